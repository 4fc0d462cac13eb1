r"""The supports of distributions: discrete or not, fixed or moving with parameters.

The score of a density has the expectation 0 where its support is fixed. Where an end :math:`b` of the support
moves with a parameter :math:`\phi`, probability flows over it:

.. math:: E[\nabla_\phi \log q_\phi(z)] = \int \nabla_\phi q_\phi(z)\, dz
    = \nabla_\phi 1 - q_\phi(b)\, \nabla_\phi b,

for a single upper end. Nothing that relies on the score alone is right there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Delta, SineBivariateVonMises, SineSkewed, Unit
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    VonMises,
    constraints,
)
from torch.distributions.transforms import ComposeTransform, ExpTransform, Transform

__all__ = ["is_circular", "is_discrete", "limits", "own_support", "stripped", "support_moves"]

_WRAPPERS = (Independent, ExpandedDistribution, MaskedDistribution)

# Their density falls faster than any bijection to a bounded interval can compress it: at the ends it is 0.
_GAUSSIAN = (Normal, MultivariateNormal, LowRankMultivariateNormal)
_CIRCULAR = (VonMises, SineBivariateVonMises, SineSkewed)
# What stands for the inverse of any transform.
_Inverse = type(ExpTransform().inv)


def is_discrete(fn: Any) -> bool | None:
    """Whether a distribution has a probability mass rather than a density; None where that cannot be told.

    None also of a point mass or a factor, which go with either.
    """
    while (part := _whole(fn)) is not None:
        fn = part
    if isinstance(fn, Delta | Unit):
        return None
    if getattr(fn, "has_enumerate_support", False):
        return True
    support = _support(fn)
    # A constraint by somebody else says that it is not discrete where nobody has given it a thought.
    if not type(support).__module__.startswith(("torch.", "pyro.")):
        return None
    return support.is_discrete


def is_circular(fn: Any) -> bool:
    """Whether a distribution, or what it is made of, is one of angles from -pi to pi.

    Their support says all real numbers, and their density repeats itself there.
    """
    while fn is not None:
        if isinstance(fn, _CIRCULAR):
            return True
        fn = _whole(fn)
    return False


def _whole(fn: Any) -> Any:
    """A distribution with values of the same kind, of which this one is made; None if of none."""
    for name in ("base_dist", "_component_distribution", "component0"):
        part = getattr(fn, name, None)
        if part is not None:
            return part
    return None


def _support(fn: Any) -> Any:
    """The support, None where it has none to tell."""
    try:
        return fn.support
    except (AttributeError, NotImplementedError):
        return None


def stripped(fn: Any) -> Any:
    """A distribution without its event dims, expansions and masks."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def limits(fn: Any) -> tuple[Any, Any] | None:
    """The lowest and highest value of a distribution over numbers, by entry; None where that is not known.

    Both are numbers or tensors that broadcast to the shape of a value; infinite where there is no limit. Of a
    plain :class:`TransformedDistribution` they follow from its base, see :func:`support_moves`.
    """
    fn = stripped(fn)
    if isinstance(fn, _CIRCULAR):
        return -math.pi, math.pi
    component = getattr(fn, "_component_distribution", None)
    if component is not None:
        return _limits_of_mixture(component)
    if isinstance(fn, TransformedDistribution) and type(fn).support is TransformedDistribution.support:
        return _limits_of_image(fn)
    return _interval(_support(fn))


def _limits_of_mixture(component: Any) -> tuple[Any, Any] | None:
    """Of all components together, on the last batch dim; gaps between them aside."""
    both = limits(component)
    if both is None:
        return None
    dim = -1 - len(component.event_shape)
    shape = component.batch_shape + component.event_shape
    low, high = (torch.as_tensor(end) for end in both)
    # A number is that of all components.
    return (
        low.expand(shape).amin(dim) if low.dim() else low,
        high.expand(shape).amax(dim) if high.dim() else high,
    )


def _limits_of_image(fn: Any) -> tuple[Any, Any] | None:
    """Where the transforms take the base's limits."""
    both, domain = limits(fn.base_dist), None if is_circular(fn.base_dist) else _support(fn.base_dist)
    for transform in _flat(fn.transforms):
        if both is not None and domain is not None and _is_same(domain, transform.domain):
            domain = transform.codomain  # all of it is reached
            both = _interval(domain)
            continue
        elementwise = transform.domain.event_dim == 0 and transform.bijective
        if both is None or not elementwise:
            return None
        ends = [_apply(transform, torch.as_tensor(end)) for end in both]
        if any(bool(end.isnan().any()) for end in ends):
            return None
        both, domain = (torch.minimum(*ends), torch.maximum(*ends)), None
    return both


def own_support(name: str, prior: Any) -> str:
    """What to do about a guide that goes beyond the prior's support, as a sentence."""
    if is_circular(prior):
        return (
            f"Give {name!r} a guide with the prior's support: dist.VonMises, or a "
            "dist.TransformedDistribution of a dist.Normal by "
            "torch.distributions.biject_to(constraints.interval(-math.pi, math.pi)); no AutoNormal, which "
            "goes by what the prior says of its support: all real numbers."
        )
    return (
        f"Give {name!r} a guide with the prior's support: AutoNormal, a dist.TransformedDistribution of a "
        "dist.Normal by torch.distributions.biject_to(support), or a Beta for an interval."
    )


def support_moves(fn: Any) -> bool:
    """Whether an end of a distribution's support depends on a tensor that requires a gradient.

    Told from the bounds of ``fn.support``, and for a plain :class:`TransformedDistribution`, whose support
    is said to be what its last transform could reach, from where the transforms take those of its base.
    """
    if isinstance(fn, Delta | Unit):
        return False
    if not isinstance(fn, TransformedDistribution):
        # Of an independent, expanded or masked one, or a mixture.
        part = _whole(fn)
        return any(map(_is_moving, _tensors(_support(fn)))) if part is None else support_moves(part)
    if type(fn).support is not TransformedDistribution.support:
        return any(map(_is_moving, _tensors(_support(fn))))
    return _image_moves(fn)


def _is_moving(bound: Tensor) -> bool:
    return bound.requires_grad and bool(bound.isfinite().any())


def _tensors(constraint: Any) -> Iterator[Tensor]:
    """The tensors that a constraint is made of."""
    if isinstance(constraint, Tensor):
        yield constraint
    elif isinstance(constraint, constraints.Constraint):
        for part in vars(constraint).values():
            yield from _tensors(part)
    elif isinstance(constraint, list | tuple):
        for part in constraint:
            yield from _tensors(part)


def _image_moves(fn: TransformedDistribution) -> bool:
    """Whether the image of the base's support moves."""
    transforms: list[Any] = []
    base: Any = fn
    while (part := _whole(base)) is not None:
        if isinstance(base, TransformedDistribution):
            transforms = [*_flat(base.transforms), *transforms]
        base = part
    if isinstance(base, _GAUSSIAN) and all(transform.bijective for transform in transforms):
        return False
    domain = _support(base)
    ends = _ends(domain)
    sources = [tensor for tensor in _tensors(domain) if tensor.requires_grad]
    shape = base.batch_shape + base.event_shape
    for transform in transforms:
        if domain is not None and _is_same(domain, transform.domain):
            domain = transform.codomain  # all of it is reached
            ends = _ends(domain)
            continue
        ends = [_apply(transform, end.expand(torch.broadcast_shapes(end.shape, shape))) for end in ends]
        domain = None
        sources += _learnt(transform)
    return any(_depends(end, sources) for end in ends if _is_moving(end))


def _flat(transforms: Any) -> Iterator[Any]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flat(transform.parts)
        else:
            yield transform


def _apply(transform: Any, value: Tensor) -> Tensor:
    """Past the cache, in which a transform without an inverse keeps its last draw."""
    return transform.inv._inverse(value) if isinstance(transform, _Inverse) else transform._call(value)


def _learnt(part: Any) -> list[Tensor]:
    """The tensors with gradients that a transform is made of."""
    if isinstance(part, Tensor):
        return [part] if part.requires_grad else []
    if isinstance(part, _Inverse):
        return _learnt(part.inv)
    found: list[Tensor] = []
    if isinstance(part, torch.nn.Module):
        found += [parameter for parameter in part.parameters() if parameter.requires_grad]
    if isinstance(part, Transform):
        own = [value for name, value in vars(part).items() if name not in ("_inv", "_cached_x_y")]
        found += _learnt(own)
    elif isinstance(part, list | tuple):
        found += [tensor for value in part for tensor in _learnt(value)]
    return found


def _interval(constraint: Any) -> tuple[Any, Any] | None:
    """The ends of a constraint to an interval, infinite where it has none; None if it is something else."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    lower, upper = (getattr(constraint, name, None) for name in ("lower_bound", "upper_bound"))
    if lower is None and upper is None and type(constraint) is not type(constraints.real):
        return None
    return -math.inf if lower is None else lower, math.inf if upper is None else upper


def _ends(constraint: Any) -> list[Tensor]:
    """The finite ends of an interval."""
    ends = map(torch.as_tensor, _interval(constraint) or ())
    return [end for end in ends if bool(end.isfinite().all())]


def _is_same(one: Any, other: Any) -> bool:
    """Whether two constraints are the same interval, or else of one kind."""
    first, second = _interval(one), _interval(other)
    if first is None or second is None:
        return first is second and type(one) is type(other)
    if any(isinstance(end, Tensor) and end.requires_grad for end in (*first, *second)):
        return False
    return all(
        bool((torch.as_tensor(a) == torch.as_tensor(b)).all()) for a, b in zip(first, second, strict=True)
    )


def _depends(end: Tensor, sources: list[Tensor]) -> bool:
    """Whether an end varies with any of the tensors: 0 times a scale does not."""
    if not sources:  # of a transform that hides what it is made of
        return True
    grads = torch.autograd.grad(end.sum(), sources, retain_graph=True, allow_unused=True)
    return any(grad is not None and bool((grad != 0).any()) for grad in grads)
