"""The pictures of Makhzani et al. (1511.05644): codes beside the prior, styles, clusters and the plane."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .. import pictures
from ..evaluation import seeded
from ..pictures import tile
from . import evaluation
from .networks import ClassAAE, HeadsAAE, LatentAAE, Pair
from .training import Data

__all__ = [
    "save_all",
    "save_clusters",
    "save_codes",
    "save_embedding",
    "save_losses",
    "save_manifold",
    "save_style_grid",
]

COLOURS = colormaps["tab10"]
# More points than this hide one another.
MAX_POINTS = 3000
MANIFOLD_COLUMNS, STYLES, BINS = 16, 10, 40
# What a head without training images is called.
EMPTY = "–"
# In words; the others are named by player and site.
LOSSES = {
    "reconstruction": "−log p(x | code)",
    "penalty": "beside it: penalty on heads too close",
    "supervised": "labels",
}
# Codes to images [N, H, W], or [N, H, W, 3] in colour; likewise below.
Decoded = Callable[[Tensor], Tensor]


def scatter(axes: Axes, points: Tensor, labels: Tensor | None) -> None:
    """Points ``[N, 2]``, coloured by class."""
    points = points[:MAX_POINTS].cpu()
    colours = "0.45" if labels is None else COLOURS(labels[:MAX_POINTS].cpu().numpy() % 10)
    axes.scatter(*points.T.numpy(), s=5, c=colours, linewidths=0)
    axes.set_aspect("equal")


def histogram(axes: Axes, points: Tensor, labels: Tensor | None, limit: float) -> None:
    """The density of points ``[N, 1]`` on [−limit, limit], stacked by class."""
    values = points[:, 0].cpu()
    if labels is None:
        groups, colours = [values], ["0.45"]
    else:
        classes = range(int(labels.max()) + 1)
        groups = [values[labels.cpu() == c] for c in classes]
        colours = [COLOURS(c % 10) for c in classes]
    arrays = [group.numpy() for group in groups]
    axes.hist(arrays, BINS, range=(-limit, limit), density=True, stacked=True, color=colours)


def legend(figure: Figure, axes: Axes, classes: int) -> None:
    """A dot a class, beside the axes."""
    dots = [axes.scatter([], [], s=20, color=COLOURS(c % 10), label=str(c)) for c in range(classes)]
    figure.legend(handles=dots, fontsize=8, loc="outside right upper", title="class", title_fontsize=8)


def save_codes(codes: Tensor, labels: Tensor, prior: Tensor, parts: Tensor | None, path: Path) -> None:
    """The aggregated posterior beside the prior: the first two dims of codes, or a histogram of one.

    Arguments:
        codes: Of images, shape ``[N, latent]``.
        labels: Their classes, shape ``[N]``.
        prior: Draws from the prior, shape ``[N', latent]``.
        parts: Classes that these stand for, shape ``[N']``, or ``None``.
        path: The file.
    """
    figure = Figure(figsize=(10, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    limit = 1.05 * max(both[:, :2].abs().max().item() for both in (codes, prior))
    for axes, points, classes in ((left, codes, labels), (right, prior, parts)):
        if codes.shape[1] == 1:
            histogram(axes, points, classes, limit)
            axes.set(xlim=(-limit, limit), xlabel="code")
        else:
            scatter(axes, points[:, :2], classes)
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel="code, dim 1")
    left.set_ylabel("density" if codes.shape[1] == 1 else "code, dim 2")
    legend(figure, left, int(labels.max()) + 1)
    shown = f" (dims 1 and 2 of {codes.shape[1]})" if codes.shape[1] > 2 else ""
    left.set_title(f"Codes of the held-out images{shown}", fontsize=10)
    right.set_title(f"Draws from the prior{shown}", fontsize=10)
    figure.savefig(path, dpi=120)


def show_grid(images: Tensor, columns: int, width: float, texts: float) -> tuple[Figure, Axes]:
    """Images ``[N, H, W]`` as one grid, ``width`` inches wide, with ``texts`` inches for the texts."""
    grid = tile(images.cpu(), columns)
    size = (width, width * grid.shape[0] / grid.shape[1] + texts)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    return figure, axes


def save_manifold(images: Tensor, rows: list[str], row: str, column: str, path: Path) -> None:
    """Images ``[rows * columns, H, W]`` of codes laid out over the prior.

    Arguments:
        images: Of which :data:`MANIFOLD_COLUMNS` make a row.
        rows: The rows' names, if they have any.
        row: What a row is.
        column: What a column is.
        path: The file.
    """
    figure, axes = show_grid(images, MANIFOLD_COLUMNS, 6, 0.7)
    height = images.shape[1] + 1
    axes.set_yticks([(i + 0.5) * height for i in range(len(rows))], rows, fontsize=8)
    axes.set_xlabel(f"{column} →", fontsize=8)
    axes.set_ylabel(row, fontsize=8)
    axes.set_title("Decoder means of codes laid out over the prior", fontsize=10)
    figure.savefig(path, dpi=120)


def save_style_grid(images: Tensor, path: Path) -> None:
    """Images ``[styles, classes, H, W]``: a row a style, a column a class."""
    classes = images.shape[1]
    figure, axes = show_grid(images.flatten(0, 1), classes, 5.5, 0.6)
    width = images.shape[3] + 1
    axes.set_xticks([(c + 0.5) * width for c in range(classes)], [str(c) for c in range(classes)])
    axes.set(xlabel="class", ylabel="style", title="One style a row, one class a column")
    figure.savefig(path, dpi=120)


def save_clusters(
    heads: Tensor, images: Tensor, chosen: Tensor, names: list[str], path: Path, columns: int = 14
) -> None:
    """A row a cluster: its head, then images that belong to it.

    Arguments:
        heads: What the decoder makes of each head alone, shape ``[heads, H, W]``.
        images: Shape ``[N, H, W]``.
        chosen: The head of each, shape ``[N]``.
        names: What each head is called.
        path: The file.
        columns: Images shown of each cluster, at most.
    """
    number, height, *_ = heads.shape
    rows = torch.full((number, columns + 2, *heads.shape[1:]), torch.nan)
    for i in range(number):
        members = images[chosen == i][:columns].cpu()
        rows[i, 0] = heads[i].cpu()
        # The second column is left empty, between the head and its members.
        rows[i, 2 : 2 + len(members)] = members
    figure, axes = show_grid(rows.flatten(0, 1), columns + 2, 6, 0.5)
    ticks = [(i + 0.5) * (height + 1) for i in range(number)]
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set_ylabel(f"class by majority of the training images{empty(names)}", fontsize=8)
    axes.set_title(f"The head of each cluster, then its first {columns} held-out members", fontsize=10)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(path, dpi=120)


def empty(names: list[str]) -> str:
    """What the name of an empty head means, if there is one."""
    return f" ({EMPTY}: the head has none)" if EMPTY in names else ""


def save_embedding(
    codes: Tensor, labels: Tensor, centres: Tensor, names: list[str], given: str, path: Path
) -> None:
    """Two-dimensional codes by class, with the heads among them.

    Arguments:
        codes: Of images, shape ``[N, 2]``.
        labels: Their classes, shape ``[N]``.
        centres: Of the heads, shape ``[heads, 2]``.
        names: What each head is called.
        given: What these names are.
        path: The file.
    """
    figure = Figure(figsize=(6.5, 6), layout="constrained")
    axes = figure.add_subplot()
    scatter(axes, codes, labels)
    for centre, name in zip(centres.cpu().tolist(), names, strict=True):
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "black", "alpha": 0.8}
        axes.annotate(name, centre, ha="center", va="center", fontsize=8, bbox=box)
    legend(figure, axes, int(labels.max()) + 1)
    # Texts do not count for the limits by themselves.
    axes.update_datalim(centres.cpu().numpy())
    axes.margins(0.06)
    axes.autoscale_view()
    axes.set(xlabel="code (head + style), dim 1", ylabel="code (head + style), dim 2")
    axes.set_title(f"Held-out images in the plane\ncircles: heads, with {given}{empty(names)}", fontsize=9)
    figure.savefig(path, dpi=120)


def save_losses(history: list[dict[str, float]], path: Path) -> None:
    """The phases' losses over the epochs; the reconstruction apart, which is on another scale.

    And the held-out classification error, where there are labels.
    """
    last = history[-1]
    errors = "error" in last
    figure = Figure(figsize=(15 if errors else 11, 3.8), layout="constrained")
    left, right, *rest = figure.subplots(1, 3 if errors else 2)
    labels = "supervised" in last
    title = "Discriminators, guide and labels" if labels else "Discriminators and guide"
    unit = "nats per code; labels: nats per image" if labels else "nats per code"
    left.set(title="Reconstruction", xlabel="epoch", ylabel="−log p(x | code) [nats per image]")
    right.set(title=title, xlabel="epoch", ylabel=f"loss [{unit}]")
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(history) == 1 else None
    for axes in rest:
        axes.plot(epochs, [100 * record["error"] for record in history], color="C3", marker=marker)
        axes.set(title="Held-out images", xlabel="epoch", ylabel="classification error [%]")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    for name in last:
        if name in ("epoch", "seconds", "error"):
            continue
        axes = left if name in ("reconstruction", "penalty") else right
        label = LOSSES.get(name) or " of ".join(name.split("_", 1))
        axes.plot(epochs, [record[name] for record in history], marker=marker, label=label)
    # A discriminator that knows nothing says 1/2 of everything.
    for where, value, style in (
        ("discriminator at 2 log 2", 2 * math.log(2), (0, (8, 3))),
        ("guide at log 2", math.log(2), "--"),
    ):
        label = f"cannot be told apart:\n{where}"
        right.axhline(value, color="0.3", linestyle=style, linewidth=1, label=label)
    if "penalty" in last:
        left.set_ylabel("[nats per image]")
        left.legend(fontsize=8)
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    for axes in (left, right, *rest):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)


@torch.no_grad()
def save_all(
    pair: Pair, data: Data, history: list[dict[str, float]], *, plane: bool, seed: int, folder: Path
) -> None:
    """What the paper shows of a pair, reconstructions, and the losses.

    Arguments:
        pair: The model and its guide.
        data: What it was trained on, and what was held out.
        history: The trainer's.
        plane: Whether heads and codes are points of one plane, to be shown.
        seed: Of all draws.
        folder: For the files.
    """
    pair.eval()
    device = data.heldout.device

    def decoded(codes: Tensor) -> Tensor:
        return pair.images(codes.to(device)).reshape(-1, *data.shape).cpu()

    save_losses(history, folder / "losses.png")
    codes = evaluation.encode(pair, data.heldout, data.heldout_labels)
    originals = data.heldout[:24].reshape(-1, *data.shape).cpu()
    pictures.save_reconstructions(originals, decoded(codes[:24]), folder / "reconstructions.png")
    with seeded(seed):
        if isinstance(pair, LatentAAE):
            save_latent(pair, data, codes, decoded, folder)
        elif isinstance(pair, HeadsAAE):
            save_heads(pair, data, codes, decoded, folder, plane)
        elif isinstance(pair, ClassAAE):
            labels = torch.arange(pair.classes, device=device).expand(STYLES, -1)
            styles = torch.randn(STYLES, 1, pair.latent, device=device).expand(-1, pair.classes, -1)
            save_style_grid(decoded_grid(decoded, pair.code(labels, styles)), folder / "styles.png")


def save_latent(pair: LatentAAE, data: Data, codes: Tensor, decoded: Decoded, folder: Path) -> None:
    """Codes beside the prior, and images of draws and of codes laid out over it."""
    draws = evaluation.prior_draws(pair, max(len(codes), 1000))
    parts = pair.prior.nearest(draws) if pair.steered else None
    save_codes(codes, data.heldout_labels, draws, parts, folder / "codes.png")
    pictures.save_images(decoded(draws[:100]), 10, "Decoder means of prior draws", folder / "samples.png")
    manifold = pair.prior.manifold(MANIFOLD_COLUMNS)
    if manifold is not None:
        prior = pair.prior
        names = [str(part) for part in range(prior.components)]
        row = "class" if pair.steered else prior.rows
        save_manifold(decoded(manifold), names, row, prior.columns, folder / "manifold.png")


def decoded_grid(decoded: Decoded, codes: Tensor) -> Tensor:
    """Images of codes ``[rows, columns, width]``, laid out as these are."""
    images = decoded(codes.flatten(0, 1))
    return images.reshape(*codes.shape[:2], *images.shape[1:])


def save_heads(
    pair: HeadsAAE, data: Data, codes: Tensor, decoded: Decoded, folder: Path, plane: bool
) -> None:
    """Styles by class where heads are classes, else clusters; and the plane, if they are in one."""
    heads = torch.eye(pair.heads, device=codes.device)
    centres = pair.decoder.code(heads, heads.new_zeros(pair.heads, pair.latent))
    names = [str(label) for label in range(pair.heads)]
    if data.few is None:
        labels, _ = evaluation.cluster_labels(evaluation.head_logits(pair, data.images), data.labels)
        names = [str(label) if label >= 0 else EMPTY for label in labels.tolist()]
        chosen = evaluation.head_logits(pair, data.heldout).argmax(-1)
        images = data.heldout.reshape(-1, *data.shape)
        save_clusters(decoded(centres), images, chosen, names, folder / "clusters.png")
    else:
        styles = torch.randn(STYLES, 1, pair.latent, device=codes.device)
        both = (tensor.expand(STYLES, pair.heads, -1) for tensor in (heads, styles))
        save_style_grid(decoded_grid(decoded, pair.decoder.code(*both)), folder / "styles.png")
    if plane:
        given = "their classes" if data.few is not None else "the class by majority of the training images"
        save_embedding(codes, data.heldout_labels, centres, names, given, folder / "plane.png")
