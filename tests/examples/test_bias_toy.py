"""The biases that the toy draws are those of theory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import bias_toy
import pytest
import torch
from matplotlib.image import imread


def integral(function: torch.Tensor, z: torch.Tensor) -> float:
    return torch.trapezoid(function, z).item()


def test_closed_forms_against_quadrature() -> None:
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    normal = torch.distributions.Normal
    joint = normal(0.0, 1.0).log_prob(z) + normal(z, 1.0).log_prob(torch.tensor(bias_toy.X))
    log_q = normal(bias_toy.GUIDE_LOC, bias_toy.GUIDE_SCALE).log_prob(z)
    log_p = math.log(integral(joint.exp(), z))
    assert log_p == pytest.approx(bias_toy.LOG_P)
    assert bias_toy.kl() == pytest.approx(integral(log_q.exp() * (log_q - joint + log_p), z))
    second_moment = integral((2 * (joint - log_p) - log_q).exp(), z)
    assert bias_toy.relative_variance() == pytest.approx(second_moment - 1)


def test_bias_falls_with_what_is_inside_the_log_alone(tmp_path: Path) -> None:
    results = bias_toy.main(["--draws", str(2**18), "--out", str(tmp_path)])
    assert json.loads((tmp_path / "bias.json").read_text()) == results
    assert imread(tmp_path / "bias.png").std() > 0.05
    outside, groups, inside, leading = results["bias"].values()
    # Five standard errors of a mean of 2^18 log-weights, whose deviation is about 1.
    error = 5 / 2**9
    assert outside == [pytest.approx(bias_toy.kl(), abs=error)] * len(outside)
    assert groups == [None] * 3 + inside[:6]
    for size, bias, order in zip(results["sizes"], inside, leading, strict=True):
        assert bias == pytest.approx(order, abs=error + 0.5 * order / size**0.5)
    assert inside[0] > 7 * inside[3] > 40 * inside[6] > 0


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bias_toy.main(["--draws", "255"])
    assert "--draws: must be at least 256" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file"):
        bias_toy.main(["--draws", "256", "--out", str(tmp_path / "file")])
