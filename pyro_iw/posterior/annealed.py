r"""Annealed importance sampling: the log evidence where the guide alone would miss it by nats.

S chains go from the guide (or the prior) to the posterior along the geometric path :math:`q^{1-\beta}
p^\beta` by Hamiltonian Monte Carlo in unconstrained coordinates, and gather weights on the way, see
:mod:`~pyro_iw.posterior.annealing`. The estimate

.. math:: \log \hat p(x) = \log \frac1S \sum_{s=1}^S w_s

is unbiased in :math:`\hat p(x)` for any number T of temperatures, as plain importance sampling is (the case T
= 1), but its shortfall decreases with T however poor the guide is, as long as its chains find the mass.

References:
    | Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
    | On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017),
      https://arxiv.org/abs/1611.04273
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from tqdm import tqdm

from .._support.arguments import as_plate_names, check_loader, positive_integer, read_batch
from .._support.devices import wide
from .._support.progress import length_of, progress_bar
from .._support.random_state import RandomState
from .._support.warn import warn
from ..compiling.evaluating import EvaluationCompiler
from ..ranks.group import Group
from ..running import RunningLogMean
from ..tracing.cells import weighted_plates
from ..tracing.latents import Latent, enumerated_sites, read_latents
from ..tracing.minibatches import OneMinibatch
from ..tracing.particles import Particles, collect
from ..tracing.runner import Runner
from ..tracing.sites import read_sites
from ..tracing.traces import Pair, Traces, plate_nesting
from .annealing import Annealed, Annealing, temperatures
from .dead import check_finite, dead_site, warn_of_dead
from .evidence import LogMarginal
from .hmc import Point, Tuning
from .movable import Prior, check_pair
from .over_data import evaluate_over_ranks
from .predictive import Rerun
from .progress_file import ProgressFile
from .proposal import check_proposal
from .samples import ImportanceSamples
from .unconstrained import PairPath

if TYPE_CHECKING:  # a PyTorch may be built without
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["AnnealedImportanceSampler", "AnnealedSamples"]

# As many draws of the guide know the spread of its coordinates well enough.
_DRAWS_FOR_SCALES = 32
# Chains that are accepted less often than this hardly move; of fewer moves than that it cannot be told.
_LOW_ACCEPTANCE, _ENOUGH_MOVES = 0.2, 100


class AnnealedSamples(ImportanceSamples):
    r"""The ends of S annealed chains and their weights.

    All that :class:`~pyro_iw.ImportanceSamples` gives: ``log_weights`` are the chains', whose log mean is
    ``log_marginal``; ``log_q`` is :math:`\log p(x, z_s) - \log w_s`, the density that the ends effectively
    come from; ``posterior`` resamples the ends by weight.

    Attributes:
        acceptance: mean probability with which a move was accepted, of shape ``[*cells]``.

    Example:
        >>> samples = AnnealedImportanceSampler(model, guide, num_temperatures=20)(data)
        >>> samples.acceptance.shape, samples.log_weights.shape
        (torch.Size([3]), torch.Size([16, 3]))
    """

    def __init__(
        self,
        latents: dict[str, Latent],
        log_p: Tensor,
        log_q: Tensor,
        frames: tuple[CondIndepStackFrame, ...],
        rerun: Rerun,
        acceptance: Tensor,
    ) -> None:
        super().__init__(latents, log_p, log_q, frames, rerun)
        self.acceptance = acceptance

    def __repr__(self) -> str:
        return "Annealed" + super().__repr__().removeprefix("Importance")


class AnnealedImportanceSampler:
    r"""Estimates the log evidence by annealed importance sampling from the guide to the posterior.

    All latents have to be continuous, but for those that the model sums out. They are moved in unconstrained
    coordinates, by :func:`torch.distributions.biject_to`; every cell of the kept plates (for a VAE: every
    datapoint) has weights, acceptances and step sizes of its own, and all of them move at once.

    Before the chains that count, others walk along the path at a coarser schedule to find step sizes and
    scales, and are thrown away: :math:`E[\hat p(x)] = p(x)` holds exactly.

    Arguments:
        model: the model (a callable with Pyro primitives).
        guide: where the path begins; None for the model's prior.
        num_chains: number S of chains a cell; an integer >= 1.
        num_temperatures: number T of steps from the guide to the posterior, with one transition each.
        num_leapfrog: number of gradients a transition takes.
        schedule: ``"sigmoidal"``, ``"linear"``, or T + 1 inverse temperatures from 0 to 1, see
            :func:`~pyro_iw.posterior.annealing.temperatures`.
        target_acceptance: acceptance probability that the step sizes aim at.
        num_adaptation: number of temperatures at which step sizes are looked for; None for a fifth of
            ``num_temperatures``, but 50 at least.
        plates: name or names of the plates whose cells have a weight each; ``()`` for one joint weight; None
            for the plates common to all sample sites.
        check_support: whether a guide that never proposes part of what the prior allows is refused.
        vectorize_particles: run all chains in one pass under a plate on the leftmost batch dim, which model
            and guide must broadcast over; otherwise one chain at a time.
        max_plate_nesting: number of batch dims that the plates of the pair take; found by running the pair
            once if infinite.
        compile: compile the densities and gradients that a chain moves by, see
            :mod:`~pyro_iw.compiling.evaluating`. The guide's networks of the data then run once for all of
            its steps. The second step takes some seconds to compile; what cannot be compiled runs eagerly,
            after a warning.
        progress: whether to show a progress bar, if it takes more than two seconds.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> sampler = AnnealedImportanceSampler(model, guide, num_temperatures=50)
        >>> samples = sampler(data)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(data)
        >>> bool(((samples.log_marginal - exact).abs() < 4 * samples.monte_carlo_error).all())
        True
        >>> samples.posterior(10)["z"].shape
        torch.Size([10, 3])
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable | None = None,
        num_chains: int = 16,
        num_temperatures: int = 1000,
        *,
        num_leapfrog: int = 5,
        schedule: str | Sequence[float] | Tensor = "sigmoidal",
        target_acceptance: float = 0.65,
        num_adaptation: int | None = None,
        plates: str | Iterable[str] | None = None,
        check_support: bool = True,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        compile: bool = False,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.guide = Prior(model) if guide is None else guide
        self.num_chains = positive_integer("num_chains", num_chains)
        self.num_temperatures = positive_integer("num_temperatures", num_temperatures)
        self.num_leapfrog = positive_integer("num_leapfrog", num_leapfrog)
        self.schedule = schedule
        self._betas = temperatures(self.num_temperatures, schedule)
        if not 0 < target_acceptance < 1:
            raise ValueError(f"target_acceptance must be between 0 and 1, got {target_acceptance!r}")
        self.target_acceptance = target_acceptance
        if num_adaptation is None:
            num_adaptation = max(self.num_temperatures // 5, 50)
        self.num_adaptation = positive_integer("num_adaptation", num_adaptation)
        self.plates = as_plate_names(plates)
        self.check_support = check_support
        self.compile = compile
        self.progress = progress
        self._compiler = EvaluationCompiler("leapfrog step")
        self._runner = Runner(
            vectorize_particles,
            max_plate_nesting,
            check=read_sites,
            look=check_pair,
            warn=self._warn_once,
            kept=partial(weighted_plates, plates=self.plates),
        )
        self._warned: set[str] = set()

    def log_marginal(self, *args: Any, **kwargs: Any) -> Tensor:
        """The log evidence of every cell, of shape ``[*cells]``, in nats; a scalar where there is one weight.

        Its Monte Carlo error is that of what calling the sampler gives, which also has the chains' ends.

        Arguments:
            args: positional arguments of model and guide.
            kwargs: keyword arguments of both.

        Raises:
            ValueError: if a latent is discrete and not summed out, or a point estimate, the density of the
                guide cannot be evaluated at given values, and as
                :meth:`ImportanceSampler.log_marginal`; naming the site.
        """
        return self(*args, **kwargs).log_marginal

    def __call__(self, *args: Any, **kwargs: Any) -> AnnealedSamples:
        """Run S chains and keep their ends, with their weights.

        Arguments and errors are those of :meth:`log_marginal`.
        """
        with self.bar(1) as bar:
            start = self.prepare(Pair(self.model, self.guide, args, kwargs))
            annealing = self.tune(start, bar)
            return self._samples(start, self.forwards(start, annealing))

    def log_marginal_dataset(
        self,
        loader: Iterable[Any],
        to_args: Callable[[Any], Any] | None = None,
        *,
        resume: str | Path | None = None,
        data_group: ProcessGroup | DeviceMesh | None = None,
        indices: Sequence[int] | Tensor | None = None,
    ) -> LogMarginal:
        """The log evidence of every datapoint of a data set, batch by batch.

        Arguments:
            loader: gives batches, as in :meth:`ImportanceSampler.log_marginal_dataset`; all of them at once
                are in memory, times the number of chains.
            to_args: likewise.
            resume: a file that keeps the results of finished batches. If it is there, the batches that it
                knows are not run again, and the result is what it would have been without the interruption.
                Of each the first draws are made again and compared, so that other data, parameters or
                numbers of chains do not go unnoticed. With ``data_group`` every rank has such a file of its
                own, with its rank and the number of ranks in the name.
            data_group: ranks of which each has a loader with a part of the data set, as in
                :meth:`ImportanceSampler.log_marginal_dataset`.
            indices: likewise.

        Raises:
            ValueError: if there is no batch, the pair does not have one weight for each index of exactly one
                plate, or the file is of another run; and as :meth:`log_marginal`.

        Example:
            >>> loader = torch.utils.data.DataLoader(data, batch_size=2)
            >>> sampler = AnnealedImportanceSampler(model, guide, num_temperatures=50)
            >>> result = sampler.log_marginal_dataset(loader)
            >>> abs(result.mean - dist.Normal(0.0, 2**0.5).log_prob(data).mean().item()) < 0.1
            True
        """
        check_loader(loader)
        evaluate = partial(self._evaluate, to_args=to_args, resume=resume)
        return evaluate_over_ranks(evaluate, loader, data_group, indices)

    def _evaluate(
        self,
        loader: Iterable[Any],
        group: Group | None,
        to_args: Callable[[Any], Any] | None,
        resume: str | Path | None,
    ) -> LogMarginal | None:
        """The log evidence of what a loader gives; None if that is nothing."""
        if resume is not None and group is not None:
            path = Path(resume)
            resume = path.with_name(f"{path.stem}.rank{group.rank}of{group.size}{path.suffix}")
        file = ProgressFile(resume, self._in_words())
        with ExitStack() as stack:
            bar = stack.enter_context(self.bar(length_of(loader), group=group))
            stack.callback(RandomState.now().restore)
            for index, batch in enumerate(loader):
                args, kwargs = read_batch(batch, to_args)
                # Each batch has a stream of its own, whether those before it are run or known.
                torch.manual_seed(file.seed + index)
                start = self.prepare(Pair(self.model, self.guide, args, kwargs))
                if start.log_weights.dim() != 2:
                    raise ValueError(
                        "A data set is evaluated datapoint by datapoint, which needs one importance weight "
                        "for each index of one plate, but a batch gives weights of shape "
                        f"{tuple(start.log_weights.shape[1:])}. Put all latents into one plate over the "
                        "data, name it by plates=, or, for a joint model, call log_marginal on all of it."
                    )
                if file.knows(index, start.log_weights):
                    bar.update(self._num_transitions)
                    continue
                annealed = self.forwards(start, self.tune(start, bar))
                running = RunningLogMean()
                running.add(annealed.log_w)
                columns = [running.value, running.standard_error, running.ess]
                file.add(start.log_weights, [column.to(start.log_weights.dtype) for column in columns])
        if not file.parts:
            return None
        values, errors, ess = (torch.cat(column) for column in zip(*file.parts, strict=True))
        return LogMarginal(values, errors, ess, self.num_chains, estimator=self._in_words())

    # ------------------------------------------------------------------------------------------------
    # The steps of a run
    # ------------------------------------------------------------------------------------------------

    def prepare(self, pair: Pair, minibatch: OneMinibatch | None = None) -> Start:
        """Draw from the guide once, check the pair, and get to know its shapes.

        Arguments:
            pair: the pair and its arguments.
            minibatch: the subsample, where it is known.
        """
        minibatch = minibatch or OneMinibatch()
        with torch.no_grad():
            self._runner.prepare(pair)
        traces, particles = self._draw(pair, minibatch)
        with torch.no_grad():
            check_proposal(particles, traces, self.check_support, self._warn_once)
            compiler = self._compiler if self.compile else None
            path = PairPath(pair, traces, particles, minibatch, self.plates, self._warn_once, compiler)
            coordinates = path.coordinates(traces)
        _check_same_density(path.at(coordinates), particles)
        scaled = [site for site in particles.sites if isinstance(site.scale, Tensor) or site.scale != 1]
        tempered = list(dict.fromkeys(site.name for site in scaled))
        dead = dead_site(particles) if check_finite(particles) else None
        return Start(pair, path, minibatch, coordinates, particles.log_weights, dead, tempered)

    def tune(self, start: Start, bar: tqdm) -> Annealing:
        """Find the settings of the transitions."""
        draws = [start.coordinates]
        while len(draws) * self.num_chains < _DRAWS_FOR_SCALES:
            draws.append(self._draw_coordinates(start))
        scales = []
        for parts in zip(*draws, strict=True):
            scale = torch.cat(parts).std(0, keepdim=True)
            scales.append(torch.where(scale.isfinite() & (scale > 0), scale, 1.0))
        tuning = Tuning(start.path, scales, self.num_leapfrog, self.target_acceptance)
        betas = self._betas
        if isinstance(self.schedule, str):
            betas = temperatures(self.num_adaptation, self.schedule)
        else:
            # Evenly among those that the user chose.
            last = self.num_temperatures
            chosen = [round(i * last / self.num_adaptation) for i in range(1, self.num_adaptation + 1)]
            betas = [0.0, *(betas[max(index, 1)] for index in chosen)]
        tuning.run(start.path.at(start.coordinates), betas[1:], bar.update)
        return Annealing(start.path, tuning, self._betas, self.num_leapfrog, bar.update)

    def forwards(self, start: Start, annealing: Annealing) -> Annealed:
        """Run the chains that count, from draws of their own."""
        annealed = annealing.forwards(start.path.at(self._draw_coordinates(start)))
        warn_of_dead(annealed.log_w.amax(0), self.num_chains, start.dead)
        self._warn_of_rejection(annealed.acceptance)
        return annealed

    def _draw(self, pair: Pair, minibatch: OneMinibatch) -> tuple[Traces, Particles]:
        with torch.no_grad(), minibatch:
            traces = self._runner.run(pair, self.num_chains)
            particles = collect(traces, self.plates, is_linear=False, warn_once=self._warn_once)
        check_finite(particles)
        return traces, particles

    def _draw_coordinates(self, start: Start) -> list[Tensor]:
        traces, _ = self._draw(start.pair, start.minibatch)
        return start.path.coordinates(traces)

    def _samples(self, start: Start, annealed: Annealed) -> AnnealedSamples:
        with torch.no_grad():
            particles, traces, _ = start.path.run(annealed.point.coordinates)
        alive = annealed.log_w > -math.inf
        log_p = particles.log_p.masked_fill(~alive, -math.inf)
        log_q = (wide(particles.log_p) - annealed.log_w).to(log_p.dtype).masked_fill(~alive, 0.0)
        rerun = Rerun(
            start.pair,
            self._runner.prepare(start.pair),
            plate_nesting(traces.pairs[-1].model),
            self._runner.vectorize,
            self.num_chains,
            start.minibatch,
            enumerated_sites(traces),
        )
        acceptance = annealed.acceptance.to(log_p.dtype)
        return AnnealedSamples(read_latents(traces), log_p, log_q, particles.plates, rerun, acceptance)

    def _warn_of_rejection(self, acceptance: Tensor) -> None:
        low = acceptance < _LOW_ACCEPTANCE
        if self.num_chains * self.num_temperatures >= _ENOUGH_MOVES and bool(low.any()):
            warn(
                f"In {int(low.sum())} of {low.numel()} cell(s) fewer than {_LOW_ACCEPTANCE:.0%} of the moves "
                f"were accepted (least {acceptance.min().item():.2g}), so the chains hardly leave the "
                "guide's draws, and the estimate is little better than ImportanceSampler's. Give the step "
                f"sizes more time to settle (num_adaptation={2 * self.num_adaptation}), or the path more "
                "temperatures.",
                RuntimeWarning,
            )

    @property
    def _num_transitions(self) -> int:
        return Tuning.FIRST + self.num_adaptation + self.num_temperatures

    def bar(self, runs: int | None, both_ways: bool = False, group: Group | None = None) -> tqdm:
        """A progress bar over the transitions of that many runs."""
        each = self._num_transitions + both_ways * self.num_temperatures
        total = None if runs is None else runs * each
        show = self.progress and (group is None or group.rank == 0)
        return progress_bar(show=show, total=total, desc="transitions", unit_scale=True)

    def _in_words(self) -> str:
        """All that a result depends on but for the pair and the data."""
        betas = zlib.crc32(repr(self._betas).encode())
        return (
            f"{self!r} (num_adaptation={self.num_adaptation}, target_acceptance={self.target_acceptance}, "
            f"plates={self.plates}, temperatures {betas:08x})"
        )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    @property
    def compile_seconds(self) -> dict[str, float]:
        """How long each compilation took, by what was compiled."""
        return self._compiler.seconds

    def __repr__(self) -> str:
        schedule = self.schedule if isinstance(self.schedule, str) else "given"
        return (
            f"AnnealedImportanceSampler(num_chains={self.num_chains}, "
            f"num_temperatures={self.num_temperatures}, num_leapfrog={self.num_leapfrog}, "
            f"schedule={schedule!r})"
        )


class Start(NamedTuple):
    """A pair that is ready for chains.

    Attributes:
        pair: the pair and its arguments.
        path: its densities.
        minibatch: the subsample that all chains see.
        coordinates: S draws of the guide.
        log_weights: their log-weights, of shape ``[S, *cells]``.
        dead: the first site at which one of them has zero density.
        tempered: sites with a scale inside the weights.
    """

    pair: Pair
    path: PairPath
    minibatch: OneMinibatch
    coordinates: list[Tensor]
    log_weights: Tensor
    dead: str | None
    tempered: list[str]


def _check_same_density(point: Point, particles: Particles) -> None:
    """Refuse a pair that is another one when it is run again on its own draws."""
    one, other = point.log_w, particles.log_weights
    finite = one.isfinite() & other.isfinite()
    moved = finite & ~torch.isclose(one, other, rtol=1e-2, atol=1e-2)
    # A few draws may lie where a bijection saturates.
    if bool(wide(moved).mean() > 0.1):
        worst = (one - other).abs().masked_fill(~moved, 0.0).max().item()
        raise ValueError(
            f"The log-weights of {int(moved.sum())} of {moved.numel()} draws change (by up to {worst:.3g}) "
            "when model and guide are run again on them, so they depend on random numbers that are no sample "
            "sites. Put random layers (dropout) in eval mode, and draw all random numbers by pyro.sample."
        )
