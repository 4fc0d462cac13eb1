"""The clock of a loss: what it counts, and what a checkpoint holds of it."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule

from pyro_iw import FIVO_ELBO, IWAE_ELBO, FusedOptim

X = torch.tensor([0.5, -1.0])


class Half(PyroModule):
    """Model and guide in one class."""

    def __init__(self, observed):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(()))
        self.observed = observed

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            if self.observed:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def module(**options):
    loss = IWAE_ELBO(K=3, **options)
    return loss, loss(Half(True), Half(False))


def test_the_state_of_a_module_carries_the_steps(tmp_path):
    loss, elbo = module()
    for _ in range(3):
        elbo(X).backward()
    torch.save(elbo.state_dict(), tmp_path / "elbo.pt")
    again, other = module()
    other.load_state_dict(torch.load(tmp_path / "elbo.pt", weights_only=True))
    assert again.steps == 3
    assert again.kl_weight == 1.0
    # As a part of another module, and of the loss alone, which is all that SVI has.
    outer = torch.nn.ModuleDict({"elbo": module()[1]})
    outer.load_state_dict(torch.nn.ModuleDict({"elbo": elbo}).state_dict())
    assert outer["elbo"].elbo.steps == 3
    for one in (IWAE_ELBO(K=2), FIVO_ELBO(K=2)):
        one.load_state_dict(loss.state_dict())
        assert one.steps == 3
        assert one.state_dict() == {"steps": 3}


def test_counts_the_steps_of_an_optimiser():
    seen = []
    loss, elbo = module(kl_weight=lambda steps: seen.append(steps) or 1.0)
    first, second = (torch.optim.SGD(elbo.parameters(), 0.1) for _ in range(2))
    loss.count_steps_of(second)
    loss.count_steps_of(first)  # and no longer the second's
    for _ in range(2):
        for _ in range(3):
            elbo(X).backward()
        first.step()
        second.step()
    assert seen == [0, 0, 0, 1, 1, 1]
    # A copy has no optimiser to count.
    for other in (copy.deepcopy(elbo).elbo, pickle.loads(pickle.dumps(IWAE_ELBO(K=2)))):
        before = other.steps
        other(Half(True), Half(False))(X).backward()
        assert other.steps == before + 1
    assert loss.steps == 2


def test_a_step_that_a_scaler_leaves_out_does_not_count():
    loss, elbo = module()
    optimizer = torch.optim.SGD(elbo.parameters(), 0.1)
    loss.count_steps_of(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(elbo(X) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert loss.steps == 2


def test_under_svi_every_loss_is_a_step():
    loss, elbo = module()
    with pytest.raises(ValueError, match="Under SVI every loss is a step"):
        loss.count_steps_of(FusedOptim(torch.optim.Adam, {"lr": 0.1}))
    svi = SVI(elbo.model, elbo.guide, FusedOptim(torch.optim.Adam, {"lr": 0.1}), loss=loss)
    svi.step(X)
    svi.evaluate_loss(X)
    assert loss.state_dict() == {"steps": 1}
