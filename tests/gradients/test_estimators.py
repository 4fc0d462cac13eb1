"""What the reparameterised estimator covers, and that it never gives a silent zero gradient."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_iw import IWAE_ELBO, PIWAE_ELBO, Bound, ImportanceWeightedELBO
from pyro_iw.gradients.estimators import get_estimator
from pyro_iw.gradients.surrogate import Boundary, _without_dust

LOSSES = [IWAE_ELBO(K=4), PIWAE_ELBO(M=2, K=2), IWAE_ELBO(K=4, estimator="reparam")]


def model():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    y = pyro.sample("y", dist.Normal(z, 1.0))
    pyro.sample("x", dist.Normal(y, 1.0), obs=torch.tensor(1.0))


def guide():
    probs = pyro.param("probs", torch.tensor(0.3))
    pyro.sample("z", dist.Bernoulli(probs))
    pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("vectorize", [True, False])
def test_a_discrete_site_is_refused_by_name(loss, vectorize):
    loss = type(loss)(
        **{"K": loss.bound.K} if isinstance(loss, IWAE_ELBO) else {"M": 2, "K": 2},
        estimator=loss.estimator,
        vectorize_particles=vectorize,
    )
    for evaluate in (loss.loss_and_grads, loss.differentiable_loss):
        with pytest.raises(ValueError, match=r"Guide site\(s\) 'z' cannot be reparameterised"):
            evaluate(model, guide)
    assert all(value.unconstrained().grad is None for value in pyro.get_param_store().values())


def test_its_bound_can_still_be_evaluated():
    assert IWAE_ELBO(K=4).loss(model, guide) > 0
    with torch.no_grad():
        assert IWAE_ELBO(K=4).differentiable_loss(model, guide) > 0


def test_rsample_switched_off_counts_as_discrete():
    def detached():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(loc, 1.0).has_rsample_(False))

    def prior():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'z' cannot be reparameterised"):
        IWAE_ELBO(K=2).loss_and_grads(prior, detached)


def test_a_discrete_site_without_parameters_has_no_gradient_to_lose():
    def fixed():
        pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    IWAE_ELBO(K=4).loss_and_grads(model, fixed)
    assert pyro.param("loc").unconstrained().grad != 0


def test_the_boundary_rescales_each_particle_and_leaves_the_value_alone():
    boundary = Boundary()
    raw = torch.randn(3, 2, 4, requires_grad=True)
    z = raw * 1.0
    seen = boundary(z, 1, None)
    assert torch.equal(seen, z)
    ratio = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.5, 1.0]])
    boundary.set_ratio(ratio)
    # z itself also feeds the guide's own density, which must not be rescaled.
    (seen.sum() + 10 * z.sum()).backward()
    torch.testing.assert_close(raw.grad, (ratio + 10).unsqueeze(-1).expand(3, 2, 4))


@pytest.mark.parametrize("autocast", [True, False])
def test_separate_objectives_are_refused_in_float16(autocast):
    """The ratio of the two weights overflows there; the guide's gradient would be NaN or 0."""
    dtype = torch.float32 if autocast else torch.float16

    def half_guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0, dtype=dtype)), 1.0))

    def half_model():
        pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=dtype), 1.0))

    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        with pytest.raises(ValueError, match="float32, float64 or bfloat16"):
            PIWAE_ELBO(M=2, K=2).loss_and_grads(half_model, half_guide)
        IWAE_ELBO(K=4).loss_and_grads(half_model, half_guide)


@pytest.mark.parametrize("shape", ["scalar", "groups"])
def test_a_bound_of_the_wrong_shape_is_refused(shape):
    class Wrong(Bound):
        def value(self, log_w):
            return log_w.mean() if shape == "scalar" else log_w.logsumexp(1)

    def normal():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ValueError, match=r"Wrong\(M=2, K=4\).value\(\) must reduce .* to \[\*cells\] = \[3\]"
    ):
        ImportanceWeightedELBO(Wrong(M=2, K=4)).loss(normal, normal)


def test_an_unknown_estimator_lists_the_known():
    with pytest.raises(ValueError, match=r"one of \['auto', 'dreg', 'ovis', 'reparam', .*, got 'magic'"):
        get_estimator("magic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_too_small_to_matter_are_zero(dtype):
    weights = torch.tensor([1.0, 1e-20, -1e-25, 1e-30, -1e-38], dtype=dtype)
    expected = torch.tensor([1.0, 1e-20, -1e-25, 0.0, 0.0], dtype=dtype)
    assert torch.equal(_without_dust(weights), expected)


class Square(Bound):
    """No bound, but a function whose curvature is known, of one particle too."""

    def value(self, log_w):
        return log_w.square().mean((0, 1))


def test_a_bound_of_ones_own_need_not_be_linear_for_one_particle():
    log_w = torch.tensor([[[0.5, -2.0]]])
    weights = get_estimator("dreg").weights(Square(), log_w[0], log_q_weight=0.5, scale=1.0)
    # V = l ** 2: the weight 2 l less 0.5 times the curvature 2.
    torch.testing.assert_close(weights.path, 2 * log_w[0] - 1)
