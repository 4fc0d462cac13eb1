r"""Bounds on the log evidence, as functions of the log-weights alone.

A bound is a function :math:`V` of the log-weights
:math:`\ell_{mk} = \log p_\theta(x, z_{mk}) - \log q_\phi(z_{mk} \mid x)` of :math:`S = M K` particles,
held in a tensor ``log_w`` of shape ``[M, K, *cells]``. Besides its value it gives two sets of particle
weights, both of that shape: ``a`` for the model's parameters :math:`\theta` and ``b`` for the guide's
parameters :math:`\phi`. Every gradient of the family is a sum over particles weighted by them.

=====  ============================================  ===========================  ================
class  value :math:`V`                               weights                      source
=====  ============================================  ===========================  ================
MIWAE  mean over M of lme over K                     a = b: softmax over K, / M   Rainforth et al.
IWAE   lme over K                                    a = b: softmax over K        Burda et al.
CIWAE  :math:`\beta` mean + (1 - :math:`\beta`) lme  a = b: the same mixture      Rainforth et al.
PIWAE  lme over M and K                              a: IWAE(MK), b: MIWAE(M, K)  Rainforth et al.
=====  ============================================  ===========================  ================

(lme is the logarithm of the mean of the exponentials; the ELBO is MIWAE with K = 1.) Nothing in here
knows Pyro.

References:
    | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
    | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
      https://arxiv.org/abs/1802.04537
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

__all__ = ["CIWAE", "IWAE", "MIWAE", "PIWAE", "Bound", "Weights"]


class Weights(NamedTuple):
    """Particle weights of a bound: ``a`` for the model's parameters, ``b`` for the guide's.

    Both have the shape ``[M, K, *cells]`` of the log-weights. A particle whose log-weight is -inf
    weighs 0; otherwise the weights of the bounds in this module sum to 1 over (M, K).
    """

    a: Tensor
    b: Tensor


class Bound:
    r"""Base class: a bound :math:`V` over M groups of K particles.

    A bound of your own overrides :meth:`value` with differentiable tensor operations; its particle
    weights :math:`a = b = \partial V / \partial \ell` then come from autograd. A closed form, where there
    is one, overrides :meth:`weights` too.

    Arguments:
        M: number of groups, averaged outside the logarithm; an integer >= 1.
        K: number of particles in a group, averaged inside it; an integer >= 1.

    Raises:
        ValueError: if M or K is not an integer >= 1.

    Example:
        >>> class Median(Bound):  # the middle of M independent IWAE bounds
        ...     def value(self, log_w):
        ...         return (log_w.logsumexp(1) - math.log(self.K)).median(0).values
        >>> bound = Median(M=3, K=2)
        >>> log_w = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
        >>> bound.value(log_w)
        tensor(1.)
        >>> bound.weights(log_w).a
        tensor([[0.0000, 0.0000],
                [0.5000, 0.5000],
                [0.0000, 0.0000]])
    """

    #: Whether the guide's weights ``b`` differ from the model's weights ``a``.
    separate_weights: ClassVar[bool] = False

    def __init__(self, M: int = 1, K: int = 1) -> None:
        self.M = _positive_integer("M", M)
        self.K = _positive_integer("K", K)

    @property
    def num_particles(self) -> int:
        """The number S = M * K of particles."""
        return self.M * self.K

    @property
    def is_linear(self) -> bool:
        """Whether the bound is the plain mean of the log-weights, as the ELBO is.

        Only then is it unbiased under a scale inside the logarithm, such as that of a subsampled plate
        below a global latent.
        """
        return self.num_particles == 1

    def value(self, log_w: Tensor) -> Tensor:
        """The bound, in nats.

        Arguments:
            log_w: log-weights, of shape ``[M, K, *cells]``.

        Returns:
            The bound of every cell, of shape ``[*cells]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define value(log_w)")

    def weights(self, log_w: Tensor) -> Weights:
        """The particle weights ``a`` and ``b``, each of shape ``[M, K, *cells]``.

        Arguments:
            log_w: log-weights, of shape ``[M, K, *cells]``.
        """
        with torch.enable_grad():
            leaf = log_w.detach().requires_grad_()
            (a,) = torch.autograd.grad(self.value(leaf).sum(), leaf)
        a = _without_dead(a, log_w)
        return Weights(a, a)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self)})"


class MIWAE(Bound):
    r"""Mean of M importance-weighted bounds of K particles each.

    .. math:: V = \frac1M \sum_{m=1}^M \log \frac1K \sum_{k=1}^K e^{\ell_{mk}}, \qquad
        a_{mk} = b_{mk} = \frac1M \frac{e^{\ell_{mk}}}{\sum_j e^{\ell_{mj}}}

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

    def __init__(self, M: int, K: int) -> None:
        super().__init__(M, K)

    @property
    def is_linear(self) -> bool:
        return self.K == 1

    def value(self, log_w: Tensor) -> Tensor:
        return _logmeanexp(log_w, 1).mean(0)

    def weights(self, log_w: Tensor) -> Weights:
        a = _softmax(log_w, 1) / self.M
        return Weights(a, a)


class IWAE(MIWAE):
    r"""Importance-weighted bound of K particles.

    .. math:: V = \log \frac1K \sum_{k=1}^K e^{\ell_k}, \qquad
        a_k = b_k = \frac{e^{\ell_k}}{\sum_j e^{\ell_j}}

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Arguments:
        K: number of particles, averaged inside the logarithm; an integer >= 1.

    Example:
        >>> IWAE(K=2).value(torch.tensor([[1.0, 3.0]]).log()).exp()
        tensor(2.)
    """

    def __init__(self, K: int) -> None:
        super().__init__(M=1, K=K)


class CIWAE(Bound):
    r"""Convex combination of the ELBO and the importance-weighted bound, on the same K particles.

    .. math:: V = \beta\, \frac1K \sum_k \ell_k + (1 - \beta) \log \frac1K \sum_k e^{\ell_k}, \qquad
        a_k = b_k = \frac{\beta}{K} + (1 - \beta) \frac{e^{\ell_k}}{\sum_j e^{\ell_j}}

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

    def __init__(self, K: int, beta: float) -> None:
        super().__init__(K=K)
        if not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
            raise ValueError(f"beta must be a number in [0, 1], got {beta!r}")
        self.beta = float(beta)

    @property
    def is_linear(self) -> bool:
        return self.K == 1 or self.beta == 1

    def value(self, log_w: Tensor) -> Tensor:
        # At either end the other term drops out: 0 * -inf would be NaN.
        if self.beta == 0:
            return _logmeanexp(log_w, (0, 1))
        if self.beta == 1:
            return log_w.mean((0, 1))
        return self.beta * log_w.mean((0, 1)) + (1 - self.beta) * _logmeanexp(log_w, (0, 1))

    def weights(self, log_w: Tensor) -> Weights:
        mixture = self.beta / self.K + (1 - self.beta) * _softmax(log_w, 1)
        a = _without_dead(mixture, log_w)
        return Weights(a, a)


class PIWAE(Bound):
    r"""Partially importance-weighted bound: IWAE(MK) for the model, MIWAE(M, K) for the guide.

    .. math:: V = \log \frac{1}{MK} \sum_{mk} e^{\ell_{mk}}, \qquad
        a_{mk} = \frac{e^{\ell_{mk}}}{\sum_{ij} e^{\ell_{ij}}}, \qquad
        b_{mk} = \frac1M \frac{e^{\ell_{mk}}}{\sum_j e^{\ell_{mj}}}

    Two objectives share one set of particles, so no single number is optimised; the value is the model's
    objective, the tighter of the two. The guide's is that of :class:`MIWAE`.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), section 4,
          https://arxiv.org/abs/1802.04537

    Arguments:
        M: number of groups of the guide's objective; an integer >= 1.
        K: number of particles in a group; an integer >= 1.

    Example:
        >>> weights = PIWAE(M=2, K=1).weights(torch.tensor([[1.0], [3.0]]).log())
        >>> weights.a.flatten(), weights.b.flatten()
        (tensor([0.2500, 0.7500]), tensor([0.5000, 0.5000]))
    """

    separate_weights = True

    def __init__(self, M: int, K: int) -> None:
        super().__init__(M, K)

    def value(self, log_w: Tensor) -> Tensor:
        return _logmeanexp(log_w, (0, 1))

    def weights(self, log_w: Tensor) -> Weights:
        a = _softmax(log_w.flatten(0, 1), 0).reshape(log_w.shape)
        return Weights(a, _softmax(log_w, 1) / self.M)


def describe(bound: Bound) -> str:
    """The bound's constructor arguments as text: ``M=8, K=8``."""
    names = [name for name in inspect.signature(type(bound)).parameters if hasattr(bound, name)]
    return ", ".join(f"{name}={getattr(bound, name)!r}" for name in names)


def _logmeanexp(log_w: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Logarithm of the mean of the exponentials; -inf where all are -inf."""
    dims = (dim,) if isinstance(dim, int) else dim
    count = math.prod(log_w.shape[d] for d in dims)
    return torch.logsumexp(log_w, dims) - math.log(count)


def _softmax(log_w: Tensor, dim: int) -> Tensor:
    return _without_dead(torch.softmax(log_w, dim), log_w)


def _without_dead(weights: Tensor, log_w: Tensor) -> Tensor:
    """Zero the weights of particles at -inf, where a softmax of nothing but -inf is NaN."""
    return weights.masked_fill(log_w == -math.inf, 0.0)


def _positive_integer(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return number
