r"""One scalar for several gradients: a loss whose backward pass weighs particles as it is told.

The value of a loss and its gradient are tied together by an autograd node, not by adding and subtracting
surrogates, so that a weight of 0 beside a log-weight of -inf stays 0.

Where the weights of the path through the model are not those of the model's parameters, the model sees
:math:`z'_i = B(z_i)`, where :math:`B`, the :class:`Boundary`, is the identity whose backward multiplies the
gradient of particle :math:`i` by the ratio of the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._support.devices import autocast_dtype
from ..tracing.traces import Index

__all__ = ["Boundary", "Estimate", "Term", "Weights", "boundary_ratio", "refuse_second_derivative", "tie"]

# Far below float32's rounding of a, yet large enough that b / a stays finite where a underflows.
_UNDERFLOW = 2.0**-60
# Below the rounding of a weight of 1, even for a path's weight that is larger by 1 / _UNDERFLOW.
_NEGLIGIBLE = 2.0**-90


class Estimate(NamedTuple):
    """One evaluation of a bound.

    Attributes:
        loss: minus the bound, summed over cells and scaled; a scalar that can be differentiated once.
        bound: the bound of every cell in nats, unscaled, detached, of shape ``[*cells]``.
    """

    loss: Tensor
    bound: Tensor


class Weights(NamedTuple):
    """What the particles' densities weigh in the gradient of a bound.

    Attributes:
        model: weights of log p for the model's parameters, of shape ``[S, *cells]``.
        path: weights of log p for what it depends on through the particles, of the same shape.
        guide: weights of the estimator's :attr:`~Estimator.guide_densities`, each of the same shape.
    """

    model: Tensor
    path: Tensor
    guide: tuple[Tensor, ...]

    def of(self, particles: slice) -> Weights:
        """The weights of some of the particles."""
        return Weights(self.model[particles], self.path[particles], tuple(w[particles] for w in self.guide))


#: A density of shape ``[S, *cells]`` and the particle weights of its gradient, of the same shape.
Term = tuple[Tensor, Tensor]


class Boundary:
    """The identity between a guide's values and the model's densities; its backward rescales particles.

    The factors are known only once the model has run, so they are set in :meth:`set_ratio` between the
    forward and the backward pass.
    """

    def __init__(self) -> None:
        self._ratio: Tensor | None = None

    def __call__(self, value: Tensor, event_dim: int, particle: Index, site: Any = None) -> Tensor:
        """Pass a value through.

        Arguments:
            value: the value of a latent site, of shape ``[*batch, *event]``.
            event_dim: its number of event dims.
            particle: index of the particle it belongs to; None if ``batch`` holds all of them.
            site: the site's message, which makes no difference here.
        """
        if not value.requires_grad:
            return value
        _refuse_half_precision(value)

        def rescale(grad: Tensor) -> Tensor:
            assert self._ratio is not None, "a boundary needs its ratio before the backward pass"
            ratio = self._ratio if particle is None else self._ratio[particle]
            return grad * ratio.reshape(ratio.shape + (1,) * event_dim).to(grad.dtype)

        # A view, so that the hook acts on what the model sees and not on the guide's own value.
        value = value.view_as(value)
        value.register_hook(rescale)
        return value

    def set_ratio(self, ratio: Tensor) -> None:
        """Set the factors b / a, of shape ``[S, *batch]`` with 1 for every dim that is no cell."""
        self._ratio = ratio


def _refuse_half_precision(value: Tensor) -> None:
    """float16 has too few exponents for the ratio of two weights: it would overflow without a word."""
    if torch.float16 in (autocast_dtype(value.device.type), value.dtype):
        raise ValueError(
            "Particle weights that differ between model and path (PIWAE, estimator='dreg') need float32, "
            "float64 or bfloat16: in float16 their ratio overflows. Run this loss in another dtype, or "
            "another bound or estimator."
        )


def boundary_ratio(model: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
    """The factors that a :class:`Boundary` needs to turn the model's weights into those of the path.

    Returns:
        The model's weights, with a trace of the path's where they underflow against those, and the ratio.
    """
    model = model + _UNDERFLOW * path.abs().copysign(model)
    return model, torch.where(model == 0, 1.0, path / model)


def tie(loss: Tensor, scale: float | Tensor, terms: Iterable[Term]) -> Tensor:
    """The loss with the gradient of minus the weighted sum of some densities, times the scale."""
    flat: list[Tensor] = []
    for density, weights in terms:
        flat += [density, -scale * _without_dust(weights)]
    return _Weighted.apply(loss, *flat)


def _without_dust(weights: Tensor) -> Tensor:
    """Weights too small to matter as 0.

    Training drives the weights of most particles down, and what is multiplied by those on their way to 0
    falls among the denormal numbers, on which processors are slower by an order of magnitude.
    """
    return weights.masked_fill(weights.abs() < _NEGLIGIBLE, 0.0)


def refuse_second_derivative() -> None:
    """To be called in a backward pass, where gradients are enabled under ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "An importance-weighted loss can be differentiated once: its particle weights are constants "
            "of the backward pass, so a second derivative (create_graph=True) would be wrong."
        )


class _Weighted(torch.autograd.Function):
    """A loss whose gradient with respect to each of some densities is given."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *terms: Tensor) -> Tensor:
        ctx.save_for_backward(*terms[1::2])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        grads: list[Tensor | None] = [None]
        for weights, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1::2], strict=True):
            grads += [grad * weights if needed else None, None]
        return tuple(grads)
