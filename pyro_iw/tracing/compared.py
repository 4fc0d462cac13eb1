"""What runs of a pair are compared by: their densities, read aside, and how much these may differ."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import constraints

from .._support.devices import autocast_dtype, wide
from .sites import Site, read_sites
from .traces import PairTraces, Traces

__all__ = [
    "CLEARLY",
    "FAILURES",
    "ROUNDING",
    "RUNS",
    "Difference",
    "accuracy",
    "copy_of",
    "difference_of",
    "is_real",
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


def scored(site: Site) -> Tensor:
    """A site's log density, unscaled, under its mask.

    What the guide draws follows its distribution, and goes on to other sites, whatever a mask says.
    """
    drawn = site.role == "guide" and site.is_latent
    return scale_and_mask(site.log_prob, mask=None if drawn else site.message["mask"])


def difference_of(site: Site, one: Tensor, other: Tensor) -> Difference | None:
    """Where two log densities of a site differ most, if by more than rounding explains."""
    value = site.message.get("value")
    size = value.numel() / max(site.log_prob.numel(), 1) if isinstance(value, Tensor) else 1.0
    # Rounding errors of as many terms as there are in an event.
    return largest(one, other, (accuracy(one, other), math.sqrt(max(size, 1.0))))


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
