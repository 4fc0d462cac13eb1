"""What a compiled step leaves in gradients and hands to autograd, as an eager one would."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from helpers.cases import DataPlate
from helpers.compiled import SmallVAE, binary, check_same, compiled_programs, pair
from pyro_iw import IWAE_ELBO, MIWAE_ELBO


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
