"""Modes and statistics of networks in adversarial training: who trains, who evaluates, what is normalised."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import Tensor, nn
from torch.nn.functional import softplus

from helpers.autoencoder import (
    PIXELS,
    D,
    Recorder,
    images,
    pair,
    sgd,
    standard_normal,
    with_labels,
)
from pyro_iw import AdversarialSVI


def test_modes_of_the_discriminator() -> None:
    p, x = pair(noise=None), images()
    recorder, frozen = Recorder(), nn.Dropout(0.5).eval()
    critic = nn.Sequential(recorder, frozen, p.critic)
    svi = AdversarialSVI(p.model, p.guide, critic, sgd(0.1))
    svi.step(x)
    recorder.seen.clear()
    svi.step(x)
    assert recorder.seen == [(True, False), (False, True)]
    assert recorder.training
    assert not frozen.training
    recorder.seen.clear()
    svi.evaluate_loss(x)
    assert recorder.seen == [(False, False), (False, False)]


def test_a_discriminators_statistics_are_of_both_classes_in_one_batch() -> None:
    p, x = pair(noise=None), images()
    norm = nn.BatchNorm1d(D, momentum=1.0).double()
    svi = AdversarialSVI(p.model, p.guide, nn.Sequential(norm, p.critic), sgd(0.0))
    torch.manual_seed(5)
    svi.step(x)
    torch.manual_seed(5)
    both = torch.cat([2.0 * standard_normal(len(x)), p.encoder(x).detach()])
    torch.testing.assert_close(norm.running_mean, both.mean(0))
    assert norm.num_batches_tracked == 1


def test_evaluation_changes_nothing() -> None:
    p, x = pair(norm=True), images()
    dropout = nn.Dropout(0.5)

    def guide(x: Tensor) -> None:
        p.guide(dropout(x))

    supervised, labelled = with_labels(p)
    svi = AdversarialSVI(p.model, guide, p.critics, Adam({"lr": 0.1}), supervised=supervised)
    svi.step(x, labelled=labelled)
    modules = [p.encoder, p.decoder, p.critic, dropout]
    p.decoder[1].eval()
    modes = [m.training for module in modules for m in module.modules()]
    before = copy.deepcopy([module.state_dict() for module in modules])
    optimisers = copy.deepcopy(svi.get_state())
    torch.manual_seed(9)
    first = svi.evaluate_loss(x, labelled=labelled)
    torch.manual_seed(9)
    assert svi.evaluate_loss(x, labelled=labelled) == first
    assert modes == [m.training for module in modules for m in module.modules()]
    for old, module in zip(before, modules, strict=True):
        torch.testing.assert_close(module.state_dict(), old, rtol=0, atol=0)
    torch.testing.assert_close(svi.get_state(), optimisers, rtol=0, atol=0)
    # In eval mode: the guide's codes by the running statistics, without dropout.
    encoder = copy.deepcopy(p.encoder).eval()
    torch.manual_seed(9)
    z = encoder(x) + 0.3 * standard_normal(len(x))
    critic = copy.deepcopy(p.critic).eval()
    assert first.guide["z"] == pytest.approx(float(softplus(-critic(z)).mean().detach()))
    expected = nn.functional.cross_entropy(encoder(labelled[0]), labelled[1], reduction="sum")
    assert first.supervised == pytest.approx(float(expected.detach()))


def test_evaluation_of_methods_that_read_their_mode() -> None:
    class Pair(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.seen = nn.Linear(PIXELS, D), []

        def model(self, x: Tensor) -> None:
            self.seen.append(self.training)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1, True).expand(-1, PIXELS), 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            self.seen.append(self.training)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))

    both = Pair()
    svi = AdversarialSVI(both.model, both.guide, nn.Linear(D, 1), sgd(0.1))
    svi.evaluate_loss(images().float())
    assert both.seen
    assert not any(both.seen)
    assert both.training


def test_phases_in_a_users_autocast() -> None:
    """Each sees the parameters as they are then, not as autocast has kept them."""
    torch.manual_seed(1)
    parts = pair()
    for module in (parts.encoder, parts.decoder, parts.critic):
        module.float()
    codes = []

    def guide(x: Tensor) -> None:
        pyro.module("encoder", parts.encoder)
        with pyro.plate("data", len(x)):
            codes.append(parts.encoder(x).float())
            pyro.sample("z", dist.Delta(codes[-1], event_dim=1))

    svi = AdversarialSVI(parts.model, guide, parts.critics, sgd(0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        svi.step(images().float())
    assert not torch.equal(*codes)


@pytest.mark.filterwarnings("ignore")
def test_compiled_networks() -> None:
    """What torch.compile wraps calls no hooks inside: statistics and modes are as without."""
    found = []
    for compiled in (False, True):
        pyro.clear_param_store()
        parts = pair(None, norm=True)
        encoder = parts.encoder
        encode = torch.compile(encoder, backend="eager") if compiled else encoder

        def guide(x: Tensor, encoder: nn.Module = encoder, encode: Callable = encode) -> None:
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(encode(x), event_dim=1))

        svi = AdversarialSVI(parts.model, guide, parts.critics, sgd(0.01))
        torch.manual_seed(3)
        losses = [svi.step(images()) for _ in range(2)]
        losses += [svi.evaluate_loss(images()), svi.step(images())]
        assert encoder[0].training
        assert encoder[0].num_batches_tracked == 3
        found.append((losses, encoder[0].running_mean))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_evaluation_of_a_partial() -> None:
    """A part that is only read, of a module that is hidden in a functools.partial."""
    parts, modes = pair(), []

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = parts.encoder

        def forward(self, x: Tensor, noise: float) -> None:
            pyro.module("encoder", self.encoder)
            modes.append(self.encoder.training)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ self.encoder.weight.T, noise).to_event(1))

    svi = AdversarialSVI(parts.model, functools.partial(Guide(), noise=0.1), parts.critics, sgd(0.1))
    svi.evaluate_loss(images())
    assert modes == [False]
    assert parts.encoder.training


def test_evaluation_refuses_a_discriminator_first() -> None:
    parts = pair()
    svi = AdversarialSVI(parts.model, parts.guide, nn.Sequential(parts.critic, nn.Sigmoid()), sgd(0.1))
    with pytest.raises(ValueError, match="sigmoid"):
        svi.evaluate_loss(images())


def test_evaluation_of_a_closures_module_that_is_not_called() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(PIXELS, D).double()

        def encode(self, x: Tensor) -> Tensor:
            assert not self.training
            return self.linear(x)

    p, net = pair(), Net()
    encode = Net().encode  # a method, likewise

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(net.encode(x) + encode(x), event_dim=1))

    AdversarialSVI(p.model, guide, p.critics, sgd(0.1)).evaluate_loss(images())
    assert net.training


def test_statistics_of_instance_normalisation_follow_once() -> None:
    def statistics(run: Callable) -> Tensor:
        pyro.clear_param_store()
        p = pair(noise=None)
        torch.manual_seed(1)
        norm = nn.InstanceNorm1d(1, track_running_stats=True).double()

        def guide(x: Tensor) -> None:
            pyro.module("encoder", p.encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(p.encoder(norm(x.unsqueeze(1)).squeeze(1)), event_dim=1))

        run(p, guide)
        return norm.running_mean

    once = statistics(lambda p, guide: guide(images()))
    stepped = statistics(lambda p, guide: AdversarialSVI(p.model, guide, p.critics, sgd(0.0)).step(images()))
    assert once.abs().item() > 0
    torch.testing.assert_close(stepped, once)
