"""One optimiser for all parameters takes the steps that one for each would take."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.optim import PyroOptim

from pyro_iw import IWAE_ELBO, FusedOptim

DATA = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def model(data: torch.Tensor, **_: Any) -> None:
    loc = pyro.param("loc", torch.tensor(0.1, dtype=torch.float64))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


def guide(data: torch.Tensor, late: bool = True) -> None:
    weight = pyro.param("weight", torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64))
    scale = pyro.param("scale", torch.tensor(0.7, dtype=torch.float64), dist.constraints.positive)
    shift = pyro.param("shift", torch.tensor(0.2, dtype=torch.float64)) if late else 0.0
    with pyro.plate("data", len(data)):
        pyro.sample("z", dist.Normal(weight * data + shift, scale))


def train(optim: PyroOptim, steps: int = 5, fresh: bool = True, **kwargs: Any) -> dict[str, torch.Tensor]:
    if fresh:
        pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = SVI(model, guide, optim, loss=Trace_ELBO())
    for _ in range(steps):
        svi.step(DATA, **kwargs)
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-12)


OPTIMISERS = [
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.Adam, {"lr": 0.1, "foreach": True}),
    (torch.optim.Adam, {"lr": 0.1, "fused": False, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    (torch.optim.RMSprop, {"lr": 0.01}),
    (pyro.optim.clipped_adam.ClippedAdam, {"lr": 0.1, "lrd": 0.9}),
]


@pytest.mark.parametrize(("constructor", "options"), OPTIMISERS)
def test_same_steps_as_pyros(constructor: type, options: dict[str, Any]) -> None:
    start = train(FusedOptim(constructor, options), steps=0)
    assert not start
    assert_same(train(FusedOptim(constructor, options)), train(PyroOptim(constructor, options)))


def test_it_is_one_fused_optimiser() -> None:
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1})
    train(optim)
    (group,) = optim.optimizer.param_groups
    assert len(group["params"]) == 4
    assert group["fused"] is True
    assert pyro.param("weight").grad is None


def test_parameters_that_cannot_be_fused() -> None:
    def complex_model() -> None:
        z = pyro.param("z", torch.tensor(1.0 + 1.0j))
        pyro.factor("energy", -(z - 2.0).abs().square())

    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1})
    svi = SVI(complex_model, lambda: None, optim, loss=Trace_ELBO())
    first = svi.step()
    for _ in range(10):
        last = svi.step()
    assert last < first
    assert optim.optimizer.param_groups[0]["fused"] is False


@pytest.mark.parametrize("options", [{"lr": 0.1}, lambda name: {"lr": 0.1 if name == "loc" else 0.02}])
def test_parameters_that_appear_later(options: Any) -> None:
    found = []
    for kind in (FusedOptim, PyroOptim):
        optim = kind(torch.optim.Adam, options)
        train(optim, steps=3, late=False)
        if kind is FusedOptim:  # whose optimiser may have a group of someone else's
            optim.optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
        found.append(train(optim, steps=3, fresh=False))
    assert_same(*found)


@pytest.mark.parametrize(
    ("constructor", "options"),
    [
        (pyro.optim.clipped_adam.ClippedAdam, {"lr": 0.05, "lrd": 0.9}),
        (pyro.optim.adagrad_rmsprop.AdagradRMSProp, {"eta": 0.3}),
        (torch.optim.Adam, {"lr": 0.1}),
        (torch.optim.Adagrad, {"lr": 0.1}),
    ],
)
def test_parameters_that_rest_in_some_steps(constructor: type, options: dict[str, Any]) -> None:
    """A decay that a group counts in steps goes on for those parameters alone that take part."""

    def trained(kind: type[PyroOptim]) -> dict[str, torch.Tensor]:
        optim = kind(constructor, dict(options))
        train(optim, steps=2, late=False)
        for late in (True, False, False, True, False):
            result = train(optim, steps=1, fresh=False, late=late)
        return result

    assert_same(trained(FusedOptim), trained(PyroOptim))


def test_options_by_name() -> None:
    def options(name: str) -> dict[str, Any]:
        return {"lr": 0.0, "betas": (0.1, 0.2)} if name == "loc" else {"lr": 0.1}

    optim = FusedOptim(torch.optim.Adam, options)
    found = train(optim)
    assert found["loc"] == 0.1
    assert sorted(len(group["params"]) for group in optim.optimizer.param_groups) == [1, 3]
    assert_same(found, train(PyroOptim(torch.optim.Adam, options)))


@pytest.mark.parametrize(
    "clip", [{"clip_norm": 0.5}, {"clip_value": 0.1}, lambda module, name: {"clip_norm": 0.5}]
)
def test_clipping(clip: Any) -> None:
    options = {"lr": 0.01}
    clipped = train(FusedOptim(torch.optim.SGD, options, clip))
    assert_same(clipped, train(PyroOptim(torch.optim.SGD, options, clip)))
    assert (clipped["loc"] - train(FusedOptim(torch.optim.SGD, options))["loc"]).abs() > 1e-4


@pytest.mark.parametrize("first", [FusedOptim, PyroOptim])
@pytest.mark.parametrize("second", [FusedOptim, PyroOptim])
def test_state_goes_on(first: type, second: type, tmp_path: Path) -> None:
    whole = PyroOptim(torch.optim.Adam, {"lr": 0.1})
    train(whole, steps=3)
    expected = train(whole, steps=3, fresh=False)
    before = first(torch.optim.Adam, {"lr": 0.1})
    train(before, steps=3)
    before.save(str(tmp_path / "optim.pt"))
    after = second(torch.optim.Adam, {"lr": 77.0})  # the saved state brings its own
    after.load(str(tmp_path / "optim.pt"))
    assert_same(train(after, steps=3, fresh=False), expected)


def test_state_replaces_what_there_is() -> None:
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1})
    train(optim, steps=3)
    saved = {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}
    # get_state refers to the tensors at work, as that of torch.optim does.
    state = torch.utils._pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, optim.get_state()
    )
    expected = train(optim, steps=3, fresh=False)
    with torch.no_grad():
        for name, value in pyro.get_param_store().named_parameters():
            value.copy_(saved[name])
    optim.set_state({name: state[name] for name in ("loc", "weight", "scale", "shift")})
    assert_same(train(optim, steps=3, fresh=False), expected)


def test_state_that_waits_is_kept() -> None:
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1})
    train(optim, steps=3)
    state = optim.get_state()
    assert state.keys() == {"loc", "weight", "scale", "shift"}
    again = FusedOptim(torch.optim.Adam, {"lr": 0.1})
    again.set_state(state)
    assert again.get_state().keys() == state.keys()
    train(again, steps=1, fresh=False, late=False)
    assert again.get_state().keys() == state.keys()


def test_gradients_of_other_parameters_are_left_alone() -> None:
    one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optim = FusedOptim(torch.optim.SGD, {"lr": 0.1})
    one.grad, other.grad = torch.ones(2), torch.ones(2)
    optim({one, other})
    one.grad, other.grad = torch.ones(2), torch.ones(2)
    optim([one])
    optim([])
    assert one.grad is None
    torch.testing.assert_close(other.grad, torch.ones(2))
    torch.testing.assert_close(one.detach(), torch.full((2,), 0.8))
    torch.testing.assert_close(other.detach(), torch.full((2,), 0.9))


def test_with_a_scheduler_of_pytorch() -> None:
    optim = FusedOptim(torch.optim.SGD, {"lr": 0.1})
    train(optim, steps=1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optim.optimizer, gamma=0.5)
    svi = SVI(model, guide, optim, loss=IWAE_ELBO(K=3))
    for _ in range(2):
        svi.step(DATA)
        scheduler.step()
    assert optim.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 0.25, total_iters=2),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
    ],
)
def test_a_scheduler_moves_late_parameters_too(make: Any) -> None:
    optim = FusedOptim(torch.optim.SGD, {"lr": 0.1})
    train(optim, steps=1, late=False)
    scheduler = make(optim.optimizer)
    for late in (False, True):
        train(optim, steps=1, fresh=False, late=late)
        scheduler.step()
    (group,) = optim.optimizer.param_groups
    assert len(group["params"]) == 4
    assert group["lr"] == scheduler.get_last_lr()[0]


def test_late_parameters_that_a_scheduler_does_not_know() -> None:
    optim = FusedOptim(torch.optim.SGD, lambda name: {"lr": 0.02 if name == "shift" else 0.1})
    train(optim, steps=1, late=False)
    torch.optim.lr_scheduler.StepLR(optim.optimizer, 1)
    with pytest.warns(UserWarning, match="'shift' have come after a scheduler"):
        train(optim, steps=1, fresh=False)


def test_nothing_is_half_done_after_an_error() -> None:
    """A parameter without options holds up a step; the next one, with options, is the first."""
    asked = []

    def options(name: str) -> dict[str, float]:
        asked.append(name)
        if name == "shift" and asked.count(name) == 1:
            raise KeyError(name)
        return {"lr": 0.1}

    optim = FusedOptim(torch.optim.Adam, options)
    with pytest.raises(KeyError, match="shift"):
        train(optim, steps=1)
    pyro.clear_param_store()
    assert_same(train(optim), train(PyroOptim(torch.optim.Adam, {"lr": 0.1})))
    # An error in the step itself: gradients of this loss do not wait for the next one.
    param = next(iter(pyro.get_param_store().named_parameters()))[1]
    broken = FusedOptim(torch.optim.Adam, {"lr": 0.1})
    param.grad = torch.ones_like(param)
    with pytest.raises(ZeroDivisionError):
        broken([param], lambda: 1 / 0)
    assert param.grad is None


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}])
def test_sparse_gradients(options: dict[str, float]) -> None:
    """No fused kernel takes them."""
    found = []
    for kind in (FusedOptim, PyroOptim):
        pyro.clear_param_store()
        table = torch.nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, sparse=True)

        def looked_up(table: torch.nn.Embedding = table) -> None:
            pyro.module("table", table)
            pyro.factor("energy", -(table(torch.tensor([1, 2, 2])) ** 2).sum())

        svi = SVI(looked_up, lambda: None, kind(torch.optim.SGD, options), Trace_ELBO())
        for _ in range(2):
            svi.step()
        found.append(table.weight.detach())
    torch.testing.assert_close(found[0], found[1])
    assert found[0][2, 0] < found[0][1, 0] < found[0][0, 0] == 1


def test_the_state_of_parameters_without_a_name() -> None:
    """Those of a store that was cleared are gone; those that modules keep for themselves are warned of."""
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1})
    train(optim, steps=1)
    train(optim, steps=1)
    named = optim.get_state()
    assert named.keys() == {"loc", "weight", "scale", "shift"}
    pyro.clear_param_store()  # as to go back to a checkpoint
    optim.set_state(named)
    assert optim.get_state().keys() == named.keys()
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1})

    class Energy(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (PyroParam(torch.tensor(start)) for start in (1.0, 5.0))

        def forward(self) -> None:
            pyro.factor("energy", -(self.one**2 + self.two**2))

    with pyro.settings.context(module_local_params=True):
        pyro.clear_param_store()
        energy = Energy()
        svi = SVI(energy, lambda: None, optim, Trace_ELBO())
        svi.step()
        with pytest.warns(UserWarning, match="not in the param store"):
            assert not optim.get_state()
        with pytest.warns(UserWarning, match="not in the param store"):
            optim.set_state({None: named["loc"]})  # as Pyro's optimisers write it
        svi.step()
    assert all(state["step"] == 1 for state in optim.optimizer.state.values())


COMING_AND_GOING = [
    (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "foreach": True}),
    (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "fused": True}),
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
    (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.5}),
    (torch.optim.Adagrad, {"lr": 0.1}),
    (pyro.optim.clipped_adam.ClippedAdam, {"lr": 0.1, "lrd": 0.9, "weight_decay": 0.1}),
]


def steps_of(optim: PyroOptim, pattern: list[dict[str, str]]) -> list[dict[str, torch.Tensor]]:
    """All parameters after each step, in which some are absent, some are there without a gradient."""

    def coming_and_going(how: dict[str, str]) -> None:
        for name, start in {"a": 0.5, "b": -1.0, "c": 2.0}.items():
            if how[name] == "absent":
                continue
            value = pyro.param(name, torch.tensor([start, 1.0], dtype=torch.float64))
            if how[name] == "used":
                pyro.factor(f"energy_{name}", -(value**2).sum())

    pyro.clear_param_store()
    svi = SVI(coming_and_going, lambda how: None, optim, loss=Trace_ELBO())
    found = []
    for how in pattern:
        svi.step(how)
        found.append({name: value.detach().clone() for name, value in pyro.get_param_store().items()})
    return found


@pytest.mark.parametrize(("constructor", "options"), COMING_AND_GOING)
@pytest.mark.parametrize("seed", range(3))
def test_parameters_that_come_and_go(constructor: type, options: dict[str, Any], seed: int) -> None:
    """Each step is Pyro's: first gradients that come late, parameters unused, and left out altogether."""
    draw = random.Random(seed)
    kinds = ("used", "used", "unused", "absent")
    pattern = [{name: draw.choice(kinds) for name in "abc"} for _ in range(30)]
    pattern[:2] = [{"a": "used", "b": "unused", "c": "absent"}, {"a": "used", "b": "used", "c": "unused"}]
    ours = steps_of(FusedOptim(constructor, dict(options)), pattern)
    for one, other in zip(ours, steps_of(PyroOptim(constructor, dict(options)), pattern), strict=True):
        assert_same(one, other)


def test_momentum_after_a_state_that_lacks_some() -> None:
    """The state of a checkpoint in which one parameter has a momentum and the other none yet."""
    pattern = [{"a": "used", "b": "unused", "c": "absent"}, {"a": "used", "b": "used", "c": "used"}]
    found = []
    for kind in (FusedOptim, PyroOptim):
        optim = kind(torch.optim.SGD, {"lr": 0.02, "momentum": 0.9})
        steps_of(optim, pattern[:1])
        state = optim.get_state()
        again = kind(torch.optim.SGD, {"lr": 0.02, "momentum": 0.9})
        again.set_state(state)
        found.append(steps_of(again, pattern[1:] * 3)[-1])
    assert_same(*found)


def test_the_fused_kernel_is_used_again() -> None:
    optim = FusedOptim(torch.optim.SGD, {"lr": 0.02, "momentum": 0.9})
    steps_of(optim, [{"a": "used", "b": "unused", "c": "absent"}, {"a": "used", "b": "used", "c": "used"}])
    assert all(group["fused"] for group in optim.optimizer.param_groups)


@pytest.mark.parametrize(
    ("constructor", "message"),
    [
        (pyro.optim.Adam, r"pyro.optim.Adam makes .* FusedOptim\(torch.optim.Adam, ...\)"),
        (pyro.optim.ClippedAdam, r"FusedOptim\(pyro.optim.clipped_adam.ClippedAdam, ...\)"),
        (pyro.optim.AdagradRMSProp, r"FusedOptim\(pyro.optim.adagrad_rmsprop.AdagradRMSProp, ...\)"),
        (pyro.optim.DCTAdam, r"FusedOptim\(pyro.optim.dct_adam.DCTAdam, ...\)"),
        (pyro.optim.StepLR, r"StepLR is a scheduler .*lr_scheduler.StepLR\(optim.optimizer"),
        (torch.optim.lr_scheduler.StepLR, r"StepLR is a scheduler .*lr_scheduler.StepLR\(optim.optimizer"),
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "is a scheduler"),
        (PyroOptim, "PyroOptim is one of Pyro's wrappers"),
        (pyro.optim.Adam({"lr": 0.1}), "is an object, a PyroOptim made already"),
        (torch.optim.Adam([torch.zeros(1)]), "a Adam made already"),
        ("Adam", "must be an optimiser class, such as torch.optim.Adam; got 'Adam'"),
    ],
)
def test_what_makes_no_optimiser(constructor: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedOptim(constructor, {"lr": 0.1})


def test_the_named_way_out_works() -> None:
    for name in ("clipped_adam.ClippedAdam", "dct_adam.DCTAdam", "adagrad_rmsprop.AdagradRMSProp"):
        module, kind = name.split(".")
        constructor = getattr(importlib.import_module(f"pyro.optim.{module}"), kind)
        train(FusedOptim(constructor, {}), steps=1)


def test_a_function_that_makes_something_else() -> None:
    optim = FusedOptim(lambda params, lr: list(params), {"lr": 0.1})
    with pytest.raises(ValueError, match="has made a list of parameters"):
        train(optim)


def test_keywords_of_another_kind() -> None:
    with pytest.raises(ValueError, match=r"optim_args must be a dict .* got 0.1"):
        FusedOptim(torch.optim.Adam, 0.1)
