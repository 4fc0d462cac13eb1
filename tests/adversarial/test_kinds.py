"""Adversarial training of all kinds of pairs: implicit, discrete, automatic guides; priors of any kind."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoHierarchicalNormalMessenger,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import Tensor, nn

from helpers.autoencoder import (
    PIXELS,
    D,
    images,
    pair,
    sgd,
    values,
)
from pyro_iw import AdversarialSVI


class SwissRoll(dist.TorchDistribution):
    """A prior that can be sampled, and has no density."""

    arg_constraints: dict = {}  # noqa: RUF012
    support = dist.constraints.real_vector
    has_rsample = False

    def __init__(self, size: int) -> None:
        super().__init__(torch.Size([size]), torch.Size([2]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        angle = 3 * math.pi * torch.rand(*sample_shape, *self.batch_shape).sqrt()
        return torch.stack([angle.cos(), angle.sin()], -1) * angle[..., None]


class Samples(dist.Delta):
    """Values of a guide whose density nobody may ask for."""

    def log_prob(self, x: Tensor) -> Tensor:
        raise AssertionError("the guide's density was evaluated")


def test_an_implicit_guide_and_a_prior_without_density() -> None:
    encoder, decoder = nn.Linear(PIXELS + 1, D), nn.Linear(D, PIXELS)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", SwissRoll(len(x)))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            code = encoder(torch.cat([x, noise[:, None]], -1))
            pyro.sample("z", Samples(code, event_dim=1))

    svi = AdversarialSVI(model, guide, nn.Linear(D, 1), Adam({"lr": 0.1}))
    x = images().float()
    before = encoder.weight.detach().clone()
    losses = [svi.step(x).reconstruction for _ in range(60)]
    assert losses[-1] < losses[0] - 5
    assert (encoder.weight - before).abs()[:, -1].min() > 0  # that of the noise, too


@pytest.mark.parametrize(
    "fn", [dist.RelaxedOneHotCategorical, dist.OneHotCategoricalStraightThrough], ids=["relaxed", "straight"]
)
def test_one_hot_guides(fn: Any) -> None:
    encoder, decoder = nn.Linear(PIXELS, 3), nn.Linear(3, PIXELS)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(decoder(y), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        options = {"temperature": torch.tensor(0.5)} if fn is dist.RelaxedOneHotCategorical else {}
        with pyro.plate("data", len(x)):
            pyro.sample("y", fn(logits=encoder(x), **options))

    svi = AdversarialSVI(model, guide, nn.Linear(3, 1), sgd(0.1))
    before = encoder.weight.detach().clone()
    svi.step(images().float())
    assert (encoder.weight - before).abs().min() > 0


@pytest.mark.parametrize(
    "kind",
    [AutoDelta, AutoDiagonalNormal, AutoNormal, AutoNormalMessenger, AutoHierarchicalNormalMessenger],
)
def test_autoguides(kind: Any) -> None:
    """A guide messenger runs the model, and its codes may depend on parameters that are not its own."""
    x = torch.randn(4)

    def model() -> None:
        shift = pyro.param("shift", torch.tensor(0.3))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    critic = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1))
    optims = {"discriminator_optim": sgd(0.0), "guide_optim": sgd(0.1)}
    svi = AdversarialSVI(model, kind(model), critic, sgd(0.0), **optims)
    svi.evaluate_loss()
    before = values()
    svi.step()
    changed = {name for name, value in before.items() if not torch.equal(values()[name], value)}
    assert any("loc" in name or name == "AutoDelta.z" for name in changed)
    assert pyro.param("shift") == before["shift"]
    assert set(svi.get_state()["guide"]) == changed
    assert "shift" in svi.get_state()["reconstruction"]


def test_a_module_pair() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = PyroModule[nn.Linear](D, PIXELS)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = PyroModule[nn.Linear](PIXELS, D)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))

    svi = AdversarialSVI(Model(), Guide(), nn.LazyLinear(1), Adam({"lr": 0.05}))
    x = images().float()
    losses = [svi.step(x).reconstruction for _ in range(50)]
    assert losses[-1] < losses[0]
    assert set(svi.get_state()["guide"]) == {"encoder.weight", "encoder.bias"}
    assert svi.discriminators.keys() == {"z"}


def test_a_mixture_prior_that_knows_labels() -> None:
    """Each cell of class c is drawn from component c, and the discriminator is told the class."""
    p, x = pair(noise=None), images()
    labels = torch.tensor([0, 1, 2, 2, 1, 0])

    def model(x: Tensor, labels: Tensor) -> None:
        pyro.module("decoder", p.decoder)
        with pyro.plate("data", len(x)):
            anyone = pyro.sample("component", dist.Categorical(torch.ones(2)), infer={"is_auxiliary": True})
            component = torch.where(labels == 2, anyone, labels)
            centre = 10.0 * component[:, None].double().expand(-1, D)
            z = pyro.sample("z", dist.Normal(centre, 1e-9).to_event(1))
            pyro.sample("x", dist.Normal(p.decoder(z), 0.7).to_event(1), obs=x)

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.seen = nn.Linear(D + 3, 1).double(), []

        def forward(self, values: Tensor, features: Tensor) -> Tensor:
            self.seen.append((values.detach(), features))
            return self.linear(torch.cat([values, features], -1))[:, 0]

    critic = Critic()
    svi = AdversarialSVI(
        model,
        lambda x, labels: p.guide(x),
        critic,
        sgd(0.1),
        condition=lambda x, labels: nn.functional.one_hot(labels, 3).double(),
    )
    svi.step(x, labels)
    critic.seen.clear()
    svi.step(x, labels)
    (both, features), (_, again) = critic.seen
    assert torch.equal(features, torch.cat([again, again]))
    assert torch.equal(again.argmax(-1), labels)
    known = labels != 2
    torch.testing.assert_close(both[:6][known], 10.0 * labels[known, None].double().expand(-1, D))
    assert set(both[:6].round().flatten().tolist()) <= {0.0, 10.0}


def test_the_priors_own_parameters_stay() -> None:
    p, x = pair(noise=None), images()

    def model(x: Tensor) -> None:
        pyro.module("decoder", p.decoder)
        loc = pyro.param("prior", torch.ones(D, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            assert p.decoder.weight.requires_grad
            graphs.append(z.requires_grad)
            pyro.sample("x", dist.Normal(p.decoder(z), 1.0).to_event(1), obs=x)

    graphs: list[bool] = []
    seen: list[bool] = []
    p.critic.register_forward_pre_hook(lambda _, values: seen.append(values[0].requires_grad))
    svi = AdversarialSVI(model, p.guide, p.critics, Adam({"lr": 0.1}))
    for _ in range(2):
        seen.clear()
        svi.step(x)
    assert seen == [False, True]  # prior draws carry no graph to the discriminator
    assert graphs == [True, True]  # and the decoder runs once a step
    assert pyro.param("prior").tolist() == [1.0, 1.0]


def test_latents_that_only_the_model_has() -> None:
    p, x = pair(noise=None), images()

    def model(x: Tensor, marked: bool) -> None:
        with pyro.plate("data", len(x)):
            infer = {"is_auxiliary": True} if marked else {}
            pyro.sample("component", dist.Categorical(torch.ones(2)), infer=infer)
        p.model(x)

    def guide(x: Tensor, marked: bool) -> None:
        p.guide(x)

    @pyro.poutine.block(hide=["data"])
    def plated(x: Tensor, marked: bool) -> None:
        model(x, marked)

    svi = AdversarialSVI(plated, guide, p.critics, sgd(0.1))
    svi.step(x, marked=True)
    with pytest.warns(UserWarning, match=r"not in the guide: \['component'\]"):
        svi.step(x, marked=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step(x, marked=False)


def test_one_module_for_all_parts() -> None:
    """Registered by guide and model as a whole, it has the discriminator's parameters among the guide's."""
    torch.manual_seed(1)
    whole = nn.ModuleDict(
        {"encoder": nn.Linear(PIXELS, D), "decoder": nn.Linear(D, PIXELS), "critic": nn.Linear(D, 1)}
    ).double()

    def model(x: Tensor) -> None:
        pyro.module("whole", whole)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(whole["decoder"](z), 0.7).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("whole", whole)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(whole["encoder"](x), event_dim=1))

    still = {"optim": sgd(0.0), "discriminator_optim": sgd(0.0), "guide_optim": sgd(0.1)}
    before = copy.deepcopy(whole.state_dict())
    AdversarialSVI(model, guide, whole["critic"], **still).step(images())
    moved = {name for name, value in whole.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"encoder.weight", "encoder.bias"}


def test_a_layer_of_both_guide_and_discriminator() -> None:
    parts, trunk = pair(), nn.Linear(D, D).double()

    def guide(x: Tensor) -> None:
        pyro.module("encoder", parts.encoder)
        pyro.module("trunk", trunk)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(trunk(parts.encoder(x)), event_dim=1))

    before = copy.deepcopy(parts.encoder.state_dict())
    svi = AdversarialSVI(parts.model, guide, nn.Sequential(trunk, parts.critic), sgd(0.1))
    with pytest.raises(ValueError, match=r"depend on parameters of a discriminator.*trunk\$\$\$weight"):
        svi.step(images())
    assert all(torch.equal(value, before[name]) for name, value in parts.encoder.state_dict().items())


def test_a_model_that_handles_exceptions() -> None:
    parts = pair()

    def model(x: Tensor) -> None:
        try:
            parts.model(x)
        except Exception as error:
            raise RuntimeError("in the model") from error

    AdversarialSVI(model, parts.guide, parts.critics, sgd(0.1)).step(images())
