r"""A pair's arguments taken apart: into tensors, which are inputs of a program, and what it is made for."""

from __future__ import annotations

import enum
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._support.nested import map_leaves
from .reachable import PLAIN

__all__ = ["Refused", "rebuild", "spec"]


class Refused(Exception):
    """Why a pair cannot be recorded."""


def spec(value: Any, tensors: list[Tensor]) -> Any:
    """Arguments as something hashable, with their tensors taken out in order."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            raise Refused("an argument is a sparse or nested tensor")
        for index, seen in enumerate(tensors):
            if seen is value:  # one tensor twice is one input
                return Tensor, index
        tensors.append(value)
        return Tensor
    kind = type(value)
    if kind in PLAIN or isinstance(value, np.generic | enum.Enum):
        return kind, value
    if kind is tuple or kind is list:
        return kind, tuple([spec(item, tensors) for item in value])
    if kind is dict:
        return kind, tuple([(key, spec(item, tensors)) for key, item in value.items()])
    if isinstance(value, (nn.Module, types.FunctionType, type)):
        return kind, value
    raise Refused(
        f"an argument is of type {kind.__name__}, whose changes would go unseen; pass tensors, numbers, "
        "strings or modules"
    )


def rebuild(value: Any, tensors: Iterable[Tensor]) -> Any:
    """The arguments with other tensors in the place of their own, in the order of :func:`spec`."""
    others = iter(tensors)
    seen: dict[int, Tensor] = {}

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in seen:
            seen[id(leaf)] = next(others)
        return seen[id(leaf)]

    return map_leaves(other, value)
