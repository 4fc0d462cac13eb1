"""Operations that a recording takes in its own form, and draws, which are eager's own."""

import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_iw.compiling.inductor as inductor_module
from helpers.cases import DataPlate
from helpers.compiled import (
    DATA,
    LOSSES,
    check_same,
    compiled_programs,
    guide_of,
    model_of,
)
from pyro_iw import IWAE_ELBO

LABELS = torch.tensor([0, 2, 1, 1])
READOUT = torch.tensor([0.3, -1.0, 2.0])


def reused(z):
    mask, out = z > 0, torch.zeros_like(z)
    out[mask] = (3 * z)[mask]
    return out


HARMLESS = {
    "one_hot": lambda z: z + (nn.functional.one_hot(LABELS, 3) * READOUT).sum(-1),
    "picked by one mask": reused,
    "known mask": lambda z: z + READOUT[torch.arange(3) > 0].sum(),
    "known number": lambda z: z * int(torch.tensor(4)) + sum(float(i) for i in torch.arange(3)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_readings_that_do_not_depend_on_values(name):
    check_same(LOSSES["iwae"], lambda: (model_of(HARMLESS[name]), guide_of(DATA)))


def test_a_class_out_of_range_is_an_error():
    labels = LABELS.clone()
    model = model_of(lambda z: z + (nn.functional.one_hot(labels, 3) * READOUT).sum(-1))
    guide, loss = guide_of(DATA), IWAE_ELBO(K=3, compile=True)
    for _ in range(2):
        loss.loss_and_grads(model, guide)
    assert compiled_programs(loss)
    labels[0] = 3
    with pytest.raises(RuntimeError, match="out of bounds"):
        loss.loss_and_grads(model, guide)


def circular():
    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.VonMises(0.0, 1.0))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(torch.cos(z) + (y * READOUT).sum(-1), 1.0), obs=DATA)

    def guide():
        a, c = pyro.param("a", torch.tensor(0.3)), pyro.param("c", torch.zeros(4, 3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.VonMises(a * DATA, a.exp()))
            pyro.sample("y", dist.OneHotCategorical(logits=c))

    return model, guide


@pytest.mark.parametrize("through", ["operations", pytest.param("inductor", marks=pytest.mark.slow)])
def test_von_mises_and_one_hot_categorical(through, request):
    if through == "inductor":
        from pyro_iw.compiling.inductor import inductor

        request.getfixturevalue("monkeypatch").setattr(inductor_module, "inductor", inductor)
    check_same(LOSSES["score"], circular)


def correlated():
    def model():
        tril = pyro.sample("tril", dist.LKJCholesky(3, 1.5))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=torch.ones(4, 3))

    return model, AutoNormal(model)


def splined(order):
    def make():
        spline = dist.transforms.Spline(1, count_bins=4, order=order)

        def model():
            with pyro.plate("data", 4):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.squeeze(-1), 1.0), obs=DATA)

        def guide():
            pyro.module("spline", spline)
            base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
            with pyro.plate("data", 4):
                pyro.sample("z", dist.TransformedDistribution(base, [spline]))

        return model, guide

    return make


@pytest.mark.parametrize(
    "make", [correlated, splined("linear"), splined("quadratic")], ids=["lkj", "linear", "quadratic"]
)
def test_lkj_and_spline_flows(make):
    check_same(LOSSES["iwae"], make)


@pytest.mark.usefixtures("inductor")
def test_inductor_draws_fresh_noise_that_a_seed_repeats():
    case = DataPlate()
    loss = IWAE_ELBO(K=5, compile=True)
    eager = IWAE_ELBO(K=5)
    for _ in range(2):
        loss.loss_and_grads(case.model, case.guide)
    assert compiled_programs(loss)
    pyro.set_rng_seed(7)
    first = [loss.loss_and_grads(case.model, case.guide) for _ in range(3)]
    pyro.set_rng_seed(7)
    second = [loss.loss_and_grads(case.model, case.guide) for _ in range(3)]
    pyro.set_rng_seed(7)
    third = [eager.loss_and_grads(case.model, case.guide) for _ in range(3)]
    assert first == second
    assert len(set(first)) == 3
    assert first == pytest.approx(third, rel=1e-6)


P = 0.2 + 0.6 * torch.rand(7, 5, generator=torch.Generator().manual_seed(0))
DRAWS = {
    "rand": lambda p: torch.rand(7, 5, dtype=p.dtype),
    "randn": lambda p: torch.randn(7, 5, dtype=p.dtype),
    "bernoulli": torch.bernoulli,
    "expanded bernoulli": lambda p: torch.bernoulli(p[:, :1].expand(7, 5)),
    "poisson": torch.poisson,
    "binomial": lambda p: torch.binomial(torch.full_like(p, 9), p),
    "gamma": torch._standard_gamma,
    "dirichlet": torch._sample_dirichlet,
    "exponential": lambda p: torch.empty_like(p).exponential_(2.0),
    "cauchy": lambda p: torch.empty_like(p).cauchy_(),
    "geometric": lambda p: torch.empty_like(p).geometric_(0.3),
    "multinomial": lambda p: torch.multinomial(p, 9, True).to(p.dtype),
    "dropout": lambda p: nn.functional.dropout(p, 0.3),
    "permutation": lambda p: torch.randperm(9).to(p.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("inductor")
def test_every_draw_is_eagers_own(dtype):
    from torch.fx.experimental.proxy_tensor import make_fx

    p = P.to(dtype)

    def draws(p):
        return [draw(p) for draw in DRAWS.values()]

    with torch.no_grad():
        program = inductor_module.inductor(make_fx(draws)(p), [p])
        for seed in range(2):
            torch.manual_seed(seed)
            eager, after = draws(p), torch.rand(1)
            torch.manual_seed(seed)
            for name, ours, other in zip(DRAWS, program([p]), eager, strict=True):
                torch.testing.assert_close(ours, other, msg=name)
            assert torch.equal(torch.rand(1), after)


@pytest.mark.usefixtures("inductor")
def test_draws_that_nothing_depends_on_are_made():
    """Without them, later ones would be others than the eager step's."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def draws(p):
        unused = [draw(p) for draw in DRAWS.values()]
        return [torch.zeros_like(unused[0]) + torch.rand(7, 5)]

    program = inductor_module.inductor(make_fx(draws)(P), [P])
    torch.manual_seed(3)
    (eager,), after = draws(P), torch.rand(1)
    torch.manual_seed(3)
    (ours,) = program([P])
    assert torch.equal(ours, eager)
    assert torch.equal(torch.rand(1), after)


def test_recording_leaves_the_random_states_alone():
    case = DataPlate()
    loss = IWAE_ELBO(K=5, compile=True)
    loss.loss_and_grads(case.model, case.guide)
    python, numpy = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    loss.loss_and_grads(case.model, case.guide)
    assert compiled_programs(loss)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)  # noqa: NPY002


@pytest.mark.parametrize("size", [3, 40])
def test_draws_without_a_look_are_pytorchs_own(size, monkeypatch):
    """What stands in on a GPU for operations that look at values, on the same noise."""
    monkeypatch.setattr(inductor_module, "_RECORDED_ON", ("cpu",))
    mean, std, probs = torch.randn(size, 5), torch.rand(5), torch.rand(size, 7)
    for operation, args in (
        (torch.ops.aten.normal.Tensor_Tensor, (mean, std.expand(size, 5))),
        (torch.ops.aten.normal.Tensor_Tensor, (mean[:, :1], std.expand(size, 5))),
        (torch.ops.aten.multinomial.default, (probs, 1, True)),
    ):
        torch.manual_seed(3)
        expected = operation(*args)
        torch.manual_seed(3)
        torch.testing.assert_close(inductor_module.DECOMPOSITIONS[operation](*args), expected)
        after = torch.rand(())
        torch.manual_seed(3)
        operation(*args)
        assert torch.equal(after, torch.rand(()))
    several = inductor_module.DECOMPOSITIONS[torch.ops.aten.multinomial.default](probs, 2, True)
    assert several is NotImplemented


def test_what_a_replay_gives_is_kept(monkeypatch):
    """The memory that a program returns is its own, and written to again."""
    monkeypatch.setattr(
        torch.compiler, "cudagraph_mark_step_begin", lambda: None
    )  # which needs a GPU's parts
    own = [torch.tensor([1.0, -0.0, math.nan]), torch.tensor([1, 2]), torch.ones((), dtype=torch.float64)]
    kept = inductor_module.replayed(lambda inputs: own, [])
    expected = [tensor.clone() for tensor in own]
    for tensor in own:
        tensor.zero_()
    for tensor, other in zip(kept, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)
        assert tensor.dtype == other.dtype
