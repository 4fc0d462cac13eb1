"""Packages that only some of the tools need, imported when they are."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

__all__ = ["is_arviz_0", "require"]


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional package.

    Arguments:
        module: its import name.
        extra: the extra of this package that installs it.
        purpose: what it is needed for, as the subject of the error.

    Raises:
        ImportError: if it is missing, saying what to install.
    """
    try:
        with warnings.catch_warnings():
            # ArviZ 0.x announces its successor at every import.
            warnings.simplefilter("ignore", FutureWarning)
            return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # it is there, but broken
        raise ImportError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed: "
            f"pip install 'pyro-iw[{extra}]'"
        ) from error


def is_arviz_0(arviz: Any) -> bool:
    """Whether this ArviZ is of version 0, with an ``InferenceData`` of its own.

    Version 1 still has the name, for a ``DataTree`` and a warning.
    """
    return "InferenceData" in vars(arviz)
