"""Pyro's handlers that surround a statement, in which the package runs or from which it is told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pyro.poutine.runtime import _PYRO_STACK

__all__ = ["handlers_in_force", "under_handlers"]


def handlers_in_force() -> list[Any]:
    """The handlers around this statement, the outermost first."""
    return list(_PYRO_STACK)


@contextmanager
def under_handlers(handlers: Sequence[Any]) -> Iterator[None]:
    """Run under these handlers, and no others."""
    before = list(_PYRO_STACK)
    _PYRO_STACK[:] = handlers
    try:
        yield
    finally:
        _PYRO_STACK[:] = before
