r"""Gradient estimators: from particle weights to one scalar whose backward pass gives the gradients.

Given particles and a bound, an estimator returns the loss as a tensor. Its value is minus the bound; its
``.backward()`` leaves the estimator's gradients in ``.grad``. The two are tied together by an autograd node,
not by adding and subtracting surrogates, so that a weight of 0 beside a log-weight of -inf stays 0.

The model's gradient is the same for all: the sum of :math:`a_i \nabla_\theta \log p_\theta(x, z_i)`, with
:math:`a = \partial V / \partial \ell`. The guide's is, with :math:`V_\phi` the guide's bound and
:math:`b = \partial V_\phi / \partial \ell`:

=======  ==============================================================================================
name     guide's gradient, a sum over particles i
=======  ==============================================================================================
reparam  :math:`b_i` times the total derivative of :math:`\ell_i` along its particle's path
stl      :math:`b_i` times the derivative along the path alone; biased for K > 1
dreg     :math:`b_i` less :math:`\partial^2 V_\phi / \partial \ell_i^2`, times that along the path alone
score    reparam's, plus :math:`V_\phi - V_{-i}` times the score of the sites without a path
vimco    the same with another control variate :math:`V_{-i}`
rws      the normalised weight times the score at stopped values: the wake phase, no path at all
=======  ==============================================================================================

**Two sets of weights, one backward pass.** Where the path's weights are not the model's, the model sees
:math:`z'_i = B(z_i)`, where :math:`B` is the identity whose backward multiplies the gradient of particle
:math:`i` by the ratio of the two. What reaches :math:`\theta` keeps its weight; what reaches :math:`\phi`
through the particle has the path's. B sits between the guide's values and the model's densities, never
inside the guide's sampling, so a hierarchy of latents is one latent to it.

**The path alone** is the total derivative less the score, which is the derivative of :math:`\log q_\phi` at
stopped values. That holds for hierarchies, flows and joint latents alike and needs no surgery on parameters.
It runs the guide (not the model) a second time, so a guide with layers that are random in themselves
(dropout) has to be in eval mode.

References:
    | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114
    | Reweighted Wake-Sleep (Bornschein & Bengio, 2014), https://arxiv.org/abs/1406.2751
    | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
    | Variational Inference for Monte Carlo Objectives (Mnih & Rezende, 2016),
      https://arxiv.org/abs/1602.06725
    | Sticking the Landing (Roeder et al., 2017), https://arxiv.org/abs/1703.09194
    | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
      https://arxiv.org/abs/1802.04537
    | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2018),
      https://arxiv.org/abs/1810.04152
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from .bounds import Bound
from .logmean import leave_one_out_logmeanexp, leave_one_out_mean, softmax
from .particles import Particles
from .traces import Route

__all__ = [
    "ESTIMATORS",
    "RWS",
    "STL",
    "VIMCO",
    "Boundary",
    "DReG",
    "Estimate",
    "Estimator",
    "Reparam",
    "Score",
    "get_estimator",
]

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


def _without_dust(weights: Tensor) -> Tensor:
    """Weights too small to matter as 0.

    Training drives the weights of most particles down, and what is multiplied by those on their way to 0
    falls among the denormal numbers, on which processors are slower by an order of magnitude.
    """
    return weights.masked_fill(weights.abs() < _NEGLIGIBLE, 0.0)


def _refuse_half_precision(value: Tensor) -> None:
    """float16 has too few exponents for the ratio of two weights: it would overflow without a word."""
    kind = value.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if autocast or value.dtype == torch.float16:
        raise ValueError(
            "Particle weights that differ between model and path (PIWAE, estimator='dreg') need float32, "
            "float64 or bfloat16: in float16 their ratio overflows. Run this loss in another dtype, or "
            "another bound or estimator."
        )


class Estimator(ABC):
    """Base class: how the particle weights of a bound become gradients."""

    #: The name that ``estimator=`` takes.
    name: ClassVar[str]

    def route(self, bound: Bound) -> Route:
        """How latent values are to travel from guide to model, where they may pass a :class:`Boundary`."""
        return Route(through=None if bound.guide_bound is bound else Boundary())

    def check(self, particles: Particles, bound: Bound) -> None:
        """Refuse particles whose gradient this estimator would get wrong.

        Raises:
            ValueError: naming the sites and what to do.
        """
        for site in particles.guide_sites:
            if "baseline" in site.message["infer"]:
                raise ValueError(
                    f"Guide site {site.name!r} asks for a baseline by infer={{'baseline': ...}}, which the "
                    "estimators here do not use: they take their control variates from the other particles. "
                    "Remove it."
                )

    @abstractmethod
    def guide_terms(self, particles: Particles, bound: Bound, log_w: Tensor) -> tuple[Tensor, list[Term]]:
        """What the guide's gradient is made of.

        Arguments:
            particles: the particles.
            bound: the guide's bound.
            log_w: their log-weights, of shape ``[M, K, *cells]``.

        Returns:
            The weights of the path through the model, of the shape of ``log_w``; and the terms in the guide's
            own densities: pairs of a density of shape ``[S, *cells]`` and its weights of the shape of
            ``log_w``.
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
        log_w = particles.log_weights.detach()
        shape, cells = log_w.shape, log_w.shape[1:]
        log_w = log_w.reshape(bound.M, bound.K, *cells)
        value = bound.value(log_w)
        if value.shape != cells:
            raise ValueError(
                f"{bound!r}.value() must reduce log-weights [M, K, *cells] of shape {list(log_w.shape)} to "
                f"[*cells] = {list(cells)}, but gave {list(value.shape)}."
            )
        loss = -(particles.scale * value).sum()
        if not torch.is_grad_enabled():
            return Estimate(loss, value)
        a = bound.weights(log_w)
        path, guide_terms = self.guide_terms(particles, bound.guide_bound, log_w)
        if route is not None and isinstance(route.through, Boundary):
            a = a + _UNDERFLOW * path.abs().copysign(a)
            ratio = torch.where(a == 0, 1.0, path / a)
            route.through.set_ratio(particles.to_batch(ratio.reshape(shape)))
        terms = []
        for density, weights in [(particles.log_p, a), *guide_terms]:
            terms += [density, -particles.scale * _without_dust(weights).reshape(shape)]
        return Estimate(_Weighted.apply(loss, *terms), value)


#: A density of shape ``[S, *cells]`` and the particle weights of its gradient.
Term = tuple[Tensor, Tensor]


class Reparam(Estimator):
    """Total derivative along reparameterised particles, for any bound (Kingma & Welling, 2013)."""

    name = "reparam"

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        if particles.nonreparameterized_sites:
            listed = ", ".join(dict.fromkeys(repr(s.name) for s in particles.nonreparameterized_sites))
            raise ValueError(
                f"Guide site(s) {listed} cannot be reparameterised, so estimator={self.name!r} would leave "
                "out the gradient of their parameters without a word. Pass estimator='vimco' (K > 1), "
                "'score' or 'rws' (wake-wake), or use a distribution with rsample at these sites."
            )

    def guide_terms(self, particles: Particles, bound: Bound, log_w: Tensor) -> tuple[Tensor, list[Term]]:
        b = bound.weights(log_w)
        return b, [(particles.log_q, -b)]


def _refuse_late_parameters(particles: Particles, name: str) -> None:
    """Refuse guides whose densities depend on parameters other than as a distribution that was sampled.

    At stopped values the derivative of such a density is no score: a transformation by parameters of a draw
    without any (AutoStructured), a point estimate (AutoDelta), a factor or an observed site.
    """
    late = [site for site in particles.guide_sites if site.has_late_parameters]
    if late:
        listed = ", ".join(dict.fromkeys(repr(site.name) for site in late))
        raise ValueError(
            f"Guide site(s) {listed} depend on parameters after sampling (a Delta of parameters, as in "
            "AutoDelta, AutoStructured and hand-made transformations of noise, or a factor or observed site "
            f"with parameters), so their density at fixed values has no score, which estimator={name!r} "
            "needs. Use estimator='reparam', or sample these sites from a distribution with the parameters "
            "(TransformedDistribution)."
        )


class STL(Reparam):
    """Sticking the landing (Roeder et al., 2017): the derivative along the path alone, the score left out.

    Unbiased for the ELBO alone; for K > 1 its expectation is not the gradient of the bound. Zero when the
    guide is the exact posterior.
    """

    name = "stl"

    def route(self, bound: Bound) -> Route:
        return super().route(bound)._replace(rescored=True)

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        _refuse_late_parameters(particles, self.name)
        assert particles.log_q_stopped is not None
        log_q, again = particles.log_q, particles.log_q_stopped
        if is_validation_enabled() and not torch.allclose(log_q, again, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise ValueError(
                f"The guide gives another density when it is run again on its own values, which "
                f"estimator={self.name!r} does. Put its random layers (dropout) in eval mode, or use "
                "estimator='reparam'."
            )

    def path_weights(self, particles: Particles, bound: Bound, log_w: Tensor) -> Tensor:
        """Weights of the path, of the shape of ``log_w``."""
        return bound.weights(log_w)

    def guide_terms(self, particles: Particles, bound: Bound, log_w: Tensor) -> tuple[Tensor, list[Term]]:
        c = self.path_weights(particles, bound, log_w)
        assert particles.log_q_stopped is not None
        return c, [(particles.log_q, -c), (particles.log_q_stopped, c)]


class DReG(STL):
    r"""Doubly reparameterised gradients (Tucker et al., 2018), for any smooth bound.

    The score term of the total derivative has, with :math:`c_i = \partial V_\phi / \partial \ell_i`, the
    expectation

    .. math:: E[c_i \nabla_\phi \log q(z_i)] = E\Big[\frac{\partial c_i}{\partial \ell_i}
        \frac{\partial \ell_i}{\partial z_i} \nabla_\phi z_i\Big],

    for only :math:`\ell_i` depends on :math:`z_i`. That leaves the path alone, with the weights
    :math:`c_i - \lambda\, \partial^2 V_\phi / \partial \ell_i^2`, where :math:`\lambda` is the weight of
    :math:`\log q` in :math:`\ell` (``kl_weight``, 1 unless given). Unbiased; zero when the guide is the exact
    posterior; its signal-to-noise ratio grows with K where that of ``reparam`` falls.
    """

    name = "dreg"

    def route(self, bound: Bound) -> Route:
        return Route(through=Boundary(), rescored=True)

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        scales = [site.scale for site in particles.guide_sites]
        tempered = any(isinstance(scale, Tensor) or scale != scales[0] for scale in scales)
        if tempered and not bound.guide_bound.is_linear:
            listed = ", ".join(dict.fromkeys(repr(site.name) for site in particles.guide_sites))
            raise ValueError(
                f"Guide sites {listed} differ in poutine.scale, or have a tensor for one, inside the "
                "logarithm. estimator='dreg' needs one number there. Scale them alike, or use "
                "estimator='reparam'."
            )

    def path_weights(self, particles: Particles, bound: Bound, log_w: Tensor) -> Tensor:
        scale = particles.guide_sites[0].scale if particles.guide_sites else 1.0
        if bound.is_linear or (scale == 1 and particles.kl_weight == 1):
            return bound.path_weights(log_w)
        weight = particles.kl_weight * scale
        return (1 - weight) * bound.weights(log_w) + weight * bound.path_weights(log_w)


class Score(Estimator):
    r"""Score function for sites without a path, with a leave-one-out control variate.

    .. math:: \sum_i \big(V_\phi - V_{-i}\big)\, \nabla_\phi \log q_\phi(z_i)
        + \sum_i \frac{\partial V_\phi}{\partial \ell_i} \nabla_\phi \ell_i

    where :math:`\log q` in the first sum is that of the sites that cannot be reparameterised, and
    :math:`V_{-i}` the bound without particle i: its log-weight replaced by the log of the others' mean weight
    (in its group of K; for a linear bound by the mean of the others' log-weights). Reparameterised sites keep
    their path, upstream and downstream of the others. With one particle there is no control variate.
    """

    name = "score"

    def replacement(self, bound: Bound, log_w: Tensor) -> Tensor | None:
        """What a particle's log-weight is replaced by in its control variate, made from the others alone."""
        if bound.num_particles == 1:
            return None
        if bound.is_linear:
            everything = log_w.reshape(1, -1, *log_w.shape[2:])
            return leave_one_out_mean(everything).reshape(log_w.shape)
        return leave_one_out_logmeanexp(log_w, 1 if bound.K > 1 else 0)

    def guide_terms(self, particles: Particles, bound: Bound, log_w: Tensor) -> tuple[Tensor, list[Term]]:
        b = bound.weights(log_w)
        terms = [(particles.log_q, -b)]
        sites = particles.nonreparameterized_sites
        if sites:
            if bound.is_shift_equivariant and bound.num_particles > 1:
                # The signal is far smaller than the log-weights, whose digits it would lose.
                top = log_w.amax((0, 1))
                log_w = log_w - top.masked_fill(~top.isfinite(), 0.0)
            value = bound.value(log_w).expand_as(log_w)
            signal = value
            replacement = self.replacement(bound, log_w)
            if replacement is not None:
                signal = value - bound.replaced(log_w, replacement)
            # A cell whose bound is -inf has no gradient, and a particle without another live one no baseline.
            signal = signal.masked_fill(~(value.isfinite() & signal.isfinite()), 0.0)
            terms.append((particles.log_prob(sites, masked=False), signal))
        return b, terms


class VIMCO(Score):
    """Score function with the control variate of Mnih & Rezende (2016), in O(K) memory.

    That of :class:`Score`, but :math:`V_{-i}` has the log-weight of particle i replaced by the mean of the
    log-weights of its group's others (the log of their geometric mean weight).
    """

    name = "vimco"

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        if bound.guide_bound.K == 1:
            raise ValueError(
                f"estimator='vimco' makes a particle's control variate from the others of its group, and "
                f"{bound.guide_bound!r} has groups of K=1. Take K > 1, or estimator='score'."
            )

    def replacement(self, bound: Bound, log_w: Tensor) -> Tensor | None:
        return leave_one_out_mean(log_w)


class RWS(Estimator):
    """Wake-wake (Bornschein & Bengio, 2014): the guide climbs log q under the importance weights.

    No gradient flows through a latent value, so a guide of any distributions will do. Its weights are the
    importance weights, normalised in each group of K of each cell, whatever the bound; the cells make the
    scheme safe on minibatches. The guide's gradient is that of the divergence from the posterior to the
    guide, estimated with a bias that vanishes as K grows, and not of the bound.
    """

    name = "rws"

    def route(self, bound: Bound) -> Route:
        return Route(stopped=True)

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        _refuse_late_parameters(particles, self.name)
        if bound.guide_bound.K == 1:
            raise ValueError(
                f"estimator='rws' needs importance weights to normalise, and {bound.guide_bound!r} has "
                "groups of K=1. Take K > 1, or estimator='score'."
            )

    def guide_terms(self, particles: Particles, bound: Bound, log_w: Tensor) -> tuple[Tensor, list[Term]]:
        s = softmax(log_w, 1) / bound.M
        return s, [(particles.log_prob(particles.guide_sites), s)]


class _Weighted(torch.autograd.Function):
    """A loss whose gradient with respect to each of some densities is given."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *terms: Tensor) -> Tensor:
        ctx.save_for_backward(*terms[1::2])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(
                "An importance-weighted loss can be differentiated once: its particle weights are constants "
                "of the backward pass, so a second derivative (create_graph=True) would be wrong."
            )
        grads: list[Tensor | None] = [None]
        for weights, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1::2], strict=True):
            grads += [grad * weights if needed else None, None]
        return tuple(grads)


#: Estimators by the name that ``estimator=`` takes. ``"auto"`` is ``"reparam"`` where every guide site
#: allows it, and an error that names the site where one does not.
ESTIMATORS: dict[str, type[Estimator]] = {
    "auto": Reparam,
    **{kind.name: kind for kind in (Reparam, STL, DReG, Score, VIMCO, RWS)},
}


def get_estimator(name: str) -> Estimator:
    """The estimator of that name.

    Raises:
        ValueError: if there is none, listing those there are.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {sorted(ESTIMATORS)}, got {name!r}")
    return ESTIMATORS[name]()
