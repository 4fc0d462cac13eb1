"""Whether a guide can serve as the proposal of an importance sampler at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ..tracing.latents import enumerated_sites
from ..tracing.masks import warn_of_masks
from ..tracing.messages import is_delta
from ..tracing.particles import Particles
from ..tracing.sites import Site
from ..tracing.traces import Traces

__all__ = ["check_proposal"]


def check_proposal(
    particles: Particles, traces: Traces, check_support: bool, warn: Callable[[str], None]
) -> None:
    """Refuse a pair whose weights would say nothing of the evidence.

    Arguments:
        particles: some particles of the pair.
        traces: the traces they come from.
        check_support: whether to compare the supports.
        warn: called with a message where the estimate is of something else than the evidence.

    Raises:
        ValueError: if the model has no latent site, or the support of a guide site is smaller than that of
            the model's; naming the site.
    """
    sites = particles.sites
    latent = {site.name: site for site in sites if site.role == "model" and site.is_latent}
    guide = {site.name: site for site in sites if site.role == "guide" and site.is_latent}
    if not guide:
        raise ValueError(
            "Model and guide have no latent site in common, so there is nothing to sample: the evidence is "
            "the log density of the observed sites"
            + (", with the enumerated ones summed out" if enumerated_sites(traces) else "")
            + ", which pyro_iw.IWAE_ELBO(K=1).loss gives exactly (with the opposite sign)."
        )
    warn_of_masks(sites, warn)
    for name, site in latent.items():
        if check_support and not is_delta(guide[name].message["fn"]):
            _check_support(name, site, guide[name])


def _check_support(name: str, model: Site, guide: Site) -> None:
    """Refuse a guide that never proposes part of what the model's prior allows."""
    wanted, proposed = _limits(model.message["fn"]), _limits(guide.message["fn"])
    if wanted is None or proposed is None:
        return
    low, high = (torch.as_tensor(limit) for limit in wanted)
    guide_low, guide_high = (torch.as_tensor(limit).to(low.device) for limit in proposed)
    if bool((guide_low > low).any()) or bool((guide_high < high).any()):
        raise ValueError(
            f"The guide proposes {name!r} from [{_extreme(guide_low, max)}, {_extreme(guide_high, min)}], "
            f"but the model's prior reaches over [{_extreme(low, min)}, {_extreme(high, max)}]. No weight "
            "can make up for what is never proposed: unless the likelihood is 0 there, every estimate "
            f"falls short. Give {name!r} a guide distribution with the prior's support, or pass "
            "check_support=False."
        )


def _limits(fn: Any) -> tuple[Any, Any] | None:
    """The lowest and highest value of a distribution over numbers; None where that is not its support."""
    try:
        support = fn.support
    except NotImplementedError:
        return None
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if type(support) is type(dist.constraints.real):
        return -math.inf, math.inf
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if low is None and high is None:
        return None
    return -math.inf if low is None else low, math.inf if high is None else high


def _extreme(limit: Tensor, pick: Callable[..., float]) -> str:
    return f"{pick(limit.flatten().tolist()):g}"
