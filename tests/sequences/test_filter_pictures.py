"""Filtered sequences in ArviZ and in pictures: the numbers that they show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from helpers.linear_gaussian import Walk, near_optimal, simulate
from pyro_iw import FilteredSequences, ParticleFilter
from pyro_iw._support.optional import is_arviz_0
from pyro_iw.sequences import plots
from sequences.test_cells import LENGTHS, Padded, PaddedGuide
from sequences.test_particle_filter import Counting

arviz = pytest.importorskip("arviz")


@pytest.fixture(scope="module")
def filtered() -> FilteredSequences:
    torch.manual_seed(0)
    return ParticleFilter(Walk(), near_optimal(), 40, num_filters=3)(simulate(7, 4))


@pytest.fixture
def ax():
    figure = Figure(layout="constrained")
    yield figure.add_subplot()
    figure.draw_without_rendering()


def test_groups_and_dims(filtered) -> None:
    data = filtered.to_arviz(num_samples=30, coords={"data": ["a", "b", "c", "d"], "time": range(2000, 2007)})
    posterior = data.posterior if is_arviz_0(arviz) else data["posterior"].dataset
    assert dict(posterior["z"].sizes) == {"chain": 1, "draw": 30, "time": 7, "data": 4}
    assert posterior["time"].values.tolist() == list(range(2000, 2007))
    stats = data.filter_stats if is_arviz_0(arviz) else data["filter_stats"].dataset
    assert stats["ess"].dims == ("time", "data")
    assert stats["log_marginal"].dims == ("data",)
    np.testing.assert_array_equal(stats["log_increment"].values, filtered.log_increments.numpy())
    filtering = data.filtering if is_arviz_0(arviz) else data["filtering"].dataset
    np.testing.assert_array_equal(filtering["z_mean"].values, filtered.mean().numpy())
    np.testing.assert_allclose(filtering["z_sd"].values ** 2, filtered.variance().numpy())
    observed = data.observed_data if is_arviz_0(arviz) else data["observed_data"].dataset
    np.testing.assert_array_equal(observed["x"].values, simulate(7, 4).numpy())


def test_events_and_no_plate() -> None:
    judge = ParticleFilter(Counting(), Counting(guide=True), 50)
    data = judge(torch.zeros(3), initial=torch.ones(2)).to_arviz(20, smoothed=False)
    posterior = data.posterior if is_arviz_0(arviz) else data["posterior"].dataset
    assert dict(posterior["z"].sizes) == {"chain": 1, "draw": 20, "time": 3, "z_dim_0": 2}


@pytest.mark.parametrize(
    ("coords", "message"),
    [({"weeks": [1]}, "coords names dim 'weeks'"), ({"time": [1]}, "1 labels for dim 'time'")],
)
def test_wrong_coords(filtered, coords, message) -> None:
    with pytest.raises(ValueError, match=message):
        filtered.to_arviz(5, coords=coords)


@pytest.mark.parametrize(
    ("plot", "values"),
    [
        (plots.plot_ess_over_time, lambda f: f.ess),
        (plots.plot_ancestors, lambda f: f.num_ancestors()),
        (plots.plot_log_increments, lambda f: f.log_increments),
    ],
)
def test_over_time(filtered, plot, values, ax) -> None:
    plot(filtered, ax, sequence=2, label="one")
    plot(filtered, ax, label="all")
    one, both = (line.get_ydata() for line in ax.lines)
    np.testing.assert_allclose(one, values(filtered)[:, 2].numpy())
    np.testing.assert_allclose(both, values(filtered).mean(1).numpy())
    assert len(ax.collections) == 1
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "all"]
    with pytest.raises(ValueError, match="There is no sequence 9"):
        plot(filtered, ax, sequence=9)


def test_masked_steps_are_left_out(ax) -> None:
    filtered = ParticleFilter(Padded(), PaddedGuide(), 20)(simulate(8, 5), lengths=LENGTHS)
    plots.plot_ess_over_time(filtered, ax)
    plots.plot_ess_over_time(filtered, ax, sequence=1)
    everyone, one = (line.get_ydata() for line in ax.lines)
    assert np.isfinite(everyone).all()
    assert np.isfinite(one).tolist() == [True] * 3 + [False] * 5


def test_mean_and_trajectories(filtered, ax) -> None:
    plots.plot_filtering_mean(filtered, ax=ax, sequence=3)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), filtered.mean()[:, 3].numpy())
    plots.plot_trajectories(filtered, "z", ax, num_samples=12, sequence=3)
    assert len(ax.lines) == 1 + 12 + 1
    drawn = np.stack([line.get_ydata() for line in ax.lines[1:13]])
    np.testing.assert_allclose(ax.lines[13].get_ydata(), drawn.mean(0))
    assert {*drawn[:, 0]} <= {*filtered.values["z"][0, :, 3].tolist()}
    with pytest.raises(ValueError, match="no sequence 7"):
        plots.plot_filtering_mean(filtered, ax=ax, sequence=7)
    with pytest.raises(ValueError, match="sequence must be 1 number"):
        plots.plot_filtering_mean(filtered, ax=ax, sequence=None)


def test_elements_of_an_event(ax) -> None:
    filtered = ParticleFilter(Counting(), Counting(guide=True), 50)(torch.zeros(3), initial=torch.ones(2))
    plots.plot_filtering_mean(filtered, ax=ax, element=1)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), filtered.mean()[:, 1].numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="element 5"):
        plots.plot_filtering_mean(filtered, ax=ax, element=5)


def test_a_new_figure(filtered) -> None:
    for plot in (plots.plot_ess_over_time, plots.plot_filtering_mean, plots.plot_trajectories):
        assert plot(filtered).get_title()
