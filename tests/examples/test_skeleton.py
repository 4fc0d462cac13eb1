"""What the smaller examples share: the training loop on a model that is known, options and files."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_iw import IWAE_ELBO, MIWAE_ELBO
from shared import skeleton
from shared.options import loss_of

SEEN: list[tuple[Tensor, Tensor]] = []


def model(x: Tensor, y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor, y: Tensor) -> None:
    if torch.is_grad_enabled():  # not where a batch of a new shape is looked at beside the steps
        SEEN.append((x, y))
    loc = pyro.param("loc", torch.tensor(0.0)).detach()
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((loc + x) / 2, 0.5**0.5))  # the exact posterior


def options(**given: float) -> argparse.Namespace:
    return argparse.Namespace(**{"epochs": 1, "learning_rate": 1e-9, **given})


def test_the_bound_is_that_of_a_datapoint() -> None:
    x = torch.randn(7)
    history = skeleton.fit(model, guide, (x, x), IWAE_ELBO(K=3), options(batch_size=3))
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x).mean().item()
    assert history == [pytest.approx(evidence, abs=1e-5)]


def test_every_epoch_sees_each_datapoint_once_and_in_pairs() -> None:
    x = torch.arange(7.0)
    SEEN.clear()
    skeleton.fit(model, guide, (x, 10 * x), IWAE_ELBO(K=2), options(batch_size=3, epochs=2))
    batches = SEEN[-6:]  # before them, the pass that gets to know the pair
    assert [len(batch) for batch, _ in batches] == [3, 3, 1] * 2
    for epoch in (batches[:3], batches[3:]):
        assert sorted(torch.cat([batch for batch, _ in epoch]).tolist()) == x.tolist()
    assert all(torch.equal(10 * one, other) for one, other in batches)
    SEEN.clear()
    skeleton.fit(model, guide, (x, x), IWAE_ELBO(K=2), options())
    assert [len(batch) for batch, _ in SEEN[-1:]] == [7]


def test_it_learns_and_its_steps_shrink() -> None:
    x = 3 + torch.randn(50)
    skeleton.fit(model, guide, (x, x), IWAE_ELBO(K=8), options(epochs=300, learning_rate=0.1))
    assert pyro.param("loc").item() == pytest.approx(x.mean().item(), abs=0.1)
    # One datapoint far away: Adam's steps are of the size of the learning rate, which falls to a tenth.
    pyro.clear_param_store()
    far = torch.full((1,), 1e6)
    skeleton.fit(model, guide, (far, far), IWAE_ELBO(K=1), options(epochs=100, learning_rate=1.0))
    expected = sum(0.1 ** (i / 100) for i in range(1, 101))
    assert pyro.param("loc").item() == pytest.approx(expected, rel=0.02)


def test_options() -> None:
    parser = skeleton.training_parser("First line.\n\nMore.", "results/x", K=3, epochs=50, loss="ciwae")
    args = skeleton.parse(parser, ["--smoke", "-M", "2"], {"epochs": 2, "M": 7})
    assert (args.M, args.K, args.epochs, args.out) == (2, 3, 2, Path("results/smoke/x"))
    assert parser.description == "First line."
    assert repr(loss_of(args)) == "CIWAE_ELBO(K=6, beta=0.5)"
    args = skeleton.parse(parser, ["--loss", "miwae", "--estimator", "dreg"], {"epochs": 2})
    loss = loss_of(args)
    assert isinstance(loss, MIWAE_ELBO)
    assert loss.estimator == "dreg"
    assert args.epochs == 50


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: argparse.Namespace) -> dict:
        return {"khat": [math.inf, -math.inf, 0.5], "error": math.nan, "draw": torch.rand(()).item()}

    args = argparse.Namespace(seed=3, out=tmp_path / "below")
    draws = [
        skeleton.finish(args, "story", run, lambda results: Figure(), lambda results: "a table")["draw"]
        for _ in range(2)
    ]
    assert draws[0] == draws[1]  # seeded
    saved = json.loads((args.out / "story.json").read_text())
    assert saved["khat"] == [None, None, 0.5]
    assert saved["error"] is None
    assert saved["settings"] == {"seed": 3, "out": str(args.out)}
    assert saved["seconds"] >= 0
    assert (args.out / "story.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("a table\n")
