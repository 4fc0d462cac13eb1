r"""Pictures of what importance weights say: the bound by K, ESS, k̂, the weights, and the latent space.

Every function draws on the :class:`~matplotlib.axes.Axes` that it is given, or on those of a new figure of
``matplotlib.pyplot``, and returns them. Tensors may be on any device and may require a gradient. What has no
place in a picture (NaN, infinities, datapoints without a living particle) is counted in its legend.

References:
    | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114
    | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
    | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._support.drawing import (
    HIGH,
    LOW,
    as_array,
    as_numpy,
    bars,
    bin_edges,
    finish,
    make_axes,
    note,
    num_bins,
    percent,
    refuse_nothing,
)
from ._support.optional import require
from .posterior.evaluation import BoundCurve
from .posterior.samples import ImportanceSamples
from .posterior.sandwich import Sandwich
from .psis import khat_threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_bound_curve",
    "plot_ess",
    "plot_khat",
    "plot_latents",
    "plot_manifold",
    "plot_sandwich",
    "plot_weights",
]

# More classes than this cannot be told apart by colour.
_MAX_CLASSES = 20
# More lines than this are drawn as a median and a band.
_MAX_LINES = 20
# So many points draw a smooth curve, however many particles there are.
_CURVE_POINTS = 500


def plot_bound_curve(
    curve: BoundCurve,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    log_marginal: float | Tensor | None = None,
) -> Axes:
    r"""The bound over its number K of particles, on a logarithmic axis.

    A curve that is flat at the largest K has arrived at :math:`\log p(x)`; the height it climbs is the
    guide's :math:`\mathrm{KL}(q \,\|\, p)`. Bars are one standard error either way.

    Arguments:
        curve: what :func:`pyro_iw.bound_curve` returns.
        ax: where to draw; curves of several guides may share it.
        label: name of the curve in the legend.
        log_marginal: a log evidence to compare with, drawn as a horizontal line; the mean of a tensor.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if no point of the curve is finite.

    Example:
        >>> curve = pyro_iw.bound_curve(ImportanceSampler(model, guide, num_particles=256), data)
        >>> axes = plot_bound_curve(curve, label="guide", log_marginal=-1.69)
        >>> axes.get_xscale(), axes.get_ylabel()
        ('log', 'bound [nats]')
    """
    sizes = np.asarray(curve.num_particles)
    mean, error = (
        as_array("curve.mean", curve.mean),
        as_array("curve.monte_carlo_error", curve.monte_carlo_error),
    )
    if not sizes.shape == mean.shape == error.shape or sizes.ndim != 1:
        raise ValueError(
            "curve should have as many means and errors as values of K, but has "
            f"{sizes.size}, with a mean of shape {mean.shape} and an error of shape {error.shape}."
        )
    keep = np.isfinite(mean)
    error = np.where(np.isfinite(error), error, math.nan)  # which has no bar
    refuse_nothing("curve.mean", keep)
    axes = make_axes(ax, "plot_bound_curve")
    line = axes.errorbar(
        sizes[keep], mean[keep], error[keep], marker="o", markersize=4, capsize=3, label=label
    ).lines[0]
    if log_marginal is not None:
        level = as_array("log_marginal", log_marginal).mean()
        axes.axhline(
            level, color=line.get_color(), linestyle="--", label=f"log p̂(x) = {level:.2f}".replace("-", "−")
        )
    note(axes, keep, "not finite")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    return finish(axes, "The bound by number of particles", "particles K", "bound [nats]")


def plot_ess(ess: Tensor, num_particles: int, ax: Axes | None = None) -> Axes:
    """Histogram of the effective number of particles over the datapoints.

    The upper axis is relative efficiency, ESS / S. The lower is logarithmic if ESS spans a decade or more.
    Datapoints without a living particle, whose ESS is 0, are counted in the legend.

    Arguments:
        ess: of each datapoint, of any shape.
        num_particles: the number S of particles of each.
        ax: where to draw.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if nothing positive and finite is in ``ess``, or it is more than there are particles.

    Example:
        >>> samples = ImportanceSampler(model, guide, num_particles=500)(data)
        >>> axes = plot_ess(samples.ess, samples.num_particles)
        >>> int(sum(bar.get_height() for bar in axes.patches))  # one count a datapoint
        3
    """
    values = as_array("ess", ess).ravel()
    # The sums behind an ESS round.
    if bool((values > num_particles * 1.001).any()):
        raise ValueError(
            f"ess goes up to {np.nanmax(values):.4g}, which num_particles={num_particles} do not allow. "
            "Pass the number of particles that it was computed from."
        )
    alive = np.isfinite(values) & (values > 0)
    refuse_nothing("ess", alive)
    shown = values[alive]
    is_log = shown.max() >= 10 * shown.min()
    axes = make_axes(ax, "plot_ess")
    bars(axes, shown, bin_edges(shown, is_log))
    median = float(np.median(shown))
    axes.axvline(
        median,
        color="black",
        linestyle="--",
        label=f"median {median:.3g} ({percent(median / num_particles)} of {num_particles})",
    )
    note(axes, values != 0, "without a living particle")
    note(axes, np.isfinite(values), "not finite")
    if is_log:
        axes.set_xscale("log")
        axes.set_xlim(min(1.0, shown.min()), num_particles)
        axes.xaxis.set_major_formatter("{x:g}")
    upper = axes.secondary_xaxis("top", functions=(lambda x: x / num_particles, lambda x: x * num_particles))
    upper.xaxis.set_major_formatter(lambda share, _: percent(share))
    upper.set_xlabel("relative efficiency ESS / S")
    return finish(axes, "Effective number of particles", "ESS", "datapoints")


def plot_khat(khat: Tensor, num_particles: int, ax: Axes | None = None) -> Axes:
    """Histogram of the Pareto shape k̂ over the datapoints, with the threshold that few should exceed.

    Infinite values (see :func:`~pyro_iw.psis.pareto_smoothed`) have a hatched bar of their own at either end.

    Arguments:
        khat: of each datapoint, of any shape.
        num_particles: the number of particles of each, which the threshold depends on.
        ax: where to draw.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if ``khat`` is empty or NaN throughout.

    Example:
        >>> samples = ImportanceSampler(model, guide, num_particles=2000)(data)
        >>> axes = plot_khat(samples.khat, samples.num_particles)
        >>> axes.get_legend().get_texts()[0].get_text()
        'threshold 0.70: 0 of 3 above (0%)'
    """
    values = as_array("khat", khat).ravel()
    known = ~np.isnan(values)
    refuse_nothing("khat", known)
    threshold = khat_threshold(num_particles)
    above = int((values > threshold).sum())
    shown = values[np.isfinite(values)]
    axes = make_axes(ax, "plot_khat")

    # The threshold is an edge, so that no bar has a share on either side of it.
    low, high = min(shown.min(initial=math.inf), threshold), max(shown.max(initial=-math.inf), threshold)
    width = max(high - low, 0.1) / num_bins(len(shown))
    first, last = math.floor((low - threshold) / width), math.floor((high - threshold) / width) + 1
    edges = threshold + width * np.arange(first, last + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    for bar, index in zip(bars(axes, shown, edges), range(first, last), strict=True):
        if index >= 0:
            bar.set_facecolor(HIGH)
    for sign, place, colour in ((-1, edges[0] - 2 * width, LOW), (1, edges[-1] + 2 * width, HIGH)):
        count = int((values == sign * math.inf).sum())
        if count:
            infinite = axes.bar(place, count, 2 * width, color=colour, edgecolor="white", hatch="//")
            axes.bar_label(infinite, ["∞" if sign > 0 else "−∞"])

    share = percent(above / known.sum())
    label = f"threshold {threshold:.2f}: {above} of {known.sum()} above ({share})"
    axes.axvline(threshold, color="black", linestyle="--", label=label)
    note(axes, known, "NaN")
    return finish(axes, "Tail of the importance weights", "Pareto k̂", "datapoints")


def plot_weights(log_weights: Tensor | ImportanceSamples, ax: Axes | None = None) -> Axes:
    """How few of the particles hold the weight: share of the total over the share of the heaviest particles.

    A guide equal to the posterior gives the dotted line; the further up to the left a curve is, the fewer
    particles count. Each datapoint has its line; more than 20 are drawn as their median and the band from
    5% to 95% of them.

    Arguments:
        log_weights: of shape ``[S, *cells]`` in nats, or samples that have them.
        ax: where to draw.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if there are fewer than two particles, or no datapoint has weights that are finite and
            not all 0.

    Example:
        >>> samples = ImportanceSampler(model, guide, num_particles=500)(data)
        >>> axes = plot_weights(samples)
        >>> round(float(axes.lines[0].get_ydata()[-1]), 6)  # all particles hold all of the weight
        1.0
    """
    if isinstance(log_weights, ImportanceSamples):
        log_weights = log_weights.log_weights
    values = torch.as_tensor(log_weights).detach().cpu().double()
    if values.dim() == 0 or len(values) < 2:
        raise ValueError(
            "log_weights should be of shape [S, *cells] with two particles or more, but has shape "
            f"{tuple(values.shape)}."
        )
    values = values.reshape(len(values), -1)
    usable = (values.amax(0).isfinite() & ~values.isnan().any(0)).numpy()
    refuse_nothing("log_weights", usable)
    curves = values[:, usable].softmax(0).sort(0, descending=True).values.cumsum(0).numpy()
    size = len(curves)
    ranks = np.unique(np.geomspace(1, size, _CURVE_POINTS).round().astype(int))
    x, curves = ranks / size, curves[ranks - 1]

    axes = make_axes(ax, "plot_weights")
    count = curves.shape[1]
    if count <= _MAX_LINES:
        for index, line in enumerate(curves.T):
            label = f"{count} datapoint(s)" if index == 0 else None
            axes.plot(x, line, color=LOW, linewidth=0.8, alpha=0.8, label=label)
    else:
        low, median, high = np.quantile(curves, [0.05, 0.5, 0.95], axis=1)
        axes.plot(x, median, color=LOW, label=f"median of {count} datapoints")
        axes.fill_between(x, low, high, color=LOW, alpha=0.25, linewidth=0, label="5% to 95% of them")
    axes.plot(x, x, color="black", linestyle=":", label="equal weights")
    note(axes, usable, "without usable weights")
    axes.set_xscale("log")
    axes.set_xlim(1 / size, 1)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(lambda share, _: percent(share))
    axes.yaxis.set_major_formatter(lambda share, _: percent(share))
    axes.grid(alpha=0.3)
    return finish(
        axes, "Concentration of the weights", f"heaviest particles (of {size})", "share of the total weight"
    )


def plot_latents(
    values: Tensor,
    labels: Tensor | Sequence[Any] | None = None,
    dims: tuple[int, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Scatter plot of two units of a latent.

    Arguments:
        values: a point for each datapoint (the guide's means, or draws), of shape ``[N, D]`` with D >= 2.
        labels: a class (colour and legend) or, for floating point or more than 20 different ones, a number
            (colour bar) for each point.
        dims: the two units to show; by default those of largest variance.
        ax: where to draw.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if a shape or unit does not fit, or no point is finite.

    Example:
        >>> z = torch.randn(200, 5) * torch.tensor([1.0, 0.1, 2.0, 0.1, 0.1])
        >>> axes = plot_latents(z, labels=(z[:, 0] > 0).long())
        >>> axes.get_xlabel()[:6], axes.get_ylabel()[:6]
        ('unit 0', 'unit 2')
    """
    points = as_array("values", values)
    if points.ndim != 2 or points.shape[1] < 2:
        raise ValueError(f"values should be of shape [N, D] with D >= 2, but has shape {points.shape}.")
    width = points.shape[1]
    classes = np.zeros(len(points), int) if labels is None else as_numpy(labels)
    if classes.shape != points.shape[:1]:
        raise ValueError(
            f"labels should be of shape [N] for N={len(points)} points, but has shape {classes.shape}."
        )
    keep = np.isfinite(points).all(1)
    if classes.dtype.kind == "f":
        keep &= np.isfinite(classes)
    refuse_nothing("values", keep)
    points, classes = points[keep], classes[keep]
    names = np.unique(classes)
    is_number = classes.dtype.kind == "f" or len(names) > _MAX_CLASSES
    if is_number and classes.dtype.kind not in "fiub":
        raise ValueError(
            f"labels has {len(names)} different classes, which colours cannot tell apart: pass at most "
            f"{_MAX_CLASSES} classes, or numbers."
        )
    variances = points.var(0)
    if dims is None:
        first, second = sorted(np.argsort(-variances, kind="stable")[:2])
    else:
        if len(set(dims)) != 2 or not all(0 <= dim < width for dim in dims):
            raise ValueError(f"dims should be two different units in 0..{width - 1}, but is {dims}.")
        first, second = dims
    x, y = points[:, first], points[:, second]

    axes = make_axes(ax, "plot_latents")
    if is_number:
        scatter = axes.scatter(x, y, s=8, c=classes, cmap="viridis", linewidths=0)
        axes.figure.colorbar(scatter, ax=axes)
    else:
        colours = require("matplotlib", "plots", "plot_latents").colormaps["tab20"].colors
        # The strong colours of this map come first, every other one.
        for name, colour in zip(names, [*colours[::2], *colours[1::2]], strict=False):
            label = None if labels is None else name
            own = classes == name
            axes.scatter(x[own], y[own], s=8, color=colour, linewidths=0, label=label)
    note(axes, keep, "not finite")
    title = "Two units of the latent" if dims else "The two units of largest variance"
    axis_labels = (f"unit {dim} (variance {variances[dim]:.2g})" for dim in (first, second))
    # Outside, because points are everywhere inside.
    return finish(axes, title, *axis_labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=2)


def plot_manifold(
    decode: Callable[[Tensor], Tensor],
    image_shape: tuple[int, int],
    n: int = 20,
    *,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""The images that a two-dimensional latent has learnt, on a grid of its values.

    The grid is the standard normal's quantiles at :math:`(i + 1/2) / n`, so that images stand for equal
    shares of the prior, as in figure 4 of Kingma & Welling (2013).

    Arguments:
        decode: gives intensities in [0, 1] for latents ``[n * n, 2]`` (on the CPU, in the default dtype), of
            shape ``[n * n, H, W]`` or ``[n * n, H * W]``.
        image_shape: height H and width W in pixels.
        n: the number of images along either side.
        limits: the least and the largest value of an even grid, to take the place of the quantiles.
        ax: where to draw.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if an argument is out of range, or ``decode`` gives the wrong shape or values.

    Example:
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Sigmoid())
        >>> axes = plot_manifold(decoder, (8, 8), n=10)
        >>> axes.images[0].get_array().shape
        (80, 80)
    """
    if n < 1 or len(image_shape) != 2 or min(image_shape) < 1:
        raise ValueError(
            f"n should be at least 1 and image_shape (H, W), but they are {n} and {image_shape}."
        )
    if limits is None:
        grid = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    elif not -math.inf < limits[0] < limits[1] < math.inf:
        raise ValueError(f"limits should be two finite values in ascending order, but is {limits}.")
    else:
        grid = torch.linspace(*limits, n, dtype=torch.float64)
    # Rows come from the top, where the second unit is largest.
    z = torch.cartesian_prod(grid.flip(0), grid).flip(1).to(torch.get_default_dtype())
    with torch.no_grad():
        images = torch.as_tensor(decode(z)).detach().cpu()
    height, width = image_shape
    if images.shape not in ((n * n, height, width), (n * n, height * width)):
        raise ValueError(
            f"decode should give [{n * n}, {height}, {width}] or [{n * n}, {height * width}] for latents "
            f"[{n * n}, 2], but gave {list(images.shape)}."
        )
    low, high = (value.item() for value in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"decode should give intensities in [0, 1], but they range from {low:.3g} to {high:.3g}: pass "
            "the mean of the pixels, such as the sigmoid of logits."
        )
    picture = images.reshape(n, n, height, width).transpose(1, 2).reshape(n * height, n * width)

    axes = make_axes(ax, "plot_manifold")
    axes.imshow(picture.double().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    marked = np.unique([0, n // 3, n - 1 - n // 3, n - 1])
    names = [f"{grid[index]:.1f}" for index in marked]
    axes.set_xticks((marked + 0.5) * width - 0.5, names)
    axes.set_yticks((n - 1 - marked + 0.5) * height - 0.5, names)
    return finish(axes, "Images by latent value", "unit 0", "unit 1")


def plot_sandwich(bounds: Sandwich, ax: Axes | None = None) -> Axes:
    """The gap between upper and lower bound of the log evidence, by datapoint in ascending order.

    Bars are one standard error either way, from the finite number of chains; the line is the mean gap, with a
    band of one standard error by the datapoints. No estimate by as many chains is further off, but by chance.

    Arguments:
        bounds: what :func:`pyro_iw.sandwich` returns.
        ax: where to draw.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if no gap is finite.

    Example:
        >>> axes = plot_sandwich(pyro_iw.sandwich(model, guide, data, num_temperatures=50))
        >>> axes.get_ylabel()
        'upper less lower bound [nats]'
    """
    gaps, errors = as_array("gap", bounds.gap).ravel(), as_array("gap_errors", bounds.gap_errors).ravel()
    keep = np.isfinite(gaps)
    refuse_nothing("bounds.gap", keep)
    order = np.argsort(gaps[keep])
    gap = gaps[keep][order]
    error = np.where(np.isfinite(errors[keep]), errors[keep], math.nan)[order]
    axes = make_axes(ax, "plot_sandwich")
    places = np.arange(1, len(gap) + 1)
    axes.errorbar(places, gap, error, fmt="o", markersize=3, elinewidth=0.8, color=LOW)
    mean = gap.mean()
    spread = gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else 0.0
    axes.axhline(mean, color=HIGH, linestyle="--", label=f"mean {mean:.3g} ± {spread:.2g}".replace("-", "−"))
    axes.axhspan(mean - spread, mean + spread, color=HIGH, alpha=0.15, linewidth=0)
    note(axes, keep, "not finite")
    axes.grid(alpha=0.3)
    return finish(axes, "How far off log p can be", "simulated datapoints", "upper less lower bound [nats]")
