"""Weights that are no numbers, and cells in which all weights are 0."""

from __future__ import annotations

import torch
from torch import Tensor

from .._support.warn import warn
from ..tracing.levels import TwoLevels
from ..tracing.particles import Particles
from .local_weights import total_log_weights

__all__ = ["check_finite", "dead_site", "warn_of_dead"]


def check_finite(particles: Particles | TwoLevels) -> bool:
    """Refuse NaN and +inf, naming the site; whether a particle has zero density.

    Both by one number, for which an accelerator is waited for once.
    """
    log_w = total_log_weights(particles)
    bad = log_w.isnan() | log_w.isposinf()
    found = int(2 * bad.any().int() + log_w.isneginf().any().int())
    if found >= 2:
        site = (
            particles.first_site(torch.isnan)
            or particles.first_site(torch.isposinf)
            or particles.first_site(torch.isneginf, role="guide")
        )
        raise ValueError(
            f"{int(bad.sum())} of {log_w.numel()} log-weights are NaN or +inf (first at site {site}), and "
            "so would be the estimate. Look for a NaN in the data or the parameters, or a scale of 0."
        )
    return found == 1


def dead_site(particles: Particles | TwoLevels) -> str:
    """The first site at which a particle has zero density, where one has."""
    return str(particles.first_site(torch.isneginf) or particles.first_site(torch.isposinf, role="guide"))


def warn_of_dead(value: Tensor, num_particles: int, site: str | None) -> None:
    """Warn of cells that no particle has reached."""
    dead = value.isneginf()
    if bool(dead.any()):
        warn(
            f"In {int(dead.sum())} of {dead.numel()} cell(s) none of the {num_particles} particles has "
            f"positive density (first at site {site}), so the estimate there is -inf. The guide proposes "
            "values outside the model's support, or the data do not fit the model.",
            RuntimeWarning,
        )
