"""A look at a model/guide pair before it is trained: what gets a weight, what it costs, what would raise."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine

from ._support.random_state import fork_rng
from .elbo import ImportanceWeightedELBO
from .gradients.estimators import ESTIMATORS, get_estimator
from .hierarchical import LocallyEnhancedELBO
from .losses import IWAE_ELBO
from .tracing.batch_norm import watch_batch_norm
from .tracing.cells import is_subsampled, weighted_plates
from .tracing.enumeration import is_enumerated
from .tracing.guide_values import is_marked
from .tracing.sites import Site, read_sites
from .tracing.traces import Pair, Traces, trace_pair

__all__ = ["PairCheck", "SiteCheck", "check"]

# Steps that are timed, the fastest of which counts: the first ones also look the pair over.
_TIMED = 3


@dataclass(frozen=True)
class SiteCheck:
    """A site of one particle.

    Attributes:
        role: ``"guide"`` or ``"model"``.
        name: its name.
        kind: ``"latent"``, ``"observed"``, ``"factor"`` or ``"enumerated"``.
        batch_shape: the shape of its log density.
        event_shape: the shape of one event.
        plates: the plates around it, outermost first.
        has_path: whether a gradient flows through its value (or need not, where it has no parameters).

    Example:
        >>> site = check(model, guide, data).sites[0]
        >>> site.role, site.name, site.batch_shape, site.has_path
        ('guide', 'z', (3,), True)
    """

    role: str
    name: str
    kind: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[str, ...]
    has_path: bool


@dataclass
class PairCheck:
    """What :func:`check` found; printed, it is a page of text.

    Attributes:
        loss: the loss that was tried.
        sites: the sites of one particle, guide first.
        cells: the plates whose indices have an importance weight each, with their sizes; none for one joint
            weight. Plates of local particles, whose weights are given what is outside, are not among them.
        estimators: by name, None where the estimator goes with this pair and loss, else what it raises.
        warnings: what a first step warns of, each once.
        error: what a step raises; None if it does not.
        seconds: of the fastest of three steps with all particles, gradients included.
        seconds_of_one: likewise with a single particle; None if that raises.

    Example:
        >>> found = check(model, guide, data)
        >>> found.error is None, found.estimators["dreg"] is None, found.seconds > 0
        (True, True, True)
    """

    loss: ImportanceWeightedELBO
    sites: list[SiteCheck] = field(default_factory=list)
    cells: dict[str, int] = field(default_factory=dict)
    estimators: dict[str, str | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float | None = None
    seconds_of_one: float | None = None

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__

    def _lines(self) -> Iterator[str]:
        yield repr(self.loss)
        rows = [("", "site", "kind", "batch", "event", "plates")]
        rows += [
            (s.role, s.name, s.kind, str(s.batch_shape), str(s.event_shape), ", ".join(s.plates))
            for s in self.sites
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows if self.sites else ():
            yield (
                "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            )
        if self.cells:
            each = " and ".join(f"{name!r} ({size})" for name, size in self.cells.items())
            yield f"weights: one for each index of plate {each}"
        elif self.sites:
            yield "weights: one joint weight for all sites"
        if self.sites and _local(self.loss):
            over = " and ".join(map(repr, _local(self.loss)))
            yield f"local weights, given each particle of what is outside: one for each index of plate {over}"
        if self.error is not None:
            yield f"a step raises {self.error}"
        if self.seconds is not None:
            cost = f"cost: a step takes {1e3 * self.seconds:.3g} ms"
            if self.seconds_of_one is not None:
                cost += f", {self.seconds / self.seconds_of_one:.2g} times one of one particle"
            yield cost
        fine = [name for name, refusal in self.estimators.items() if refusal is None]
        if fine:
            yield "estimators: " + ", ".join(fine)
        for name, refusal in self.estimators.items():
            if refusal is not None and self.error is None:
                yield f"  not {name}: {refusal.split('. ')[0]}"
        for message in self.warnings:
            yield f"warning: {message}"


def check(
    model: Callable, guide: Callable, *args: Any, loss: ImportanceWeightedELBO | None = None, **kwargs: Any
) -> PairCheck:
    """Look a pair over as a first training step would see it.

    It runs a few steps on these arguments and throws their gradients away. Random generators, ``.grad`` and
    the statistics of batch normalisation stay as they are; parameters that a first step would make are made.

    Arguments:
        model: the model (a callable with Pyro primitives).
        guide: the guide.
        args: positional arguments of both.
        loss: the loss to train with; ``IWAE_ELBO(K=8)`` if None. One with a ``particle_group`` is tried
            with all particles on this process, without the other ranks.
        kwargs: keyword arguments of both.

    Returns:
        What was found; print it. What a step would raise is in there, and not raised.

    Raises:
        ValueError: if ``loss`` is none of the losses of this package.

    Example:
        >>> found = check(model, guide, data, loss=MIWAE_ELBO(M=8, K=8))
        >>> print(found)
        MIWAE_ELBO(M=8, K=8)
                 site  kind      batch  event  plates
          guide  z     latent    (3,)   ()     data
          model  z     latent    (3,)   ()     data
          model  x     observed  (3,)   ()     data
        weights: one for each index of plate 'data' (3)
        cost: a step takes ... ms, ... times one of one particle
        estimators: auto, reparam, stl, dreg, score, vimco, ovis, rws
        >>> found.cells
        {'data': 3}
    """
    loss = IWAE_ELBO(K=8) if loss is None else loss
    if not isinstance(loss, ImportanceWeightedELBO):
        raise ValueError(f"loss must be one of pyro_iw's losses of model and guide, got {loss!r}")
    found = PairCheck(loss)
    pair = Pair(model, guide, args, kwargs)
    with fork_rng(), watch_batch_norm(restore=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _noting(found):
            traces = Traces([trace_pair(pair)], 1, None)
            sites = read_sites(traces)
            guide_trace = traces.pairs[0].guide
            summed = {name for name, message in guide_trace.nodes.items() if is_marked(message)}
            model_sites = traces.pairs[0].model.nodes.items()
            summed |= {name for name, message in model_sites if is_enumerated(name, message, guide_trace)}
            found.sites = [_read(site, site.name in summed) for site in sites]
            kept = set(weighted_plates(sites, loss.plates)).difference(_local(loss))
            found.cells = {f.name: f.size for f in (sites[0].frames if sites else ()) if f.name in kept}
            found.seconds = _time(loss, pair)
        found.warnings = list(dict.fromkeys(str(warning.message) for warning in caught))
        if found.error is None:
            paths = loss.estimator in ("auto", "reparam", "stl", "dreg")
            with suppress(Exception):  # not every pair goes with it
                found.seconds_of_one = _time(IWAE_ELBO(K=1, estimator="auto" if paths else "score"), pair)
        if found.sites:
            found.estimators = _try_estimators(loss, pair)
    return found


def _local(loss: ImportanceWeightedELBO) -> list[str]:
    """The plates of local particles."""
    return list(loss.bound.local) if isinstance(loss, LocallyEnhancedELBO) else []


@contextmanager
def _noting(found: PairCheck) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found.error = f"{type(error).__name__}: {error}"


def _time(loss: ImportanceWeightedELBO, pair: Pair) -> float:
    trial, seconds = _alone(loss), []
    for _ in range(_TIMED):
        begin = time.perf_counter()
        _step(trial, pair)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _alone(loss: ImportanceWeightedELBO) -> ImportanceWeightedELBO:
    """A copy that has all particles on this process, for other ranks may not be checking anything."""
    trial = copy.deepcopy(loss)
    trial.particle_group = trial._ranks = None
    trial._minibatches = nullcontext()
    return trial


def _step(loss: ImportanceWeightedELBO, pair: Pair) -> None:
    """A gradient step as ``SVI`` takes it, whose gradients go nowhere."""
    with poutine.trace(param_only=True) as capture:
        value = loss.differentiable_loss(pair.model, pair.guide, *pair.args, **pair.kwargs)
    sites: Any = capture.trace.nodes.values()
    params = [site["value"].unconstrained() for site in sites]
    if value.requires_grad and params:
        torch.autograd.grad(value, params, allow_unused=True)
    value.item()  # waits for an accelerator


def _try_estimators(loss: ImportanceWeightedELBO, pair: Pair) -> dict[str, str | None]:
    outcomes: dict[str, str | None] = {}
    if isinstance(loss, LocallyEnhancedELBO):  # whose estimators are of another kind
        return outcomes
    for name in ESTIMATORS:
        trial = _alone(loss)
        trial._estimator = get_estimator(name)
        try:
            _step(trial, pair)
        except Exception as error:
            outcomes[name] = str(error)
        else:
            outcomes[name] = None
    return outcomes


def _read(site: Site, is_summed: bool) -> SiteCheck:
    message = site.message
    kind = "enumerated" if is_summed else "latent" if site.is_latent else "observed"
    if site.is_factor:
        kind = "factor"
    return SiteCheck(
        site.role,
        site.name,
        kind,
        tuple(site.log_prob.shape),
        tuple(message["fn"].event_shape),
        tuple(f"{f.name} (minibatch)" if is_subsampled(f) else f.name for f in site.frames),
        site.is_reparameterized,
    )
