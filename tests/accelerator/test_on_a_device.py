"""Runs the checks of ``checks.py``, in a process of their own: a device that is registered stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import accelerator

CHECKS = Path(__file__).with_name("checks.py")


@pytest.mark.skipif(not accelerator.is_supported(), reason="this PyTorch wants a backend in C++")
def test_on_a_simulated_accelerator():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CHECKS)],
        env=environment,
        cwd=CHECKS.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
