"""What batch normalisation sees in a run, and its statistics kept as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["watch_batch_norm"]


@contextmanager
def watch_batch_norm(enabled: bool = True, restore: bool = False) -> Iterator[dict[_BatchNorm, int]]:
    """How many values each BatchNorm in train mode sees at once, filled in while the context is open.

    Arguments:
        enabled: look at all.
        restore: put the running statistics back at the end.
    """
    seen: dict[_BatchNorm, int] = {}
    if not enabled:
        yield seen
        return
    buffers: dict[_NormBase, dict[str, Tensor | None]] = {}
    lazy: list[_NormBase] = []

    def keep(module: torch.nn.Module) -> None:
        if isinstance(module, _NormBase) and module.training and module not in buffers:
            # A copy takes the updates: a graph may hold on to the buffers themselves.
            buffers[module] = dict(module._buffers)
            for name, buffer in buffers[module].items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    def look(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if restore and "_orig_mod" in module._modules:  # as torch.compile wraps it: no hook is called inside
            for part in module.modules():
                keep(part)
        if isinstance(module, _NormBase) and module.training and inputs:
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
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
            module._buffers.update(saved)
        if restore:
            for module in lazy:
                module.reset_running_stats()
