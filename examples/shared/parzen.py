"""Parzen-window log-likelihood: what a kernel density estimate over a model's samples gives held-out points.

It judges samples where no likelihood is to be had, as in Goodfellow et al. (1406.2661) and Makhzani et al.
(1511.05644). It is a coarse judge (Theis et al., 1511.01844): in hundreds of dimensions it prefers samples
near cluster centres to samples of the data. Compare its figures only at one number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BANDWIDTHS", "choose_bandwidth", "log_likelihood"]

#: Bandwidths to choose from, for values in [0, 1]: 10 from 0.1 to 1, on a logarithmic scale.
BANDWIDTHS = tuple(10 ** (-1 + i / 9) for i in range(10))
# Distances (points × samples) in memory at once.
CHUNK = 2_000_000


def log_likelihood(samples: Tensor, heldout: Tensor, sigma: float) -> Tensor:
    r"""The log density of a mixture of normals around the samples.

    .. math:: \log \frac1S \sum_{s=1}^S N(x;\, \tilde x_s, \sigma^2 I)

    Arguments:
        samples: the model's samples; all dims but the first are flattened to D. ``[S, *shape]``.
        heldout: the points x, ``[N, *shape]``.
        sigma: bandwidth, in the units of the points.

    Returns:
        One value a point, in nats, float64, of shape ``[N]``.

    Raises:
        ValueError: if shapes differ, there is no sample or point, one is not finite, or sigma not positive.
    """
    if samples.shape[1:] != heldout.shape[1:]:
        raise ValueError(
            f"samples are of shape {tuple(samples.shape[1:])} each, but held-out points of "
            f"{tuple(heldout.shape[1:])}"
        )
    if not len(samples) or not len(heldout):
        raise ValueError(
            f"there are {len(samples)} samples and {len(heldout)} held-out points: both are needed"
        )
    if not 0 < sigma < math.inf:
        raise ValueError(f"the bandwidth must be positive, got sigma={sigma!r}")
    for name, values in (("samples", samples), ("held-out points", heldout)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"some of the {name} are NaN or infinite")
    centres, points = samples.flatten(1).double(), heldout.flatten(1).double()
    # |x - c|² = |x|² - 2 x·c + |c|² loses the digits that a common mean takes.
    mean = centres.mean(0)
    centres, points = centres - mean, points - mean
    squares = centres.square().sum(1)
    parts = []
    for chunk in points.split(max(1, CHUNK // len(centres))):
        distance = (chunk.square().sum(1, keepdim=True) + squares - 2 * chunk @ centres.T).clamp(min=0)
        parts.append((-distance / (2 * sigma**2)).logsumexp(1))
    size, dim = centres.shape
    return torch.cat(parts) - math.log(size) - 0.5 * dim * math.log(2 * math.pi * sigma**2)


def choose_bandwidth(samples: Tensor, validation: Tensor, candidates: Sequence[float] = BANDWIDTHS) -> float:
    """The bandwidth under which validation points are most likely.

    They have to be neither those that the density is reported for nor those that the model was trained on.

    Arguments:
        samples: as in :func:`log_likelihood`.
        validation: likewise.
        candidates: bandwidths to choose from.

    Raises:
        ValueError: as :func:`log_likelihood`, or if there is no candidate.
    """
    if not candidates:
        raise ValueError("there is no bandwidth to choose from")
    return max(candidates, key=lambda sigma: log_likelihood(samples, validation, sigma).mean().item())
