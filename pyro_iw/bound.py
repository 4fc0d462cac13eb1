r"""What a bound is: a function of the log-weights, its derivatives, and what it is without one of them."""

from __future__ import annotations

import inspect
from typing import ClassVar

import torch
from torch import Tensor

from ._support.arguments import positive_integer
from ._support.devices import wide
from .logmean import without_dead

__all__ = ["Bound", "describe"]


class Bound:
    r"""Base class: a bound :math:`V` over M groups of K particles.

    A bound of your own overrides :meth:`value` with differentiable tensor operations; all else then comes
    from autograd. Closed forms, where there are any, override the other methods.

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
        >>> bound.weights(log_w)
        tensor([[0.0000, 0.0000],
                [0.5000, 0.5000],
                [0.0000, 0.0000]])
    """

    #: Whether a constant added to all log-weights is added to the value, so that differences of values may be
    #: taken of shifted log-weights, with all their digits. True of the bounds here.
    is_shift_equivariant: ClassVar[bool] = False

    def __init__(self, M: int = 1, K: int = 1) -> None:
        self.M = positive_integer("M", M)
        self.K = positive_integer("K", K)

    @property
    def num_particles(self) -> int:
        """The number S = M * K of particles."""
        return self.M * self.K

    @property
    def is_linear(self) -> bool:
        """Whether the bound is the plain mean of the log-weights, as the ELBO is; False unless overridden.

        Only then is it unbiased under a scale inside the logarithm, such as that of a subsampled plate
        below a global latent.
        """
        return False  # not even with one particle, of whose log-weight a value may be any function

    @property
    def guide_bound(self) -> Bound:
        """The bound that the guide climbs, on the same particles; this one unless overridden."""
        return self

    def value(self, log_w: Tensor) -> Tensor:
        """The bound, in nats.

        Arguments:
            log_w: log-weights, of shape ``[M, K, *cells]``.

        Returns:
            The bound of every cell, of shape ``[*cells]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define value(log_w)")

    def weights(self, log_w: Tensor) -> Tensor:
        r""":math:`\partial V / \partial \ell`, of the shape ``[M, K, *cells]`` of ``log_w``.

        A particle whose log-weight is -inf weighs 0; otherwise the weights of the bounds in this module sum
        to 1 over (M, K).
        """
        with torch.enable_grad():
            leaf = log_w.detach().requires_grad_()
            (a,) = torch.autograd.grad(self.value(leaf).sum(), leaf)
        return without_dead(a, log_w)

    def path_weights(self, log_w: Tensor) -> Tensor:
        r"""The weights minus the Hessian's diagonal :math:`\partial^2 V / \partial \ell^2`; of one shape.

        From autograd this takes a backward pass for each particle, over the log-weights alone.
        """
        with torch.enable_grad():
            leaf = log_w.detach().requires_grad_()
            (a,) = torch.autograd.grad(self.value(leaf).sum(), leaf, create_graph=True)
            curvature = torch.zeros_like(log_w)
            for index in (divmod(i, self.K) for i in range(self.num_particles)):
                if a.requires_grad:  # else the bound is linear
                    (row,) = torch.autograd.grad(a[index].sum(), leaf, retain_graph=True)
                    curvature[index] = row[index]
        return without_dead(a.detach() - curvature, log_w)

    def replaced(self, log_w: Tensor, replacement: Tensor) -> Tensor:
        """The value with each particle's log-weight replaced in turn, the others as they are.

        Without a closed form this evaluates the bound once for each particle, in memory for one.

        Arguments:
            log_w: log-weights, of shape ``[M, K, *cells]``.
            replacement: what each is replaced by, of the same shape.

        Returns:
            A tensor of the same shape; its entry (m, k) is V with only entry (m, k) replaced.
        """
        values = torch.empty_like(log_w)
        for index in (divmod(i, self.K) for i in range(self.num_particles)):
            changed = log_w.clone()
            changed[index] = replacement[index]
            values[index] = self.value(changed)
        return values

    def difference(self, log_w: Tensor, replacement: Tensor) -> Tensor:
        """The value less :meth:`replaced`, to all digits that its size of about 1 / K has.

        Without a closed form the two are subtracted in float64 (float32 on a device without it).

        Arguments and result are those of :meth:`replaced`.
        """
        exact = wide(log_w)
        return (self.value(exact) - self.replaced(exact, wide(replacement))).to(log_w.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self)})"


def describe(bound: Bound) -> str:
    """The bound's constructor arguments as text: ``M=8, K=8``."""
    names = [name for name in inspect.signature(type(bound)).parameters if hasattr(bound, name)]
    return ", ".join(f"{name}={getattr(bound, name)!r}" for name in names)
