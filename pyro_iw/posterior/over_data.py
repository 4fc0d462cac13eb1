"""A data set whose parts are evaluated on different ranks, and the whole on each of them.

Ranks draw from streams of their own, which follow from the seed of the group's first rank: two datapoints
never share their noise, so that errors of ranks that started from the same seed are independent as well.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.utils.data import DistributedSampler

from .._support.random_state import RandomState
from .._support.warn import warn
from ..ranks.exchange import checksum, seed_of
from ..ranks.group import Group
from .evidence import LogMarginal

if TYPE_CHECKING:  # a PyTorch may be built without
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["NO_BATCH", "evaluate_over_ranks"]

NO_BATCH = "The loader gave no batch, so there is nothing to evaluate."


def evaluate_over_ranks(
    evaluate: Callable[[Iterable[Any], Group | None], LogMarginal | None],
    loader: Iterable[Any],
    data_group: ProcessGroup | DeviceMesh | None,
    indices: Sequence[int] | Tensor | None,
) -> LogMarginal:
    """The log evidence of a data set, of which each rank evaluates what its loader gives.

    Arguments:
        evaluate: evaluates a loader's batches, and is told of the ranks; None if there is no batch.
        loader: this rank's.
        data_group: the ranks; None if this process is alone.
        indices: which datapoints of the data set the loader gives, in its order. None for those of its
            :class:`~torch.utils.data.DistributedSampler`; without one the parts come one after the other.

    Returns:
        The whole, in the order of the indices, of which each counts once however often it was evaluated.

    Raises:
        ValueError: if there is no batch; or the ranks' parts are no parts of a whole.
    """
    if data_group is None:
        if indices is not None:
            raise ValueError(
                "indices= tells apart what the ranks of data_group= evaluate. Pass that as well."
            )
        alone = evaluate(loader, None)
        if alone is None:
            raise ValueError(NO_BATCH)
        return alone
    group = Group.of("data_group", data_group)
    own = int(torch.randint(2**62, ()))
    state = RandomState.now()
    try:
        with group.meeting("data_group, the data set"):
            total, known = _known(loader, group, indices)
        seed = group.hear(own)[0]
        torch.manual_seed(seed_of(seed, "data", group.rank))
        watched = loader if known is not None else _Fingerprint(loader)
        with group.meeting("data_group, the log evidence of each rank's part") as brought:
            # A handler of another kind would keep the evaluation from being compiled.
            with poutine.trace(param_only=True) as parameters:
                part = evaluate(watched, group)
            count = 0 if part is None else len(part.values)
            if known is not None and count != len(known):
                raise ValueError(
                    f"The loader gave {count} datapoints, but there are indices of {len(known)}. (A "
                    "DataLoader with drop_last=True drops those of the last batch, and an iterator gives its "
                    "batches once.)"
                )
            brought += ["with indices" if known is not None else "without indices", total]
    finally:
        state.restore()
    mark = watched.mark if isinstance(watched, _Fingerprint) else None
    nodes: dict[str, Any] = parameters.trace.nodes
    sums = {name: checksum(site["value"]) for name, site in nodes.items()}
    told = group.hear((None if part is None else _on_cpu(part), known, mark, sums))
    there = [(each, places) for each, places, *_ in told if each is not None]
    if not there:
        raise ValueError(NO_BATCH)
    if known is None:
        _refuse_the_same([None if part is None else mark for part, _, mark, _ in told], group)
        whole = LogMarginal.join([each for each, _ in there])
    else:
        whole = _join_once(there, total)
    _warn_of_other_parameters([sums for *_, sums in told], group)
    device = torch.device("cpu") if part is None else part.values.device
    return _mapped(whole, lambda column: column.to(device))


def _known(
    loader: Iterable[Any], group: Group, indices: Sequence[int] | Tensor | None
) -> tuple[int | None, Tensor | None]:
    """The size of the whole data set and the datapoints that a loader gives, as far as they are known."""
    if indices is not None:
        return None, torch.as_tensor(indices, device="cpu").reshape(-1)
    sampler: Any = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None, None
    if (sampler.num_replicas, sampler.rank) != (group.size, group.rank):
        raise ValueError(
            f"The loader's DistributedSampler is of rank {sampler.rank} among {sampler.num_replicas}, but "
            f"this is rank {group.rank} among the {group.size} of data_group=. Pass it "
            f"num_replicas={group.size} and rank=torch.distributed.get_rank(group), of that group."
        )
    dataset: Any = sampler.dataset
    return len(dataset), torch.tensor(list(sampler))


def _join_once(there: Sequence[tuple[LogMarginal, Tensor]], total: int | None) -> LogMarginal:
    """The parts as a whole, with each datapoint's first value where it was evaluated more than once."""
    seen: set[int] = set()
    parts, indices = [], []
    for part, places in there:
        keep: list[int] = []
        for row, place in enumerate(places.tolist()):
            if place not in seen:
                seen.add(place)
                keep.append(row)
        rows = torch.tensor(keep, dtype=torch.long)
        parts.append(_mapped(part, partial(torch.index_select, dim=0, index=rows)))
        indices.append(places[rows])
    if total is not None and len(seen) < total:
        raise ValueError(
            f"The ranks evaluated {len(seen)} of the {total} datapoints: the DistributedSampler drops "
            "the others (drop_last=True). Leave that to its default, which pads instead; here padding counts "
            "once."
        )
    return LogMarginal.join(parts, indices)


def _mapped(result: LogMarginal, function: Callable[[Tensor], Tensor]) -> LogMarginal:
    """The same with a function applied to each of its columns."""
    columns: dict[str, Any] = {
        field.name: function(value)
        for field in dataclasses.fields(result)
        if isinstance(value := getattr(result, field.name), Tensor)
    }
    return dataclasses.replace(result, **columns)


def _on_cpu(result: LogMarginal) -> LogMarginal:
    return _mapped(result, lambda column: column.cpu())


def _refuse_the_same(marks: Sequence[int | None], group: Group) -> None:
    """Refuse ranks that have evaluated the same data as others."""
    ranks: dict[int, list[int]] = defaultdict(list)
    for rank, mark in zip(group.world_ranks, marks, strict=True):
        if mark is not None:
            ranks[mark].append(rank)
    same = next((found for found in ranks.values() if len(found) > 1), None)
    if same is not None:
        raise ValueError(
            f"Ranks {', '.join(map(str, same))} of data_group= evaluated the same data, which would "
            f"count {len(same)} times. Give each rank a part of its own: a DataLoader with a "
            "DistributedSampler, or data[rank::size] with indices=range(rank, N, size). (If the parts are "
            "alike but not the same, say by indices= which datapoints each has. Ranks that share particles "
            "do not belong to one data_group.)"
        )


def _warn_of_other_parameters(said: Sequence[Mapping[str, int]], group: Group) -> None:
    """Warn of ranks whose values are of other models."""
    known: dict[str, tuple[int, int]] = {}  # by name, the first rank that has it, and its value's sum
    for rank, sums in zip(group.world_ranks, said, strict=True):
        others = [name for name, value in sums.items() if known.setdefault(name, (rank, value))[1] != value]
        if others:
            names = ", ".join(map(repr, others[:3])) + (", ..." if len(others) > 3 else "")
            warn(
                f"Rank {rank} of data_group= has evaluated its part with other values of parameter(s) "
                f"{names} than rank {known[others[0]][0]}. Values under several models are no log evidence "
                "of a data set: load one checkpoint on all ranks, or broadcast the parameters. (What the "
                "guide alone uses may differ, such as parameters fitted to a rank's own datapoints.)"
            )
            return


class _Fingerprint:
    """A loader that knows by a number what it has given, in whatever order and batches."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.mark = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.mark = (self.mark + sum(map(zlib.crc32, _rows(batch)))) % 2**62
            yield batch

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


def _rows(batch: Any) -> Iterator[bytes]:
    """The rows of all tensors in a batch, and what else is in there."""
    if isinstance(batch, Tensor):
        batch = batch.detach().cpu()
        rows = batch.unsqueeze(1) if batch.dim() == 1 else torch.atleast_2d(batch)
        yield from (row.tobytes() for row in rows.flatten(1).contiguous().view(torch.uint8).numpy())
    elif isinstance(batch, np.ndarray):
        yield from (row.tobytes() for row in np.atleast_1d(batch))
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _rows(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for value in batch:
            yield from _rows(value)
    else:
        yield repr(batch).encode()
