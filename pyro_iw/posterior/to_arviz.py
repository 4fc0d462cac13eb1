r"""Importance samples as ArviZ knows posteriors: named dims, groups, one file.

The draws of the posterior are resampled by weight, so that what ArviZ computes from equally weighted draws
(summaries, PSIS-LOO, predictive checks) holds for them. The copies of a particle stand side by side, the
particles themselves in random order: ``ess_bulk`` and ``mcse_mean`` of ``az.summary`` then see the copies as
the correlation of a chain, and follow the ESS of the weights. They see nothing of what no particle has
reached; k̂ may. R̂ needs a second run, joined as a second chain.

=====================  =========================================================================
group                  variables
=====================  =========================================================================
posterior              latent, enumerated and deterministic sites, ``[chain=1, draw, *batch, *event]``
sample_stats           of each draw, ``[chain, draw, *cells]``: ``lp``, the log joint density of latents
                       and data, ``log_q``, the guide's, and ``log_weight``
weight_stats           of the weights in each cell, ``[chain, *cells]``: ``ess``, ``khat``,
                       ``log_marginal``; with local particles also ``{plate}_ess`` and ``{plate}_khat``
log_likelihood         observed sites, ``[chain, draw, *batch]``, in nats; 0 where masked; enumerated
                       sites summed out, see :meth:`~pyro_iw.ImportanceSamples.log_likelihood`; in the
                       cells of a local plate the local latents are integrated out, and what is observed in a
                       cell is one number
posterior_predictive   observed sites sampled anew, ``[chain, draw, *batch, *event]``
prior                  latent and deterministic sites drawn from the model
prior_predictive       observed sites drawn from the model
observed_data          what was observed
constant_data          tensor arguments of the model that are not observed themselves
=====================  =========================================================================

References:
    | ArviZ a unified library for exploratory analysis of Bayesian models in Python (Kumar et al., 2019),
      https://doi.org/10.21105/joss.01143
"""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .._support.arguments import positive_integer
from .._support.devices import wide_dtype
from .._support.optional import is_arviz_0, require
from .._support.version import __version__

if TYPE_CHECKING:
    from ..tracing.latents import Latent
    from .predictive import Observed
    from .samples import ImportanceSamples

__all__ = ["to_arviz"]

_DRAWS = ("chain", "draw")

#: A group under construction: each variable's dims and values.
Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]


def to_arviz(
    samples: ImportanceSamples,
    *,
    num_samples: int = 1000,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    log_likelihood: bool = True,
    predictive: bool = True,
    prior: bool = True,
) -> Any:
    """Convert importance samples for ArviZ.

    Arguments:
        samples: the samples; smoothed ones are resampled by their smoothed weights.
        num_samples: number of draws from posterior and prior; an integer >= 1.
        coords: labels of a dim, by its name. The default counts from 0, for a subsampled plate gives its
            indices.
        dims: names for the rightmost dims of a site, by the site's name. By default dims of plates have the
            plate's name, and others are called ``{site}_dim_{i}``.
        constant_data: for the group of that name, by variable. The default is every tensor among the model's
            arguments that is not observed.
        log_likelihood: whether to include the group of that name.
        predictive: whether to include posterior_predictive.
        prior: whether to include prior and prior_predictive.

    Returns:
        An ``arviz.InferenceData`` with ArviZ 0.x, an ``xarray.DataTree`` with ArviZ >= 1. Warns where k̂ says
        that the guide misses mass.

    Raises:
        ImportError: if ArviZ is missing.
        ValueError: if prior or observed sites cannot be sampled, ``dims`` names an unknown site or has too
            many names for one, two variables have a dim of one name and different sizes, a dim is called as a
            variable beside it, ``coords`` names an unknown dim or has the wrong length, or a cell has no
            living particle.

    Example:
        >>> samples = ImportanceSampler(model, guide, num_particles=2000)(data)
        >>> posterior = samples.to_arviz(num_samples=500, coords={"data": ["a", "b", "c"]}).posterior
        >>> dict(posterior["z"].sizes)
        {'chain': 1, 'draw': 500, 'data': 3}
    """
    positive_integer("num_samples", num_samples)
    wrap = _container()
    names = _Names(samples, dims or {})
    samples.warn_of_tails()
    indices = _copies_together(samples.resample(num_samples), samples.num_particles)
    indices = samples.on_all_levels(indices)
    draws = samples.complete(indices)
    latents = samples.as_latents(draws)
    shown = samples.rerun.observed(latents)
    data = {name: site for name, site in shown.items() if site.log_prob is not None}
    if constant_data is None:
        constant_data = _constants(samples, [site.values for site in data.values()])
    likelihood = samples.pointwise(indices, latents, shown) if log_likelihood else {}
    names.check({*latents, *shown, *constant_data, *likelihood})

    def on_draws(values: Mapping[str, Tensor], sites: Mapping[str, Latent | Observed]) -> Variables:
        return {
            name: names.variable(name, values[name], site.frames, site.event_dim, _DRAWS)
            for name, site in sites.items()
        }

    deterministic = {name: site for name, site in shown.items() if site.log_prob is None}
    groups: dict[str, Variables] = {
        "posterior": {
            **on_draws(draws, latents),
            **on_draws({name: site.values for name, site in deterministic.items()}, deterministic),
        },
        **_stats(samples, indices, names),
        "observed_data": {
            name: names.variable(name, site.values, site.frames, site.event_dim)
            for name, site in data.items()
        },
        "constant_data": {
            name: names.variable(name, _as_array(value), (), _as_array(value).ndim)
            for name, value in constant_data.items()
        },
    }
    if log_likelihood:
        groups["log_likelihood"] = {
            name: names.variable(
                name,
                part.log_prob,
                part.frames,
                shown[name].event_dim if name in shown else 0,
                _DRAWS,
                is_density=True,
            )
            for name, part in likelihood.items()
        }
    if predictive and data:
        with _sampling("model's observed sites", "predictive"):
            new = samples.rerun.sample_given(latents, data)
        groups["posterior_predictive"] = on_draws(new, data)
    if prior:
        unobserved: dict[str, Latent | Observed] = {**latents, **deterministic}
        with _sampling("model", "prior"):
            new = samples.rerun.sample_prior(num_samples, {**unobserved, **data})
        groups |= {"prior": on_draws(new, unobserved), "prior_predictive": on_draws(new, data)}
    labels = names.labels(groups, coords or {})
    data_sets = {name: _dataset(group, labels, samples) for name, group in groups.items() if group}
    names_out = {name for part in likelihood.values() for name in part.summed_out}
    if (names_out or samples.rerun.enumerated) and "log_likelihood" in data_sets:
        data_sets["log_likelihood"].attrs["summed_out"] = ", ".join(sorted(names_out))
    return wrap(data_sets)


def _copies_together(indices: Tensor, num_particles: int) -> Tensor:
    """The indices ``[n, *cells]`` of resampled particles, in random order but for copies of the same one."""
    dtype = wide_dtype(indices.device)
    order = torch.rand((num_particles, *indices.shape[1:]), dtype=dtype, device=indices.device)
    return indices.gather(0, order.gather(0, indices).argsort(0))


class _Names:
    """What the dims of each variable are called."""

    def __init__(self, samples: ImportanceSamples, dims: Mapping[str, Sequence[str]]) -> None:
        self.dims = {
            name: (given,) if isinstance(given, str) else tuple(given) for name, given in dims.items()
        }
        self.indices = samples.rerun.minibatch.indices
        self.sizes: dict[str, int] = {}
        self.plates: set[str] = set()

    def check(self, sites: set[str]) -> None:
        unknown = sorted(set(self.dims) - sites)
        if unknown:
            raise ValueError(f"dims names {unknown}, but there are only the sites {sorted(sites)}.")

    def variable(
        self,
        name: str,
        values: Tensor | np.ndarray,
        frames: Sequence[CondIndepStackFrame],
        event_dim: int,
        leading: tuple[str, ...] = (),
        is_density: bool = False,
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Dims and values of a variable, with a chain of its own in front.

        Arguments:
            name: of the site.
            values: of shape ``[*batch, *event]``, behind the draws if they are among the ``leading`` dims.
            frames: the plates around the site.
            event_dim: the site's number of event dims.
            leading: ``("chain", "draw")``, ``("chain",)`` for what is one number a run, or nothing.
            is_density: whether the values are log densities, without the event dims.
        """
        array = _as_array(values)
        if leading:
            array = array[None]
        array = _over_plates(array, len(leading), frames, 0 if is_density else event_dim)
        shape = array.shape[len(leading) :]
        rank = len(shape) - (0 if is_density else event_dim)
        plates = {frame.dim: frame.name for frame in frames}
        labels = [*(plates.get(dim, "") for dim in range(-rank, 0)), *[""] * event_dim]
        self.plates.update(label for label in labels if label)
        given = self.dims.get(name, ())
        if len(given) > len(labels):
            raise ValueError(
                f"dims gives {len(given)} names {list(given)} for {name!r}, which has {len(labels)} dims."
            )
        labels[len(labels) - len(given) :] = given
        labels = [label or f"{name}_dim_{i}" for i, label in enumerate(labels)][: len(shape)]
        for label, size in zip(labels, shape, strict=True):
            if label in _DRAWS or label == name or self.sizes.setdefault(label, size) != size:
                reason = (
                    f"has another size elsewhere ({self.sizes[label]})" if label in self.sizes else "is taken"
                )
                raise ValueError(
                    f"Dim {label!r} of {name!r}, of size {size}, {reason}. Give the dims of {name!r} other "
                    f"names by dims={{{name!r}: [...]}}."
                )
        return (*leading, *labels), array

    def labels(self, groups: Mapping[str, Variables], coords: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Labels of all dims, as given or counted."""
        for name, given in coords.items():
            if name not in self.sizes:
                raise ValueError(f"coords names dim {name!r}, but there are only {sorted(self.sizes)}.")
            if len(given) != self.sizes[name]:
                raise ValueError(
                    f"coords has {len(given)} labels for dim {name!r} of size {self.sizes[name]}."
                )
        labels: dict[str, Any] = {name: np.arange(size) for name, size in self.sizes.items()}
        for name in self.plates & set(self.indices):
            chosen = self.indices[name]
            if isinstance(chosen, Tensor) and len(chosen) == self.sizes.get(name):
                labels[name] = chosen.cpu().numpy()
        return {**labels, **{name: np.asarray(given) for name, given in coords.items()}}


def _as_array(values: Any) -> np.ndarray:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    # NumPy has no bfloat16, and netCDF no float16 either.
    half = values.dtype in (torch.bfloat16, torch.float16)
    return (values.float() if half else values).detach().cpu().numpy()


def _over_plates(
    array: np.ndarray, leading: int, frames: Sequence[CondIndepStackFrame], event_dim: int
) -> np.ndarray:
    """The array with dims of size 1, or none, expanded to the plates' sizes, as Pyro lets values have
    them.
    """
    front, rank = array.shape[:leading], array.ndim - leading - event_dim
    wanted = max([rank, *(-frame.dim for frame in frames if frame.dim is not None)])
    batch = [1] * (wanted - rank) + list(array.shape[leading : leading + rank])
    event = array.shape[array.ndim - event_dim :]
    array = array.reshape((*front, *batch, *event))
    for frame in frames:
        if frame.dim is not None and batch[frame.dim] == 1:
            batch[frame.dim] = frame.size
    expanded = np.broadcast_to(array, (*front, *batch, *event))
    return array if expanded.shape == array.shape else expanded.copy()  # one that can be written to


def _stats(samples: ImportanceSamples, indices: Any, names: _Names) -> dict[str, Variables]:
    """The groups on draws, and on the weights they were drawn by."""

    def over_cells(
        name: str, values: Tensor, cells: Sequence[CondIndepStackFrame], leading: tuple[str, ...]
    ) -> tuple[tuple[str, ...], np.ndarray]:
        # Cells have no dims but those of their plates, side by side.
        frames = [frame._replace(dim=i - len(cells)) for i, frame in enumerate(cells)]
        return names.variable(name, values, frames, 0, leading)

    return {
        "sample_stats": {
            name: over_cells(name, values, samples.frames, _DRAWS)
            for name, values in samples.densities(indices).items()
        },
        "weight_stats": {
            name: over_cells(name, values, frames, _DRAWS[:1])
            for name, (values, frames) in samples.weight_stats().items()
        },
    }


def _constants(samples: ImportanceSamples, observed: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors among the model's arguments, by the model's names for them, that are not observed."""
    pair = samples.rerun.pair
    model = pair.model.forward if isinstance(pair.model, torch.nn.Module) else pair.model
    bound = inspect.signature(model).bind(*pair.args, **pair.kwargs).arguments
    return {
        name: value
        for name, value in bound.items()
        if isinstance(value, Tensor)
        and not any(
            value is other or (value.shape == other.shape and torch.equal(value, other)) for other in observed
        )
    }


def _dataset(group: Variables, labels: Mapping[str, Any], samples: ImportanceSamples) -> Any:
    xarray = require("xarray", "arviz", "to_arviz")
    used = {dim for dims, _ in group.values() for dim in dims}
    for name in sorted(used & group.keys()):
        if name in _DRAWS:
            raise ValueError(
                f"Site {name!r} has the name of a dim of all draws. Call it otherwise in the model."
            )
        raise ValueError(
            f"{name!r} is a variable, and by dims= a dim of {_having(name, group)} beside it. Give the dim "
            "another name."
        )
    coords: dict[str, Any] = {dim: labels[dim] for dim in used if dim in labels}
    for dims, array in group.values():
        if "chain" in dims:
            coords["chain"] = np.arange(1)
        if "draw" in dims:
            coords["draw"] = np.arange(array.shape[1])
    attributes = {
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "inference_library": "pyro_iw",
        "inference_library_version": __version__,
        "num_particles": samples.num_particles,
    }
    return xarray.Dataset(dict(group), coords=coords, attrs=attributes)


@contextmanager
def _sampling(what: str, option: str) -> Iterator[None]:
    """Says what to leave out where a distribution has a density alone (an improper prior)."""
    try:
        yield
    except NotImplementedError as error:
        reason = str(error).partition("\n")[0] or "a distribution has no sample()"
        raise ValueError(f"The {what} cannot be sampled ({reason}). Pass {option}=False.") from error


def _having(dim: str, group: Variables) -> str:
    """The variables that have a dim."""
    return ", ".join(repr(name) for name, (dims, _) in group.items() if dim in dims)


def _container() -> Any:
    """What makes one object of the groups, in the installed ArviZ's own kind."""
    arviz = require("arviz", "arviz", "to_arviz")
    if is_arviz_0(arviz):
        return lambda groups: arviz.InferenceData(**groups)
    return require("xarray", "arviz", "to_arviz").DataTree.from_dict
