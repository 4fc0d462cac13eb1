r"""Estimators of particles that are divided among ranks: weights from all, a gradient from one's own.

Between the two steps of an :class:`~pyro_iw.gradients.estimator.Estimator` there is one exchange: of what the
weights follow from, the statistics of S / P particles on each of P ranks. Bound and weights are then computed
on every rank for all S particles, and each keeps its own block of the weights, times P; see
:mod:`~pyro_iw.ranks.particles` for why.

**Particles chosen by weight** (``backward_particles``) are drawn from all S by the uniforms of the group's
first rank, which come with its log-weights: the gradient is that of one process. Since all k' may fall to one
rank, each runs its model again on k' particles, those it was not given with weight 0.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._support.devices import wide_dtype
from .._support.nested import leaves, map_leaves
from ..bounds import Bound
from ..ranks.particles import ParticleGroup
from ..resampling import systematic_at
from ..tracing.minibatches import DrawnApart
from ..tracing.traces import PARTICLE_PLATE, Route
from .estimator import Estimator
from .graph import leaves_below
from .refusals import refuse_choice_of_values
from .surrogate import Estimate, Weights

__all__ = ["OverRanks", "over_ranks", "same_minibatches"]


class OverRanks(Estimator):
    """An estimator for this rank's share of the particles.

    Arguments:
        inner: that of one process, of one level or two.
        ranks: the share.
        chosen: the number k' of particles that the model's gradient comes from; None for all.
    """

    def __init__(self, inner: Any, ranks: ParticleGroup, chosen: int | None = None) -> None:
        self.inner = inner
        self.ranks = ranks
        self.chosen = chosen
        self._everything: Any = None  # the statistics of all particles
        self._weights: Any = None
        self._offsets: Tensor | None = None

    def wrapped(self, wrap: Callable[[Any], Any]) -> OverRanks:
        return OverRanks(wrap(self.inner), self.ranks, self.chosen)

    def route(self, bound: Bound) -> Route:
        return self.inner.route(bound)

    def check(self, particles: Any, bound: Bound) -> None:
        self.inner.check(particles, bound)
        if self.chosen is not None:
            refuse_choice_of_values(particles.enumerated)
        if self.ranks.is_due and not self.ranks.is_recording:
            self.ranks.parameters = [weakref.ref(leaf) for leaf in leaves_below(*self.densities(particles))]

    def guide_weights(
        self, bound: Bound, log_w: Tensor, b: Tensor, log_q_weight: float | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.inner.guide_weights(bound, log_w, b, log_q_weight)

    def densities(self, particles: Any) -> list[Tensor]:
        return self.inner.densities(particles)

    def guide_terms(self, particles: Any, weights: Weights) -> list:
        return self.inner.guide_terms(particles, weights)

    def estimate(self, particles: Any, bound: Bound, route: Route | None = None) -> Estimate:
        log_w = map_leaves(Tensor.detach, particles.statistics)
        estimate = self.evaluate(bound, log_w, particles.scale)
        if not torch.is_grad_enabled():
            return estimate
        weights: Any = self.weights(bound, log_w, particles.log_q_weight, particles.scale)
        if self.chosen is not None:
            weights, _ = self.choose(weights, _crosses(route), self.chosen)
        return estimate._replace(loss=self.attach(estimate.loss, particles, weights, route))

    def evaluate(self, bound: Bound, log_w: Any, scale: Any) -> Estimate:
        """The bound and the loss of all ranks' particles; arguments as of :meth:`Estimator.evaluate`."""
        self._everything = self._gather(log_w)
        return self.inner.evaluate(bound, self._everything, scale)

    def _gather(self, own: Any) -> Any:
        """Statistics of all particles, of the shapes of these but for the first dim."""
        parts = list(leaves(own))
        if self.chosen is not None:
            cells = own.shape[1:]
            parts.append(torch.rand((1, *cells), dtype=wide_dtype(own.device), device=own.device))
        flat = [part.reshape(-1) for part in parts]
        everything = self.ranks.exchange(flat[0] if len(flat) == 1 else torch.cat(flat))
        pieces = iter(everything.split([len(part) for part in flat], 1))

        def joined(part: Tensor) -> Tensor:
            rows = next(pieces).reshape(self.ranks.size * part.shape[0], *part.shape[1:])
            return rows.to(part.dtype)

        result = map_leaves(joined, own)
        if self.chosen is not None:
            self._offsets = joined(parts[-1])[:1]
        return result

    def weights(self, bound: Bound, log_w: Any, log_q_weight: Any, scale: Any) -> Weights:
        """The weights of this rank's particles, times P; ``log_w`` is what :meth:`evaluate` was given."""
        every: Any = self.inner.weights(bound, self._everything, log_q_weight, scale)
        # A compiled step keeps this estimator, which is not to keep what belongs to all particles.
        self._everything = None
        self._weights = every if self.chosen is not None else None
        return map_leaves(self._averaged, every.of(self.ranks.block))

    def _averaged(self, weights: Tensor) -> Tensor:
        return self.ranks.size * weights

    def attach(self, loss: Tensor, particles: Any, weights: Any, route: Route | None = None) -> Tensor:
        return self.inner.attach(loss, particles, weights, route)

    def choose(self, weights: Weights, crosses: bool, count: int) -> tuple[Weights, Tensor]:
        """Draw k' of all particles, in each cell; see :meth:`Estimator.choose`.

        Returns:
            The weights of those that are this rank's, and their places among its own. Particles that were
            not drawn come with weights 0, to fill the k'; or all S / P come in their order, if those are no
            more.
        """
        block, every = self.ranks.block, self._weights
        self._weights = None
        path = every.path if crosses else every.model
        total = every.model.abs() + path.abs()
        assert self._offsets is not None
        indices = systematic_at(total, count, self._offsets)
        once = torch.ones_like(total[:1]).expand(indices.shape)
        times = torch.zeros_like(total).scatter_add(0, indices, once)
        mean, own = total.sum(0) / count, times[block]
        if count < len(own):
            places = own.topk(count, 0).indices
        else:
            places = torch.arange(len(own), device=own.device)
            places = places.reshape(-1, *[1] * (own.dim() - 1)).expand(own.shape)
        model, path = (
            self._averaged(torch.where(own > 0, w[block] / total[block], 0.0) * own * mean).gather(0, places)
            for w in (every.model, path)
        )
        return weights._replace(model=model, path=path), places


def over_ranks(estimator: Any, ranks: ParticleGroup, chosen: int | None = None) -> Any:
    """The estimator for this rank's share, or itself where it has all particles; see :class:`OverRanks`."""
    return estimator if ranks.size == 1 else OverRanks(estimator, ranks, chosen)


def same_minibatches(ranks: ParticleGroup) -> DrawnApart:
    """A handler that draws plates' minibatches, the same on all ranks, and notes them where that is due."""
    if not ranks.is_due or ranks.is_recording:
        return DrawnApart(ranks.minibatch)
    ranks.seen = DrawnApart(ranks.minibatch, PARTICLE_PLATE)
    return ranks.seen


def _crosses(route: Route | None) -> bool:
    return route is not None and route.through is not None
