"""Which steps share a program: arguments, settings, handlers, the param store."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

import pyro_iw.compiling.step as compiled
from helpers.cases import DataPlate
from helpers.compiled import DATA, LOSSES, check_same, compiled_programs, follows
from pyro_iw import CIWAE_ELBO, IWAE_ELBO


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
