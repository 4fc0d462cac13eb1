r"""What passes with one particle show about a pair, before particles run in one pass.

Particles run under an outermost plate, on a dim left of every plate of the pair, so the pair's plates must
be known beforehand. A probe also lets lazily initialised guides make their parameters outside the particle
dim, and records what batch normalisation sees without it. It puts the random state and BatchNorm's running
statistics back: for one seed, a pair's first run gives the same numbers as any later one. Its own draws come
from a stream apart, so that parameters made at random do not repeat the first particle's noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from .counterparts import Pattern, pattern_of
from .enumeration import is_enumerated
from .random_state import fork_rng
from .traces import Pair, PairTraces, Traces, trace_pair

__all__ = ["Look", "Probe", "watch_batch_norm"]

#: Looks at one particle of a pair, to refuse it or return warnings.
Look = Callable[[Pair, PairTraces], list[str]]


class Probe:
    """What is known of a pair.

    Attributes:
        model: gives the model of the pair, or None once that is gone.
        nesting: number of batch dims that the pair's own plates take.
        normalised: how many values each BatchNorm in train mode sees at once.
        enumerates: whether the model has sites that are to be enumerated in parallel.
        watched: whether batch normalisation has been looked at in a pass with gradients.
        patterns: what has been looked at of the guide's sites without a counterpart in the model.
        compared: the kinds of runs of which a particle has been run by itself, see :mod:`~pyro_iw.alone`.
    """

    def __init__(self, model: Callable[[], Any] | None = None) -> None:
        self.model = model or (lambda: None)
        self.nesting = 0
        self.normalised: dict[_BatchNorm, int] = {}
        self.enumerates = False
        self.watched = False
        self.patterns: set[Pattern] = set()
        self.compared: set[Any] = set()

    def run(
        self, pair: Pair, check: Callable[[Traces], Any] | None = None, look: Look | None = None
    ) -> list[str]:
        """One pass that leaves nothing behind but lazily made parameters.

        Arguments:
            pair: the pair and its arguments.
            check: called with the traces, to refuse the pair.
            look: as in :meth:`look_at_guide`, whose warnings are returned.
        """
        with fork_rng(), watch_batch_norm(restore=True) as seen:
            traces = Traces([trace_pair(pair)], 1, None)
            if check is not None:
                check(traces)
            messages = self.look_at_guide(pair, traces, look)
        self.learn(traces)
        self.normalised.update(seen)
        return messages

    def look_at_guide(self, pair: Pair, traces: Traces, look: Look | None) -> list[str]:
        """Look at the guide's sites without a counterpart, where they are others than before.

        Arguments:
            pair: the pair and its arguments.
            traces: those of a run.
            look: called with the pair and the traces of one particle; refuses it, or returns warnings.
        """
        messages: list[str] = []
        if look is None:
            return messages
        for run in traces.pairs:
            pattern = pattern_of(run)
            if pattern in self.patterns:
                continue
            with fork_rng(), watch_batch_norm(restore=True):
                messages += look(pair, run if traces.particle_dim is None else trace_pair(pair))
            self.patterns.add(pattern)
        return messages

    def learn(self, traces: Traces) -> bool:
        """Take note of what further traces show; whether that is news."""
        before = self.nesting, self.enumerates
        self.nesting = max(self.nesting, traces.plate_nesting)
        self.enumerates = self.enumerates or any(
            is_enumerated(name, message, pair.guide)
            for pair in traces.pairs
            for name, message in pair.model.nodes.items()
        )
        return before != (self.nesting, self.enumerates)


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
