r"""The log evidence between two bounds, on data that the model itself has made.

On data simulated from the model, its latents are an exact draw from the posterior. Chains that begin there
and go backwards to the guide bound :math:`\log p(x)` from above, chains forwards from below, both in
expectation and both by the same transitions:

.. math:: E\Big[\log \frac1S \sum_s w_s\Big] \le \log p(x) \le
    E\Big[-\log \frac1S \sum_s \frac1{w'_s}\Big].

The gap bounds how far either is off. It is that of simulated data; of real ones it tells as far as they are
alike (Wu et al., 2017, look at both).

References:
    | Sandwiching the Marginal Likelihood (Grosse et al., 2015), https://arxiv.org/abs/1511.02543
    | On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017),
      https://arxiv.org/abs/1611.04273
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import Unit
from torch import Tensor

from .._support.arguments import positive_integer, read_batch
from .._support.devices import wide
from .._support.nested import leaves, map_leaves
from .._support.random_state import fork_rng
from ..running import RunningLogMean
from ..tracing.messages import is_latent, sample_sites
from ..tracing.minibatches import OneMinibatch
from ..tracing.traces import Pair
from .annealed import AnnealedImportanceSampler
from .predictive import SampleData

__all__ = ["Sandwich", "sandwich"]


@dataclass(frozen=True, eq=False, repr=False)
class Sandwich:
    r"""Bounds of the log evidence of simulated data, from below and from above.

    .. math:: E[\text{lower}] \le \log p(x) \le E[\text{upper}]

    Attributes:
        lower: those of the forward chains, in nats, of shape ``[num_simulations, *cells]``.
        upper: those of the reversed chains, likewise.
        lower_errors: standard error of each of the former from the finite number of chains (delta method).
        upper_errors: likewise; that all reversed chains of a cell begin at one draw is not in it.
        num_chains: the number of chains for each.
        num_temperatures: the number of temperatures on their way.

    Example:
        >>> result = pyro_iw.sandwich(model, guide, data, num_temperatures=50)
        >>> result.lower.shape, torch.equal(result.gap, result.upper - result.lower)
        (torch.Size([1, 3]), True)
    """

    lower: Tensor
    upper: Tensor
    lower_errors: Tensor
    upper_errors: Tensor
    num_chains: int
    num_temperatures: int

    @property
    def gap(self) -> Tensor:
        """Upper less lower bound, ``[num_simulations, *cells]``; by chance it may be below 0."""
        return self.upper - self.lower

    @property
    def gap_errors(self) -> Tensor:
        """Standard error of each :attr:`gap` from the finite number of chains."""
        return (self.lower_errors.square() + self.upper_errors.square()).sqrt()

    @property
    def mean_gap(self) -> float:
        """Mean of the gaps over datapoints and simulations, in nats."""
        return wide(self.gap).mean().item()

    @property
    def mean_gap_error(self) -> float:
        """Standard error of :attr:`mean_gap`, from the spread of the gaps; NaN for a single one."""
        gaps = wide(self.gap).flatten()
        return gaps.std().item() / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan

    def __repr__(self) -> str:
        return (
            f"Sandwich(mean_gap={self.mean_gap:.3f}, mean_gap_error={self.mean_gap_error:.2g}, "
            f"lower={wide(self.lower).mean().item():.3f}, upper={wide(self.upper).mean().item():.3f}, "
            f"N={self.gap.numel()})"
        )


def sandwich(
    model: Callable,
    guide: Callable | None,
    *args: Any,
    num_simulations: int = 1,
    to_args: Callable[[dict[str, Tensor]], Any] | None = None,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrog: int = 5,
    schedule: str | Sequence[float] | Tensor = "sigmoidal",
    plates: str | Iterable[str] | None = None,
    vectorize_particles: bool = True,
    max_plate_nesting: float = math.inf,
    compile: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> Sandwich:
    """How far off an estimate of the log evidence can be: bounds from both sides, on simulated data.

    Data of the shapes of the given ones are drawn from the model. Forward chains run on them as in
    :class:`~pyro_iw.AnnealedImportanceSampler`, and reversed ones from the latents they were made of.

    Arguments:
        model: the model.
        guide: where the path begins; None for the model's prior.
        args: positional arguments of model and guide, the data among them.
        num_simulations: number of data sets to simulate, each a run of its own.
        to_args: makes the arguments (a tuple, a dict or the only one) of simulated values of the observed
            sites by name. None if these are arguments as they stand, or reshaped.
        num_chains: as in :class:`~pyro_iw.AnnealedImportanceSampler`, as are all that follow.
        num_temperatures: likewise.
        num_leapfrog: likewise.
        schedule: likewise.
        plates: likewise.
        vectorize_particles: likewise.
        max_plate_nesting: likewise.
        compile: likewise.
        progress: likewise.
        kwargs: keyword arguments of model and guide.

    Raises:
        ValueError: if the model has a factor or no observed site, so that it cannot be simulated; an observed
            site is not made of the arguments in a way that is known; the guide's own draws cannot be told
            from the model's latents; or as :meth:`~pyro_iw.AnnealedImportanceSampler.log_marginal`; naming
            the site.

    Example:
        >>> result = sandwich(model, guide, data, num_temperatures=100)
        >>> result.gap.shape, bool(result.mean_gap < 0.2)
        (torch.Size([1, 3]), True)
    """
    sampler = AnnealedImportanceSampler(
        model,
        guide,
        num_chains,
        num_temperatures,
        num_leapfrog=num_leapfrog,
        schedule=schedule,
        plates=plates,
        vectorize_particles=vectorize_particles,
        max_plate_nesting=max_plate_nesting,
        compile=compile,
        progress=progress,
    )
    parts = []
    with sampler.bar(positive_integer("num_simulations", num_simulations), both_ways=True) as bar:
        for _ in range(num_simulations):
            pair, latents, minibatch = _simulate(Pair(model, sampler.guide, args, kwargs), to_args)
            start = sampler.prepare(pair, minibatch)
            if start.tempered:
                raise ValueError(
                    f"Site(s) {', '.join(map(repr, start.tempered))} have a poutine.scale inside the "
                    "importance weights, so what would be bounded is not the evidence of the model that data "
                    "are simulated from. Remove the scale."
                )
            exact = start.path.coordinates_of(latents)
            annealing = sampler.tune(start, bar)
            forwards = sampler.forwards(start, annealing)
            backwards = annealing.backwards(start.path.at(exact))
            lower, upper = RunningLogMean(), RunningLogMean()
            lower.add(forwards.log_w)
            upper.add(-backwards.log_w)
            parts.append((lower.value, -upper.value, lower.standard_error, upper.standard_error))
    dtype = start.log_weights.dtype
    bounds = [torch.stack(column).to(dtype) for column in zip(*parts, strict=True)]
    return Sandwich(bounds[0], bounds[1], bounds[2], bounds[3], num_chains, num_temperatures)


def _simulate(
    pair: Pair, to_args: Callable[[dict[str, Tensor]], Any] | None
) -> tuple[Pair, dict[str, Any], OneMinibatch]:
    """The pair on simulated data, the messages of the latents these were made of, and the minibatch."""
    minibatch = OneMinibatch()
    with torch.no_grad(), minibatch:
        trace = poutine.trace(SampleData()(pair.model)).get_trace(*pair.args, **pair.kwargs)
    simulated, latents = {}, {}
    sites: dict[str, Any] = sample_sites(trace)
    for name, site in sites.items():
        if site["infer"].get("was_observed"):
            simulated[name] = site
        elif isinstance(site["fn"], Unit):
            raise ValueError(
                f"pyro.factor({name!r}, ...) is part of the model's density, but nothing is drawn there, so "
                "data cannot be simulated from the model. Write it as pyro.sample(..., obs=...)."
            )
        elif is_latent(site) and site["infer"].get("enumerate") != "parallel":
            latents[name] = site
    if not simulated:
        raise ValueError("The model has no observed site, so there are no data to simulate.")
    values = {name: site["value"] for name, site in simulated.items()}
    if to_args is not None:
        args, kwargs = read_batch(to_args(values))
    else:
        args, kwargs = _replaced(pair, simulated)
    pair = pair._replace(args=args, kwargs=kwargs)
    _check_arguments(pair, values, minibatch)
    return pair, latents, minibatch


def _replaced(pair: Pair, simulated: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments with simulated values in place of those that were observed."""
    found = set()

    def change(argument: Any) -> Any:
        for name, site in simulated.items():
            if isinstance(argument, Tensor) and _is_same_memory(argument, site["infer"]["obs"]):
                found.add(name)
                return site["value"].reshape(argument.shape).to(argument.dtype)
        return argument

    args, kwargs = map_leaves(change, (pair.args, pair.kwargs))
    missing = sorted(simulated.keys() - found)
    if missing:
        raise ValueError(
            f"The data of observed site(s) {', '.join(map(repr, missing))} are none of the arguments of the "
            f"model as they stand ({sum(isinstance(a, Tensor) for a in leaves((args, kwargs)))} tensors), so "
            "simulated ones cannot be put in their place. Pass to_args=, a function that makes the arguments "
            "of a dict of simulated values by site, and make the data arguments if they are none."
        )
    return args, kwargs


def _is_same_memory(argument: Tensor, observed: Any) -> bool:
    """Whether an observation is an argument, or a reshaped one."""
    if not isinstance(observed, Tensor) or argument.numel() != observed.numel():
        return False
    one, other = argument.detach(), observed.detach()
    same_order = one.shape == other.shape or (one.is_contiguous() and other.is_contiguous())
    return one.data_ptr() == other.data_ptr() and same_order


def _check_arguments(pair: Pair, values: Mapping[str, Tensor], minibatch: OneMinibatch) -> None:
    """Refuse arguments from which the model does not observe what was simulated."""
    with torch.no_grad(), fork_rng(), minibatch:
        trace = poutine.trace(pair.model).get_trace(*pair.args, **pair.kwargs)
    sites: dict[str, Any] = dict(trace.nodes)
    for name, value in values.items():
        is_there = name in sites and sites[name]["is_observed"]
        observed = sites[name]["value"] if is_there else torch.full_like(value, math.nan)
        same = observed.shape == value.shape
        if not same or not torch.allclose(observed.to(value), value, rtol=1e-4):
            raise ValueError(
                f"Site {name!r} does not observe what was simulated for it when the model runs on the "
                "arguments made of that. Let to_args= give the arguments that hold these values."
            )
