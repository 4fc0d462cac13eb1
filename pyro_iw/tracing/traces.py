r"""One run of a model/guide pair: the guide traced, the model replayed against it.

What the rest of the package knows of Pyro's handlers is in here: ordinary guides and guide messengers, the
plate over particles, the route that latent values take from guide to model, and one minibatch for particles
that run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import TransformedDistribution

from .._support.random_state import RandomState
from .handlers import GivenValues
from .messages import guide_messenger, is_latent, sample_sites
from .paths import carried, has_path

__all__ = [
    "PARTICLE_PLATE",
    "OneMinibatch",
    "Pair",
    "PairTraces",
    "Progress",
    "Route",
    "Through",
    "Traces",
    "is_transformed",
    "plate_nesting",
    "trace_given",
    "trace_guide_given",
    "trace_model_again",
    "trace_pair",
    "trace_particle",
    "trace_prior_given",
]

#: Name of the plate over particles; Pyro's own ELBOs use the same.
PARTICLE_PLATE = "num_particles_vectorized"

#: What a latent value passes through between guide and model, given its event_dim and the index of its
#: particle (None where it holds all of them).
Through = Callable[[Tensor, int, "int | None"], Tensor]


class Pair(NamedTuple):
    """A model, its guide (which may be a :class:`~pyro.poutine.guide.GuideMessenger`) and their arguments."""

    model: Callable
    guide: Callable
    args: tuple = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never written to


class Route(NamedTuple):
    """How latent values travel.

    Attributes:
        through: what each passes through on its way from the guide to the model.
        stopped: whether no gradient flows through them at all, from one guide site to the next either.
        rescored: whether the guide's density is also evaluated at stopped values, by a second run of it.
        model_gradients: whether the model runs with gradients.
    """

    through: Through | None = None
    stopped: bool = False
    rescored: bool = False
    model_gradients: bool = True


class PairTraces(NamedTuple):
    """Traces of one run, without subsample sites.

    Attributes:
        model: the model, replayed against the guide.
        guide: the guide.
        rescored: the guide again, replayed against its own stopped values, if the route asks for it.
    """

    model: Trace
    guide: Trace
    rescored: Trace | None = None


class Traces(NamedTuple):
    """The traces of S particles.

    Attributes:
        pairs: one if vectorised, else S.
        num_particles: the number S of particles.
        particle_dim: the (negative) batch dim of the particles; None where each pair holds one.
        enum_dim: the first (negative) dim for enumerated sites of the model, left of all others; None where
            nothing is enumerated.
        began: the random state that the run began from, where it was asked for.
    """

    pairs: list[PairTraces]
    num_particles: int
    particle_dim: int | None
    enum_dim: int | None = None
    began: RandomState | None = None

    @property
    def plate_nesting(self) -> int:
        """Number of batch dims that the pair's own plates take."""
        return max(plate_nesting(trace) for pair in self.pairs for trace in (pair.model, pair.guide))


def plate_nesting(trace: Trace) -> int:
    """Number of batch dims that the plates in a trace take, that over particles aside."""
    return max(
        (
            -frame.dim
            for site in trace.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if frame.dim is not None and frame.name != PARTICLE_PLATE
        ),
        default=0,
    )


class Progress:
    """How far a run got, for the message if it breaks.

    Attributes:
        role: ``"guide"`` or ``"model"``.
        trace: what that has recorded.
    """

    def __init__(self) -> None:
        self.role = "guide"
        self.trace = Trace()

    def record(self, role: str, fn: Callable, pair: Pair) -> Trace:
        """Trace ``fn`` on the pair's arguments."""
        handler = poutine.trace(fn)
        self.role = role
        try:
            return handler.get_trace(*pair.args, **pair.kwargs)
        finally:
            self.trace = handler.trace

    def where(self) -> str:
        """The last sample site that was reached, in words."""
        names = list(sample_sites(self.trace))
        return f"after sample site {names[-1]!r}" if names else "before its first sample site"


class OneMinibatch(Messenger):
    """Gives every run inside it the subsample that the first one drew.

    A model's plate that declares no subsample gets the guide's, as under ``poutine.replay``, also when the
    model runs alone.

    Arguments:
        indices: subsamples known beforehand, by the name of their plate.

    Attributes:
        indices: subsamples known by now.
    """

    def __init__(self, indices: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.indices: dict[str, Any] = dict(indices or {})
        self._full_sizes: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if not site_is_subsample(msg) or msg["value"] is not None or name not in self.indices:
            return
        # A plate that takes all of its indices may have others than before: it is on other data then.
        if _is_minibatch(msg) or self._full_sizes.get(name) == msg["fn"].size:
            msg["value"] = self.indices[name]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and (_is_minibatch(msg) or len(msg["value"]) < msg["fn"].size):
            self.indices.setdefault(msg["name"], msg["value"])
            self._full_sizes.setdefault(msg["name"], msg["fn"].size)


def _is_minibatch(msg: Any) -> bool:
    """Whether a plate draws from its indices, rather than take them all."""
    size, subsample_size = msg["fn"].size, msg["fn"].subsample_size
    return subsample_size is not None and subsample_size < size


class _CutPaths(Messenger):
    """Cuts the gradient at latent values without a path, before anything downstream or any trace sees it.

    Arguments:
        everywhere: cut it at all latent values.
    """

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere

    def _pyro_post_sample(self, msg: Any) -> None:
        value: Any = msg["value"]
        if msg["is_observed"] or not getattr(value, "requires_grad", False) or site_is_subsample(msg):
            return
        if self.everywhere or not has_path(msg["fn"], msg["infer"]):
            msg["value"] = carried(value, Tensor.detach)


def trace_pair(
    pair: Pair,
    particle: int | None = None,
    route: Route | None = None,
    enclose: Callable[[Callable], Callable] = lambda fn: fn,
    enum_dim: int | None = None,
    progress: Progress | None = None,
) -> PairTraces:
    """Run guide and model once.

    Arguments:
        pair: the pair and its arguments.
        particle: index of the particle that this run is; None if it holds all of them.
        route: how latent values travel; straight, if None.
        enclose: wraps guide and model, as the plate over particles does.
        enum_dim: first dim for the model's sites that are enumerated in parallel; if None they are sampled.
        progress: kept up to date while they run.
    """
    route, progress = route or Route(), progress or Progress()
    # Around the trace and not inside it: the trace is to record stopped values.
    with _CutPaths(everywhere=route.stopped) if torch.is_grad_enabled() else nullcontext():
        guided, guide_trace, model_trace = _trace_guide(pair, enclose(pair.guide), progress)
    _score_transformed(guide_trace)
    rescored = None
    if route.rescored:
        stopped = _with_values(guided, lambda value, *_: value.detach())
        _, rescored, _ = _trace_guide(pair, poutine.replay(enclose(pair.guide), trace=stopped), progress)
    if route.through is not None:
        guided = _with_values(guided, route.through, particle)
    if route.through is not None or model_trace is None or enum_dim is not None:
        with nullcontext() if route.model_gradients else torch.no_grad():
            model_trace = _trace_model(pair, guided, enclose, enum_dim, progress)
    return PairTraces(prune_subsample_sites(model_trace), guide_trace, rescored)


def trace_particle(pair: Pair, latents: Mapping[str, Tensor], enum_dim: int | None = None) -> PairTraces:
    """Run guide and model once on given values of their latents.

    Arguments:
        pair: the pair and its arguments.
        latents: values of the guide's latent sites, of those where they are given.
        enum_dim: as in :func:`trace_pair`.
    """
    return trace_given(pair, GivenValues(latents), enum_dim=enum_dim)


def trace_given(
    pair: Pair,
    given: Messenger,
    enclose: Callable[[Callable], Callable] = lambda fn: fn,
    enum_dim: int | None = None,
) -> PairTraces:
    """Run guide and model once, with latents of the guide that a handler gives their values.

    Arguments:
        pair: the pair and its arguments.
        given: the handler, around the guide alone; whatever gradients its values carry, they keep.
        enclose: wraps guide and model, as the plate over particles does.
        enum_dim: as in :func:`trace_pair`.
    """
    progress = Progress()
    with given:
        guided, guide_trace, model_trace = _trace_guide(pair, enclose(pair.guide), progress)
    if model_trace is None or enum_dim is not None:
        model_trace = _trace_model(pair, guided, enclose, enum_dim, progress)
    return PairTraces(prune_subsample_sites(model_trace), guide_trace)


def trace_prior_given(
    pair: Pair,
    given: Messenger,
    enclose: Callable[[Callable], Callable] = lambda fn: fn,
    enum_dim: int | None = None,
) -> PairTraces:
    """:func:`trace_given` where the guide is the model's own prior, by a single run of the model.

    What is enumerated is not among the guide's sites.
    """
    model = enclose(pair.model)
    if enum_dim is not None:
        model = poutine.enum(model, first_available_dim=enum_dim)
    with given:
        model_trace = prune_subsample_sites(Progress().record("model", model, pair))
    guide_trace = Trace()
    for name, site in model_trace.nodes.items():
        if is_latent(site) and (site["infer"] or {}).get("enumerate") != "parallel":
            guide_trace.add_node(name, **site)
    return PairTraces(model_trace, guide_trace)


def trace_model_again(
    pair: Pair,
    traces: PairTraces,
    through: Through,
    enclose: Callable[[Callable], Callable],
    enum_dim: int | None,
) -> PairTraces:
    """Run the model alone, on the guide's values as they come out of ``through``.

    Arguments:
        pair: the pair and its arguments.
        traces: the traces of both.
        through: what the guide's values pass through.
        enclose: wraps the model, as the plate over particles does.
        enum_dim: as in :func:`trace_pair`.
    """
    guided = _with_values(traces.guide, through)
    model_trace = _trace_model(pair, guided, enclose, enum_dim, Progress())
    return traces._replace(model=prune_subsample_sites(model_trace))


def trace_guide_given(pair: Pair, values: Mapping[str, Tensor]) -> Trace:
    """Run the guide alone, with given values of some of its latent sites; without subsample sites."""
    with GivenValues(values):
        return _trace_guide(pair, pair.guide, Progress())[1]


def _trace_model(
    pair: Pair,
    guided: Trace,
    enclose: Callable[[Callable], Callable],
    enum_dim: int | None,
    progress: Progress,
) -> Trace:
    """The model replayed against the guide's trace."""
    model = enclose(pair.model)
    if enum_dim is not None:
        model = poutine.enum(model, first_available_dim=enum_dim)
    return progress.record("model", poutine.replay(model, trace=guided), pair)


def _trace_guide(pair: Pair, guide: Callable, progress: Progress) -> tuple[Trace, Trace, Trace | None]:
    """All that the guide recorded, its sites without subsampling, and the model's if it ran that as well."""
    messenger = guide_messenger(pair.guide)
    if messenger is None:
        recorded = progress.record("guide", guide, pair)
        return recorded, prune_subsample_sites(recorded), None
    progress.role = "guide"
    try:
        guide(*pair.args, **pair.kwargs)
    finally:
        progress.trace = messenger.trace
    model_trace, guide_trace = messenger.get_traces()
    # What it ran is the model itself only if neither of them is wrapped.
    own = messenger is pair.guide and messenger.model is pair.model
    return messenger.trace, guide_trace, model_trace if own else None


def _score_transformed(trace: Trace) -> None:
    """Evaluate transformed distributions at once: one without an inverse knows its last value alone."""
    site: Any
    for site in trace.nodes.values():
        if site["type"] == "sample" and is_transformed(site["fn"]):
            with suppress(ValueError, RuntimeError, KeyError):  # raised again, with a name, when it is read
                log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
                site["unscaled_log_prob"] = log_prob


def is_transformed(fn: Any) -> bool:
    """Whether a distribution is made by transforms, its event dims aside."""
    while not isinstance(fn, TransformedDistribution) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, TransformedDistribution)


def _with_values(trace: Trace, change: Through, particle: int | None = None) -> Trace:
    """The trace with its latent values changed."""
    trace = trace.copy()
    for name, site in list(trace.nodes.items()):
        if is_latent(site):
            event_dim = getattr(site["fn"], "event_dim", 0)
            value: Any = site["value"]
            changed: Any = {**site, "value": carried(value, change, event_dim, particle)}
            changed.pop("unscaled_log_prob", None)
            trace.nodes[name] = changed
    return trace
