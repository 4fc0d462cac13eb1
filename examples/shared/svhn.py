"""Street View House Numbers (Netzer et al., 2011): cropped digits, in the files that torchvision keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["FILES", "download", "read", "read_mat"]

# Where torchvision puts them, below the root folder it is given; all are MATLAB's format 5.
FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat", "extra": "extra_32x32.mat"}


def parts(extra: bool) -> list[str]:
    return ["train", "test", *(["extra"] if extra else [])]


def read(folder: Path, extra: bool) -> dict[str, np.ndarray] | None:
    """Images uint8 ``[N, H, W, 3]`` and labels ``[N]`` of both parts, or ``None`` unless all files are there.

    Arguments:
        folder: Where they are.
        extra: Whether those of the easier, extra images are to follow the training images.
    """
    paths = {part: folder / FILES[part] for part in parts(extra)}
    if not all(path.is_file() for path in paths.values()):
        return None
    arrays = {}
    for part in ("train", "test"):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = read_mat(paths[part])
    if extra:
        for name, more in zip(("train_images", "train_labels"), read_mat(paths["extra"]), strict=True):
            arrays[name] = np.concatenate([arrays[name], more])
    return arrays


def read_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[N, H, W, 3]`` and their digits 0 to 9, ``[N]``, of one file.

    There the images are ``X``, ``[H, W, 3, N]``, the labels are ``y``, ``[N, 1]``, and the digit 0 is 10.

    Raises:
        ValueError: If it is no such file, or holds something else.
    """
    from scipy.io import loadmat

    # The file is opened here: what stops loadmat may leave it open.
    with path.open("rb") as file:
        try:
            content = loadmat(file, variable_names=("X", "y"))
        except Exception as error:  # whatever damaged bytes stop SciPy or zlib with
            raise ValueError(f"{path} is no MATLAB file, or a damaged one ({error})") from error
    if absent := [name for name in ("X", "y") if name not in content]:
        raise ValueError(f"{path}: no array {', '.join(absent)}")
    images, labels = content["X"], content["y"].ravel()
    if images.ndim != 4 or images.shape[2] != 3 or images.dtype != np.uint8:
        shape = list(images.shape)
        raise ValueError(
            f"{path}: X should be uint8 of shape [H, W, 3, N], not {images.dtype} of shape {shape}"
        )
    if not np.isin(labels, np.arange(1, 11)).all():
        raise ValueError(f"{path}: y should be 1 to 10, where 10 is the digit 0")
    # A copy in the new order: as a view, every image would be spread over the whole file.
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels.astype(np.int64) % 10


def download(folder: Path, extra: bool) -> str:
    """Have torchvision put the files into a folder; returns what failed, or nothing.

    It may be missing or, built for another torch, fail on import.
    """
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        return f"torchvision cannot be imported: {type(error).__name__}"
    try:
        for part in parts(extra):
            datasets.SVHN(root=str(folder), split=part, download=True)
    except (ImportError, RuntimeError, OSError) as error:
        return f"the download failed: {error}"
    return ""
