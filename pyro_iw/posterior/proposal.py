"""Whether a guide can serve as the proposal of an importance sampler at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tracing.jumps import wrong_outside
from ..tracing.latents import enumerated_sites
from ..tracing.levels import TwoLevels
from ..tracing.masks import warn_of_masks
from ..tracing.messages import is_delta
from ..tracing.particles import Particles
from ..tracing.sites import Site
from ..tracing.supports import limits
from ..tracing.traces import Traces

__all__ = ["check_proposal"]


def check_proposal(
    particles: Particles | TwoLevels, traces: Traces, check_support: bool, warn: Callable[[str], None]
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
    for site in sites:
        absorbed = site.message.get("absorbed_latents", {}) if site.role == "model" else {}
        latent |= {name: site._replace(name=name, message=message) for name, message in absorbed.items()}
    sampled = (*sites, *particles.absorbed)
    guide = {site.name: site for site in sampled if site.role == "guide" and site.is_latent}
    if not guide and not particles.enumerated:
        raise ValueError(
            "Model and guide have no latent site in common, so there is nothing to sample: the evidence is "
            "the log density of the observed sites"
            + (", with the enumerated ones summed out" if enumerated_sites(traces) else "")
            + ", which pyro_iw.IWAE_ELBO(K=1).loss gives exactly (with the opposite sign)."
        )
    warn_of_masks(sites, warn, look=True)
    for name, site in latent.items():
        if name not in guide:  # summed out
            continue
        if is_delta(guide[name].message["fn"]):
            continue
        if check_support:
            _check_support(name, site, guide[name])
        wrong = wrong_outside(name, site.message, guide[name].message)
        if wrong is not None:
            warn(wrong)


def _check_support(name: str, model: Site, guide: Site) -> None:
    """Refuse a guide that never proposes part of what the model's prior allows."""
    wanted, proposed = limits(model.message["fn"]), limits(guide.message["fn"])
    if wanted is None or proposed is None:
        return
    low, high = (torch.as_tensor(limit) for limit in wanted)
    guide_low, guide_high = (torch.as_tensor(limit) for limit in proposed)
    slack = 1e-6 * torch.maximum(guide_low.abs(), guide_high.abs()).nan_to_num(posinf=0.0)  # rounding
    if bool((guide_low > low + slack).any()) or bool((guide_high < high - slack).any()):
        raise ValueError(
            f"The guide proposes {name!r} from [{_extreme(guide_low, max)}, {_extreme(guide_high, min)}], "
            f"but the model's prior reaches over [{_extreme(low, min)}, {_extreme(high, max)}]. No weight "
            "can make up for what is never proposed: unless the likelihood is 0 there, every estimate "
            f"falls short. Give {name!r} a guide distribution with the prior's support, or pass "
            "check_support=False."
        )


def _extreme(limit: Tensor, pick: Callable[..., float]) -> str:
    return f"{pick(limit.flatten().tolist()):g}"
