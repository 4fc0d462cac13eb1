"""What a run of filters leaves behind, kept step by step and put side by side."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._support.warn import warn
from ..logmean import logmeanexp, softmax
from ..tracing.latents import Latent, own_frames, own_shape, read_latents
from .filtered import FilteredSequences, Observed
from .filtering import Filtered, Moment
from .finite import first_not_finite
from .protocol import INIT, Protocol, Sequences
from .smoothing import Past, attributes_of
from .state import Copies, FilterState

__all__ = ["History", "Watch"]


class Watch:
    """Looks at every moment, and says which is the first that is not finite.

    Arguments:
        num_filters: the number M of filters.
        num_particles: the number K of particles of each.
    """

    def __init__(self, num_filters: int, num_particles: int) -> None:
        self.num_filters = num_filters
        self.num_particles = num_particles
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
        return Filtered([moment], self.num_filters, self.num_particles)


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


class History(Watch):
    """All steps of a run.

    Arguments:
        pair: the pair.
        num_filters: the number M of filters.
        num_particles: the number K of particles of each.
    """

    def __init__(self, pair: Protocol, num_filters: int, num_particles: int) -> None:
        super().__init__(num_filters, num_particles)
        self.pair = pair
        self._steps: dict[int, _Step] = {}
        self._copies = Copies()

    def __call__(self, moment: Moment, state: FilterState) -> None:
        super().__call__(moment, state)
        filtered = self._of(moment)
        self._copies.begin()
        self._steps[moment.index] = _Step(
            filtered.log_weights(moment),
            filtered.estimate(moment),
            None if moment.draw is None else moment.draw.ancestors,
            moment.active,
            read_latents(moment.traces),
            _read_observed(moment),
            state.snapshot(self._copies),
            attributes_of(self._copies, *self.pair),
        )

    def collect(self, filtered: Filtered, sequences: Sequences) -> FilteredSequences:
        """All steps, side by side."""
        missing = [t for t in range(len(sequences)) if t not in self._steps]
        if missing:
            raise ValueError(
                f"Step(s) {missing[:5]} have no sample site, so there are no particles to keep for them. "
                "log_marginal does not need to."
            )
        assert filtered.known is not None
        steps = [self._steps[t] for t in range(len(sequences))]
        cells = steps[-1].estimate.shape[1:]
        active = torch.stack(
            [
                torch.ones_like(s.estimate[0], dtype=torch.bool) if s.active is None else s.active
                for s in steps
            ]
        )
        # Beyond its end a sequence stays what it was, see filtering.
        running = active.int().flip(0).cummax(0).values.flip(0).bool()
        size = self.num_filters * self.num_particles
        own = torch.arange(size, device=active.device).reshape(-1, *[1] * len(cells)).expand(size, *cells)
        ancestors, weights, log_w = [], [], steps[0].log_weights
        ess, K = [], self.num_particles
        for step, now in zip(steps, running, strict=True):
            ancestors.append(own if step.ancestors is None else torch.where(now, step.ancestors, own))
            log_w = torch.where(now, step.log_weights, log_w)
            within = softmax(log_w, 1)
            between = softmax(step.estimate, 0).unsqueeze(1)
            weights.append((within * between).reshape(size, *cells))
            squares = within.square().sum(1)
            number = squares.reciprocal().clamp(max=K)
            ess.append(number.masked_fill(squares == 0, 0.0).mean(0))  # no particle is alive
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
            num_filters=self.num_filters,
            plates=tuple(frame.name for frame in filtered.moments[-1].particles.plates),
            sites=sites,
            observed=observed,
            frames=filtered.moments[-1].particles.plates,
            _past=Past(
                self.pair,
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
    """For each step the sites' names by those that they have in common with the other steps'.

    What every step has keeps its name; others lose the number at their end, where that leaves them apart.
    """
    everywhere = set.intersection(*map(set, steps))
    named = []
    for names in steps:
        stems = {n: n if n in everywhere else re.sub(r"[_.\[(-]?\d+[\])]?$", "", n) for n in names}
        count = Counter(stems.values())
        named.append({stem if count[stem] == 1 else name: name for name, stem in stems.items()})
    return named


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
            f"Latent site(s) {', '.join(map(repr, left_out))} are not in every step, or not of one shape, "
            "so they have no values over time. The evidence counts them."
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
