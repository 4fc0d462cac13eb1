"""Small files of Street View House Numbers, as its authors wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import savemat

__all__ = ["house_numbers", "write_mat"]


def house_numbers(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random colours ``[N, 32, 32, 3]``, and digits ``[N]``, each as often."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8), np.arange(number) % 10


def write_mat(path: Path, images: np.ndarray, digits: np.ndarray) -> None:
    """Images last to first axis, a column of labels in which the digit 0 is 10; compressed."""
    labels = np.array([[10 if digit == 0 else digit] for digit in digits], dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"X": np.stack(list(images), axis=-1), "y": labels}, do_compression=True)
