r"""A recorded graph made into kernels by Inductor, with eager's own noise."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .exchanging import OPERATION
from .private import cached_on_disk, compile_graph, library, schema_of

__all__ = ["DECOMPOSITIONS", "inductor"]

_aten = torch.ops.aten

# Inductor's own draws of float64 compare with float32 numbers, where eager ones compare with float64 ones.
library.define("bernoulli(Tensor p) -> Tensor", tags=[torch.Tag.nondeterministic_seeded])
library.impl("bernoulli", lambda p: torch.bernoulli(p), "CompositeExplicitAutograd")
library.impl("bernoulli", lambda p: torch.empty_like(p), "Meta")


def inductor(graph: Any, inputs: list[Tensor]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """The graph compiled, as a function of a list of inputs.

    Arguments:
        graph: the graph; changed in place.
        inputs: examples of its inputs.
    """
    for node in graph.graph.nodes:
        node.meta.clear()
        if node.target is _aten.bernoulli.default and not node.kwargs.get("generator"):
            node.target = torch.ops.pyro_iw.bernoulli.default
    count = _keep_draws(graph)
    graph.recompile()
    # Eager's own draws from eager's own generators, at no cost that could be measured.
    # Older releases of PyTorch (2.4 is one) move them next to where they are used, and so out of their order.
    options: dict[str, Any] = {"fallback_random": True, "reorder_for_locality": False}
    exchanges = any(node.target is OPERATION for node in graph.graph.nodes)
    # A CUDA graph replays kernels, and not what ranks say to one another on the CPU.
    if not exchanges and any(tensor.device.type == "cuda" for tensor in inputs):
        options["triton.cudagraphs"] = True
    with torch.no_grad(), cached_on_disk(graph):
        compiled: Any = compile_graph(graph, list(inputs), options=options)
    return lambda args: compiled(*args)[:count]


def _keep_draws(graph: Any) -> int:
    """Have a graph return draws that nothing depends on, which Inductor would leave out.

    All draws after those would be others than the eager step's, and than those of a program that needs them.

    Returns:
        The number of the graph's own outputs.
    """
    output = next(node for node in graph.graph.nodes if node.op == "output")
    own = list(output.args[0])
    needed, pending = {output}, [output]
    while pending:
        node = pending.pop()
        if not _reads_shapes_alone(node):
            new = set(node.all_input_nodes) - needed
            needed |= new
            pending += new
    unused = []
    for node in graph.graph.nodes:
        if node in needed or torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        if len(schema_of(node.target).returns) > 1:
            with graph.graph.inserting_before(output):
                node = graph.graph.call_function(operator.getitem, (node, 0))
        unused.append(node)
    if unused:
        output.args = ([*own, *unused],)
    return len(own)


def _reads_shapes_alone(node: Any) -> bool:
    """Whether what an operation gives does not depend on the values that it is given."""
    name = node.target.__name__ if node.op == "call_function" else ""
    name = name.partition(".")[0]
    return name.endswith("_like") or name.startswith("new_")


def _tanh(x: Tensor) -> Tensor:
    """float32's tanh on a CPU in fewer operations than Inductor's, which costs several times an ``exp``.

    Cephes' tanhf: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel; 1e-7 relative.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return NotImplemented
    square = x * x
    series = square * -5.70498872745e-3 + 2.06390887954e-2
    for coefficient in (-5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        series = series * square + coefficient
    far = (1 - 2 / (torch.exp(2 * x.abs()) + 1)).copysign(x)
    return torch.where(x.abs() < 0.625, x + x * square * series, far)


#: Operations that are recorded as others.
DECOMPOSITIONS = {_aten.tanh.default: _tanh}
