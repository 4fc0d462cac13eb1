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
    "logmeanexp_difference",
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
    """logsumexp of all entries along ``dim`` but the own one.

    From the total the own share is taken away, which loses no digits below a half of it. Above is the largest
    entry at most, and the others are added up for it.
    """
    total = log_w.logsumexp(dim, keepdim=True)
    top = log_w.argmax(dim, keepdim=True)
    others = torch.log1p(-softmax(log_w, dim)) + total
    rest = log_w.scatter(dim, top, -math.inf).logsumexp(dim, keepdim=True)
    return others.scatter(dim, top, rest)


def logmeanexp_difference(log_w: Tensor, replacement: Tensor, dim: int) -> Tensor:
    r"""logmeanexp along ``dim`` less that with each entry replaced in turn, of the shape of ``log_w``.

    .. math:: -\log(1 + c_i), \qquad c_i = \frac{e^{r_i} - e^{\ell_i}}{\sum_j e^{\ell_j}}
        = s_i\, (e^{r_i - \ell_i} - 1),

    to the relative precision of its arguments' differences, where subtracting the two logarithms would keep
    none of the digits of a result of the size 1 / K. (Where :math:`c_i` is not small, they are subtracted.)
    """
    total = log_w.logsumexp(dim, keepdim=True)
    rise = replacement - log_w
    change = torch.where(
        rise > 0, -(replacement - total).exp() * torch.expm1(-rise), (log_w - total).exp() * torch.expm1(rise)
    )
    close = change.abs() < 0.5
    apart = total - torch.logaddexp(exclusive_logsumexp(log_w, dim), replacement)
    return torch.where(close, -torch.log1p(change.masked_fill(~close, 0.0)), apart)


def softmax(log_w: Tensor, dim: int) -> Tensor:
    """Weights normalised along ``dim``; 0 for particles at -inf."""
    return without_dead(torch.softmax(log_w, dim), log_w)


def without_dead(weights: Tensor, log_w: Tensor) -> Tensor:
    """Zero the weights of particles at -inf, where a softmax of nothing but -inf is NaN."""
    return weights.masked_fill(log_w == -math.inf, 0.0)
