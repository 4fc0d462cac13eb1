"""Why a loss is not finite: the site at which NaN or infinity arose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._support.nested import leaves
from .._support.warn import warn
from .surrogate import Estimate

__all__ = ["explain_not_finite"]


def explain_not_finite(
    bound: Any, particles: Any, estimate: Estimate, refuse_others: Callable[[], None] = lambda: None
) -> None:
    """Warn of a bound of -inf, refuse NaN and +inf; name the site each arose at.

    Arguments:
        bound: the bound.
        particles: the particles, or chunks of them.
        estimate: what came of them.
        refuse_others: called where none of these particles is at fault, to raise if some of another rank are.

    Raises:
        ValueError: if there is NaN or +inf.
    """
    log_w = torch.cat([part.reshape(-1) for part in leaves(particles.log_weights)])
    value = estimate.bound
    bad = log_w.isnan() | log_w.isposinf()
    if bool(bad.any()):
        site = (
            particles.first_site(torch.isnan)
            or particles.first_site(torch.isposinf)
            or particles.first_site(torch.isneginf, role="guide")
        )
        kind = "NaN" if bool(log_w.isnan().any()) else "+inf"
        raise ValueError(
            f"{int(bad.sum())} of {log_w.numel()} log-weights are {kind} (first at site {site}). No "
            "gradient step should be taken on them: look for a NaN in the data or the parameters, a "
            "scale of 0, or too large a learning rate."
        )
    refuse_others()
    bad = value.isnan() | value.isposinf()
    if bool(bad.any()):
        raise ValueError(
            f"{bound!r} is NaN or +inf in {int(bad.sum())} of {value.numel()} cell(s), though no "
            "log-weight is: look at its value()."
        )
    if bool(value.isneginf().any()):
        site = particles.first_site(torch.isneginf) or particles.first_site(torch.isposinf, "guide")
        where = "on other ranks" if site is None else f"first at site {site}"
        warn(
            f"The bound is -inf in {int(value.isneginf().sum())} of {value.numel()} cell(s), where "
            f"{int(log_w.isneginf().sum())} particles have zero density ({where}). Those "
            "particles give no gradient.",
            RuntimeWarning,
        )
