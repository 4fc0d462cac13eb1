r"""A recorded function without gradients, as a program in two parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..tracing.traces import Pair
from . import inductor
from .hoisting import take_out_constants
from .recording import record

__all__ = ["Evaluation"]


class Evaluation:
    """A compiled function: what is the same from call to call, and the rest.

    Arguments:
        pair: the pair and the function's arguments.
        args: the tensors among those, in order.
        varying: how many of the last of them are others in each call.
        function: makes the tensors.

    Attributes:
        once: the first part, as a graph of all inputs; None if there is nothing to it.

    Raises:
        Refused: if a recording would freeze what may change from call to call.
    """

    def __init__(
        self, pair: Pair, args: list[Tensor], varying: int, function: Callable[[Pair], list[Tensor]]
    ) -> None:
        recorded = record(pair, args, 1.0, lambda pair, *_: (function(pair), None))
        plain = [tensor.detach() for tensor in (*recorded.fixed, *args)]
        self.once, results = take_out_constants(recorded.graph, plain, varying)
        self.function = inductor.inductor(recorded.graph, [*plain, *results])
        self.fixed = recorded.fixed
        self.changed = recorded.guards.changed
        self.varying = varying
        self.on_gpu = any(tensor.device.type == "cuda" for tensor in plain)

    def start(self, args: list[Tensor]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        """Compute what is the same in all calls.

        Arguments:
            args: all arguments, of the first call.

        Returns:
            A function of those that vary.
        """
        inputs = [*self.fixed, *args]
        with torch.no_grad():
            once = [] if self.once is None else list(self.once(*inputs))
        same = inputs[: len(inputs) - self.varying]

        def evaluate(varying: Sequence[Tensor]) -> Sequence[Tensor]:
            with torch.no_grad():
                if not self.on_gpu:
                    return self.function([*same, *varying, *once])
                return inductor.replayed(self.function, [*same, *varying, *once])

        return evaluate
