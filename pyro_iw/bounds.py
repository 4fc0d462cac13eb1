r"""Bounds on the log evidence, as functions of the log-weights alone.

A bound is a function :math:`V` of the log-weights
:math:`\ell_{mk} = \log p_\theta(x, z_{mk}) - \log q_\phi(z_{mk} \mid x)` of :math:`S = M K` particles,
held in a tensor ``log_w`` of shape ``[M, K, *cells]``. Every gradient of the family is a sum over particles,
weighted by functions of the log-weights of that shape:

- ``weights``: :math:`\partial V / \partial \ell`, for the model's parameters and for total derivatives;
- ``path_weights``: these minus the Hessian's diagonal :math:`\partial^2 V / \partial \ell^2`, for the guide's
  parameters along a particle's path alone;
- ``difference``: the value less what it is with one log-weight replaced (``replaced``), which is what a
  leave-one-out control variate leaves of it.

=====  =======================================  ====================================  ====================
class  value :math:`V`                          ``weights``                           ``path_weights``
=====  =======================================  ====================================  ====================
MIWAE  mean over M of lme over K                s / M, s a softmax over K             s² / M
IWAE   lme over K                               s                                     s²
CIWAE  β mean + (1 - β) lme                     β / K + (1 - β) s                     β / K + (1 - β) s²
PIWAE  lme over M and K                         s over M and K                        s²; guide: MIWAE's
VR     lme of (1 - α) ℓ, divided by 1 - α       s of (1 - α) ℓ                        α s + (1 - α) s²
TVO    Σ Δβ E[ℓ] under a softmax s of βℓ        Σ Δβ s (1 + β (ℓ - E[ℓ]))             in closed form
=====  =======================================  ====================================  ====================

(lme is the logarithm of the mean of the exponentials; the ELBO is MIWAE with K = 1.) Model and guide climb
the same bound, except where ``guide_bound`` says otherwise, as in PIWAE. Nothing in here knows Pyro.

References:
    | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
    | Rényi Divergence Variational Inference (Li & Turner, 2016), https://arxiv.org/abs/1602.02311
    | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
      https://arxiv.org/abs/1802.04537
    | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2018),
      https://arxiv.org/abs/1810.04152
    | The Thermodynamic Variational Objective (Masrani et al., 2019), https://arxiv.org/abs/1907.00031
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Iterable

import torch
from torch import Tensor

from ._support.arguments import positive_integer
from .bound import Bound
from .logmean import logmeanexp, logmeanexp_difference, softmax, without_dead

__all__ = ["CIWAE", "IWAE", "MIWAE", "PIWAE", "TVO", "VR", "Bound"]


class MIWAE(Bound):
    r"""Mean of M importance-weighted bounds of K particles each.

    .. math:: V = \frac1M \sum_{m=1}^M \log \frac1K \sum_{k=1}^K e^{\ell_{mk}}

    K = 1 is the ELBO with M particles, M = 1 is :class:`IWAE`.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), section 4,
          https://arxiv.org/abs/1802.04537

    Arguments:
        M: number of groups, averaged outside the logarithm; an integer >= 1.
        K: number of particles in a group, averaged inside it; an integer >= 1.

    Example:
        >>> log_w = torch.tensor([[1.0, 3.0], [2.0, 2.0]]).log()
        >>> MIWAE(M=2, K=2).value(log_w).exp()  # (2 * 2) ** (1 / 2)
        tensor(2.)
    """

    is_shift_equivariant = True

    def __init__(self, M: int, K: int) -> None:
        super().__init__(M, K)

    @property
    def is_linear(self) -> bool:
        return self.K == 1

    def value(self, log_w: Tensor) -> Tensor:
        return logmeanexp(log_w, 1).mean(0)

    def weights(self, log_w: Tensor) -> Tensor:
        return softmax(log_w, 1) / self.M

    def path_weights(self, log_w: Tensor) -> Tensor:
        return softmax(log_w, 1) ** 2 / self.M

    def difference(self, log_w: Tensor, replacement: Tensor) -> Tensor:
        if self.K == 1:
            return (log_w - replacement) / self.M
        return logmeanexp_difference(log_w, replacement, 1) / self.M


class IWAE(MIWAE):
    r"""Importance-weighted bound of K particles.

    .. math:: V = \log \frac1K \sum_{k=1}^K e^{\ell_k}

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Arguments:
        K: number of particles, averaged inside the logarithm; an integer >= 1.

    Example:
        >>> IWAE(K=2).value(torch.tensor([[1.0, 3.0]]).log()).exp()
        tensor(2.)
    """

    def __init__(self, K: int) -> None:
        Bound.__init__(self, K=K)


class CIWAE(Bound):
    r"""Convex combination of the ELBO and the importance-weighted bound, on the same K particles.

    .. math:: V = \beta\, \frac1K \sum_k \ell_k + (1 - \beta) \log \frac1K \sum_k e^{\ell_k}

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), section 4,
          https://arxiv.org/abs/1802.04537

    Arguments:
        K: number of particles; an integer >= 1.
        beta: share of the ELBO, in [0, 1].

    Raises:
        ValueError: if K is not an integer >= 1 or beta lies outside [0, 1].

    Example:
        >>> CIWAE(K=2, beta=1.0).value(torch.tensor([[1.0, 4.0]]).log()).exp()
        tensor(2.)
    """

    is_shift_equivariant = True

    def __init__(self, K: int, beta: float) -> None:
        super().__init__(K=K)
        if not _is_number(beta) or not 0 <= beta <= 1:
            raise ValueError(f"beta must be a number in [0, 1], got {beta!r}")
        self.beta = float(beta)

    @property
    def is_linear(self) -> bool:
        return self.K == 1 or self.beta == 1

    def value(self, log_w: Tensor) -> Tensor:
        # At either end the other term drops out: 0 * -inf would be NaN.
        if self.beta == 0:
            return logmeanexp(log_w, (0, 1))
        if self.beta == 1:
            return log_w.mean((0, 1))
        return self.beta * log_w.mean((0, 1)) + (1 - self.beta) * logmeanexp(log_w, (0, 1))

    def weights(self, log_w: Tensor) -> Tensor:
        return without_dead(self.beta / self.K + (1 - self.beta) * softmax(log_w, 1), log_w)

    def path_weights(self, log_w: Tensor) -> Tensor:
        return without_dead(self.beta / self.K + (1 - self.beta) * softmax(log_w, 1) ** 2, log_w)

    def difference(self, log_w: Tensor, replacement: Tensor) -> Tensor:
        mean = (log_w - replacement) / self.K
        if self.is_linear:
            return mean
        iwae = logmeanexp_difference(log_w, replacement, 1)
        return iwae if self.beta == 0 else self.beta * mean + (1 - self.beta) * iwae


class PIWAE(Bound):
    r"""Partially importance-weighted bound: IWAE(MK) for the model, MIWAE(M, K) for the guide.

    .. math:: V = \log \frac{1}{MK} \sum_{mk} e^{\ell_{mk}}, \qquad
        V_\phi = \frac1M \sum_{m=1}^M \log \frac1K \sum_{k=1}^K e^{\ell_{mk}}

    Two objectives share one set of particles, so no single number is optimised; the value is the model's
    objective, the tighter of the two.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), section 4,
          https://arxiv.org/abs/1802.04537

    Arguments:
        M: number of groups of the guide's objective; an integer >= 1.
        K: number of particles in a group; an integer >= 1.

    Example:
        >>> bound, log_w = PIWAE(M=2, K=1), torch.tensor([[1.0], [3.0]]).log()
        >>> bound.weights(log_w).flatten(), bound.guide_bound.weights(log_w).flatten()
        (tensor([0.2500, 0.7500]), tensor([0.5000, 0.5000]))
    """

    is_shift_equivariant = True

    def __init__(self, M: int, K: int) -> None:
        super().__init__(M, K)

    @property
    def is_linear(self) -> bool:
        return self.num_particles == 1

    @property
    def guide_bound(self) -> Bound:
        return MIWAE(self.M, self.K)

    def value(self, log_w: Tensor) -> Tensor:
        return logmeanexp(log_w, (0, 1))

    def weights(self, log_w: Tensor) -> Tensor:
        return softmax(log_w.flatten(0, 1), 0).reshape(log_w.shape)

    def path_weights(self, log_w: Tensor) -> Tensor:
        return self.weights(log_w) ** 2

    def difference(self, log_w: Tensor, replacement: Tensor) -> Tensor:
        flat = logmeanexp_difference(log_w.flatten(0, 1), replacement.flatten(0, 1), 0)
        return flat.reshape(log_w.shape)


class VR(Bound):
    r"""Variational Rényi bound of order :math:`\alpha`.

    .. math:: V = \frac{1}{1 - \alpha} \log \frac1K \sum_{k=1}^K e^{(1 - \alpha) \ell_k}

    :math:`\alpha = 0` is :class:`IWAE`, :math:`\alpha = 1` the ELBO (taken as the limit); for
    :math:`0 \le \alpha` the expected value lies below the log evidence, for :math:`\alpha < 0` it need not.

    References:
        | Rényi Divergence Variational Inference (Li & Turner, 2016), https://arxiv.org/abs/1602.02311

    Arguments:
        alpha: the order, a finite number.
        K: number of particles; an integer >= 1.

    Raises:
        ValueError: if K is not an integer >= 1 or alpha is not a finite number.

    Example:
        >>> VR(alpha=0.5, K=2).value(torch.tensor([[1.0, 9.0]]).log()).exp()  # ((1 + 3) / 2) ** 2
        tensor(4.)
    """

    is_shift_equivariant = True

    def __init__(self, alpha: float, K: int) -> None:
        super().__init__(K=K)
        if not _is_number(alpha) or not math.isfinite(alpha):
            raise ValueError(f"alpha must be a finite number, got {alpha!r}")
        self.alpha = float(alpha)

    @property
    def is_linear(self) -> bool:
        return self.K == 1 or self.alpha == 1

    def value(self, log_w: Tensor) -> Tensor:
        if self.alpha == 1:
            return log_w.mean((0, 1))
        power = 1 - self.alpha
        if abs(power) >= 1e-2:
            return logmeanexp(power * log_w, (0, 1)) / power
        # Close to the ELBO the division would blow up the rounding of a logarithm of about 1, but not that of
        # one close to it.
        top = (log_w.amax if power > 0 else log_w.amin)((0, 1))
        top = top.masked_fill(~top.isfinite(), 0.0)
        return top + torch.expm1(power * (log_w - top)).mean((0, 1)).log1p() / power

    def _softmax(self, log_w: Tensor) -> Tensor:
        if self.alpha == 1:
            return without_dead(torch.full_like(log_w, 1 / self.K), log_w)
        s = softmax((1 - self.alpha) * log_w, 1)
        if self.alpha > 1:  # one dead particle makes the bound -inf, and leaves no gradient
            return s.masked_fill((log_w == -math.inf).any(1, keepdim=True), 0.0)
        return s

    def weights(self, log_w: Tensor) -> Tensor:
        return self._softmax(log_w)

    def path_weights(self, log_w: Tensor) -> Tensor:
        s = self._softmax(log_w)
        return self.alpha * s + (1 - self.alpha) * s**2

    def difference(self, log_w: Tensor, replacement: Tensor) -> Tensor:
        if self.is_linear:
            return (log_w - replacement) / self.K
        power = 1 - self.alpha
        return logmeanexp_difference(power * log_w, power * replacement, 1) / power


class TVO(Bound):
    r"""Thermodynamic variational objective: a left Riemann sum of thermodynamic integration.

    .. math:: V = \sum_{p=0}^{P-1} (\beta_{p+1} - \beta_p)\, E_{s_p}[\ell], \qquad
        s_p = \mathrm{softmax}(\beta_p \ell)

    The integrand, the mean of :math:`\ell` under a posterior tempered by :math:`\beta`, increases in
    :math:`\beta` and integrates to the log evidence over [0, 1], so its left sum is a lower bound. On the
    same particles it lies between the ELBO and :class:`IWAE`.
    ``partitions=(0, 1)`` is the ELBO. The gradients here are those of V as a function of the log-weights;
    those of the paper replace the guide's by a covariance that needs no reparameterisation.

    References:
        | The Thermodynamic Variational Objective (Masrani et al., 2019), https://arxiv.org/abs/1907.00031

    Arguments:
        K: number of particles; an integer >= 1.
        partitions: the increasing :math:`\beta_0 = 0, \dots, \beta_P = 1` in a list, array or tensor; or
            their number P, which then are log-uniform between 0.025 and 1 as in the paper (with P = 1 the
            ELBO).

    Raises:
        ValueError: if K is not an integer >= 1 or the partitions do not increase from 0 to 1.

    Example:
        >>> TVO(K=2, partitions=(0.0, 1.0)).value(torch.tensor([[1.0, 3.0]]))
        tensor(2.)
    """

    is_shift_equivariant = True

    def __init__(self, K: int, partitions: int | Iterable[float] | Tensor) -> None:
        super().__init__(K=K)
        # Of an array or tensor its numbers; of a single one in it, that number.
        given = partitions.tolist() if hasattr(partitions, "tolist") else partitions
        if isinstance(given, Iterable):
            try:
                betas = tuple(float(beta) for beta in given)
            except (TypeError, ValueError):  # rows of a matrix, words
                betas = ()
        else:
            count = positive_integer("partitions", given)
            inner = torch.logspace(math.log10(0.025), 0, count, dtype=torch.float64).tolist()
            betas = (0.0, *(inner[:-1] if count > 1 else []), 1.0)
        rising = all(low < high for low, high in itertools.pairwise(betas))
        if len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not rising:
            raise ValueError(f"partitions must increase from 0 to 1, got {partitions!r}")
        self.partitions = betas

    @property
    def is_linear(self) -> bool:
        return self.K == 1 or len(self.partitions) == 2

    def _terms(self, log_w: Tensor) -> tuple[Tensor, ...]:
        """On a new leftmost dim: widths, betas, softmaxes, means under them, and deviations from those."""
        betas = _on_device(self.partitions, log_w.dtype, log_w.device).reshape(-1, *[1] * log_w.dim())
        # Tempered by 0 a dead particle counts like any other, where 0 * -inf would be NaN.
        dead = log_w == -math.inf
        log_w = log_w.masked_fill(dead, 0.0)
        tempered = (betas[:-1] * log_w).masked_fill(dead & (betas[:-1] > 0), -math.inf)
        s = torch.softmax(tempered, 2)
        mean = (s * log_w).sum(2, keepdim=True)
        return betas.diff(dim=0), betas[:-1], s, mean, log_w - mean

    def value(self, log_w: Tensor) -> Tensor:
        widths, _, _, mean, _ = self._terms(log_w)
        value = (widths * mean).sum(0).squeeze((0, 1))
        return value.masked_fill((log_w == -math.inf).any(1).squeeze(0), -math.inf)

    def weights(self, log_w: Tensor) -> Tensor:
        widths, betas, s, _, deviation = self._terms(log_w)
        return without_dead((widths * s * (1 + betas * deviation)).sum(0), log_w)

    def path_weights(self, log_w: Tensor) -> Tensor:
        widths, betas, s, _, deviation = self._terms(log_w)
        tilted = 1 + betas * deviation
        first = s * tilted
        second = betas * s * (1 - s) * tilted + betas * s * (1 - first)
        return without_dead((widths * (first - second)).sum(0), log_w)

    def difference(self, log_w: Tensor, replacement: Tensor) -> Tensor:
        if self.is_linear:
            return (log_w - replacement) / self.K
        widths, betas, s, mean, deviation = self._terms(log_w)
        # Of the mean of l, where a particle's softmax becomes t and its l the replacement: what has changed,
        # over the sum of all softmaxes that are left.
        t = (betas * replacement - (betas * log_w).logsumexp(2, keepdim=True)).exp()
        change = (widths * (s * deviation - t * (replacement - mean)) / (1 - s + t)).sum(0)
        # 1 - s has lost its digits for a particle with more than half of the weight. There is one at most.
        top = log_w.argmax(1, keepdim=True)
        without = log_w.scatter(1, top, replacement.gather(1, top))
        apart = (self.value(log_w) - self.value(without)).expand_as(top)
        heavy = s.amax(0).gather(1, top) > 0.5
        return change.scatter(1, top, torch.where(heavy, apart, change.gather(1, top)))


@functools.lru_cache(maxsize=32)
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor, which is copied to the device once and not at every step."""
    with torch.inference_mode(False):  # else it could not take part in gradients later on
        return torch.tensor(numbers, dtype=dtype, device=device)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
