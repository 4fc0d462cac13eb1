"""Arguments that many take, checked and brought into one form."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["as_plate_names", "check_loader", "positive_integer", "read_batch", "weight_of_kl"]


def positive_integer(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return number


def as_plate_names(plates: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """The names as a tuple, with None for None; ValueError unless they are names."""
    if plates is None:
        return None
    names = (plates,) if isinstance(plates, str) else tuple(dict.fromkeys(plates))
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"plates must be a name or names of plates, got {plates!r}")
    return names


def check_loader(loader: Any) -> None:
    """Refuse what would give its rows one by one, where batches are meant."""
    if isinstance(loader, Tensor | np.ndarray | Dataset):
        raise ValueError(
            f"A {type(loader).__name__} gives single datapoints and not batches. Pass a DataLoader of it, "
            "data.split(100), or [data] for all in one batch."
        )


def read_batch(batch: Any, to_args: Callable[[Any], Any] | None = None) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments of model and guide from a loader's batch.

    Arguments:
        batch: a tuple or list of positional arguments, a dict of keyword arguments, or the only argument.
        to_args: makes one of these of what the loader gives.
    """
    given = batch if to_args is None else to_args(batch)
    if isinstance(given, dict):
        return (), given
    return (tuple(given) if isinstance(given, tuple | list) else (given,)), {}


def weight_of_kl(kl_weight: float) -> float:
    """The weight of the KL term; ValueError unless it is a finite number >= 0."""
    is_number = isinstance(kl_weight, numbers.Real) and not isinstance(kl_weight, bool)
    is_number = is_number or (isinstance(kl_weight, Tensor) and kl_weight.numel() == 1)
    if not is_number or not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight must be a finite number >= 0, got {kl_weight!r}")
    return kl_weight
