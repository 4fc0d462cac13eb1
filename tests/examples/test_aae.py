"""The adversarial autoencoders' program: its six modes, its command line, and runs that go on."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aae
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from helpers.resuming import run_stopped
from helpers.tiny_aae import MODES, TINY, training
from shared import checkpoint, datasets
from shared.aae import evaluation
from shared.aae.training import Trainer

SMOKES: dict[str, tuple[list[str], set[str], set[str]]] = {
    "unsupervised": (
        ["--latent", "2"],
        {"codes", "samples", "manifold"},
        {"parzen", "two_sample_accuracy_training"},
    ),
    "unsupervised, 8 dims": ([], {"codes", "samples"}, {"parzen"}),
    "unsupervised, 1 dim": (["--latent", "1"], {"codes", "samples"}, {"parzen"}),
    "unsupervised, swiss roll": (["--prior", "swiss-roll"], {"codes", "samples", "manifold"}, {"parzen"}),
    "steered": ([], {"codes", "samples", "manifold"}, {"error"}),
    "supervised": ([], {"styles"}, {"style_error"}),
    "semi-supervised": ([], {"styles"}, {"error", "error_labels_alone", "error_difference"}),
    "clustering": ([], {"clusters"}, {"error_majority", "error_most_confident", "clusters_used"}),
    "reduction": ([], {"clusters", "plane"}, {"error_majority", "neighbour_error"}),
    "reduction, labels": (["--labels", "30"], {"styles", "plane"}, {"error", "neighbour_error"}),
}


@pytest.mark.parametrize("name", SMOKES)
def test_smoke(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra, pictures, numbers = SMOKES[name]
    metrics = aae.main(["--mode", name.split(",")[0], "--smoke", *extra, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    folder = tmp_path / "seed-0"
    pictures = {f"{picture}.png" for picture in pictures | {"losses", "reconstructions"}}
    assert {path.name for path in folder.iterdir()} == pictures | {"checkpoint.pt", "metrics.json"}
    for picture in pictures:
        assert imread(folder / picture).std() > 0.05
    results = metrics["runs"][0]["results"]
    assert numbers <= set(results)
    assert all(math.isfinite(value) for value in results.values())
    assert all(0 <= results[key] <= 1 for key in results if key.startswith("error") and "diff" not in key)
    history = metrics["runs"][0]["history"]
    assert [record["epoch"] for record in history] == [1, 2]
    printed = capsys.readouterr().out
    for key in numbers:
        assert re.search(rf"^{re.escape(evaluation.ROWS[key].words)}  ", printed, re.MULTILINE)
    lines = printed.splitlines()
    assert lines[0] == f"{name.split(',')[0]} on digits, 2 epochs, 1 run"
    # Every number has its words, or stands beside the one that it is the error of.
    own = {row.error for row in evaluation.ROWS.values()}
    assert set(results) <= set(evaluation.ROWS) | own
    files = [str(path) for path in sorted(folder.iterdir())]
    assert lines[-len(files) - 1 :] == [*files, str(tmp_path / "metrics.json")]
    assert "_" not in "".join(lines[: -len(files) - 1])


def test_several_seeds_are_paired(tmp_path: Path) -> None:
    metrics = aae.main(
        [
            "--mode",
            "semi-supervised",
            *TINY,
            "--labels",
            "10",
            "--seeds",
            "2",
            "--seed",
            "3",
            "--out",
            str(tmp_path),
        ]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "seed-3", "seed-4"}
    differences = [r["results"]["error"] - r["results"]["error_labels_alone"] for r in metrics["runs"]]
    summary = metrics["summary"]["error_difference"]
    assert summary["mean"] == pytest.approx(np.mean(differences))
    assert summary["standard_error"] == pytest.approx(np.std(differences, ddof=1) / math.sqrt(2))


def test_seeds_draw_labels_and_validation(tmp_path: Path) -> None:
    args = aae.parse_args(["--mode", "semi-supervised"])
    first, again, second = (aae.load_data(args, seed) for seed in (0, 0, 1))
    assert len(first.few[1]) == 100
    assert torch.equal(first.few[0], again.few[0])
    assert not torch.equal(first.few[0].sum(1).sort().values, second.few[0].sum(1).sort().values)
    # Held-out images are the same for all seeds, and none of them is trained on.
    assert torch.equal(first.heldout, second.heldout)
    assert not len(first.validation)

    data = aae.load_data(aae.parse_args(["--mode", "unsupervised"]), 0)
    assert (len(data.images), len(data.validation), len(data.heldout)) == (1350, 150, 297)
    together = torch.cat([data.images, data.validation])
    assert torch.equal(
        together.sum(1).sort().values, datasets.load("digits").train.flatten(1).sum(1).sort().values
    )


CONFIGURATIONS = {
    "steered": ["--mode", "steered", "--prior", "swiss-roll", "--labels", "20"],
    "semi-supervised": ["--mode", "semi-supervised", "--labels", "10"],
    "reduction": ["--mode", "reduction"],
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    done: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in done:
            folder = tmp_path_factory.mktemp("whole")
            aae.main([*TINY, *CONFIGURATIONS[name], "--checkpoint-every", "1000", "--out", str(folder)])
            done[name] = training(folder)
        return done[name]

    return get


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aae.pictures, "save_all", lambda *_, **__: None)
    monkeypatch.setattr(aae.evaluation, "evaluate", lambda *_, **__: {"error": 0.0})


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_resumed_is_uninterrupted(
    name: str, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = uninterrupted(name)
    rng = random.Random(name)
    # Two stops, at random steps of nine, with checkpoints every so often.
    argv = [*TINY, *CONFIGURATIONS[name], "--checkpoint-every", str(rng.choice([1, 2]))]
    argv += ["--resume", "--out", str(tmp_path)]
    for steps in sorted(rng.sample(range(1, 9), 2)):
        run_stopped(monkeypatch, Trainer, steps, aae.main, argv)
        torch.manual_seed(rng.randrange(1000))  # another process has another state
    aae.main(argv)
    assert training(tmp_path) == expected


def moments(phase: str) -> Callable[[dict[str, Any]], Any]:
    """Loses the moments of one phase."""

    def lose(state: dict[str, Any]) -> None:
        for saved in state["optimisers"][phase].values():
            for moment in saved["state"].values():
                moment["exp_avg_sq"].mul_(1.5)

    return lose


# Parts of the state, and how to lose each: as if the checkpoint did not have it.
LOSSES_OF_STATE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pair": lambda state: state["pair"]["decoder.layers.0.bias"].add_(1e-3),
    "batch norm": lambda state: state["pair"]["encoder.heads.1.running_mean"].add_(1e-3),
    "discriminators": lambda state: state["discriminators"]["y.layers.0.bias"].add_(1e-3),
    **{
        f"moments of {phase}": moments(phase)
        for phase in ("reconstruction", "discriminators", "guide", "supervised")
    },
    "random": lambda state: state["random"].update(cpu=torch.Generator().manual_seed(5).get_state()),
    "generator": lambda state: state.update(generator=torch.Generator().manual_seed(0).get_state()),
    "order": lambda state: state.update(order=state["order"].flip(0)),
    "position": lambda state: state.update(position=len(state["order"])),
    "step": lambda state: state.update(step=state["step"] - 1),
    "history": lambda state: state.update(history=[]),
    "since_record": lambda state: state.update(since_record=({}, 0.0)),
}


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("part", [None, *LOSSES_OF_STATE])
def test_every_part_of_the_state_matters(
    part: str | None, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any one of them a resumed run is another one: so the test above would notice."""
    name = "semi-supervised"
    argv = [*TINY, *CONFIGURATIONS[name], "--resume", "--out", str(tmp_path)]
    run_stopped(monkeypatch, Trainer, 4, aae.main, argv)  # in the middle of an epoch
    path = tmp_path / "seed-0" / "checkpoint.pt"
    saved = checkpoint.load(path, aae.KIND)
    assert saved["training"]["step"] == 4
    if part is not None:
        LOSSES_OF_STATE[part](saved["training"])
    checkpoint.save(path, aae.KIND, saved)
    aae.main(argv)
    assert (training(tmp_path) == uninterrupted(name)) == (part is None)


@pytest.mark.usefixtures("_no_pictures")
def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    argv = [*TINY, "--mode", "clustering", "--clusters", "5", "--out", str(tmp_path)]
    aae.main(argv)
    with pytest.raises(SystemExit, match="--resume"):
        aae.main(argv)
    with pytest.raises(SystemExit, match=r"clusters 5 \(now 6\)"):
        aae.main([*argv, "--resume", "--clusters", "6"])
    # More seeds are more of the same.
    metrics = aae.main([*argv, "--resume", "--seeds", "2"])
    assert len(metrics["runs"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "clustering", "--labels", "100"], "--labels is not for --mode clustering"),
        (["--mode", "semi-supervised", "--clusters", "16"], "--clusters is not for"),
        (["--mode", "reduction", "--prior", "mixture"], "--prior is not for"),
        (["--mode", "steered", "--prior", "gaussian"], "needs a prior with parts"),
        (["--prior", "mixture", "--latent", "3"], "in the plane"),
        (["--data", "omniglot"], "invalid choice"),
        (["--clusters", "0"], "at least 1"),
        (["--mode", "clustering", "--noise", "-1"], "--noise"),
        (["--mode", "clustering", "--clusters", "1"], "--clusters"),
        (
            ["--mode", "reduction", "--labels", "30", "--clusters", "12"],
            "not for --mode reduction with --labels",
        ),
        (["--test-size", "19"], "at least 20"),
        (["--batch-size", "1"], "--batch-size"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        aae.parse_args(argv)
    assert message in capsys.readouterr().err


def test_defaults() -> None:
    def of(*argv: str) -> tuple[Any, ...]:
        args = aae.parse_args(list(argv))
        return args.prior, args.latent, args.labels, args.clusters, args.epochs

    assert of() == ("gaussian", 8, None, None, 200)
    assert of("--prior", "swiss-roll") == ("swiss-roll", 2, None, None, 200)
    assert of("--mode", "steered") == ("mixture", 2, 300, None, 200)
    assert of("--mode", "semi-supervised") == (None, 3, 100, None, 100)
    assert of("--mode", "semi-supervised", "--data", "mnist") == (None, 10, 100, None, 100)
    assert of("--mode", "semi-supervised", "--latent", "7") == (None, 7, 100, None, 100)
    assert of("--mode", "clustering", "--clusters", "30") == (None, 3, None, 30, 100)
    assert of("--mode", "reduction") == (None, 2, None, 20, 100)
    assert of("--mode", "reduction", "--labels", "100") == (None, 2, 100, None, 100)


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        ("", "aae-unsupervised-digits"),
        ("--prior gaussian", "aae-unsupervised-digits"),
        ("--prior swiss-roll", "aae-unsupervised-swiss-roll-digits"),
        ("--prior mixture --data mnist", "aae-unsupervised-mixture-mnist"),
        ("--mode steered --prior mixture", "aae-steered-digits"),
        ("--mode steered --prior swiss-roll", "aae-steered-swiss-roll-digits"),
        ("--mode reduction", "aae-reduction-digits"),
        ("--mode reduction --labels 100", "aae-reduction-labels-digits"),
        ("--mode semi-supervised --labels 50", "aae-semi-supervised-digits"),
        ("--mode clustering --smoke", "smoke/aae-clustering-digits"),
        ("--mode reduction --labels 100 --smoke", "smoke/aae-reduction-labels-digits"),
    ],
)
def test_default_folder(argv: str, folder: str) -> None:
    assert aae.parse_args(argv.split()).out == Path("results", folder)


def test_help_tells_the_defaults_by_mode(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        aae.parse_args(["--help"])
    printed = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    assert "None" not in printed
    for name, modes in {
        "labels": ("steered", "semi-supervised"),
        "clusters": ("clustering", "reduction"),
        "latent": ("semi-supervised", "clustering", "reduction"),
        "noise": MODES,
    }.items():
        told = printed.split(f"--{name} {name.upper()} ")[1].split(" --")[0]
        for mode in modes:
            # On MNIST: digits are told apart from it in words.
            default = getattr(aae.parse_args(["--mode", mode, "--data", "mnist"]), name)
            assert f"{default} in {mode}" in told


@pytest.mark.parametrize("below", ["", "below"])
def test_out_that_is_a_file(below: str, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("")
    with pytest.raises(SystemExit) as raised:
        aae.main(["--smoke", "--out", str(file / below)])
    assert str(raised.value) == f"error: --out {file / below}: {file} is a file, name a folder"


@pytest.mark.usefixtures("_no_pictures")
def test_errors_of_the_system_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit) as raised:
        aae.main(["--smoke", "--out", str(tmp_path / "new")])
    assert str(raised.value) == f"error: {tmp_path / 'new' / 'seed-0'}: Permission denied"


@pytest.mark.usefixtures("_no_pictures")
def test_words_for_one_and_for_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TINY, "--mode", "clustering"]
    aae.main([*argv, "--epochs", "1", "--out", str(tmp_path / "a")])
    assert "clustering on digits, 1 epoch, 1 run\n" in capsys.readouterr().out
    aae.main([*argv, "--seeds", "2", "--out", str(tmp_path / "b")])
    assert "clustering on digits, 3 epochs, 2 runs\n" in capsys.readouterr().out


def test_too_few_images_for_the_labels(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="less than one for each of the 10 classes"):
        aae.main(["--mode", "semi-supervised", "--labels", "9", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="training images, and 20 are to be labelled"):
        aae.main(["--mode", "steered", "--labels", "200", "--train-size", "100", "--out", str(tmp_path)])


@pytest.mark.slow
def test_unlabelled_images_help_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aae.pictures, "save_all", lambda *_, **__: None)
    argv = ["--mode", "semi-supervised", "--epochs", "40", "--hidden", "128", "--seeds", "3"]
    summary = aae.main([*argv, "--out", str(tmp_path)])["summary"]["error_difference"]
    assert summary["mean"] < -0.015
    assert summary["mean"] < -2 * summary["standard_error"]


@pytest.mark.slow
def test_clusters_are_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aae.pictures, "save_all", lambda *_, **__: None)
    argv = ["--mode", "clustering", "--epochs", "40", "--hidden", "128", "--seeds", "2"]
    metrics = aae.main([*argv, "--out", str(tmp_path)])
    assert all(run["results"]["error_majority"] <= 0.25 for run in metrics["runs"])
