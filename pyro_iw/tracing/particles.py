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
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .._support.warn import warn
from .cells import (
    dims_of_plates,
    kept_plates,
    own_scales,
    split_scales,
    warn_of_tempering,
    with_inner_scales,
)
from .guide_values import GuideValues, ValueDims, guide_values
from .masks import warn_of_masks
from .over_values import over_values, stratified, warn_of_dropped
from .sites import Site, plate_key, read_sites
from .traces import Traces

__all__ = ["Layout", "Particles", "check_kl_weight", "collect", "sum_to_particles"]


@dataclass(frozen=True)
class Particles:
    r"""S particles and their log densities, summed within each cell.

    .. math:: \ell_s = \log p_\theta(x, z_s) - \log q_\phi(z_s \mid x) \qquad \text{(log_weights)}

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

    Example:
        >>> particles = IWAE_ELBO(K=16).particles(model, guide, data)
        >>> particles.log_weights.shape, [frame.name for frame in particles.plates]
        (torch.Size([16, 3]), ['data'])
    """

    log_p: Tensor
    log_q: Tensor
    scale: float | Tensor
    plates: tuple[CondIndepStackFrame, ...]
    sites: tuple[Site, ...] = field(repr=False)
    kl_weight: float
    log_q_stopped: Tensor | None = field(repr=False)
    _layout: Layout = field(repr=False)
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

    @property
    def cells(self) -> tuple[list, torch.Size]:
        """Which plates are kept, and of what sizes."""
        return [plate_key(frame) for frame in self.plates], self.log_p.shape[len(self._layout.particles) :]

    def to_batch(self, per_cell: Tensor) -> Tensor:
        """Reshape ``[S, *cells]`` so that it broadcasts against the batch dims of the sites' values.

        Returns:
            A tensor of shape ``[S, *batch]``, with size 1 at every batch dim that is no kept plate.
        """
        dims, particle_dims = self._layout.kept_dims, self._layout.particle_dims
        if self._layout.values.dims:
            return self._layout.values.to_batch(per_cell, dims, particle_dims)
        rank = -particle_dims[-1] - 1 if particle_dims else -min(dims, default=0)
        levels = len(self._layout.particles)
        shape = [1] * rank
        for dim, size in zip(dims, per_cell.shape[levels:], strict=True):
            shape[dim] = size
        return per_cell.reshape(*per_cell.shape[:levels], *shape)

    def any_in_cell(self, entries: Tensor) -> Tensor:
        """Whether any of a site's boolean entries, of its batch shape, is true in a cell, ``[*cells]``."""
        count = self._layout.sum_to_cells(entries.to(torch.int32))
        count = count.sum(0) if self._layout.particle_dims else count
        return (count > 0).expand(self.log_p.shape[1:])

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
        return self.log_prob_as_is(unscaled)

    def log_prob_as_is(self, sites: list[Site]) -> Tensor:
        """The log density of some of the sites, of shape ``[S, *cells]``, scaled and masked as they are."""
        return _sum_sites(sites, self._layout, 1.0, self.log_q.new_zeros(())).expand(self.log_p.shape)

    def log_p_of(self, traces: Traces) -> Tensor:
        """log p(x, z) of other particles of the same pair, summed as that of these.

        Arguments:
            traces: those of S' particles, vectorised, of which the model's alone is read.

        Returns:
            A tensor of shape ``[S', *cells]``.
        """
        sites = read_sites(traces, roles=("model",))
        sites = with_inner_scales(sites, own_scales(sites), self.plates, self._shares_scale)
        zero = self.log_p.new_zeros(())
        total = _sum_sites(sites, self._layout, self.kl_weight, zero)
        return total.expand(traces.num_particles, *self.log_p.shape[1:])

    def first_site(self, where: Callable[[Tensor], Tensor], role: str | None = None) -> Site | None:
        """The first site with a log density for which ``where`` holds anywhere, guide sites first."""
        for site in self.sites:
            if role in (None, site.role) and bool(where(self._layout.log_density(site)).any()):
                return site
        return None


class Layout(NamedTuple):
    """Where particles and cells lie among the batch dims."""

    particles: tuple[int, ...]  # their number, with local ones S and L
    particle_dims: tuple[int, ...]  # their dims; none where each run holds one of them
    kept_dims: tuple[int, ...]
    values: ValueDims = ValueDims()  # the dims of what the guide enumerates, where those are kept

    @property
    def num_runs(self) -> int:
        """Number of runs that hold all particles."""
        return 1 if self.particle_dims else math.prod(self.particles)

    def log_density(self, site: Site) -> Tensor:
        """The site's log density, scaled and masked, of shape ``[*particles, *cells]`` or ``[*cells]``.

        Particles and cells have size 1 where the density does not vary.
        """
        log_prob = scale_and_mask(site.log_prob, site.scale, site.message["mask"])
        return self.sum_to_cells(log_prob)

    def without_particles(self) -> Layout:
        """The layout of what does not vary over particles and has no dims for them."""
        return self._replace(particles=(), particle_dims=(), values=ValueDims())

    def sum_to_cells(self, tensor: Tensor) -> Tensor:
        keep = (*self.values.dims, *self.particle_dims, *self.kept_dims)
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
    before: tuple[Tensor, Tensor] | None = None,
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
        before: log p and log q of the same particles, vectorised, ``[S, *cells]``, that those of these traces
            are added to, site by site: the sum is that of one long trace, to the bit.

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
    kept = kept_plates(sites, plates, is_linear, warn_once)
    scale, sites, shared = split_scales(sites, kept)
    if not is_linear:
        warn_of_tempering(sites, warn_once)
    warn_of_masks(sites, warn_once)
    if kl_weight != 1:
        check_kl_weight(sites)
    dims = () if traces.particle_dim is None else (traces.particle_dim,)
    layout = Layout((traces.num_particles,), dims, dims_of_plates(kept))
    if not enumerated or is_stratified:
        particles = sum_to_particles(sites, layout, kept, scale, kl_weight, shared, before=before)
        return replace(particles, enumerated=enumerated, absorbed=absorbed) if enumerated else particles
    found = over_values(sites, kept, traces, is_linear)
    layout = layout._replace(values=found.dims)
    particles = sum_to_particles(found.counted, layout, kept, scale, kl_weight, shared, found.rescored)
    particles = replace(particles, sites=tuple(found.sites), enumerated=found.enumerated)
    if not found.dims.dims:
        return particles
    values = guide_values(
        found.enumerated, particles.guide_sites, traces, particles.log_prob_as_is, kl_weight
    )
    return replace(particles, values=values)


def sum_to_particles(
    sites: list[Site],
    layout: Layout,
    kept: tuple[CondIndepStackFrame, ...],
    scale: float | Tensor,
    kl_weight: float,
    shares_scale: bool,
    rescored: list[Site] | None = None,
    before: tuple[Tensor, Tensor] | None = None,
    like: Tensor | None = None,
) -> Particles:
    """Sum the sites' log densities within each cell.

    Arguments:
        sites: the sites, with what scales remain inside.
        layout: where particles and cells lie.
        kept: the kept plates.
        scale: the factor outside.
        kl_weight: the weight of the prior and of the guide's density.
        shares_scale: whether all sites share what their plates do not account for.
        rescored: the guide's sites at stopped values, where they are not those of ``sites``.
        before: as of :func:`collect`.
        like: a tensor of the device and dtype to take where there are no sites.
    """
    if isinstance(scale, Tensor):
        scale = layout.without_particles().sum_to_cells(scale)
    log_p, log_q, log_q_stopped = _log_densities(sites, layout, kl_weight, rescored, before, like)
    return Particles(log_p, log_q, scale, kept, tuple(sites), kl_weight, log_q_stopped, layout, shares_scale)


def check_kl_weight(sites: list[Site]) -> None:
    """Refuse a prior that has gone into a sum together with the likelihood, and cannot be weighted alone."""
    for site in (site for site in sites if site.role == "model"):
        latents = site.message.get("absorbed_latents")
        if latents:
            raise NotImplementedError(
                f"kl_weight other than 1 needs the prior apart from the likelihood, but the prior of "
                f"{', '.join(map(repr, latents))} depends on an enumerated site and is summed with it in "
                f"{site}. Use kl_weight=1, or sample the enumerated site in the guide (where the guide "
                "enumerates it, leave out stratified=True)."
            )


def _log_densities(
    sites: list[Site],
    layout: Layout,
    kl_weight: float,
    rescored: list[Site] | None = None,
    before: tuple[Tensor, Tensor] | None = None,
    like: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log p, log q and, if the guide was rescored, log q at stopped values, ``[*particles, *cells]``."""
    guide = [site for site in sites if site.role == "guide"]
    model = [site for site in sites if site.role == "model"]
    groups = [model, guide]
    if all(site.rescored is not None for site in guide):  # or where there are none
        groups.append([site.rescored_site() for site in guide] if rescored is None else rescored)
    like = sites[0].log_prob if sites else like
    zero = torch.zeros(()) if like is None else like.new_zeros(())
    starts = [*(before or (None, None)), None]
    totals = [
        _sum_sites(group, layout, kl_weight, zero, start)
        for group, start in zip(groups, starts, strict=False)
    ]
    shape, levels = totals[0].shape, len(layout.particles)
    if shape[:levels] != layout.particles or any(total.shape != shape for total in totals):
        shape = torch.broadcast_shapes(*(total.shape for total in totals))
        shape = torch.Size([*layout.particles, *shape[levels:]])
        totals = [total.expand(shape) for total in totals]
    log_p, log_q, *rest = totals
    return log_p, log_q, rest[0] if rest else None


def _sum_sites(
    sites: Iterable[Site], layout: Layout, kl_weight: float, zero: Tensor, start: Tensor | None = None
) -> Tensor:
    """The sites' log densities summed, ``[*particles, *cells]`` with size 1 where they do not vary."""
    rank = len(layout.kept_dims) + len(layout.particle_dims) + len(layout.values.dims)
    sums: list[Tensor | None] = [start] * layout.num_runs
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
            nothing = zero.reshape((1,) * rank)
            total = nothing if total is None else nothing + total
        totals.append(layout.values.join(total, bool(layout.particle_dims)))
    if layout.particle_dims:
        return totals[0]
    if len(totals) == 1:
        return totals[0].reshape(*layout.particles, *totals[0].shape)
    stacked = torch.stack(torch.broadcast_tensors(*totals))
    return stacked.reshape(*layout.particles, *stacked.shape[1:])
