r"""Importance sampling with the guide as proposal: the log evidence of every datapoint, and its particles.

With S particles :math:`z_s \sim q_\phi(z \mid x)` and weights :math:`w_s = p_\theta(x, z_s) / q_\phi(z_s \mid
x)`,

.. math:: \log \hat p(x) = L_S = \log \frac1S \sum_{s=1}^S w_s

falls short of :math:`\log p(x)` by about :math:`\mathrm{Var}[w] / (2 S\, p(x)^2)` in expectation. Particles
run in chunks, whose weights are added up as they come, so S may be as large as time allows. One value a cell
of the plates common to all sample sites (for a VAE: a datapoint), in nats, without the scale of subsampling.

References:
    | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
    | Debiasing Evidence Approximations (Nowozin, 2018), https://openreview.net/forum?id=HyZoi-WRb
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from .._support.arguments import as_plate_names, check_loader, positive_integer, read_batch
from .._support.nested import leaves
from .._support.progress import length_of, progress_bar
from .._support.random_state import RandomState, fork_rng
from .._support.warn import warn
from ..bounds import Bound
from ..compiling.evaluating import EvaluationCompiler
from ..ranks.group import Group
from ..running import RunningBound, RunningGap, RunningLogMean, jackknife
from ..tracing.batch_norm import watch_batch_norm
from ..tracing.cells import weighted_plates
from ..tracing.counterparts import check_guide
from ..tracing.latents import enumerated_sites
from ..tracing.levels import TwoLevels, check_local_plates
from ..tracing.minibatches import OneMinibatch
from ..tracing.particles import Particles, collect
from ..tracing.runner import Runner
from ..tracing.sites import read_sites
from ..tracing.traces import Pair, Traces, plate_nesting
from .chunk_size import particles_that_fit
from .compiled import CompiledChunks
from .dead import check_finite, dead_site, warn_of_dead
from .evidence import Evidence, LogMarginal
from .keeping import keep
from .local_weights import collect_local, local_numbers, total_log_weights
from .over_data import evaluate_over_ranks
from .over_particles import ParticleRanks, add_up, chunk_sizes, explain
from .predictive import Rerun
from .proposal import check_proposal
from .samples import ImportanceSamples

if TYPE_CHECKING:  # a PyTorch may be built without
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Evidence", "ImportanceSampler", "LogMarginal"]


class ImportanceSampler:
    r"""Judges a model/guide pair by importance sampling, with the guide as proposal.

    Arguments:
        model: the model (a callable with Pyro primitives).
        guide: the guide.
        num_particles: number S of particles a cell; an integer >= 1.
        local: for a hierarchical model the name of the plate of its local latents, which then have weights of
            their own, given each particle of the global ones; see :class:`HierarchicalSamples`. Or a mapping
            from the names of several plates side by side to the number of local particles in each.
        num_local: number L of local particles of each particle, where ``local`` is a name; an integer >= 1.
        chunk_size: number of particles in memory at once, each with all of its local ones; the last chunk may
            be smaller. None for all; ``"auto"`` for as many as a tenth of the free memory holds, and on a CPU
            16 MiB, see :mod:`~pyro_iw.posterior.chunk_size`.
        plates: name or names of the plates whose cells have a weight each; ``()`` for one joint weight; None
            for the plates common to all sample sites.
        jackknife: whether :meth:`log_marginal` corrects the leading term of the bias, 1/S, by

            .. math:: S L_S - (S - 1)\, \frac1S \sum_s L_{S-1}^{(-s)}

            where particle s is left out in turn (Nowozin, 2018, of order 1). Keeps S numbers a cell. The
            result is no bound, and its variance is larger.
        check_support: whether a guide that never proposes part of what the prior allows is refused. Pass
            False where the likelihood is 0 on that part.
        vectorize_particles: run a chunk in one pass under a plate on the leftmost batch dim, which model and
            guide must broadcast over; otherwise one particle at a time.
        max_plate_nesting: number of batch dims that the plates of the pair take; found by running the pair
            once if infinite.
        particle_group: ranks that share the particles, a process group or a mesh of one dimension: each draws
            its share of the S (see :mod:`~pyro_iw.posterior.over_particles`), all of them call the same
            methods on the same arguments, and every one gets the whole. For one seed of the group's first
            rank that is the same, but for rounding, on P ranks of whatever number with P chunks or more.
        compile: compile what a chunk computes, for :meth:`log_marginal`, :meth:`evidence` and
            :meth:`log_marginal_dataset`, see :mod:`~pyro_iw.compiling.evaluating`. The first chunk on
            arguments of new shapes runs eagerly, and the second takes some seconds to compile. From then on
            Pyro's handlers no longer run, and the guide's networks of the data run once for all chunks of a
            call. What cannot be compiled runs eagerly, after a warning. Where a plate draws its minibatch,
            the first chunk of every call runs eagerly, too.
        progress: whether to show a progress bar, if it takes more than two seconds.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> sampler = ImportanceSampler(model, guide, num_particles=1000)
        >>> sampler.log_marginal(data).shape  # one value a datapoint
        torch.Size([3])
        >>> samples = sampler(data)
        >>> samples.posterior(500)["z"].shape
        torch.Size([500, 3])
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        num_particles: int = 1000,
        *,
        local: str | Mapping[str, int] | None = None,
        num_local: int | None = None,
        chunk_size: int | Literal["auto"] | None = 100,
        plates: str | Iterable[str] | None = None,
        jackknife: bool = False,
        check_support: bool = True,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        particle_group: ProcessGroup | DeviceMesh | None = None,
        compile: bool = False,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.guide = guide
        self.num_particles = positive_integer("num_particles", num_particles)
        self.chunk_size = _chunk_size(chunk_size, self.num_particles)
        self.plates = as_plate_names(plates)
        self.local = local_numbers(local, num_local)
        if self.local and plates is not None:
            raise ValueError(
                "plates= names the plates that have a weight each on one level; with local= these are the "
                "plates around all sites, outside of the local ones. Pass one of them."
            )
        self.jackknife = jackknife
        if jackknife and self.num_particles == 1:
            raise ValueError("jackknife=True leaves out one particle in turn, which needs num_particles > 1.")
        self.check_support = check_support
        self.compile = compile
        self.progress = progress
        self._compiler = EvaluationCompiler()
        self._draws = False  # whether plates draw their minibatch
        self._fits: dict[Any, int] = {}  # chunk sizes, by the shapes of arguments
        self._runner = Runner(
            vectorize_particles,
            max_plate_nesting,
            check=partial(_check, local=tuple(self.local)),
            look=partial(check_guide, strict=True),
            warn=self._warn_once,
            local=self.local,
            kept=partial(weighted_plates, plates=self.plates),
        )
        self._warned: set[str] = set()
        self._ranks = None
        if particle_group is not None:
            self._ranks = ParticleRanks(particle_group, self.num_particles)

    def log_marginal(self, *args: Any, **kwargs: Any) -> Tensor:
        """The log evidence of every cell, of shape ``[*cells]``, in nats; a scalar where there is one weight.

        Memory is that of one chunk, whatever the number of particles (``jackknife`` keeps their weights).

        Arguments:
            args: positional arguments of model and guide.
            kwargs: keyword arguments of both.

        Raises:
            ValueError: if the model has no latent site, the support of a guide site is smaller than that of
                the model's, or a log-weight is NaN or +inf; naming the site. With ``local`` also if a local
                plate is not in the model, is subsampled or a Python loop, or has no latent that the guide
                draws in it; if a latent lies inside of it in one of model and guide alone; or if a site
                outside depends on a latent inside.

        Example:
            >>> exact = dist.Normal(0.0, 2**0.5).log_prob(data)
            >>> estimate = ImportanceSampler(model, guide, 5000).log_marginal(data)
            >>> torch.allclose(estimate, exact, atol=0.1)
            True
        """
        with self._bar(1) as bar:
            return self._stream(Pair(self.model, self.guide, args, kwargs), bar, RunningLogMean())

    def evidence(self, *args: Any, **kwargs: Any) -> Evidence:
        """:meth:`log_marginal` with its Monte Carlo error and the effective number of particles.

        Memory, arguments and errors are those of :meth:`log_marginal`. With ``jackknife`` the error is that
        of the value before its correction.

        Example:
            >>> value, error, ess = ImportanceSampler(model, guide, 5000).evidence(data)
            >>> exact = dist.Normal(0.0, 2**0.5).log_prob(data)
            >>> bool(((value - exact).abs() < 5 * error).all())
            True
        """
        running = RunningLogMean()
        with self._bar(1) as bar:
            value = self._stream(Pair(self.model, self.guide, args, kwargs), bar, running)
        return Evidence(value, running.standard_error.to(value.dtype), running.ess.to(value.dtype))

    def log_marginal_dataset(
        self,
        loader: Iterable[Any],
        to_args: Callable[[Any], Any] | None = None,
        bound: Bound | None = None,
        *,
        data_group: ProcessGroup | DeviceMesh | None = None,
        indices: Sequence[int] | Tensor | None = None,
    ) -> LogMarginal:
        """The log evidence of every datapoint of a data set.

        Arguments:
            loader: gives batches, as a :class:`~torch.utils.data.DataLoader` does: the positional arguments
                of model and guide in a tuple or list, or their keyword arguments in a dict, or the only
                argument. The last batch may be smaller.
            to_args: turns what the loader gives into one of these, where a batch holds more than the model
                takes, or has to move to another device.
            bound: a bound to evaluate on the same particles, in groups of its M K, for ``minus_kl``.
            data_group: ranks of which each has a loader with a part of the data set, a process group or a
                mesh of one dimension. Each of them gets the whole, in the order of the indices.
            indices: which datapoints this rank's loader gives, in its order; of one that occurs more than
                once the first value counts. None for those of the loader's ``DistributedSampler``, whose
                padding so counts once; without one the parts come one after the other.

        Raises:
            ValueError: if there is no batch, the bound takes more particles than there are, or the pair does
                not have one weight for each index of exactly one plate; if the parts leave a datapoint out,
                or are the same on all ranks; and as :meth:`log_marginal`.
            RankError: if another rank has failed, or evaluates something else; naming it.

        Example:
            >>> loader = torch.utils.data.DataLoader(data, batch_size=2)
            >>> sampler = ImportanceSampler(model, guide, num_particles=5000)
            >>> result = sampler.log_marginal_dataset(loader, bound=pyro_iw.bounds.IWAE(K=1))
            >>> result
            LogMarginal(mean=-1.69..., monte_carlo_error=0.003..., N=3, num_particles=5000)
            >>> round(result.minus_kl, 1)  # the guide's mean is off by 0.2 x, its variance too small
            -0.1
        """
        if bound is not None and bound.num_particles > self.num_particles:
            raise ValueError(
                f"{bound!r} takes {bound.num_particles} particles, but num_particles={self.num_particles}."
            )
        check_loader(loader)
        evaluate = partial(self._evaluate, to_args=to_args, bound=bound)
        return evaluate_over_ranks(evaluate, loader, data_group, indices)

    def _evaluate(
        self,
        loader: Iterable[Any],
        group: Group | None,
        to_args: Callable[[Any], Any] | None,
        bound: Bound | None,
    ) -> LogMarginal | None:
        """The log evidence of what a loader gives; None if that is nothing."""
        parts: list[list[Tensor]] = []
        given = (read_batch(batch, to_args) for batch in loader)
        with self._bar(length_of(loader), group) as bar:
            for args, kwargs in given if self._ranks is None else self._ranks.in_step(given):
                running = RunningLogMean()
                bounds = None if bound is None else RunningGap(bound)
                value = self._stream(Pair(self.model, self.guide, args, kwargs), bar, running, bounds)
                if value.dim() != 1:
                    remedy = (
                        "Call evidence on all of the data; samples.leave_one_out() has a predictive density "
                        "for each index of a local plate."
                        if self.local
                        else "Put all latents into one plate over the data, name it by plates=, or, for a "
                        "joint model, call log_marginal on all of the data."
                    )
                    raise ValueError(
                        "A data set is evaluated datapoint by datapoint, which needs one importance weight "
                        "for each index of one plate, but a batch gives weights of shape "
                        f"{tuple(value.shape)}. {remedy}"
                    )
                columns = [value, running.standard_error, running.ess]
                if bounds is not None:
                    columns += [bounds.value.to(value), bounds.gap_error(running)]
                parts.append(columns)
        if not parts:
            return None
        values, errors, ess, *bounds_values = (torch.cat(column) for column in zip(*parts, strict=True))
        value_of_bound, gap_errors = bounds_values or (None, None)
        words = f"importance sampling, local={self.local}, jackknife={self.jackknife}, bound={bound!r}"
        return LogMarginal(values, errors, ess, self.num_particles, value_of_bound, gap_errors, words)

    def __call__(self, *args: Any, **kwargs: Any) -> ImportanceSamples:
        """Draw S particles and keep them, with their densities.

        With ``particle_group`` every rank ends with all of them, and may do what it likes with them by
        itself. That takes as much memory on each rank as one process would need, S times the latents of all
        cells, and three times that of one site while it travels; all other methods hold a chunk.

        Arguments and errors are those of :meth:`log_marginal`.
        """
        pair = Pair(self.model, self.guide, args, kwargs)
        minibatch = OneMinibatch()
        with self._bar(1) as bar:
            if self._ranks is None:
                kept = keep(self._chunks(pair, self._plan(pair), minibatch, bar))
            else:
                draw, size_of_chunks = partial(self._chunks, pair), partial(self._size_of_chunks, pair)
                kept, minibatch = self._ranks.keep(repr(self), size_of_chunks, draw, keep, bar)
        rerun = Rerun(
            pair,
            self._runner.prepare(pair),
            plate_nesting(kept.traces.pairs[-1].model),
            self._runner.vectorize,
            self._size_of_chunks(pair),
            minibatch,
            enumerated_sites(kept.traces),
        )
        samples = kept.as_samples(rerun)
        if kept.dead is not None:
            warn_of_dead(samples.log_weights.amax(0), self.num_particles, kept.dead)
        return samples

    def particles(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The particles chunk by chunk, for an estimate of your own in the memory of one chunk:
        :class:`Particles`, with local ones :class:`TwoLevels`.

        Arguments and errors are those of :meth:`log_marginal`.
        """
        if self._ranks is not None:
            raise ValueError(
                "particles() gives chunk by chunk what this process draws, which with particle_group= is a "
                "share of the particles alone. Take a sampler without particle_group=, which draws all of "
                "them here, or call this one, whose ImportanceSamples are the whole."
            )
        with self._bar(1) as bar:
            pair = Pair(self.model, self.guide, args, kwargs)
            for particles, _, _ in self._chunks(pair, self._plan(pair), OneMinibatch(), bar):
                yield particles

    # ------------------------------------------------------------------------------------------------
    # Chunks
    # ------------------------------------------------------------------------------------------------

    def _stream(
        self, pair: Pair, bar: tqdm, running: RunningLogMean, bounds: RunningBound | None = None
    ) -> Tensor:
        """The log evidence of the cells, and on the way whatever else is to be added up."""
        draw, weigh = partial(self._chunks, pair), partial(self._log_weights, pair, bar)
        if self._ranks is None:
            began = RandomState.now()
            found = add_up(weigh(self._plan(pair), OneMinibatch()), running, bounds, self.jackknife)
            # The one look at values: no chunk waits for the device.
            if not bool(running.value.isfinite().all()):
                ended = RandomState.now()
                began.restore()
                try:
                    explain(draw(self._plan(pair), OneMinibatch()), running.value, self.num_particles)
                finally:
                    ended.restore()
        else:
            found = self._ranks.add_up(
                repr(self), partial(self._size_of_chunks, pair), draw, weigh, running, bounds, self.jackknife
            )
        value = running.value if found.log_w is None else jackknife(found.log_w)
        return value.to(found.like.dtype)

    def _log_weights(
        self, pair: Pair, bar: tqdm, plan: Iterable[int], minibatch: OneMinibatch
    ) -> Iterator[Tensor]:
        """The log-weights of chunk by chunk, ``[chunk, *cells]``."""
        compiled = None
        if self.compile:
            options = (self.plates, tuple(self.local.items()), self._runner.vectorize)
            compiled = CompiledChunks(self._compiler, pair, self._particles_of, options, self._draws)
        is_first = True
        for size in plan:
            log_w = None if compiled is None else compiled.log_weights(size, minibatch)
            if log_w is None:
                particles, _ = self._chunk(pair, size, minibatch, is_first)
                log_w = total_log_weights(particles)
                if is_first:
                    check_finite(particles)
                    self._draws = self._draws or bool(minibatch.indices)
                del particles, _  # or two chunks would be in memory while the next one runs
            is_first = False
            bar.update(size)
            yield log_w

    def _chunks(
        self, pair: Pair, plan: Iterable[int], minibatch: OneMinibatch, bar: tqdm | None = None
    ) -> Iterator[tuple[Particles | TwoLevels, Traces, str | None]]:
        """The particles chunk by chunk, with their traces and the first site of zero density, if any."""
        is_first = True
        for size in plan:
            particles, traces = self._chunk(pair, size, minibatch, is_first)
            is_first = False
            dead = dead_site(particles) if check_finite(particles) else None
            if bar is not None:
                bar.update(size)
            yield particles, traces, dead
            del particles, traces

    def _plan(self, pair: Pair) -> list[int]:
        """The sizes of chunks."""
        return chunk_sizes(self.num_particles, self._size_of_chunks(pair))

    def _size_of_chunks(self, pair: Pair) -> int:
        with torch.no_grad():
            self._runner.prepare(pair)
        if self.chunk_size != "auto":
            return self.chunk_size
        shapes = tuple(each.shape for each in leaves((pair.args, pair.kwargs)) if isinstance(each, Tensor))
        if shapes not in self._fits:
            with torch.no_grad(), fork_rng(), watch_batch_norm(restore=True), OneMinibatch():
                self._fits[shapes] = particles_that_fit(
                    lambda size: self._particles_of(pair, size), self.num_particles
                )
        return self._fits[shapes]

    def _chunk(
        self, pair: Pair, size: int, minibatch: OneMinibatch, is_first: bool
    ) -> tuple[Particles | TwoLevels, Traces]:
        # Never across a yield: whoever consumes the chunks may leave, or run under other settings.
        with torch.no_grad(), minibatch:
            particles, traces = self._particles_of(pair, size)
            if is_first:
                check_proposal(particles, traces, self.check_support, self._warn_once)
        return particles, traces

    def _particles_of(self, pair: Pair, size: int) -> tuple[Particles | TwoLevels, Traces]:
        traces = self._runner.run(pair, size)
        if self.local:
            return collect_local(traces, self._warn_once), traces
        particles = collect(
            traces, self.plates, is_linear=False, warn_once=self._warn_once, is_stratified=True
        )
        return particles, traces

    def _bar(self, batches: int | None, group: Group | None = None) -> tqdm:
        share, groups = self.num_particles, [group]
        if self._ranks is not None:
            share = math.ceil(share / self._ranks.group.size)
            groups.append(self._ranks.group)
        show = self.progress and all(ranks is None or ranks.rank == 0 for ranks in groups)
        total = None if batches is None else batches * share
        return progress_bar(show=show, total=total, desc="particles", unit_scale=True)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    @property
    def compile_seconds(self) -> dict[str, float]:
        """How long each compilation took, by what was compiled."""
        return self._compiler.seconds

    def __repr__(self) -> str:
        local = f", local={self.local}" if self.local else ""
        return f"ImportanceSampler(num_particles={self.num_particles}{local}, chunk_size={self.chunk_size!r})"


def _chunk_size(chunk_size: Any, num_particles: int) -> Any:
    if chunk_size is None:
        return num_particles
    if isinstance(chunk_size, str):
        if chunk_size != "auto":
            raise ValueError(
                f"chunk_size must be an integer >= 1, 'auto', or None for all, got {chunk_size!r}"
            )
        return chunk_size
    return min(positive_integer("chunk_size", chunk_size), num_particles)


def _check(traces: Traces, local: tuple[str, ...]) -> None:
    """Refuse a pair before particles obscure what is wrong with it."""
    sites = read_sites(traces)
    if local:
        check_local_plates(sites, local)
