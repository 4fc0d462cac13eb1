r"""The losses by name: a bound of :mod:`~pyro_iw.bounds` each, built from the bound's own arguments."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from . import bounds
from .bound import describe
from .elbo import ImportanceWeightedELBO, Keywords

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

__all__ = ["CIWAE_ELBO", "IWAE_ELBO", "MIWAE_ELBO", "PIWAE_ELBO", "TVO_ELBO", "VR_ELBO"]


_Init = TypeVar("_Init", bound=Callable[..., None])


def _spelled_out(init: _Init) -> _Init:
    """Name the base class's keywords in a signature, for help and completion.

    Type checkers read them off :class:`Keywords`.
    """
    *own, _ = inspect.signature(init).parameters.values()
    keywords = inspect.signature(ImportanceWeightedELBO.__init__).parameters.values()
    passed_on = [parameter for parameter in keywords if parameter.kind is parameter.KEYWORD_ONLY]
    signature = inspect.Signature([*own, *passed_on], return_annotation=None)
    init.__signature__ = signature  # type: ignore[attr-defined]
    return init


class _NamedELBO(ImportanceWeightedELBO):
    """A loss named after its bound and built from the bound's own arguments."""

    def __init__(self, bound: bounds.Bound, **keywords: Unpack[Keywords]) -> None:
        known = list(inspect.signature(type(self)).parameters)
        for name in keywords:
            if name not in Keywords.__annotations__:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"Did you mean {close[0]!r}?" if close else f"It takes {', '.join(known)}."
                if name == "num_particles":  # what Pyro's losses call it
                    hint = f"The particles are counted by {' * '.join(n for n in known if n in ('M', 'K'))}."
                raise TypeError(
                    f"{type(self).__name__}() got an unexpected keyword argument {name!r}. {hint}"
                )
        super().__init__(bound, **keywords)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self.bound)}{self._options()})"


class IWAE_ELBO(_NamedELBO):
    r"""Importance-weighted bound of K particles.

    .. math::
        \mathcal L = \sum_n \log \frac1K \sum_{k=1}^K w_{nk}, \qquad
        w_{nk} = \frac{p_\theta(x_n, z_{nk})}{q_\phi(z_{nk} \mid x_n)}

    The sum is over the cells of the kept plates. It tightens as K grows, while the signal-to-noise ratio
    of the guide's gradient falls as :math:`1 / \sqrt K`; :class:`MIWAE_ELBO` and :class:`PIWAE_ELBO` trade
    between the two.

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Arguments:
        K: number of particles, averaged inside the logarithm; an integer >= 1.
        keywords: see :class:`ImportanceWeightedELBO`.

    Raises:
        ValueError: if K is not an integer >= 1.

    Example:
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=IWAE_ELBO(K=64))
        >>> loss = svi.step(data)
    """

    @_spelled_out
    def __init__(self, K: int, **keywords: Unpack[Keywords]) -> None:
        super().__init__(bounds.IWAE(K), **keywords)


class MIWAE_ELBO(_NamedELBO):
    r"""Mean of M importance-weighted bounds of K particles each.

    .. math::
        \mathcal L = \sum_n \frac1M \sum_{m=1}^M \log \frac1K \sum_{k=1}^K
            \frac{p_\theta(x_n, z_{nmk})}{q_\phi(z_{nmk} \mid x_n)}

    K = 1 is the ELBO with M particles, M = 1 is :class:`IWAE_ELBO`.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537

    Arguments:
        M: number of groups, averaged outside the logarithm; an integer >= 1.
        K: number of particles in a group, averaged inside it; an integer >= 1.
        keywords: see :class:`ImportanceWeightedELBO`.

    Raises:
        ValueError: if M or K is not an integer >= 1.

    Example:
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=MIWAE_ELBO(M=8, K=8))
        >>> loss = svi.step(data)
    """

    @_spelled_out
    def __init__(self, M: int, K: int, **keywords: Unpack[Keywords]) -> None:
        super().__init__(bounds.MIWAE(M, K), **keywords)


class CIWAE_ELBO(_NamedELBO):
    r"""Convex combination of the ELBO and the importance-weighted bound, on the same K particles.

    .. math::
        \mathcal L = \sum_n \Big[ \beta\, \frac1K \sum_{k=1}^K \log w_{nk}
            + (1 - \beta) \log \frac1K \sum_{k=1}^K w_{nk} \Big], \qquad
        w_{nk} = \frac{p_\theta(x_n, z_{nk})}{q_\phi(z_{nk} \mid x_n)}

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537

    Arguments:
        K: number of particles; an integer >= 1.
        beta: share of the ELBO, in [0, 1].
        keywords: see :class:`ImportanceWeightedELBO`.

    Raises:
        ValueError: if K is not an integer >= 1 or beta lies outside [0, 1].

    Example:
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=CIWAE_ELBO(K=64, beta=0.5))
        >>> loss = svi.step(data)
    """

    @_spelled_out
    def __init__(self, K: int, beta: float, **keywords: Unpack[Keywords]) -> None:
        super().__init__(bounds.CIWAE(K, beta), **keywords)


class PIWAE_ELBO(_NamedELBO):
    r"""Partially importance-weighted: the model climbs IWAE(MK), the guide MIWAE(M, K).

    .. math::
        \theta: \sum_n \log \frac1{MK} \sum_{m,k} w_{nmk}, \qquad
        \phi: \sum_n \frac1M \sum_m \log \frac1K \sum_k w_{nmk}, \qquad
        w_{nmk} = \frac{p_\theta(x_n, z_{nmk})}{q_\phi(z_{nmk} \mid x_n)}

    Both gradients come from the same particles in one forward and one backward pass. A parameter that model
    and guide share gets the sum of its two roles. The loss reported is the model's, IWAE(MK).

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537

    Arguments:
        M: number of groups of the guide's objective; an integer >= 1.
        K: number of particles in a group; an integer >= 1.
        keywords: see :class:`ImportanceWeightedELBO`.

    Raises:
        ValueError: if M or K is not an integer >= 1.

    Example:
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=PIWAE_ELBO(M=8, K=8))
        >>> loss = svi.step(data)
    """

    @_spelled_out
    def __init__(self, M: int, K: int, **keywords: Unpack[Keywords]) -> None:
        super().__init__(bounds.PIWAE(M, K), **keywords)


class VR_ELBO(_NamedELBO):
    r"""Variational Rényi bound of order :math:`\alpha`.

    .. math::
        \mathcal L = \sum_n \frac{1}{1 - \alpha} \log \frac1K \sum_{k=1}^K w_{nk}^{1 - \alpha}, \qquad
        w_{nk} = \frac{p_\theta(x_n, z_{nk})}{q_\phi(z_{nk} \mid x_n)}

    :math:`\alpha = 0` is :class:`IWAE_ELBO`, :math:`\alpha = 1` the ELBO.

    References:
        | Rényi Divergence Variational Inference (Li & Turner, 2016), https://arxiv.org/abs/1602.02311

    Arguments:
        alpha: the order, a finite number.
        K: number of particles; an integer >= 1.
        keywords: see :class:`ImportanceWeightedELBO`.

    Raises:
        ValueError: if K is not an integer >= 1 or alpha is not a finite number.

    Example:
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=VR_ELBO(alpha=0.5, K=64))
        >>> loss = svi.step(data)
    """

    @_spelled_out
    def __init__(self, alpha: float, K: int, **keywords: Unpack[Keywords]) -> None:
        super().__init__(bounds.VR(alpha, K), **keywords)


class TVO_ELBO(_NamedELBO):
    r"""Thermodynamic variational objective on K particles.

    .. math::
        \mathcal L = \sum_n \sum_{p=0}^{P-1} (\beta_{p+1} - \beta_p)
            \sum_k \frac{w_{nk}^{\beta_p}}{\sum_j w_{nj}^{\beta_p}} \log w_{nk}

    ``partitions=1`` is the ELBO. The gradients are those of this estimate; the paper's own
    covariance form, which needs no reparameterisation, is not used.

    References:
        | The Thermodynamic Variational Objective (Masrani et al., 2019), https://arxiv.org/abs/1907.00031

    Arguments:
        K: number of particles; an integer >= 1.
        partitions: the increasing :math:`\beta_0 = 0, \dots, \beta_P = 1`; or their number P, which then are
            log-uniform between 0.025 and 1, after 0.
        keywords: see :class:`ImportanceWeightedELBO`.

    Raises:
        ValueError: if K is not an integer >= 1 or the partitions do not increase from 0 to 1.

    Example:
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=TVO_ELBO(K=64, partitions=5))
        >>> loss = svi.step(data)
    """

    @_spelled_out
    def __init__(self, K: int, partitions: int | Sequence[float], **keywords: Unpack[Keywords]) -> None:
        super().__init__(bounds.TVO(K, partitions), **keywords)
