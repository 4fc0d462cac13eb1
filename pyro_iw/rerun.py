"""Running a model again on draws of its latents: log-likelihoods, deterministic sites and new
observations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer import Predictive
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from .latents import Latent, own_frames, own_shape
from .traces import PARTICLE_PLATE, OneMinibatch, Pair

__all__ = ["Observed", "Rerun"]


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
        vectorize: whether draws run in one pass, or one by one.
        chunk_size: number of draws in memory at once.
        minibatch: the subsample that all particles saw.
        enumerated: the model's sites that are summed out.
    """

    pair: Pair
    nesting: int
    vectorize: bool
    chunk_size: int
    minibatch: OneMinibatch
    enumerated: Sequence[str]

    def observed(self, draws: Mapping[str, Latent]) -> dict[str, Observed]:
        """The observed and deterministic sites of the model on draws of all its latents.

        Raises:
            NotImplementedError: if the model has enumerated sites, whose values are not known.
        """
        self._refuse_enumeration("log-likelihoods")
        # One draw by itself shows the shapes that deterministic sites have without a dim for draws.
        first = {name: latent.values[0] for name, latent in draws.items()}
        single: dict[str, Any] = dict(self._trace(first).nodes)
        found: dict[str, list[Observed]] = {}
        for trace, size in self._traces(draws):
            for name, site in trace.nodes.items():
                is_data = site["type"] == "sample" and site["is_observed"] and name not in draws
                if not is_data or isinstance(site["fn"], Unit):  # a factor has no observation
                    continue
                if not _is_deterministic(site):
                    found.setdefault(name, []).append(self._read_data(site, size))
                    continue
                value = single[name]["value"]
                part = _read_deterministic(site, value.shape, size)
                if name not in found and not torch.allclose(part.values[0], value, rtol=1e-3, atol=1e-5):
                    raise ValueError(
                        f"The deterministic site {name!r} has another value when all draws run in one "
                        "pass, so its computation mixes the draws (a mean over all dims, say). Let it "
                        "broadcast over a leading dim, or pass vectorize_particles=False."
                    )
                found.setdefault(name, []).append(part)
        return {name: _cat(parts) for name, parts in found.items()}

    def predictive(self, draws: Mapping[str, Latent], return_sites: Sequence[str]) -> Predictive:
        """Samples the observed sites given draws of the latents.

        Raises:
            NotImplementedError: as :meth:`observed`.
        """
        self._refuse_enumeration("predictions")
        # With all batch dims there: Predictive would count event dims among those it adds.
        pad = self._padded if self.vectorize else _values
        return Predictive(
            self._sampling_model(),
            posterior_samples={name: pad(latent) for name, latent in draws.items()},
            return_sites=return_sites,
            parallel=self.vectorize,
        )

    def sample_given(
        self, draws: Mapping[str, Latent], sites: Mapping[str, Latent | Observed]
    ) -> dict[str, Tensor]:
        """Observed sites given draws of the latents, a chunk at a time, each ``[n, *batch, *event]``."""
        total = len(next(iter(draws.values())).values)
        chunks = []
        for start in range(0, total, self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            chunk = {name: draw._replace(values=draw.values[rows]) for name, draw in draws.items()}
            chunks.append(self.predictive(chunk, list(sites))(*self.pair.args, **self.pair.kwargs))
        return self._joined(chunks, sites)

    def sample_prior(self, num_samples: int, sites: Mapping[str, Latent | Observed]) -> dict[str, Tensor]:
        """Sites sampled from the model alone, a chunk at a time, each ``[n, *batch, *event]``."""
        chunks = []
        for start in range(0, num_samples, self.chunk_size):
            size = min(self.chunk_size, num_samples - start)
            model, names = self._sampling_model(), list(sites)
            predictive = Predictive(model, num_samples=size, return_sites=names, parallel=self.vectorize)
            chunks.append(predictive(*self.pair.args, **self.pair.kwargs))
        return self._joined(chunks, sites)

    def _joined(
        self, chunks: Sequence[dict[str, Tensor]], sites: Mapping[str, Latent | Observed]
    ) -> dict[str, Tensor]:
        """Chunks as Predictive gives them, without the dims that it adds to sites outside of plates."""
        joined = {}
        for name, site in sites.items():
            values = torch.cat([chunk[name] for chunk in chunks])
            if isinstance(site, Observed) and site.log_prob is None:
                joined[name] = values.reshape(len(values), *site.values.shape[1:])
            else:
                joined[name] = own_shape(values, site.event_dim, site.frames, self.nesting, len(values))
        return joined

    def _sampling_model(self) -> Any:
        """The model with its observed sites sampled."""
        model = _SampleData()(self.pair.model)

        def on_the_same_minibatch(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), self.minibatch:
                return model(*args, **kwargs)

        return on_the_same_minibatch

    def _traces(self, draws: Mapping[str, Latent]) -> Iterator[tuple[Trace, int | None]]:
        """The model's traces on chunks of draws, with their number in each; None for a single one."""
        total = len(next(iter(draws.values())).values)
        step = self.chunk_size if self.vectorize else 1
        for start in range(0, total, step):
            chunk = {
                name: latent._replace(values=latent.values[start : start + step])
                for name, latent in draws.items()
            }
            if not self.vectorize:
                yield self._trace({name: latent.values[0] for name, latent in chunk.items()}), None
                continue
            size = min(step, total - start)
            with pyro.plate(PARTICLE_PLATE, size, dim=-1 - self.nesting):
                trace = self._trace({name: self._padded(latent) for name, latent in chunk.items()})
            yield trace, size

    def _trace(self, data: dict[str, Tensor]) -> Trace:
        conditioned = poutine.condition(self.pair.model, data=data)
        with torch.no_grad(), self.minibatch:
            trace = poutine.trace(conditioned).get_trace(*self.pair.args, **self.pair.kwargs)
        return prune_subsample_sites(trace)

    def _padded(self, latent: Latent) -> Tensor:
        """Values with the draws on the batch dim left of all plates."""
        values = latent.values
        batch = values.dim() - 1 - latent.event_dim
        return values.reshape(len(values), *[1] * (self.nesting - batch), *values.shape[1:])

    def _read_data(self, site: Any, size: int | None) -> Observed:
        fn, value = site["fn"], site["value"]
        frames = own_frames(site)
        log_prob = scale_and_mask(fn.log_prob(value), mask=site["mask"])
        log_prob = own_shape(log_prob, 0, frames, self.nesting, size)
        return Observed(value, log_prob, fn.event_dim, frames)

    def _refuse_enumeration(self, purpose: str) -> None:
        if self.enumerated:
            raise NotImplementedError(
                f"Site(s) {', '.join(map(repr, self.enumerated))} of the model are summed out, so no draws "
                f"of them are there for {purpose}. Sample them from their conditional by "
                "pyro.infer.infer_discrete, or in the guide."
            )


class _SampleData(UnconditionMessenger):
    """Samples what was observed, and leaves factors and deterministic sites as they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_deterministic(msg) and not isinstance(msg["fn"], Unit):
            super()._pyro_sample(msg)


def _is_deterministic(site: Any) -> bool:
    return bool(site["infer"] and site["infer"].get("_deterministic"))


def _read_deterministic(site: Any, shape: torch.Size, size: int | None) -> Observed:
    """A deterministic site's values on draws, given the shape that it has on one."""
    value, frames = site["value"], own_frames(site)
    count = 1 if size is None else size
    values = value.reshape(-1, *shape)
    rank = max((-frame.dim for frame in frames if frame.dim is not None), default=0)
    return Observed(values.expand(count, *shape), None, max(len(shape) - rank, 0), frames)


def _values(latent: Latent) -> Tensor:
    return latent.values


def _cat(parts: Sequence[Observed]) -> Observed:
    """The draws of several runs as one."""
    first = parts[0]
    if first.log_prob is None:
        return first._replace(values=torch.cat([part.values for part in parts]))
    log_probs = [part.log_prob for part in parts if part.log_prob is not None]
    return first._replace(log_prob=torch.cat(log_probs))
