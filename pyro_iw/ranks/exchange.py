"""What ranks exchange once they have met, and random streams that do not depend on how many they are."""

from __future__ import annotations

import hashlib
import pickle
from typing import Any

import torch
from torch import Tensor

from .group import Group

__all__ = ["gather_rows", "seed_of", "tell"]


def seed_of(*names: object) -> int:
    """A seed for :func:`torch.manual_seed` that follows from some names alone: a seed, the index of a chunk.

    Example:
        >>> from pyro_iw.ranks.exchange import seed_of
        >>> seed_of(7, "chunk", 0) == seed_of(7, "chunk", 0), seed_of(7, "chunk", 0) == seed_of(7, "chunk", 1)
        (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=7).digest(), "big")


def tell(group: Group, said: Any) -> list[Any]:
    """What every rank says, by rank: small things that can be pickled, tensors among them on the CPU."""
    if group.size == 1:
        return [said]
    mine = torch.frombuffer(bytearray(pickle.dumps(said)), dtype=torch.uint8)
    sizes = group._gather(torch.tensor([len(mine)]), group._words)[:, 0].tolist()
    padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
    answers = group._gather(padded, group._words)
    return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(answers, sizes, strict=True)]


def gather_rows(group: Group, rows: Tensor) -> Tensor:
    """The rows of all ranks, in their order; ranks may have other numbers of them, of one shape and dtype.

    Arguments:
        group: the ranks.
        rows: of shape ``[n, ...]``, where n may be 0.
    """
    counts = tell(group, len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    gathered = group.gather(padded)
    return torch.cat([gathered[rank, :count] for rank, count in enumerate(counts)])
