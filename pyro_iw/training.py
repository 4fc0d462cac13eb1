"""What losses have in common that are trained: a clock, its state, and their place among several ranks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from pyro.infer.elbo import ELBO, ELBOModule
from torch import Tensor

from .ranks.data_axis import DataAxis, among_ranks, refuse_sharded
from .tracing.traces import PARTICLE_PLATE

__all__ = ["LossModule", "TrainedLoss", "gradient_step"]

_Method = TypeVar("_Method", bound=Callable)


class LossModule(ELBOModule):
    """A loss with its pair, as a module. Its ``state_dict`` carries the loss's :attr:`~TrainedLoss.steps`."""

    elbo: TrainedLoss

    def get_extra_state(self) -> Tensor:
        """The number of steps, as a tensor, which every way to write a checkpoint can hold."""
        return torch.tensor(self.elbo.steps)

    def set_extra_state(self, state: Any) -> None:
        """Go on from a number of steps."""
        self.elbo.steps = int(state)


class TrainedLoss(ELBO):
    """Base class of the losses: what has to do with training and not with a bound."""

    #: Number of gradient steps taken, the clock of ``kl_weight``: calls of ``loss_and_grads`` and, with
    #: gradients enabled, of ``differentiable_loss``; or an optimiser's steps, see :meth:`count_steps_of`.
    steps: int = 0

    _counted: Any = None
    _data_axis: DataAxis | None = None

    def __call__(self, model: Any, guide: Any) -> LossModule:
        """The loss of a pair of modules, as a module."""
        return LossModule(model, guide, self)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint has to hold of the loss: its :attr:`steps`."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.steps = int(state_dict["steps"])

    def count_steps_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the steps of an optimiser from now on, and not the losses computed.

        For gradients that are accumulated over several losses before a step. Steps that are left out, as by
        ``torch.amp.GradScaler``, do not count.

        Arguments:
            optimizer: an optimiser of PyTorch's. Under ``SVI`` every loss is a step, so there is no need.

        Raises:
            ValueError: if it is none.

        Example:
            >>> loss = IWAE_ELBO(K=5, kl_weight=lambda steps: min(1.0, steps / 1000))
            >>> optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
            >>> loss.count_steps_of(optimizer)
            >>> _ = optimizer.step()
            >>> loss.steps
            1
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"count_steps_of takes an optimiser of torch.optim, got {type(optimizer).__name__}. Under "
                "SVI every loss is a step, and nothing is to be done."
            )
        if self._counted is not None:
            self._counted.remove()
        self._counted = optimizer.register_step_post_hook(self._count_one)

    def _count_one(self, *_: Any) -> None:
        self.steps += 1

    def _clock(self) -> str:
        """Where the ``kl_weight`` of the next step is, in words."""
        weight = getattr(self, "kl_weight", None)
        return f"kl_weight after {self.steps} steps" if callable(weight) else f"kl_weight={weight}"

    def _count(self) -> None:
        """A gradient has been taken."""
        if self._counted is None:
            self.steps += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainedLoss:
        other = copy.copy(self)
        memo[id(self)] = other
        group = getattr(self, "particle_group", None)
        memo[id(group)] = group  # processes cannot be copied
        for name, value in vars(other).items():
            setattr(other, name, copy.deepcopy(value, memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no optimiser to count, and has met nobody.
        return {name: value for name, value in vars(self).items() if name not in ("_counted", "_data_axis")}


def gradient_step(method: _Method) -> _Method:
    """A method that computes a loss for its gradient: among several ranks, they look out for one another."""

    @functools.wraps(method)
    def step(self: Any, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Any:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return method(self, model, guide, *args, **kwargs)
        for what in ("chunk_size", "compile"):
            if getattr(self, what, None):
                refuse_sharded(model, guide, what)
        if not (among_ranks() and torch.is_grad_enabled()):
            return method(self, model, guide, *args, **kwargs)
        if self._data_axis is None:
            self._data_axis = DataAxis(self._warn_once, {PARTICLE_PLATE})
        shared = getattr(self, "_ranks", None)
        same_seeds = shared is not None and shared.size > 1
        with self._data_axis.step(model, guide, same_seeds, self._clock):
            loss = method(self, model, guide, *args, **kwargs)
        self._data_axis.warn_of_scale(loss)
        return loss

    return step  # type: ignore[return-value]
