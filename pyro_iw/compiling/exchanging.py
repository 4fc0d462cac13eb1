"""The exchange between ranks inside a compiled step, as one operation.

In a program it does what it does in an eager step, words and all, so that it makes no difference to the other
ranks which of the two a rank takes: one may compile at another step, or not be able to. A recording takes
place without the others: there, every rank's numbers are its own.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..ranks.particles import ParticleGroup
from .private import library

__all__ = ["OPERATION", "recorded"]

_groups: weakref.WeakValueDictionary[int, ParticleGroup] = weakref.WeakValueDictionary()


def recorded(group: ParticleGroup, tensor: Tensor) -> Tensor:
    """The exchange of a tensor ``[n]`` for ``[P, n]``, as an operation that a recording sees."""
    _groups[id(group)] = group
    return torch.ops.pyro_iw.exchange(tensor.contiguous(), group.size, id(group))


def _exchange(tensor: Tensor, size: int, key: int) -> Tensor:
    group = _groups[key]
    if group.is_recording:
        return tensor.repeat(size, 1)
    return group.exchange(tensor).clone()


library.define("exchange(Tensor own, int size, int key) -> Tensor", tags=[torch.Tag.nondeterministic_seeded])
library.impl("exchange", _exchange, "CompositeExplicitAutograd")
library.impl("exchange", lambda tensor, size, key: tensor.new_empty((size, *tensor.shape)), "Meta")

OPERATION = torch.ops.pyro_iw.exchange.default
