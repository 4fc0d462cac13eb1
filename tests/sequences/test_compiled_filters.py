"""Compiled steps of filters against eager ones: the same numbers for one seed, or one warning."""

from __future__ import annotations

import pyro
import pytest
import torch

import pyro_iw.compiling.inductor as inductor_module
from helpers.linear_gaussian import Proposal, Walk, simulate
from pyro_iw import FIVO_ELBO

OPTIONS = [
    {"ess_threshold": 0.0},
    {"ess_threshold": 0.7},
    {"ess_threshold": 1.0, "resampling": "multinomial", "resampling_gradient": True},
    {"ess_threshold": 1.0, "estimator": "dreg"},
]


@pytest.fixture
def _interpreted(monkeypatch):
    """Run what is recorded operation by operation."""
    monkeypatch.setattr(inductor_module, "inductor", lambda graph, inputs: lambda args: graph(*args))


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_numbers_as_eagerly(options) -> None:
    x = simulate(5, 3)
    values = {"a": 0.5, "b": 0.4, "s": 0.6}
    p = {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in values.items()}
    model, guide = Walk(), Proposal(**p)
    compiled, eager = FIVO_ELBO(4, compile=True, **options), FIVO_ELBO(4, **options)
    eager._filter.looks = False
    for number in range(4):
        found = []
        for loss in (compiled, eager):
            pyro.set_rng_seed(number)
            value = loss.loss_and_grads(model, guide, x + number)
            found.append((value, *(parameter.grad.item() for parameter in p.values())))
            for parameter in p.values():
                parameter.grad = None
        assert found[0] == pytest.approx(found[1], rel=1e-10)
    assert len(compiled._compiler._programs) == 1
    assert not compiled._compiler._refused
    assert compiled.steps == 4


@pytest.mark.usefixtures("_interpreted")
def test_another_length_is_another_program() -> None:
    loss = FIVO_ELBO(4, compile=True)
    p = torch.tensor(0.5, requires_grad=True, dtype=torch.float64)
    pair = Walk(), Proposal(p)
    for size in (3, 3, 5, 5, 3):
        pyro.set_rng_seed(0)
        found = loss.loss_and_grads(*pair, simulate(size, 2))
        pyro.set_rng_seed(0)
        assert found == pytest.approx(loss.loss(*pair, simulate(size, 2)), rel=1e-10)
    assert len(loss._compiler._programs) == 2


@pytest.mark.usefixtures("_interpreted")
def test_what_cannot_be_compiled_runs_with_one_warning() -> None:
    class Looking(Walk):
        def step(self, state, x):
            super().step(state, x)
            assert bool((state["z"].abs() < 1e6).all())

    loss, pair = FIVO_ELBO(4, compile=True), (Looking(), Proposal(torch.tensor(0.5, requires_grad=True)))
    loss.loss_and_grads(*pair, simulate(3, 2))
    with pytest.warns(RuntimeWarning, match="compile=True is left aside and the step runs eagerly"):
        loss.loss_and_grads(*pair, simulate(3, 2))
    loss.loss_and_grads(*pair, simulate(3, 2))


def test_it_is_shown() -> None:
    assert repr(FIVO_ELBO(4, compile=True)) == "FIVO_ELBO(K=4, compile=True)"
