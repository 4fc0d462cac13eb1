"""What is not finite in a filter: how many cells, since which step, and the site that it arose at."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .filtering import Filtered
from .protocol import moment_name

__all__ = ["NotFinite", "check_kl_weight", "first_not_finite"]


# Where to look for the cause, and in whose densities, the likeliest first.
_Order = tuple[tuple[Callable[[Tensor], Tensor], "str | None"], ...]
_FATAL: _Order = ((torch.isnan, None), (torch.isposinf, None), (torch.isneginf, "guide"))
_DEAD: _Order = ((torch.isneginf, None), (torch.isposinf, "guide"))


class NotFinite(NamedTuple):
    """What is not finite.

    Attributes:
        is_fatal: whether there is NaN or +inf, and not -inf alone.
        message: what there is, since when and where.
    """

    is_fatal: bool
    message: str


def first_not_finite(filtered: Filtered) -> NotFinite | None:
    """The first step after which the estimate of a cell is not finite; NaN and +inf before -inf."""
    for is_fatal in (True, False):
        for moment in filtered.moments:
            estimate = filtered.estimate(moment)
            log_w = filtered.log_weights(moment)
            bad = estimate.isneginf()
            if is_fatal:
                bad = estimate.isnan() | estimate.isposinf() | (log_w.isnan() | log_w.isposinf()).any(1)
            if not bool(bad.any()):
                continue
            particles = moment.particles
            order = _FATAL if is_fatal else _DEAD
            sites = (particles.first_site(where, role) for where, role in order)
            site = next((site for site in sites if site is not None), None)
            cells = bad.any(0)
            kind = (
                "-inf"
                if not is_fatal
                else "NaN"
                if bool((estimate.isnan() | log_w.isnan().any(1)).any())
                else "+inf"
            )
            where = f", the first of them {_indices(cells)}" if cells.dim() else ""
            return NotFinite(
                is_fatal,
                f"The log-weights are {kind} in {int(cells.sum())} of {cells.numel()} sequence(s){where}, "
                f"since "
                f"{moment_name(moment.index)} (first at site {site}).",
            )
    return None


def _indices(cells: Tensor) -> str:
    first = cells.nonzero()[0].tolist()
    return str(first[0]) if len(first) == 1 else str(tuple(first))


def check_kl_weight(kl_weight: float) -> float:
    """The weight, if it is one.

    Raises:
        ValueError: if it is no finite number >= 0.
    """
    is_number = isinstance(kl_weight, numbers.Real) and not isinstance(kl_weight, bool)
    is_number = is_number or (isinstance(kl_weight, Tensor) and kl_weight.numel() == 1)
    if not is_number or not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight must be a finite number >= 0, got {kl_weight!r}")
    return kl_weight
