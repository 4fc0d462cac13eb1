r"""What a recording of a step takes for granted of the Python world, looked at before each step.

Tensors are inputs of a recorded program and may change in place; what else a model reads in Python is frozen
by a recording. :class:`Guards` notes it as the recorded code runs, and finds out later whether it changed.
"""

from __future__ import annotations

import argparse
import enum
import functools
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
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .traces import Pair

__all__ = ["PLAIN", "Guards", "Refused"]

#: Types whose values are compared.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_COMPARED = (*PLAIN, np.generic, enum.Enum)
#: Containers of more entries are not compared.
_LARGEST = 64
#: Containers in containers are looked into that deep.
_DEEPEST = 3
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
        self._sizes: list[tuple[Any, int]] = []  # containers and their lengths; what is in them is above
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
        for container, size in self._sizes:
            if len(container) != size:
                return "what is in a container or an object"
        for tensor, facts in self._tensors:
            if _facts(tensor) != facts:
                return "the shape, dtype, device or requires_grad of a tensor"
        return None

    def keep(self, again: Guards) -> None:
        """Leave out objects that another run did not meet, as it made its own, or has put in another's
        place.
        """
        for key, (_, same, equal) in self._owners.items():
            if key in again._owners:
                self._same += same
                self._equal += equal
        self._owners = {key: value for key, value in self._owners.items() if key in again._owners}
        self._same = [
            (mapping, key, value)
            for mapping, key, value in self._same
            if isinstance(value, (Tensor, nn.Module)) or mapping.get(key) is value
        ]
        self._sizes = [(container, size) for container, size in self._sizes if len(container) == size]

    def add_tensors(self, tensors: list[Tensor]) -> None:
        """Watch the shapes of tensors, and where the param store has them."""
        self._tensors += [(tensor, _facts(tensor)) for tensor in tensors]
        known = {id(tensor) for tensor in tensors}
        store = pyro.get_param_store()
        for name, leaf in store._params.items():
            if id(leaf) in known:
                self._same.append((_Store("_params"), name, leaf))
                self._same.append((_Store("_constraints"), name, store._constraints.get(name)))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note what the code that runs in here may read."""
        frames: set[Any] = set()
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
            variables = frame.f_locals
            for place, name in enumerate(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
                value = variables.get(name)
                if isinstance(value, nn.Module) or _is_instance(value) or (place == 0 and _has_dict(value)):
                    self._object(value)
            free = {name: variables.get(name) for name in code.co_freevars}
            met = (code, *map(id, free.values()))
            if met not in frames:
                frames.add(met)
                self._names(frame.f_globals, code.co_names)
                self._cells(code, free)

        def called(module: nn.Module, _: Any) -> None:
            self._object(module)

        for fn in (self._pair.model, self._pair.guide):
            self._callable(fn)
        for value in tree_leaves((self._pair.args, self._pair.kwargs)):
            if isinstance(value, nn.Module):
                self._object(value)
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
            self._function(fn)
            wrapped = vars(fn).get("__wrapped__")
            if wrapped is not None:
                self._callable(wrapped)
        elif isinstance(fn, functools.partial):  # a model in a handler of Pyro's, too
            self._callable(fn.func)
            for items in (_Items(fn.args), fn.keywords):
                for key, value in items.items():
                    self._value(items, key, value, self._same, self._equal)
                    if callable(value) and not isinstance(value, type):
                        self._callable(value)
        elif isinstance(fn, Messenger) or _has_dict(fn):
            self._object(fn)

    def _function(self, fn: types.FunctionType) -> None:
        """Default arguments and attributes of a function."""
        attributes = _Attributes(fn)
        for name in ("__defaults__", "__kwdefaults__", "__code__"):
            self._value(attributes, name, getattr(fn, name), self._same, self._equal)
        for name, value in vars(fn).items():
            self._value(vars(fn), name, value, self._same, self._equal)

    def _names(self, mapping: dict[str, Any], names: Sequence[str]) -> None:
        for name in names:
            if name not in mapping:
                continue
            value = mapping[name]
            self._value(mapping, name, value, self._same, self._equal)
            if isinstance(value, types.FunctionType) and _is_users(value.__code__.co_filename):
                self._function(value)
            elif isinstance(value, types.ModuleType) and _is_users_module(value):
                members = vars(value)
                for member in names:
                    if member in members:
                        self._value(members, member, members[member], self._same, self._equal)

    def _cells(self, code: Any, free: dict[str, Any]) -> None:
        """The closure variables of the function that runs this code."""
        if not free:
            return
        for function in gc.get_referrers(code):
            if isinstance(function, types.FunctionType) and function.__code__ is code:
                _, same, equal = self._owners.setdefault(id(function), (function, [], []))
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
        attributes = vars(owner) if _has_dict(owner) else {}
        internals = _MODULE_INTERNALS if isinstance(owner, nn.Module) else frozenset()
        for name, value in list(attributes.items()):
            if name not in internals:
                self._note(attributes, name, value, same, equal)
        if _has_dict(owner) and not isinstance(owner, Messenger):
            self._sizes.append((attributes, len(attributes)))
        slots = _Attributes(owner)
        for kind in type(owner).__mro__:
            names = vars(kind).get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if hasattr(owner, name):
                    self._note(slots, name, getattr(owner, name), same, equal)
        if isinstance(owner, nn.Module):
            for members in (owner._parameters, owner._buffers, owner._modules):
                same += [(members, name, value) for name, value in members.items()]
                self._sizes.append((members, len(members)))
            for hooks in (owner._forward_hooks, owner._forward_pre_hooks, owner._backward_hooks):
                self._sizes.append((hooks, len(hooks)))
            for child in owner._modules.values():
                if child is not None:
                    self._object(child)
        for kind in type(owner).__mro__:
            if _is_users(_file_of(kind)):
                self._class(kind, same, equal)

    def _class(self, kind: type, same: list[Any], equal: list[Any]) -> None:
        """What stands in the body of a class."""
        for name, value in vars(kind).items():
            if not name.startswith("__"):
                self._note(vars(kind), name, value, same, equal)

    def _value(self, mapping: Any, name: Any, value: Any, same: list[Any], equal: list[Any]) -> None:
        """A global, a closure variable or what was given with a function."""
        self._note(mapping, name, value, same, equal)
        if isinstance(value, (nn.Module, Messenger)) or _is_instance(value):
            self._object(value)
        elif isinstance(value, type) and _is_users(_file_of(value)):
            self._class(value, same, equal)

    def _note(
        self, mapping: Any, name: Any, value: Any, same: list[Any], equal: list[Any], depth: int = 0
    ) -> None:
        """One name: a plain value by equality, all else by identity, and what is in a container likewise."""
        if isinstance(value, np.ndarray):
            raise Refused(f"it can read a NumPy array ({name!r}), whose changes would go unseen")
        if _is_plain(value):
            equal.append((mapping, name, _copy(value)))
            return
        same.append((mapping, name, value))
        if _is_instance(value):
            self._object(value)
        elif isinstance(value, (list, tuple, dict)) and len(value) <= _LARGEST and depth < _DEEPEST:
            items: Any = value if isinstance(value, dict) else _Items(value)
            self._sizes.append((items, len(items)))
            for key, item in items.items():
                self._note(items, key, item, same, equal, depth + 1)


def _facts(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, tensor.stride()


class _Store:
    """One of the param store's dicts as a mapping, which the store may replace by another."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(pyro.get_param_store(), self.name).get(key, default)


class _Attributes:
    """An object's attributes as a mapping."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.owner, name, default)


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

    def __len__(self) -> int:
        return len(self.sequence)


def _is_users(filename: str) -> bool:
    """Whether a file is neither of this package, its dependencies, nor of the standard library."""
    if not filename or filename.startswith("<frozen") or filename.startswith(_LIBRARIES):
        return False
    return not filename.startswith(_STDLIB) or "site-packages" in filename


def _has_dict(value: Any) -> bool:
    # Not by hasattr, which runs what a class of the user's says of unknown attributes.
    return not isinstance(value, Tensor) and type(value).__dictoffset__ != 0


def _is_users_module(module: types.ModuleType) -> bool:
    name = module.__name__.partition(".")[0]
    path = getattr(module, "__file__", None)
    return _is_users(path) if path else name not in sys.stdlib_module_names


def _file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or ""


def _is_instance(value: Any) -> bool:
    """Whether this is an object of a class of the user's, or one that is made to hold settings."""
    kind = type(value)
    if isinstance(value, (type, types.ModuleType, types.FunctionType, Tensor, *_COMPARED)):
        return False
    return kind in (types.SimpleNamespace, argparse.Namespace) or _is_users(_file_of(kind))


def _is_plain(value: Any) -> bool:
    if isinstance(value, _COMPARED):
        return True
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _LARGEST:
        return all(isinstance(item, _COMPARED) for item in value)
    if isinstance(value, dict) and len(value) <= _LARGEST:
        return all(isinstance(item, _COMPARED) for item in value.values())
    return False


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict, set)) else value
