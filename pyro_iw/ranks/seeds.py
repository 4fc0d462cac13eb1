"""Ranks that draw the same random numbers, found out by the states of their generators."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from .._support.random_state import RandomState
from .._support.warn import warn
from .group import Group

__all__ = ["SameSeeds", "random_digests", "warn_of_same_seed"]


def random_digests() -> list[int]:
    """Checksums of the states of PyTorch's generators: that of the CPU, then those in use elsewhere."""
    cpu, elsewhere = RandomState.now()[:2]
    return [zlib.crc32(one.numpy().tobytes()) for one in (cpu, *elsewhere)]


def warn_of_same_seed(
    group: Group, before: Sequence[int], after: Sequence[int], warn: Callable[[str], None] = warn
) -> None:
    """Warn of ranks whose generators have drawn and are in one state; a meeting of all ranks.

    Arguments:
        group: the ranks.
        before: the checksums before something was drawn.
        after: those afterwards. A pair that draws nothing (a point estimate) leaves them as they were.
        warn: called with a message.
    """
    drawn = [new if old != new else None for old, new in zip(before, after, strict=False)]
    told = group.hear(drawn)
    for i, mine in enumerate(told[group.rank]):
        same = [
            rank
            for rank, theirs in zip(group.world_ranks, told, strict=True)
            if mine is not None and i < len(theirs) and theirs[i] == mine
        ]
        if len(same) > 1:
            warn(
                f"Ranks {', '.join(map(str, same))} draw the same random numbers: the noise of their "
                "particles, and the minibatches that plates draw, are the same on all of them, so that they "
                "learn little more than one would. Once model and guide are made, seed by rank: "
                "pyro.set_rng_seed(seed + torch.distributed.get_rank())."
            )
            return


class SameSeeds:
    """Looks at the generators in the first two steps, and then no more.

    Arguments:
        group: the ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._before: list[int] | None = None
        self._done = False

    def leave(self) -> None:
        """Do not look: the ranks are to draw the same."""
        self._done = True

    def look(self) -> None:
        """Called once a step, on all ranks."""
        if self._done:
            return
        now = random_digests()
        if self._before is None:
            self._before = now
            return
        self._done = True
        warn_of_same_seed(self._group, self._before, now)
