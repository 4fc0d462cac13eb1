r"""What passes with one particle show about a pair, before particles run in one pass.

Particles run under an outermost plate, on a dim left of every plate of the pair, so the pair's plates must
be known beforehand. A probe also lets lazily initialised guides make their parameters outside the particle
dim. It puts the random state and BatchNorm's running statistics back: for one seed, a pair's first run gives
the same numbers as any later one. Its own draws come from a stream apart, so that parameters made at random
do not repeat the first particle's noise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from .._support.random_state import fork_rng
from .batch_norm import watch_batch_norm
from .counterparts import Pattern, pattern_of
from .enumeration import is_enumerated
from .guide_values import is_marked
from .traces import Pair, PairTraces, Traces, trace_pair

__all__ = ["Look", "Probe"]

#: Looks at one particle of a pair, to refuse it or return warnings.
Look = Callable[[Pair, PairTraces], list[str]]


class Probe:
    """What is known of a pair.

    Attributes:
        nesting: number of batch dims that the pair's own plates take.
        enumerates: whether model or guide have sites that are to be enumerated in parallel.
        watched: whether batch normalisation has been looked at in a pass with gradients.
        normalising: the modules of it that have been looked at in train mode.
        patterns: what has been looked at of the guide's sites without a counterpart in the model.
        compared: the kinds of runs of which a particle has been run by itself, see
            :mod:`~pyro_iw.tracing.alone`.
        looked_along: whether what a gradient along the particles' paths may miss has been looked at.
        looked_outside: whether what lies outside of the local plates has been compared between local
            particles that ran one by one.
    """

    def __init__(self) -> None:
        self.nesting = 0
        self.enumerates = False
        self.watched = False
        self.normalising: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.patterns: set[Pattern] = set()
        self.compared: set[Any] = set()
        self.looked_along = False
        self.looked_outside = False

    def run(
        self, pair: Pair, check: Callable[[Traces], Any] | None = None, look: Look | None = None
    ) -> list[str]:
        """One pass that leaves nothing behind but lazily made parameters.

        Arguments:
            pair: the pair and its arguments.
            check: called with the traces, to refuse the pair.
            look: as in :meth:`look_at_guide`, whose warnings are returned.
        """
        with fork_rng(), watch_batch_norm(restore=True):
            traces = Traces([trace_pair(pair, is_new=True)], 1, None)
            if check is not None:
                check(traces)
            messages = self.look_at_guide(pair, traces, look)
        self.learn(traces)
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
        self.enumerates = self.enumerates or any(
            is_marked(message) for pair in traces.pairs for message in pair.guide.nodes.values()
        )
        return before != (self.nesting, self.enumerates)
