r"""Log-weights per cell: what the bounds need to know of the traces of a model/guide pair.

A *cell* is one index into the *kept plates*: the plates common to all sample sites of model and guide. The
importance weights are averaged separately in every cell; all other batch dims are summed out. For a VAE
with one data plate that is one bound a datapoint, :math:`\sum_n \log \mathrm{mean}_k\, w_{nk}`.

Scales stay outside the logarithm. A kept plate of full size N run on a minibatch of B scales every site
alike, by N / B, and so scales the bound; what the user's own ``poutine.scale`` adds goes the same way where
all sites of model and guide share it, and otherwise stays on its site. Masks apply before anything is
summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .._support.warn import warn
from .guide_values import GuideValues, ValueDims, guide_values
from .masks import warn_of_masks, warn_of_masks_of_guide
from .over_values import over_values, stratified, warn_of_dropped
from .sites import Site, plate_key, read_sites
from .traces import Traces

__all__ = ["Particles", "collect"]


@dataclass(frozen=True)
class Particles:
    """S particles and their log densities, summed within each cell.

    Attributes:
        log_p: log p(x, z), of shape ``[S, *cells]``, in nats.
        log_q: log q(z | x), of shape ``[S, *cells]``, in nats.
        scale: factor outside the logarithm: N / B of the kept plates and a ``poutine.scale`` that all sites
            share; a number, or a tensor that broadcasts to ``[*cells]``.
        plates: the kept plates, in the order of their dims.
        sites: the sites that carry a density, guide first.
        kl_weight: the weight of the prior and of the guide's density within ``log_p`` and ``log_q``.
        log_q_stopped: log q at stopped values, of the same shape, where the route asked for it.
        enumerated: the guide's sites whose values are enumerated.
        absorbed: the guide's sampled sites that have been summed out together with them.
        values: densities of these values, where each joint value has log-weights of its own: then all shapes
            are ``[S, Y, *cells]``, and ``log_q`` is that of the sampled sites alone.
    """

    log_p: Tensor
    log_q: Tensor
    scale: float | Tensor
    plates: tuple[CondIndepStackFrame, ...]
    sites: tuple[Site, ...] = field(repr=False)
    kl_weight: float
    log_q_stopped: Tensor | None = field(repr=False)
    _layout: _Layout = field(repr=False)
    _shares_scale: bool = field(repr=False)
    enumerated: tuple[Site, ...] = field(default=(), repr=False)
    absorbed: tuple[Site, ...] = field(default=(), repr=False)
    values: GuideValues | None = field(default=None, repr=False)

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), of shape ``[S, *cells]``, in nats."""
        log_w = self.log_p - self.log_q
        return log_w if self.values is None else log_w - self.kl_weight * self.values.counted

    @property
    def statistics(self) -> Tensor:
        """What bound and weights follow from: the log-weights, or their parts where there are ``values``.

        Those are log p - log q, ``values.log_q`` and ``values.counted``; of shape ``[S, 3, Y, *cells]``.
        """
        if self.values is None:
            return self.log_p - self.log_q
        parts = (self.log_p - self.log_q, self.values.log_q, self.values.counted)
        return torch.stack(torch.broadcast_tensors(*parts), 1)

    def to_batch(self, per_cell: Tensor) -> Tensor:
        """Reshape ``[S, *cells]`` so that it broadcasts against the batch dims of the sites' values.

        Returns:
            A tensor of shape ``[S, *batch]``, with size 1 at every batch dim that is no kept plate.
        """
        dims = self._layout.kept_dims
        if self._layout.values.dims:
            return self._layout.values.to_batch(per_cell, dims, self._layout.particle_dim)
        rank = -self._layout.particle_dim - 1 if self._layout.particle_dim else -min(dims, default=0)
        shape = [1] * rank
        for dim, size in zip(dims, per_cell.shape[1:], strict=True):
            shape[dim] = size
        return per_cell.reshape(-1, *shape)

    @property
    def log_q_weight(self) -> float | Tensor:
        """What log q of the guide's sites is multiplied by within ``log_q``, where that is one number."""
        scale = self.guide_sites[0].scale if self.guide_sites else 1.0
        return self.kl_weight * scale

    @property
    def guide_sites(self) -> list[Site]:
        """The guide's sites."""
        return [site for site in self.sites if site.role == "guide"]

    @property
    def nonreparameterized_sites(self) -> list[Site]:
        """The guide's sites without a pathwise gradient whose density has parameters."""
        return [
            site
            for site in (*self.guide_sites, *self.absorbed)
            if (site.is_latent or site.is_factor) and not site.is_reparameterized and not site.is_enumerated
        ]

    def log_prob(self, sites: list[Site], masked: bool = True) -> Tensor:
        """The unweighted log density of some of the sites, of shape ``[S, *cells]``, masked or not."""
        unscaled = [site._replace(scale=1.0) for site in sites]
        if not masked:
            unscaled = [site._replace(message={**site.message, "mask": None}) for site in unscaled]
        pairs = 1 if self._layout.particle_dim is not None else len(self.log_p)
        total = _sum_sites(unscaled, self._layout, pairs, 1.0, self.log_q.new_zeros(()))
        return total.expand(self.log_p.shape)

    def log_p_of(self, traces: Traces) -> Tensor:
        """log p(x, z) of other particles of the same pair, summed as that of these.

        Arguments:
            traces: those of S' particles, vectorised, of which the model's alone is read.

        Returns:
            A tensor of shape ``[S', *cells]``.
        """
        sites = read_sites(traces, roles=("model",))
        sites = _with_inner_scales(sites, _own_scales(sites), self.plates, self._shares_scale)
        zero = self.log_p.new_zeros(())
        total = _sum_sites(sites, self._layout, 1, self.kl_weight, zero)
        return total.expand(traces.num_particles, *self.log_p.shape[1:])

    def first_site(self, where: Callable[[Tensor], Tensor], role: str | None = None) -> Site | None:
        """The first site with a log density for which ``where`` holds anywhere, guide sites first."""
        for site in self.sites:
            if role in (None, site.role) and bool(where(self._layout.log_density(site)).any()):
                return site
        return None


class _Layout(NamedTuple):
    """Where particles and cells lie among the batch dims."""

    particle_dim: int | None
    kept_dims: tuple[int, ...]
    values: ValueDims = ValueDims()

    def log_density(self, site: Site) -> Tensor:
        """The site's log density, scaled and masked, of shape ``[S, *cells]`` or ``[*cells]``.

        Particles and cells have size 1 where the density does not vary.
        """
        log_prob = scale_and_mask(site.log_prob, site.scale, site.message["mask"])
        return self.sum_to_cells(log_prob)

    def sum_to_cells(self, tensor: Tensor) -> Tensor:
        keep = self.kept_dims if self.particle_dim is None else (self.particle_dim, *self.kept_dims)
        keep = (*self.values.dims, *keep)
        rank = -min(keep, default=0)
        if tensor.dim() < rank:
            tensor = tensor.reshape((1,) * (rank - tensor.dim()) + tensor.shape)
        drop = [dim for dim in range(-tensor.dim(), 0) if dim not in keep]
        return tensor.sum(drop) if drop else tensor


def collect(
    traces: Traces,
    plates: Sequence[str] | None = None,
    is_linear: bool = False,
    kl_weight: float = 1.0,
    warn_once: Callable[[str], None] = warn,
    is_stratified: bool = False,
) -> Particles:
    r"""Read the log-weights off the traces.

    Arguments:
        traces: the traces of S particles.
        plates: names of the plates to keep; ``()`` for one joint weight; None for those common to all
            sites.
        is_linear: whether the bound is the mean of the log-weights, for which a scale inside is right too.
        kl_weight: :math:`\beta` in :math:`\log p(x \mid z) + \beta (\log p(z) - \log q(z \mid x))`.
        warn_once: called with a message if a plate of all the model's latents is lost to other sites, a scale
            stays inside the logarithm, or a latent is masked in the model alone.
        is_stratified: whether values that the guide enumerates are summed over inside the logarithm.

    Raises:
        ValueError: if a plate is unknown or has sites outside, or a subsampled plate is not kept,
            all of them named; and as :func:`read_sites`.
        NotImplementedError: as :func:`read_sites`.
    """
    sites = read_sites(traces)
    enumerated = tuple(site for site in sites if site.is_enumerated)
    absorbed: tuple[Site, ...] = ()
    if enumerated and is_stratified:
        warn_of_dropped(enumerated, warn_once)
        sites, absorbed = stratified(sites, enumerated, traces)
    kept = _kept_plates(sites, plates, is_linear, warn_once)
    if not is_linear:
        _check_subsampling(sites, kept)
    scale, sites, shared = _split_scales(sites, kept)
    if not is_linear:
        _warn_of_tempering(sites, warn_once)
    if is_validation_enabled():
        warn_of_masks(sites, warn_once)
    warn_of_masks_of_guide(sites, warn_once)
    kept_dims = tuple(frame.dim for frame in kept if frame.dim is not None)
    if isinstance(scale, Tensor):
        scale = _Layout(None, kept_dims).sum_to_cells(scale)
    layout = _Layout(traces.particle_dim, kept_dims)
    if kl_weight != 1:
        _check_kl_weight(sites)
    counted, rescored = sites, None
    if enumerated and not is_stratified:
        found = over_values(sites, kept, traces, is_linear)
        sites, counted, rescored = found.sites, found.counted, found.rescored
        layout, enumerated = layout._replace(values=found.dims), found.enumerated
    log_p, log_q, log_q_stopped = _log_densities(counted, layout, traces, kl_weight, rescored)
    particles = Particles(log_p, log_q, scale, kept, tuple(sites), kl_weight, log_q_stopped, layout, shared)
    if not layout.values.dims:
        return replace(particles, enumerated=enumerated, absorbed=absorbed) if enumerated else particles
    values = guide_values(enumerated, particles.guide_sites, traces, particles.log_prob)
    return replace(particles, enumerated=enumerated, values=values)


def _check_kl_weight(sites: list[Site]) -> None:
    """Refuse a prior that has gone into a sum together with the likelihood, and cannot be weighted alone."""
    for site in sites:
        latents = site.message.get("absorbed_latents")
        if latents:
            raise NotImplementedError(
                f"kl_weight other than 1 needs the prior apart from the likelihood, but the prior of "
                f"{', '.join(map(repr, latents))} depends on an enumerated site and is summed with it in "
                f"{site}. Use kl_weight=1, or sample the enumerated site in the guide."
            )


def _common(sites: Iterable[Site]) -> list[CondIndepStackFrame]:
    """The vectorised plates around all of these sites."""
    sites = list(sites)
    if not sites:
        return []
    return [
        frame for frame in sites[0].frames if frame.vectorized and all(site.inside(frame) for site in sites)
    ]


def _names(sites: Iterable[Site]) -> str:
    return ", ".join(dict.fromkeys(str(site) for site in sites))


def _kept_plates(
    sites: list[Site],
    plates: Sequence[str] | None,
    is_linear: bool,
    warn_once: Callable[[str], None],
) -> tuple[CondIndepStackFrame, ...]:
    """The kept plates, in the order of their dims."""
    kept = _common(sites)
    if plates is not None:
        kept = _named_plates(sites, plates)
    elif not is_linear:
        for frame in _common(site for site in sites if site.is_latent and site.role == "model"):
            outside = [site for site in sites if not site.inside(frame)]
            if outside and not _is_subsampled(frame):
                warn_once(
                    f"All latent sites of the model lie in plate {frame.name!r}, but site(s) "
                    f"{_names(outside)} do not, so there is one joint importance weight instead of one for "
                    f"each index of {frame.name!r}. Move observed and factor sites into the plate (divided "
                    "by its size where they are a regulariser), take a guide whose sites lie in it "
                    "(AutoNormal rather than one with a joint latent), or pass plates=() to ask for the "
                    "joint weight."
                )
    for frame in kept:
        _check_sizes(sites, frame)
    return tuple(sorted(kept, key=lambda frame: frame.dim or 0))


def _check_sizes(sites: list[Site], frame: CondIndepStackFrame) -> None:
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


def _named_plates(sites: list[Site], names: Sequence[str]) -> list[CondIndepStackFrame]:
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
            raise ValueError(
                f"Plate {name!r} cannot be kept: site(s) {_names(outside)} lie outside it, so there is no "
                f"importance weight for each index of {name!r}."
            )
        kept.append(frame)
    return kept


def _is_subsampled(frame: CondIndepStackFrame) -> bool:
    return frame.full_size is not None and frame.full_size != frame.size


def _check_subsampling(sites: list[Site], kept: tuple[CondIndepStackFrame, ...]) -> None:
    keys = {plate_key(frame) for frame in kept}
    for site in sites:
        for frame in site.frames:
            if plate_key(frame) in keys or not _is_subsampled(frame):
                continue
            outside = [other for other in sites if not other.inside(frame)]
            if not frame.vectorized:
                reason = "it is a Python loop, whose steps share one weight"
                remedy = "make it a vectorised plate around all latents (with pyro.plate(...) as indices:)"
            elif not outside:
                reason, remedy = "plates= does not keep it", "let plates= keep it"
            else:
                reason = f"site(s) {_names(outside)} lie outside it"
                latent = any(other.is_latent for other in outside)
                remedy = (
                    "move every latent into the plate (or turn those outside into parameters)"
                    if latent
                    else "move them into the plate, divided by its size where they are a regulariser"
                )
            raise ValueError(
                f"Plate {frame.name!r} is subsampled ({_in_words(frame)}), but {reason}. The joint "
                "importance weight then needs all of the data: an estimate from a minibatch is no bound for "
                f"K > 1. Run the plate on all of its data, use K=1 (the ELBO), or {remedy}."
            )


def _split_scales(
    sites: list[Site], kept: tuple[CondIndepStackFrame, ...]
) -> tuple[float | Tensor, list[Site], bool]:
    """The factor outside the logarithm, the sites with what remains inside, and whether they share theirs."""
    if not any(map(_is_scaled, sites)):
        return 1.0, sites, True
    outer: float | Tensor = math.prod(_subsampling(frame) for frame in kept)
    own = _own_scales(sites)
    common = _shared_scale(own, kept)
    shared = common is not None
    if common is not None:
        outer = outer * common
    return outer, _with_inner_scales(sites, own, kept, shared), shared


def _warn_of_tempering(sites: list[Site], warn_once: Callable[[str], None]) -> None:
    """Warn of scales inside a logarithm that is not that of a plain mean."""
    tempered = [site for site in sites if isinstance(site.scale, Tensor) or site.scale != 1]
    if tempered:
        warn_once(
            f"Site(s) {_names(tempered)} have a poutine.scale that not everything in a weight shares, so it "
            "stays inside the logarithm, and what is estimated is the normaliser of that tempered density "
            "and not the evidence. A likelihood scaled by N / B on a minibatch is unbiased with K=1 (the "
            "ELBO) alone: for K > 1 run it unscaled on all of the data, or put all latents into a "
            "subsampled pyro.plate. To anneal the KL term pass kl_weight=; to weight the loss, scale model "
            "and guide alike."
        )


def _own_scales(sites: list[Site]) -> list[float | Tensor]:
    """What the plates do not account for, which is the user's own."""
    return [_divide(site.message["scale"], math.prod(map(_subsampling, site.frames))) for site in sites]


def _with_inner_scales(
    sites: list[Site], own: list[float | Tensor], kept: tuple[CondIndepStackFrame, ...], shared: bool
) -> list[Site]:
    """The sites with the scales that remain inside the logarithm."""
    keys = {plate_key(frame) for frame in kept}
    inner = []
    for site, scale in zip(sites, own, strict=True):
        rest = math.prod(_subsampling(frame) for frame in site.frames if plate_key(frame) not in keys)
        inner.append(site._replace(scale=rest if shared else scale * rest))
    return inner


def _is_scaled(site: Site) -> bool:
    scale = site.message["scale"]
    return isinstance(scale, Tensor) or scale != 1 or any(map(_is_subsampled, site.frames))


def _subsampling(frame: CondIndepStackFrame) -> float:
    return frame.full_size / frame.size if _is_subsampled(frame) else 1.0  # type: ignore[operator]


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
    reference = widest.double()
    for scale in scales:
        other = torch.as_tensor(scale, dtype=torch.float64, device=widest.device)
        try:
            equal = torch.allclose(other.expand_as(reference), reference, rtol=1e-6)
        except RuntimeError:  # the shapes do not broadcast
            return None
        if not equal:
            return None
    return widest


def _log_densities(
    sites: list[Site],
    layout: _Layout,
    traces: Traces,
    kl_weight: float,
    rescored: list[Site] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log p, log q and, if the guide was rescored, log q at stopped values, of shape ``[S, *cells]``."""
    guide = [site for site in sites if site.role == "guide"]
    model = [site for site in sites if site.role == "model"]
    groups = [model, guide]
    if any(site.rescored is not None for site in guide):
        groups.append([site.rescored_site() for site in guide] if rescored is None else rescored)
    zero = sites[0].log_prob.new_zeros(()) if sites else torch.zeros(())
    totals = [_sum_sites(group, layout, len(traces.pairs), kl_weight, zero) for group in groups]
    shape = totals[0].shape
    if shape[0] != traces.num_particles or any(total.shape != shape for total in totals):
        shape = torch.broadcast_shapes(*(total.shape for total in totals))
        shape = torch.Size([traces.num_particles, *shape[1:]])
        totals = [total.expand(shape) for total in totals]
    log_p, log_q, *rest = totals
    return log_p, log_q, rest[0] if rest else None


def _sum_sites(
    sites: Iterable[Site], layout: _Layout, num_pairs: int, kl_weight: float, zero: Tensor
) -> Tensor:
    """The sites' log densities summed, of shape ``[S, *cells]`` with size 1 where they do not vary."""
    rank = len(layout.kept_dims) + (layout.particle_dim is not None) + len(layout.values.dims)
    sums: list[Tensor | None] = [None] * num_pairs
    for site in sites:
        term = layout.log_density(site)
        if kl_weight != 1 and (site.is_latent or site.role == "guide"):
            if kl_weight == 0:
                continue  # 0 * -inf would be NaN
            term = kl_weight * term
        so_far = sums[site.pair]
        sums[site.pair] = term if so_far is None else so_far + term
    totals = []
    for total in sums:
        if total is None or total.dtype != zero.dtype:  # a dtype that all groups share
            start = zero.reshape((1,) * rank)
            total = start if total is None else start + total
        totals.append(layout.values.join(total, layout.particle_dim is not None))
    if layout.particle_dim is not None:
        return totals[0]
    return totals[0].unsqueeze(0) if num_pairs == 1 else torch.stack(torch.broadcast_tensors(*totals))
