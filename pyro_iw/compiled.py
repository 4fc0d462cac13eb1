r"""The compiled step: Pyro's handlers run once, and the tensor program they leave behind from then on.

A gradient step of a pair is the same few hundred tensor operations every time: guide, model, log-weights,
particle weights, backward pass. :class:`Compiler` records them once with PyTorch's ``make_fx``, has Inductor
compile the lot into fused kernels, and runs those. The program draws its noise from PyTorch's own generators,
operation by operation as the eager step does, so for one seed both see the same particles.

**What is an input.** Every tensor that the pair reads without having made it is an input of the program,
held by reference: arguments, parameters, buffers, tensors that a model closes over. Changes in place are
therefore seen (an optimiser's step, ``load_state_dict``, data written into a buffer), and ``kl_weight`` is a
tensor too.

**What is a guard.** Anything else that a recording would freeze is looked at before each step, and if it
changed, the next step runs eagerly and the one after it is recorded afresh:

* shapes, strides, dtypes and devices of tensors, whether they need gradients, other arguments' values;
* which tensor or submodule a name stands for, in modules, the param store, closures and globals;
* plain Python values (numbers, strings, flags, and small containers of them) that are attributes of a module
  that ran or of the ``self`` of a method that ran, or globals and closure variables of functions that ran:
  ``module.training``, ``dropout.p``, a weight to anneal;
* default dtype, autocast, float32 precision, Pyro's validation.

**What is refused**, with one warning that says why, and runs eagerly: reading a tensor's value in Python
(``if z.mean() > 0``, ``.item()``, ``.numpy()``), shapes that depend on values, random numbers from Python or
NumPy, attributes that the run itself changes (a counter), anything that comes out differently when recorded
twice, and whatever Inductor cannot compile, as for want of a C++ compiler.

**What cannot be seen** is baked in: a Python value behind more than one attribute of ``self`` (or behind two
containers), the state of files, clocks and other libraries, and the effect of code that only runs sometimes.
Call :meth:`Compiler.forget` after changing such a thing, or make it a tensor and change that in place. Checks
of Pyro's validation take part in the eager step that precedes each recording, and not in those after it.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import sysconfig
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import opt_einsum
import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .estimators import Estimate
from .traces import Pair
from .warn import warn

__all__ = ["CompiledStep", "Compiler"]

#: Programs kept, the least recently used leaves first.
_CAPACITY = 8
#: How often guards may fail before a pair is left to run eagerly.
_PATIENCE = 8
#: Containers of more entries are not compared.
_LARGEST = 64

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
#: Ways to read a tensor's value in Python.
_READS = frozenset(
    {"item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"}
    | {"__dlpack__"}
)
_LIBRARIES = tuple(
    os.path.dirname(str(library.__file__)) + os.sep
    for library in (sys.modules[__package__ or ""], pyro, torch, np, opt_einsum)
)
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}


class _Refused(Exception):
    """Why a pair cannot be recorded."""


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


class CompiledStep:
    """One run of a program: a loss, and the gradients that its backward pass would give.

    Attributes:
        loss: minus the bound, a detached scalar.
    """

    def __init__(self, program: _Program, args: list[Tensor], kl_weight: float) -> None:
        self._leaves = [*program.leaves, *(args[index] for index in program.leaf_args)]
        self._emit = program.emit_params
        self._undo = program.snapshot()
        self.loss, *self._grads = program(args, kl_weight)

    def accumulate(self) -> None:
        """Add the gradients to the leaves' ``.grad`` and tell Pyro's handlers of the parameters."""
        self._emit()
        if any(
            leaf.grad_fn is not None or leaf._backward_hooks or leaf._post_accumulate_grad_hooks
            for leaf in self._leaves
        ):
            self._attach().backward()
            return
        old, new = [], []
        for leaf, grad in zip(self._leaves, self._grads, strict=True):
            if leaf.grad is None:
                leaf.grad = grad
            else:
                old.append(leaf.grad)
                new.append(grad)
        if old:
            with torch.no_grad():
                torch._foreach_add_(old, new)

    def differentiable(self) -> Tensor:
        """The loss as a scalar whose ``.backward()`` gives these gradients; tells handlers as well."""
        self._emit()
        return self._attach()

    def _attach(self) -> Tensor:
        if not self._leaves:
            return self.loss
        return _Attached.apply(self.loss, len(self._leaves), *self._leaves, *self._grads)

    def rewind(self) -> None:
        """Put the random state and all that the run changed back, so that an eager run repeats it."""
        self._undo()


class _Attached(torch.autograd.Function):
    """A loss whose gradients with respect to some leaves are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(
                "An importance-weighted loss can be differentiated once: its particle weights are constants "
                "of the backward pass, so a second derivative (create_graph=True) would be wrong."
            )
        grads: Sequence[Tensor] = ctx.saved_tensors
        # The usual factor of 1 is not worth a pass over the parameters; elsewhere reading it would wait.
        if grad.device.type != "cpu" or grad.item() != 1:
            grads = [saved * grad for saved in grads]
        return (None, None, *grads, *[None] * len(grads))


class Compiler:
    """Compiled gradient steps of the pairs that a loss meets, by what each was recorded for.

    Example:
        >>> loss = IWAE_ELBO(K=5, compile=True)
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=loss)
        >>> first = svi.step(data)  # eager; the second step is recorded and compiled, a matter of seconds
    """

    def __init__(self) -> None:
        # For a key met once: its pair's callables, for an id is good as long as its object.
        self._programs: OrderedDict[Any, _Program | tuple] = OrderedDict()
        self._stale: dict[Any, int] = {}
        self._refused: dict[Any, Any] = {}
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # programs hold code; they are soon recorded again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def forget(self) -> None:
        """Drop all programs, and try refused pairs again."""
        self.__init__()  # type: ignore[misc]

    def run(
        self, pair: Pair, kl_weight: float, estimate: Callable[[Pair, Any], tuple[Any, Estimate]]
    ) -> CompiledStep | None:
        """Run a compiled step, recording it if this is the second one of its kind.

        Arguments:
            pair: the pair and its arguments.
            kl_weight: the weight of the KL term.
            estimate: what a step computes, given a pair and a weight.

        Returns:
            The step, or None if it has to run eagerly.
        """
        identity = _identity(pair)
        if identity in self._refused:
            return None
        tensors: list[Tensor] = []
        try:
            spec = _spec((pair.args, pair.kwargs), tensors)
            key = (identity, spec, _signature(tensors), _settings(), _kind(kl_weight))
            hash(key)
        except (_Refused, TypeError) as error:
            self._refuse(identity, pair, str(error))
            return None
        for messenger in _PYRO_STACK:
            if type(messenger) is not TraceMessenger or not messenger.param_only:
                return None  # its effect would be recorded
        if key not in self._programs:
            # Eagerly once: lazy parameters are made, errors and warnings come from the user's own lines.
            self._remember(key, (pair.model, pair.guide))
            return None
        program = self._programs[key]
        if not isinstance(program, _Program):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the pair's own came from the eager step
                    program = _record(pair, tensors, kl_weight, estimate)
            except Exception as error:
                reason = str(error) if isinstance(error, _Refused) else _in_words(error)
                self._refuse(identity, pair, reason)
                return None
            self._remember(key, program)
        else:
            changed = program.guards.changed()
            if changed is not None:
                self._remember(key, (pair.model, pair.guide))
                self._stale[identity] = self._stale.get(identity, 0) + 1
                if self._stale[identity] > _PATIENCE:
                    self._refuse(identity, pair, f"{changed} keeps changing; a tensor could, in place")
                return None
            self._programs.move_to_end(key)
        return CompiledStep(program, tensors, kl_weight)

    def _remember(self, key: Any, program: _Program | tuple) -> None:
        self._programs[key] = program
        self._programs.move_to_end(key)
        while len(self._programs) > _CAPACITY:
            self._programs.popitem(last=False)

    def _refuse(self, identity: Any, pair: Pair, reason: str) -> None:
        self._refused[identity] = pair.model, pair.guide
        for key in [key for key in self._programs if key[0] == identity]:
            del self._programs[key]
        if not self._warned:
            self._warned = True
            warn(f"compile=True is left aside and the step runs eagerly: {reason}.", RuntimeWarning)


# ------------------------------------------------------------------------------------------------
# What a program is known by
# ------------------------------------------------------------------------------------------------


def _identity(pair: Pair) -> Any:
    # A bound method is made anew at each access, its owner and its function are not.
    return tuple(
        (id(fn.__self__), id(fn.__func__)) if isinstance(fn, types.MethodType) else id(fn)
        for fn in (pair.model, pair.guide)
    )


def _spec(value: Any, tensors: list[Tensor]) -> Any:
    """Arguments as something hashable, with their tensors taken out in order."""
    if isinstance(value, Tensor):
        for index, seen in enumerate(tensors):
            if seen is value:  # one tensor twice is one input
                return Tensor, index
        tensors.append(value)
        return Tensor
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind is tuple or kind is list:
        return kind, tuple([_spec(item, tensors) for item in value])
    if kind is dict:
        return kind, tuple([(key, _spec(item, tensors)) for key, item in value.items()])
    if isinstance(value, (nn.Module, types.FunctionType, type)):
        return kind, value
    raise _Refused(
        f"an argument is of type {kind.__name__}, whose changes would go unseen; pass tensors, numbers, "
        "strings or modules"
    )


def _signature(tensors: Sequence[Tensor]) -> tuple:
    return tuple([(t.shape, t.dtype, t.stride(), t.device, t.requires_grad, type(t)) for t in tensors])


def _settings() -> tuple:
    """Global settings that a recording would freeze."""
    return (
        torch.get_default_dtype(),
        is_validation_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
        _autocast("cpu"),
        _autocast("cuda"),
        torch.get_default_device() if torch._C._len_torch_function_stack() else None,
    )


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _kind(kl_weight: float) -> float | None:
    """0 and 1 leave terms out and are recorded as they are; all others are one input."""
    return float(kl_weight) if kl_weight == 0 or kl_weight == 1 else None


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


# ------------------------------------------------------------------------------------------------
# Recording
# ------------------------------------------------------------------------------------------------


class _Program:
    """A compiled step and where its inputs come from."""

    def __init__(
        self,
        function: Callable[[list[Tensor]], Sequence[Tensor]],
        fixed: list[Tensor],
        leaves: list[Tensor],
        leaf_args: list[int],
        written: list[Tensor],
        messages: list[tuple[dict[str, Any], Any]],
        weight: Tensor | None,
        guards: _Guards,
    ) -> None:
        self.function = function
        self.fixed = fixed
        self.leaves = leaves
        self.leaf_args = leaf_args
        self.written = written
        self.messages = messages
        self.weight = weight
        self.guards = guards
        device = next((t.device for t in [*leaves, *fixed] if t.device.type == "cuda"), None)
        self.device = device

    def __call__(self, args: list[Tensor], kl_weight: float) -> Sequence[Tensor]:
        inputs = [*self.fixed, *args]
        if self.weight is not None:
            self.weight.fill_(float(kl_weight))
            inputs.append(self.weight)
        with torch.no_grad():
            if self.device is None:
                return self.function(inputs)
            torch.compiler.cudagraph_mark_step_begin()
            # The next replay of a CUDA graph writes over what this one returns.
            return [out.clone() for out in self.function(inputs)]

    def snapshot(self) -> Callable[[], None]:
        """What puts the random state, and the tensors that the program writes to, back to now."""
        state = torch.default_generator.get_state()
        cuda = None if self.device is None else torch.cuda.get_rng_state(self.device)
        values = [tensor.clone() for tensor in self.written]

        def undo() -> None:
            torch.default_generator.set_state(state)
            if cuda is not None:
                assert self.device is not None
                torch.cuda.set_rng_state(cuda, self.device)
            with torch.no_grad():
                for tensor, value in zip(self.written, values, strict=True):
                    tensor.copy_(value)

        return undo

    def emit_params(self) -> None:
        """Send the handlers outside, such as SVI's, the parameters that the eager step would touch."""
        messenger: Any
        for messenger in _PYRO_STACK:
            add_node = messenger.trace.add_node
            for message, constraint in self.messages:
                if constraint is not None:
                    leaf = message["value"]
                    message = {**message, "value": transform_to(constraint)(leaf)}
                    message["value"].unconstrained = weakref.ref(leaf)
                add_node(message["name"], **message)


class _Recording:
    """One run of a step under ``make_fx``."""

    def __init__(self, pair: Pair, estimate: Callable[[Pair, Any], tuple[Any, Estimate]]) -> None:
        self.pair = pair
        self.estimate = estimate
        self.leaves: list[Tensor] = []
        self.messages: list[Any] = []
        self.unused: list[Tensor] = []

    def run(self, fixed: list[Tensor], args: list[Tensor], weight: Tensor | None, kl_weight: float) -> Any:
        """The graph of the step with these inputs; its outputs are the loss and the leaves' gradients."""
        from torch.fx.experimental.proxy_tensor import make_fx

        fresh = [arg.detach().requires_grad_(arg.requires_grad) for arg in args]

        def step(*inputs: Tensor) -> list[Tensor]:
            iterator = iter(inputs[len(fixed) :])
            pair_args, pair_kwargs = _rebuild((self.pair.args, self.pair.kwargs), iterator, {})
            pair = self.pair._replace(args=pair_args, kwargs=pair_kwargs)
            beta: Any = _Weight(inputs[-1]) if weight is not None else kl_weight
            with poutine.trace(param_only=True) as capture:
                _, estimate = self.estimate(pair, beta)
            self.messages = [site for site in capture.trace.nodes.values() if site["type"] == "param"]
            loss = estimate.loss
            # Those that are arguments come last, in their order.
            place = {id(arg): index for index, arg in enumerate(fresh)}
            leaves = sorted(_leaves(loss), key=lambda leaf: place.get(id(leaf), -1))
            with _without_hooks(leaves):
                grads = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
            found = [(leaf, g) for leaf, g in zip(leaves, grads, strict=True) if g is not None]
            self.leaves = [leaf for leaf, _ in found]
            return [loss.detach(), *_apart(found)]

        inputs = [*fixed, *fresh, *([] if weight is None else [weight])]
        with _without_metadata():
            graph = make_fx(step, tracing_mode="real")(*inputs)
        self.fresh = fresh
        return graph


@contextmanager
def _without_metadata() -> Iterator[None]:
    """``make_fx`` without a fake copy of each result, which takes most of its time and is of no use here."""
    from torch.fx.experimental import proxy_tensor

    extract_val = proxy_tensor.extract_val
    proxy_tensor.extract_val = lambda *args, **kwargs: None
    try:
        yield
    finally:
        proxy_tensor.extract_val = extract_val


def _record(
    pair: Pair,
    args: list[Tensor],
    kl_weight: float,
    estimate: Callable[[Pair, Any], tuple[Any, Estimate]],
) -> _Program:
    """Record the step twice, compare, and compile it."""
    device = next((arg.device for arg in args if arg.device.type == "cuda"), torch.device("cpu"))
    weight = None
    if _kind(kl_weight) is None:
        weight = torch.tensor(float(kl_weight), dtype=torch.float64, device=device)
    guards, guards_again = _Guards(pair), _Guards(pair)
    observer = _Observer()
    first, second = _Recording(pair, estimate), _Recording(pair, estimate)
    with _as_before(observer) as check_random, pyro.validation_enabled(False):
        with observer, guards.watch():
            graph = first.run([], args, weight, kl_weight)
        fixed = _constants(graph)
        observer.restore()
        torch.manual_seed(1)  # other noise than before: what depends on it in Python shows
        with observer, guards_again.watch():
            again = second.run(fixed, args, weight, kl_weight)
        check_random()
        if torch.initial_seed() != 1:
            raise _Refused("it seeds PyTorch's generator")
        guards.keep(guards_again)
        made = guards.changed()
        if made is not None:
            raise _Refused(f"{made} changes as it runs")
        try:
            _compare(graph, again, fixed, 0)
        except _Refused:
            # Writing to a constant is recorded otherwise than writing to an input: compare like with like.
            observer.restore()
            torch.manual_seed(2)
            with observer:
                graph = _Recording(pair, estimate).run(fixed, args, weight, kl_weight)
            _compare(graph, again, fixed, len(fixed))
    return _compile(again, fixed, args, weight, second, observer, guards)


def _compile(
    graph: Any,
    fixed: list[Tensor],
    args: list[Tensor],
    weight: Tensor | None,
    recording: _Recording,
    observer: _Observer,
    guards: _Guards,
) -> _Program:
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    used = []
    for node, tensor in zip(placeholders, fixed, strict=False):
        if node.users:
            used.append(tensor)
        else:
            graph.graph.erase_node(node)
    constants = _lift(graph)
    fixed = [*constants, *used]
    written = [tensor for tensor in observer.written if any(tensor is other for other in used)]
    known = {id(tensor): index for index, tensor in enumerate(recording.fresh)}
    leaves = [leaf for leaf in recording.leaves if id(leaf) not in known]
    leaf_args = [known[id(leaf)] for leaf in recording.leaves if id(leaf) in known]
    messages = [_message(site) for site in recording.messages]
    guards.add_tensors(used, messages)
    example = [*fixed, *args, *([] if weight is None else [weight])]
    plain = [tensor.detach() for tensor in example]
    function = _inductor(graph, plain, exclusive=not written)
    return _Program(function, fixed, leaves, leaf_args, written, messages, weight, guards)


def _inductor(
    graph: Any, inputs: list[Tensor], exclusive: bool
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
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
        table = None if cuda else _cpu_decompositions()
        outer = compile_fx(graph, list(inputs), inner_compile=inner, decompositions=table)
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel()}
        apart = len(storages) == sum(tensor.numel() > 0 for tensor in inputs)
        if exclusive and apart and not cuda and len(kernels) == 1 and kernels[0][1] == len(inputs):
            # What lies around the kernels keeps track of aliases and writes; there are none to track.
            return kernels[0][0]
    return lambda args: outer(*args)


def _message(site: Any) -> tuple[dict[str, Any], Any]:
    """A param message with the leaf for its value; and the constraint, unless there is none."""
    value = site["value"]
    reference = getattr(value, "unconstrained", None)
    leaf = value if reference is None else reference()
    if leaf is value:
        return dict(site), None
    store = pyro.get_param_store()
    if store._params.get(site["name"]) is leaf:
        constraint = store._constraints[site["name"]]
    else:  # a PyroParam of a module that keeps its own
        constraint = site["kwargs"].get("constraint")
    if constraint is None:
        raise _Refused(f"parameter {site['name']!r} does not say how it is constrained")
    return {**site, "value": leaf}, constraint


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors whose ``.grad`` a backward pass would fill, in the order of the graph."""
    found: dict[int, Tensor] = {}
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        pending.extend(parent for parent, _ in node.next_functions)
    return list(found.values())


def _apart(gradients: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Gradients of the leaves' own strides in memory of their own, as ``.backward()`` leaves them."""
    storages = {leaf.untyped_storage().data_ptr() for leaf, _ in gradients}
    result = []
    for leaf, grad in gradients:
        storage = grad.untyped_storage()
        whole = storage.nbytes() == grad.numel() * grad.element_size()
        if storage.data_ptr() in storages or grad.stride() != leaf.stride() or not whole:
            grad = torch.empty_like(leaf).copy_(grad)
        storages.add(storage.data_ptr())
        result.append(grad)
    return result


@contextmanager
def _without_hooks(leaves: list[Tensor]) -> Iterator[None]:
    """The leaves without their hooks, which are the user's to run at each step."""
    hooks = [(leaf, leaf._backward_hooks) for leaf in leaves if leaf._backward_hooks]
    for leaf, _ in hooks:
        leaf._backward_hooks = None
    try:
        yield
    finally:
        for leaf, own in hooks:
            leaf._backward_hooks = own


def _rebuild(value: Any, tensors: Iterator[Tensor], seen: dict[int, Tensor]) -> Any:
    """The arguments with other tensors in the place of their own, as :func:`_spec` takes them out."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = next(tensors)
        return seen[id(value)]
    if type(value) is tuple or type(value) is list:
        return type(value)([_rebuild(item, tensors, seen) for item in value])
    if type(value) is dict:
        return {key: _rebuild(item, tensors, seen) for key, item in value.items()}
    return value


def _constants(graph: Any) -> list[Tensor]:
    """The tensors that a graph reads without having them as inputs."""
    found: dict[int, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            tensor = getattr(graph, node.target)
            found[id(tensor)] = tensor
    return list(found.values())


def _lift(graph: Any) -> list[Tensor]:
    """Turn the constants of a graph into its first inputs, those of one number into that number."""
    constants: dict[int, tuple[Tensor, Any]] = {}
    targets = set()
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        targets.add(node.target)
        tensor = getattr(graph, node.target)
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
    lines, constants = zip(
        _canonical(first, persistent, given), _canonical(second, persistent, len(fixed)), strict=True
    )
    same = lines[0] == lines[1] and len(constants[0]) == len(constants[1])
    if not same:
        raise _Refused("it is another computation each time it runs (random or counting in Python?)")
    for one, other in zip(*constants, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype or not _equal(one, other):
            raise _Refused("it makes tensors of other values each time it runs, outside of PyTorch")


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    return torch.equal(one, other)


def _canonical(graph: Any, persistent: dict[int, str], skip: int) -> tuple[list[str], list[Tensor]]:
    """A graph as text, and the constants in it that are made anew by each run."""
    from torch.fx.node import map_arg

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
            if id(tensor) in persistent:
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

    __repr__ = str.__str__


@contextmanager
def _as_before(observer: _Observer) -> Iterator[Callable[[], None]]:
    """Leave random states and the tensors that were written to as they are now.

    Gives a function that refuses a run that has drawn from Python's or NumPy's.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state models may use
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []

    def check() -> None:
        after: Any = np.random.get_state()  # noqa: NPY002
        for name, changed in (
            ("Python's random", python != random.getstate()),
            ("numpy.random", numpy[2] != after[2] or not np.array_equal(numpy[1], after[1])),
        ):
            if changed:
                raise _Refused(f"it draws from {name}, which would be drawn once and for all")

    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            try:
                yield check
            finally:
                observer.restore()
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class _Observer:
    """Sees every operation of a recording: refuses those that hand values to Python, notes writes.

    Attributes:
        written: tensors written to that the step did not make itself.
    """

    def __init__(self) -> None:
        self.written: list[Tensor] = []
        self._values: list[Tensor] = []
        self._made: dict[int, StorageWeakRef] = {}
        self._found: dict[int, StorageWeakRef] = {}
        self._modes: list[Any] = []

    def __enter__(self) -> None:
        self._modes = [_Operations(self), _Reads()]
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)

    def note(self, func: Any, args: Any, kwargs: Any) -> None:
        """Keep what an operation is about to write over."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._note_argument(argument, value)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._note_argument(argument, kwargs[argument.name])

    def _note_argument(self, argument: Any, value: Any) -> None:
        values = value if isinstance(value, (list, tuple)) else [value]
        for tensor in values:
            if not isinstance(tensor, Tensor):
                continue
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage.cdata not in self._made:
                self._found.setdefault(storage.cdata, storage)
                # Batch normalisation's schema does not say that it updates these.
                writes = argument.name in ("running_mean", "running_var")
                writes = writes or (argument.alias_info is not None and argument.alias_info.is_write)
                if writes and not any(tensor is other for other in self.written):
                    self.written.append(tensor)
                    self._values.append(tensor.detach().clone())

    def made(self, out: Any) -> None:
        """Note the memory that an operation made."""
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage.cdata not in self._found:
                    self._made.setdefault(storage.cdata, storage)

    def restore(self) -> None:
        """Put the values of the tensors that were written to back."""
        with torch.no_grad():
            for tensor, value in zip(self.written, self._values, strict=True):
                tensor.copy_(value)


class _Operations(TorchDispatchMode):
    def __init__(self, observer: _Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise _Refused(f"it reads a tensor's value in Python ({func})")
        if torch.Tag.dynamic_output_shape in func.tags and not _is_gather(func, args):
            raise _Refused(f"it makes a tensor whose shape depends on values ({func})")
        self.observer.note(func, args, kwargs)
        out = func(*args, **kwargs)
        self.observer.made(out)
        return out


def _is_gather(func: Any, args: Any) -> bool:
    """Whether an operation indexes by integers, which gives a shape known beforehand."""
    masks = (torch.bool, torch.uint8)
    return func is torch.ops.aten.index.Tensor and not any(
        index is not None and index.dtype in masks for index in args[1]
    )


class _Reads(TorchFunctionMode):
    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS:
            raise _Refused(f"it reads a tensor's value in Python ({func.__name__})")
        return func(*args, **(kwargs or {}))


def _cpu_decompositions() -> dict[Any, Callable]:
    """Inductor's own, with float32's tanh and log-sigmoid in fewer operations, to the same accuracy.

    Its vectorised ``log1p`` and ``tanh`` cost several times an ``exp``, and a Bernoulli likelihood over
    particles and pixels spends most of its time in them.
    """
    from torch._inductor.decomposition import select_decomp_table

    table = dict(select_decomp_table())
    aten = torch.ops.aten
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


# ------------------------------------------------------------------------------------------------
# Guards
# ------------------------------------------------------------------------------------------------


class _Guards:
    """What was true of the Python world when a program was recorded."""

    def __init__(self, pair: Pair) -> None:
        self._same: list[tuple[Any, Any, Any]] = []  # mapping, key, the very object
        self._equal: list[tuple[Any, Any, Any]] = []  # mapping, key, an equal value
        self._tensors: list[tuple[Tensor, tuple]] = []
        self._owners: dict[int, tuple[Any, list, list]] = {}  # objects, each with entries of either kind
        self._pair = pair

    def changed(self) -> str | None:
        """The name of something that is no longer as it was; None if all is."""
        for mapping, key, value in self._same:
            if mapping.get(key) is not value:
                return repr(key)
        for mapping, key, value in self._equal:
            found = mapping.get(key, _Guards)
            if found is not value and found != value:
                return repr(key)
        for tensor, facts in self._tensors:
            if (tensor.shape, tensor.dtype, tensor.requires_grad, tensor.stride()) != facts:
                return "the shape, dtype or requires_grad of a tensor"
        return None

    def keep(self, again: _Guards) -> None:
        """Leave out objects that another run did not meet, as it made its own."""
        for key, (_, same, equal) in self._owners.items():
            if key in again._owners:
                self._same += same
                self._equal += equal
        self._owners = {key: value for key, value in self._owners.items() if key in again._owners}

    def add_tensors(self, tensors: list[Tensor], messages: list[tuple[dict[str, Any], Any]]) -> None:
        """Watch the tensors that a program reads, and where the param store has them."""
        for t in tensors:
            self._tensors.append((t, (t.shape, t.dtype, t.requires_grad, t.stride())))
        params = pyro.get_param_store()._params
        for message, _ in messages:
            if params.get(message["name"]) is message["value"]:
                self._same.append((params, message["name"], message["value"]))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note what the code that runs in here may read."""
        frames: set[types.CodeType] = set()

        users: dict[Any, bool] = {}

        def look(frame: Any, event: str, _: Any) -> None:
            if event != "call":
                return
            code = frame.f_code
            known = users.get(code)
            if known is None:
                known = users[code] = _is_users(code.co_filename)
            if not known:
                return
            own = None
            if code.co_argcount:
                own = frame.f_locals.get(code.co_varnames[0])
            if own is not None and not isinstance(own, Tensor) and hasattr(own, "__dict__"):
                self._object(own)
            if code not in frames:
                free = {name: frame.f_locals.get(name) for name in code.co_freevars}
                frames.add(code)
                self._names(frame.f_globals, code.co_names)
                self._cells(code, free)

        def called(module: nn.Module, _: Any) -> None:
            self._object(module)

        for fn in (self._pair.model, self._pair.guide):
            self._callable(fn)
        hook = nn.modules.module.register_module_forward_pre_hook(called)
        before: Any = sys.getprofile()
        sys.setprofile(look)
        try:
            yield
        finally:
            sys.setprofile(None)
            if hasattr(before, "enable"):  # cProfile's
                before.enable()
            elif before is not None:
                sys.setprofile(before)
            hook.remove()

    def _callable(self, fn: Any) -> None:
        if isinstance(fn, types.MethodType):
            self._object(fn.__self__)
        elif isinstance(fn, types.FunctionType):
            wrapped = getattr(fn, "__wrapped__", None)
            if wrapped is not None:
                self._callable(wrapped)
        elif hasattr(fn, "__dict__"):
            self._object(fn)

    def _names(self, mapping: dict[str, Any], names: Sequence[str]) -> None:
        for name in names:
            if name in mapping:
                self._value(mapping, name, mapping[name], self._same, self._equal)

    def _cells(self, code: Any, free: dict[str, Any]) -> None:
        """The closure variables of the function that runs this code."""
        if not free:
            return
        for function in gc.get_referrers(code):
            if isinstance(function, types.FunctionType) and function.__code__ is code:
                same: list[Any] = []
                equal: list[Any] = []
                self._owners[id(function)] = function, same, equal
                for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
                    value = _Cell(cell).get(name)
                    if value is free.get(name):
                        self._value(_Cell(cell), name, value, same, equal)

    def _object(self, owner: Any) -> None:
        """The attributes of an object whose code runs."""
        if id(owner) in self._owners or isinstance(owner, (type, types.ModuleType, Tensor)):
            return
        same: list[Any] = []
        equal: list[Any] = []
        self._owners[id(owner)] = owner, same, equal
        attributes = vars(owner)
        internals = _MODULE_INTERNALS if isinstance(owner, nn.Module) else frozenset()
        for name, value in list(attributes.items()):
            if name not in internals:
                _note(attributes, name, value, same, equal)
        if isinstance(owner, nn.Module):
            for members in (owner._parameters, owner._buffers, owner._modules):
                same += [(members, name, value) for name, value in members.items()]
            for child in owner._modules.values():
                if child is not None:
                    self._object(child)
        for kind in type(owner).__mro__:
            if _is_users(getattr(sys.modules.get(kind.__module__), "__file__", None) or ""):
                for name, value in vars(kind).items():
                    if not name.startswith("__"):
                        _note(vars(kind), name, value, same, equal)

    def _value(self, mapping: Any, name: str, value: Any, same: list[Any], equal: list[Any]) -> None:
        """A global or a closure variable."""
        if not _note(mapping, name, value, same, equal) and _is_instance(value):
            self._object(value)


def _note(mapping: Any, name: str, value: Any, same: list[Any], equal: list[Any]) -> bool:
    """One name: a plain value by equality, a tensor or module by identity; whether it is any of that."""
    if isinstance(value, np.ndarray):
        raise _Refused(f"it can read a NumPy array ({name!r}), whose changes would go unseen")
    if isinstance(value, (Tensor, nn.Module)):
        same.append((mapping, name, value))
    elif _is_plain(value):
        equal.append((mapping, name, _copy(value)))
    elif isinstance(value, (list, tuple, dict)) and len(value) <= _LARGEST:
        same.append((mapping, name, value))
        items: Any = value if isinstance(value, dict) else _Items(value)
        for key, item in items.items():
            if isinstance(item, (Tensor, nn.Module)):
                same.append((items, key, item))
            elif _is_plain(item):
                equal.append((items, key, _copy(item)))
    else:
        return False
    return True


class _Cell:
    """A closure's cell as a mapping with one name."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:
            return default


class _Items:
    """A sequence as a mapping from indices."""

    def __init__(self, sequence: Any) -> None:
        self.sequence = sequence

    def get(self, index: int, default: Any = None) -> Any:
        return self.sequence[index] if index < len(self.sequence) else default

    def items(self) -> list[tuple[int, Any]]:
        return list(enumerate(self.sequence))


def _is_users(filename: str) -> bool:
    """Whether a file is neither of this package, its dependencies, nor of the standard library."""
    if not filename or filename.startswith("<frozen") or filename.startswith(_LIBRARIES):
        return False
    return not filename.startswith(_STDLIB) or "site-packages" in filename


def _is_instance(value: Any) -> bool:
    kind = type(value)
    if isinstance(value, (type, types.ModuleType, types.FunctionType)) or not hasattr(value, "__dict__"):
        return False
    return kind is types.SimpleNamespace or _is_users(
        getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _LARGEST:
        return all(isinstance(item, _PLAIN) for item in value)
    if isinstance(value, dict) and len(value) <= _LARGEST:
        return all(isinstance(item, _PLAIN) for item in value.values())
    return False


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict, set)) else value
