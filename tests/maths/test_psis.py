"""Pareto smoothing: against ArviZ called by hand, and the shape of tails that are known."""

import importlib.util
import math
import sys

import pytest
import torch

from pyro_iw import psis
from pyro_iw._support.optional import require
from pyro_iw.psis import khat_threshold, pareto_smoothed, warn_of_khat

arviz = require("arviz", "arviz", "This test")


@pytest.fixture(params=["arviz", "arviz_stats"])
def smoothing(request, monkeypatch):
    """Both that there are: ArviZ's own, and that of version 1, which can be there beside version 0."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    if request.param == "arviz_stats":
        monkeypatch.setattr(psis, "_arviz", psis._arviz_stats)


def _arviz_psis(log_w):
    if "psislw" in vars(arviz):
        return arviz.psislw(log_w)
    values, shape = require("arviz_stats.base", "arviz", "This test").array_stats.psislw(-log_w)
    return values, shape


def test_cell_by_cell_as_arviz_does():
    log_w = 2 * torch.randn(1000, 2, 3, dtype=torch.float64)
    smoothed, khat = pareto_smoothed(log_w)
    assert smoothed.shape == (1000, 2, 3)
    assert khat.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            values, shape = _arviz_psis(log_w[:, i, j].numpy())
            assert khat[i, j].item() == pytest.approx(float(shape))
            normalised = smoothed[:, i, j] - smoothed[:, i, j].logsumexp(0)
            torch.testing.assert_close(normalised, torch.from_numpy(values))


@pytest.mark.parametrize("shape", [0.3, 0.6, 0.9])
def test_the_shape_of_a_pareto_tail(shape):
    # The fit of 600 or so tail weights scatters by 0.05 to 0.1 around the truth: the mean of 20 by 0.02.
    uniform = torch.rand(40_000, 20, dtype=torch.float64)
    _, khat = pareto_smoothed(-shape * uniform.log())
    assert khat.mean().item() == pytest.approx(shape, abs=0.08)


def test_what_lies_below_the_tail_is_unchanged_and_the_order_kept():
    log_w = torch.randn(500, dtype=torch.float64)
    smoothed, _ = pareto_smoothed(log_w)
    low = log_w < log_w.quantile(0.8)
    torch.testing.assert_close(smoothed[low], log_w[low])
    assert not torch.allclose(smoothed[~low], log_w[~low])
    assert torch.equal(smoothed.argsort(), log_w.argsort())


def test_dtype_is_kept():
    smoothed, khat = pareto_smoothed(torch.randn(300, 2))
    assert smoothed.dtype == torch.float32
    assert khat.dtype == torch.float64


def test_degenerate_weights():
    good = torch.randn(300)
    dead = torch.full((300,), -math.inf)
    some_dead = torch.where(torch.arange(300) < 100, dead, good)
    few = torch.where(torch.arange(300) < 3, good, dead)
    table = torch.stack([good, torch.full((300,), 2.0), dead, some_dead, few], 1)
    smoothed, khat = pareto_smoothed(table)
    assert khat[0].isfinite()
    assert khat[1] == -math.inf  # all equal: no tail at all
    assert khat[2] == math.inf
    assert khat[3].isfinite()
    assert khat[4] == math.inf
    assert not smoothed.isnan().any()
    for column in (1, 2, 4):
        assert torch.equal(smoothed[:, column], table[:, column])
    assert (smoothed[:100, 3] == -math.inf).all()


@pytest.mark.usefixtures("smoothing")
@pytest.mark.parametrize("log_w", [torch.randn(10), torch.randn(24), torch.zeros(1), torch.zeros(3)])
def test_too_few_particles(log_w):
    smoothed, khat = pareto_smoothed(log_w)
    assert khat.item() == math.inf
    assert torch.equal(smoothed, log_w)
    with pytest.warns(RuntimeWarning, match=rf"k̂ is not known of {len(log_w)} particles"):
        warn_of_khat(khat, len(log_w))


def test_bounded_weights_of_few_values_have_no_tail():
    log_w = torch.where(torch.rand(1000) < 0.5, 0.0, -1.0)
    smoothed, khat = pareto_smoothed(log_w)
    assert khat.item() == -math.inf
    assert torch.equal(smoothed, log_w)


def _psis_by_hand(log_w):
    """The algorithm of Vehtari et al. (2024) for finite weights, the fit that of Zhang & Stephens (2009)."""
    order = log_w.argsort()
    size = len(log_w)
    length = math.ceil(min(size / 5, 3 * math.sqrt(size)))
    top = log_w.max()
    w = (log_w - top).exp()[order]
    cutoff, x = w[-length - 1], w[-length:] - w[-length - 1]
    grid = 30 + int(math.sqrt(length))
    steps = (grid / (torch.arange(1, grid + 1, dtype=torch.float64) - 0.5)).sqrt()
    theta = 1 / x[-1] + (1 - steps) / (3 * x[int(length / 4 + 0.5) - 1])
    k = (-theta[:, None] * x).log1p().mean(1)
    profile = length * ((-theta / k).log() - k - 1)
    theta = (torch.softmax(profile, 0) * theta).sum()
    k = (-theta * x).log1p().mean()
    sigma = -k / theta
    k = (length * k + 5) / (length + 10)
    p = (torch.arange(1, length + 1, dtype=torch.float64) - 0.5) / length
    smoothed = log_w.clone()
    tail = cutoff + sigma / k * ((1 - p) ** -k - 1)
    smoothed[order[-length:]] = top + tail.clamp(max=1).log()
    return smoothed, k


# Numbers of which a fifth is a whole one, or else 3 root S: versions 0 and 1 round it up and down.
@pytest.mark.usefixtures("smoothing")
@pytest.mark.parametrize("living", [30, 35, 100, 400, 900])
@pytest.mark.parametrize("dead", [-math.inf, -720.0, -1e30])  # of which the last two weigh 0 in float64
def test_dead_particles_count_for_nothing(living, dead):
    log_w = torch.full((1000, 2), dead, dtype=torch.float64)
    for cell, spread in enumerate((0.05, 1.5)):
        chosen = torch.randperm(1000)[:living]
        log_w[chosen, cell] = 3 + spread * torch.randn(living, dtype=torch.float64)
    smoothed, khat = pareto_smoothed(log_w)
    for cell in range(2):
        alive = log_w[:, cell] != dead
        values, shape = _psis_by_hand(log_w[alive, cell])
        assert khat[cell].item() == pytest.approx(shape.item(), abs=1e-6)
        torch.testing.assert_close(smoothed[alive, cell], values, rtol=0, atol=1e-6)
        assert (smoothed[~alive, cell] == dead).all()


@pytest.mark.usefixtures("smoothing")
@pytest.mark.parametrize("spread", [100.0, 300.0, 400.0, 1e3, 1e5, 1e300])
def test_weights_that_span_more_than_a_float_are_warned_of(spread):
    log_w = spread * torch.randn(1000, 5, dtype=torch.float64)
    smoothed, khat = pareto_smoothed(log_w)
    assert smoothed.isfinite().all()
    living = (log_w - log_w.amax(0)).exp() > 0
    assert torch.equal(smoothed[~living], log_w[~living])
    # The tail of normal log-weights has a local exponent of the order of their spread.
    assert (khat > spread / 20).all()
    if spread >= 1e3:
        assert (khat == math.inf).all()
        assert torch.equal(smoothed, log_w)
    with pytest.warns(RuntimeWarning, match=r"5 of 5 cell\(s\)"):
        warn_of_khat(khat, 1000)


@pytest.mark.usefixtures("smoothing")
@pytest.mark.parametrize("error", [1e-17, 1e-30, 1e-310])
def test_weights_equal_but_for_rounding_have_no_tail(error):
    log_w = error * torch.randn(1000, dtype=torch.float64)
    smoothed, khat = pareto_smoothed(log_w)
    assert khat.item() == -math.inf
    assert torch.equal(smoothed, log_w)
    warn_of_khat(khat, 1000)  # and warns of nothing


@pytest.mark.usefixtures("smoothing")
def test_an_exact_guide_in_single_precision_has_no_tail():
    """A fit to a few rounding errors may say anything; a large weight among equal ones is none."""
    log_w = 1e-7 * torch.randn(30, 500)
    assert (pareto_smoothed(log_w)[1] == -math.inf).all()
    log_w[0] = 5.0
    assert (pareto_smoothed(log_w)[1] > 0.7).all()


@pytest.mark.usefixtures("smoothing")
@pytest.mark.parametrize(("size", "living"), [(1000, 12), (1000, 50), (40_000, 300)])
def test_a_heavy_tail_above_weights_that_are_all_equal(size, living):
    """As where a latent leaves the weights alone but for some of its values."""
    log_w = torch.zeros(size, 3, dtype=torch.float64)
    chosen = torch.randperm(size)[:living]
    log_w[chosen] = 1.5 * -torch.rand(living, 3, dtype=torch.float64).log()
    log_w[:, 2] = (log_w[:, 2] > 0.7).double()  # two values
    smoothed, khat = pareto_smoothed(log_w)
    assert khat[2] == -math.inf
    for cell in range(2):
        # Alone with as many equal weights as make them the tail.
        count = 5 * living if living <= 45 else living**2 // 9
        alone = torch.cat([torch.zeros(count - living, dtype=torch.float64), log_w[chosen, cell]])
        values, shape = _psis_by_hand(alone)
        assert khat[cell].item() == pytest.approx(shape.item(), abs=1e-6)
        torch.testing.assert_close(smoothed[chosen, cell], values[count - living :], rtol=0, atol=1e-6)
        assert (smoothed[:, cell] == 0).sum() == size - living


def test_what_is_not_known_is_warned_of():
    with pytest.warns(RuntimeWarning, match=r"1 of 2 cell\(s\)"):
        warn_of_khat(torch.tensor([0.1, math.nan]), 1000)


def test_the_evidence_survives_smoothing_where_most_are_dead():
    # Prior Uniform(0, 1), guide N(0.5, 12), one observation 0.3 ~ N(z, 1): some 33 of 1000 particles live.
    z = 0.5 + 12 * torch.randn(1000, 20, dtype=torch.float64)
    log_w = -((0.3 - z) ** 2) / 2 + ((z - 0.5) / 12) ** 2 / 2 + math.log(12)
    log_w = torch.where((z > 0) & (z < 1), log_w, -math.inf)
    exact = math.log(0.5 * (math.erf(0.7 / 2**0.5) + math.erf(0.3 / 2**0.5)))
    smoothed, khat = pareto_smoothed(log_w)
    before, after = (table.logsumexp(0) - math.log(1000) for table in (log_w, smoothed))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)
    assert after.mean().item() == pytest.approx(exact, abs=4 * before.std().item() / 20**0.5)
    assert (khat[khat.isfinite()] < 0.7).all()


@pytest.mark.usefixtures("smoothing")
@pytest.mark.parametrize("size", [24, 26, 29])
def test_where_a_tail_begins(size):
    log_w = torch.randn(size, 50, dtype=torch.float64)
    smoothed, khat = pareto_smoothed(log_w)
    assert not khat.isnan().any()
    assert not smoothed.isnan().any()
    unfit = khat.isinf()
    assert bool(unfit.all()) or size >= 25
    assert torch.equal(smoothed[:, unfit], log_w[:, unfit])


@pytest.mark.usefixtures("smoothing")
@pytest.mark.parametrize("share", [0.005, 0.01, 0.06, 0.5])
def test_few_values_have_no_tail(share):
    log_w = torch.where(torch.arange(1000) < 1000 * share, 1.0, 0.0).double()
    smoothed, khat = pareto_smoothed(log_w)
    assert khat.item() == -math.inf
    assert torch.equal(smoothed, log_w)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_weight_leaves_nothing_to_fit(bad):
    log_w = torch.randn(100, 2, dtype=torch.float64)
    log_w[3, 0] = bad
    smoothed, khat = pareto_smoothed(log_w)
    assert khat[0] == math.inf
    assert khat[1].isfinite()
    torch.testing.assert_close(smoothed[:, 0], log_w[:, 0], equal_nan=True)


def test_threshold():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(10_000) == 0.7


def test_without_arviz(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    monkeypatch.setitem(sys.modules, "arviz_stats", None)
    with pytest.raises(ImportError, match=r"Pareto smoothing.*pip install 'pyro-iw\[arviz\]'"):
        pareto_smoothed(torch.randn(100))


def test_a_broken_package_is_not_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "halfthere.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        require("halfthere", "arviz", "This test")
