"""Running a model again on draws of its latents: log-likelihoods, deterministic sites and new
observations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer import Predictive, infer_discrete
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from .._support.devices import wide
from ..tracing.latents import Enumerated, Latent, own_frames, own_shape
from ..tracing.lkj import correct_draws
from ..tracing.masks import masked_value
from ..tracing.messages import is_deterministic
from ..tracing.minibatches import OneMinibatch
from ..tracing.traces import PARTICLE_PLATE, Pair
from .marginal import LogLikelihood, summed_out

__all__ = ["Observed", "Rerun", "SampleData"]


class Observed(NamedTuple):
    """What a run of the model on given latents shows of one of its sites.

    Attributes:
        values: what was observed, of shape ``[*batch, *event]``; for a ``pyro.deterministic`` its value on
            each draw, of shape ``[n, *batch, *event]``.
        log_prob: log density in nats, 0 where masked, unscaled, of shape ``[n, *batch]``; None for a
            deterministic.
        event_dim: number of event dims.
        frames: the plates around it.
    """

    values: Tensor
    log_prob: Tensor | None
    event_dim: int
    frames: tuple[CondIndepStackFrame, ...]


class Rerun(NamedTuple):
    """How particles were run, so that the model can be run again on them.

    Attributes:
        pair: model, guide and arguments.
        nesting: number of batch dims that the pair's own plates take.
        model_nesting: number of those that the model's alone take.
        vectorize: whether draws run in one pass, or one by one.
        chunk_size: number of draws in memory at once.
        minibatch: the subsample that all particles saw.
        enumerated: the model's sites that are summed out. Draws of all latents hold values of these as well,
            as :meth:`draw_enumerated` gives them.
    """

    pair: Pair
    nesting: int
    model_nesting: int
    vectorize: bool
    chunk_size: int
    minibatch: OneMinibatch
    enumerated: Mapping[str, Enumerated]

    def observed(self, draws: Mapping[str, Latent]) -> dict[str, Observed]:
        """The observed and deterministic sites of the model on draws of all its latents.

        Raises:
            ValueError: if a site is another one when all draws run in one pass than by itself; it is named.
        """
        # One draw by itself shows the shapes that deterministic sites have without a dim for draws.
        first, last = (self._single(draws, index) for index in (0, -1))
        found: dict[str, list[Observed]] = {}
        for trace, size in self._traces(draws):
            for name, site in trace.nodes.items():
                is_data = site["type"] == "sample" and site["is_observed"] and name not in draws
                if not is_data or isinstance(site["fn"], Unit):  # a factor has no observation
                    continue
                if not is_deterministic(site):
                    found.setdefault(name, []).append(self._read_data(site, size))
                    continue
                found.setdefault(name, []).append(_read_deterministic(name, site, first[name]["value"], size))
        for name, parts in found.items():
            ends = (parts[0], first, 0), (parts[-1], last, -1)
            for part, single, index in ends:
                if part.log_prob is None:
                    if not _is_same(part.values[index], single[name]["value"]):
                        raise ValueError(_MIXED.format("deterministic", name, "value"))
                elif not _is_same(part.log_prob[index], self._density(single[name])):
                    again = self._single(draws, index)[name]
                    if _is_same(self._density(again), self._density(single[name])):  # else it is random
                        raise ValueError(_MIXED.format("observed", name, "log density"))
        return {name: _cat(parts) for name, parts in found.items()}

    def predictive(self, draws: Mapping[str, Latent], return_sites: Sequence[str]) -> Predictive:
        """Samples the observed sites given draws of the latents.

        Raises:
            ValueError: if the model has no site of one of these names, naming those it has.
        """
        known = [name for name, site in self._single(draws, 0).items() if site["type"] == "sample"]
        # Predictive would leave them out without a word; it calls the model's result a site, too.
        unknown = [name for name in return_sites if name not in (*known, "_RETURN")]
        if unknown:
            raise ValueError(
                f"return_sites names {unknown}, but on these arguments the model has the sites {known}. For "
                "one that it has on others alone, take pyro.infer.Predictive(model, posterior(num_samples))."
            )
        if self.vectorize:  # whether draws can run in one pass
            self.observed({name: latent._replace(values=latent.values[:2]) for name, latent in draws.items()})
        # With all batch dims there: Predictive would count event dims among those it adds.
        nesting = self.model_nesting
        return Predictive(
            # It runs the model without draws first, where a prior may be one that cannot be sampled.
            poutine.condition(
                self._sampling_model(), data={name: latent.values[0] for name, latent in draws.items()}
            ),
            posterior_samples={
                name: _padded(latent, nesting) if self.vectorize else latent.values
                for name, latent in draws.items()
            },
            return_sites=return_sites,
            parallel=self.vectorize,
        )

    def draw_enumerated(self, draws: Mapping[str, Latent]) -> dict[str, Latent]:
        """The enumerated sites, drawn jointly from their conditional given the data and each of some draws.

        Arguments:
            draws: of the latents that the guide samples.
        """

        def sampled(model: Callable) -> Callable:
            return infer_discrete(model, first_available_dim=self._enum_dim)

        found: dict[str, list[Tensor]] = {name: [] for name in self.enumerated}
        for trace, size in self._traces(draws, around=sampled):
            for name, (event_dim, frames) in self.enumerated.items():
                value: Any = trace.nodes[name]["value"]
                found[name].append(own_shape(value, event_dim, frames, self.nesting, size))
        return {name: Latent(torch.cat(found[name]), *self.enumerated[name]) for name in found}

    def log_likelihood(
        self, draws: Mapping[str, Latent], shown: Mapping[str, Observed]
    ) -> dict[str, LogLikelihood]:
        """The log-likelihood of the data, by site, with enumerated sites summed out where each datapoint has
        its own.

        Arguments:
            draws: of all latents.
            shown: what :meth:`observed` gives on them.
        """
        given = [
            LogLikelihood(site.log_prob, site.frames, (name,))
            for name, site in shown.items()
            if site.log_prob is not None
        ]
        if not self.enumerated:
            return {part.name: part for part in given}
        draws = {name: latent for name, latent in draws.items() if name not in self.enumerated}
        data = {part.name for part in given}

        def summed(model: Callable) -> Callable:
            return poutine.enum(model, first_available_dim=self._enum_dim)

        found: dict[str, list[LogLikelihood]] = {}
        for trace, size in self._traces(draws, around=summed):
            for part in summed_out(trace, data):
                log_prob = own_shape(part.log_prob, 0, part.frames, self.nesting, size)
                found.setdefault(part.name, []).append(part._replace(log_prob=log_prob))
        joined = {
            name: parts[0]._replace(log_prob=torch.cat([part.log_prob for part in parts]))
            for name, parts in found.items()
        }
        done = {site for part in joined.values() for site in part.sites}
        return {part.name: part for part in given if part.name not in done} | joined

    def sample_given(
        self, draws: Mapping[str, Latent], sites: Mapping[str, Latent | Observed]
    ) -> dict[str, Tensor]:
        """Observed sites given draws of the latents, a chunk at a time, each ``[n, *batch, *event]``."""
        drawn: dict[str, list[Tensor]] = {name: [] for name in sites}
        # The data are let go before the latents are held, which would be let go as well.
        for trace, size in self._traces(draws, SampleData()(self.pair.model)):
            for name, site in sites.items():
                value: Any = trace.nodes[name]["value"]
                drawn[name].append(own_shape(value, site.event_dim, site.frames, self.nesting, size))
        return {name: torch.cat(parts) for name, parts in drawn.items()}

    def sample_prior(self, num_samples: int, sites: Mapping[str, Latent | Observed]) -> dict[str, Tensor]:
        """Sites sampled from the model alone, a chunk at a time, each ``[n, *batch, *event]``."""
        chunks = []
        for start in range(0, num_samples, self.chunk_size):
            size = min(self.chunk_size, num_samples - start)
            model, names = self._sampling_model(), list(sites)
            predictive = Predictive(model, num_samples=size, return_sites=names, parallel=self.vectorize)
            chunks.append(predictive(*self.pair.args, **self.pair.kwargs))
        # Without the dims that Predictive adds to sites outside of plates.
        joined = {}
        for name, site in sites.items():
            values = torch.cat([chunk[name] for chunk in chunks])
            if isinstance(site, Observed) and site.log_prob is None:
                joined[name] = values.reshape(len(values), *site.values.shape[1:])
            else:
                nesting = self.model_nesting
                joined[name] = own_shape(values, site.event_dim, site.frames, nesting, len(values))
        return joined

    def _sampling_model(self) -> Any:
        """The model with its observed sites sampled."""
        model = SampleData()(self.pair.model)

        def on_the_same_minibatch(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), self.minibatch:
                return model(*args, **kwargs)

        return on_the_same_minibatch

    def _traces(
        self,
        draws: Mapping[str, Latent],
        model: Callable | None = None,
        around: Callable[[Callable], Callable] = lambda model: model,
    ) -> Iterator[tuple[Trace, int | None]]:
        """The model's traces on chunks of draws, with their number in each; None for a single one.

        Arguments:
            draws: of its latents.
            model: another model in its place.
            around: wraps the model on a chunk, with its plate.
        """
        total = len(next(iter(draws.values())).values)
        step = self.chunk_size if self.vectorize else 1
        for start in range(0, total, step):
            chunk = {
                name: latent._replace(values=latent.values[start : start + step])
                for name, latent in draws.items()
            }
            if not self.vectorize:
                single = {name: latent.values[0] for name, latent in chunk.items()}
                yield self._trace(single, model, around), None
                continue
            size = min(step, total - start)
            plate = pyro.plate(PARTICLE_PLATE, size, dim=-1 - self.nesting)
            padded = {name: _padded(latent, self.nesting) for name, latent in chunk.items()}
            yield self._trace(padded, model, around, plate), size

    def _single(self, draws: Mapping[str, Latent], index: int) -> dict[str, Any]:
        """The sites of the model on a single draw."""
        return dict(self._trace({name: latent.values[index] for name, latent in draws.items()}).nodes)

    def _trace(
        self,
        data: dict[str, Tensor],
        model: Callable | None = None,
        around: Callable[[Callable], Callable] = lambda model: model,
        plate: Callable[[Callable], Callable] = lambda model: model,
    ) -> Trace:
        # What is around may hide it from handlers further out: minibatch and plate are inside.
        conditioned = plate(self.minibatch(poutine.condition(model or self.pair.model, data=data)))
        with torch.no_grad():
            trace = poutine.trace(around(conditioned)).get_trace(*self.pair.args, **self.pair.kwargs)
        return prune_subsample_sites(trace)

    def _density(self, site: Any) -> Tensor:
        """The log density of an observed site on a single draw."""
        log_prob = self._read_data(site, None).log_prob
        assert log_prob is not None
        return log_prob[0]

    def _read_data(self, site: Any, size: int | None) -> Observed:
        fn, value = site["fn"], site["value"]
        frames = own_frames(site)
        log_prob = scale_and_mask(fn.log_prob(masked_value(site)), mask=site["mask"])
        log_prob = own_shape(log_prob, 0, frames, self.nesting, size)
        return Observed(value, log_prob, fn.event_dim, frames)

    @property
    def _enum_dim(self) -> int:
        """The first dim for enumerated sites, left of the plates and the draws."""
        return -1 - self.nesting - self.vectorize


class SampleData(UnconditionMessenger):
    """Samples what was observed, and leaves factors and deterministic sites as they are."""

    def _pyro_sample(self, msg: Any) -> None:
        correct_draws(msg["fn"])
        if not is_deterministic(msg) and not isinstance(msg["fn"], Unit):
            super()._pyro_sample(msg)


def _read_deterministic(name: str, site: Any, single: Tensor, size: int | None) -> Observed:
    """A deterministic site's values on draws, given the one that it has on a single draw."""
    value, frames = site["value"], own_frames(site)
    count, shape = 1 if size is None else size, single.shape
    if value.numel() not in (single.numel(), count * single.numel()):
        raise ValueError(_MIXED.format("deterministic", name, "value"))
    rank = max((-frame.dim for frame in frames if frame.dim is not None), default=0)
    values = value.reshape(-1, *shape).expand(count, *shape)
    return Observed(values, None, max(len(shape) - rank, 0), frames)


def _is_same(value: Tensor, single: Tensor) -> bool:
    """Whether a value is the one that it is on a single draw."""
    return torch.allclose(wide(value), wide(single), rtol=1e-3, atol=1e-5, equal_nan=True)


_MIXED = (
    "The {} site {!r} has another {} when all draws run in one pass than by itself: its "
    "computation mixes the draws (a mean over all dims, an index from the left), or is random (dropout in "
    "train mode). Let it broadcast over a leading dim (index from the right), or pass "
    "vectorize_particles=False."
)


def _padded(latent: Latent, nesting: int) -> Tensor:
    """Values with the draws on the batch dim left of that many plates."""
    values = latent.values
    batch = values.dim() - 1 - latent.event_dim
    return values.reshape(len(values), *[1] * (nesting - batch), *values.shape[1:])


def _cat(parts: Sequence[Observed]) -> Observed:
    """The draws of several runs as one."""
    first = parts[0]
    if first.log_prob is None:
        return first._replace(values=torch.cat([part.values for part in parts]))
    log_probs = [part.log_prob for part in parts if part.log_prob is not None]
    return first._replace(log_prob=torch.cat(log_probs))
