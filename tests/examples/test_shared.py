"""Programs and parts of the examples: which may import which, and that a program runs from anywhere."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = EXAMPLES / "shared"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))
PARTS = sorted(SHARED.rglob("*.py"))
# Programs that stand on another one: on its run, with other networks or losses, or on what its runs leave.
STANDS_ON = {"conv_vae": {"vae"}, "demo": {"vae"}, "compare_runs": {"deep_vae"}}
STANDS_ON["distributed_lightning"] = {"distributed_vae"}


def name(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def imported(path: Path) -> Iterator[str]:
    """The first name of every module that a file imports by its full name, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", PROGRAMS + PARTS, ids=name)
def test_parts_import_no_program(path: Path) -> None:
    programs = {program.stem for program in PROGRAMS}
    allowed = set() if path in PARTS else STANDS_ON.get(path.stem, set())
    assert set(imported(path)) & programs == allowed
    # Within the parts by relative names, so that there is one way to each.
    assert path not in PARTS or "shared" not in imported(path)


@pytest.mark.parametrize("path", PROGRAMS + PARTS, ids=name)
def test_each_says_what_it_is_and_can_be_read_at_one_sitting(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= 500


def test_a_program_finds_its_parts_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "vae.py"), "--help"]
    environment = {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--estimator" in done.stdout
