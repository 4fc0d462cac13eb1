"""Adversarial training against plain PyTorch, phase by phase and as a whole."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.optim import Adam, PyroOptim
from torch import Tensor, nn
from torch.nn.functional import softplus

from helpers.autoencoder import (
    PIXELS,
    D,
    images,
    moved,
    pair,
    sgd,
    standard_normal,
    values,
    with_labels,
)
from pyro_iw import AdversarialSVI, FusedOptim
from pyro_iw.adversarial import svi as adversarial


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("optimiser", ["adam", "fused"])
def test_steps_equal_a_plain_loop(norm: bool, optimiser: str) -> None:
    # Biases before batch normalisation have a gradient of mere rounding, which Adam must not blow up.
    x, steps, options = images(), 5, {"lr": 0.02, "eps": 1e-3}
    ours, plain = pair(norm=norm), pair(norm=norm)
    kind = PyroOptim if optimiser == "adam" else FusedOptim
    svi = AdversarialSVI(ours.model, ours.guide, ours.critics, kind(torch.optim.Adam, options))
    torch.manual_seed(3)
    found = [svi.step(x) for _ in range(steps)]

    encoder, decoder, critic = plain.encoder, plain.decoder, plain.critic
    both = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], **options)
    of_critic = torch.optim.Adam(critic.parameters(), **options)
    of_encoder = torch.optim.Adam(encoder.parameters(), **options)
    everything = [*encoder.parameters(), *decoder.parameters(), *critic.parameters()]

    def descend(optim: torch.optim.Optimizer, loss: Tensor) -> None:
        for param in everything:
            param.grad = None
        loss.backward()
        optim.step()

    torch.manual_seed(3)
    for losses in found:
        z = encoder(x) + 0.3 * standard_normal(len(x))
        real = 2.0 * standard_normal(len(x))
        residual = (x - decoder(z)) / 0.7
        reconstruction = (residual.square() / 2 + math.log(0.7) + math.log(2 * math.pi) / 2).sum()
        descend(both, reconstruction)

        thrown_away = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        z = torch.func.functional_call(encoder, thrown_away, x) + 0.3 * standard_normal(len(x))
        logits = critic(torch.cat([real, z.detach()]))[:, 0]
        as_real = -torch.log(torch.sigmoid(logits[: len(x)])).mean()
        as_fake = -torch.log(1 - torch.sigmoid(logits[len(x) :])).mean()
        descend(of_critic, as_real + as_fake)

        critic.eval()
        fooled = -torch.log(torch.sigmoid(critic(z)[:, 0])).mean()
        critic.train()
        descend(of_encoder, fooled)

        assert losses.reconstruction == pytest.approx(reconstruction.item(), rel=1e-10)
        assert losses.discriminator["z"] == pytest.approx((as_real + as_fake).item(), rel=1e-10)
        assert losses.guide["z"] == pytest.approx(fooled.item(), rel=1e-10)
    for mine, theirs in [(ours.encoder, encoder), (ours.decoder, decoder), (ours.critic, critic)]:
        for (name, value), other in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=name)
        assert all(module.training for module in mine.modules())


def test_losses_by_their_formulas() -> None:
    """NumPy alone: a deterministic guide, so that the prior's draws are the only noise."""
    p, x = pair(noise=None), images()
    svi = AdversarialSVI(p.model, p.guide, p.critics, sgd(0.1))
    torch.manual_seed(5)
    losses = svi.evaluate_loss(x)
    torch.manual_seed(5)
    real = 2.0 * standard_normal(len(x)).numpy()

    def linear(module: nn.Module, inputs: np.ndarray) -> np.ndarray:
        return inputs @ module.weight.detach().numpy().T + module.bias.detach().numpy()

    data = x.numpy()
    z = linear(p.encoder, data)
    means = linear(p.decoder, z)
    log_density = -((data - means) ** 2) / (2 * 0.49) - 0.5 * np.log(2 * np.pi * 0.49)
    assert losses.reconstruction == pytest.approx(-log_density.sum(), rel=1e-12)

    def probability(codes: np.ndarray) -> np.ndarray:
        logits = linear(p.critic[2], np.tanh(linear(p.critic[0], codes)))
        return 1 / (1 + np.exp(-logits[:, 0]))

    cross_entropy = -np.log(probability(real)).mean() - np.log(1 - probability(z)).mean()
    assert losses.discriminator["z"] == pytest.approx(cross_entropy, rel=1e-12)
    assert losses.guide["z"] == pytest.approx(-np.log(probability(z)).mean(), rel=1e-12)
    assert losses.supervised is None


def test_several_sites() -> None:
    """A categorical and a Gaussian site, each against its own prior, and the sum of both for the guide."""
    p, x = pair(noise=None, classes=3), images()
    svi = AdversarialSVI(
        p.model, p.guide, p.critics, sgd(0.0), discriminator_optim=sgd(0.0), guide_optim=sgd(0.5)
    )
    before = copy.deepcopy(p.encoder)
    torch.manual_seed(5)
    losses = svi.step(x)
    code = before(x)
    fooled = {
        "z": softplus(-p.critics["z"](code[:, :D])).mean(),
        "y": softplus(-p.critics["y"](code[:, D:].softmax(-1))).mean(),
    }
    assert losses.guide == pytest.approx({name: float(loss.detach()) for name, loss in fooled.items()})
    (fooled["z"] + fooled["y"]).backward()
    for old, new in zip(before.parameters(), p.encoder.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old.detach() - 0.5 * old.grad)
    torch.manual_seed(5)
    standard_normal(len(x))
    y = dist.OneHotCategorical(logits=x.new_zeros(len(x), 3)).sample()
    critic = p.critics["y"]
    expected = softplus(-critic(y)).mean() + softplus(critic(code[:, D:].softmax(-1))).mean()
    assert losses.discriminator["y"] == pytest.approx(expected.item())


PHASES = {
    "reconstruction": {"encoder", "decoder"},
    "discriminator": {"discriminator.z"},
    "guide": {"encoder"},
    "supervised": {"encoder"},
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("norm", [False, True])
def test_a_phase_updates_its_own_parameters_alone(phase: str, norm: bool) -> None:
    p, x = pair(norm=norm), images()
    supervised, labelled = with_labels(p)
    optims = {name: sgd(0.1 if name == phase else 0.0) for name in PHASES}
    svi = AdversarialSVI(
        p.model,
        p.guide,
        p.critics,
        optims["reconstruction"],
        discriminator_optim=optims["discriminator"],
        guide_optim=optims["guide"],
        supervised=supervised,
        supervised_optim=optims["supervised"],
    )
    modules = [("encoder", p.encoder), ("decoder", p.decoder), ("discriminator.z", p.critic)]
    before = {f"{m}$$${n}": v.detach().clone() for m, mod in modules for n, v in mod.named_parameters()}
    svi.step(x, labelled=labelled)
    after = values()
    assert before.keys() == after.keys()
    assert moved(before, after) == PHASES[phase]
    # The optimisers have met no others, either.
    state = svi.get_state()
    assert state.keys() == {"reconstruction", "discriminators", "guide", "supervised"}
    for (name, known), of_phase in zip(PHASES.items(), state.values(), strict=True):
        assert {param.split("$$$")[0] for param in of_phase} == known, name


def test_supervised_gradient_and_loss() -> None:
    p, x = pair(noise=None), images()
    supervised, (inputs, labels) = with_labels(p)
    svi = AdversarialSVI(
        p.model,
        p.guide,
        p.critics,
        sgd(0.0),
        supervised=poutine.scale(supervised, 0.5),
        supervised_optim=sgd(0.1),
    )
    before = copy.deepcopy(p.encoder)
    losses = svi.step(x, labelled=(inputs, labels))
    loss = 0.5 * nn.functional.cross_entropy(before(inputs), labels, reduction="sum")
    assert losses.supervised == pytest.approx(float(loss.detach()))
    loss.backward()
    for old, new in zip(before.parameters(), p.encoder.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old.detach() - 0.1 * old.grad)
    assert svi.evaluate_loss(x, labelled=(inputs, labels)).supervised is not None
    assert svi.step(x).supervised is None


def test_gradients_do_not_leak() -> None:
    """What stands in .grad before a step changes nothing, and nothing stands there after it."""
    x, results = images(), []
    for junk in (False, True):
        pyro.clear_param_store()
        p = pair()
        params = [param for m in (p.encoder, p.decoder, p.critic) for param in m.parameters()]
        bystander = nn.Parameter(torch.ones(2))
        bystander.grad = torch.full((2,), 3.0)
        svi = AdversarialSVI(p.model, p.guide, p.critics, Adam({"lr": 0.1}))
        torch.manual_seed(3)
        for _ in range(3):
            if junk:
                for param in params:
                    param.grad = torch.full_like(param, 100.0)
            svi.step(x)
            assert all(param.grad is None for param in params)
        assert bystander.grad.tolist() == [3.0, 3.0]
        results.append(values())
    assert moved(*results) == set()


def test_moments_are_each_phases_own() -> None:
    p, x = pair(), images()
    svi = AdversarialSVI(p.model, p.guide, p.critics, Adam({"lr": 0.1}))
    optims = [svi.optim, svi.discriminator_optim, svi.guide_optim]
    assert len({id(optim) for optim in optims}) == 3
    svi.step(x)
    state = svi.get_state()
    first, second = (
        state[phase]["encoder$$$weight"]["state"][0]["exp_avg"] for phase in ("reconstruction", "guide")
    )
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_discriminator_that_wins_leaves_gradients(sign: float) -> None:
    """With logits of 1e4 and more, also in single precision."""
    encoder = nn.Linear(PIXELS, D)

    class Certain(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return sign * (1e4 + values.sum(-1))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.sum(-1))

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(encoder(x), event_dim=1))

    svi = AdversarialSVI(model, guide, Certain(), sgd(0.0), guide_optim=sgd(1.0))
    before, x = encoder.bias.detach().clone(), images().float()
    losses = svi.step(x)
    step = encoder.bias.detach() - before
    if sign > 0:  # fooled for good: nothing to do
        assert losses.guide["z"] == 0
        assert torch.equal(step, torch.zeros(D))
    else:
        assert losses.guide["z"] == pytest.approx(1e4, rel=1e-2)
        torch.testing.assert_close(step, torch.full((D,), -1.0))
    assert math.isfinite(losses.discriminator["z"])


def test_nothing_is_read_off_the_device_before_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to read: any attempt is an error."""
    where = torch.device("meta")
    encoder, decoder, label = (
        nn.Linear(*sizes, device=where) for sizes in [(PIXELS, D), (D, PIXELS), (D, 3)]
    )
    critic = nn.Sequential(
        nn.Linear(D, 4, device=where), nn.BatchNorm1d(4, device=where), nn.Dropout(), nn.ReLU()
    )
    critic.append(nn.Linear(4, 1, device=where))
    reports: list[Any] = []
    monkeypatch.setattr(adversarial, "_report", lambda *losses: reports.append(losses))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), device=where):
            z = pyro.sample("z", dist.Normal(torch.zeros(D, device=where), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), device=where):
            pyro.sample("z", dist.Normal(encoder(x), 0.1).to_event(1))

    def supervised(x: Tensor, y: Tensor) -> None:
        pyro.module("label", label)
        pyro.module("encoder", encoder)
        with pyro.plate("labelled", len(x), device=where):
            pyro.sample("y", dist.Categorical(logits=label(encoder(x))), obs=y)

    x, y = torch.randn(6, PIXELS, device=where), torch.zeros(6, dtype=torch.long, device=where)
    with pyro.validation_enabled(False):
        svi = AdversarialSVI(model, guide, critic, Adam({"lr": 0.1}), supervised=supervised)
        svi.step(x, labelled=(x, y))
        svi.evaluate_loss(x, labelled=(x, y))
        assert len(reports) == 2
        monkeypatch.undo()
        with pytest.raises(NotImplementedError, match="no data"):
            svi.evaluate_loss(x)


@pytest.mark.parametrize("kind", [PyroOptim, FusedOptim])
def test_resume(kind: Any) -> None:
    """Four steps at once equal two and, from their state, two more; also where moments are there already."""
    x = images()

    def start() -> tuple[SimpleNamespace, AdversarialSVI, Any]:
        pyro.clear_param_store()
        p = pair()
        supervised, labelled = with_labels(p)
        optim = kind(torch.optim.Adam, {"lr": 0.1})
        return p, AdversarialSVI(p.model, p.guide, p.critics, optim, supervised=supervised), labelled

    def advance(svi: AdversarialSVI, labelled: Any, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(2):
            svi.step(x, labelled=labelled)

    p, svi, labelled = start()
    advance(svi, labelled, 1)
    modules = copy.deepcopy([m.state_dict() for m in (p.encoder, p.decoder, p.critic)])
    state = copy.deepcopy(svi.get_state())
    advance(svi, labelled, 2)
    expected = values()
    for stale in (False, True):
        p, svi, labelled = start()
        if stale:
            advance(svi, labelled, 8)
        for module, saved in zip((p.encoder, p.decoder, p.critic), modules, strict=True):
            module.load_state_dict(saved)
        svi.set_state(copy.deepcopy(state))
        assert {phase: set(names) for phase, names in svi.get_state().items()} == {
            phase: set(names) for phase, names in state.items()
        }
        advance(svi, labelled, 2)
        torch.testing.assert_close(values(), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="phases"):
        AdversarialSVI(p.model, p.guide, p.critics, Adam({"lr": 0.1})).set_state(state)


@pytest.mark.slow
def test_the_aggregated_posterior_becomes_the_prior() -> None:
    """Data of one lump, a prior of five: classifiers can hardly tell codes of unseen data from prior draws.

    Accuracies are of 4000 test values, with a standard error of 0.008 about chance, 0.5. They end below 0.58,
    and below 0.55 after twice as many steps.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(1)
    mixing, size, steps = torch.randn(2, 10, generator=generator), 4000, 1000
    angles = 2 * math.pi * torch.arange(5) / 5
    centres = 2 * torch.stack([angles.cos(), angles.sin()], -1)

    def data() -> Tensor:
        lump = torch.randn(size, 2, generator=generator)
        return torch.tanh(0.7 * lump @ mixing) + 0.05 * torch.randn(size, 10, generator=generator)

    def network(inputs: int, outputs: int) -> nn.Module:
        hidden = 64
        return nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs),
        )

    train, test = data(), data()
    encoder, decoder = network(10, 2), network(2, 10)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            which = pyro.sample("component", dist.Categorical(torch.ones(5)), infer={"is_auxiliary": True})
            z = pyro.sample("z", dist.Normal(centres[which], 0.4).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.2).to_event(1))

    def accuracies() -> list[float]:
        with torch.no_grad():
            codes, draws = (poutine.trace(fn).get_trace(test).nodes["z"]["value"] for fn in (guide, model))
        values, labels = torch.cat([codes, draws]).numpy(), np.repeat([0, 1], size)
        order = np.random.default_rng(0).permutation(2 * size)
        fit, score = order[:size], order[size:]
        return [
            classifier.fit(values[fit], labels[fit]).score(values[score], labels[score])
            for classifier in (KNeighborsClassifier(30), HistGradientBoostingClassifier(max_iter=50))
        ]

    assert min(accuracies()) > 0.8
    adam = {"lr": 1e-3, "betas": (0.5, 0.9)}
    svi = AdversarialSVI(model, guide, network(2, 1), FusedOptim(torch.optim.Adam, adam))
    optims = [svi.optim, svi.discriminator_optim, svi.guide_optim]
    svi.step(train)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optim.optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
        for optim in optims
    ]
    for _ in range(steps):
        svi.step(train[torch.randint(size, (256,))])
        for scheduler in schedulers:
            scheduler.step()
    assert max(accuracies()) < 0.6
    with torch.no_grad():
        error = (decoder(encoder(test)) - test).square().mean()
    assert error < 0.1 * test.var(0).mean()


def test_nothing_is_updated_silently_without_gradients() -> None:
    p = pair()
    svi = AdversarialSVI(p.model, p.guide, p.critics, sgd(0.1))
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(ValueError, match=r"gradients are off .* evaluate_loss"):
            svi.step(images())


def test_a_state_is_taken_up_whole() -> None:
    """Moments of later steps do not stay behind those of an earlier state."""
    x = images()
    for kind in (PyroOptim, FusedOptim):
        pyro.clear_param_store()
        p = pair(noise=None)
        svi = AdversarialSVI(p.model, p.guide, p.critics, kind(torch.optim.Adam, {"lr": 0.1}))
        start = copy.deepcopy(svi.get_state())
        assert all(not states for states in start.values())
        svi.step(x)
        svi.set_state(start)
        assert svi.get_state() == start
