r"""Which plates are kept, and where the scales go: outside of the logarithm or inside.

A *cell* is one index into the kept plates, in which all else is summed before weights are averaged. A kept
plate of full size N run on a minibatch of B scales every site alike, and so scales the bound. What the user's
own ``poutine.scale`` adds goes the same way where all sites share it, and otherwise stays on its site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .._support.devices import wide
from .messages import is_delta
from .sites import Site, plate_key

__all__ = [
    "check_sizes",
    "check_subsampling",
    "common_plates",
    "dims_of_plates",
    "is_subsampled",
    "kept_plates",
    "names_of",
    "own_scales",
    "split_scales",
    "subsampling",
    "two_levels",
    "warn_of_tempering",
    "weighted_plates",
    "with_inner_scales",
]


def common_plates(sites: Iterable[Site]) -> list[CondIndepStackFrame]:
    """The vectorised plates around all of these sites."""
    sites = list(sites)
    if not sites:
        return []
    return [
        frame for frame in sites[0].frames if frame.vectorized and all(site.inside(frame) for site in sites)
    ]


def dims_of_plates(frames: Iterable[CondIndepStackFrame]) -> tuple[int, ...]:
    """The batch dims of vectorised plates."""
    return tuple([frame.dim for frame in frames if frame.dim is not None])


def names_of(sites: Iterable[Site]) -> str:
    """The sites in words, each once."""
    return ", ".join(dict.fromkeys(str(site) for site in sites))


def kept_plates(
    sites: list[Site],
    plates: Sequence[str] | None,
    is_linear: bool,
    warn_once: Callable[[str], None],
    offers_local: bool = True,
) -> tuple[CondIndepStackFrame, ...]:
    """The kept plates, in the order of their dims; arguments and errors are as of ``collect``.

    Messages name the loss with local particles where it is of use, if ``offers_local``.
    """
    kept = _weighted(sites, plates, offers_local)
    if plates is None and not is_linear:
        for frame in common_plates(site for site in sites if site.is_latent and site.role == "model"):
            outside = [site for site in sites if not site.inside(frame)]
            if outside and not is_subsampled(frame):
                loss = two_levels(sites, frame) if offers_local else ""
                loss = f"Take {loss}, in which what lies outside counts once, or move" if loss else "Move"
                warn_once(
                    f"All latent sites of the model lie in plate {frame.name!r}, but site(s) "
                    f"{names_of(outside)} do not, so there is one joint importance weight instead of one for "
                    f"each index of {frame.name!r}. {loss} observed and factor sites into the plate (divided "
                    "by its size where they are a regulariser), take a guide whose sites lie in it "
                    "(AutoNormal rather than one with a joint latent), or pass plates=() to ask for the "
                    "joint weight."
                )
    for frame in kept:
        check_sizes(sites, frame)
    if not is_linear:
        check_subsampling(sites, tuple(kept), offers_local)
    return tuple(sorted(kept, key=lambda frame: frame.dim or 0))


def weighted_plates(sites: list[Site], plates: Sequence[str] | None = None) -> list[str]:
    """Names of the plates whose indices have a weight each; arguments and errors are as of ``collect``."""
    return [frame.name for frame in _weighted(sites, plates)]


def _weighted(
    sites: list[Site], plates: Sequence[str] | None, offers_local: bool = True
) -> list[CondIndepStackFrame]:
    return common_plates(sites) if plates is None else _named_plates(sites, plates, offers_local)


def check_sizes(sites: list[Site], frame: CondIndepStackFrame) -> None:
    """Refuse a plate that is not of one size everywhere, whose cells and scale would be in doubt."""
    for site in sites:
        for other in site.frames:
            if plate_key(other) == plate_key(frame) and _sizes(other) != _sizes(frame):
                raise ValueError(
                    f"Plate {frame.name!r} runs on {_in_words(other)} at site {site}, but on "
                    f"{_in_words(frame)} at site {sites[0]}. Declare the same size and subsample in model "
                    "and guide."
                )


def _sizes(frame: CondIndepStackFrame) -> tuple[int, int]:
    return frame.size, frame.size if frame.full_size is None else frame.full_size


def _in_words(frame: CondIndepStackFrame) -> str:
    return "{} of {}".format(*_sizes(frame))


def _named_plates(sites: list[Site], names: Sequence[str], offers_local: bool) -> list[CondIndepStackFrame]:
    frames = {frame.name: frame for site in sites for frame in site.frames}
    kept = []
    for name in names:
        if name not in frames:
            raise ValueError(
                f"plates names {name!r}, but model and guide have no such plate around their sites; they "
                f"have {sorted(frames)}."
            )
        frame = frames[name]
        if not frame.vectorized:
            raise ValueError(f"Plate {name!r} is a Python loop; only vectorised plates can be kept.")
        outside = [site for site in sites if not site.inside(frame)]
        if outside:
            loss = two_levels(sites, frame) if offers_local else ""
            raise ValueError(
                f"Plate {name!r} cannot be kept: site(s) {names_of(outside)} lie outside it, so there is no "
                f"importance weight for each index of {name!r}"
                + (f" alone. Given what lies outside there is, in {loss}." if loss else ".")
            )
        kept.append(frame)
    return kept


def is_subsampled(frame: CondIndepStackFrame) -> bool:
    return frame.full_size is not None and frame.full_size != frame.size


def check_subsampling(
    sites: list[Site], kept: tuple[CondIndepStackFrame, ...], offers_local: bool = True
) -> None:
    keys = {plate_key(frame) for frame in kept}
    for site in sites:
        for frame in site.frames:
            if plate_key(frame) in keys or not is_subsampled(frame):
                continue
            outside = [other for other in sites if not other.inside(frame)]
            if not frame.vectorized:
                reason = "it is a Python loop, whose steps share one weight"
                remedy = "make it a vectorised plate around all latents (with pyro.plate(...) as indices:)"
            elif not outside:
                reason, remedy = "plates= does not keep it", "let plates= keep it"
            else:
                reason = f"site(s) {names_of(outside)} lie outside it"
                latent = any(other.is_latent for other in outside)
                remedy = (
                    "move every latent into the plate (or turn those outside into parameters)"
                    if latent
                    else "move them into the plate, divided by its size where they are a regulariser"
                )
            loss = two_levels(sites, frame) if outside and offers_local else ""
            first = "Run"
            if loss:
                first = f"Take {loss}, which weighs the plate's latents given what is outside; or run"
            raise ValueError(
                f"Plate {frame.name!r} is subsampled ({_in_words(frame)}), but {reason}. The joint "
                "importance weight then needs all of the data: an estimate from a minibatch is no bound for "
                f"K > 1. {first} the plate on all of its data, use K=1 (the ELBO), or {remedy}."
            )


def two_levels(sites: Sequence[Site], frame: CondIndepStackFrame) -> str:
    """The loss with local particles in a plate, as a user can paste it; empty where it would be refused."""
    inside = [site for site in sites if site.is_latent and site.inside(frame)]
    drawn = [site for site in inside if site.role == "guide" and not is_delta(site.message["fn"])]
    if not frame.vectorized or not any(site.role == "model" for site in inside):
        return ""
    loss = f"LocallyEnhancedELBO(local=pyro_iw.bounds.IWAE(16), over={frame.name!r})"
    # A joint latent of the guide lies outside, and what is made of it inside is a function of it.
    return loss if drawn else f"{loss} with a guide that draws the plate's latents in it (AutoNormal)"


def split_scales(
    sites: list[Site], kept: tuple[CondIndepStackFrame, ...]
) -> tuple[float | Tensor, list[Site], bool]:
    """The factor outside the logarithm, the sites with what remains inside, and whether they share theirs."""
    if not any(map(_is_scaled, sites)):
        return 1.0, sites, True
    outer: float | Tensor = math.prod(subsampling(frame) for frame in kept)
    own = own_scales(sites)
    common = _shared_scale(own, kept)
    shared = common is not None
    if common is not None:
        outer = outer * common
    return outer, with_inner_scales(sites, own, kept, shared), shared


def warn_of_tempering(sites: list[Site], warn_once: Callable[[str], None]) -> None:
    """Warn of scales inside a logarithm that is not that of a plain mean."""
    tempered = [site for site in sites if isinstance(site.scale, Tensor) or site.scale != 1]
    if tempered:
        warn_once(
            f"Site(s) {names_of(tempered)} have a poutine.scale that not everything in a weight shares, so "
            "it stays inside the logarithm, and what is estimated is the normaliser of that tempered density "
            "and not the evidence. A likelihood scaled by N / B on a minibatch is unbiased with K=1 (the "
            "ELBO) alone: for K > 1 run it unscaled on all of the data, or put all latents into a "
            "subsampled pyro.plate. To anneal the KL term pass kl_weight=; to weight the loss, scale model "
            "and guide alike."
        )


def own_scales(sites: list[Site]) -> list[float | Tensor]:
    """What the plates do not account for, which is the user's own."""
    return [_divide(site.message["scale"], math.prod(map(subsampling, site.frames))) for site in sites]


def with_inner_scales(
    sites: list[Site], own: list[float | Tensor], kept: tuple[CondIndepStackFrame, ...], shared: bool
) -> list[Site]:
    """The sites with the scales that remain inside the logarithm."""
    keys = {plate_key(frame) for frame in kept}
    inner = []
    for site, scale in zip(sites, own, strict=True):
        rest = math.prod(subsampling(frame) for frame in site.frames if plate_key(frame) not in keys)
        inner.append(site._replace(scale=rest if shared else scale * rest))
    return inner


def _is_scaled(site: Site) -> bool:
    scale = site.message["scale"]
    return isinstance(scale, Tensor) or scale != 1 or any(map(is_subsampled, site.frames))


def subsampling(frame: CondIndepStackFrame) -> float:
    return frame.full_size / frame.size if is_subsampled(frame) else 1.0  # type: ignore[operator]


def _divide(scale: float | Tensor, share: float) -> float | Tensor:
    if isinstance(scale, Tensor):
        return scale / share
    ratio = scale / share
    # Pyro multiplies scales site by site; undo the rounding of a scale that is the plates' alone.
    return 1.0 if math.isclose(ratio, 1.0, rel_tol=1e-9) else ratio


def _shared_scale(
    scales: list[float | Tensor], kept: tuple[CondIndepStackFrame, ...]
) -> float | Tensor | None:
    """The scale that all sites share, if they do and it does not vary within a cell."""
    if not scales:
        return None
    tensors = [scale for scale in scales if isinstance(scale, Tensor)]
    if not tensors:
        first = scales[0]
        return first if all(math.isclose(scale, first, rel_tol=1e-9) for scale in scales) else None
    if any(tensor.requires_grad for tensor in tensors):
        return None  # outside the logarithm it would lose its gradient
    widest = max(tensors, key=Tensor.dim)
    dims = {frame.dim for frame in kept}
    if any(widest.shape[dim] > 1 and dim not in dims for dim in range(-widest.dim(), 0)):
        return None
    # A user's tensor has to be compared by value, which on an accelerator waits for the device.
    reference = wide(widest)
    tolerance = 1e-8 + 1e-6 * reference.abs()
    same = []
    for scale in scales:
        if scale is widest:
            continue
        other = wide(scale.to(widest.device)) if isinstance(scale, Tensor) else scale
        try:
            difference = reference - other
        except RuntimeError:  # the shapes do not broadcast
            return None
        if difference.shape != reference.shape:
            return None
        same.append((difference.abs() <= tolerance).all())
    return widest if not same or bool(torch.stack(same).all()) else None
