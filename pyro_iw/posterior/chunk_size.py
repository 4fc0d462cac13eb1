r"""How many particles to hold in memory at once, found by running a few of them.

What a particle takes is the difference between a run of two particles and one of six, at the point of the
run where it is largest, counted by the tensors that PyTorch's functions return. Memory that a function uses
inside is not seen: the count is a lower bound, and the budget therefore a small part of what is free. On a
CPU the budget is what runs fastest, about the size of its caches.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Peak", "particles_that_fit"]

#: The share of the free memory that the tensors of a chunk may take.
_SHARE = 0.1
#: Bytes of a chunk on a CPU. Measured from 1 to 256 MiB on three VAEs, one thread: the fastest, or within a
#: tenth of it; from 64 MiB on the largest of them took 1.4 times as long.
_CPU_BUDGET = 16 * 2**20
_FEW, _MORE = 2, 6


class Peak(TorchFunctionMode):
    """Counts the bytes of the tensors that are alive at once, of those made within.

    Attributes:
        history: that number whenever a tensor had been made.
        device: where the largest tensor was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = []
        self.device = torch.device("cpu")
        self._largest = 0
        self._now = 0
        self._views: dict[int, int] = {}  # how many tensors share a memory, by its address

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        self._views[address] = self._views.get(address, 0) + 1
        if self._views[address] == 1:
            self._now += size
            self.history.append(self._now)
            if size > self._largest:
                self._largest, self.device = size, tensor.device
        weakref.finalize(tensor, self._gone, address, size).atexit = False

    def _gone(self, address: int, size: int) -> None:
        self._views[address] -= 1
        if not self._views[address]:
            del self._views[address]
            self._now -= size


def particles_that_fit(run: Callable[[int], Any], most: int) -> int:
    """The number of particles that fit into memory, and on a CPU into what is fast.

    Arguments:
        run: runs a number of particles, and returns what is to be alive at its end.
        most: no more than that.
    """
    if most <= _MORE:
        return most
    run(_FEW)  # what happens in a first run alone
    histories = []
    for number in (_FEW, _MORE):
        with Peak() as peak:
            run(number)
        histories.append(peak.history)
    few, more = histories
    if len(few) == len(more):
        each = max((b - a) / (_MORE - _FEW) for a, b in zip(few, more, strict=True))
    else:  # particles run one by one, or as many steps as they take
        each = max(more) / _MORE
    each = max(each, 1.0)
    fits = int(_budget(peak.device) / each)
    if fits >= most:
        return most
    # Chunks of one size, and of no odd one.
    chunks = -(-most // max(fits, 1))
    return -(-most // chunks)


def _budget(device: torch.device) -> float:
    if device.type == "cuda":
        return _SHARE * torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return _CPU_BUDGET
    return min(_CPU_BUDGET, _SHARE * _free_bytes())


def _free_bytes() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return float("inf")
