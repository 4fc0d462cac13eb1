r"""Draws of :class:`~torch.distributions.LKJCholesky` that have the density it gives.

Row i (from 0) of a D x D factor has a direction and, for what is off the diagonal, a squared length y that is

.. math:: y_i \sim \mathrm{Beta}\Big(\frac i2,\ \eta + \frac{D - 1 - i}2\Big).

PyTorch takes :math:`i - \frac12` for the first parameter, which is right in row 1 alone: from D = 3 on its
draws are too correlated for their density, and any weight that divides by the latter is wrong.

References:
    | Generating Random Correlation Matrices Based on Vines and Extended Onion Method (Lewandowski et al.,
      2009)
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch.distributions import Beta, LKJCholesky

__all__ = ["RightDraws", "correct_draws"]


class RightDraws(Messenger):
    """Corrects what the sites inside it are drawn by."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None:
            correct_draws(msg["fn"])


def correct_draws(fn: Any) -> None:
    """Let an LKJCholesky, or what is made of one, draw by its density; leave all else as it is."""
    while not isinstance(fn, LKJCholesky):
        fn = getattr(fn, "base_dist", None)
        if fn is None:
            return
    beta = fn._beta
    rows = torch.arange(fn.dim, dtype=beta.concentration1.dtype, device=beta.concentration1.device)
    # Row 0 has nothing off the diagonal, and takes any number.
    halves = (rows / 2).clamp(min=0.5).expand_as(beta.concentration1)
    fn._beta = Beta(halves, beta.concentration0, validate_args=False)
