"""What is shipped: the wheel and the source archive, and that the package needs no installation to run."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyro_iw

ROOT = Path(__file__).parent.parent
# Everything that a version control would not hold.
GENERATED = shutil.ignore_patterns(
    ".git", ".venv*", "*.egg-info", "build", "dist", "results", "data", "_build", "__pycache__", ".*_cache"
)
BUILD = (
    "import sys; from setuptools import build_meta as build; to = sys.argv[1]; "
    "build.build_wheel(to); build.build_sdist(to)"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both archives, built from a copy: setuptools writes beside the sources."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=GENERATED)
    (folder / "built").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder / "built")], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "built"


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_package_and_its_licence_alone(wheel):
    info = f"pyro_iw-{pyro_iw.__version__}.dist-info"
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} == {"pyro_iw", info}
    assert f"{info}/licenses/LICENSE" in names
    package = ROOT / "pyro_iw"
    sources = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    assert {name for name in names if name.startswith("pyro_iw/")} == sources | {"pyro_iw/py.typed"}


def test_the_version_is_read_from_the_sources(wheel):
    metadata = wheel.read(f"pyro_iw-{pyro_iw.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {pyro_iw.__version__}\n" in metadata


def test_the_source_archive_can_be_tested(built):
    """It holds the tests with their helpers, what they read, and all that make works on."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    made = {ROOT / "docs" / "api", ROOT / "docs" / "tutorials"}  # by "make docs"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("pyro_iw", "tests", "examples", "benchmarks", "docs", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".md", ".png"}
        and not {"_build", "results"} & set(path.parts)
        and not made & set(path.parents)
    }
    wanted |= {"LICENSE", "README.md", "Makefile", "conftest.py", "constraints.txt", "pyproject.toml"}
    assert wanted <= names
    assert not any(
        "__pycache__" in name or name.startswith((".venv", "docs/_build", "docs/tutorials")) for name in names
    )


def test_to_arviz_without_an_installation(wheel, tmp_path):
    """A checkout on PYTHONPATH, of which no metadata speaks."""
    wheel.extractall(tmp_path, [name for name in wheel.namelist() if name.startswith("pyro_iw/")])
    program = """
import importlib.metadata, warnings
found = importlib.metadata.Distribution.from_name
def from_name(name):
    if name.replace("_", "-") == "pyro-iw":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.Distribution.from_name = from_name
warnings.simplefilter("ignore")
import pyro, pyro.distributions as dist, pyro_iw
def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))
data = pyro_iw.ImportanceSampler(model, model, 100)().to_arviz(num_samples=5)
print(pyro_iw.__file__)
print(data.posterior.attrs["inference_library_version"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "pyro_iw" / "__init__.py"), pyro_iw.__version__]


def requirements():
    """What the package needs by itself ("") and with each extra, by the names that pip knows."""
    project = (ROOT / "pyproject.toml").read_text()  # which Python 3.10 has no parser for
    own, _, rest = project.partition("[project.optional-dependencies]")
    lists = re.findall(r"^(dependencies) = \[(.*)\]$", own, re.M)
    lists += re.findall(r"^([\w-]+) = \[(.*)\]$", rest.partition("\n[")[0], re.M)
    return {name.replace("dependencies", ""): set(re.findall(r'"([\w-]+)', text)) for name, text in lists}


# What pip and Python call by different names, and what a listed package always brings along.
PIP_NAMES = {"pyro": "pyro-ppl", "sklearn": "scikit-learn", "PIL": "pillow"}
BROUGHT = {"arviz_stats": "arviz", "xarray": "arviz"}


def imported(folder):
    """Packages of others that a folder's modules import, and those that it asks for by an extra's name."""
    here = {path.stem for path in (ROOT / folder).rglob("*.py")} | {path.name for path in ROOT.glob("*/*")}
    plain, asked = set(), set()
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text())
        for_types = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and node not in for_types:
                plain |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node not in for_types:
                plain.add(node.module)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
                module, extra = (ast.literal_eval(argument) for argument in node.args[:2])
                asked.add((module.partition(".")[0], extra))
    tops = {name.partition(".")[0] for name in plain}
    return tops - set(sys.stdlib_module_names) - here - {"pyro_iw"}, asked


def test_what_is_imported_is_required():
    """And not left to what another package happens to bring."""
    needed = requirements()
    plain, asked = imported("pyro_iw")
    assert {"torch", "opt_einsum"} <= plain
    assert {PIP_NAMES.get(name, name) for name in plain} <= needed[""]
    assert {("arviz", "arviz"), ("sklearn", "examples")} <= asked
    plain, asked_by_examples = imported("examples")
    assert ("lightning", "lightning") in asked_by_examples
    for module, extra in asked | asked_by_examples:
        name = BROUGHT.get(module, module)
        assert PIP_NAMES.get(name, name) in needed[extra], (module, extra)
    optional = {"torchvision"}  # which downloads a data set where the user has it
    assert {PIP_NAMES.get(name, name) for name in plain - optional} <= needed[""] | needed["examples"]


def test_arviz_comes_with_what_writes_its_files():
    with_arviz = {extra: names for extra, names in requirements().items() if "arviz" in names}
    assert {"arviz", "examples", "test", "docs"} <= set(with_arviz)
    assert all({"h5netcdf", "h5py"} <= names for names in with_arviz.values())


def test_what_is_promised_is_what_is_run():
    """The legs of ``make test-versions``: all Pythons of the classifiers, the lowest versions required."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / "scripts" / "versions.py")
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    project = (ROOT / "pyproject.toml").read_text()
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert promised == [leg.python for leg in versions.LEGS.values()]
    assert f'requires-python = ">={promised[0]}"' in project
    lowest = dict(pin.split("==") for pin in versions.LEGS["floor"].pip)
    assert set(lowest) == {"torch", "pyro-ppl"}
    assert all(f'"{name}>={version}"' in project for name, version in lowest.items())
