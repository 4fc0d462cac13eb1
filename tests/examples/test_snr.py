"""The signal-to-noise example: it runs at smoke size, and its pieces are what they say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pyro.distributions as dist
import pytest
import snr
import torch

from pyro_iw import IWAE_ELBO


def pair(dimension: int = 3, datapoints: int = 5) -> snr.Gaussian:
    return snr.Gaussian(dimension, datapoints, seed=0, device=torch.device("cpu"))


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = snr.main(
        ["--smoke", "--bounds", *snr.BOUNDS, "--estimators", *snr.ESTIMATORS, "--out", str(tmp_path)]
    )
    assert results["particles"] == [1, 4, 16]
    assert len(results["curves"]) == len(snr.BOUNDS) * len(snr.ESTIMATORS)
    for curve in results["curves"].values():
        for key in ("theta", "phi", "A", "theta_norm", "phi_norm", "floor"):
            assert len(curve[key]) == 3
            assert all(0 < ratio < math.inf for ratio in curve[key])
    assert (tmp_path / "snr.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "snr.json").read_text())
    assert saved["curves"]["iwae, dreg"]["phi"] == results["curves"]["iwae, dreg"]["phi"]
    assert saved["settings"]["datapoints"] == 32
    printed = capsys.readouterr().out
    assert "SNR(θ)" in printed
    assert "SNR(φ)" in printed

    # All draw the same particles, and θ's gradient does not depend on the estimator; PIWAE's θ is IWAE's and
    # its φ MIWAE's; with one particle all bounds are one.
    curves = results["curves"]
    for bound in snr.BOUNDS:
        assert curves[f"{bound}, dreg"]["theta"] == pytest.approx(
            curves[f"{bound}, reparam"]["theta"], rel=1e-3
        )
    for estimator in snr.ESTIMATORS:
        piwae = curves[f"piwae, {estimator}"]
        assert piwae["theta"] == pytest.approx(curves[f"iwae, {estimator}"]["theta"], rel=1e-3)
        assert piwae["phi"] == pytest.approx(curves[f"miwae, {estimator}"]["phi"], rel=1e-3)
        first = {round(curves[f"{bound}, {estimator}"]["phi"][0], 3) for bound in snr.BOUNDS}
        assert len(first) == 1


@pytest.mark.slow
def test_slopes_have_the_signs_of_the_paper(tmp_path: Path) -> None:
    argv = ["--bounds", "elbo", "iwae", "miwae", "--datapoints", "128", "--max-k", "64", "--draws", "60"]
    curves = snr.main([*argv, "--max-draws", "300", "--seed", "1", "--out", str(tmp_path)])["curves"]
    for estimator in snr.ESTIMATORS[::2]:
        slopes = curves[f"elbo, {estimator}"]["slopes"]
        assert slopes["theta"]["all S"] == pytest.approx(0.5, abs=0.07)
        assert slopes["phi"]["S ≤ 64"] == pytest.approx(0.5, abs=0.07)
    iwae, dreg = (curves[f"iwae, {estimator}"] for estimator in ("reparam", "dreg"))
    assert iwae["slopes"]["phi"]["S ≤ 64"] == pytest.approx(-0.5, abs=0.12)
    assert dreg["slopes"]["phi"]["S ≥ 16"] > 0.25
    # θ first loses signal, then gains.
    assert iwae["theta"][2] < iwae["theta"][0]
    assert iwae["theta"][3] > iwae["theta"][2]
    # MIWAE's φ lies between.
    ratios = [curves[f"{bound}, reparam"]["phi"][-1] for bound in ("iwae", "miwae", "elbo")]
    assert 2 * ratios[0] < ratios[1] < ratios[2] / 2


def test_isotropic_is_a_normal() -> None:
    loc = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    ours, normal = snr.Isotropic(loc, 0.7), dist.Normal(loc, 0.7).to_event(1)
    value = torch.randn(6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(value), normal.log_prob(value))
    expanded = ours.expand((6, 4))
    assert expanded.batch_shape == (6, 4)
    assert expanded.event_shape == (3,)
    torch.manual_seed(0)
    draws = ours.rsample((50_000,))
    assert draws.requires_grad
    # Six standard errors.
    torch.testing.assert_close(draws.float().mean(0), loc.float(), rtol=0, atol=6 * 0.7 / 50_000**0.5)
    torch.testing.assert_close(draws.float().std(0), torch.full((4, 3), 0.7), rtol=0, atol=0.02)


def test_the_guide_at_its_optimum_is_near_the_posterior() -> None:
    gaussian = pair(dimension=2, datapoints=40_000)
    mean = gaussian.x.mean(0)
    torch.testing.assert_close(gaussian.mu, mean, rtol=0, atol=0.05)
    torch.testing.assert_close(gaussian.b, mean / 2, rtol=0, atol=0.05)
    torch.testing.assert_close(gaussian.A, torch.eye(2) / 2, rtol=0, atol=0.05)
    torch.testing.assert_close(gaussian.x.var(0), torch.full((2,), 2.0), rtol=0, atol=0.1)
    # The posterior is N((x + μ) / 2, 1/2), so the log-weights' mean is log p(x) less a KL in closed form.
    log_w = IWAE_ELBO(K=50).particles(gaussian.model, gaussian.guide).log_weights
    kl = 2 * 0.5 * (4 / 3 - 1 - math.log(4 / 3))
    evidence = dist.Normal(mean, 2**0.5).to_event(1).log_prob(gaussian.x)
    assert (evidence - log_w.mean(0)).mean().item() == pytest.approx(kl, abs=0.01)


def test_slope() -> None:
    particles = [1, 4, 16, 64]
    ratios = [3 * s**-0.5 for s in particles]
    assert snr.slope(particles, ratios, 1, 64) == pytest.approx(-0.5)
    assert snr.slope(particles, [1.0, 1.0, 2.0, 4.0], 4, 64) == pytest.approx(0.5)
    assert math.isnan(snr.slope(particles, ratios, 64, math.inf))


def test_grid() -> None:
    assert snr.powers_of_four(1) == [1]
    assert snr.powers_of_four(63) == [1, 4, 16]
    assert snr.powers_of_four(64) == [1, 4, 16, 64]


@pytest.mark.parametrize("bound", snr.BOUNDS)
def test_every_bound_takes_as_many_particles(bound: str) -> None:
    loss = snr.make_loss(bound, 16, "dreg")
    assert loss.bound.num_particles == 16
    assert loss.estimator == "dreg"
    groups = {"elbo": 16, "iwae": 1, "ciwae": 1, "miwae": 4, "piwae": 4}
    assert groups[bound] == loss.bound.M


def test_the_bar_moves_within_a_measurement_and_ends_full() -> None:
    class Bar:
        """What snr.py asks of tqdm's."""

        def __init__(self) -> None:
            self.total, self.steps = 3 * 4, []

        def update(self, count: int) -> None:
            self.steps.append(count)

    loss = snr.make_loss("iwae", 4, "reparam")
    bar = Bar()
    shown = snr.measure(pair(), loss, draws=3, max_draws=12, seed=0, bar=bar)
    # Once for each gradient, those of a repetition among them.
    assert set(bar.steps) == {4}
    assert len(bar.steps) > 3
    assert sum(bar.steps) == bar.total
    assert snr.measure(pair(), loss, draws=3, max_draws=12, seed=0) == shown


def test_curves_that_are_one_are_drawn_once() -> None:
    names = [
        f"{bound}, {estimator}" for bound in ("elbo", "iwae", "piwae") for estimator in ("reparam", "dreg")
    ]
    curves = {name: {"floor": [0.1, 0.01 if name == "piwae, dreg" else 0.1]} for name in names}
    theta = snr.distinct({"curves": curves}, "theta")
    assert theta == {"ELBO": ("elbo, reparam", "elbo", ""), "IWAE = PIWAE": ("piwae, dreg", "iwae", "")}
    phi = snr.distinct({"curves": curves}, "phi")
    assert phi["PIWAE, dreg"] == ("piwae, dreg", "miwae", "dreg")
    assert len(phi) == 6


def test_unknown_bound() -> None:
    with pytest.raises(ValueError, match="miwae"):
        snr.make_loss("tvo", 4, "reparam")


def test_a_ratio_near_its_floor_is_drawn_again() -> None:
    loss = snr.make_loss("iwae", 16, "reparam")
    few = snr.measure(pair(), loss, draws=4, max_draws=4, seed=0)
    more = snr.measure(pair(), loss, draws=4, max_draws=40, seed=0)
    assert few["floor"] == 0.5
    assert more["floor"] < few["floor"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--draws", "1"], "--draws: must be at least 2"),
        (["--bounds", "tvo"], "invalid choice"),
        (["--estimators", "vimco"], "invalid choice"),
        (["--max-k", "0"], "--max-k: must be at least 1"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_bad_arguments(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        snr.main([*argv, "--smoke", "--out", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err)


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        snr.main(["--smoke", "--out", str(tmp_path / "file")])
