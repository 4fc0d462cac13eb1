"""Compiled steps against eager ones on the same noise; what is guarded, refused and undone.

Most tests run the recorded program operation by operation, which takes no compiler's seconds: what they check
is what was recorded. Those that ask for ``inductor`` run what Inductor makes of it.
"""

import argparse
import array
import collections
import contextvars
import copy
import dataclasses
import enum
import functools
import itertools
import os
import pickle
import random
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

import pyro_iw.compiling.announce as announce
import pyro_iw.compiling.inductor as inductor_module
import pyro_iw.compiling.step as compiled
from helpers.cases import CASES, DataPlate, ScaledPerCell
from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, Bound, ImportanceWeightedELBO
from pyro_iw.compiling.program import Program

LOSSES = {
    "iwae": lambda **kw: IWAE_ELBO(K=5, **kw),
    "elbo": lambda **kw: MIWAE_ELBO(M=1, K=1, **kw),
    "miwae": lambda **kw: MIWAE_ELBO(M=2, K=3, **kw),
    "piwae": lambda **kw: PIWAE_ELBO(M=2, K=3, **kw),
    "ciwae-dreg": lambda **kw: CIWAE_ELBO(K=4, beta=0.3, estimator="dreg", **kw),
    "stl": lambda **kw: IWAE_ELBO(K=5, estimator="stl", **kw),
    "score": lambda **kw: MIWAE_ELBO(M=2, K=3, estimator="score", **kw),
    "vimco": lambda **kw: IWAE_ELBO(K=5, estimator="vimco", **kw),
    "rws": lambda **kw: IWAE_ELBO(K=5, estimator="rws", **kw),
    "loop": lambda **kw: IWAE_ELBO(K=3, vectorize_particles=False, **kw),
    "resampled": lambda **kw: IWAE_ELBO(K=6, backward_particles=2, **kw),
    "resampled-piwae": lambda **kw: PIWAE_ELBO(M=2, K=3, backward_particles=2, **kw),
    "resampled-dreg": lambda **kw: MIWAE_ELBO(M=2, K=3, backward_particles=3, estimator="dreg", **kw),
}


@pytest.fixture(autouse=True)
def _interpreted(request, monkeypatch):
    if "inductor" not in request.fixturenames:

        def interpret(graph, inputs):
            return lambda args: graph(*args)

        monkeypatch.setattr(inductor_module, "inductor", interpret)


@pytest.fixture
def inductor():
    """Run what Inductor makes of the program."""


def compiled_programs(loss):
    return [p for p in loss._compiler._programs.values() if isinstance(p, Program)]


def run(loss, model, guide, args=(), steps=6, lr=0.01):
    """Losses and parameters of a short training run, from one seed."""
    pyro.clear_param_store()
    svi = SVI(model, guide, Adam({"lr": lr}), loss=loss)
    pyro.set_rng_seed(11)
    losses = [svi.step(*args) for _ in range(steps)]
    return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def check_same(make_loss, make_pair, args=(), steps=6, rtol=1e-5):
    """Eager and compiled training from one seed agree; returns the compiled loss."""
    pyro.set_rng_seed(0)
    eager, eager_params = run(make_loss(), *make_pair(), args, steps)
    pyro.set_rng_seed(0)
    loss = make_loss(compile=True)
    losses, params = run(loss, *make_pair(), args, steps)
    assert compiled_programs(loss), "nothing was compiled"
    assert losses == pytest.approx(eager, rel=rtol)
    assert params.keys() == eager_params.keys()
    for name, value in params.items():
        torch.testing.assert_close(value, eager_params[name], rtol=rtol, atol=1e-5, msg=name)
    return loss


def pair(case):
    return lambda: (case.model_callable, case.guide_callable)


def refused(loss, match, model, guide, *args):
    """Both steps run eagerly, the second after one warning."""
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss=loss)
    svi.step(*args)
    with pytest.warns(RuntimeWarning, match=match):
        svi.step(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step(*args)
    assert not compiled_programs(loss)


# Agreement ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*tempered density")
@pytest.mark.parametrize("case", [case for case in CASES if case is not ScaledPerCell])
@pytest.mark.parametrize("name", ["miwae", "piwae"])
def test_every_case_agrees_with_eager(case, name):
    check_same(LOSSES[name], pair(case()))


@pytest.mark.parametrize("name", LOSSES)
def test_every_estimator_agrees_with_eager(name):
    check_same(LOSSES[name], pair(DataPlate()))


@pytest.mark.usefixtures("inductor")
def test_resampled_steps_through_inductor():
    pyro.enable_validation(False)  # which looks at values
    try:
        check_same(LOSSES["resampled-piwae"], pair(DataPlate()))
    finally:
        pyro.enable_validation(True)


def test_chunks_are_refused():
    with pytest.raises(ValueError, match="compile=True makes one program of a whole step, and chunk_size"):
        IWAE_ELBO(K=64, chunk_size=8, compile=True)


class SmallVAE(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 5))
        self.encoder = nn.Sequential(
            nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6)
        )

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def binary(rows=8):
    return (torch.rand(rows, 5, generator=torch.Generator().manual_seed(0)) < 0.4).float()


@pytest.mark.parametrize(
    "name", ["iwae", *[pytest.param(name, marks=pytest.mark.slow) for name in ("ciwae-dreg", "piwae", "rws")]]
)
@pytest.mark.usefixtures("inductor")
def test_a_hundred_steps_of_a_vae_through_inductor(name):
    nets = []

    def make():
        vae = SmallVAE()
        if name == "ciwae-dreg":
            vae.eval()  # the guide is run twice
        nets.append(vae)
        return vae.model, vae.guide

    check_same(LOSSES[name], make, (binary(),), steps=100, rtol=2e-3)
    eager, ours = nets
    torch.testing.assert_close(
        ours.encoder[1].running_mean, eager.encoder[1].running_mean, rtol=1e-3, atol=1e-4
    )
    assert ours.encoder[1].num_batches_tracked == eager.encoder[1].num_batches_tracked


def test_dropout_and_batch_norm_in_train_mode():
    nets = []

    def make():
        nets.append(SmallVAE())
        return nets[-1].model, nets[-1].guide

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "BatchNorm1d")
        check_same(LOSSES["iwae"], make, (binary(),))
    eager, ours = nets
    assert torch.equal(ours.encoder[1].running_mean, eager.encoder[1].running_mean)
    assert ours.encoder[1].num_batches_tracked == 6


class Regression(PyroModule):
    """Local parameters with a constraint, a latent attribute and a plain child."""

    def __init__(self):
        super().__init__()
        self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)
        self.slope = PyroSample(dist.Normal(0.0, 1.0))
        self.shift = nn.Linear(1, 1)

    def forward(self, x, y):
        loc = self.slope * x + self.shift(x.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, self.noise), obs=y)


REGRESSION = torch.linspace(-1, 1, 6), torch.linspace(0, 2, 6)


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoDiagonalNormal])
def test_autoguides(autoguide):
    def make():
        model = Regression()
        return model, autoguide(model)

    check_same(lambda **kw: IWAE_ELBO(K=4, **kw), make, REGRESSION)


@pytest.mark.parametrize("local", [False, True])
def test_elbo_module_with_torch_optim(local):
    results = []
    for compile in (False, True):
        with pyro.settings.context(module_local_params=local):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            model = Regression()
            guide = AutoNormal(model)
            loss = IWAE_ELBO(K=4, compile=compile)
            elbo = loss(model, guide)
            elbo(*REGRESSION)
            optim = torch.optim.Adam(elbo.parameters(), lr=0.01)
            losses = []
            for _ in range(6):
                optim.zero_grad()
                value = elbo(*REGRESSION)
                value.backward()
                optim.step()
                losses.append(value.item())
            results.append((losses, [p.detach().clone() for p in elbo.parameters()]))
    assert compiled_programs(loss)
    torch.testing.assert_close(results[1], results[0])


def test_enumerated_model_site():
    x = torch.tensor([-1.0, 0.3, 2.0])

    def model():
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[c.long()] + z, 1.0), obs=x)

    def guide():
        a = pyro.param("a", torch.tensor(0.1))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(a * x, 1.0))

    check_same(lambda **kw: IWAE_ELBO(K=3, **kw), lambda: (model, guide))


def test_a_plate_that_subsamples_does_so_at_each_step():
    x = torch.arange(12.0)

    def model():
        with pyro.plate("data", 12, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", 12, subsample_size=3) as index:
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.1)) * x[index], 1.0))

    loss = check_same(lambda **kw: IWAE_ELBO(K=3, **kw), lambda: (model, guide))
    with torch.no_grad():
        pyro.get_param_store()["a"] = torch.tensor(0.0)
    values = {round(loss.loss_and_grads(model, guide), 3) for _ in range(6)}
    assert len(values) > 3


def test_the_tanh_of_a_program_is_as_accurate_as_eagers():
    x = torch.cat([torch.linspace(-12, 12, 40_001), torch.logspace(-30, 0, 1000), torch.tensor([0.0, -0.0])])
    tanh = inductor_module.DECOMPOSITIONS[torch.ops.aten.tanh.default]
    torch.testing.assert_close(tanh(x).double(), x.double().tanh(), rtol=2.5e-7, atol=0.0)
    ends = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30])
    assert tanh(ends).tolist() == [1.0, -1.0, 1.0, -1.0]
    assert tanh(torch.tensor(torch.nan)).isnan()
    assert tanh(x.double()) is NotImplemented


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


# Noise and state ---------------------------------------------------------------------------------


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


def test_recording_leaves_the_random_states_alone():
    case = DataPlate()
    loss = IWAE_ELBO(K=5, compile=True)
    loss.loss_and_grads(case.model, case.guide)
    python, numpy = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    loss.loss_and_grads(case.model, case.guide)
    assert compiled_programs(loss)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)  # noqa: NPY002


def test_gradients_accumulate_and_stay_none_where_eager_leaves_none():
    case = DataPlate()
    unused = pyro.param("unused", torch.tensor(1.0))

    def model():
        pyro.param("unused", torch.tensor(1.0))
        case.model()

    loss = IWAE_ELBO(K=5, compile=True)
    for _ in range(2):
        loss.loss_and_grads(model, case.guide)
    params = [pyro.param(name).unconstrained() for name in "wsac"]
    for param in params:
        param.grad = None
    pyro.set_rng_seed(3)
    loss.loss_and_grads(model, case.guide)
    once = [param.grad.clone() for param in params]
    pyro.set_rng_seed(3)
    loss.loss_and_grads(model, case.guide)
    torch.testing.assert_close([param.grad for param in params], [2 * grad for grad in once])
    assert unused.grad is None


def test_tied_gradients_do_not_share_memory():
    x = torch.zeros(3)

    def model():
        loc = pyro.param("a", torch.tensor(0.0)) + pyro.param("b", torch.tensor(0.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(pyro.param("c", torch.tensor(0.2)), 1.0))

    loss = IWAE_ELBO(K=2, compile=True)
    for _ in range(2):
        for name in pyro.get_param_store():
            pyro.param(name).grad = None
        loss.loss_and_grads(model, guide)
    a, b = pyro.param("a").grad, pyro.param("b").grad
    assert torch.equal(a, b)
    assert a.data_ptr() != b.data_ptr()


def test_hooks_on_parameters_run_at_each_step():
    case = DataPlate()
    loss = IWAE_ELBO(K=5, compile=True)
    svi = SVI(case.model, case.guide, Adam({"lr": 0.0}), loss=loss)
    svi.step()
    seen = []
    pyro.param("w").register_hook(lambda grad: seen.append(float(grad)))
    for _ in range(3):
        svi.step()
    assert compiled_programs(loss)
    assert len(set(seen)) == 3


def test_gradients_flow_into_arguments():
    x = torch.linspace(-1, 1, 4)

    def model(x, shift):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.3)), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x, shift):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.1)) * x, 1.0))

    results = []
    for compile in (False, True):
        loss = IWAE_ELBO(K=3, compile=compile)
        root = torch.tensor(0.5, requires_grad=True)
        for _ in range(3):
            root.grad = None
            pyro.set_rng_seed(2)
            loss.loss_and_grads(model, guide, x, 2 * root)
        direct = root.grad.clone()
        pyro.set_rng_seed(2)
        loss.differentiable_loss(model, guide, x, 2 * root).backward()
        results.append((direct, root.grad))
    assert compiled_programs(loss)
    torch.testing.assert_close(results[1], results[0])


def test_differentiable_loss_scales_and_refuses_a_second_derivative():
    case = DataPlate()
    loss = IWAE_ELBO(K=5, compile=True)
    for _ in range(2):
        loss.loss_and_grads(case.model, case.guide)
    w = pyro.param("w").unconstrained()
    grads = []
    for factor in (1.0, -3.0):
        w.grad = None
        pyro.set_rng_seed(4)
        (factor * loss.differentiable_loss(case.model, case.guide)).backward()
        grads.append(w.grad)
    torch.testing.assert_close(grads[1], -3 * grads[0])
    value = loss.differentiable_loss(case.model, case.guide)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(value, w, create_graph=True)
    value.backward(retain_graph=True)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
    assert loss.steps == 5


def test_loss_without_gradients_is_eager_and_does_not_count():
    case = DataPlate()
    loss = IWAE_ELBO(K=5, compile=True)
    for _ in range(2):
        loss.loss_and_grads(case.model, case.guide)
    before = len(loss._compiler._programs)
    loss.loss(case.model, case.guide)
    with torch.no_grad():
        assert not loss.differentiable_loss(case.model, case.guide).requires_grad
    assert len(loss._compiler._programs) == before
    assert loss.steps == 2


# What a step sees without being recorded again ---------------------------------------------------


def test_a_kl_schedule_is_one_program_apart_from_0_and_1():
    case = DataPlate()

    def make(**kw):
        return MIWAE_ELBO(M=2, K=3, kl_weight=lambda step: min(1.0, step / 8), **kw)

    loss = check_same(make, pair(case), steps=12)
    assert len(compiled_programs(loss)) == 2  # in between, and 1; 0 came once


@pytest.mark.parametrize("estimator", ["reparam", "dreg"])
def test_a_number_for_kl_weight_can_be_set_anew(estimator):
    case = DataPlate()
    loss = IWAE_ELBO(K=5, kl_weight=0.5, estimator=estimator, compile=True)
    eager = IWAE_ELBO(K=5, kl_weight=0.5, estimator=estimator)
    for _ in range(2):
        loss.loss_and_grads(case.model, case.guide)
    loss.kl_weight = eager.kl_weight = 0.25
    pyro.set_rng_seed(0)
    value = loss.loss_and_grads(case.model, case.guide)
    pyro.set_rng_seed(0)
    assert value == pytest.approx(eager.loss_and_grads(case.model, case.guide), rel=1e-6)
    assert len(loss._compiler._programs) == 1


def test_loaded_parameters_are_seen():
    vae = SmallVAE().eval()
    other = SmallVAE().eval()
    loss, eager = IWAE_ELBO(K=3, compile=True), IWAE_ELBO(K=3)
    for _ in range(2):
        loss.loss_and_grads(vae.model, vae.guide, binary())
    vae.load_state_dict(other.state_dict())
    pyro.set_rng_seed(5)
    value = loss.loss_and_grads(vae.model, vae.guide, binary())
    pyro.set_rng_seed(5)
    assert value == pytest.approx(eager.loss_and_grads(vae.model, vae.guide, binary()), rel=1e-6)
    assert len(loss._compiler._programs) == 1


def follows(loss, model, guide, change, *args, eager=None):
    """Whether the steps after a change give what eager ones give, on the same noise."""
    eager = eager or IWAE_ELBO(K=3)
    for _ in range(2):
        loss.loss_and_grads(model, guide, *args)
    assert compiled_programs(loss)
    change()
    for _ in range(3):
        pyro.set_rng_seed(6)
        value = loss.loss_and_grads(model, guide, *args)
        pyro.set_rng_seed(6)
        if value != pytest.approx(eager.loss_and_grads(model, guide, *args), rel=1e-6):
            return False
    return bool(compiled_programs(loss))


class Configured(nn.Module):
    beta = 1.0

    def __init__(self):
        super().__init__()
        self.gamma = 1.0
        self.options = {"shift": 0.0}
        self.register_buffer("x", torch.linspace(-1, 1, 4))
        self.net = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5), nn.Linear(3, 1))

    def model(self):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(self.options["shift"], self.gamma))
            pyro.sample("x", dist.Normal(self.beta * z, 1.0 if self.training else 2.0), obs=self.x)

    def guide(self):
        pyro.module("net", self.net)
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(self.net(self.x.unsqueeze(-1)).squeeze(-1), 1.0))


CHANGES = {
    "attribute": lambda pair: setattr(pair, "gamma", 2.0),
    "class attribute": lambda pair: setattr(Configured, "beta", 3.0),
    "container": lambda pair: pair.options.update(shift=1.5),
    "training": lambda pair: pair.eval(),
    "training of a child": lambda pair: pair.net[1].eval(),
    "option of a child": lambda pair: setattr(pair.net[1], "p", 0.0),
    "buffer in place": lambda pair: pair.x.mul_(2),
    "buffer replaced": lambda pair: setattr(pair, "x", torch.zeros(4)),
    "child replaced": lambda pair: pair.net.__setitem__(1, nn.Tanh()),
    "dtype": lambda pair: (pair.net.double(), setattr(pair, "x", pair.x.double())),
    "frozen": lambda pair: pair.net[0].weight.requires_grad_(False),
    "store cleared": lambda pair: pyro.clear_param_store(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_module_are_seen(change):
    pair = Configured()
    loss = IWAE_ELBO(K=3, compile=True)
    warnings.filterwarnings("ignore", ".* was not registered in the param store")
    try:
        assert follows(loss, pair.model, pair.guide, lambda: CHANGES[change](pair))
    finally:
        Configured.beta = 1.0


def test_a_parameter_that_is_frozen_gets_no_gradient_any_more():
    vae, x = SmallVAE().eval(), binary()
    loss = IWAE_ELBO(K=3, compile=True)
    for _ in range(2):
        loss.loss_and_grads(vae.model, vae.guide, x)
    assert compiled_programs(loss)
    vae.zero_grad()
    weight = vae.decoder[0].weight.requires_grad_(False)
    for _ in range(3):
        loss.loss_and_grads(vae.model, vae.guide, x)
    assert compiled_programs(loss)
    assert weight.grad is None
    assert vae.decoder[3].weight.grad is not None


def test_a_module_of_another_dtype_is_recorded_again():
    vae = SmallVAE().eval()
    loss = IWAE_ELBO(K=3, compile=True)
    for _ in range(2):
        loss.loss_and_grads(vae.model, vae.guide, binary())
    (program,) = compiled_programs(loss)
    assert program.guards.changed() is None
    vae.decoder.double()  # the same parameters in other memory
    assert "dtype" in program.guards.changed()


SCALE = 1.0
DATA = torch.linspace(-1, 1, 4)


@pytest.mark.parametrize(
    "what", ["global", "global tensor", "closure", "closure tensor", "nested", "in place"]
)
def test_changes_of_globals_and_closures_are_seen(what, monkeypatch):
    weight, shift = 1.0, torch.tensor(0.1)

    def loc(z):
        return weight * z + shift

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, SCALE))
            pyro.sample("x", dist.Normal(loc(z), 1.0), obs=DATA)

    def guide():
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a * DATA + shift, 1.0))

    def change():
        nonlocal weight, shift
        if what == "global":
            monkeypatch.setitem(globals(), "SCALE", 2.0)
        elif what == "global tensor":
            monkeypatch.setitem(globals(), "DATA", torch.ones(4))
        elif what in ("closure", "nested"):
            weight = 2.0
        elif what == "closure tensor":
            shift = torch.tensor(1.0)
        else:
            shift.fill_(1.0)

    assert follows(IWAE_ELBO(K=3, compile=True), model, guide, change)


class Settings:
    beta = 1.0


class Kind(enum.Enum):
    narrow, wide = 1.0, 3.0


@dataclasses.dataclass(slots=True)
class Slotted:
    beta: float = 1.0


class OneSlot:
    __slots__ = "beta"

    def __init__(self):
        self.beta = 1.0


class Nested:
    def __init__(self):
        self.inner = Settings()
        self.table = {"prior": {"scale": 1.0}}
        self.values = [1.0]
        self.kind = Kind.narrow
        self.number = np.float32(1.0)
        self.prior = dist.Normal(0.0, 1.0)


class Unused(nn.Module):
    """Read by a model, its own forward never run."""

    def __init__(self):
        super().__init__()
        self.beta = 1.0
        self.scale = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.scale.weight)

    def replace(self):
        self.scale = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.scale.weight, 3.0)


def scale_of(z):
    return 1.0


# What a model reads its prior's scale from, and how that changes.
READS = {
    "class": (lambda: Settings, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "shadowed": (Settings, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "namespace": (
        lambda: argparse.Namespace(beta=1.0),
        lambda c: c.beta,
        lambda c: setattr(c, "beta", 3.0),
    ),
    "slots": (Slotted, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "one slot": (OneSlot, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "object in object": (Nested, lambda c: c.inner.beta, lambda c: setattr(c.inner, "beta", 3.0)),
    "dict in dict": (
        Nested,
        lambda c: c.table["prior"]["scale"],
        lambda c: c.table["prior"].update(scale=3.0),
    ),
    "dict replaced": (
        Nested,
        lambda c: c.table["prior"]["scale"],
        lambda c: c.table.update(prior={"scale": 3.0}),
    ),
    "appended": (Nested, lambda c: sum(c.values), lambda c: c.values.append(2.0)),
    "enum": (Nested, lambda c: c.kind.value, lambda c: setattr(c, "kind", Kind.wide)),
    "numpy number": (Nested, lambda c: float(c.number), lambda c: setattr(c, "number", np.float32(3.0))),
    "distribution": (
        Nested,
        lambda c: c.prior.scale,
        lambda c: setattr(c, "prior", dist.Normal(0.0, 3.0)),
    ),
    "function": (lambda: scale_of, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "module": (Unused, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "module's flag": (Unused, lambda c: 1.0 + c.training, lambda c: c.eval()),
    "module's child": (Unused, lambda c: c.scale.weight[0, 0], Unused.replace),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("where", ["closure", "partial"])
def test_changes_wherever_a_model_reads_are_seen(name, where, monkeypatch):
    make, read, change = READS[name]
    monkeypatch.setattr(Settings, "beta", 1.0)
    monkeypatch.setattr(scale_of, "beta", 1.0, raising=False)
    settings = make()

    def body(scale):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)

    def model():
        body(read(settings))

    def model_of(given):
        body(read(given))

    def guide():
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a * DATA, 1.0))

    run_model = model if where == "closure" else functools.partial(model_of, settings)
    assert follows(IWAE_ELBO(K=3, compile=True), run_model, guide, lambda: change(settings))


def prior_pair(scale):
    """A pair whose prior's scale is what a function of nothing gives."""

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, scale()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)

    return model, guide_of(DATA)


class Tagged(dict):
    """A dict of the user's own."""


class Shared(type):
    beta = 1.0


class OfShared(metaclass=Shared):
    pass


class Outer:
    class Inner:
        beta = 1.0


TABLE = {"scale": 1.0}
LEVEL = 1.0


def of_default(nested=([1.0],)):
    return nested[0][0]


@functools.lru_cache
def cached_scale():
    return TABLE["scale"]


def set_table(cached):
    TABLE["scale"] = 3.0
    cached.cache_clear()
    cached()  # as full as it was


def put(key):
    return lambda c: c.__setitem__(key, 3.0)


# What a scale is read from, by which code, and how it changes.
DEEP = {
    "lists": (lambda: [[[[[1.0]]]]], lambda c: c[0][0][0][0][0], lambda c: put(0)(c[0][0][0][0])),
    "long list": (lambda: [1.0] * 100, lambda c: c[70], put(70)),
    "long dict": (lambda: dict.fromkeys(range(1000), 1.0), lambda c: c[7], put(7)),
    "tensors": (
        lambda: [torch.ones(())] * 100,
        lambda c: c[70],
        lambda c: c.__setitem__(70, torch.tensor(3.0)),
    ),
    "deque": (lambda: collections.deque([1.0]), lambda c: c[0], put(0)),
    "rotated": (lambda: collections.deque([1.0, 3.0]), lambda c: c[0], lambda c: c.rotate()),
    "set": (lambda: {(1.0,)}, lambda c: sum(v for (v,) in c), lambda c: c.add((3.0,))),
    "own dict": (lambda: Tagged(a=[1.0], b=DATA), lambda c: c["a"][0], lambda c: put(0)(c["a"])),
    "user dict": (lambda: collections.UserDict(a=1.0), lambda c: c["a"], put("a")),
    "chain": (lambda: collections.ChainMap({"a": 1.0}), lambda c: c["a"], put("a")),
    "array": (lambda: np.ones(3), lambda c: float(c[0]), put(0)),
    "array in list": (lambda: [np.ones(3)], lambda c: float(c[0][0]), lambda c: put(0)(c[0])),
    "array of Python's": (lambda: array.array("d", [1.0]), lambda c: c[0], put(0)),
    "bytes": (lambda: bytearray([1]), lambda c: float(c[0]), lambda c: c.__setitem__(0, 3)),
    "partial": (
        lambda: functools.partial(lambda table: table["a"][0], {"a": [1.0]}),
        lambda c: c(),
        lambda c: put(0)(c.args[0]["a"]),
    ),
    "inner class": (lambda: Outer, lambda c: c.Inner.beta, lambda c: setattr(c.Inner, "beta", 3.0)),
    "metaclass": (lambda: OfShared, lambda c: c.beta, lambda c: setattr(Shared, "beta", 3.0)),
    "within a distribution": (
        lambda: [dist.Normal(0.0, 1.0)],
        lambda c: c[0].scale,
        lambda c: setattr(c[0], "scale", torch.tensor(3.0)),
    ),
    "optimiser": (
        lambda: [torch.optim.SGD([torch.zeros(1)], lr=1.0)],
        lambda c: c[0].param_groups[0]["lr"],
        lambda c: c[0].param_groups[0].update(lr=3.0),
    ),
    "context": (lambda: contextvars.ContextVar("c", default=1.0), lambda c: c.get(), lambda c: c.set(3.0)),
    "default": (lambda: of_default, lambda c: c(), lambda c: put(0)(c.__defaults__[0][0])),
    "type": (lambda: {"a": 1}, lambda c: 3.0 if type(c["a"]) is float else 1.0, lambda c: c.update(a=1.0)),
    "cache": (lambda: cached_scale, lambda c: c(), set_table),
    "globals": (lambda: None, lambda c: globals()["LEVEL"], lambda c: globals().update(LEVEL=3.0)),
    "globals by a name": (
        lambda: "LEVEL",
        lambda c: globals()[c],
        lambda c: globals().update(LEVEL=3.0),
    ),
    "vars": (
        lambda: None,
        lambda c: vars(sys.modules[__name__])["LEVEL"],
        lambda c: globals().update(LEVEL=3.0),
    ),
    "environment": (
        lambda: None,
        lambda c: float(os.environ.get("PYRO_IW_LEVEL", "1")),
        lambda c: os.environ.update(PYRO_IW_LEVEL="3"),
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_changes_deep_inside_are_seen(name, monkeypatch):
    for owner, attribute in ((Outer.Inner, "beta"), (Shared, "beta")):
        monkeypatch.setattr(owner, attribute, 1.0)
    monkeypatch.setitem(globals(), "LEVEL", 1.0)
    monkeypatch.setitem(TABLE, "scale", 1.0)
    monkeypatch.setattr(of_default, "__defaults__", ([[1.0]],))
    monkeypatch.setenv("PYRO_IW_LEVEL", "1")
    cached_scale.cache_clear()
    make, read, change = DEEP[name]
    given = make()
    model, guide = prior_pair(lambda: read(given))
    assert follows(IWAE_ELBO(K=3, compile=True), model, guide, lambda: change(given))


def test_a_module_imported_by_the_model_is_watched(tmp_path, monkeypatch):
    (tmp_path / "level_of_a_test.py").write_text("class Prior:\n    scale = [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)

    def scale():
        import level_of_a_test

        return level_of_a_test.Prior.scale[0]

    def change():
        sys.modules["level_of_a_test"].Prior.scale[0] = 3.0

    assert follows(IWAE_ELBO(K=3, compile=True), *prior_pair(scale), change)


def test_what_nothing_names_may_be_large_or_unreadable():
    class Trainer:
        def __init__(self):
            self.images = [0.0] * 100_000
            self.features = np.zeros(1_000_000)
            self.batches = iter(range(3))
            self.beta = 1.0

        def scale(self):
            return self.beta

    trainer = Trainer()
    loss = IWAE_ELBO(K=3, compile=True)
    assert follows(loss, *prior_pair(trainer.scale), lambda: setattr(trainer, "beta", 3.0))
    assert next(trainer.batches) == 0


def test_each_closure_of_one_factory_is_watched():
    def layer(weight):
        def forward(z):
            return weight * z

        def set_weight(value):
            nonlocal weight
            weight = value

        return forward, set_weight

    (one, set_one), (other, set_other) = layer(1.0), layer(2.0)

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(other(one(z)), 1.0), obs=DATA)

    def guide():
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a * DATA, 1.0))

    loss = IWAE_ELBO(K=3, compile=True)
    assert follows(loss, model, guide, lambda: set_one(3.0))
    assert follows(loss, model, guide, lambda: set_other(-1.0))


def test_handlers_around_a_model_are_watched():
    data = {"x": DATA}

    def free():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide():
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a, 1.0))

    model = poutine.condition(free, data=data)
    assert follows(IWAE_ELBO(K=3, compile=True), model, guide, lambda: data.update(x=DATA + 2))


def test_the_bound_of_a_loss_may_change():
    case = DataPlate()
    loss = CIWAE_ELBO(K=3, beta=0.2, compile=True)
    eager = CIWAE_ELBO(K=3, beta=0.9)
    assert follows(loss, case.model, case.guide, lambda: setattr(loss.bound, "beta", 0.9), eager=eager)


def test_a_cleared_param_store_is_begun_anew():
    """Not merely seen: the new parameters are those that are trained and stored."""
    case = DataPlate()
    loss = IWAE_ELBO(K=3, compile=True)
    found = []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = SVI(case.model, case.guide, Adam({"lr": 0.1}), loss=loss)
        losses = [svi.step() for _ in range(6)]
        found.append((losses, {name: value.item() for name, value in pyro.get_param_store().items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


def test_saving_the_param_store_in_between(tmp_path):
    case = DataPlate()
    svi = SVI(case.model, case.guide, Adam({"lr": 0.1}), loss=IWAE_ELBO(K=3, compile=True))
    for _ in range(3):
        svi.step()
    pyro.get_param_store().save(str(tmp_path / "params.pt"))
    before = pyro.param("a").item()
    svi.step()
    assert pyro.param("a").item() != before


def test_steps_without_gradients_are_no_gradient_steps():
    case = DataPlate()
    loss = IWAE_ELBO(K=3, compile=True)
    with torch.no_grad():
        for _ in range(3):
            loss.loss_and_grads(case.model, case.guide)
    assert pyro.get_param_store()._params["a"].grad is None
    for _ in range(3):
        loss.loss_and_grads(case.model, case.guide)
    assert pyro.get_param_store()._params["a"].grad is not None


def test_autoguides_of_local_latents():
    x = torch.linspace(-1, 1, 4)

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).expand([4]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    check_same(LOSSES["iwae"], lambda: (model, AutoNormal(model)))


def test_two_models_in_turn_on_one_guide():
    case = DataPlate()
    loss = IWAE_ELBO(K=3, compile=True)

    def other():
        case.model()

    for _ in range(3):
        loss.loss_and_grads(case.model, case.guide)
        loss.loss_and_grads(other, case.guide)
    assert len(compiled_programs(loss)) == 2


def test_arguments_that_are_new_at_every_step_are_given_up():
    def model(scale):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)

    def guide(scale):
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a * DATA, 1.0))

    loss = IWAE_ELBO(K=3, compile=True)
    for step in range(compiled._NOVELTIES):
        loss.loss_and_grads(model, guide, 1.0 + step)
    with pytest.warns(RuntimeWarning, match="new at every step; pass a number that changes as a tensor"):
        loss.loss_and_grads(model, guide, 0.5)


def test_a_sparse_argument_runs_eagerly():
    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.to_dense())

    def guide(x):
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a, 1.0))

    loss = IWAE_ELBO(K=3, compile=True)
    with pytest.warns(RuntimeWarning, match="sparse or nested tensor"):
        loss.loss_and_grads(model, guide, DATA.to_sparse())


def test_shapes_and_values_of_arguments_are_seen_and_programs_bounded():
    def model(x, scale=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, scale=1.0):
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x, 1.0))

    loss, eager = IWAE_ELBO(K=3, compile=True), IWAE_ELBO(K=3)
    for size in range(1, 6):
        for keywords in ({}, {"scale": 2.0}):
            for _ in range(3):
                pyro.set_rng_seed(size)
                value = loss.loss_and_grads(model, guide, torch.ones(size), **keywords)
                pyro.set_rng_seed(size)
                other = eager.loss_and_grads(model, guide, torch.ones(size), **keywords)
                assert value == pytest.approx(other, rel=1e-5)
    assert len(compiled_programs(loss)) == len(loss._compiler._programs) == 8


def test_aliased_arguments_are_told_apart():
    def model(x, y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.3)) * x, 1.0))

    loss, eager = IWAE_ELBO(K=3, compile=True), IWAE_ELBO(K=3)
    x = torch.ones(3)
    for args in [(x, x)] * 3 + [(x, 5 * x)] * 3:
        pyro.set_rng_seed(0)
        value = loss.loss_and_grads(model, guide, *args)
        pyro.set_rng_seed(0)
        assert value == pytest.approx(eager.loss_and_grads(model, guide, *args), rel=1e-6)


def test_global_settings_are_part_of_what_was_recorded():
    case = DataPlate()
    loss = IWAE_ELBO(K=3, compile=True)
    for _ in range(2):
        loss.loss_and_grads(case.model, case.guide)
    assert len(loss._compiler._programs) == 1
    with torch.autocast("cpu", torch.bfloat16):
        loss.loss_and_grads(case.model, case.guide)
    assert len(loss._compiler._programs) == 2
    with pyro.validation_enabled(False):
        loss.loss_and_grads(case.model, case.guide)
    assert len(loss._compiler._programs) == 3


def test_handlers_outside_are_not_recorded():
    case = DataPlate()
    loss, eager = IWAE_ELBO(K=3, compile=True), IWAE_ELBO(K=3)
    for _ in range(3):
        loss.loss_and_grads(case.model, case.guide)
    with poutine.scale(scale=3.0):
        pyro.set_rng_seed(0)
        value = loss.loss_and_grads(case.model, case.guide)
        pyro.set_rng_seed(0)
        assert value == pytest.approx(eager.loss_and_grads(case.model, case.guide), rel=1e-6)


# Refusals ----------------------------------------------------------------------------------------


def guide_of(x):
    def guide():
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a * x, 1.0))

    return guide


def model_of(loc):
    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc(z), 1.0), obs=torch.ones(4))

    return model


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, z):
        self.calls += 1
        return z / self.calls


def forked(z):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return z * torch.randn(4)


def set_back(z):
    state = torch.get_rng_state()
    torch.manual_seed(3)
    z = z * torch.randn(4)
    torch.set_rng_state(state)
    return z


def drawn_twice(z):
    state = TORCH_GENERATOR.get_state()
    z = z * torch.randn(4, generator=TORCH_GENERATOR)
    TORCH_GENERATOR.set_state(state)
    return z


LARGE = [1.0] * 5000
LARGE_ARRAY = np.ones(100_000)
STREAM = itertools.count()
WEIGHTS = torch.tensor([0.5])
TORCH_GENERATOR = torch.Generator()
GENERATOR = np.random.default_rng(0)

REFUSED = {
    "branch": (lambda z: z if z.mean() > 0 else -z, "reads a tensor's value"),
    "item": (lambda z: z * WEIGHTS.item(), "reads a tensor's value"),
    "float": (lambda z: z * float(z.detach().sum()), "reads a tensor's value"),
    "tolist": (lambda z: z * torch.tensor(z.tolist()), "reads a tensor's value"),
    "numpy": (lambda z: z + torch.from_numpy(np.tanh(WEIGHTS.numpy())), "reads a tensor's value"),
    "equal": (lambda z: z if torch.equal(WEIGHTS, 2 * WEIGHTS) else z / 2, "reads a tensor's value"),
    "shape": (lambda z: z + z[z > 0].sum(), "shape depends on values"),
    "python random": (lambda z: z * random.random(), "Python's random"),
    "numpy random": (lambda z: z * np.random.rand(), "numpy.random"),  # noqa: NPY002
    "numpy generator": (lambda z: z * GENERATOR.random(), "generator 'GENERATOR'"),
    "fresh values": (lambda z: z * torch.tensor(list(os.urandom(9))).sum(), "other values"),
    "forked": (forked, "seeds a random generator, or puts its state back"),
    "set back": (set_back, "seeds a random generator, or puts its state back"),
    "seeded handler": (poutine.seed(lambda z: z * torch.randn(4), 1), "seeds a random generator"),
    "own generator": (
        lambda z: z * torch.randn(4, generator=torch.Generator().manual_seed(3)),
        "torch.Generator of its own",
    ),
    "generator seeded": (
        lambda z: z * torch.randn(4, generator=TORCH_GENERATOR.manual_seed(3)),
        "seeds a random generator",
    ),
    "generator set back": (drawn_twice, "seeds a random generator, or puts its state back"),
    "large container": (lambda z: z * LARGE[7], "'LARGE', a container of 5000 entries"),
    "large array": (lambda z: z * LARGE_ARRAY[7], "'LARGE_ARRAY', a large NumPy array"),
    "iterator": (lambda z: z * next(STREAM), "'STREAM', an iterator"),
    "one-hot": (lambda z: z + nn.functional.one_hot(torch.arange(4))[0], "pass num_classes"),
    "picked": (lambda z: z + torch.cat([z[z > 0], z[z <= 0]]).sum(), "shape depends on values"),
    "counter": (Counter(), "changes as it runs"),
    "seed": (lambda z: z + 0 * torch.manual_seed(5).initial_seed(), "seeds a random generator"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_would_be_frozen_is_refused(why):
    loc, match = REFUSED[why]
    refused(IWAE_ELBO(K=3, compile=True), match, model_of(loc), guide_of(torch.ones(4)))


def steps_with(loss, loc, generator, state, count=4):
    """Losses of some steps, from one state of the user's own generator, and its state after them."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    generator.set_state(state)
    model, guide = model_of(loc), guide_of(torch.ones(4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "compile=True is left aside")
        return [loss.loss_and_grads(model, guide) for _ in range(count)], generator.get_state()


@pytest.mark.parametrize("can", [True, False])
def test_a_generator_of_ones_own_is_where_the_eager_steps_leave_it(can):
    def loc(z):
        z = z * torch.randn(4, generator=TORCH_GENERATOR)
        return z if can or z.mean() < 100 else -z

    state = TORCH_GENERATOR.get_state()
    loss = IWAE_ELBO(K=3, compile=True)
    losses, after = steps_with(loss, loc, TORCH_GENERATOR, state)
    eager, expected = steps_with(IWAE_ELBO(K=3), loc, TORCH_GENERATOR, state)
    assert bool(compiled_programs(loss)) is can
    assert losses == pytest.approx(eager, rel=1e-6)
    assert torch.equal(after, expected)


def test_generators_of_numpy_and_python_are_not_advanced_by_a_failed_recording():
    draws = []
    for compile in (False, True):
        own, pythons = np.random.default_rng(0), random.Random(0)
        loss = IWAE_ELBO(K=3, compile=compile)
        model = model_of(lambda z, own=own, pythons=pythons: z * own.random() * pythons.random())
        guide = guide_of(torch.ones(4))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "compile=True is left aside")
            for _ in range(3):
                loss.loss_and_grads(model, guide)
        draws.append((own.random(), pythons.random()))
    assert draws[0] == draws[1]


def test_a_tensor_of_scales_is_compared_by_value_and_refused():
    case = ScaledPerCell()
    refused(IWAE_ELBO(K=3, compile=True), "reads a tensor's value", case.model_callable, case.guide_callable)


def test_arguments_of_unknown_types_are_refused():
    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(x))

    def guide(x):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.3)), 1.0))

    loss = IWAE_ELBO(K=3, compile=True)
    with pytest.warns(RuntimeWarning, match="argument is of type ndarray"):
        loss.loss_and_grads(model, guide, np.ones(4, dtype=np.float32))


def test_without_a_compiler_the_step_is_eager(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("No C++ compiler found\nand more")

    monkeypatch.setattr(inductor_module, "inductor", broken)
    case = DataPlate()
    refused(IWAE_ELBO(K=3, compile=True), "No C.. compiler found", case.model, case.guide)


def test_what_keeps_changing_is_left_to_run_eagerly():
    pair = Configured()
    loss = IWAE_ELBO(K=3, compile=True)

    def train():
        for step in range(40):
            pair.gamma = 1.0 + step // 3
            loss.loss_and_grads(pair.model, pair.guide)

    with pytest.warns(RuntimeWarning, match="'gamma' keeps changing"):
        train()
    assert loss.steps == 40


def test_recompile_forgets():
    case = DataPlate()
    loss = IWAE_ELBO(K=3, compile=True)
    for _ in range(2):
        loss.loss_and_grads(case.model, case.guide)
    assert compiled_programs(loss)
    loss.recompile()
    assert not loss._compiler._programs


# Errors ------------------------------------------------------------------------------------------


def sick_pair():
    x = torch.ones(4)

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    return model, guide_of(torch.ones(4)), x


@pytest.mark.parametrize("through", ["svi", "module"])
def test_nan_names_the_site_and_leaves_no_gradient(through):
    model, guide, x = sick_pair()
    loss = IWAE_ELBO(K=3, compile=True)
    for _ in range(2):
        loss.loss_and_grads(model, guide)
    assert compiled_programs(loss)
    a = pyro.param("a").unconstrained()
    a.grad = None
    x[1] = float("nan")
    step = loss.loss_and_grads if through == "svi" else loss.differentiable_loss
    with pytest.raises(ValueError, match=r"NaN \(first at site 'x'"):
        step(model, guide)
    assert a.grad is None
    assert loss.steps == 2
    x[1] = 1.0
    loss.loss_and_grads(model, guide)
    assert a.grad is not None


def test_a_bound_of_minus_infinity_warns_as_in_eager():
    x = torch.ones(4)

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.log(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = guide_of(torch.ones(4))
    loss, eager = IWAE_ELBO(K=3, compile=True), IWAE_ELBO(K=3)
    for _ in range(2):
        loss.loss_and_grads(model, guide)
    assert compiled_programs(loss)
    x[2] = 0.0
    values, grads = [], []
    for each in (loss, eager):
        pyro.param("a").grad = None
        pyro.set_rng_seed(0)
        with pytest.warns(RuntimeWarning, match="-inf in 1 of 4"):
            values.append(each.loss_and_grads(model, guide))
        grads.append(pyro.param("a").grad)
    assert values[0] == values[1] == float("inf")
    assert torch.equal(*grads)


def test_batch_norm_is_not_updated_twice_by_a_bad_step():
    vae = SmallVAE()
    vae.decoder.eval()
    x = binary()
    loss = MIWAE_ELBO(M=1, K=1, compile=True)
    for _ in range(2):
        loss.loss_and_grads(vae.model, vae.guide, x)
    norm = vae.encoder[1]
    assert compiled_programs(loss)
    assert norm.num_batches_tracked == 2
    with torch.no_grad():
        vae.decoder[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        loss.loss_and_grads(vae.model, vae.guide, x)
    assert norm.num_batches_tracked == 3


# Protocol ----------------------------------------------------------------------------------------


def test_a_compilation_is_announced_once_a_shape(caplog, capsys, monkeypatch):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, LEVEL))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.3)), 1.0))

    caplog.set_level("INFO", "pyro_iw")
    loss = IWAE_ELBO(K=3, compile=True)
    for size in (4, 4, 4, 3, 3, 3):
        loss.loss_and_grads(model, guide, torch.ones(size))
    said = "compiling a step of model(float32[4]) ...", "compiling a step of model(float32[3]) ..."
    assert tuple(message for message in caplog.messages if "compiling" in message) == said
    assert not capsys.readouterr().err  # no terminal
    monkeypatch.setattr(announce, "_LONG", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(globals(), "LEVEL", 2.0)
    for _ in range(2):
        loss.loss_and_grads(model, guide, torch.ones(4))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == ("pyro_iw: compiling a step of model(float32[4]) again, for 'LEVEL' has changed ...")
    assert lines[1].startswith("pyro_iw: compiled in ")


def test_repr_pickle_and_deepcopy():
    case = DataPlate()
    loss = MIWAE_ELBO(M=2, K=3, compile=True)
    assert repr(loss) == "MIWAE_ELBO(M=2, K=3, compile=True)"
    for _ in range(2):
        loss.loss_and_grads(case.model, case.guide)
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert other.compile
        assert other.steps == 2
        assert not other._compiler._programs
        for _ in range(3):
            other.loss_and_grads(case.model, case.guide)
        assert compiled_programs(other)


def test_param_messages_are_those_of_the_eager_step():
    model = Regression()
    guide = AutoNormal(model)
    loss, eager = IWAE_ELBO(K=3, compile=True), IWAE_ELBO(K=3)
    for _ in range(2):
        loss.loss_and_grads(model, guide, *REGRESSION)
    assert compiled_programs(loss)
    traces = []
    for each in (loss, eager):
        with poutine.trace(param_only=True) as capture:
            each.loss_and_grads(model, guide, *REGRESSION)
        traces.append(capture.trace.nodes)
    assert traces[0].keys() == traces[1].keys()
    for name, site in traces[0].items():
        other = traces[1][name]["value"]
        torch.testing.assert_close(site["value"], other)
        assert site["value"].unconstrained() is other.unconstrained()
    assert any(site["value"].unconstrained() is not site["value"] for site in traces[0].values())


def test_a_bound_of_ones_own():
    class Middle(Bound):
        def value(self, log_w):
            return log_w.logsumexp(1).median(0).values

    check_same(lambda **kw: ImportanceWeightedELBO(Middle(M=3, K=2), **kw), pair(DataPlate()))
