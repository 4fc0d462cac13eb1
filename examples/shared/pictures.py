"""Pictures of an image model: grids of images, latents and learning curves.

They take tensors, not models, and draw on figures of their own, so that nothing of pyplot's global state
is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_iw import plots

__all__ = [
    "save_images",
    "save_latents",
    "save_learning_curve",
    "save_manifold",
    "save_reconstructions",
    "tile",
]

MAX_COLOURS = 20


def tile(images: Tensor, columns: int) -> Tensor:
    """Images ``[N, H, W]`` or ``[N, H, W, 3]`` on a grid, with a line of NaN (drawn as background) between.

    In colour NaN would be drawn as black: there it is made white.
    """
    n, height, width, *colours = images.shape
    rows = math.ceil(n / columns)
    grid = images.new_full((rows * (height + 1) + 1, columns * (width + 1) + 1, *colours), math.nan)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        grid[top : top + height, left : left + width] = image
    return grid.nan_to_num(1.0) if colours else grid


def save_images(images: Tensor, columns: int, title: str, path: Path) -> None:
    """Images ``[N, H, W]`` or ``[N, H, W, 3]`` of intensities in [0, 1], as one grid."""
    grid = tile(images.cpu(), columns)
    figure = Figure(figsize=(6, 6 * grid.shape[0] / grid.shape[1] + 0.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    figure.savefig(path, dpi=120)


def save_reconstructions(originals: Tensor, rebuilt: Tensor, path: Path, columns: int = 12) -> None:
    """Images, grey or not, each above its reconstruction; what does not fill a row is left out."""
    columns = min(columns, len(originals))
    whole = len(originals) // columns * columns
    rows = zip(originals[:whole].split(columns), rebuilt[:whole].split(columns), strict=True)
    pictures = torch.cat([row for pair in rows for row in pair])
    save_images(pictures, columns, "Held-out images above, reconstructions below", path)


def save_latents(means: Tensor, labels: Tensor | None, path: Path) -> None:
    """Guide means ``[N, latent]`` along the two units whose means vary most over the data."""
    variances = means.var(0)
    first, second = variances.topk(2).indices.tolist()
    figure = Figure(figsize=(6, 5.2), layout="constrained")
    axes = figure.add_subplot()
    points = means[:, [first, second]].cpu().numpy()
    if labels is not None and int(labels.max()) < MAX_COLOURS:
        classes = int(labels.max()) + 1
        colours = colormaps["tab10" if classes <= 10 else "tab20"].resampled(classes)
        limits = {"vmin": -0.5, "vmax": classes - 0.5}
        scatter = axes.scatter(*points.T, c=labels.numpy(), s=8, cmap=colours, **limits)
        figure.colorbar(scatter, ax=axes, label="class", ticks=range(classes))
    else:
        axes.scatter(*points.T, s=8)
    axes.set_title("Guide means of the held-out images: the two most active units")
    axes.set_xlabel(f"E[z{first}], variance {variances[first].item():.2f}")
    axes.set_ylabel(f"E[z{second}], variance {variances[second].item():.2f}")
    figure.savefig(path, dpi=120)


def save_manifold(decode: Callable[[Tensor], Tensor], image_shape: tuple[int, int], path: Path) -> None:
    """Images that ``decode`` makes of a grid of two-dimensional latents."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    plots.plot_manifold(decode, image_shape, ax=figure.add_subplot())
    figure.savefig(path, dpi=120)


def save_learning_curve(history: list[dict[str, float]], loss: str, path: Path) -> None:
    """The training and the held-out bound over the epochs."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(history) == 1 else None
    for key, label in (("train_bound", "training"), ("heldout_bound", "held out")):
        axes.plot(epochs, [record[key] for record in history], marker=marker, label=label)
    axes.set_title(f"{loss}: the bound during training")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("bound [nats per datapoint]")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
