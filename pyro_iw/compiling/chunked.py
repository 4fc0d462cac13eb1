r"""A step in chunks as programs: one that gives a chunk's log-weights, and one that gives its gradients.

It is what :mod:`~pyro_iw.gradients.chunks` does, with each chunk of either pass a replay of one compiled
graph. In between, bound and weights follow from the log-weights of all particles as they do there, by no
program: that takes little time. The second pass draws the noise of the first again, from the random state
that was noted before each chunk; that it is the same is checked once, as the programs are made.

Chunks of another size have graphs of their own, as has the first one where it draws the others' minibatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._support.nested import leaves, map_leaves
from .._support.random_state import set_back
from ..gradients.chunks import InChunks, parts_of
from ..gradients.over_values import suited_to
from ..gradients.refusals import refuse_another_density
from ..tracing.batch_norm import watch_batch_norm
from ..tracing.guide_values import GuideValues
from ..tracing.minibatches import OneMinibatch
from ..tracing.traces import Pair
from .arguments import Refused
from .private import add_each
from .program import Piece, Program
from .recording import Body, record

__all__ = ["ChunkedStep"]


class _Drawn(NamedTuple):
    """What a first pass knows of particles: of a chunk's, and then of all.

    Attributes:
        log_weights, scale, log_q_weight, values: see :class:`~pyro_iw.gradients.chunks.Chunks`.
        minibatch: the subsamples of plates.
    """

    log_weights: Any
    scale: Any
    log_q_weight: Any
    values: GuideValues | None
    minibatch: dict[str, Any]


class _Kind(NamedTuple):
    """What makes the programs of chunks differ."""

    size: int
    draws_minibatch: bool  # if there is one; otherwise it is given


class _Chunk(NamedTuple):
    """Where a chunk lies among the particles, and all it takes to draw it again."""

    particles: slice
    kind: _Kind
    random_state: list[Tensor]


class ChunkedStep(Program):
    """A step as two programs for each kind of chunk.

    Arguments:
        pair: the pair and its arguments.
        args: the tensors among those, in order.
        kl_weight: the weight of the KL term.
        varies: whether that is an input of the programs, and not a number in them.
        step: how it is taken in chunks.

    Raises:
        Refused: if a recording would freeze what may change from step to step, or a chunk is another one when
            it is drawn again.
    """

    def __init__(
        self,
        pair: Pair,
        args: list[Tensor],
        kl_weight: float,
        varies: bool,
        step: InChunks,
    ) -> None:
        super().__init__(args, kl_weight, varies)
        self._step = step
        self._parts = parts_of(step.num_particles, step.chunk_size)
        self._first: dict[_Kind, tuple[Piece, _Drawn]] = {}  # with the places of a graph's outputs
        self._second: dict[_Kind, tuple[Piece, list[int]]] = {}  # with those of its gradients among all

        def make(body: Body, extras: list[Tensor]) -> tuple[Piece, Any]:
            recorded = record(pair, args, kl_weight if self.weight is None else self.weight, body, extras)
            return self.add(recorded, self.inputs(args, kl_weight, extras)), recorded

        def make_first(kind: _Kind, minibatch: dict[str, Any]) -> None:
            known: list[Tensor] = []
            told: list[_Drawn] = []
            body = _first_body(step, kind.size, _taken_apart(minibatch, known), told)
            self._first[kind] = make(body, known)[0], told[-1]

        self._kinds = [_Kind(_size(self._parts[0]), True)]
        make_first(self._kinds[0], {})
        undo = self.snapshot()
        try:
            drawn = self._draw(self._kinds[0], args, kl_weight, {})
            draws_minibatch = not drawn.minibatch  # the same as given none
            self._kinds += [_Kind(_size(part), draws_minibatch) for part in self._parts[1:]]
            for kind in self._kinds:
                if kind not in self._first:
                    make_first(kind, {} if kind.draws_minibatch else drawn.minibatch)
            undo()
            drawn, chunks = self._first_pass(args, kl_weight)
            weights = step.weigh(drawn)[1]
            found: dict[_Kind, Any] = {}
            for chunk in chunks:
                if chunk.kind not in found:
                    extras: list[Tensor] = []
                    apart = _taken_apart(_given(chunk, drawn, weights), extras)
                    found[chunk.kind] = make(_second_body(step, chunk.kind.size, apart), extras)
            for kind, (piece, recorded) in found.items():
                self._second[kind] = piece, self._places(recorded)
            self._second_pass(chunks, drawn, weights, args, kl_weight, check=True)
        finally:
            undo()

    def __call__(self, args: list[Tensor], kl_weight: float) -> Sequence[Tensor]:
        drawn, chunks = self._first_pass(args, kl_weight)
        estimate, weights = self._step.weigh(drawn)
        return [estimate.loss, *self._second_pass(chunks, drawn, weights, args, kl_weight)]

    def _draw(self, kind: _Kind, args: list[Tensor], kl_weight: float, minibatch: dict[str, Any]) -> _Drawn:
        """What a chunk's first program gives."""
        piece, places = self._first[kind]
        known: list[Tensor] = []
        if not kind.draws_minibatch:
            _taken_apart(minibatch, known)
        return _put_together(places, piece(self.inputs(args, kl_weight, known)))

    def _first_pass(self, args: list[Tensor], kl_weight: float) -> tuple[_Drawn, list[_Chunk]]:
        """The log-weights of all particles, and what it takes to draw them again."""
        chunks: list[_Chunk] = []
        minibatch: dict[str, Any] = {}
        every: _Drawn | None = None
        begin = self._step.begin
        with nullcontext() if begin is None else set_back():
            for part, kind in zip(self._parts, self._kinds, strict=True):
                if begin is not None:
                    begin(part.start)
                chunks.append(_Chunk(part, kind, self.random_state()))
                drawn = self._draw(kind, args, kl_weight, minibatch)
                if every is None:
                    every = drawn._replace(log_weights=map_leaves(self._empty, drawn.log_weights))
                    minibatch = drawn.minibatch
                for kept, some in zip(leaves(every.log_weights), leaves(drawn.log_weights), strict=True):
                    kept[part] = some
        assert every is not None
        if every.values is not None:
            nothing = torch.empty(0)
            weight: Any = kl_weight if self.weight is None else self.weight
            values = every.values._replace(log_q=nothing, counted=nothing, kl_weight=weight)
            every = every._replace(values=values)
        return every, chunks

    def _second_pass(
        self,
        chunks: list[_Chunk],
        drawn: _Drawn,
        weights: Any,
        args: list[Tensor],
        kl_weight: float,
        check: bool = False,
    ) -> list[Tensor]:
        """The gradients; the random state is left as it is."""
        weights = map_leaves(Tensor.contiguous, weights)
        log_weights = list(leaves(drawn.log_weights))
        totals: list[Any] = [None] * (len(self.leaves) + len(self.leaf_args))
        state = self.random_state()
        try:
            for chunk in chunks:
                self.set_random_state(chunk.random_state)
                piece, places = self._second[chunk.kind]
                extras: list[Tensor] = []
                _taken_apart(_given(chunk, drawn, weights), extras)
                results = piece(self.inputs(args, kl_weight, extras))
                if check:
                    for again, before in zip(results, log_weights, strict=False):
                        _refuse_another_chunk(again, before[chunk.particles])
                _add_to(totals, places, results[len(log_weights) :])
        finally:
            self.set_random_state(state)
        return totals

    def _empty(self, part: Tensor) -> Tensor:
        return part.new_empty((self._step.num_particles, *part.shape[1:]))

    def _places(self, recorded: Any) -> list[int]:
        """Where a graph's gradients belong among those of the step."""
        place = {id(leaf): index for index, leaf in enumerate(self.leaves)}
        of_args = [len(self.leaves) + self.leaf_args.index(index) for index in recorded.leaf_args]
        return [*(place[id(leaf)] for leaf in recorded.leaves), *of_args]


def _first_body(step: InChunks, size: int, minibatch: Any, told: list[_Drawn]) -> Body:
    """A chunk's log-weights; adds to ``told`` which output is what."""

    def body(pair: Pair, kl_weight: Any, extras: list[Tensor]) -> tuple[list[Tensor], None]:
        torch.clear_autocast_cache()  # of casts that belong to another graph
        with step.around(), OneMinibatch(_put_together(minibatch, extras)) as known:
            particles, _ = step.draw(kl_weight, pair, size, step.route, known)
        suited_to(step.estimator, particles).check(particles, step.bound)
        values: Any = particles.values
        if values is not None:
            values = values._replace(log_q=None, counted=None, kl_weight=None)
        drawn = _Drawn(particles.statistics, particles.scale, particles.log_q_weight, values, known.indices)
        outputs: list[Tensor] = []
        told.append(_taken_apart(drawn, outputs))
        return outputs, None

    return body


def _second_body(step: InChunks, size: int, given: Any) -> Body:
    """A chunk's log-weights once more, and its share of the gradients."""

    def body(pair: Pair, kl_weight: Any, extras: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        torch.clear_autocast_cache()
        minibatch, weights = _put_together(given, extras)
        with watch_batch_norm(restore=True), step.around(), OneMinibatch(minibatch):
            particles, _ = step.draw(kl_weight, pair, size, step.route, None)
        log_weights = list(leaves(particles.statistics))
        return log_weights, step.share(particles, weights, log_weights[0])

    return body


def _given(chunk: _Chunk, drawn: _Drawn, weights: Any) -> tuple[dict[str, Any], Any]:
    """What a chunk's second program is given: the minibatch, unless it draws that itself, and weights."""
    return {} if chunk.kind.draws_minibatch else drawn.minibatch, weights.of(chunk.particles)


def _add_to(totals: list[Any], places: list[int], grads: Sequence[Tensor]) -> None:
    old, new = [], []
    for place, grad in zip(places, grads, strict=True):
        if totals[place] is None:
            totals[place] = grad
        else:
            old.append(totals[place])
            new.append(grad)
    if old:
        with torch.no_grad():
            add_each(old, new)


def _refuse_another_chunk(again: Tensor, before: Tensor) -> None:
    try:
        refuse_another_density(again, before, "")
    except ValueError:
        raise Refused(
            "a chunk of particles has other log-weights when it is drawn again from the same random state"
        ) from None


def _size(part: slice) -> int:
    return part.stop - part.start


class _Place(int):
    """The place of a tensor in a list."""


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """The same containers with numbers in the place of tensors, which are added to a list."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return _Place(len(tensors) - 1)

    return map_leaves(take, value)


def _put_together(value: Any, tensors: Sequence[Tensor]) -> Any:
    """What was taken apart, with other tensors."""
    return map_leaves(lambda leaf: tensors[leaf] if isinstance(leaf, _Place) else leaf, value)
