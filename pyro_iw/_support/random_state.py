"""The state of all random generators that models and guides may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .devices import accelerator_in_use, rng_states, set_rng_state

__all__ = ["RandomState", "fork_rng", "set_back"]


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

    @classmethod
    def seeded(cls, seed: int) -> RandomState:
        """The state that comes of a seed, which is the present one from here on."""
        torch.default_generator.manual_seed(seed)
        module = accelerator_in_use()
        if module is not None:  # PyTorch's own would look at the stack at each call, where it is not in use
            getattr(module, "manual_seed_all", module.manual_seed)(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        return cls.now()

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
def set_back() -> Iterator[None]:
    """Leave the states of all generators as they were."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def fork_rng() -> Iterator[None]:
    """Random draws from a stream apart, which leave the states of all generators as they were."""
    with set_back():
        torch.manual_seed(int(torch.randint(2**62, ())))
        yield
