r"""What a recording of a step takes for granted of the Python world, looked at before each step.

Tensors are inputs of a recorded program and may change in place; what else a model reads in Python is frozen
by a recording. :class:`Guards` notes it as the recorded code runs, and finds out later whether it changed.
"""

from __future__ import annotations

import gc
import os
import sys
import sysconfig
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import opt_einsum  # type: ignore[import-untyped]
import pyro
import torch
from torch import Tensor, nn

from .traces import Pair

__all__ = ["PLAIN", "Guards", "Refused"]

#: Types whose values are compared.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
#: Containers of more entries are not compared.
_LARGEST = 64
_LIBRARIES = tuple(
    os.path.dirname(str(library.__file__)) + os.sep
    for library in (sys.modules[__package__ or ""], pyro, torch, np, opt_einsum)
)
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}


class Refused(Exception):
    """Why a pair cannot be recorded."""


class Guards:
    """What was true of the Python world when a program was recorded."""

    def __init__(self, pair: Pair) -> None:
        self._same: list[tuple[Any, Any, Any]] = []  # mapping, key, the very object
        self._equal: list[tuple[Any, Any, Any]] = []  # mapping, key, an equal value
        self._tensors: list[tuple[Tensor, tuple]] = []
        self._owners: dict[int, tuple[Any, list, list]] = {}  # objects, each with entries of either kind
        self._pair = pair

    def changed(self) -> str | None:
        """The name of something that is no longer as it was; None if all is."""
        for mapping, key, value in self._same:
            if mapping.get(key) is not value:
                return repr(key)
        for mapping, key, value in self._equal:
            found = mapping.get(key, Guards)
            if found is not value and found != value:
                return repr(key)
        for tensor, facts in self._tensors:
            if (tensor.shape, tensor.dtype, tensor.requires_grad, tensor.stride()) != facts:
                return "the shape, dtype or requires_grad of a tensor"
        return None

    def keep(self, again: Guards) -> None:
        """Leave out objects that another run did not meet, as it made its own."""
        for key, (_, same, equal) in self._owners.items():
            if key in again._owners:
                self._same += same
                self._equal += equal
        self._owners = {key: value for key, value in self._owners.items() if key in again._owners}

    def add_tensors(self, tensors: list[Tensor]) -> None:
        """Watch the shapes of tensors, and where the param store has them."""
        for t in tensors:
            self._tensors.append((t, (t.shape, t.dtype, t.requires_grad, t.stride())))
        known = {id(tensor) for tensor in tensors}
        params = pyro.get_param_store()._params
        self._same += [(params, name, leaf) for name, leaf in params.items() if id(leaf) in known]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note what the code that runs in here may read."""
        frames: set[types.CodeType] = set()

        users: dict[Any, bool] = {}

        def look(frame: Any, event: str, _: Any) -> None:
            if event != "call":
                return
            code = frame.f_code
            known = users.get(code)
            if known is None:
                known = users[code] = _is_users(code.co_filename)
            if not known:
                return
            own = None
            if code.co_argcount:
                own = frame.f_locals.get(code.co_varnames[0])
            if own is not None and not isinstance(own, Tensor) and hasattr(own, "__dict__"):
                self._object(own)
            if code not in frames:
                free = {name: frame.f_locals.get(name) for name in code.co_freevars}
                frames.add(code)
                self._names(frame.f_globals, code.co_names)
                self._cells(code, free)

        def called(module: nn.Module, _: Any) -> None:
            self._object(module)

        for fn in (self._pair.model, self._pair.guide):
            self._callable(fn)
        hook = nn.modules.module.register_module_forward_pre_hook(called)
        before: Any = sys.getprofile()
        sys.setprofile(look)
        try:
            yield
        finally:
            sys.setprofile(None)
            if hasattr(before, "enable"):  # cProfile's
                before.enable()
            elif before is not None:
                sys.setprofile(before)
            hook.remove()

    def _callable(self, fn: Any) -> None:
        if isinstance(fn, types.MethodType):
            self._object(fn.__self__)
        elif isinstance(fn, types.FunctionType):
            wrapped = getattr(fn, "__wrapped__", None)
            if wrapped is not None:
                self._callable(wrapped)
        elif hasattr(fn, "__dict__"):
            self._object(fn)

    def _names(self, mapping: dict[str, Any], names: Sequence[str]) -> None:
        for name in names:
            if name in mapping:
                self._value(mapping, name, mapping[name], self._same, self._equal)

    def _cells(self, code: Any, free: dict[str, Any]) -> None:
        """The closure variables of the function that runs this code."""
        if not free:
            return
        for function in gc.get_referrers(code):
            if isinstance(function, types.FunctionType) and function.__code__ is code:
                same: list[Any] = []
                equal: list[Any] = []
                self._owners[id(function)] = function, same, equal
                for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
                    value = _Cell(cell).get(name)
                    if value is free.get(name):
                        self._value(_Cell(cell), name, value, same, equal)

    def _object(self, owner: Any) -> None:
        """The attributes of an object whose code runs."""
        if id(owner) in self._owners or isinstance(owner, (type, types.ModuleType, Tensor)):
            return
        same: list[Any] = []
        equal: list[Any] = []
        self._owners[id(owner)] = owner, same, equal
        attributes = vars(owner)
        internals = _MODULE_INTERNALS if isinstance(owner, nn.Module) else frozenset()
        for name, value in list(attributes.items()):
            if name not in internals:
                _note(attributes, name, value, same, equal)
        if isinstance(owner, nn.Module):
            for members in (owner._parameters, owner._buffers, owner._modules):
                same += [(members, name, value) for name, value in members.items()]
            for child in owner._modules.values():
                if child is not None:
                    self._object(child)
        for kind in type(owner).__mro__:
            if _is_users(getattr(sys.modules.get(kind.__module__), "__file__", None) or ""):
                for name, value in vars(kind).items():
                    if not name.startswith("__"):
                        _note(vars(kind), name, value, same, equal)

    def _value(self, mapping: Any, name: str, value: Any, same: list[Any], equal: list[Any]) -> None:
        """A global or a closure variable."""
        if not _note(mapping, name, value, same, equal) and _is_instance(value):
            self._object(value)


def _note(mapping: Any, name: str, value: Any, same: list[Any], equal: list[Any]) -> bool:
    """One name: a plain value by equality, a tensor or module by identity; whether it is any of that."""
    if isinstance(value, np.ndarray):
        raise Refused(f"it can read a NumPy array ({name!r}), whose changes would go unseen")
    if isinstance(value, (Tensor, nn.Module)):
        same.append((mapping, name, value))
    elif _is_plain(value):
        equal.append((mapping, name, _copy(value)))
    elif isinstance(value, (list, tuple, dict)) and len(value) <= _LARGEST:
        same.append((mapping, name, value))
        items: Any = value if isinstance(value, dict) else _Items(value)
        for key, item in items.items():
            if isinstance(item, (Tensor, nn.Module)):
                same.append((items, key, item))
            elif _is_plain(item):
                equal.append((items, key, _copy(item)))
    else:
        return False
    return True


class _Cell:
    """A closure's cell as a mapping with one name."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:
            return default


class _Items:
    """A sequence as a mapping from indices."""

    def __init__(self, sequence: Any) -> None:
        self.sequence = sequence

    def get(self, index: int, default: Any = None) -> Any:
        return self.sequence[index] if index < len(self.sequence) else default

    def items(self) -> list[tuple[int, Any]]:
        return list(enumerate(self.sequence))


def _is_users(filename: str) -> bool:
    """Whether a file is neither of this package, its dependencies, nor of the standard library."""
    if not filename or filename.startswith("<frozen") or filename.startswith(_LIBRARIES):
        return False
    return not filename.startswith(_STDLIB) or "site-packages" in filename


def _is_instance(value: Any) -> bool:
    kind = type(value)
    if isinstance(value, (type, types.ModuleType, types.FunctionType)) or not hasattr(value, "__dict__"):
        return False
    return kind is types.SimpleNamespace or _is_users(
        getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, PLAIN):
        return True
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _LARGEST:
        return all(isinstance(item, PLAIN) for item in value)
    if isinstance(value, dict) and len(value) <= _LARGEST:
        return all(isinstance(item, PLAIN) for item in value.values())
    return False


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict, set)) else value
