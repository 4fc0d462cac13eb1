r"""A particle filter over every cell: its own weights, its own effective sample size, its own ancestors.

M filters of K particles each run side by side over every sequence of a minibatch. With the log-weight of a
step,

.. math:: \ell_{t,k} = \log p(z_{t,k}, x_t \mid h_{t-1,k}) - \log q(z_{t,k} \mid h_{t-1,k}, x),

where :math:`h` is the state, a particle's weight since the last resampling is :math:`e^{L_k}, L_k = \sum_t
\ell_{t,k}`. When its effective number :math:`(\sum_k e^{L_k})^2 / \sum_k e^{2 L_k}` falls below
:math:`\tau K`, the cell is resampled: the estimate takes in :math:`\log \frac1K \sum_k e^{L_k}`, the
particles take over the state of ancestors drawn by weight, and :math:`L` starts from 0. So

.. math:: V = \sum_{\text{blocks}} \log \frac1K \sum_k e^{L_k}, \qquad E[e^V] = p(x)

for every threshold and scheme (Del Moral, 2004). A sequence that has ended, all of
whose sites are masked, is not resampled again.

References:
    | Novel Approach to Nonlinear/Non-Gaussian Bayesian State Estimation (Gordon et al., 1993)
    | Feynman-Kac Formulae (Del Moral, 2004)
    | Filtering Variational Objectives (Maddison et al., 2017), https://arxiv.org/abs/1705.09279
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from .._support.arguments import positive_integer
from .._support.random_state import RandomState
from ..logmean import logmeanexp, softmax
from ..resampling import multinomial, systematic
from ..tracing.messages import carries_density, masks_of, unmasked
from ..tracing.minibatches import OneMinibatch
from ..tracing.particles import Particles, collect
from ..tracing.runner import ORDINARY, speaks_for_itself
from ..tracing.traces import PARTICLE_PLATE, Route, Traces
from .probing import Known, Unknown, learn, refuse_enumeration
from .protocol import INIT, Protocol, Sequences, march, moment_name, naming
from .state import FilterState, Leaf, take

__all__ = ["SCHEMES", "Draw", "Filter", "Filtered", "Moment"]

#: The ways to draw ancestors.
SCHEMES: dict[str, Callable[[Tensor, int], Tensor]] = {"systematic": systematic, "multinomial": multinomial}


class Draw(NamedTuple):
    """A resampling, before a moment.

    Attributes:
        chosen: which cells are resampled, ``[M, *cells]``.
        ancestors: the particle that each takes over from, ``[S, *cells]``.
        counts: how many take over from each, ``[S, *cells]``.
    """

    chosen: Tensor
    ancestors: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Moment:
    """``init`` or a step of a filter.

    Attributes:
        index: which; -1 is ``init``.
        draw: the resampling that it began with, None if no cell was resampled.
        particles: the particles, whose densities are the sums since each cell's last resampling, ``[S,
            *cells]``.
        closed: the estimate up to that resampling, ``[M, *cells]``, in nats, detached; 0 if there was none.
        active: the cells that are not masked, ``[*cells]``; None for all of them.
        traces: of guide and model.
    """

    index: int
    draw: Draw | None
    particles: Particles
    closed: Tensor | float
    active: Tensor | None
    traces: Traces


@dataclass(frozen=True)
class Filtered:
    """A filter that has run.

    Attributes:
        moments: those that have sites, in order.
        num_filters: the number M of filters a cell.
        num_particles: the number K of particles of each.
        known: what is known of the pair.
        scale: the factor outside the logarithm, a number or a tensor that broadcasts to ``[*cells]``.
    """

    moments: list[Moment]
    num_filters: int
    num_particles: int
    known: Known | None = None
    scale: float | Tensor = field(default=1.0)

    def log_weights(self, moment: Moment) -> Tensor:
        """Log-weights since the last resampling, ``[M, K, *cells]``, detached."""
        return self.grouped(moment.particles.log_weights.detach())

    def estimate(self, moment: Moment) -> Tensor:
        """The estimate of log p of what has come up to this moment, ``[M, *cells]``, in nats, detached."""
        return moment.closed + logmeanexp(self.log_weights(moment), 1)

    def grouped(self, tensor: Tensor) -> Tensor:
        """``[S, *cells]`` as ``[M, K, *cells]``."""
        return tensor.reshape(self.num_filters, self.num_particles, *tensor.shape[1:])

    @property
    def value(self) -> Tensor:
        """The estimate of log p(x), ``[M, *cells]``, in nats, detached."""
        return self.estimate(self.moments[-1])


class Filter:
    """Runs pairs of the SMC protocol, and remembers what it learnt of each.

    Arguments:
        num_particles: the number K of particles; an integer >= 1.
        ess_threshold: :math:`\\tau` in [0, 1]: 0 never resamples, 1 does before every step.
        resampling: the name of a scheme in :data:`SCHEMES`.
        plates: names of the plates to keep; None for those common to all sites.
        max_plate_nesting: number of batch dims that the plates take; found by a probe if infinite.
        warn_once: called with a message.
        num_filters: the number M of filters a cell.
        looks: whether it may look, on a CPU, if any cell is to be resampled, and save the work.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        num_particles: int,
        ess_threshold: float,
        resampling: str,
        plates: Sequence[str] | None,
        max_plate_nesting: float,
        warn_once: Callable[[str], None],
        num_filters: int = 1,
        looks: bool = True,
    ) -> None:
        if resampling not in SCHEMES:
            raise ValueError(f"resampling must be one of {sorted(SCHEMES)}, got {resampling!r}")
        if isinstance(ess_threshold, bool) or not isinstance(ess_threshold, int | float):
            raise ValueError(f"ess_threshold must be a number in [0, 1], got {ess_threshold!r}")
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold must be a number in [0, 1], got {ess_threshold!r}")
        self.num_particles = num_particles
        self.num_filters = positive_integer("num_filters", num_filters)
        self.ess_threshold = ess_threshold
        self.resampling = resampling
        self.plates = plates
        self.max_plate_nesting = max_plate_nesting
        self.warn_once = warn_once
        self.looks = looks
        self._known: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Known]]
        self._known = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # What was learnt holds weak references, which do not pickle, and is soon relearnt.
        return {**vars(self), "_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _known=weakref.WeakKeyDictionary())

    def run(
        self,
        pair: Protocol,
        sequences: Sequences,
        kl_weight: float = 1.0,
        route: Callable[[int], Route | None] = lambda moment: None,
        visit: Callable[[Moment, FilterState], None] | None = None,
    ) -> Filtered:
        """Filter the sequences.

        Arguments:
            pair: the pair.
            sequences: the arguments.
            kl_weight: the weight of the prior and of the guide's density.
            route: how latent values travel from guide to model, by moment.
            visit: called with every moment and the state after it, in place of keeping all of them: then the
                last alone is kept.

        Raises:
            ValueError: if the pair cannot be filtered, naming the step, and the site or the tensor of the
                state.
            NotImplementedError: if a site is to be enumerated; it is named.
        """
        known = self.prepare(pair, sequences)
        began = RandomState.now()
        options = pair, sequences, kl_weight, route, visit
        try:
            return self._run(*options, known)
        except Unknown:
            known = self._learn(pair, sequences, known)
        except Exception as error:
            if type(error) not in ORDINARY or speaks_for_itself(error):
                raise
            again = self._learn_if_possible(pair, sequences, known)
            if again is None or again.nesting == known.nesting:
                raise
            known = again  # there were more plates, beside the particles' dim
        began.restore()
        try:
            return self._run(*options, known)
        except Unknown:
            raise ValueError(
                "The plates around the sites, or the tensors in the state, are others in every run on the "
                "same arguments. Let them depend on nothing but the arguments and the step."
            ) from None

    def prepare(self, pair: Protocol, sequences: Sequences) -> Known:
        """Get to know the pair, and make its lazy parameters."""
        pair.check()
        try:
            known = self._known.get(pair.guide, {}).get(pair.model)
        except TypeError:
            known = None
        if known is None or not known.covers(sequences):
            return self._learn(pair, sequences, known)
        return known

    def _learn_if_possible(self, pair: Protocol, sequences: Sequences, before: Known) -> Known | None:
        try:
            return self._learn(pair, sequences, before)
        except (*ORDINARY, KeyError):
            return None

    def _learn(self, pair: Protocol, sequences: Sequences, before: Known | None) -> Known:
        least = 0 if self.max_plate_nesting == math.inf else int(self.max_plate_nesting)
        least = max(least, 0 if before is None else before.nesting)
        known = learn(pair, sequences, self.plates, least, self.warn_once)
        if before is not None and self.plates is None:
            known = replace(known, plates=tuple(name for name in known.plates if name in before.plates))
        with suppress(TypeError):  # not hashable or not weakly referable: probed at every call
            self._known.setdefault(pair.guide, weakref.WeakKeyDictionary())[pair.model] = known
        return known

    def _run(
        self,
        pair: Protocol,
        sequences: Sequences,
        kl_weight: float,
        route: Callable[[int], Route | None],
        visit: Callable[[Moment, FilterState], None] | None,
        known: Known,
    ) -> Filtered:
        size, dim = self.num_filters * self.num_particles, -1 - known.nesting
        state = FilterState(size)
        plate = pyro.plate(PARTICLE_PLATE, size, dim=dim)
        result = Filtered([], self.num_filters, self.num_particles, known)
        first: Moment | None = None
        draw: Draw | None = None
        before: tuple[Tensor, Tensor] | None = None
        closed: Tensor | float = 0.0
        with OneMinibatch():
            for index, traced in march(pair, sequences, state, route, plate):
                traces = Traces([traced], size, dim)
                if traces.plate_nesting > known.nesting:
                    raise Unknown
                with naming(index):
                    moment = self._weigh(traces, known, kl_weight, draw, before, closed)
                if self.ess_threshold > 0 or visit is not None:
                    known.check(index, state.tensors(), size)
                if moment is None:
                    continue  # what was before it still is
                draw = None
                moment = replace(moment, index=index)
                first = first or moment
                _check_scale(moment, first)
                if visit is not None:
                    result.moments.clear()
                    visit(moment, state)
                result.moments.append(moment)
                before, closed = (moment.particles.log_p, moment.particles.log_q), moment.closed
                if index < len(sequences) - 1:
                    draw = self._resample(result, moment)
                if draw is not None:
                    before, closed = _closed(result, moment, draw)
                    with naming(index):
                        _move(state, draw, moment, known)
        if first is None:
            raise ValueError(
                "Neither init nor any step of model and guide has a sample site, so there is nothing to "
                "weigh. Are values drawn by pyro.sample, and data observed by obs=?"
            )
        return replace(result, scale=first.particles.scale)

    def _weigh(
        self,
        traces: Traces,
        known: Known,
        kl_weight: float,
        draw: Draw | None,
        before: tuple[Tensor, Tensor] | None,
        closed: Tensor | float,
    ) -> Moment | None:
        """The moment, its densities added to those before; None if it has no site."""
        traced = traces.pairs[0]
        traced_by = {"model": traced.model.nodes, "guide": traced.guide.nodes}
        messages: list[Any] = [
            message
            for role, nodes in traced_by.items()
            for message in nodes.values()
            if carries_density(role, message)
        ]
        if not messages:
            return None
        refuse_enumeration(traced)
        if self.plates is None:
            for message in messages:
                around = {frame.name for frame in message.get("cond_indep_stack", ())}
                if not around.issuperset(known.plates):
                    raise Unknown
        particles = collect(traces, known.plates, False, kl_weight, self.warn_once, before=before)
        active = _active(particles)
        return Moment(INIT, draw, particles, closed, active, traces)

    def _resample(self, filtered: Filtered, moment: Moment) -> Draw | None:
        """Which cells are resampled now, and how; None if none is."""
        K, M = self.num_particles, self.num_filters
        if self.ess_threshold == 0 or K == 1:
            return None
        weights = softmax(filtered.log_weights(moment), 1)
        if self.ess_threshold < 1:
            chosen = weights.square().sum(1).reciprocal() < self.ess_threshold * K
        else:
            chosen = torch.ones_like(weights[:, 0], dtype=torch.bool)
        if moment.active is not None:  # the others weigh what they did before
            chosen = chosen & moment.active
        # On an accelerator it would mean to wait for the device.
        if self.looks and chosen.device.type == "cpu" and not bool(chosen.any()):
            return None
        drawn = SCHEMES[self.resampling](weights.movedim(1, 0), K)  # [K, M, *cells]
        own = torch.arange(K, device=drawn.device).reshape(-1, *[1] * (drawn.dim() - 1))
        drawn = torch.where(chosen, drawn, own)
        counts = torch.zeros_like(drawn).scatter_add(0, drawn, torch.ones_like(drawn))
        first = K * torch.arange(M, device=drawn.device).reshape(1, -1, *[1] * (drawn.dim() - 2))
        ancestors, counts = ((t.movedim(0, 1).reshape(M * K, *t.shape[2:])) for t in (drawn + first, counts))
        return Draw(chosen, ancestors, counts)


def _closed(filtered: Filtered, moment: Moment, draw: Draw) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The sums of densities that the next step adds to, and the estimate up to here."""
    particles = moment.particles
    K = filtered.num_particles
    spread = draw.chosen.repeat_interleave(K, 0)
    before = tuple(torch.where(spread, 0.0, density) for density in (particles.log_p, particles.log_q))
    closed = torch.where(draw.chosen, filtered.estimate(moment), torch.as_tensor(moment.closed))
    return (before[0], before[1]), closed


def _move(state: FilterState, draw: Draw, moment: Moment, known: Known) -> None:
    """Let the particles take over the state of their ancestors."""
    dims = tuple(frame.dim for frame in moment.particles.plates if frame.dim is not None)

    def moved(leaf: Leaf, tensor: Tensor) -> Tensor:
        carries = known.carries(moment.index, leaf)
        return take(tensor, draw.ancestors, dims, known.nesting, leaf) if carries else tensor

    state.change(moved)


def _active(particles: Particles) -> Tensor | None:
    """The cells in which a site is not masked, ``[*cells]``; None for all."""
    active: Tensor | None = None
    for site in particles.sites:
        if not masks_of(site.message):
            return None
        shape, device = site.log_prob.shape, site.log_prob.device
        kept = unmasked(site.name, shape, [site.message], device)
        if kept is None:
            return None
        here = particles.any_in_cell(kept)
        active = here if active is None else active | here
    return active


def _check_scale(moment: Moment, first: Moment) -> None:
    """Refuse a factor outside the logarithm that is not the same at all moments."""
    one, other = moment.particles.scale, first.particles.scale
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        a, b = torch.broadcast_tensors(torch.as_tensor(one), torch.as_tensor(other))
        same = one is other or torch.allclose(a, b, rtol=1e-6)
    else:
        same = math.isclose(one, other, rel_tol=1e-9)
    if not same:
        raise ValueError(
            f"At {moment_name(moment.index)} the bound is scaled by {one}, and at "
            f"{moment_name(first.index)} by {other}. A sequence has one weight in the loss: give all steps "
            "and init the same poutine.scale, and let plates be subsampled alike everywhere."
        )
