"""Imputation by importance weights: the smoke run, and a factor model whose conditionals are known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import missing_data
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_iw import IWAE_ELBO

FACTORS = torch.tensor([[1.0, 0.0], [0.8, -0.5], [-0.6, 0.7], [0.3, 1.2]])
NOISE = 0.5


class FactorModel(missing_data.TableVAE):
    """x | z ~ N(F z, 0.5² I), and so jointly normal."""

    def __init__(self) -> None:
        super().__init__(columns=4, latent=2, hidden=8)

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(z @ FACTORS.T, NOISE)


def exact(x: Tensor, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Conditional means, sds and the log evidence of what is observed, row by row."""
    covariance = FACTORS @ FACTORS.T + NOISE**2 * torch.eye(4)
    means, sds, log_evidence = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(len(x))
    for n, seen in enumerate(observed):
        gain = covariance[:, seen] @ covariance[seen][:, seen].inverse()
        means[n] = gain @ x[n, seen]
        sds[n] = (covariance - gain @ covariance[seen]).diagonal().clamp(min=0).sqrt()
        joint = torch.distributions.MultivariateNormal(
            torch.zeros(int(seen.sum())), covariance[seen][:, seen]
        )
        log_evidence[n] = joint.log_prob(x[n, seen])
    return means, sds, log_evidence


def table() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(6, 2) @ FACTORS.T + NOISE * torch.randn(6, 4)
    observed = torch.tensor(
        [[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0]]
    )
    return x, observed.bool()


def test_imputations_are_those_of_the_exact_conditionals() -> None:
    vae, (x, observed) = FactorModel(), table()
    means, sds, _ = exact(x, observed)
    missing = ~observed
    # What is deleted must not be seen: garbage in its place changes nothing.
    hidden = x.masked_fill(missing, 77.0)
    found, _, ess = missing_data.impute(vae, hidden, observed, 20_000)
    assert ess.min() > 500
    torch.testing.assert_close(found[missing], means[missing], rtol=0, atol=0.1)
    _, log_prob, _ = missing_data.impute(vae, x, observed, 20_000)
    truth = torch.distributions.Normal(means[missing], sds[missing]).log_prob(x[missing])
    torch.testing.assert_close(log_prob[missing], truth, rtol=0, atol=0.1)

    drawn = missing_data.impute_many(vae, x, observed, 20_000, num_draws=4000)
    assert drawn.shape == (4000, 6, 4)
    assert torch.equal(drawn[:, observed], x[observed].expand(4000, -1))
    torch.testing.assert_close(drawn.mean(0)[missing], means[missing], rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.std(0)[missing], sds[missing], rtol=0.1, atol=0)


def test_the_bound_is_one_on_what_is_observed() -> None:
    vae, (x, observed) = FactorModel(), table()
    hidden = x.masked_fill(~observed, 77.0)
    particles = IWAE_ELBO(K=20_000).particles(vae.model, vae.guide, hidden, observed)
    assert particles.log_weights.shape == (20_000, 6)
    estimate = particles.log_weights.logsumexp(0) - math.log(20_000)
    torch.testing.assert_close(estimate, exact(x, observed)[2], rtol=0, atol=0.1)


@pytest.mark.parametrize("name", missing_data.DATA)
def test_tables_are_standardised_by_what_is_observed(name: str) -> None:
    x, observed = missing_data.load(name, 0.3, seed=0)
    assert observed.float().mean().item() == pytest.approx(0.7, abs=0.02)
    columns = [column[seen] for column, seen in zip(x.T, observed.T, strict=True)]
    for column in columns:
        assert column.mean().item() == pytest.approx(0, abs=1e-3)
        assert column.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--smoke", "--data", "wine", "--missing", "0.2", "--out", str(tmp_path)]
    results = missing_data.main(argv)
    assert results["table"]["missing"] == pytest.approx(0.2, abs=0.03)
    names = ["column means", "weights, 1", "weights, 4", "weights, 16", "iterative ridge"]
    assert list(results["results"]) == names
    for numbers in results["results"].values():
        assert all(math.isfinite(value) for value in numbers.values())
    # The columns have been standardised, so their means miss by about one sd.
    assert results["results"]["column means"]["rmse"] == pytest.approx(1, abs=0.15)
    coverage = results["coverage"]
    assert all(low <= high for low, high in itertools.pairwise(coverage))
    saved = json.loads((tmp_path / "missing_data.json").read_text())
    assert saved["results"] == results["results"]
    assert saved["settings"]["data"] == "wine"
    assert (tmp_path / "missing_data.png").read_bytes().startswith(b"\x89PNG")
    assert "iterative ridge" in capsys.readouterr().out


@pytest.mark.slow
def test_better_than_column_means(tmp_path: Path) -> None:
    argv = ["--data", "wine", "--epochs", "40", "--num-particles", "64", "--out", str(tmp_path)]
    results = missing_data.main(argv)["results"]
    assert results["weights, 64"]["rmse"] < 0.93 * results["column means"]["rmse"]
    assert results["weights, 64"]["rmse"] < results["weights, 1"]["rmse"]
    assert results["weights, 64"]["log_prob"] > results["column means"]["log_prob"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--missing", "1.5"], "--missing: must lie in"),
        (["--data", "housing"], "invalid choice"),
        (["--epochs", "0"], "--epochs: must be at least 1"),
        (["--learning-rate", "-1"], "--learning-rate: must be positive"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        missing_data.main([*argv, "--smoke"])
    assert message in capsys.readouterr().err


def test_nothing_left_to_see(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="lower --missing"):
        missing_data.main(["--smoke", "--missing", "1", "--out", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        missing_data.main(["--smoke", "--out", str(tmp_path / "file")])
