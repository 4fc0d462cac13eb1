"""Handlers of Pyro's: those that surround a statement, and one that puts values in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

__all__ = ["GivenValues", "handlers_in_force", "under_handlers"]


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


class GivenValues(Messenger):
    """Gives latent sites their values, and leaves all else as it is (unlike a replay, their ``infer``).

    Arguments:
        values: by the name of their site.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
