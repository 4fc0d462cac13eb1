r"""Gradient estimators: from particle weights to one scalar whose backward pass gives the gradients.

Given particles and a bound, an estimator returns the loss as a tensor. Its value is minus the bound; its
``.backward()`` leaves the estimator's gradients in ``.grad``, by means of
:mod:`~pyro_iw.gradients.surrogate`. That takes two steps, which :mod:`~pyro_iw.gradients.chunks` and
:mod:`~pyro_iw.gradients.backward_subset` take apart: all weights follow from the log-weights of all
particles; a gradient, from the weights and the densities of any of them.

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
ovis     the same with the bound without particle i, its weight 0: the signal grows with K
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

**What counts as a path** is decided in :mod:`~pyro_iw.tracing.paths`: not every ``rsample`` has the right
gradient.

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
    | Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted Bounds
      (Liévin et al., 2020), https://arxiv.org/abs/2008.01998
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from ..bounds import Bound
from ..logmean import leave_one_out_logmeanexp, leave_one_out_mean, softmax
from ..tracing.masks import masked_in_guide_alone
from ..tracing.particles import Particles
from ..tracing.traces import Rescored, Route
from .estimator import Density, Estimator
from .refusals import (
    listed,
    refuse_another_density,
    refuse_enumerated,
    refuse_expected,
    refuse_hidden_draws,
    refuse_inside_sums,
    refuse_late_parameters,
    refuse_missing_paths,
    refuse_moving_supports,
)
from .surrogate import Boundary

__all__ = [
    "ESTIMATORS",
    "OVIS",
    "RWS",
    "STL",
    "VIMCO",
    "DReG",
    "Reparam",
    "Score",
    "get_estimator",
]


def _minus_log_q(particles: Particles) -> Tensor:
    return -particles.log_q


def _log_q_stopped(particles: Particles) -> Tensor:
    assert particles.log_q_stopped is not None
    return particles.log_q_stopped


def _score(particles: Particles) -> Tensor:
    """log q of the sites without a path: their draws vary with their parameters whatever a mask says."""
    return particles.log_prob(particles.nonreparameterized_sites, masked=False)


def _wake(particles: Particles) -> Tensor:
    return particles.log_prob(particles.guide_sites)


class Reparam(Estimator):
    """Total derivative along reparameterised particles, for any bound (Kingma & Welling, 2013)."""

    name = "reparam"
    guide_densities: ClassVar[tuple[Density, ...]] = (_minus_log_q,)

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        refuse_missing_paths(particles.nonreparameterized_sites, self.name)

    def guide_weights(
        self, bound: Bound, log_w: Tensor, b: Tensor, log_q_weight: float | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return b, (b,)


class STL(Reparam):
    """Sticking the landing (Roeder et al., 2017): the derivative along the path alone, the score left out.

    Unbiased for the ELBO alone; for K > 1 its expectation is not the gradient of the bound. Zero when the
    guide is the exact posterior.
    """

    name = "stl"
    guide_densities = (_minus_log_q, _log_q_stopped)

    def route(self, bound: Bound) -> Route:
        return super().route(bound)._replace(rescored=(Rescored(),))

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        refuse_inside_sums(particles.absorbed, self.name)
        refuse_late_parameters(particles.guide_sites, self.name)
        refuse_moving_supports(particles.guide_sites, self.name)
        assert particles.log_q_stopped is not None
        if is_validation_enabled():
            refuse_another_density(
                particles.log_q_stopped,
                particles.log_q,
                "The guide gives another density when it is run again on its own values, which "
                f"estimator={self.name!r} does. Put its random layers (dropout) in eval mode, or use "
                "estimator='reparam'.",
            )

    def path_weights(self, bound: Bound, log_w: Tensor, b: Tensor, log_q_weight: float | Tensor) -> Tensor:
        """Weights of the path, of the shape of ``log_w``; arguments as of :meth:`guide_weights`."""
        return b

    def guide_weights(
        self, bound: Bound, log_w: Tensor, b: Tensor, log_q_weight: float | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        c = self.path_weights(bound, log_w, b, log_q_weight)
        return c, (c, c)


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
        return Route(through=Boundary(), rescored=(Rescored(),))

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        scales = [site.scale for site in particles.guide_sites]
        tempered = any(isinstance(scale, Tensor) or scale != scales[0] for scale in scales)
        if tempered and not bound.guide_bound.is_linear:
            raise ValueError(
                f"Guide sites {listed(particles.guide_sites)} differ in poutine.scale, or have a tensor for "
                "one, inside the logarithm. estimator='dreg' needs one number there. Scale them alike, or "
                "use estimator='reparam'."
            )
        masked = [] if bound.guide_bound.is_linear else masked_in_guide_alone(particles.sites)
        if masked:
            raise ValueError(
                f"Guide site(s) {', '.join(map(repr, masked))} are masked where the model is not, "
                "so log q is not the density of what was sampled, which estimator='dreg' needs. Mask both "
                "alike, or use estimator='reparam'."
            )

    def path_weights(self, bound: Bound, log_w: Tensor, b: Tensor, log_q_weight: float | Tensor) -> Tensor:
        if bound.is_linear or (not isinstance(log_q_weight, Tensor) and log_q_weight == 1):
            return bound.path_weights(log_w)
        return (1 - log_q_weight) * b + log_q_weight * bound.path_weights(log_w)


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
    guide_densities = (_minus_log_q, _score)

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        refuse_hidden_draws(particles.nonreparameterized_sites, self.name)
        refuse_expected(particles.nonreparameterized_sites, self.name)
        refuse_moving_supports(particles.nonreparameterized_sites, self.name)

    def replacement(self, bound: Bound, log_w: Tensor) -> Tensor | None:
        """What a particle's log-weight is replaced by in its control variate, made from the others alone."""
        if bound.num_particles == 1:
            return None
        if bound.is_linear:
            everything = log_w.reshape(1, -1, *log_w.shape[2:])
            return leave_one_out_mean(everything).reshape(log_w.shape)
        return leave_one_out_logmeanexp(log_w, 1 if bound.K > 1 else 0)

    def guide_weights(
        self, bound: Bound, log_w: Tensor, b: Tensor, log_q_weight: float | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if bound.is_shift_equivariant and bound.num_particles > 1:
            # The signal is far smaller than the log-weights, whose digits it would lose.
            top = log_w.amax((0, 1))
            log_w = log_w - top.masked_fill(~top.isfinite(), 0.0)
        value = signal = bound.value(log_w).expand_as(log_w)
        replacement = self.replacement(bound, log_w)
        if replacement is not None:
            signal = bound.difference(log_w, replacement)
        # A cell whose bound is -inf has no gradient, and a particle without another live one no baseline.
        signal = signal.masked_fill(~(value.isfinite() & signal.isfinite()), 0.0)
        return b, (b, signal)


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


class OVIS(Score):
    r"""Score function with the asymptotically best control variate (Liévin et al., 2020, with gamma = 0).

    That of :class:`Score`, but :math:`V_{-i}` has the weight of particle i replaced by 0 instead of the
    others' mean. For IWAE, with normalised weights :math:`s_i`, what multiplies the score is then, in all,

    .. math:: V - V_{-i} - \frac{\partial V}{\partial \ell_i} = -\log(1 - s_i) - s_i \approx s_i^2 / 2,

    so that the noise falls as :math:`K^{-3/2}`, faster than the gradient, and the signal-to-noise ratio grows
    as :math:`\sqrt K` where that of :class:`Score` and :class:`VIMCO` falls. Unbiased for every K > 1.
    """

    name = "ovis"

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        inner = bound.guide_bound
        log_w = torch.zeros(inner.M, inner.K, dtype=torch.float64)
        log_w[0, 0] = -torch.inf
        if inner.K == 1 or not bool(inner.value(log_w).isfinite()):
            raise ValueError(
                "estimator='ovis' makes a particle's control variate of the bound in which it weighs 0, and "
                f"{inner!r} is not finite there. Take IWAE, MIWAE or PIWAE with K > 1, or VR with alpha < 1; "
                "or estimator='vimco' or 'score'."
            )

    def replacement(self, bound: Bound, log_w: Tensor) -> Tensor | None:
        return torch.full_like(log_w, -torch.inf)


class RWS(Estimator):
    """Wake-wake (Bornschein & Bengio, 2014): the guide climbs log q under the importance weights.

    No gradient flows through a latent value, so a guide of any distributions will do. Its weights are the
    importance weights, normalised in each group of K of each cell, whatever the bound; the cells make the
    scheme safe on minibatches. The guide's gradient is that of the divergence from the posterior to the
    guide, estimated with a bias that vanishes as K grows, and not of the bound.
    """

    name = "rws"
    guide_densities = (_wake,)

    def route(self, bound: Bound) -> Route:
        return Route(stopped=True)

    def check(self, particles: Particles, bound: Bound) -> None:
        super().check(particles, bound)
        refuse_enumerated(particles.enumerated, self.name)
        refuse_late_parameters(particles.guide_sites, self.name)
        refuse_moving_supports(particles.guide_sites, self.name)
        if bound.guide_bound.K == 1:
            raise ValueError(
                f"estimator='rws' needs importance weights to normalise, and {bound.guide_bound!r} has "
                "groups of K=1. Take K > 1, or estimator='score'."
            )

    def guide_weights(
        self, bound: Bound, log_w: Tensor, b: Tensor, log_q_weight: float | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        s = softmax(log_w, 1) / bound.M
        return s, (s,)


#: Estimators by the name that ``estimator=`` takes. ``"auto"`` is ``"reparam"`` where every guide site
#: allows it, and an error that names the site where one does not.
ESTIMATORS: dict[str, type[Estimator]] = {
    "auto": Reparam,
    **{kind.name: kind for kind in (Reparam, STL, DReG, Score, VIMCO, OVIS, RWS)},
}


def get_estimator(name: str) -> Estimator:
    """The estimator of that name.

    Raises:
        ValueError: if there is none, listing those there are.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {sorted(ESTIMATORS)}, got {name!r}")
    return ESTIMATORS[name]()
