"""What ranks exchange and compare, and random streams that do not depend on how many they are."""

from __future__ import annotations

import hashlib
import zlib

import torch
from torch import Tensor

from .group import Group

__all__ = ["checksum", "gather_rows", "seed_of"]


def seed_of(*names: object) -> int:
    """A seed for :func:`torch.manual_seed` that follows from some names alone: a seed, the index of a chunk.

    Example:
        >>> from pyro_iw.ranks.exchange import seed_of
        >>> seed_of(7, "chunk", 0) == seed_of(7, "chunk", 0), seed_of(7, "chunk", 0) == seed_of(7, "chunk", 1)
        (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=7).digest(), "big")


def checksum(tensor: Tensor) -> int:
    """Of the bits, dtype and shape of a tensor, which come to the CPU for it."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    kind = repr((tensor.dtype, list(tensor.shape))).encode()
    return zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), zlib.crc32(kind))


def gather_rows(group: Group, rows: Tensor) -> Tensor:
    """The rows of all ranks, in their order; ranks may have other numbers of them, of one shape and dtype.

    Arguments:
        group: the ranks.
        rows: of shape ``[n, ...]``, where n may be 0.
    """
    counts = group.hear(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    gathered = group.gather(padded)
    return torch.cat([gathered[rank, :count] for rank, count in enumerate(counts)])
