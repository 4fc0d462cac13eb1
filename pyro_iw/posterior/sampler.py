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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .._support.arguments import as_plate_names, check_loader, positive_integer, read_batch
from .._support.progress import length_of, progress_bar
from .._support.warn import warn
from ..bounds import Bound
from ..running import RunningBound, RunningGap, RunningLogMean, jackknife
from ..tracing.cells import weighted_plates
from ..tracing.counterparts import check_guide
from ..tracing.latents import Latent, enumerated_sites, join, read_latents
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
from .predictive import Rerun
from .proposal import check_proposal
from .samples import ImportanceSamples

__all__ = ["Evidence", "ImportanceSampler", "LogMarginal"]

_NO_BOUND = "minus_kl compares with a bound: pass bound= to log_marginal_dataset."


class Evidence(NamedTuple):
    """The log evidence of every cell, and how well it is known.

    Attributes:
        log_marginal: :math:`\\log \\hat p(x)` in nats, of shape ``[*cells]``.
        monte_carlo_error: its standard error from the finite number of particles (delta method), likewise.
        ess: effective number of particles, likewise.

    Example:
        >>> evidence = ImportanceSampler(model, guide).evidence(data)
        >>> evidence.log_marginal.shape, evidence.ess.shape
        (torch.Size([3]), torch.Size([3]))
    """

    log_marginal: Tensor
    monte_carlo_error: Tensor
    ess: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class LogMarginal:
    """The log evidence of every datapoint of a data set.

    Attributes:
        values: :math:`\\log \\hat p(x_n)` in nats, of shape ``[N]``.
        monte_carlo_errors: standard error of each from the finite number of particles (delta method),
            ``[N]``. It says nothing of mass that no particle has reached, and with ``jackknife`` it is that
            of the values before their correction, whose error is larger.
        ess: effective number of particles of each, ``[N]``.
        num_particles: number S of particles.
        bounds: another bound on the same particles, where it was asked for, of shape ``[N]``.
        minus_kl_errors: standard error of each difference ``bounds - values``, whose two sides vary together,
            from the finite number of particles, ``[N]``. NaN where these make fewer than 3 groups of the
            bound (0 for IWAE of all of them). With ``jackknife`` it is that of the difference before the
            correction.

    Example:
        >>> result = ImportanceSampler(model, guide).log_marginal_dataset([data[:2], data[2:]])
        >>> result.values.shape
        torch.Size([3])
    """

    values: Tensor
    monte_carlo_errors: Tensor
    ess: Tensor
    num_particles: int
    bounds: Tensor | None = None
    minus_kl_errors: Tensor | None = None

    @property
    def mean(self) -> float:
        """Mean over the datapoints, in nats; its negative is the held-out NLL."""
        return self.values.double().mean().item()

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of :attr:`mean` for these very datapoints, from the finite number of particles."""
        return self.monte_carlo_errors.double().square().sum().sqrt().item() / len(self.values)

    @property
    def sampling_error(self) -> float:
        """Standard error of :attr:`mean` as an estimate for the population; NaN for a single datapoint."""
        if len(self.values) == 1:
            return math.nan
        return self.values.double().std().item() / math.sqrt(len(self.values))

    @property
    def minus_kl(self) -> float:
        r"""Mean of :attr:`bounds` less :attr:`values`, in nats: how far the guide is from the posterior.

        For the ELBO this is :math:`-\mathrm{KL}(q \,\|\, p)` up to the bias of the values; for IWAE-64 the
        column "-KL" of Rainforth et al. (2018), the divergence of the guide that IWAE-64 implies. It is -inf
        where a bound is.

        Raises:
            ValueError: if no bound was asked for.
        """
        if self.bounds is None:
            raise ValueError(_NO_BOUND)
        # Both are -inf where no particle has positive density.
        gaps = (self.bounds.double() - self.values.double()).masked_fill(self.bounds.isneginf(), -math.inf)
        return gaps.mean().item()

    @property
    def minus_kl_error(self) -> float:
        """Standard error of :attr:`minus_kl` for these very datapoints, from the finite number of particles.

        Raises:
            ValueError: if no bound was asked for.
        """
        if self.minus_kl_errors is None:
            raise ValueError(_NO_BOUND)
        return self.minus_kl_errors.double().square().sum().sqrt().item() / len(self.values)

    def __repr__(self) -> str:
        return (
            f"LogMarginal(mean={self.mean:.4f}, monte_carlo_error={self.monte_carlo_error:.2g}, "
            f"N={len(self.values)}, num_particles={self.num_particles})"
        )


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
            kept=partial(weighted_plates, plates=self.plates),
        )
        self._warned: set[str] = set()

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
    ) -> LogMarginal:
        """The log evidence of every datapoint of a data set.

        Arguments:
            loader: gives batches, as a :class:`~torch.utils.data.DataLoader` does: the positional arguments
                of model and guide in a tuple or list, or their keyword arguments in a dict, or the only
                argument. The last batch may be smaller.
            to_args: turns what the loader gives into one of these, where a batch holds more than the model
                takes, or has to move to another device.
            bound: a bound to evaluate on the same particles, in groups of its M K, for ``minus_kl``.

        Raises:
            ValueError: if there is no batch, the bound takes more particles than there are, or the pair does
                not have one weight for each index of exactly one plate; and as :meth:`log_marginal`.

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
        parts: list[list[Tensor]] = []
        check_loader(loader)
        with self._bar(length_of(loader)) as bar:
            for batch in loader:
                args, kwargs = read_batch(batch, to_args)
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
            raise ValueError("The loader gave no batch, so there is nothing to evaluate.")
        values, errors, ess, *bounds_values = (torch.cat(column) for column in zip(*parts, strict=True))
        return LogMarginal(values, errors, ess, self.num_particles, *bounds_values)

    def __call__(self, *args: Any, **kwargs: Any) -> ImportanceSamples:
        """Draw S particles and keep them, with their densities.

        Arguments and errors are those of :meth:`log_marginal`.
        """
        pair = Pair(self.model, self.guide, args, kwargs)
        minibatch = OneMinibatch()
        chunks: list[Any] = []
        latents: list[dict[str, Latent]] = []
        dead = None
        with self._bar(1) as bar:
            for particles, traces in self._chunks(pair, bar, minibatch):
                _refuse_values(particles)
                chunks.append(particles)
                latents.append(read_local_latents(traces) if self.local else read_latents(traces))
                dead = dead or dead_site(particles)
        rerun = Rerun(
            pair,
            self._runner.prepare(pair),
            plate_nesting(traces.pairs[-1].model),
            self._runner.vectorize,
            self.chunk_size,
            minibatch,
            enumerated_sites(traces),
        )
        tops: list[Particles] = [chunk.top for chunk in chunks] if self.local else chunks
        joined = join(latents, self.num_particles)
        log_p, log_q = (torch.cat([getattr(top, name) for top in tops]) for name in ("log_p", "log_q"))
        samples = ImportanceSamples(joined, log_p, log_q, particles.plates, rerun)
        if self.local:
            local = join_local(chunks)
            samples = HierarchicalSamples(joined, log_p, log_q, particles.plates, rerun, local)
        warn_of_dead(samples.log_weights.amax(0), self.num_particles, dead)
        return samples

    def particles(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The particles chunk by chunk, for an estimate of your own in the memory of one chunk:
        :class:`Particles`, with local ones :class:`TwoLevels`.

        Arguments and errors are those of :meth:`log_marginal`.
        """
        with self._bar(1) as bar:
            for particles, _ in self._chunks(Pair(self.model, self.guide, args, kwargs), bar):
                yield particles

    def _stream(
        self, pair: Pair, bar: tqdm, running: RunningLogMean, bounds: RunningBound | None = None
    ) -> Tensor:
        """The log evidence of the cells, and on the way whatever else is to be added up."""
        kept = []
        dead = None
        for particles, traces in self._chunks(pair, bar):
            log_w = total_log_weights(particles)
            running.add(log_w)
            if bounds is not None:
                bounds.add(log_w)
            if self.jackknife:
                kept.append(log_w)
            dead = dead or dead_site(particles)
            del particles, traces  # or two chunks would be in memory while the next one runs
        warn_of_dead(running.value, self.num_particles, dead)
        value = jackknife(torch.cat(kept)) if self.jackknife else running.value
        return value.to(log_w.dtype)

    def _chunks(
        self, pair: Pair, bar: tqdm, minibatch: OneMinibatch | None = None
    ) -> Iterator[tuple[Particles | TwoLevels, Traces]]:
        minibatch = minibatch or OneMinibatch()
        with torch.no_grad():
            self._runner.prepare(pair)
        left = self.num_particles
        while left:
            size = min(self.chunk_size, left)
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
                if left == self.num_particles:
                    check_proposal(particles, traces, self.check_support, self._warn_once)
            check_finite(particles)
            bar.update(size)
            left -= size
            yield particles, traces
            del particles, traces

    def _bar(self, batches: int | None) -> tqdm:
        total = None if batches is None else batches * self.num_particles
        return progress_bar(show=self.progress, total=total, desc="particles", unit_scale=True)

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
