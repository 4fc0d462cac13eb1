r"""What passes with one and two particles show about a pair of the SMC protocol, before it is filtered.

Some things have to be known. How many dims the plates take, and which of them all sites share: the particles
run left of the former, and have one filter for every cell of the latter. Which tensors of the state have the
particle dim: those whose shape differs between a pass with one particle and one with two, for a shape alone
cannot tell (a batch may have as many sequences as there are particles). And whether the state is all the
memory
there is: what a model keeps in ``self`` would not follow its particle when that is resampled.

That is tried out on the first few steps, on given values. If the two particles are exchanged, values and
state, after every step, then all densities have to be exchanged with them; if the second particle is made a
copy of the first, then nothing of the first may change, nor what has no particle dim. And if the values are
exchanged in some cells alone, whatever the model makes of that, then the densities of these cells have to be
exchanged and no others: cells are resampled each by itself, and may know nothing of one another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from .._support.random_state import RandomState, fork_rng
from ..tracing.batch_norm import watch_batch_norm
from ..tracing.cells import kept_plates
from ..tracing.enumeration import is_enumerated
from ..tracing.handlers import GivenValues
from ..tracing.indices import shuffled
from ..tracing.messages import latent_sites
from ..tracing.minibatches import OneMinibatch
from ..tracing.runner import ORDINARY, speaks_for_itself
from ..tracing.sites import Site, read_sites
from ..tracing.traces import PARTICLE_PLATE, PairTraces, Progress, Traces
from .protocol import INIT, Protocol, Sequences, march, moment_name, naming
from .state import Copies, FilterState, Leaf, in_words

__all__ = ["Known", "Unknown", "learn", "refuse_enumeration"]

#: Moments on which particles are exchanged and copied.
_MOMENTS = 4


class Unknown(Exception):
    """Something has come up that is not known of the pair: another plate, another tensor in the state."""


@dataclass(frozen=True)
class Known:
    """What is known of a pair.

    Attributes:
        nesting: the number of dims that all its plates take.
        plates: names of the plates whose cells have a filter each.
        carried: for ``init`` and every step, whether a tensor of the state has the particle dim.
        shapes: likewise, the shape that it has with two particles.
    """

    nesting: int
    plates: tuple[str, ...]
    carried: tuple[dict[Leaf, bool], ...]
    shapes: tuple[dict[Leaf, torch.Size], ...]

    def covers(self, sequences: Sequences) -> bool:
        """Whether all steps are known: memory of steps further back may begin late to have particles."""
        return len(sequences) < len(self.carried)

    def carries(self, moment: int, leaf: Leaf) -> bool:
        """Whether this tensor of the state has the particle dim after a moment.

        Raises:
            Unknown: if there was no such tensor.
        """
        carried = self.carried[moment + 1]
        if leaf not in carried:
            raise Unknown
        return carried[leaf]

    def check(self, moment: int, tensors: dict[Leaf, Tensor], size: int) -> None:
        """Compare the state of that many particles after a moment with what was known of it; other arguments
        may lead elsewhere.

        Raises:
            Unknown: if there is another tensor, one has more or fewer dims, or it seems to have begun or
                ceased to vary with the particles.
        """
        shapes = self.shapes[moment + 1]
        for leaf, tensor in tensors.items():
            known = shapes.get(leaf)
            if known is None or len(known) != tensor.dim():
                raise Unknown
            if tensor.dim() > self.nesting:
                has_dim, had_dim = tensor.shape[0] == size, self.carries(moment, leaf)
                # Data may have that size, and what has the wrong shape is named where it is resampled.
                usual = known[0] == (2 if had_dim else size)
                if has_dim != had_dim and usual == had_dim:
                    raise Unknown


class _Moment(NamedTuple):
    """What a pass with two particles leaves of a moment."""

    values: dict[str, Tensor]
    event_dims: dict[str, int]
    frames: dict[str, Any]
    sites: list[Site]
    tensors: dict[Leaf, Tensor]


def learn(
    pair: Protocol,
    sequences: Sequences,
    plates: Sequence[str] | None,
    least_nesting: int,
    warn_once: Callable[[str], None],
) -> Known:
    """Get to know a pair.

    Leaves nothing behind but lazily made parameters.

    Arguments:
        pair: the pair.
        sequences: the arguments.
        plates: names of the plates to keep; None for those common to all sites.
        least_nesting: the number of dims that the plates take at least.
        warn_once: called with a message.

    Raises:
        ValueError: if it cannot be filtered, naming the step, and the site or the tensor of the state.
        NotImplementedError: if a site is to be enumerated; it is named.
    """
    with torch.no_grad(), fork_rng(), watch_batch_norm(restore=True):
        sites, nesting, shapes = _run_alone(pair, sequences)
        nesting = max(nesting, least_nesting)
        kept = kept_plates(sites, plates, False, warn_once, offers_local=False)
        moments, indices = _run_two(pair, sequences, nesting)
        carried = tuple(
            {leaf: tensor.shape != before.get(leaf) for leaf, tensor in moment.tensors.items()}
            for moment, before in zip(moments, shapes, strict=True)
        )
        sizes = tuple({leaf: tensor.shape for leaf, tensor in moment.tensors.items()} for moment in moments)
        _warn_of_forgetting(moments, warn_once)
        known = Known(nesting, tuple(frame.name for frame in kept), carried, sizes)
        _check_memory(pair, sequences, known, moments[:_MOMENTS], indices)
    return known


def refuse_enumeration(traces: PairTraces) -> None:
    """Refuse a model that leaves a sum to be made.

    Raises:
        NotImplementedError: naming the site.
    """
    for name, site in dict[str, Any](traces.model.nodes).items():
        if is_enumerated(name, site, traces.guide):
            raise NotImplementedError(
                f"Site {name!r} of the model is to be enumerated in parallel, which a filter does not do: "
                f"its particles are draws. Sample {name!r} in the guide."
            )


def _run_alone(pair: Protocol, sequences: Sequences) -> tuple[list[Site], int, list[dict[Leaf, torch.Size]]]:
    """The sites of a pass with one particle, the dims of their plates, and the shapes in the state."""
    state, nesting = FilterState(1), 0
    # A site of every step once, where its plates are the same.
    sites: dict[Any, Site] = {}
    shapes: list[dict[Leaf, torch.Size]] = []
    with OneMinibatch():
        for moment, traced in march(pair, sequences, state):
            traces = Traces([traced], 1, None)
            with naming(moment):
                refuse_enumeration(traced)
                found = read_sites(traces)
            for site in found:
                label = f"{site.name} of {moment_name(moment)}"
                plates = tuple((frame.name, frame.dim, frame.size) for frame in site.frames)
                sites.setdefault((site.role, site.name, plates), site._replace(name=label))
            nesting = max(nesting, traces.plate_nesting)
            shapes.append({leaf: tensor.shape for leaf, tensor in state.tensors().items()})
    return list(sites.values()), nesting, shapes


def _run_two(pair: Protocol, sequences: Sequences, nesting: int) -> tuple[list[_Moment], dict[str, Any]]:
    """A pass with two particles, and the subsamples that it drew."""
    moments: list[_Moment] = []
    state, progress, minibatch, copies = FilterState(2), Progress(), OneMinibatch(), Copies()
    run = march(pair, sequences, state, enclose=_plate_of_two(nesting), progress=progress)
    try:
        with minibatch:
            for moment, traced in run:
                with naming(moment):
                    moments.append(_read(traced, nesting, state, copies))
    except Exception as error:
        if type(error) not in ORDINARY or speaks_for_itself(error):
            raise
        raise ValueError(
            f"The {progress.role} runs with one particle but not with 2 in one pass: it failed at "
            f"{moment_name(len(moments) - 1)}, {progress.where()}, with {type(error).__name__}: "
            f"{error}\nParticles add a batch dim at dim {-1 - nesting}, left of every plate. Let the "
            "computation broadcast over leading dims: index dims from the right, end reshapes in "
            "(*z.shape[:-1], ...), and add up where values of particles meet data, for torch.cat does not "
            "broadcast."
        ) from error
    return moments, minibatch.indices


def _plate_of_two(nesting: int) -> Any:
    return pyro.plate(PARTICLE_PLATE, 2, dim=-1 - nesting)


def _read(traced: PairTraces, nesting: int, state: FilterState, copies: Copies) -> _Moment:
    copies.begin()
    latents: dict[str, Any] = latent_sites(traced.guide)
    return _Moment(
        {name: site["value"] for name, site in latents.items()},
        {name: getattr(site["fn"], "event_dim", 0) for name, site in latents.items()},
        {name: site["cond_indep_stack"] for name, site in latents.items()},
        read_sites(Traces([traced], 2, -1 - nesting)),
        {leaf: copies(tensor) for leaf, tensor in state.tensors().items()},
    )


def _warn_of_forgetting(moments: Sequence[_Moment], warn_once: Callable[[str], None]) -> None:
    """Warn of a step that draws something and stores nothing."""
    for number, (before, after) in enumerate(itertools.pairwise(moments)):
        kept = {id(tensor) for tensor in before.tensors.values()}
        if after.values and all(id(tensor) in kept for tensor in after.tensors.values()):
            warn_once(
                f"At {moment_name(number)} the model samples {', '.join(map(repr, after.values))} and "
                "stores nothing in the state, so the next step does not know of it. Let step store what "
                "the next one reads, as in state['z'] = pyro.sample('z', ...)."
            )
            return


def _check_memory(
    pair: Protocol,
    sequences: Sequences,
    known: Known,
    moments: Sequence[_Moment],
    indices: dict[str, Any],
) -> None:
    """Exchange the two particles, and make one a copy of the other, see above.

    Nothing is said of what draws noise of its own, as dropout does.
    """
    before = RandomState.now()
    runs = [_repeat(pair, sequences, known, moments, indices, change) for change in (_Exchanged, _Copied)]
    mixed = moments
    if known.plates:
        mixed = _repeat(pair, sequences, known, moments, indices, _mixed(known))
    after = RandomState.now()
    if not torch.equal(before.cpu, after.cpu) or any(map(_differ, before.devices, after.devices)):
        return
    for number, (moment, exchanged, copied) in enumerate(zip(moments, *runs, strict=True)):
        _check_cells(moment, mixed[number], known, number)
        carried = known.carried[number]
        for leaf, tensor in moment.tensors.items():
            mine, theirs = tensor, copied.tensors[leaf]
            if carried[leaf]:
                mine, theirs = mine[:1], theirs[:1]
            if not _agree(mine, theirs):
                raise ValueError(
                    f"{in_words(leaf)} depends on "
                    + ("other particles" if carried[leaf] else "the particles and has no particle dim")
                    + f" (found at {moment_name(number - 1)}). A particle is resampled together with its own "
                    "memory: store values of the sites' batch shape, and average over particles nowhere "
                    "(batch normalisation in train mode does)."
                )
        for site, other, copy in zip(moment.sites, exchanged.sites, copied.sites, strict=True):
            if not _agree(_first(site.log_prob, known.nesting), _first(copy.log_prob, known.nesting)):
                raise ValueError(
                    f"The density of site {site} at {moment_name(number - 1)} depends on other particles "
                    "than its own, so its weight means nothing. Let no computation go over the particles' "
                    "dim, the leftmost one: batch normalisation in train mode does, softmax(h, 0) and "
                    "z.mean(0) do."
                )
            if not _agree(
                site.log_prob, _exchange(other.log_prob, known.nesting) if number % 2 else other.log_prob
            ):
                raise ValueError(
                    f"The density of site {site} at {moment_name(number - 1)} does not follow its "
                    "particle: when particles change places, and all in the state with them, it stays. So "
                    "something that depends on sampled values is kept elsewhere (in self, or in an object "
                    "in the state that is no tensor, tuple, list or dict), where resampling cannot move "
                    "it. Store it in the state."
                )


def _check_cells(moment: _Moment, mixed: _Moment, known: Known, number: int) -> None:
    """Refuse cells that know of one another."""
    for site, other in zip(moment.sites, mixed.sites, strict=True):
        if not _has_two(site.log_prob, known.nesting) or not _has_two(other.log_prob, known.nesting):
            continue
        wanted = _exchange_in_some(site.log_prob, site.frames, 0, known)
        if not _agree(wanted, other.log_prob):
            plates = " and ".join(map(repr, known.plates))
            raise ValueError(
                f"The density of site {site} at {moment_name(number - 1)} depends on latents of other "
                f"indices of plate {plates} (as z.mean(-1), z.roll(1, -1) make it). Each index has a filter "
                "of its own, whose particles are resampled without those of the others, so its weights would "
                "mean nothing. Let indices be independent, or pass plates=() for one joint filter."
            )


class _Change(NamedTuple):
    """What a repetition does to values and to the state."""

    values: Callable[[Tensor, int, Any, int], Tensor]
    state: Callable[[Tensor], Tensor]


_Exchanged = _Change(
    lambda value, number, *_: value.flip(0) if number % 2 else value, lambda tensor: tensor.flip(0)
)
_Copied = _Change(lambda value, *_: value[:1].expand_as(value), lambda tensor: tensor)


def _mixed(known: Known) -> _Change:
    """The particles exchanged in some cells, the same ones at all moments."""
    return _Change(
        lambda value, number, frames, event_dim: _exchange_in_some(value, frames, event_dim, known),
        lambda tensor: tensor,
    )


def _exchange_in_some(tensor: Tensor, frames: Any, event_dim: int, known: Known) -> Tensor:
    """``[2, *batch, *event]`` with the two exchanged in some cells."""
    moved = shuffled(tensor, 2, frozenset(known.plates), frames, event_dim)
    return torch.where(moved == 0, tensor, tensor.flip(0))


def _repeat(
    pair: Protocol,
    sequences: Sequences,
    known: Known,
    moments: Sequence[_Moment],
    indices: dict[str, Any],
    change: _Change,
) -> list[_Moment]:
    """The same moments again, on changed values and with a changed state between them."""
    state, given, repeated, copies = FilterState(2), GivenValues({}), [], Copies()
    run = march(
        pair, sequences, state, enclose=_plate_of_two(known.nesting), moments=range(INIT, len(moments) - 1)
    )
    with OneMinibatch(indices), given:
        for number, moment in enumerate(moments):
            given.values = {
                name: change.values(value, number, moment.frames[name], moment.event_dims[name])
                if value.dim() > known.nesting + moment.event_dims[name] and len(value) == 2
                else value
                for name, value in moment.values.items()
            }
            _, traced = next(run)
            repeated.append(_read(traced, known.nesting, state, copies))
            carried = known.carried[number]
            state.change(partial(_changed, change.state, carried))
    return repeated


def _changed(
    change: Callable[[Tensor], Tensor], carried: dict[Leaf, bool], leaf: Leaf, tensor: Tensor
) -> Tensor:
    return change(tensor) if carried[leaf] else tensor


def _first(log_prob: Tensor, nesting: int) -> Tensor:
    return log_prob[:1] if _has_two(log_prob, nesting) else log_prob


def _exchange(log_prob: Tensor, nesting: int) -> Tensor:
    return log_prob.flip(0) if _has_two(log_prob, nesting) else log_prob


def _has_two(log_prob: Tensor, nesting: int) -> bool:
    return log_prob.dim() > nesting and len(log_prob) == 2


def _agree(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)


def _differ(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other)
