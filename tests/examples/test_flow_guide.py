"""The flow beside the normal: the grid's evidence, both guides' densities, and the smoke run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import flow_guide
import pyro.poutine as poutine
import pytest
import torch

from pyro_iw import IWAE_ELBO


def test_the_evidence_on_the_grid_agrees_with_draws_from_the_prior() -> None:
    torch.manual_seed(0)
    x = flow_guide.simulate(6)
    z = flow_guide.SPREAD * torch.randn(400_000, 2, dtype=torch.float64)
    normal = torch.distributions.Normal(flow_guide.distances(z.float()).double(), flow_guide.NOISE)
    for value, estimate in zip(x, flow_guide.log_evidence(x), strict=True):
        log_w = normal.log_prob(value.double()).sum(-1)
        truth = log_w.logsumexp(0).item() - math.log(len(z))
        error = log_w.softmax(0).square().sum().sqrt().item()  # 1/√ESS
        assert error < 0.05
        assert estimate.item() == pytest.approx(truth, abs=5 * error)


def test_distances() -> None:
    x = flow_guide.distances(torch.tensor([[[-1.5, 2.0]], [[1.5, 0.0]]]))
    torch.testing.assert_close(x, torch.tensor([[[2.0, 13**0.5]], [[3.0, 0.0]]]))


@pytest.mark.parametrize("layers", [0, 2])
def test_densities_of_the_guide_integrate_to_one(layers: int) -> None:
    torch.manual_seed(1)
    guide = flow_guide.Guide(layers, hidden=8)
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    with torch.no_grad():
        q = poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
        loc, log_scale = guide.encoder(x).chunk(2, -1)
        axis = torch.linspace(-5.5, 5.5, 301)
        noise = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 1, 2)
        grid = loc + log_scale.exp() * noise
        cells = q.log_prob(grid).exp() * (axis[1] - axis[0]) ** 2 * log_scale.exp().prod(-1)
        torch.testing.assert_close(cells.sum(0), torch.ones(2), rtol=0, atol=0.03)
        # ... and they are those of the draws, by their moments in units of the scale; five standard errors.
        draws = (q.sample((20_000,)) - loc) / log_scale.exp()
        weights = cells.unsqueeze(-1)
        for power in (1, 2, 3):
            moments = draws.pow(power)
            error = 5 * moments.std(0).max().item() / 20_000**0.5 + 0.02
            truth = (weights * noise.pow(power)).sum(0)
            torch.testing.assert_close(moments.mean(0), truth, rtol=0, atol=error)
    # The normal's third moment vanishes, and the flow is no normal.
    assert (truth.abs().max() > 0.3) == (layers > 0)


@pytest.mark.parametrize("estimator", ["auto", "dreg"])
def test_one_bound_a_datapoint(estimator: str) -> None:
    x = flow_guide.simulate(5)
    guide = flow_guide.Guide(2, hidden=8)
    loss = IWAE_ELBO(K=6, estimator=estimator)
    particles = loss.particles(flow_guide.model, guide, x)
    assert [plate.name for plate in particles.plates] == ["data"]
    assert particles.log_weights.shape == (6, 5)
    assert math.isfinite(loss.loss_and_grads(flow_guide.model, guide, x))
    assert all(parameter.grad.isfinite().all() for parameter in guide.parameters())


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = flow_guide.main(["--smoke", "--out", str(tmp_path)])
    assert list(results["guides"]) == ["normal", "flow"]
    assert len(results["log_evidence"]) == 10
    for found in results["guides"].values():
        for elbo, log_p, ess in zip(found["elbo"], found["log_evidence"], found["ess"], strict=True):
            assert elbo <= log_p < 3
            assert 1 <= ess <= 100
    saved = json.loads((tmp_path / "flow_guide.json").read_text())
    assert saved["guides"]["flow"]["elbo"] == results["guides"]["flow"]["elbo"]
    for name in ("flow_guide", "khat"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "flow" in capsys.readouterr().out


def test_no_arc_is_cut() -> None:
    x = torch.tensor([[6.5, 6.5], [1.0, 2.5], [3.0, 0.5]])
    log_p, axis = flow_guide.log_joint(x, steps=200)
    for n in range(len(x)):
        density = (log_p[n] - log_p[n].max()).exp()
        (left, right), (bottom, top) = flow_guide.window(axis, density, 0.1 * torch.randn(50, 2))
        shown = ((axis > left) & (axis < right)) & ((axis > bottom) & (axis < top))[:, None]
        assert density[~shown].max() < min(flow_guide.LEVELS)
        assert right - left == pytest.approx(top - bottom)


@pytest.mark.slow
def test_the_flow_fits_better(tmp_path: Path) -> None:
    sizes = ["--epochs", "10", "-K", "4", "--test-size", "30", "--num-particles", "500", "--hidden", "16"]
    results = flow_guide.main([*sizes, "--out", str(tmp_path)])
    truth = torch.tensor(results["log_evidence"])
    normal, flow = (results["guides"][name] for name in ("normal", "flow"))
    elbos = {name: torch.tensor(found["elbo"]).mean() for name, found in results["guides"].items()}
    assert elbos["normal"] + 2 < elbos["flow"] < truth.mean()
    for found in (normal, flow):
        assert (torch.tensor(found["log_evidence"]) - truth).mean().abs() < 0.15


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--layers", "0"], "--layers: must be at least 1"), (["--test-size", "x"], "--test-size")],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flow_guide.main([*argv, "--smoke"])
    assert message in capsys.readouterr().err


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        flow_guide.main(["--smoke", "--out", str(tmp_path / "file")])
