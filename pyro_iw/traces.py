r"""Running a model/guide pair: S particles in one vectorised pass, or one by one.

Particles run under an outermost plate on the leftmost batch dim, so the dim must be left of every plate
of the pair. The first run of a pair is therefore preceded by one pass with a single particle (a *probe*),
which also lets lazily initialised guides create their parameters outside the particle dim and records what
batch normalisation sees without it. The probe restores the random state and BatchNorm's running
statistics: for one seed, a pair's first run gives the same numbers as any later one.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["PARTICLE_PLATE", "TraceRunner", "Traces"]

#: Name of the plate over particles; Pyro's own ELBOs use the same.
PARTICLE_PLATE = "num_particles_vectorized"

#: What a latent value passes through between guide and model: (value, event_dim, particle index or None).
Through = Callable[[Tensor, int, "int | None"], Tensor]


class Traces(NamedTuple):
    """The traces of S particles.

    Attributes:
        pairs: (model trace, guide trace), without subsample sites: one pair if vectorised, else S.
        num_particles: S.
        particle_dim: the (negative) batch dim of the particles; None where each pair holds one.
    """

    pairs: list[tuple[Trace, Trace]]
    num_particles: int
    particle_dim: int | None


class TraceRunner:
    """Runs guide and model, the model replayed against the guide.

    Arguments:
        vectorize: run all particles in one pass, under a plate; otherwise one by one.
        max_plate_nesting: number of batch dims the pair needs for its own plates; found by the
            probe if infinite.
        check: called with the probe's traces, to refuse a pair before the particle dim obscures why.
    """

    def __init__(
        self,
        vectorize: bool = True,
        max_plate_nesting: float = float("inf"),
        check: Callable[[Traces], Any] | None = None,
    ) -> None:
        self.vectorize = vectorize
        self.max_plate_nesting = max_plate_nesting
        self.check = check
        self._probes: weakref.WeakKeyDictionary[Any, _Probe] = weakref.WeakKeyDictionary()
        self._warned_modules: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        # What was learnt about a pair holds weak references, which do not pickle, and is soon relearnt.
        return {
            "vectorize": self.vectorize,
            "max_plate_nesting": self.max_plate_nesting,
            "check": self.check,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def run(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        num_particles: int,
        through: Through | None = None,
    ) -> Traces:
        """Run the pair on S particles.

        Arguments:
            model: a callable with Pyro primitives.
            guide: likewise, or a :class:`~pyro.poutine.guide.GuideMessenger`.
            args: positional arguments of both.
            kwargs: keyword arguments of both.
            num_particles: S.
            through: what each latent value passes through on its way from the guide to the model.

        Raises:
            ValueError: if the pair runs with one particle but not under the particle dim, naming the last
                site that was reached.
        """
        if num_particles == 1 or not self.vectorize:
            one_minibatch = _OneMinibatch()
            pairs = []
            for particle in range(num_particles):
                with one_minibatch:
                    pairs.append(_run_pair(model, guide, args, kwargs, particle, through))
            return Traces(pairs, num_particles, None)
        return self._run_vectorized(model, guide, args, kwargs, num_particles, through)

    def _run_vectorized(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        num_particles: int,
        through: Through | None,
    ) -> Traces:
        probe = self._probe(model, guide, args, kwargs)
        while True:
            dim = -1 - probe.nesting
            particles = pyro.plate(PARTICLE_PLATE, num_particles, dim=dim)
            progress = _Progress()
            try:
                with _watch_batch_norm(enabled=not probe.watched) as seen:
                    pair = _run_pair(
                        model,
                        guide,
                        args,
                        kwargs,
                        None,
                        through,
                        outer=particles,
                        progress=progress,
                    )
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                nesting = _nesting_alone(model, guide, args, kwargs)
                if nesting is None:
                    raise
                if nesting > probe.nesting:  # the pair's structure has changed since it was probed
                    probe.nesting = nesting
                    continue
                raise ValueError(
                    f"The {progress.role} runs with one particle but not with {num_particles} in one "
                    f"pass: it failed {progress.where()} with {type(error).__name__}: {error}\n"
                    f"Particles add a batch dim of size {num_particles} at dim {dim}, left of every plate. "
                    "Let the computation broadcast over leading dims (index dims from the right, end "
                    "reshapes in (*z.shape[:-1], ...)), or pass vectorize_particles=False to run the "
                    "particles one by one."
                ) from error
            nesting = _plate_nesting(pair)
            if nesting <= probe.nesting:
                break
            probe.nesting = nesting
        if not probe.watched:
            self._check_batch_norm(seen, probe, model, guide, args, kwargs)
            probe.watched = torch.is_grad_enabled()
        return Traces([pair], num_particles, dim)

    def _probe(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> _Probe:
        """What is known of the pair, from one pass with one particle if it is new."""
        model_anchor, guide_anchor = _anchor(model), _anchor(guide)
        try:
            known = self._probes.get(guide_anchor)
            if known is not None and known.model() is model_anchor:
                return known
            reference: Callable[[], Any] | None = weakref.ref(model_anchor)
        except TypeError:  # not hashable or not weakly referable: probed at every call
            reference = guide_anchor = None
        probe = _Probe(reference)
        probe.run(model, guide, args, kwargs, self.check)
        if self.max_plate_nesting != float("inf"):
            probe.nesting = max(probe.nesting, int(self.max_plate_nesting))
        if guide_anchor is not None:
            self._probes[guide_anchor] = probe
        return probe

    def _check_batch_norm(
        self,
        seen: dict[_BatchNorm, int],
        probe: _Probe,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict,
    ) -> None:
        """Warn of batch normalisation in train mode that averages over more than it would alone."""
        if any(module not in probe.normalised for module in seen):
            probe.run(model, guide, args, kwargs)  # in eval mode when first probed, in train mode now
        for module, count in seen.items():
            if count > probe.normalised.get(module, count) and id(module) not in self._warned_modules:
                self._warned_modules.add(id(module))
                warnings.warn(
                    f"{_module_name(module, model, guide)} is in train mode and normalises over the "
                    "particles as well as the batch, so one particle's density depends on the others and "
                    "the importance weights are off. Put it in eval mode, replace it by a normalisation "
                    "without batch statistics (LayerNorm, GroupNorm), or pass vectorize_particles=False.",
                    UserWarning,
                    stacklevel=2,
                )


class _Probe:
    """What passes with one particle show about a pair.

    Attributes:
        model: gives the model of the pair, or None once that is gone.
        nesting: number of batch dims that the pair's own plates take.
        normalised: how many values each BatchNorm in train mode averages over.
        watched: whether batch normalisation has been looked at in a pass with gradients.
    """

    def __init__(self, model: Callable[[], Any] | None = None) -> None:
        self.model = model or (lambda: None)
        self.nesting = 0
        self.normalised: dict[_BatchNorm, int] = {}
        self.watched = False

    def run(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict,
        check: Callable[[Traces], Any] | None = None,
    ) -> None:
        """One pass that leaves nothing behind but lazily made parameters."""
        with _fork_rng(), _watch_batch_norm(enabled=True, restore=True) as seen:
            pair = _run_pair(model, guide, args, kwargs)
            if check is not None:
                check(Traces([pair], 1, None))
        self.nesting = max(self.nesting, _plate_nesting(pair))
        self.normalised.update(seen)


class _OneMinibatch(Messenger):
    """Gives every particle the subsample that the first one drew."""

    def __init__(self) -> None:
        super().__init__()
        self._indices: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None and msg["name"] in self._indices:
            msg["value"] = self._indices[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._indices.setdefault(msg["name"], msg["value"])


class _Progress:
    """How far a run got, for the message if it breaks."""

    def __init__(self) -> None:
        self.role = "guide"
        self.trace: Trace | None = None

    def where(self) -> str:
        names = (
            []
            if self.trace is None
            else [
                name
                for name, site in self.trace.nodes.items()
                if site["type"] == "sample" and not site_is_subsample(site)
            ]
        )
        return f"after sample site {names[-1]!r}" if names else "before its first sample site"


def _run_pair(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    particle: int | None = None,
    through: Through | None = None,
    outer: Callable[[Callable], Callable] | None = None,
    progress: _Progress | None = None,
) -> tuple[Trace, Trace]:
    """Model and guide trace of one run, without subsample sites; ``outer`` is a plate over particles."""
    progress = progress or _Progress()
    enclose = outer or (lambda fn: fn)
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, GuideMessenger):
        enclose(guide)(*args, **kwargs)
        progress.role, progress.trace = "model", messenger.trace
        if through is None and messenger.model is model:
            return messenger.get_traces()
        full_trace = messenger.trace
        _, guide_trace = messenger.get_traces()
    else:
        handler = poutine.trace(enclose(guide))
        try:
            full_trace = handler.get_trace(*args, **kwargs)
        finally:
            progress.trace = handler.trace
        guide_trace = prune_subsample_sites(full_trace)
    if through is not None:
        full_trace = _pass_through(full_trace, through, particle)
    handler = poutine.trace(poutine.replay(enclose(model), trace=full_trace))
    progress.role = "model"
    try:
        model_trace = handler.get_trace(*args, **kwargs)
    finally:
        progress.trace = handler.trace
    return prune_subsample_sites(model_trace), guide_trace


def _pass_through(trace: Trace, through: Through, particle: int | None) -> Trace:
    trace = trace.copy()
    for name, site in list(trace.nodes.items()):
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site):
            event_dim = getattr(site["fn"], "event_dim", 0)
            trace.nodes[name] = {**site, "value": through(site["value"], event_dim, particle)}  # type: ignore[arg-type]
    return trace


def _nesting_alone(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> int | None:
    """Plate nesting of a pass with one particle; None if that fails too."""
    probe = _Probe()
    try:
        probe.run(model, guide, args, kwargs)
    except Exception:
        return None
    return probe.nesting


def _plate_nesting(pair: tuple[Trace, Trace]) -> int:
    """Number of batch dims that a pair's own plates take."""
    return max(
        (
            -frame.dim
            for trace in pair
            for site in trace.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if frame.dim is not None and frame.name != PARTICLE_PLATE
        ),
        default=0,
    )


def _anchor(fn: Callable) -> Any:
    """The object to know a callable by: a bound method is made anew at each access, its owner is not."""
    return fn.__self__ if inspect.ismethod(fn) else fn


def _module_name(module: torch.nn.Module, *roots: Any) -> str:
    for root in map(_anchor, roots):
        if isinstance(root, torch.nn.Module):
            for name, child in root.named_modules():
                if child is module:
                    return f"{type(module).__name__} {name!r}"
    return f"{type(module).__name__}({getattr(module, 'num_features', '')})"


@contextmanager
def _fork_rng() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _watch_batch_norm(enabled: bool, restore: bool = False) -> Iterator[dict[_BatchNorm, int]]:
    """How many values each BatchNorm in train mode averages over; its statistics restored if asked."""
    seen: dict[_BatchNorm, int] = {}
    if not enabled:
        yield seen
        return
    buffers: dict[_BatchNorm, dict[str, Tensor | None]] = {}

    def look(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, _BatchNorm) and module.training and inputs:
            if module not in buffers and restore:
                # A copy takes the updates: a graph may hold on to the buffers themselves.
                buffers[module] = dict(module._buffers)
                for name, buffer in buffers[module].items():
                    module._buffers[name] = None if buffer is None else buffer.clone()
            seen[module] = max(seen.get(module, 0), inputs[0].numel())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()
        for module, saved in buffers.items():
            module._buffers.update(saved)
