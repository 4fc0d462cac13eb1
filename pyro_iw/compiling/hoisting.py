r"""What every run of a program would compute anew from inputs that stay the same, computed once beforehand.

A chunk of particles runs the guide's networks on the same data as the chunk before; a leapfrog step, on the
same as the step before. In a recorded graph it can be told exactly what that is: operations that depend on
no random one, on no input that varies and on nothing that the graph writes to. Of these the ones worth it
are taken out: matrix products, convolutions, decompositions and what is made of their results in no more
memory than these take. All random operations stay, in their order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from .private import schema_of

__all__ = ["take_out_constants"]

_Operation = type(torch.ops.aten.add.Tensor)
#: What the names of operations begin with that take more than one pass over memory.
_HEAVY = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mv",
    "addmv",
    "dot",
    "convolution",
    "linalg_",
    "_linalg_",
    "cholesky",
    "triangular_solve",
    "ormqr",
    "geqrf",
    "_fft_",
    "_scaled_dot_product",
    "mkldnn_",
    "embedding",
)


def take_out_constants(
    graph: Any, inputs: Sequence[Tensor], varying: int
) -> tuple[fx.GraphModule | None, list[Tensor]]:
    """Split a graph in two: what is the same in every run, and the rest.

    Arguments:
        graph: the graph; of it the rest is left, with the results of the first part as its last inputs.
        inputs: examples of its inputs.
        varying: how many of the last inputs are others in each run.

    Returns:
        The first part, of the same inputs, None if there is nothing to it; and its results on the examples.
    """
    values = _constants(graph, inputs, varying)
    heavy: set[Any] = set()
    for node in values:
        if _is_heavy(node) or any(parent in heavy for parent in node.all_input_nodes):
            heavy.add(node)
    results = [
        node
        for node in heavy
        if isinstance(values[node], Tensor) and any(user not in heavy for user in node.users)
    ]
    results = [node for node in graph.graph.nodes if node in set(results)]  # in their order
    if not results:
        return None, []
    first = _first_part(graph, results)
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for index, node in enumerate(results):
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"once_{index}")
        node.replace_all_uses_with(last)
    for node in reversed(list(graph.graph.nodes)):
        if node in heavy and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return first, [values[node] for node in results]


def _first_part(graph: Any, results: list[Any]) -> fx.GraphModule:
    """The part of a graph that some of its nodes need, with all of its inputs."""
    needed, pending = set(results), list(results)
    while pending:
        new = set(pending.pop().all_input_nodes) - needed
        needed |= new
        pending += new
    first = fx.Graph()
    copies: dict[Any, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = first.node_copy(node, lambda n: copies[n])
    first.output([copies[node] for node in results])
    return fx.GraphModule(graph, first)


def _constants(graph: Any, inputs: Sequence[Tensor], varying: int) -> dict[Any, Any]:
    """What the nodes that are the same in every run give, views and pieces of others included."""
    roots = _roots(graph)
    dirty: set[Any] = set()
    for node in graph.graph.nodes:
        for written in _written(node):
            dirty |= roots[written]
    values: dict[Any, Any] = {}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, value in list(zip(placeholders, inputs, strict=True))[: len(inputs) - varying]:
        if not dirty & roots[node]:
            values[node] = value
    for node in graph.graph.nodes:
        if node.op != "call_function" or dirty & roots[node] or not _is_pure(node):
            continue
        parents = node.all_input_nodes
        if not parents or any(parent not in values for parent in parents):
            continue  # what is made of nothing is cheaper to make again
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        if _is_heavy(node) or _bytes([value]) <= max(_bytes([values[parent]]) for parent in parents):
            values[node] = value
    return values


def _roots(graph: Any) -> dict[Any, set[Any]]:
    """Whose memory each node may be a view of."""
    roots: dict[Any, set[Any]] = {}
    for node in graph.graph.nodes:
        roots[node] = {node}
        if node.target is operator.getitem:
            roots[node] = roots[node.args[0]]
        elif isinstance(node.target, _Operation):
            schema = schema_of(node.target)
            if any(returned.alias_info is not None for returned in schema.returns):
                for parent in node.all_input_nodes:
                    roots[node] = roots[node] | roots[parent]
        elif node.op == "call_function":
            for parent in node.all_input_nodes:
                roots[node] = roots[node] | roots[parent]
    return roots


def _written(node: Any) -> Iterable[Any]:
    """The nodes whose memory an operation writes to."""
    if node.op != "call_function" or not isinstance(node.target, _Operation):
        return
    schema = schema_of(node.target)
    arguments = schema.arguments
    given = [*zip(arguments, node.args, strict=False)]
    given += [(each, node.kwargs[each.name]) for each in arguments if each.name in node.kwargs]
    # PyTorch 2.4 records another operation in eval mode, which says so by its name alone.
    may_train = not schema.name.endswith("_no_training")
    training = next((value for argument, value in given if argument.name == "training"), may_train)
    for argument, value in given:
        # Batch normalisation's schema does not say that it updates these, in train mode.
        writes = argument.name in ("running_mean", "running_var") and training
        if writes or (argument.alias_info is not None and argument.alias_info.is_write):
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(each, fx.Node):
                    yield each


def _is_pure(node: Any) -> bool:
    """Whether an operation does nothing but compute, the same each time."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, _Operation) or node.kwargs.get("generator") is not None:
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not any(True for _ in _written(node))


def _is_heavy(node: Any) -> bool:
    if not isinstance(node.target, _Operation):
        return False
    return schema_of(node.target).name.partition("::")[2].startswith(_HEAVY)


def _bytes(values: Iterable[Any]) -> int:
    """Memory behind tensors, that of views being their base's."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            total += _bytes(value)
    return total
