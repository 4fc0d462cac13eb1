"""The benchmarks run at smoke size, and measure what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import contestants
import evaluation
import filter_step
import measuring
import memory
import models
import pytest
import step_time
import time_to_nll
import torch
from torch import nn

from pyro_iw import IWAE_ELBO


@pytest.fixture(autouse=True)
def _one_setting_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    for name in ("NPROC", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_DEFAULT_MATMUL_PRECISION"):
        monkeypatch.setenv(name, "")  # so that what is set in here is taken back
        monkeypatch.delenv(name)
    yield
    torch.set_num_threads(threads)


def case(model: str, particles: int = 3, batch: int = 4) -> contestants.Case:
    images = step_time.images(batch, 784, torch.device("cpu"))
    return contestants.Case(model, images, particles, learning_rate=1e-8)


# The programs


@pytest.mark.parametrize("validation", ["off", "on"])
def test_step_time(validation: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = step_time.main(["--smoke", "--validation", validation, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "step_time.json").read_text())["results"] == found["results"]
    (result,) = found["results"]
    assert {"PyTorch by hand", "Pyro RenyiELBO", "ours, SVI", "ours, module"} <= result["rows"].keys()
    for name, row in result["rows"].items():
        assert row["check"]["same"], name
        assert 0 < row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2] < math.inf
    assert "MISMATCH" not in capsys.readouterr().out


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    found = memory.main(["--smoke", "--out", str(tmp_path)])["results"]
    assert (tmp_path / "memory.json").exists()
    for way in ("PyTorch by hand", "ours"):
        # At least the logits, and what the loss keeps for its backward pass.
        assert found[way][64]["bytes"] > 2 * 64 * 4 * 784 * 4


def test_memory_stops_below_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten kilobytes a particle, whichever way.
    monkeypatch.setattr(memory, "in_subprocess", lambda way, particles, args: {"bytes": 10_240 * particles})
    argv = ["--out", str(tmp_path), "--particles", "64", "256", "1024", "--cap", str(4e6 / 2**30)]
    found = memory.main(argv)["results"]["ours"]
    assert [found[count].get("bytes") for count in (64, 256, 1024)] == [655_360, 2_621_440, None]
    assert "0.0 GiB foreseen" in found[1024]["skipped"]


def test_time_to_nll(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = time_to_nll.main(["--smoke", "--target", "1000", "--out", str(tmp_path)])
    assert (tmp_path / "time_to_nll.json").exists()
    for (result,) in found["results"].values():
        assert result["seconds"] > 0
        assert math.isfinite(result["nll"])
    assert "s to NLL 1000" in capsys.readouterr().out


def test_time_to_nll_out_of_reach(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    time_to_nll.main(["--smoke", "--target", "0", "--out", str(tmp_path)])
    assert "not reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["--sizes", "20"], ["--sizes", "0x5"], ["--threads", "0"], ["--device", "x"]]
)
def test_bad_arguments(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        step_time.parse_args(argv)
    assert argv[0] in capsys.readouterr().err


# What is compared


@pytest.mark.parametrize("model", models.MODELS)
def test_by_hand_and_for_pyro_are_one_model(model: str) -> None:
    setting = case(model, particles=200, batch=2)
    vae = setting.make()
    with torch.no_grad():
        by_hand = vae.log_weights(setting.x, 200)
        for_pyro = IWAE_ELBO(K=200).particles(vae.model, vae.guide, setting.x).log_weights
    error = (by_hand.var(0) / 200 + for_pyro.var(0) / 200).sqrt()
    assert by_hand.shape == for_pyro.shape == (200, 2)
    assert (by_hand.mean(0) - for_pyro.mean(0)).abs().max() < 5 * error.max()
    # So small a spread that no gradient is denormal, whose arithmetic is several times slower on a CPU.
    assert 0.1 < by_hand.std(0).mean() < 8


def test_log_weights_by_hand() -> None:
    setting = case("two-layer", particles=1, batch=1)
    vae = setting.make()
    torch.manual_seed(5)
    log_w = vae.log_weights(setting.x, 1)
    torch.manual_seed(5)
    first, second = vae.encoder[0].distribution(setting.x), vae.encoder[1]
    z1 = first.rsample((1,))
    z2 = second.distribution(z1).rsample()
    log_q = first.log_prob(z1) + second.distribution(z1).log_prob(z2)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z2).sum(-1)
    log_p = log_p + vae.decoder[0].distribution(z2).log_prob(z1)
    pixels = torch.distributions.Bernoulli(logits=vae.decoder[1](z1))
    torch.testing.assert_close(log_w, log_p + pixels.log_prob(setting.x).sum(-1) - log_q)


@pytest.mark.parametrize("model", models.MODELS)
def test_products_are_those_of_the_layers(model: str) -> None:
    setting = case(model)
    vae, seen = setting.make(), []

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not hasattr(module, "weight"):
            return
        rows = (inputs[0] if isinstance(module, nn.ConvTranspose2d) else output).numel()
        # A dense layer has one row for every vector, a convolution for every position.
        rows //= module.weight.shape[0]
        seen.append((2 * rows * module.weight.numel(), inputs[0].numel(), output.numel()))

    for module in vae.modules():
        module.register_forward_hook(look)
    vae.log_weights(setting.x, setting.particles)
    expected = [
        (2 * product.rows * product.width_in * product.width_out, product.elements_in, product.elements_out)
        for product in vae.products(len(setting.x), setting.particles)
    ]
    assert sorted(seen) == sorted(expected)


def test_work_of_the_one_layer_model() -> None:
    vae = models.OneLayerVAE(pixels=3, hidden=2, latent=1)
    work = measuring.work_of(vae, batch=5, particles=7)
    encoder, decoder = 3 * 2 + 2 * 2 + 2 * 2, 1 * 2 + 2 * 2 + 2 * 3
    # Forward, and backward for weights and inputs, but for that of the data.
    assert work.flops == 2 * (3 * (5 * encoder + 35 * decoder) - 5 * 3 * 2)


def test_wrong_losses_are_marked() -> None:
    setting = case("one-layer")
    contestant = contestants.registry()["PyTorch by hand"]("PyTorch by hand", setting)
    assert step_time.check(contestant, setting, 10, {})["same"]
    step = contestant.step
    contestant.step = lambda: step() * 1.01
    assert not step_time.check(contestant, setting, 10, {})["same"]


def test_quartiles_and_tables() -> None:
    blocks, other = measuring.Blocks([2.0, 4.0, 6.0], []), measuring.Blocks([1.0, 4.0, 2.0], [])
    assert blocks.ratios(other) == (1.5, 2.0, 2.5)
    assert measuring.table(["", "b"], [["one", "2"]]).splitlines() == [
        "|     | b |",
        "|-----|--:|",
        "| one | 2 |",
    ]


def test_filter_step(tmp_path: Path) -> None:
    results = filter_step.main(["--smoke", "--schemes", "systematic", "multinomial", "--out", str(tmp_path)])
    assert len(results) == 5
    assert results["without resampling"]["ratio"].median == 1.0
    saved = json.loads((tmp_path / "filter_step.json").read_text())
    assert set(saved["results"]) == set(results)


def test_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyro_iw.compiling.inductor as inductor_module

    monkeypatch.setattr(inductor_module, "inductor", lambda graph, inputs: lambda args: graph(*args))
    (rows,) = evaluation.main(["--smoke", "--out", str(tmp_path)]).values()
    saved = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert list(*saved.values()) == list(rows)
    assert len(rows) == 5
    means = [row["mean"] for row in rows.values()]
    assert max(means) - min(means) < 5  # nats, of 64 particles
    assert all(row["ratio"].median > 0 for row in rows.values())
