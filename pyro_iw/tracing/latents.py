"""Values of latent sites, by particle and cell.

Under particles a site's value has the batch dims of all plates of the pair, its own or not, between the
particles and its events. Here it has its own alone, as it would have with one particle, and particles in
front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .enumeration import is_enumerated
from .messages import is_latent
from .traces import Traces, is_of_particles

__all__ = [
    "Enumerated",
    "Latent",
    "cat",
    "enumerated_sites",
    "join",
    "own_frames",
    "own_shape",
    "place",
    "read_latents",
]


class Latent(NamedTuple):
    """Values of a latent site.

    Attributes:
        values: of shape ``[S, *batch, *event]``, where batch starts at the outermost plate around the site.
        event_dim: its number of event dims.
        frames: the plates around it.
    """

    values: Tensor
    event_dim: int
    frames: tuple[CondIndepStackFrame, ...]


def read_latents(traces: Traces) -> dict[str, Latent]:
    """The latent sites of the model that the guide has sampled.

    Raises:
        ValueError: as :func:`join`.
    """
    nesting = 0 if traces.particle_dim is None else -traces.particle_dim - 1
    size = None if traces.particle_dim is None else traces.num_particles
    found = []
    for pair in traces.pairs:
        nodes: dict[str, Any] = dict(pair.model.nodes)
        latents = {}
        for name, site in nodes.items():
            if is_latent(site) and name in pair.guide.nodes:
                event_dim, frames = site["fn"].event_dim, own_frames(site)
                values = own_shape(site["value"], event_dim, frames, nesting, size)
                latents[name] = Latent(values, event_dim, frames)
        found.append(latents)
    return join(found, traces.num_particles)


class Enumerated(NamedTuple):
    """A site that is summed out.

    Attributes:
        event_dim: its number of event dims.
        frames: the plates around it.
    """

    event_dim: int
    frames: tuple[CondIndepStackFrame, ...]


def enumerated_sites(traces: Traces) -> dict[str, Enumerated]:
    """The model's sites that are summed out."""
    pair = traces.pairs[0]
    sites: dict[str, Any] = dict(pair.model.nodes)
    return {
        name: Enumerated(site["fn"].event_dim, own_frames(site))
        for name, site in sites.items()
        if is_enumerated(name, site, pair.guide)
    }


def cat(parts: Sequence[Latent]) -> Latent:
    """The particles of several runs as one."""
    return parts[0]._replace(values=torch.cat([part.values for part in parts]))


def join(chunks: Sequence[dict[str, Latent]], num_particles: int) -> dict[str, Latent]:
    """The particles of several chunks as one.

    Raises:
        ValueError: if a site is not there for every particle, or differs in shape; naming it.
    """
    joined = {}
    for name in dict.fromkeys(name for chunk in chunks for name in chunk):
        parts = [chunk[name] for chunk in chunks if name in chunk]
        alike = len({tuple(part.values.shape[1:]) for part in parts}) == 1
        if not alike or sum(len(part.values) for part in parts) != num_particles:
            raise ValueError(
                f"Latent site {name!r} is not there for every particle, or not of one shape, so its values "
                "cannot be kept side by side. log_marginal does not need to and works for such models."
            )
        joined[name] = cat(parts)
    return joined


def own_frames(site: Any) -> tuple[CondIndepStackFrame, ...]:
    """The vectorised plates around a site, that over particles aside."""
    frames = site["cond_indep_stack"]
    return tuple(frame for frame in frames if frame.vectorized and not is_of_particles(frame))


def own_shape(
    values: Tensor, event_dim: int, frames: Sequence[CondIndepStackFrame], nesting: int, size: int | None
) -> Tensor:
    """Values in the shape ``[S, *batch, *event]``.

    Arguments:
        values: of shape ``[S, *plates, *event]``, dims on the left left out where they do not vary; or, for
            one particle, of shape ``[*batch, *event]``.
        event_dim: their number of event dims.
        frames: the plates around the site.
        nesting: the number of dims that all plates of the pair take.
        size: the number of particles; None if they are of one particle and have no dim for it.
    """
    event = tuple(values.shape[values.dim() - event_dim :])
    batch = tuple(values.shape[: values.dim() - event_dim])
    particles = 1
    if size is not None:
        batch = (1,) * (nesting + 1 - len(batch)) + batch
        particles, batch = batch[0], batch[1:]
    rank = max((-frame.dim for frame in frames if frame.dim is not None), default=0)
    while len(batch) > rank and batch[0] == 1:
        batch = batch[1:]
    values = values.reshape(particles, *batch, *event)
    return values if size is None else values.expand(size, *batch, *event)


def place(per_cell: Tensor, frames: Sequence[CondIndepStackFrame], rank: int, event_dim: int) -> Tensor:
    """Put ``[n, *cells]`` at the cells' own dims among ``rank`` batch dims and ``event_dim`` event dims."""
    shape = [1] * rank
    for frame, size in zip(frames, per_cell.shape[1:], strict=True):
        assert frame.dim is not None
        shape[frame.dim] = size
    return per_cell.reshape(len(per_cell), *shape, *[1] * event_dim)
