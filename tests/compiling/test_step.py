"""Compiled steps against eager ones on the same noise, of every kind of pair and estimator."""

import copy
import pickle
import sys
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

import pyro_iw.compiling.announce as announce
import pyro_iw.compiling.inductor as inductor_module
from helpers.cases import CASES, DataPlate, ScaledPerCell
from helpers.compiled import LOSSES, SmallVAE, binary, check_same, compiled_programs, guide_of, pair
from pyro_iw import IWAE_ELBO, MIWAE_ELBO, Bound, ImportanceWeightedELBO


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


@pytest.mark.parametrize(
    "name", ["iwae", *[pytest.param(name, marks=pytest.mark.slow) for name in ("ciwae-dreg", "rws")]]
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
    torch.testing.assert_close(ours.encoder[1].running_mean, eager.encoder[1].running_mean)
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


def test_recompile_forgets():
    case = DataPlate()
    loss = IWAE_ELBO(K=3, compile=True)
    for _ in range(2):
        loss.loss_and_grads(case.model, case.guide)
    assert compiled_programs(loss)
    loss.recompile()
    assert not loss._compiler._programs


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


WIDTH = 1.0


def test_a_compilation_is_announced_once_a_shape(caplog, capsys, monkeypatch):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, WIDTH))
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
    monkeypatch.setitem(globals(), "WIDTH", 2.0)
    for _ in range(2):
        loss.loss_and_grads(model, guide, torch.ones(4))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == ("pyro_iw: compiling a step of model(float32[4]) again, for 'WIDTH' has changed ...")
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
