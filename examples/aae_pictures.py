"""The pictures of Makhzani et al. (1511.05644): codes beside the prior, styles, clusters and the plane."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import aae_evaluation as evaluation
import pictures
import torch
import vae
from aae_networks import HeadsAAE, LatentAAE, Pair
from aae_training import Data
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import tile
from torch import Tensor

__all__ = ["save_all", "save_clusters", "save_codes", "save_embedding", "save_losses", "save_style_grid"]

COLOURS = colormaps["tab10"]
# More points than this hide one another.
MAX_POINTS = 3000
MANIFOLD_COLUMNS, STYLES = 16, 10
# Codes to images [N, H, W].
Decoded = Callable[[Tensor], Tensor]


def scatter(axes: Axes, points: Tensor, labels: Tensor | None) -> None:
    """Points ``[N, 2]``, coloured by class."""
    points = points[:MAX_POINTS].cpu()
    colours = "0.45" if labels is None else COLOURS(labels[:MAX_POINTS].cpu().numpy() % 10)
    axes.scatter(*points.T.numpy(), s=5, c=colours, linewidths=0)
    axes.set_aspect("equal")


def legend(figure: Figure, axes: Axes, classes: int) -> None:
    """A dot a class, beside the axes."""
    dots = [axes.scatter([], [], s=20, color=COLOURS(c % 10), label=str(c)) for c in range(classes)]
    figure.legend(handles=dots, fontsize=8, loc="outside right upper", title="class", title_fontsize=8)


def save_codes(codes: Tensor, labels: Tensor, prior: Tensor, parts: Tensor | None, path: Path) -> None:
    """The aggregated posterior beside the prior: the first two dims of codes.

    Arguments:
        codes: Of images, shape ``[N, latent]``.
        labels: Their classes, shape ``[N]``.
        prior: Draws from the prior, shape ``[N', latent]``.
        parts: Classes that these stand for, shape ``[N']``, or ``None``.
        path: The file.
    """
    figure = Figure(figsize=(10, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    scatter(left, codes[:, :2], labels)
    legend(figure, left, int(labels.max()) + 1)
    scatter(right, prior[:, :2], parts)
    limit = 1.05 * max(both[:, :2].abs().max().item() for both in (codes, prior))
    left.set(xlim=(-limit, limit), ylim=(-limit, limit))
    more = f" (2 of {codes.shape[1]} dims)" if codes.shape[1] > 2 else ""
    left.set_title(f"Codes of the held-out images{more}", fontsize=10)
    right.set_title("Draws from the prior", fontsize=10)
    figure.savefig(path, dpi=120)


def save_style_grid(images: Tensor, path: Path) -> None:
    """Images ``[styles, classes, H, W]``: a row a style, a column a class."""
    styles, classes = images.shape[:2]
    grid = tile(images.flatten(0, 1).cpu(), classes)
    figure = Figure(figsize=(5.5, 5.5 * styles / classes + 0.6), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    width = images.shape[-1] + 1
    axes.set_xticks([(c + 0.5) * width for c in range(classes)], [str(c) for c in range(classes)])
    axes.set_yticks([])
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
    number, height, width = heads.shape
    rows = torch.full((number, columns + 2, height, width), torch.nan)
    for i in range(number):
        members = images[chosen == i][:columns].cpu()
        rows[i, 0] = heads[i].cpu()
        # The second column is left empty, between the head and its members.
        rows[i, 2 : 2 + len(members)] = members
    grid = tile(rows.flatten(0, 1), columns + 2)
    figure = Figure(figsize=(6, 6 * number / (columns + 2) + 0.5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ticks = [(i + 0.5) * (height + 1) for i in range(number)]
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set_xticks([])
    axes.set(ylabel="the class that the cluster is given")
    axes.set_title("Cluster heads, and held-out images in each cluster", fontsize=10)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(path, dpi=120)


def save_embedding(codes: Tensor, labels: Tensor, centres: Tensor, names: list[str], path: Path) -> None:
    """Two-dimensional codes ``[N, 2]`` by class, with the heads ``[heads, 2]`` among them, by name."""
    figure = Figure(figsize=(6.5, 6), layout="constrained")
    axes = figure.add_subplot()
    scatter(axes, codes, labels)
    for centre, name in zip(centres.cpu().tolist(), names, strict=True):
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "black", "alpha": 0.8}
        axes.annotate(name, centre, ha="center", va="center", fontsize=8, bbox=box)
    legend(figure, axes, int(labels.max()) + 1)
    axes.set_title(
        "Held-out images in the plane; circles: heads, with the classes they are given", fontsize=10
    )
    figure.savefig(path, dpi=120)


def save_losses(history: list[dict[str, float]], path: Path) -> None:
    """The phases' losses over the epochs; the reconstruction apart, which is on another scale."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(history) == 1 else None
    left.plot(epochs, [record["reconstruction"] for record in history], marker=marker)
    left.set(title="Reconstruction", xlabel="epoch", ylabel="-log p(x | code) [nats per image]")
    for name in history[-1]:
        if name not in ("epoch", "seconds", "reconstruction"):
            values = [record[name] for record in history]
            right.plot(epochs, values, marker=marker, label=name.replace("_", ", "))
    right.set(title="Discriminators, guide, labels", xlabel="epoch", ylabel="loss [nats per image]")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
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
    codes = evaluation.encode(pair, data.heldout)
    originals = data.heldout[:24].reshape(-1, *data.shape).cpu()
    pictures.save_reconstructions(originals, decoded(codes[:24]), folder / "reconstructions.png")
    with vae.seeded(seed, device):
        if isinstance(pair, LatentAAE):
            save_latent(pair, data, codes, decoded, folder)
        elif isinstance(pair, HeadsAAE):
            save_heads(pair, data, codes, decoded, folder, plane)


def save_latent(pair: LatentAAE, data: Data, codes: Tensor, decoded: Decoded, folder: Path) -> None:
    """Codes beside the prior, and images of draws and of codes laid out over it."""
    draws = evaluation.prior_draws(pair, max(len(codes), 1000))
    parts = pair.prior.nearest(draws) if pair.steered else None
    save_codes(codes, data.heldout_labels, draws, parts, folder / "codes.png")
    pictures.save_images(decoded(draws[:100]), 10, "Decoder means of prior draws", folder / "samples.png")
    manifold = pair.prior.manifold(MANIFOLD_COLUMNS)
    if manifold is not None:
        title = "Decoder means of codes laid out over the prior"
        pictures.save_images(decoded(manifold), MANIFOLD_COLUMNS, title, folder / "manifold.png")


def save_heads(
    pair: HeadsAAE, data: Data, codes: Tensor, decoded: Decoded, folder: Path, plane: bool
) -> None:
    """Styles by class where heads are classes, else clusters; and the plane, if they are in one."""
    heads = torch.eye(pair.heads, device=codes.device)
    centres = pair.decoder.code(heads, heads.new_zeros(pair.heads, pair.latent))
    names = [str(label) for label in range(pair.heads)]
    if data.few is None:
        labels, _ = evaluation.cluster_labels(evaluation.head_logits(pair, data.images), data.labels)
        names = [str(label) if label >= 0 else "–" for label in labels.tolist()]
        chosen = evaluation.head_logits(pair, data.heldout).argmax(-1)
        images = data.heldout.reshape(-1, *data.shape)
        save_clusters(decoded(centres), images, chosen, names, folder / "clusters.png")
    else:
        styles = torch.randn(STYLES, 1, pair.latent, device=codes.device)
        both = (tensor.expand(STYLES, pair.heads, -1) for tensor in (heads, styles))
        grid = decoded(pair.decoder.code(*both)).reshape(STYLES, pair.heads, *data.shape)
        save_style_grid(grid, folder / "styles.png")
    if plane:
        save_embedding(codes, data.heldout_labels, centres, names, folder / "plane.png")
