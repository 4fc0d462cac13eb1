r"""A word before something that takes long, and one after: to the log, and to a terminal if there is one."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["announced"]

_logger = logging.getLogger("pyro_iw")
#: Seconds from which on it is said how many it took.
_LONG = 2.0


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Say that something is compiled, and how long that took if it is more than two seconds.

    It is logged at INFO by the logger ``pyro_iw``. Where standard error is a terminal it is written there as
    well, above any progress bar.
    """
    _say(f"compiling {what} ...")
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    if seconds > _LONG:
        _say(f"compiled in {seconds:.0f} s")


def _say(message: str) -> None:
    _logger.info(message)
    if sys.stderr is not None and sys.stderr.isatty():
        tqdm.write(f"pyro_iw: {message}", file=sys.stderr)
