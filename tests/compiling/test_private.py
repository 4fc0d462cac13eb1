"""A private name that a PyTorch lacks costs compile=True, and nothing else."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_iw

PACKAGE = Path(pyro_iw.__file__).parent

# Names of PyTorch's, Python's and Pyro's that compiled steps alone need: the owner and the attribute; a whole
# module, where there is none.
MISSING = [
    "torch._inductor:compile",
    "torch.fx.experimental.proxy_tensor:",
    "torch.fx.experimental.proxy_tensor:make_fx",
    "torch.fx.experimental.proxy_tensor:extract_val",
    "torch.multiprocessing.reductions:StorageWeakRef",
    "torch.utils._python_dispatch:_disable_current_modes",
    "torch:_foreach_add_",
    "torch:_foreach_mul",
    "torch.distributions.von_mises:_rejection_sample",
]

# Breaks one name in a process of its own each, forked from one that has imported all but the package.
PROGRAM = """
import functools, importlib, os, sys, traceback, warnings
import pyro, pyro.distributions as dist, torch, torch._inductor, torch.fx.experimental.proxy_tensor
from torch.multiprocessing import reductions
from pyro.infer import SVI
from pyro.optim import Adam
torch.optim.Adam([torch.zeros(1, requires_grad=True)]).step()

def model():
    pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())), 1.0)), 1.0),
                obs=torch.tensor(0.5))

def guide():
    pyro.sample("z", dist.Normal(pyro.param("b", torch.zeros(())), 1.0))

def check(name):
    owner, _, attribute = name.partition(":")
    owner_object = functools.reduce(getattr, owner.split(".")[1:], sys.modules[owner.split(".")[0]])
    if attribute:
        delattr(owner_object, attribute)
    else:
        package, _, last = owner.rpartition(".")
        sys.modules[owner] = None
        delattr(sys.modules[package], last)
    import pyro_iw
    pyro.set_rng_seed(0)
    eager = SVI(model, guide, Adam({"lr": 0.1}), loss=pyro_iw.IWAE_ELBO(K=3))
    expected = [eager.step() for _ in range(4)]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(model, guide, Adam({"lr": 0.1}), loss=pyro_iw.IWAE_ELBO(K=3, compile=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [svi.step() for _ in range(4)]
    assert losses == expected, (losses, expected)
    assert len(caught) == 1, [str(w.message) for w in caught]
    message = str(caught[0].message)
    assert "compile=True is left aside and the step runs eagerly" in message, message
    assert (attribute or last) in message, message

for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            check(name)
        except BaseException:
            print("with", name, "missing:", file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_missing_name_costs_the_compiled_step_alone():
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *MISSING],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def imported(path):
    """Dotted names of PyTorch's and Pyro's that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_private_names_are_imported_by_the_doors_alone():
    doors = {
        PACKAGE / "compiling" / "private.py": {
            "torch.fx.experimental.proxy_tensor",
            "torch._inductor.compile",
        },
        PACKAGE / "tracing" / "handlers.py": {"pyro.poutine.runtime._PYRO_STACK"},
    }
    for path in PACKAGE.rglob("*.py"):
        names = {name for name in imported(path) if name.startswith(("torch.", "pyro."))}
        private = {name for name in names if "._" in name or ".experimental" in name}
        assert not private or path in doors, f"{path.relative_to(PACKAGE)} imports {private}"
    for path, names in doors.items():  # which this finds
        assert names <= set(imported(path))
