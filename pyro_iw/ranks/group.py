"""The processes that share a task, and meetings at which all of them go on or all of them stop.

A collective operation that one process never reaches hangs, or, where the next one comes in its place, mixes
up numbers in silence. So everything that is exchanged here is exchanged at a *meeting*: each rank says how it
fared and what it brings, in a few integers on the CPU; if one has failed, or they do not bring the same,
every rank raises, and the error names the rank.

On a CPU those words travel in front of the tensor that is exchanged, if that is small, in one collective
operation. For the ranks not to meet in operations of different sizes, at which gloo ends the process, all
meetings of a group have the size of the last such tensor, whatever they are about and whoever calls them: a
rank that fails early, or is at another meeting than the others, fills that room with nothing. So there is one
:class:`Group` of a process group, which losses, optimisers and samplers share: :meth:`Group.of`.
"""

from __future__ import annotations

import datetime
import pickle
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # a PyTorch may be built without
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["WORDS", "Group", "RankError", "as_process_group"]

#: How many integers a rank may say at a meeting, beside how it fared and what it brings.
WORDS = 6

_FINE, _FAILED = 0, 1

#: What ``torch.distributed.new_group`` gives to processes that it leaves out.
_NOT_A_MEMBER: Any = dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else object()

#: Bytes of a tensor that still travels with the words; every meeting may come to have this size.
_SMALL = 2**14

#: The attribute of an error that says which ranks know of it.
_KNOWING = "_known_to_ranks"

#: How long a rank waits, after a failed operation, for the others to say that they are still there.
_GRACE = datetime.timedelta(seconds=5)


class RankError(RuntimeError):
    """One of the processes that share a task has failed, or does something else than the others.

    Raised on all of them, but that on a rank which failed its own error goes on; the message names that rank.
    After one of a loss or an evaluation all ranks may go on, say with the next minibatch; after one that says
    that a rank did not come they may not.

    Example:
        >>> def step():  # on a rank that is fine itself
        ...     raise RankError("the log-weights of a step: rank 1 raised KeyError: 'labels'")
        >>> try:
        ...     step()
        ... except RankError as error:
        ...     print(f"stopped, since of {error}")
        stopped, since of the log-weights of a step: rank 1 raised KeyError: 'labels'
    """


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

    _known: ClassVar[dict[Any, Group]] = {}

    @classmethod
    def of(cls, name: str, group: ProcessGroup | DeviceMesh) -> Group:
        """The processes of a group, the same object whoever asks for them; as of the class."""
        key = as_process_group(name, group)
        if key not in cls._known:
            cls._known[key] = cls(name, key)
        return cls._known[key]

    def __init__(self, name: str, group: ProcessGroup | DeviceMesh) -> None:
        self.process_group = as_process_group(name, group)
        self.size = dist.get_world_size(self.process_group)
        self.rank = dist.get_rank(self.process_group)
        #: Ranks in the world, by which a message names a process.
        self.world_ranks: list[int] = dist.get_process_group_ranks(self.process_group)
        self._words = self.process_group
        if self.size > 1 and "gloo" not in str(dist.get_backend_config(self.process_group)):
            # Words go over the CPU: to read them from an accelerator would mean to wait for it.
            self._words = dist.new_group(self.world_ranks, backend="gloo", use_local_synchronization=True)
        self._room = 0  # bytes for a tensor at every meeting, the same on all ranks
        self._meetings = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a copy of what uses it meets the same ranks, at meetings that are counted here

    @contextmanager
    def meeting(self, subject: str) -> Iterator[list[Any]]:
        """Do something that may fail on one rank, and learn whether it has succeeded on all.

        To the list that it yields, the block appends what must be the same on all ranks, such as shapes and
        dtypes. Every rank of the group has to come to every meeting, in the same order.

        Arguments:
            subject: what is done, for messages: ``"the log-weights of a step"``.

        Raises:
            RankError: on every rank but that which failed (where its own error goes on) if one fails; on all
                ranks if they do not bring the same, or one of them does not come.
        """
        brought: list[Any] = []
        try:
            yield brought
        except Exception as error:
            self.tell(subject, error)
            raise
        self.say(subject, brought)

    def tell(self, subject: str, failure: Exception) -> None:
        """Come to a meeting with the news that this rank has failed; the others raise it by its name.

        Of a failure that all of them have heard of, at a meeting of these or more ranks, nobody tells twice:
        they may have left the step, and be at no meeting any more.

        Arguments:
            subject: what it failed at.
            failure: its error.
        """
        if self.size > 1 and not _knowing(failure).issuperset(self.world_ranks):
            with suppress(RankError):
                self._meet(subject, f"{type(failure).__name__}: {failure}", failed=True)
            self._known_to_all(failure)

    def _known_to_all(self, failure: Exception) -> Exception:
        with suppress(AttributeError):  # of an error that takes no attributes
            setattr(failure, _KNOWING, _knowing(failure).union(self.world_ranks))
        return failure

    def say(self, subject: str, brought: Sequence[Any] = (), words: Sequence[int] = ()) -> list[list[int]]:
        """Exchange a few integers.

        Arguments:
            subject: what for; the same on all ranks.
            brought: what else must be the same on all ranks.
            words: the integers, no more than :data:`WORDS`; those left out are 0.

        Returns:
            Those of all ranks, in their order.

        Raises:
            RankError: as of :meth:`meeting`.
        """
        if self.size == 1:
            return [[*words]]
        return self._meet(subject, repr((subject, *brought)), words)[0]

    def exchange(
        self, subject: str, tensor: Tensor, brought: Sequence[Any] = (), words: Sequence[int] = ()
    ) -> tuple[list[list[int]], Tensor]:
        """Exchange tensors of one shape and dtype, and a few integers.

        On a CPU that is one operation, in which each rank sends 64 bytes and those of its tensor, rounded up
        to 8, if that is small; larger ones, and those on an accelerator, go apart from the words, and nothing
        waits for the device.

        Arguments:
            subject: what for; the same on all ranks.
            tensor: that of this rank.
            brought: what must be the same on all ranks, beside shape and dtype.
            words: as of :meth:`say`.

        Returns:
            The integers of all ranks; their tensors as ``[P, *shape]``, detached.

        Raises:
            RankError: as of :meth:`meeting`.
        """
        tensor = tensor.detach().contiguous()
        if self.size == 1:
            return [[*words]], tensor.unsqueeze(0)
        said = repr((subject, *brought, tensor.dtype, list(tensor.shape)))
        size = -(-tensor.numel() * tensor.element_size() // 8) * 8
        if tensor.device.type != "cpu" or size > _SMALL:
            heard, _ = self._meet(subject, said, words)
            return heard, self._gather(tensor, self.process_group)
        if size != self._room:
            self._meet(subject, said, words)
            self._room = size
        heard, everything = self._meet(subject, said, words, tensor)
        own = tensor.numel() * tensor.element_size()
        return heard, everything[:, :own].view(tensor.dtype).reshape(self.size, *tensor.shape)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape and dtype, as ``[P, *shape]``; detached."""
        if self.size == 1:
            return tensor.detach().unsqueeze(0)
        return self._gather(tensor, self.process_group)

    def hear(self, words: Any) -> list[Any]:
        """What every rank says, by rank: small things that can be pickled, tensors among them on the CPU.

        Two operations, so for what is rare.
        """
        if self.size == 1:
            return [words]
        mine = torch.frombuffer(bytearray(pickle.dumps(words)), dtype=torch.uint8)
        sizes = self._gather(torch.tensor([len(mine)]), self._words)[:, 0].tolist()
        padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
        rows = zip(self._gather(padded, self._words), sizes, strict=True)
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in rows]

    def _meet(
        self,
        subject: str,
        said: str,
        words: Sequence[int] = (),
        tensor: Tensor | None = None,
        failed: bool = False,
    ) -> tuple[list[list[int]], Tensor]:
        """One operation: the words of all ranks, and the bytes of their tensors."""
        self._meetings += 1
        room = -(-self._room // 8)
        mine = torch.zeros(2 + WORDS + room, dtype=torch.int64)
        crc = zlib.crc32(said.encode())
        mine[: 2 + len(words)] = torch.tensor([_FAILED if failed else _FINE, crc, *words])
        if tensor is not None:
            flat = tensor.reshape(-1).view(torch.uint8)
            mine[2 + WORDS :].view(torch.uint8)[: flat.numel()] = flat
        all_of_them = self._gather(mine, self._words)
        heard: list[list[int]] = all_of_them[:, : 2 + WORDS].tolist()
        if any(row[:2] != [_FINE, crc] for row in heard):
            self._refuse(subject, said, [row[0] == _FAILED for row in heard])
        return [row[2:] for row in heard], all_of_them[:, 2 + WORDS :].contiguous().view(torch.uint8)

    def _refuse(self, subject: str, said: str, failed: list[bool]) -> None:
        """Learn from all ranks what they said, and raise."""
        each = list(zip(self.world_ranks, self.hear(said), failed, strict=True))
        if any(failed):
            which = "; ".join(f"rank {rank} raised {words}" for rank, words, is_so in each if is_so)
            raise self._known_to_all(RankError(f"{subject}: {which}"))
        which = "; ".join(f"rank {rank} has {words}" for rank, words, _ in each)
        raise self._known_to_all(RankError(f"{subject}: the ranks do not bring the same. {which}"))

    def _gather(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        tensor = tensor.detach().contiguous()
        everything = tensor.new_empty((self.size, *tensor.shape))
        try:
            dist.all_gather(list(everything.unbind(0)), tensor, group=group)
        except RuntimeError as error:
            raise self._known_to_all(RankError(self._who_is_missing(error))) from error
        return everything

    def _who_is_missing(self, error: RuntimeError) -> str:
        """Of the ranks that share a failed operation, those who do not say that it failed for them too."""
        others = [rank for rank in self.world_ranks if rank != self.world_ranks[self.rank]]
        said = f"({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        try:
            store = self._words.get_group_store()
            keys = {rank: f"pyro_iw/missing/{self._meetings}/{rank}" for rank in self.world_ranks}
            store.set(keys[self.world_ranks[self.rank]], "here")
            with suppress(RuntimeError):
                store.wait([keys[rank] for rank in others], _GRACE)
            missing = [rank for rank in others if not store.check([keys[rank]])]
        except (RuntimeError, AttributeError):  # it went with its process, or this PyTorch does not give it
            who = "Rank" if len(others) == 1 else "One of the ranks"
            return f"{who} {_listed(others)} has ended or does not answer {said}."
        if not missing:
            return f"An exchange between the ranks {_listed(self.world_ranks)} failed on all of them {said}."
        return (
            f"Rank {_listed(missing)} did not come to an exchange with rank "
            f"{_listed([rank for rank in self.world_ranks if rank not in missing])}, and gives no sign of "
            f"life: it has ended, has failed outside of the loss, or waits for something else {said}. Look "
            "at its own output."
        )


def _knowing(failure: Exception) -> frozenset[int]:
    """The ranks in the world that have heard of an error."""
    return getattr(failure, _KNOWING, frozenset())


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def as_process_group(name: str, group: Any) -> ProcessGroup:
    """What the user passed as a group; arguments and errors are as of :class:`Group`."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{name} needs processes that know of one another. Start the script by torchrun, and call "
            "torch.distributed.init_process_group first."
        )
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or ()
            example = (
                f"mesh[{names[-1]!r}]" if names else "mesh['particles'] of a mesh whose dimensions have names"
            )
            raise ValueError(f"{name} is a mesh of {group.ndim} dimensions. Pass one of them: {example}.")
        group = _NOT_A_MEMBER if group.get_coordinate() is None else group.get_group()
    if isinstance(group, type(_NOT_A_MEMBER)) and group == _NOT_A_MEMBER:
        raise ValueError(
            f"{name} is a group that this process (rank {dist.get_rank()}) is not part of. Pass the one that "
            "it is in, or leave the argument out."
        )
    if not isinstance(group, ProcessGroup):
        raise ValueError(
            f"{name} must be a torch.distributed.ProcessGroup or a DeviceMesh of one dimension, got {group!r}"
        )
    return group
