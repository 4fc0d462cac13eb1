"""The accelerator of this machine, of whichever type: its random states, its autocast, its precision.

PyTorch runs on one type of accelerator at a time (CUDA, Apple's MPS, Intel's XPU, or one that a package
brings along), and each has a module of functions of the same names, which are all that is asked for here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "accelerator",
    "accelerator_in_use",
    "autocast_dtype",
    "autocast_types",
    "rng_state",
    "rng_states",
    "set_rng_state",
    "wide",
    "wide_dtype",
]

# All of them have float64 and fused optimisers, whatever the release.
_COMPLETE = ("cpu", "cuda")


def accelerator() -> str | None:
    """The type of the accelerator that this PyTorch was built for; None if there is none."""
    generic = getattr(torch, "accelerator", None)
    if generic is None:
        return _available_before()
    try:
        device = generic.current_accelerator()
    except RuntimeError:  # how PyTorch 2.6 says None
        return None
    return None if device is None else device.type


@functools.cache
def _available_before() -> str | None:
    """The same for PyTorch before 2.6, which has no common name for them."""
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
    }
    return next((kind for kind, is_available in available.items() if is_available()), None)


def accelerator_in_use() -> Any:
    """The module of the accelerator's functions, once something has been done on it; else None."""
    kind = accelerator()
    if kind is None:
        return None
    module = torch.get_device_module(kind)
    if kind == "mps":  # which is always ready
        return module if torch.backends.mps.is_available() else None
    return module if module.is_initialized() else None


def rng_states() -> list[Tensor]:
    """The states of the accelerator's generators, by device, which lie on the host; none where it rests."""
    module = accelerator_in_use()
    return [] if module is None else [rng_state(index) for index in range(module.device_count())]


def rng_state(device: int | torch.device) -> Tensor:
    """The state of a device's generator."""
    module, args = _module_of(device)
    return module.get_rng_state(*args)


def set_rng_state(state: Tensor, device: int | torch.device) -> None:
    """Set it."""
    module, args = _module_of(device)
    module.set_rng_state(state, *args)


def _module_of(device: int | torch.device) -> tuple[Any, tuple]:
    kind = accelerator() if isinstance(device, int) else device.type
    assert kind is not None
    module = torch.get_device_module(kind)
    return module, () if kind == "mps" else (device,)  # there is one alone


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast makes of networks on a type of device; None where it is off or not known there."""
    try:
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    except RuntimeError:  # before 2.5 on Apple's
        return None


def autocast_types() -> list[str]:
    """The types of the devices for which autocast is on."""
    kinds = ("cpu", accelerator())
    return [kind for kind in kinds if kind is not None and autocast_dtype(kind) is not None]


@functools.cache
def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64, such as Apple's."""
    if device.type in _COMPLETE:
        return torch.float64
    try:
        # Some refuse to hold such a tensor, others to compute with it.
        torch.zeros(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def wide(tensor: Tensor) -> Tensor:
    """The same numbers in :func:`wide_dtype`."""
    return tensor.to(wide_dtype(tensor.device))
