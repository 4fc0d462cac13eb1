"""Runs that are stopped, and what they leave behind: for the tests of examples that can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

__all__ = ["flat", "run_stopped"]


class _Stopped(Exception):
    pass


def run_stopped(
    monkeypatch: pytest.MonkeyPatch,
    trainer: type,
    steps: int,
    main: Callable[[list[str]], Any],
    argv: list[str],
) -> None:
    """A run that fails in the step after that many, once the optimisers have moved the parameters."""
    take_step = trainer.take_step  # type: ignore[attr-defined]

    def limited(self: Any) -> Any:
        result = take_step(self)
        if self.step > steps:
            raise _Stopped
        return result

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "take_step", limited)
        with pytest.raises(_Stopped):
            main(argv)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested containers by their path, tensors as lists."""
    if isinstance(value, torch.Tensor):
        return {name: value.tolist()}
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for part, item in items for key, leaf in flat(item, f"{name}/{part}").items()}
