"""Image sets in every file format that the examples claim to read, and files that are damaged or missing."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import vae
from PIL import Image

from shared import datasets


def mnist_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "train_images": rng.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        "train_labels": rng.integers(0, 10, 30, dtype=np.uint8),
        "test_images": rng.integers(0, 256, (9, 28, 28), dtype=np.uint8),
        "test_labels": rng.integers(0, 10, 9, dtype=np.uint8),
    }


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def assert_holds(data: datasets.ImageData, arrays: dict[str, np.ndarray]) -> None:
    for part in ("train", "test"):
        images, labels = getattr(data, part), getattr(data, f"{part}_labels")
        assert images.dtype == torch.float32
        # Multiplied back, a byte divided by 255 has to be the byte itself.
        np.testing.assert_array_equal((images * 255).round().numpy(), arrays[f"{part}_images"])
        assert images.min() >= 0
        assert 0.9 < images.max() <= 1
        np.testing.assert_array_equal(labels.numpy(), arrays[f"{part}_labels"])
    assert not data.binary


def test_digits_are_split_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    data, again = datasets.load("digits"), datasets.load("digits")
    assert data.train.shape == (1500, 8, 8)
    assert data.test.shape == (297, 8, 8)
    assert data.image_shape == (8, 8)
    assert torch.equal(data.train, again.train)
    both = torch.cat([data.train, data.test]).flatten(1) * 16
    original = load_digits().data
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, original.tolist()))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("mnist", "mnist"),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "fashion_mnist"),
        ("omniglot", "omniglot_28x28"),
    ],
)
def test_npz(name: str, stem: str, tmp_path: Path) -> None:
    arrays = mnist_arrays()
    np.savez(tmp_path / f"{stem}.npz", **arrays)
    assert_holds(datasets.load(name, tmp_path), arrays)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", ".")],
)
def test_idx_layout(name: str, folder: str, suffix: str, tmp_path: Path) -> None:
    arrays = mnist_arrays(1)
    for key, stem in datasets.IDX_STEMS.items():
        write_idx(tmp_path / folder / f"{stem}{suffix}", arrays[key])
    assert_holds(datasets.load(name, tmp_path), arrays)


def test_binarized_mnist_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    bits = {part: rng.integers(0, 2, (n, 784)) for part, n in (("train", 7), ("test", 5))}
    packed = {f"{part}_images": np.packbits(rows, axis=1) for part, rows in bits.items()}
    np.savez(tmp_path / "binarized_mnist.npz", **packed, valid_images=packed["test_images"])
    data = datasets.load("binarized-mnist", tmp_path)
    assert data.binary
    assert data.train_labels is None
    np.testing.assert_array_equal(data.train.flatten(1).numpy(), bits["train"])
    np.testing.assert_array_equal(data.test.flatten(1).numpy(), bits["test"])


def test_binarized_mnist_text(tmp_path: Path) -> None:
    bits = np.random.default_rng(3).integers(0, 2, (4, 784))
    for part in ("train", "test"):
        np.savetxt(tmp_path / f"binarized_mnist_{part}.amat", bits, fmt="%d")
    data = datasets.load("binarized-mnist", tmp_path)
    np.testing.assert_array_equal(data.train.flatten(1).numpy(), bits)

    (tmp_path / "binarized_mnist_test.amat").write_text("0 1 2\n")
    with pytest.raises(ValueError, match="784 zeros and ones"):
        datasets.load("binarized-mnist", tmp_path)


@pytest.mark.parametrize("name", [name for name in datasets.NAMES if name != "digits"])
def test_missing_files_say_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_download", lambda *_: (None, "not in a test"))
    with pytest.raises(FileNotFoundError, match="--data-dir") as caught:
        datasets.load(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)
    with pytest.raises(SystemExit, match="--data-dir"):
        vae.main(["--data", name, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="digits"):
        datasets.load("imagenet")


def test_bad_idx_files(tmp_path: Path) -> None:
    labels = np.arange(4, dtype=np.uint8)
    path = tmp_path / "file"
    write_idx(path, labels)
    np.testing.assert_array_equal(datasets.read_idx(path, ndim=1), labels)
    with pytest.raises(ValueError, match="bad magic number 00000801, expected 00000803"):
        datasets.read_idx(path, ndim=3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated"):
        datasets.read_idx(path, ndim=1)
    path = tmp_path / "labels.gz"
    for damaged in (gzip.compress(whole)[:-9], whole, gzip.compress(whole)[:12] + b"\xff" * 8):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"labels\.gz is no gzip file, or a damaged one"):
            datasets.read_idx(path, ndim=1)


def test_bad_npz_files(tmp_path: Path) -> None:
    arrays = mnist_arrays()
    path = tmp_path / "mnist.npz"
    np.savez(path, **{**arrays, "test_labels": arrays["test_labels"][1:]})
    with pytest.raises(ValueError, match="9 test images, but labels"):
        datasets.load("mnist", tmp_path)
    np.savez(path, **{**arrays, "train_images": arrays["train_images"] / 255})
    with pytest.raises(ValueError, match="should be uint8"):
        datasets.load("mnist", tmp_path)
    np.savez(path, **{**arrays, "test_images": arrays["test_images"][:, 1:]})
    with pytest.raises(ValueError, match="different sizes in training and test"):
        datasets.load("mnist", tmp_path)
    np.savez(
        path, **{**arrays, "test_images": arrays["test_images"][:0], "test_labels": arrays["test_labels"][:0]}
    )
    with pytest.raises(ValueError, match=r"test_images should be .* not empty"):
        datasets.load("mnist", tmp_path)
    np.savez(path, train_images=arrays["train_images"])
    with pytest.raises(ValueError, match="no array train_labels"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "one bit"])
def test_damaged_data(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    np.savez(path, **mnist_arrays())
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    damaged = {"truncated": content[:-100], "empty": b"", "text": b"no images\n", "one bit": content}
    path.write_bytes(damaged[kind])
    with pytest.raises(SystemExit, match=r"error: .*mnist\.npz"):
        vae.main(["--smoke", "--data", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_subset_is_shuffled_and_keeps_labels() -> None:
    rows = torch.arange(50.0)
    data = datasets.ImageData("mnist", rows.reshape(-1, 1, 1), rows.reshape(-1, 1, 1), rows.long(), None)
    part = data.subset(train_size=20, test_size=60)
    assert len(part.train) == 20
    assert len(part.test) == 50
    assert torch.equal(part.train.flatten().long(), part.train_labels)
    assert part.train_labels.max() >= 20
    assert part.train_labels.unique().numel() == 20


def test_binarize_has_the_right_mean() -> None:
    probabilities = torch.tensor([0.0, 0.2, 0.7, 1.0]).expand(20_000, 4)
    bits = datasets.binarize(probabilities, torch.Generator().manual_seed(0))
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    # Five standard errors of a mean of 20 000 bits.
    torch.testing.assert_close(bits.mean(0), probabilities[0], rtol=0, atol=5 * 0.5 / 20_000**0.5)


def drawing(seed: int) -> np.ndarray:
    """Black strokes on white, 105 × 105, as Omniglot has them."""
    ink = np.random.default_rng(seed).random((15, 15)) < 0.2
    return np.where(np.kron(ink, np.ones((7, 7), bool)), 0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def area_mean(ink: np.ndarray) -> np.ndarray:
    """Means over 28 × 28 equal areas of 105 × 105 pixels: of 15 × 15 quarters of a pixel's side."""
    return np.kron(ink, np.ones((4, 4))).reshape(28, 15, 28, 15).mean((1, 3))


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("below", ["omniglot-py", "."])
def test_omniglot_as_torchvision_keeps_it(archived: bool, below: str, tmp_path: Path) -> None:
    seed = 0
    for stem, alphabets in {
        "images_background": ("Greek", "Latin"),
        "images_evaluation": ("Tengwar",),
    }.items():
        files = {}
        for alphabet in alphabets:
            for character in ("character01", "character02"):
                for drawer in (1, 2):
                    files[f"{stem}/{alphabet}/{character}/{seed:04d}_{drawer:02d}.png"] = png(drawing(seed))
                    seed += 1
        root = tmp_path / below
        root.mkdir(exist_ok=True)
        if archived:
            with zipfile.ZipFile(root / f"{stem}.zip", "w") as archive:
                for name, content in reversed(files.items()):
                    archive.writestr(name, content)
        else:
            for name, content in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
    data = datasets.load("omniglot", tmp_path)
    assert data.train.shape == (8, 28, 28)
    assert data.test.shape == (4, 28, 28)
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert data.test_labels.tolist() == [4, 4, 5, 5]
    assert not data.binary
    for index, image in enumerate([*data.train, *data.test]):
        expected = area_mean((drawing(index) == 0).astype(float))
        np.testing.assert_allclose(image.numpy(), expected, atol=0.51 / 255)


def test_omniglot_that_is_damaged_or_half_there(tmp_path: Path) -> None:
    (tmp_path / "images_background").mkdir()
    with pytest.raises(FileNotFoundError, match="images_background and images_evaluation, as folders or"):
        datasets.load("omniglot", tmp_path)
    (tmp_path / "images_background").rmdir()
    (tmp_path / "images_background.zip").write_bytes(b"no archive")
    (tmp_path / "images_evaluation").mkdir()
    with pytest.raises(ValueError, match=r"images_background\.zip is no .zip file"):
        datasets.load("omniglot", tmp_path)
    (tmp_path / "images_background.zip").unlink()
    (tmp_path / "images_background" / "Greek" / "character01").mkdir(parents=True)
    drawn = tmp_path / "images_background" / "Greek" / "character01" / "0001_01.png"
    drawn.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0001_01\.png is no image"):
        datasets.load("omniglot", tmp_path)
    drawn.write_bytes(png(drawing(0)))
    with pytest.raises(ValueError, match=r"images_evaluation holds no alphabet/character/\*\.png"):
        datasets.load("omniglot", tmp_path)
