"""The front page as it is typed: in a process of its own, with nothing imported beforehand."""

import os
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"

PROGRAM = """
import doctest, sys
flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
failed, tried = doctest.testfile(sys.argv[1], module_relative=False, optionflags=flags, encoding="utf-8")
sys.exit(failed or not tried)
"""


def test_every_snippet_runs_as_typed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(README.parent)}  # this package, if another is installed
    command = [sys.executable, "-c", PROGRAM, str(README)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
