"""Whether two runs of an importance sampler are of one posterior, so that their particles make one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from .samples import ImportanceSamples

__all__ = ["check_mergeable"]


def check_mergeable(one: ImportanceSamples, other: ImportanceSamples) -> None:
    """Refuse two runs whose particles are not of one posterior."""

    def refuse(what: str) -> None:
        raise ValueError(f"These two runs cannot be merged: {what}. Merge runs of one sampler on one data.")

    if type(other) is not type(one):
        refuse(f"the other is a {type(other).__name__}")
    if one.is_smoothed or other.is_smoothed:
        refuse("weights are smoothed within a run; merge first, then call smoothed()")
    mine, theirs = one.rerun.pair, other.rerun.pair
    if mine.model != theirs.model or mine.guide != theirs.guide:
        refuse("they are of different models or guides")
    if one._cells() != other._cells():
        refuse(f"the kept plates are {one._cells()} in one and {other._cells()} in the other")
    shapes, others = ({n: tuple(v.shape[1:]) for n, v in run.values.items()} for run in (one, other))
    if shapes != others:
        refuse(f"the latent sites are {shapes} in one and {others} in the other")
    if not _same(mine.args, theirs.args) or not _same(mine.kwargs, theirs.kwargs):
        refuse("the arguments differ, and with them the data")
    if not _same(one.rerun.minibatch.indices, other.rerun.minibatch.indices):
        refuse("a subsampled plate drew different minibatches; pass subsample= to the plate")


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, tensors by value."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return (
            both
            and one.shape == other.shape
            and bool(((one == other) | ((one != one) & (other != other))).all())
        )
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and not isinstance(one, str) and isinstance(other, Sequence):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
