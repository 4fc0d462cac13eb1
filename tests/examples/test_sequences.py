"""Particle filters in the examples: truths by other means, and the smoke runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import dmm
import filter_toy
import oscillator
import pytest
import torch
import volatility
from torch.distributions import MultivariateNormal, Normal

from pyro_iw import ParticleFilter


def test_the_oscillator_by_conditioning_all_of_it() -> None:
    initial, ys = torch.tensor([1.0, 0.0]), torch.tensor([0.3, -1.0, 0.7, 2.0])
    powers = [torch.linalg.matrix_power(oscillator.A, t) for t in range(5)]
    mean = torch.stack([(powers[t + 1] @ initial)[0] for t in range(4)])
    covariance = torch.eye(4)
    for t in range(4):
        for s in range(4):
            rows = [(powers[t - r] @ powers[s - r].T)[0, 0] for r in range(min(s, t) + 1)]
            covariance[t, s] += 0.25 * sum(rows)
    truth = MultivariateNormal(mean, covariance).log_prob(ys).item()
    assert oscillator.kalman(ys, initial, 0.5, 1.0) == pytest.approx(truth, abs=1e-4)


def test_the_grid_of_the_volatility() -> None:
    """One return, and two of a walk without memory, by a finer integral."""
    h = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    prior = Normal(-1.0, 0.3 / math.sqrt(1 - 0.95**2)).log_prob(h).exp()
    one = (prior * Normal(0.0, (h / 2).exp()).log_prob(torch.tensor(0.4)).exp()).sum() * (h[1] - h[0])
    found = volatility.on_a_grid(torch.tensor([0.4]), -1.0, 0.95, 0.3)
    assert found == pytest.approx(one.log().item(), abs=1e-5)
    apart = [volatility.on_a_grid(torch.tensor([r]), -1.0, 0.0, 0.8) for r in (0.4, -1.3)]
    both = volatility.on_a_grid(torch.tensor([0.4, -1.3]), -1.0, 0.0, 0.8)
    assert both == pytest.approx(sum(apart), abs=1e-5)


def test_filters_agree_with_the_grid() -> None:
    torch.manual_seed(0)
    net, r = volatility.Volatility(), volatility.generate(20)
    filters = ParticleFilter(volatility.Model(net), volatility.Guide(net), 500)
    found = filters(r.unsqueeze(1), volatility.windows(r).unsqueeze(1))
    exact = volatility.on_a_grid(r, *(value.item() for value in net.values))
    assert abs(found.log_marginal.item() - exact) < 4 * found.monte_carlo_error.item() + 0.01


def test_windows() -> None:
    read = volatility.windows(torch.tensor([1.0, -math.e, math.e**2, 0.0]))
    assert read.shape == (4, 5)
    torch.testing.assert_close(read[0], torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0]))


@torch.no_grad()
def test_the_steps_of_the_deep_markov_model_are_the_model() -> None:
    """Without resampling, one particle: the log-weight of the ordinary pair on the same noise."""
    from pyro_iw import FIVO_ELBO, IWAE_ELBO

    torch.manual_seed(2)
    net = dmm.DMM(latent=2, hidden=3)
    x, lengths = torch.bernoulli(torch.full((3, 5, dmm.KEYS), 0.4)), torch.tensor([2, 5, 1])
    sequences, given = dmm.in_steps(x, lengths)
    filters, weighted = FIVO_ELBO(4, ess_threshold=0), IWAE_ELBO(4)
    losses = []
    for loss, pair, args, kwargs in (
        (filters, (dmm.Model(net), dmm.Guide(net)), sequences, given),
        (weighted, (net.model, net.guide), (x, lengths), {}),
    ):
        loss.loss(*pair, *args, **kwargs)
        torch.manual_seed(0)
        losses.append(loss.loss(*pair, *args, **kwargs))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def saved(folder: Path, name: str) -> dict:
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())


def test_smoke_of_the_oscillator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = oscillator.main(["--smoke", "--out", str(tmp_path)])
    assert abs(results["log_marginal"] - results["kalman"]) < 5 * results["error"] + 0.1
    assert len(saved(tmp_path, "oscillator")["mean"]) == 8
    assert "by Kalman" in capsys.readouterr().out


def test_smoke_of_the_volatility(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = volatility.main(["--smoke", "--out", str(tmp_path)])
    assert list(results["losses"]) == ["ELBO", "IWAE", "FIVO"]
    for row in saved(tmp_path, "volatility")["losses"].values():
        assert abs(row["log_marginal"] - row["grid"]) < 5 * row["error"] + 0.02
    assert "nats per time step" in capsys.readouterr().out


def test_smoke_of_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dmm.main(["--compare", "--smoke", "--out", str(tmp_path)])
    results = saved(tmp_path, "dmm_losses")
    assert list(results["losses"]) == ["ELBO", "IWAE", "FIVO"]
    for row in results["losses"].values():
        assert row["log_marginal"] < results["truth"]
        assert {name: len(gaps) for name, gaps in row["gaps"].items()} == {"IWAE": 6, "FIVO": 6}
        assert len(row["ess"]) == 8
    assert "trained by" in capsys.readouterr().out


def test_smoke_of_the_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = filter_toy.main(["--smoke", "--out", str(tmp_path)])
    assert results["lengths"] == [5, 10]
    assert {name: len(gaps) for name, gaps in results["gaps"].items()} == {"IWAE": 2, "FIVO": 2}
    assert list(saved(tmp_path, "filter_toy")["gradients"]) == ["2", "4"]
    assert "with the score" in capsys.readouterr().out


def test_the_toy_by_conditioning_all_of_it() -> None:
    xs, a = torch.tensor([0.3, -1.0, 0.7]), 0.9
    covariance = torch.eye(3) * filter_toy.R**2
    for t in range(3):
        for s in range(3):
            steps = range(min(s, t) + 1)
            covariance[t, s] += filter_toy.Q**2 * sum(a ** (t - r) * a ** (s - r) for r in steps)
    truth = MultivariateNormal(torch.zeros(3), covariance).log_prob(xs)
    torch.testing.assert_close(filter_toy.kalman(xs, torch.tensor(a)), truth)
