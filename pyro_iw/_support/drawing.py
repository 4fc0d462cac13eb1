"""What pictures are made of: axes, arrays out of anything like them, bins and legends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "HIGH",
    "LOW",
    "as_array",
    "as_numpy",
    "bars",
    "bin_edges",
    "finish",
    "make_axes",
    "note",
    "num_bins",
    "percent",
    "refuse_nothing",
]

LOW, HIGH = "tab:blue", "tab:red"


def make_axes(ax: Axes | None, purpose: str) -> Any:
    """The given Axes, or those of a new pyplot figure, which notebooks show by themselves."""
    if ax is not None:
        return ax
    return require("matplotlib.pyplot", "plots", purpose).subplots(layout="constrained")[1]


def as_numpy(values: Any) -> np.ndarray:
    """Anything like an array, away from its device and graph."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    # NumPy does not know bfloat16.
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()


def as_array(name: str, values: Any) -> np.ndarray:
    """Numbers as float64."""
    array = as_numpy(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} should be real numbers, but is of dtype {array.dtype}.")
    return array.astype(np.float64)


def refuse_nothing(name: str, keep: np.ndarray) -> None:
    if not keep.any():
        raise ValueError(f"{name} has nothing to draw: none of its {keep.size} value(s) is usable.")


def note(axes: Any, fits: np.ndarray, what: str) -> None:
    """Say in the legend how many are left out."""
    left_out = int((~fits).sum())
    if left_out:
        axes.plot([], [], " ", color="none", label=f"{left_out} of {fits.size} {what}")


def num_bins(count: int) -> int:
    return min(40, 5 + round(count**0.5))


def bin_edges(values: np.ndarray, is_log: bool) -> np.ndarray:
    """Edges of a histogram's bins, which all values are within."""
    low, high = values.min(), values.max()
    if is_log:
        return np.geomspace(low, high, num_bins(len(values)) + 1)
    if high - low < 1e-6 * high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, num_bins(len(values)) + 1)


def bars(axes: Any, values: np.ndarray, edges: np.ndarray) -> Any:
    """A histogram with room for a legend above its bars."""
    axes.margins(y=0.3)
    return axes.hist(values, edges, color=LOW, edgecolor="white", linewidth=0.5)[2]


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def finish(axes: Any, title: str, xlabel: str, ylabel: str, **legend: Any) -> Axes:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(**legend)
    return axes
