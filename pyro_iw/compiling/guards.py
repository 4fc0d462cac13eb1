r"""What a recording of a step takes for granted of the Python world, looked at before each step.

Tensors are inputs of a recorded program and may change in place; what else a model reads in Python is frozen
by a recording. :class:`Guards` notes it as the recorded code runs, and finds out later whether it changed.
It begins at the names in the code that runs (globals, closures, attributes, modules) and goes on into what
they stand for: containers in containers, objects of the user's classes, arrays, functions behind a cache.
What it cannot look into, and the code names, is refused.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import sys
import types
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from .._support.nested import leaves
from ..tracing.traces import Pair
from .arguments import Refused
from .private import IMPORTING, hooks_of, members_of, params_of_store
from .reachable import (
    PLAIN,
    Attributes,
    Cell,
    Items,
    Reading,
    codes_of,
    contents,
    file_of,
    frozen,
    has_dict,
    indirect,
    is_instance,
    is_iterator,
    is_own,
    is_plain,
    is_users,
    is_users_module,
    random_state,
    reading,
)

__all__ = ["Guards"]

#: Containers of more entries are not looked into.
_LARGEST = 4096
#: Entries that are looked at before each step, at about 0.1 microseconds each.
_MOST = 20_000
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
#: Names by which code reads other names, which it then has as strings.
_BY_STRING = frozenset(
    {"globals", "vars", "eval", "exec", "getattr", "attrgetter", "methodcaller", "__dict__"}
    | {"modules", "import_module", "__import__", "__getattribute__"}
)
#: Those of them that may read any global.
_ANY_GLOBAL = frozenset({"globals", "vars", "eval", "exec", "__dict__", "modules"})

#: Code under which others' hooks run, which have no bearing on a step: handlers of the log, of imports.
_ASIDE = (logging.Handler.handle.__code__, IMPORTING)
#: What a function becomes behind an ``lru_cache``.
_CACHED = type(functools.lru_cache(len))


class Guards:
    """What was true of the Python world when a program was recorded."""

    def __init__(self, pair: Pair) -> None:
        self._same: list[tuple[Any, Any, Any]] = []  # mapping, key, the very object
        self._equal: list[tuple[Any, Any, Any, Any]] = []  # mapping, key, a plain value and it frozen
        self._sizes: list[tuple[Any, int]] = []  # containers and their lengths; what is in them is above
        self._states: list[tuple[Any, Any, Any]] = []  # a name, a function that reads, what it read
        self._tensors: list[tuple[Tensor, tuple]] = []
        self._owners: dict[int, tuple[Any, list, list]] = {}  # objects, each with entries of the first kinds
        self._random: list[tuple[str, Any, Any, Any]] = []  # a name, how to read and to set, the state
        self._pair = pair
        self._pending: deque[tuple[Any, str]] = deque()
        self._count = 0
        self._named: set[str] = set()  # all names in the code that ran
        self._unseen: dict[str, str] = {}  # names of what cannot be looked into, and why

    def changed(self) -> str | None:
        """The name of something that is no longer as it was; None if all is."""
        for mapping, key, value in self._same:
            if mapping.get(key) is not value:
                return repr(key)
        for mapping, key, value, copy in self._equal:
            found = mapping.get(key, Guards)
            if found is value and isinstance(value, PLAIN):
                continue
            if type(found) is not type(value) or frozen(found) != copy:
                return repr(key)
        for container, size in self._sizes:
            if len(container) != size:
                return "what is in a container or an object"
        for name, read, state in self._states:
            if read() != state:
                return repr(name)
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
        _, constraints = params_of_store(pyro.get_param_store())
        for name, leaf in pyro.get_param_store().named_parameters():
            if id(leaf) in known:
                self._same.append((Store(0), name, leaf))
                self._same.append((Store(1), name, constraints.get(name)))

    def check_random(self) -> None:
        """Refuse a run that has drawn from a generator of Python's or NumPy's that it can reach."""
        for name, read, _, state in self._random:
            if repr(read()) != repr(state):
                raise Refused(f"it draws from the generator {name!r}, which would be drawn once and for all")

    def rewind_random(self) -> None:
        """Put the generators of Python's and NumPy's that the run can reach back to where they were."""
        for _, _, write, state in self._random:
            write(state)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note what the code that runs in here may read."""
        frames: set[Any] = set()
        users: dict[Any, bool] = {}

        aside: list[Any] = []

        def look(frame: Any, event: str, _: Any) -> None:
            code = frame.f_code
            if aside:
                if event == "return" and frame is aside[0]:
                    aside.clear()
                return
            if event != "call":
                return
            if code in _ASIDE:
                aside.append(frame)
                return
            known = users.get(code)
            if known is None:
                known = users[code] = is_users(_file_of_code(code, frame.f_globals))
            if not known:
                return
            variables = frame.f_locals
            for place, name in enumerate(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
                value = variables.get(name)
                if isinstance(value, nn.Module) or is_instance(value):
                    self._inside(value, name)
                elif place == 0 and has_dict(value):
                    self._object(value)
            free = {name: variables.get(name) for name in code.co_freevars}
            met = (code, *map(id, free.values()))
            if met not in frames:
                frames.add(met)
                self._code(code, frame.f_globals)
                self._cells(code, free)
            self._go_on()

        def called(module: nn.Module, _: Any) -> None:
            self._object(module)
            self._go_on()

        for fn in (self._pair.model, self._pair.guide):
            self._callable(fn)
        for value in leaves((self._pair.args, self._pair.kwargs)):
            if isinstance(value, (nn.Module, type, types.FunctionType)):
                self._inside(value, "an argument")
        self._go_on()
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

    # Code --------------------------------------------------------------------------------------------

    def _callable(self, fn: Any) -> None:
        if isinstance(fn, types.MethodType):
            self._object(fn.__self__)
        elif isinstance(fn, types.FunctionType):
            self._function(fn)
            wrapped = vars(fn).get("__wrapped__")
            if wrapped is not None:
                self._callable(wrapped)
        elif isinstance(fn, functools.partial):  # a model in a handler of Pyro's, too
            self._partial(fn)
        elif isinstance(fn, Messenger) or has_dict(fn):
            self._object(fn)

    def _partial(self, fn: functools.partial) -> None:
        self._callable(fn.func)
        for items in (Items(fn.args), fn.keywords):
            for key, value in items.items():
                self._note(items, key, value, self._same, self._equal)
                if callable(value) and not isinstance(value, type):
                    self._callable(value)

    def _function(self, fn: types.FunctionType) -> None:
        """Default arguments and attributes of a function."""
        attributes = Attributes(fn)
        for name in ("__defaults__", "__kwdefaults__", "__code__"):
            self._note(attributes, name, getattr(fn, name), self._same, self._equal)
        for name, value in vars(fn).items():
            self._note(vars(fn), name, value, self._same, self._equal)

    def _unrun(self, fn: Any) -> None:
        """All that a function may read whose results are kept, so that its code need not run."""
        if not isinstance(fn, types.FunctionType) or not is_users(fn.__code__.co_filename):
            return
        if id(fn.__code__) in self._owners:
            return
        self._owners[id(fn.__code__)] = fn.__code__, [], []
        for code in codes_of(fn.__code__):
            self._code(code, fn.__globals__)
            for name in code.co_names:
                self._unrun(fn.__globals__.get(name))
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            value = Cell(cell).get(name)
            self._note(Cell(cell), name, value, self._same, self._equal)
            self._unrun(value)

    def _code(self, code: types.CodeType, variables: dict[str, Any]) -> None:
        """The names in code that runs."""
        names = list(code.co_names)
        own = is_own(_file_of_code(code, variables))
        if own:
            self._name((*code.co_names, *code.co_freevars))
        if own and _BY_STRING.intersection(names):
            strings = [text for text in code.co_consts if isinstance(text, str)]
            words = {word for text in strings for word in re.findall(r"\w+", text)}
            self._name(words)
            if _ANY_GLOBAL.intersection(names) and words.isdisjoint(variables):
                words = {name for name, value in variables.items() if is_plain(value) or contents(value)}
            names += sorted(words)
            names += [text for text in strings if text in sys.modules]
        self._names(variables, names)
        for name in names:  # imported as it runs
            module = sys.modules.get(name)
            if name not in variables and module is not None and is_users_module(module):
                self._names(vars(module), names)
        if {"environ", "getenv"}.intersection(names):
            environment = dict(os.environ)
            self._equal.append((_ENVIRONMENT, "os.environ", environment, frozen(environment)))

    def _names(self, mapping: dict[str, Any], names: Sequence[str], within: tuple = ()) -> None:
        for name in names:
            if name not in mapping:
                continue
            value = mapping[name]
            self._note(mapping, name, value, self._same, self._equal)
            if isinstance(value, types.ModuleType) and is_users_module(value) and value not in within:
                self._names(vars(value), names, (*within, value))

    def _cells(self, code: Any, free: dict[str, Any]) -> None:
        """The closure variables of the function that runs this code."""
        if not free:
            return
        for function in gc.get_referrers(code):
            if isinstance(function, types.FunctionType) and function.__code__ is code:
                _, same, equal = self._owners.setdefault(id(function), (function, [], []))
                for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
                    value = Cell(cell).get(name)
                    if value is free.get(name):
                        self._note(Cell(cell), name, value, same, equal)

    # Values ------------------------------------------------------------------------------------------

    def _note(self, mapping: Any, name: Any, value: Any, same: list, equal: list, label: str = "") -> None:
        """One name: a plain value by equality, all else by identity, and later what is in it."""
        self._count += 1
        if is_plain(value) and (contents(value) is None or len(value) <= _LARGEST):
            equal.append((mapping, name, value, frozen(value)))
            return
        same.append((mapping, name, value))
        self._inside(value, label or str(name))

    def _inside(self, value: Any, label: str) -> None:
        if isinstance(value, Tensor):
            return
        # What is close to the code comes first, should there be too much.
        self._pending.append((value, label))

    def _go_on(self) -> None:
        """Look into what was noted, as far as that has not been done."""
        while self._pending:
            value, label = self._pending.popleft()
            if id(value) in self._owners or isinstance(value, PLAIN):
                continue
            if self._count > _MOST:
                self._cannot(label, "more than can be looked at before each step")
            else:
                self._look_into(value, label)

    def _look_into(self, value: Any, label: str) -> None:
        if isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.FunctionType):
            if is_own(value.__code__.co_filename):
                self._once(value)
                self._function(value)
        elif isinstance(value, types.MethodType):
            if is_own(getattr(getattr(value.__func__, "__code__", None), "co_filename", "")):
                self._inside(value.__self__, label)
                self._inside(value.__func__, label)
        elif isinstance(value, functools.partial):
            self._once(value)
            self._partial(value)
        elif isinstance(value, _CACHED):
            self._once(value)
            self._unrun(value.__wrapped__)
            misses = value.cache_info().misses
            self._states.append((label, lambda: _was_cleared(value, misses), False))
        elif isinstance(value, (nn.Module, Messenger)):
            self._object(value)
        elif is_iterator(value):
            self._cannot(label, "an iterator, which looking at would use up")
        else:
            self._data(value, label)

    def _data(self, value: Any, label: str) -> None:
        """Containers, arrays, generators and objects."""
        try:
            read = reading(value)
        except ValueError as error:
            self._cannot(label, str(error))
            return
        generator, referent, items = random_state(value), indirect(value), contents(value)
        if read is not None:
            self._once(value)
            self._states.append((label, read, read()))
        elif generator is not None:
            self._once(value)
            self._random.append((label, *generator, generator[0]()))
        elif referent is not None:
            same, equal = self._once(value)
            self._note(Reading(referent), label, referent(), same, equal, label)
        elif items is not None:
            same, equal = self._once(value)
            self._sizes.append((items if isinstance(items, dict) else value, len(items)))
            if len(items) > _LARGEST:
                self._cannot(label, f"a container of {len(items)} entries")
            else:
                if isinstance(value, (set, frozenset)):
                    members = set(value)
                    self._states.append((label, lambda: value == members, True))
                for key, item in items.items():
                    self._note(items, key, item, same, equal, label)
            if is_instance(value):  # a dict or list of the user's own kind
                self._attributes(value, same, equal)
        elif is_instance(value):
            self._object(value)

    def _once(self, value: Any) -> tuple[list, list]:
        _, same, equal = self._owners.setdefault(id(value), (value, [], []))
        return same, equal

    def _object(self, owner: Any) -> None:
        """The attributes of an object whose code runs."""
        if id(owner) in self._owners or isinstance(owner, (type, types.ModuleType, Tensor)):
            return
        same, equal = self._once(owner)
        self._attributes(owner, same, equal)
        if isinstance(owner, nn.Module):
            for members in members_of(owner):
                same += [(members, name, value) for name, value in members.items()]
                self._sizes.append((members, len(members)))
            self._sizes += [(hooks, len(hooks)) for hooks in hooks_of(owner)]
            for child in owner.children():
                self._object(child)

    def _attributes(self, owner: Any, same: list, equal: list) -> None:
        attributes = vars(owner) if has_dict(owner) else {}
        internals = _MODULE_INTERNALS if isinstance(owner, nn.Module) else frozenset()
        users = is_users(file_of(type(owner)))
        for name, value in list(attributes.items()):
            if name not in internals and (users or not name.startswith("_cache")):
                self._note(attributes, name, value, same, equal)
        # What libraries add to their own objects are things worked out and kept.
        if has_dict(owner) and (users or isinstance(owner, nn.Module)) and not isinstance(owner, Messenger):
            self._sizes.append((attributes, len(attributes)))
        slots = Attributes(owner)
        for kind in type(owner).__mro__:
            names = vars(kind).get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if hasattr(owner, name):
                    self._note(slots, name, getattr(owner, name), same, equal)
        self._class(type(owner))

    def _class(self, owner: type) -> None:
        """What stands in the bodies of a class, of those it derives from, and of its metaclass."""
        metaclass: type = type(owner)
        for kind in (*owner.__mro__, *metaclass.__mro__):
            if id(kind) not in self._owners and is_users(file_of(kind)):
                same, equal = self._once(kind)
                for name, value in vars(kind).items():
                    if not name.startswith("__"):
                        self._note(vars(kind), name, value, same, equal)

    # What cannot be looked into ------------------------------------------------------------------------

    def _name(self, names: Any) -> None:
        """Names in the code that runs; refuses them if they stand for what cannot be looked into."""
        self._named.update(names)
        for name in self._unseen.keys() & set(names):
            self._cannot(name, self._unseen[name])

    def _cannot(self, name: str, why: str) -> None:
        if name in self._named:
            raise Refused(f"it can read {name!r}, {why}: changes would go unseen; use a tensor")
        self._unseen[name] = why


class Store:
    """The param store's leaves (0) or their constraints (1) as a mapping, which it may replace by another."""

    def __init__(self, index: int) -> None:
        self.index = index

    def get(self, key: str, default: Any = None) -> Any:
        return params_of_store(pyro.get_param_store())[self.index].get(key, default)


_ENVIRONMENT = Reading(lambda: dict(os.environ))


def _file_of_code(code: types.CodeType, variables: dict[str, Any]) -> str:
    """Where code is from; that of a string, as in the methods of a dataclass, from where its globals are."""
    name = code.co_filename
    return variables.get("__file__") or name if name == "<string>" else name


def _was_cleared(cache: Any, misses: int) -> bool:
    return cache.cache_info().misses < misses


def _facts(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, tensor.stride()
