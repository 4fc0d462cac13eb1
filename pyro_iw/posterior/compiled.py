"""Chunks of particles whose log-weights a compiled program gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compiling.arguments import Refused
from ..compiling.evaluating import Evaluate, EvaluationCompiler
from ..tracing.minibatches import OneMinibatch
from ..tracing.traces import Pair
from .local_weights import total_log_weights

__all__ = ["CompiledChunks"]


class CompiledChunks:
    """The chunks of one call, all with the same arguments, parameters and minibatch.

    Arguments:
        compiler: keeps the programs from call to call.
        pair: the pair and its arguments.
        draw: runs a pair on a number of particles, and returns these and their traces.
        options: what else that depends on, hashable.
        draws: whether plates are known to draw a minibatch: then the first chunk, which does, runs eagerly.
    """

    def __init__(
        self,
        compiler: EvaluationCompiler,
        pair: Pair,
        draw: Callable[[Pair, int], tuple[Any, Any]],
        options: tuple,
        draws: bool,
    ) -> None:
        self.compiler = compiler
        self.pair = pair
        self.draw = draw
        self.options = options
        self.draws = draws
        self._ready: dict[int, Evaluate] = {}  # by the size of a chunk

    def log_weights(self, size: int, minibatch: OneMinibatch) -> Tensor | None:
        """Those of a chunk, of shape ``[size, *cells]``; None if it has to run eagerly.

        Arguments:
            size: the number of particles.
            minibatch: the subsample of the call, as far as chunks before this one have drawn it.
        """
        if self.draws and not minibatch.indices:
            return None
        if size not in self._ready:
            ready = self._start(size, minibatch)
            if ready is None:
                return None
            self._ready[size] = ready
        return self._ready[size](())[0]

    def _start(self, size: int, minibatch: OneMinibatch) -> Evaluate | None:
        # Indices that a plate drew are the same in all chunks, and are inputs.
        indices = {name: torch.as_tensor(value) for name, value in minibatch.indices.items()}
        given = self.pair._replace(args=(self.pair.args, self.pair.kwargs, indices), kwargs={})

        def log_weights(given: Pair) -> list[Tensor]:
            args, kwargs, indices = given.args
            with torch.no_grad(), minibatch.with_indices(indices) as drawn:
                particles, _ = self.draw(given._replace(args=args, kwargs=kwargs), size)
            new = drawn.indices.keys() - indices.keys()
            if new:
                raise Refused(f"plate {min(new)!r} draws a minibatch in some runs and not in others")
            return [total_log_weights(particles)]

        return self.compiler.start(given, log_weights, (size, *self.options))
