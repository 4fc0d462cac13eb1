r"""What a model keeps from one step to the next, and how resampling moves it.

All memory of a model and its guide is in ``state``, a dict that :class:`~pyro.infer.SMCFilter` and this
package hand to ``init`` and ``step``. When the particles of a cell are resampled, particle :math:`k` takes
over the memory of its ancestor :math:`a_k`: every tensor of the state that has the particle dim is indexed
by the ancestors, cell by cell, inside tuples, lists and dicts too. What has no particle dim (data, lengths, a
network's reading of the data) stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .._support.nested import leaves, map_leaves

__all__ = ["Copies", "FilterState", "Leaf", "in_words", "take"]

#: A tensor of the state: the key that it is stored under, and which of the things there it is.
Leaf = tuple[Hashable, int]


class Copies:
    """Copies of tensors, which stay as they are where a step writes into its own (``state["t"] += 1``).

    What is the same tensor, and has not been written into, at two moments has one copy for both.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._before: dict[int, tuple[Tensor, int, Tensor]] = {}

    def begin(self) -> None:
        """A moment begins: what was not there at the last one can be let go of."""
        self._before, self._made = self._made, {}

    def __call__(self, value: Any) -> Any:
        """The copy of a tensor; all else as it is."""
        if not isinstance(value, Tensor):
            return value
        if value.is_inference():  # which does not count what is written into it
            return value.clone()
        key, version = id(value), value._version
        found = self._made.get(key) or self._before.get(key)
        if found is None or found[0] is not value or found[1] != version:
            found = value, version, value.clone()
        self._made[key] = found
        return found[2]


class _NotStored(KeyError):
    """With a message that is shown as it is, and not as the representation of a key."""

    def __str__(self) -> str:
        return str(self.args[0])


class FilterState(dict):
    """The memory of a model, written by the model alone.

    Arguments:
        num_particles: the number of particles.

    Attributes:
        where: who reads it and when, for the message if what is read is not there.
    """

    def __init__(self, num_particles: int) -> None:
        super().__init__()
        self.where = "at init"
        self._num_particles = num_particles  # where Pyro's own has it
        self._locked = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nothing can be written while this context is open."""
        self._locked = True
        try:
            yield
        finally:
            self._locked = False

    def tensors(self) -> dict[Leaf, Tensor]:
        """All tensors, those in nested containers included."""
        return {
            (key, number): leaf
            for key, value in self.items()
            for number, leaf in enumerate(leaves(value))
            if isinstance(leaf, Tensor)
        }

    def change(self, change: Callable[[Leaf, Tensor], Tensor]) -> None:
        """Put other tensors in the place of all."""
        for key, value in list(self.items()):
            numbers = itertools.count()

            def moved(leaf: Any, key: Hashable = key, numbers: Iterator[int] = numbers) -> Any:
                number = next(numbers)
                return change((key, number), leaf) if isinstance(leaf, Tensor) else leaf

            dict.__setitem__(self, key, map_leaves(moved, value))

    def snapshot(self, copies: Copies) -> FilterState:
        """A state of its own with copies of the tensors."""
        other = FilterState(self._num_particles)
        for key, value in self.items():
            dict.__setitem__(other, key, map_leaves(copies, value))
        return other

    def __missing__(self, key: Hashable) -> Any:
        raise _NotStored(
            f"state[{key!r}] is read {self.where}, but nothing has been stored there. Let init(state, ...) "
            "store what the first step reads, and step(state, ...) of the model what the next one does. "
            f"There is {', '.join(map(repr, self)) or 'nothing'}."
        )

    def _write(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._locked:
            raise RuntimeError(
                f"The guide writes to the state {self.where}, but can only read it. Let the model store "
                "what the next step needs: it is given the guide's values."
            )
        return getattr(dict, name)(self, *args, **kwargs)

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self._write("__setitem__", key, value)

    def __delitem__(self, key: Hashable) -> None:
        self._write("__delitem__", key)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        return self._write("__ior__", other)

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._write("update", *args, **kwargs)

    def setdefault(self, *args: Any) -> Any:
        return self._write("setdefault", *args)

    def pop(self, *args: Any) -> Any:
        return self._write("pop", *args)

    def popitem(self) -> Any:
        return self._write("popitem")

    def clear(self) -> None:
        self._write("clear")


def in_words(leaf: Leaf) -> str:
    """A tensor of the state, as a message names it."""
    key, number = leaf
    return f"state[{key!r}]" + (f" (item {number})" if number else "")


def take(values: Tensor, ancestors: Tensor, dims: tuple[int, ...], nesting: int, leaf: Leaf) -> Tensor:
    """What the ancestors hold.

    Arguments:
        values: of shape ``[S, *plates, *event]``.
        ancestors: indices of particles, of shape ``[S, *cells]``.
        dims: the (negative) dims of the cells among the plates'.
        nesting: the number of dims that all plates take.
        leaf: which tensor of the state this is.

    Raises:
        ValueError: if the values have not these dims; the leaf is named.
    """
    rank, size = nesting + 1, len(ancestors)
    shape = list(values.shape)
    index = [size] + [1] * nesting
    fits = len(shape) >= rank and shape[0] == size
    for dim, cells in zip(dims, ancestors.shape[1:], strict=True):
        fits = fits and shape[rank + dim] in (1, cells)
        if fits:
            index[rank + dim] = shape[rank + dim] = cells
    if not fits:
        raise ValueError(
            f"{in_words(leaf)} varies with the particles, but has shape {tuple(values.shape)}, where the "
            f"leftmost dims should be {size} particles and {nesting} dim(s) of the plates"
            + (f", with {list(ancestors.shape[1:])} cells at {list(dims)}" if dims else "")
            + ". Each particle of each cell is resampled by itself and needs a value of its own: store "
            "values of the sites' batch shape, and nothing that is summed or averaged over particles or "
            "plates."
        )
    if not dims:
        return values.index_select(0, ancestors)
    placed = ancestors.reshape(index + [1] * (len(shape) - rank))
    return values.expand(shape).gather(0, placed.expand(shape))
