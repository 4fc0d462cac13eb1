r"""Judging a model of sequences by particle filters: evidence, filtering means, and what became of the
particles.

M independent filters of K particles run side by side. Each gives an unbiased :math:`\hat p_m(x)`, so that

.. math:: \log \hat p(x) = \log \frac1M \sum_m \hat p_m(x)

has a Monte Carlo error that can be read off their spread (delta method), and particles of all filters count
by :math:`\hat p_m` times their weight within the filter.

References:
    | Feynman-Kac Formulae (Del Moral, 2004)
    | A tutorial on particle filtering and smoothing: fifteen years later (Doucet & Johansen, 2011)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .._support.arguments import as_plate_names, positive_integer
from .._support.warn import warn
from ..logmean import logmeanexp, softmax
from ..resampling import multinomial
from ..tracing.latents import Latent, own_frames, own_shape, place, read_latents
from .filtering import Filter, Filtered, Moment
from .finite import first_not_finite
from .protocol import INIT, Protocol, Sequences, read_sequences
from .smoothing import Past, attributes_of, smooth
from .state import FilterState

__all__ = ["FilteredSequences", "ParticleFilter"]


class Observed(NamedTuple):
    """What was observed at a site: values ``[*batch, *event]``, its number of event dims, its plates."""

    values: Tensor
    event_dim: int
    frames: tuple[CondIndepStackFrame, ...]


@dataclass(frozen=True, eq=False, repr=False)
class FilteredSequences:
    """Particle filters that have run, on the sequences that they ran on.

    Attributes:
        log_marginal: :math:`\\log \\hat p(x)` of each sequence in nats, of shape ``[*cells]``.
        monte_carlo_error: its standard error (delta method), ``[*cells]``; NaN with one filter.
        log_increments: :math:`\\log \\hat p(x_t \\mid x_{<t})`, ``[T, *cells]``, which add up to
            ``log_marginal``; ``init`` counts with the first step.
        ess: effective number of the K particles after each step, averaged over the filters, ``[T, *cells]``;
            NaN where a sequence is masked.
        weights: of all S = M K particles after each step, summing to 1, ``[T, S, *cells]``.
        ancestors: the particle that each came from in the step before, ``[T, S, *cells]``.
        values: latent sites of the steps, ``[T, S, *batch, *event]``, by name; ``"z"`` for sites that are
            called ``"z_0"``, ``"z_1"``, ... by their step.
        active: whether a sequence is not masked, ``[T, *cells]``.
        num_particles: the number K of particles of a filter.
        num_filters: the number M of filters.
        plates: names of the plates whose cells have a filter each.
    """

    log_marginal: Tensor
    monte_carlo_error: Tensor
    log_increments: Tensor
    ess: Tensor
    weights: Tensor
    ancestors: Tensor
    values: dict[str, Tensor]
    active: Tensor
    num_particles: int
    num_filters: int
    plates: tuple[str, ...]
    sites: dict[str, Latent] = field(repr=False)
    observed: dict[str, Observed] = field(repr=False)
    frames: tuple[CondIndepStackFrame, ...] = field(repr=False)
    _past: Past = field(repr=False)

    @property
    def num_steps(self) -> int:
        """The number T of steps."""
        return len(self.weights)

    def mean(self, name: str | None = None) -> Tensor:
        """Filtering means E[z_t | x_1, ..., x_t], of shape ``[T, *batch, *event]``; NaN where masked.

        Arguments:
            name: a latent site; may be left out where there is one.

        Raises:
            ValueError: if there is no such site.
        """
        name = self._name(name)
        return self._weighted(name, self.values[name])

    def variance(self, name: str | None = None) -> Tensor:
        """Filtering variances of each element, of the shape of :meth:`mean`; arguments and errors are its."""
        name = self._name(name)
        values = self.values[name]
        return self._weighted(name, (values - self._weighted(name, values).unsqueeze(1)).square())

    def num_ancestors(self) -> Tensor:
        """How many of the K particles of each step have descendants at the end, ``[T, *cells]``.

        The mean over the filters. The first row is the number of distinct roots: where it is 1, all that the
        last particles know of the first step is one draw, and trajectories along the genealogy are one there.
        """
        counts = []
        lineage = self._own()
        for t in range(self.num_steps - 1, -1, -1):
            alive = torch.zeros_like(lineage).scatter(0, lineage, 1)
            counts.append(alive.sum(0).to(self.ess.dtype) / self.num_filters)
            lineage = self.ancestors[t].gather(0, lineage)
        return torch.stack(counts[::-1])

    def trajectories(self, num_samples: int = 100) -> dict[str, Tensor]:
        """Trajectories along the genealogy of the last particles, ``[n, T, *batch, *event]``, by site.

        Draws from p(z_1, ..., z_T | x), of which the early steps of long sequences have few distinct values,
        see :meth:`num_ancestors`; :meth:`smooth` has more.

        Arguments:
            num_samples: the number n of trajectories of each cell; an integer >= 1.
        """
        lineage = multinomial(self.weights[-1], positive_integer("num_samples", num_samples))
        chosen = []
        for t in range(self.num_steps - 1, -1, -1):
            chosen.append(lineage)
            lineage = self.ancestors[t].gather(0, lineage)
        return self._along(chosen[::-1])

    def smooth(self, num_samples: int = 100) -> dict[str, Tensor]:
        """Trajectories by backward sampling, ``[n, T, *batch, *event]``, by site.

        From the last step to the first, each trajectory picks among all particles of a step by

        .. math:: w_{t,k}\\, p(\\tilde z_{t+1}, x_{t+1} \\mid h_{t,k}),

        where :math:`\\tilde z_{t+1}` is what it has picked already. That takes a model whose state after a
        step follows from the step's latents (and data): a Markov model. It costs n S densities a step.

        Arguments:
            num_samples: the number n of trajectories of each cell; an integer >= 1.

        Raises:
            NotImplementedError: if the state remembers more than that, naming the tensor, or the sites of a
                step are not those that were filtered.

        References:
            | Monte Carlo Smoothing for Nonlinear Time Series (Godsill et al., 2004)
        """
        chosen = smooth(self._past, self.weights, positive_integer("num_samples", num_samples))
        return self._along(chosen)

    def to_arviz(self, num_samples: int = 500, smoothed: bool = True, coords: Any = None) -> Any:
        """Trajectories, filtering moments and diagnostics as ArviZ knows them, with a dim ``time``.

        See :func:`pyro_iw.sequences.to_arviz.to_arviz`.
        """
        from .to_arviz import to_arviz

        return to_arviz(self, num_samples=num_samples, smoothed=smoothed, coords=coords)

    def _own(self) -> Tensor:
        first = self.ancestors[0]
        own = torch.arange(len(first), device=first.device)
        return own.reshape(-1, *[1] * (first.dim() - 1)).expand_as(first).contiguous()

    def _along(self, chosen: list[Tensor]) -> dict[str, Tensor]:
        """Values of the particles ``[n, *cells]`` that were chosen at each step."""
        result = {}
        for name, values in self.values.items():
            site = self.sites[name]
            picked = [self._pick(step, index, site) for step, index in zip(values, chosen, strict=True)]
            result[name] = torch.stack(picked, 1)
        return result

    def _pick(self, values: Tensor, index: Tensor, site: Latent) -> Tensor:
        placed = self._placed(index, values, site)
        shape = torch.broadcast_shapes(placed.shape[1:], values.shape[1:])
        values = values.expand(len(values), *shape)
        return values.gather(0, placed.expand(len(placed), *shape))

    def _placed(self, per_cell: Tensor, values: Tensor, site: Latent) -> Tensor:
        return place(per_cell, self.frames, values.dim() - 1 - site.event_dim, site.event_dim)

    def _weighted(self, name: str, values: Tensor) -> Tensor:
        site, means = self.sites[name], []
        for step, weights, active in zip(values, self.weights, self.active, strict=True):
            placed = self._placed(weights, step, site)
            mean = (placed * step).sum(0)
            means.append(mean.masked_fill(~self._placed(active.unsqueeze(0), step, site)[0], math.nan))
        return torch.stack(means)

    def _name(self, name: str | None) -> str:
        if name is None and len(self.values) == 1:
            return next(iter(self.values))
        if name not in self.values:
            raise ValueError(f"name must be one of the latent sites {sorted(self.values)}, got {name!r}")
        return name

    def __repr__(self) -> str:
        return (
            f"FilteredSequences(log_marginal={self.log_marginal.double().sum().item():.4f}, "
            f"T={self.num_steps}, "
            f"sequences={max(1, self.log_marginal.numel())}, num_particles={self.num_particles}, "
            f"num_filters={self.num_filters})"
        )


class ParticleFilter:
    """Judges a model of sequences by particle filters, with the guide as proposal.

    Model and guide are objects with ``init(state, ...)`` and ``step(state, ...)``; sequences are given as to
    :class:`FIVO_ELBO`.

    Arguments:
        model: the model.
        guide: the guide.
        num_particles: the number K of particles of a filter; an integer >= 2.
        num_filters: the number M of independent filters of each sequence, run in one pass; an integer >= 1.
            They tell the Monte Carlo error, and at a given K M more particles in fewer filters are better.
        ess_threshold: as of :class:`FIVO_ELBO`.
        resampling: as of :class:`FIVO_ELBO`.
        plates: name or names of the plates whose cells have a filter each; ``()`` for a joint one; None for
            the plates common to all sample sites.
        max_plate_nesting: number of batch dims that the plates of the pair take; found by running the pair if
            infinite.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> class Model:
        ...     def init(self, state):
        ...         state["z"] = torch.zeros(())
        ...     def step(self, state, y):
        ...         with pyro.plate("data", len(y)):
        ...             state["z"] = pyro.sample("z", dist.Normal(state["z"], 1.0))
        ...             pyro.sample("y", dist.Normal(state["z"], 1.0), obs=y)
        >>> class Guide:
        ...     def init(self, state):
        ...         pass
        ...     def step(self, state, y):
        ...         with pyro.plate("data", len(y)):
        ...             pyro.sample("z", dist.Normal((state["z"] + y) / 2, 0.7))
        >>> filtered = ParticleFilter(Model(), Guide(), num_particles=100)(torch.randn(6, 3))  # T = 6
        >>> filtered.log_marginal.shape, filtered.mean("z").shape, filtered.smooth(20)["z"].shape
        (torch.Size([3]), torch.Size([6, 3]), torch.Size([20, 6, 3]))
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        num_particles: int = 1000,
        *,
        num_filters: int = 8,
        ess_threshold: float = 0.5,
        resampling: str = "systematic",
        plates: str | Iterable[str] | None = None,
        max_plate_nesting: float = math.inf,
    ) -> None:
        self.model = model
        self.guide = guide
        self.num_particles = positive_integer("num_particles", num_particles)
        if self.num_particles == 1:
            raise ValueError("num_particles=1 leaves nothing to resample; a filter needs 2 or more.")
        self.num_filters = positive_integer("num_filters", num_filters)
        self._warned: set[str] = set()
        self._filter = Filter(
            self.num_particles,
            ess_threshold,
            resampling,
            as_plate_names(plates),
            max_plate_nesting,
            self._warn_once,
            self.num_filters,
        )

    @torch.no_grad()
    def log_marginal(self, *args: Any, **kwargs: Any) -> Tensor:
        """The log evidence of every sequence, ``[*cells]``, in nats, in the memory of one step.

        A sequence with a NaN or without a living particle has NaN or -inf, and leaves the others untouched; a
        warning names the step and the site.

        Arguments:
            args: sequences, of which each step gets an entry.
            kwargs: arguments of ``init``.

        Raises:
            ValueError: as :meth:`FIVO_ELBO.loss`, NaN aside.
        """
        watch = _Watch(self)
        filtered = self._filter.run(self._pair, read_sequences(args, kwargs), visit=watch)
        return logmeanexp(filtered.value, 0)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> FilteredSequences:
        """Filter sequences, and keep all steps.

        Arguments, errors and warnings are those of :meth:`log_marginal`.
        """
        sequences = read_sequences(args, kwargs)
        history = _History(self)
        filtered = self._filter.run(self._pair, sequences, visit=history)
        return history.collect(filtered, self._pair, sequences)

    @property
    def _pair(self) -> Protocol:
        return Protocol(self.model, self.guide)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)


class _Watch:
    """Looks at every moment, and says which is the first that is not finite."""

    def __init__(self, owner: ParticleFilter) -> None:
        self.owner = owner
        self._found: set[bool] = set()

    def __call__(self, moment: Moment, state: FilterState) -> None:
        if moment.index == INIT:
            self._found.clear()  # a run may start again
        filtered = self._of(moment)
        if bool(filtered.estimate(moment).isfinite().all()):
            return
        found = first_not_finite(filtered)
        if found is not None and found.is_fatal not in self._found:
            self._found.add(found.is_fatal)
            warn(f"{found.message} The others are not touched.", RuntimeWarning)

    def _of(self, moment: Moment) -> Filtered:
        return Filtered([moment], self.owner.num_filters, self.owner.num_particles)


class _Step(NamedTuple):
    """What is kept of a step."""

    log_weights: Tensor
    estimate: Tensor
    ancestors: Tensor | None
    active: Tensor | None
    latents: dict[str, Latent]
    observed: dict[str, Observed]
    state: FilterState
    attributes: list[dict[str, Any]]


class _History(_Watch):
    """All steps of a run."""

    def __init__(self, owner: ParticleFilter) -> None:
        super().__init__(owner)
        self._steps: dict[int, _Step] = {}

    def __call__(self, moment: Moment, state: FilterState) -> None:
        super().__call__(moment, state)
        filtered, owner = self._of(moment), self.owner
        self._steps[moment.index] = _Step(
            filtered.log_weights(moment),
            filtered.estimate(moment),
            None if moment.draw is None else moment.draw.ancestors,
            moment.active,
            read_latents(moment.traces),
            _read_observed(moment),
            state.snapshot(),
            attributes_of(owner.model, owner.guide),
        )

    def collect(self, filtered: Filtered, pair: Protocol, sequences: Sequences) -> FilteredSequences:
        """All steps, side by side."""
        missing = [t for t in range(len(sequences)) if t not in self._steps]
        if missing:
            raise ValueError(
                f"Step(s) {missing[:5]} have no sample site, so there are no particles to keep for them. "
                f"log_marginal "
                "does not need to."
            )
        assert filtered.known is not None
        steps = [self._steps[t] for t in range(len(sequences))]
        cells = steps[-1].estimate.shape[1:]
        active = torch.stack(
            [torch.ones(cells, dtype=torch.bool) if s.active is None else s.active for s in steps]
        )
        # Beyond its end a sequence stays what it was, see filtering.
        running = active.int().flip(0).cummax(0).values.flip(0).bool()
        size = self.owner.num_filters * self.owner.num_particles
        own = torch.arange(size, device=active.device).reshape(-1, *[1] * len(cells)).expand(size, *cells)
        ancestors, weights, log_w = [], [], steps[0].log_weights
        ess, K = [], self.owner.num_particles
        for step, now in zip(steps, running, strict=True):
            ancestors.append(own if step.ancestors is None else torch.where(now, step.ancestors, own))
            log_w = torch.where(now, step.log_weights, log_w)
            within = softmax(log_w, 1)
            between = softmax(step.estimate, 0).unsqueeze(1)
            weights.append((within * between).reshape(size, *cells))
            ess.append(within.square().sum(1).reciprocal().clamp(max=K).mean(0))
        totals = torch.stack([logmeanexp(step.estimate, 0) for step in steps])
        value = steps[-1].estimate
        values, sites = _by_name([step.latents for step in steps])
        observed = _stack_observed([step.observed for step in steps])
        return FilteredSequences(
            log_marginal=totals[-1],
            monte_carlo_error=_error_of_log_mean(value),
            log_increments=torch.cat([totals[:1], totals[1:] - totals[:-1]]),
            ess=torch.stack(ess).masked_fill(~active, math.nan),
            weights=torch.stack(weights),
            ancestors=torch.stack(ancestors),
            values=values,
            active=active,
            num_particles=K,
            num_filters=self.owner.num_filters,
            plates=tuple(frame.name for frame in filtered.moments[-1].particles.plates),
            sites=sites,
            observed=observed,
            frames=filtered.moments[-1].particles.plates,
            _past=Past(
                pair,
                sequences,
                filtered.known,
                [step.latents for step in steps],
                [step.state for step in steps],
                [step.attributes for step in steps],
            ),
        )


def _error_of_log_mean(value: Tensor) -> Tensor:
    """Standard error of the logarithm of the mean of ``exp(value)`` over the first dim."""
    count = len(value)
    if count == 1:
        return torch.full_like(value[0], math.nan)
    ratio = count * softmax(value, 0)
    return (ratio.var(0) / count).sqrt()


def _read_observed(moment: Moment) -> dict[str, Observed]:
    nesting = -moment.traces.particle_dim - 1 if moment.traces.particle_dim else 0
    found = {}
    for site in moment.particles.sites:
        if site.role == "model" and not site.is_latent and not site.is_factor:
            event_dim, frames = site.message["fn"].event_dim, own_frames(site.message)
            values = own_shape(site.message["value"], event_dim, frames, nesting, moment.traces.num_particles)
            found[site.name] = Observed(values[0], event_dim, frames)
    return found


def _stems(steps: list[list[str]]) -> list[dict[str, str]]:
    """For each step the sites' names by those that they have in common with the other steps'."""
    if all(set(names) == set(steps[0]) for names in steps):
        return [{name: name for name in names} for names in steps]
    return [{re.sub(r"[_.\[(-]?\d+[\])]?$", "", name): name for name in names} for names in steps]


def _by_name(steps: list[dict[str, Latent]]) -> tuple[dict[str, Tensor], dict[str, Latent]]:
    """Latents of all steps by their common names: stacked values, and one of them."""
    named = _stems([list(step) for step in steps])
    values, sites, left_out = {}, {}, []
    for stem in dict.fromkeys(stem for names in named for stem in names):
        parts = [step[names[stem]] for step, names in zip(steps, named, strict=True) if stem in names]
        if len(parts) < len(steps) or len({tuple(part.values.shape) for part in parts}) > 1:
            left_out.append(stem)
            continue
        values[stem] = torch.stack([part.values for part in parts])
        sites[stem] = parts[0]
    if left_out:
        warn(
            f"Latent site(s) {', '.join(map(repr, left_out))} are not in every step, or not of one shape, so "
            f"they "
            "have no values over time. The evidence counts them."
        )
    return values, sites


def _stack_observed(steps: list[dict[str, Observed]]) -> dict[str, Observed]:
    """What was observed at sites that every step has, with time on the first dim."""
    named = _stems([list(step) for step in steps])
    found = {}
    for stem in named[0]:
        parts = [step[names[stem]] for step, names in zip(steps, named, strict=True) if stem in names]
        if len(parts) == len(steps) and len({tuple(part.values.shape) for part in parts}) == 1:
            found[stem] = parts[0]._replace(values=torch.stack([part.values for part in parts]))
    return found
