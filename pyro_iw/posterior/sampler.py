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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from .._support.arguments import as_plate_names, check_loader, positive_integer, read_batch
from .._support.progress import length_of, progress_bar
from .._support.warn import warn
from ..bounds import Bound
from ..ranks.group import Group
from ..running import RunningBound, RunningGap, RunningLogMean, jackknife
from ..tracing.counterparts import check_guide
from ..tracing.latents import enumerated_sites, join, read_latents
from ..tracing.levels import TwoLevels, check_local_plates
from ..tracing.local_latents import read_local_latents
from ..tracing.minibatches import OneMinibatch
from ..tracing.particles import Particles, collect
from ..tracing.runner import Runner
from ..tracing.sites import read_sites
from ..tracing.traces import Pair, Traces, plate_nesting
from .dead import check_finite, dead_site, warn_of_dead
from .hierarchical_samples import HierarchicalSamples
from .local_weights import collect_local, join_local, local_numbers, total_log_weights
from .log_marginal import LogMarginal
from .over_data import evaluate_over_ranks
from .over_particles import Kept, ParticleRanks, Sums, chunk_sizes
from .predictive import Rerun
from .proposal import check_proposal
from .samples import ImportanceSamples

__all__ = ["Evidence", "ImportanceSampler", "LogMarginal"]


class Evidence(NamedTuple):
    """The log evidence of every cell, and how well it is known.

    Attributes:
        log_marginal: :math:`\\log \\hat p(x)` in nats, of shape ``[*cells]``.
        monte_carlo_error: its standard error from the finite number of particles (delta method), likewise.
        ess: effective number of particles, likewise.
    """

    log_marginal: Tensor
    monte_carlo_error: Tensor
    ess: Tensor


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
        chunk_size: number of particles in memory at once, each with all of its local ones; None for all; the
            last chunk may be smaller.
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
        chunk_size: int | None = 100,
        plates: str | Iterable[str] | None = None,
        jackknife: bool = False,
        check_support: bool = True,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        particle_group: ProcessGroup | DeviceMesh | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.guide = guide
        self.num_particles = positive_integer("num_particles", num_particles)
        chunk_size = self.num_particles if chunk_size is None else positive_integer("chunk_size", chunk_size)
        self.chunk_size = min(chunk_size, self.num_particles)
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
        self.progress = progress
        self._runner = Runner(
            vectorize_particles,
            max_plate_nesting,
            check=partial(_check, local=tuple(self.local)),
            look=partial(check_guide, strict=True),
            warn=self._warn_once,
            local=self.local,
        )
        self._warned: set[str] = set()
        self._ranks = None
        if particle_group is not None:
            self._ranks = ParticleRanks(particle_group, self.num_particles, self.chunk_size)

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
                kept = self._keep(self._chunks(pair, bar, minibatch))
            else:
                kept, minibatch = self._ranks.keep(repr(self), partial(self._chunks, pair, bar), self._keep)
        rerun = Rerun(
            pair,
            self._runner.prepare(pair),
            plate_nesting(kept.traces.pairs[-1].model),
            self._runner.vectorize,
            self.chunk_size,
            minibatch,
            enumerated_sites(kept.traces),
        )
        samples = ImportanceSamples(kept.latents, kept.log_p, kept.log_q, kept.particles.plates, rerun)
        if self.local:
            samples = HierarchicalSamples(
                kept.latents, kept.log_p, kept.log_q, kept.particles.plates, rerun, kept.local
            )
        warn_of_dead(samples.log_weights.amax(0), self.num_particles, kept.dead)
        return samples

    def _keep(self, drawn: Iterable[tuple[Any, Traces]]) -> Kept:
        """Particles that come in chunks, side by side."""
        chunks, latents = [], []
        dead = None
        for particles, traces in drawn:
            _refuse_values(particles)
            chunks.append(particles)
            latents.append(read_local_latents(traces) if self.local else read_latents(traces))
            dead = dead or dead_site(particles)
        tops: list[Particles] = [chunk.top for chunk in chunks] if self.local else chunks
        log_p, log_q = (torch.cat([getattr(top, name) for top in tops]) for name in ("log_p", "log_q"))
        local = join_local(chunks) if self.local else {}
        return Kept(join(latents, len(log_p)), log_p, log_q, local, traces, particles, dead)

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
            for particles, _ in self._chunks(Pair(self.model, self.guide, args, kwargs), bar):
                yield particles

    def _stream(
        self, pair: Pair, bar: tqdm, running: RunningLogMean, bounds: RunningBound | None = None
    ) -> Tensor:
        """The log evidence of the cells, and on the way whatever else is to be added up."""
        if self._ranks is None:
            found = self._add_up(self._chunks(pair, bar), running, bounds)
        else:
            draw = partial(self._chunks, pair, bar)
            found = self._ranks.add_up(repr(self), draw, self._add_up, running, bounds, self.jackknife)
        warn_of_dead(running.value, self.num_particles, found.dead)
        value = running.value if found.log_w is None else jackknife(found.log_w)
        return value.to(found.like.dtype)

    def _add_up(
        self, drawn: Iterable[tuple[Any, Traces]], running: RunningLogMean, bounds: RunningBound | None
    ) -> Sums:
        """Add up particles that come in chunks."""
        kept = []
        dead = None
        for particles, traces in drawn:
            log_w = total_log_weights(particles)
            running.add(log_w)
            if bounds is not None:
                bounds.add(log_w)
            if self.jackknife:
                kept.append(log_w)
            dead = dead or dead_site(particles)
            del particles, traces  # or two chunks would be in memory while the next one runs
        return Sums(torch.cat(kept) if kept else None, dead, log_w)

    def _chunks(
        self,
        pair: Pair,
        bar: tqdm,
        minibatch: OneMinibatch | None = None,
        sizes: Iterable[int] | None = None,
    ) -> Iterator[tuple[Particles | TwoLevels, Traces]]:
        minibatch = minibatch or OneMinibatch()
        with torch.no_grad():
            self._runner.prepare(pair)
        is_first = True
        for size in chunk_sizes(self.num_particles, self.chunk_size) if sizes is None else sizes:
            # Never across a yield: whoever consumes this may leave it, or run under other settings.
            with torch.no_grad(), minibatch:
                traces = self._runner.run(pair, size)
                particles: Particles | TwoLevels
                if self.local:
                    particles = collect_local(traces, self._warn_once)
                else:
                    particles = collect(
                        traces, self.plates, is_linear=False, warn_once=self._warn_once, is_stratified=True
                    )
                if is_first:
                    check_proposal(particles, traces, self.check_support, self._warn_once)
                    is_first = False
            check_finite(particles)
            bar.update(size)
            yield particles, traces
            del particles, traces

    def _bar(self, batches: int | None, group: Group | None = None) -> tqdm:
        share = self.num_particles if self._ranks is None else self._ranks.share + 1
        groups = [group, None if self._ranks is None else self._ranks.group]
        show = self.progress and all(ranks is None or ranks.rank == 0 for ranks in groups)
        total = None if batches is None else batches * share
        return progress_bar(show=show, total=total, desc="particles", unit_scale=True)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    def __repr__(self) -> str:
        local = f", local={self.local}" if self.local else ""
        return f"ImportanceSampler(num_particles={self.num_particles}{local}, chunk_size={self.chunk_size})"


def _check(traces: Traces, local: tuple[str, ...]) -> None:
    """Refuse a pair before particles obscure what is wrong with it."""
    sites = read_sites(traces)
    if local:
        check_local_plates(sites, local)


def _refuse_values(particles: Particles | TwoLevels) -> None:
    """Refuse particles that stand for all values of a site, and so are no draws of the latents."""
    names = ", ".join(dict.fromkeys(repr(site.name) for site in particles.enumerated))
    if names:
        raise NotImplementedError(
            f"Site(s) {names} are enumerated in the guide, so a particle holds all of their values, and "
            "there are no draws to keep. log_marginal sums over the values; for draws sample them in the "
            "guide (without infer={'enumerate': 'parallel'}), or leave them out of the guide and enumerate "
            "them in the model."
        )
