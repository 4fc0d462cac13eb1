"""Run the tests on the versions that the package promises, each in an environment of its own.

A leg is a Python and what is installed for it: ``floor`` the oldest PyTorch and Pyro that ``pyproject.toml``
admits, ``pinned`` the versions of ``constraints.txt``, ``newest-…`` whatever pip takes today (ArviZ 1 among
it, which needs Python 3.12). The environments lie in ``.venv-versions``, 1 to 6 GB each, beside the logs of
pip and of the tests; a second run brings them up to date. One line a leg says what ran::

    floor: Python 3.10.13, torch 2.4.0, pyro-ppl 1.9.1, ...: 2800 passed, 3 skipped in 301 s

A leg is skipped, with its reason, where its Python is not at hand or pip cannot install it.
``make test-versions`` runs all; ``make test-versions LEGS="floor pinned" PYTEST_ARGS="-m 'not slow'"`` some
tests of some. Options for pip, such as ``--find-links`` with a folder of wheels, go into the variable
``VERSIONS_PIP_ARGS``.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-versions"
REPORTED = ("torch", "pyro-ppl", "numpy", "arviz", "xarray")


class Leg(NamedTuple):
    """A Python, as ``major.minor``, and what pip is told beside the package itself."""

    python: str
    pip: tuple[str, ...]


class Skip(Exception):
    """Why a leg cannot run here."""


def floor() -> tuple[str, ...]:
    """The lowest versions that the package's own requirements admit."""
    project = (ROOT / "pyproject.toml").read_text()  # which Python 3.10 has no parser for
    (dependencies,) = re.findall(r"^dependencies = \[(.*?)\]", project, re.M | re.S)
    return tuple(f"{name}=={version}" for name, version in re.findall(r'"([\w-]+)>=([\d.]+)', dependencies))


LEGS = {
    "floor": Leg("3.10", floor()),
    "pinned": Leg("3.11", ("-c", "constraints.txt")),
    "newest-3.12": Leg("3.12", ("--upgrade", "--upgrade-strategy=eager")),
    "newest-3.13": Leg("3.13", ("--upgrade", "--upgrade-strategy=eager")),
}


def interpreter(version: str) -> str:
    """A Python of that version that runs: on the path, or among pyenv's."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(name), *(str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/{name}")))]
    for path in filter(None, found):
        # pyenv's own command of that name is there even where it leads nowhere.
        if subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return path
    raise Skip(f"there is no {name} with venv")


def logged(command: list[str], log: Path, seconds: float, **variables: str) -> int | None:
    """The command's exit status, or none if it was stopped after that time."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:  # it, and the processes that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def install(name: str, leg: Leg, seconds: float) -> str:
    """Make or update the environment of a leg; its Python."""
    folder = ENVIRONMENTS / name
    python = str(folder / "bin" / "python")
    log = ENVIRONMENTS / f"{name}-pip.log"
    if not os.path.exists(python):
        made = logged([interpreter(leg.python), "-m", "venv", str(folder)], log, seconds)
        if made != 0:
            shutil.rmtree(folder, ignore_errors=True)
            raise Skip(f"no environment can be made; see {log}")
    # With bytecode compiled now: Pyro 1.9.1 has escapes that Python warns of where it compiles them, and
    # warnings are errors in the tests.
    command = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    command += [*shlex.split(os.environ.get("VERSIONS_PIP_ARGS", "")), *leg.pip, "-e", ".[test]"]
    status = logged(command, log, seconds)
    if status != 0:
        shutil.rmtree(folder)  # it may hold gigabytes, and none that runs
    if status is None:
        raise Skip(f"pip was not done after {seconds / 60:.0f} minutes")
    if status != 0:
        errors = re.findall(r"^ERROR: (.*)", log.read_text(), re.M)
        raise Skip(f"pip cannot install it: {errors[0][:200] if errors else f'see {log}'}")
    return python


def versions(python: str) -> str:
    """What is installed there, in words."""
    program = (
        "import importlib.metadata as m, platform; print(', '.join(['Python ' + platform.python_version(), "
        f"*(f'{{name}} {{m.version(name)}}' for name in {REPORTED})]))"
    )
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def tested(name: str, python: str, arguments: argparse.Namespace) -> tuple[bool, str]:
    """Whether the tests pass there, and how many did."""
    log = ENVIRONMENTS / f"{name}-tests.log"
    command = [python, "-m", "pytest", "-q", "-n", str(arguments.jobs), *arguments.pytest]
    status = logged(command, log, 60 * arguments.test_minutes, OMP_NUM_THREADS="1")
    text = log.read_text()
    if status is None:
        return False, f"stopped after {arguments.test_minutes} minutes; see {log}"
    closing = re.findall(r"^=*\s*(\d+ \w+(?:, \d+ \w+)* in [\d.]+s)", text, re.M)
    counts = closing[-1] if closing else "no test ran"
    if status == 0:
        return True, counts
    failed = re.findall(r"^(?:FAILED|ERROR) .*", text, re.M)
    return False, "\n    ".join([f"{counts}; see {log}", *failed[:20]])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("legs", nargs="*", help=f"of {', '.join(LEGS)}; the default is all")
    parser.add_argument("--jobs", type=int, default=2, help="test processes at a time")
    parser.add_argument("--pytest", type=shlex.split, default=[], metavar="ARGS", help="options for pytest")
    parser.add_argument("--install-minutes", type=float, default=20, help="after which a leg is skipped")
    parser.add_argument("--test-minutes", type=float, default=90, help="after which a leg has failed")
    parser.add_argument("--remove", action="store_true", help="each environment once its tests have run")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.legs) - set(LEGS))
    if unknown:
        parser.error(f"there is no leg {', '.join(unknown)}; there are {', '.join(LEGS)}")
    ENVIRONMENTS.mkdir(exist_ok=True)
    ran, failed = 0, []
    for name in arguments.legs or LEGS:
        start = time.monotonic()
        try:
            python = install(name, LEGS[name], 60 * arguments.install_minutes)
        except Skip as reason:
            print(f"{name}: skipped: {reason}", flush=True)
            continue
        installed = f"{name}: {versions(python)} (installed in {time.monotonic() - start:.0f} s)"
        passed, counts = tested(name, python, arguments)
        print(f"{installed}: {counts}", flush=True)
        if arguments.remove:
            shutil.rmtree(ENVIRONMENTS / name)
        ran += 1
        if not passed:
            failed.append(name)
    print(f"{ran} of {len(arguments.legs or LEGS)} legs ran; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
