"""The VAE and the demo at smoke size: what they write, repeat, and say of bad arguments, data and files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import demo
import evaluate
import numpy as np
import pytest
import torch
import vae

from pyro_iw import IWAE_ELBO
from shared import checkpoint, datasets, options, training
from shared.networks import VAE

PICTURES = ("samples.png", "reconstructions.png", "latents.png", "learning_curve.png")


def finite(numbers: dict) -> bool:
    return all(math.isfinite(value) for value in numbers.values())


@pytest.mark.parametrize("loss", options.LOSSES)
def test_vae_smoke(loss: str, tmp_path: Path) -> None:
    argv = ["--loss", loss, "-M", "3", "-K", "4", "--smoke", "--out", str(tmp_path)]
    metrics = vae.main(argv)
    assert finite(metrics["results"])
    assert all(finite(record) for record in metrics["history"])
    assert 0 <= metrics["results"]["active_units"] <= 50
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    saved = torch.load(tmp_path / "vae.pt", weights_only=True)
    assert saved["settings"] == metrics["settings"]
    again = VAE(64)
    again.load_state_dict(saved["state_dict"])

    # The decoder's bias must have moved away from where it started: the training has trained.
    images = datasets.load("digits").subset(100, 40).train.flatten(1)
    start = images.mean(0).clamp(0.001, 0.999).logit()
    assert not torch.equal(again.decoder[-1].bias, start)


@pytest.mark.parametrize("estimator", options.ESTIMATORS)
def test_vae_with_every_estimator(estimator: str, tmp_path: Path) -> None:
    metrics = vae.main(["--smoke", "--estimator", estimator, "--out", str(tmp_path)])
    assert metrics["settings"]["estimator"] == estimator
    assert math.isfinite(metrics["results"]["heldout_nll"])


def test_two_latent_dimensions_have_a_manifold(tmp_path: Path) -> None:
    vae.main(["--smoke", "--latent", "2", "--out", str(tmp_path)])
    assert (tmp_path / "manifold.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate.load_vae(tmp_path)[0].latent == 2


def test_damaged_model(tmp_path: Path) -> None:
    vae.main(["--smoke", "--out", str(tmp_path)])
    path = tmp_path / "vae.pt"
    content = bytearray(path.read_bytes())
    weights = checkpoint.read_torch(path)["state_dict"]["decoder.0.weight"]
    content[content.index(weights.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vae\.pt is no model saved by .*checksum"):
        evaluate.load_vae(tmp_path)


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        vae.main(["--smoke", "--out", str(tmp_path / "file")])


def test_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vae, "train", interrupt)
    with pytest.raises(SystemExit) as caught:
        vae.main(["--smoke", "--out", str(tmp_path)])
    assert caught.value.code == 130
    assert "interrupted: nothing is saved" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_vae_is_repeatable_and_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    def history(name: str, extra: dict) -> list[float]:
        args = vae.parse_args(["--smoke", "-M", "2", "-K", "2", "--out", str(tmp_path / name)])
        args.epochs = 2
        return [record["train_bound"] for record in vae.run(args, extra)["history"]]

    first = history("a", {})
    assert history("b", {}) == first
    assert history("c", {"heldout_iwae": IWAE_ELBO(K=4)}) == first


def test_grey_images_are_binarised_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training sees bits alone, and other bits of the same images in every epoch."""
    seen = []
    guide = VAE.guide
    monkeypatch.setattr(VAE, "guide", lambda self, x: (seen.append(x.clone()), guide(self, x)))
    argv = ["-M", "1", "-K", "1", "--epochs", "2", "--train-size", "30", "--test-size", "5"]
    argv += ["--batch-size", "30", "--nll-particles", "1", "--out", str(tmp_path)]
    vae.main(argv)
    assert {value for x in seen for value in x.unique().tolist()} == {0.0, 1.0}
    # The first batch is seen several times: the pair is new to the loss, which looks at it.
    batches = [x for x in seen if len(x) == 30]
    first, second = batches[0], batches[-1]
    assert all(torch.equal(x, first) for x in batches[:-1])
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    # The five held-out images are drawn once.
    held_out = [x for x in seen if len(x) == 5]
    assert all(torch.equal(x, held_out[0]) for x in held_out)


def test_vae_learns(tmp_path: Path) -> None:
    argv = ["-M", "2", "-K", "4", "--epochs", "4", "--train-size", "400", "--test-size", "100"]
    argv += ["--learning-rate", "3e-3", "--nll-particles", "20", "--out", str(tmp_path)]
    history = vae.main(argv)["history"]
    assert history[-1]["heldout_bound"] > history[0]["heldout_bound"] + 0.5
    assert history[-1]["train_bound"] > history[0]["train_bound"] + 0.5


def test_binary_images_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (datasets, training):
        monkeypatch.setattr(module, "binarize", lambda *_: pytest.fail("binarised twice"))
    rng = np.random.default_rng(0)
    packed = {f"{part}_images": rng.integers(0, 256, (25, 98), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "binarized_mnist.npz", **packed)
    argv = ["--data", "binarized-mnist", "--data-dir", str(tmp_path), "--smoke"]
    metrics = vae.main([*argv, "--out", str(tmp_path / "out")])
    assert finite(metrics["results"])
    assert metrics["settings"]["heldout_images"] == 25


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-M", "0"], "-M: must be at least 1"),
        (["-K", "-2"], "-K: must be at least 1"),
        (["-K", "1.5"], "-K: invalid"),
        (["--beta", "1.2"], r"must lie in \[0, 1\]"),
        (["--nll-particles", "0"], "--nll-particles: must be at least 1"),
        (["--learning-rate", "nan"], "must be positive"),
        (["--data", "imagenet"], "invalid choice"),
        (["--loss", "vimco"], "invalid choice"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_bad_arguments(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        vae.main([*argv, "--smoke", "--out", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err)


def test_demo_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = demo.main(["--smoke", "--out", str(tmp_path)])
    assert set(metrics) == set(demo.WAYS)
    for name in (*PICTURES, "comparison.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    lines = table.splitlines()
    assert len(lines) == 2 + len(demo.WAYS)
    assert {line.count("|") for line in lines} == {1 + len(demo.HEADER)}
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert all(finite(numbers) for numbers in results.values())
    assert all(demo.COMMON_BOUND in one["history"][0] for one in metrics.values())
    assert metrics["iwae-dreg"]["settings"]["estimator"] == "dreg"

    # Image by image: the standard error from the sum of both variances less twice their covariance.
    log_p = {name: one["log_p"].astype(float) for name, one in metrics.items()}
    for name, numbers in results.items():
        assert numbers["heldout_nll"] == pytest.approx(-log_p[name].mean(), rel=1e-6)
        difference = numbers["heldout_nll"] - results["elbo"]["heldout_nll"]
        assert numbers["nll_less_elbo"] == pytest.approx(difference, abs=1e-5)
        (a, c), (_, b) = np.cov(log_p[name], log_p["elbo"])
        error = math.sqrt(max(a + b - 2 * c, 0) / len(log_p[name]))
        assert numbers["nll_less_elbo_error"] == pytest.approx(error, rel=1e-6, abs=1e-9)
