r"""The graph that autograd keeps below a loss: its leaves, which get gradients, and the hooks on those.

What is read here of PyTorch's private names is in the table of :mod:`pyro_iw.compiling`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Graph", "has_hooks", "leaves_below", "without_hooks"]


def _nodes_below(roots: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the graph below some tensors, each once."""
    pending = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)


def _leaf_of(node: Any) -> Tensor | None:
    """The leaf that a node adds a gradient to; None for all other nodes."""
    return node.variable if node.name() == "torch::autograd::AccumulateGrad" else None


def leaves_below(*roots: Tensor) -> list[Tensor]:
    """The tensors whose ``.grad`` a backward pass from here would fill, in the order of the graph."""
    return [leaf for leaf in map(_leaf_of, _nodes_below(roots)) if leaf is not None]


class Graph:
    """The leaves that a gradient leads to, found in graphs that are made and dropped one after another.

    Arguments:
        leaves: those known beforehand.

    Attributes:
        leaves: all that are known, by their id.
    """

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        self.leaves: dict[int, Tensor] = {id(leaf): leaf for leaf in leaves}
        self.start()

    def start(self) -> None:
        """Take what has been computed up to now for another graph."""
        with torch.enable_grad():
            self._oldest = _age(torch.zeros((), requires_grad=True).clone().grad_fn)

    def explore(self, roots: Iterable[Tensor], known: bool = False) -> None:
        """Find the leaves below some tensors.

        Arguments:
            roots: the tensors.
            known: whether all leaves should be known by now.

        Raises:
            ValueError: if the graph leads to another one, or to leaves that should be known and are not.
        """
        for node in _nodes_below(roots):
            leaf = _leaf_of(node)
            if leaf is not None:
                if known and id(leaf) not in self.leaves:
                    raise ValueError(
                        "Drawn again, a chunk of particles uses a parameter of shape "
                        f"{list(leaf.shape)} that it did not use before. Do not exchange parameters "
                        "between a loss with chunk_size and its backward pass."
                    )
                self.leaves[id(leaf)] = leaf
            elif _age(node) < self._oldest:
                raise ValueError(
                    f"Model or guide use a tensor that was computed before they ran, with a gradient "
                    f"({node.name()}), and chunk_size runs the backward pass once for every chunk. Pass "
                    "that tensor to the loss as an argument of model and guide, or compute it inside them."
                )


def _age(node: Any) -> int:
    """A number that grows from each node of a graph to the next; 0 for all where PyTorch does not tell."""
    number = getattr(node, "_sequence_nr", None)
    return 0 if number is None else number()


def has_hooks(tensor: Tensor) -> bool:
    """Whether something of the user's is to run when a leaf gets its gradient."""
    return any(getattr(tensor, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Keep hooks of leaves from running, which are to see the whole gradient of a step, once."""
    hooks = [found for tensor in tensors if (found := getattr(tensor, "_backward_hooks", None))]
    saved = [dict(found) for found in hooks]
    for found in hooks:
        found.clear()
    try:
        yield
    finally:
        for found, kept in zip(hooks, saved, strict=True):
            found.update(kept)
