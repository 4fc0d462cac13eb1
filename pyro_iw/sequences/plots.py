"""Pictures of particle filters over time: ESS, genealogy, filtering means, trajectories, evidence by step.

Every function draws on the :class:`~matplotlib.axes.Axes` that it is given, or on those of a new figure of
``matplotlib.pyplot``, and returns them. Where there are several sequences, ``sequence`` says which one; None,
where it is allowed, draws the mean over all that are not masked, with a band from the 10th to the 90th
percentile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from torch import Tensor

from .._support.optional import require
from .filtered import FilteredSequences

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_ancestors",
    "plot_ess_over_time",
    "plot_filtering_mean",
    "plot_log_increments",
    "plot_trajectories",
]

#: Index of a sequence; of several numbers where several plates are kept.
Sequence = Union[int, tuple[int, ...], None]  # noqa: UP007 - it is evaluated


def plot_ess_over_time(
    filtered: FilteredSequences,
    ax: Axes | None = None,
    *,
    sequence: Sequence = None,
    label: str | None = None,
) -> Axes:
    """Effective number of particles after each step, of K.

    Arguments:
        filtered: the sequences.
        ax: where to draw; those of several filters may share it.
        sequence: which sequence; None for all.
        label: name in the legend.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if there is no such sequence.
    """
    axes = _axes(ax, "plot_ess_over_time")
    _over_time(axes, filtered.ess, sequence, label)
    axes.set_ylim(0, max(filtered.num_particles * 1.05, axes.get_ylim()[1]))
    return _finish(axes, "Effective number of particles", f"ESS of {filtered.num_particles}")


def plot_ancestors(
    filtered: FilteredSequences,
    ax: Axes | None = None,
    *,
    sequence: Sequence = None,
    label: str | None = None,
) -> Axes:
    """How many particles of each step have descendants at the end, on a logarithmic axis.

    Arguments and errors are those of :func:`plot_ess_over_time`.
    """
    axes = _axes(ax, "plot_ancestors")
    counts = filtered.num_ancestors().masked_fill(~filtered.active, math.nan)
    _over_time(axes, counts, sequence, label)
    axes.set_yscale("log")
    return _finish(axes, "Genealogy", "particles with descendants at the end")


def plot_log_increments(
    filtered: FilteredSequences,
    ax: Axes | None = None,
    *,
    sequence: Sequence = None,
    label: str | None = None,
) -> Axes:
    r"""What each step adds to the log evidence, :math:`\log \hat p(x_t \mid x_{<t})`.

    Arguments and errors are those of :func:`plot_ess_over_time`.
    """
    axes = _axes(ax, "plot_log_increments")
    _over_time(axes, filtered.log_increments.masked_fill(~filtered.active, math.nan), sequence, label)
    return _finish(axes, "Evidence by step", "log p̂ of the step [nats]")


def plot_filtering_mean(
    filtered: FilteredSequences,
    name: str | None = None,
    ax: Axes | None = None,
    *,
    sequence: Sequence = 0,
    element: int | tuple[int, ...] = 0,
    label: str | None = None,
) -> Axes:
    """The filtering mean of a latent site, with a band of two standard deviations either way.

    Arguments:
        filtered: the sequences.
        name: the site; may be left out where there is one.
        ax: where to draw.
        sequence: which sequence.
        element: which element of the site's event, where it has one.
        label: name in the legend.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if there is no such site, sequence or element.
    """
    name = filtered._name(name)
    mean = _series(filtered, name, filtered.mean(name), sequence, element)
    sd = _series(filtered, name, filtered.variance(name).sqrt(), sequence, element)
    axes = _axes(ax, "plot_filtering_mean")
    time = np.arange(len(mean))
    (line,) = axes.plot(time, mean, label=label or "filtering mean")
    axes.fill_between(time, mean - 2 * sd, mean + 2 * sd, alpha=0.2, color=line.get_color(), linewidth=0)
    return _finish(axes, f"{name} given the data so far", name)


def plot_trajectories(
    filtered: FilteredSequences,
    name: str | None = None,
    ax: Axes | None = None,
    *,
    num_samples: int = 50,
    smoothed: bool = True,
    sequence: Sequence = 0,
    element: int | tuple[int, ...] = 0,
) -> Axes:
    """Trajectories of a latent site given all of the data, and their mean.

    Arguments:
        filtered: the sequences.
        name: the site; may be left out where there is one.
        ax: where to draw.
        num_samples: how many; an integer >= 1.
        smoothed: by backward sampling, or else along the genealogy.
        sequence: which sequence.
        element: which element of the site's event, where it has one.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if there is no such site, sequence or element.
        NotImplementedError: as :meth:`~pyro_iw.FilteredSequences.smooth`.
    """
    name = filtered._name(name)
    draws = (filtered.smooth if smoothed else filtered.trajectories)(num_samples)[name].cpu().double()
    lines = np.stack([_series(filtered, name, draw, sequence, element) for draw in draws])
    axes = _axes(ax, "plot_trajectories")
    time = np.arange(lines.shape[1])
    axes.plot(time, lines.T, color="tab:blue", alpha=max(0.05, 1 / num_samples**0.5), linewidth=0.8)
    axes.plot(time, lines.mean(0), color="black", label="mean")
    return _finish(axes, f"{name} given all of the data", name)


def _series(
    filtered: FilteredSequences, name: str, values: Tensor, sequence: Sequence, element: int | tuple[int, ...]
) -> np.ndarray:
    """One number a step, of ``[T, *batch, *event]``."""
    site = filtered.sites[name]
    index = _index(sequence)
    batch = values.dim() - 1 - site.event_dim
    place: list[Any] = [0] * batch
    if index is None or len(index) != len(filtered.frames):
        if filtered.frames or index not in (None, (0,)):
            raise ValueError(
                f"sequence must be {len(filtered.frames)} number(s), one for each of the plates "
                f"{list(filtered.plates)}, got {sequence!r}"
            )
        index = ()
    for frame, number in zip(filtered.frames, index, strict=True):
        assert frame.dim is not None
        if -frame.dim <= batch and values.shape[1 + batch + frame.dim] > 1:
            place[frame.dim] = number
    event = element if isinstance(element, tuple) else (element,) + (0,) * (site.event_dim - 1)
    try:
        at: tuple[Any, ...] = (slice(None), *place, *event[: site.event_dim])
        chosen = values[at]
    except IndexError as error:
        raise ValueError(
            f"Site {name!r} has no sequence {sequence!r} with element {element!r}: {error}"
        ) from error
    if chosen.dim() != 1:
        raise ValueError(f"element must be {site.event_dim} number(s) for site {name!r}, got {element!r}")
    return chosen.detach().cpu().double().numpy()


def _over_time(axes: Axes, values: Tensor, sequence: Sequence, label: str | None) -> None:
    """A line of ``[T, *cells]``: one sequence's, or the mean of all with a band."""
    index = _index(sequence)
    if index is not None:
        try:
            at: tuple[Any, ...] = (slice(None), *index)
            chosen = values[at]
        except IndexError as error:
            raise ValueError(f"There is no sequence {sequence!r}: {error}") from error
        if chosen.dim() != 1:
            raise ValueError(f"sequence must be {values.dim() - 1} number(s), got {sequence!r}")
        axes.plot(chosen.detach().cpu().numpy(), label=label)
        return
    array = (values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)).cpu().double()
    mean = array.nanmean(1).cpu().numpy()
    (line,) = axes.plot(mean, label=label)
    if array.shape[1] > 1:
        low, high = torch.nanquantile(array, array.new_tensor([0.1, 0.9]), dim=1).cpu().numpy()
        axes.fill_between(np.arange(len(mean)), low, high, alpha=0.2, color=line.get_color(), linewidth=0)


def _index(sequence: Sequence) -> tuple[int, ...] | None:
    return (sequence,) if isinstance(sequence, int) else sequence


def _axes(ax: Axes | None, purpose: str) -> Axes:
    if ax is not None:
        return ax
    return require("matplotlib.pyplot", "plots", purpose).subplots(layout="constrained")[1]


def _finish(axes: Axes, title: str, ylabel: str) -> Axes:
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    return axes
