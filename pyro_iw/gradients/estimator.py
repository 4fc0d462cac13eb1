r"""What an estimator is: from particles and a bound to a loss, and what each has to say of the guide.

The base of those in :mod:`~pyro_iw.gradients.estimators`. It takes two steps, which
:mod:`~pyro_iw.gradients.chunks` and :mod:`~pyro_iw.gradients.backward_subset` take apart: all weights follow
from the log-weights of all particles; a gradient, from the weights and the densities of any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import Bound
from ..resampling import systematic
from ..tracing.particles import Particles
from ..tracing.traces import Route
from .refusals import refuse_baselines
from .surrogate import Boundary, Estimate, Term, Weights, boundary_ratio, tie

__all__ = ["Density", "Estimator", "grouped_by"]

#: One of the guide's densities, of shape ``[S, *cells]``, as read off the particles.
Density = Callable[[Particles], Tensor]


class Estimator(ABC):
    """Base class: how the particle weights of a bound become gradients."""

    #: The name that ``estimator=`` takes.
    name: ClassVar[str]

    #: What the guide's gradient is made of, apart from the path through the model.
    guide_densities: ClassVar[tuple[Density, ...]]

    def route(self, bound: Bound) -> Route:
        """How latent values are to travel from guide to model, where they may pass a :class:`Boundary`."""
        return Route(through=None if bound.guide_bound is bound else Boundary())

    def check(self, particles: Particles, bound: Bound) -> None:
        """Refuse particles whose gradient this estimator would get wrong.

        Raises:
            ValueError: naming the sites and what to do.
        """
        refuse_baselines(particles.guide_sites)

    @abstractmethod
    def guide_weights(
        self, bound: Bound, log_w: Tensor, b: Tensor, log_q_weight: float | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What makes the guide's gradient.

        Arguments:
            bound: the guide's bound.
            log_w: log-weights, of shape ``[M, K, *cells]``.
            b: the bound's weights of them, of the same shape.
            log_q_weight: the weight of log q within them, see :class:`Particles`.

        Returns:
            The weights of the path through the model, and those of each of :attr:`guide_densities`; all of
            the shape of ``log_w``.
        """

    def estimate(self, particles: Particles, bound: Bound, route: Route | None = None) -> Estimate:
        """The loss of these particles under the bound.

        Arguments:
            particles: the particles.
            bound: the bound.
            route: the one they came by, as :meth:`route` gave it; needed for gradients alone.

        Raises:
            ValueError: if the bound's value has the wrong shape.
        """
        log_w = particles.statistics.detach()
        estimate = self.evaluate(bound, log_w, particles.scale)
        if not torch.is_grad_enabled():
            return estimate
        weights = self.weights(bound, log_w, particles.log_q_weight, particles.scale)
        return estimate._replace(loss=self.attach(estimate.loss, particles, weights, route))

    def evaluate(self, bound: Bound, log_w: Tensor, scale: float | Tensor) -> Estimate:
        """The bound and the loss without gradients.

        Arguments:
            bound: the bound.
            log_w: log-weights, of shape ``[S, *cells]``, detached.
            scale: the factor outside the logarithm.

        Raises:
            ValueError: if the bound's value has the wrong shape.
        """
        cells = log_w.shape[1:]
        value = bound.value(grouped_by(log_w, bound))
        if value.shape != cells:
            raise ValueError(
                f"{bound!r}.value() must reduce log-weights [M, K, *cells] of shape "
                f"{[bound.M, bound.K, *cells]} to [*cells] = {list(cells)}, but gave {list(value.shape)}."
            )
        return Estimate(-(scale * value).sum(), value)

    def weights(
        self, bound: Bound, log_w: Tensor, log_q_weight: float | Tensor, scale: float | Tensor
    ) -> Weights:
        """The weights of all particles.

        The guide's bound sees them in groups of its own.

        Arguments:
            bound: the bound.
            log_w: log-weights, of shape ``[S, *cells]``, detached.
            log_q_weight: the weight of log q within them, see :class:`Particles`.
            scale: the factor outside the logarithm, which is not in these weights.

        Raises:
            ValueError: if the guide's bound takes another number of particles than the bound.
        """
        grouped, guide_bound = grouped_by(log_w, bound), bound.guide_bound
        a = b = bound.weights(grouped)
        if guide_bound is not bound:
            if guide_bound.num_particles != bound.num_particles:
                raise ValueError(
                    f"guide_bound of {bound!r} is {guide_bound!r}, of {guide_bound.num_particles} particles, "
                    f"but there are {bound.num_particles}: both see the same ones. Give the guide's bound M "
                    f"and K with M * K = {bound.num_particles}."
                )
            grouped = grouped_by(log_w, guide_bound)
            b = guide_bound.weights(grouped)
        path, guide = self.guide_weights(guide_bound, grouped, b, log_q_weight)
        model, path, *rest = (weights.reshape(log_w.shape) for weights in (a, path, *guide))
        return Weights(model, path, tuple(rest))

    def attach(
        self, loss: Tensor, particles: Particles, weights: Weights, route: Route | None = None
    ) -> Tensor:
        """Give the loss the gradient that comes from these particles.

        Arguments:
            loss: any scalar.
            particles: the particles.
            weights: their weights.
            route: the one they came by.
        """
        model = weights.model
        if route is not None and isinstance(route.through, Boundary):
            model, ratio = boundary_ratio(model, weights.path)
            route.through.set_ratio(particles.to_batch(ratio))
        return tie(loss, particles.scale, [(particles.log_p, model), *self.guide_terms(particles, weights)])

    def wrapped(self, wrap: Callable[[Estimator], Estimator]) -> Estimator:
        """This estimator inside of another."""
        return wrap(self)

    def choose(self, weights: Weights, crosses: bool, count: int) -> tuple[Weights, Tensor]:
        """Draw k' particles in each cell, by their weights.

        Arguments:
            weights: the weights of all particles.
            crosses: whether the path's weights are others than the model's.
            count: the number k' of particles.

        Returns:
            The weights, with those of model and path of the particles drawn alone, over k' π and of shape
            ``[k', *cells]``; the particles' places, of the same shape. In a cell where all weights are 0,
            they are 0 again.
        """
        path = weights.path if crosses else weights.model  # without a boundary it has those, or none
        total = weights.model.abs() + path.abs()
        places = systematic(total, count)
        own = total.gather(0, places)
        mean = total.sum(0) / count
        # Divided by its own share first: that is at most 1, where 1 / π could overflow.
        model, path = (
            torch.where(own > 0, w.gather(0, places) / own, 0.0) * mean for w in (weights.model, path)
        )
        return weights._replace(model=model, path=path), places

    def densities(self, particles: Particles) -> list[Tensor]:
        """All that is weighed in the gradient: the model's density and :attr:`guide_densities`."""
        return [particles.log_p, *(density(particles) for density in self.guide_densities)]

    def guide_terms(self, particles: Particles, weights: Weights) -> list[Term]:
        """The guide's densities of these particles, with their weights."""
        densities = [density(particles) for density in self.guide_densities]
        return list(zip(densities, weights.guide, strict=True))


def grouped_by(log_w: Tensor, bound: Bound) -> Tensor:
    """``[S, *cells]`` as the groups ``[M, K, *cells]`` of a bound."""
    return log_w.reshape(bound.M, bound.K, *log_w.shape[1:])
