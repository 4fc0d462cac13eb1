"""Radon: the data's shape, the model against one with the counties integrated out, and the smoke run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pytest
import radon
import torch
from torch import Tensor

from pyro_iw import LocallyEnhancedELBO
from pyro_iw.bounds import IWAE, MIWAE


def test_data_of_the_survey_s_shape() -> None:
    survey = radon.generated()
    assert survey.seen.sum() == radon.HOUSES
    assert survey.seen.any(1).all()
    assert len(survey.uranium) == radon.COUNTIES
    assert survey.y[~survey.seen].abs().max() == 0
    # Least squares on what is known of a house comes near the truth, five standard errors of about 0.05.
    columns = [torch.ones_like(survey.y), survey.uranium[:, None].expand_as(survey.y), survey.floor]
    X = torch.stack([column[survey.seen] for column in columns], -1)
    found = torch.linalg.lstsq(X, survey.y[survey.seen][:, None]).solution.flatten()
    truth = torch.tensor([radon.TRUTH[name] for name in ("intercept", "uranium", "floor")])
    assert (found - truth).abs().max() < 0.3


def test_a_row_a_county() -> None:
    county = torch.tensor([1, 0, 1, 2, 1])
    y, floor = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([0, 1, 1, 0, 0])
    survey = radon.tabulate(y, floor, county, torch.tensor([0.1, 0.2, 0.3]))
    assert survey.y.tolist() == [[2, 0, 0], [1, 3, 5], [4, 0, 0]]
    assert survey.floor.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert survey.seen.sum(1).tolist() == [1, 3, 1]


def fake_arviz(file: str) -> Any:
    """ArviZ as far as the example asks it, with a survey of four houses."""
    columns = {
        "constant_data": {"floor_idx": [0, 1, 0, 0], "county_idx": [0, 0, 1, 0], "uranium": [0.5, -0.5]},
        "observed_data": {"y": [1.0, 2.0, 3.0, 4.0]},
    }
    groups = {
        group: {name: SimpleNamespace(values=np.array(values)) for name, values in given.items()}
        for group, given in columns.items()
    }

    def load_arviz_data(name: str | None = None) -> Any:
        return {"radon": SimpleNamespace(filename=file)} if name is None else groups

    return SimpleNamespace(load_arviz_data=load_arviz_data)


def test_the_survey_where_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARVIZ_DATA", str(tmp_path))
    monkeypatch.setattr(radon, "require", lambda *_: fake_arviz("radon.nc"))
    assert "generated" in radon.load("auto")[1]
    (tmp_path / "radon.nc").write_text("")
    survey, source = radon.load("auto")
    assert "arviz.load_arviz_data" in source
    assert survey.y.tolist() == [[1, 2, 4], [3, 0, 0]]
    assert survey.floor.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert survey.uranium.tolist() == [0.5, -0.5]
    assert "generated" in radon.load("generated")[1]


def few_counties() -> radon.Survey:
    """Three of at most four houses."""
    y, floor, seen, uranium = radon.generated()
    rows = (seen.sum(1) <= 4).nonzero()[:3, 0]
    return radon.Survey(y[rows, :4], floor[rows, :4], seen[rows, :4], uranium[rows])


def log_p_given(survey: radon.Survey, given: Tensor) -> Tensor:
    """log p(y, g) of global latents ``[S, 5]``: the counties of a row are integrated out as normals."""
    intercept, slope, floor, spread, noise = given.double().unbind(-1)
    normal, exponential = torch.distributions.Normal, torch.distributions.Exponential(1.0)
    total = normal(0, 10).log_prob(intercept) + normal(0, 10).log_prob(slope) + normal(0, 1).log_prob(floor)
    total = total + exponential.log_prob(spread) + exponential.log_prob(noise)
    for y, x, seen, uranium in zip(*(table.double() for table in survey), strict=True):
        y, x = y[seen.bool()], x[seen.bool()]
        eye = torch.eye(len(y)).double()
        mean = (intercept + slope * uranium)[:, None] + floor[:, None] * x
        covariance = spread.square()[:, None, None] + noise.square()[:, None, None] * eye
        total = total + torch.distributions.MultivariateNormal(mean, covariance).log_prob(y)
    return total


def guide_near_the_truth(survey: radon.Survey, counties: int | None = None) -> None:
    normal = pyro.distributions.Normal
    for name in ("intercept", "uranium", "floor"):
        pyro.sample(name, normal(radon.TRUTH[name], 0.2))
    for name in ("spread", "noise"):
        pyro.sample(name, pyro.distributions.LogNormal(math.log(radon.TRUTH[name]), 0.2))
    with radon.counties_plate(survey, counties):
        pyro.sample("level", normal(1.4, 0.7))


def test_many_local_particles_integrate_the_counties_out() -> None:
    survey, L = few_counties(), 5000
    loss = LocallyEnhancedELBO(local=IWAE(L), over="county", outer=MIWAE(5, 1))
    levels = loss.particles(radon.model, guide_near_the_truth, survey)
    local = levels.local["county"].log_weights.squeeze()
    assert local.shape == (5, L, 3)
    found = levels.top.log_weights + (local.logsumexp(1) - math.log(L)).sum(-1)
    sites = [site for site in levels.top.sites if site.role == "guide"]
    values = {site.name: site.message["value"].flatten() for site in sites}
    given = torch.stack([values[name] for name in radon.GLOBALS], -1)
    log_q = sum(site.message["fn"].log_prob(site.message["value"]).flatten() for site in sites)
    # The errors of three logarithms of means, each of 1/√ESS.
    errors = local.softmax(1).square().sum(1).sum(-1).sqrt()
    assert errors.max() < 0.1
    assert ((found - (log_p_given(survey, given) - log_q)).abs() < 5 * errors).all()


@pytest.mark.slow
def test_minibatches_of_counties_agree_with_all_of_them() -> None:
    survey, guide = few_counties(), radon.make_guide()
    loss = LocallyEnhancedELBO(local=IWAE(4), over="county", outer=MIWAE(2, 1))
    with torch.no_grad():
        values = {
            size: torch.tensor([loss.loss(radon.model, guide, survey, size) for _ in range(100)])
            for size in (2, None)
        }
    error = sum(found.var() / len(found) for found in values.values()).sqrt().item()
    assert values[2].mean().item() == pytest.approx(values[None].mean().item(), abs=4 * error)


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = radon.main(["--smoke", "--data", "generated", "--out", str(tmp_path)])
    assert list(results["methods"]) == [*radon.METHODS, "nuts"]
    for found in results["methods"].values():
        assert len(found["mean"]) == len(found["sd"]) == len(radon.GLOBALS)
        assert all(math.isfinite(value) for value in found["mean"])
        assert min(found["sd"]) > 0
    assert "is subsampled (17 of 85)" in results["refused"]
    saved = json.loads((tmp_path / "radon.json").read_text())
    assert saved["methods"] == results["methods"]
    assert saved["settings"]["steps"] == 8
    assert (tmp_path / "radon.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "919 houses in 85 counties: generated from known values" in printed
    assert "joint IWAE, minibatches: refused. Plate 'county' is subsampled" in printed


def test_against_nuts() -> None:
    methods = {"elbo": {"mean": [1.0], "sd": [0.5]}, "nuts": {"mean": [2.0], "sd": [2.0]}}
    assert radon.against_nuts({"methods": methods}, "elbo") == [(-0.5, 0.25)]


def test_draws_of_the_guide_are_global() -> None:
    pyro.set_rng_seed(0)
    survey = few_counties()
    guide = radon.make_guide()
    draws = radon.draw_globals(guide, survey, 50)
    assert draws.shape == (50, 5)
    assert draws.std(0).min() > 0


@pytest.mark.parametrize(
    ("argv", "message"), [(["--steps", "0"], "--steps"), (["--data", "iowa"], "invalid choice")]
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        radon.main([*argv, "--smoke"])
    assert message in capsys.readouterr().err
