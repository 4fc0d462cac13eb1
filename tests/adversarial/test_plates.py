"""Adversarial training under plates, masks and scales: what is summed, and what counts as a cell."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor, nn
from torch.nn.functional import softplus

from helpers.autoencoder import (
    D,
    Recorder,
    images,
    pair,
    sgd,
    standard_normal,
    with_labels,
)
from pyro_iw import AdversarialSVI


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
