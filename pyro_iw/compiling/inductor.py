r"""A recorded graph made into kernels by Inductor, with eager's own noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .matmul import choose_products

__all__ = ["inductor"]


def inductor(graph: Any, inputs: list[Tensor], exclusive: bool) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """The graph compiled, as a function of a list of inputs, which it empties.

    Arguments:
        graph: the graph.
        inputs: examples of its inputs.
        exclusive: whether it writes to none of its inputs.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    kernels: list[Any] = []

    def inner(module: Any, examples: Any, **keywords: Any) -> Any:
        if not cuda:
            choose_products(module)
        compiled = compile_fx_inner(module, examples, **keywords)
        kernels.append((compiled, len(examples)))
        return compiled

    for node in graph.graph.nodes:
        node.meta.clear()
    cuda = any(tensor.device.type == "cuda" for tensor in inputs)
    # Eager's own draws from eager's own generators, at no cost that could be measured.
    options: dict[str, Any] = {"fallback_random": True}
    if cuda:
        options["triton.cudagraphs"] = True
    with torch.no_grad(), config.patch(options):
        table = _decompositions(cuda)
        outer: Any = compile_fx(graph, list(inputs), inner_compile=inner, decompositions=table)
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel()}
        apart = len(storages) == sum(tensor.numel() > 0 for tensor in inputs)
        if exclusive and apart and not cuda and len(kernels) == 1 and kernels[0][1] == len(inputs):
            # What lies around the kernels keeps track of aliases and writes; there are none to track.
            return kernels[0][0]
    return lambda args: outer(*args)


def _decompositions(cuda: bool) -> dict[Any, Callable]:
    """Inductor's own but for Bernoulli draws; on a CPU, float32's tanh and log-sigmoid in fewer operations.

    Inductor's Bernoulli draws compare with float32 numbers where eager ones of float64 compare with float64
    ones. Its vectorised ``log1p`` and ``tanh`` cost several times an ``exp``, and a Bernoulli likelihood over
    particles and pixels spends most of its time in them; the replacements are as accurate.
    """
    from torch._inductor.decomposition import select_decomp_table

    table = dict(select_decomp_table())
    aten = torch.ops.aten
    table.pop(aten.bernoulli.default, None)
    if cuda:
        return table
    log_sigmoid = table[aten.log_sigmoid_forward.default]

    def log1p_of_fraction(x: Tensor) -> Tensor:
        """log(1 + x) for x in [0, 1], as 2 artanh(x / (2 + x)) by its series: 2e-7 relative."""
        ratio = x / (2 + x)
        square = ratio * ratio
        series = square * (1 / 15) + 1 / 13
        for odd in (11, 9, 7, 5, 3, 1):
            series = series * square + 1 / odd
        return 2 * ratio * series

    def log_sigmoid_forward(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype != torch.float32:
            return log_sigmoid(x)
        return x.clamp(max=0.0) - log1p_of_fraction(torch.exp(-x.abs())), x.new_zeros((0,))

    def tanh(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return NotImplemented
        # Cephes' tanhf: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel; 1e-7 relative.
        square = x * x
        series = square * -5.70498872745e-3 + 2.06390887954e-2
        for coefficient in (-5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
            series = series * square + coefficient
        far = (1 - 2 / (torch.exp(2 * x.abs()) + 1)).copysign(x)
        return torch.where(x.abs() < 0.625, x + x * square * series, far)

    table[aten.log_sigmoid_forward.default] = log_sigmoid_forward
    table[aten.tanh.default] = tanh
    return table
