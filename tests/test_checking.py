"""What ``check`` says of a pair, beside what a step then does."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import nn

import pyro_iw
from pyro_iw import IWAE_ELBO, MIWAE_ELBO, LocallyEnhancedELBO, check

X = torch.tensor([0.5, -1.0, 2.0])


def model(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", 9, len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide(x):
    weight = pyro.param("weight", torch.tensor(0.3))
    with pyro.plate("data", 9, len(x)):
        pyro.sample("z", dist.Normal(weight * x[:, None].expand(3, 2), 0.7).to_event(1))


def switching(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def switch(x):
    logit = pyro.param("logit", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=logit))


def test_sites_and_cells_of_a_minibatch():
    found = check(model, guide, X, loss=MIWAE_ELBO(M=2, K=4))
    assert [(s.role, s.name, s.kind, s.batch_shape, s.event_shape) for s in found.sites] == [
        ("guide", "z", "latent", (3,), (2,)),
        ("model", "z", "latent", (3,), (2,)),
        ("model", "x", "observed", (3,), ()),
    ]
    assert found.cells == {"data": 3}
    assert found.error is None
    assert "data (minibatch)" in str(found)
    assert "weights: one for each index of plate 'data' (3)" in str(found)
    assert set(found.estimators.values()) == {None}
    assert found.seconds > 0
    assert found.seconds_of_one > 0


def test_a_joint_weight_and_its_warning():
    found = check(model_of_all, AutoDiagonalNormal(model_of_all), X)
    assert found.cells == {}
    assert "weights: one joint weight for all sites" in str(found)
    (message,) = found.warnings
    assert "one joint importance weight" in message
    assert f"warning: {message}" in str(found)
    assert (
        check(model_of_all, AutoDiagonalNormal(model_of_all), X, loss=IWAE_ELBO(K=4, plates=())).warnings
        == []
    )


def model_of_all(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_what_a_step_would_raise_is_said_and_which_estimators_do():
    found = check(switching, switch, X)
    with pytest.raises(ValueError, match="cannot be reparameterised") as raised:
        IWAE_ELBO(K=8).loss_and_grads(switching, switch, X)
    assert found.error == f"ValueError: {raised.value}"
    assert f"a step raises {found.error}" in str(found)
    assert "estimators: score, vimco, ovis, rws" in str(found)
    for name, refusal in found.estimators.items():
        loss = IWAE_ELBO(K=8, estimator=name)
        if refusal is None:
            loss.loss_and_grads(switching, switch, X)
        else:
            with pytest.raises(ValueError, match="cannot be reparameterised"):
                loss.loss_and_grads(switching, switch, X)


def test_a_model_that_does_not_run_at_all():
    def broken(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(3)))

    found = check(broken, guide, X)
    assert found.sites == []
    assert "a step raises" in str(found)


def test_it_leaves_things_as_they_are():
    norm = nn.BatchNorm1d(2)

    def normed(x):
        pyro.module("norm", norm)
        loc = norm(x[:, None].expand(3, 2))
        with pyro.plate("data", 9, len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))

    loss = IWAE_ELBO(K=4)
    before, state = norm.running_mean.clone(), torch.get_rng_state()
    check(model, normed, X, loss=loss)
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(param.grad is None for param in norm.parameters())
    assert loss.steps == 0


def test_two_levels_and_what_is_no_loss():
    loss = LocallyEnhancedELBO(local=pyro_iw.bounds.IWAE(4), over="data")
    found = check(model, guide, X, loss=loss)
    assert found.error is None
    assert found.cells == {}
    assert "local weights, given each particle of what is outside: one for each index of plate 'data'" in str(
        found
    )
    with pytest.raises(ValueError, match="loss must be one of"):
        check(model, guide, X, loss=Trace_ELBO())


@pytest.mark.parametrize("where", ["model", "guide"])
def test_what_is_summed_out_is_enumerated(where):
    def mixture(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def its_guide(x):
        with pyro.plate("data", len(x)):
            if where == "guide":
                pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    found = check(mixture, its_guide, X)
    assert found.error is None
    kinds = {(site.role, site.name): site.kind for site in found.sites}
    assert kinds["model", "z"] == kinds["guide", "z"] == "latent"
    assert {kind for (_, name), kind in kinds.items() if name == "c"} == {"enumerated"}
