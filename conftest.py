"""Fixtures of tests and doctests: a clean slate for every test, and a small pair for the examples."""

import math
import os
import sys

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_iw

os.environ.setdefault("MPLBACKEND", "agg")

# Made by "make docs", or run by it.
collect_ignore_glob = ["docs/_build/*", "docs/_ext/*", "docs/api/*", "docs/tutorials/*"]


@pytest.fixture(autouse=True)
def _clean_slate():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    pyro.clear_param_store()
    pyro.settings.set(module_local_params=False)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    """Names that the examples in docstrings and docs may use without importing them."""

    def model(data):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide(data):
        weight = pyro.param("weight", torch.tensor(0.3))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(weight * data, 0.7))

    names = {
        "math": math,
        "torch": torch,
        "pyro": pyro,
        "dist": dist,
        "poutine": poutine,
        "SVI": SVI,
        "Trace_ELBO": Trace_ELBO,
        "Adam": Adam,
        "model": model,
        "guide": guide,
        "data": torch.tensor([0.5, -1.0, 2.0]),
        "pyro_iw": pyro_iw,
        **{name: getattr(pyro_iw, name) for name in pyro_iw.__all__},
    }
    doctest_namespace.update(names)
