r"""Discrete sites of the guide that are enumerated, not sampled.

Sites of the guide marked ``infer={"enumerate": "parallel"}`` take each of their values at once, on a batch
dim of their own left of the particles', as Pyro's ``EnumMessenger`` sets them out; all that depends on them
is computed for each value, and what is sampled given them is drawn for each value. What is here tells those
sites and their dims from others, and refuses by name what there is no bound for. How the values are summed
over is in :mod:`~pyro_iw.tracing.over_values`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .messages import is_latent

if TYPE_CHECKING:
    from .sites import Site
    from .traces import Traces

__all__ = [
    "GuideValues",
    "ValueDims",
    "guide_values",
    "ids_of",
    "is_enumerated_in_guide",
    "is_marked",
    "joint_values",
    "refuse_messenger",
    "spread_over_values",
    "value_dims",
    "without_densities",
]


class GuideValues(NamedTuple):
    """Densities of the values that the guide enumerates, with a joint value on a dim of its own.

    Attributes:
        log_q: log q(y | x), unscaled and unmasked, of shape ``[S, Y, *cells]``, in nats.
        counted: the same, scaled and masked, as it counts in the log-weights; of the same shape.
        is_free: whether it is known not to depend on the particles.
        names: the enumerated sites.
        kl_weight: what ``counted`` is weighted by there.
    """

    log_q: Tensor
    counted: Tensor
    is_free: bool
    names: tuple[str, ...]
    kl_weight: float


def without_densities(values: GuideValues | None) -> GuideValues | None:
    """What is known of the values, without the graph of their densities."""
    if values is None:
        return None
    nothing = values.log_q.new_empty(0)
    return values._replace(log_q=nothing, counted=nothing)


def is_marked(message: Any) -> bool:
    """Whether a site is latent, and marked to be enumerated in parallel."""
    return is_latent(message) and (message["infer"] or {}).get("enumerate") == "parallel"


def is_enumerated_in_guide(message: Any) -> bool:
    """Whether a site of a guide's trace has been enumerated."""
    return is_marked(message) and message["infer"].get("_enumerate_dim") is not None


def ids_of(trace: Any) -> frozenset[int]:
    """What Pyro knows the enumerated sites of a guide's trace by, apart from their dims."""
    sites = (site for site in trace.nodes.values() if is_enumerated_in_guide(site))
    return frozenset(site["infer"]["_dim_to_id"][site["infer"]["_enumerate_dim"]] for site in sites)


def value_dims(message: Any, log_prob: Tensor, ids: frozenset[int]) -> dict[int, int]:
    """The dims of a log density that hold values of the guide's sites, and the ids of those sites."""
    if not ids:
        return {}
    known = (message["infer"] or {}).get("_dim_to_id", {})
    rank = log_prob.dim()
    return {dim: id_ for dim, id_ in known.items() if id_ in ids and rank >= -dim and log_prob.shape[dim] > 1}


class ValueDims(NamedTuple):
    """Where values of the enumerated sites lie among batch dims, the leftmost dim first, and their sizes."""

    dims: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, sites: Iterable[Site]) -> ValueDims:
        """Those of some enumerated sites."""
        sizes = {site.message["infer"]["_enumerate_dim"]: _size(site) for site in sites}
        dims = tuple(sorted(sizes))
        return cls(dims, tuple(sizes[dim] for dim in dims))

    def join(self, tensor: Tensor, has_particles: bool) -> Tensor:
        """Of ``[*values, S, *cells]`` or ``[*values, *cells]``, ``[S, Y, *cells]`` or ``[Y, *cells]``."""
        if not self.dims:
            return tensor
        count = len(self.dims)
        joined = tensor.expand(*self.sizes, *tensor.shape[count:]).flatten(0, count - 1)
        return joined.transpose(0, 1) if has_particles else joined

    def to_batch(self, per_cell: Tensor, kept_dims: Sequence[int], particle_dims: Sequence[int]) -> Tensor:
        """``[S, Y, *cells]`` so that it broadcasts against values, each joint value at the dims of its sites.

        Returns:
            A tensor of shape ``[*values, S, *batch]``; ``[S, *values, *batch]`` where particles have no dim.
        """
        apart = per_cell.unflatten(1, self.sizes)
        shape = [1] * -min(self.dims)
        for dim, size in zip((*self.dims, *kept_dims), apart.shape[1:], strict=True):
            shape[dim] = size
        if not particle_dims:
            return apart.reshape(-1, *shape)
        shape[particle_dims[0]] = len(apart)
        return apart.movedim(0, len(self.dims)).reshape(shape)


def _size(site: Site) -> int:
    dim = site.message["infer"]["_enumerate_dim"]
    return site.log_prob.shape[dim] if site.log_prob.dim() >= -dim else 1


def refuse_messenger(trace: Any) -> None:
    """Refuse a guide that runs the model itself, and has a site to be enumerated.

    Raises:
        NotImplementedError: naming the site.
    """
    for name, site in trace.nodes.items():
        if is_marked(site):
            raise NotImplementedError(
                f"Site {name!r} of the guide is to be enumerated in parallel, but the guide is a guide "
                "messenger, which runs the model itself. Write the guide as a function or an AutoGuideList, "
                f"or remove its infer={{'enumerate': 'parallel'}} to have {name!r} sampled."
            )


def spread_over_values(through: Callable[..., Tensor], guide_trace: Any) -> Callable[..., Tensor]:
    """Expand what passes through to the dims of all enumerated sites, where it carries a gradient."""
    sizes: dict[int, int] = {}
    for site in guide_trace.nodes.values():
        if is_enumerated_in_guide(site):
            dim = site["infer"]["_enumerate_dim"]
            shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
            sizes[dim] = shape[dim]

    def spread(value: Tensor, event_dim: int, particle: Any, site: Any) -> Tensor:
        if value.requires_grad and sizes:
            rank = max(value.dim() - event_dim, -min(sizes))
            value = value.reshape((1,) * (rank + event_dim - value.dim()) + value.shape)
            shape = list(value.shape)
            for dim, size in sizes.items():
                shape[dim - event_dim] = size
            value = value.expand(shape)
        return through(value, event_dim, particle, site)

    return spread


def joint_values(sites: Sequence[Site], kept: Sequence[CondIndepStackFrame], num_pairs: int) -> None:
    """Refuse enumerated sites whose joint values are not those of a cell.

    Arguments:
        sites: the guide's enumerated sites.
        kept: the kept plates.
        num_pairs: the number of pairs of traces that the sites are from.

    Raises:
        NotImplementedError: naming the sites.
    """
    keys = {(frame.name, frame.dim) for frame in kept}
    for site in sites:
        deeper = [frame for frame in site.frames if frame.vectorized and (frame.name, frame.dim) not in keys]
        if deeper:
            plates = ", ".join(repr(frame.name) for frame in deeper)
            raise NotImplementedError(
                f"Site {site.name!r} of the guide is enumerated in plate(s) {plates}, which have no "
                "importance weight of their own: outside the logarithm its sum would be over the values of "
                "all entries jointly. Pass stratified=True, which sums inside the logarithm entry by entry, "
                "use K=1 (the ELBO), move every latent, observed and factor site into the plate(s), or "
                f"sample {site.name!r} (without its infer={{'enumerate': 'parallel'}}) with "
                "estimator='vimco'."
            )
    for pair in range(num_pairs):
        own = [site for site in sites if site.pair == pair]
        seen: dict[int, str] = {}
        for site in own:
            dim = site.message["infer"]["_enumerate_dim"]
            if dim in seen:
                raise NotImplementedError(
                    f"Sites {seen[dim]!r} and {site.name!r} of the guide are enumerated on the same dim, as "
                    "pyro.markov lets them, but outside the logarithm all their values are taken jointly. "
                    "Pass stratified=True, use K=1 (the ELBO), or leave out pyro.markov in the guide to have "
                    "a dim for each."
                )
            seen[dim] = site.name
        if ValueDims.of(own) != ValueDims.of([site for site in sites if site.pair == 0]):
            raise NotImplementedError(
                f"The guide enumerates {', '.join(repr(site.name) for site in own)} for one particle, and "
                "others or in another order for the first one. Enumerate the same sites for every particle."
            )


def guide_values(
    enumerated: Sequence[Site],
    guide: Sequence[Site],
    traces: Traces,
    log_prob: Callable[[list[Site]], Tensor],
    kl_weight: float,
) -> GuideValues:
    """The densities of joint values.

    Arguments:
        enumerated: the enumerated sites.
        guide: the guide's sites, in the order in which they ran.
        traces: the traces that they are from.
        log_prob: sums log densities as they are to count, unscaled or not.
        kl_weight: the weight of the prior and of the guide's density.
    """
    plain = [site._replace(scale=1.0, message={**site.message, "mask": None}) for site in enumerated]
    log_q = counted = log_prob(plain)
    if any(site.message["mask"] is not None or not _is_one(site.scale) for site in enumerated):
        counted = log_prob(list(enumerated))
    free = _is_free(enumerated, guide, traces.particle_dim)
    names = tuple(dict.fromkeys(site.name for site in enumerated))
    return GuideValues(log_q, counted, free, names, kl_weight)


def _is_one(scale: Any) -> bool:
    return not isinstance(scale, Tensor) and scale == 1


def _is_free(sites: Sequence[Site], guide: Sequence[Site], particle_dim: int | None) -> bool:
    """Whether the enumerated sites are known to have one density for all particles.

    That is so of sites that come before any draw, and where the particles run in one pass of those whose
    parameters do not vary along their dim.

    Arguments:
        sites: the enumerated sites.
        guide: the guide's sites, in the order in which they ran.
        particle_dim: the dim of the particles, None where each pair of traces holds one.
    """
    names = {site.name for site in sites}
    order = [site for site in guide if site.is_latent and site.pair == 0]
    last = max(index for index, site in enumerate(order) if site.name in names)
    if all(site.name in names for site in order[:last]):
        return True
    return particle_dim is not None and not any(_varies(site.message["fn"], particle_dim) for site in sites)


def _varies(fn: Any, dim: int) -> bool:
    """Whether a parameter of a distribution, or of one that it is made of, varies along a batch dim."""
    rank = len(getattr(fn, "batch_shape", ()))
    for value in vars(fn).values():
        if isinstance(value, Tensor):
            if value.dim() >= rank >= -dim and value.shape[rank + dim] > 1 and value.stride(rank + dim) != 0:
                return True
        elif isinstance(value, torch.distributions.Distribution) and _varies(value, dim):
            return True
    return False
