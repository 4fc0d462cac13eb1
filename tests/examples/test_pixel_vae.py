"""The gated PixelCNN: what each pixel sees, that its density sums to one, its draws follow it; and runs."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import pixel_vae
import pyro
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from pyro_iw import IWAE_ELBO, ImportanceSampler
from shared.pixels import REACH, AutoregressiveBernoulli, GatedPixelCNN, PixelCNN, PixelVAE


def network(height: int, width: int, layers: int = 2, scale: float = 2.5) -> GatedPixelCNN:
    """A small one in float64 with z in three dimensions, its weights ``scale`` times the usual ones."""
    torch.manual_seed(1)
    made = GatedPixelCNN((height, width), 3, channels=6, layers=layers, hidden=8).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    return made


def open_network(height: int, width: int, layers: int) -> GatedPixelCNN:
    """One in whose head no unit is shut, which would hide what it sees."""
    made = network(height, width, layers, scale=1.0)
    with torch.no_grad():
        for bias in (made.horizontal.module.head[1].bias, made.horizontal.module.outputs[-1].bias):
            bias.add_(5.0)
    return made


def gradients(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Of every output, one a row."""
    return torch.stack([torch.autograd.grad(output, inputs, retain_graph=True)[0] for output in outputs])


def all_images(pixels: int) -> Tensor:
    return torch.tensor(list(product((0.0, 1.0), repeat=pixels)), dtype=torch.float64)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_pixel_sees_all_before_it_within_reach_and_nothing_else(layers: int) -> None:
    """Rows i − R to i − 1 at columns j ± R, the R pixels to the left, R = 2 a layer: no blind spot."""
    height, width, reach = 6, 7, REACH * layers
    made = open_network(height, width, layers)
    z = torch.randn(3, dtype=torch.float64)
    x = torch.rand(height * width, dtype=torch.float64, requires_grad=True)
    jacobian = gradients(made(x, z), x).reshape(height, width, height, width)
    for i, j, a, b in product(range(height), range(width), range(height), range(width)):
        above = i - reach <= a < i and abs(b - j) <= reach
        left = a == i and j - reach <= b < j
        assert (jacobian[i, j, a, b] != 0) == (above or left), (i, j, a, b)


@pytest.mark.parametrize("layers", [1, 3])
def test_every_logit_depends_on_the_code_in_every_layer(layers: int) -> None:
    made = open_network(3, 4, layers)
    x, z = torch.ones(12, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)
    logits = made(x, z)
    assert (gradients(logits, z) != 0).all()
    for code in made.horizontal.module.codes:
        before = code.weight.clone()
        with torch.no_grad():
            code.weight.zero_()
            assert not torch.allclose(made(x, z), logits, atol=1e-6)
            code.weight.copy_(before)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4)])
def test_the_density_sums_to_one_over_all_images(shape: tuple[int, int]) -> None:
    """For each z its own density, far from that of a fair coin."""
    made = network(*shape)
    z = torch.randn(2, 1, 3, dtype=torch.float64)
    x = all_images(shape[0] * shape[1])
    log_p = AutoregressiveBernoulli(made, z).log_prob(x)
    assert log_p.shape == (2, len(x))
    torch.testing.assert_close(log_p.logsumexp(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (log_p.std(1) > 0.25).all()
    assert (log_p[0] - log_p[1]).abs().max() > 0.1


def test_the_density_is_the_product_of_its_conditionals() -> None:
    """Each pixel's share by the definition, from marginals of the enumerated images."""
    made = network(2, 3)
    z, x = torch.randn(3, dtype=torch.float64), all_images(6)
    p = AutoregressiveBernoulli(made, z).log_prob(x).exp()
    image = x[37]
    on = made(image, z).sigmoid()
    for i in range(6):
        same = (x[:, :i] == image[:i]).all(1)
        torch.testing.assert_close(on[i], p[same & (x[:, i] == 1)].sum() / p[same].sum())


def test_draws_follow_the_density() -> None:
    """Frequencies of all 64 images of 2 by 3 pixels under two z: Pearson's statistic within 4 of its s.d."""
    made, draws = network(2, 3), 20_000
    z, x = torch.randn(2, 3, dtype=torch.float64), all_images(6)
    torch.manual_seed(0)
    drawn = AutoregressiveBernoulli(made, z).sample((draws,))
    assert drawn.shape == (draws, 2, 6)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    code = (drawn * 2.0 ** torch.arange(5, -1, -1, dtype=torch.float64)).sum(-1).long()
    for k in range(2):
        p = AutoregressiveBernoulli(made, z[k]).log_prob(x).exp()
        counts = torch.bincount(code[:, k], minlength=64)
        errors = (p * (1 - p) / draws).sqrt()
        assert ((counts / draws - p).abs() < 4.5 * errors + 1 / draws).all()
        chi2 = ((counts - draws * p).square() / (draws * p)).sum().item()
        assert abs(chi2 - 63) < 4 * math.sqrt(2 * 63)
    other = AutoregressiveBernoulli(made, z[0]).log_prob(x).exp()
    assert ((counts - draws * other).square() / (draws * other)).sum() > 1000  # of the other z they are not


def test_particles_are_as_if_each_ran_alone() -> None:
    """Log-weights of 3 particles and 4 images, by one at a time; of images with particles, too."""
    torch.manual_seed(0)
    pair = PixelVAE((3, 4), latent=2, channels=3, layers=2).double()
    x = torch.bernoulli(torch.full((4, 12), 0.4, dtype=torch.float64))
    samples = ImportanceSampler(pair.model, pair.guide, 3)(x)
    z = samples.values["z"]
    standard = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    for k, n in product(range(3), range(4)):
        loc, scale = pair.encoder(x[n])
        on = pair.decoder(x[n][None], z[k, n][None])[0].sigmoid()
        log_p = torch.where(x[n] == 1, on, 1 - on).log().sum() + standard.log_prob(z[k, n]).sum()
        log_q = torch.distributions.Normal(loc, scale).log_prob(z[k, n]).sum()
        torch.testing.assert_close(samples.log_weights[k, n], log_p - log_q)
        many = pair.decoder(x.expand(3, 4, 12), z)
        torch.testing.assert_close(many[k, n], pair.decoder(x[n], z[k, n]))


def test_the_vertical_stack_runs_once_for_all_particles() -> None:
    pair, seen = PixelVAE((4, 4), latent=2, channels=3, layers=2), []
    pair.decoder.vertical.module.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    IWAE_ELBO(K=5).loss(pair.model, pair.guide, torch.ones(3, 16))
    assert seen
    assert set(seen) == {3}


def test_the_model_draws_where_nothing_is_observed() -> None:
    pair = PixelVAE((3, 3), latent=2, channels=3, layers=1)
    trace = pyro.poutine.trace(pyro.poutine.uncondition(pair.model)).get_trace(torch.zeros(5, 9))
    x = trace.nodes["x"]["value"]
    assert x.shape == (5, 9)
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    assert trace.nodes["x"]["fn"].log_prob(x).shape == (5,)


def test_alone_it_has_no_latents_and_gives_its_exact_log_p() -> None:
    torch.manual_seed(0)
    alone = PixelCNN((2, 3), latent=2, channels=3, layers=2)
    x = all_images(6).float()
    args = pixel_vae.parse_args(["--smoke"])
    results, log_p = pixel_vae.evaluate(alone, x, args)
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
    assert results["rate"] == results["gap"] == 0
    assert results["nll"] == results["distortion"] == pytest.approx(-log_p.mean().item(), abs=1e-5)
    trace = pyro.poutine.trace(alone.model).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), log_p.sum())
    assert not pyro.poutine.trace(alone.guide).get_trace(x).stochastic_nodes


@torch.no_grad()
def test_evaluation_against_enumeration() -> None:
    """NLL, rate, distortion and gap of 8 images against quadrature over the one-dimensional z."""
    torch.manual_seed(3)
    pair = PixelVAE((2, 2), latent=1, channels=3, layers=1).double()
    with torch.no_grad():
        for parameter in pair.decoder.parameters():
            parameter.mul_(2.0)
        pair.encoder.log_scale[0].bias.fill_(
            0.3
        )  # wider than the posterior, for weights without a heavy tail
    x = all_images(4)[::2]
    args = pixel_vae.parse_args(["--smoke"])
    args.nll_particles = 4000
    results, log_p = pixel_vae.evaluate(pair, x, args)
    assert results["active_units"] <= 1
    grid = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    given_z = pair.likelihood(grid[:, None, None]).log_prob(x)
    step = math.log(grid[1] - grid[0])
    exact = (given_z + prior.log_prob(grid)[:, None] + step).logsumexp(0)
    torch.testing.assert_close(log_p, exact, rtol=0, atol=0.05)
    loc, scale = pair.encoder(x)
    guide = torch.distributions.Normal(loc[:, 0], scale[:, 0])
    rate = torch.distributions.kl_divergence(guide, prior).mean().item()
    weights = (guide.log_prob(grid[:, None]) + step).exp()
    distortion = -(weights * given_z).sum(0).mean().item()
    # 50 draws for each of 8 images.
    spread = (weights * given_z.square()).sum(0) - (weights * given_z).sum(0).square()
    assert abs(results["distortion"] - distortion) < 4 * math.sqrt(spread.mean() / 400) + 1e-3
    ratio = guide.log_prob(grid[:, None]) - prior.log_prob(grid)[:, None]
    spread = (weights * ratio.square()).sum(0) - (weights * ratio).sum(0).square()
    assert abs(results["rate"] - rate) < 4 * math.sqrt(spread.mean() / 400) + 1e-3
    gap = rate + distortion + exact.mean().item()
    assert results["gap"] == pytest.approx(gap, abs=0.03)


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = pixel_vae.main(["--smoke", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert tuple(results["arms"]) == pixel_vae.ARMS
    assert json.loads((tmp_path / "pixel_vae.json").read_text())["arms"] == results["arms"]
    assert imread(tmp_path / "pixel_vae.png").std() > 0.05
    for arm, r in results["arms"].items():
        assert all(
            math.isfinite(r[name]) for name in ("nll", "rate", "distortion", "gap", "gain", "gain_error")
        )
        assert {len(image) for image in r["draws"]} == {64}
        assert len(r["draws"]) == pixel_vae.ROWS * pixel_vae.COLUMNS
        assert r["gain"] == pytest.approx(results["arms"][pixel_vae.ALONE]["nll"] - r["nll"], abs=1e-4)
        assert f"\n{arm} " in printed


def test_warm_up_is_of_the_training_alone() -> None:
    args = pixel_vae.parse_args(["--smoke", "--kl-warmup", "0.5", "--batch-size", "10"])
    weights = {
        arm: getattr(pixel_vae.training_loss(arm, 40, args), "kl_weight", None) for arm in pixel_vae.ARMS
    }
    assert weights.pop(pixel_vae.ALONE) is None
    for arm, weight in weights.items():
        if arm.endswith(pixel_vae.WARM):
            assert [weight(step) for step in range(4)] == [0, 0.5, 1, 1]
        else:
            assert weight == 1


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pixel_vae.main(["--smoke", "--layers", "0"])
    assert "--layers: must be at least 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        pixel_vae.main(["--smoke", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="--data-dir"):
        pixel_vae.main(["--smoke", "--data", "omniglot", "--data-dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="--learning-rate"):
        pixel_vae.main(["--smoke", "--learning-rate", "1e30", "--out", str(tmp_path)])
