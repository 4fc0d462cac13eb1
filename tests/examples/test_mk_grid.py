"""The grid over (M, K) and β is complete, is measured as it says, and goes on where it was stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mk_grid
import pytest
import torch
from matplotlib.image import imread
from mk_grid import Cell

from shared import datasets, options
from shared.datasets import heldout_images
from shared.networks import VAE

PICTURES = {"grid.png", "learning_curves.png"}
FILES = PICTURES | {"runs", "grid.json", "grid.md"}


def fake_results(cell: Cell, seed: int, *_: Any) -> dict[str, Any]:
    """Numbers that tell loss, M, K and seed apart."""
    value = {"miwae": 100, "piwae": 200, "ciwae": 300}[cell.loss] + cell.M + 10 * cell.beta + seed
    return {name: float(value) for name in (*mk_grid.METRICS, "active_units", "training_seconds")}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Cell, int]]:
    done: list[tuple[Cell, int]] = []

    def noted(cell: Cell, seed: int, *rest: Any) -> dict[str, Any]:
        done.append((cell, seed))
        return fake_results(cell, seed)

    monkeypatch.setattr(mk_grid, "train_and_measure", noted)
    monkeypatch.setattr(mk_grid, "save_figure", lambda *_: None)
    monkeypatch.setattr(mk_grid, "save_learning_curves", lambda *_: None)
    return done


def test_cells_are_all_ways_to_spend_64() -> None:
    cells = mk_grid.make_cells(64, [0.5, 0.05, 0.0, 1.0, 0.5])
    pairs = [(64, 1), (32, 2), (16, 4), (8, 8), (4, 16), (2, 32), (1, 64)]
    assert [(cell.M, cell.K) for cell in cells if cell.loss == "miwae"] == pairs
    assert [(cell.M, cell.K) for cell in cells if cell.loss == "piwae"] == pairs[:-1]
    assert [cell.beta for cell in cells if cell.loss == "ciwae"] == [0.05, 0.5]
    assert len({cell.file for cell in cells}) == len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert options.make_loss(cell.loss, cell.M, cell.K, beta=cell.beta).num_particles == 64
    assert mk_grid.make_cells(1, []) == [Cell("miwae", 1, 1)]


def test_default_is_the_papers_budget() -> None:
    args = mk_grid.parse_args([])
    assert (args.budget, args.data) == (64, "digits")
    assert len(mk_grid.make_cells(args.budget, args.betas)) == 18


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = mk_grid.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "grid.json").read_text()) == results
    for name in PICTURES:
        assert imread(tmp_path / name).std() > 0.05
    assert [cell["name"] for cell in results["cells"]] == [
        "MIWAE(4, 1)",
        "MIWAE(2, 2)",
        "MIWAE(1, 4)",
        "PIWAE(4, 1)",
        "PIWAE(2, 2)",
        "CIWAE(4, β = 0.5)",
    ]
    for cell in results["cells"]:
        (one,) = cell["runs"]
        assert one["minus_kl"] == pytest.approx(one["iwae"] - one["log_marginal"])
        assert one["minus_kl"] < 0
        assert 1 <= one["ess"] <= 20
        # The bound after the only epoch, from other draws.
        assert one["curve"] == [pytest.approx(one["iwae"], abs=1)]
        assert 0 <= one["active_units"] <= 50
    table = (tmp_path / "grid.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert "±" not in table


def test_measures_against_weights_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws, put together here: an untrained network, IWAE-2 of 6 particles."""
    monkeypatch.setattr(mk_grid, "train", lambda *_, **__: [{"seconds": 0.0, "iwae": 0.0}])
    argv = ["--smoke", "--budget", "2", "--nll-particles", "6", "--train-size", "10", "--test-size", "7"]
    args = mk_grid.parse_args(argv)
    data = datasets.load("digits").subset(10, 7)
    results = mk_grid.train_and_measure(Cell("miwae", 1, 2), 3, data, args)

    torch.manual_seed(3)
    network = VAE(64, mean_image=data.train.flatten(1).mean(0))
    x = heldout_images(data, 0).flatten(1)
    with torch.no_grad():
        loc, scale = network.encoder(x)
        torch.manual_seed(3)
        z = loc + scale * torch.randn(6, 7, 50)
        log_q = torch.distributions.Normal(loc, scale).log_prob(z).sum(-1)
        log_prior = torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
        log_likelihood = -torch.nn.functional.binary_cross_entropy_with_logits(
            network.decoder(z), x.expand(6, 7, 64), reduction="none"
        ).sum(-1)
        log_w = log_prior + log_likelihood - log_q
        w = (log_w - log_w.amax(0)).exp()
    assert results["log_marginal"] == pytest.approx(
        (log_w.logsumexp(0) - math.log(6)).mean().item(), rel=1e-5
    )
    iwae = (log_w.reshape(3, 2, 7).logsumexp(1) - math.log(2)).mean().item()
    assert results["iwae"] == pytest.approx(iwae, rel=1e-5)
    assert results["ess"] == pytest.approx((w.sum(0) ** 2 / (w**2).sum(0)).mean().item(), rel=1e-4)
    assert results["active_units"] == int((loc.var(0) > 0.01).sum())


def test_finished_runs_are_not_repeated(tmp_path: Path, calls: list[tuple[Cell, int]]) -> None:
    argv = ["--smoke", "--out", str(tmp_path)]
    first = mk_grid.main(argv)
    assert len(calls) == len(set(calls)) == 12
    lost = tmp_path / "runs" / "piwae-2-2-seed-1.json"
    lost.unlink()
    assert mk_grid.main(argv) == first
    assert calls[12:] == [(Cell("piwae", 2, 2), 1)]


def test_stopped_grid_goes_on(
    tmp_path: Path, calls: list[tuple[Cell, int]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv = ["--smoke", "--out", str(tmp_path)]
    unlimited = mk_grid.train_and_measure

    def limited(cell: Cell, seed: int, *rest: Any) -> dict[str, Any]:
        if len(calls) == 5:
            raise KeyboardInterrupt
        return unlimited(cell, seed, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(mk_grid, "train_and_measure", limited)
        with pytest.raises(SystemExit) as caught:
            mk_grid.main(argv)
    assert caught.value.code == 130
    assert "finished runs are kept" in capsys.readouterr().err
    results = mk_grid.main(argv)
    assert len(calls) == len(set(calls)) == 12
    for cell in results["cells"]:
        made = Cell(cell["loss"], cell["M"], cell["K"], cell["beta"])
        assert cell["runs"] == [fake_results(made, seed) for seed in range(2)]


def test_more_seeds_add_to_the_grid(tmp_path: Path, calls: list[tuple[Cell, int]]) -> None:
    for seeds in (1, 2):
        results = mk_grid.main(["--smoke", "--seeds", str(seeds), "--out", str(tmp_path)])
        assert {len(cell["runs"]) for cell in results["cells"]} == {seeds}
    assert [seed for _, seed in calls] == [0] * 6 + [1] * 6


def test_table_has_mean_and_standard_deviation(tmp_path: Path, calls: list[tuple[Cell, int]]) -> None:
    mk_grid.main(["--smoke", "--out", str(tmp_path)])
    rows = (tmp_path / "grid.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2 + 6
    assert {row.count("|") for row in rows} == {7}
    # 102 and 103 of the two seeds: the standard deviation of two is their distance over √2.
    assert rows[3].startswith("| MIWAE(2, 2) | 102.50 ± 0.71 | 102.50 ± 0.71 | 102.50 ± 0.71 | 102.5 ± 0.7 |")


def test_other_settings_are_refused(tmp_path: Path, calls: list[tuple[Cell, int]]) -> None:
    argv = ["--smoke", "--out", str(tmp_path)]
    mk_grid.main(argv)
    with pytest.raises(SystemExit, match="another batch_size: choose another --out"):
        mk_grid.main([*argv, "--batch-size", "10"])
    assert len(calls) == 12


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"results": {}}', "7"])
def test_damaged_run(content: str, tmp_path: Path, calls: list[tuple[Cell, int]]) -> None:
    argv = ["--smoke", "--seeds", "1", "--out", str(tmp_path)]
    mk_grid.main(argv)
    (tmp_path / "runs" / "miwae-4-1-seed-0.json").write_text(content)
    with pytest.raises(SystemExit, match=r"error: .*miwae-4-1-seed-0\.json is not a run .*delete it"):
        mk_grid.main(argv)


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--nll-particles", "63"], "--nll-particles: must be at least the budget, 64"),
        (["--betas", "0.5", "1.5"], "must lie in [0, 1]"),
        (["--data", "imagenet"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            mk_grid.main([*argv, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no files of the data set"):
        mk_grid.main(["--smoke", "--data", "omniglot", "--data-dir", str(tmp_path), "--out", str(tmp_path)])
