r"""The compiled step: Pyro's handlers run once, and the tensor program they leave behind from then on.

A gradient step of a pair is the same few hundred tensor operations every time: guide, model, log-weights,
particle weights, backward pass. :class:`Compiler` records them once with PyTorch's ``make_fx``, has Inductor
compile the lot into fused kernels, and runs those. The program draws its noise from PyTorch's own generators,
and from the user's, operation by operation as the eager step does, so for one seed both see the same
particles: on a CPU with every random operation of PyTorch's, in float32 and float64. That a compilation
begins, and how long it took, is said in the log (logger ``pyro_iw``, at INFO) and on a terminal.

**What is an input.** Every tensor that the pair reads without having made it is an input of the program,
held by reference: arguments, parameters, buffers, tensors that a model closes over. Changes in place are
therefore seen (an optimiser's step, ``load_state_dict``, data written into a buffer), and ``kl_weight`` is a
tensor too.

**What is a guard.** Anything else that a recording would freeze is looked at before each step, and if it
changed, the next step runs eagerly and the one after it is recorded afresh:

* shapes, strides, dtypes and devices of tensors, whether they need gradients, other arguments' values;
* which object a name stands for, in modules, the param store, closures, globals and default arguments: a
  tensor, a submodule, a function, a distribution;
* plain Python values (numbers, strings, flags) among the attributes of modules, classes and objects of the
  user's own that the code that runs can reach: ``module.training``, ``dropout.p``, a weight to anneal,
  settings of any kind, by whatever way it gets at them (``globals()["beta"]`` and ``getattr`` too);
* what is in containers, in containers of containers and so on; in NumPy arrays of up to 256 KiB, byte arrays,
  distributions, optimisers, context variables; environment variables; what a function behind an
  ``lru_cache`` reads, and whether that was cleared;
* default dtype, autocast, float32 precision, Pyro's validation.

**What is refused**, with one warning that says why, and runs eagerly: reading a tensor's value in Python
(``if z.mean() > 0``, ``.item()``, ``.numpy()``), shapes that depend on values, random numbers from Python or
NumPy, a random generator that the run seeds or sets back (``torch.manual_seed``, ``fork_rng``,
``poutine.seed``), iterators, NumPy arrays and containers (of more than 4096 entries) that are too large to be
looked at each time, attributes that the run itself changes (a counter), anything that comes out differently
when recorded twice, and whatever Inductor cannot compile, as for want of a C++ compiler. A tensor's value may
be read where it follows from the code alone (``int(torch.tensor(4))``, a triangular mask). Recorded without a
reading are ``F.one_hot(labels, num_classes)``, ``x[mask] = y[mask]``, draws of ``OneHotCategorical`` and
``VonMises``, ``LKJCholesky`` and spline flows (a quadratic spline's inverse checks a value, and is refused).
A refused recording puts random generators and buffers back; what else the pair does as it runs it has done
two or three times more.

**What cannot be seen** is baked in: objects that the standard library or C code keep to themselves (a
``decimal`` context, a database), what is large inside objects of other libraries, Python attributes set on a
tensor, the state of files and clocks, random numbers that an ``lru_cache`` holds, and the effect of code that
only runs sometimes. Nor do the pair's own side effects happen any more (a list it appends to, something it
prints): it does not run. Call :meth:`Compiler.forget` after changing such a thing, or make it a tensor and
change that in place. Checks of Pyro's validation take part in the eager step that precedes each recording,
and not in those after it.
"""

from __future__ import annotations

import time
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from .._support.devices import autocast_dtype, autocast_types
from .._support.warn import warn
from ..gradients.chunks import InChunks
from ..gradients.surrogate import Estimate
from ..ranks.particles import ParticleGroup
from ..tracing.handlers import handlers_in_force
from ..tracing.traces import Pair
from .announce import announced
from .arguments import Refused, spec

if TYPE_CHECKING:
    from .program import CompiledStep, Program

__all__ = ["Compiler", "without_others"]

#: Programs kept, the least recently used leaves first.
_CAPACITY = 8
#: How often guards may fail before a pair is left to run eagerly.
_PATIENCE = 8
#: How many steps in a row may have arguments that were not met before.
_NOVELTIES = 64


class Compiler:
    """Compiled gradient steps of the pairs that a loss meets, by what each was recorded for.

    Attributes:
        seconds: how long each compilation took, by what was compiled in words.

    Example:
        >>> loss = IWAE_ELBO(K=5, compile=True)
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=loss)
        >>> first = svi.step(data)  # eager; the second step is recorded and compiled, a matter of seconds
    """

    #: What is compiled, in a word.
    what = "step"

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        # For a key met once: its pair's callables, for an id is good as long as its object.
        self._programs: OrderedDict[Any, Any] = OrderedDict()
        self._stale: dict[Any, int] = {}
        self._new: dict[Any, int] = {}
        self._refused: dict[Any, Any] = {}
        self._changed: dict[Any, str] = {}  # why a program of this key is made again
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # programs hold code; they are soon recorded again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def forget(self) -> None:
        """Drop all programs, and try refused pairs again."""
        self.__init__()  # type: ignore[misc]

    def run(
        self,
        pair: Pair,
        kl_weight: float,
        estimate: Callable[[Pair, Any], tuple[Any, Estimate]],
        options: tuple = (),
        chunks: InChunks | None = None,
        recording: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> CompiledStep | None:
        """Run a compiled step, recording it if this is the second one of its kind.

        Arguments:
            pair: the pair and its arguments.
            kl_weight: the weight of the KL term.
            estimate: what a step computes, given a pair and a weight.
            options: what else that depends on, hashable.
            chunks: how the step is taken chunk by chunk; all at once, if None.
            recording: what a step is recorded within.

        Returns:
            The step, or None if it has to run eagerly.
        """

        def make(tensors: list[Tensor]) -> Program:
            # Here and not above: a PyTorch that lacks what these stand on is to cost this loss its programs,
            # and not the package its import.
            from .chunked import ChunkedStep
            from .program import WholeStep

            varies = _kind(kl_weight) is None
            with recording():
                if chunks is None:
                    return WholeStep(pair, tensors, kl_weight, varies, estimate)
                return ChunkedStep(pair, tensors, kl_weight, varies, chunks)

        found = self.find(pair, make, (_kind(kl_weight), options))
        return None if found is None else found[0].run(found[1], kl_weight)

    def find(
        self, pair: Pair, make: Callable[[list[Tensor]], Any], options: tuple
    ) -> tuple[Any, list[Tensor]] | None:
        """A program and the tensors among its pair's arguments.

        Arguments:
            pair: the pair and its arguments.
            make: makes the program, given these tensors.
            options: what else that depends on, hashable.

        Returns:
            Both, or None if what is wanted has to run eagerly.
        """
        identity = _identity(pair)
        if identity in self._refused:
            return None
        tensors: list[Tensor] = []
        try:
            arguments = spec((pair.args, pair.kwargs), tensors)
            key = (identity, arguments, _signature(tensors), _settings(), options)
            hash(key)
        except (Refused, TypeError) as error:
            self._refuse(identity, pair, str(error))
            return None
        for messenger in handlers_in_force():
            if type(messenger) is not TraceMessenger or not messenger.param_only:
                return None  # its effect would be recorded
        if key not in self._programs:
            # Eagerly once: lazy parameters are made, errors and warnings come from the user's own lines.
            self._remember(key, (pair.model, pair.guide))
            self._new[identity] = self._new.get(identity, 0) + 1
            if self._new[identity] > _NOVELTIES:
                self._refuse(
                    identity,
                    pair,
                    "its arguments are new at every step; pass a number that changes as a tensor",
                )
            return None
        self._new[identity] = 0
        program = self._programs[key]
        if isinstance(program, tuple):
            try:
                title = _title(self.what, pair, tensors, self._changed.pop(key, None))
                start = time.perf_counter()
                with warnings.catch_warnings(), announced(title):
                    warnings.simplefilter("ignore")  # the pair's own came from the eager step
                    program = make(tensors)
                self.seconds[title] = time.perf_counter() - start
            except Exception as error:
                reason = str(error) if isinstance(error, Refused) else _in_words(error)
                self._refuse(identity, pair, reason)
                return None
            self._remember(key, program)
            return program, tensors
        changed = program.changed()
        if changed is not None:
            self._remember(key, (pair.model, pair.guide))
            self._changed[key] = changed
            self._stale[identity] = self._stale.get(identity, 0) + 1
            if self._stale[identity] > _PATIENCE:
                self._refuse(identity, pair, f"{changed} keeps changing; a tensor could, in place")
            return None
        self._programs.move_to_end(key)
        return program, tensors

    def _remember(self, key: Any, program: Program | tuple) -> None:
        self._programs[key] = program
        self._programs.move_to_end(key)
        while len(self._programs) > _CAPACITY:
            self._programs.popitem(last=False)

    def _refuse(self, identity: Any, pair: Pair, reason: str) -> None:
        self._refused[identity] = pair.model, pair.guide
        for key in [key for key in self._programs if key[0] == identity]:
            del self._programs[key]
        if not self._warned:
            self._warned = True
            warn(f"compile=True is left aside and the {self.what} runs eagerly: {reason}.", RuntimeWarning)


@contextmanager
def without_others(ranks: ParticleGroup) -> Iterator[None]:
    """Steps inside are taken without the other ranks of a group, to be recorded."""
    from .exchanging import recorded  # not before it is needed, see Compiler.run

    with ranks.recording(recorded):
        yield


def _identity(pair: Pair) -> Any:
    # A bound method is made anew at each access, its owner and its function are not.
    return tuple(
        (id(fn.__self__), id(fn.__func__)) if isinstance(fn, types.MethodType) else id(fn)
        for fn in (pair.model, pair.guide)
    )


def _signature(tensors: Sequence[Tensor]) -> tuple:
    return tuple([(t.shape, t.dtype, t.stride(), t.device, t.requires_grad, type(t)) for t in tensors])


def _settings() -> tuple:
    """Global settings that a recording would freeze."""
    return (
        torch.get_default_dtype(),
        is_validation_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
        tuple([(kind, autocast_dtype(kind)) for kind in autocast_types()]),
        torch.get_default_device(),
    )


def _kind(kl_weight: float) -> float | None:
    """0 and 1 leave terms out and are recorded as they are; all others are one input."""
    return float(kl_weight) if kl_weight == 0 or kl_weight == 1 else None


def _title(what: str, pair: Pair, tensors: Sequence[Tensor], changed: str | None) -> str:
    """What is compiled: the model, its tensors' dtypes and shapes, and what made it necessary again."""
    name = getattr(pair.model, "__qualname__", type(pair.model).__name__).rpartition(".<locals>.")[2]
    given = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors)
    return f"a {what} of {name}({given})" + ("" if changed is None else f" again, for {changed} has changed")


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
