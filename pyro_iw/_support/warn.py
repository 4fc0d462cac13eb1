"""Warnings that point at the user's own line."""

from __future__ import annotations

import inspect
import os
import warnings

import pyro
import torch

__all__ = ["PACKAGE", "warn"]

#: Where this package's files are.
PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
# A user's step may lie below SVI, a module call or an optimiser's closure.
_LIBRARIES = (PACKAGE, *(os.path.dirname(str(library.__file__)) + os.sep for library in (pyro, torch)))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost caller outside this package, Pyro and PyTorch."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
