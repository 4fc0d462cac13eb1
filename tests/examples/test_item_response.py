"""Item responses: the data, the densities against quadrature, and the smoke run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import item_response
import pytest
import torch
from torch import Tensor

from pyro_iw import LocallyEnhancedELBO
from pyro_iw.bounds import IWAE, MIWAE


def few_students() -> tuple[item_response.Answers, Tensor, Tensor]:
    """Of one ability, over which a density can be integrated."""
    return item_response.generated(students=6, items=8, answers=6, abilities=1, seed=3)


def test_data() -> None:
    data, slope, offset = item_response.generated(50, 12, 5, 2, seed=0)
    assert data.y.shape == data.seen.shape == data.held_out.shape == (50, 12)
    assert (slope.shape, offset.shape) == ((12, 2), (12,))
    assert not (data.seen & data.held_out).any()
    assert ((data.seen | data.held_out).sum(1) == 5).all()
    assert 0.1 < data.held_out.sum() / 250 < 0.3
    assert set(data.y.unique().tolist()) == {0, 1}
    some = data.of(slice(3, 5))
    assert torch.equal(some.y, data.y[3:5])
    assert torch.equal(some.held_out, data.held_out[3:5])


def on_a_grid(data: item_response.Answers, slope: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log joint of a grid of abilities and what is seen ``[G, N]``, of answers ``[G, N, I]``; the step."""
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    sign = (2 * data.y - 1).double()
    log_p = torch.nn.functional.logsigmoid(
        sign * (grid[:, None, None] * slope[:, 0].double() + offset.double())
    )
    prior = -grid.square() / 2 - math.log(2 * math.pi) / 2
    return (log_p * data.seen).sum(-1) + prior[:, None], log_p, grid[1] - grid[0]


def test_the_density_of_known_items_by_quadrature() -> None:
    data, slope, offset = few_students()
    log_joint, log_p, _ = on_a_grid(data, slope, offset)
    exact = (log_joint.log_softmax(0)[..., None] + log_p).logsumexp(0)[data.held_out].mean().item()
    found = item_response.density_of_known_items(data, slope, offset, particles=40_000)
    assert found == pytest.approx(exact, abs=0.02)


def test_densities_by_the_guide_and_by_weights() -> None:
    """Abilities from any normal: the plain density is its own, the weighted one that of the posterior."""
    data, slope, offset = few_students()
    log_joint, log_p, step = on_a_grid(data, slope, offset)
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    wide = torch.distributions.Normal(0.5, 1.2)
    q = torch.distributions.Independent(torch.distributions.Normal(torch.full((6, 1), 0.5), 1.2), 1)
    plain, weighted = item_response.densities(data, slope, offset, q, 40_000)
    by_guide = (wide.log_prob(grid)[:, None, None] + step.log() + log_p).logsumexp(0)
    by_weights = (log_joint.log_softmax(0)[..., None] + log_p).logsumexp(0)
    torch.testing.assert_close(plain.double(), by_guide, atol=0.03, rtol=0)
    torch.testing.assert_close(weighted.double(), by_weights, atol=0.06, rtol=0)
    assert (by_guide - by_weights).abs().max() > 0.3


def test_a_student_s_local_particles_integrate_the_ability_out() -> None:
    data, _, _ = few_students()
    pair = item_response.ItemResponse(6, 8, 1, 16)
    with torch.no_grad():
        pair.network[-1].weight.zero_()  # abilities as wide as their prior
        pair.network[-1].bias.zero_()
    L = 5000
    loss = LocallyEnhancedELBO(local=IWAE(L), over="students", outer=MIWAE(2, 1))
    with torch.no_grad():
        levels = loss.particles(pair.model, pair.guide, data)
    local = levels.local["students"].log_weights
    assert local.shape == (2, L, 6)
    sites = {site.name: site.message["value"] for site in levels.top.sites if site.role == "model"}
    errors = local.softmax(1).square().sum(1).sqrt()
    assert errors.max() < 0.1
    for s in range(2):
        slope, offset = sites["slope"][s].reshape(8, 1), sites["offset"][s].reshape(8)
        log_joint, _, step = on_a_grid(data, slope, offset)
        exact = log_joint.logsumexp(0) + step.log()
        found = local[s].logsumexp(0) - math.log(L)
        assert ((found - exact).abs() < 5 * errors[s]).all()


def test_minibatches_count_for_all_students() -> None:
    data, _, _ = few_students()
    pair = item_response.ItemResponse(6, 8, 1, 16)
    loss = LocallyEnhancedELBO(local=IWAE(2), over="students")
    with torch.no_grad():
        levels = loss.particles(pair.model, pair.guide, data.of(slice(2)))
    assert levels.scale.local[0].scale == pytest.approx(3)


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = item_response.main(["--smoke", "--out", str(tmp_path)])
    assert list(results["methods"]) == list(item_response.METHODS)
    for found in results["methods"].values():
        assert len(found["at"]) == len(found["density"]) == len(found["bound"])
        assert all(value < 0 for value in found["density"] + found["bound"])
        assert found["at"] == sorted(found["at"])
        assert -1 < found["guide"] < 0
        assert -1 < found["weighted"] < 0
    assert results["known"] > results["methods"]["elbo"]["weighted"]
    assert results["answers"] + results["held_out"] == 60 * 6
    assert results["latents"] == 60 * 3 + 8 * 4
    saved = json.loads((tmp_path / "item_response.json").read_text())
    assert saved["methods"] == results["methods"]
    assert (tmp_path / "item_response.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{results['answers']} answers to train on" in printed
    assert "two levels" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--students", "0"], "--students"), (["--learning-rate", "-1"], "must be positive")],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        item_response.main([*argv, "--smoke"])
    assert message in capsys.readouterr().err
