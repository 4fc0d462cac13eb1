r"""What can be said of weights that come in chunks, in the memory of one chunk.

References:
    | Debiasing Evidence Approximations (Nowozin, 2018), https://openreview.net/forum?id=HyZoi-WRb
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._support.devices import wide
from .bounds import IWAE, PIWAE, Bound
from .logmean import exclusive_logsumexp, logmeanexp

__all__ = ["RunningBound", "RunningGap", "RunningLogMean", "jackknife"]


class RunningLogMean:
    r"""Log of a mean weight and the effective number of particles, added up chunk by chunk in float64.

    (In float32 on a device without it, as everything here.)

    Example:
        >>> running = RunningLogMean()
        >>> for chunk in torch.tensor([1.0, 2.0, 3.0, 6.0]).log().split(3):
        ...     running.add(chunk)
        >>> running.value.exp(), running.ess  # 12 / 4 and 12 ** 2 / 50
        (tensor(3.0000, dtype=torch.float64), tensor(2.8800, dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self._first = self._second = torch.tensor(-math.inf, dtype=torch.float64)

    def add(self, log_w: Tensor) -> None:
        """Add log-weights of shape ``[chunk, *cells]``."""
        log_w = wide(log_w)
        first, second = log_w.logsumexp(0), (2 * log_w).logsumexp(0)
        is_new = self.count == 0
        self._first = first if is_new else torch.logaddexp(self._first, first)
        self._second = second if is_new else torch.logaddexp(self._second, second)
        self.count += len(log_w)

    def merge(self, other: RunningLogMean) -> None:
        """Add the weights that another one has added up, with the same cells."""
        if not self.count:
            self._first, self._second, self.count = other._first, other._second, other.count
        elif other.count:
            self._first = torch.logaddexp(self._first, other._first)
            self._second = torch.logaddexp(self._second, other._second)
            self.count += other.count

    @property
    def value(self) -> Tensor:
        """Log of the mean weight, of shape ``[*cells]``."""
        return self._first - math.log(self.count)

    @property
    def ess(self) -> Tensor:
        r""":math:`(\sum w)^2 / \sum w^2`, of shape ``[*cells]``; 0 where all are dead."""
        return (2 * self._first - self._second).exp().nan_to_num(nan=0.0)

    @property
    def standard_error(self) -> Tensor:
        """Of :attr:`value`, by the delta method, ``[*cells]``; NaN for a single particle or a dead cell."""
        if self.count == 1:
            return torch.full_like(self._first, math.nan)
        variance = (1 / self.ess - 1 / self.count).clamp(min=0) * self.count / (self.count - 1)
        return variance.sqrt().masked_fill(self._first.isneginf(), math.nan)


class RunningBound:
    """Mean of a bound over disjoint groups of M K particles, added up group by group in float64.

    Arguments:
        bound: the bound. Particles left over at the end, too few for a group, do not count.

    Attributes:
        groups: the number of groups so far.
        rest: log-weights of the last particles, too few for a group.

    Example:
        >>> running = RunningBound(pyro_iw.bounds.IWAE(K=2))
        >>> for chunk in torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]).log().split(3):
        ...     running.add(chunk)
        >>> running.value.exp(), running.groups  # the geometric mean of 2 and 6
        (tensor(3.4641, dtype=torch.float64), 2)
    """

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.groups = 0
        self.rest: Tensor | None = None
        self._mean = self._squares = self._infinite = torch.tensor(0.0, dtype=torch.float64)

    def add(self, log_w: Tensor) -> None:
        """Add log-weights of shape ``[chunk, *cells]``."""
        if self.rest is not None:
            log_w = torch.cat([self.rest, log_w])
        size = self.bound.num_particles
        whole = len(log_w) // size * size
        self.rest = log_w[whole:].clone()
        if not whole:
            return
        # To a bound, groups are so many more cells.
        groups = log_w[:whole].reshape(-1, self.bound.M, self.bound.K, *log_w.shape[1:]).movedim(0, -1)
        values = wide(self.bound.value(groups))
        # Deviations from a mean of -inf are NaN, so that such values are added up on their own.
        finite = values.isfinite()
        new = type(self)(self.bound)
        new._infinite = values.masked_fill(finite, 0.0).sum(-1)
        new._describe(values.masked_fill(~finite, 0.0), groups)
        self.merge(new)

    def _describe(self, values: Tensor, groups: Tensor) -> None:
        """Begin with finite values ``[*cells, new]`` of groups of log-weights ``[M, K, *cells, new]``."""
        self.groups = values.shape[-1]
        self._mean = values.mean(-1)
        self._squares = (values - self._mean.unsqueeze(-1)).square().sum(-1)

    def merge(self, other: RunningBound) -> None:
        """Add the groups that another one of the same bound and cells has added up, without what it has left
        over.
        """
        if not self.groups:
            # Without a copy of what is not there to the device of what is.
            kept = {"bound": self.bound, "rest": self.rest}
            vars(self).update(vars(other) | kept)
        elif other.groups:
            self._add(other)

    def _add(self, other: RunningBound) -> None:
        """Add groups to those that are there."""
        between, share = self._pooled(other)
        deviation = other._mean - self._mean
        self._infinite = self._infinite + other._infinite
        self._squares = self._squares + other._squares + deviation**2 * between
        self._mean = self._mean + deviation * share
        self.groups += other.groups

    def _pooled(self, other: RunningBound) -> tuple[float, float]:
        """What the distance of two means weighs in the sum of squares of both, and in their common mean."""
        total = self.groups + other.groups
        return self.groups * other.groups / total, other.groups / total

    @property
    def value(self) -> Tensor:
        """The mean, of shape ``[*cells]``, in nats; -inf if a group's is."""
        return torch.where(self._infinite == 0, self._mean, self._infinite)

    @property
    def standard_error(self) -> Tensor:
        """Of :attr:`value`, of shape ``[*cells]``; NaN for a single group or a value that is not finite."""
        if self.groups < 2:
            return torch.full_like(self._mean, math.nan)
        error = (self._squares / (self.groups - 1) / self.groups).sqrt()
        return error.masked_fill(self._infinite != 0, math.nan)


class RunningGap(RunningBound):
    r"""The same, with the standard error of its difference from the log mean weight of the same particles.

    With G groups of m particles each, values :math:`V_g` and mean weights :math:`r_g` relative to
    :math:`\hat p`, the difference is to first order a mean of independent terms,

    .. math:: \frac1G \sum_g V_g - \log \hat p(x) \approx \text{const} + \sum_{g=1}^G \Big(\frac{V_g}{G} -
        \frac{m}{S} r_g\Big) - \frac1S \sum_{s > G m} \frac{w_s}{\hat p(x)},

    whose variance is that of the pairs over the groups, and of the weights left over. Two means have been
    fitted to the groups, so that the sum of squares is divided by G - 2; for IWAE, where the term of first
    order all but vanishes, that also makes the next one right (a variance over the groups, on either side).

    Example:
        >>> log_w = torch.randn(4096, generator=torch.Generator().manual_seed(0))
        >>> everything, gap = RunningLogMean(), RunningGap(pyro_iw.bounds.IWAE(K=64))
        >>> for chunk in log_w.split(100):
        ...     everything.add(chunk)
        ...     gap.add(chunk)
        >>> round((gap.value - everything.value).item(), 3), round(gap.gap_error(everything).item(), 3)
        (-0.019, 0.004)
        >>> round(gap.standard_error.item(), 3)  # of the bound alone, most of which it shares
        0.024
    """

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        # Mean weights of the groups are kept relative to exp(_top), the largest of them so far.
        self._top = torch.tensor(-math.inf, dtype=torch.float64)
        self._weight = self._weight_squares = self._products = torch.tensor(0.0, dtype=torch.float64)

    def _describe(self, values: Tensor, groups: Tensor) -> None:
        super()._describe(values, groups)
        logs = logmeanexp(wide(groups), (0, 1))
        self._top = logs.amax(-1)
        weights = (logs - self._top.masked_fill(self._top.isneginf(), 0.0).unsqueeze(-1)).exp()
        self._weight = weights.mean(-1)
        centred = weights - self._weight.unsqueeze(-1)
        self._weight_squares = centred.square().sum(-1)
        self._products = (centred * values).sum(-1)

    def _add(self, other: RunningBound) -> None:
        assert isinstance(other, RunningGap)
        between, share = self._pooled(other)
        top = torch.maximum(self._top, other._top)
        base = top.masked_fill(top.isneginf(), 0.0)
        mine, theirs = (self._top - base).exp(), (other._top - base).exp()  # 0 for no weight
        apart = other._weight * theirs - self._weight * mine
        deviation = other._mean - self._mean
        self._products = self._products * mine + other._products * theirs + apart * deviation * between
        self._weight_squares = (
            self._weight_squares * mine**2 + other._weight_squares * theirs**2 + apart**2 * between
        )
        self._weight, self._top = self._weight * mine + apart * share, top
        super()._add(other)

    def gap_error(self, everything: RunningLogMean) -> Tensor:
        """Standard error of :attr:`value` less the log mean weight.

        Arguments:
            everything: that of all particles, those left over included.

        Returns:
            Of shape ``[*cells]``; NaN where the difference is not finite, or for fewer than 3 groups. (The
            IWAE bound of all particles is the log mean weight: 0.)
        """
        count = everything.count
        used = self.groups * self.bound.num_particles
        if self.groups < 3:
            itself = used == self.bound.num_particles == count and isinstance(self.bound, IWAE | PIWAE)
            return torch.full_like(self._mean, 0.0 if itself else math.nan).masked_fill(
                self._infinite != 0, math.nan
            )
        of_weight = used / count * (self._top - everything.value).exp()
        squares = self._squares - 2 * of_weight * self._products + of_weight**2 * self._weight_squares
        variance = squares.clamp(min=0) / self.groups / (self.groups - 2)
        left = (count - used) / count * everything.standard_error**2 if used < count else 0.0
        return (variance + left).sqrt().masked_fill(self._infinite != 0, math.nan)


def jackknife(log_w: Tensor) -> Tensor:
    """Leave-one-out correction of the log mean weight over dim 0, in float64."""
    log_w = wide(log_w)
    size = len(log_w)
    without = exclusive_logsumexp(log_w, 0) - math.log(size - 1)
    value = logmeanexp(log_w, 0)
    # One particle has all of the weight: nothing is left without it, and nothing can be said of the bias.
    correction = (size - 1) * (value - without).mean(0)
    return torch.where(correction.isfinite(), value + correction, value)
