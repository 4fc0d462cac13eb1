"""A file with the results of the batches that are done, for a long evaluation to go on from."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["ProgressFile"]


class ProgressFile:
    """Results of finished batches, on disk as soon as there are any.

    Arguments:
        path: the file; None to keep nothing. If it is there, its results are taken over.
        settings: what the results depend on, in words.

    Attributes:
        seed: the batches' random numbers follow from it and their index.
        parts: the results of each batch.

    Raises:
        ValueError: if the file is no such file, or of other settings.
    """

    def __init__(self, path: str | Path | None, settings: str) -> None:
        self.path = None if path is None else Path(path)
        self.settings = settings
        self.seed = int(torch.randint(2**62, ()))
        self.parts: list[list[Tensor]] = []
        self._marks: list[Tensor] = []
        if self.path is not None and self.path.exists():
            self._read(self.path)
        self._known = len(self.parts)

    def _read(self, path: Path) -> None:
        try:
            saved = torch.load(path, weights_only=True)
            settings = saved["settings"]
            self.seed, self.parts, self._marks = saved["seed"], saved["parts"], saved["marks"]
        except Exception as error:  # whatever a damaged file stops the unpickler with
            raise ValueError(
                f"{path} holds no results to go on from ({type(error).__name__}). Name another file, or "
                "delete it."
            ) from error
        if settings != self.settings:
            raise ValueError(
                f"{path} holds the results of {settings}, but this is {self.settings}. Name another file, or "
                "delete it."
            )

    def knows(self, index: int, mark: Tensor) -> bool:
        """Whether the results of a batch are there from an earlier run.

        Arguments:
            index: the batch's.
            mark: what the batch's results begin with.

        Raises:
            ValueError: if that is another one than it was.
        """
        if index >= self._known:
            return False
        before = self._marks[index].to(mark.device)
        if before.shape != mark.shape or not torch.allclose(
            before, mark, rtol=1e-3, atol=1e-3, equal_nan=True
        ):
            raise ValueError(
                f"{self.path} holds results of other data, parameters or random numbers: the first draws of "
                f"batch {index} have other log-weights now. Give the same batches in the same order to the "
                "same model and guide, or name another file."
            )
        return True

    def add(self, mark: Tensor, columns: list[Tensor]) -> None:
        """Note the results of the next batch.

        Arguments:
            mark: what they begin with.
            columns: the results.
        """
        self._marks.append(mark.cpu())
        self.parts.append([column.cpu() for column in columns])
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        saved = {"settings": self.settings, "seed": self.seed, "parts": self.parts, "marks": self._marks}
        torch.save(saved, unfinished)
        os.replace(unfinished, self.path)
