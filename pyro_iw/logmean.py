"""Means of weights that are given by their logarithms, with and without one of them.

Everything here is finite wherever it can be: particles at -inf count for nothing, and leaving out a particle
that dominates keeps the others to full precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "exclusive_logsumexp",
    "leave_one_out_logmeanexp",
    "leave_one_out_mean",
    "logmeanexp",
    "replaced_logmeanexp",
    "softmax",
    "without_dead",
]


def leave_one_out_mean(log_w: Tensor) -> Tensor:
    """For each particle the mean of the log-weights of its group's others, of the shape of ``log_w``.

    Others at -inf are left out of the mean; it is -inf where there are no more.
    """
    alive = log_w != -math.inf
    total = log_w.masked_fill(~alive, 0.0)
    count = alive.sum(1, keepdim=True) - alive.to(torch.int64)
    mean = (total.sum(1, keepdim=True) - total) / count.clamp(min=1)
    return mean.masked_fill(count == 0, -math.inf)


def leave_one_out_logmeanexp(log_w: Tensor, dim: int = 1) -> Tensor:
    """For each particle the logarithm of the mean weight of the others along ``dim``, in O(K) memory."""
    return exclusive_logsumexp(log_w, dim) - math.log(log_w.shape[dim] - 1)


def logmeanexp(log_w: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Logarithm of the mean of the exponentials; -inf where all are -inf."""
    dims = (dim,) if isinstance(dim, int) else dim
    count = math.prod(log_w.shape[d] for d in dims)
    return torch.logsumexp(log_w, dims) - math.log(count)


def exclusive_logsumexp(log_w: Tensor, dim: int) -> Tensor:
    """logsumexp of all entries along ``dim`` but the own one, by sums from either side.

    Subtracting the own weight from the total would lose the others where it dominates.
    """
    nothing = torch.full_like(log_w.narrow(dim, 0, 1), -math.inf)
    size = log_w.shape[dim]
    before = torch.logcumsumexp(log_w, dim).narrow(dim, 0, size - 1)
    after = torch.logcumsumexp(log_w.flip(dim), dim).flip(dim).narrow(dim, 1, size - 1)
    return torch.logaddexp(torch.cat([nothing, before], dim), torch.cat([after, nothing], dim))


def replaced_logmeanexp(log_w: Tensor, replacement: Tensor, dim: int) -> Tensor:
    """logmeanexp along ``dim`` with each entry replaced in turn, of the shape of ``log_w``."""
    others = exclusive_logsumexp(log_w, dim)
    return torch.logaddexp(others, replacement) - math.log(log_w.shape[dim])


def softmax(log_w: Tensor, dim: int) -> Tensor:
    """Weights normalised along ``dim``; 0 for particles at -inf."""
    return without_dead(torch.softmax(log_w, dim), log_w)


def without_dead(weights: Tensor, log_w: Tensor) -> Tensor:
    """Zero the weights of particles at -inf, where a softmax of nothing but -inf is NaN."""
    return weights.masked_fill(log_w == -math.inf, 0.0)
