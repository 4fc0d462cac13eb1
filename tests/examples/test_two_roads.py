"""The two roads: likelihood by a grid against quadrature, all columns where they are known, the smoke run."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import two_roads
from matplotlib.image import imread
from scipy.integrate import dblquad

from pyro_iw import AdversarialSVI, aggregated_posterior
from shared import parzen
from shared.datasets import ImageData, heldout_images
from shared.networks import VAE


def small(**changes: Any) -> argparse.Namespace:
    options = {
        "seed": 0,
        "latent": 2,
        "hidden": 5,
        "M": 2,
        "K": 2,
        "epochs": 1,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "nll_particles": 7,
        "parzen_samples": 40,
    }
    return argparse.Namespace(**options, **changes)


def images_of(count: int, seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.rand(2, count, 2, 3, generator=generator)
    return ImageData("few", train, test)


def test_the_grid_against_quadrature() -> None:
    torch.manual_seed(0)
    network = VAE(pixels=3, latent=2, hidden=4)
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.mul_(2.0)
    x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])

    def density(z1: float, z0: float, row: torch.Tensor) -> float:
        with torch.no_grad():
            p = network.decoder(torch.tensor([z0, z1])).sigmoid().double().tolist()
        pixels = math.prod(p[i] if on else 1 - p[i] for i, on in enumerate(row.tolist()))
        return pixels * math.exp(-0.5 * (z0**2 + z1**2)) / (2 * math.pi)

    expected = [math.log(dblquad(density, -6, 6, -6, 6, args=(row,), epsabs=1e-5)[0]) for row in x]
    for spacing in (0.02, 0.2):
        found = two_roads.grid_log_marginal(network, x, spacing).tolist()
        assert found == pytest.approx(expected, abs=1e-4)


def test_columns_of_a_model_whose_pixels_depend_on_nothing() -> None:
    torch.manual_seed(0)
    data, args = images_of(300), small()
    p = torch.linspace(0.2, 0.8, 6)
    # Validation images lie near the samples, held-out ones do not: each would choose another bandwidth.
    data = replace(data, train=p.reshape(2, 3) + 0.05 * torch.randn(300, 2, 3))
    network = VAE(pixels=6, latent=2, hidden=5, mean_image=p)
    with torch.no_grad():
        network.decoder[-1].weight.zero_()
        for head in (network.encoder.loc, network.encoder.log_scale):
            head[-1].weight.zero_()  # the guide is the prior
    heldout = heldout_images(data, 0).flatten(1)
    both = aggregated_posterior(network.model, network.guide, [heldout])["z"]
    found = two_roads.judge(network, both, heldout, data.train.flatten(1), data, args)
    nll = -(heldout * p.log() + (1 - heldout) * (1 - p).log()).sum(1).mean().item()
    for column in ("nll", "nll_grid", "reconstruction"):
        assert found[column] == pytest.approx(nll, abs=1e-4)
    assert found["active_units"] == 0
    assert found["scale"] == 1.0
    assert abs(found["accuracy"] - 0.5) < 4 * found["accuracy_error"]
    assert found["mmd"] == pytest.approx(1000 * both.mmd().squared)
    assert abs(found["mmd"]) < 4 * found["mmd_error"]
    assert found["mmd_p_value"] > 0.001
    # All samples are one and the same: the window is a normal around it.
    means = {}
    for sigma in parzen.BANDWIDTHS:
        for name, images in (("validation", data.train), ("heldout", data.test)):
            squares = (images.flatten(1) - p).square().sum(1) / sigma**2
            log_p = -0.5 * squares - 6 * math.log(sigma) - 3 * math.log(2 * math.pi)
            means[name, sigma] = log_p.mean().item()
    best = max(parzen.BANDWIDTHS, key=lambda sigma: means["validation", sigma])
    assert found["parzen_bandwidth"] == best
    assert best != max(parzen.BANDWIDTHS, key=lambda sigma: means["heldout", sigma])
    assert found["parzen"] == pytest.approx(means["heldout", best], abs=1e-4)


def test_the_tail_of_a_guide_that_is_too_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_roads, "grid_log_marginal", lambda *_: torch.zeros(1))
    data, args = images_of(60), small()
    args.nll_particles = 1000
    network = VAE(pixels=6, latent=2, hidden=5)
    heldout = heldout_images(data, 0).flatten(1)
    shares = {}
    for scale in (0.01, 1.5):
        with torch.no_grad():
            network.decoder[-1].weight.zero_()  # the posterior is the prior
            network.encoder.loc[-1].weight.zero_()
            network.encoder.log_scale[-1].weight.zero_()
            network.encoder.log_scale[-1].bias.fill_(math.log(scale))
        both = aggregated_posterior(network.model, network.guide, [heldout])["z"]
        found = two_roads.judge(network, both, heldout, data.train.flatten(1), data, args)
        assert found["scale"] == pytest.approx(scale)
        shares[scale] = found["khat"]
    assert shares[0.01] > 0.8  # w = exp(e²/2) for a standard normal e: k is 1
    assert shares[1.5] < 0.1  # bounded weights


def test_the_plane_is_that_of_the_largest_variance() -> None:
    torch.manual_seed(0)
    codes = torch.randn(200, 4) @ torch.randn(4, 4) + 3.0
    shown = two_roads.plane(codes)
    eigenvalues = np.linalg.eigvalsh(np.cov(codes.numpy().T))[::-1]
    np.testing.assert_allclose(np.cov(shown.numpy().T), np.diag(eigenvalues[:2]), atol=1e-3)
    assert shown.mean(0).norm() > 0.1  # where the codes lie is shown as well
    assert torch.equal(two_roads.plane(codes[:, :2]), codes[:, :2])
    assert two_roads.plane(codes[:, :1]).shape == (200, 2)


def test_all_roads_see_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    losses = {}

    class Stepper:
        def __init__(self, model: Any, guide: Any, *_: Any, loss: Any = None, **__: Any) -> None:
            self.road = "adversarial" if loss is None else repr(loss)
            losses[self.road] = loss

        def step(self, x: torch.Tensor) -> None:
            seen.setdefault(self.road, []).append(x)

    monkeypatch.setattr(two_roads, "SVI", Stepper)
    monkeypatch.setattr(two_roads, "AdversarialSVI", Stepper)
    data = images_of(20)
    for road in two_roads.ROADS:
        pyro.set_rng_seed(0)
        network = VAE(6, 2, 5)
        assert two_roads.train(road, network, data.train.flatten(1), data, 0, small()) > 0
    assert len(seen) == 4
    first, *others = seen.values()
    assert [len(x) for x in first] == [8, 8, 4]
    assert set(torch.cat(first).unique().tolist()) == {0.0, 1.0}
    for batches in others:
        assert all(torch.equal(a, b) for a, b in zip(first, batches, strict=True))
    assert {loss.num_particles for loss in losses.values() if loss is not None} == {4}


def test_the_other_road_trains_the_same_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Noted(AdversarialSVI):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            made.append(self)

    monkeypatch.setattr(two_roads, "AdversarialSVI", Noted)
    network, data = VAE(6, 2, 5), images_of(20)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    two_roads.train("adversarial", network, data.train.flatten(1), data, 0, small())
    assert made[0].model == network.model
    assert made[0].guide == network.guide
    assert not any(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_the_table_of_several_seeds() -> None:
    runs = [dict.fromkeys([*two_roads.COLUMNS, "accuracy_error"], value) for value in (1.0, 3.0)]
    results = {"roads": {road: {"runs": runs} for road in two_roads.ROADS}, "settings": {"nll_particles": 9}}
    line = two_roads.table(results).splitlines()[2]
    assert line.startswith("| ELBO | 2.000 ± 1.414 | 2.00 ± 1.41 |")


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    exact = two_roads.grid_log_marginal
    monkeypatch.setattr(two_roads, "grid_log_marginal", lambda *args: exact(*args, spacing=0.2))
    results = two_roads.main(["--smoke", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"two_roads.json", "two_roads.png"}
    assert json.loads((tmp_path / "two_roads.json").read_text()) == results
    assert imread(tmp_path / "two_roads.png").std() > 0.05
    assert list(results["roads"]) == list(two_roads.ROADS)
    for found in results["roads"].values():
        (one,) = found["runs"]
        assert all(math.isfinite(one[key]) for key in two_roads.COLUMNS)
        assert 0 <= one["accuracy"] <= 1
        assert len(found["codes"]) == 80
    assert len(results["classes"]) == 80
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("| trained by | two-sample accuracy | MMD² × 1000 | reconstruction |")
    assert "NLL, L_20 | NLL, grid |" in shown[0]
    assert [line.split(" |")[0] for line in shown[2:6]] == ["| ELBO", "| IWAE", "| MIWAE", "| adversarial"]
    assert f"{results['roads']['iwae']['runs'][0]['nll']:.2f}" in shown[3]


def test_without_a_grid_and_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = two_roads.main(["--smoke", "--latent", "3", "--out", str(tmp_path)])
    assert "nll_grid" not in results["roads"]["elbo"]["runs"][0]
    assert "NLL, grid" not in capsys.readouterr().out
    assert imread(tmp_path / "two_roads.png").std() > 0.05
    with pytest.raises(SystemExit, match="validation-size leaves none of 20 images"):
        two_roads.main(["--smoke", "--train-size", "20", "--out", str(tmp_path)])
