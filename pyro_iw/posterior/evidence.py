r"""What an evaluation gives: the log evidence of cells, or of a data set's points, and its errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .._support.devices import wide

__all__ = ["Evidence", "LogMarginal"]

_NO_BOUND = "minus_kl compares with a bound: pass bound= to log_marginal_dataset."


class Evidence(NamedTuple):
    """The log evidence of every cell, and how well it is known.

    Attributes:
        log_marginal: :math:`\\log \\hat p(x)` in nats, of shape ``[*cells]``.
        monte_carlo_error: its standard error from the finite number of particles (delta method), likewise.
        ess: effective number of particles, likewise.
    """

    log_marginal: Tensor
    monte_carlo_error: Tensor
    ess: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class LogMarginal:
    """The log evidence of every datapoint of a data set.

    Attributes:
        values: :math:`\\log \\hat p(x_n)` in nats, of shape ``[N]``.
        monte_carlo_errors: standard error of each from the finite number of particles (delta method),
            ``[N]``. It says nothing of mass that no particle has reached, and with ``jackknife`` it is that
            of the values before their correction, whose error is larger.
        ess: effective number of particles of each, ``[N]``.
        num_particles: number S of particles.
        bounds: another bound on the same particles, where it was asked for, of shape ``[N]``.
        minus_kl_errors: standard error of each difference ``bounds - values``, whose two sides vary together,
            from the finite number of particles, ``[N]``. NaN where these make fewer than 3 groups of the
            bound (0 for IWAE of all of them). With ``jackknife`` it is that of the difference before the
            correction.
    """

    values: Tensor
    monte_carlo_errors: Tensor
    ess: Tensor
    num_particles: int
    bounds: Tensor | None = None
    minus_kl_errors: Tensor | None = None

    @property
    def mean(self) -> float:
        """Mean over the datapoints, in nats; its negative is the held-out NLL."""
        return wide(self.values).mean().item()

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of :attr:`mean` for these very datapoints, from the finite number of particles."""
        return wide(self.monte_carlo_errors).square().sum().sqrt().item() / len(self.values)

    @property
    def sampling_error(self) -> float:
        """Standard error of :attr:`mean` as an estimate for the population; NaN for a single datapoint."""
        if len(self.values) == 1:
            return math.nan
        return wide(self.values).std().item() / math.sqrt(len(self.values))

    @property
    def minus_kl(self) -> float:
        r"""Mean of :attr:`bounds` less :attr:`values`, in nats: how far the guide is from the posterior.

        For the ELBO this is :math:`-\mathrm{KL}(q \,\|\, p)` up to the bias of the values; for IWAE-64 the
        column "-KL" of Rainforth et al. (2018), the divergence of the guide that IWAE-64 implies. It is -inf
        where a bound is.

        Raises:
            ValueError: if no bound was asked for.
        """
        if self.bounds is None:
            raise ValueError(_NO_BOUND)
        # Both are -inf where no particle has positive density.
        gaps = (wide(self.bounds) - wide(self.values)).masked_fill(self.bounds.isneginf(), -math.inf)
        return gaps.mean().item()

    @property
    def minus_kl_error(self) -> float:
        """Standard error of :attr:`minus_kl` for these very datapoints, from the finite number of particles.

        Raises:
            ValueError: if no bound was asked for.
        """
        if self.minus_kl_errors is None:
            raise ValueError(_NO_BOUND)
        return wide(self.minus_kl_errors).square().sum().sqrt().item() / len(self.values)

    def __repr__(self) -> str:
        return (
            f"LogMarginal(mean={self.mean:.4f}, monte_carlo_error={self.monte_carlo_error:.2g}, "
            f"N={len(self.values)}, num_particles={self.num_particles})"
        )
