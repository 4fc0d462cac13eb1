"""Networks and schedule are those of Burda et al., and a stopped run goes on to the bit."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import deep_vae
import numpy as np
import pyro
import pytest
import torch
from matplotlib.image import imread

from helpers.resuming import flat, run_stopped
from pyro_iw import IWAE_ELBO
from pyro_iw._support import devices
from shared import checkpoint, options
from shared.deep.networks import DeepVAE, KLWarmup, Layer, layer_widths, schedule
from shared.deep.training import Trainer
from shared.networks import VAE

PICTURES = ("samples.png", "reconstructions.png", "learning_curve.png")
FILES = {*PICTURES, "checkpoint.pt", "heldout.npz", "metrics.json"}
# 3 steps an epoch, 8 stages of 15 steps in all; the last batch of an epoch is a small one.
TINY = ["--train-size", "25", "--batch-size", "10", "--test-size", "8", "--nll-particles", "3"]
TINY += ["--epochs-scale", "0.0011", "-K", "2", "--checkpoint-every", "1"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Small networks and no pictures, but in the tests of these."""
    name = request.node.name
    if "full_size" not in name:
        widths = [Layer(6, 8), Layer(4, 5)]
        monkeypatch.setattr(deep_vae, "layer_widths", lambda layers: widths[:layers])
    if "smoke" not in name:
        monkeypatch.setattr(deep_vae, "save_pictures", lambda *_: None)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def training(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind in its checkpoint but for the seconds."""
    leaves = flat(checkpoint.load(folder / "checkpoint.pt", deep_vae.KIND)["training"])
    return {name: leaf for name, leaf in leaves.items() if not name.endswith(("seconds", "since_record/2"))}


# The networks


def count(*widths: int) -> int:
    """Weights and biases of a chain of linear layers."""
    return sum((w_in + 1) * w_out for w_in, w_out in pairwise(widths))


def test_one_layer_is_the_papers() -> None:
    network = DeepVAE(784, layer_widths(1))
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "encoders.0.trunk.0.0.weight": (200, 784),
        "encoders.0.trunk.0.2.weight": (200, 200),
        "encoders.0.loc.0.weight": (50, 200),
        "encoders.0.log_scale.0.weight": (50, 200),
        "output.0.weight": (200, 50),
        "output.2.weight": (200, 200),
        "output.4.weight": (784, 200),
    }
    # 157000 + 40200 + 2 · 10050 in the encoder, 10200 + 40200 + 157584 in the decoder.
    assert sum(p.numel() for p in network.parameters()) == 217_300 + 207_984


def test_two_layers_are_the_papers() -> None:
    network = DeepVAE(784, layer_widths(2))
    parts = {
        "encoders.0": count(784, 200, 200) + 2 * count(200, 100),
        "encoders.1": count(100, 100, 100) + 2 * count(100, 50),
        "decoders.0": count(50, 100, 100) + 2 * count(100, 100),
        "output": count(100, 200, 200, 784),
    }
    assert list(parts.values()) == [237_400, 30_300, 35_400, 217_984]
    for name, number in parts.items():
        assert sum(p.numel() for p in network.get_submodule(name).parameters()) == number
    assert sum(p.numel() for p in network.parameters()) == sum(parts.values())


def test_one_layer_is_the_vae_of_the_other_example() -> None:
    """The same parameters and the same draws give the same bound."""
    torch.manual_seed(0)
    one, deep = VAE(6, latent=3, hidden=4), DeepVAE(6, [Layer(3, 4)])
    deep.encoders[0].load_state_dict(one.encoder.state_dict())
    deep.output.load_state_dict(one.decoder.state_dict())
    x = torch.bernoulli(torch.full((5, 6), 0.5))

    def bound(network: VAE | DeepVAE) -> float:
        torch.manual_seed(1)
        return IWAE_ELBO(K=3).loss(network.model, network.guide, x)

    assert bound(one) == bound(deep)


@pytest.mark.parametrize("layers", [3, 4, 7])
def test_more_layers_grow_narrower(layers: int) -> None:
    widths = layer_widths(layers)
    assert len(widths) == layers
    assert widths[:2] == layer_widths(2)
    for lower, upper in pairwise(widths):
        assert 5 <= upper.latent <= lower.latent
        assert 20 <= upper.hidden <= lower.hidden


def test_initialisation() -> None:
    mean = torch.linspace(0, 1, 784)
    network = DeepVAE(784, layer_widths(2), mean)
    for name, parameter in network.named_parameters():
        if name == "output.4.bias":
            expected = [math.log(p / (1 - p)) for p in mean.double().clamp(0.001, 0.999).tolist()]
            torch.testing.assert_close(parameter.data, torch.tensor(expected))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            # Glorot: uniform within ± sqrt(6 / (fan in + fan out)).
            limit = math.sqrt(6 / sum(parameter.shape))
            assert 0.98 * limit < parameter.abs().max() <= limit
            assert parameter.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)


def test_density_of_two_layers_by_hand() -> None:
    """log p(x, z) - log q(z | x) from the networks alone, for one particle."""
    torch.manual_seed(0)
    network = DeepVAE(6, [Layer(3, 4), Layer(2, 5)]).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.bernoulli(torch.full((5, 6), 0.5, dtype=torch.float64))
    with torch.no_grad():
        particles = IWAE_ELBO(K=1).particles(network.model, network.guide, x)
        z1, z2 = (site.message["value"] for site in particles.sites if site.role == "guide")

        def normal(z: torch.Tensor, loc: Any, scale: Any) -> torch.Tensor:
            scale = torch.as_tensor(scale, dtype=z.dtype)
            densities = -0.5 * ((z - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
            return densities.sum(-1)

        p = network.output(z1).sigmoid()
        log_p = torch.where(x == 1, p, 1 - p).log().sum(-1)
        log_p = log_p + normal(z1, *network.decoders[0](z2)) + normal(z2, 0.0, 1.0)
        log_q = normal(z1, *network.encoders[0](x)) + normal(z2, *network.encoders[1](z1))
    torch.testing.assert_close(particles.log_weights, (log_p - log_q).reshape(particles.log_weights.shape))


def test_bfloat16_is_for_the_networks_in_training_alone() -> None:
    torch.manual_seed(0)
    network = DeepVAE(6, [Layer(3, 4), Layer(2, 5)], bfloat16=True)
    x = torch.ones(5, 6)

    def logits(mode: bool) -> torch.Tensor:
        network.train(mode)
        return network.logits(torch.ones(5, 3))

    exact, rough = logits(False), logits(True)
    assert exact.dtype == rough.dtype == torch.float32
    assert torch.equal(rough, rough.bfloat16().float())
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=0.02, atol=0.02)
    assert math.isfinite(IWAE_ELBO(K=3).loss_and_grads(network.model, network.guide, x))


def test_tf32_is_for_the_run_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(deep_vae, "run", lambda _: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    for name in ("tf32", "float32"):
        with pytest.raises(TypeError):  # of the summary of no results
            deep_vae.main(["--precision", name])
    assert seen == ["high", before]
    assert torch.get_float32_matmul_precision() == before


def test_compile_is_passed_on_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    keywords = []
    monkeypatch.setattr(deep_vae, "make_loss", lambda *_, **given: keywords.append(given))
    for argv in ([], ["--compile"]):
        deep_vae.training_loss(deep_vae.parse_args(argv), 10)
    assert [given.get("compile") for given in keywords] == [None, True]


# The schedule


def test_schedule_is_the_papers() -> None:
    stages = schedule(steps_per_epoch=3000)
    assert [(stage.end - stage.start) // 3000 for stage in stages] == [1, 3, 9, 27, 81, 243, 729, 2187]
    assert stages[-1].end == 3280 * 3000
    assert [stage.start for stage in stages[1:]] == [stage.end for stage in stages[:-1]]
    # The authors' code has these, rounded so.
    rates = [1e-3, 7.2e-4, 5.2e-4, 3.7e-4, 2.7e-4, 1.9e-4, 1.4e-4, 1e-4]
    assert [round(stage.learning_rate, 5) for stage in stages] == pytest.approx(rates)
    assert [(s.end, s.learning_rate) for s in schedule(3000, first=7)] == [
        (2187 * 3000, stages[-1].learning_rate)
    ]


def test_short_schedule_keeps_every_stage() -> None:
    stages = schedule(steps_per_epoch=75, scale=0.01)
    # 0.75, 2.25, 6.75, 20.25, ... steps.
    assert [stage.end - stage.start for stage in stages] == [1, 2, 7, 20, 61, 182, 547, 1640]


def test_learning_rates_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimiser steps with, also right after resuming at the end of a stage or in the middle."""
    rates: list[float] = []
    step = torch.optim.Adam.step

    def noted(self: torch.optim.Adam, *args: Any) -> Any:
        # A step on a parameter of one number is FusedOptim's trial of whether there is a fused kernel.
        if [len(group["params"]) for group in self.param_groups] != [1]:
            rates.extend({group["lr"] for group in self.param_groups})
        assert all(group["eps"] == 1e-4 for group in self.param_groups)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    argv = [*TINY, "--resume", "--out", str(tmp_path)]
    for steps in (3, 9):
        run_stopped(monkeypatch, Trainer, steps, deep_vae.main, argv)
        rates.pop()  # of the step that was not saved
    deep_vae.main(argv)
    stages = schedule(3, 0.0011)
    assert rates == [stage.learning_rate for stage in stages for _ in range(stage.end - stage.start)]


# Whole runs


@pytest.mark.parametrize("loss", options.LOSSES)
def test_smoke(loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = 2 if loss in ("iwae", "piwae") else 1
    argv = ["--smoke", "--loss", loss, "-M", "2", "-K", "3", "--layers", str(layers), "--out", str(tmp_path)]
    metrics = deep_vae.main(argv)
    assert files(tmp_path) == FILES
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    for name in PICTURES:
        assert imread(tmp_path / name).std() > 0.05
    results = metrics["results"]
    assert math.isfinite(results["heldout_nll"])
    # IWAE-64 of 50 draws is IWAE-50, the log evidence itself.
    assert results["iwae_particles"] == 50
    assert results["iwae_bound"] == pytest.approx(-results["heldout_nll"], rel=1e-5)
    assert results["minus_kl"] == pytest.approx(0, abs=1e-4)
    assert 1 <= results["ess"] <= 50
    assert results["units"] == [6, 4][:layers]
    assert all(0 <= a <= b for a, b in zip(results["active_units"], results["units"], strict=True))
    history = metrics["history"]
    assert history[-1]["step"] == results["steps"] == schedule(5, 0.002)[-1].end
    assert history[-1]["heldout_bound"] > history[0]["heldout_bound"]
    assert f"NLL {results['heldout_nll']:.3f}" in capsys.readouterr().out


def test_full_size_networks(tmp_path: Path) -> None:
    results = deep_vae.main([*TINY, "--layers", "2", "--out", str(tmp_path)])["results"]
    assert results["units"] == [100, 50]


@pytest.mark.slow
def test_annealed_chains_beside_the_guide(tmp_path: Path, capsys: Any) -> None:
    sizes = ["--ais", "--ais-images", "3", "--ais-chains", "2", "--ais-temperatures", "3"]
    results = deep_vae.main([*TINY, *sizes, "--out", str(tmp_path)])["results"]
    annealed = results["annealed"]
    assert (annealed["images"], annealed["chains"]) == (3, 2)
    heldout = np.load(tmp_path / "heldout.npz")["log_p"]
    assert annealed["nll_of_guide"] == pytest.approx(-heldout[:3].mean(), rel=1e-5)
    assert annealed["nll"] == pytest.approx(annealed["nll_of_guide"] - annealed["shortfall"], rel=1e-5)
    assert "sandwich, gap" in capsys.readouterr().out


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    images = torch.eye(7)
    network = DeepVAE(7, [Layer(2, 3)])
    trainer = Trainer(network, IWAE_ELBO(K=1), images, binary=True, batch_size=3, seed=0)
    epochs = [torch.cat([trainer.next_batch() for _ in range(3)]) for _ in range(2)]
    assert all(torch.equal(epoch.sum(0), torch.ones(7)) for epoch in epochs)
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("binarisation", ["fresh", "static"])
def test_binarisation(binarisation: str) -> None:
    args = deep_vae.parse_args(["--binarisation", binarisation, "--train-size", "40", "--test-size", "5"])
    _, images, heldout, binary = deep_vae.load_data(args)
    trainer = Trainer(
        DeepVAE(64, [Layer(2, 3)]), IWAE_ELBO(K=1), images, binary=binary, batch_size=40, seed=0
    )
    first, second = (trainer.next_batch().sort(0).values for _ in range(2))
    for bits in (first, second, heldout):
        assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(first, second) == (binarisation == "static")


def test_images_that_are_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    packed = {f"{part}_images": rng.integers(0, 256, (25, 98), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "binarized_mnist.npz", **packed)
    argv = [*TINY, "--data", "binarized-mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    assert deep_vae.main(argv)["settings"]["binarisation"] == "static"
    with pytest.raises(SystemExit, match="bits already"):
        deep_vae.main([*argv, "--binarisation", "fresh"])


# To the bit

CONFIGURATIONS = {
    "one layer": [],
    "two layers, warm-up": ["--layers", "2", "--kl-warmup", "3", "--loss", "piwae", "-M", "2"],
    "static, dreg": ["--binarisation", "static", "--estimator", "dreg"],
    "bfloat16": ["--precision", "bfloat16"],
    "tvo": ["--loss", "tvo", "--partitions", "3", "--learning-rate", "0.01"],
    "compiled": ["--compile"],
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    done: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in done:
            folder = tmp_path_factory.mktemp("whole")
            deep_vae.main([*TINY, *CONFIGURATIONS[name], "--checkpoint-every", "1000", "--out", str(folder)])
            done[name] = training(folder)
        return done[name]

    return get


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name != "compiled"])
@pytest.mark.parametrize("seed", range(3))
def test_resumed_is_uninterrupted(
    name: str, seed: int, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = uninterrupted(name)
    rng = random.Random(f"{name} {seed}")
    # Two stops each, at random steps, with checkpoints every so often.
    argv = [*TINY, *CONFIGURATIONS[name], "--checkpoint-every", str(rng.choice([1, 2, 5]))]
    argv += ["--resume", "--out", str(tmp_path)]
    for steps in sorted(rng.sample(range(1, 13), 2)):
        run_stopped(monkeypatch, Trainer, steps, deep_vae.main, argv)
        torch.manual_seed(rng.randrange(1000))  # another process has another state
    deep_vae.main(argv)
    assert training(tmp_path) == expected


def test_stopped_early_goes_on(uninterrupted: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """A run ends where it is told to, evaluated, and goes on to the bit to the end of the schedule."""
    name = next(iter(CONFIGURATIONS))
    argv = [*TINY, *CONFIGURATIONS[name], "--out", str(tmp_path)]
    early = deep_vae.main([*argv, "--stop-after", "2"])
    assert early["results"]["steps"] == early["history"][-1]["step"] == 6
    deep_vae.main([*argv, "--resume"])
    assert checkpoint.load(tmp_path / "checkpoint.pt", deep_vae.KIND)["training"]["step"] == 15
    assert training(tmp_path) == uninterrupted(name)


@pytest.mark.slow
def test_resumed_is_uninterrupted_when_compiled(
    uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: the step after a start is not a compiled one, and fused sums round in another order."""
    argv = [*TINY, "--compile", "--checkpoint-every", "2", "--resume", "--out", str(tmp_path)]
    run_stopped(monkeypatch, Trainer, 8, deep_vae.main, argv)
    torch.manual_seed(5)
    deep_vae.main(argv)
    expected = uninterrupted("compiled")
    resumed = training(tmp_path)
    assert resumed.keys() == expected.keys()
    for name, leaf in resumed.items():
        if name.startswith("/history"):
            continue
        if isinstance(leaf, list | float):
            torch.testing.assert_close(torch.tensor(leaf), torch.tensor(expected[name]), rtol=1e-4, atol=1e-6)
        else:
            assert leaf == expected[name], name


# Parts of the state, and how to lose each: as if the checkpoint did not have it.
LOSSES_OF_STATE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "random": lambda state: state["random"].update(cpu=torch.Generator().manual_seed(5).get_state()),
    "generator": lambda state: state.update(generator=torch.Generator().manual_seed(0).get_state()),
    "order": lambda state: state.update(order=state["order"].flip(0)),
    "position": lambda state: state.update(position=len(state["order"])),
    "optimiser": lambda state: state.update(optimiser={}),
    "moments": lambda state: next(iter(state["optimiser"].values()))["state"][0]["exp_avg_sq"].mul_(1.5),
    "network": lambda state: state["network"]["output.0.bias"].add_(1e-3),
    "loss_steps": lambda state: state.update(loss_steps=0),
    "step": lambda state: state.update(step=state["step"] - 1),
    "history": lambda state: state.update(history=[]),
    "since_record": lambda state: state.update(since_record=(0.0, 0, 0.0)),
}


@pytest.mark.parametrize("part", [None, *LOSSES_OF_STATE])
def test_every_part_of_the_state_matters(
    part: str | None, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any one of them a resumed run is another one: so the test above would notice."""
    name = "two layers, warm-up"
    argv = [*TINY, *CONFIGURATIONS[name], "--resume", "--out", str(tmp_path)]
    run_stopped(monkeypatch, Trainer, 7, deep_vae.main, argv)  # in the middle of an epoch and of the warm-up
    path = tmp_path / "checkpoint.pt"
    saved = checkpoint.load(path, deep_vae.KIND)
    assert (saved["training"]["step"], saved["training"]["loss_steps"]) == (7, 7)
    if part is not None:
        LOSSES_OF_STATE[part](saved["training"])
    checkpoint.save(path, deep_vae.KIND, saved)
    deep_vae.main(argv)
    assert (training(tmp_path) == uninterrupted(name)) == (part is None)


def test_random_state_is_that_of_all_generators() -> None:
    def draw() -> list[Any]:
        return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]  # noqa: NPY002

    pyro.set_rng_seed(3)
    random.gauss(0, 1)  # which keeps half a pair for later
    state = checkpoint.random_state()
    expected = draw()
    draw()
    checkpoint.restore_random_state(state)
    assert draw() == expected


def test_random_state_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whichever type; where there is one alone, or none, what was saved of others is left out."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    module = types.SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: len(generators),
        get_rng_state=lambda device: generators[device].get_state(),
        set_rng_state=lambda state, device: generators[device].set_state(state),
    )
    for place in devices, checkpoint:
        monkeypatch.setattr(place, "accelerator", lambda: "xpu")
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    state = checkpoint.random_state()
    drawn = [torch.rand(1, generator=generator).item() for generator in generators]
    earlier = {**{key: state[key] for key in ("cpu", "numpy", "python")}, "cuda": state["devices"]}
    for saved in state, earlier:
        checkpoint.restore_random_state(saved)
        assert [torch.rand(1, generator=generator).item() for generator in generators] == drawn
    del generators[1]
    checkpoint.restore_random_state(state)
    assert torch.rand(1, generator=generators[0]).item() == drawn[0]
    monkeypatch.setattr(checkpoint, "accelerator", lambda: None)
    checkpoint.restore_random_state(state)
    assert torch.rand(1, generator=generators[0]).item() != drawn[0]


def test_backward_particles_are_a_setting_of_the_run(tmp_path: Path) -> None:
    argv = [*TINY, "--backward-particles", "1", "--out", str(tmp_path)]
    metrics = deep_vae.main(argv)
    assert metrics["settings"]["backward_particles"] == 1
    with pytest.raises(SystemExit, match="backward_particles 1 \\(now None\\)"):
        deep_vae.main([*TINY, "--out", str(tmp_path), "--resume"])


def test_finished_run_is_only_evaluated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*TINY, "--out", str(tmp_path)]
    first = deep_vae.main(argv)
    monkeypatch.setattr(Trainer, "take_step", lambda _: pytest.fail("trained again"))
    again = deep_vae.main([*argv, "--resume", "--nll-particles", "3"])
    assert again["history"] == first["history"]
    assert again["results"]["heldout_nll"] == first["results"]["heldout_nll"]


def test_kl_weights_right_after_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[float] = []

    def noted(self: KLWarmup, steps: int) -> float:
        weights.append(min(1.0, steps / self.num_steps))
        return weights[-1]

    monkeypatch.setattr(KLWarmup, "__call__", noted)
    argv = [*TINY, "--kl-warmup", "3.33", "--resume", "--out", str(tmp_path)]
    run_stopped(monkeypatch, Trainer, 4, deep_vae.main, argv)
    weights.pop()
    deep_vae.main(argv)
    # 3.33 epochs of 3 steps are 10 steps.
    assert weights == [min(1.0, i / 10) for i in range(schedule(3, 0.0011)[-1].end)]


# Stops


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_after_its_step(
    signum: int, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv = [*TINY, "--checkpoint-every", "1000", "--resume", "--out", str(tmp_path)]
    step = torch.optim.Adam.step
    steps = 0
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(self: torch.optim.Adam, *args: Any) -> Any:
        nonlocal steps
        steps += [len(group["params"]) for group in self.param_groups] != [1]  # else FusedOptim's trial
        if steps == 10:  # in the middle of a step in the middle of the last stage
            os.kill(os.getpid(), signum)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        with pytest.raises(SystemExit) as caught:
            deep_vae.main(argv)
    assert caught.value.code == 130
    assert "--resume" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoint.load(tmp_path / "checkpoint.pt", deep_vae.KIND)["training"]["step"] == 10
    deep_vae.main(argv)
    assert training(tmp_path) == uninterrupted("one layer")


@pytest.mark.slow
def test_killed_process_of_full_size(tmp_path: Path) -> None:
    """SIGKILL at any moment, checkpoints being written all the time."""
    argv = ["--smoke", "-K", "2", "--checkpoint-every", "1", "--resume", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, deep_vae.__file__, *argv, str(killed)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while not (killed / "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.Random(0).uniform(0, 0.2))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    steps = deep_vae.main([*argv, str(whole)])["results"]["steps"]
    assert 1 <= checkpoint.load(killed / "checkpoint.pt", deep_vae.KIND)["training"]["step"] < steps
    deep_vae.main([*argv, str(killed)])
    assert training(killed) == training(whole)


# Damage


def small_run(folder: Path, *more: str) -> dict:
    return deep_vae.main([*TINY, *more, "--out", str(folder)])


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "list", "other program", "one bit"])
def test_damaged_checkpoint(kind: str, tmp_path: Path) -> None:
    small_run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no model\n")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "other program":
        checkpoint.save(path, "another program", {"training": {}})
    elif kind == "one bit":
        weights = checkpoint.load(path, deep_vae.KIND)["training"]["network"]["output.2.weight"]
        content[content.index(weights.numpy().tobytes()) + 2] ^= 1
        path.write_bytes(content)
    damaged = path.read_bytes()
    with pytest.raises(
        SystemExit, match=r"error: .*checkpoint\.pt is no checkpoint of examples/deep_vae\.py"
    ):
        small_run(tmp_path, "--resume")
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "2"], r"layers 1 \(now 2\)"),
        (["--seed", "1"], r"seed 0 \(now 1\)"),
        (["-K", "3"], r"K 2 \(now 3\)"),
        (["--loss", "elbo"], r"loss iwae \(now elbo\)"),
        (["--train-size", "24"], "data_checksum"),
        (["--kl-warmup", "2"], r"kl_warmup None \(now 2"),
        (["--epochs-scale", "1"], "epochs_scale"),
        (["--learning-rate", "0.002"], r"learning_rate 0\.001 \(now 0\.002\)"),
    ],
)
def test_other_settings(more: list[str], message: str, tmp_path: Path) -> None:
    small_run(tmp_path)
    with pytest.raises(SystemExit, match=f"was trained with .*{message}"):
        small_run(tmp_path, *more, "--resume")


def test_checkpoint_of_another_kind_of_device(tmp_path: Path) -> None:
    small_run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    saved = checkpoint.load(path, deep_vae.KIND)
    saved["settings"]["device_type"] = "cuda"
    checkpoint.save(path, deep_vae.KIND, saved)
    with pytest.raises(SystemExit, match=r"device_type cuda \(now cpu\)"):
        small_run(tmp_path, "--resume")


def test_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    small_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="--resume"):
        small_run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, the checkpoint before it is there, and the run goes on from it when there is room."""
    original = getattr(os, call)
    calls = 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 6:  # three checkpoints with their logs
            raise OSError(28, "No space left on device")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, call, full)
        with pytest.raises(SystemExit, match=r"error: cannot write .*checkpoint\.pt .*No space left"):
            small_run(tmp_path)
    assert files(tmp_path) == {"checkpoint.pt", "metrics.json"}
    assert checkpoint.load(tmp_path / "checkpoint.pt", deep_vae.KIND)["training"]["step"] == 3
    assert len(json.loads((tmp_path / "metrics.json").read_text())["history"]) == 3
    small_run(tmp_path, "--resume")


def test_unknown_data_and_unwritable_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        small_run(tmp_path, "--data", "imagenet")
    assert "invalid choice: 'imagenet'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no files of the data set"):
        small_run(tmp_path, "--data", "omniglot", "--data-dir", str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file"):
        small_run(tmp_path / "file")


# The switch


def test_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, switched = tmp_path / "trained", tmp_path / "switched"
    first = small_run(trained, "--loss", "elbo", "-K", "1", "--kl-warmup", "1")
    more = ["--switch-to", "iwae", "-K", "4", "--start-from", str(trained)]
    metrics = small_run(switched, *more)
    for key in ("heldout_nll", "active_units"):
        assert metrics["before_switch"][key] == first["results"][key]
        assert key in metrics["results"]
    assert metrics["before_switch"]["step"] == first["results"]["steps"]
    # The last stage once more: 2187 · 0.0011 · 3 steps at the last learning rate.
    assert metrics["results"]["steps"] == round(2187 * 0.0011 * 3)
    assert [record["learning_rate"] for record in metrics["history"]] == pytest.approx([1e-4] * 3)
    # Adam's moments and the count of steps go on.
    steps = first["results"]["steps"] + metrics["results"]["steps"]
    saved = checkpoint.load(switched / "checkpoint.pt", deep_vae.KIND)
    assert saved["training"]["loss_steps"] == steps
    moments = saved["training"]["optimiser"].values()
    assert {parameter["state"][0]["step"].item() for parameter in moments} == {steps}
    printed = capsys.readouterr().out
    assert f"before the switch: NLL {first['results']['heldout_nll']:.3f}" in printed


def test_switch_is_resumed_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = tmp_path / "trained"
    small_run(trained)
    more = ["--switch-to", "miwae", "-M", "2", "--start-from", str(trained)]
    whole = small_run(tmp_path / "whole", *more)
    run_stopped(monkeypatch, Trainer, 3, deep_vae.main, [*TINY, *more, "--out", str(tmp_path / "stopped")])
    resumed = small_run(tmp_path / "stopped", *more, "--resume")
    assert training(tmp_path / "stopped") == training(tmp_path / "whole")
    assert resumed["before_switch"] == whole["before_switch"]


def test_switch_needs_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = tmp_path / "trained"
    more = ["--switch-to", "miwae", "--start-from", str(trained)]
    with pytest.raises(SystemExit, match=r"error: no file .*checkpoint\.pt"):
        small_run(tmp_path / "switched", *more)
    small_run(trained)
    with pytest.raises(SystemExit, match=r"layers 1 \(now 2\)"):
        small_run(tmp_path / "switched", *more, "--layers", "2")
    with pytest.raises(SystemExit):
        small_run(tmp_path / "switched", *more[:2])
    assert "go together" in capsys.readouterr().err
