r"""Matrix products of a compiled step on CPUs, by whichever of two libraries is faster at them.

PyTorch multiplies float32 matrices with the BLAS it was built with, which on some processors (MKL on other
makers') reaches half the speed of oneDNN, and on others is ahead of it. Which it is depends on processor,
number of threads, shapes and strides, so each kind of product of a program is timed once when that is
compiled. Both compute in float32; a product that came out otherwise would not be replaced.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

__all__ = ["choose_products", "library"]

_aten = torch.ops.aten
#: oneDNN has to be faster by this factor to be worth a call through Python.
_MARGIN = 1.1
#: Multiplications under which that call would show.
_SMALL = 1_000_000
_RUNS = 5

_choices: dict[Any, bool] = {}
#: The package's own operations.
library = torch.library.Library("pyro_iw", "DEF")
library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


library.impl("linear", _linear, "CPU")
library.impl("linear", lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]), "Meta")


def choose_products(module: Any) -> None:
    """Replace the large products of a graph by oneDNN's, where those are faster.

    Arguments:
        module: a graph module whose nodes know their shapes (``meta["val"]``); changed in place.
    """
    if torch.get_float32_matmul_precision() != "highest" or not torch.backends.mkldnn.is_available():
        return
    for node in list(module.graph.nodes):
        if node.target not in (_aten.mm.default, _aten.addmm.default) or node.kwargs:
            continue
        bias, x, w = (None, *node.args) if node.target is _aten.mm.default else node.args
        if (bias is None or bias.meta["val"].dim() == 1) and _is_faster(x.meta["val"], w.meta["val"]):
            with module.graph.inserting_before(node):
                transposed = module.graph.call_function(_aten.permute.default, (w, [1, 0]))
                transposed.meta["val"] = w.meta["val"].permute(1, 0)
                linear = torch.ops.pyro_iw.linear.default
                product = module.graph.call_function(linear, (x, transposed, bias))
                product.meta.update(node.meta)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    module.recompile()


def _is_faster(x: Tensor, w: Tensor) -> bool:
    """Whether oneDNN multiplies matrices of these shapes and strides faster."""
    rows, inner, columns = x.shape[0], x.shape[1], w.shape[1]
    suited = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, w))
    if not suited or rows * inner * columns < _SMALL:
        return False
    key = x.shape, x.stride(), w.shape, w.stride(), torch.get_num_threads()
    if key not in _choices:
        _choices[key] = _measure(*key[:4])
    return _choices[key]


def _measure(x_shape: Any, x_stride: Any, w_shape: Any, w_stride: Any) -> bool:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
        x = torch.empty_strided(x_shape, x_stride).normal_()
        w = torch.empty_strided(w_shape, w_stride).normal_()
        one, other = torch.mm(x, w), _linear(x, w.t(), None)
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-5 * x_shape[1]):
            return False
        times = []
        for product in (lambda: torch.mm(x, w), lambda: _linear(x, w.t(), None)):
            best = float("inf")
            for _ in range(_RUNS):
                start = time.perf_counter()
                product()
                best = min(best, time.perf_counter() - start)
            times.append(best)
    return times[0] > _MARGIN * times[1]
