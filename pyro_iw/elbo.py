r"""A bound as a Pyro loss: the base of all that stand in for :class:`~pyro.infer.Trace_ELBO` in ``SVI``.

It glues together three steps and speaks Pyro's protocol: :mod:`~pyro_iw.tracing.runner` runs model and guide
and :mod:`~pyro_iw.tracing.particles` reads off the log-weights, :mod:`~pyro_iw.bounds` turns them
into a bound and particle weights, :mod:`~pyro_iw.gradients.estimators` turns those into gradients. ``loss``,
``loss_and_grads`` and ``differentiable_loss`` are one computation, so for one seed they agree to the last
bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from ._support.arguments import as_plate_names, positive_integer, weight_of_kl
from ._support.random_state import RandomState, set_back
from ._support.warn import warn
from .bounds import Bound
from .compiling.step import Compiler, without_others
from .gradients.backward_subset import estimate_from_subset
from .gradients.chunks import Chunks, InChunks, estimate_in_chunks
from .gradients.estimators import get_estimator
from .gradients.not_finite import explain_not_finite
from .gradients.over_ranks import over_ranks, same_minibatches
from .gradients.over_values import suited_to
from .gradients.surrogate import Estimate
from .ranks.particles import ParticleGroup
from .tracing.cells import weighted_plates
from .tracing.counterparts import check_guide
from .tracing.jumps import find_jumps
from .tracing.masks import warn_of_masks
from .tracing.minibatches import OneMinibatch
from .tracing.particles import Particles, collect
from .tracing.runner import Runner
from .tracing.sites import Site, read_sites
from .tracing.traces import Pair, Route, Traces, trace_pair
from .training import TrainedLoss, gradient_step

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from .compiling.program import CompiledStep

__all__ = ["ImportanceWeightedELBO", "Keywords"]


class Keywords(TypedDict, total=False):
    """The keywords of :class:`ImportanceWeightedELBO`, for its subclasses to pass on."""

    estimator: str
    plates: str | Iterable[str] | None
    kl_weight: float | Callable[[int], float]
    vectorize_particles: bool
    chunk_size: int | None
    backward_particles: int | None
    max_plate_nesting: float
    strict_enumeration_warning: bool
    retain_graph: bool | None
    compile: bool
    stratified: bool
    particle_group: ProcessGroup | DeviceMesh | None


class ImportanceWeightedELBO(TrainedLoss):
    r"""Base class: any :class:`~pyro_iw.bounds.Bound` as a Pyro loss.

    Use it directly for a bound of your own. Log-weights are averaged per *cell* of the plates common to all
    sample sites of model and guide; the loss is minus the sum of the cells' bounds, each times N / B where
    its plate is a minibatch of B out of N.

    Arguments:
        bound: the bound on the log evidence, over S = M K particles.
        estimator: how the guide's gradient is estimated, see :mod:`~pyro_iw.gradients.estimators`:
            ``"reparam"`` (total derivative along reparameterised particles), ``"stl"``, ``"dreg"``, and for
            guides with sites that cannot be reparameterised ``"score"``, ``"vimco"``, ``"ovis"``, ``"rws"``.
            ``"auto"`` is ``"reparam"``, where every guide site allows it.
        plates: name or names of the plates whose cells get an importance weight each; ``()`` for one
            joint weight; None for the plates common to all sample sites.
        kl_weight: :math:`\beta` in :math:`\ell = \log p(x \mid z) + \beta\,(\log p(z) - \log q(z \mid x))`; a
            number >= 0, or a callable of the number of gradient steps taken so far (:attr:`steps`). A
            ``pyro.factor`` in the model counts as likelihood. Unless :math:`\beta = 1` the loss is no
            bound; :meth:`loss` always evaluates at 1, :meth:`differentiable_loss` at the current weight.
        vectorize_particles: run all particles in one pass under a plate on the leftmost batch dim, which
            model and guide must broadcast over; otherwise one by one.
        chunk_size: run no more than that many particles at once; an integer >= 1, or None for all. The
            gradients are the same (but for the order in which random numbers are drawn) in the memory of one
            chunk, at the price of a second forward pass, see :mod:`~pyro_iw.gradients.chunks`. With
            ``compile=True`` the programs of a chunk are compiled once and replayed.
        backward_particles: number k' of particles, chosen by weight in each cell, that the model runs on with
            gradients; an integer >= 1, or None for all. The loss is that of all particles, the gradient
            unbiased, see :mod:`~pyro_iw.gradients.backward_subset`. It goes together neither with
            ``chunk_size`` nor with ``vectorize_particles=False``.
        max_plate_nesting: number of batch dims that the plates of the pair take; found by running the pair
            once if infinite.
        strict_enumeration_warning: whether to warn of sites marked for sequential enumeration, which are
            sampled.
        retain_graph: as of ``Tensor.backward``, in :meth:`loss_and_grads`: True for a model that keeps a part
            of the graph from one step to the next, as GPyTorch's do. It goes together neither with
            ``chunk_size`` nor with ``compile=True``, whose graphs are no such thing.
        compile: compile gradient steps, see :mod:`~pyro_iw.compiling.step`. The first step on arguments of
            new shapes runs eagerly and the second takes some seconds to compile; from then on Pyro's handlers
            no longer run. What cannot be compiled runs eagerly, after a warning. :meth:`recompile` starts
            afresh where the model reads something in Python whose changes go unseen.
        stratified: whether discrete sites y that the guide enumerates (``infer={"enumerate": "parallel"}``)
            are summed over inside the logarithm, as the strata of one weight
            :math:`\sum_y p_\theta(x, y, z_y) / q_\phi(z_y \mid y, x)`. The bound is tighter than
            :math:`\sum_y q_\phi(y \mid x) V(\ell_y)`, the default, but does not train
            :math:`q_\phi(y \mid x)`, which drops out of it.
        particle_group: the P ranks, each a process of its own, that the M K particles are divided among: a
            process group of :mod:`torch.distributed` or a mesh of one dimension, ``mesh["particles"]``; M and
            K stay those of all. They share datapoints, and each has the whole bound for its loss. Gradients
            are to be *averaged* over all ranks, as ``DistributedDataParallel(loss(model, guide))`` and
            ``FusedOptim(..., process_group=...)`` do; see :mod:`~pyro_iw.ranks.particles`.

    Raises:
        ValueError: if an argument is out of range, or P does not divide M K.
        RankError: in a step, on every rank, if one of a particle group fails, does not come, has other data,
            parameters or shapes than the others, or the same noise; naming the rank.

    Example:
        >>> class Median(pyro_iw.Bound):  # the middle of M independent IWAE bounds
        ...     def value(self, log_w):
        ...         return (log_w.logsumexp(1) - math.log(self.K)).median(0).values
        >>> ImportanceWeightedELBO(Median(M=3, K=8))
        ImportanceWeightedELBO(Median(M=3, K=8))
    """

    def __init__(
        self,
        bound: Bound,
        *,
        estimator: str = "auto",
        plates: str | Iterable[str] | None = None,
        kl_weight: float | Callable[[int], float] = 1.0,
        vectorize_particles: bool = True,
        chunk_size: int | None = None,
        backward_particles: int | None = None,
        max_plate_nesting: float = math.inf,
        strict_enumeration_warning: bool = True,
        retain_graph: bool | None = None,
        compile: bool = False,
        stratified: bool = False,
        particle_group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        if not isinstance(bound, Bound):
            raise ValueError(f"bound must be a pyro_iw.Bound, got {bound!r}")
        super().__init__(
            num_particles=bound.num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
        )
        if not callable(kl_weight):
            weight_of_kl(kl_weight)
        if chunk_size is not None:
            chunk_size = positive_integer("chunk_size", chunk_size)
        if backward_particles is not None:
            backward_particles = positive_integer("backward_particles", backward_particles)
            if chunk_size is not None or not vectorize_particles:
                other = "chunk_size" if chunk_size is not None else "vectorize_particles=False"
                raise ValueError(
                    f"backward_particles runs all particles in one pass, and {other} asks for several. Pass "
                    "one of them: chunk_size bounds memory, backward_particles saves time and memory at the "
                    "price of noise in the gradient."
                )
        if retain_graph and (compile or chunk_size is not None):
            other = "compile=True" if compile else "chunk_size"
            raise ValueError(
                f"retain_graph=True keeps the graph of a step for the next one, but {other} leaves none to "
                "keep. Pass one of them."
            )
        self.bound = bound
        self.estimator = estimator
        self.plates = as_plate_names(plates)
        self.kl_weight = kl_weight
        self.chunk_size = chunk_size
        self.backward_particles = backward_particles
        self.steps = 0
        self._estimator = get_estimator(estimator)
        self._runner = Runner(
            vectorize_particles,
            max_plate_nesting,
            check=self._check_pair,
            look=partial(check_guide, strict=False),
            look_along=self._look_along,
            warn=self._warn_once,
            kept=self._indices_apart,
        )
        self._warned: set[str] = set()
        self.compile = compile
        self.stratified = stratified
        self._compiler = Compiler()
        self.particle_group = particle_group
        self._ranks = None if particle_group is None else ParticleGroup(particle_group, bound)
        self._said: tuple | None = None  # what must be the same on all ranks
        #: Gives the plates of a step that came to nothing the minibatches that they had.
        self._minibatches: AbstractContextManager[Any] = nullcontext()

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, in nats, without gradients.

        Arguments:
            model: the model (a callable with Pyro primitives).
            guide: the guide.
            args: positional arguments of both.
            kwargs: keyword arguments of both.

        Raises:
            ValueError: if a log-weight is NaN or +inf, naming the site.
        """
        with torch.no_grad(), self._step(1.0):
            particles, estimate = self._estimate(Pair(model, guide, args, kwargs), kl_weight=1.0)
            loss = estimate.loss.item()
            self._check_finite(loss, particles, estimate)
        return loss

    @gradient_step
    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, in nats, leaving gradients in the parameters' ``.grad``.

        Arguments and errors are those of :meth:`loss`; also ``ValueError`` where the estimator does not
        cover a site of the guide. ``.grad`` is untouched by an error, except that on an accelerator with
        Pyro's validation off, NaN and +inf are found only after the backward pass: zero it then.
        """
        kl_weight = self._next_kl_weight()
        with self._step(kl_weight):
            return self._loss_and_grads(Pair(model, guide, args, kwargs), kl_weight)

    def _loss_and_grads(self, pair: Pair, kl_weight: float) -> float:
        compiled = self._compiled_step(pair, kl_weight)
        if compiled is not None:
            loss = compiled.loss.item()
            if math.isfinite(loss):
                compiled.accumulate()
                self._count()
                return loss
            self._rewind(compiled)  # the eager step on the same noise says what is wrong, and where
        particles, estimate = self._estimate(pair, kl_weight)
        # Before the backward pass, so that .grad stays clean; on an accelerator that means to wait for
        # the device in mid-step, which is a price for validation alone.
        early = is_validation_enabled() or estimate.loss.device.type == "cpu"
        if early:
            loss = estimate.loss.item()
            self._check_finite(loss, particles, estimate)
        if estimate.loss.requires_grad:
            estimate.loss.backward(retain_graph=self.retain_graph)
        if not early:
            loss = estimate.loss.item()
            self._check_finite(loss, particles, estimate)
        self._count()
        return loss

    @gradient_step
    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, in nats, as a scalar whose ``.backward()`` gives the estimator's gradients.

        Arguments and errors are those of :meth:`loss_and_grads`; NaN and +inf are looked for only where
        Pyro's validation is on. It can be differentiated once.
        """
        kl_weight = self._next_kl_weight()
        with self._step(kl_weight):
            return self._differentiable_loss(Pair(model, guide, args, kwargs), kl_weight)

    def _differentiable_loss(self, pair: Pair, kl_weight: float) -> Tensor:
        compiled = self._compiled_step(pair, kl_weight)
        if compiled is not None:
            if not is_validation_enabled() or math.isfinite(compiled.loss.item()):
                self._count()
                return compiled.differentiable()
            self._rewind(compiled)
        particles, estimate = self._estimate(pair, kl_weight)
        if is_validation_enabled():
            self._check_finite(estimate.loss.item(), particles, estimate)
        if torch.is_grad_enabled():
            self._count()
        return estimate.loss

    def _compiled_step(self, pair: Pair, kl_weight: float) -> CompiledStep | None:
        if not (self.compile and torch.is_grad_enabled()):
            return None
        self._runner.prepare(pair)  # by a run of its own, which is not to be recorded
        attributes = tuple(
            (type(bound), name, value if isinstance(value, Hashable) else id(value))
            for bound in self._bounds
            for name, value in vars(bound).items()
        )
        options = (attributes, self.plates, self.backward_particles, self.stratified, self.chunk_size)
        chunks = None
        recording: Callable[[], AbstractContextManager[Any]] = nullcontext
        if _is_less(self.chunk_size, self.num_particles):
            chunks = self._in_chunks(self._route())
        if self._ranks is not None:
            self._ranks.ready()
            recording = partial(without_others, self._ranks)
        return self._compiler.run(pair, kl_weight, self._estimate, options, chunks, recording)

    def _rewind(self, compiled: CompiledStep) -> None:
        compiled.rewind()
        if self._ranks is not None:
            self._ranks.repeat()

    def _step(self, kl_weight: float) -> AbstractContextManager[None]:
        """A step, in which the ranks of a particle group take part together."""
        if self._ranks is None:
            return nullcontext()
        if self._said is None:
            keywords = (self.plates, self.backward_particles, self.stratified)
            self._said = str(self._bounds), self.estimator, *keywords
        kind = "a gradient step" if torch.is_grad_enabled() else "a loss"
        weight = None if isinstance(kl_weight, Tensor) else float(kl_weight)
        return self._ranks.step(kind, *self._said, weight)

    def recompile(self) -> None:
        """Forget all compiled steps, and try again to compile what could not be."""
        self._compiler.forget()

    @property
    def compile_seconds(self) -> dict[str, float]:
        """How long each compilation took, by what was compiled; empty without ``compile=True``."""
        return self._compiler.seconds

    def particles(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Particles:
        """Draw S = M K particles and return their log-weights, of shape ``[S, *cells]``, in nats.

        Arguments are those of :meth:`loss`. They are drawn at once, whatever ``chunk_size``.

        Example:
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> def guide(x):
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            >>> IWAE_ELBO(K=5).particles(model, guide, torch.zeros(3)).log_weights.shape
            torch.Size([5, 3])
        """
        return self._draw(1.0, Pair(model, guide, args, kwargs), self.num_particles)[0]

    def _estimate(self, pair: Pair, kl_weight: float) -> tuple[Particles | Chunks, Estimate]:
        gradients = torch.is_grad_enabled()
        route = self._route() if gradients else None
        number, begin, chosen = self.num_particles, None, None
        if route is not None and _is_less(self.backward_particles, number):
            chosen = self.backward_particles
        estimator: Any = self._estimator
        with ExitStack() as stack:
            if self._ranks is not None:
                estimator, number = over_ranks(estimator, self._ranks, chosen), self._ranks.own
                self._ranks.ready()
                self._minibatches = stack.enter_context(same_minibatches(self._ranks))
                if _is_less(self.chunk_size, self.num_particles):
                    stack.enter_context(set_back())
                    begin = partial(self._ranks.begin, 0)
            if _is_less(self.chunk_size, number):
                return estimate_in_chunks(pair, kl_weight, self._in_chunks(route))
            if _is_less(chosen, number):
                assert route is not None
                collect = partial(self._collect, kl_weight)
                return estimate_from_subset(
                    self._runner, collect, pair, estimator, self.bound, route, number, chosen
                )
            particles, _ = self._draw(kl_weight, pair, number, route, begin=begin)
            estimator = suited_to(estimator, particles)
            if gradients:
                estimator.check(particles, self.bound)
            return particles, estimator.estimate(particles, self.bound, route)

    def _route(self) -> Route:
        """How latent values travel where gradients are wanted."""
        route = self._estimator.route(self.bound)
        return route._replace(per_value=not (self.stratified or self._is_linear))

    def _in_chunks(self, route: Route | None) -> InChunks:
        assert self.chunk_size is not None
        step = InChunks(self._draw, self._estimator, self.bound, route, self.num_particles, self.chunk_size)
        if self._ranks is None:
            return step
        return step._replace(
            estimator=over_ranks(self._estimator, self._ranks),
            num_particles=self._ranks.own,
            begin=self._ranks.begin,
            around=partial(same_minibatches, self._ranks),
        )

    def _draw(
        self,
        kl_weight: float,
        pair: Pair,
        num_particles: int,
        route: Route | None = None,
        minibatch: OneMinibatch | None = None,
        begin: Callable[[], RandomState] | None = None,
    ) -> tuple[Particles, RandomState | None]:
        """Particles, and the random state that they were drawn from, as of :meth:`Runner.run`."""
        traces = self._runner.run(pair, num_particles, route, minibatch, begin)
        return self._collect(kl_weight, traces), traces.began

    @property
    def _bounds(self) -> list[Bound]:
        """The bound, or those it is made of."""
        return [self.bound]

    @property
    def _is_linear(self) -> bool:
        return all(bound.is_linear and bound.guide_bound.is_linear for bound in self._bounds)

    def _read(self, kl_weight: float, traces: Traces) -> Particles:
        return collect(traces, self.plates, self._is_linear, kl_weight, self._warn_once, self.stratified)

    def _collect(self, kl_weight: float, traces: Traces) -> Particles:
        particles = self._read(kl_weight, traces)
        if self.strict_enumeration_warning:
            for site in particles.sites:
                if site.role == "guide" and site.message["infer"].get("enumerate") == "sequential":
                    self._warn_once(
                        f"Site {site.name!r} is marked for sequential enumeration, but is sampled. Remove "
                        "its infer={'enumerate': 'sequential'} or pass strict_enumeration_warning=False."
                    )
        return particles

    def _look_along(self, traces: Traces) -> list[str]:
        route = self._estimator.route(self.bound)
        return find_jumps(traces, has_paths=not route.stopped, is_linear=self._is_linear)

    def _indices_apart(self, sites: list[Site]) -> list[str]:
        """The plates whose indices have a weight each; log-weights that are only averaged may add up."""
        return [] if self._is_linear else weighted_plates(sites, self.plates)

    def _check_pair(self, traces: Traces) -> None:
        """What a new pair's first run with one particle shows, masks included whatever the validation."""
        warn_of_masks(read_sites(traces), self._warn_once, look=True)

    def _next_kl_weight(self) -> float:
        if not callable(self.kl_weight):
            return self.kl_weight
        return weight_of_kl(self.kl_weight(self.steps))

    def _check_finite(self, loss: float, particles: Particles | Chunks, estimate: Estimate) -> None:
        """Warn of a bound of -inf, refuse NaN and +inf; name the site each arose at."""
        if math.isfinite(loss):
            return
        with self._minibatches:
            others = (lambda: None) if self._ranks is None else self._ranks.refuse_others
            explain_not_finite(self.bound, particles, estimate, others)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Any:
        """Model and guide trace of one particle, as Pyro's own ELBOs give them."""
        traces = trace_pair(Pair(model, guide, args, kwargs))
        return traces.model, traces.guide

    def _options(self) -> str:
        """The keywords that are not at their default, as they would be typed."""
        defaults = inspect.signature(ImportanceWeightedELBO).parameters
        names = (
            "estimator",
            "plates",
            "kl_weight",
            "vectorize_particles",
            "chunk_size",
            "backward_particles",
            "retain_graph",
            "compile",
            "stratified",
            "particle_group",
        )
        values = {name: getattr(self, name) for name in names}
        return "".join(
            f", {name}={value!r}" for name, value in values.items() if value != defaults[name].default
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.bound!r}{self._options()})"


def _is_less(number: int | None, num_particles: int) -> TypeGuard[int]:
    return number is not None and number < num_particles
