"""The processes that share a task, and meetings at which all of them go on or all of them stop.

A collective operation that one process never reaches hangs, or, where the next one comes in its place, mixes
up numbers in silence. So everything that is exchanged here is exchanged at a *meeting*: each rank says first
how it fared and what it brings, in a few integers on the CPU; if one has failed, or they do not bring the
same, every rank raises, and the error names the rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Group", "RankError"]

_FINE, _FAILED = 0, 1


class RankError(RuntimeError):
    """One of the processes that share a task has failed, or does something else than the others."""


class Group:
    """The processes that share a task.

    Arguments:
        name: the argument that the user passed the group as, for messages.
        group: a process group, or a mesh of one dimension, to which this process belongs.

    Attributes:
        size: the number of processes P.
        rank: the place of this one, from 0 to P - 1.

    Raises:
        ValueError: if it is no such thing, has several dimensions, or this process does not belong to it.
    """

    def __init__(self, name: str, group: ProcessGroup | DeviceMesh) -> None:
        self.process_group = _as_process_group(name, group)
        self.size = dist.get_world_size(self.process_group)
        self.rank = dist.get_rank(self.process_group)
        if self.rank < 0:
            raise ValueError(f"{name} is a group that this process (rank {dist.get_rank()}) is not part of")
        #: Ranks in the world, by which a message names a process.
        self.world_ranks: list[int] = dist.get_process_group_ranks(self.process_group)
        self._words = self.process_group
        if self.size > 1 and "gloo" not in str(dist.get_backend_config(self.process_group)):
            # Words go over the CPU: to read them from an accelerator would mean to wait for it.
            self._words = dist.new_group(self.world_ranks, backend="gloo", use_local_synchronization=True)

    @contextmanager
    def meeting(self, subject: str) -> Iterator[list[Any]]:
        """Do something that may fail on one rank, and learn whether it has succeeded on all.

        To the list that it yields, the block appends what must be the same on all ranks, such as shapes and
        dtypes. Every rank of the group has to come to every meeting, in the same order.

        Arguments:
            subject: what is done, for messages: ``"the log-weights of a step"``.

        Raises:
            RankError: on every rank but that which failed (where its own error goes on) if one fails; on all
                ranks if they do not bring the same.
        """
        brought: list[Any] = []
        failure: Exception | None = None
        try:
            yield brought
        except Exception as error:
            failure = error
        if self.size > 1:
            try:
                self._compare(subject, brought, failure)
            except RankError:
                if failure is None:
                    raise
        if failure is not None:
            raise failure

    def _compare(self, subject: str, brought: Sequence[Any], failure: Exception | None) -> None:
        said = repr((subject, *brought))
        mine = torch.tensor([_FINE if failure is None else _FAILED, zlib.crc32(said.encode())])
        all_of_them = self._gather(mine, self._words)
        if (all_of_them == torch.tensor([_FINE, int(mine[1])])).all():
            return
        if failure is not None:
            said = f"{type(failure).__name__}: {failure}"
        said_by: list[Any] = [None] * self.size
        dist.all_gather_object(said_by, said, group=self._words)
        failed = (all_of_them[:, 0] == _FAILED).nonzero()[:, 0].tolist()
        if failed:
            which = "; ".join(f"rank {self.world_ranks[i]} raised {said_by[i]}" for i in failed)
            raise RankError(f"{subject}: {which}")
        which = "; ".join(
            f"rank {rank} has {words}" for rank, words in zip(self.world_ranks, said_by, strict=True)
        )
        raise RankError(f"{subject}: the ranks do not bring the same. {which}")

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape and dtype, as ``[P, *shape]``; detached."""
        if self.size == 1:
            return tensor.detach().unsqueeze(0)
        return self._gather(tensor, self.process_group)

    def _gather(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=group)
        return torch.stack(parts)


def _as_process_group(name: str, group: Any) -> ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{name} needs processes that know of one another. Start the script by torchrun, and call "
            "torch.distributed.init_process_group first."
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or ()
            example = (
                f"mesh[{names[-1]!r}]" if names else "mesh['particles'] of a mesh whose dimensions have names"
            )
            raise ValueError(f"{name} is a mesh of {group.ndim} dimensions. Pass one of them: {example}.")
        return group.get_group()
    if not isinstance(group, ProcessGroup):
        raise ValueError(
            f"{name} must be a torch.distributed.ProcessGroup or a DeviceMesh of one dimension, got {group!r}"
        )
    return group
