r"""Gradients from a few of the particles, chosen by weight: ``backward_particles=``.

The bound needs the densities of all S particles, but most of them weigh next to nothing in its gradient. So
the guide runs on all of them with gradients and the model without; then :math:`k'` particles of each cell are
drawn with probabilities :math:`\pi_i`, and the model runs once more, on those alone and with gradients. With
:math:`a` the weights of the model's parameters and :math:`b` those of the path (see
:mod:`~pyro_iw.gradients.estimators`), the model's part of the gradient is

.. math:: \sum_i a_i \nabla_\theta \log p_\theta(x, z_i) + b_i \nabla_\phi \log p_\theta(x, z_i) \approx
    \frac{1}{k'} \sum_{j=1}^{k'} \frac{a_{I_j}}{\pi_{I_j}} \nabla_\theta \log p_\theta(x, z_{I_j})
    + \frac{b_{I_j}}{\pi_{I_j}} \nabla_\phi \log p_\theta(x, z_{I_j}), \qquad
    \pi_i \propto |a_i| + |b_i|,

which is unbiased, since :math:`i` is drawn :math:`k' \pi_i` times on average. The indices come from
:func:`~pyro_iw.resampling.systematic` resampling. The value of the bound and the part of the gradient that
comes from the guide's own density stay those of all S particles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from ..bounds import Bound
from ..tracing.batch_norm import watch_batch_norm
from ..tracing.messages import guide_messenger
from ..tracing.minibatches import OneMinibatch
from ..tracing.particles import Particles
from ..tracing.runner import Runner
from ..tracing.traces import Index, Pair, Route, Traces
from .estimator import Estimator
from .refusals import refuse_another_density, refuse_choice_of_values
from .surrogate import Boundary, Estimate, boundary_ratio, tie

__all__ = ["estimate_from_subset"]


def estimate_from_subset(
    runner: Runner,
    collect: Callable[[Traces], Particles],
    pair: Pair,
    estimator: Estimator,
    bound: Bound,
    route: Route,
    num_particles: int,
    count: int,
) -> tuple[Particles, Estimate]:
    """The loss of S particles, with a gradient from some of them.

    Arguments:
        runner: runs the pair, vectorised.
        collect: reads the particles off their traces.
        pair: the pair and its arguments.
        estimator: the estimator.
        bound: the bound.
        route: how latent values travel, as the estimator wants it.
        num_particles: the number S of particles.
        count: the number k' < S of particles to choose in each cell.

    Raises:
        ValueError: as the estimator's ``check``; if the guide runs the model itself; and under validation if
            the model gives another density when it is run again.
    """
    messenger = guide_messenger(pair.guide)
    if messenger is not None:
        raise ValueError(
            f"backward_particles runs the guide and the model apart, but {type(messenger)} "
            "is a guide messenger, which runs the model itself. Use chunk_size to save memory instead."
        )
    boundary = route.through if isinstance(route.through, Boundary) else None
    with OneMinibatch() as minibatch:
        forward = route._replace(through=None, model_gradients=False)
        traces = runner.run(pair, num_particles, forward, minibatch)
        particles = collect(traces)
        refuse_choice_of_values(particles.enumerated)
        estimator.check(particles, bound)
        log_w = particles.log_weights.detach()
        estimate = estimator.evaluate(bound, log_w, particles.scale)
        weights = estimator.weights(bound, log_w, particles.log_q_weight, particles.scale)
        chosen, indices = estimator.choose(weights, boundary is not None, count)
        places = particles.to_batch(indices)

        def through(value: Tensor, event_dim: int, particle: Index, site: Any) -> Tensor:
            value = _gather(value, event_dim, places)
            return value if boundary is None else boundary(value, event_dim, particle)

        torch.clear_autocast_cache()  # of casts made without gradients
        with watch_batch_norm(restore=True) as normalised:
            log_p = particles.log_p_of(runner.run_model_again(pair, traces, len(indices), through))
    # In train mode BatchNorm, of which the runner has warned, sees other particles now.
    if is_validation_enabled() and not normalised:
        refuse_another_density(log_p, particles.log_p.gather(0, indices), _RUN_AGAIN)
    model = chosen.model
    if boundary is not None:
        model, ratio = boundary_ratio(model, chosen.path)
        boundary.set_ratio(particles.to_batch(ratio))
    terms = [(log_p, model), *estimator.guide_terms(particles, weights)]
    return particles, estimate._replace(loss=tie(estimate.loss, particles.scale, terms))


def _gather(value: Tensor, event_dim: int, places: Tensor) -> Tensor:
    """The values of some particles.

    Arguments:
        value: values of all particles, of shape ``[*batch, *event]``.
        event_dim: number of event dims.
        places: the particles to take, of shape ``[k', *batch]``, with size 1 at every dim that is no cell.

    Returns:
        Values of shape ``[k', *batch, *event]``; ``value`` itself if it does not vary over particles.
    """
    batch = value.shape[: value.dim() - event_dim]
    if len(batch) < places.dim() or batch[0] == 1:
        return value
    event = value.shape[len(batch) :]
    rest = torch.broadcast_shapes(batch[1:], places.shape[1:])
    places = places.expand(-1, *rest).reshape(-1, *rest, *[1] * event_dim).expand(-1, *rest, *event)
    return value.expand(-1, *rest, *event).gather(0, places)


_RUN_AGAIN = (
    "The model gives another density when it is run again on some of its particles, as backward_particles "
    "does. Put its random layers (dropout) in eval mode, let particles not depend on one another, or leave "
    "out backward_particles."
)
