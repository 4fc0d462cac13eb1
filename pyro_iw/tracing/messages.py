"""What a message of Pyro's is: what kind of site it comes from, what its distribution is at heart, its masks.

Pyro describes each sample statement by a dict; a trace has one a site. All questions that more than one
module asks of such a dict are answered here, so that each has one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import Delta, Unit
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = [
    "base_of",
    "carries_density",
    "check_broadcasts",
    "guide_messenger",
    "has_no_density",
    "is_auxiliary",
    "is_delta",
    "is_deterministic",
    "is_latent",
    "latent_sites",
    "masks_of",
    "sample_sites",
    "unmasked",
]


def sample_sites(trace: Any) -> dict[str, Any]:
    """Messages of the sample sites of a trace by name, those of subsampling aside."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def latent_sites(trace: Any) -> dict[str, Any]:
    """Messages of the latent sites of a trace by name."""
    return {name: site for name, site in trace.nodes.items() if is_latent(site)}


def is_latent(message: Any) -> bool:
    """Whether a value is drawn here that is neither observed nor a plate's minibatch."""
    return message["type"] == "sample" and not message["is_observed"] and not site_is_subsample(message)


def is_auxiliary(message: Any) -> bool:
    """Whether a site is marked as one that only one side of the pair has."""
    return bool((message["infer"] or {}).get("is_auxiliary"))


def is_deterministic(message: Any) -> bool:
    """Whether a site only records a value: by pyro.deterministic, or as what is left of one
    reparameterised.
    """
    marked = bool(message["infer"] and message["infer"].get("_deterministic"))
    return marked or is_delta(message["fn"])


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point mass under its wrappers."""
    return isinstance(base_of(fn), Delta)


def has_no_density(message: Any) -> bool:
    """Whether an observed site is there for the record only, as those of ``pyro.deterministic`` are."""
    return message["is_observed"] and any(mask is False for mask in masks_of(message))


def carries_density(role: str, message: Any) -> bool:
    """Whether a message counts in the log-weights: no parameter, nothing that is there for the record only,
    and in the guide nothing observed, from which no particle is drawn.
    """
    if message["type"] != "sample" or site_is_subsample(message) or has_no_density(message):
        return False
    return role == "model" or not message["is_observed"] or isinstance(message["fn"], Unit)


def base_of(fn: Any) -> Any:
    """A distribution without its wrappers: plates' dims, event dims, masks, transforms."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def masks_of(message: Any) -> list[Any]:
    """The masks of a site: by ``poutine.mask`` (or ``obs_mask``), and by the distribution's ``.mask()``."""
    return [mask for mask in (message["mask"], getattr(message["fn"], "_mask", None)) if mask is not None]


def unmasked(name: str, batch: torch.Size, messages: Iterable[Any], device: torch.device) -> Tensor | None:
    """Which of a site's cells none of its messages masks, of the batch shape; None if all are kept.

    Arguments:
        name: the site's name.
        batch: the site's batch shape.
        messages: the site's message in the model, in the guide, or both.
        device: where to.

    Raises:
        ValueError: if a mask does not broadcast to the batch shape; the site is named.
    """
    kept = None
    for message in messages:
        for mask in masks_of(message):
            if mask is True:
                continue
            mask = torch.as_tensor(mask, dtype=torch.bool, device=device)
            check_broadcasts("mask", name, mask.shape, batch)
            kept = mask.expand(batch) if kept is None else kept & mask
    return kept


def check_broadcasts(what: str, name: str, shape: torch.Size, batch: torch.Size) -> None:
    """Refuse what has dims that the site does not have: it would count the site several times.

    Raises:
        ValueError: if the shape does not broadcast to the batch shape; the site is named.
    """
    try:
        fits = torch.broadcast_shapes(shape, batch) == batch
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"The {what} at site {name!r} has shape {tuple(shape)}, which does not broadcast to the site's "
            f"batch shape {tuple(batch)}. Give it the dims of the plates around the site."
        )


def guide_messenger(guide: Callable) -> GuideMessenger | None:
    """The guide as a messenger, which runs the model itself; None if it is an ordinary guide."""
    unwrapped = poutine.unwrap(guide)
    return unwrapped if isinstance(unwrapped, GuideMessenger) else None
