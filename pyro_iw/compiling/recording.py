r"""One step of a model/guide pair recorded as a graph of tensor operations, forward and backward.

The pair runs under PyTorch's ``make_fx`` with every handler of Pyro's in place, and the gradients are taken
inside, so the graph holds all that a step computes and nothing of how it came about. It runs twice, on
different noise: what differs between the two would be frozen and is refused, as is any operation that hands
a tensor's value to Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.fx.node import map_arg

from .._support.random_state import RandomState
from ..gradients.graph import leaves_below, without_hooks
from ..tracing.traces import Pair
from .arguments import Refused, rebuild
from .guards import Guards
from .inductor import DECOMPOSITIONS
from .observing import Observer
from .private import traced, without_validation

__all__ = ["Body", "Recorded", "record"]

#: What a step, or a part of one, computes: given a pair, the weight of the KL term and further tensors, some
#: tensors, and a scalar whose gradients come after those in the graph's outputs; None for no gradients.
Body = Callable[[Pair, Any, list[Tensor]], tuple[list[Tensor], "Tensor | None"]]


class Recorded(NamedTuple):
    """A step, or a part of one, as a graph.

    Attributes:
        graph: its inputs are ``fixed``, the step's arguments, further tensors and, if there is one, the
            weight; its outputs those of the body and the gradients of ``leaves`` and then of ``leaf_args``.
        fixed: tensors that the step reads, by reference.
        leaves: those of them that get gradients.
        leaf_args: indices of the arguments that do.
        written: those that the step writes to.
        generators: random generators of the user's own that it draws from.
        params: the messages of its ``pyro.param`` statements.
        guards: what else it depends on.
    """

    graph: Any
    fixed: list[Tensor]
    leaves: list[Tensor]
    leaf_args: list[int]
    written: list[Tensor]
    generators: list[torch.Generator]
    params: list[Any]
    guards: Guards


class _Weight:
    """``kl_weight`` as an input of the program: a number that is neither 0 nor 1, its value unknown."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]

    def __mul__(self, other: Any) -> Tensor:
        return self.value * other

    __rmul__ = __mul__


class _Recording:
    """One run of a step under ``make_fx``."""

    def __init__(self, pair: Pair, body: Body) -> None:
        self.pair = pair
        self.body = body
        self.leaves: list[Tensor] = []
        self.params: list[Any] = []
        self.fresh: list[Tensor] = []

    def run(
        self,
        fixed: list[Tensor],
        args: list[Tensor],
        extras: Sequence[Tensor],
        weight: Tensor | None,
        kl_weight: Any,
    ) -> Any:
        """The graph of the step with these inputs."""
        # Other objects than the tensors of these arguments that the pair may also close over.
        self.fresh = fresh = [arg.detach().requires_grad_(arg.requires_grad) for arg in args]

        def step(*inputs: Tensor) -> list[Tensor]:
            pair_args, pair_kwargs = rebuild((self.pair.args, self.pair.kwargs), inputs[len(fixed) :])
            pair = self.pair._replace(args=pair_args, kwargs=pair_kwargs)
            start = len(fixed) + len(args)
            beta: Any = kl_weight if weight is None else _Weight(inputs[-1])
            with poutine.trace(param_only=True) as capture:
                outputs, loss = self.body(pair, beta, list(inputs[start : start + len(extras)]))
            self.params = [site for site in capture.trace.nodes.values() if site["type"] == "param"]
            outputs = [out.detach() for out in outputs]
            if loss is None:
                return outputs
            # Those that are arguments come last, in their order.
            place = {id(arg): index for index, arg in enumerate(fresh)}
            leaves = sorted(leaves_below(loss), key=lambda leaf: place.get(id(leaf), -1))
            with without_hooks(leaves):
                grads = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
            found = [(leaf, g) for leaf, g in zip(leaves, grads, strict=True) if g is not None]
            self.leaves = [leaf for leaf, _ in found]
            return [*outputs, *_apart(found, extras)]

        inputs = [*fixed, *fresh, *extras, *([] if weight is None else [weight])]
        return traced(step, inputs, DECOMPOSITIONS)


def record(
    pair: Pair,
    args: list[Tensor],
    kl_weight: float | Tensor,
    body: Body,
    extras: Sequence[Tensor] = (),
) -> Recorded:
    """Record a step twice and compare.

    Arguments:
        pair: the pair and its arguments.
        args: the tensors among those, in order.
        kl_weight: the weight of the KL term; an input of the graph if it is a tensor.
        body: what is to be computed.
        extras: examples of the further tensors.

    Raises:
        Refused: if a recording would freeze what may change from step to step.
    """
    torch.compiler.list_backends()  # imports what is large, and is not to be watched as it does
    weight = kl_weight if isinstance(kl_weight, Tensor) else None
    guards, guards_again = Guards(pair), Guards(pair)
    observer = Observer()
    first, second = _Recording(pair, body), _Recording(pair, body)
    with _as_before(observer, guards) as check_random, without_validation(), pyro.validation_enabled(False):
        with observer.watching(), guards.watch():
            graph = first.run([], args, extras, weight, kl_weight)
        fixed = _constants(graph)
        observer.restore()
        torch.manual_seed(1)  # other noise than before: what depends on it in Python shows
        with observer.watching(), guards_again.watch():
            again = second.run(fixed, args, extras, weight, kl_weight)
        check_random()
        guards.check_random()
        guards.keep(guards_again)
        made = guards.changed()
        if made is not None:
            raise Refused(f"{made} changes as it runs")
        try:
            _compare(graph, again, fixed, 0)
        except Refused:
            # Writing to a constant is recorded otherwise than writing to an input: compare like with like.
            observer.restore()
            torch.manual_seed(2)
            with observer.watching():
                graph = _Recording(pair, body).run(fixed, args, extras, weight, kl_weight)
            _compare(graph, again, fixed, len(fixed))
    placeholders = [node for node in again.graph.nodes if node.op == "placeholder"]
    used = []
    for node, tensor in zip(placeholders, fixed, strict=False):
        if node.users:
            used.append(tensor)
        else:
            again.graph.erase_node(node)
    guards.add_tensors(used)
    known = {id(tensor): index for index, tensor in enumerate(second.fresh)}
    return Recorded(
        graph=again,
        fixed=[*_lift(again), *used],
        leaves=[leaf for leaf in second.leaves if id(leaf) not in known],
        leaf_args=[known[id(leaf)] for leaf in second.leaves if id(leaf) in known],
        written=observer.written,
        params=second.params,
        generators=observer.generators,
        guards=guards,
    )


def _apart(gradients: list[tuple[Tensor, Tensor]], extras: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the leaves' own strides in memory of their own, as ``.backward()`` leaves them."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*(leaf for leaf, _ in gradients), *extras)}
    result = []
    for leaf, grad in gradients:
        storage = grad.untyped_storage()
        whole = storage.nbytes() == grad.numel() * grad.element_size()
        if storage.data_ptr() in storages or grad.stride() != leaf.stride() or not whole:
            grad = torch.empty_like(leaf).copy_(grad)
        storages.add(storage.data_ptr())
        result.append(grad)
    return result


def _constants(graph: Any) -> list[Tensor]:
    """The tensors that a graph reads without having them as inputs."""
    found: dict[int, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            tensor = getattr(graph, node.target)
            if isinstance(tensor, Tensor):  # and not a generator
                found[id(tensor)] = tensor
    return list(found.values())


def _lift(graph: Any) -> list[Tensor]:
    """Turn the constants of a graph into its first inputs, those of one number into that number."""
    constants: dict[int, tuple[Tensor, Any]] = {}
    targets = set()
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if not isinstance(tensor, Tensor):
            continue
        targets.add(node.target)
        if id(tensor) not in constants:
            with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
                constants[id(tensor)] = tensor, graph.graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(constants[id(tensor)][1])
        graph.graph.erase_node(node)
    for target in targets:
        delattr(graph, target)
    inputs = []
    for tensor, node in reversed(constants.values()):
        if tensor.numel() == 1 and all(
            use.target is torch.ops.aten.lift_fresh_copy.default for use in node.users
        ):
            for use in list(node.users):
                with graph.graph.inserting_before(use):
                    number = graph.graph.call_function(
                        torch.ops.aten.full.default,
                        (list(tensor.shape), tensor.item()),
                        {"dtype": tensor.dtype, "device": tensor.device},
                    )
                use.replace_all_uses_with(number)
                graph.graph.erase_node(use)
            graph.graph.erase_node(node)
        else:
            inputs.append(tensor)
    graph.recompile()
    return inputs


def _compare(first: Any, second: Any, fixed: list[Tensor], given: int) -> None:
    """Refuse a step that is not the same when it is recorded again.

    Arguments:
        first: a graph.
        second: another, whose first inputs are ``fixed``.
        fixed: the tensors that the step reads.
        given: how many of these are inputs of the first graph.
    """
    inputs = [node for node in second.graph.nodes if node.op == "placeholder"]
    persistent = {id(t): f"input {i}" for i, t in enumerate(fixed) if inputs[i].users}
    lines, constants = _canonical(first, persistent, given)
    other_lines, other_constants = _canonical(second, persistent, len(fixed))
    if lines != other_lines or len(constants) != len(other_constants):
        raise Refused("it is another computation each time it runs (random or counting in Python?)")
    for one, other in zip(constants, other_constants, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype or not _equal(one, other):
            raise Refused("it makes tensors of other values each time it runs, outside of PyTorch")


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    return torch.equal(one, other)


def _canonical(graph: Any, persistent: dict[int, str], skip: int) -> tuple[list[str], list[Tensor]]:
    """A graph as text, and the constants in it that are made anew by each run."""
    names: dict[Any, str] = {}
    lines: list[str] = []
    constants: dict[int, Tensor] = {}
    position = 0
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            names[node] = f"input {position}" if position < skip else f"arg {position - skip}"
            position += 1
        elif node.op == "get_attr":
            tensor = getattr(graph, node.target)
            if not isinstance(tensor, Tensor):
                names[node] = f"object {id(tensor)}"
            elif id(tensor) in persistent:
                names[node] = persistent[id(tensor)]
            else:
                constants[id(tensor)] = tensor
                names[node] = f"constant {list(constants).index(id(tensor))}"
        elif node.target is torch.ops.aten.detach.default:
            names[node] = names[node.args[0]]  # constants come with some that inputs do not have
        else:
            names[node] = f"%{len(lines)}"
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: _Name(names[n]))
            lines.append(f"{node.target} {args} {kwargs}")
    return lines, list(constants.values())


class _Name(str):
    """A node's name, printed bare."""

    def __repr__(self) -> str:
        return str(self)


@contextmanager
def _as_before(observer: Observer, guards: Guards) -> Iterator[Callable[[], None]]:
    """Leave random states and the tensors that were written to as they are now.

    Gives a function that refuses a run that has drawn from Python's or NumPy's.
    """
    before = RandomState.now()

    def check() -> None:
        after = RandomState.now()
        for name, changed in (
            ("Python's random", before.python != after.python),
            (
                "numpy.random",
                before.numpy[2] != after.numpy[2] or not np.array_equal(before.numpy[1], after.numpy[1]),
            ),
        ):
            if changed:
                raise Refused(f"it draws from {name}, which would be drawn once and for all")

    try:
        torch.manual_seed(0)
        yield check
    finally:
        observer.restore()
        guards.rewind_random()
        before.restore()
