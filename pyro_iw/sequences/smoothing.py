r"""Backward sampling: trajectories that pick, from the last step to the first, among all particles of a step.

A trajectory that has picked :math:`\tilde z_{t+1}` picks particle k of step t by

.. math:: w_{t,k}\, p(\tilde z_{t+1}, x_{t+1} \mid h_{t,k}),

which is its weight in :math:`p(z_t \mid \tilde z_{t+1}, x)` if the state after step t + 1 is the same
whichever particle it came from. That is looked at, and refused where it does not hold. The densities come
from the model's own ``step``, run once for all pairs of a trajectory and a particle.

References:
    | Monte Carlo Smoothing for Nonlinear Time Series (Godsill et al., 2004)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from .._support.nested import map_leaves
from ..logmean import softmax
from ..resampling import multinomial
from ..tracing.handlers import GivenValues
from ..tracing.latents import Latent, place
from ..tracing.messages import latent_sites
from ..tracing.minibatches import OneMinibatch
from ..tracing.particles import Particles, collect
from ..tracing.traces import PARTICLE_PLATE, Traces
from .probing import Known
from .protocol import Protocol, Sequences, march, moment_name
from .state import Copies, FilterState, Leaf, in_words

__all__ = ["Past", "attributes_of", "smooth"]

#: What modules keep their parameters and one another in.
_LEARNT = ("_parameters", "_modules")

#: Pairs of a trajectory and a particle that the model runs on at once.
_AT_ONCE = 1 << 16


class Past(NamedTuple):
    """What there was at every step of a filter.

    Attributes:
        pair: the pair.
        sequences: the arguments.
        known: what is known of the pair.
        latents: latent sites.
        states: the state after the step.
        attributes: those of model and guide after the step, which may count steps.
    """

    pair: Protocol
    sequences: Sequences
    known: Known
    latents: list[dict[str, Latent]]
    states: list[FilterState]
    attributes: list[list[dict[str, Any]]]


@torch.no_grad()
def smooth(past: Past, weights: Tensor, num_samples: int) -> list[Tensor]:
    """Indices of particles for each step, ``[n, *cells]``, by backward sampling.

    Arguments:
        past: what there was.
        weights: of the particles after each step, ``[T, S, *cells]``.
        num_samples: the number n of trajectories.

    Raises:
        NotImplementedError: if the state of a step depends on more than its latents, naming the tensor; or
            the model's sites of a step are others than they were.
    """
    chosen = [multinomial(weights[-1], num_samples)]
    size = weights.shape[1]
    at_once = max(1, _AT_ONCE // size)
    with OneMinibatch(), _attributes_restored(past.pair):
        for t in range(len(weights) - 2, -1, -1):
            picked = [
                _pick(past, weights[t], t, part)
                for part in chosen[-1].split(at_once)  # of some trajectories
            ]
            chosen.append(torch.cat(picked))
    return chosen[::-1]


def _pick(past: Past, weights: Tensor, t: int, following: Tensor) -> Tensor:
    """Particles of step t, ``[n, *cells]``, given those of the next step."""
    size, count = len(weights), len(following)
    particles, state = _run_step(past, t, following, size)
    log_p = particles.log_p.reshape(count, size, *weights.shape[1:])
    _check_markov(past, t, state, count, size)
    log_b = weights.log() + log_p
    drawn = multinomial(softmax(log_b, 1).movedim(1, 0), 1)  # [1, n, *cells]
    return drawn[0]


def _run_step(past: Past, t: int, following: Tensor, size: int) -> tuple[Particles, FilterState]:
    """The next step of all particles with the latents of all trajectories, the trajectories first."""
    known, count = past.known, len(following)
    spread = torch.arange(size, device=following.device).repeat(count)
    state = past.states[t].snapshot(Copies())
    state.change(lambda leaf, tensor: tensor.index_select(0, spread) if known.carries(t, leaf) else tensor)
    state._num_particles = size * count
    values = {name: _values(latent, following, known, size) for name, latent in past.latents[t + 1].items()}
    for part, attributes in zip(past.pair, past.attributes[t], strict=True):
        _attributes(part).update(_copied(Copies(), attributes))
    dim = -1 - known.nesting
    plate = pyro.plate(PARTICLE_PLATE, size * count, dim=dim)
    with GivenValues(values):
        _, traced = next(march(past.pair, past.sequences, state, enclose=plate, moments=[t + 1]))
    found = [name for name in latent_sites(traced.model) if name in latent_sites(traced.guide)]
    if set(found) != set(values):
        raise NotImplementedError(
            f"At {moment_name(t + 1)} the latent sites are {found}, and were {list(values)} when the "
            "sequence was filtered. Let them depend on the state and the arguments alone."
        )
    return collect(Traces([traced], size * count, dim), known.plates), state


def _values(latent: Latent, following: Tensor, known: Known, size: int) -> Tensor:
    """Values that the trajectories have picked, once for every particle, under all dims of the plates."""
    frames = [frame for frame in latent.frames if frame.name in known.plates]
    frames.sort(key=lambda frame: frame.dim or 0)
    values, event_dim = latent.values, latent.event_dim
    rank = values.dim() - 1 - event_dim
    placed = place(following, frames, rank, event_dim)
    shape = torch.broadcast_shapes(placed.shape[1:], values.shape[1:])
    picked = values.expand(len(values), *shape).gather(0, placed.expand(len(placed), *shape))
    picked = picked.repeat_interleave(size, 0)
    return picked.reshape(len(picked), *[1] * (known.nesting - rank), *picked.shape[1:])


def _check_markov(past: Past, t: int, state: FilterState, count: int, size: int) -> None:
    """Refuse a state that depends on the particle it came from."""

    def look(leaf: Leaf, tensor: Tensor) -> Tensor:
        if past.known.carries(t + 1, leaf):
            each = tensor.reshape(count, size, *tensor.shape[1:])
            first = each[:, :1].expand_as(each)
            same = (
                torch.allclose(each, first, equal_nan=True)
                if each.is_floating_point()
                else torch.equal(each, first)
            )
            if not same:
                raise NotImplementedError(
                    f"{in_words(leaf)} after {moment_name(t + 1)} depends on more than the latents of that "
                    "step, so what follows depends on where a trajectory came from, and the density of "
                    "going from one particle to another is not that of a step. Smooth models whose state "
                    "is made of the latest latents (delete what is not read again), or take trajectories() "
                    "along the genealogy."
                )
        return tensor

    state.change(look)


@contextmanager
def _attributes_restored(pair: Protocol) -> Iterator[None]:
    """Put the attributes of model and guide back at the end: the very same objects, which others may hold."""
    before = [dict(_attributes(part)) for part in pair]
    try:
        yield
    finally:
        for part, attributes in zip(pair, before, strict=True):
            _attributes(part).update(attributes)


def attributes_of(copies: Copies, *parts: Any) -> list[dict[str, Any]]:
    """What is stored in objects now, buffers included: copies of containers and tensors, parameters aside."""
    return [_copied(copies, _attributes(part)) for part in parts]


def _copied(copies: Copies, attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if name in _LEARNT else map_leaves(lambda leaf: _copy(copies, leaf), value)
        for name, value in attributes.items()
    }


def _copy(copies: Copies, leaf: Any) -> Any:
    """What steps may write into: no parameters, which are themselves and not their values."""
    return leaf if isinstance(leaf, Tensor) and leaf.requires_grad else copies(leaf)


def _attributes(part: Any) -> dict[str, Any]:
    return getattr(part, "__dict__", {})
