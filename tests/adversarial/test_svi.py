"""Adversarial training against plain PyTorch, phase by phase and as a whole."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
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
from pyro.optim import Adam, PyroOptim
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_iw import AdversarialSVI, FusedOptim
from pyro_iw.adversarial import svi as adversarial

D, PIXELS = 2, 5


def pair(noise: float | None = 0.3, norm: bool = False, classes: int = 0) -> SimpleNamespace:
    """A small autoencoder in double precision: linear, with batch normalisation and dropout if asked for."""
    torch.manual_seed(1)
    encoder, decoder = nn.Linear(PIXELS, D + classes), nn.Linear(D + classes, PIXELS)
    critic: nn.Module = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 1))
    if norm:
        encoder = nn.Sequential(nn.BatchNorm1d(PIXELS), encoder)
        decoder = nn.Sequential(decoder, nn.BatchNorm1d(PIXELS))
        critic = nn.Sequential(
            nn.Linear(D, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 1)
        )
    for module in (encoder, decoder, critic):
        module.double()
    critics: Any = {"z": critic}
    if classes:
        critics["y"] = nn.Linear(classes, 1).double()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 2.0).to_event(1))
            if classes:
                y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(classes)))
                z = torch.cat([z, y], -1)
            pyro.sample("x", dist.Normal(decoder(z), 0.7).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            code = encoder(x)
            loc = code[:, :D]
            fn = dist.Delta(loc, event_dim=1) if noise is None else dist.Normal(loc, noise).to_event(1)
            pyro.sample("z", fn)
            if classes:
                pyro.sample("y", dist.Delta(code[:, D:].softmax(-1), event_dim=1))

    return SimpleNamespace(
        model=model, guide=guide, encoder=encoder, decoder=decoder, critics=critics, critic=critic
    )


def images(size: int = 6, seed: int = 2) -> Tensor:
    return torch.randn(size, PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sgd(lr: float) -> PyroOptim:
    return PyroOptim(torch.optim.SGD, {"lr": lr})


def values() -> dict[str, Tensor]:
    """All parameters there are."""
    return {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The modules whose parameters have changed."""
    return {name.split("$$$")[0] for name in after if not torch.equal(before[name], after[name])}


def standard_normal(size: int) -> Tensor:
    shape = (size, D)
    return torch.normal(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))


# Whole steps against a loop written by hand.


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


# Each phase by itself.

PHASES = {
    "reconstruction": {"encoder", "decoder"},
    "discriminator": {"discriminator.z"},
    "guide": {"encoder"},
    "supervised": {"encoder"},
}


def with_labels(p: SimpleNamespace) -> tuple[Callable, tuple[Tensor, Tensor]]:
    def supervised(x: Tensor, y: Tensor) -> None:
        pyro.module("encoder", p.encoder)
        with pyro.plate("labelled", len(x)):
            pyro.sample("label", dist.Categorical(logits=p.encoder(x)), obs=y)

    return supervised, (images(4, seed=7), torch.tensor([0, 1, 1, 0]))


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


# Modes, running statistics, and what an evaluation leaves alone.


class Recorder(nn.Module):
    """Passes on what it gets, and notes its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, values: Tensor) -> Tensor:
        self.seen.append((self.training, values.requires_grad))
        return values


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


# Plates, scales and masks.


def test_subsampling_scales_the_reconstruction_alone() -> None:
    """Half of the data: twice the reconstruction, means of the codes; one minibatch for the whole step."""
    p, x = pair(noise=None), images(8)
    seen: list[list[int]] = []

    def subsampled(fn: str) -> Callable:
        def run(x: Tensor) -> None:
            module = p.encoder if fn == "guide" else p.decoder
            pyro.module("encoder" if fn == "guide" else "decoder", module)
            with pyro.plate("data", len(x), subsample_size=4) as index:
                seen.append(index.tolist())
                if fn == "guide":
                    pyro.sample("z", dist.Delta(p.encoder(x[index]), event_dim=1))
                else:
                    prior = dist.Normal(index[:, None].double().expand(-1, D), 1e-6).to_event(1)
                    z = pyro.sample("z", prior)
                    pyro.sample("x", dist.Normal(p.decoder(z), 1.0).to_event(1), obs=x[index])

        return run

    svi = AdversarialSVI(subsampled("model"), subsampled("guide"), p.critics, sgd(0.0))
    losses = svi.step(x)
    assert len(seen) == 4  # guide, prior, model, guide
    assert all(indices == seen[0] for indices in seen)
    index = torch.tensor(seen[0])
    code = p.encoder(x[index])
    log_density = dist.Normal(p.decoder(code), 1.0).log_prob(x[index]).sum()
    assert losses.reconstruction == pytest.approx(-2 * float(log_density.detach()))
    critic = p.critic
    real = softplus(-critic(index[:, None].double().expand(-1, D))).mean()
    assert losses.discriminator["z"] == pytest.approx(float((real + softplus(critic(code)).mean()).detach()))
    first = set(seen[0])
    for _ in range(10):
        svi.step(x)
    assert any(set(indices) != first for indices in seen)


def test_the_supervised_phase_draws_its_own_minibatch() -> None:
    """A plate of its own may bear the name of the pair's."""
    p, x = pair(noise=None), images(12)
    seen: dict[str, list[Any]] = {"pair": [], "supervised": []}

    def minibatch(fn: Callable, name: str) -> Callable:
        def run(*args: Tensor) -> None:
            with pyro.plate("all", 12, subsample_size=3, dim=-2) as index:
                seen[name].append(index.tolist())
            fn(*args)

        return run

    supervised, labelled = with_labels(p)
    svi = AdversarialSVI(
        minibatch(p.model, "pair"),
        minibatch(p.guide, "pair"),
        p.critics,
        sgd(0.1),
        supervised=minibatch(supervised, "supervised"),
    )
    for _ in range(3):
        svi.step(x, labelled=labelled)
    svi.evaluate_loss(x, labelled=labelled)
    assert len(seen["supervised"]) == 5  # with the trial, which takes the pair's noise and gives it back
    assert not any(index in seen["pair"] for index in seen["supervised"][1:])


def test_nested_plates_and_user_scale() -> None:
    critic = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(3, 4)

    def model() -> None:
        with pyro.plate("columns", 4, dim=-1), pyro.plate("rows", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        loc = pyro.param("loc", torch.randn(3, 4))
        with pyro.plate("columns", 4, dim=-1), pyro.plate("rows", 3, dim=-2):
            pyro.sample("z", dist.Delta(loc))

    scaled = [poutine.scale(fn, 0.1) for fn in (model, guide)]
    svi = AdversarialSVI(*scaled, critic, sgd(0.1))
    losses = svi.evaluate_loss()
    loc = pyro.param("loc").detach()
    assert losses.reconstruction == pytest.approx(float(-0.1 * dist.Normal(loc, 1.0).log_prob(x).sum()))
    assert losses.guide["z"] == pytest.approx(float(softplus(-critic(loc.reshape(12))).mean().detach()))
    svi.step()


@pytest.mark.parametrize("how", ["poutine", "distribution"])
def test_masked_cells_count_in_neither_class(how: str) -> None:
    p, x = pair(noise=None), images()
    keep = torch.tensor([True, False, True, True, False, True])
    recorder = Recorder()
    sizes: list[int] = []
    recorder.register_forward_hook(lambda _m, _i, out: sizes.append(len(out)))

    def masked(fn: Any) -> Any:
        return fn.mask(keep) if how == "distribution" else fn

    def model(x: Tensor) -> None:
        pyro.module("decoder", p.decoder)
        with pyro.plate("data", len(x)), poutine.mask(mask=keep if how == "poutine" else True):
            z = pyro.sample("z", masked(dist.Normal(x.new_zeros(D), 2.0).to_event(1)))
            pyro.sample("x", masked(dist.Normal(p.decoder(z), 0.7).to_event(1)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", p.encoder)
        with pyro.plate("data", len(x)), poutine.mask(mask=keep if how == "poutine" else True):
            # What is masked may be anything.
            code = torch.where(keep[:, None], p.encoder(x), math.nan)
            pyro.sample("z", masked(dist.Delta(code, event_dim=1)))

    with pyro.validation_enabled(False):
        svi = AdversarialSVI(model, guide, nn.Sequential(recorder, p.critic), sgd(0.1))
        torch.manual_seed(5)
        losses = svi.evaluate_loss(x)
        assert sizes[-2:] == [8, 4]  # after the trial
        code = p.encoder(x)[keep]
        torch.manual_seed(5)
        real = 2.0 * standard_normal(len(x))[keep]
        expected = softplus(-p.critic(real)).mean() + softplus(p.critic(code)).mean()
        assert losses.discriminator["z"] == pytest.approx(float(expected.detach()))
        assert losses.guide["z"] == pytest.approx(float(softplus(-p.critic(code)).mean().detach()))
        log_density = dist.Normal(p.decoder(code), 0.7).log_prob(x[keep]).sum()
        assert losses.reconstruction == pytest.approx(-float(log_density.detach()))


def test_all_masked() -> None:
    p, x = pair(norm=True), images()
    masked = [poutine.mask(fn, mask=torch.zeros(len(x), dtype=torch.bool)) for fn in (p.model, p.guide)]
    svi = AdversarialSVI(*masked, p.critics, Adam({"lr": 0.1}))
    before = copy.deepcopy(p.critic.state_dict())
    losses = svi.step(x)
    assert (losses.reconstruction, losses.discriminator, losses.guide) == (0.0, {"z": 0.0}, {"z": 0.0})
    torch.testing.assert_close(p.critic.state_dict(), before, rtol=0, atol=0)


def test_missing_pixels() -> None:
    p, x = pair(noise=None), images()
    known = torch.arange(6) % 2 == 0

    def model(x: Tensor) -> None:
        pyro.module("decoder", p.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(p.decoder(z), 0.7).to_event(1), obs=x, obs_mask=known)

    svi = AdversarialSVI(model, p.guide, p.critics, sgd(0.1))
    log_density = dist.Normal(p.decoder(p.encoder(x)), 0.7).log_prob(x)[known].sum()
    assert svi.step(x).reconstruction == pytest.approx(-float(log_density.detach()))


# Kinds of guides and priors.


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


# The discriminator that wins, and other extremes.


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


# Waiting for the device.


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


# Checkpoints.


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


# What it is for.


@pytest.mark.slow
def test_the_aggregated_posterior_becomes_the_prior() -> None:
    """Data of one lump, a prior of five: classifiers cannot tell the codes of unseen data from prior draws.

    Accuracies are of 4000 test values, with a standard error of 0.008 about chance, 0.5.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(1)
    mixing, size, steps = torch.randn(2, 10, generator=generator), 4000, 2000
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
    assert max(accuracies()) <= 0.55
    with torch.no_grad():
        error = (decoder(encoder(test)) - test).square().mean()
    assert error < 0.1 * test.var(0).mean()


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


def test_a_model_that_handles_exceptions() -> None:
    parts = pair()

    def model(x: Tensor) -> None:
        try:
            parts.model(x)
        except Exception as error:
            raise RuntimeError("in the model") from error

    AdversarialSVI(model, parts.guide, parts.critics, sgd(0.1)).step(images())


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
