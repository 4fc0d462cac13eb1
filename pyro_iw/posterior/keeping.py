"""Particles that are kept with their densities, where a call of the sampler is to give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tracing.latents import Latent, join, read_latents
from ..tracing.levels import TwoLevels
from ..tracing.local_latents import read_local_latents
from ..tracing.particles import Particles
from ..tracing.traces import Traces
from .hierarchical_samples import HierarchicalSamples
from .local_weights import LocalWeights, join_local
from .predictive import Rerun
from .samples import ImportanceSamples

__all__ = ["Kept", "keep"]


class Kept(NamedTuple):
    """Particles, kept with their densities.

    Attributes:
        latents: by site, ``[S, *batch, *event]``.
        log_p: ``[S, *cells]``.
        log_q: likewise.
        local: the local particles by their plate.
        traces: those of one of the runs.
        particles: what was read off those.
        dead: the first site at which one has zero density.
    """

    latents: dict[str, Latent]
    log_p: Tensor
    log_q: Tensor
    local: dict[str, LocalWeights]
    traces: Traces
    particles: Any
    dead: str | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Kept:
        """The same with a function applied to all that has a row for each particle."""
        return self._replace(
            latents={
                name: latent._replace(values=function(latent.values)) for name, latent in self.latents.items()
            },
            log_p=function(self.log_p),
            log_q=function(self.log_q),
            local={
                name: level._replace(log_p=function(level.log_p), log_q=function(level.log_q))
                for name, level in self.local.items()
            },
        )

    def shapes(self) -> dict[str, tuple]:
        """Of one row of everything that has one for each particle."""
        found = {f"latent site {name!r}": latent.values for name, latent in self.latents.items()}
        found["log_p"] = self.log_p
        found |= {f"plate {name!r}": level.log_p for name, level in self.local.items()}
        return {name: (tuple(values.shape[1:]), str(values.dtype)) for name, values in found.items()}

    def as_samples(self, rerun: Rerun) -> ImportanceSamples:
        """What a user gets to see of them."""
        found = self.latents, self.log_p, self.log_q, self.particles.plates, rerun
        return HierarchicalSamples(*found, self.local) if self.local else ImportanceSamples(*found)


def keep(drawn: Iterable[tuple[Particles | TwoLevels, Traces, str | None]]) -> Kept:
    """Particles that come in chunks, with their traces and first sites of zero density, side by side."""
    chunks: list[Any] = []
    latents = []
    dead = None
    for particles, traces, dead_here in drawn:
        _refuse_values(particles)
        chunks.append(particles)
        latents.append(read_local_latents(traces) if traces.local else read_latents(traces))
        dead = dead or dead_here
    tops: list[Particles] = [chunk.top for chunk in chunks] if traces.local else chunks
    log_p, log_q = (torch.cat([getattr(top, name) for top in tops]) for name in ("log_p", "log_q"))
    local = join_local(chunks) if traces.local else {}
    return Kept(join(latents, len(log_p)), log_p, log_q, local, traces, particles, dead)


def _refuse_values(particles: Particles | TwoLevels) -> None:
    """Refuse particles that stand for all values of a site, and so are no draws of the latents."""
    names = ", ".join(dict.fromkeys(repr(site.name) for site in particles.enumerated))
    if names:
        raise NotImplementedError(
            f"Site(s) {names} are enumerated in the guide, so a particle holds all of their values, and "
            "there are no draws to keep. log_marginal sums over the values; for draws sample them in the "
            "guide (without infer={'enumerate': 'parallel'}), or leave them out of the guide and enumerate "
            "them in the model."
        )
