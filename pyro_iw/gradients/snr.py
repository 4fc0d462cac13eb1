r"""How much signal a gradient estimator leaves in its noise.

Theorem 1 of the source, for M groups of K particles: :math:`\mathrm{SNR}(\theta) = O(\sqrt{M K})` while
:math:`\mathrm{SNR}(\phi) = O(\sqrt{M / K})` with ``estimator="reparam"``. ``estimator="dreg"`` turns the
latter round. ``examples/snr.py`` measures both.

References:
    | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
      https://arxiv.org/abs/1802.04537
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.infer.elbo import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .._support.devices import wide, wide_dtype
from .._support.progress import progress_bar
from .._support.warn import warn
from ..tracing.messages import guide_messenger
from ..tracing.traces import Pair

__all__ = ["GradientSNR", "GroupSNR", "gradient_snr"]


class GroupSNR(NamedTuple):
    """Signal-to-noise ratio of a group of parameters.

    Attributes:
        names: the group's parameters.
        elementwise: the ratios of its elements, averaged; as in the source. NaN for an empty group.
        norm: norm of the mean gradient over the root of its summed variance. NaN for an empty group.
    """

    names: tuple[str, ...]
    elementwise: float
    norm: float


@dataclass(frozen=True, eq=False, repr=False)
class GradientSNR:
    r"""What :func:`gradient_snr` measured: :math:`|E[g]| / \sqrt{\mathrm{Var}[g]}` of a gradient g.

    Attributes:
        mean: mean gradient of every parameter, by name; float64, of the parameter's shape, in nats per unit
            of the unconstrained parameter.
        std: standard deviation of a single draw, likewise.
        snr: \|mean\| / std of every element; 0 where the mean is 0 (also where both are, as for a unit that
            is never reached), inf where only the deviation is 0.
        model: the ratio of the model's parameters.
        guide: that of the guide's. A parameter that both have counts in both, with its one gradient.
        num_draws: number of draws.

    Example:
        >>> result = gradient_snr(IWAE_ELBO(K=16), model, guide, data)
        >>> sorted(result.mean) == sorted(result.std) == ["loc", "weight"]
        True
    """

    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    snr: dict[str, Tensor]
    model: GroupSNR
    guide: GroupSNR
    num_draws: int

    @property
    def floor(self) -> float:
        r"""What a gradient without any signal would seem to have, about :math:`1 / \sqrt{\text{num\_draws}}`.

        Ratios that are not well above it are noise.
        """
        return 1 / math.sqrt(self.num_draws)

    def __repr__(self) -> str:
        return (
            f"GradientSNR(model={self.model.elementwise:.3g}, guide={self.guide.elementwise:.3g}, "
            f"floor={self.floor:.2g}, num_draws={self.num_draws})"
        )


def gradient_snr(
    loss: ELBO,
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 100,
    progress: bool = True,
    **kwargs: Any,
) -> GradientSNR:
    r"""Signal-to-noise ratio of the gradients that a loss gives at the current parameters.

    .. math:: \mathrm{SNR}_i = \frac{|E[g_i]|}{\sqrt{\mathrm{Var}[g_i]}}, \qquad
        \mathrm{SNR}_{\mathrm{norm}} = \frac{\lVert E[g] \rVert}{\sqrt{\sum_i \mathrm{Var}[g_i]}}

    with mean and variance over independent draws of the gradient :math:`g` of ``loss.differentiable_loss``,
    on the same arguments. They are accumulated in float64, in memory for a few copies of the parameters.
    Parameters are the unconstrained tensors that an optimiser would move, under Pyro's names for them.

    Neither the parameters nor their ``.grad`` change, nor does a loss's count of :attr:`steps`, so that an
    annealed KL term keeps its present weight. The random state advances, a parameter that does not exist yet
    is made, and running averages (batch normalisation in train mode) are updated as by any forward pass.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), section 3,
          https://arxiv.org/abs/1802.04537

    Arguments:
        loss: any of Pyro's losses with a ``differentiable_loss``.
        model: the model.
        guide: the guide.
        args: positional arguments of both.
        num_draws: number of gradients to draw; an integer >= 2.
        progress: whether to show a progress bar, if it takes more than two seconds.
        kwargs: further keyword arguments of both.

    Returns:
        Mean, standard deviation and ratio of every parameter, and the ratio of model and guide.

    Raises:
        ValueError: if ``num_draws`` < 2, the loss has no ``differentiable_loss`` or has a
            ``particle_group``, no parameter gets a gradient, or model and guide have different ones of one
            name (as they may under ``module_local_params``).

    Example:
        >>> result = gradient_snr(IWAE_ELBO(K=16), model, guide, data, num_draws=200)
        >>> {name: ratio.shape for name, ratio in result.snr.items()}
        {'weight': torch.Size([]), 'loc': torch.Size([])}
        >>> better = gradient_snr(IWAE_ELBO(K=16, estimator="dreg"), model, guide, data, num_draws=200)
        >>> better.guide.elementwise > result.guide.elementwise > result.floor
        True
    """
    if isinstance(num_draws, bool) or not isinstance(num_draws, numbers.Integral) or num_draws < 2:
        raise ValueError(f"num_draws must be an integer >= 2, for there to be a variance, got {num_draws!r}")
    if not hasattr(loss, "differentiable_loss"):
        raise ValueError(f"{loss!r} has no differentiable_loss to take gradients of")
    if getattr(loss, "particle_group", None) is not None:
        raise ValueError(
            "The gradients of a loss with a particle_group are those of one rank's particles, and not of all."
            " Measure the loss without particle_group, on one process."
        )
    moments: dict[str, _Moments] = {}
    for draw in progress_bar(range(num_draws), show=progress, desc="gradients"):
        for name, gradient in _draw(loss, model, guide, args, kwargs).items():
            # In the draws before a parameter was first seen its gradient was 0.
            moments.setdefault(name, _Moments(gradient, draw)).add(gradient)
        for moment in moments.values():
            if moment.count == draw:  # not reached in this one
                moment.add(torch.zeros_like(moment.mean))
    mean = {name: moment.mean for name, moment in moments.items()}
    std = {name: moment.variance().sqrt() for name, moment in moments.items()}
    bad = [repr(name) for name, value in std.items() if not bool(value.isfinite().all())]
    if bad:
        message = f"Some gradients of {', '.join(bad)} are NaN or infinite, and so is their ratio."
        warn(message, RuntimeWarning)
    names = _names(Pair(model, guide, args, kwargs))
    return GradientSNR(
        mean=mean,
        std=std,
        snr={name: _ratio(value.abs(), std[name]) for name, value in mean.items()},
        model=_group([name for name in moments if name in names["model"]], mean, std),
        guide=_group([name for name in moments if name in names["guide"]], mean, std),
        num_draws=num_draws,
    )


class _Moments:
    """Running mean and variance (Welford, 1962) in float64, where the device has it.

    Arguments:
        like: a tensor of the shape of what is added.
        count: number of zeros that were added before.
    """

    def __init__(self, like: Tensor, count: int) -> None:
        self.mean = torch.zeros_like(like, dtype=wide_dtype(like.device))
        self.squares = torch.zeros_like(self.mean)
        self.count = count

    def add(self, value: Tensor) -> None:
        self.count += 1
        deviation = wide(value) - self.mean
        self.mean += deviation / self.count
        self.squares += deviation * (wide(value) - self.mean)

    def variance(self) -> Tensor:
        """The unbiased one."""
        return self.squares / (self.count - 1)


class _Parameters(Messenger):
    """Collects the unconstrained tensors of the parameters that are asked for inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        # A module's own nn.Parameter, under module_local_params, is itself what is optimised. An autoguide
        # that sets itself up asks for a parameter twice, the second time for the one that it keeps.
        self.tensors[name] = value.unconstrained() if hasattr(value, "unconstrained") else value


def _draw(loss: Any, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """One gradient, by the names of the parameters."""
    steps = getattr(loss, "steps", None)
    try:
        with torch.enable_grad(), _Parameters() as parameters:
            value = loss.differentiable_loss(model, guide, *args, **kwargs)
    finally:
        if steps is not None:
            loss.steps = steps
    leaves = {name: tensor for name, tensor in parameters.tensors.items() if tensor.requires_grad}
    if not leaves or not getattr(value, "requires_grad", False):
        raise ValueError("No parameter of model or guide gets a gradient from this loss.")
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def _names(pair: Pair) -> dict[str, set[str]]:
    """Names of the parameters of model and guide, from one run."""
    with torch.no_grad():
        with _Parameters() as guided:
            trace = poutine.trace(pair.guide).get_trace(*pair.args, **pair.kwargs)
        with _Parameters() as modelled:
            poutine.replay(pair.model, trace=trace)(*pair.args, **pair.kwargs)
    names = {"model": set(modelled.tensors), "guide": set(guided.tensors)}
    for name in names["model"] & names["guide"]:
        if modelled.tensors[name] is not guided.tensors[name]:
            raise ValueError(
                f"Model and guide each have a parameter named {name!r} of their own, which "
                "module_local_params allows, but which cannot be told apart here. Rename one of them."
            )
    if guide_messenger(pair.guide) is not None:  # which runs the model, too
        names["guide"] -= names["model"]
    return names


def _group(names: list[str], mean: dict[str, Tensor], std: dict[str, Tensor]) -> GroupSNR:
    if not names:
        return GroupSNR((), math.nan, math.nan)
    means, stds = _flat(mean[name] for name in names), _flat(std[name] for name in names)
    norm = _ratio(means.norm(), stds.norm()).item()
    return GroupSNR(tuple(names), _ratio(means.abs(), stds).mean().item(), norm)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().cpu() for tensor in tensors])


def _ratio(mean: Tensor, std: Tensor) -> Tensor:
    """mean / std, 0 where the mean is 0; NaN where either is."""
    return torch.where((mean == 0) & ~std.isnan(), 0.0, mean / std)
