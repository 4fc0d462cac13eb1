"""What runs of a pair are compared by: their densities, read aside, and how much these may differ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from .._support.devices import autocast_dtype, wide
from .guide_values import is_enumerated_in_guide
from .messages import base_of, latent_sites
from .sites import Site, read_sites
from .traces import PairTraces, Traces

__all__ = [
    "FAILURES",
    "ROUNDING",
    "Difference",
    "accuracy",
    "beyond_noise",
    "by_name",
    "copy_of",
    "difference_of",
    "given_latents",
    "largest",
    "read_aside",
    "scored",
]

#: Relative accuracy that log densities are expected to have, whatever the order of operations.
_ACCURACY = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
#: How much larger than what the particle differs by from itself a difference has to be.
CLEARLY = 100.0
#: Runs of the single particle for that, until one differs: a coin shows one side alone in 1e-6 of cases.
RUNS = 20
#: Latent values are moved by at most this much, relative to their size.
ROUNDING = 5e-7
#: What cannot be run or read by itself says nothing here; what is wrong with it is said elsewhere, by name.
FAILURES = (ValueError, RuntimeError, IndexError, TypeError, AssertionError, KeyError, AttributeError)


class Difference(NamedTuple):
    """Where two log densities of a site differ most."""

    size: float
    together: float
    alone: float


def read_aside(traces: Traces) -> list[Site] | None:
    """The sites with their log densities; None if they are refused, which the run itself will be as well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's own reading says it
            return read_sites(traces)
    except FAILURES:
        return None


def by_name(sites: list[Site]) -> dict[tuple[str, str], Site]:
    """Sites by their role and name."""
    return {(site.role, site.name): site for site in sites}


def scored(site: Site) -> Tensor:
    """A site's log density under its mask, and times its scale where that may differ from index to index.

    What the guide draws follows its distribution, and goes on to other sites, whatever a mask says.
    """
    drawn, scale = site.role == "guide" and site.is_latent, site.message["scale"]
    scale = scale if isinstance(scale, Tensor) else 1.0
    return scale_and_mask(site.log_prob, scale, mask=None if drawn else site.message["mask"])


def difference_of(site: Site, one: Tensor, other: Tensor) -> Difference | None:
    """Where two log densities of a site differ most, if by more than rounding explains."""
    value = site.message.get("value")
    size = value.numel() / max(site.log_prob.numel(), 1) if isinstance(value, Tensor) else 1.0
    # Rounding errors of as many terms as there are in an event.
    return largest(one, other, (accuracy(one, other), math.sqrt(max(size, 1.0))))


def beyond_noise(
    found: dict[Any, Difference],
    once: Callable[[Any], Tensor],
    again: Callable[[], dict[Any, Tensor] | None],
) -> dict[Any, Difference] | None:
    """Those differences that are clearly larger than what a particle differs by from itself.

    Arguments:
        found: differences of log densities, by site.
        once: the log density of a site in a run of one particle.
        again: the log densities in another run of that particle, its values moved by a few roundings; None if
            there is none to be had.

    Returns:
        What is left of them; None if nothing can be said, or nothing is left.
    """
    for _ in range(RUNS):
        twice = again() if found else None
        if twice is None:
            return None
        noise = {key: largest(once(key), twice[key], None) for key in found if key in twice}
        found = {
            key: found[key]
            for key, own in noise.items()
            if found[key].size > CLEARLY * (0.0 if own is None else own.size)
        }
    return found or None


def given_latents(guide: Trace, take: Callable[[Any, Callable[[Any], Tensor]], Any], move: float) -> Any:
    """Latent values for a run of one particle, by site.

    Those of a Delta are left to be computed: they would have to be met to the last bit. So are those that are
    enumerated.

    Arguments:
        guide: the guide's trace.
        take: makes such a value, given a site's message and what reads a tensor off such a message; None
            where there is none.
        move: how far values are moved, relative to their size.
    """
    values: dict[str, Tensor] = {}
    for name, site in latent_sites(guide).items():
        if isinstance(base_of(site["fn"]), Delta) or is_enumerated_in_guide(site):
            continue
        value = take(site, lambda message: message["value"])
        if value is None:
            continue
        if move and is_real(site["fn"]):
            value = value * (1 + min(4 * torch.finfo(value.dtype).eps, move))
        if hasattr(site["value"], "_unquantize"):  # what a straight-through value is scored at
            value._unquantize = take(site, lambda message: message["value"]._unquantize)
        values[name] = value
    return values


def copy_of(pair: PairTraces) -> PairTraces:
    """Traces whose messages can be written to."""
    copies = []
    for trace in (pair.model, pair.guide):
        copy = trace.copy()
        for name, site in trace.nodes.items():
            message: Any = {**site, "infer": dict(site["infer"] or {})} if "infer" in site else dict(site)
            copy.nodes[name] = message
        copies.append(copy)
    model, guide = copies
    return PairTraces(model, guide)


def is_real(fn: Any) -> bool:
    """Whether all real numbers are values, so that one can be moved a little."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return False
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def accuracy(*densities: Tensor) -> float:
    """The relative accuracy to expect of log densities, given what they may have been computed from."""
    kind = densities[0].device.type
    dtypes = {density.dtype for density in densities} | {torch.get_default_dtype()}
    autocast = autocast_dtype(kind)
    if autocast is not None:
        dtypes.add(autocast)
    cuda = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if (kind == "cuda" and cuda) or torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # as many digits as TF32
    return max(_ACCURACY.get(dtype, 0.0) for dtype in dtypes)


def largest(one: Tensor, other: Tensor, tolerance: tuple[float, float] | None) -> Difference | None:
    """Where two log densities differ most; None if nowhere by more than relative accuracy times the size."""
    try:
        one, other = torch.broadcast_tensors(wide(one), wide(other))
    except RuntimeError:  # they do not even have the same shape
        return Difference(math.inf, math.nan, math.nan)
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, (one - other).abs()).nan_to_num(nan=math.inf)
    if tolerance is not None:
        accuracy, extra = tolerance
        gap = gap.masked_fill(gap <= accuracy * (torch.minimum(one.abs(), other.abs()) + extra), 0.0)
    if gap.numel() == 0:
        return None
    index = int(gap.argmax())
    size = float(gap.reshape(-1)[index])
    if size == 0:
        return None
    return Difference(size, float(one.reshape(-1)[index]), float(other.reshape(-1)[index]))
