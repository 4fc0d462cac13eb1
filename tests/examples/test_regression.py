"""Bayesian regression: the conjugate posterior against quadrature, and the guides against it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import regression
import scipy.stats
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from pyro_iw import IWAE_ELBO
from shared.skeleton import fit


def few_patients() -> tuple[Tensor, Tensor]:
    X, y, _ = regression.load()
    return X[:9, [0, 2, 8]], y[:9]


def test_the_evidence_is_that_of_a_multivariate_t() -> None:
    X, y = few_patients()
    shape = regression.RATE / regression.SHAPE * (torch.eye(len(y)) + X @ X.T)
    truth = scipy.stats.multivariate_t(shape=shape.double().numpy(), df=2 * regression.SHAPE).logpdf(
        y.numpy()
    )
    assert regression.exact(X, y)[0] == pytest.approx(float(truth), abs=1e-4)


def test_the_posterior_by_quadrature() -> None:
    """Given λ all is normal, so that λ alone is left to be integrated over."""
    X, y = (values.double() for values in few_patients())
    log_lambda = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    grid = log_lambda.exp()
    marginal = torch.eye(len(y), dtype=torch.float64) + X @ X.T
    square = y @ torch.linalg.solve(marginal, y)
    log_joint = regression.SHAPE * log_lambda - regression.RATE * grid  # Gamma(2, 1), with λ's Jacobian
    log_joint = log_joint + len(y) / 2 * log_lambda - grid * square / 2
    weights = log_joint.softmax(0)
    precision = weights @ grid
    variance = weights @ (grid - precision).square()
    posterior = (X.T @ X + torch.eye(3)).inverse()
    sd = (posterior.diagonal() * (weights @ (1 / grid))).sqrt()
    _, means, sds = regression.exact(X, y)
    torch.testing.assert_close(means, torch.cat([posterior @ X.T @ y, precision[None]]))
    torch.testing.assert_close(sds, torch.cat([sd, variance.sqrt()[None]]))


def test_one_weight_for_all_the_data() -> None:
    X, y = few_patients()
    guide = AutoMultivariateNormal(regression.model)
    particles = IWAE_ELBO(K=6).particles(regression.model, guide, X, y)
    assert particles.plates == ()
    assert particles.log_weights.shape == (6,)


def test_the_weighted_guide_is_the_exact_posterior() -> None:
    X, y = few_patients()
    args = regression.parse(regression.make_parser(), ["--epochs", "300", "-K", "8"], {})
    guide = AutoMultivariateNormal(regression.model, init_scale=0.3)
    fit(regression.model, guide, (X, y), IWAE_ELBO(K=8, estimator="dreg"), args)
    with torch.no_grad():
        found = regression.judge(guide, X, y, 20_000)
    log_evidence, means, sds = regression.exact(X, y)
    assert found["ess"] > 2000
    assert found["elbo"] < found["log_evidence"]
    assert found["log_evidence"] == pytest.approx(log_evidence, abs=5 * found["error"])
    # Five standard errors of a mean, and of an sd of heavier tails than a normal's.
    error = 5 / math.sqrt(found["ess"])
    assert ((torch.tensor(found["weighted"]["mean"]) - means) / sds).abs().max() < error
    assert (torch.tensor(found["weighted"]["sd"]) / sds - 1).abs().max() < 2 * error


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = regression.main(["--smoke", "--out", str(tmp_path)])
    assert list(results["guides"]) == list(regression.GUIDES)
    for found in results["guides"].values():
        assert found["elbo"] <= found["log_evidence"]
        assert 1 <= found["ess"] <= 200
        for label in ("guide", "weighted"):
            assert len(found[label]["mean"]) == len(found[label]["sd"]) == len(results["names"]) == 11
    saved = json.loads((tmp_path / "regression.json").read_text())
    assert saved["exact"] == results["exact"]
    assert saved["settings"]["epochs"] == 20
    assert (tmp_path / "regression.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"exact log evidence {results['log_evidence']:.2f}" in printed
    assert "AutoMultivariateNormal, weighted" in printed


def test_distances() -> None:
    results = {"exact": {"mean": [1.0, 2.0], "sd": [0.5, 4.0]}}
    shift, least, most = regression.distances(results, {"mean": [1.5, 0.0], "sd": [0.25, 8.0]})
    assert (shift, least, most) == (1.0, 0.5, 2.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--batch-size", "5"], "unrecognized arguments"), (["--loss", "vimco"], "invalid choice")],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        regression.main([*argv, "--smoke"])
    assert message in capsys.readouterr().err


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        regression.main(["--smoke", "--out", str(tmp_path / "file")])
