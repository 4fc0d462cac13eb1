"""Small image sets for the examples, as probabilities that a pixel is on, or as colours.

``digits`` comes with scikit-learn, so nothing is downloaded. The other sets are read from a folder
that the user names; ``mnist``, ``fashion-mnist`` and ``svhn`` are downloaded into it where torchvision
can be imported.
"""

from __future__ import annotations

import gzip
import io
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import svhn

__all__ = ["COLOUR", "NAMES", "ImageData", "binarize", "heldout_images", "load", "read_idx"]

NAMES = ("digits", "mnist", "binarized-mnist", "omniglot", "fashion-mnist")
# Whose pixels are no probabilities: red, green and blue, for programs that ask for them.
COLOUR = ("svhn",)

DIGITS_TRAIN_SIZE = 1500
DIGITS_SPLIT_SEED = 0

# Where torchvision keeps the idx files, below the root folder it is given.
TORCHVISION_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
IDX_STEMS = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
# As torchvision names what it downloads. Train on the one, hold out the other: other characters altogether.
OMNIGLOT_STEMS = {"train": "images_background", "test": "images_evaluation"}


@dataclass(frozen=True)
class ImageData:
    """Training and held-out images of one set.

    Attributes:
        name: One of :data:`NAMES` or :data:`COLOUR`.
        train: Probabilities in [0, 1], shape ``[N, H, W]``, float32; or colours in [0, 1], ``[N, H, W, 3]``.
        test: Those held out, shape ``[N', H, W]`` or ``[N', H, W, 3]``, float32.
        train_labels: Class ids, shape ``[N]``, or ``None`` where the set has none.
        test_labels: Class ids, shape ``[N']``, or ``None``.
        binary: Whether every pixel is 0 or 1 already, so that no binarisation is due.
    """

    name: str
    train: torch.Tensor
    test: torch.Tensor
    train_labels: torch.Tensor | None = None
    test_labels: torch.Tensor | None = None
    binary: bool = False

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height and width in pixels; and 3, if they have colours."""
        return tuple(self.train.shape[1:])

    def subset(self, train_size: int | None = None, test_size: int | None = None, seed: int = 0) -> ImageData:
        """A random subset; shuffled first, because some files are sorted by class."""
        generator = torch.Generator().manual_seed(seed)

        def pick(size: int | None, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
            if size is None or size >= len(tensors[0]):
                return list(tensors)
            rows = torch.randperm(len(tensors[0]), generator=generator)[:size]
            return [None if tensor is None else tensor[rows] for tensor in tensors]

        train, train_labels = pick(train_size, self.train, self.train_labels)
        test, test_labels = pick(test_size, self.test, self.test_labels)
        return ImageData(self.name, train, test, train_labels, test_labels, self.binary)


def binarize(probabilities: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw every pixel from a Bernoulli of its probability: the "dynamic" binarisation."""
    return torch.bernoulli(probabilities, generator=generator)


def heldout_images(data: ImageData, seed: int) -> torch.Tensor:
    """Held-out images as bits, drawn once, so that every epoch and every loss sees the same."""
    if data.binary:
        return data.test
    return binarize(data.test, torch.Generator().manual_seed(seed))


def load(name: str, data_dir: str | Path = "data", extra: bool = False) -> ImageData:
    """Load an image set.

    Arguments:
        name: One of :data:`NAMES` or :data:`COLOUR`.
        data_dir: The folder to read from; ``digits`` needs none.
        extra: Whether the extra images of ``svhn`` follow its training images.

    Raises:
        ValueError: If the name is unknown or a file does not hold what it should.
        FileNotFoundError: If no file of the set is found; the message lists what was tried.
    """
    if name not in NAMES + COLOUR:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(NAMES + COLOUR)}")
    folder = Path(data_dir)
    if name == "digits":
        return _load_digits()
    if name == "binarized-mnist":
        return _load_binarized_mnist(folder)
    if name == "omniglot":
        return _load_omniglot(folder)
    if name == "svhn":
        return _load_svhn(folder, extra)
    return _load_mnist_like(name, folder)


def _load_digits() -> ImageData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16).float()
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(DIGITS_SPLIT_SEED))
    train, test = order[:DIGITS_TRAIN_SIZE], order[DIGITS_TRAIN_SIZE:]
    return ImageData("digits", images[train], images[test], labels[train], labels[test])


def _load_mnist_like(name: str, folder: Path) -> ImageData:
    tried: list[str] = []
    for stem in dict.fromkeys((name, name.replace("-", "_"))):
        path = folder / f"{stem}.npz"
        if path.is_file():
            return _from_bytes(name, _read_npz(path, tuple(IDX_STEMS)))
        tried.append(str(path))

    # Before torchvision, so that files already on disk never cause a download.
    for raw in (folder / TORCHVISION_CLASS[name] / "raw", folder):
        arrays = _read_idx_folder(raw)
        if arrays is not None:
            return _from_bytes(name, arrays)
        tried.append(f"{raw / IDX_STEMS['train_images']}[.gz] and its three companions")

    arrays, failure = _download(name, folder)
    if arrays is not None:
        return _from_bytes(name, arrays)
    tried.append(f"torchvision.datasets.{TORCHVISION_CLASS[name]} ({failure})")
    raise _missing(
        name,
        tried,
        f"Put {name}.npz (keys {', '.join(IDX_STEMS)}; uint8 images [N, 28, 28]) or the four idx "
        "files into that folder, name another one with --data-dir, or install torchvision to "
        "download them.",
    )


def _load_binarized_mnist(folder: Path) -> ImageData:
    npz = folder / "binarized_mnist.npz"
    if npz.is_file():
        arrays = _read_npz(npz, ("train_images", "test_images"))
        train, test = (_unpack(arrays[key], npz, key) for key in ("train_images", "test_images"))
        return ImageData("binarized-mnist", train, test, binary=True)
    amat = [folder / f"binarized_mnist_{part}.amat" for part in ("train", "test")]
    if all(path.is_file() for path in amat):
        train, test = (_read_amat(path) for path in amat)
        return ImageData("binarized-mnist", train, test, binary=True)
    raise _missing(
        "binarized-mnist",
        [str(npz), " and ".join(map(str, amat))],
        "Put Larochelle's binarized_mnist_{train,test}.amat into that folder, or an .npz of "
        "train_images and test_images with 784 bits packed into 98 bytes a row "
        "(numpy.packbits), or name another folder with --data-dir.",
    )


def _load_omniglot(folder: Path) -> ImageData:
    path = folder / "omniglot_28x28.npz"
    if path.is_file():
        return _from_bytes("omniglot", _read_npz(path, tuple(IDX_STEMS)))
    tried = [str(path)]
    for root in (folder / "omniglot-py", folder):
        parts = {part: _characters(root, stem) for part, stem in OMNIGLOT_STEMS.items()}
        whole = {part: drawings for part, drawings in parts.items() if drawings is not None}
        if len(whole) == len(parts):
            return _from_bytes("omniglot", _omniglot_arrays(root, whole))
        tried.append(f"{root / OMNIGLOT_STEMS['train']} and {OMNIGLOT_STEMS['test']}, as folders or .zip")
    raise _missing(
        "omniglot",
        tried,
        f"Put omniglot_28x28.npz (keys {', '.join(IDX_STEMS)}; uint8 ink [N, 28, 28]) or "
        "images_background.zip and images_evaluation.zip into that folder, or name another one with "
        "--data-dir. torchvision.datasets.Omniglot(root, background=..., download=True), once with True and "
        "once with False, downloads both.",
    )


def _load_svhn(folder: Path, extra: bool) -> ImageData:
    arrays, failure = svhn.read(folder, extra), ""
    if arrays is None:
        failure = svhn.download(folder, extra)
        arrays = svhn.read(folder, extra)
    if arrays is not None:
        return _from_bytes("svhn", arrays)
    files = [svhn.FILES[part] for part in svhn.parts(extra)]
    raise _missing(
        "svhn",
        [f"{', '.join(str(folder / file) for file in files)}", f"torchvision.datasets.SVHN ({failure})"],
        f"Put {' and '.join(files)}, the cropped digits in MATLAB's format, into that folder, "
        "name another one with --data-dir, or install torchvision to download them.",
    )


# A PNG file's name, for messages, and its content, by character (alphabet/character01).
Drawings = dict[str, list[tuple[str, bytes]]]


def _characters(root: Path, stem: str) -> Drawings | None:
    """The drawings in a folder or its .zip; ``None`` where there is neither."""
    found: Drawings = {}
    if (root / stem).is_dir():
        for path in sorted((root / stem).glob("*/*/*.png")):
            found.setdefault(str(path.parent), []).append((str(path), path.read_bytes()))
        return found
    path = root / f"{stem}.zip"
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".png") and not name.startswith("__MACOSX"):
                    drawing = f"{path}: {name}", archive.read(name)
                    found.setdefault(str(Path(name).parent), []).append(drawing)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is no .zip file, or a damaged one ({error})") from error
    return found


def _omniglot_arrays(root: Path, parts: dict[str, Drawings]) -> dict[str, np.ndarray]:
    """Ink 0..255 on 28 × 28 pixels, and the characters' numbers, which go on from training to held out."""
    arrays, first = {}, 0
    for part, characters in parts.items():
        if not characters:
            raise ValueError(f"{root / OMNIGLOT_STEMS[part]} holds no alphabet/character/*.png")
        labels = [first + i for i, images in enumerate(characters.values()) for _ in images]
        ink = [_ink(name, content) for images in characters.values() for name, content in images]
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = np.stack(ink), np.array(labels)
        first += len(characters)
    return arrays


def _ink(name: str, content: bytes) -> np.ndarray:
    """A drawing, black on white, as ink on 28 × 28 pixels: each the mean of the area that it covers."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            ink = 255.0 - np.asarray(image.convert("L"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} is no image, or a damaged one ({error})") from error
    rows, columns = (_shares(size) for size in ink.shape)
    return (rows @ ink @ columns.T).round().astype(np.uint8)


def _shares(size: int) -> np.ndarray:
    """What each of that many pixels in a row has in the mean over each of 28 equal lengths."""
    edges, pixels = np.linspace(0, size, 29)[:, None], np.arange(size)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return overlap.clip(0) * 28 / size


def _missing(name: str, tried: list[str], advice: str) -> FileNotFoundError:
    lines = "".join(f"\n  - {place}" for place in tried)
    return FileNotFoundError(f"no files of the data set {name!r}; looked for{lines}\n{advice}")


def _from_bytes(name: str, arrays: dict[str, np.ndarray]) -> ImageData:
    """Check the four arrays against each other and scale 0..255 to [0, 1]."""
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        colours = (3,) if name in COLOUR else ()
        wanted = "[N, H, W, 3]" if colours else "[N, H, W]"
        if images.ndim < 3 or images.shape[3:] != colours or images.dtype != np.uint8 or images.size == 0:
            raise ValueError(
                f"{name}: {part}_images should be uint8 of shape {wanted} and not empty, "
                f"not {images.dtype} of shape {list(images.shape)}"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{name}: {len(images)} {part} images, but labels of shape {list(labels.shape)}")
    shapes = {tuple(arrays[f"{part}_images"].shape[1:]) for part in ("train", "test")}
    if len(shapes) > 1:
        raise ValueError(f"{name}: images of different sizes in training and test, {sorted(shapes)}")
    return ImageData(
        name,
        torch.from_numpy(arrays["train_images"]).float() / 255,
        torch.from_numpy(arrays["test_images"]).float() / 255,
        torch.from_numpy(arrays["train_labels"].astype(np.int64)),
        torch.from_numpy(arrays["test_labels"].astype(np.int64)),
    )


def _read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    # The file is opened here: np.load does not close one that it cannot read.
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            present = list(archive.files)
            arrays = {key: archive[key] for key in keys if key in present}
        except Exception as error:  # whatever damaged bytes stop NumPy or zipfile with
            raise ValueError(f"{path} is no .npz file, or a damaged one ({error})") from error
    absent = [key for key in keys if key not in present]
    if absent:
        raise ValueError(f"{path}: no array {', '.join(absent)}; it holds {present}")
    return arrays


def _unpack(packed: np.ndarray, path: Path, key: str) -> torch.Tensor:
    """Rows of 98 bytes to images of 28 × 28 bits."""
    if packed.ndim != 2 or packed.shape[1] != 98 or packed.dtype != np.uint8 or len(packed) == 0:
        raise ValueError(
            f"{path}: {key} should be uint8 of shape [N, 98] and not empty, "
            f"not {packed.dtype} of shape {list(packed.shape)}"
        )
    return torch.from_numpy(np.unpackbits(packed, axis=1).reshape(-1, 28, 28)).float()


def _read_amat(path: Path) -> torch.Tensor:
    """Larochelle's text format: a line an image, 784 characters 0 or 1 with blanks between."""
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    pixels = raw[~np.isin(raw, np.frombuffer(b" \t\r\n", np.uint8))] - ord("0")
    if pixels.size == 0 or pixels.size % 784 or pixels.max() > 1:
        raise ValueError(f"{path}: not lines of 784 zeros and ones")
    return torch.from_numpy(pixels.reshape(-1, 28, 28)).float()


def _read_idx_folder(folder: Path) -> dict[str, np.ndarray] | None:
    """The four idx arrays of a folder, or ``None`` unless all four files are there."""
    arrays = {}
    for key, stem in IDX_STEMS.items():
        path = next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)
        if path is None:
            return None
        arrays[key] = read_idx(path, ndim=3 if key.endswith("images") else 1)
    return arrays


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read LeCun's idx format: two zero bytes, type, rank, big-endian sizes, then the data.

    Arguments:
        path: The file, gzipped if it ends in ``.gz``.
        ndim: The rank it must have.

    Raises:
        ValueError: If the compression, the magic number or the length is wrong.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no gzip file, or a damaged one ({error})") from error
    magic = bytes([0, 0, 0x08, ndim])  # 0x08: unsigned bytes
    if content[:4] != magic:
        raise ValueError(
            f"{path}: bad magic number {content[:4].hex() or '(empty file)'}, "
            f"expected {magic.hex()} for unsigned bytes of rank {ndim}"
        )
    header = 4 + 4 * ndim
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path}: {len(content)} bytes, but a shape of {shape} "
            f"makes {header + math.prod(shape)}: the file is truncated or corrupt"
        )
    # A copy, because torch wants memory that it may write to.
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _download(name: str, folder: Path) -> tuple[dict[str, np.ndarray] | None, str]:
    """Ask torchvision, which may be missing or, built for another torch, fail on import."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        return None, f"torchvision cannot be imported: {type(error).__name__}"
    dataset = getattr(datasets, TORCHVISION_CLASS[name])
    arrays = {}
    try:
        for part in ("train", "test"):
            images = dataset(root=str(folder), train=part == "train", download=True)
            arrays[f"{part}_images"] = images.data.numpy()
            arrays[f"{part}_labels"] = images.targets.numpy()
    except (RuntimeError, OSError) as error:
        return None, f"the download failed: {error}"
    return arrays, ""
