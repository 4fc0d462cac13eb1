r"""Pyro's SMC protocol: objects with ``init(state, ...)`` and ``step(state, ...)``, run in lockstep.

The guide runs first and only reads the state; the model runs on the guide's values, and writes. What belongs
to a step is a positional argument, a *sequence* along time; what belongs to ``init`` is a keyword argument.
So ``loss(model, guide, ys, initial=z0)`` is::

    smc.init(initial=z0)
    for y in ys:
        smc.step(y)

with Pyro's own :class:`~pyro.infer.SMCFilter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from pyro.nn import PyroModule
from torch import Tensor

from .._support.nested import map_leaves
from ..tracing.runner import breaks_a_constraint
from ..tracing.traces import Pair, PairTraces, Progress, Route, trace_pair
from .state import FilterState

__all__ = ["INIT", "Protocol", "Sequences", "march", "moment_name", "naming", "read_sequences"]

#: The moment before the first step.
INIT = -1


class Protocol(NamedTuple):
    """A model and its guide, each with ``init(state, ...)`` and ``step(state, ...)``."""

    model: Any
    guide: Any

    def check(self) -> None:
        """Refuse objects without these methods.

        Raises:
            ValueError: naming what is missing.
        """
        for role, part in self._asdict().items():
            for method in ("init", "step"):
                if not callable(getattr(part, method, None)):
                    raise ValueError(
                        f"The {role} ({type(part).__name__}) has no method {method}(state, ...). Sequences "
                        "take models and guides of Pyro's SMC protocol: objects with init(state, ...) and "
                        "step(state, ...), as pyro.infer.SMCFilter does."
                    )


class Sequences(NamedTuple):
    """Arguments of every call: keywords for ``init``, and a tuple for each of the T steps."""

    steps: list[tuple]
    init: dict[str, Any]

    def __len__(self) -> int:
        return len(self.steps)

    def at(self, moment: int) -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments of a moment; lists are copies, for a state may store and extend
        them.
        """
        given: tuple = ((), self.init) if moment == INIT else (self.steps[moment], {})
        return map_leaves(lambda leaf: leaf, given)


def read_sequences(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequences:
    """Split arguments by time.

    Arguments:
        args: one or more sequences of the same length T >= 1: a tensor (or array) with time on its first
            dim, or a list, tuple or range of T things.
        kwargs: arguments of ``init``.

    Raises:
        ValueError: if there is none, one is no sequence, or their lengths differ or are 0.
    """
    if not args:
        raise ValueError(
            "There is no sequence to filter: every positional argument is one, with an entry for each "
            "step, and keyword arguments go to init. Where step(state) takes nothing but the state, let it "
            "take the time and pass range(T)."
        )
    columns: list[Sequence[Any]] = []
    for number, arg in enumerate(args):
        if isinstance(arg, Tensor | np.ndarray) and arg.ndim > 0:
            columns.append(arg.unbind(0) if isinstance(arg, Tensor) and len(arg) else list(arg))
        elif isinstance(arg, list | tuple | range):
            columns.append(arg)
        else:
            kind = "a tensor without dims" if isinstance(arg, Tensor) else f"of type {type(arg).__name__}"
            raise ValueError(
                f"Positional argument {number} is {kind}, but has to be a sequence with an entry for each "
                "step: a tensor with time on its first dim, or a list. What is the same for all steps goes "
                "to init, by keyword, which can put it into the state."
            )
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The sequences differ in length: {lengths}. Each needs an entry for every step (a tensor has "
            "time on its first dim: is one batch first?). Sequences of a minibatch are padded, and masked "
            "beyond their ends."
        )
    if lengths[0] == 0:
        raise ValueError(
            "The sequences are empty: there is no step to take (T = 0). A tensor has time on its first dim."
        )
    return Sequences(list(zip(*columns, strict=True)), kwargs)


def moment_name(moment: int) -> str:
    """A moment in words."""
    return "init" if moment == INIT else f"step {moment}"


@contextmanager
def naming(moment: int) -> Iterator[None]:
    """Say in which step something was refused."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if type(error) not in (ValueError, NotImplementedError):
            raise
        raise type(error)(f"At {moment_name(moment)}: {error}") from error


def march(
    pair: Protocol,
    sequences: Sequences,
    state: FilterState,
    route: Callable[[int], Route | None] = lambda moment: None,
    enclose: Callable[[Callable], Callable] = lambda fn: fn,
    progress: Progress | None = None,
    moments: Sequence[int] | None = None,
) -> Iterator[tuple[int, PairTraces]]:
    """Run guide and model moment by moment; the state may be changed in between.

    Arguments:
        pair: the pair.
        sequences: the arguments.
        state: their memory.
        route: how latent values travel from the guide to the model, by moment.
        enclose: wraps guide and model, as the plate over particles does.
        progress: kept up to date while they run.
        moments: which to run; by default ``init`` and all steps.
    """
    progress = progress or Progress()
    for moment in range(INIT, len(sequences)) if moments is None else moments:
        name = f"at {moment_name(moment)}"
        args, kwargs = sequences.at(moment)
        method = "init" if moment == INIT else "step"

        def guide(*args: Any, method: str = method, name: str = name, **kwargs: Any) -> Any:
            state.where = f"{name} (guide)"
            with state.locked(), _context(pair.guide):
                return getattr(pair.guide, method)(state, *args, **kwargs)

        def model(*args: Any, method: str = method, name: str = name, **kwargs: Any) -> Any:
            state.where = f"{name} (model)"
            with _context(pair.model):
                return getattr(pair.model, method)(state, *args, **kwargs)

        try:
            traces = trace_pair(
                Pair(model, guide, args, kwargs), None, route(moment), enclose, progress=progress
            )
        except ValueError as error:
            if type(error) is not ValueError or not breaks_a_constraint(error):
                raise
            raise ValueError(
                f"{name.capitalize()}, in the {progress.role} {progress.where()}: {error}"
            ) from error
        yield moment, traces


def _context(part: Any) -> AbstractContextManager[Any]:
    """What makes a PyroModule's parameters known to Pyro, as a call of it does."""
    return part._pyro_context if isinstance(part, PyroModule) else nullcontext()
