r"""The particles of a loss divided among the ranks of a group: ``particle_group=``.

Each of P ranks draws its own block of the S particles, and sends their log-weights to the others. All weights
follow from all log-weights and from nothing else, so that is all there is to exchange: ``S / P`` numbers a
cell and rank in a step, in one operation. Each rank then has the whole bound, and goes backward through its
own particles, whose weights are P times those of one process. An engine that *averages* gradients over ranks,
as DistributedDataParallel does, then gives their sum over the ranks of a particle group, and the mean over
data ranks where there are those too.

**What no rank can see by itself** is looked at when the first steps are taken, and every now and then later:
each rank sends digests of its parameters, of the data that it observed, of the minibatches of its plates and
of its random state along with its log-weights. Where ranks differ that must not, or have the same noise, all
of them raise.

**Seeds.** What has to be the same on all ranks (minibatches that plates draw), and the noise of chunks, comes
from a seed that the first rank of the group draws for the step.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._support.random_state import RandomState
from .exchange import seed_of
from .group import Group, RankError
from .seeds import random_digests

__all__ = ["ParticleGroup", "digest"]

#: Steps that are looked at closely: the first ones, and then one in so many.
_FIRST, _EVERY = 3, 128
#: Numbers whose bits are added up at a time in a digest.
_PIECE = 2**20
#: What an exchange is about, for messages.
_SUBJECT = "the log-weights of a step"


class Digests(NamedTuple):
    """What a rank says of itself at a closer look; 0 for what is not known.

    Attributes:
        minibatch: of the indices of subsampled plates.
        observed: of the values of observed sites.
        parameters: of the tensors that get gradients.
        random: of the random state that the step began from.
    """

    minibatch: int = 0
    observed: int = 0
    parameters: int = 0
    random: int = 0


_DIFFERENT = {
    "minibatch": (
        "takes other minibatches of its plates than",
        "The ranks of a particle group share their datapoints. Let the plates draw them (subsample_size=), "
        "or give all ranks of a group the same indices.",
    ),
    "observed": (
        "observes other data than",
        "The ranks of a particle group share their datapoints, and have other particles of each. Give a "
        "DistributedSampler the number and the place of the data ranks (num_replicas=mesh['data'].size(), "
        "rank=mesh['data'].get_local_rank()), or 1 and 0 where there is no such mesh.",
    ),
    "parameters": (
        "has other parameters than",
        "All ranks have to begin with the same parameters (pyro.set_rng_seed(0) before the networks are made "
        "and the guide runs first, and another seed on each rank after that), and gradients have to be "
        "averaged over all of them: by DistributedDataParallel(loss(model, guide)), or in SVI by "
        "pyro_iw.optim.FusedOptim(torch.optim.Adam, {'lr': 1e-3}, "
        "process_group=torch.distributed.group.WORLD).",
    ),
}


class _Step:
    """A step that is being taken."""

    def __init__(self, brought: tuple) -> None:
        self.brought = brought
        self.seed: int | None = None
        self.is_over = False  # its exchange took place
        self.again = False  # it runs once more on the same noise, of which the other ranks know nothing
        self.digests = Digests()


class ParticleGroup:
    """A loss's share in the particles.

    Arguments:
        group: a process group, or a mesh of one dimension.
        bound: anything with M and K and a ``num_particles``.

    Attributes:
        size: the number of ranks P.
        own: the number of particles of this rank.
        block: which of all particles these are.
        draws_minibatches: whether plates were seen to draw theirs.

    Raises:
        ValueError: if the particles cannot be divided among the ranks.
    """

    def __init__(self, group: Any, bound: Any) -> None:
        self.group = Group.of("particle_group", group)
        self.size = self.group.size
        if bound.num_particles % self.size:
            raise ValueError(
                f"particle_group has P={self.size} ranks, among which the M K = {bound.num_particles} "
                f"particles of {bound!r} cannot be divided evenly. With M={bound.M}, take "
                f"{_suitable(bound, self.size)}."
            )
        self.own = bound.num_particles // self.size
        self.block = slice(self.group.rank * self.own, (self.group.rank + 1) * self.own)
        self.draws_minibatches = False
        self._generators: dict[torch.device, torch.Generator] = {}
        self._exchanges = 0
        self._step: _Step | None = None
        #: Weak references to the tensors that got gradients when they were last looked at.
        self.parameters: list[weakref.ref[Tensor]] = []
        #: What a step has ``observed``, and the ``indices`` of its minibatches, by name, when that is due.
        self.seen: Any = None
        self._recorded: Callable[[ParticleGroup, Tensor], Tensor] | None = None
        self._everything: Tensor | None = None
        self._own: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ParticleGroup:
        other = copy.copy(self)
        other._generators, other.parameters = {}, []
        return other

    # Steps --------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, *brought: Any) -> Iterator[None]:
        """What a step does up to its loss. If that fails before the exchange, the other ranks are told.

        Arguments:
            brought: what must be the same on all ranks.
        """
        self._step = step = _Step(brought)
        try:
            if self.is_due:
                self.note(random=zlib.crc32(repr(random_digests()).encode()) + 1)
            yield
        except RankError:
            raise
        except Exception as error:
            if not step.is_over:
                self.group.tell(_SUBJECT, error)
            raise
        finally:
            self._step = self.seen = None

    @property
    def is_due(self) -> bool:
        """Whether this step is looked at closely."""
        return self.size > 1 and (self._exchanges < _FIRST or self._exchanges % _EVERY == 0)

    @property
    def is_recording(self) -> bool:
        """Whether steps are taken without the other ranks."""
        return self._recorded is not None

    def note(self, **digests: int) -> None:
        """Say something of this rank with the next exchange; see :class:`Digests`."""
        if self._step is not None:
            self._step.digests = self._step.digests._replace(**digests)

    def repeat(self) -> None:
        """What comes is this step once more, on the same noise: the other ranks are not asked again."""
        if self._step is not None:
            self._step.again = self._step.is_over

    @contextmanager
    def recording(self, exchange: Callable[[ParticleGroup, Tensor], Tensor]) -> Iterator[None]:
        """Steps inside are taken without the other ranks, to see what they do.

        Arguments:
            exchange: stands in for :meth:`exchange`.
        """
        self._recorded = exchange
        try:
            yield
        finally:
            self._recorded = None

    def exchange(self, tensor: Tensor) -> Tensor:
        """Numbers of all ranks, ``[P, n]``, given those ``[n]`` of this one."""
        if self._recorded is not None:
            return self._recorded(self, tensor)
        step = self._step or _Step(())
        if step.again and self._everything is not None:
            return self._everything
        if self.is_due:
            alive = [parameter for reference in self.parameters if (parameter := reference()) is not None]
            self.note(parameters=digest(alive) if alive else 0)
            if self.seen is not None:
                observed, indices = list(self.seen.observed.values()), list(self.seen.indices.values())
                self.note(observed=digest(observed), minibatch=digest(list(map(torch.as_tensor, indices))))
        words, everything = self.group.exchange(_SUBJECT, tensor, step.brought, step.digests)
        step.is_over = True
        self._exchanges += 1
        self._everything = everything
        if any(map(any, words)):
            self._compare([Digests(*row[: len(Digests._fields)]) for row in words], everything)
        return everything

    def _compare(self, said: Sequence[Digests], everything: Tensor) -> None:
        """Refuse ranks that differ where they must not, and those that have the same noise."""
        ranks = self.group.world_ranks
        for name, (verb, advice) in _DIFFERENT.items():
            known = [(rank, getattr(each, name)) for rank, each in zip(ranks, said, strict=True)]
            known = [(rank, value) for rank, value in known if value]
            for rank, value in known:
                if value != known[0][1]:
                    raise RankError(f"Rank {rank} {verb} rank {known[0][0]}. {advice}")
        for i, j in itertools.combinations(range(self.size), 2):
            if (
                said[i].random
                and said[i].random == said[j].random
                and torch.equal(everything[i], everything[j])
            ):
                raise RankError(
                    f"Rank {ranks[j]} has drawn the same particles as rank {ranks[i]}: both are seeded "
                    "alike. Seed each rank of a particle group by its number once the networks are made: "
                    "pyro.set_rng_seed(seed + torch.distributed.get_rank())."
                )

    def refuse_others(self) -> None:
        """Raise, if there is NaN or +inf among the log-weights of other ranks, and name those.

        Raises:
            RankError: then.
        """
        if self.size == 1 or self._everything is None:
            return
        bad = (self._everything.isnan() | self._everything.isposinf()).sum(1).tolist()
        bad[self.group.rank] = 0
        found = [f"rank {rank} ({n})" for rank, n in zip(self.group.world_ranks, bad, strict=True) if n]
        if found:
            raise RankError(
                f"Log-weights are NaN or +inf on {', '.join(found)}, and none on this rank. No gradient step "
                "should be taken on them: the error of that rank says at which site."
            )

    # Seeds --------------------------------------------------------------------------------------------

    def seed(self) -> int:
        """The seed of this step, which the first rank of the group draws from its generator."""
        if self._step is None or self.is_recording:
            return 0
        if self._step.seed is None:
            mine = int(torch.randint(2**62, (), device="cpu"))
            self._step.seed = self.group.say("the seed of a step", self._step.brought, [mine])[0][0]
        return self._step.seed

    def begin(self, start: int) -> RandomState:
        """Seed a chunk by its place among the particles of all ranks, so that it is the same for any P.

        Arguments:
            start: which of this rank's own particles it begins with.

        Returns:
            The random state, which is the present one.
        """
        return RandomState.seeded(seed_of(self.seed(), self.block.start + start))

    def ready(self) -> None:
        """Have the minibatches of the step begin where they should, if its plates draw any."""
        if self.draws_minibatches and not self.is_recording:
            self.seed_minibatches()

    def seed_minibatches(self) -> None:
        """Begin the stream that minibatches are drawn from, as this step's seed has it."""
        seed = self.seed()
        for generator in self._generators.values():
            generator.manual_seed(seed)

    def minibatch(self, size: int, count: int, device: torch.device) -> Tensor:
        """Indices of a minibatch, the same on all ranks.

        Arguments:
            size: the plate's full size.
            count: the number of indices.
            device: where they are drawn.
        """
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        if not self.draws_minibatches and self._recorded is None and self._step is not None:
            self.draws_minibatches = True
            self.seed_minibatches()
        return torch.randperm(size, generator=self._generators[device], device=device)[:count].clone()


def digest(tensors: Sequence[Tensor]) -> int:
    """A number that tells tensors from others, bit by bit and whatever device they lie on; never 0.

    Their order makes no difference.
    """
    total = 1
    for tensor in tensors:
        tensor = tensor.detach()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.layout is not torch.strided:
            continue
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        total += zlib.crc32(repr(list(tensor.shape)).encode())
        for i, piece in enumerate(tensor.contiguous().reshape(-1).view(kind).split(_PIECE)):
            places = torch.arange(1, len(piece) + 1, device=piece.device)
            total += (2 * i + 1) * int((piece * places).sum())
    return total % (2**62) or 1


def _suitable(bound: Any, ranks: int) -> str:
    """The numbers K next to that of a bound, for which M K is a multiple of the number of ranks."""
    unit = ranks // math.gcd(bound.M, ranks)
    below = bound.K // unit * unit
    return f"K={below} or K={below + unit}" if below else f"K={unit}"
