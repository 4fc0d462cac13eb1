r"""One particle of a vectorised run once more, by itself: does it have the same densities?

Under particles a model that counts dims from the left, or by size, means something else than with one
particle: ``softmax(h, 1)``, ``mean(0)``, ``z[:, 0]``, a bare ``squeeze()``. Where the shapes happen to fit,
nothing fails and all log-weights are wrong. So one particle of a pair's first vectorised run is taken out,
its latent values are given to guide and model without the particle dim, and the log densities of both runs
are compared, site by site in the order in which they ran.

The indices of a plate that have a weight each get different particles: any of them together are a joint
value, if the indices are independent. So an index whose density depends on the latents of others, for which
there is no weight, shows as well. On two levels the same holds of the indices of a local plate and the local
particles.

What differs by itself is no evidence: layers that draw their own noise (dropout), models that count their
calls, computations so ill-conditioned that rounding shows. A difference is therefore held against that
between two runs of the single particle, with other random numbers and with its values moved by a few
roundings, and counts where it is a hundred times as large. Draws from few values may happen to be the same
twice, so there are several such runs before a difference counts.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .compared import (
    FAILURES,
    ROUNDING,
    Difference,
    accuracy,
    beyond_noise,
    by_name,
    copy_of,
    difference_of,
    given_latents,
    largest,
    read_aside,
    scored,
)
from .guide_values import ids_of
from .indices import Kept, dependent_indices, no_plates, shuffled
from .latents import own_frames, own_shape
from .messages import latent_sites
from .minibatches import OneMinibatch
from .sites import Site
from .traces import Pair, Traces, is_transformed, trace_particle

__all__ = ["Alone"]


class Alone:
    """A particle of a vectorised run, to be run by itself.

    It is the middle one: a wrong index from the left or the right most often takes the first or the last.

    Arguments:
        pair: the pair and its arguments.
        traces: the traces of the run, as it was made: with or without gradients.
        minibatch: the subsamples that it drew, by the name of their plate.
        kept: names, given all sites, the plates whose indices have a weight each.
    """

    def __init__(self, pair: Pair, traces: Traces, minibatch: dict[str, Any], kept: Kept) -> None:
        self._pair = pair
        self._traces = traces
        self._minibatch = minibatch
        self._particle = traces.num_particles // 2
        self._gradients = torch.is_grad_enabled()
        self._sites: list[Site] | None = None
        self._together: list[Site] | None = None
        self._keep = kept
        self._kept: frozenset[str] = frozenset()

    def run(self) -> bool:
        """Run it; whether that is possible."""
        self._together = self._read_together()
        if self._together is not None:
            with suppress(*FAILURES):  # the run's own reading says it
                self._kept = frozenset(self._keep(self._together))
        self._sites = self._read_again(move=0.0)
        return self._sites is not None

    def compare(self) -> bool:
        """Compare its densities with those it has among the others.

        Returns:
            Whether something can be said of all of its sites.

        Raises:
            ValueError: if the particles' densities depend on one another; the first such site is named.
        """
        if self._sites is None or self._together is None:
            return False
        alone, together = by_name(self._sites), by_name(self._together)
        differences = {}
        for key, site in together.items():
            if key in alone:
                difference = difference_of(site, self._values(site), self._values(alone[key]))
                if difference is not None:
                    differences[key] = difference
        if not differences:
            return True

        def again() -> dict[Any, Tensor] | None:
            sites = self._read_again(move=ROUNDING)
            return None if sites is None else {key: self._values(s) for key, s in by_name(sites).items()}

        suspects = {key: each for key, each in differences.items() if self._is_inverse_exact(together[key])}
        clear = beyond_noise(suspects, lambda key: self._values(alone[key]), again) or {}
        for key, difference in clear.items():
            site = together[key]
            if self._kept:  # is it the same particle for all indices that differs?
                straight = Alone(self._pair, self._traces, self._minibatch, no_plates)
                if straight.run():
                    straight.compare()
                raise ValueError(dependent_indices(site, self._kept, difference))
            raise ValueError(self._message(site, difference))
        return False

    def _read_together(self) -> list[Site] | None:
        """The sites of the vectorised run, read off a copy of its traces.

        As the run itself reads them, with or without gradients: distributions keep what they have evaluated
        (Pyro's rejection samplers, transforms), and will give it out again.
        """
        traces = self._traces._replace(pairs=[copy_of(self._traces.pairs[0])])
        with torch.set_grad_enabled(self._gradients):
            return read_aside(traces)

    def _read_again(self, move: float) -> list[Site] | None:
        """The sites of a run of the particle by itself."""
        # Without particles' dims the first free one lies further to the right.
        enum_dim = self._traces.local_dim or self._traces.particle_dim if self._traces.enum_dim else None
        if ids_of(self._traces.pairs[0].guide):
            enum_dim = self._traces.enum_dim  # where values given to the model have theirs
        try:
            with OneMinibatch(self._minibatch):
                traced = trace_particle(self._pair, self._latents(move), enum_dim)
        except FAILURES:
            return None
        self._fill_in(traced.guide)
        return read_aside(Traces([traced], 1, None, enum_dim))

    def _latents(self, move: float) -> dict[str, Tensor]:
        """The particle's latent values, as they are without the particle dim."""
        guide = self._traces.pairs[0].guide
        return given_latents(guide, lambda site, read: self._take(site, read(site)), move)

    def _take(self, site: Any, value: Tensor) -> Tensor:
        """A latent site's value, or a tensor of its shape, without the particle dim."""
        assert self._traces.particle_dim is not None
        event_dim, nesting = getattr(site["fn"], "event_dim", 0), -self._traces.particle_dim - 1
        value = self._one_in_each(value, site["cond_indep_stack"], event_dim)
        size = self._traces.num_particles
        if value.dim() - event_dim > nesting + 1:  # of each of the values that the guide enumerates
            dim = -nesting - 1 - event_dim
            return value.narrow(dim, self._particle if value.shape[dim] > 1 else 0, 1).clone()
        return own_shape(value, event_dim, own_frames(site), nesting, size)[self._particle].clone()

    def _one_in_each(self, tensor: Tensor, frames: Any, event_dim: int = 0) -> Tensor:
        """Another particle for each index that has a weight of its own, on a particle dim of size 1."""
        dims = [
            (self._traces.local_dim, frozenset(self._traces.local)),
            (self._traces.particle_dim, self._kept),
        ]
        for dim, plates in dims:
            if dim is not None and plates and tensor.dim() >= event_dim - dim:
                tensor = _one_in_each(tensor, dim - event_dim, plates, frames, event_dim)
        return tensor

    def _fill_in(self, guide: Trace) -> None:
        """Give sites that cannot be scored here (flows without an inverse) the density that they had."""
        before = self._traces.pairs[0].guide.nodes
        for name, site in latent_sites(guide).items():
            if is_transformed(site["fn"]) and name in before:
                known: Any = before[name].get("unscaled_log_prob")
                try:
                    site["unscaled_log_prob"] = site["fn"].log_prob(site["value"])
                except FAILURES:
                    if known is not None:
                        site["unscaled_log_prob"] = self._select(known, site["cond_indep_stack"])

    def _select(self, density: Tensor, frames: Any) -> Tensor:
        """The particle's part of a log density of all, or one of its own as it is."""
        dim = self._traces.particle_dim
        assert dim is not None
        density = self._one_in_each(density, frames)
        if density.dim() >= -dim:
            density = density.select(dim, self._particle if density.shape[dim] > 1 else 0)
        local_dim = self._traces.local_dim
        if local_dim is not None and density.dim() >= -local_dim:
            density = density.squeeze(local_dim)
        return density

    def _values(self, site: Site) -> Tensor:
        return self._select(scored(site), site.frames)

    def _is_inverse_exact(self, site: Site) -> bool:
        """Whether a transformed distribution scores the values it has made as it does those it has not."""
        fn = site.message["fn"]
        if site.role == "model" or not is_transformed(fn):
            return True
        try:
            uncached = self._select(fn.log_prob(site.message["value"].clone()), site.frames)
        except FAILURES:
            return False
        cached = self._select(site.log_prob, site.frames)
        return largest(cached, uncached, (accuracy(cached, uncached), 1.0)) is None

    def _message(self, site: Site, difference: Difference) -> str:
        number, dim = self._traces.num_particles, self._traces.particle_dim
        local = "".join(
            f" Or an index of plate {frame.name!r} depends on latents of others (z.mean(-1), z.roll(1, -1)), "
            "however the particles run: then there is no local weight for each index. Sample such "
            "latents outside of the plate, or use a bound with one joint weight (IWAE_ELBO with plates=())."
            for frame in site.frames
            if frame.name in self._traces.local
        )
        return (
            f"Particles are not independent of one another at site {site}: the log density of one of them is "
            f"{difference.together:.6g} when {number} run in one pass, but {difference.alone:.6g} when it "
            "runs by itself, so the importance weights would be wrong. What is computed for that site counts "
            "dims from the left or by size (softmax(h, 1), mean(0), cat(..., 0), z[:, 0], a bare squeeze()), "
            f"which under particles (on dim {dim}) are other dims, or takes statistics over all of a batch. "
            "Count dims from the right (softmax(h, -1), z[..., 0]), or pass vectorize_particles=False to run "
            f"the particles one by one.{local}"
        )


def _one_in_each(tensor: Tensor, dim: int, plates: frozenset[str], frames: Any, event_dim: int) -> Tensor:
    """Gather one particle, another one for each index of some plates, with a particle dim of size 1."""
    number, size = tensor.shape[dim], list(tensor.shape)
    size[dim] = 1
    index = number // 2 + shuffled(tensor, number, plates, frames, event_dim)
    return tensor.gather(dim, (index % number).expand(size))
