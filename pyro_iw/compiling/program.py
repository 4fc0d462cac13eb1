r"""A recorded step as a program: its inputs, what it leaves behind, and how it is taken back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import transform_to

from ..gradients.graph import has_hooks
from ..gradients.surrogate import Estimate, refuse_second_derivative
from ..tracing.handlers import handlers_in_force
from ..tracing.traces import Pair
from . import inductor
from .arguments import Refused
from .hoisting import take_out_constants
from .private import add_each, params_of_store
from .recording import Recorded, record

__all__ = ["CompiledStep", "Evaluation", "Program", "make_evaluation", "make_program"]


class Program:
    """A compiled step and where its inputs come from.

    Arguments:
        function: the compiled graph, of a list of inputs.
        recorded: the graph's inputs and outputs.
        args: the arguments that it was recorded with.
        weight: holds the weight of the KL term, if that is an input.
    """

    def __init__(
        self,
        function: Callable[[list[Tensor]], Sequence[Tensor]],
        recorded: Recorded,
        args: list[Tensor],
        weight: Tensor | None,
    ) -> None:
        self.function = function
        self.fixed = recorded.fixed
        self.leaves = recorded.leaves
        self.leaf_args = recorded.leaf_args
        self.guards = recorded.guards
        self.generators = recorded.generators
        self.weight = weight
        self.messages = [_message(site) for site in recorded.params]
        # The next step's arguments are others.
        own = {arg.untyped_storage().data_ptr() for arg in args}
        self.written = [t for t in recorded.written if t.untyped_storage().data_ptr() not in own]
        self.device = next((t.device for t in self.fixed if t.device.type == "cuda"), None)

    def run(self, args: list[Tensor], kl_weight: float) -> CompiledStep:
        """Take a step with these arguments."""
        return CompiledStep(self, args, kl_weight)

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
        generators = [torch.default_generator, *self.generators]
        states = [generator.get_state() for generator in generators]
        cuda = None if self.device is None else torch.cuda.get_rng_state(self.device)
        values = [tensor.clone() for tensor in self.written]

        def undo() -> None:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            if cuda is not None:
                assert self.device is not None
                torch.cuda.set_rng_state(cuda, self.device)
            with torch.no_grad():
                for tensor, value in zip(self.written, values, strict=True):
                    tensor.copy_(value)

        return undo

    def emit_params(self) -> None:
        """Send the handlers outside, such as SVI's, the parameters that the eager step would touch."""
        for messenger in handlers_in_force():
            add_node = messenger.trace.add_node
            for message, constraint in self.messages:
                leaf = message["value"]
                if constraint is not None:
                    message = {**message, "value": transform_to(constraint)(leaf)}
                # As the param store does at each access; saving the store takes it off.
                message["value"].unconstrained = weakref.ref(leaf)
                add_node(message["name"], **message)


class CompiledStep:
    """One run of a program: a loss, and the gradients that its backward pass would give.

    Attributes:
        loss: minus the bound, a detached scalar.
    """

    def __init__(self, program: Program, args: list[Tensor], kl_weight: float) -> None:
        self._leaves = [*program.leaves, *(args[index] for index in program.leaf_args)]
        self._emit = program.emit_params
        self._undo = program.snapshot()
        self.loss, *self._grads = program(args, kl_weight)

    def accumulate(self) -> None:
        """Add the gradients to the leaves' ``.grad`` and tell Pyro's handlers of the parameters."""
        self._emit()
        if any(leaf.grad_fn is not None or has_hooks(leaf) for leaf in self._leaves):
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
                add_each(old, new)

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


class Evaluation:
    """A compiled function without gradients, in two parts.

    Arguments:
        once: what is the same from call to call, as a graph of all inputs; None if nothing is.
        function: the rest, compiled, of these inputs and the results of the first part.
        recorded: the inputs that are held by reference, and what else it depends on.
        varying: how many of the arguments are others in each call, the last ones.
    """

    def __init__(
        self,
        once: Callable[..., Sequence[Tensor]] | None,
        function: Callable[[list[Tensor]], Sequence[Tensor]],
        recorded: Recorded,
        varying: int,
    ) -> None:
        self.once = once
        self.function = function
        self.fixed = recorded.fixed
        self.guards = recorded.guards
        self.varying = varying
        self.on_gpu = any(tensor.device.type == "cuda" for tensor in self.fixed)

    def start(self, args: list[Tensor]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        """Compute what is the same in all calls.

        Arguments:
            args: all arguments, of the first call.

        Returns:
            A function of those that vary.
        """
        inputs = [*self.fixed, *args]
        with torch.no_grad():
            once = [] if self.once is None else list(self.once(*inputs))
        same = inputs[: len(inputs) - self.varying]

        def evaluate(varying: Sequence[Tensor]) -> Sequence[Tensor]:
            with torch.no_grad():
                if not self.on_gpu:
                    return self.function([*same, *varying, *once])
                torch.compiler.cudagraph_mark_step_begin()
                # The next replay of a CUDA graph writes over what this one returns.
                return [out.clone() for out in self.function([*same, *varying, *once])]

        return evaluate


class _Attached(torch.autograd.Function):
    """A loss whose gradients with respect to some leaves are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        grads: Sequence[Tensor] = ctx.saved_tensors
        # The usual factor of 1 is not worth a pass over the parameters; elsewhere reading it would wait.
        if grad.device.type != "cpu" or grad.item() != 1:
            grads = [saved * grad for saved in grads]
        return (None, None, *grads, *[None] * len(grads))


def make_program(
    pair: Pair,
    args: list[Tensor],
    kl_weight: float,
    varies: bool,
    estimate: Callable[[Pair, Any], tuple[Any, Estimate]],
) -> Program:
    """Record a step and compile it.

    Arguments:
        pair: the pair and its arguments.
        args: the tensors among those, in order.
        kl_weight: the weight of the KL term.
        varies: whether that is an input of the program, and not a number in it.
        estimate: what a step computes, given a pair and a weight.

    Raises:
        Refused: if a recording would freeze what may change from step to step.
    """
    device = next((arg.device for arg in args if arg.device.type == "cuda"), torch.device("cpu"))
    weight = None
    if varies:
        weight = torch.tensor(float(kl_weight), dtype=torch.float64, device=device)
    recorded = record(pair, args, kl_weight if weight is None else weight, estimate)
    example = [*recorded.fixed, *args, *([] if weight is None else [weight])]
    plain = [tensor.detach() for tensor in example]
    function = inductor.inductor(recorded.graph, plain)
    return Program(function, recorded, args, weight)


def make_evaluation(
    pair: Pair, args: list[Tensor], varying: int, estimate: Callable[[Pair, Any], tuple[Any, list[Tensor]]]
) -> Evaluation:
    """Record a function without gradients and compile it.

    Arguments:
        pair: the pair and the function's arguments.
        args: the tensors among those, in order.
        varying: how many of the last of them are others in each call.
        estimate: what the function computes, given a pair.

    Raises:
        Refused: if a recording would freeze what may change from call to call.
    """
    recorded = record(pair, args, 1.0, estimate)
    plain = [tensor.detach() for tensor in (*recorded.fixed, *args)]
    once, results = take_out_constants(recorded.graph, plain, varying)
    function = inductor.inductor(recorded.graph, [*plain, *results])
    return Evaluation(once, function, recorded, varying)


def _message(site: Any) -> tuple[dict[str, Any], Any]:
    """A param message with the leaf for its value; and the constraint, unless there is none."""
    value = site["value"]
    reference = getattr(value, "unconstrained", None)
    leaf = value if reference is None else reference()
    if leaf is value:
        return dict(site), None
    leaves, constraints = params_of_store(pyro.get_param_store())
    if leaves.get(site["name"]) is leaf:
        constraint = constraints[site["name"]]
    else:  # a PyroParam of a module that keeps its own
        constraint = site["kwargs"].get("constraint")
    if constraint is None:
        raise Refused(f"parameter {site['name']!r} does not say how it is constrained")
    return {**site, "value": leaf}, constraint
