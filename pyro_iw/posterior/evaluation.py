r"""What a fitted pair is like: its bound by number of particles, its rate and distortion, its active units.

References:
    | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
    | Fixing a Broken ELBO (Alemi et al., 2018), https://arxiv.org/abs/1711.00464
    | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
      https://arxiv.org/abs/1802.04537
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from torch import Tensor

from .._support.arguments import check_loader, positive_integer, read_batch
from .._support.devices import wide
from .._support.progress import progress_bar
from ..bounds import IWAE
from ..running import RunningBound, RunningLogMean
from ..tracing.messages import is_auxiliary, latent_sites, unmasked
from ..tracing.paths import class_name
from ..tracing.sites import Site
from .local_weights import total_log_weights
from .sampler import ImportanceSampler

__all__ = ["BoundCurve", "RateDistortion", "UnitActivity", "active_units", "bound_curve", "rate_distortion"]

# So many groups of particles know the spread of their bounds.
_ENOUGH_GROUPS = 8


class BoundCurve(NamedTuple):
    """The IWAE bound by its number of particles.

    Attributes:
        num_particles: the values of K.
        mean: :math:`E[L_K]` averaged over the cells, in nats, of shape ``[len(num_particles)]``.
        monte_carlo_error: standard error of each, from the finite number of particles.
    """

    num_particles: tuple[int, ...]
    mean: Tensor
    monte_carlo_error: Tensor


def bound_curve(
    sampler: ImportanceSampler, *args: Any, num_particles: Sequence[int] | None = None, **kwargs: Any
) -> BoundCurve:
    """The IWAE bound over K, all of its points from the same particles, in groups of K.

    It rises with K towards the log evidence; where it still rises at the largest K, that is no estimate of
    the log evidence yet. With ``local=`` K counts global particles, each with all of its local ones.

    Arguments:
        sampler: the sampler, whose number of particles is the largest K.
        args: positional arguments of model and guide.
        num_particles: the values of K; the powers of two up to the number of particles by default.
        kwargs: further keyword arguments of model and guide.

    Raises:
        ValueError: if there is no K, or one exceeds the sampler's number of particles.

    Example:
        >>> curve = bound_curve(ImportanceSampler(model, guide, 1024), data, num_particles=[1, 32, 1024])
        >>> bool((curve.mean.diff() > 0).all())
        True
    """
    largest = sampler.num_particles
    if num_particles is None:
        num_particles = [2**i for i in range(largest.bit_length())]
    running = {K: RunningBound(IWAE(K)) for K in num_particles}
    if not running:
        raise ValueError("num_particles names no K to evaluate the bound at.")
    if max(running) > largest:
        raise ValueError(f"The sampler draws {largest} particles, too few for K={max(running)}.")
    everything = RunningLogMean()
    for particles in sampler.particles(*args, **kwargs):
        log_weights = total_log_weights(particles)
        everything.add(log_weights)
        for point in running.values():
            point.add(log_weights)
    errors = []
    for point in running.values():
        # A few groups do not know their spread; the delta method, for as many particles as they use, stands
        # in.
        used = point.groups * point.bound.num_particles
        delta = everything.standard_error * math.sqrt(largest / used)
        error = point.standard_error if point.groups >= _ENOUGH_GROUPS else delta
        errors.append(error.square().sum().sqrt() / error.numel())
    means = torch.stack([point.value.mean() for point in running.values()])
    return BoundCurve(tuple(running), means, torch.stack(errors))


@dataclass(frozen=True, eq=False)
class RateDistortion:
    r"""The ELBO in its parts, each of shape ``[*cells]`` and in nats.

    Attributes:
        distortion: :math:`-E_q[\log p(x \mid z)]`, the reconstruction term; observed sites and factors.
        rates: :math:`E_q[\log q(z_l \mid \cdot) - \log p(z_l \mid \cdot)]` of every latent site, the layer's
            share of the KL term. A site that only the guide has (auxiliary) stands with its own name.

    Example:
        >>> parts = pyro_iw.rate_distortion(ImportanceSampler(model, guide), data)
        >>> torch.allclose(parts.elbo, -parts.rate - parts.distortion)
        True
    """

    distortion: Tensor
    rates: dict[str, Tensor]

    @property
    def rate(self) -> Tensor:
        r""":math:`E_q[\log q(z \mid x) - \log p(z)]`, the KL term, ``[*cells]``."""
        return torch.stack(list(self.rates.values())).sum(0)

    @property
    def elbo(self) -> Tensor:
        """Minus rate and distortion, ``[*cells]``."""
        return -self.rate - self.distortion


def rate_distortion(sampler: ImportanceSampler, *args: Any, **kwargs: Any) -> RateDistortion:
    """The ELBO's two terms in every cell, as means over the sampler's particles, whatever a poutine.scale
    says.

    References:
        | Fixing a Broken ELBO (Alemi et al., 2018), https://arxiv.org/abs/1711.00464

    Arguments:
        sampler: the sampler.
        args: positional arguments of model and guide.
        kwargs: keyword arguments of both.

    Raises:
        ValueError: if the sampler has local particles.

    Example:
        >>> parts = rate_distortion(ImportanceSampler(model, guide, num_particles=1000), data)
        >>> parts.rates["z"].shape, parts.distortion.shape
        (torch.Size([3]), torch.Size([3]))
    """
    if sampler.local:
        raise ValueError(
            f"rate_distortion takes the ELBO apart, which has no local particles, but the sampler has "
            f"local={sampler.local}. Pass one without local=."
        )
    distortion = torch.zeros(())
    rates: dict[str, Tensor] = {}
    for particles in sampler.particles(*args, **kwargs):
        latent: dict[str, list[Site]] = {}
        data = []
        for site in particles.sites:
            if site.role == "guide" or site.is_latent:
                latent.setdefault(site.name, []).append(site)
            else:
                data.append(site)
        distortion = distortion - wide(particles.log_prob(data)).sum(0) / sampler.num_particles
        for name, both in latent.items():
            log_q = particles.log_prob([site for site in both if site.role == "guide"])
            log_p = particles.log_prob([site for site in both if site.role == "model"])
            share = wide(log_q - log_p).sum(0) / sampler.num_particles
            rates[name] = rates.get(name, 0.0) + share
    return RateDistortion(distortion, rates)


class UnitActivity(NamedTuple):
    """Activity of a latent site's units.

    Attributes:
        num_active: number of active ones.
        variances: variance over the data of the guide's mean of each unit, of the site's event shape.
    """

    num_active: int
    variances: Tensor


def active_units(
    guide: Callable,
    batches: Iterable[Any],
    threshold: float = 0.01,
    *,
    to_args: Callable[[Any], Any] | None = None,
    sites: Sequence[str] | None = None,
    num_samples: int = 50,
    progress: bool = True,
) -> dict[str, UnitActivity]:
    r"""Latent units that the guide makes depend on the data.

    .. math:: A_u = \mathrm{Var}_x\big(E_{q(z \mid x)}[z_u]\big) > \text{threshold}

    The inner mean is that of the site's distribution. Where it depends on other latents of the guide (deeper
    layers, global latents), or is not known in closed form (flows), it is a mean over samples, and what their
    finite number adds to the variance is subtracted (an inactive unit would seem active otherwise). A global
    latent is drawn anew for every batch: where much depends on it, large batches tell the units' variance
    more exactly.

    References:
        | Importance Weighted Autoencoders (Burda et al., 2016), appendix C, https://arxiv.org/abs/1509.00519

    Arguments:
        guide: the guide; all batch dims of a site count as datapoints, without the cells that it masks.
        batches: as in :meth:`ImportanceSampler.log_marginal_dataset`.
        threshold: a unit is active above this variance.
        to_args: likewise.
        sites: the latent sites to look at; by default all that are not auxiliary.
        num_samples: number of runs of the guide on each batch, where samples are needed; >= 2.
        progress: whether to show a progress bar, if it takes more than two seconds.

    Returns:
        The activity of each site, by name.

    Raises:
        ValueError: if there is no batch or only one datapoint, a site is unknown, lies in no plate, or has no
            finite mean (a Categorical, a Cauchy).

    Example:
        >>> loader = torch.utils.data.DataLoader(data, batch_size=2)
        >>> active_units(guide, loader)["z"].num_active
        1
    """
    if positive_integer("num_samples", num_samples) < 2:
        raise ValueError("num_samples must be at least 2, for there to be a variance")
    moments: dict[str, _Activity] = {}
    check_loader(batches)
    for batch in progress_bar(batches, show=progress, desc="active units"):
        args, kwargs = read_batch(batch, to_args)
        runs = 1
        done = 0
        means: dict[str, list[Tensor]] = {}
        while done < runs:
            with torch.no_grad():
                trace = poutine.trace(guide).get_trace(*args, **kwargs)
            chosen, exact = _conditional_means(trace, sites)
            runs = 1 if exact else num_samples
            for name, (mean, shape) in chosen.items():
                moments.setdefault(name, _Activity(shape))
                means.setdefault(name, []).append(mean)
            done += 1
        for name, drawn in means.items():
            moments[name].add(torch.stack(drawn))
    if not moments:
        raise ValueError("No batch was given, or the guide has no latent site.")
    return {
        name: UnitActivity(
            int((moment.variance() > threshold).sum()), moment.variance().reshape(moment.shape)
        )
        for name, moment in moments.items()
    }


class _Activity:
    r"""Variance over datapoints of a conditional mean that is itself estimated.

    With means :math:`m_{rn}` of datapoint n in run r of its batch, the variance of their averages over R runs
    exceeds that of what they estimate by

    .. math:: \frac{1}{N - 1} \Big(\sum_n \frac{\mathrm{Var}_r[m_{rn}]}{R}
        - \frac1N \sum_b \frac{\mathrm{Var}_r[\sum_{n \in b} m_{rn}]}{R}\Big)

    in expectation. What is left without it is that of products of different runs alone, which are independent
    however much the datapoints b of one batch share of a run (a global latent of the guide).
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.count = 0
        self.mean = self.squares = self.within = self.common = torch.zeros((), dtype=torch.float64)

    def add(self, means: Tensor) -> None:
        """Add means ``[runs, datapoints, units]``."""
        means = means.cpu().double()
        runs, count = means.shape[:2]
        if not count:  # all are masked
            return
        each = means.mean(0)
        if runs > 1:
            self.within = self.within + (means.var(0) / runs).sum(0)
            self.common = self.common + means.sum(1).var(0) / runs
        total = self.count + count
        deviation = each.mean(0) - self.mean
        spread = (each - each.mean(0)).square().sum(0)
        self.squares = self.squares + spread + deviation**2 * (self.count * count / total)
        self.mean = self.mean + deviation * (count / total)
        self.count = total

    def variance(self) -> Tensor:
        if self.count < 2:
            raise ValueError("Activity is a variance over the data, which needs more than one datapoint.")
        excess = self.within - self.common / self.count
        return ((self.squares - excess) / (self.count - 1)).clamp(min=0)


def _conditional_means(
    trace: Any, sites: Sequence[str] | None
) -> tuple[dict[str, tuple[Tensor, torch.Size]], bool]:
    """Mean ``[datapoints, units]`` and event shape of each site, and whether they depend on no sample."""
    latent = latent_sites(trace)
    named = [name for name, site in latent.items() if not is_auxiliary(site)]
    unknown = sorted(set(sites or ()) - set(latent))
    if unknown:
        raise ValueError(f"sites names {unknown}, but the guide has only the latent sites {sorted(latent)}.")
    exact = len(latent) == 1
    found = {}
    for name in named if sites is None else sites:
        fn, value = latent[name]["fn"], latent[name]["value"]
        mean = _mean(fn)
        if mean is None:
            mean, exact = value, False
        if not mean.is_floating_point() or bool(mean.isnan().all()):
            raise ValueError(
                f"Site {name!r} has no mean ({type(fn).__name__}), so its units have no activity. Name the "
                "sites to look at by sites=, or use OneHotCategorical, whose mean are its probabilities."
            )
        if not fn.batch_shape:
            raise ValueError(f"Site {name!r} lies in no plate, so it does not vary over the data.")
        mean = mean.expand(fn.batch_shape + fn.event_shape).reshape(math.prod(fn.batch_shape), -1)
        kept = unmasked(name, fn.batch_shape, [latent[name]], mean.device)
        mean = mean if kept is None else mean[kept.reshape(-1)]
        bad = (~mean.isfinite()).any(1)
        if bool(bad.any()):
            raise ValueError(
                f"The mean of site {name!r} ({class_name(fn)}) is NaN or infinite at {int(bad.sum())} of "
                f"{len(bad)} datapoints, so its units have no activity. Look for a NaN in the data or the "
                "parameters; of a distribution whose tails leave it no mean, name the other sites by sites=."
            )
        found[name] = mean, fn.event_shape
    return found, exact


def _mean(fn: Any) -> Tensor | None:
    """The mean of a distribution; None where it has none in closed form."""
    try:
        return fn.mean
    except (NotImplementedError, AttributeError):
        return None
