r"""Gradients averaged over the ranks that train one model, for optimisers that are given parameters in a set.

Rank r has the gradient :math:`g_r` of its own minibatch; all step along :math:`\frac{1}{R} \sum_r g_r`.
Parameters are known by their names in Pyro's param store, which are the same on all ranks where the order of
a set is not, and it is their union that counts: to what one rank's step did not use, that rank adds a zero.
Gradients travel in buckets, one message for many of them, and with them the running statistics of batch
normalisation.

What a rank lacks it takes over: a parameter that others made first, and the values of one that it began from
others. A rank that began from other values has taken its gradient at another place than the rest, so in that
one step it adds nothing, and the mean is over the others.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import pyro
import torch
import torch.distributed as dist
from torch import Tensor

from .batch_norm import BatchNorms
from .exchange import checksum
from .group import Group, RankError
from .seeds import SameSeeds

__all__ = ["AveragedGradients"]

_GRADIENTS = "the gradients of a step"

#: Bytes of gradients that travel in one message.
_BUCKET = 25 * 2**20


class _Entry(NamedTuple):
    """What a rank says of a parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_new: bool
    layout: torch.layout | None  # of its gradient, if it has one


class _Said(NamedTuple):
    """What a rank says of its step."""

    subject: str
    entries: dict[str, _Entry]
    known: list[str]  # names in its param store
    statistics: list[str]
    alike: Any


class AveragedGradients:
    """The mean of the gradients over the ranks of a group.

    Arguments:
        process_group: the group, or a mesh of one dimension.
        describe: given a parameter's name and itself, what has to be the same for it on all ranks, such as
            its options and its state; asked when the parameter is met.

    Raises:
        ValueError: if it is no group that this process belongs to.
    """

    _counts: ClassVar[dict[tuple[int, ...], int]] = defaultdict(int)

    def __init__(self, process_group: Any, describe: Callable[[str, Tensor], Any]) -> None:
        self.group = Group.of("process_group", process_group)
        self._seeds = SameSeeds(self.group)
        self._begin(describe)

    def _begin(self, describe: Callable[[str, Tensor], Any]) -> None:
        # Optimisers are made in the same order on all ranks, so this is one name for one of them.
        ranks = tuple(self.group.world_ranks)
        self._counts[ranks] += 1
        self._subject = f"those of optimiser {self._counts[ranks]}"
        self._describe = describe
        self._batch_norms = BatchNorms(enabled=self.group.size > 1)
        #: Whether the last step failed in here, of which all ranks have learnt.
        self.broken = False

    def copy(self, describe: Callable[[str, Tensor], Any]) -> AveragedGradients:
        """The same for another optimiser; a process group itself cannot be copied."""
        other = object.__new__(AveragedGradients)
        other.group, other._seeds = self.group, self._seeds
        other._begin(describe)
        return other

    def report(self, error: Exception) -> None:
        """Tell the ranks that wait for this one's gradients that there will be none."""
        self.group.tell(_GRADIENTS, error)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.report(error)
            raise

    def leave_seeds(self) -> None:
        """Do not look whether the ranks draw the same random numbers: they are to."""
        self._seeds.leave()

    def __call__(self, params: Iterable[Tensor], met: set[Tensor], alike: Any = ()) -> set[Tensor]:
        """Average the gradients, in place.

        Arguments:
            params: the parameters of this rank's step.
            met: those of the steps before.
            alike: what else has to be the same on all ranks.

        Returns:
            The parameters of all ranks' steps.

        Raises:
            ValueError: if a parameter is not in Pyro's param store.
            RankError: if another rank has failed, a gradient is NaN, or they differ in what has to be alike.
        """
        params = set(params)
        if self.group.size == 1:
            return params
        self.broken = True
        try:
            params = self._averaged(params, met, alike)
        except Exception:
            for param in params:
                param.grad = None  # else the next step would add to it
            raise
        self.broken = False
        return params

    def _averaged(self, params: set[Tensor], met: set[Tensor], alike: Any) -> set[Tensor]:
        statistics = dict(self._batch_norms.statistics())
        # The rank that new values come from, by name.
        sources: dict[str, int] = defaultdict(int)
        with self._told():
            named = _by_name(params)
            used = set(named)
            entries = {name: _entry(param, param not in met) for name, param in named.items()}
        mine = self._subject, entries, sorted(statistics), alike
        heard = self.group.say(_GRADIENTS, words=[zlib.crc32(repr(mine).encode())])
        if any(theirs != heard[0] for theirs in heard):
            known = list(pyro.get_param_store().keys())
            told = self.group.hear(_Said(self._subject, entries, known, sorted(statistics), alike))
            entries, sources = self._unite(told)
            self._take_over(named, entries, sources, told)
            common = set.intersection(*(set(said.statistics) for said in told))
            statistics = {name: value for name, value in statistics.items() if name in common}
        new = [name for name, entry in entries.items() if entry.is_new]
        weight, total = 1.0, float(self.group.size)
        if new:
            weight, total = self._settle(new, named, sources, used)
        tensors = dict(statistics)
        for name, entry in entries.items():
            param = named[name]
            if entry.layout is not None and param.grad is None:
                param.grad = torch.zeros_like(param, layout=entry.layout)
            if param.grad is not None:
                tensors[name] = param.grad
        self._average(tensors, weight, total)
        self._batch_norms.after_step(bool(new))
        self._seeds.look()
        return {named[name] for name in entries}

    def _unite(self, told: Sequence[_Said]) -> tuple[dict[str, _Entry], dict[str, int]]:
        """The parameters of all ranks, in the order of their names, and which rank has their values."""
        union: dict[str, _Entry] = {}
        sources: dict[str, int] = {}
        ranks = self.group.world_ranks
        for place, said in enumerate(told):
            if said.subject != told[0].subject:
                raise RankError(
                    f"Of {_GRADIENTS}, rank {ranks[0]} brings {told[0].subject}, rank {ranks[place]} "
                    f"{said.subject}. Make the "
                    "optimisers, and take the steps, in the same order on all ranks."
                )
            if said.alike != told[0].alike:
                raise RankError(
                    f"Rank {ranks[0]} has the learning rates {told[0].alike}, rank "
                    f"{ranks[place]} {said.alike}. Step schedulers alike; one that follows the loss, by the "
                    "mean of all ranks' losses."
                )
            for name, entry in said.entries.items():
                before = union.setdefault(name, entry)
                source = sources.setdefault(name, place)
                layouts = {entry.layout, before.layout} - {None}
                if (entry.shape, entry.dtype) != (before.shape, before.dtype) or len(layouts) > 1:
                    raise RankError(
                        f"Parameter {name!r} is {_in_words(before)} on rank {ranks[source]} and "
                        f"{_in_words(entry)} on rank {ranks[place]}. One with an entry for each datapoint "
                        "has to be made for those of all ranks, and indexed by those of the minibatch."
                    )
                if before.is_new and not entry.is_new:
                    sources[name] = place
                union[name] = before._replace(
                    is_new=before.is_new or entry.is_new, layout=before.layout or entry.layout
                )
        return dict(sorted(union.items())), sources

    def _take_over(
        self,
        named: dict[str, Tensor],
        entries: Mapping[str, _Entry],
        sources: Mapping[str, int],
        told: Sequence[_Said],
    ) -> None:
        """Add the parameters that this rank's step did not use, and make those that it does not have."""
        store = pyro.get_param_store()
        ranks = self.group.world_ranks
        lacking = sorted(name for name in entries if any(name not in said.known for said in told))
        if lacking:
            for name in lacking:
                if "$$$" in name:  # a module keeps its own parameter, whatever the store has by its name
                    without = [ranks[place] for place, said in enumerate(told) if name not in said.known]
                    raise RankError(
                        f"Parameter {name!r} of a module is used by rank {ranks[sources[name]]}, and rank "
                        f"{without[0]} has not registered it. Call pyro.module for it on all ranks, before "
                        "the first step that uses it."
                    )
            constraints = store.get_state()["constraints"]
            own = {name: store[name].detach() for name in lacking if sources[name] == self.group.rank}
            here = {param.device.type: param.device for _, param in store.named_parameters()}
            for made in self.group.hear(
                {name: (value.cpu(), value.device.type, constraints[name]) for name, value in own.items()}
            ):
                for name, (value, kind, constraint) in made.items():
                    if name not in told[self.group.rank].known:
                        # Each rank has a device of its own, of one kind on all of them.
                        store.setdefault(name, value.to(here.get(kind, kind)), constraint)
        everything = dict(store.named_parameters())
        for name in entries.keys() - named.keys():
            named[name] = everything[name]
            named[name].grad = None  # of another loss

    def _settle(
        self,
        new: Sequence[str],
        named: Mapping[str, Tensor],
        sources: Mapping[str, int],
        used: Collection[str],
    ) -> tuple[float, float]:
        """Give new parameters the same values on all ranks.

        Returns:
            The weight of this rank's gradients in this step, and the sum of those of all ranks.
        """
        ranks = self.group.world_ranks
        described = {name: _digest(self._describe(name, named[name])) for name in new}
        told = self.group.hear(described)
        for name in new:
            for rank, theirs in zip(ranks, told, strict=True):
                if theirs[name] != told[0][name]:
                    raise RankError(
                        f"Parameter {name!r} has another optimiser, or another state or other options of it "
                        f"(clip_args included), on rank {rank} than on rank {ranks[0]}. Load a checkpoint on "
                        "all ranks, and give them the same options."
                    )
        is_at_home = True
        for name in new:
            param = named[name]
            value = param.detach().clone()
            dist.broadcast(value, ranks[sources[name]], group=self.group.process_group)
            if not torch.equal(value, param):
                is_at_home = is_at_home and name not in used
                with torch.no_grad():
                    param.copy_(value)
        weights = self.group.hear(float(is_at_home))
        return weights[self.group.rank], max(sum(weights), 1.0)

    def _average(self, tensors: Mapping[str, Tensor], weight: float, total: float) -> None:
        """Replace tensors, by the names of their parameters, by their weighted mean over the ranks."""
        sent = []
        for bucket in _buckets(tensors.values()):
            if bucket[0].layout == torch.strided:
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            else:
                flat = bucket[0].coalesce()
            if weight == 0.0:
                flat.zero_()
            work = dist.all_reduce(flat, group=self.group.process_group, async_op=True)
            sent.append((bucket, flat, work))
        for _, _, work in sent:
            work.wait()
        # All ranks have the same sums, and so the same look at them.
        if any(bool(_values(flat).sum().isnan()) for _, flat, _ in sent):
            self._refuse_nan(tensors)
        for bucket, flat, _ in sent:
            flat.div_(total)
            if flat.layout != torch.strided:
                bucket[0].copy_(flat)
                continue
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _refuse_nan(self, tensors: Mapping[str, Tensor]) -> None:
        """Find the ranks that have made a sum NaN."""
        mine = [name for name, tensor in tensors.items() if not bool(_values(tensor).isfinite().all())]
        for rank, names in zip(self.group.world_ranks, self.group.hear(mine), strict=True):
            if names:
                raise RankError(
                    f"On rank {rank} the gradient of parameter {names[0]!r} is not finite, and all ranks' "
                    "parameters would be NaN. Look for it in that rank's data, or for too large a learning "
                    "rate."
                )


def _values(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.coalesce().values()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that travel together, in an order that follows from theirs; sparse ones alone."""
    open_buckets: dict[Any, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        if tensor.layout != torch.strided:
            yield [tensor]
            continue
        key = tensor.dtype, tensor.device
        bucket, size = open_buckets.get(key, ([], 0))
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        open_buckets[key] = bucket, size
        if size >= _BUCKET:
            yield open_buckets.pop(key)[0]
    for bucket, _ in open_buckets.values():
        yield bucket


def _by_name(params: Iterable[Tensor]) -> dict[str, Tensor]:
    """Parameters in the order of their names."""
    store = pyro.get_param_store()
    named = {}
    for param in params:
        name = store.param_name(param)
        if name is None:
            raise ValueError(
                f"A parameter of shape {list(param.shape)} is not in Pyro's param store, so that ranks "
                "cannot tell which of theirs it is. Outside SVI, or with module_local_params, train "
                "DistributedDataParallel(loss(model, guide)) by an optimiser of PyTorch's."
            )
        named[name] = param
    return dict(sorted(named.items()))


def _entry(param: Tensor, is_new: bool) -> _Entry:
    layout = None if param.grad is None else param.grad.layout
    return _Entry(tuple(param.shape), param.dtype, is_new, layout)


def _in_words(entry: _Entry) -> str:
    gradient = ", with a sparse gradient" if entry.layout not in (None, torch.strided) else ""
    return f"{list(entry.shape)} of {entry.dtype}{gradient}"


def _digest(described: Any) -> int:
    """A checksum of numbers, words and tensors in containers."""
    if isinstance(described, Tensor):
        return checksum(described)
    if isinstance(described, Mapping):
        described = sorted((str(key), _digest(value)) for key, value in described.items())
    elif isinstance(described, (list, tuple)):
        described = [_digest(value) for value in described]
    return zlib.crc32(repr(described).encode())
