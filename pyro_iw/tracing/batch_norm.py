"""What batch normalisation sees in a run, and its statistics kept as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["watch_batch_norm"]

# Their base classes, of which users make kinds of their own; where PyTorch has no such class, its own kinds.
_BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
_NORMS = *_BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
_BatchNorm: Any = getattr(batchnorm, "_BatchNorm", _BATCH_NORMS)
_NormBase: Any = getattr(batchnorm, "_NormBase", _NORMS)


@contextmanager
def watch_batch_norm(enabled: bool = True, restore: bool = False) -> Iterator[dict[nn.Module, int]]:
    """How many values each BatchNorm in train mode sees at once, filled in while the context is open.

    Arguments:
        enabled: look at all.
        restore: put the running statistics back at the end.
    """
    seen: dict[nn.Module, int] = {}
    if not enabled:
        yield seen
        return
    buffers: dict[nn.Module, dict[str, Tensor]] = {}
    lazy: list[Any] = []

    def keep(module: nn.Module) -> None:
        if isinstance(module, _NormBase) and module.training and module not in buffers:
            # A copy takes the updates: a graph may hold on to the buffers themselves.
            buffers[module] = dict(module.named_buffers(recurse=False))
            for name, buffer in buffers[module].items():
                setattr(module, name, buffer.clone())

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # As torch.compile wraps it: no hook is called inside.
        if restore and any(name == "_orig_mod" for name, _ in module.named_children()):
            for part in module.modules():
                keep(part)
        if isinstance(module, _NormBase) and module.training and inputs:
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
                lazy.append(module)  # its statistics are made by this very call
            elif module not in lazy and restore:
                keep(module)
            if isinstance(module, _BatchNorm):
                seen[module] = max(seen.get(module, 0), inputs[0].numel())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()
        for module, saved in buffers.items():
            for name, buffer in saved.items():
                setattr(module, name, buffer)
        if restore:
            for module in lazy:
                module.reset_running_stats()
