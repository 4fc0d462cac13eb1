"""The state of all random generators that models and guides may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .devices import rng_states, set_rng_state

__all__ = ["RandomState", "fork_rng"]


class RandomState(NamedTuple):
    """PyTorch's state on the CPU and on the devices of the accelerator in use, NumPy's and Python's."""

    cpu: Tensor
    devices: list[Tensor]
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomState:
        """The present state."""
        numpy, python = np.random.get_state(), random.getstate()  # noqa: NPY002 - the state models may use
        return cls(torch.get_rng_state(), rng_states(), numpy, python)

    def sharing(self, before: RandomState) -> RandomState:
        """The same state; what it has in common with an earlier one is held in memory once."""
        python = before.python if before.python == self.python else self.python
        same = all(np.array_equal(a, b) for a, b in zip(before.numpy, self.numpy, strict=True))
        return self._replace(numpy=before.numpy if same else self.numpy, python=python)

    def restore(self) -> None:
        """Make it the present state."""
        torch.set_rng_state(self.cpu.clone())  # which does not heed where in its storage a view begins
        for device, state in enumerate(self.devices):
            set_rng_state(state, device)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)


@contextmanager
def fork_rng() -> Iterator[None]:
    """Random draws from a stream apart, which leave the states of all generators as they were."""
    state = RandomState.now()
    try:
        torch.manual_seed(int(torch.randint(2**62, ())))
        yield
    finally:
        state.restore()
