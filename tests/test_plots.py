"""What the plots draw: the data of their lines, bars and images, not merely that they run."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import pyro_iw
from pyro_iw import ImportanceSampler, Sandwich, bound_curve
from pyro_iw.plots import (
    plot_bound_curve,
    plot_ess,
    plot_khat,
    plot_latents,
    plot_manifold,
    plot_sandwich,
    plot_weights,
)
from pyro_iw.posterior.evaluation import BoundCurve
from pyro_iw.psis import khat_threshold

matplotlib.use("Agg")

CURVE = BoundCurve((1, 4, 16), torch.tensor([-3.0, -2.0, -1.5]), torch.tensor([0.3, 0.2, 0.1]))
# Each of the functions on something that it can draw.
ALL: dict[str, Callable[..., Axes]] = {
    "plot_bound_curve": lambda ax=None: plot_bound_curve(CURVE, ax),
    "plot_ess": lambda ax=None: plot_ess(torch.tensor([1.0, 50.0, 9.0]), 100, ax),
    "plot_khat": lambda ax=None: plot_khat(torch.tensor([0.1, 0.9]), 1000, ax),
    "plot_weights": lambda ax=None: plot_weights(torch.randn(50, 3), ax),
    "plot_latents": lambda ax=None: plot_latents(torch.randn(9, 3), ax=ax),
    "plot_manifold": lambda ax=None: plot_manifold(lambda z: z.sigmoid(), (1, 2), n=3, ax=ax),
}


@pytest.fixture
def ax() -> Iterator[Axes]:
    """Axes of a figure that pyplot does not know of, drawn at the end: some errors show only then."""
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    before = pyplot.get_fignums()
    yield axes
    figure.draw_without_rendering()
    assert pyplot.get_fignums() == before


def legend(axes: Axes) -> list[str]:
    return [] if axes.get_legend() is None else [text.get_text() for text in axes.get_legend().get_texts()]


def heights(axes: Axes) -> float:
    return sum(bar.get_height() for bar in axes.patches)


# All of them


@pytest.mark.parametrize("name", ALL)
def test_draws_on_the_given_axes_or_on_new_ones(name: str, ax: Axes) -> None:
    assert ALL[name](ax=ax) is ax
    before = pyplot.get_fignums()
    new = ALL[name]()
    assert new is not ax
    assert new.figure.number not in before
    new.figure.draw_without_rendering()
    pyplot.close(new.figure)
    assert pyplot.get_fignums() == before
    for axes in (ax, new):
        assert axes.get_title()
        assert axes.get_xlabel()
        assert axes.get_ylabel()


@pytest.mark.parametrize("name", ALL)
def test_missing_matplotlib(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=rf"{name} needs matplotlib.*pip install 'pyro-iw\[plots\]'"):
        ALL[name]()


def test_importing_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyro_iw, "plots", sys.modules["pyro_iw.plots"])
    monkeypatch.delitem(sys.modules, "pyro_iw.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    importlib.import_module("pyro_iw.plots")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_bound_curve(BoundCurve((1, 2), torch.zeros(3), torch.zeros(3))), "as many means"),
        (
            lambda: plot_bound_curve(BoundCurve((1,), torch.tensor([math.nan]), torch.zeros(1))),
            "curve.mean has nothing to draw: none of its 1 value",
        ),
        (lambda: plot_ess(torch.tensor([math.nan, 200.0]), 100), "up to 200, which num_particles=100 do not"),
        (lambda: plot_ess(torch.zeros(3), 100), "nothing to draw"),
        (lambda: plot_ess(torch.empty(0), 100), "none of its 0 value"),
        (lambda: plot_ess(torch.zeros(3, dtype=torch.complex64), 100), "real numbers.*complex"),
        (lambda: plot_khat(torch.tensor([math.nan]), 100), "nothing to draw"),
        (lambda: plot_weights(torch.zeros(1, 4)), r"\[S, \*cells\] with two particles.*\(1, 4\)"),
        (lambda: plot_weights(torch.tensor(0.0)), r"\[S, \*cells\]"),
        (lambda: plot_weights(torch.full((5, 2), -math.inf)), "nothing to draw"),
        (lambda: plot_latents(torch.zeros(4)), r"\[N, D\] with D >= 2.*\(4,\)"),
        (lambda: plot_latents(torch.zeros(4, 1)), r"D >= 2"),
        (lambda: plot_latents(torch.zeros(4, 2), labels=torch.zeros(3)), r"\[N\] for N=4.*\(3,\)"),
        (lambda: plot_latents(torch.zeros(4, 2), dims=(0, 2)), r"different units in 0\.\.1.*\(0, 2\)"),
        (lambda: plot_latents(torch.zeros(4, 2), dims=(1, 1)), "different units"),
        (lambda: plot_latents(torch.full((4, 2), math.inf)), "nothing to draw"),
        (lambda: plot_latents(torch.zeros(30, 2), labels=[str(i) for i in range(30)]), "30 different"),
        (lambda: plot_manifold(torch.sigmoid, (2, 2), n=2), r"\[4, 2, 2\] or \[4, 4\].*gave \[4, 2\]"),
        (lambda: plot_manifold(lambda z: 3 * z, (1, 2)), r"in \[0, 1\].*sigmoid"),
        (lambda: plot_manifold(lambda z: z / 0, (1, 2)), r"in \[0, 1\]"),
        (lambda: plot_manifold(lambda z: z * math.nan, (1, 2)), r"in \[0, 1\].*nan"),
        (lambda: plot_manifold(torch.sigmoid, (2,)), r"image_shape \(H, W\)"),
        (lambda: plot_manifold(torch.sigmoid, (1, 2), n=0), "n should be at least 1"),
        (lambda: plot_manifold(torch.sigmoid, (1, 2), limits=(1.0, -1.0)), "ascending"),
        (lambda: plot_manifold(torch.sigmoid, (1, 2), limits=(-math.inf, 1.0)), "finite"),
    ],
)
def test_says_what_is_wrong_before_it_opens_a_figure(call: Callable[[], Any], message: str) -> None:
    before = pyplot.get_fignums()
    with pytest.raises(ValueError, match=message):
        call()
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_and_dtypes(dtype: torch.dtype, ax: Axes) -> None:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.rand(*shape).to(dtype).requires_grad_()

    plot_bound_curve(BoundCurve((1, 2), tensor(2), tensor(2)), ax, log_marginal=tensor(4))
    plot_ess(tensor(5) + 1, 100, Figure().add_subplot())
    plot_khat(tensor(5), 100, Figure().add_subplot())
    plot_weights(tensor(5, 2), Figure().add_subplot())
    plot_latents(tensor(5, 2), labels=tensor(5), ax=Figure().add_subplot())
    scale = tensor(2)
    plot_manifold(lambda z: (scale * z).sigmoid(), (1, 2), ax=Figure().add_subplot())


# The bound by K


def test_bound_curve(ax: Axes) -> None:
    plot_bound_curve(CURVE, ax, label="mine", log_marginal=torch.tensor([-1.0, -1.5]))
    container = ax.containers[0]
    line, caps, (bars,) = container.lines
    np.testing.assert_array_equal(line.get_xdata(), CURVE.num_particles)
    np.testing.assert_allclose(line.get_ydata(), CURVE.mean)
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends.mean(1), CURVE.mean)
    np.testing.assert_allclose(np.diff(ends)[:, 0] / 2, CURVE.monte_carlo_error, rtol=1e-6)
    level = next(drawn for drawn in ax.lines if drawn not in (line, *caps))
    np.testing.assert_allclose(level.get_ydata(), -1.25)
    assert sorted(legend(ax)) == ["log p̂(x) = −1.25", "mine"]
    assert ax.get_xscale() == "log"
    assert ax.xaxis.get_major_formatter()(1024) == "1024"


def test_bound_curves_share_axes(ax: Axes) -> None:
    for label in ("one", "two"):
        plot_bound_curve(CURVE, ax, label=label, log_marginal=0.0)
    one, two = (container.lines[0].get_color() for container in ax.containers)
    assert one != two
    levels = [line.get_color() for line in ax.lines if line.get_linestyle() == "--"]
    assert levels == [one, two]


def test_bound_curve_leaves_out_what_is_not_finite(ax: Axes) -> None:
    curve = BoundCurve(
        (1, 2, 4), torch.tensor([-math.inf, -2.0, -1.0]), torch.tensor([1.0, math.nan, math.inf])
    )
    plot_bound_curve(curve, ax)
    np.testing.assert_array_equal(ax.containers[0].lines[0].get_xdata(), [2, 4])
    assert legend(ax) == ["1 of 3 not finite"]


def test_bound_curve_of_a_pair(ax: Axes) -> None:
    curve = bound_curve(ImportanceSampler(model, guide, 64), torch.tensor([0.5, -1.0]))
    plot_bound_curve(curve, ax)
    line = ax.containers[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 4, 8, 16, 32, 64])
    np.testing.assert_allclose(line.get_ydata(), curve.mean)


# ESS


def test_ess_over_decades(ax: Axes) -> None:
    ess = torch.logspace(0, 3, 101)
    plot_ess(ess, 1000, ax)
    assert heights(ax) == 101
    assert ax.get_xscale() == "log"
    assert ax.get_xlim() == pytest.approx((1, 1000))
    # Evenly spaced in the logarithm, and so are the bins.
    left = np.array([bar.get_x() for bar in ax.patches])
    np.testing.assert_allclose(np.diff(np.log(left)), np.log(1000) / len(left), rtol=1e-6)
    assert legend(ax) == ["median 31.6 (3.16% of 1000)"]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), 1000**0.5, rtol=1e-5)


def test_ess_within_a_decade(ax: Axes) -> None:
    plot_ess(torch.linspace(500, 900, 12).reshape(3, 4), 1000, ax)
    assert heights(ax) == 12
    assert ax.get_xscale() == "linear"
    assert legend(ax) == ["median 700 (70% of 1000)"]


@pytest.mark.parametrize("values", [[1.0, 10.0, 100.0], [60.0, 80.0, 90.0]])
def test_ess_has_relative_efficiency_above(values: list[float], ax: Axes) -> None:
    plot_ess(torch.tensor(values), 200, ax)
    ax.figure.draw_without_rendering()
    (upper,) = ax.child_axes
    assert upper.get_xlim() == pytest.approx(tuple(x / 200 for x in ax.get_xlim()))
    assert upper.xaxis.get_major_formatter()(0.25) == "25%"


@pytest.mark.parametrize("value", [1.0, 100.0, 1e-3])
def test_ess_all_the_same(value: float, ax: Axes) -> None:
    plot_ess(torch.full((7,), value), 100, ax)
    assert heights(ax) == 7


def test_ess_of_dead_cells(ax: Axes) -> None:
    plot_ess(torch.tensor([0.0, 5.0, math.nan, 6.0]), 100, ax)
    assert heights(ax) == 2
    assert legend(ax)[1:] == ["1 of 4 without a living particle", "1 of 4 not finite"]


# k̂


@pytest.mark.parametrize("num_particles", [50, 1000, 10**6])
def test_khat(num_particles: int, ax: Axes) -> None:
    threshold = khat_threshold(num_particles)
    khat = torch.linspace(-0.2, 1.3, 301, dtype=torch.float64)
    plot_khat(khat, num_particles, ax)
    assert heights(ax) == 301
    np.testing.assert_allclose(ax.lines[0].get_xdata(), threshold)
    above = int((khat > threshold).sum())
    assert legend(ax) == [f"threshold {threshold:.2f}: {above} of 301 above ({above / 3.01:.3g}%)"]
    # No bar lies on both sides, and the colour says on which.
    red = [bar for bar in ax.patches if bar.get_facecolor() == to_rgba("tab:red")]
    assert sum(bar.get_height() for bar in red) == above
    assert min(bar.get_x() for bar in red) == pytest.approx(threshold)


def test_khat_of_infinite_and_nan(ax: Axes) -> None:
    infinite = [math.inf] * 3 + [-math.inf] * 2
    plot_khat(torch.tensor([0.1, 0.2, 0.9, *infinite, math.nan]), 10**6, ax)
    assert heights(ax) == 8
    hatched = [bar for bar in ax.patches if bar.get_hatch()]
    assert [bar.get_height() for bar in hatched] == [2, 3]
    assert [text.get_text() for text in ax.texts] == ["−∞", "∞"]
    assert hatched[0].get_x() + hatched[0].get_width() < 0.1
    assert hatched[1].get_x() > 0.9
    assert legend(ax) == ["threshold 0.70: 4 of 8 above (50%)", "1 of 9 NaN"]


def test_khat_all_infinite(ax: Axes) -> None:
    plot_khat(torch.full((4,), math.inf), 20, ax)
    assert heights(ax) == 4
    assert legend(ax) == ["threshold 0.23: 4 of 4 above (100%)"]


def test_khat_counts_all_at_any_scale() -> None:
    for power in range(-10, 10):
        axes = Figure().add_subplot()
        plot_khat(torch.randn(50) * 10.0**power, 1000, axes)
        assert heights(axes) == 50


# Weights


def test_weights(ax: Axes) -> None:
    weights = torch.tensor([[1.0, 1.0], [5.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    log_weights = weights.double().log() + torch.tensor([1000.0, -1000.0])
    plot_weights(log_weights, ax)
    first, equal, diagonal = ax.lines
    for line in ax.lines:
        np.testing.assert_allclose(line.get_xdata(), [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(first.get_ydata(), [0.5, 0.7, 0.9, 1.0])
    np.testing.assert_allclose(equal.get_ydata(), [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(diagonal.get_ydata(), [0.25, 0.5, 0.75, 1.0])
    assert legend(ax) == ["2 datapoint(s)", "equal weights"]
    assert ax.get_xscale() == "log"


def test_weights_of_many_cells(ax: Axes) -> None:
    log_weights = torch.randn(40, 5, 6, dtype=torch.float64)
    plot_weights(log_weights, ax)
    shares = log_weights.reshape(40, 30).softmax(0).sort(0, descending=True).values.cumsum(0)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), shares.quantile(0.5, 1))
    np.testing.assert_allclose(ax.lines[0].get_xdata(), np.arange(1, 41) / 40)
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices[:, 1]
    for quantile in (0.05, 0.95):
        for value in shares.quantile(quantile, 1):
            assert np.abs(corners - value.item()).min() < 1e-12
    assert legend(ax) == ["median of 30 datapoints", "5% to 95% of them", "equal weights"]


def test_weights_of_many_particles(ax: Axes) -> None:
    plot_weights(torch.randn(100_000), ax)
    x, y = ax.lines[0].get_data()
    assert len(x) <= 500
    assert (x[0], x[-1]) == (1e-5, 1.0)
    assert bool((np.diff(y) > 0).all())
    assert y[-1] == pytest.approx(1)


def test_weights_leave_out_dead_cells(ax: Axes) -> None:
    log_weights = torch.zeros(4, 5)
    log_weights[:, 0] = -math.inf
    log_weights[1, 1] = math.nan
    log_weights[1, 2] = math.inf
    log_weights[1:, 3] = -math.inf  # one living particle is enough
    plot_weights(log_weights, ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1, 1, 1, 1])
    assert legend(ax) == ["2 datapoint(s)", "equal weights", "3 of 5 without usable weights"]


def model(data: torch.Tensor) -> None:
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


def guide(data: torch.Tensor) -> None:
    with pyro.plate("data", len(data)):
        pyro.sample("z", dist.Normal(0.3 * data, 0.7))


def test_weights_of_samples(ax: Axes) -> None:
    samples = ImportanceSampler(model, guide, num_particles=50)(torch.tensor([0.5, -1.0]))
    plot_weights(samples, ax)
    expected = samples.weights.double().sort(0, descending=True).values.cumsum(0)
    for index in range(2):
        np.testing.assert_allclose(ax.lines[index].get_ydata(), expected[:, index], rtol=1e-5)


# Latents


def test_latents_of_largest_variance(ax: Axes) -> None:
    values = torch.randn(100, 4) * torch.tensor([0.1, 1.0, 0.1, 2.0]) + 50
    plot_latents(values, ax=ax)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), values[:, [1, 3]])
    variance = values[:, 1].var(correction=0)
    assert ax.get_xlabel() == f"unit 1 (variance {variance:.2g})"
    assert legend(ax) == []


def test_latents_of_given_dims(ax: Axes) -> None:
    values = torch.randn(10, 4)
    plot_latents(values, dims=(3, 0), ax=ax)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), values[:, [3, 0]])
    assert ax.get_ylabel().startswith("unit 0")


@pytest.mark.parametrize("labels", [torch.tensor([7, 3, 7]), ["b", "a", "b"], np.array([True, False, True])])
def test_latents_by_class(labels: Any, ax: Axes) -> None:
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    plot_latents(values, labels, dims=(0, 1), ax=ax)
    one, other = ax.collections
    np.testing.assert_allclose(one.get_offsets(), values[[1]])
    np.testing.assert_allclose(other.get_offsets(), values[[0, 2]])
    assert not np.array_equal(one.get_facecolor(), other.get_facecolor())
    assert legend(ax) == [str(name) for name in np.unique(np.asarray(labels))]


def test_latents_tell_twenty_classes_apart(ax: Axes) -> None:
    plot_latents(torch.randn(20, 2), torch.arange(20), ax=ax)
    assert len({tuple(points.get_facecolor()[0]) for points in ax.collections}) == 20


@pytest.mark.parametrize("labels", [torch.linspace(0, 1, 30), torch.arange(30)])
def test_latents_by_number(labels: torch.Tensor, ax: Axes) -> None:
    plot_latents(torch.randn(30, 2), labels, ax=ax)
    np.testing.assert_allclose(ax.collections[0].get_array(), labels)
    assert len(ax.figure.axes) == 2  # the colour bar


def test_latents_leave_out_what_is_not_finite(ax: Axes) -> None:
    values = torch.tensor([[0.0, 1.0], [math.nan, 3.0], [4.0, math.inf], [6.0, 7.0], [8.0, 9.0]])
    plot_latents(values, torch.tensor([0.0, 1.0, 2.0, 3.0, math.nan]), dims=(0, 1), ax=ax)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), values[[0, 3]])
    np.testing.assert_allclose(ax.collections[0].get_array(), [0, 3])
    assert legend(ax) == ["3 of 5 not finite"]


# The manifold


def test_manifold(ax: Axes) -> None:
    """Every image has unit 0 in its left half and unit 1 in its right one, so it says where it should be."""

    def decode(z: torch.Tensor) -> torch.Tensor:
        return dist.Normal(0.0, 1.0).cdf(z)[:, None, :].expand(-1, 3, -1)

    plot_manifold(decode, (3, 2), n=4, ax=ax)
    picture = ax.images[0].get_array()
    assert picture.shape == (12, 8)
    quantiles = [0.125, 0.375, 0.625, 0.875]
    for row in range(4):
        for column in range(4):
            tile = picture[3 * row : 3 * row + 3, 2 * column : 2 * column + 2]
            expected = [quantiles[column], quantiles[3 - row]]  # unit 1 grows upwards
            np.testing.assert_allclose(tile, np.tile(expected, (3, 1)), rtol=1e-5)
    # Ticks at the middle of the images that they name.
    ticks = dict(zip([text.get_text() for text in ax.get_xticklabels()], ax.get_xticks(), strict=True))
    assert ticks == {"-1.2": 0.5, "-0.3": 2.5, "0.3": 4.5, "1.2": 6.5}
    ticks = dict(zip([text.get_text() for text in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    assert ticks == {"-1.2": 10.0, "-0.3": 7.0, "0.3": 4.0, "1.2": 1.0}


def test_manifold_of_limits(ax: Axes) -> None:
    seen = []

    def decode(z: torch.Tensor) -> torch.Tensor:
        seen.append(z)
        assert not torch.is_grad_enabled()
        return z.sigmoid()

    plot_manifold(decode, (1, 2), n=3, limits=(-2.0, 2.0), ax=ax)
    (z,) = seen
    expected = [[-2, 2], [0, 2], [2, 2], [-2, 0], [0, 0], [2, 0], [-2, -2], [0, -2], [2, -2]]
    assert torch.equal(z, torch.tensor(expected, dtype=torch.get_default_dtype()))
    np.testing.assert_allclose(ax.images[0].get_array()[0], z[:3].sigmoid().flatten(), rtol=1e-6)


def test_manifold_of_one_image(ax: Axes) -> None:
    plot_manifold(lambda z: z.sigmoid(), (2, 1), n=1, ax=ax)
    np.testing.assert_array_equal(ax.images[0].get_array(), [[0.5], [0.5]])


class TestSandwich:
    BOUNDS = Sandwich(
        torch.tensor([[-3.0, -2.0, -5.0, -1.0]]),
        torch.tensor([[-2.5, -1.9, -4.0, math.nan]]),
        torch.full((1, 4), 0.3),
        torch.full((1, 4), 0.4),
        16,
        100,
    )

    def test_gaps_in_ascending_order(self):
        axes = plot_sandwich(self.BOUNDS)
        places, gaps = axes.containers[0].lines[0].get_data()
        assert places.tolist() == [1, 2, 3]
        assert gaps.tolist() == pytest.approx([0.1, 0.5, 1.0], abs=1e-6)
        (bars,) = axes.containers[0].lines[2]
        assert [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()] == pytest.approx([1.0] * 3)

    def test_the_mean_and_what_is_left_out(self):
        labels = plot_sandwich(self.BOUNDS).get_legend_handles_labels()[1]
        spread = np.std([0.1, 0.5, 1.0], ddof=1) / math.sqrt(3)
        assert labels == [f"mean 0.533 ± {spread:.2g}", "1 of 4 not finite"]

    def test_nothing_to_draw(self):
        nan = torch.full((1, 2), math.nan)
        with pytest.raises(ValueError, match="gap has nothing to draw"):
            plot_sandwich(Sandwich(nan, nan, nan, nan, 2, 2))
