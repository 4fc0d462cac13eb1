r"""Log densities in single precision or better, whatever autocast makes of the networks.

Under ``torch.autocast`` a network's output is bfloat16 or float16, and a distribution made of it would draw
its noise and sum its log density with those few digits: an error of up to a nat over some hundred latents. So
the parameters of every distribution are widened to float32 as it comes to a sample statement, before it is
sampled or scored; both happen outside of autocast. The networks stay as they are.

What a distribution has computed when it was made goes through autocast too, and is made again where it
matters: the normaliser of a categorical one and of each step of a discrete hidden Markov model, whose
probabilities would sum to 1 only within 0.01, and the small matrix of a multivariate normal of low rank. What
Pyro's Gaussian chains multiply as they are made cannot be had again, and they are refused.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from pyro.distributions import DiscreteHMM
from pyro.ops.gamma_gaussian import GammaGaussian
from pyro.ops.gaussian import Gaussian
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, ExpTransform, LowRankMultivariateNormal, Transform

from .._support.devices import autocast_types

__all__ = ["in_full_precision", "wide_densities"]

_HALF = (torch.float16, torch.bfloat16)
#: The type of a transform's inverse.
_INVERSE: type[Transform] = type(ExpTransform().inv)


def in_full_precision() -> AbstractContextManager[Any]:
    """A context without autocast."""
    kinds = autocast_types()
    if not kinds:
        return nullcontext()
    stack = ExitStack()
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def wide_densities() -> Any:
    """A context for model and guide to run in: nothing but where autocast is on."""
    return _WideDensities() if autocast_types() else nullcontext()


class _WideDensities(Messenger):
    """Widens the distributions of sample statements, and samples them without autocast."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if not isinstance(fn, Distribution):
            return
        _refuse_rounded(msg["name"], fn)
        msg["fn"] = _widened(fn, {})
        if msg["value"] is None and not msg["done"] and not msg["is_observed"]:
            with in_full_precision():
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])


def _widened(value: Any, known: dict[int, Any]) -> Any:
    """The same with tensors of float32 in place of those with fewer digits.

    Arguments:
        value: a distribution, a transform, a list of them, a tensor, or anything else, which stays.
        known: what has been made of which object, by its id: what is one thing stays one.
    """
    if id(value) in known:
        return known[id(value)][1]
    result = value
    if isinstance(value, Tensor):
        result = _wide(value)
    elif type(value) in (list, tuple):
        parts = [_widened(part, known) for part in value]
        if any(new is not old for new, old in zip(parts, value, strict=True)):
            result = type(value)(parts)
    elif isinstance(value, Distribution | Transform) and not isinstance(value, nn.Module):
        state = {
            name: _widened(part, known) for name, part in vars(value).items() if not _is_back(value, name)
        }
        if any(new is not vars(value)[name] for name, new in state.items()):
            result = copy.copy(value)
            vars(result).update(state)
            if _is_back(result, "_inv"):
                result._inv = None  # type: ignore[union-attr]
            if isinstance(result, Categorical):
                _normalise(result)
            elif isinstance(result, DiscreteHMM):
                for name in ("initial_logits", "transition_logits"):
                    setattr(result, name, getattr(result, name).log_softmax(-1))
        if isinstance(result, LowRankMultivariateNormal):
            result = copy.copy(result)
            result._capacitance_tril = _capacitance_tril(result)
    known[id(value)] = value, result  # the value too, so that no other gets its id meanwhile
    return result


def _refuse_rounded(name: str, fn: Any) -> None:
    """Refuse what has been multiplied in fewer digits than can be given back."""
    while isinstance(base := getattr(fn, "base_dist", None), Distribution):
        fn = base
    for made in vars(fn).values():
        if isinstance(made, Gaussian | GammaGaussian) and any(
            isinstance(part, Tensor) and part.dtype in _HALF for part in vars(made).values()
        ):
            raise ValueError(
                f"The {type(fn).__name__} of site {name!r} has been made under autocast, which multiplied "
                "its matrices in fewer digits than float32 has, and its density would be off by nats. Make "
                f"it under torch.autocast({made.log_normalizer.device.type!r}, enabled=False), of parameters "
                "that are turned to float32 by .float()."
            )


def _is_back(value: Any, name: str) -> bool:
    """Whether an attribute is a transform's inverse, made of the transform itself once it was asked for."""
    return name == "_inv" and isinstance(value, Transform) and not isinstance(value, _INVERSE)


def _normalise(fn: Any) -> None:
    """Have the probabilities sum to 1, in place; they did so in fewer digits."""
    names = {name for name in ("logits", "probs") if name in vars(fn)}
    for name in names:  # one is the parameter; the other, if there, was computed from it
        if vars(fn)[name] is fn._param:
            value = fn._param
            value = value.log_softmax(-1) if name == "logits" else value / value.sum(-1, keepdim=True)
            fn._param = vars(fn)[name] = value
        else:
            del vars(fn)[name]


def _capacitance_tril(fn: Any) -> Tensor:
    r"""The Cholesky factor of :math:`I + W^\top D^{-1} W`, which autocast would multiply in fewer digits."""
    with in_full_precision():
        factor, diag = fn._unbroadcasted_cov_factor, fn._unbroadcasted_cov_diag
        product = (factor.mT / diag.unsqueeze(-2)) @ factor
        eye = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
        return torch.linalg.cholesky(product + eye)


def _wide(tensor: Tensor) -> Tensor:
    if tensor.dtype not in _HALF:
        return tensor
    shape = tensor.shape
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and shape[dim] > 1:  # expanded: to be cast once
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.float().expand(shape)
