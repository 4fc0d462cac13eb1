"""Warnings that point at the user's own line."""

from __future__ import annotations

import os
import sys
import warnings

import pyro
import torch

__all__ = ["warn"]

# A user's step may lie below SVI, a module call or an optimiser's closure.
_LIBRARIES = tuple(
    os.path.dirname(path) + os.sep for path in (__file__, pyro.__file__, torch.__file__) if path is not None
)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost caller outside this package, Pyro and PyTorch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
