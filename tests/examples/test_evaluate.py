"""The evaluation of a trained VAE agrees with what its training reported, and fails with a word."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import evaluate
import pyro
import pytest
import torch
import vae
import xarray
from matplotlib import pyplot
from matplotlib.image import imread

from pyro_iw import plots
from shared import options
from shared.evaluation import mean_bound
from shared.networks import VAE

PICTURES = {"bound.png", "ess.png", "khat.png", "weights.png", "latents.png"}
FILES = PICTURES | {"report.json", "posterior.nc"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    vae.main(["--smoke", "-M", "4", "-K", "4", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return evaluate.main(["--smoke", str(run)])


@pytest.fixture(scope="module")
def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What it reports


def test_agrees_with_the_training_run(report: dict[str, Any], metrics: dict[str, Any]) -> None:
    results, trained = report["results"], metrics["results"]
    # Both from 50 draws, so with the same bias; the two errors are independent.
    tolerance = 5 * 2**0.5 * results["nll_monte_carlo_error"]
    assert tolerance < 1.5
    assert results["nll"] == pytest.approx(trained["heldout_nll"], abs=tolerance)
    assert results["active_units"] == trained["active_units"]


def test_images_and_parameters_are_those_of_the_run(run: Path, metrics: dict[str, Any]) -> None:
    """The same pair, bits and draws, in the same order, give the same bound to the last digit."""
    network, settings = evaluate.load_vae(run)
    data, images = evaluate.load_heldout(settings, None)
    assert data.name == "digits"
    pyro.clear_param_store()
    bound = mean_bound(network, images, options.make_loss("miwae", 4, 4), seed=settings["seed"])
    assert bound == metrics["results"]["heldout_bound"]


def test_numbers_are_consistent(report: dict[str, Any]) -> None:
    results = report["results"]
    assert report["images"] == 40
    assert results["elbo"] == pytest.approx(-results["rate"] - results["distortion"], rel=1e-5)
    assert results["elbo"] < results["iwae"]
    # IWAE-64 of 50 draws is IWAE-50, the log evidence itself.
    assert results["iwae_particles"] == 50
    assert results["minus_kl"] == pytest.approx(0, abs=1e-4)
    assert results["units"] == 50
    assert 1 <= results["ess_5_percent"] <= results["ess_median"] <= 50
    assert results["khat_images"] == 20
    assert results["khat_threshold"] == pytest.approx(1 - 1 / math.log10(50))
    assert 0 <= results["khat_share_above"] <= 1
    curve = results["bound_curve"]
    assert curve["num_particles"] == [1, 2, 4, 8, 16, 32]
    assert curve["mean"] == sorted(curve["mean"])


def test_report_is_what_main_returns(run: Path, report: dict[str, Any]) -> None:
    assert json.loads((run / "evaluation-smoke" / "report.json").read_text()) == report
    assert report["settings"]["num_particles"] == 50
    assert report["training"]["data"] == "digits"


def test_files(run: Path, report: dict[str, Any]) -> None:
    folder = run / "evaluation-smoke"
    assert files(folder) == FILES
    for name in PICTURES:
        picture = imread(folder / name)
        assert picture.shape[1] == 720
        assert picture.std() > 0.05
    with xarray.open_dataset(folder / "posterior.nc", group="posterior") as posterior:
        assert dict(posterior["z"].sizes) == {"chain": 1, "draw": 1000, "data": 4, "unit": 50}


def test_same_seed_same_report(run: Path, report: dict[str, Any], tmp_path: Path) -> None:
    again = evaluate.main(["--smoke", str(run / "vae.pt"), "--out", str(tmp_path)])
    assert files(tmp_path) == FILES
    assert {**again["results"], "wall_seconds": 0} == {**report["results"], "wall_seconds": 0}


def test_annealed(run: Path, report: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    """The first images once more, by another way to the same number; the rest of the report is as before."""
    again = evaluate.main(["--smoke", str(run), "--out", str(tmp_path), "--ais", "--ais-temperatures", "20"])
    assert files(tmp_path) == FILES | {"sandwich.png"}
    results = again["results"]
    annealed = results.pop("annealed")
    assert {**results, "wall_seconds": 0} == {**report["results"], "wall_seconds": 0}
    assert (annealed["images"], annealed["chains"], annealed["temperatures"]) == (5, 4, 20)
    assert annealed["nll_of_guide"] - annealed["nll"] == pytest.approx(annealed["shortfall"], abs=1e-3)
    # 50 draws of the guide are not far off on a model this small, nor are the chains.
    assert abs(annealed["shortfall"]) < 4
    assert abs(annealed["sandwich_gap"]) < 6
    printed = capsys.readouterr().out
    assert "[4/4] annealed" in printed
    assert "NLL of these, L_50" in printed


def test_two_dimensional_latent_has_a_manifold(run: Path, tmp_path: Path, capsys: Any) -> None:
    saved = torch.load(run / "vae.pt", weights_only=True)
    saved["state_dict"] = VAE(64, latent=2, hidden=5).state_dict()
    torch.save(saved, tmp_path / "vae.pt")
    figures = pyplot.get_fignums()
    report = evaluate.main(["--smoke", str(tmp_path), "--test-size", "10", "--chunk-size", "7"])
    assert pyplot.get_fignums() == figures
    assert files(tmp_path / "evaluation-smoke") == FILES | {"manifold.png"}
    assert report["images"] == 10
    assert report["results"]["khat_images"] == 10
    assert report["results"]["units"] == 2
    printed = capsys.readouterr().out
    assert f"{report['results']['nll']:.3f} nats" in printed
    assert "10 held-out images" in printed
    assert "manifold.png" in printed


# What it refuses


def damage(kind: str, run: Path, folder: Path) -> None:
    """A damaged copy of the run's ``vae.pt``."""
    content = (run / "vae.pt").read_bytes()
    saved = torch.load(run / "vae.pt", weights_only=True)
    path = folder / "vae.pt"
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no model\n")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "no settings":
        torch.save({"state_dict": saved["state_dict"]}, path)
    elif kind == "other model":
        torch.save({**saved, "state_dict": torch.nn.Linear(2, 3).state_dict()}, path)
    elif kind == "lost layer":
        del saved["state_dict"]["decoder.2.weight"]
        torch.save(saved, path)


@pytest.mark.parametrize(
    "kind",
    ["truncated", "empty", "text", "list", "tensor", "no settings", "other model", "lost layer"],
)
def test_damaged_model(kind: str, run: Path, tmp_path: Path) -> None:
    damage(kind, run, tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*vae\.pt is no model saved by examples/vae\.py"):
        evaluate.main(["--smoke", str(tmp_path)])
    assert files(tmp_path) == {"vae.pt"}


def test_no_model(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit, match=r"error: no file .*train a model"):
            evaluate.main(["--smoke", str(path)])
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heldout_images": 41}, "held out 41 images, but there are 40"),
        ({"data": "imagenet"}, "unknown data set"),
        ({"data": "omniglot"}, "no files of the data set"),
    ],
)
def test_other_data(change: dict[str, Any], message: str, run: Path, tmp_path: Path) -> None:
    saved = torch.load(run / "vae.pt", weights_only=True)
    saved["settings"] |= change
    torch.save(saved, tmp_path / "vae.pt")
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        evaluate.main(["--smoke", str(tmp_path), "--data-dir", str(tmp_path)])
    assert files(tmp_path) == {"vae.pt"}


def test_other_image_size(run: Path, tmp_path: Path) -> None:
    saved = torch.load(run / "vae.pt", weights_only=True)
    torch.save({**saved, "state_dict": VAE(30).state_dict()}, tmp_path / "vae.pt")
    with pytest.raises(SystemExit, match="images have 30 pixels, but those of the data 64"):
        evaluate.main(["--smoke", str(tmp_path)])


def test_failure_leaves_earlier_results(
    run: Path, report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run / "evaluation-smoke", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(plots, "plot_latents", fail)
    with pytest.raises(SystemExit, match="error: the disk is full"):
        evaluate.main(["--smoke", str(run), "--out", str(tmp_path / "out"), "--seed", "1"])
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_unwritable_output(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file"):
        evaluate.main(["--smoke", str(run), "--out", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-particles", "1"], "--num-particles: must be at least 2"),
        (["--num-particles", "0"], "--num-particles: must be at least 1"),
        (["--khat-images", "0"], "--khat-images"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["somewhere", *argv])
    assert message in capsys.readouterr().err
