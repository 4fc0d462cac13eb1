"""One look for all progress bars: on a terminal, on runs of more than two seconds, and gone when they end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["length_of", "progress_bar"]


def progress_bar(iterable: Any = None, *, show: bool, **options: Any) -> tqdm:
    """A progress bar, if it is to be shown at all; ``options`` are tqdm's.

    A log file would get a line for each look of it, ten a second, and so has none.
    """
    return tqdm(iterable, delay=2.0, leave=False, disable=None if show else True, **options)


def length_of(loader: Iterable[Any]) -> int | None:
    """The number of batches in a loader; None where it is not known."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # which a DataLoader raises of a data set that has none
        return None
