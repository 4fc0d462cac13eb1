r"""A recorded graph made into kernels by Inductor, with eager's own noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .exchanging import OPERATION
from .private import cached_on_disk, compile_graph, library

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
    graph.recompile()
    # Eager's own draws from eager's own generators, at no cost that could be measured.
    options: dict[str, Any] = {"fallback_random": True}
    exchanges = any(node.target is OPERATION for node in graph.graph.nodes)
    # A CUDA graph replays kernels, and not what ranks say to one another on the CPU.
    if not exchanges and any(tensor.device.type == "cuda" for tensor in inputs):
        options["triton.cudagraphs"] = True
    with torch.no_grad(), cached_on_disk():
        compiled: Any = compile_graph(graph, list(inputs), options=options)
    return lambda args: compiled(*args)


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
