"""The plate that grows: the example's closed forms, and what its figure says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import two_levels
from matplotlib.image import imread


def test_closed_forms() -> None:
    n = 5
    x = torch.linspace(-1, 2, n, dtype=torch.float64)
    identity, ones = torch.eye(n, dtype=torch.float64), torch.ones(n, n, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal
    marginal = normal(torch.zeros(n, dtype=torch.float64), 2 * identity + ones)
    assert two_levels.log_evidence(x) == pytest.approx(marginal.log_prob(x).item())
    # Of (g, z): the posterior's precision is the same in the guide, and locations differ.
    precision = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    precision[0, 0] = 1 + n
    precision[0, 1:] = precision[1:, 0] = -1
    precision[1:, 1:] = 2 * identity
    shift = torch.full((n + 1,), two_levels.OFF * two_levels.SCALE, dtype=torch.float64)
    shift[0] = 0
    assert two_levels.kl(n) == pytest.approx((shift @ precision @ shift).item() / 2)


def test_local_weights_do_not_collapse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = two_levels.main(["--repeats", "10", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "two_levels.json").read_text()) == results
    assert imread(tmp_path / "two_levels.png").std() > 0.05
    found = results["found"]
    assert found["joint ESS"][-1] < 3
    # Weights of a normal that is off by half its scale: ESS / L is exp(-1/4) for many.
    assert found["local ESS"] == [pytest.approx(64 * 0.779, rel=0.05)] * len(results["sizes"])
    assert found["two-level gap"][-1] < 4 < 50 < found["joint gap"][-1] < found["ELBO gap"][-1]
    assert "joint ESS" in capsys.readouterr().out


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file"):
        two_levels.main(["--repeats", "1", "--out", str(tmp_path / "file")])
