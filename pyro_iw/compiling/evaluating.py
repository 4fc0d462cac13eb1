r"""A compiled function of a pair for evaluation: tensors without gradients.

What is recorded, guarded and refused is as in :mod:`~pyro_iw.compiling.step`. What a function computes of
inputs that stay the same from call to call is computed once, see :mod:`~pyro_iw.compiling.hoisting`: a
guide's networks of the data run once for all chunks of particles, or for all steps of a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..tracing.traces import Pair
from .step import Compiler

__all__ = ["Evaluate", "EvaluationCompiler"]

#: A compiled function of the tensors among those arguments that vary, in order.
Evaluate = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class EvaluationCompiler(Compiler):
    """Compiled functions of the pairs that a sampler meets.

    Arguments:
        what: what a function computes, in a word.
    """

    def __init__(self, what: str = "chunk") -> None:
        super().__init__()
        self.what = what

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def forget(self) -> None:
        """Drop all programs, and try refused pairs again."""
        self.__init__(self.what)  # type: ignore[misc]

    def start(
        self, pair: Pair, function: Callable[[Pair], list[Tensor]], options: tuple, varying: int = 0
    ) -> Evaluate | None:
        """A function ready to be called many times, compiled if this is the second request of its kind.

        Between the calls neither parameters nor other arguments than those that vary may change.

        Arguments:
            pair: the pair and the function's arguments, which may be others than the pair's own.
            function: makes the tensors.
            options: what else it depends on, hashable.
            varying: how many of the last tensors among the arguments vary from call to call.

        Returns:
            The function, or None if it has to run eagerly.
        """

        def make(tensors: list[Tensor]) -> Any:
            from .evaluation import Evaluation  # as in Compiler.run

            return Evaluation(pair, tensors, varying, function)

        found = self.find(pair, make, (*options, varying))
        return None if found is None else found[0].start(found[1])
