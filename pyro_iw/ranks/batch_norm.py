"""Batch normalisations that run in train mode, and their running statistics, which no gradient reaches."""

from __future__ import annotations

import weakref
from typing import Any

import pyro
from torch import Tensor, nn
from torch.nn.modules import batchnorm
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["BatchNorms"]

# The base class, of which users make kinds of their own; where PyTorch has none, its own kinds.
_BatchNorm: Any = getattr(batchnorm, "_BatchNorm", (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))


class BatchNorms:
    """Those that ran in train mode since this was made.

    All modules are watched up to the first step, and again in the step after one that has met new parameters;
    in others nothing is.

    Arguments:
        enabled: watch at all.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._seen: dict[int, weakref.ref[nn.Module]] = {}
        self._hook: Any = None
        if enabled:
            self._watch()

    def _watch(self) -> None:
        own = weakref.ref(self)

        def look(module: nn.Module, _: Any) -> None:
            if isinstance(module, _BatchNorm) and module.training and (norms := own()) is not None:
                norms._seen.setdefault(id(module), weakref.ref(module))

        self._hook = register_module_forward_pre_hook(look)
        weakref.finalize(self, self._hook.remove)

    def after_step(self, met_new: bool) -> None:
        """Watch no more, or again where a step has met new parameters."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        elif met_new:
            self._watch()

    def statistics(self) -> list[tuple[str, Tensor]]:
        """Running means and variances, by names that are the same on all ranks."""
        store = pyro.get_param_store()
        found = []
        for place, reference in enumerate(self._seen.values()):
            module: Any = reference()
            if module is None or module.running_mean is None:
                continue
            known = module.affine and store.param_name(module.weight)
            name = known or f"the {place}th of those without parameters"
            found += [(f"{name} {kind}", getattr(module, f"running_{kind}")) for kind in ("mean", "var")]
        return sorted(found, key=lambda pair: pair[0])
