r"""Gradient estimators: from particle weights to one scalar whose backward pass gives the gradients.

Given particles and a bound, with particle weights ``a`` for the model's parameters :math:`\theta` and ``b``
for the guide's parameters :math:`\phi`, an estimator returns the loss as a tensor. Its value is minus the
bound; its ``.backward()`` leaves the estimator's gradients in ``.grad``. The two are tied together by
an autograd node, not by adding and subtracting surrogates, so that a weight of 0 beside a log-weight
of -inf stays 0.

``reparam`` is the total derivative along reparameterised particles,

.. math::
    \nabla_\theta = \sum_i a_i\, \nabla_\theta \log p_\theta(x, z_i), \qquad
    \nabla_\phi = \sum_i b_i\, \nabla_\phi \big[\log p_\theta(x, z_i(\phi)) - \log q_\phi(z_i(\phi))\big].

Where :math:`a \ne b` (PIWAE) both still come from one forward and one backward pass: the model sees
:math:`z'_i = B(z_i)`, where :math:`B` is the identity whose backward multiplies the gradient of particle
:math:`i` by :math:`b_i / a_i`. What reaches :math:`\theta` is weighted by :math:`a_i`, what reaches
:math:`\phi` through the particle by :math:`a_i\, b_i / a_i`.

References:
    | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114
    | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
    | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
      https://arxiv.org/abs/1802.04537
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bounds import Bound
from .particles import Particles

__all__ = ["ESTIMATORS", "Boundary", "Estimate", "Estimator", "Reparam", "get_estimator"]

# Far below float32's rounding of a, yet large enough that b / a stays finite where a underflows.
_UNDERFLOW = 2.0**-60


class Estimate(NamedTuple):
    """One evaluation of a bound.

    Attributes:
        loss: minus the bound, summed over cells and scaled; a scalar that can be differentiated once.
        bound: the bound of every cell in nats, unscaled, detached, of shape ``[*cells]``.
    """

    loss: Tensor
    bound: Tensor


class Boundary:
    """The identity between a guide's values and the model's densities; its backward rescales particles.

    The factors are known only once the model has run, so they are set in :meth:`set_ratio` between the
    forward and the backward pass.
    """

    def __init__(self) -> None:
        self._ratio: Tensor | None = None

    def __call__(self, value: Tensor, event_dim: int, particle: int | None) -> Tensor:
        """Pass a value through.

        Arguments:
            value: the value of a latent site, of shape ``[*batch, *event]``.
            event_dim: its number of event dims.
            particle: index of the particle it belongs to; None if ``batch`` holds all of them.
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
    kind = value.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if autocast or value.dtype == torch.float16:
        raise ValueError(
            "Separate objectives for model and guide (PIWAE) need float32, float64 or bfloat16: in float16 "
            "the ratio of their particle weights overflows. Run this loss in another dtype, or take "
            "MIWAE_ELBO."
        )


class Estimator(ABC):
    """Base class: how the particle weights of a bound become gradients."""

    def boundary(self, bound: Bound) -> Boundary | None:
        """What the guide's values pass through on their way into the model, if anything."""
        return None

    @abstractmethod
    def check(self, particles: Particles) -> None:
        """Refuse particles whose gradient this estimator would get wrong.

        Raises:
            ValueError: naming the sites and what to do.
        """

    @abstractmethod
    def estimate(self, particles: Particles, bound: Bound, boundary: Boundary | None) -> Estimate:
        """The loss of these particles under the bound."""


class Reparam(Estimator):
    """Total derivative along reparameterised particles, for any bound."""

    def boundary(self, bound: Bound) -> Boundary | None:
        return None if bound.guide_bound is bound else Boundary()

    def check(self, particles: Particles) -> None:
        names = particles.nonreparameterized_sites()
        if names:
            listed = ", ".join(repr(name) for name in names)
            raise ValueError(
                f"Guide site(s) {listed} cannot be reparameterised, so estimator='reparam' would give "
                "their parameters a zero gradient without a word. Use a distribution with rsample at "
                "these sites, marginalise them out of the model, or train this pair with "
                "pyro.infer.TraceGraph_ELBO (score function) or TraceEnum_ELBO (enumeration)."
            )

    def estimate(self, particles: Particles, bound: Bound, boundary: Boundary | None) -> Estimate:
        log_w = particles.log_weights.detach()
        grouped = log_w.reshape(bound.M, bound.K, *log_w.shape[1:])
        value = bound.value(grouped)
        if value.shape != log_w.shape[1:]:
            raise ValueError(
                f"{bound!r}.value() must reduce log-weights [M, K, *cells] of shape {list(grouped.shape)} to "
                f"[*cells] = {list(log_w.shape[1:])}, but gave {list(value.shape)}."
            )
        loss = -(particles.scale * value).sum()
        if not torch.is_grad_enabled():
            return Estimate(loss, value)
        a = bound.weights(grouped)
        b = a if boundary is None else bound.guide_bound.weights(grouped)
        if boundary is not None:
            a = a + _UNDERFLOW * b
            ratio = torch.where(a == 0, 1.0, b / a)
            boundary.set_ratio(particles.to_batch(ratio.reshape(log_w.shape)))
        grad_p = -particles.scale * a.reshape(log_w.shape)
        grad_q = particles.scale * b.reshape(log_w.shape)
        loss = _Weighted.apply(particles.log_p, particles.log_q, loss, grad_p, grad_q)
        return Estimate(loss, value)


class _Weighted(torch.autograd.Function):
    """A loss whose gradient with respect to ``log_p`` and ``log_q`` is given."""

    @staticmethod
    def forward(
        ctx: Any, log_p: Tensor, log_q: Tensor, loss: Tensor, grad_p: Tensor, grad_q: Tensor
    ) -> Tensor:
        ctx.save_for_backward(grad_p, grad_q)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(
                "An importance-weighted loss can be differentiated once: its particle weights are constants "
                "of the backward pass, so a second derivative (create_graph=True) would be wrong."
            )
        grad_p, grad_q = ctx.saved_tensors
        needs_p, needs_q = ctx.needs_input_grad[:2]
        return (
            grad * grad_p if needs_p else None,
            grad * grad_q if needs_q else None,
            None,
            None,
            None,
        )


#: Estimators by the name that ``estimator=`` takes. ``"auto"`` is ``"reparam"`` where every guide site
#: allows it, and an error that names the site where one does not.
ESTIMATORS: dict[str, type[Estimator]] = {"auto": Reparam, "reparam": Reparam}


def get_estimator(name: str) -> Estimator:
    """The estimator of that name.

    Raises:
        ValueError: if there is none, listing those there are.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {sorted(ESTIMATORS)}, got {name!r}")
    return ESTIMATORS[name]()
