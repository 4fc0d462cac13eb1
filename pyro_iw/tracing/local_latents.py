r"""Values of latent sites on two levels: of particles and, in a local plate, of the local ones of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .latents import Latent, join, own_frames, own_shape
from .local_particles import local_plate_of
from .messages import is_latent
from .traces import Traces

__all__ = ["read_local_latents"]


def read_local_latents(traces: Traces) -> dict[str, Latent]:
    """The latent sites of the model that the guide has sampled, under local particles.

    Returns:
        Their values, of shape ``[S, *batch, *event]`` outside of the local plates, and inside of one
        ``[S, L, *batch, *event]``.

    Raises:
        ValueError: as :func:`~pyro_iw.tracing.latents.join`.
    """
    size, runs = traces.num_particles, max(traces.local.values())
    found: dict[str, list[Latent]] = {}
    numbers: dict[str, int | None] = {}
    for run, pair in enumerate(traces.pairs):
        nodes: dict[str, Any] = dict(pair.model.nodes)
        for name, site in nodes.items():
            if not is_latent(site) or name not in pair.guide.nodes:
                continue
            event_dim, frames = site["fn"].event_dim, own_frames(site)
            plate = local_plate_of(name, frames, traces.local)
            numbers[name] = None if plate is None else traces.local[plate]
            number = numbers[name] or 1
            if traces.local_dim is not None:
                nesting = -traces.local_dim - 1
                values = _side_by_side(site["value"], size, number, nesting + event_dim)
                values = own_shape(values, event_dim, frames, nesting, size * number)
            elif run % runs < number:  # the runs of a particle stand side by side
                values = own_shape(site["value"], event_dim, frames, 0, None)
            else:
                continue
            found.setdefault(name, []).append(Latent(values, event_dim, frames))
    latents = {}
    for name, parts in found.items():
        count = numbers[name]
        latent = join([{name: part} for part in parts], size * (count or 1))[name]
        if count is not None:
            latent = latent._replace(values=latent.values.reshape(size, count, *latent.values.shape[1:]))
        latents[name] = latent
    return latents


def _side_by_side(values: Tensor, size: int, number: int, rank: int) -> Tensor:
    """Values ``[S, L, ...]`` with that many dims behind, some of them left out, as ``[S L, ...]``."""
    values = values.reshape((1,) * (rank + 2 - values.dim()) + values.shape)
    return values.expand(size, number, *values.shape[2:]).flatten(0, 1)
