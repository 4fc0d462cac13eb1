r"""Resampling: indices of particles, drawn in proportion to their weights in every cell apart.

Both schemes invert the cumulative sum of the weights: a position :math:`p \in [0, 1)` gives the particle
:math:`i` with :math:`C_{i-1} \le p\, C_S < C_i`, where :math:`C_i = w_1 + \dots + w_i`. They are tensor
operations throughout, without a loop over particles or cells and without waiting for an accelerator. In both
the expected number of times that particle :math:`i` is drawn is :math:`n\, w_i / \sum_j w_j`.

References:
    | Monte Carlo filter and smoother for non-Gaussian nonlinear state space models (Kitagawa, 1996), for
      systematic resampling
    | Comparison of Resampling Schemes for Particle Filtering (Douc et al., 2005),
      https://arxiv.org/abs/cs/0507025
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._support.arguments import positive_integer
from ._support.devices import wide, wide_dtype

__all__ = ["multinomial", "systematic"]


def systematic(weights: Tensor, num_samples: int) -> Tensor:
    r"""Evenly spaced positions with one random offset a cell: the least noise for the draws' total.

    The positions are :math:`(u + j) / n` for :math:`j = 0, \dots, n - 1` with one uniform :math:`u`, so that
    particle :math:`i` is drawn :math:`n\, w_i / \sum_j w_j` times, rounded up or down. The draws of a cell
    are ascending and depend on one another; those of two cells do not.

    Arguments:
        weights: weights >= 0, of shape ``[S, *cells]``; they need not be normalised.
        num_samples: the number n of draws in each cell; an integer >= 1.

    Returns:
        Indices into the S particles, of shape ``[n, *cells]``. A particle of weight 0 is never drawn, except
        in a cell where all are 0, which gets its first particle throughout.

    Raises:
        ValueError: if ``num_samples`` is not an integer >= 1 or there is no particle.

    Example:
        >>> from pyro_iw.resampling import systematic
        >>> systematic(torch.tensor([[1.0, 0.0], [1.0, 3.0], [2.0, 0.0]]), 4)
        tensor([[0, 1],
                [1, 1],
                [2, 1],
                [2, 1]])
    """
    dtype = wide_dtype(weights.device)
    offsets = torch.rand((1, *weights.shape[1:]), dtype=dtype, device=weights.device)
    return systematic_at(weights, num_samples, offsets)


def systematic_at(weights: Tensor, num_samples: int, offsets: Tensor) -> Tensor:
    """:func:`systematic`, given the offsets u in [0, 1), of shape ``[1, *cells]`` and as wide as may be."""
    count = positive_integer("num_samples", num_samples)
    steps = torch.arange(count, dtype=offsets.dtype, device=weights.device)
    return _invert(weights, (offsets + steps.reshape(-1, *[1] * (weights.dim() - 1))) / count)


def multinomial(weights: Tensor, num_samples: int) -> Tensor:
    """Independent draws.

    Arguments, result and errors are those of :func:`systematic`.

    Example:
        >>> from pyro_iw.resampling import multinomial
        >>> multinomial(torch.tensor([0.0, 1.0, 0.0]), 4)
        tensor([1, 1, 1, 1])
    """
    shape = (positive_integer("num_samples", num_samples), *weights.shape[1:])
    return _invert(weights, torch.rand(shape, dtype=wide_dtype(weights.device), device=weights.device))


def _invert(weights: Tensor, positions: Tensor) -> Tensor:
    """The particles at these positions in [0, 1), of shape ``[n, *cells]``."""
    if weights.dim() == 0 or weights.shape[0] == 0:
        raise ValueError(f"weights must be of shape [S, *cells] with S >= 1, got {list(weights.shape)}")
    weights = wide(weights.detach().movedim(0, -1)).nan_to_num(nan=0.0)
    # A parallel sum need neither ascend nor stay put where a weight is 0, but what is inverted must: a
    # particle of weight 0 takes on the sum before it, and so has no position to itself.
    total = weights.cumsum(-1).masked_fill(~(weights > 0), -math.inf).cummax(-1).values
    targets = positions.movedim(0, -1) * total[..., -1:].clamp(min=0)
    indices = torch.searchsorted(total.contiguous(), targets.contiguous(), right=True)
    # Rounding can put the last position at the very end, behind all particles.
    last = torch.searchsorted(total.contiguous(), total[..., -1:].contiguous())
    # A copy with strides of its own, which contiguous() does not make of a single row. On a CPU, gather of
    # torch 2.4 and 2.5 takes its strides (1, 1) for those of an expanded index, and gives the first cell's
    # particle to all.
    return torch.minimum(indices, last).movedim(-1, 0).clone(memory_format=torch.contiguous_format)
