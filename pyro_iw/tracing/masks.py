"""Which entries of a site count, and what follows for its value and for the other side of the pair.

A mask takes entries out of a site's density. Where that means that they do not exist (missing data, padding),
nothing else may depend on them: no gradient on the value in their place, no importance weight on the guide's
density of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution, Unit
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent, biject_to, constraints

from .messages import is_delta

if TYPE_CHECKING:
    from .sites import Site

__all__ = [
    "fits",
    "masked_in_guide_alone",
    "masked_value",
    "warn_of_masks",
    "with_masks_of_model",
]


def fits(shape: torch.Size, other: torch.Size) -> bool:
    """Whether a mask or scale of one shape broadcasts to the other, and does not make it larger."""
    try:
        return torch.broadcast_shapes(shape, other).numel() == other.numel()
    except RuntimeError:
        return False


def masked_value(message: Any) -> Tensor:
    """A site's value with something harmless in place of observed entries that are masked.

    These may hold anything, NaN or a number outside the support. The density there is masked afterwards, but
    its gradient would be 0 times NaN.
    """
    fn, value = message["fn"], message["value"]
    if not message["is_observed"] or isinstance(fn, Unit):
        return value
    kept = _kept_entries(message)
    if not isinstance(kept, Tensor):
        return value
    try:
        shape = torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape)
    except RuntimeError:  # which the density says better
        return value
    if not fits(kept.shape, shape):
        return value
    if kept.dim() > len(shape):
        kept = kept.reshape(kept.shape[kept.dim() - len(shape) :])
    harmless = _in_support(fn, value, shape)
    if harmless is not None:
        return torch.where(kept, value, harmless)
    return value.masked_fill(~kept & value.isnan(), 0.0) if value.is_floating_point() else value


def _kept_entries(message: Any) -> Tensor | bool:
    """What the masks leave of a site, by poutine.mask and .mask(), as broadcasts to its value."""
    kept: Tensor | bool = True if message["mask"] is None else message["mask"]
    fn = message["fn"]
    if isinstance(kept, Tensor):
        kept = _over_events(kept, fn.event_dim)
    while isinstance(fn, MaskedDistribution | Independent | ExpandedDistribution):
        if isinstance(fn, MaskedDistribution):
            mask = fn._mask
            kept = kept & (_over_events(mask, fn.event_dim) if isinstance(mask, Tensor) else mask)
        fn = fn.base_dist
    return kept


def _over_events(mask: Tensor, event_dim: int) -> Tensor:
    return mask.reshape(mask.shape + (1,) * event_dim)


def _in_support(fn: Any, value: Tensor, shape: torch.Size) -> Tensor | None:
    """A value with a density, that broadcasts to a shape; None if none is known."""
    try:
        support = fn.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        if isinstance(support, type(constraints.real)):
            return value.new_zeros(())
        if isinstance(support, type(constraints.boolean)):
            return value.new_zeros(())
        if isinstance(support, type(constraints.one_hot)):
            return torch.eye(shape[-1], dtype=value.dtype, device=value.device)[0]
        if support.is_discrete:
            bound = getattr(support, "lower_bound", None)
            return None if bound is None else value.new_zeros(()) + bound
        transform = biject_to(support)
        return transform(value.new_zeros(transform.inverse_shape(shape))).detach()
    except NotImplementedError:
        return None


# ----------------------------------------------------------------------------------------------------
# Model against guide
# ----------------------------------------------------------------------------------------------------


def with_masks_of_model(sites: list[Site], model_trace: Trace) -> list[Site]:
    """The guide's sites, with the model's mask on those that stand for what ``obs_mask=`` leaves unobserved.

    Pyro splits a site with ``obs_mask=`` into ``{name}_observed`` and ``{name}_unobserved``, and the model
    uses the unobserved entries of the latter alone. The others do not exist: their density in the guide would
    have nothing against it in the model, and grow without bound.

    Raises:
        ValueError: if the entries of the guide's density cannot be told apart; naming the site.
    """
    masks: dict[str, Tensor] = {}
    auxiliary: list[str] = []  # those met so far, from which a Delta may have its value
    for site in sites:
        mask = _mask_of_unobserved(site.name, model_trace)
        if mask is not None:
            masks[site.name] = mask
            own = f"{site.name}_unconstrained"  # the noise of this site alone, in Pyro's AutoNormal
            if own in auxiliary:
                masks[own] = mask
            elif auxiliary and _is_computed(site):
                raise ValueError(_JOINT.format(site.name, f"auxiliary site {auxiliary[-1]!r}"))
        if site.is_latent and site.name not in model_trace.nodes:
            auxiliary.append(site.name)
    return [_masked(site, masks[site.name]) if site.name in masks else site for site in sites]


_JOINT = (
    "What obs_mask= leaves unobserved is the latent site {0!r}, of which only the unobserved entries exist. "
    "The guide draws them together with others from {1}, so log q of entries that do not exist would stay "
    "in the importance weight, and grow without bound. Give {0!r} a guide with a density for each entry: "
    "AutoNormal, or AutoGuideList of AutoNormal(poutine.block(model, expose=[{0!r}])) and of your guide on "
    "poutine.block(model, hide=[{0!r}]). If the missing values need not be imputed, mask the observed site "
    "by poutine.mask instead."
)


def _mask_of_unobserved(name: str, model_trace: Trace) -> Tensor | None:
    """The model's mask on a site, if that is the latent part of a site with ``obs_mask=``."""
    # What a reparameterisation makes of the latent has a name that goes on: y_unobserved_decentered.
    stem, found, rest = name.rpartition("_unobserved")
    if not found or (rest and not rest.startswith("_")):
        return None
    message: Any = model_trace.nodes.get(name)
    observed: Any = model_trace.nodes.get(f"{stem}_observed")
    if message is None or observed is None or message["type"] != "sample" or not observed["is_observed"]:
        return None
    both = isinstance(message["mask"], Tensor) and isinstance(observed["mask"], Tensor)
    return message["mask"] if both and not message["is_observed"] else None


def _masked(site: Site, mask: Tensor) -> Site:
    if not fits(mask.shape, site.log_prob.shape):
        density = f"a density of shape {tuple(site.log_prob.shape)} under a mask of shape {tuple(mask.shape)}"
        raise ValueError(_JOINT.format(site.name, density))

    def changed(message: Any) -> Any:
        own = message["mask"]
        return {**message, "mask": mask if own is None else own & mask}

    rescored = None if site.rescored is None else changed(site.rescored)
    return site._replace(message=changed(site.message), rescored=rescored)


def _is_computed(site: Site) -> bool:
    """Whether a site is a Delta, of what may come from other sites, and the guide does not mask it itself."""
    # A guide's own mask is taken to be on what the value is made of as well.
    return is_delta(site.message["fn"]) and not isinstance(site.message["mask"], Tensor)


def warn_of_masks(sites: Sequence[Site], warn: Callable[[str], None], look: bool | None = None) -> None:
    """Warn of latents that are masked in one of model and guide alone.

    Arguments:
        sites: the sites of both.
        warn: called with a message.
        look: whether to read the values of masks, which on an accelerator waits for the device; as Pyro's
            validation is, unless given.
    """
    if not _are_masked(sites):
        return
    look = is_validation_enabled() if look is None else look
    if look:
        _warn_of_masks_of_model(sites, warn)
    _warn_of_masks_of_guide(sites, warn, look)


def _warn_of_masks_of_model(sites: Sequence[Site], warn: Callable[[str], None]) -> None:
    """Warn of latents that the model masks in entries where the guide keeps their density.

    A mask of False is no tensor and means a flat prior.
    """
    pairs = _latents(sites)
    points = _all_are_models(sites)
    found = [
        repr(model.name)
        for model, guide in pairs
        if isinstance(_kept_entries(model.message), Tensor)
        and not (points and is_delta(guide.message["fn"]))  # a point estimate has no density to be left over
        and _masks_more(model, guide)
    ]
    if found:
        warn(
            f"Latent site(s) {', '.join(found)} are masked in the model where the guide does not mask them, "
            "so log q of entries without a prior stays in the importance weight. If they do not exist "
            "(padding), it grows without bound: put the same poutine.mask around the guide's sites, or take "
            "AutoNormalMessenger, which runs under the model's masks. If the prior is meant to be flat "
            "there, all is well."
        )


def _warn_of_masks_of_guide(sites: Sequence[Site], warn: Callable[[str], None], look: bool) -> None:
    """Warn of latents that the guide masks in entries where the model keeps their density."""
    found = masked_in_guide_alone(sites, look)
    if found:
        warn(
            f"Latent site(s) {', '.join(map(repr, found))} are masked in the guide where the model does not "
            "mask them, so log q of what was drawn is missing from the importance weight, and what is "
            "estimated is neither the evidence nor a bound of it. Mask both alike, or neither."
        )


def masked_in_guide_alone(sites: Sequence[Site], look: bool | None = None) -> list[str]:
    """The latents that the guide masks in entries where the model keeps their density.

    Arguments:
        sites: the sites of both.
        look: as of :func:`warn_of_masks`.
    """
    if not _are_masked(sites):
        return []
    look = is_validation_enabled() if look is None else look
    points = _all_are_models(sites)
    return [
        model.name
        for model, guide in _latents(sites)
        if not (points and is_delta(guide.message["fn"]))
        if (look or _kept_entries(guide.message) is False) and _masks_more(guide, model)
    ]


def _are_masked(sites: Sequence[Site]) -> bool:
    """Whether any site is masked: at most steps none is, and there is nothing to compare."""
    return any(
        _kept_entries(message) is not True
        for site in sites
        for message in (site.message, *site.message.get("absorbed_latents", {}).values())
    )


def _latents(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """The model's latents, each with the guide's site; of particles that run one by one, the first's.

    Those too whose prior depends on an enumerated site, and has gone into a term with it.
    """
    guide = {site.name: site for site in sites if site.role == "guide" and site.pair == 0}
    model = []
    for site in sites:
        if site.role == "model" and site.pair == 0:
            absorbed = site.message.get("absorbed_latents", {})
            model += [site._replace(name=name, message=message) for name, message in absorbed.items()]
            model += [site] if site.is_latent else []
    return [(site, guide[site.name]) for site in model if site.name in guide]


def _all_are_models(sites: Sequence[Site]) -> bool:
    """Whether all latents of the guide are the model's: then Deltas are made of no noise, but points."""
    names = {model.name for model, _ in _latents(sites)}
    return all(site.name in names for site in sites if site.role == "guide" and site.is_latent)


def _masks_more(site: Site, other: Site) -> bool:
    """Whether a site is masked somewhere where the other is not."""
    ours, theirs = _kept_entries(site.message), _kept_entries(other.message)
    if not isinstance(ours, Tensor):
        return ours is False and theirs is not False
    try:
        return bool((~ours & theirs).any())
    except RuntimeError:  # shapes that do not broadcast
        return True
