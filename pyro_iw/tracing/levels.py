r"""Log-weights on two levels: global particles, and for each of them local ones in the plates that are named.

With S particles :math:`g_s` of the global latents and for each of them and each cell :math:`n` of a local
plate L particles :math:`z_{snl}` of the local ones,

.. math::
    \ell_{snl} = \log p(z_{snl}, x_n \mid g_s) - \log q(z_{snl} \mid g_s, x_n), \qquad
    \ell_s = \log p(g_s) - \log q(g_s) + \sum_n c_n U(\ell_{sn\cdot}),

where :math:`U` is a bound of the local log-weights and :math:`c_n = N / B` on a minibatch of B out of N. What
lies outside of all local plates, observations included, counts in the first two terms.

The cells of a local plate are its indices and those of plates outside of it; plates inside are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .._support.warn import warn
from .cells import (
    check_sizes,
    check_subsampling,
    common_plates,
    dims_of_plates,
    is_subsampled,
    split_scales,
    subsampling,
    warn_of_tempering,
    with_inner_scales,
)
from .local_particles import local_plate_of
from .masks import warn_of_masks
from .messages import is_delta
from .particles import Layout, Particles, check_kl_weight, sum_to_particles
from .sites import Site, outside_depends_on_inside, plate_key, read_sites
from .traces import Traces

__all__ = [
    "LocalScale",
    "LogWeights",
    "Scales",
    "TwoLevels",
    "check_local_plates",
    "check_outside",
    "collect_levels",
]


class LogWeights(NamedTuple):
    """Log-weights of particles on two levels, in nats.

    Attributes:
        top: log p - log q of what lies outside of the local plates, of shape ``[S, *cells]``.
        local: those of the local particles of each plate, of shape ``[S, L, *cells]`` with its own L and
            cells.
    """

    top: Tensor
    local: tuple[Tensor, ...]


class LocalScale(NamedTuple):
    """How the bounds of a local plate's cells add up.

    Attributes:
        scale: the factor c of a cell's bound, a number or a tensor that broadcasts to the cells.
        summed: which of the cells' dims are no cells of the upper level, counted from the first.
    """

    scale: float | Tensor
    summed: tuple[int, ...]

    def add_up(self, per_cell: Tensor) -> Tensor:
        """The sum over what is one cell above, of ``[*particles, *cells]`` with one dim of particles."""
        per_cell = self.scale * per_cell
        return per_cell.sum([1 + dim for dim in self.summed]) if self.summed else per_cell

    def spread(self, per_top: Tensor) -> Tensor:
        """The factor times ``[S, *cells]`` of the upper level, so that it broadcasts to ``[S, *cells]``."""
        for dim in self.summed:  # in increasing order
            per_top = per_top.unsqueeze(1 + dim)
        return self.scale * per_top


class Scales(NamedTuple):
    """What particles on two levels are scaled by.

    Attributes:
        outside: the factor outside of both bounds.
        local: how each local plate's cells add up.
    """

    outside: float | Tensor
    local: tuple[LocalScale, ...]

    def total(self, top: Tensor, bounds: Iterable[Tensor]) -> Tensor:
        """The particles' log-weights with the bounds of their local plates' cells, of shape ``[S, *cells]``.

        Arguments:
            top: their log-weights outside of the local plates, of that shape.
            bounds: those of each local plate, of shape ``[S, *cells]`` with its own cells.
        """
        for level, values in zip(self.local, bounds, strict=True):
            top = top + level.add_up(values)
        return top


@dataclass(frozen=True)
class TwoLevels:
    r"""S particles of the global latents, and the local particles of each.

    .. math:: \ell_{snl} = \log p_\theta(z_{snl}, x_n \mid g_s) - \log q_\phi(z_{snl} \mid g_s, x_n)

    Attributes:
        top: the particles' densities outside of the local plates, of shape ``[S, *cells]``.
        local: by the name of its plate, those of the local particles, of shape ``[S, L, *cells]``.
        scale: what they are scaled by.

    Example:
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     mean = pyro.sample("mean", dist.Normal(x.mean(), 0.5))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal((mean + x) / 2, 0.8))
        >>> from pyro_iw.bounds import IWAE
        >>> loss = LocallyEnhancedELBO(local=IWAE(8), over="data", outer=IWAE(4))
        >>> levels = loss.particles(model, guide, torch.randn(20))
        >>> levels.top.log_weights.shape, levels.local["data"].log_weights.shape
        (torch.Size([4]), torch.Size([4, 8, 20]))
    """

    top: Particles
    local: dict[str, Particles]
    scale: Scales
    # The guide enumerates nothing.
    values: ClassVar[None] = None
    enumerated: ClassVar[tuple[Site, ...]] = ()
    absorbed: ClassVar[tuple[Site, ...]] = ()

    @property
    def log_weights(self) -> LogWeights:
        """Log densities of the model less those of the guide, on each level."""
        return LogWeights(self.top.log_weights, tuple([level.log_weights for level in self.local.values()]))

    @property
    def statistics(self) -> LogWeights:
        """What bound and weights follow from: the log-weights."""
        return self.log_weights

    @property
    def levels(self) -> list[Particles]:
        """Both levels, the upper one first."""
        return [self.top, *self.local.values()]

    @property
    def plates(self) -> tuple[CondIndepStackFrame, ...]:
        """The plates whose cells get a bound each."""
        return self.top.plates

    @property
    def cells(self) -> list:
        """The cells of all levels, and their number."""
        return [level.cells for level in self.levels]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that carry a density, those outside of the local plates first."""
        return tuple([site for level in self.levels for site in level.sites])

    @property
    def guide_sites(self) -> list[Site]:
        """The guide's sites."""
        return [site for site in self.sites if site.role == "guide"]

    @property
    def nonreparameterized_sites(self) -> list[Site]:
        """The guide's sites without a pathwise gradient whose density has parameters."""
        return [site for level in self.levels for site in level.nonreparameterized_sites]

    @property
    def log_q_weight(self) -> tuple[float | Tensor, ...]:
        """That of each level, see :class:`Particles`."""
        return tuple([level.log_q_weight for level in self.levels])

    def first_site(self, where: Callable[[Tensor], Tensor], role: str | None = None) -> Site | None:
        """The first site with a log density for which ``where`` holds anywhere."""
        found = (level.first_site(where, role) for level in self.levels)
        return next((site for site in found if site is not None), None)


def check_local_plates(sites: Sequence[Site], names: Sequence[str]) -> dict[str | None, list[Site]]:
    """The sites by their local plate, None for those outside.

    Arguments:
        sites: all sites of a pair.
        names: the names of the local plates.

    Raises:
        ValueError: if a plate is not there, runs as a Python loop, or has no latent that the guide draws in
            it; or if a latent lies inside of a plate in one of model and guide and outside in the other;
            naming it.
    """
    frames = {frame.name: frame for site in sites for frame in site.frames}
    for name in names:
        if name not in frames:
            raise ValueError(
                f"Local particles are asked for in plate {name!r}, but model and guide have no such plate "
                f"around their sites; they have {sorted(frames)}."
            )
        if not frames[name].vectorized:
            raise ValueError(
                f"Plate {name!r} is a Python loop (for i in pyro.plate(...)); only vectorised plates have "
                f"local particles. Write it as with pyro.plate({name!r}, ...):"
            )
    by_plate: dict[str | None, list[Site]] = {None: [], **{name: [] for name in names}}
    for site in sites:
        by_plate[local_plate_of(site.name, site.frames, names)].append(site)
    for name in names:
        _check_draws(name, by_plate)
        check_sizes(by_plate[name], frames[name])
    return by_plate


def _check_draws(name: str, by_plate: Mapping[str | None, list[Site]]) -> None:
    """Refuse a local plate of which the guide draws nothing, or whose latents it draws elsewhere."""
    inside, outside = by_plate[name], by_plate[None]
    latents = {site.name for site in inside if site.is_latent and site.role == "model"}
    drawn = [site for site in inside if site.is_latent and site.role == "guide"]
    elsewhere = [site for site in outside if site.role == "guide" and site.name in latents]
    if elsewhere:
        raise ValueError(
            f"Latent site(s) {', '.join(repr(site.name) for site in elsewhere)} lie in plate {name!r} in the "
            "model, but outside of it in the guide. Sample them inside the plate in both."
        )
    names = {site.name for site in drawn}
    stray = [site for site in outside if site.role == "model" and site.is_latent and site.name in names]
    if stray:
        raise ValueError(
            f"Latent site(s) {', '.join(repr(site.name) for site in stray)} lie outside of plate {name!r} in "
            "the model, but inside of it in the guide. Sample them outside of the plate in both."
        )
    if all(is_delta(site.message["fn"]) for site in drawn):
        raise ValueError(
            f"The guide draws nothing inside plate {name!r}"
            + (f" (its latents {sorted(latents)} are functions of sites outside)" if latents else "")
            + ", so there is nothing that local particles could differ in. Take a guide that samples the "
            "plate's latents inside of it, such as AutoNormal (AutoDiagonalNormal and its kin sample one "
            "joint latent), or name another plate."
        )


def collect_levels(
    traces: Traces,
    numbers: Mapping[str, int],
    is_linear: bool = False,
    local_is_linear: Mapping[str, bool] | None = None,
    kl_weight: float = 1.0,
    warn_once: Callable[[str], None] = warn,
) -> TwoLevels:
    """Read the log-weights of both levels off the traces.

    Arguments:
        traces: the traces of S particles and their local ones.
        numbers: the number of local particles, by the name of their plate.
        is_linear: whether the upper bound is the mean of its log-weights, for which a minibatch is right.
        local_is_linear: by plate, whether its bound is.
        kl_weight: as of :func:`~pyro_iw.tracing.particles.collect`.
        warn_once: called with a message if a scale stays inside a logarithm, or a latent is masked in the
            model alone.

    Raises:
        ValueError: as :func:`check_local_plates`; if a plate is subsampled and the upper bound is not linear;
            if a site outside of the local plates depends on a latent inside; and as :func:`read_sites`.
        NotImplementedError: as :func:`read_sites`.
    """
    sites = read_sites(traces)
    _refuse_enumerated(sites)
    by_plate = check_local_plates(sites, list(numbers))
    warn_of_masks(sites, warn_once)
    if kl_weight != 1:
        check_kl_weight(sites)
    kept = _in_order(frame for frame in common_plates(sites) if frame.name not in numbers)
    for frame in kept:
        check_sizes(sites, frame)
    cells = {name: _cells(by_plate[name], name, kept) for name in numbers}
    if not is_linear:
        _check_minibatches(cells, kept)
        check_subsampling(sites, (*kept, *(frame for frames in cells.values() for frame in frames)))
    outside, scaled, shared = split_scales(sites, kept)
    where = [local_plate_of(site.name, site.frames, numbers) for site in sites]
    above = [site for site, name in zip(scaled, where, strict=True) if name is None]
    if not is_linear:
        warn_of_tempering(above, warn_once)
    dims = () if traces.particle_dim is None else (traces.particle_dim,)
    per_particle = 1 if dims else max(numbers.values())
    layout = Layout((traces.num_particles,), dims, dims_of_plates(kept))
    above = _first_runs(above, per_particle)
    like = sites[0].log_prob  # nothing need be outside of the local plates
    top = sum_to_particles(above, layout, kept, outside, kl_weight, shared, like=like)
    local, scales = {}, []
    for name, number in numbers.items():
        scale, inside = _split_local_scales(by_plate[name], cells[name], kept, shared)
        if not (local_is_linear or {}).get(name, False):
            check_subsampling(by_plate[name], cells[name])
            warn_of_tempering(inside, warn_once)
        if not is_linear:
            warn_of_tempering([site._replace(scale=scale) for site in inside], warn_once)
        local_dims = () if traces.local_dim is None else (*dims, traces.local_dim)
        layout = Layout((traces.num_particles, number), local_dims, dims_of_plates(cells[name]))
        inside = _first_runs(inside, per_particle, number)
        local[name] = sum_to_particles(inside, layout, cells[name], scale, kl_weight, shared)
        keys = {plate_key(frame) for frame in kept}
        summed = tuple([i for i, frame in enumerate(cells[name]) if plate_key(frame) not in keys])
        scales.append(LocalScale(local[name].scale, summed))
    return TwoLevels(top, local, Scales(top.scale, tuple(scales)))


def _refuse_enumerated(sites: Iterable[Site]) -> None:
    """Refuse sites that the guide enumerates, of which there is no particle."""
    names = ", ".join(dict.fromkeys(repr(site.name) for site in sites if site.is_enumerated))
    if names:
        raise NotImplementedError(
            f"Site(s) {names} of the guide are enumerated in parallel, which local particles do not go "
            "together with. Leave them out of the guide and mark them in the model, to have them summed out "
            "there, or sample them: remove their infer={'enumerate': 'parallel'}."
        )


def _in_order(frames: Iterable[CondIndepStackFrame]) -> tuple[CondIndepStackFrame, ...]:
    return tuple(sorted(frames, key=lambda frame: frame.dim or 0))


def _cells(
    inside: Sequence[Site], name: str, kept: tuple[CondIndepStackFrame, ...]
) -> tuple[CondIndepStackFrame, ...]:
    """The plates whose indices are a local plate's cells: it, and those around it at all of its sites."""
    common = common_plates(inside)
    above = {plate_key(frame) for frame in kept}

    def is_around(frame: CondIndepStackFrame) -> bool:
        names = [[other.name for other in site.frames] for site in inside]
        return all(order.index(frame.name) <= order.index(name) for order in names)

    return _in_order(frame for frame in common if plate_key(frame) in above or is_around(frame))


def _check_minibatches(
    cells: Mapping[str, tuple[CondIndepStackFrame, ...]], kept: tuple[CondIndepStackFrame, ...]
) -> None:
    """Refuse a minibatch of a local plate inside of an upper bound that is not linear."""
    above = {plate_key(frame) for frame in kept}
    for name, frames in cells.items():
        for frame in frames:
            if is_subsampled(frame) and plate_key(frame) not in above:
                around = "" if frame.name == name else f", around plate {name!r} with local particles,"
                raise ValueError(
                    f"Plate {frame.name!r}{around} is subsampled ({frame.size} of "
                    f"{frame.full_size}), and the outer bound is no plain mean: the logarithm of a mean over "
                    "particles of exp(N / B times a minibatch's sum) is no bound, nor unbiased. Take "
                    "outer=MIWAE(M, 1), the mean over M particles, or run the plate on all of its data."
                )


def _split_local_scales(
    inside: list[Site],
    cells: tuple[CondIndepStackFrame, ...],
    kept: tuple[CondIndepStackFrame, ...],
    shared: bool,
) -> tuple[float | Tensor, list[Site]]:
    """The factor of a cell's bound, less what goes outside of both, and the sites with what stays inside."""
    above = {plate_key(frame) for frame in kept}
    minibatch = math.prod(subsampling(frame) for frame in cells if plate_key(frame) not in above)
    if shared:  # what they share with all other sites has gone outside
        return minibatch, with_inner_scales(inside, [1.0] * len(inside), cells, True)
    scale, inside, _ = split_scales(inside, cells)
    return scale / math.prod(subsampling(frame) for frame in kept), inside


def _first_runs(sites: list[Site], per_particle: int, number: int = 1) -> list[Site]:
    """The sites in the first ``number`` of a particle's runs, counted through.

    Raises:
        ValueError: under validation, if a site that is not read from all of them differs between them.
    """
    if per_particle == 1:
        return sites
    if number == 1 and is_validation_enabled():
        _check_equal(sites, per_particle)
    return [
        site._replace(pair=site.pair // per_particle * number + site.pair % per_particle)
        for site in sites
        if site.pair % per_particle < number
    ]


def check_outside(traces: Traces) -> None:
    """Refuse sites outside of the local plates that differ between the local particles of one.

    Arguments:
        traces: those of particles that ran one by one.

    Raises:
        ValueError: naming the site.
    """
    sites = read_sites(traces)
    outside = [site for site in sites if local_plate_of(site.name, site.frames, traces.local) is None]
    _check_equal(outside, max(traces.local.values()))


def _check_equal(sites: Iterable[Site], per_particle: int) -> None:
    first: dict[Any, Site] = {}
    for site in sites:
        before = first.setdefault((site.role, site.name, site.pair // per_particle), site)
        if not torch.allclose(before.log_prob, site.log_prob, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ValueError(outside_depends_on_inside(site, "differs between the local particles of one"))
