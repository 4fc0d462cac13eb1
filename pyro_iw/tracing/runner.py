r"""Running S particles of a model/guide pair, in one vectorised pass or one by one."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from .._support.random_state import RandomState, fork_rng
from .._support.warn import PACKAGE, warn
from .alone import Alone
from .batch_norm import watch_batch_norm
from .indices import Kept, check_indices, no_plates
from .levels import check_outside
from .local_particles import particles_on_two_levels, values_outside
from .minibatches import OneMinibatch
from .probe import Look, Probe
from .traces import PARTICLE_PLATE, Pair, Progress, Route, Through, Traces, trace_model_again, trace_pair

__all__ = ["ORDINARY", "Runner", "breaks_a_constraint", "speaks_for_itself"]


# What a computation raises that does not broadcast. Others (out of memory, a singular matrix, an error of the
# user's own) keep their type.
ORDINARY = (ValueError, RuntimeError, IndexError, TypeError, AssertionError)

#: What PyTorch says of parameters and values that a distribution does not allow.
_CONSTRAINTS = ("to satisfy the constraint", "to be within the support")

#: What stands for all runs of a single particle among those that have been looked at.
_SINGLE = "single"

#: Kinds of runs of a pair that are looked at closely; shapes may be new at every step.
_MANY = 8


class Runner:
    """Runs pairs on S particles, and remembers what it learnt of each.

    Arguments:
        vectorize: run all particles in one pass, under a plate; otherwise one by one.
        max_plate_nesting: number of batch dims a pair needs for its own plates; found by a probe if
            infinite.
        check: called with the traces of a new pair's probe, to refuse it before the particle dim obscures
            why.
        look: called once for each pair and pattern of guide sites that the model does not have, see
            :mod:`~pyro_iw.tracing.counterparts`.
        look_along: called once for each pair, with the traces of its first run with gradients; returns
            warnings.
        warn: called with a message.
        local: the number of local particles of each particle, by the name of their plate.
        kept: names, given all sites of a pair, the plates whose indices have an importance weight each, so
            that they have to be independent; none for the mean of log-weights, which may add up.
    """

    def __init__(
        self,
        vectorize: bool = True,
        max_plate_nesting: float = math.inf,
        check: Callable[[Traces], Any] | None = None,
        look: Look | None = None,
        look_along: Callable[[Traces], list[str]] = lambda traces: [],
        warn: Callable[[str], None] = warn,
        local: Mapping[str, int] | None = None,
        kept: Kept = no_plates,
    ) -> None:
        self.vectorize = vectorize
        self.kept = kept
        self.local = dict(local or {})
        self.max_plate_nesting = max_plate_nesting
        self.check = check
        self.look = look
        self.look_along = look_along
        self.warn = warn
        # By guide and by model: a guide may take turns with several.
        self._probes: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Probe]]
        self._probes = weakref.WeakKeyDictionary()
        self._warned_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # What was learnt about a pair holds weak references, which do not pickle, and is soon relearnt.
        names = ("vectorize", "max_plate_nesting", "check", "look", "look_along", "warn", "local", "kept")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def run(
        self,
        pair: Pair,
        num_particles: int,
        route: Route | None = None,
        minibatch: OneMinibatch | None = None,
        begin: Callable[[], RandomState] | None = None,
    ) -> Traces:
        """Run the pair on S particles.

        Arguments:
            pair: the pair and its arguments.
            num_particles: the number S of particles.
            route: how latent values travel; straight, if None.
            minibatch: one that this run takes part in; what a probe draws, or an attempt that is thrown away,
                is taken out of it again.
            begin: called right before the run, for the random state that it begins from, to be noted.

        Raises:
            ValueError: if the pair runs with one particle but not under the particle dim, naming the last
                site that was reached; or if a particle has other densities there than by itself, naming the
                first site.
        """
        known = {} if minibatch is None else dict(minibatch.indices)
        probe = self._probe(pair)
        vectorized = self.vectorize and max(num_particles, *self.local.values(), 1) > 1
        while True:
            if minibatch is not None:
                minibatch.indices = dict(known)
            began = None if begin is None else begin()
            single = num_particles == 1 and not vectorized
            is_new = _is_new(pair, probe)
            if single:  # it shows nothing of other particles, but does of a plate's indices
                is_new = is_new and self.kept is not no_plates and _SINGLE not in probe.compared
            watch = watch_batch_norm(enabled=is_new or (vectorized and not probe.watched))
            drawn = OneMinibatch()
            with watch as seen, drawn if is_new else nullcontext():
                if vectorized:
                    traces = self._one_pass(pair, num_particles, route, probe)
                else:
                    traces = self._run_one_by_one(pair, num_particles, route, probe)
            if traces is None:
                continue
            # More plates than were known, or a site to enumerate: then the run was beside its dims.
            dims_matter = traces.particle_dim is not None or traces.enum_dim is not None
            enumerated = probe.enumerates
            news = probe.learn(traces)
            if not news or not (dims_matter or enumerated != probe.enumerates):
                for message in probe.look_at_guide(pair, traces, self.look):
                    self.warn(message)
                if vectorized:
                    self._look_closer(pair, traces, probe, is_new, seen, drawn)
                elif is_new and not self.local:
                    self._look_across(pair, traces, probe, seen, drawn)
                if not vectorized and self.local and not probe.looked_outside:
                    check_outside(traces)
                    probe.looked_outside = True
                if torch.is_grad_enabled() and not probe.looked_along:
                    for message in self.look_along(traces):
                        self.warn(message)
                    probe.looked_along = True
                return traces._replace(began=began)

    def prepare(self, pair: Pair) -> int:
        """Get to know the pair, and make its lazy parameters, ahead of the first run.

        Returns:
            Number of batch dims that the pair's own plates take, as far as is known.
        """
        return self._probe(pair).nesting

    def run_model_again(self, pair: Pair, traces: Traces, num_particles: int, through: Through) -> Traces:
        """Run the model alone on some of the particles of a vectorised run, in another number.

        Arguments:
            pair: the pair and its arguments.
            traces: the traces of the run.
            num_particles: the number of particles now.
            through: makes their values out of the guide's.
        """
        plate = pyro.plate(PARTICLE_PLATE, num_particles, dim=traces.particle_dim)
        again = trace_model_again(pair, traces.pairs[0], through, plate, traces.enum_dim)
        return traces._replace(pairs=[again], num_particles=num_particles)

    def _run_one_by_one(self, pair: Pair, num_particles: int, route: Route | None, probe: Probe) -> Traces:
        enum_dim = -1 - probe.nesting if probe.enumerates else None
        pairs = []
        with OneMinibatch():
            for particle in range(num_particles):
                if not self.local:
                    pairs.append(trace_pair(pair, particle, route, enum_dim=enum_dim))
                    continue
                values = None
                for local in range(max(self.local.values())):
                    index = particle, local
                    pairs.append(trace_pair(pair, index, route, enum_dim=enum_dim, given=values))
                    if values is None:
                        values = values_outside(pairs[-1].guide, self.local)
        return Traces(pairs, num_particles, None, enum_dim, local=self.local)

    def _one_pass(self, pair: Pair, num_particles: int, route: Route | None, probe: Probe) -> Traces | None:
        """Traces under a plate left of the nesting known so far; None if that turned out too small."""
        dim = -1 - probe.nesting - bool(self.local)
        enum_dim = dim - 1 if probe.enumerates else None
        enclose = particles_on_two_levels(num_particles, self.local, dim)
        progress = Progress()
        try:
            traced = trace_pair(pair, None, route, enclose, enum_dim, progress)
        except Exception as error:
            if type(error) not in ORDINARY or speaks_for_itself(error):
                raise
            nesting = _nesting_alone(pair)
            if nesting is None:
                raise  # the pair is at fault, not the particle dim
            if nesting > probe.nesting:
                probe.nesting = nesting
                return None
            local = "".join(
                f", and at the sites in plate {name!r} one of size {number} at dim {dim + 1}"
                for name, number in self.local.items()
            )
            raise ValueError(
                f"The {progress.role} runs with one particle but not with {num_particles} in one pass: it "
                f"failed {progress.where()} with {type(error).__name__}: {error}\n"
                f"Particles add a batch dim of size {num_particles} at dim {dim}{local}, left of every "
                "plate. Let the computation broadcast over leading dims: z[..., 0] for z[:, 0], "
                "z.reshape(*z.shape[:-1], ...) for z.reshape(n, ...). A latent outside the plates comes with "
                "a dim of size 1 for each: (X * w).sum(-1) for X @ w, and for means[c] of such means in a "
                "plate, with c enumerated, Vindex(means.unsqueeze(-2))[..., c]. Or pass "
                "vectorize_particles=False to run the particles one by one. "
                "(If it fails for some values of the latents only, see the error itself, above.)"
            ) from error
        return Traces([traced], num_particles, dim, enum_dim, local=self.local)

    def _probe(self, pair: Pair) -> Probe:
        """What is known of the pair, from one pass with one particle if it is new."""
        model, guide = _anchor(pair.model), _anchor(pair.guide)
        probe = Probe()
        try:
            known = self._probes.setdefault(guide, weakref.WeakKeyDictionary())
            if model in known:
                return known[model]
        except TypeError:  # not hashable or not weakly referable: probed at every call
            known = None
        for message in probe.run(pair, self.check, self.look):
            self.warn(message)
        if self.max_plate_nesting != math.inf:
            probe.nesting = max(probe.nesting, int(self.max_plate_nesting))
        if known is not None:
            known[model] = probe
        return probe

    def _look_closer(
        self,
        pair: Pair,
        traces: Traces,
        probe: Probe,
        is_new: bool,
        seen: dict[nn.Module, int],
        minibatch: OneMinibatch,
    ) -> None:
        """Run one of the particles by itself, and see whether the others made a difference to it.

        Arguments:
            pair: the pair and its arguments.
            traces: the traces of all particles.
            probe: what is known of the pair.
            is_new: whether a run of this kind has not been looked at yet.
            seen: how many values each BatchNorm in train mode saw.
            minibatch: the subsamples of a new run.
        """
        if is_new or any(module not in probe.normalising for module in seen):
            alone = Alone(pair, traces, minibatch.indices, self.kept)
            with torch.no_grad(), fork_rng():
                with watch_batch_norm(restore=True) as normalised:
                    runs = alone.run()
                mixed = self._check_batch_norm(seen, normalised, pair) if runs else True
                # What a BatchNorm has mixed differs, as was said.
                with watch_batch_norm(restore=True):
                    known = is_new and not mixed and alone.compare()
            torch.clear_autocast_cache()  # of casts made without gradients
            if runs:
                probe.normalising.update(seen)
            if is_new:
                probe.compared.add(_kind(pair, probe, None if known else torch.is_grad_enabled()))
        probe.watched = probe.watched or torch.is_grad_enabled()

    def _look_across(
        self,
        pair: Pair,
        traces: Traces,
        probe: Probe,
        seen: dict[nn.Module, int],
        minibatch: OneMinibatch,
    ) -> None:
        """Whether the indices of plates that have a weight each are independent, in a run one by one.

        BatchNorm in train mode is let pass: its statistics are meant to be those of the batch.
        """
        single = len(traces.pairs) == 1
        if not seen:
            with torch.no_grad(), fork_rng():
                if single:
                    with OneMinibatch(minibatch.indices):
                        other = trace_pair(pair, enum_dim=traces.enum_dim)
                    traces = traces._replace(pairs=[*traces.pairs, other])
                check_indices(pair, traces, minibatch.indices, self.kept)
            torch.clear_autocast_cache()  # of casts made without gradients
        probe.compared.add(_SINGLE if single else _kind(pair, probe, None))

    def _check_batch_norm(
        self, seen: dict[nn.Module, int], normalised: dict[nn.Module, int], pair: Pair
    ) -> bool:
        """Warn of batch normalisation in train mode that saw more than with one particle; whether one did."""
        mixed = [module for module, count in seen.items() if count > normalised.get(module, count)]
        for module in mixed:
            if module not in self._warned_modules:
                self._warned_modules.add(module)
                warn(
                    f"{_module_name(module, pair)} is in train mode and normalises over the particles as "
                    "well as the batch, so one particle's density depends on the others and the importance "
                    "weights are off. Put it in eval mode, replace it by a normalisation without batch "
                    "statistics (LayerNorm, GroupNorm), or pass vectorize_particles=False."
                )
        return bool(mixed)


def _kind(pair: Pair, probe: Probe, gradients: bool | None) -> Any:
    """What makes a run another one than those before: its plates and the shapes of its arguments.

    Where nothing could be said with gradients (as of dropout in train mode), it may be without.
    """
    arguments = (*pair.args, *pair.kwargs.values())
    shapes = tuple([argument.shape for argument in arguments if isinstance(argument, Tensor)])
    return probe.nesting, probe.enumerates, shapes, gradients


def _is_new(pair: Pair, probe: Probe) -> bool:
    """Whether a run of this kind has not been looked at yet."""
    if len(probe.compared) >= _MANY:
        return False
    kinds = (_kind(pair, probe, gradients) for gradients in (None, torch.is_grad_enabled()))
    return probe.compared.isdisjoint(kinds)


def speaks_for_itself(error: Exception) -> bool:
    """Whether an error says what is wrong, which then is not the particle dim.

    That is so for what this package refuses, by a ``raise`` of its own, and for values that a distribution
    does not allow.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is not None and last.tb_frame.f_code.co_filename.startswith(PACKAGE):
        return True
    return breaks_a_constraint(error)


def breaks_a_constraint(error: Exception) -> bool:
    """Whether a distribution does not allow its parameters or a value."""
    return isinstance(error, ValueError) and any(words in str(error) for words in _CONSTRAINTS)


def _nesting_alone(pair: Pair) -> int | None:
    """Plate nesting of a pass with one particle; None if that fails too."""
    probe = Probe()
    try:
        probe.run(pair)
    except Exception:
        return None
    return probe.nesting


def _anchor(fn: Callable) -> Any:
    """The object to know a callable by: a bound method is made anew at each access, its owner is not."""
    return fn.__self__ if inspect.ismethod(fn) else fn


def _module_name(module: torch.nn.Module, pair: Pair) -> str:
    for root in (_anchor(pair.model), _anchor(pair.guide)):
        if isinstance(root, torch.nn.Module):
            for name, child in root.named_modules():
                if child is module:
                    return f"{type(module).__name__} {name!r}"
    return f"{type(module).__name__}({getattr(module, 'num_features', '')})"
