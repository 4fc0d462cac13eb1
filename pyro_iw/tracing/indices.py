r"""Particles that run one by one: does each index of a plate have a weight of its own?

It has if its densities do not depend on the latents of other indices. Then some indices may as well have the
latents of another particle: any of them together are a joint value, of which each index has the densities
that it had. What differs by itself is no evidence, as in :mod:`~pyro_iw.tracing.alone`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .compared import (
    FAILURES,
    ROUNDING,
    Difference,
    beyond_noise,
    by_name,
    copy_of,
    difference_of,
    given_latents,
    read_aside,
    scored,
)
from .minibatches import OneMinibatch
from .sites import Site
from .traces import Pair, PairTraces, Traces, trace_particle

__all__ = ["Kept", "check_indices", "dependent_indices", "no_plates", "shuffled"]

#: Odd. Of 150 chosen at random the one by which the fewest rolls, lags, reversals and transpositions of up to
#: 60 indices leave each index its particle, for 2 to 9 particles.
_MIXING = 4286255503

#: Names, given the sites of a pair, the plates whose indices have an importance weight each.
Kept = Callable[[list[Site]], Iterable[str]]


def no_plates(sites: list[Site]) -> Iterable[str]:
    """None of them."""
    return ()


def dependent_indices(site: Site, kept: frozenset[str], difference: Difference) -> str:
    """What is wrong with a site whose indices have other densities beside other latents of the others."""
    plates = " and ".join(repr(frame.name) for frame in site.frames if frame.name in kept)
    return (
        f"The indices of plate {plates} are not independent of one another at site {site}: the log density "
        f"of an index is {difference.together:.6g} beside the others' latents as they were drawn, but "
        f"{difference.alone:.6g} beside other draws of them (as z.mean(-1), z.roll(1, -1) make it). Each "
        "index has an importance weight of its own, which then does not exist. Sample such latents outside "
        "of the plate, or pass plates=() for one joint weight."
    )


def check_indices(pair: Pair, traces: Traces, minibatch: dict[str, Any], kept: Kept) -> None:
    """Run a particle whose latents are those of two others, and compare its densities with theirs.

    Arguments:
        pair: the pair and its arguments.
        traces: the traces of particles that ran one by one.
        minibatch: the subsamples that they share, by the name of their plate.
        kept: names, given all sites, the plates whose indices have a weight each.

    Raises:
        ValueError: if an index of these plates depends on the latents of others; the first site is named.
    """
    enum_dim = traces.enum_dim
    two = [read_aside(Traces([copy_of(traced)], 1, None, enum_dim)) for traced in traces.pairs[:2]]
    plates: frozenset[str] = frozenset()
    if two[0] is not None:
        with suppress(*FAILURES):  # the run's own reading says it
            plates = frozenset(kept(two[0]))
    if not plates or None in two:
        return

    def run(pairs: list[PairTraces], move: float = 0.0) -> dict[Any, Site]:
        try:
            with OneMinibatch(minibatch):
                traced = trace_particle(pair, _by_turns(pairs, plates, move), enum_dim)
        except FAILURES:
            return {}
        return by_name(read_aside(Traces([traced], 1, None, enum_dim)) or [])

    first, second = (by_name(sites or []) for sites in two)
    mixed = run(traces.pairs[:2])
    suspects = {}
    for key in [key for key in first if key in second and key in mixed]:
        drawn = _turns(scored(first[key]), scored(second[key]), first[key].frames, plates)
        found = difference_of(first[key], drawn, scored(mixed[key]))
        if found is not None:
            suspects[key] = found

    def again() -> dict[Any, Tensor]:
        return {key: scored(site) for key, site in run(traces.pairs[:1], ROUNDING).items()}

    for key, found in (beyond_noise(suspects, lambda key: scored(first[key]), again) or {}).items():
        raise ValueError(dependent_indices(first[key], plates, found))


def _by_turns(pairs: list[PairTraces], plates: frozenset[str], move: float) -> dict[str, Tensor]:
    """Latent values, those of the first pair at some indices and of the last at the others."""
    others: Any = pairs[-1].guide.nodes

    def take(site: Any, read: Callable[[Any], Tensor]) -> Tensor | None:
        if site["name"] not in others:
            return None
        event_dim = getattr(site["fn"], "event_dim", 0)
        return _turns(read(site), read(others[site["name"]]), site["cond_indep_stack"], plates, event_dim)

    return given_latents(pairs[0].guide, take, move)


def _turns(one: Tensor, other: Tensor, frames: Any, plates: frozenset[str], event_dim: int = 0) -> Tensor:
    """The one tensor at some indices of the plates, the other at the rest; a new tensor."""
    return torch.where(shuffled(one, 2, plates, frames, event_dim) == 0, one, other)


def shuffled(tensor: Tensor, number: int, plates: frozenset[str], frames: Any, event_dim: int = 0) -> Tensor:
    """Which of a number of particles each index of the plates around a tensor gets.

    The first indices get different ones, and those after them one each by :math:`n^2 c \\bmod 2^{32}`: in an
    order that repeats itself after no lag, nor from the other end, nor in another plate.

    Returns:
        Integers below that number, in a shape that broadcasts with the tensor.
    """
    place = torch.zeros([1] * tensor.dim(), dtype=torch.long, device=tensor.device)
    for frame in frames:
        if frame.name in plates and frame.dim is not None and tensor.dim() >= event_dim - frame.dim:
            shape = [1] * tensor.dim()
            shape[frame.dim - event_dim] = -1
            size = tensor.shape[frame.dim - event_dim]
            stride = 7 ** (-1 - frame.dim)
            place = place + stride * torch.arange(size, device=tensor.device).reshape(shape)
    mixed = (place**2 * _MIXING & 0xFFFFFFFF) * number >> 32
    return torch.where(place < number, place, mixed)
