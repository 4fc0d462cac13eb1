"""Priors and networks of the adversarial autoencoders' example."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from shared.aae.networks import ClassAAE, Discriminator, Encoder, HeadsAAE, HeadsDecoder, LatentAAE
from shared.aae.priors import COMPONENTS, UNLABELLED, Gaussian, Mixture, Prior, SwissRoll


def draw(prior: Prior, labels: torch.Tensor) -> torch.Tensor:
    with pyro.plate("data", len(labels)):
        return prior.sample(labels)


@pytest.mark.parametrize("prior", [Mixture(), SwissRoll()])
def test_a_class_has_its_part_of_the_prior(prior: Prior) -> None:
    labels = torch.arange(COMPONENTS).repeat(300)
    z = draw(prior, labels)
    assert z.shape == (3000, 2)
    # Parts touch one another: the mixture's near the centre, the roll's at their ends.
    assert (prior.nearest(z) == labels).double().mean() > 0.95


@pytest.mark.parametrize("prior", [Mixture(), SwissRoll()])
def test_without_a_class_all_parts_are_equally_probable(prior: Prior) -> None:
    number = 5000
    counts = torch.bincount(
        prior.nearest(draw(prior, torch.full((number,), UNLABELLED))), minlength=COMPONENTS
    )
    # A share has a standard error of 0.3 / √5000 = 0.004.
    torch.testing.assert_close(counts / number, torch.full((10,), 0.1), rtol=0, atol=0.02)


def test_petals_are_long_along_the_radius() -> None:
    prior, number = Mixture(), 20_000
    for c in (0, 3, 7):
        angle = 2 * math.pi * c / 10
        z = draw(prior, torch.full((number,), c)).numpy()
        along = z @ np.array([math.cos(angle), math.sin(angle)])
        across = z @ np.array([-math.sin(angle), math.cos(angle)])
        # Standard errors: 1/√20000 = 0.007 of a mean, 0.005 of a standard deviation.
        assert along.mean() == pytest.approx(4, abs=0.04)
        assert across.mean() == pytest.approx(0, abs=0.02)
        assert along.std() == pytest.approx(1, abs=0.03)
        assert across.std() == pytest.approx(0.35, abs=0.01)


def test_nearest_petal_is_that_of_the_highest_density() -> None:
    from scipy.stats import multivariate_normal

    z = 3 * torch.randn(200, 2)
    densities = []
    for c in range(10):
        turn = np.array([[math.cos(a := math.pi * c / 5), -math.sin(a)], [math.sin(a), math.cos(a)]])
        covariance = turn @ np.diag([1.0, 0.35**2]) @ turn.T
        densities.append(multivariate_normal(4 * turn[:, 0], covariance).logpdf(z.numpy()))
    assert Mixture().nearest(z).tolist() == np.argmax(densities, 0).tolist()


def test_swiss_roll_is_a_spiral() -> None:
    """Angle and radius of draws grow together, two turns to radius 5, and all of it is as probable."""
    prior = SwissRoll()
    z = draw(prior, torch.arange(COMPONENTS).repeat(200)).numpy()
    radius, angle = np.hypot(*z.T), np.arctan2(*z.T[::-1])
    # From radius 2 on, a turn is so long that noise of 0.1 is a small part of the angle.
    outer = radius > 2
    residue = (4 * math.pi * radius / 5 - angle + math.pi) % (2 * math.pi) - math.pi
    # The angle's noise: 0.1/2 across the radius, and 0.1 · 4π/5 = 0.25 along it.
    assert np.abs(residue[outer]).max() < 1.3
    assert residue[outer].std() == pytest.approx(math.hypot(0.25, 0.03), abs=0.04)
    # The share of probability below a radius r: (r / 5)².
    for r in (2.0, 3.0, 4.0):
        assert (radius < r).mean() == pytest.approx((r / 5) ** 2, abs=0.05)


@pytest.mark.parametrize("prior", [Mixture(), SwissRoll()])
def test_manifold_has_a_row_a_part(prior: Prior) -> None:
    z = prior.manifold(7)
    rows = prior.nearest(z).reshape(COMPONENTS, 7)
    assert torch.equal(rows, torch.arange(COMPONENTS)[:, None].expand(-1, 7))
    radii = z.norm(dim=-1).reshape(COMPONENTS, 7)
    assert (radii.diff(dim=1) > 0).all()


def test_manifold_of_the_gaussian() -> None:
    from scipy.stats import norm

    z = Gaussian(2).manifold(4).reshape(4, 4, 2)
    quantiles = torch.tensor(norm.ppf([1 / 8, 3 / 8, 5 / 8, 7 / 8]), dtype=torch.float32)
    # As on a sheet of paper: the first coordinate to the right, the second upwards.
    torch.testing.assert_close(z[..., 0], quantiles.expand(4, 4))
    torch.testing.assert_close(z[..., 1], quantiles.flip(0)[:, None].expand(4, 4))
    assert Gaussian(3).manifold(4) is None


def test_networks_are_the_papers_at_full_width() -> None:
    pair = HeadsAAE(784, heads=10, latent=10, hidden=1000)
    shapes = {name: tuple(p.shape) for name, p in pair.named_parameters() if p.dim() == 2}
    assert shapes == {
        "encoder.trunk.0.0.weight": (1000, 784),
        "encoder.trunk.0.2.weight": (1000, 1000),
        "encoder.code.weight": (10, 1000),
        "encoder.heads.0.weight": (10, 1000),
        "decoder.layers.0.weight": (1000, 20),
        "decoder.layers.2.weight": (1000, 1000),
        "decoder.layers.4.weight": (784, 1000),
    }
    found = {
        site: [p.shape[1] for p in d.parameters() if p.dim() == 2]
        for site, d in pair.discriminators(1000).items()
    }
    assert found == {"y": [10, 1000, 1000], "z": [10, 1000, 1000]}


def test_noise_is_for_training_alone() -> None:
    encoder = Encoder(6, 2, 5, heads=3, noise=0.5)
    x = torch.rand(4, 6)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))
    logits, z = encoder.both(x)
    assert torch.equal(logits, encoder.logits(x))
    assert torch.equal(z, encoder(x))
    h = encoder.trunk(x)
    standardised = (encoder.heads[0](h) - encoder.heads[1].running_mean) / encoder.heads[1].running_var.sqrt()
    torch.testing.assert_close(logits, standardised, rtol=1e-4, atol=1e-4)


def test_discriminator_sees_value_and_condition() -> None:
    discriminator = Discriminator(5, 4)
    value, condition = torch.randn(7, 2), torch.randn(7, 3)
    logits = discriminator(value, condition)
    assert logits.shape == (7,)
    assert torch.equal(logits, discriminator(torch.cat([value, condition], 1)))


def test_representation_is_heads_plus_style() -> None:
    decoder = HeadsDecoder(6, heads=3, latent=2, hidden=4, distance=1.5)
    y, z = torch.rand(5, 3), torch.randn(5, 2)
    centres = decoder.centres.tolist()
    expected = [
        [sum(p * centre[i] for p, centre in zip(weights, centres, strict=True)) + style[i] for i in range(2)]
        for weights, style in zip(y.tolist(), z.tolist(), strict=True)
    ]
    torch.testing.assert_close(decoder.code(y, z), torch.tensor(expected))
    apart = HeadsDecoder(6, heads=3, latent=2, hidden=4, distance=None)
    assert torch.equal(apart.code(y, z), torch.cat([y, z], 1))


def test_penalty_keeps_heads_apart() -> None:
    decoder = HeadsDecoder(6, heads=4, latent=2, hidden=4, distance=2.0)
    with torch.no_grad():
        decoder.centres.copy_(torch.tensor([[0.0, 0.0], [0.0, 1.5], [3.0, 0.0], [3.0, 4.0]]))
    # Pairs at 1.5, 3, 5, √11.25, √15.25 and 4: only the first is too close.
    assert decoder.penalty().item() == pytest.approx(0.5)
    decoder.penalty().backward()
    torch.testing.assert_close(decoder.centres.grad[:2], torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    assert not decoder.centres.grad[2:].any()


@pytest.mark.parametrize("distance", [None, 2.0])
def test_density_of_images(distance: float | None) -> None:
    """Pixel by pixel a normal of scale 0.2; the penalty once an image, beside."""
    pair = HeadsAAE(6, heads=3, latent=2, hidden=4, distance=distance)
    x = torch.rand(5, 6)
    trace = poutine.trace(pair.model).get_trace(x)
    trace.compute_log_prob()
    y, z = trace.nodes["y"]["value"], trace.nodes["z"]["value"]
    assert torch.equal(y.sum(1), torch.ones(5))
    with torch.no_grad():
        means = 1 / (1 + np.exp(-pair.decoder.layers(pair.decoder.code(y, z)).double().numpy()))
    log_p = -((x.numpy() - means) ** 2) / (2 * 0.04) - math.log(0.2) - 0.5 * math.log(2 * math.pi)
    assert trace.nodes["x"]["log_prob_sum"].item() == pytest.approx(log_p.sum(), rel=1e-4)
    factor = trace.nodes["distances"]["log_prob_sum"].item() if distance else 0.0
    assert factor == pytest.approx(-5 * pair.decoder.penalty().item() if distance else 0.0)


def test_decoder_is_told_the_class_and_the_encoder_is_not() -> None:
    pair = ClassAAE(6, classes=3, latent=2, hidden=4).eval()
    x, labels = torch.rand(5, 6), torch.tensor([2, 0, 1, 1, 0])
    trace = poutine.trace(pair.model).get_trace(x, labels)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    told = np.zeros((5, 5), np.float32)
    for row, label in enumerate(labels.tolist()):
        told[row, label] = 1
        told[row, 3:] = z[row]
    with torch.no_grad():
        means = 1 / (1 + np.exp(-pair.decoder(torch.from_numpy(told)).double().numpy()))
    log_p = -((x.numpy() - means) ** 2) / (2 * 0.04) - math.log(0.2) - 0.5 * math.log(2 * math.pi)
    assert trace.nodes["x"]["log_prob_sum"].item() == pytest.approx(log_p.sum(), rel=1e-4)
    codes = [poutine.trace(pair.guide).get_trace(x, y).nodes["z"]["value"] for y in (labels, 0 * labels)]
    assert torch.equal(*codes)


def test_guides_are_deterministic_and_shaped_as_the_priors() -> None:
    x = torch.rand(5, 6)
    heads = HeadsAAE(6, heads=3, latent=2, hidden=4).eval()
    latent = LatentAAE(6, Mixture(), hidden=4).eval()
    for pair in (heads, latent):
        args, _ = pair.batch(x, None)
        guide = poutine.trace(pair.guide).get_trace(*args)
        model = poutine.trace(pair.model).get_trace(*args)
        sites = set(guide.stochastic_nodes) - {"data"}
        assert sites == ({"y", "z"} if pair is heads else {"z"})
        for name in sites:
            assert isinstance(guide.nodes[name]["fn"], dist.Delta)
            assert guide.nodes[name]["value"].shape == model.nodes[name]["value"].shape
    torch.testing.assert_close(
        poutine.trace(heads.guide).get_trace(x).nodes["y"]["value"].sum(1), torch.ones(5)
    )
