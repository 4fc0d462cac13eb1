r"""Pareto smoothing of importance weights, by whichever major version of ArviZ is installed.

The largest weights are replaced by the expected order statistics of a generalised Pareto distribution fitted
to them. Its shape k̂ says how heavy the tail is: for :math:`\hat k > 0.7` the mean weight, hence
:math:`\hat p(x)`, has not settled, because the guide misses mass of the posterior.

References:
    | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
    | Yes, but Did It Work? (Yao et al., 2018), https://arxiv.org/abs/1802.02538
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .optional import require
from .warn import warn

__all__ = ["khat_threshold", "pareto_smoothed", "warn_of_khat"]


def khat_threshold(num_particles: int) -> float:
    """The k̂ above which that many particles are too few: min(1 - 1 / log10 S, 0.7) (Vehtari et al., 2024)."""
    return min(1 - 1 / math.log10(max(num_particles, 2)), 0.7)


def warn_of_khat(khat: Tensor, num_particles: int) -> None:
    """Warn of cells whose weights have too heavy a tail."""
    threshold = khat_threshold(num_particles)
    high = khat > threshold
    if bool(high.any()):
        warn(
            f"k̂ exceeds {threshold:.2f} in {int(high.sum())} of {high.numel()} cell(s) (up to "
            f"{khat.max().item():.2f}): the guide misses mass of the posterior there, and estimates from "
            "these weights are not to be trusted. Train a guide with heavier tails or more freedom; more "
            "particles help only where k̂ is just too high.",
            RuntimeWarning,
        )


def pareto_smoothed(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth the weights of every cell, and say how heavy their tail is.

    Arguments:
        log_weights: of shape ``[S, *cells]``, in nats.

    Returns:
        The smoothed log-weights, of that shape, the unsmoothed ones unchanged; and k̂, of shape ``[*cells]``
        in float64. It is inf where fewer than 5 weights make up the tail (S < 25, or all dead but a few), and
        -inf where the largest weight makes up the whole tail, as it does if all are equal.

    Raises:
        ImportError: if ArviZ is missing.

    Example:
        >>> tail = -torch.rand(4000, generator=torch.Generator().manual_seed(0)).log()
        >>> smoothed, khat = pareto_smoothed(0.5 * tail)  # weights with a Pareto tail of shape 0.5
        >>> round(khat.item(), 1)
        0.5
    """
    smooth = _arviz()
    raw = log_weights.detach().double().cpu()
    table = raw.reshape(len(raw), -1).T.contiguous().numpy()  # [cells, S]
    top, bottom = table.max(1), table.min(1)
    size = table.shape[1]
    # Where the largest weight makes up the tail by itself, as with a few discrete values, weights are
    # bounded.
    ties = (table == top[:, None]).sum(1) >= max(math.ceil(min(size / 5, 3 * math.sqrt(size))), 5)
    khat = np.where(ties & np.isfinite(top), -np.inf, np.inf)
    fit = np.isfinite(top) & (top > bottom) & ~ties & (np.isfinite(table).sum(1) > 5)
    smoothed = table.copy()
    if fit.any():
        with np.errstate(over="ignore"):
            values, khat[fit] = smooth(table[fit])
        # Version 1 normalises its result; what lies below the tail is as it was but for that constant.
        low = np.where(np.isfinite(table[fit]), table[fit], np.inf).argmin(1)
        rows = np.arange(len(values))
        smoothed[fit] = values + (table[fit][rows, low] - values[rows, low])[:, None]
    back = torch.from_numpy(np.ascontiguousarray(smoothed.T)).reshape(raw.shape)
    shape = torch.from_numpy(khat.reshape(raw.shape[1:]))
    return back.to(log_weights), shape.to(log_weights.device)


def _arviz() -> Callable[[np.ndarray], tuple[Any, Any]]:
    """ArviZ's smoothing of log-weights ``[cells, S]``."""
    purpose = "Pareto smoothing (khat, smoothed)"
    if importlib.util.find_spec("arviz") is None and importlib.util.find_spec("arviz_stats") is not None:
        return _arviz_stats()  # ArviZ 1 in parts
    arviz = require("arviz", "arviz", purpose)
    if hasattr(arviz, "InferenceData"):
        return lambda table: arviz.psislw(table, normalize=True)
    return _arviz_stats()


def _arviz_stats() -> Callable[[np.ndarray], tuple[Any, Any]]:
    """The same in version 1, which expects log-likelihoods and takes their negative for weights."""
    array_stats = require("arviz_stats.base", "arviz", "Pareto smoothing (khat, smoothed)").array_stats
    return lambda table: array_stats.psislw(-table, axis=-1)
