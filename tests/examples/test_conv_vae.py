"""The convolutional VAE: its smoke run, and that its networks see images, one at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import conv_vae
import pytest
import torch

from pyro_iw import IWAE_ELBO


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--smoke", "--loss", "piwae", "--channels", "4", "--latent", "3", "--out", str(tmp_path)]
    metrics = conv_vae.main(argv)
    assert all(math.isfinite(value) for value in metrics["results"].values())
    assert metrics["results"]["train_bound"] > -64  # a coin for every pixel has -44
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["settings"]["channels"] == 4
    assert saved["results"] == metrics["results"]
    for name in ("samples.png", "reconstructions.png", "latents.png", "learning_curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "piwae on digits, 1 epochs" in capsys.readouterr().out
    state = torch.load(tmp_path / "vae.pt", weights_only=True)["state_dict"]
    conv_vae.ConvVAE((8, 8), channels=4, latent=3).load_state_dict(state)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (28, 28)])
def test_the_decoder_takes_each_latent_by_itself(shape: tuple[int, int]) -> None:
    network = conv_vae.ConvVAE(shape, channels=2, latent=3)
    z = torch.randn(4, 5, 3)
    logits = network.decoder(z)
    assert logits.shape == (4, 5, shape[0] * shape[1])
    for k in range(4):
        for n in range(5):
            alone = network.decoder.module(z[k, n][None])[0]
            torch.testing.assert_close(logits[k, n], alone, rtol=1e-4, atol=1e-5)


def test_pixels_are_neighbours_in_rows_and_columns() -> None:
    """One value of the encoder's first layer sees a square of 4 by 4 pixels."""
    network = conv_vae.ConvVAE((8, 12), channels=2, latent=3)
    x = torch.zeros(1, 96, requires_grad=True)
    network.encoder.net[:2](x)[0, :, 2, 3].sum().backward()
    seen = x.grad.reshape(8, 12).nonzero()
    assert seen.amin(0).tolist() == [3, 5]
    assert seen.amax(0).tolist() == [6, 8]


def test_one_bound_an_image() -> None:
    network = conv_vae.ConvVAE((8, 8), channels=2, latent=3)
    images = torch.bernoulli(torch.full((5, 64), 0.3))
    particles = IWAE_ELBO(K=6).particles(network.model, network.guide, images)
    assert [plate.name for plate in particles.plates] == ["data"]
    assert particles.log_weights.shape == (6, 5)


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="30×28"):
        conv_vae.ConvVAE((30, 28), channels=2, latent=3)
    with pytest.raises(SystemExit):
        conv_vae.main(["--smoke", "--channels", "0"])
    assert "--channels: must be at least 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        conv_vae.main(["--smoke", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="--data-dir"):
        conv_vae.main(["--smoke", "--data", "omniglot", "--data-dir", str(tmp_path / "nowhere")])
