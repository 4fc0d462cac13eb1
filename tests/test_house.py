"""The house: which part of the package may import which, and that each stays of a size to be read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_iw

PACKAGE = Path(pyro_iw.__file__).parent
MATHS = {"bound", "bounds", "logmean", "psis", "resampling", "running"}

# What each part may import beside itself. A module at the top is a part of its own, except mathematics.
MAY_IMPORT = {
    "_support": set(),
    "maths": {"_support"},
    "nn": {"_support"},
    "ranks": {"_support"},
    "optim": {"_support", "ranks"},
    "tracing": {"_support", "maths"},
    "gradients": {"_support", "maths", "ranks", "tracing"},
    "posterior": {"_support", "maths", "ranks", "tracing", "compiling"},
    "adversarial": {"_support", "maths", "ranks", "tracing", "optim"},
    "sequences": {"_support", "maths", "tracing", "gradients", "compiling", "training"},
    "compiling": {"_support", "maths", "ranks", "tracing", "gradients"},
    "training": {"ranks", "tracing"},
    "elbo": {"_support", "maths", "ranks", "tracing", "gradients", "compiling", "training"},
    "losses": {"_support", "maths", "elbo"},
    "hierarchical": {"_support", "maths", "tracing", "gradients", "elbo"},
    "checking": {"_support", "tracing", "gradients", "elbo", "hierarchical", "losses"},
    "plots": {"_support", "maths", "posterior"},
}


def part_of(module):
    """The part that a module belongs to, given its dotted name inside the package."""
    top = module.split(".")[0]
    return "maths" if top in MATHS else top


def imported(path):
    """Dotted names, inside the package, of all modules that a file imports, wherever it does."""
    package = path.relative_to(PACKAGE).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
            # ``from . import name`` at the top names modules; else the part is known by now.
            yield from [".".join(base)] if base else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyro_iw":
            yield node.module.partition(".")[2] or "__init__"
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("pyro_iw."))


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = part_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    wrong = {name for name in imported(path) if part_of(name) not in MAY_IMPORT[own] | {own}}
    assert not wrong, f"a module of {own!r} imports {sorted(wrong)}"


def test_mathematics_knows_no_pyro():
    for name in MATHS:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        roots = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        roots |= {
            (node.module or "").split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert "pyro" not in roots, name


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_is_and_can_be_read_at_one_sitting(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a module opens with a sentence on what it is for"
    assert text.count("\n") <= 500


def test_each_name_has_a_home_and_importing_the_package_imports_none_of_them():
    assert sorted(pyro_iw._HOME_OF) == sorted(pyro_iw.__all__)
    for name in pyro_iw.__all__:
        assert getattr(pyro_iw, name).__name__ == name
    assert {*pyro_iw.__all__, *pyro_iw._MODULES} <= set(dir(pyro_iw))
    for name in pyro_iw._MODULES:
        assert getattr(pyro_iw, name).__name__ == f"pyro_iw.{name}"
    with pytest.raises(AttributeError, match="module 'pyro_iw' has no attribute 'IWAE'"):
        _ = pyro_iw.IWAE
    program = "import sys, pyro_iw; print(*[n for n in sys.modules if n.startswith(('pyro_iw', 'torch'))])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == {"pyro_iw", "pyro_iw._support", "pyro_iw._support.version"}
