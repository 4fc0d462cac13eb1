r"""Exact gradients of any number of particles in the memory of a few: ``chunk_size=``.

The weights of the gradient need the log-weights of all particles, but no more than those. So there are two
passes over the particles, chunk by chunk. The first keeps the log-weights, from which follow the bound and
all weights, and the random state before each chunk. The second, which is the backward pass, draws each chunk
again from its own random state, this time to keep its graph, and takes its share of the gradient from it at
once. No more than one chunk's graph is alive at a time.

A chunk's share is :math:`\sum_i a_i \nabla \log p(x, z_i) + \dots` over its particles, with the weights of
all, so the shares add up to the gradient of one pass, whatever the bound and the estimator. What it costs is
a second forward pass.

References:
    | Training Deep Nets with Sublinear Memory Cost (Chen et al., 2016), https://arxiv.org/abs/1604.06174
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from .._support.devices import autocast_dtype
from .._support.nested import leaves, map_leaves
from .._support.random_state import RandomState, set_back
from ..bounds import Bound
from ..tracing.batch_norm import watch_batch_norm
from ..tracing.guide_values import GuideValues, without_densities
from ..tracing.handlers import handlers_in_force, under_handlers
from ..tracing.minibatches import OneMinibatch
from ..tracing.particles import Particles
from ..tracing.sites import Site
from ..tracing.traces import Pair, Route
from .estimator import Estimator
from .graph import Graph, without_hooks
from .over_values import suited_to
from .refusals import refuse_another_density
from .surrogate import Estimate, Weights, refuse_second_derivative

__all__ = ["Chunks", "Draw", "InChunks", "estimate_in_chunks", "parts_of"]

#: Draws a number of particles of a pair by a route, as part of a minibatch if one is given, from the random
#: state that the last argument gives, if there is one.
Draw = Callable[
    [Pair, int, "Route | None", "OneMinibatch | None", "Callable[[], RandomState] | None"],
    "tuple[Particles, RandomState | None]",
]


class InChunks(NamedTuple):
    """How a step is taken chunk by chunk: log-weights of all chunks; weights of all; gradients of each.

    Attributes:
        draw: draws the particles of a chunk, given the weight of the KL term and what a :data:`Draw` takes.
        estimator: the estimator.
        bound: the bound.
        route: how latent values travel, as the estimator wants it; None where gradients are disabled.
        num_particles: the number S of particles.
        chunk_size: the number of particles in a chunk; the last may have fewer.
        begin: sets the random state that a chunk is drawn from, given its first particle, where that is not
            the one that the chunk before it has left. Then the state is left as it was, in the end.
        around: a handler around each run of the pair in a compiled step.
    """

    draw: Callable[..., tuple[Particles, RandomState | None]]
    estimator: Estimator
    bound: Bound
    route: Route | None
    num_particles: int
    chunk_size: int
    begin: Callable[[int], RandomState] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def weigh(self, chunks: Any) -> tuple[Estimate, Any]:
        """The loss, without gradients, and the weights of all particles.

        Arguments:
            chunks: what is known of all particles: ``log_weights``, ``scale``, ``log_q_weight`` and
                ``values`` as of :class:`Chunks`.
        """
        estimator = suited_to(self.estimator, chunks)
        estimate = estimator.evaluate(self.bound, chunks.log_weights, chunks.scale)
        weights = estimator.weights(self.bound, chunks.log_weights, chunks.log_q_weight, chunks.scale)
        if isinstance(weights, Weights) and (self.route is None or self.route.through is None):
            weights = weights._replace(path=weights.model)  # and not one more tensor for all particles
        return estimate, weights

    def share(self, particles: Particles, weights: Any, like: Tensor) -> Tensor:
        """A zero with a chunk's share of the gradient.

        Arguments:
            particles: those of the chunk.
            weights: their weights.
            like: a tensor of the loss's dtype and device.
        """
        return suited_to(self.estimator, particles).attach(like.new_zeros(()), particles, weights, self.route)


def parts_of(num_particles: int, chunk_size: int) -> list[slice]:
    """Where each chunk lies among the particles."""
    starts = range(0, num_particles, chunk_size)
    return [slice(start, min(start + chunk_size, num_particles)) for start in starts]


class _Chunk(NamedTuple):
    """Where a chunk lies among the particles, and all it takes to draw it again."""

    particles: slice
    random_state: RandomState
    minibatch: dict[str, Any]

    @property
    def size(self) -> int:
        return self.particles.stop - self.particles.start


class Chunks:
    """S particles drawn chunk by chunk, of which the log-weights are kept.

    Arguments:
        draw: draws the particles of a chunk.
        pair: the pair and its arguments.
        step: how the step is taken.
        look: called with the particles of each chunk.

    Attributes:
        log_weights: log p(x, z) - log q(z | x), of shape ``[S, *cells]``, in nats, detached; or those of two
            levels, or what else :attr:`Particles.statistics` are.
        scale: see :class:`Particles`.
        log_q_weight: see :class:`Particles`.
        values: those of the first chunk, see :class:`Particles`.

    Raises:
        ValueError: if two chunks differ in their cells.
    """

    log_weights: Any
    scale: Any
    log_q_weight: Any
    values: GuideValues | None

    def __init__(
        self,
        draw: Draw,
        pair: Pair,
        step: InChunks,
        look: Callable[[Particles], None] = lambda particles: None,
    ) -> None:
        self._draw = draw
        self._pair = pair
        self._route = step.route
        self._begin = step.begin
        self._look = look
        self._chunks: list[_Chunk] = []
        # What is kept of each chunk goes to memory set aside beforehand. Between the large blocks that come
        # and go with a chunk, it would keep the allocator from using those again.
        state = torch.get_rng_state()
        parts = parts_of(step.num_particles, step.chunk_size)
        self._cpu_states = state.new_empty((len(parts), *state.shape))
        with nullcontext() if step.begin is None else set_back(), OneMinibatch() as minibatch:
            for part in parts:
                log_weights = self._first_pass(part, minibatch)
                if part.start == 0:
                    self.log_weights = map_leaves(
                        lambda some: some.new_empty((step.num_particles, *some.shape[1:])), log_weights
                    )
                for kept, some in zip(leaves(self.log_weights), leaves(log_weights), strict=True):
                    kept[part] = some

    def _first_pass(self, part: slice, minibatch: OneMinibatch) -> Any:
        """The log-weights of a chunk. Nothing else of it outlives this call."""
        known = dict(minibatch.indices)
        torch.clear_autocast_cache()  # of casts that belong to another chunk's graph
        begin = RandomState.now if self._begin is None else partial(self._begin, part.start)
        particles, state = self._draw(self._pair, part.stop - part.start, self._route, minibatch, begin)
        assert state is not None
        if self._chunks:
            state = state.sharing(self._chunks[-1].random_state)
        cpu = self._cpu_states[len(self._chunks)].copy_(state.cpu)
        chunk = _Chunk(part, state._replace(cpu=cpu), known)
        cells = particles.cells
        if not self._chunks:
            self._cells, self.scale, self.log_q_weight = cells, particles.scale, particles.log_q_weight
            self.values = without_densities(particles.values)
        elif cells != self._cells:
            raise ValueError(
                f"Particles {part.start} to {part.stop - 1} have cells {cells}, those before "
                f"them {self._cells}. With chunk_size all particles must have the same plates; pass plates= "
                "to name those to keep."
            )
        self._look(particles)
        self._chunks.append(chunk)
        return map_leaves(Tensor.detach, particles.statistics)

    def draw_again(self, visit: Callable[[slice, Particles], bool | None]) -> None:
        """Draw every chunk once more, the same as before. The random state is left as it is.

        Arguments:
            visit: called with the position of each chunk and its particles, which should not outlive the
                call; returns True to stop.
        """
        random_state = RandomState.now()
        try:
            with watch_batch_norm(restore=True):
                for chunk in self._chunks:
                    chunk.random_state.restore()
                    torch.clear_autocast_cache()
                    with OneMinibatch(chunk.minibatch):
                        # Never by a name here, which would keep it alive beside the next.
                        if visit(
                            chunk.particles, self._draw(self._pair, chunk.size, self._route, None, None)[0]
                        ):
                            break
        finally:
            random_state.restore()

    def first_site(self, where: Callable[[Tensor], Tensor], role: str | None = None) -> Site | None:
        """The first site with a log density for which ``where`` holds anywhere, as of :class:`Particles`."""
        found = None

        def visit(_: slice, particles: Particles) -> bool:
            nonlocal found
            found = particles.first_site(where, role)
            return found is not None

        with torch.no_grad():
            self.draw_again(visit)
        return found


def estimate_in_chunks(pair: Pair, kl_weight: float, step: InChunks) -> tuple[Chunks, Estimate]:
    """The loss of S particles, whose gradient is taken chunk by chunk in its backward pass.

    Arguments:
        pair: the pair and its arguments.
        kl_weight: the weight of the KL term.
        step: how the step is taken.

    Raises:
        ValueError: as :class:`Chunks`, as the estimator's ``check``, and if a tensor with a graph of its own
            comes into model or guide other than as an argument.
    """
    bound, draw = step.bound, partial(step.draw, kl_weight)
    if not torch.is_grad_enabled():
        chunks = Chunks(draw, pair, step)
        estimator = suited_to(step.estimator, chunks)
        return chunks, estimator.evaluate(bound, chunks.log_weights, chunks.scale)
    pair, sources, cut = _cut_arguments(pair)
    # The first pass runs with gradients too: what the estimator has to check and which tensors the gradient
    # leads to can be told from a chunk's graph, which is then dropped.
    graph = Graph(cut)

    def look(particles: Particles) -> None:
        suited = suited_to(step.estimator, particles)
        suited.check(particles, bound)
        graph.explore(suited.densities(particles))

    def draw_watched(*args: Any) -> tuple[Particles, RandomState | None]:
        graph.start()
        return draw(*args)

    chunks = Chunks(draw_watched, pair, step, look)
    estimate, weights = step.weigh(chunks)
    if not graph.leaves:
        return chunks, estimate
    inputs = list(graph.leaves.values())
    surroundings = _Surroundings(estimate.loss.device.type)

    def gradients(grad: Tensor, needed: list[bool]) -> list[Tensor | None]:
        """Those of the inputs, None for what needs none."""
        wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
        totals: list[Tensor | None] = [None] * len(wanted)

        def visit(part: slice, particles: Particles) -> None:
            if is_validation_enabled():
                log_weights = zip(leaves(particles.statistics), leaves(chunks.log_weights), strict=True)
                for again, before in log_weights:
                    refuse_another_density(again, before[part], _DRAWN_AGAIN)
            graph.explore(suited_to(step.estimator, particles).densities(particles), known=True)
            share = step.share(particles, weights.of(part), grad)
            if share.requires_grad:
                found = torch.autograd.grad(share, wanted, grad, allow_unused=True)
                totals[:] = [_add(total, new) for total, new in zip(totals, found, strict=True)]

        with surroundings.again(), without_hooks(wanted), torch.enable_grad():
            chunks.draw_again(visit)
        results = iter(totals)
        return [next(results) if is_needed else None for is_needed in needed]

    origins = [sources.get(id(tensor), tensor) for tensor in inputs]
    return chunks, estimate._replace(loss=_Chunked.apply(estimate.loss, gradients, *origins))


def _add(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    if new is None:
        return total
    if total is None:
        return new.clone()  # autograd may have given the same tensor to several
    return total + new if total.is_sparse else total.add_(new)


_DRAWN_AGAIN = (
    "A chunk of particles has other log-weights when it is drawn again from the same random state, so its "
    "gradient would be wrong. chunk_size needs all randomness to come from PyTorch's, NumPy's or Python's "
    "global generators, and model, guide and parameters not to change between the loss and its backward pass."
)


class _Chunked(torch.autograd.Function):
    """A loss whose gradients with respect to some tensors are computed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Callable, *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*inputs)  # so that to change them in place before the backward pass is an error
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        assert len(ctx.saved_tensors) == len(ctx.needs_input_grad) - 2
        return None, None, *ctx.gradients(grad, ctx.needs_input_grad[2:])


def _cut_arguments(pair: Pair) -> tuple[Pair, dict[int, Tensor], list[Tensor]]:
    """Replace arguments that have a graph of their own, which every chunk would run through anew.

    Returns:
        The pair with leaves in their place; what each leaf, by its id, stands for; the leaves.
    """
    sources: dict[int, Tensor] = {}
    stand_ins: list[Tensor] = []

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad or value.is_leaf:
            return value
        leaf = value.detach().requires_grad_()
        sources[id(leaf)] = value
        stand_ins.append(leaf)
        return leaf

    args, kwargs = map_leaves(cut, (pair.args, pair.kwargs))
    return (pair._replace(args=args, kwargs=kwargs) if stand_ins else pair), sources, stand_ins


class _Surroundings:
    """Pyro's handlers and autocasting as they are now, for a backward pass that runs elsewhere.

    Arguments:
        kind: the type of the device in use.
    """

    def __init__(self, kind: str) -> None:
        self._handlers = handlers_in_force()
        self._cache = torch.is_autocast_cache_enabled()
        self._autocast = [(kind, autocast_dtype(kind)) for kind in {kind, "cpu"}]

    @contextmanager
    def again(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(under_handlers(self._handlers))
            for kind, dtype in self._autocast:
                if dtype is not None:
                    stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._cache))
                elif autocast_dtype(kind) is not None:
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
