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

import numpy as np
import torch
from torch import Tensor

from ._support.devices import wide_dtype
from ._support.optional import require
from ._support.warn import warn

__all__ = ["khat_threshold", "pareto_smoothed", "warn_of_khat"]

# Living particles of which a fifth, the tail, are the five that a fit takes.
_FEWEST = 25

# A tail within this share of the largest weight is one value: single precision tells no more.
_ROUNDING = 1e-5

# A log-weight this far below the largest is a weight of 0 beside it in float64.
_UNDERFLOW = math.log(np.finfo(np.float64).tiny)

#: From log-weights ``[cells, S]`` to smoothed ones and k̂ ``[cells]``.
Smoothing = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def khat_threshold(num_particles: int) -> float:
    """The k̂ above which that many particles are too few: min(1 - 1 / log10 S, 0.7) (Vehtari et al., 2024)."""
    return min(1 - 1 / math.log10(max(num_particles, 2)), 0.7)


def warn_of_khat(khat: Tensor, num_particles: int) -> None:
    """Warn of cells whose weights have too heavy a tail, or one of which nothing is known (NaN)."""
    threshold = khat_threshold(num_particles)
    high = ~(khat <= threshold)
    if num_particles < _FEWEST:
        if bool(high.any()):
            warn(
                f"k̂ is not known of {num_particles} particles, so it cannot be told whether the guide misses "
                f"mass of the posterior: draw {_FEWEST} or more.",
                RuntimeWarning,
            )
    elif bool(high.any()):
        warn(
            f"k̂ exceeds {threshold:.2f} in {int(high.sum())} of {high.numel()} cell(s) (up to "
            f"{khat.max().item():.2f}): the guide misses mass of the posterior there, and estimates from "
            "these weights are not to be trusted. Train a guide with heavier tails or more freedom; more "
            "particles help only where k̂ is just too high.",
            RuntimeWarning,
        )


def pareto_smoothed(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Smooth the weights of every cell, and say how heavy their tail is.

    Particles at -inf stay there and do not count: the living ones of a cell are its sample, and their tail is
    the largest fifth of them, or :math:`3 \sqrt{S}` if these are fewer. Were the tail taken among all, it
    would reach down to weight 0 wherever most are dead, and the bulk of the weights would be fitted as if it
    were their tail. A particle 708 nats below the cell's largest weighs 0 in float64: it does not count
    either, and is left as it is.

    Arguments:
        log_weights: of shape ``[S, *cells]``, in nats.

    Returns:
        The smoothed log-weights, of that shape, the unsmoothed ones unchanged; and k̂, of shape ``[*cells]``
        in float64 (float32 on a device without it). It is inf where the tail is too small for a fit (fewer
        than 25 living particles; ArviZ 1.1 and newer want 30), and -inf where a quarter of it or more is one
        value at its foot, as if all are equal: weights of few values are bounded. Nothing is smoothed in
        either case. It is never NaN.

    Raises:
        ImportError: if ArviZ is missing.

    Example:
        >>> tail = -torch.rand(4000, generator=torch.Generator().manual_seed(0)).log()
        >>> smoothed, khat = pareto_smoothed(0.5 * tail)  # weights with a Pareto tail of shape 0.5
        >>> round(khat.item(), 1)
        0.5
    """
    smooth = _arviz()
    raw = log_weights.detach().cpu().double()
    smoothed = raw.reshape(len(raw), -1).T.contiguous().numpy().copy()  # [cells, S]
    top = smoothed.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # inf - inf, of cells that have no tail
        alive = smoothed - top > _UNDERFLOW
    # A cell with a weight of NaN or +inf has no tail to speak of.
    counts = np.where(top[:, 0] < np.inf, alive.sum(1), 0)
    khat = np.full(len(smoothed), np.inf)
    for count in np.unique(counts[counts >= _FEWEST]):  # one call where no particle is dead
        rows = np.flatnonzero(counts == count)
        chosen = alive[rows]
        values, khat[rows] = _smooth_living(smooth, smoothed[rows][chosen].reshape(len(rows), count))
        table = smoothed[rows]
        table[chosen] = values.ravel()
        smoothed[rows] = table
    back = torch.from_numpy(np.ascontiguousarray(smoothed.T)).reshape(raw.shape)
    shape = torch.from_numpy(khat.reshape(raw.shape[1:]))
    device = log_weights.device
    return back.to(log_weights.dtype).to(device), shape.to(wide_dtype(device)).to(device)


def _smooth_living(smooth: Smoothing, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed log-weights ``[cells, S]`` and the shapes k̂ ``[cells]`` of finite log-weights."""
    size = table.shape[1]
    length = math.floor(min(size / 5, 3 * math.sqrt(size)))
    # As shares of the largest weight. Of a guide that is exact all are 1 but for rounding, whose noise may
    # seem to have a heavy tail.
    tail = np.exp(np.sort(table, 1)[:, size - length :] - table.max(1, keepdims=True))
    equal = tail[:, 0] >= 1 - _ROUNDING
    level = ~equal & (tail[:, max(length // 4 - 1, 1)] <= tail[:, 0])
    table, khat = table.copy(), np.full(len(table), -np.inf)
    whole = ~equal & ~level
    if whole.any():
        table[whole], khat[whole] = _fitted(smooth, table[whole])
    # Where the tail's foot is level, the weights above it are the tail, unless they are few values as well.
    above = (tail > tail[:, :1]).sum(1)
    different = (np.diff(tail, axis=1) > 0).sum(1)
    for count in np.unique(above[level]):
        rows = np.flatnonzero(level & (above == count) & (2 * different > count) & (count > 2))
        if not len(rows):
            continue
        places = table[rows].argsort(1)[:, size - count - 1 :]  # the foot and what is above
        chosen = np.take_along_axis(table[rows], places, 1)
        # Of so many weights these are the tail that is fitted.
        more = (5 * count if count <= 45 else math.ceil(count**2 / 9)) - count - 1
        chosen = np.concatenate([np.repeat(chosen[:, :1], more, 1), chosen], 1)
        values, khat[rows] = _fitted(smooth, chosen) if count > 4 else (chosen, np.inf)
        changed = table[rows]
        np.put_along_axis(changed, places, values[:, more:], 1)
        table[rows] = changed
    return table, khat


def _fitted(smooth: Smoothing, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by ArviZ; as they are, with a shape of inf, where it has no fit."""
    with np.errstate(all="ignore"):
        values, shapes = smooth(table)
    # Version 1 normalises its result; the lowest weight lies below the tail, so only that constant moved it.
    low = table.argmin(1)[:, None]
    values = values + np.take_along_axis(table - values, low, 1)
    fitted = np.isfinite(shapes) & np.isfinite(values).all(1)  # a shape is given for weights of NaN, too
    return np.where(fitted[:, None], values, table), np.where(fitted, shapes, np.inf)


def _arviz() -> Smoothing:
    """ArviZ's smoothing of log-weights ``[cells, S]``."""
    purpose = "Pareto smoothing (khat, smoothed)"
    if importlib.util.find_spec("arviz") is None and importlib.util.find_spec("arviz_stats") is not None:
        return _arviz_stats()  # ArviZ 1 in parts
    arviz = require("arviz", "arviz", purpose)
    if "psislw" in vars(arviz):  # version 1.3 warns of names that are gone when it is asked for them
        return lambda table: arviz.psislw(table, normalize=True)
    return _arviz_stats()


def _arviz_stats() -> Smoothing:
    """The same in version 1, which expects log-likelihoods and takes their negative for weights."""
    array_stats = require("arviz_stats.base", "arviz", "Pareto smoothing (khat, smoothed)").array_stats
    return lambda table: array_stats.psislw(-table, axis=-1)
