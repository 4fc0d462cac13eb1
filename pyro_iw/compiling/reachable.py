r"""What a recorded step may read: the places where Python keeps names as mappings, and kinds of values.

:mod:`~pyro_iw.compiling.guards` keeps triples (mapping, key, what was there). A mapping is anything with a
``get`` that looks a key up afresh: a namespace, an object's attributes, a closure's cell, a list.
"""

from __future__ import annotations

import argparse
import array
import collections
import contextvars
import enum
import os
import random
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import opt_einsum  # type: ignore[import-untyped]
import pyro
import torch
from torch import Tensor

from .._support.warn import PACKAGE

__all__ = [
    "PLAIN",
    "Attributes",
    "Cell",
    "Items",
    "Reading",
    "codes_of",
    "contents",
    "file_of",
    "frozen",
    "has_dict",
    "indirect",
    "is_instance",
    "is_iterator",
    "is_own",
    "is_plain",
    "is_users",
    "is_users_module",
    "random_state",
    "reading",
]

#: Types whose values are compared.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_COMPARED = (*PLAIN, np.generic, enum.Enum)
#: Bytes of an array that are compared.
_BYTES = 1 << 18
#: Python classes of libraries that are made to hold settings or values, by the modules they come from.
_HOLDERS = ("torch.distributions", "torch.optim", "pyro.distributions", "collections", "configparser")

_LIBRARIES = (
    PACKAGE,
    *(os.path.dirname(str(library.__file__)) + os.sep for library in (pyro, torch, np, opt_einsum)),
)
_STDLIB = tuple({sysconfig.get_paths()["stdlib"] + os.sep, os.path.dirname(os.__file__) + os.sep})


class Attributes:
    """An object's attributes as a mapping."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.owner, name, default)


class Cell:
    """A closure's cell as a mapping with one name."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:
            return default


class Items:
    """A sequence as a mapping from indices."""

    def __init__(self, sequence: Any) -> None:
        self.sequence = sequence

    def get(self, index: int, default: Any = None) -> Any:
        return self.sequence[index] if index < len(self.sequence) else default

    def items(self) -> list[tuple[int, Any]]:
        return list(enumerate(self.sequence))

    def __len__(self) -> int:
        return len(self.sequence)


class Reading:
    """What a function returns, as a mapping that has it under every key."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self.read = read

    def get(self, key: Any, default: Any = None) -> Any:
        return self.read()


def is_users(filename: str) -> bool:
    """Whether a file is neither of this package, its dependencies, nor of the standard library."""
    if not filename or filename.startswith("<frozen") or filename.startswith(_LIBRARIES):
        return False
    return not filename.startswith(_STDLIB) or "site-packages" in filename


def is_own(filename: str) -> bool:
    """Whether a file is the user's and of no installed library."""
    return is_users(filename) and "site-packages" not in filename


def is_users_module(module: types.ModuleType) -> bool:
    name = module.__name__.partition(".")[0]
    path = getattr(module, "__file__", None)
    return is_users(path) if path else name not in sys.stdlib_module_names


def file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or ""


def has_dict(value: Any) -> bool:
    # Not by hasattr, which runs what a class of the user's says of unknown attributes.
    return not isinstance(value, Tensor) and type(value).__dictoffset__ != 0


def is_instance(value: Any) -> bool:
    """Whether this is an object of a class of the user's, or one that is made to hold settings."""
    kind = type(value)
    if isinstance(value, (type, types.ModuleType, types.FunctionType, Tensor, *_COMPARED)):
        return False
    if kind in (types.SimpleNamespace, argparse.Namespace) or is_users(file_of(kind)):
        return True
    return has_dict(value) and kind.__module__.startswith(_HOLDERS)


def is_iterator(value: Any) -> bool:
    """Whether this is an iterator of Python's own, which is used up by looking."""
    return isinstance(value, Iterator) and not has_dict(value) and not is_instance(value)


def is_plain(value: Any) -> bool:
    """Whether this is compared by value: a number, a string, a flag ..., or a flat container of such."""
    if isinstance(value, _COMPARED):
        return True
    if type(value) in (list, tuple, set, frozenset, collections.deque):
        return all(isinstance(item, _COMPARED) for item in value)
    if type(value) in (dict, collections.OrderedDict, collections.defaultdict, collections.Counter):
        return all(isinstance(item, _COMPARED) for item in value.values())
    return False


def frozen(value: Any) -> Any:
    """A plain value with the types in it first, for 1, 1.0 and True are equal, and so are 0.0 and -0.0."""
    if isinstance(value, _COMPARED):
        return (type(value), value, str(value)) if value == 0 else (type(value), value)
    if isinstance(value, dict):
        items = list(value.values())
        return type(value), list(map(type, items)), list(value), items
    if isinstance(value, (set, frozenset)):
        return type(value), set(value)
    return type(value), list(map(type, value)), list(value)


def contents(value: Any) -> Any:
    """What is in a container, as a mapping with ``items``; None if it is none."""
    if isinstance(value, (dict, types.MappingProxyType)):
        return value
    if isinstance(value, (list, tuple, collections.deque)):
        return Items(value)
    if isinstance(value, (set, frozenset)):
        return Items(tuple(value))  # that these are in it is compared apart
    if isinstance(value, threading.local):
        return vars(value)
    return None


def reading(value: Any) -> Callable[[], Any] | None:
    """A function that reads the state of an object that keeps it out of Python's sight; None for others.

    Raises:
        ValueError: if there is too much of it, in words.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise ValueError("a NumPy array of objects")
        if value.nbytes > _BYTES:
            raise ValueError("a large NumPy array")
        return lambda: (value.shape, value.dtype, value.tobytes())
    if isinstance(value, (bytearray, memoryview, array.array)):
        if len(value) > _BYTES:
            raise ValueError(f"a large {type(value).__name__}")
        return lambda: bytes(value)
    return None


def indirect(value: Any) -> Callable[[], Any] | None:
    """A function that gives the object that another stands for; None if it stands for itself."""
    if isinstance(value, contextvars.ContextVar):
        return lambda: value.get(None)
    if isinstance(value, weakref.ref):
        return value
    return None


def random_state(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    """How to read and to set the state of a random generator of Python's or NumPy's; None for all else."""
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    bits = value.bit_generator if isinstance(value, np.random.Generator) else value
    if isinstance(bits, np.random.BitGenerator):
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


def codes_of(code: types.CodeType) -> list[types.CodeType]:
    """A code object and those of the functions defined in it."""
    found = [code]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += codes_of(constant)
    return found
