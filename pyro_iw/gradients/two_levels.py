r"""Gradient estimators for particles on two levels: a bound of the global ones over bounds of the local ones.

With the local log-weights :math:`\ell_{snl}`, their bounds :math:`U_{sn}`, the global log-weights
:math:`\ell_s` that those are part of, and the outer bound :math:`V`, see
:mod:`~pyro_iw.tracing.levels`, a density's weight in the gradient follows by the chain rule,

.. math:: a_s = \frac{\partial V}{\partial \ell_s}, \qquad
    a_{snl} = a_s\, c_n\, \frac{\partial U_{sn}}{\partial \ell_{snl}},

for what lies outside of the local plates and inside of them. The model's parameters and ``reparam`` and
``stl`` of the guide's take these as they are (with the outer bound's ``guide_bound`` for the guide).

**score**, **vimco**, **ovis**: a draw without a path has the signal :math:`V - V_{-i}`, with the log-weight
of one local particle replaced by what the others of its cell suggest, or that of one global particle by what
the other global ones do.

**dreg**: given :math:`g_s`, the score of a local particle comes from :math:`\log q(z_{snl} \mid g_s)` alone,
of which :math:`g_s` is a parameter like any other. Its weight :math:`a_{snl}` depends on :math:`z_{snl}`
through :math:`\ell_{snl}` alone, so the identity of :class:`~pyro_iw.gradients.estimators.DReG` holds with

.. math:: b_{snl} = a_{snl} - \Big[ \frac{\partial^2 V}{\partial \ell_s^2}
    \Big(c_n \frac{\partial U_{sn}}{\partial \ell_{snl}}\Big)^2
    + a_s\, c_n \frac{\partial^2 U_{sn}}{\partial \ell_{snl}^2} \Big]

for the path from :math:`z_{snl}`, to :math:`\phi` and through the guide to :math:`g_s`, and without
:math:`\log q`'s own dependence on :math:`\phi` and :math:`g_s`. What depends on :math:`g_s` otherwise keeps
its weight :math:`a`. The score of :math:`g_s` itself has the expectation 0 where the outer bound is linear
and is left out; where it is not, :math:`a_s` depends on :math:`g_s` through the local weights too, and the
global latents have the total derivative, as under ``reparam``. Either is unbiased.

References:
    | Variational Inference with Locally Enhanced Bounds for Hierarchical Models (Geffner & Domke, 2022),
      https://arxiv.org/abs/2203.04432
    | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2018),
      https://arxiv.org/abs/1810.04152
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._support.nested import map_leaves
from ..bounds import Bound
from ..tracing.levels import LocalScale, LogWeights, Scales, TwoLevels
from ..tracing.local_particles import local_plate_of
from ..tracing.particles import Particles
from ..tracing.traces import Index, Rescored, Route
from .estimator import Estimator, grouped_by
from .estimators import OVIS, VIMCO, DReG, Reparam, Score, get_estimator
from .surrogate import Boundary, Estimate, Term, Weights, boundary_ratio, tie

__all__ = ["LocallyEnhanced", "TwoLevelEstimator", "TwoLevelWeights", "total_log_weights"]


class LocallyEnhanced:
    """An outer bound over the bounds of local plates.

    Arguments:
        outer: the bound of the global particles.
        local: that of the local particles of each cell, by plate.

    Raises:
        ValueError: if the guide climbs another local bound than the model.
    """

    def __init__(self, outer: Bound, local: Mapping[str, Bound]) -> None:
        self.outer = outer
        self.local = dict(local)
        for name, inner in self.local.items():
            if inner.guide_bound is not inner:
                raise ValueError(
                    f"The local bound {inner!r} of plate {name!r} has another for the guide, "
                    f"{inner.guide_bound!r}. A global latent would need the weights of both at once. Take "
                    "one of them for both, or use it as the outer bound."
                )

    @property
    def num_particles(self) -> int:
        """Number of the global particles."""
        return self.outer.num_particles

    @property
    def is_linear(self) -> bool:
        """Whether the outer bound is, for model and guide."""
        return self.outer.is_linear and self.outer.guide_bound.is_linear

    @property
    def numbers(self) -> dict[str, int]:
        """Number of the local particles, by plate."""
        return {name: bound.num_particles for name, bound in self.local.items()}


class TwoLevelWeights(NamedTuple):
    """The weights of both levels.

    Attributes:
        top: those of the particles.
        local: those of the local particles of each plate.
    """

    top: Weights
    local: tuple[Weights, ...]

    def of(self, particles: slice) -> TwoLevelWeights:
        """The weights of some of the particles."""
        return TwoLevelWeights(
            self.top.of(particles), tuple([weights.of(particles) for weights in self.local])
        )


class Boundaries:
    """A boundary for each level.

    Arguments:
        names: the names of the local plates.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.top = Boundary()
        self.local = {name: Boundary() for name in names}

    def __call__(self, value: Tensor, event_dim: int, particle: Index, site: Any) -> Tensor:
        """Pass a value through that of its site; arguments as of :class:`Boundary`."""
        name = local_plate_of(site["name"], site["cond_indep_stack"], self.local)
        if name is not None:
            return self.local[name](value, event_dim, particle)
        return self.top(value, event_dim, particle if particle is None else particle[0])  # type: ignore[index]


class TwoLevelEstimator:
    """How the weights of particles on two levels become gradients.

    It speaks as an :class:`~pyro_iw.gradients.estimators.Estimator` does, of a :class:`LocallyEnhanced` bound
    and of particles on two levels.

    Arguments:
        name: the estimator's.
        bound: the bound.

    Raises:
        ValueError: if there is none of that name, or it has no meaning on two levels.
    """

    def __init__(self, name: str, bound: LocallyEnhanced) -> None:
        kinds = {"auto", "reparam", "stl", "dreg", "score", "vimco", "ovis"}
        self.kind = get_estimator(name)
        if name not in kinds:
            raise ValueError(
                f"estimator={name!r} has no form for particles on two levels. Pass one of {sorted(kinds)}."
            )
        self.bound = bound
        self.names = tuple(bound.local)
        #: The estimator of the global latents.
        self.top = self._without_group(bound.outer.guide_bound)
        if isinstance(self.kind, DReG) and not bound.is_linear:
            self.top = Reparam()
        #: Those of each plate's local latents.
        self.local = [self._without_group(inner) for inner in bound.local.values()]

    def _without_group(self, bound: Bound) -> Estimator:
        """The estimator, or for one that looks at the others of a group of a single particle, score."""
        return Score() if isinstance(self.kind, VIMCO | OVIS) and bound.K == 1 else self.kind

    def route(self, bound: LocallyEnhanced) -> Route:
        """How latent values are to travel from guide to model."""
        rescored = self.kind.route(bound.outer).rescored
        dreg = isinstance(self.kind, DReG)
        if dreg:
            rescored = (Rescored(self._is_local, self._is_local),)
            if self.top is self.kind:
                rescored = (Rescored(read=lambda site: not self._is_local(site)), *rescored)
        crosses = dreg or bound.outer.guide_bound is not bound.outer
        return Route(through=Boundaries(self.names) if crosses else None, rescored=rescored)

    def _is_local(self, site: Any) -> bool:
        return local_plate_of(site["name"], site["cond_indep_stack"], self.names) is not None

    def check(self, particles: TwoLevels, bound: LocallyEnhanced) -> None:
        """Refuse particles whose gradient this estimator would get wrong.

        Raises:
            ValueError: naming the sites and what to do.
        """
        self.top.check(particles.top, bound.outer)
        for kind, (name, level) in zip(self.local, particles.local.items(), strict=True):
            inner = bound.local[name]
            # dreg asks whether the weights vary with the log-weights, which they do by either bound.
            kind.check(level, bound.outer if inner.is_linear and isinstance(kind, DReG) else inner)

    def densities(self, particles: TwoLevels) -> list[Tensor]:
        """All that is weighed in the gradient."""
        return [density for kind, level in self._levels(particles) for density in kind.densities(level)]

    def _levels(self, particles: TwoLevels) -> list[tuple[Estimator, Particles]]:
        return list(zip([self.top, *self.local], particles.levels, strict=True))

    def estimate(self, particles: TwoLevels, bound: LocallyEnhanced, route: Route | None = None) -> Estimate:
        """The loss of these particles; arguments and errors as of :meth:`Estimator.estimate`."""
        log_w = map_leaves(Tensor.detach, particles.log_weights)
        estimate = self.evaluate(bound, log_w, particles.scale)
        if not torch.is_grad_enabled():
            return estimate
        weights = self.weights(bound, log_w, particles.log_q_weight, particles.scale)
        return estimate._replace(loss=self.attach(estimate.loss, particles, weights, route))

    def evaluate(self, bound: LocallyEnhanced, log_w: LogWeights, scale: Scales) -> Estimate:
        """The bound and the loss without gradients; arguments and errors as of :meth:`Estimator.evaluate`."""
        return self.top.evaluate(bound.outer, total_log_weights(bound, log_w, scale), scale.outside)

    def weights(
        self,
        bound: LocallyEnhanced,
        log_w: LogWeights,
        log_q_weight: tuple[float | Tensor, ...],
        scale: Scales,
    ) -> TwoLevelWeights:
        """The weights of all particles; arguments and errors as of :meth:`Estimator.weights`."""
        total = total_log_weights(bound, log_w, scale)
        top = self.top.weights(bound.outer, total, log_q_weight[0], scale.outside)
        above = Reparam().weights(bound.outer, total, 1.0, scale.outside)
        local = []
        for i, (kind, inner) in enumerate(zip(self.local, bound.local.values(), strict=True)):
            level = _Local(bound.outer.guide_bound, inner, total, above, log_w.local[i], scale.local[i])
            local.append(level.weights(kind, log_q_weight[1 + i]))
        return TwoLevelWeights(top, tuple(local))

    def attach(
        self, loss: Tensor, particles: TwoLevels, weights: TwoLevelWeights, route: Route | None = None
    ) -> Tensor:
        """Give the loss the gradient of these particles; arguments as of :meth:`Estimator.attach`."""
        boundaries: list[Boundary | None] = [None] * (1 + len(self.names))
        if route is not None and isinstance(route.through, Boundaries):
            boundaries = [route.through.top, *route.through.local.values()]
        terms: list[Term] = []
        levels = zip(self._levels(particles), [weights.top, *weights.local], boundaries, strict=True)
        for (kind, level), own, boundary in levels:
            model = own.model
            if boundary is not None:
                model, ratio = boundary_ratio(model, own.path)
                boundary.set_ratio(level.to_batch(ratio))
            terms += [(level.log_p, model), *kind.guide_terms(level, own)]
        return tie(loss, particles.scale.outside, terms)


class _Local(NamedTuple):
    """What the weights of a plate's local particles follow from.

    Attributes:
        outer: the outer bound, that of the guide.
        inner: the bound of a cell.
        total: log-weights of the particles, of shape ``[S, *cells]`` above, local bounds included.
        above: their weights in the outer bound of the model, and as ``path`` in that of the guide.
        log_w: log-weights of the local particles, of shape ``[S, L, *cells]``.
        scale: how the cells add up.
    """

    outer: Bound
    inner: Bound
    total: Tensor
    above: Weights
    log_w: Tensor
    scale: LocalScale

    def weights(self, kind: Estimator, log_q_weight: float | Tensor) -> Weights:
        """The weights, each of the shape of ``log_w``.

        Arguments:
            kind: the estimator.
            log_q_weight: the weight of log q within ``log_w``.
        """
        grouped = _grouped(self.log_w, self.inner)
        u = self.inner.weights(grouped)
        a, b = (_ungrouped(self.scale.spread(w) * u) for w in (self.above.model, self.above.path))
        if isinstance(kind, Score):
            return Weights(a, b, (b, self._signal(kind, grouped)))
        path = b
        if isinstance(kind, DReG) and not (self.inner.is_linear and self.outer.is_linear):
            path = b - log_q_weight * _ungrouped(self._curvature(grouped, u))
        return Weights(a, path, (path,) * len(kind.guide_densities))

    def _curvature(self, grouped: Tensor, u: Tensor) -> Tensor:
        """The second derivative of the outer bound by each local log-weight, as ``[M, K, S, *cells]``."""
        own = self.scale.spread(self.above.path) * (u - self.inner.path_weights(grouped))
        if self.outer.is_linear:
            return own
        rows = grouped_by(self.total, self.outer)
        h = (self.outer.weights(rows) - self.outer.path_weights(rows)).reshape(self.total.shape)
        return own + self.scale.scale * self.scale.spread(h) * u**2

    def _signal(self, kind: Score, grouped: Tensor) -> Tensor:
        """The outer bound less what it is without a local particle, of the shape of ``log_w``."""
        rows = grouped_by(self.total, self.outer)
        if self.inner.num_particles == 1:
            # Nothing is left in the cell to compare with, but there are the other global particles.
            _, (_, signal) = Score().guide_weights(self.outer, rows, rows, 1.0)
            return self._broadcast(signal.reshape(self.total.shape)).expand(self.log_w.shape)
        _, (_, difference) = kind.guide_weights(self.inner, grouped, grouped, 1.0)
        difference = _ungrouped(difference)  # of the cell's bound
        if self.outer.is_linear:
            return self.scale.spread(self.above.path).unsqueeze(1) * difference
        total = self.total
        if self.outer.is_shift_equivariant:  # the difference would lose its digits
            top = total.amax(0)
            total = total - top.masked_fill(~top.isfinite(), 0.0)
        # To the outer bound, local particles and their cells are so many more cells.
        total = self._broadcast(total).expand(self.log_w.shape)
        changed = total - self.scale.scale * difference
        signal = self.outer.difference(grouped_by(total, self.outer), grouped_by(changed, self.outer))
        signal = signal.reshape(total.shape)
        return signal.masked_fill(~signal.isfinite(), 0.0)

    def _broadcast(self, per_top: Tensor) -> Tensor:
        """``[S, *cells]`` above, so that it broadcasts to ``log_w``."""
        return self.scale._replace(scale=1.0).spread(per_top).unsqueeze(1)


def total_log_weights(bound: LocallyEnhanced, log_w: LogWeights, scale: Scales) -> Tensor:
    """The particles' log-weights with the bounds of their local ones, of shape ``[S, *cells]``, in nats.

    Arguments:
        bound: the bound.
        log_w: the log-weights of both levels.
        scale: what they are scaled by.

    Raises:
        ValueError: if the value of a local bound has the wrong shape.
    """
    values = []
    for part, inner in zip(log_w.local, bound.local.values(), strict=True):
        value = inner.value(_grouped(part, inner))
        shape = part.shape[:1] + part.shape[2:]
        if value.shape != shape:
            raise ValueError(
                f"{inner!r}.value() must reduce log-weights [M, K, *cells] of shape "
                f"{[inner.M, inner.K, *shape]} to [*cells] = {list(shape)}, but gave {list(value.shape)}."
            )
        values.append(value)
    return scale.total(log_w.top, values)


def _grouped(log_w: Tensor, bound: Bound) -> Tensor:
    """``[S, L, *cells]`` as ``[M, K, S, *cells]``: to a local bound the particles are so many more cells."""
    return log_w.movedim(1, 0).reshape(bound.M, bound.K, log_w.shape[0], *log_w.shape[2:])


def _ungrouped(weights: Tensor) -> Tensor:
    """``[M, K, S, *cells]`` as ``[S, L, *cells]``."""
    return weights.flatten(0, 1).movedim(0, 1)
