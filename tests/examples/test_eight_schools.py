"""The eight schools: the example's smoke run, and its posterior against one by numerical integration."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import eight_schools
import pyro
import pytest
import torch
from torch import Tensor

from pyro_iw import ImportanceSampler
from pyro_iw._support.optional import require
from pyro_iw.psis import khat_threshold

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("arviz") is None, reason="the example writes a file for ArviZ"
)


def exact() -> tuple[float, Tensor, Tensor]:
    """Log evidence, means and sds of :data:`eight_schools.NAMES`, by quadrature over log τ.

    Given τ everything is Gaussian: μ and θ are integrated out by hand, and y ~ N(0, diag(σ² + τ²) + 25 11ᵀ).
    """
    y, variance = eight_schools.EFFECTS.double(), eight_schools.ERRORS.double().square()
    log_tau = torch.linspace(-16, 10, 5001, dtype=torch.float64)[:, None]
    tau = log_tau.exp()
    total = variance + tau**2
    precision = 1 / 25 + (1 / total).sum(1, keepdim=True)
    mu = (y / total).sum(1, keepdim=True) / precision
    log_prior = math.log(2 / math.pi / 5) - torch.log1p((tau / 5) ** 2) + log_tau
    square = (y**2 / total).sum(1, keepdim=True) - mu**2 * precision
    log_det = (2 * math.pi * total).log().sum(1, keepdim=True) + (25 * precision).log()
    log_joint = log_prior - (square + log_det) / 2
    step = (log_tau[1] - log_tau[0]).item()
    log_evidence = log_joint.logsumexp(0).item() + math.log(step)
    shrink = tau**2 / total
    means = torch.cat([mu, tau, mu + shrink * (y - mu)], 1)
    variances = torch.cat([1 / precision, 0 * tau, shrink * variance + (1 - shrink) ** 2 / precision], 1)
    weights = log_joint.softmax(0)
    mean = (weights * means).sum(0)
    return log_evidence, mean, ((weights * (variances + means**2)).sum(0) - mean**2).sqrt()


@pytest.mark.filterwarnings("ignore:k̂ exceeds:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:In 1 of 1 cell:RuntimeWarning")
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = eight_schools.main(["--smoke", "--seed", "2", "--out", str(tmp_path)])
    assert list(results["quantities"]) == eight_schools.NAMES
    for row in results["quantities"].values():
        assert list(row) == list(eight_schools.METHODS)
        for numbers in row.values():
            assert all(math.isfinite(value) for value in numbers.values())
            assert numbers["sd"] > 0
            assert numbers["low"] < numbers["median"] < numbers["high"]
        assert (row["nuts"]["shift"], row["nuts"]["ratio"]) == (0, 1)
    assert 1 <= results["weights"]["ess"] <= 200
    saved = json.loads((tmp_path / "eight_schools.json").read_text())
    assert saved["quantities"] == results["quantities"]
    assert saved["settings"]["steps"] == 20
    assert (tmp_path / "eight_schools.png").read_bytes().startswith(b"\x89PNG")

    lines = capsys.readouterr().out.splitlines()
    first = lines[2].split()
    assert first[0] == "mu"
    assert float(first[1]) == pytest.approx(results["quantities"]["mu"]["guide"]["mean"], abs=0.006)
    assert float(first[-1]) == pytest.approx(results["quantities"]["mu"]["nuts"]["sd"], abs=0.006)
    assert [line.split()[0] for line in lines[2:12]] == eight_schools.NAMES

    # What the table calls "guide + weights" are the draws in the file.
    arviz = require("arviz", "arviz", "the test")
    posterior = arviz.from_netcdf(str(tmp_path / "posterior.nc"))["posterior"]
    assert posterior["theta"].dims == ("chain", "draw", "school")
    assert posterior["theta"]["school"].values.tolist() == eight_schools.SCHOOLS
    mean = posterior["theta"].sel(school="G").values.mean()
    expected = results["quantities"]["theta[G]"]["importance"]["mean"]
    assert float(mean) == pytest.approx(expected, rel=1e-4)


def test_quantiles_of_the_picture() -> None:
    torch.manual_seed(0)
    draws = {"mu": torch.randn(300, 1), "tau": torch.rand(300, 1), "eta": torch.randn(300, 8)}
    found = eight_schools.compare(dict.fromkeys(eight_schools.METHODS, draws))["tau"]["guide"]
    ordered = draws["tau"].squeeze().double().sort().values
    assert found["low"] == pytest.approx((0.05 * ordered[15] + 0.95 * ordered[14]).item(), abs=1e-2)
    assert found["high"] == pytest.approx(ordered[284].item(), abs=1e-2)
    assert 0 < found["low"] < found["median"]


@pytest.mark.slow
def test_weights_give_the_exact_posterior() -> None:
    log_evidence, mean, sd = exact()
    pyro.set_rng_seed(0)
    guide = eight_schools.fit(steps=2000, K=16)
    samples = ImportanceSampler(eight_schools.model, guide, 20_000, chunk_size=2000)(
        eight_schools.EFFECTS, eight_schools.ERRORS
    )
    ess = samples.ess.item()
    assert samples.khat < khat_threshold(20_000)
    assert ess > 500
    # By itself the guide is no posterior: there is something to correct.
    alone = eight_schools.quantities(samples.values).double()
    assert ((alone.mean(0) - mean) / sd).abs().max() > 0.15
    assert (alone.std(0) / sd - 1).abs().max() > 0.3

    for weighted in (samples, samples.smoothed()):
        # Five standard errors, 1/√ESS.
        assert weighted.log_marginal.item() == pytest.approx(log_evidence, abs=5 / ess**0.5)
        drawn = eight_schools.quantities(weighted.posterior(4000)).double()
        # 1/√4000 = 0.016 of an sd is a mean's standard error by the resampling, √(1/ESS) that by the weights:
        # 0.010 for the 9000 effective particles of most fits, 0.03 for the 1000 of a poor one.
        assert ((drawn.mean(0) - mean) / sd).abs().max() < 0.15
        # That of an sd is √(κ - 1) / 2 times as large, with the kurtosis κ: 3 for a normal, 9 for τ.
        assert (drawn.std(0) / sd - 1).abs().max() < 0.15


@pytest.mark.slow
def test_nuts_gives_the_exact_posterior() -> None:
    _, mean, sd = exact()
    pyro.set_rng_seed(0)
    draws, ess, _ = eight_schools.nuts(250)
    values = eight_schools.quantities(draws).double()
    assert values.shape == (250, len(eight_schools.NAMES))
    assert 40 < ess < 1000
    # Five standard errors of the quantity that mixes worst.
    assert ((values.mean(0) - mean) / sd).abs().max() < 5 / ess**0.5
    off = values.std(0) / sd - 1
    assert off.abs().max() < 0.4
    assert off.mean().abs() < 0.15  # errors of the ten have both signs


def test_quadrature_against_draws_from_the_prior() -> None:
    """The truth of the other tests agrees with importance sampling from the prior, which needs no fit."""
    log_evidence, mean, sd = exact()
    torch.manual_seed(0)
    size = 400_000
    mu = 5 * torch.randn(size, 1, dtype=torch.float64)
    tau = 5 * torch.tan(math.pi / 2 * torch.rand(size, 1, dtype=torch.float64))
    theta = mu + tau * torch.randn(size, 8, dtype=torch.float64)
    y, sigma = eight_schools.EFFECTS.double(), eight_schools.ERRORS.double()
    log_w = torch.distributions.Normal(theta, sigma).log_prob(y).sum(1)
    weights = log_w.softmax(0)
    error = weights.square().sum().sqrt()  # 1/√ESS
    assert error < 0.01
    assert log_w.logsumexp(0).item() - math.log(size) == pytest.approx(log_evidence, abs=5 * error.item())
    values = torch.cat([mu, tau, theta], 1)
    estimate = weights @ values
    spread = (weights @ (values - estimate).square()).sqrt()
    # Tails count for more in a weighted mean than 1/√ESS allows for.
    assert ((estimate - mean) / sd).abs().max() < 10 * error
    assert (spread / sd - 1).abs().max() < 20 * error


@pytest.mark.parametrize(
    ("argv", "message"), [(["--K", "0"], "--K: must be at least 1"), (["--steps", "x"], "--steps")]
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        eight_schools.main([*argv, "--smoke"])
    assert message in capsys.readouterr().err


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        eight_schools.main(["--smoke", "--out", str(tmp_path / "file")])
