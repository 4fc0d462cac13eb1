r"""A recorded step as a program: its inputs, what it leaves behind, and how it is taken back."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import transform_to

from .._support.devices import rng_state, set_rng_state, wide_dtype
from ..gradients.graph import has_hooks
from ..gradients.surrogate import Estimate, refuse_second_derivative
from ..tracing.handlers import handlers_in_force
from ..tracing.traces import Pair
from . import inductor
from .arguments import Refused
from .guards import Guards
from .private import add_each, params_of_store, times_each
from .recording import Recorded, record

__all__ = ["CompiledStep", "Piece", "Program", "WholeStep"]


class Piece:
    """A compiled graph, and the tensors that it reads by reference.

    Arguments:
        recorded: the graph.
        inputs: examples of its further inputs.
    """

    def __init__(self, recorded: Recorded, inputs: Sequence[Tensor]) -> None:
        self.fixed = recorded.fixed
        self.device = next((t.device for t in self.fixed if t.device.type != "cpu"), None)
        self.function = inductor.inductor(recorded.graph, [t.detach() for t in (*self.fixed, *inputs)])

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the graph gives for these further inputs."""
        with torch.no_grad():
            if self.device is None or self.device.type != "cuda":
                return self.function([*self.fixed, *inputs])
            return inductor.replayed(self.function, [*self.fixed, *inputs])


class Program(ABC):
    """A compiled step: what it is made for, what it leaves behind and how it is taken back.

    Arguments:
        args: the arguments that it was recorded with.
        kl_weight: the weight of the KL term.
        varies: whether that is an input of the program, and not a number in it.

    Attributes:
        weight: holds that weight, if it is an input.
        leaves, leaf_args, generators: as of :class:`Recorded`.
    """

    def __init__(self, args: list[Tensor], kl_weight: float, varies: bool) -> None:
        self.weight: Tensor | None = None
        if varies:
            device = next((arg.device for arg in args if arg.device.type != "cpu"), torch.device("cpu"))
            self.weight = torch.tensor(float(kl_weight), dtype=wide_dtype(device), device=device)
        self.leaves: list[Tensor] = []
        self.leaf_args: list[int] = []
        self.generators: list[torch.Generator] = []
        self.written: list[Tensor] = []
        self.messages: list[tuple[dict[str, Any], Any]] = []
        self.device: torch.device | None = None
        self._guards: list[Guards] = []
        # The next step's arguments are others.
        self._own = {arg.untyped_storage().data_ptr() for arg in args}

    @abstractmethod
    def __call__(self, args: list[Tensor], kl_weight: float) -> Sequence[Tensor]:
        """The loss, and the gradients of the leaves and of the arguments that get some."""

    def run(self, args: list[Tensor], kl_weight: float) -> CompiledStep:
        """Take a step with these arguments."""
        return CompiledStep(self, args, kl_weight)

    def changed(self) -> str | None:
        """The name of something that is no longer as it was recorded; None if all is."""
        for guards in self._guards:
            changed = guards.changed()
            if changed is not None:
                return changed
        return None

    def add(self, recorded: Recorded, inputs: Sequence[Tensor]) -> Piece:
        """Compile a graph as a piece of this program, given examples of its further inputs."""
        piece = Piece(recorded, inputs)
        self.device = self.device or piece.device
        self._guards.append(recorded.guards)
        _extend(self.generators, recorded.generators)
        _extend(self.leaves, recorded.leaves)
        self.leaf_args += [index for index in recorded.leaf_args if index not in self.leaf_args]
        _extend(
            self.written, [t for t in recorded.written if t.untyped_storage().data_ptr() not in self._own]
        )
        self.messages = [_message(site) for site in recorded.params]
        return piece

    def inputs(self, args: Sequence[Tensor], kl_weight: float, extras: Sequence[Tensor] = ()) -> list[Tensor]:
        """A piece's further inputs."""
        if self.weight is None:
            return [*args, *extras]
        return [*args, *extras, self.weight.fill_(float(kl_weight))]

    def random_state(self) -> list[Tensor]:
        """The state of all generators that the program draws from."""
        states = [generator.get_state() for generator in (torch.default_generator, *self.generators)]
        return states if self.device is None else [*states, rng_state(self.device)]

    def set_random_state(self, states: Sequence[Tensor]) -> None:
        """Put the generators to where they were."""
        generators = (torch.default_generator, *self.generators)
        for generator, state in zip(generators, states, strict=False):
            generator.set_state(state)
        if self.device is not None:
            set_rng_state(states[-1], self.device)

    def snapshot(self) -> Callable[[], None]:
        """What puts the random state, and the tensors that the program writes to, back to now."""
        states = self.random_state()
        values = [(tensor, tensor.clone()) for tensor in self.written]

        def undo() -> None:
            self.set_random_state(states)
            with torch.no_grad():
                for tensor, value in values:
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


class WholeStep(Program):
    """A step as one graph.

    Arguments:
        pair: the pair and its arguments.
        args: the tensors among those, in order.
        kl_weight: the weight of the KL term.
        varies: whether that is an input of the program, and not a number in it.
        estimate: what a step computes, given a pair and a weight.

    Raises:
        Refused: if a recording would freeze what may change from step to step.
    """

    def __init__(
        self,
        pair: Pair,
        args: list[Tensor],
        kl_weight: float,
        varies: bool,
        estimate: Callable[[Pair, Any], tuple[Any, Estimate]],
    ) -> None:
        super().__init__(args, kl_weight, varies)

        def body(pair: Pair, kl_weight: Any, _: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            loss = estimate(pair, kl_weight)[1].loss
            return [loss], loss

        recorded = record(pair, args, kl_weight if self.weight is None else self.weight, body)
        self._piece = self.add(recorded, self.inputs(args, kl_weight))

    def __call__(self, args: list[Tensor], kl_weight: float) -> Sequence[Tensor]:
        return self._piece(self.inputs(args, kl_weight))


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
            grads = times_each(grads, grad)
        return (None, None, *grads, *[None] * len(grads))


def _extend(known: list, found: Iterable) -> None:
    """Add what is not there yet, by identity."""
    for item in found:
        if not any(item is other for other in known):
            known.append(item)


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
