"""Discriminators: the optimum of their loss by quadrature, their parameters, and those that are unfit."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import Normal

from pyro_iw import AdversarialSVI, FusedOptim
from pyro_iw.adversarial.discriminators import Discriminators
from pyro_iw.adversarial.pair import Cells

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def model(x: Tensor = X) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.sum(-1))


def guide(x: Tensor = X) -> None:
    weight = pyro.param("weight", torch.ones(3, 2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x @ weight, event_dim=1))


class Quadratic(nn.Module):
    """a + b z + c z², the family that holds the log ratio of two normals."""

    def __init__(self, coefficients: list[float]) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor(coefficients, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(z), z, z * z], -1) @ self.coefficients


def quantiles(of: Normal, size: int = 200_001) -> Cells:
    """Equally likely values: a mean over them is a quadrature of the expectation."""
    levels = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return Cells(of.icdf(levels), None)


P = Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
Q = Normal(*torch.tensor([0.7, 1.3], dtype=torch.float64))


def log_ratio() -> list[float]:
    """The coefficients of log p(z) / q(z)."""
    loc, scale = Q.loc.item(), Q.scale.item()
    return [
        math.log(scale) + loc**2 / (2 * scale**2),
        -loc / scale**2,
        1 / (2 * scale**2) - 1 / 2,
    ]


def test_the_optimum_is_the_log_ratio() -> None:
    best = Quadratic(log_ratio())
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(best(z), P.log_prob(z) - Q.log_prob(z))  # positive for "from the prior"
    discriminators = Discriminators({"z": best})
    loss = discriminators.losses({"z": quantiles(P)}, {"z": quantiles(Q)})["z"]
    (gradient,) = torch.autograd.grad(loss, best.parameters())
    assert gradient.abs().max() < 1e-4
    # There the loss is 2 log 2 - 2 JSD; the divergence by another quadrature, over z.
    grid = torch.linspace(-12, 14, 200_001, dtype=torch.float64)
    p, q = P.log_prob(grid).exp(), Q.log_prob(grid).exp()
    middle = (p + q) / 2
    divergence = torch.trapezoid(p * (p / middle).log() + q * (q / middle).log(), grid) / 2
    assert loss.item() == pytest.approx(2 * math.log(2) - 2 * divergence.item(), abs=1e-5)
    for shift in (-0.3, 0.3):
        for index in range(3):
            other = Quadratic(log_ratio())
            with torch.no_grad():
                other.coefficients[index] += shift
            worse = Discriminators({"z": other}).losses({"z": quantiles(P)}, {"z": quantiles(Q)})["z"]
            assert worse > loss + 1e-3


def test_the_guides_loss_pulls_towards_the_prior() -> None:
    """Along d/dz of -log sigmoid(D), the mean of q goes down to that of p."""
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    values = quantiles(Q).values + shift
    loss = Discriminators({"z": Quadratic(log_ratio())}).guide_losses({"z": Cells(values, None)})["z"]
    (gradient,) = torch.autograd.grad(loss, shift)
    z = quantiles(Q).values
    ratio = (P.log_prob(z) - Q.log_prob(z)).exp()
    slope = -z + (z - Q.loc) / Q.scale**2
    expected = -((1 / (1 + ratio)) * slope).mean()
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-9)
    assert gradient > 0


def test_indistinguishable_classes_cost_log_two_each() -> None:
    discriminators = Discriminators({"z": nn.Linear(2, 1)})
    nn.init.zeros_(discriminators.modules["z"].weight)
    nn.init.zeros_(discriminators.modules["z"].bias)
    cells = {"z": Cells(torch.randn(5, 2), None)}
    assert discriminators.losses(cells, cells)["z"].item() == pytest.approx(2 * math.log(2))
    assert discriminators.guide_losses(cells)["z"].item() == pytest.approx(math.log(2))


# Unfit ones.


class Function(nn.Module):
    def __init__(self, fn: Any, size: int = 2) -> None:
        super().__init__()
        self.linear, self.fn = nn.Linear(size, 1), fn

    def forward(self, z: Tensor) -> Any:
        return self.fn(self.linear(z))


UNFIT = {
    "input": (nn.Linear(3, 1), r"'z' failed on values of shape \(4, 2\).*RuntimeError: mat1 and mat2"),
    "output": (nn.Linear(2, 2), r"'z' has to return one logit a cell, of shape \(4,\) or \(4, 1\).*\(4, 2\)"),
    "mean": (Function(lambda out: out.mean()), r"'z' has to return one logit a cell.*returned \(\)"),
    "tuple": (Function(lambda out: (out, out)), "'z' has to return one logit a cell.*returned tuple"),
    "sigmoid": (nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()), "'z' ends in a sigmoid"),
    "flat sigmoid": (
        nn.Sequential(nn.Linear(2, 1), nn.Sigmoid(), nn.Flatten(0)),
        "'z' ends in a sigmoid",
    ),
    "function": (Function(lambda out: torch.sigmoid(out).squeeze(-1)), "'z' ends in a sigmoid"),
    "log": (Function(nn.functional.logsigmoid), "'z' ends in a sigmoid"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_before_anything_moves(case: str) -> None:
    module, message = UNFIT[case]
    svi = AdversarialSVI(model, guide, {"z": module}, Adam({"lr": 0.1}))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            svi.step()
    assert torch.equal(pyro.param("weight").detach(), torch.ones(3, 2))
    assert module.training


def test_a_sigmoid_within_is_fine() -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.Sigmoid(), nn.Linear(4, 1))
    AdversarialSVI(model, guide, module, Adam({"lr": 0.1})).step()


def test_a_scalar_site_is_hinted_at() -> None:
    def scalar(x: Tensor = X) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def delta(x: Tensor = X) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pyro.param("loc", torch.zeros(4))))

    with pytest.raises(ValueError, match=r"shape \(4,\).*Unflatten"):
        AdversarialSVI(scalar, delta, nn.Linear(1, 1), Adam({"lr": 0.1})).step()


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory: you tried"),
        KeyError(),
    ],
)
def test_errors_that_are_not_its_fault_stay_as_they_are(error: Exception) -> None:
    def fail(_: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error)) as caught:
        AdversarialSVI(model, guide, Function(fail), Adam({"lr": 0.1})).step()
    assert caught.value is error


def test_one_alone_needs_one_site() -> None:
    def several() -> None:
        weight = pyro.param("weight", torch.ones(3, 2))
        with pyro.plate("data", len(X)):
            for name in "zw":
                pyro.sample(name, dist.Delta(X @ weight, event_dim=1))

    with pytest.raises(ValueError, match=r"guide has 2 latent sites \['z', 'w'\]"):
        AdversarialSVI(model, several, nn.Linear(2, 1), Adam({"lr": 0.1})).step()
    with pytest.raises(ValueError, match=r"guide has 0 latent sites \[\]"):
        AdversarialSVI(model, lambda: None, nn.Linear(2, 1), Adam({"lr": 0.1})).step()


@pytest.mark.parametrize("modules", [{}, None, nn.ModuleDict(), [nn.Linear(2, 1)]])
def test_no_discriminators(modules: Any) -> None:
    with pytest.raises(ValueError, match="discriminators has to be a module, or a dict"):
        AdversarialSVI(model, guide, modules, Adam({"lr": 0.1}))


def test_no_module() -> None:
    with pytest.raises(ValueError, match=r"'z' has to be a torch.nn.Module, got builtin"):
        AdversarialSVI(model, guide, {"z": torch.sigmoid}, Adam({"lr": 0.1}))


def test_optimisers_that_cannot_be() -> None:
    adam, critic = Adam({"lr": 0.1}), nn.Linear(2, 1)
    with pytest.raises(ValueError, match="optim and guide_optim are the same optimiser"):
        AdversarialSVI(model, guide, critic, adam, guide_optim=adam)
    other = Adam({"lr": 0.1})
    with pytest.raises(ValueError, match="discriminator_optim and guide_optim are the same"):
        AdversarialSVI(model, guide, critic, adam, discriminator_optim=other, guide_optim=other)
    with pytest.raises(ValueError, match=r"guide_optim has to be an optimiser of pyro\.optim, .* got Adam"):
        AdversarialSVI(model, guide, critic, adam, guide_optim=torch.optim.Adam(critic.parameters()))
    with pytest.raises(ValueError, match="supervised_optim is given without supervised"):
        AdversarialSVI(model, guide, critic, adam, supervised_optim=other)
    for used in (adam, FusedOptim(torch.optim.Adam, {"lr": 0.1})):
        pyro.clear_param_store()
        AdversarialSVI(model, guide, critic, used).step()
        with pytest.raises(ValueError, match="optim has a state already"):
            AdversarialSVI(model, guide, critic, used)
        others = {"discriminator_optim": Adam({"lr": 0.1}), "guide_optim": Adam({"lr": 0.1})}
        AdversarialSVI(model, guide, critic, used, **others).step()


def test_labels_that_cannot_be() -> None:
    def nothing(x: Tensor) -> None:
        pyro.param("weight", torch.ones(3, 2))

    critic = nn.Linear(2, 1)
    svi = AdversarialSVI(model, guide, critic, Adam({"lr": 0.1}))
    for call in (svi.step, svi.evaluate_loss):
        with pytest.raises(ValueError, match="labelled= is given, but no supervised="):
            call(labelled=(X,))
    svi = AdversarialSVI(model, guide, critic, Adam({"lr": 0.1}), supervised=nothing)
    with pytest.raises(ValueError, match=r"labelled has to be a tuple.*got Tensor"):
        svi.step(labelled=X)
    with pytest.raises(ValueError, match="supervised has no observed site"):
        svi.step(labelled=(X,))
    assert torch.equal(pyro.param("weight").detach(), torch.ones(3, 2))


# Parameters.


def test_a_stale_param_store() -> None:
    AdversarialSVI(model, guide, nn.Linear(2, 1), Adam({"lr": 0.1})).step()
    before = pyro.param("weight").detach().clone()
    critic = nn.Linear(2, 1)
    svi = AdversarialSVI(model, guide, critic, Adam({"lr": 0.1}))
    with pytest.raises(
        ValueError, match=r"another parameter 'discriminator.z\$\$\$weight'.*clear_param_store"
    ):
        svi.step()
    assert torch.equal(pyro.param("weight").detach(), before)
    # The way out that the message names.
    pyro.module("discriminator.z", critic, update_module_params=True)
    svi.step()


def test_frozen_parameters_stay() -> None:
    critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    critic[0].requires_grad_(False)
    before = critic[0].weight.clone()
    svi = AdversarialSVI(model, guide, critic, Adam({"lr": 0.1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step()
    assert torch.equal(critic[0].weight, before)
    assert set(svi.get_state()["discriminators"]) == {
        "discriminator.z$$$2.weight",
        "discriminator.z$$$2.bias",
    }


def test_a_trial_leaves_the_random_state_alone() -> None:
    """So that a resumed run, whose first step tries the discriminator again, goes on as the other would."""

    class Noisy(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z + torch.randn(z.shape))

    discriminators = Discriminators({"z": Noisy(2, 1)})
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    discriminators.try_on({"z": Cells(X[:, :2], None)})
    assert torch.equal(torch.randn(3), expected)


def test_module_dict() -> None:
    svi = AdversarialSVI(model, guide, nn.ModuleDict({"z": nn.Linear(2, 1)}), Adam({"lr": 0.1}))
    svi.step()
    assert list(svi.discriminators) == ["z"]
