r"""Filtered sequences as ArviZ knows posteriors: trajectories with a dim ``time``, and what the filters say.

=====================  =========================================================================
group                  variables
=====================  =========================================================================
posterior              latent sites of the steps, ``[chain=1, draw, time, *batch, *event]``
filtering              ``{site}_mean`` and ``{site}_sd`` given the data so far, ``[time, *batch, *event]``
filter_stats           ``ess``, ``num_ancestors``, ``log_increment`` by ``[time, *cells]``;
                       ``log_marginal``, ``monte_carlo_error`` by ``[*cells]``, in nats
observed_data          observed sites of the steps, ``[time, *batch, *event]``
=====================  =========================================================================
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .._support.arguments import positive_integer
from .._support.optional import is_arviz_0, require
from .._support.version import __version__

if TYPE_CHECKING:
    from .filtered import FilteredSequences

__all__ = ["to_arviz"]

_LEADING = ("chain", "draw", "time")

#: A group under construction: each variable's dims and values.
Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]


def to_arviz(
    filtered: FilteredSequences,
    *,
    num_samples: int = 500,
    smoothed: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """Convert filtered sequences for ArviZ.

    Arguments:
        filtered: the sequences.
        num_samples: the number of trajectories; an integer >= 1.
        smoothed: whether they are :meth:`~pyro_iw.FilteredSequences.smooth`, or else
            :meth:`~pyro_iw.FilteredSequences.trajectories` along the genealogy, for models that cannot be
            smoothed.
        coords: labels of a dim, by its name; the default counts from 0.

    Returns:
        An ``arviz.InferenceData`` with ArviZ 0.x, an ``xarray.DataTree`` with ArviZ >= 1.

    Raises:
        ImportError: if ArviZ is missing.
        NotImplementedError: as :meth:`~pyro_iw.FilteredSequences.smooth`.
        ValueError: if ``coords`` names an unknown dim or has the wrong length.
    """
    positive_integer("num_samples", num_samples)
    wrap = _container()
    draws = filtered.smooth(num_samples) if smoothed else filtered.trajectories(num_samples)
    posterior: Variables = {}
    filtering: Variables = {}
    for name, values in draws.items():
        site = filtered.sites[name]
        posterior[name] = _variable(name, _array(values)[None], site.frames, site.event_dim, _LEADING)
        for kind, moment in (("mean", filtered.mean(name)), ("sd", filtered.variance(name).sqrt())):
            label = f"{name}_{kind}"
            filtering[label] = _variable(name, _array(moment), site.frames, site.event_dim, ("time",))
    count = len(filtered.frames)
    cells = [frame._replace(dim=i - count) for i, frame in enumerate(filtered.frames)]
    over_time = {
        "ess": filtered.ess,
        "num_ancestors": filtered.num_ancestors(),
        "log_increment": filtered.log_increments,
    }
    once = {"log_marginal": filtered.log_marginal, "monte_carlo_error": filtered.monte_carlo_error}
    groups: dict[str, Variables] = {
        "posterior": posterior,
        "filtering": filtering,
        "filter_stats": {
            **{
                name: _variable(name, _array(value), cells, 0, ("time",)) for name, value in over_time.items()
            },
            **{name: _variable(name, _array(value), cells, 0, ()) for name, value in once.items()},
        },
        "observed_data": {
            name: _variable(name, _array(site.values), site.frames, site.event_dim, ("time",))
            for name, site in filtered.observed.items()
        },
    }
    labels = _labels(groups, coords or {})
    return wrap({name: _dataset(group, labels, filtered) for name, group in groups.items() if group})


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _variable(
    name: str,
    array: np.ndarray,
    frames: Sequence[CondIndepStackFrame],
    event_dim: int,
    leading: tuple[str, ...],
) -> tuple[tuple[str, ...], np.ndarray]:
    """Dims and values of a variable, of shape ``[*leading, *batch, *event]``, over all of its plates."""
    front, event = array.shape[: len(leading)], array.shape[array.ndim - event_dim :]
    batch = list(array.shape[len(leading) : array.ndim - event_dim])
    plates = {frame.dim: frame for frame in frames if frame.dim is not None}
    rank = max([len(batch), *(-dim for dim in plates)])
    batch = [1] * (rank - len(batch)) + batch
    array = array.reshape((*front, *batch, *event))
    for dim, frame in plates.items():
        batch[dim] = max(batch[dim], frame.size)
    array = np.broadcast_to(array, (*front, *batch, *event)).copy()
    names = [plates[dim].name if dim in plates else f"{name}_dim_{dim + rank}" for dim in range(-rank, 0)]
    names += [f"{name}_dim_{rank + i}" for i in range(event_dim)]
    return (*leading, *names), array


def _labels(groups: Mapping[str, Variables], coords: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """Labels of all dims, as given or counted."""
    sizes = {
        dim: size
        for group in groups.values()
        for dims, array in group.values()
        for dim, size in zip(dims, array.shape, strict=True)
    }
    for name, given in coords.items():
        if name not in sizes:
            raise ValueError(f"coords names dim {name!r}, but there are only {sorted(sizes)}.")
        if len(given) != sizes[name]:
            raise ValueError(f"coords has {len(given)} labels for dim {name!r} of size {sizes[name]}.")
    return {
        name: np.asarray(coords[name]) if name in coords else np.arange(size) for name, size in sizes.items()
    }


def _dataset(group: Variables, labels: Mapping[str, np.ndarray], filtered: FilteredSequences) -> Any:
    xarray = require("xarray", "arviz", "to_arviz")
    used = {dim for dims, _ in group.values() for dim in dims}
    attributes = {
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "inference_library": "pyro_iw",
        "inference_library_version": __version__,
        "num_particles": filtered.num_particles,
        "num_filters": filtered.num_filters,
    }
    return xarray.Dataset(dict(group), coords={dim: labels[dim] for dim in used}, attrs=attributes)


def _container() -> Any:
    """What makes one object of the groups, in the installed ArviZ's own kind."""
    arviz = require("arviz", "arviz", "to_arviz")
    if is_arviz_0(arviz):
        return lambda groups: arviz.InferenceData(**groups)
    return require("xarray", "arviz", "to_arviz").DataTree.from_dict
