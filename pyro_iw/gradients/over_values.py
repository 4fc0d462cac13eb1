r"""Bounds and gradients where the guide enumerates discrete sites: the sum over values outside the logarithm.

Let y be the joint value of these sites in a cell and :math:`z_{ky}` what is drawn for particle k given it.
The bound is

.. math:: F = \sum_y r(y)\, V(\ell_{\cdot y}), \qquad
    \ell_{ky} = \log p_\theta(x, y, z_{ky}) - \log r(y) - \log q_\phi(z_{ky} \mid y, x), \qquad
    r(y) = \frac1K \sum_k q_\phi(y \mid x, z_k).

Where q(y | x) does not depend on what was drawn before, r is that. Where it does, r is the mixture over the
particles of a group: :math:`\sum_y r(y) \log(\hat w_y / r(y)) \le \log \sum_y \hat w_y`, with
:math:`\hat w_y` the mean weight without r, holds for any r, and the right-hand side is a bound. With K = 1
either is the ELBO with y summed out.

By linearity the gradient for fixed r is, for each y, that of V times r(y), whatever the estimator; r itself
adds

.. math:: \frac{\partial F}{\partial \log q_k(y)} = \frac1K\, q_k(y)\, V(\ell_{\cdot y})

and, through :math:`-\log r(y)` within :math:`\ell`, a term that sums to 0 over y unless y is masked or
scaled. From V the mean over y is taken off, which changes nothing and saves its digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..bounds import IWAE, MIWAE, Bound
from ..logmean import logmeanexp, softmax
from ..tracing.particles import Particles
from ..tracing.traces import Route
from .estimator import Estimator
from .estimators import DReG, Score
from .surrogate import Estimate, Weights

__all__ = ["OverValues", "suited_to"]


def suited_to(estimator: Estimator, particles: Any) -> Estimator:
    """The estimator for these particles, or chunks of them: over values where the guide enumerates some."""
    if particles.values is None:
        return estimator
    values = particles.values
    return estimator.wrapped(lambda inner: OverValues(inner, values.kl_weight, values.is_free))


class _Mixture(NamedTuple):
    """A bound over values, evaluated.

    Attributes:
        bound: the bound V of a group.
        log_w: log-weights of shape ``[M, K, G, Y, *cells]``, with M and K those of V and G groups.
        r: weights of the values, of shape ``[G, Y, *cells]``.
        each: V for each value, of the same shape.
        value: F, of shape ``[*cells]``.
        log_q, counted: of the guide's values, of shape ``[M K, G, Y, *cells]``.
    """

    bound: Bound
    log_w: Tensor
    r: Tensor
    each: Tensor
    value: Tensor
    log_q: Tensor
    counted: Tensor

    def weigh(self, weights: Tensor) -> Tensor:
        """Weights of the log-weights in V, as those in F of the particles: of shape ``[S, Y, *cells]``."""
        return self.back((self.r * weights).flatten(0, 1))

    def back(self, weights: Tensor) -> Tensor:
        """``[M K, G, Y, *cells]`` by particles, of the mean over groups."""
        groups = self.r.shape[0]
        return weights.transpose(0, 1).flatten(0, 1) / groups


class OverValues(Estimator):
    """An estimator of gradients of :math:`F`, from one of those of V.

    Arguments:
        inner: the estimator for a single value.
        kl_weight: the weight of log q in the log-weights.
        is_free: whether q(y | x) is known not to depend on the particles.
    """

    def __init__(self, inner: Estimator, kl_weight: float, is_free: bool) -> None:
        self.inner = inner
        self.kl_weight = kl_weight
        self.is_free = is_free
        self.name = inner.name  # type: ignore[misc]
        self.guide_densities = (*inner.guide_densities, _log_q, _counted)  # type: ignore[misc]

    def route(self, bound: Bound) -> Route:
        return self.inner.route(bound)

    def check(self, particles: Particles, bound: Bound) -> None:
        self.inner.check(particles, bound)
        assert particles.values is not None
        if particles.values.is_free:
            return
        names = ", ".join(map(repr, particles.values.names))
        given = (
            f"Site(s) {names} of the guide are enumerated after others were drawn, on which they may depend"
        )
        if isinstance(self.inner, DReG | Score) and not bound.guide_bound.is_linear:
            raise NotImplementedError(
                f"{given}. Their probabilities then are mixed over all particles, for which "
                f"estimator={self.name!r} has no gradient. Draw {names} first in the guide, or sample them "
                "(without infer={'enumerate': 'parallel'}). "
                + (
                    "stratified=True, which mixes nothing, will do as well."
                    if isinstance(self.inner, Score)
                    else "estimator='reparam' will do as well."
                )
            )
        for part in {bound, bound.guide_bound}:
            if (
                part.M > 1
                and _groups(part, False)[0] == 1
                and not part.is_linear
                and part.guide_bound is part
            ):
                raise NotImplementedError(
                    f"{given}. Their probabilities then are mixed over the particles of a group, but how "
                    f"{part!r} takes its M groups together is not known. Draw {names} first in the guide, "
                    "take M=1, or pass stratified=True."
                )

    def evaluate(self, bound: Bound, log_w: Tensor, scale: float | Tensor) -> Estimate:
        value = self._mix(bound, log_w).value
        return Estimate(-(scale * value).sum(), value)

    def weights(
        self, bound: Bound, log_w: Tensor, log_q_weight: float | Tensor, scale: float | Tensor
    ) -> Weights:
        mixed = self._mix(bound, log_w)
        a = mixed.weigh(mixed.bound.weights(mixed.log_w))
        if bound.guide_bound is not bound:
            mixed = self._mix(bound.guide_bound, log_w)
        b = mixed.bound.weights(mixed.log_w)
        path, guide = self.inner.guide_weights(mixed.bound, mixed.log_w, b, log_q_weight)
        rest = [mixed.weigh(weights) for weights in guide]
        return Weights(a, mixed.weigh(path), (*rest, self._of_log_q(mixed), self._of_counted(mixed, b)))

    def guide_weights(
        self, bound: Bound, log_w: Tensor, b: Tensor, log_q_weight: float | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.inner.guide_weights(bound, log_w, b, log_q_weight)

    def _mix(self, bound: Bound, statistics: Tensor) -> _Mixture:
        """The bound over values of particles, given what :attr:`Particles.statistics` has of them."""
        groups, each = _groups(bound, self.is_free)
        count = each.num_particles
        parts = statistics.reshape(groups, count, *statistics.shape[1:]).transpose(0, 1)
        log_w, log_q, counted = parts.unbind(2)  # [count, G, Y, *cells]
        r = logmeanexp(log_q, 0).exp()
        if not (isinstance(self.kl_weight, float | int) and self.kl_weight == 0):
            log_w = log_w - self.kl_weight * logmeanexp(counted, 0)
        log_w = log_w.masked_fill(r == 0, 0.0).reshape(each.M, each.K, *log_w.shape[1:])
        value = each.value(log_w)
        total = (r * value).masked_fill(r == 0, 0.0).sum(1).mean(0)
        return _Mixture(each, log_w, r, value, total, log_q, counted)

    def _of_log_q(self, mixed: _Mixture) -> Tensor:
        """Weights of log q(y | x) in F through r."""
        alive = mixed.each.isfinite()
        each = mixed.each.masked_fill(~alive, 0.0)
        share = mixed.r * alive
        mean = (share * each).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp_min(1e-30)
        gain = (each - mean).masked_fill(~alive, 0.0)
        return mixed.back(mixed.log_q.exp() * gain / len(mixed.log_q))

    def _of_counted(self, mixed: _Mixture, b: Tensor) -> Tensor:
        """Weights of log q(y | x) in F through the log-weights."""
        total = mixed.r * b.sum((0, 1))
        return mixed.back(-self.kl_weight * total * softmax(mixed.counted, 0))


def _groups(bound: Bound, is_free: bool) -> tuple[int, Bound]:
    """A bound as the mean over groups of particles of another one."""
    if is_free:
        return 1, bound
    if bound.is_linear:
        return bound.num_particles, IWAE(1)
    if type(bound) in (MIWAE, IWAE):
        return bound.M, IWAE(bound.K)
    return 1, bound


def _log_q(particles: Particles) -> Tensor:
    assert particles.values is not None
    return particles.values.log_q


def _counted(particles: Particles) -> Tensor:
    assert particles.values is not None
    return particles.values.counted
