r"""One run of a model/guide pair: the guide traced, the model replayed against it.

What the rest of the package knows of Pyro's handlers is in here: ordinary guides and guide messengers, the
plate over particles, the route that latent values take from guide to model, and one minibatch for particles
that run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import TransformedDistribution

from .._support.random_state import RandomState
from .guide_values import is_enumerated_in_guide, refuse_messenger, spread_over_values
from .handlers import GivenValues
from .lkj import RightDraws
from .messages import guide_messenger, is_latent, sample_sites
from .minibatches import SameMinibatch
from .paths import carried, has_path
from .precision import in_full_precision, wide_densities

__all__ = [
    "LOCAL_PLATE",
    "PARTICLE_PLATE",
    "Pair",
    "PairTraces",
    "Progress",
    "Rescored",
    "Route",
    "Through",
    "Traces",
    "is_of_particles",
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

#: Name of the plate over the local particles of each of these.
LOCAL_PLATE = "num_local_particles_vectorized"

#: Index of the particle that a run is: of the particle and its local one where there are two levels; None
#: where it holds all of them.
Index = int | tuple[int, int] | None

#: What a latent value passes through between guide and model, given its event_dim, the index of its particle,
#: and the message of its site in the guide.
Through = Callable[[Tensor, int, Index, Any], Tensor]


class Pair(NamedTuple):
    """A model, its guide (which may be a :class:`~pyro.poutine.guide.GuideMessenger`) and their arguments."""

    model: Callable
    guide: Callable
    args: tuple = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never written to


class Rescored(NamedTuple):
    """A second run of the guide, at its own values, for the density at stopped values.

    Attributes:
        stopped: whether the value of a site is stopped, given its message; all are, unless given.
        read: whether the density of a site is that of this run.
    """

    stopped: Callable[[Any], bool] = lambda site: True
    read: Callable[[Any], bool] = lambda site: True


class Route(NamedTuple):
    """How latent values travel.

    Attributes:
        through: what each passes through on its way from the guide to the model.
        stopped: whether no gradient flows through them at all, from one guide site to the next either.
        rescored: second runs of the guide, in which its density is also evaluated at stopped values.
        model_gradients: whether the model runs with gradients.
        per_value: whether what passes through is first spread over the values that the guide enumerates, so
            that each of them has a gradient of its own.
    """

    through: Through | None = None
    stopped: bool = False
    rescored: tuple[Rescored, ...] = ()
    model_gradients: bool = True
    per_value: bool = False


class PairTraces(NamedTuple):
    """Traces of one run, without subsample sites.

    Attributes:
        model: the model, replayed against the guide.
        guide: the guide.
        rescored: sites of the guide again, at stopped values, as far as the route asks for it.
    """

    model: Trace
    guide: Trace
    rescored: Mapping[str, Any] = {}


class Traces(NamedTuple):
    """The traces of S particles.

    Attributes:
        pairs: one if vectorised; else S, or with local particles S times the most of them that a plate has,
            those of one particle side by side.
        num_particles: the number S of particles.
        particle_dim: the (negative) batch dim of the particles; None where each pair holds one.
        enum_dim: the first (negative) dim for enumerated sites, the guide's before the model's, left of all
            others; None where nothing is enumerated.
        began: the random state that the run began from, where it was asked for.
        local: by the name of its plate, the number of local particles of each particle.
    """

    pairs: list[PairTraces]
    num_particles: int
    particle_dim: int | None
    enum_dim: int | None = None
    began: RandomState | None = None
    local: Mapping[str, int] = {}

    @property
    def local_dim(self) -> int | None:
        """The batch dim of the local particles, right of that of the particles; None where there is none."""
        return self.particle_dim + 1 if self.local and self.particle_dim is not None else None

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
            if frame.dim is not None and not is_of_particles(frame)
        ),
        default=0,
    )


def is_of_particles(frame: Any) -> bool:
    """Whether a plate is none of the pair's own."""
    return frame.name in (PARTICLE_PLATE, LOCAL_PLATE)


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
    particle: Index = None,
    route: Route | None = None,
    enclose: Callable[[Callable], Callable] = lambda fn: fn,
    enum_dim: int | None = None,
    progress: Progress | None = None,
    given: Mapping[str, Tensor] | None = None,
    is_new: bool = False,
) -> PairTraces:
    """Run guide and model once.

    Arguments:
        pair: the pair and its arguments.
        particle: index of the particle that this run is.
        route: how latent values travel; straight, if None.
        enclose: wraps guide and model, as the plate over particles does.
        enum_dim: first dim for the sites that are enumerated in parallel; if None they are sampled.
        progress: kept up to date while they run.
        given: values of latent sites that the guide does not draw, with their graphs.
        is_new: whether to look at what is looked at in a pair's first run.

    Raises:
        ValueError: if ``is_new``, and a plate has a minibatch in the guide and is given another in the model.
        NotImplementedError: if a guide messenger has a site to enumerate.
    """
    with wide_densities():
        return _trace_pair(pair, particle, route or Route(), enclose, enum_dim, progress, given, is_new)


def _trace_pair(
    pair: Pair,
    particle: Index,
    route: Route,
    enclose: Callable[[Callable], Callable],
    enum_dim: int | None,
    progress: Progress | None,
    given: Mapping[str, Tensor] | None,
    is_new: bool,
) -> PairTraces:
    progress = progress or Progress()
    # Around the trace and not inside it: the trace is to record stopped values.
    with ExitStack() as stack:
        if torch.is_grad_enabled():
            stack.enter_context(_CutPaths(everywhere=route.stopped))
        if given:
            stack.enter_context(GivenValues(given))
        guide = _enumerating(pair, enclose(pair.guide), enum_dim)
        guided, guide_trace, model_trace = _trace_guide(pair, guide, progress)
    _score_transformed(guide_trace)
    rescored: dict[str, Any] = {}
    for run in route.rescored:
        stopped = _with_values(guided, partial(_stop, run.stopped))
        _, again, _ = _trace_guide(pair, poutine.replay(enclose(pair.guide), trace=stopped), progress)
        rescored |= {name: site for name, site in sample_sites(again).items() if run.read(site)}
    if route.through is not None:
        through = spread_over_values(route.through, guide_trace) if route.per_value else route.through
        guided = _with_values(guided, through, particle)
    if route.through is not None or model_trace is None or enum_dim is not None:
        watched = pair._replace(model=SameMinibatch(guided)(pair.model)) if is_new else pair
        with nullcontext() if route.model_gradients else torch.no_grad():
            model_trace = _trace_model(watched, guided, enclose, enum_dim, progress)
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
    with wide_densities():
        with given:
            guide = _enumerating(pair, enclose(pair.guide), enum_dim)
            guided, guide_trace, model_trace = _trace_guide(pair, guide, progress)
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
    with wide_densities():
        model_trace = _trace_model(pair, guided, enclose, enum_dim, Progress())
    return traces._replace(model=prune_subsample_sites(model_trace))


def trace_guide_given(pair: Pair, values: Mapping[str, Tensor]) -> Trace:
    """Run the guide alone, with given values of some of its latent sites; without subsample sites."""
    with wide_densities(), GivenValues(values):
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
        # The model's dims lie left of those that the guide has taken.
        taken = any(map(is_enumerated_in_guide, guided.nodes.values()))
        model = poutine.enum(model, first_available_dim=None if taken else enum_dim)
    return progress.record("model", poutine.replay(model, trace=guided), pair)


def _enumerating(pair: Pair, guide: Callable, enum_dim: int | None) -> Callable:
    """The guide under Pyro's parallel enumeration, unless it runs the model itself."""
    if enum_dim is None or guide_messenger(pair.guide) is not None:
        return guide
    return poutine.enum(guide, first_available_dim=enum_dim)


def _trace_guide(pair: Pair, guide: Callable, progress: Progress) -> tuple[Trace, Trace, Trace | None]:
    """All that the guide recorded, its sites without subsampling, and the model's if it ran that as well."""
    messenger = guide_messenger(pair.guide)
    if messenger is None:
        with RightDraws():
            recorded = progress.record("guide", guide, pair)
        return recorded, prune_subsample_sites(recorded), None
    progress.role = "guide"
    try:
        with RightDraws():
            guide(*pair.args, **pair.kwargs)
    finally:
        progress.trace = messenger.trace
    model_trace, guide_trace = messenger.get_traces()
    refuse_messenger(guide_trace)
    # What it ran is the model itself only if neither of them is wrapped.
    own = messenger is pair.guide and messenger.model is pair.model
    return messenger.trace, guide_trace, model_trace if own else None


def _score_transformed(trace: Trace) -> None:
    """Evaluate transformed distributions at once: one without an inverse knows its last value alone."""
    site: Any
    for site in trace.nodes.values():
        if site["type"] == "sample" and is_transformed(site["fn"]):
            with (
                suppress(ValueError, RuntimeError, KeyError),
                in_full_precision(),
            ):  # raised again, with a name, when it is read
                log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
                site["unscaled_log_prob"] = log_prob


def _stop(where: Callable[[Any], bool], value: Tensor, event_dim: int, particle: Index, site: Any) -> Tensor:
    return value.detach() if where(site) else value


def is_transformed(fn: Any) -> bool:
    """Whether a distribution is made by transforms, its event dims aside."""
    while not isinstance(fn, TransformedDistribution) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, TransformedDistribution)


def _with_values(trace: Trace, change: Through, particle: Index = None) -> Trace:
    """The trace with its latent values changed."""
    trace = trace.copy()
    for name, site in list(trace.nodes.items()):
        if is_latent(site) and not is_enumerated_in_guide(site):
            event_dim = getattr(site["fn"], "event_dim", 0)
            value: Any = site["value"]
            changed: Any = {**site, "value": carried(value, change, event_dim, particle, site)}
            changed.pop("unscaled_log_prob", None)
            trace.nodes[name] = changed
    return trace
