"""The VAE on several processes: the same training whoever shares the particles, resumed on another number."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_vae
import numpy as np
import pytest
import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helpers.ranks import run_on_ranks
from shared import datasets

SIZES = ["--smoke", "-M", "2", "-K", "4", "--chunk-size", "2"]


def give(images: tuple[np.ndarray, np.ndarray]) -> None:
    """Have the digits at hand: to import what reads them takes a process longer than to train."""
    data = datasets.ImageData("digits", *map(torch.tensor, images))
    datasets.load = lambda *_: data


def one_epoch(rank: int, out: Path, images: tuple) -> dict:
    give(images)
    return distributed_vae.main([*SIZES, "--epochs", "1", "--out", str(out / "resumed")])


def two_epochs(rank: int, out: Path, images: tuple) -> list[dict]:
    give(images)
    return [
        distributed_vae.main([*SIZES, "--particle-ranks", "2", "--out", str(out / "resumed"), "--resume"]),
        distributed_vae.main([*SIZES, "--particle-ranks", "2", "--out", str(out / "particles")]),
        distributed_vae.main([*SIZES, "--data-ranks", "2", "--out", str(out / "data")]),
    ]


def parameters(folder: Path) -> dict[str, Tensor]:
    (place,) = (folder / "checkpoint").iterdir()
    dcp_to_torch_save(place, folder / "all.pt")
    return torch.load(folder / "all.pt", weights_only=True)["model"]


def nll(found: dict[str, Tensor], data: datasets.ImageData, num_particles: int) -> tuple[float, float]:
    """That of the held-out images and its standard error, by hand."""

    def layers(name: str, x: Tensor) -> Tensor:
        indices = sorted({int(key[len(name) + 1 :].split(".")[0]) for key in found if key.startswith(name)})
        for i in indices:
            x = x @ found[f"{name}.{i}.weight"].T + found[f"{name}.{i}.bias"]
            x = x if i == indices[-1] else x.tanh()
        return x

    x = datasets.heldout_images(data, 0).flatten(1)
    h = layers("guide.encoder.trunk.0", x).tanh()
    q = dist.Normal(layers("guide.encoder.loc", h), layers("guide.encoder.log_scale", h).exp())
    z = q.sample((num_particles,))
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_p = log_p + dist.Bernoulli(logits=layers("model.decoder", z)).log_prob(x).sum(-1)
    log_w = log_p - q.log_prob(z).sum(-1)
    values = log_w.logsumexp(0) - math.log(num_particles)
    errors = (log_w - values).exp().std(0) / math.sqrt(num_particles)
    return -values.mean().item(), errors.square().sum().sqrt().item() / len(x)


def test_two_processes_train_as_one_and_resume(tmp_path: Path) -> None:
    digits = datasets.load("digits")
    images = digits.train.numpy(), digits.test.numpy()
    (first,) = run_on_ranks(one_epoch, 1, tmp_path, images)
    runs = run_on_ranks(two_epochs, 2, tmp_path, images, timeout=60)
    for one, other in zip(*runs, strict=True):
        assert one["results"] == other["results"]
    resumed, particles, data = runs[0]
    assert resumed["history"][0] == first["history"][0]
    for metrics in particles, data:
        assert len(metrics["history"]) == 2
        assert metrics["history"][1]["train_bound"] > metrics["history"][0]["train_bound"]
        assert metrics["results"]["heldout_images"] == 30

    # A run of one epoch on one process and one on two is a run of two epochs on two.
    went_on, through = parameters(tmp_path / "resumed"), parameters(tmp_path / "particles")
    assert went_on.keys() == through.keys()
    for name, value in through.items():
        torch.testing.assert_close(went_on[name], value, rtol=1e-4, atol=1e-5)
    expected, error = nll(through, digits.subset(100, 30), 200)
    printed = particles["results"]
    assert printed["heldout_nll"] == pytest.approx(
        expected, abs=4 * (error**2 + printed["nll_monte_carlo_error"] ** 2) ** 0.5 + 0.1
    )


def test_as_many_processes_as_the_mesh_has(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match="error: --data-ranks 2 times --particle-ranks 1 are 2 processes, but 1"
    ):
        distributed_vae.main(["--smoke", "--data-ranks", "2", "--out", str(tmp_path)])


def test_chunks_or_a_backward_subset() -> None:
    assert distributed_vae.parse_args([]).chunk_size == 8
    assert distributed_vae.parse_args(["--backward-particles", "4"]).chunk_size is None


@pytest.mark.slow
def test_lightning_trains_the_same_pair(tmp_path: Path) -> None:
    """On two processes of torchrun, with particles divided; what it prints, from the parameters it saved."""
    pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
    script = Path(distributed_vae.__file__).with_name("distributed_lightning.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(script), "--smoke", "--particle-ranks", "2", "--accumulate", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed, error = re.search(r"NLL ([\d.]+) ± ([\d.]+) nats", done.stdout).groups()
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    found = {name.removeprefix("elbo."): value for name, value in saved["state_dict"].items()}
    assert found["_extra_state"] == 6  # steps of the optimiser: 2 epochs of 5 batches, in twos
    digits = datasets.load("digits").subset(100, 30)
    expected, own = nll(found, digits, 200)
    assert float(printed) == pytest.approx(expected, abs=4 * math.hypot(own, float(error)) + 0.1)
    first = digits.train.flatten(1).mean(0).clamp(0.001, 0.999).logit()
    assert not torch.equal(found["model.decoder.4.bias"], first)
