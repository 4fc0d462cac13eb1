r"""A recorded graph made into kernels by Inductor, with eager's own noise."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._support.random_state import RandomState
from .exchanging import OPERATION
from .private import cached_on_disk, compile_graph, library, schema_of, times_each

__all__ = ["DECOMPOSITIONS", "inductor", "replayed"]

_aten = torch.ops.aten

#: Where an operation that looks at values keeps a step from being recorded as a CUDA graph.
_RECORDED_ON = ("cuda",)

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
        options["triton.cudagraphs"] = not _waits(graph, inputs)
    with torch.no_grad(), cached_on_disk(graph):
        compiled: Any = compile_graph(graph, list(inputs), options=options)
    return lambda args: compiled(*args)[:count]


def replayed(function: Callable[[list[Tensor]], Sequence[Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """What a compiled function gives on a GPU, in memory of its own.

    The next replay of a CUDA graph writes over what this one returned. One kernel copies all that is in
    floating point: fifteen small copies would take a third of a step.
    """
    torch.compiler.cudagraph_mark_step_begin()
    found = list(function(inputs))
    floating = [i for i, tensor in enumerate(found) if tensor.is_floating_point()]
    copies = iter(times_each([found[i] for i in floating], 1.0) if floating else ())
    return [next(copies) if tensor.is_floating_point() else tensor.clone() for tensor in found]


def _waits(graph: Any, inputs: list[Tensor]) -> bool:
    """Whether the host waits for the device somewhere in a graph, as operations do that look at values.

    A CUDA graph cannot hold that: an attempt to record it fails, and leaves the device's generator unusable
    for the rest of the process. So the graph is run once with PyTorch's look-out for it.
    """
    state = RandomState.now()
    own = [value for value in vars(graph).values() if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in own]
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the look-out is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            graph(*(tensor.clone() for tensor in inputs))  # of which some may be written to
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
        state.restore()
        for generator, value in zip(own, states, strict=True):
            generator.set_state(value)
    return False


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


def _normal(mean: Tensor, std: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draws as PyTorch makes them, which before looks on a GPU whether a scale is negative."""
    if mean.device.type not in _RECORDED_ON or generator is not None:
        return NotImplemented
    shape = torch.broadcast_shapes(mean.shape, std.shape)
    return mean + std * torch.randn(shape, dtype=mean.dtype, device=mean.device)


def _multinomial(
    probs: Tensor, num_samples: int, replacement: bool = False, *, generator: torch.Generator | None = None
) -> Tensor:
    """One draw, as PyTorch makes it, which before looks on a GPU whether a probability is negative."""
    if probs.device.type not in _RECORDED_ON or generator is not None or num_samples != 1:
        return NotImplemented
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)


#: Operations that are recorded as others.
DECOMPOSITIONS = {
    _aten.tanh.default: _tanh,
    _aten.normal.Tensor_Tensor: _normal,
    _aten.multinomial.default: _multinomial,
}
