"""Pareto smoothing: against ArviZ called by hand, and the shape of tails that are known."""

import math
import sys

import pytest
import torch

from pyro_iw.optional import require
from pyro_iw.psis import khat_threshold, pareto_smoothed

arviz = require("arviz", "arviz", "This test")


def test_cell_by_cell_as_arviz_does():
    log_w = 2 * torch.randn(1000, 2, 3, dtype=torch.float64)
    smoothed, khat = pareto_smoothed(log_w)
    assert smoothed.shape == (1000, 2, 3)
    assert khat.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            values, shape = arviz.psislw(log_w[:, i, j].numpy())
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


@pytest.mark.parametrize("log_w", [torch.randn(10), torch.zeros(1), torch.zeros(3)])
def test_too_few_particles(log_w):
    assert pareto_smoothed(log_w)[1].item() == math.inf


def test_bounded_weights_of_few_values_have_no_tail():
    log_w = torch.where(torch.rand(1000) < 0.5, 0.0, -1.0)
    smoothed, khat = pareto_smoothed(log_w)
    assert khat.item() == -math.inf
    assert torch.equal(smoothed, log_w)


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
