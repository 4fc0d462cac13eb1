r"""The particles of an importance sampler, shared out among ranks.

Particles are independent, so that each rank draws its share of the chunks, and what is known of them adds up:
the log mean weight and the second moment, the groups of a bound, or the particles themselves. Every rank ends
with the whole. Chunk i draws from a stream of its own, whose seed follows from that of the group's first rank
and i: the particles are the same however many ranks there are, and two ranks never draw the same ones,
whatever seeds they started from.

A first particle comes from a stream that all ranks share. Its log-weight must be the same on all of them, or
they do not evaluate the same data with the same parameters; its minibatch is that of all particles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .._support.devices import wide
from .._support.random_state import RandomState
from ..bounds import Bound
from ..ranks.exchange import gather_rows, seed_of
from ..ranks.group import Group, RankError
from ..running import RunningBound, RunningLogMean
from ..tracing.minibatches import OneMinibatch
from ..tracing.traces import Traces
from .dead import warn_of_dead
from .keeping import Kept
from .local_weights import total_log_weights

if TYPE_CHECKING:  # a PyTorch may be built without
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ParticleRanks", "Sums", "add_up", "chunk_sizes", "explain"]

_NO_BATCH = object()

# Ranks may compute on other devices, and so in another order, but not in other numbers.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-3


class Sums(NamedTuple):
    """What a run knows of its weights at its end.

    Attributes:
        log_w: log-weights ``[S, *cells]``, where they are to be kept.
        like: of the dtype and on the device of the log-weights.
    """

    log_w: Tensor | None
    like: Tensor


def chunk_sizes(num_particles: int, chunk_size: int) -> list[int]:
    """The sizes of chunks, of which the last one may be smaller."""
    whole, rest = divmod(num_particles, chunk_size)
    return [chunk_size] * whole + [rest] * (rest > 0)


def add_up(drawn: Iterable[Tensor], running: RunningLogMean, bounds: Any | None, keeps_weights: bool) -> Sums:
    """Add up log-weights that come in chunks ``[chunk, *cells]``."""
    kept = []
    for log_w in drawn:
        running.add(log_w)
        if bounds is not None:
            bounds.add(log_w)
        if keeps_weights:
            kept.append(log_w)
    return Sums(torch.cat(kept) if kept else None, log_w)


def explain(
    drawn: Iterable[tuple[Any, Traces, str | None]],
    value: Tensor,
    num_particles: int,
    dead: str | None = None,
) -> None:
    """Say at which site a weight is no number, or all are 0.

    Arguments:
        drawn: the same particles once more, in chunks with their traces and first sites of zero density.
        value: their log evidence, not all of it finite.
        num_particles: how many they are.
        dead: the first site of zero density, where it is known.

    Raises:
        ValueError: if a log-weight is NaN or +inf.
    """
    for _, _, dead_here in drawn:
        dead = dead or dead_here
    if bool((value.isnan() | value.isposinf()).any()):
        raise ValueError(
            "Log-weights are NaN or +inf, but not when the same particles are drawn again from PyTorch's "
            "global generator. Look for a NaN in the data or the parameters, or a scale of 0."
        )
    warn_of_dead(value, num_particles, dead)


class _Share(NamedTuple):
    """A rank's share of an evaluation.

    Attributes:
        seed: that of the evaluation.
        first: the index of its first chunk.
        sizes: those of its chunks.
        begin: the number of particles before.
    """

    seed: int
    first: int
    sizes: list[int]
    begin: int

    def plan(self) -> Iterator[int]:
        """The sizes of the chunks, each after its stream has begun."""
        for index, size in enumerate(self.sizes, self.first):
            torch.manual_seed(seed_of(self.seed, "chunk", index))
            yield size


class ParticleRanks:
    """The ranks that share the particles of a sampler.

    Arguments:
        group: a process group, or a mesh of one dimension.
        num_particles: the number S of particles of all ranks together.
    """

    def __init__(self, group: ProcessGroup | DeviceMesh, num_particles: int) -> None:
        self.group = Group.of("particle_group", group)
        self.num_particles = num_particles

    def in_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """A loader's batches, as long as all ranks have one."""
        while True:
            with self.group.meeting("particle_group, the next batch of the loader") as brought:
                batch = next(batches, _NO_BATCH)
                brought.append("none" if batch is _NO_BATCH else "one")
            if batch is _NO_BATCH:
                return
            yield batch

    def add_up(
        self,
        settings: str,
        size_of_chunks: Callable[[], int],
        draw: Callable,
        weigh: Callable,
        running: RunningLogMean,
        bounds: RunningBound | None,
        keeps_weights: bool,
    ) -> Sums:
        """Run this rank's share of the particles, and add up those of all ranks.

        Arguments:
            settings: what is to be the same on all ranks, in words.
            size_of_chunks: finds the number of particles that this rank has room for.
            draw: gives chunks of particles, with their traces and first sites of zero density, of given sizes
                and with a minibatch.
            weigh: gives their log-weights alone.
            running: what to add up.
            bounds: likewise.
            keeps_weights: whether to keep the log-weights.

        Warns and raises as :func:`explain`.
        """
        mine = RunningLogMean()
        with self._stream(settings, size_of_chunks, draw) as (share, minibatch, first):
            like = total_log_weights(first[0])
            aligned = None if bounds is None else _Aligned(bounds, share.begin)
            with self.group.meeting("particle_group, the particles"):
                found = Sums(like[:0] if keeps_weights else None, like)
                if share.sizes:
                    found = add_up(weigh(share.plan(), minibatch), mine, aligned, keeps_weights)
            told = self.group.hear((_portable(mine), aligned and aligned.portable()))
            for others, other_bounds in told:
                running.merge(_unpacked(RunningLogMean(), others, like.device))
                if bounds is not None:
                    bounds.merge(_unpacked(type(bounds)(bounds.bound), other_bounds[0], like.device))
            if bounds is not None:
                ends = torch.cat([end for _, other_bounds in told for end in other_bounds[1]])
                bounds.add(ends.to(like.device))
            if not bool(running.value.isfinite().all()):
                with self.group.meeting("particle_group, the particles"):
                    dead = first[2]
                    for _, _, dead_here in draw(share.plan(), minibatch):
                        dead = dead or dead_here
                explain([], running.value, self.num_particles, _first_of(self.group.hear(dead)))
            log_w = None if found.log_w is None else gather_rows(self.group, found.log_w)
        return Sums(log_w, like)

    def keep(
        self,
        settings: str,
        size_of_chunks: Callable[[], int],
        draw: Callable,
        run: Callable[..., Kept],
        bar: tqdm,
    ) -> tuple[Kept, OneMinibatch]:
        """Draw this rank's share of the particles, and keep those of all ranks.

        Arguments:
            settings: as in :meth:`add_up`.
            size_of_chunks: likewise.
            draw: likewise.
            run: keeps such chunks.
            bar: a progress bar.
        """
        with self._stream(settings, size_of_chunks, draw) as (share, minibatch, first):
            with self.group.meeting("particle_group, the particles") as brought:
                if share.sizes:
                    mine = run(draw(share.plan(), minibatch, bar))
                else:
                    mine = run([first]).map(lambda rows: rows[:0])._replace(dead=None)
                brought.append(mine.shapes())
            whole = mine.map(lambda rows: gather_rows(self.group, rows))
            return whole._replace(dead=_first_of(self.group.hear(mine.dead))), minibatch

    @contextmanager
    def _stream(
        self, settings: str, size_of_chunks: Callable[[], int], draw: Callable
    ) -> Iterator[tuple[_Share, OneMinibatch, Any]]:
        """This rank's share of an evaluation; its minibatch and first particle, which all ranks have."""
        own = int(torch.randint(2**62, ()))
        state = RandomState.now()
        try:
            with self.group.meeting("particle_group, the sampler") as brought:
                room = size_of_chunks()
                brought.append(settings)
            told = self.group.hear((own, room))
            seed = told[0][0]
            share = self._share(seed, min(room for _, room in told))
            minibatch = OneMinibatch()
            with self.group.meeting("particle_group, the cells of the first particle") as brought:
                torch.manual_seed(seed_of(seed, "all ranks"))
                first = next(iter(draw([1], minibatch)))
                log_w = total_log_weights(first[0])
                brought += [tuple(log_w.shape[1:]), str(log_w.dtype)]
            self._compare(log_w)
            yield share, minibatch, first
        finally:
            state.restore()

    def _share(self, seed: int, chunk_size: int) -> _Share:
        """This rank's share of the chunks."""
        size, rank = self.group.size, self.group.rank
        # No larger than a share, or ranks would have nothing to do.
        sizes = chunk_sizes(self.num_particles, min(chunk_size, math.ceil(self.num_particles / size)))
        first, last = (len(sizes) * end // size for end in (rank, rank + 1))
        return _Share(seed, first, sizes[first:last], sum(sizes[:first]))

    def _compare(self, log_w: Tensor) -> None:
        """Refuse ranks that evaluate something else than the first one."""
        said = self.group.hear(wide(log_w).cpu())
        close = [
            torch.allclose(other, said[0], rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True) for other in said
        ]
        if all(close):
            return
        ranks = self.group.world_ranks
        others = [i for i, same in enumerate(close) if not same]
        worst = max((said[i] - said[0]).abs().nan_to_num(nan=math.inf).max().item() for i in others)
        raise RankError(
            f"particle_group: rank(s) {', '.join(str(ranks[i]) for i in others)} give the same draw of the "
            f"guide other log-weights than rank {ranks[0]} (by up to {worst:.3g} nats), so they have other "
            "data or other parameters. All ranks of a particle group evaluate the same batches; split the "
            "data over data_group= alone (a DistributedSampler's rank and num_replicas are those in it). "
            "Give all ranks the same parameters: load one checkpoint, or broadcast them."
        )


class _Aligned:
    """A bound's groups among the particles of one rank, as they lie among those of all ranks.

    Arguments:
        bounds: what the groups of all ranks are to be added up in.
        begin: the number of particles of the ranks before.
    """

    def __init__(self, bounds: RunningBound, begin: int) -> None:
        self.running = type(bounds)(bounds.bound)
        self._missing = -begin % bounds.bound.num_particles
        self._head: list[Tensor] = []

    def add(self, log_w: Tensor) -> None:
        """Add log-weights of shape ``[chunk, *cells]``."""
        if self._missing:
            self._head.append(log_w[: self._missing].clone())
            log_w = log_w[self._missing :]
            self._missing -= len(self._head[-1])
        self.running.add(log_w)

    def portable(self) -> tuple[dict[str, Any], list[Tensor]]:
        """The whole groups; and the particles before the first and after the last of them."""
        rest = self.running.rest
        ends = [*self._head, *([] if rest is None else [rest])]
        return _portable(self.running), [end.cpu() for end in ends]


def _portable(running: RunningLogMean | RunningBound) -> dict[str, Any]:
    """What another process needs to know of it, on the CPU."""
    return {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in vars(running).items()
        if not isinstance(value, Bound) and name != "rest"
    }


def _unpacked(empty: Any, state: dict[str, Any], device: torch.device) -> Any:
    for name, value in state.items():
        setattr(empty, name, value.to(device) if isinstance(value, Tensor) else value)
    return empty


def _first_of(names: Sequence[str | None]) -> str | None:
    return next((name for name in names if name), None)
