r"""A watch on every operation of a recording: values handed to Python, memory written to, random states.

What a recording would freeze, or do otherwise than the eager step, is refused here as it happens. A few
operations that read values only to check them, or that can do so beforehand, are recorded in a form that
does not: :func:`torch.nn.functional.one_hot` with a number of classes, indexing by a mask that is the same at
each step, ``x[mask] = y[mask]``, the draws of :class:`~torch.distributions.VonMises`. A tensor whose values
follow from the code alone, such as ``torch.arange(3)``, may be read in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._support.devices import accelerator_in_use
from .arguments import Refused
from .private import (
    StorageWeakRef,
    TorchDispatchMode,
    library,
    rejection_sample,
    rejection_sampling_by,
    schema_of,
    without_modes,
)

__all__ = ["Observer"]

_aten = torch.ops.aten
#: Ways to read a tensor's value in Python.
_READS = frozenset(
    {"item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"}
    | {"__dlpack__", "__contains__"}
)
_MASKS = (torch.bool, torch.uint8)


class Observer:
    """Sees every operation of a recording.

    Attributes:
        written: tensors written to that the step did not make itself.
        generators: the user's own random generators that it draws from.
    """

    def __init__(self) -> None:
        self.written: list[Tensor] = []
        self.generators: list[torch.Generator] = []
        self._values: list[Tensor] = []
        self._made: dict[int, StorageWeakRef] = {}
        self._found: dict[int, StorageWeakRef] = {}
        self._known: dict[int, StorageWeakRef] = {}  # memory whose values follow from the code alone
        self._first: list[Tensor] = []  # states of the user's generators
        self._last: list[tuple[torch.Generator, Tensor]] = []
        self._again = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch a run. A second one has to use the same generators, from other states."""
        for seed, generator in enumerate(self.generators):
            generator.manual_seed(seed + 1)
        own = [torch.default_generator]
        own += getattr(accelerator_in_use(), "default_generators", ())
        self._last = [(each, each.get_state()) for each in (*own, *self.generators)]
        with rejection_sampling_by(torch.ops.pyro_iw.von_mises), _Operations(self), _Reads(self):
            yield
        self._check_states()
        self._again = True

    def restore(self) -> None:
        """Put back the values of the tensors that were written to, and the user's generators."""
        with torch.no_grad():
            for tensor, value in zip(self.written, self._values, strict=True):
                tensor.copy_(value)
        for generator, state in zip(self.generators, self._first, strict=True):
            generator.set_state(state)

    # Memory ------------------------------------------------------------------------------------------

    def before(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Keep what an operation is about to write over; says whether it reads known values alone."""
        known = torch.Tag.nondeterministic_seeded not in func.tags
        parameters = schema_of(func).arguments
        arguments = [*zip(parameters, args, strict=False)]
        arguments += [(each, kwargs[each.name]) for each in parameters if each.name in kwargs]
        for argument, value in arguments:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(each, Tensor):
                    known &= func is _aten.lift_fresh.default or self.is_known(each)
                    self._note_written(argument, each)
                elif isinstance(each, torch.Generator):
                    known = False
                    self._note_generator(each)
        if not known:
            for argument, value in arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for each in value if isinstance(value, (list, tuple)) else [value]:
                        if isinstance(each, Tensor):
                            self._known.pop(StorageWeakRef(each.untyped_storage()).cdata, None)
        return known

    def _note_written(self, argument: Any, tensor: Tensor) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage.cdata not in self._made:
            self._found.setdefault(storage.cdata, storage)
            # Batch normalisation's schema does not say that it updates these.
            writes = argument.name in ("running_mean", "running_var")
            writes = writes or (argument.alias_info is not None and argument.alias_info.is_write)
            if writes and not any(tensor is other for other in self.written):
                self.written.append(tensor)
                self._values.append(tensor.detach().clone())

    def after(self, out: Any, known: bool) -> None:
        """Note the memory that an operation made."""
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage.cdata not in self._found:
                    if storage.cdata not in self._made and known:
                        self._known[storage.cdata] = storage
                    self._made.setdefault(storage.cdata, storage)

    def is_known(self, tensor: Tensor) -> bool:
        """Whether a tensor's values follow from the code, and from what is guarded, alone."""
        return StorageWeakRef(tensor.untyped_storage()).cdata in self._known

    # Random states -----------------------------------------------------------------------------------

    def _note_generator(self, generator: torch.Generator) -> None:
        if any(generator is each for each, _ in self._last):
            return
        if self._again:
            raise Refused("it makes a torch.Generator of its own each time it runs")
        self.generators.append(generator)
        self._first.append(generator.get_state())
        self._last.append((generator, self._first[-1]))

    def states(self) -> list[Tensor]:
        """The states of all generators."""
        return [generator.get_state() for generator, _ in self._last]

    def drew(self, states: list[Tensor]) -> None:
        """Refuse to record an operation that has drawn from a generator which was set by hand."""
        for index, (generator, last) in enumerate(self._last):
            now = generator.get_state()
            if not torch.equal(now, states[index]):
                if not torch.equal(states[index], last):
                    raise Refused(_SEEDS)
                self._last[index] = generator, now

    def _check_states(self) -> None:
        if any(not torch.equal(generator.get_state(), last) for generator, last in self._last):
            raise Refused(_SEEDS)


_SEEDS = (
    "it seeds a random generator, or puts its state back (torch.manual_seed, fork_rng, poutine.seed), which "
    "a compiled step would not do; draw such numbers once, outside"
)


class _Operations(TorchDispatchMode):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise Refused(f"it reads a tensor's value in Python ({func})")
        if torch.Tag.dynamic_output_shape in func.tags and not _is_gather(func, args):
            raise Refused(f"it makes a tensor whose shape depends on values ({func})")
        known = self.observer.before(func, args, kwargs)
        states = self.observer.states()
        out = func(*args, **kwargs)
        self.observer.drew(states)
        self.observer.after(out, known)
        return out


def _is_gather(func: Any, args: Any) -> bool:
    """Whether an operation indexes by integers, which gives a shape known beforehand."""
    return func is _aten.index.Tensor and not any(
        index is not None and index.dtype in _MASKS for index in args[1]
    )


class _Reads(TorchFunctionMode):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READS:
            if all(self.observer.is_known(arg) for arg in args if isinstance(arg, Tensor)):
                with without_modes():
                    return func(*args, **kwargs)
            raise Refused(f"it reads a tensor's value in Python ({name})")
        if name in ("__getitem__", "__setitem__"):
            return self._index(func, *args)
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **kwargs)
        return func(*args, **kwargs)

    def _index(self, func: Any, tensor: Tensor, index: Any, *value: Any) -> Any:
        """Index by masks, where they are known by the places that they name."""
        if value and isinstance(value[0], _Picked):
            value[0].put(tensor, index)
            return None
        entries = list(index) if isinstance(index, tuple) else [index]
        masks = [each for each in entries if isinstance(each, Tensor) and each.dtype in _MASKS]
        if masks and all(self.observer.is_known(mask) for mask in masks):
            places: list[Any] = []
            for each in entries:
                if any(each is mask for mask in masks):
                    with without_modes():
                        places += [place.clone() for place in each.nonzero(as_tuple=True)]
                else:
                    places.append(each)
            return func(tensor, tuple(places), *value)
        # An assignment by a mask does not depend on how much that picks.
        if masks and not value and isinstance(index, Tensor) and index.shape == tensor.shape[: index.dim()]:
            return _Picked(tensor, index)
        return func(tensor, index, *value)


class _Picked:
    """``x[mask]``, as many as the mask says: good for ``y[mask] = x[mask]`` and no more."""

    def __init__(self, tensor: Tensor, mask: Tensor) -> None:
        self._tensor = tensor
        self._mask = mask

    def put(self, other: Tensor, mask: Any) -> None:
        """Write them to the same places of another tensor."""
        if mask is not self._mask or other.shape != self._tensor.shape:
            raise _shape_refused()
        mask = mask.bool().reshape(mask.shape + (1,) * (other.dim() - mask.dim()))
        other.copy_(torch.where(mask, self._tensor.to(other.dtype), other))

    def __getattr__(self, name: str) -> Any:
        raise _shape_refused()

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _shape_refused()


def _shape_refused(*args: Any) -> Refused:
    return Refused("it makes a tensor whose shape depends on values (x[mask])")


def _refuse(*args: Any) -> Any:
    raise _shape_refused()


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OTHERS = (
    "neg",
    "pos",
    "abs",
    "invert",
    "lt",
    "le",
    "eq",
    "ne",
    "gt",
    "ge",
    "getitem",
    "setitem",
    "len",
    "iter",
)
for _name in (
    *_OTHERS,
    "bool",
    "float",
    "int",
    *(side + name for side in ("", "r", "i") for name in _BINARY),
):
    setattr(_Picked, f"__{_name}__", _refuse)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """:func:`torch.nn.functional.one_hot` without a look at the values; a class out of range is an error."""
    if num_classes < 0:
        raise Refused("F.one_hot reads the number of classes from a tensor's value; pass num_classes")
    zeros = torch.zeros(*tensor.shape, num_classes, dtype=torch.int64, device=tensor.device)
    return zeros.scatter(-1, tensor.unsqueeze(-1), 1)


library.define(
    "von_mises(Tensor loc, Tensor concentration, Tensor proposal_r, Tensor x) -> Tensor",
    tags=[torch.Tag.nondeterministic_seeded],
)
library.impl("von_mises", lambda *args: rejection_sample(*args).clone(), "CompositeExplicitAutograd")
library.impl("von_mises", lambda loc, concentration, proposal_r, x: torch.empty_like(x), "Meta")
