r"""What an evaluation gives: the log evidence of cells or of a data set's points, how well it is known, and
how parts of a data set become the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
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

    Example:
        >>> evidence = ImportanceSampler(model, guide).evidence(data)
        >>> evidence.log_marginal.shape, evidence.ess.shape
        (torch.Size([3]), torch.Size([3]))
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
        estimator: what the values were estimated by, in words; of two parts of one data set it is the same.

    Example:
        >>> result = ImportanceSampler(model, guide).log_marginal_dataset([data[:2], data[2:]])
        >>> result.values.shape
        torch.Size([3])
    """

    values: Tensor
    monte_carlo_errors: Tensor
    ess: Tensor
    num_particles: int
    bounds: Tensor | None = None
    minus_kl_errors: Tensor | None = None
    estimator: str = ""

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

    @staticmethod
    def join(
        parts: Sequence[LogMarginal], indices: Sequence[Sequence[int] | Tensor] | None = None
    ) -> LogMarginal:
        """The log evidence of a data set whose parts were evaluated apart, on whatever machines.

        Arguments:
            parts: the results of the parts.
            indices: for each part which datapoints it has, in the order of its values: together 0 to N - 1,
                each of them once. The whole is in the order of the indices; without them the parts come one
                after the other.

        Returns:
            The whole, on the device of the first part.

        Raises:
            ValueError: if there is no part, two are of different numbers of particles or estimators, or the
                indices do not fit the parts, overlap or leave a gap.

        Example:
            >>> sampler = ImportanceSampler(model, guide, num_particles=1000)
            >>> even, odd = (sampler.log_marginal_dataset([data[start::2]]) for start in (0, 1))
            >>> LogMarginal.join([even, odd], [[0, 2], [1]])
            LogMarginal(mean=-1.6..., monte_carlo_error=0.00..., N=3, num_particles=1000)
        """
        if not parts:
            raise ValueError("There is no part to join.")
        for number, part in enumerate(parts):
            _check_alike(parts[0], part, number)
        order = None if indices is None else _order(parts, indices)
        device = parts[0].values.device

        def whole(*columns: Tensor | None) -> Tensor | None:
            there = [column.to(device) for column in columns if column is not None]
            if not there:
                return None
            return torch.cat(there) if order is None else torch.cat(there)[order.to(device)]

        names = [field.name for field in fields(LogMarginal) if field.type.startswith("Tensor")]
        columns: dict[str, Any] = {name: whole(*(getattr(part, name) for part in parts)) for name in names}
        return replace(parts[0], **columns)

    def __repr__(self) -> str:
        return (
            f"LogMarginal(mean={self.mean:.4f}, monte_carlo_error={self.monte_carlo_error:.2g}, "
            f"N={len(self.values)}, num_particles={self.num_particles})"
        )


def _check_alike(first: LogMarginal, other: LogMarginal, number: int) -> None:
    """Refuse parts whose values do not estimate the same in the same way."""
    for name, what in ("num_particles", "particles"), ("estimator", "estimator"):
        one, two = getattr(first, name), getattr(other, name)
        if one != two:
            raise ValueError(
                f"Parts of one data set have one number of particles and one estimator, but the {what} of "
                f"part 0: {one}; of part {number}: {two}."
            )
    if (first.bounds is None) != (other.bounds is None):
        with_it, without = (number, 0) if first.bounds is None else (0, number)
        raise ValueError(
            f"Part {with_it} has a bound beside its values, part {without} none. Pass bound= to both."
        )


def _order(parts: Sequence[LogMarginal], indices: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """Where in the parts, one after the other, the datapoints 0 to N - 1 are."""
    if len(indices) != len(parts):
        raise ValueError(f"{len(parts)} parts need indices for each of them, got those of {len(indices)}.")
    places = []
    for number, (part, given) in enumerate(zip(parts, indices, strict=True)):
        place = torch.as_tensor(given, device="cpu").reshape(-1)
        if len(place) and (place.is_floating_point() or place.dtype == torch.bool):
            raise ValueError(
                f"Indices of part {number} are of {place.dtype}; they count the datapoints from 0."
            )
        if len(place) != len(part.values):
            raise ValueError(f"Part {number} has {len(part.values)} values, but {len(place)} indices.")
        places.append(place.long())
    together = torch.cat(places)
    if len(together) and int(together.min()) < 0:
        raise ValueError(f"Indices count the datapoints from 0, but {int(together.min())} is among them.")
    found, order = together.sort()
    twice = found[1:][found[1:] == found[:-1]].unique()
    if len(twice):
        raise ValueError(
            f"Parts overlap: {len(twice)} datapoint(s) are in them more than once, first {int(twice[0])}. "
            "Evaluate each datapoint once."
        )
    missing = (found != torch.arange(len(found))).nonzero()[:, 0]
    if len(missing):
        last = int(found[-1])
        raise ValueError(
            f"Parts leave a gap: of the datapoints 0 to {last} there are {last + 1 - len(found)} in none of "
            f"them, first {int(missing[0])}."
        )
    return order
