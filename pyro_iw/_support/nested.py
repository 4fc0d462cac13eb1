"""What is inside tuples, lists and dicts, and those within one another."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["leaves", "map_leaves"]

_MAPPINGS = (dict, OrderedDict, defaultdict)


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """The same containers around other things: of each that is no container, what ``change`` makes of it."""
    kind = type(value)
    if _is_tuple(value):
        parts = [map_leaves(change, part) for part in value]
        return kind(*parts) if hasattr(value, "_fields") else kind(parts)
    if kind is list:
        return [map_leaves(change, part) for part in value]
    if kind is deque:
        return deque([map_leaves(change, part) for part in value], value.maxlen)
    if kind in _MAPPINGS:
        result = copy.copy(value)  # with its order, or its default
        for key, part in value.items():
            result[key] = map_leaves(change, part)
        return result
    return change(value)


def leaves(value: Any) -> Iterator[Any]:
    """All that is no container, in order."""
    if _is_tuple(value) or type(value) in (list, deque):
        for part in value:
            yield from leaves(part)
    elif type(value) in _MAPPINGS:
        yield from leaves(list(value.values()))
    else:
        yield value


def _is_tuple(value: Any) -> bool:
    """Whether this is a tuple, one with names, or one that a function of PyTorch's gives (``x.max(dim)``)."""
    named = hasattr(value, "_fields") or hasattr(value, "n_sequence_fields")
    return type(value) is tuple or (isinstance(value, tuple) and named)
