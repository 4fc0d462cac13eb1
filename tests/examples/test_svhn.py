"""House numbers: files as torchvision keeps them, damaged or absent ones, and the modes that use them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import aae
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy.io import savemat

from helpers.house_numbers import house_numbers, write_mat
from shared import datasets, svhn
from shared.aae.layers import Convolutional


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Training and held-out images, and extra ones."""
    for seed, (part, number) in enumerate({"train": 40, "test": 20, "extra": 10}.items()):
        write_mat(tmp_path / "data" / f"{part}_32x32.mat", *house_numbers(number, seed))
    return tmp_path / "data"


@pytest.fixture
def _no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)


@pytest.mark.parametrize("extra", [False, True])
def test_what_was_written_is_read(extra: bool, folder: Path) -> None:
    data = datasets.load("svhn", folder, extra=extra)
    assert data.image_shape == (32, 32, 3)
    parts = {"train": [house_numbers(40, 0)], "test": [house_numbers(20, 1)]}
    if extra:
        parts["train"].append(house_numbers(10, 2))
    for part, written in parts.items():
        images, labels = (np.concatenate(arrays) for arrays in zip(*written, strict=True))
        found = getattr(data, part)
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        np.testing.assert_array_equal((found * 255).round().numpy(), images)
        np.testing.assert_array_equal(getattr(data, f"{part}_labels").numpy(), labels)
    assert not data.binary


@pytest.mark.usefixtures("_no_torchvision")
def test_missing_files_say_what_to_do(folder: Path) -> None:
    (folder / "extra_32x32.mat").unlink()
    assert len(datasets.load("svhn", folder).train) == 40
    with pytest.raises(FileNotFoundError, match=r"extra_32x32\.mat") as caught:
        datasets.load("svhn", folder, extra=True)
    assert "torchvision cannot be imported" in str(caught.value)
    (folder / "test_32x32.mat").unlink()
    with pytest.raises(SystemExit, match="--data-dir") as stopped:
        aae.main(["--data", "svhn", "--data-dir", str(folder), "--out", str(folder / "out")])
    assert str(folder / "test_32x32.mat") in str(stopped.value)
    assert "extra" not in str(stopped.value)


def test_torchvision_downloads_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that writes the files where the real one does: right below its root."""
    asked = []

    def download(root: str, split: str, download: bool) -> None:
        asked.append((split, download))
        write_mat(Path(root) / svhn.FILES[split], *house_numbers(10, len(asked)))

    stand_in = ModuleType("torchvision")
    stand_in.datasets = SimpleNamespace(SVHN=download)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", stand_in)
    data = datasets.load("svhn", tmp_path / "new")
    assert asked == [("train", True), ("test", True)]
    np.testing.assert_array_equal((data.test * 255).round().numpy(), house_numbers(10, 2)[0])
    # What is there is not asked for again.
    datasets.load("svhn", tmp_path / "new")
    assert len(asked) == 2

    def fail(**_: object) -> None:
        raise OSError("no network")

    stand_in.datasets = SimpleNamespace(SVHN=fail)  # type: ignore[attr-defined]
    with pytest.raises(FileNotFoundError, match="the download failed: no network"):
        datasets.load("svhn", tmp_path / "other")


def test_torchvision_built_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(FileNotFoundError, match="torchvision cannot be imported: RuntimeError"):
        datasets.load("svhn", tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "test_32x32.mat"
    images, digits = house_numbers(10, 0)
    write_mat(path, images, digits)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (b"", b"no images\n" * 50, path.read_bytes()[:-100], bytes(content)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"test_32x32\.mat is no MATLAB file, or a damaged one"):
            svhn.read_mat(path)
    stacked, column = np.stack(list(images), -1), np.full((10, 1), 3, np.uint8)
    for arrays, message in (
        ({"X": stacked}, "no array y"),
        ({"X": images, "y": column}, r"shape \[H, W, 3, N\], not uint8 of shape \[10, 32, 32, 3\]"),
        ({"X": stacked / 255, "y": column}, "not float64"),
        ({"X": stacked, "y": 0 * column}, "1 to 10"),
        ({"X": stacked, "y": column + 8}, "1 to 10"),
    ):
        savemat(path, arrays)
        with pytest.raises(ValueError, match=message):
            svhn.read_mat(path)
    savemat(path, {"X": stacked, "y": column[1:]})
    write_mat(tmp_path / "train_32x32.mat", images, digits)
    with pytest.raises(ValueError, match="10 test images, but labels"):
        datasets.load("svhn", tmp_path)


SMOKE = ["--smoke", "--data", "svhn", "--channels", "2", "--train-size", "40", "--test-size", "20"]


@pytest.mark.parametrize(
    ("mode", "numbers"),
    [
        ("supervised", {"style_error", "reconstruction", "two_sample_accuracy"}),
        ("semi-supervised", {"error", "error_labels_alone"}),
    ],
)
def test_modes(mode: str, numbers: set[str], folder: Path, tmp_path: Path) -> None:
    argv = [*SMOKE, "--mode", mode, "--data-dir", str(folder), "--out", str(tmp_path / "out")]
    metrics = aae.main([*argv, *(["--labels", "20"] if mode != "supervised" else [])])
    results = metrics["runs"][0]["results"]
    assert numbers <= set(results)
    assert all(math.isfinite(value) for value in results.values())
    seed = tmp_path / "out" / "seed-0"
    assert {path.stem for path in seed.glob("*.png")} == {"losses", "reconstructions", "styles"}
    # The images are in colour: random ones are as far from grey as can be.
    shown = imread(seed / "reconstructions.png")[..., :3]
    assert np.ptp(shown, axis=-1).mean() > 0.1


def test_defaults() -> None:
    def of(*argv: str) -> tuple[object, ...]:
        args = aae.parse_args(list(argv))
        return args.latent, args.labels, args.channels, args.extra

    assert of("--mode", "semi-supervised", "--data", "svhn", "--extra") == (20, 1000, 32, True)
    assert of("--mode", "supervised", "--data", "svhn", "--channels", "8") == (20, None, 8, None)
    assert of("--mode", "steered", "--data", "svhn") == (2, 300, 32, None)
    assert of("--mode", "supervised", "--data", "mnist") == (10, None, None, None)
    assert of("--mode", "supervised") == (3, None, None, None)


def test_extra_images_are_of_house_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        aae.parse_args(["--data", "mnist", "--extra"])
    assert "--extra: only svhn has extra images, not --data mnist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "coarse"), [((32, 32, 3), (8, 4, 4)), ((28, 28), (4, 7, 7)), ((8, 8), (8, 1, 1))]
)
def test_convolutions(shape: tuple[int, ...], coarse: tuple[int, ...]) -> None:
    layers = Convolutional(shape, channels=2)
    assert layers.coarse == coarse
    trunk, decoder = layers.trunk(5), layers.decoder(3, 5)
    x = torch.rand(4, math.prod(shape))
    assert trunk(x).shape == (4, 5)
    assert decoder(torch.randn(4, 3)).shape == x.shape
    # By hand: channels before rows, as convolutions take them, whatever the order in which pixels are kept.
    first = next(layer for layer in trunk if isinstance(layer, torch.nn.Conv2d))
    images = x.numpy().reshape(4, *shape, *([] if len(shape) == 3 else [1]))
    planes = np.stack([images[..., c] for c in range(images.shape[-1])], 1)
    torch.testing.assert_close(trunk[:3](x), first(torch.from_numpy(planes)))
    last = decoder[-3]
    assert isinstance(last, torch.nn.ConvTranspose2d)
    planes = decoder[:-2](codes := torch.randn(4, 3)).detach().numpy()
    pixels = np.stack([planes[:, c] for c in range(planes.shape[1])], -1).reshape(4, -1)
    torch.testing.assert_close(decoder(codes).detach(), torch.from_numpy(pixels))
    with pytest.raises(ValueError, match="30×32"):
        Convolutional((30, 32, 3), 2)
