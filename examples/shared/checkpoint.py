"""Files that are whole or absent: checkpoints and JSON that survive a kill, a full disk and a flipped bit.

A file is written beside its place and moved there in one go, so that what is read is always what some
write has finished.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_iw._support.devices import accelerator
from pyro_iw._support.random_state import RandomState

__all__ = [
    "load",
    "random_state",
    "read_torch",
    "restore_random_state",
    "save",
    "write_arrays",
    "write_bytes",
    "write_json",
    "write_torch",
]


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file, or leave it as it is.

    Raises:
        OSError: If the content cannot be written; the file then holds what it held before.
    """
    # One name for all attempts: what a kill leaves behind, the next write takes over.
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            # Else a power cut could leave the new name with nothing behind it.
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if unfinished.is_file():
            unfinished.unlink()
        raise OSError(f"cannot write {path} ({error}); what it held before is untouched") from error


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, or leave it as it is."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Replace a file of NumPy's (``.npz``) with tensors by name, or leave it as it is."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.numpy() for name, tensor in arrays.items()})
    write_bytes(path, buffer.getvalue())


def write_torch(path: Path, content: Any) -> None:
    """Replace a file of PyTorch's, or leave it as it is."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def read_torch(path: Path) -> Any:
    """What :func:`write_torch` has written, on the CPU; an error of any kind if it is damaged."""
    content = path.read_bytes()
    # torch.load itself does not look at the checksums: a flipped bit would be a changed weight.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged}")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def save(path: Path, kind: str, state: dict[str, Any]) -> None:
    """Replace a checkpoint, or leave it as it is.

    Arguments:
        path: The file.
        kind: What program it is of, so that none takes another's.
        state: Tensors, numbers, strings and containers of these.
    """
    write_torch(path, {"kind": kind, "state": state})


def load(path: Path, kind: str) -> dict[str, Any]:
    """What :func:`save` has written, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or of another kind.
    """
    try:
        saved = read_torch(path)
        if saved["kind"] != kind:
            raise ValueError(f"it is of {saved['kind']}")
        return saved["state"]
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file stops the unpickler with
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is no checkpoint of {kind}, or a damaged one ({reason})") from error


def random_state() -> dict[str, Any]:
    """The state of PyTorch's, NumPy's and Python's global generators, for :func:`save`."""
    state = RandomState.now()
    name, keys, *rest = state.numpy
    return {
        "cpu": state.cpu,
        "devices": state.devices,
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": state.python,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on from what :func:`random_state` gave; on a machine with fewer accelerators, without theirs."""
    saved = state["devices"] if "devices" in state else state["cuda"]  # as checkpoints of version 0.1 have it
    kind = accelerator()
    devices = [] if kind is None else saved[: torch.get_device_module(kind).device_count()]
    name, keys, *rest = state["numpy"]
    RandomState(
        state["cpu"], devices, (name, keys.numpy().astype(np.uint32), *rest), state["python"]
    ).restore()
