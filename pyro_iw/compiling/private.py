r"""The one door to what PyTorch, Python and Pyro keep to themselves; :mod:`pyro_iw.compiling` has the table.

Whatever is missing is missed here, as this module is imported: when a first step is to be compiled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, von_mises

try:
    from torch._inductor import compile as compile_graph
    from torch.fx.experimental import proxy_tensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._python_dispatch import _disable_current_modes as without_modes

    #: Adds each of some tensors to one of others, in place.
    add_each: Any = torch._foreach_add_
    #: Each of some tensors times a number, or a tensor of one.
    times_each: Any = torch._foreach_mul
    #: Draws of the von Mises distribution, until all are accepted.
    rejection_sample: Callable[..., Tensor] = von_mises._rejection_sample
    #: The code that runs an ``import``.
    IMPORTING: Any = importlib._bootstrap._find_and_load.__code__  # type: ignore[attr-defined]
    for _owner, _names in (
        (proxy_tensor, ("make_fx", "extract_val")),
        (Distribution, ("_validate_sample",)),
        (torch.ops.aten.add.Tensor, ("_schema",)),
        (nn.Module(), ("_parameters", "_buffers", "_modules")),
        (nn.Module(), ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")),
        (pyro.get_param_store(), ("_params", "_constraints")),
    ):
        for _name in _names:
            getattr(_owner, _name)
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"compile=True does not know its way about PyTorch {torch.__version__} ({error})"
    ) from error

try:  # without these, what is compiled is not found again by the next process
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    _has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
except (ImportError, AttributeError):
    tracing = None  # type: ignore[assignment]

#: An operation with its signature.
_Operation = type(torch.ops.aten.add.Tensor)

__all__ = [
    "IMPORTING",
    "StorageWeakRef",
    "TorchDispatchMode",
    "add_each",
    "cached_on_disk",
    "compile_graph",
    "hooks_of",
    "library",
    "members_of",
    "params_of_store",
    "rejection_sample",
    "rejection_sampling_by",
    "schema_of",
    "times_each",
    "traced",
    "without_modes",
    "without_validation",
]

#: The package's own operations.
library = torch.library.Library("pyro_iw", "DEF")


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def traced(function: Callable[..., Any], inputs: Sequence[Tensor], decompositions: dict[Any, Any]) -> Any:
    """The graph of a function, run on these inputs, with some operations in others.

    It comes without a fake copy of each result, which takes most of the time and is of no use here.
    """
    with _replaced(proxy_tensor, "extract_val", lambda *args, **kwargs: None):
        try:
            return proxy_tensor.make_fx(function, decompositions, "real")(*inputs)
        except NotImplementedError as error:
            if str(torch.Generator) not in str(error):
                raise
            raise NotImplementedError(
                f"PyTorch {torch.__version__} cannot record draws from a torch.Generator, such as those of a "
                "particle group's minibatches; PyTorch 2.13 can"
            ) from error


def without_validation() -> AbstractContextManager[None]:
    """No checks of values in distributions, those either that were made while validation was on."""
    return _replaced(Distribution, "_validate_sample", lambda self, value: None)


def rejection_sampling_by(operation: Any) -> AbstractContextManager[None]:
    """Another function in the place of the von Mises distribution's sampler."""
    return _replaced(von_mises, "_rejection_sample", operation)


def cached_on_disk(graph: Any) -> AbstractContextManager[Any]:
    """Inductor looks for a graph in its cache only if a context says which shapes may vary: none do.

    Under that context it refuses operations that cannot say the shape of what they give without being run
    (``binomial``), which it runs otherwise.
    """
    operations = [node.target for node in graph.graph.nodes if isinstance(node.target, _Operation)]
    if tracing is None or not all(_knows_shapes(operation.name()) for operation in operations):
        return nullcontext()
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    return tracing(TracingContext(mode))


def _knows_shapes(name: str) -> bool:
    keys = (
        "Meta",
        "CompositeExplicitAutograd",
        "CompositeExplicitAutogradNonFunctional",
        "CompositeImplicitAutograd",
    )
    return any(_has_kernel(name, key) for key in keys)


def schema_of(operation: Any) -> Any:
    """What an operation takes, and what of it it writes to."""
    return operation._schema


def members_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A module's own dicts of its parameters, buffers and submodules."""
    return module._parameters, module._buffers, module._modules


def hooks_of(module: nn.Module) -> tuple[Any, Any, Any]:
    """A module's own dicts of hooks."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks


def params_of_store(store: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A param store's own dicts of its leaves and of their constraints."""
    return store._params, store._constraints
