"""Signal-to-noise ratios against closed forms; what belongs to whom; that nothing is touched."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_iw import IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, gradient_snr

DATA = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
SCALE = 0.5


def model(x=DATA):
    loc = pyro.param("loc", torch.tensor([0.3, 0.0, -1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x=DATA):
    shift = pyro.param("shift", torch.tensor([0.1, 0.7, -0.2]))
    scale = pyro.param("scale", torch.tensor(SCALE), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + shift, scale).to_event(1))


def truth(M):
    """Mean and variance of the ELBO's gradient of M particles, summed over the data; minus, for a loss.

    With z = x / 2 + shift + scale e: d/dloc is the mean of z - loc, d/dshift that of loc + x - 2 z (the
    guide's own density does not change with its shift), d/dlog scale that of 1 + scale e (loc + x - 2 z), for
    each dimension.
    """
    loc, shift = torch.tensor([0.3, 0.0, -1.0]), torch.tensor([0.1, 0.7, -0.2])
    z = DATA / 2 + shift
    slope = loc + DATA - 2 * z
    # s e (slope - 2 s e): variance s^2 slope^2 + 4 s^4 Var(e^2), Var(e^2) = 2.
    variance = SCALE**2 * slope**2 + 8 * SCALE**4
    n = len(DATA)
    return {
        "loc": (-(z - loc).sum(0), n * SCALE**2 / M * torch.ones(3)),
        "shift": (-slope.sum(0), n * 4 * SCALE**2 / M * torch.ones(3)),
        "scale": (-(1 - 2 * SCALE**2) * torch.tensor(3.0 * n), variance.sum() / M),
    }


@pytest.mark.parametrize(
    "loss", [MIWAE_ELBO(M=2, K=1), Trace_ELBO(2), Trace_ELBO(2, vectorize_particles=True)]
)
def test_moments_of_the_elbo(loss):
    n = 1000
    result = gradient_snr(loss, model, guide, num_draws=n, progress=False)
    assert set(result.mean) == {"loc", "shift", "scale"}
    for name, (mean, variance) in truth(M=2).items():
        std = variance.sqrt()
        assert result.mean[name].dtype == result.std[name].dtype == torch.float64
        assert result.mean[name].shape == result.std[name].shape == result.snr[name].shape == mean.shape
        # Five standard errors; those of a deviation allow for tails heavier than normal ones.
        errors = (result.mean[name] - mean).abs() / std * n**0.5
        assert errors.max() < 5, name
        assert (result.std[name] / std - 1).abs().max() < 5 / n**0.5, name
        torch.testing.assert_close(result.snr[name], result.mean[name].abs() / result.std[name])
    assert result.num_draws == n
    assert result.floor == pytest.approx(n**-0.5)


@pytest.mark.parametrize(
    "loss",
    [IWAE_ELBO(K=3), PIWAE_ELBO(M=2, K=2), IWAE_ELBO(K=3, estimator="dreg"), Trace_ELBO()],
    ids=["iwae", "piwae", "dreg", "elbo"],
)
def test_equals_a_plain_loop(loss):
    """The same draws as backward passes from the same seed give, their moments taken at once."""
    pyro.set_rng_seed(3)
    result = gradient_snr(loss, model, guide, num_draws=7, progress=False)
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    draws = {"loc": [], "shift": [], "scale": []}
    # A fresh loss would probe the pair first, which takes random numbers; so does the result's.
    loss = IWAE_ELBO(**vars_of(loss)) if type(loss) is IWAE_ELBO else loss
    if type(loss) is PIWAE_ELBO:
        loss = PIWAE_ELBO(M=2, K=2)
    for _ in range(7):
        loss.differentiable_loss(model, guide).backward()
        for name in draws:
            leaf = pyro.param(name).unconstrained()
            draws[name].append(leaf.grad.double())
            leaf.grad = None
    stacked = {name: torch.stack(values) for name, values in draws.items()}
    for name, values in stacked.items():
        torch.testing.assert_close(result.mean[name], values.mean(0))
        torch.testing.assert_close(result.std[name], values.std(0))
    for group, names in ((result.model, ["loc"]), (result.guide, ["shift", "scale"])):
        assert sorted(group.names) == sorted(names)
        values = torch.cat([stacked[name].reshape(7, -1) for name in names], 1)
        mean, std = values.mean(0), values.std(0)
        assert group.elementwise == pytest.approx((mean.abs() / std).mean().item())
        assert group.norm == pytest.approx((mean.norm() / std.square().sum().sqrt()).item())


def vars_of(loss):
    return {"K": loss.bound.K, "estimator": loss.estimator}


def test_welford_keeps_digits_that_a_sum_of_squares_loses():
    def offset():
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    def steep():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.factor("f", pyro.param("a", torch.tensor(0.0, dtype=torch.float64)) * (1e9 + z))

    result = gradient_snr(MIWAE_ELBO(M=1, K=1), steep, offset, num_draws=400, progress=False)
    assert result.std["a"].item() == pytest.approx(1.0, abs=0.2)
    assert result.mean["a"].item() == pytest.approx(-1e9, abs=100)


def test_zero_and_constant_gradients():
    def constant():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", 3 * pyro.param("steady", torch.tensor([1.0, 2.0])).sum())
        pyro.factor("g", 0 * pyro.param("dead", torch.tensor(1.0)))
        pyro.param("unreached", torch.tensor([1.0]))

    def prior():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    result = gradient_snr(IWAE_ELBO(K=2), constant, prior, num_draws=5, progress=False)
    assert result.mean["steady"].tolist() == [-3.0, -3.0]
    assert result.std["steady"].tolist() == [0.0, 0.0]
    assert result.snr["steady"].tolist() == [math.inf, math.inf]
    assert result.snr["dead"].item() == 0
    assert result.snr["unreached"].tolist() == [0.0]
    assert result.model.norm == result.model.elementwise == math.inf
    assert result.guide.names == ()
    assert math.isnan(result.guide.elementwise)
    assert math.isnan(result.guide.norm)


class Numbered(Trace_ELBO):
    """Knows which draw it is at."""

    draw = 0

    def differentiable_loss(self, *args, **kwargs):
        self.draw += 1
        return super().differentiable_loss(*args, **kwargs)


def test_a_parameter_of_some_draws_alone_has_zero_gradient_in_the_others():
    loss = Numbered()

    def sometimes():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", pyro.param("a", torch.tensor(1.0)))
        if loss.draw in (3, 4, 6):
            pyro.factor("g", 2 * pyro.param("b", torch.tensor(1.0)))

    def prior():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    result = gradient_snr(loss, sometimes, prior, num_draws=6, progress=False)
    assert result.mean["b"].item() == -1
    assert result.std["b"].item() == pytest.approx((6 / 5) ** 0.5)
    assert result.model.names == ("a", "b")


def test_tied_parameters_count_in_both():
    def tied_model():
        loc = pyro.param("shared", torch.tensor(1.0))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, pyro.param("noise", torch.tensor(1.0))), obs=torch.tensor(2.0))

    def tied_guide():
        pyro.sample("z", dist.Normal(pyro.param("shared", torch.tensor(1.0)) / 2, 1.0))

    result = gradient_snr(IWAE_ELBO(K=2), tied_model, tied_guide, num_draws=50, progress=False)
    assert sorted(result.model.names) == ["noise", "shared"]
    assert result.guide.names == ("shared",)
    assert result.guide.elementwise == pytest.approx(result.snr["shared"].item())
    assert result.guide.norm == pytest.approx(result.snr["shared"].item())


@pytest.mark.parametrize("kind", [AutoNormal, AutoNormalMessenger])
def test_autoguides(kind):
    auto = kind(model)
    result = gradient_snr(MIWAE_ELBO(M=2, K=1), model, auto, num_draws=5, progress=False)
    assert result.model.names == ("loc",)
    assert len(result.guide.names) == 2
    assert "loc" not in result.guide.names


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    layer.eval()

    def net():
        pyro.module("layer", layer)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(layer(z), 1.0).to_event(1), obs=torch.ones(1))

    def prior():
        pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    result = gradient_snr(IWAE_ELBO(K=2), net, prior, num_draws=3, progress=False)
    assert list(result.mean) == ["layer$$$weight"]
    assert result.mean["layer$$$weight"].shape == (1, 1)


class LocalModel(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.3, 0.0, -1.0]))

    def forward(self):
        with pyro.plate("data", len(DATA)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=DATA)


class LocalGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.1, 0.7, -0.2]))
        self.scale = PyroParam(torch.tensor(SCALE), constraint=dist.constraints.positive)

    def forward(self):
        with pyro.plate("data", len(DATA)):
            pyro.sample("z", dist.Normal(DATA / 2 + self.shift, self.scale).to_event(1))


@pytest.mark.parametrize("local", [True, False])
def test_modules_with_local_and_global_parameters(local):
    pyro.set_rng_seed(5)
    expected = gradient_snr(IWAE_ELBO(K=3), model, guide, num_draws=6, progress=False)
    pyro.clear_param_store()
    pyro.settings.set(module_local_params=local)
    pyro.set_rng_seed(5)
    result = gradient_snr(IWAE_ELBO(K=3), LocalModel(), LocalGuide(), num_draws=6, progress=False)
    assert set(result.mean) == {"loc", "shift", "scale"}
    for name, mean in expected.mean.items():
        torch.testing.assert_close(result.mean[name], mean)
        torch.testing.assert_close(result.std[name], expected.std[name])
    assert result.model.names == ("loc",)
    assert sorted(result.guide.names) == ["scale", "shift"]
    assert len(pyro.get_param_store()) == (0 if local else 3)


def test_two_local_parameters_of_one_name_are_refused():
    class Clash(LocalGuide):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3))

        def forward(self):
            with pyro.plate("data", len(DATA)):
                pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))

    pyro.settings.set(module_local_params=True)
    with pytest.raises(ValueError, match="each have a parameter named 'loc'"):
        gradient_snr(IWAE_ELBO(K=2), LocalModel(), Clash(), num_draws=2, progress=False)


def test_nothing_is_touched(capfd):
    seen = []

    def schedule(steps):
        seen.append(steps)
        return 0.5

    loss = IWAE_ELBO(K=2, kl_weight=schedule)
    loss.loss_and_grads(model, guide)
    leaves = {name: pyro.param(name).unconstrained() for name in ("loc", "shift", "scale")}
    before = {name: (leaf.detach().clone(), leaf.grad.clone()) for name, leaf in leaves.items()}
    with torch.no_grad():  # which is no obstacle
        gradient_snr(loss, model, guide, DATA, num_draws=4)
        gradient_snr(loss, model, guide, x=DATA, num_draws=4, progress=False)
    assert loss.steps == 1
    assert seen == [0] + [1] * 8
    for name, leaf in leaves.items():
        assert pyro.param(name).unconstrained() is leaf
        assert torch.equal(leaf, before[name][0])
        assert torch.equal(leaf.grad, before[name][1])
    assert capfd.readouterr() == ("", "")


def test_steps_are_restored_after_an_error():
    def broken():
        raise RuntimeError("broken")

    loss = IWAE_ELBO(K=2)
    loss.steps = 5
    with pytest.raises(RuntimeError, match="broken"):
        gradient_snr(loss, broken, guide, num_draws=4, progress=False)
    assert loss.steps == 5


def test_seeded():
    def measure(seed):
        pyro.set_rng_seed(seed)
        return gradient_snr(IWAE_ELBO(K=2), model, guide, num_draws=4, progress=False)

    first, again, other = measure(0), measure(0), measure(1)
    assert all(torch.equal(first.snr[name], again.snr[name]) for name in first.snr)
    assert first.guide == again.guide
    assert first.guide != other.guide
    state = torch.get_rng_state()
    assert measure(0).model == first.model
    assert not torch.equal(torch.get_rng_state(), state)


def test_repr():
    result = gradient_snr(IWAE_ELBO(K=2), model, guide, num_draws=4, progress=False)
    assert repr(result).startswith("GradientSNR(model=")
    assert repr(result).endswith("floor=0.5, num_draws=4)")


@pytest.mark.parametrize("num_draws", [1, 0, -3, 2.0, True])
def test_too_few_draws(num_draws):
    with pytest.raises(ValueError, match="num_draws must be an integer >= 2"):
        gradient_snr(IWAE_ELBO(K=2), model, guide, num_draws=num_draws)


def test_no_parameters():
    def fixed():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="No parameter"):
        gradient_snr(IWAE_ELBO(K=2), fixed, fixed, progress=False)


def test_a_loss_without_differentiable_loss():
    class Opaque:
        def loss_and_grads(self, model, guide):
            return 0.0

    with pytest.raises(ValueError, match="no differentiable_loss"):
        gradient_snr(Opaque(), model, guide)
    if not hasattr(RenyiELBO, "differentiable_loss"):
        with pytest.raises(ValueError, match="no differentiable_loss"):
            gradient_snr(RenyiELBO(num_particles=2), model, guide)


def test_nan_gradients_are_told_of():
    def spoilt():
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        x = pyro.param("spoilt", torch.tensor(0.0))
        pyro.factor("f", z + 0 * x.abs().sqrt())

    def prior():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with (
        pyro.validation_enabled(False),
        pytest.warns(RuntimeWarning, match="Some gradients of 'spoilt' are NaN") as caught,
    ):
        result = gradient_snr(IWAE_ELBO(K=2), spoilt, prior, num_draws=3, progress=False)
    assert caught[0].filename == __file__
    assert result.snr["spoilt"].isnan()
    assert result.snr["loc"].isfinite()
    assert math.isnan(result.model.elementwise)
