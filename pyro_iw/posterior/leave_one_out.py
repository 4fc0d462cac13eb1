r"""Leave-one-out predictive densities of a hierarchical model, its local latents integrated out.

A datapoint with a latent of its own is hard to leave out by the usual means: weights :math:`1 / p(x_n \mid
z_n)` have to turn the posterior of :math:`z_n` given :math:`x_n` back into its prior, and where the
observation says much of its latent they have no variance, or not even a mean. With the latent integrated out
no more than the posterior of the global latents g has to change, by one datapoint out of N. On two levels of
particles, whose local ones give :math:`\hat p(x_n \mid g_s)`, that is a factor taken out of a product:

.. math:: \log p(x_n \mid x_{-n}) \approx \log \frac{\sum_s r_{sn}\, \hat p(x_n \mid g_s)}{\sum_s r_{sn}},
    \qquad r_{sn} = \frac{p(g_s)}{q(g_s)} \prod_{m \neq n} \hat p(x_m \mid g_s),

with Pareto smoothing of :math:`r_{\cdot n}`; before that, the means over s above and below are unbiased for
:math:`p(x)` and :math:`p(x_{-n})`, whatever L is. (Weights :math:`1 / \hat p(x_n \mid g_s)` on draws from
the posterior, which ``az.loo`` takes, are the same but for the noise of drawing.)

References:
    | Bayesian Leave-One-Out Cross-Validation Approximations for Gaussian Latent Variable Models (Vehtari et
      al., 2016), https://jmlr.org/papers/v17/14-540.html
    | Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and WAIC (Vehtari et al.,
      2017), https://arxiv.org/abs/1507.04544
    | Bayesian Comparison of Latent Variable Models: Conditional versus Marginal Likelihoods (Merkle et al.,
      2019), https://arxiv.org/abs/1802.04452
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .._support.devices import wide
from .._support.warn import warn
from ..logmean import softmax
from ..psis import khat_threshold, pareto_smoothed

__all__ = ["LeaveOneOut", "leave_one_out"]


@dataclass(frozen=True, eq=False, repr=False)
class LeaveOneOut:
    r"""The log predictive density of every cell of a plate given all others.

    Attributes:
        values: :math:`\log p(x_n \mid x_{-n})`, of shape ``[*cells]``, in nats.
        monte_carlo_errors: standard error of each from the finite number of particles (delta method),
            likewise; NaN where the value is -inf.
        khat: shape k̂ of the tail of the weights that leave a cell out, likewise. Above 0.7 the particles say
            little of the posterior without that cell, and its value is not to be trusted.
        monte_carlo_error: standard error of :attr:`elpd` for these very data, from the finite number of
            particles, which all of the values share.
        num_particles: the number S of global particles.

    Example:
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     mean = pyro.sample("mean", dist.Normal(x.mean(), 0.5))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal((mean + x) / 2, 0.8))
        >>> sampler = ImportanceSampler(model, guide, num_particles=200, local="data", num_local=8)
        >>> left_out = sampler(torch.randn(20)).leave_one_out()
        >>> left_out.values.shape, torch.allclose(left_out.values.sum(), torch.as_tensor(left_out.elpd))
        (torch.Size([20]), True)
    """

    values: Tensor
    monte_carlo_errors: Tensor
    khat: Tensor
    monte_carlo_error: float
    num_particles: int

    @property
    def elpd(self) -> float:
        """The sum of the values, in nats: the expected log predictive density, as ArviZ calls it."""
        return wide(self.values).sum().item()

    @property
    def standard_error(self) -> float:
        """Of :attr:`elpd`, as an estimate for other data of that size; NaN for a single cell."""
        count = self.values.numel()
        return math.nan if count == 1 else wide(self.values).std().item() * math.sqrt(count)

    def __repr__(self) -> str:
        return (
            f"LeaveOneOut(elpd={self.elpd:.2f}, standard_error={self.standard_error:.2g}, "
            f"N={self.values.numel()}, num_particles={self.num_particles})"
        )


def leave_one_out(log_weights: Tensor, log_likelihood: Tensor) -> LeaveOneOut:
    r"""The log predictive densities from weights without each cell.

    Warns where k̂ is too high.

    Arguments:
        log_weights: :math:`\log r_{sn}`, of shape ``[S, *cells]``, in nats.
        log_likelihood: :math:`\log \hat p(x_n \mid g_s)`, likewise.

    Raises:
        ImportError: if ArviZ is missing.
    """
    smoothed, khat = pareto_smoothed(log_weights)
    threshold = khat_threshold(len(log_weights))
    high = khat > threshold
    if bool(high.any()):
        warn(
            f"k̂ exceeds {threshold:.2f} in {int(high.sum())} of {high.numel()} cell(s) (up to "
            f"{khat.max().item():.2f}): the particles say little of the posterior without them, and their "
            "predictive densities are not to be trusted. Draw more particles, train a guide that covers "
            "more, or run the sampler on the data without these cells.",
            RuntimeWarning,
        )
    smoothed, log_likelihood = wide(smoothed), wide(log_likelihood)
    values = (smoothed + log_likelihood).logsumexp(0) - smoothed.logsumexp(0)
    # To first order a value is a mean over the particles, of which these are the shares.
    shares = softmax(smoothed, 0) * ((log_likelihood - values).exp() - 1)
    errors = shares.square().sum(0).sqrt()
    total = shares.flatten(1).sum(1).square().sum().sqrt() if shares.dim() > 1 else errors
    dtype = log_weights.dtype
    return LeaveOneOut(values.to(dtype), errors.to(dtype), khat, total.item(), len(log_weights))
