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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .._support.random_state import RandomState
from ..bounds import Bound
from ..ranks.exchange import gather_rows, seed_of, tell
from ..ranks.group import Group, RankError
from ..running import RunningBound, RunningLogMean
from ..tracing.latents import Latent
from ..tracing.minibatches import OneMinibatch
from ..tracing.traces import Traces
from .local_weights import LocalWeights, total_log_weights

__all__ = ["Kept", "ParticleRanks", "Sums", "chunk_sizes"]

_NO_BATCH = object()

# Ranks may compute on other devices, and so in another order, but not in other numbers.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-3


class Sums(NamedTuple):
    """What a run knows of its weights at its end.

    Attributes:
        log_w: log-weights ``[S, *cells]``, where they are to be kept.
        dead: the first site at which a particle has zero density.
        like: of the dtype and on the device of the log-weights.
    """

    log_w: Tensor | None
    dead: str | None
    like: Tensor


class Kept(NamedTuple):
    """Particles, kept with their densities.

    Attributes:
        latents: by site, ``[S, *batch, *event]``.
        log_p: ``[S, *cells]``.
        log_q: likewise.
        local: the local particles by their plate.
        traces: those of one of the runs.
        particles: what was read off those.
        dead: as in :class:`Sums`.
    """

    latents: dict[str, Latent]
    log_p: Tensor
    log_q: Tensor
    local: dict[str, LocalWeights]
    traces: Traces
    particles: Any
    dead: str | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Kept:
        """The same with a function applied to all that has a row for each particle."""
        return self._replace(
            latents={
                name: latent._replace(values=function(latent.values)) for name, latent in self.latents.items()
            },
            log_p=function(self.log_p),
            log_q=function(self.log_q),
            local={
                name: level._replace(log_p=function(level.log_p), log_q=function(level.log_q))
                for name, level in self.local.items()
            },
        )

    def shapes(self) -> dict[str, tuple]:
        """Of one row of everything that has one for each particle."""
        found = {f"latent site {name!r}": latent.values for name, latent in self.latents.items()}
        found["log_p"] = self.log_p
        found |= {f"plate {name!r}": level.log_p for name, level in self.local.items()}
        return {name: (tuple(values.shape[1:]), str(values.dtype)) for name, values in found.items()}


def chunk_sizes(num_particles: int, chunk_size: int) -> list[int]:
    """The sizes of chunks, of which the last one may be smaller."""
    whole, rest = divmod(num_particles, chunk_size)
    return [chunk_size] * whole + [rest] * (rest > 0)


class ParticleRanks:
    """The ranks that share the particles of a sampler.

    Arguments:
        group: a process group, or a mesh of one dimension.
        num_particles: the number S of particles of all ranks together.
        chunk_size: the number of particles that are in memory at once.
    """

    def __init__(self, group: ProcessGroup | DeviceMesh, num_particles: int, chunk_size: int) -> None:
        self.group = Group("particle_group", group)
        size, rank = self.group.size, self.group.rank
        # No larger than a share, or ranks would have nothing to do.
        self.sizes = chunk_sizes(num_particles, min(chunk_size, math.ceil(num_particles / size)))
        self.first, self.last = (len(self.sizes) * end // size for end in (rank, rank + 1))

    @property
    def share(self) -> int:
        """The number of this rank's particles."""
        return sum(self.sizes[self.first : self.last])

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
        draw: Callable,
        run: Callable[..., Sums],
        running: RunningLogMean,
        bounds: RunningBound | None,
        keeps_weights: bool,
    ) -> Sums:
        """Run this rank's share of the particles, and add up those of all ranks.

        Arguments:
            settings: what is to be the same on all ranks, in words.
            draw: gives chunks of particles with their traces, of given sizes.
            run: adds up such chunks, one after the other, in the two that follow it.
            running: what to add up.
            bounds: likewise.
            keeps_weights: whether ``run`` keeps the log-weights.
        """
        mine = RunningLogMean()
        aligned = None if bounds is None else _Aligned(bounds, sum(self.sizes[: self.first]))
        with self._stream(settings, draw) as (seed, minibatch, first):
            like = total_log_weights(first[0])
            with self.group.meeting("particle_group, the particles"):
                found = Sums(like[:0] if keeps_weights else None, None, like)
                if self.first < self.last:
                    found = run(draw(minibatch, self._seeded(seed)), mine, aligned)
            told = tell(self.group, (_portable(mine), aligned and aligned.portable(), found.dead))
            for others, other_bounds, _ in told:
                running.merge(_unpacked(RunningLogMean(), others, like.device))
                if bounds is not None:
                    bounds.merge(_unpacked(type(bounds)(bounds.bound), other_bounds[0], like.device))
            if bounds is not None:
                ends = torch.cat([end for _, other_bounds, _ in told for end in other_bounds[1]])
                bounds.add(ends.to(like.device))
            log_w = None if found.log_w is None else gather_rows(self.group, found.log_w)
        return Sums(log_w, _first_of([dead for *_, dead in told]), like)

    def keep(self, settings: str, draw: Callable, run: Callable[..., Kept]) -> tuple[Kept, OneMinibatch]:
        """Draw this rank's share of the particles, and keep those of all ranks.

        Arguments:
            settings: as in :meth:`add_up`.
            draw: as in :meth:`add_up`.
            run: keeps such chunks.
        """
        with self._stream(settings, draw) as (seed, minibatch, first):
            with self.group.meeting("particle_group, the particles") as brought:
                if self.first < self.last:
                    mine = run(draw(minibatch, self._seeded(seed)))
                else:
                    mine = run([first]).map(lambda rows: rows[:0])._replace(dead=None)
                brought.append(mine.shapes())
            whole = mine.map(lambda rows: gather_rows(self.group, rows))
            return whole._replace(dead=_first_of(tell(self.group, mine.dead))), minibatch

    def _seeded(self, seed: int) -> Iterator[int]:
        """The sizes of this rank's chunks, each after its stream has begun."""
        for index in range(self.first, self.last):
            torch.manual_seed(seed_of(seed, "chunk", index))
            yield self.sizes[index]

    @contextmanager
    def _stream(self, settings: str, draw: Callable) -> Iterator[tuple[int, OneMinibatch, Any]]:
        """The seed of an evaluation, its minibatch and its first particle, which all ranks share."""
        own = int(torch.randint(2**62, ()))
        state = RandomState.now()
        try:
            with self.group.meeting("particle_group, the sampler") as brought:
                brought.append(settings)
            seed = tell(self.group, own)[0]
            minibatch = OneMinibatch()
            with self.group.meeting("particle_group, the cells of the first particle") as brought:
                torch.manual_seed(seed_of(seed, "all ranks"))
                first = next(iter(draw(minibatch, [1])))
                log_w = total_log_weights(first[0])
                brought += [tuple(log_w.shape[1:]), str(log_w.dtype)]
            self._compare(log_w)
            yield seed, minibatch, first
        finally:
            state.restore()

    def _compare(self, log_w: Tensor) -> None:
        """Refuse ranks that evaluate something else than the first one."""
        said = tell(self.group, log_w.double().cpu())
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
