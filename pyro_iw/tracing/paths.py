r"""Which draws have a path: the gradient of a draw with respect to what it was drawn from.

``has_rsample`` says that a distribution has some gradient to pass, not that it is the right one. That of a
*straight-through* distribution is made up: its draws are discrete, and so do not vary with its parameters.
That of a *rejection* sampler is a part of the whole: a draw also varies with its parameters in whether it
is accepted. Along either, the expected gradient is not the gradient of the expectation, for any estimator.

So the draws of such distributions are cut off from their parameters, and count as what they are, draws
without a path, whose gradient comes from the score. Who wants the other gradient, for its small variance,
asks for it with ``infer={"biased_path": True}`` at the guide's site.

References:
    | Estimating or Propagating Gradients Through Stochastic Neurons (Bengio et al., 2013),
      https://arxiv.org/abs/1308.3432
    | Reparameterization Gradients through Acceptance-Rejection Sampling Algorithms (Naesseth et al., 2017),
      https://arxiv.org/abs/1610.05683
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.distribution import Distribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor

from .supports import is_discrete, stripped

__all__ = ["carried", "class_name", "draws_hard_values", "has_biased_path", "has_path"]

_RELAXED = (dist.RelaxedBernoulliStraightThrough, dist.RelaxedOneHotCategoricalStraightThrough)

# Of a distribution whose path is all or nothing. Pyro has those that are reparameterised in part override it.
_PLAIN_SCORE_PARTS = (
    None,
    Distribution.score_parts,
    ExpandedDistribution.score_parts,
    MaskedDistribution.score_parts,
)

# What Pyro's relaxed straight-through distributions attach to a hard value: the soft one, whose density it
# has.
_SOFT = "_unquantize"


def has_path(fn: Any, infer: Mapping[str, Any]) -> bool:
    """Whether draws pass a gradient to what they were drawn from: the right one, or one that was asked for.

    Arguments:
        fn: the distribution.
        infer: what its sample site was given as such.
    """
    if not getattr(fn, "has_rsample", False):
        return False
    return bool(infer.get("biased_path", False)) or not has_biased_path(fn)


def has_biased_path(fn: Any) -> bool:
    """Whether a distribution, or one that it is made of, claims a path that is not that of its draws."""
    return any(getattr(part, "has_rsample", False) and _is_biased(part) for part in _parts(fn))


def draws_hard_values(fn: Any) -> bool:
    """Whether its draws are discrete and its density is that of the continuous values they came from."""
    return any(isinstance(part, _RELAXED) for part in _parts(fn))


def carried(value: Any, change: Callable[..., Tensor], *args: Any) -> Any:
    """A changed value, together with what its distribution has attached to it, changed in the same way.

    Arguments:
        value: the value of a latent site.
        change: called with a tensor of the value's shape and ``args``, to make another of it or return it.
    """
    soft = getattr(value, _SOFT, None)
    changed = change(value, *args)
    if soft is not None and changed is not value:
        setattr(changed, _SOFT, change(soft, *args))
    return changed


def class_name(fn: Any) -> str:
    """Name of the distribution under those that only expand, mask or reinterpret it."""
    return type(stripped(fn)).__name__


def _is_biased(fn: Any) -> bool:
    return _is_biased_kind(type(fn)) or bool(is_discrete(fn))  # type: ignore[arg-type]


def _parts(fn: Any) -> Iterator[Any]:
    """A distribution and those it is made of: base, components, samplers of its own."""
    yield fn
    for part in getattr(fn, "__dict__", {}).values():
        if _is_distribution(type(part)):  # type: ignore[arg-type]
            yield from _parts(part)


# This is asked of every latent site in every step, and of a class the answer is always the same.
@lru_cache(maxsize=1024)
def _is_biased_kind(kind: type) -> bool:
    return issubclass(kind, _RELAXED) or getattr(kind, "score_parts", None) not in _PLAIN_SCORE_PARTS


@lru_cache(maxsize=1024)
def _is_distribution(kind: type) -> bool:
    return issubclass(kind, torch.distributions.Distribution | Distribution)
