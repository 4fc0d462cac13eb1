"""The adversarial autoencoder's priors, pairs, numbers and runs; a stopped run goes on to the bit."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aae
import aae_evaluation
import aae_pictures
import checkpoint
import datasets
import numpy as np
import pictures
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from aae_networks import Discriminator, Encoder, HeadsAAE, HeadsDecoder, LatentAAE
from aae_priors import COMPONENTS, UNLABELLED, Gaussian, Mixture, Prior, SwissRoll
from aae_training import Trainer, choose_labelled, decay, train_classifier
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch.nn import functional as F

from helpers.resuming import flat, run_stopped

MODES = tuple(aae.DEFAULTS)
# 3 steps an epoch, the last of them a small one, in 3 epochs.
TINY = ["--train-size", "50", "--test-size", "30", "--batch-size", "20", "--epochs", "3", "--hidden", "8"]
TINY += ["--parzen-samples", "20", "--checkpoint-every", "1"]


def training(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind in its checkpoint but for the seconds."""
    leaves = flat(checkpoint.load(folder / "seed-0" / "checkpoint.pt", aae.KIND)["training"])
    return {name: leaf for name, leaf in leaves.items() if not name.endswith(("seconds", "since_record/1"))}


# Priors


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


# Pairs


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


def test_labelled_images_come_beside_the_others() -> None:
    x, few = torch.rand(5, 6), (torch.rand(3, 6), torch.tensor([4, 0, 9]))
    (images, labels), supervised = LatentAAE(6, Mixture(), hidden=4, steered=True).batch(x, few)
    assert supervised is None
    assert torch.equal(images, torch.cat([x, few[0]]))
    assert labels.tolist() == [UNLABELLED] * 5 + [4, 0, 9]
    args, supervised = HeadsAAE(6, heads=10, latent=2, hidden=4).batch(x, few)
    assert len(args) == 1
    assert torch.equal(args[0], x)
    assert supervised is few


def test_condition_is_one_hot_with_a_class_for_not_known() -> None:
    pair = LatentAAE(6, Mixture(), hidden=4, steered=True)
    condition = pair.condition(torch.rand(2, 6), torch.tensor([3, UNLABELLED]))
    assert condition.dtype == torch.float32
    assert condition.nonzero().tolist() == [[0, 3], [1, 10]]
    assert next(pair.discriminators(4)["z"].parameters()).shape == (4, 2 + 11)
    assert next(LatentAAE(6, Mixture(), 4).discriminators(4)["z"].parameters()).shape == (4, 2)


def test_supervised_phase_is_the_cross_entropy() -> None:
    pair = HeadsAAE(6, heads=3, latent=2, hidden=4).eval()
    x, labels = torch.rand(5, 6), torch.tensor([0, 2, 2, 1, 0])
    trace = poutine.trace(pair.classify).get_trace(x, labels)
    expected = F.cross_entropy(pair.encoder.logits(x), labels, reduction="sum")
    assert -trace.log_prob_sum().item() == pytest.approx(expected.item(), rel=1e-5)


# Training


def test_labelled_rows_are_balanced_and_random() -> None:
    labels = torch.arange(10).repeat(20)[torch.randperm(200)]
    rows = [choose_labelled(labels, 57, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert Counter(labels[rows[0]].tolist()) == dict.fromkeys(range(10), 5)
    assert rows[0].unique().numel() == 50
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0].sort().values, rows[2].sort().values)
    with pytest.raises(ValueError, match="less than one"):
        choose_labelled(labels, 9, torch.Generator())
    with pytest.raises(ValueError, match="class 0 has 20 training images, and 30"):
        choose_labelled(labels, 300, torch.Generator())


def test_learning_rate_falls_in_the_second_half() -> None:
    assert [decay(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 1, 0.55, 0.1])


def tiny_trainer(few: bool = True, images: int = 8, **options: Any) -> Trainer:
    """Three steps an epoch, the last of them a small one."""
    pair = HeadsAAE(images, heads=10, latent=2, hidden=3)
    labelled = (torch.rand(4, images), torch.arange(4)) if few else None
    options = {"hidden": 3, "batch_size": 3, "epochs": 4, "learning_rate": 1e-2, "seed": 0, **options}
    return Trainer(pair, torch.eye(images), labelled, **options)


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    trainer = tiny_trainer(few=False)
    epochs = []
    for _ in range(2):
        batches = [trainer.next_batch() for _ in range(3)]
        assert all(few is None for _, few in batches)
        epochs.append(torch.cat([x for x, _ in batches]))
    assert all(torch.equal(epoch.sum(0), torch.ones(8)) for epoch in epochs)
    assert not torch.equal(*epochs)


@pytest.mark.parametrize(("images", "sizes"), [(6, [3, 3]), (7, [3, 4]), (8, [3, 3, 2]), (2, [2])])
def test_no_batch_is_of_one_image(images: int, sizes: list[int]) -> None:
    trainer = tiny_trainer(few=False, images=images)
    assert trainer.steps_per_epoch == len(sizes)
    for _ in range(2):
        assert [len(trainer.next_batch()[0]) for _ in sizes] == sizes
    trainer.run(save=lambda: None, save_every=100, description="")


def test_labelled_batches_keep_images_and_classes_together() -> None:
    trainer = tiny_trainer()
    seen = set()
    for _ in range(6):
        _, (x, labels) = trainer.next_batch()
        assert len(labels.unique()) == 3
        assert torch.equal(x, trainer.few[0][labels])
        seen.update(labels.tolist())
    assert seen == {0, 1, 2, 3}


def test_learning_rates_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all four phases, in every step."""
    rates: list[float] = []
    step = torch.optim.Adam.step

    def noted(self: torch.optim.Adam, *args: Any) -> Any:
        assert {group["betas"] for group in self.param_groups} == {(0.5, 0.999)}
        rates.extend({group["lr"] for group in self.param_groups})
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    trainer = tiny_trainer()
    trainer.run(save=lambda: None, save_every=100, description="")
    factors = [1.0, 1.0, 1.0, 0.55]  # an epoch of three steps each
    assert rates == pytest.approx([1e-2 * f for f in factors for _ in range(3 * 4)])


def test_history_is_the_mean_of_an_epochs_steps() -> None:
    trainer = tiny_trainer(epochs=2)
    taken = []
    take_step = trainer.take_step
    trainer.take_step = lambda: taken.append(take_step()) or taken[-1]  # type: ignore[method-assign]
    trainer.run(save=lambda: None, save_every=100, description="")
    names = {"reconstruction", "supervised", "discriminator_y", "discriminator_z", "guide_y", "guide_z"}
    assert set(taken[0]) == names
    assert [record["epoch"] for record in trainer.history] == [1, 2]
    for i, record in enumerate(trainer.history):
        for name in names:
            assert record[name] == pytest.approx(np.mean([t[name] for t in taken[3 * i : 3 * i + 3]]))


def test_losses_are_per_image() -> None:
    """Whatever the batch: twice the same images and labels have the losses of one copy."""
    found = []
    for copies in (1, 2):
        pyro.clear_param_store()
        torch.manual_seed(0)
        trainer = tiny_trainer()
        few = (torch.rand(4, 8).repeat(copies, 1), torch.arange(4).repeat(copies))
        x = torch.eye(8).repeat(copies, 1)
        trainer.next_batch = lambda x=x, few=few: (x, few)  # type: ignore[method-assign]
        found.append(trainer.take_step())
    for name in ("reconstruction", "supervised"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-3)


def test_reconstruction_is_without_the_penalty() -> None:
    torch.manual_seed(0)
    pyro.clear_param_store()
    pair = HeadsAAE(8, heads=4, latent=2, hidden=3, distance=5.0)
    x = torch.rand(6, 8)
    with torch.no_grad():
        pair.decoder.centres.mul_(0.3)
    trainer = Trainer(pair, x, None, hidden=3, batch_size=6, epochs=1, learning_rate=1e-2, seed=0)
    trainer.next_batch = lambda: (x, None)  # type: ignore[method-assign]
    centres = pair.decoder.centres.tolist()
    penalty = sum(max(0.0, 5 - math.dist(a, b)) for i, a in enumerate(centres) for b in centres[:i])
    assert penalty > 1
    with torch.no_grad():
        logits, z = pair.encoder.both(x)  # batch normalisation as in training
        means = pair.images(logits.softmax(-1) @ pair.decoder.centres + z)
    log_p = dist.Normal(means, 0.2).log_prob(x).sum(-1).mean().item()
    found = trainer.take_step()
    assert found["penalty"] == pytest.approx(penalty, rel=1e-5)
    assert found["reconstruction"] == pytest.approx(-log_p, rel=1e-4)


def test_classifier_learns_what_is_labelled() -> None:
    x = torch.eye(4).repeat(5, 1)
    labels = torch.tensor([2, 0, 1, 1]).repeat(5)
    encoder = Encoder(4, 1, 16, heads=3)
    train_classifier(encoder, (x, labels), steps=150, batch_size=10, learning_rate=1e-2, seed=0)
    encoder.eval()
    assert torch.equal(encoder.logits(x).argmax(-1), labels)


# Numbers


def test_cluster_labels_against_loops() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 6)), rng.integers(0, 4, 200)
    logits[:, 5] -= 100  # a head that nobody chooses
    majority, confident = aae_evaluation.cluster_labels(torch.tensor(logits), torch.tensor(labels))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for head in range(5):
        votes = Counter(labels[probabilities.argmax(1) == head].tolist())
        assert votes[majority[head].item()] == max(votes.values())
        assert confident[head] == labels[probabilities[:, head].argmax()]
    assert majority[5] == -1


def test_most_confident_where_single_precision_is_certain() -> None:
    logits = torch.tensor([[40.0, 0.0], [60.0, 0.0], [-30.0, 0.0], [-20.0, 0.0]])
    assert ((logits / 2).softmax(-1)[:2, 0] == 1).all()
    _, confident = aae_evaluation.cluster_labels(logits / 2, torch.arange(4))
    assert confident.tolist() == [1, 2]


def test_cluster_results() -> None:
    logits = torch.eye(3)[[0, 0, 0, 1, 1]] * torch.tensor([1.0, 1.0, 3.0, 2.0, 1.0])[:, None]
    labels = torch.tensor([4, 4, 7, 5, 5])
    heldout = torch.eye(3)[[0, 0, 1, 1, 2]]
    truth = torch.tensor([4, 7, 5, 5, 4])
    # By majority the heads are 4, 5, nothing; the most confident of head 0 is a 7, of head 2 it is a 4.
    found = aae_evaluation.cluster_results(logits, labels, heldout, truth)
    assert found["error_majority"] == pytest.approx(2 / 5)
    assert found["clusters_used"] == 2
    assert found["error_most_confident"] == pytest.approx(1 / 5)


def test_neighbours_against_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    codes, heldout = rng.normal(size=(300, 2)), rng.normal(size=(1500, 2))
    labels, truth = ((x[:, 0] > 0) + 2 * (x[:, 1] > 0.3) for x in (codes, heldout))
    predicted = KNeighborsClassifier(5).fit(codes, labels).predict(heldout)
    expected = (predicted != truth).mean()
    assert 0.01 < expected < 0.2
    tensors = map(torch.tensor, (codes, labels, heldout, truth))
    assert aae_evaluation.neighbour_error(*tensors) == pytest.approx(expected)


def test_reconstruction_is_the_density_of_images() -> None:
    pair = LatentAAE(6, Gaussian(2), hidden=4).eval()
    x = torch.rand(1200, 6)
    with torch.no_grad():
        means = pair.images(pair.encoder(x))
        found = aae_evaluation.reconstruction(pair, x)
    log_p = dist.Normal(means, 0.2).log_prob(x).sum(-1).mean()
    assert found["reconstruction"] == pytest.approx(-log_p.item(), rel=1e-5)
    assert found["pixel_error"] == pytest.approx((means - x).square().mean().sqrt().item(), rel=1e-5)


def test_parzen_results_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth by the validation images alone, the result of the held-out ones alone."""
    from sklearn.neighbors import KernelDensity

    pair = LatentAAE(6, Mixture(), hidden=4).eval()
    validation, heldout = torch.rand(30, 6), 0.3 + 0.1 * torch.rand(50, 6)
    drawn = []
    draws = aae_evaluation.prior_draws
    monkeypatch.setattr(aae_evaluation, "prior_draws", lambda *args: drawn.append(draws(*args)) or drawn[-1])
    with torch.no_grad():
        found = aae_evaluation.parzen_results(pair, 1100, validation, heldout)
        samples = pair.images(drawn[0]).numpy()
    assert samples.shape == (1100, 6)
    best = max(
        aae_evaluation.parzen.BANDWIDTHS,
        key=lambda sigma: KernelDensity(bandwidth=sigma).fit(samples).score(validation.numpy()),
    )
    values = KernelDensity(bandwidth=best).fit(samples).score_samples(heldout.numpy())
    assert found["parzen_bandwidth"] == best
    assert found["parzen"] == pytest.approx(values.mean(), rel=1e-4)
    assert found["parzen_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-3)


def test_codes_that_fit_and_codes_that_do_not() -> None:
    pair = LatentAAE(2, Gaussian(2), hidden=4).eval()
    x = torch.randn(1000, 2)
    with torch.no_grad():
        pair.encoder.forward = lambda x: x  # type: ignore[method-assign]
        fits = aae_evaluation.fit_of_codes(pair, x)
        misses = aae_evaluation.fit_of_codes(pair, x + 1.0)
    # 1000 held-out draws; the best classifier of two normals √2 apart is right with probability Φ(√2 / 2).
    assert fits["two_sample_error"] == pytest.approx(0.5 / math.sqrt(1000))
    assert fits["two_sample_accuracy"] == pytest.approx(0.5, abs=4 * fits["two_sample_error"])
    assert misses["two_sample_accuracy"] == pytest.approx(0.760, abs=4 * misses["two_sample_error"])


@pytest.mark.parametrize("mode", [["steered"], ["semi-supervised"], ["clustering"], ["reduction"]])
def test_evaluation_is_of_held_out_images_in_eval_mode(mode: list[str]) -> None:
    argv = ["--mode", *mode, "--hidden", "32", "--train-size", "300", "--test-size", "100"]
    args = aae.parse_args(argv)
    args.labels = args.labels and 50
    data = aae.load_data(args, 0)
    pair = aae.make_pair(args, 64).train()
    before = torch.random.get_rng_state()
    found = aae_evaluation.evaluate(pair, data, args.mode, parzen_samples=10, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    x, truth = data.heldout, data.heldout_labels
    # By the modules themselves: the noise of a pair in train mode would be seen here.
    pair.eval()
    with torch.no_grad():
        z, h = pair.encoder.code(pair.encoder.trunk(x)), pair.encoder.trunk(x)
        if mode == ["steered"]:
            chosen = pair.prior.nearest(z)
            assert found["error"] == pytest.approx((chosen != truth).double().mean().item())
            code = z
        else:
            logits = pair.encoder.heads(h)
            code = pair.decoder.code(logits.softmax(-1), z)
        if mode == ["semi-supervised"]:
            assert found["error"] == pytest.approx((logits.argmax(-1) != truth).double().mean().item())
        if "error_majority" in found:
            known = pair.encoder.heads(pair.encoder.trunk(data.images))
            expected = aae_evaluation.cluster_results(known, data.labels, logits, truth)
            assert {key: found[key] for key in expected} == expected
        log_p = dist.Normal(pair.images(code), 0.2).log_prob(x).sum(-1).mean()
    assert found["reconstruction"] == pytest.approx(-log_p.item(), rel=1e-4)
    assert ("neighbour_error" in found) == (mode == ["reduction"])


def test_summary() -> None:
    runs = [{"a": 1.0, "b": 2}, {"a": 4.0, "b": 2}, {"a": 1.0, "b": 2}]
    summary = aae_evaluation.summarise(runs)
    assert summary["a"]["mean"] == pytest.approx(2)
    assert summary["a"]["standard_error"] == pytest.approx(np.std([1, 4, 1], ddof=1) / math.sqrt(3))
    assert summary["b"] == {"mean": 2, "standard_error": 0}
    assert aae_evaluation.summarise(runs[:1]) == {"a": {"mean": 1}, "b": {"mean": 2}}


def test_table_of_one_run_has_the_numbers_own_errors() -> None:
    results = {"two_sample_accuracy": 0.49712, "two_sample_error": 0.029, "clusters_used": 16}
    results |= {"reconstruction": -28.44, "error": 0.0241}
    assert aae_evaluation.table(aae_evaluation.summarise([results])).splitlines() == [
        "classification error                       2.4 %",
        "clusters used                              16",
        "reconstruction, −log p(x | code)           −28.4 nats per image",
        "two-sample accuracy                        0.497 ± 0.029",
    ]


def test_table_of_several_runs_has_their_errors() -> None:
    results = {
        "two_sample_accuracy": 0.4,
        "two_sample_error": 0.2,
        "clusters_used": 16,
        "parzen_samples": 100,
    }
    other = {"two_sample_accuracy": 0.6, "two_sample_error": 0.2, "clusters_used": 15, "parzen_samples": 100}
    results["error_difference"], other["error_difference"] = -0.05, -0.03
    assert aae_evaluation.table(aae_evaluation.summarise([results, other])).splitlines() == [
        "difference of the two                      −4.0 ± 1.0 percentage points",
        "clusters used                              15.5 ± 0.5",
        "draws for the windows                      100",
        "two-sample accuracy                        0.500 ± 0.100",
    ]


# Pictures


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those saved from now on, and drawn."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def noted(self: Figure, *args: Any, **keywords: Any) -> None:
        saved.append(self)
        savefig(self, *args, **keywords)

    monkeypatch.setattr(Figure, "savefig", noted)
    return saved


def test_losses_are_named_and_have_units(tmp_path: Path, figures: list[Figure]) -> None:
    history = [
        {"epoch": e, "seconds": 1.0, "reconstruction": 5.0, "discriminator_z": 1.3, "guide_z": 0.8}
        for e in (1.0, 2.0)
    ]
    aae_pictures.save_losses(history, tmp_path / "a.png")
    left, right = figures[0].axes
    assert left.get_ylabel() == "−log p(x | code) [nats per image]"
    assert (right.get_title(), right.get_ylabel()) == ("Discriminators and guide", "loss [nats per code]")
    for axes in (left, right):
        assert all(tick == round(tick) for tick in axes.get_xticks())
    levels = {
        line.get_label(): line.get_ydata()[0] for line in right.lines if "apart" in str(line.get_label())
    }
    assert levels == {
        "cannot be told apart:\ndiscriminator at 2 log 2": pytest.approx(1.38629, abs=1e-5),
        "cannot be told apart:\nguide at log 2": pytest.approx(0.69315, abs=1e-5),
    }
    aae_pictures.save_losses(
        [{**record, "supervised": 1.0, "penalty": 0.3} for record in history], tmp_path / "a.png"
    )
    left, right = figures[1].axes
    assert right.get_title() == "Discriminators, guide and labels"
    assert right.get_ylabel() == "loss [nats per code; labels: nats per image]"
    assert left.get_ylabel() == "[nats per image]"
    assert {line.get_label(): line.get_ydata()[0] for line in left.lines} == {
        "−log p(x | code)": 5.0,
        "beside it: penalty on heads too close": 0.3,
    }


def test_plane_shows_all_heads(tmp_path: Path, figures: list[Figure]) -> None:
    codes, labels = torch.rand(20, 2), torch.arange(20) % 3
    centres = torch.tensor([[0.5, 0.5], [9.0, 0.2], [0.1, -4.0]])
    names = ["0", aae_pictures.EMPTY, "2"]
    aae_pictures.save_embedding(codes, labels, centres, names, "their classes", tmp_path / "a.png")
    axes = figures[0].axes[0]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < 0 < 9.0 < right < 11
    assert -6 < low < -4.0 < 1 < high
    assert axes.get_aspect() == 1
    assert "–: the head has none" in axes.get_title()
    assert {text.get_text() for text in axes.texts} == set(names)
    aae_pictures.save_embedding(codes, labels, centres, ["0", "1", "2"], "x", tmp_path / "a.png")
    assert "none" not in figures[1].axes[0].get_title()


def test_codes_of_one_dim_are_a_histogram(tmp_path: Path, figures: list[Figure]) -> None:
    codes, prior = torch.randn(300, 1), 2 * torch.randn(500, 1)
    labels = torch.arange(300) % 3
    aae_pictures.save_codes(codes, labels, prior, None, tmp_path / "a.png")
    limit = 1.05 * max(abs(codes).max().item(), abs(prior).max().item())
    for axes, values, parts in zip(figures[0].axes, (codes, prior), (3, 1), strict=True):
        bars = [patch.get_height() for patch in axes.patches]
        heights = np.sum(np.reshape(bars, (parts, -1)), 0)
        expected, _ = np.histogram(values.numpy(), 40, (-limit, limit), density=True)
        assert heights == pytest.approx(expected, abs=1e-6)
        assert axes.get_xlim() == pytest.approx((-limit, limit))
    colours = [patch.get_facecolor() for patch in figures[0].axes[0].patches[::40]]
    assert colours == [aae_pictures.COLOURS(c) for c in range(3)]


@pytest.mark.parametrize(("latent", "shown"), [(2, ""), (5, " (dims 1 and 2 of 5)")])
def test_codes_say_which_dims(latent: int, shown: str, tmp_path: Path, figures: list[Figure]) -> None:
    codes = torch.randn(20, latent)
    aae_pictures.save_codes(codes, torch.arange(20) % 3, codes, None, tmp_path / "a.png")
    titles = [axes.get_title() for axes in figures[0].axes]
    assert titles == [f"Codes of the held-out images{shown}", f"Draws from the prior{shown}"]
    for axes in figures[0].axes:
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), codes[:, :2].numpy())


@pytest.mark.parametrize(
    ("argv", "row", "column", "rows"),
    [
        (["--latent", "2"], "second coordinate", "first coordinate", 0),
        (["--prior", "swiss-roll"], "part of the prior", "position along the part", 10),
        (["--mode", "steered"], "class", "position along the part", 10),
    ],
)
def test_manifold_says_what_rows_and_columns_are(
    argv: list[str], row: str, column: str, rows: int, tmp_path: Path, figures: list[Figure]
) -> None:
    args = aae.parse_args([*argv, "--hidden", "8", "--train-size", "400", "--test-size", "24"])
    data = aae.load_data(args, 0)
    history = [{"epoch": 1.0, "seconds": 1.0, "reconstruction": 2.0, "guide_z": 3.0}]
    pair = aae.make_pair(args, 64)
    aae_pictures.save_all(pair, data, history, plane=False, seed=0, folder=tmp_path)
    axes = figures[-1].axes[0]
    assert axes.get_ylabel().startswith(row)
    assert axes.get_xlabel().startswith(column)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [str(i) for i in range(rows)]


def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, int]]:
    """The images of every grid drawn from now on, and the columns they are laid out in."""
    grids: list[tuple[torch.Tensor, int]] = []
    original = pictures.tile

    def noted(images: torch.Tensor, columns: int) -> torch.Tensor:
        grids.append((images.clone(), columns))
        return original(images, columns)

    for module in (pictures, aae_pictures):
        monkeypatch.setattr(module, "tile", noted)
    return grids


def test_clusters_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Figure]) -> None:
    grids = captured(monkeypatch)
    heads, images = torch.rand(3, 2, 2), torch.rand(6, 2, 2)
    chosen = torch.tensor([2, 0, 2, 2, 0, 2])
    aae_pictures.save_clusters(heads, images, chosen, ["7", "none", "1"], tmp_path / "a.png", columns=3)
    rows = grids[0][0].reshape(3, grids[0][1], 2, 2)
    assert torch.equal(rows[:, 0], heads)
    assert rows[:, 1].isnan().all()
    assert torch.equal(rows[0, 2:4], images[[1, 4]])
    assert torch.equal(rows[2, 2:], images[[0, 2, 3]])  # the fourth has no place
    assert rows[1, 2:].isnan().all()
    axes = figures[0].axes[0]
    assert "first 3 held-out members" in axes.get_title()
    assert axes.get_ylabel() == "class by majority of the training images"
    aae_pictures.save_clusters(heads, images, chosen, ["7", "–", "1"], tmp_path / "a.png")
    assert "–: the head has none" in figures[1].axes[0].get_ylabel()


def test_a_style_a_row_and_a_class_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = captured(monkeypatch)
    args = aae.parse_args(["--mode", "semi-supervised", "--hidden", "8", "--test-size", "24"])
    data = aae.load_data(args, 0)
    pair = aae.make_pair(args, 64)
    seen = []
    code = pair.decoder.code
    pair.decoder.code = lambda y, z: seen.append((y, z)) or code(y, z)  # type: ignore[method-assign]
    history = [{"epoch": 1.0, "seconds": 1.0, "reconstruction": 2.0, "guide_z": 3.0}]
    aae_pictures.save_all(pair, data, history, plane=False, seed=0, folder=tmp_path)
    grid, columns = grids[-1]
    assert columns == 10
    y, z = seen[-1]
    assert torch.equal(y, torch.eye(10).expand(10, 10, 10))
    assert torch.equal(z, z[:, :1].expand(10, 10, 3))
    with torch.no_grad():
        torch.testing.assert_close(grid.reshape(10, 10, 64)[2, 7], pair.images(code(y[2, 7], z[2, 7])))


def test_images_of_draws_and_of_the_manifold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = captured(monkeypatch)
    args = aae.parse_args(
        ["--prior", "swiss-roll", "--hidden", "8", "--train-size", "100", "--test-size", "24"]
    )
    data = aae.load_data(args, 0)
    pair = aae.make_pair(args, 64)
    shown = []
    save_codes = aae_pictures.save_codes
    monkeypatch.setattr(aae_pictures, "save_codes", lambda *a: shown.append(a) or save_codes(*a))
    history = [{"epoch": 1.0, "seconds": 1.0, "reconstruction": 2.0, "guide_z": 3.0}]
    aae_pictures.save_all(pair, data, history, plane=False, seed=0, folder=tmp_path)
    codes, labels, draws, parts, _ = shown[0]
    assert parts is None
    assert torch.equal(labels, data.heldout_labels)
    with torch.no_grad():
        pair.eval()
        assert torch.equal(codes, pair.encoder(data.heldout))
        for (images, columns), latents, width in zip(
            grids[1:], (draws[:100], pair.prior.manifold(16)), (10, 16), strict=True
        ):
            assert columns == width
            torch.testing.assert_close(images.flatten(1), pair.images(latents))
    # Originals above their reconstructions, twelve a row.
    images = grids[0][0].flatten(1)
    assert torch.equal(images[:12], data.heldout[:12])
    with torch.no_grad():
        torch.testing.assert_close(images[12:24], pair.images(codes[:12]))


# Whole runs

SMOKES: dict[str, tuple[list[str], set[str], set[str]]] = {
    "unsupervised": (
        ["--latent", "2"],
        {"codes", "samples", "manifold"},
        {"parzen", "two_sample_accuracy_training"},
    ),
    "unsupervised, 8 dims": ([], {"codes", "samples"}, {"parzen"}),
    "unsupervised, 1 dim": (["--latent", "1"], {"codes", "samples"}, {"parzen"}),
    "unsupervised, swiss roll": (["--prior", "swiss-roll"], {"codes", "samples", "manifold"}, {"parzen"}),
    "steered": ([], {"codes", "samples", "manifold"}, {"error"}),
    "semi-supervised": ([], {"styles"}, {"error", "error_labels_alone", "error_difference"}),
    "clustering": ([], {"clusters"}, {"error_majority", "error_most_confident", "clusters_used"}),
    "reduction": ([], {"clusters", "plane"}, {"error_majority", "neighbour_error"}),
    "reduction, labels": (["--labels", "30"], {"styles", "plane"}, {"error", "neighbour_error"}),
}


@pytest.mark.parametrize("name", SMOKES)
def test_smoke(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra, pictures, numbers = SMOKES[name]
    metrics = aae.main(["--mode", name.split(",")[0], "--smoke", *extra, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    folder = tmp_path / "seed-0"
    pictures = {f"{picture}.png" for picture in pictures | {"losses", "reconstructions"}}
    assert {path.name for path in folder.iterdir()} == pictures | {"checkpoint.pt", "metrics.json"}
    for picture in pictures:
        assert imread(folder / picture).std() > 0.05
    results = metrics["runs"][0]["results"]
    assert numbers <= set(results)
    assert all(math.isfinite(value) for value in results.values())
    assert all(0 <= results[key] <= 1 for key in results if key.startswith("error") and "diff" not in key)
    history = metrics["runs"][0]["history"]
    assert [record["epoch"] for record in history] == [1, 2]
    printed = capsys.readouterr().out
    for key in numbers:
        assert re.search(rf"^{re.escape(aae_evaluation.ROWS[key].words)}  ", printed, re.MULTILINE)
    lines = printed.splitlines()
    assert lines[0] == f"{name.split(',')[0]} on digits, 2 epochs, 1 run"
    # Every number has its words, or stands beside the one that it is the error of.
    own = {row.error for row in aae_evaluation.ROWS.values()}
    assert set(results) <= set(aae_evaluation.ROWS) | own
    files = [str(path) for path in sorted(folder.iterdir())]
    assert lines[-len(files) - 1 :] == [*files, str(tmp_path / "metrics.json")]
    assert "_" not in "".join(lines[: -len(files) - 1])


def test_several_seeds_are_paired(tmp_path: Path) -> None:
    metrics = aae.main(
        [
            "--mode",
            "semi-supervised",
            *TINY,
            "--labels",
            "10",
            "--seeds",
            "2",
            "--seed",
            "3",
            "--out",
            str(tmp_path),
        ]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "seed-3", "seed-4"}
    differences = [r["results"]["error"] - r["results"]["error_labels_alone"] for r in metrics["runs"]]
    summary = metrics["summary"]["error_difference"]
    assert summary["mean"] == pytest.approx(np.mean(differences))
    assert summary["standard_error"] == pytest.approx(np.std(differences, ddof=1) / math.sqrt(2))


def test_seeds_draw_labels_and_validation(tmp_path: Path) -> None:
    args = aae.parse_args(["--mode", "semi-supervised"])
    first, again, second = (aae.load_data(args, seed) for seed in (0, 0, 1))
    assert len(first.few[1]) == 100
    assert torch.equal(first.few[0], again.few[0])
    assert not torch.equal(first.few[0].sum(1).sort().values, second.few[0].sum(1).sort().values)
    # Held-out images are the same for all seeds, and none of them is trained on.
    assert torch.equal(first.heldout, second.heldout)
    assert not len(first.validation)

    data = aae.load_data(aae.parse_args(["--mode", "unsupervised"]), 0)
    assert (len(data.images), len(data.validation), len(data.heldout)) == (1350, 150, 297)
    together = torch.cat([data.images, data.validation])
    assert torch.equal(
        together.sum(1).sort().values, datasets.load("digits").train.flatten(1).sum(1).sort().values
    )


CONFIGURATIONS = {
    "steered": ["--mode", "steered", "--prior", "swiss-roll", "--labels", "20"],
    "semi-supervised": ["--mode", "semi-supervised", "--labels", "10"],
    "reduction": ["--mode", "reduction"],
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    done: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in done:
            folder = tmp_path_factory.mktemp("whole")
            aae.main([*TINY, *CONFIGURATIONS[name], "--checkpoint-every", "1000", "--out", str(folder)])
            done[name] = training(folder)
        return done[name]

    return get


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aae.aae_pictures, "save_all", lambda *_, **__: None)
    monkeypatch.setattr(aae.aae_evaluation, "evaluate", lambda *_, **__: {"error": 0.0})


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_resumed_is_uninterrupted(
    name: str, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = uninterrupted(name)
    rng = random.Random(name)
    # Two stops, at random steps of nine, with checkpoints every so often.
    argv = [*TINY, *CONFIGURATIONS[name], "--checkpoint-every", str(rng.choice([1, 2]))]
    argv += ["--resume", "--out", str(tmp_path)]
    for steps in sorted(rng.sample(range(1, 9), 2)):
        run_stopped(monkeypatch, Trainer, steps, aae.main, argv)
        torch.manual_seed(rng.randrange(1000))  # another process has another state
    aae.main(argv)
    assert training(tmp_path) == expected


def moments(phase: str) -> Callable[[dict[str, Any]], Any]:
    """Loses the moments of one phase."""

    def lose(state: dict[str, Any]) -> None:
        for saved in state["optimisers"][phase].values():
            for moment in saved["state"].values():
                moment["exp_avg_sq"].mul_(1.5)

    return lose


# Parts of the state, and how to lose each: as if the checkpoint did not have it.
LOSSES_OF_STATE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pair": lambda state: state["pair"]["decoder.layers.0.bias"].add_(1e-3),
    "batch norm": lambda state: state["pair"]["encoder.heads.1.running_mean"].add_(1e-3),
    "discriminators": lambda state: state["discriminators"]["y.layers.0.bias"].add_(1e-3),
    **{
        f"moments of {phase}": moments(phase)
        for phase in ("reconstruction", "discriminators", "guide", "supervised")
    },
    "random": lambda state: state["random"].update(cpu=torch.Generator().manual_seed(5).get_state()),
    "generator": lambda state: state.update(generator=torch.Generator().manual_seed(0).get_state()),
    "order": lambda state: state.update(order=state["order"].flip(0)),
    "position": lambda state: state.update(position=len(state["order"])),
    "step": lambda state: state.update(step=state["step"] - 1),
    "history": lambda state: state.update(history=[]),
    "since_record": lambda state: state.update(since_record=({}, 0.0)),
}


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("part", [None, *LOSSES_OF_STATE])
def test_every_part_of_the_state_matters(
    part: str | None, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any one of them a resumed run is another one: so the test above would notice."""
    name = "semi-supervised"
    argv = [*TINY, *CONFIGURATIONS[name], "--resume", "--out", str(tmp_path)]
    run_stopped(monkeypatch, Trainer, 4, aae.main, argv)  # in the middle of an epoch
    path = tmp_path / "seed-0" / "checkpoint.pt"
    saved = checkpoint.load(path, aae.KIND)
    assert saved["training"]["step"] == 4
    if part is not None:
        LOSSES_OF_STATE[part](saved["training"])
    checkpoint.save(path, aae.KIND, saved)
    aae.main(argv)
    assert (training(tmp_path) == uninterrupted(name)) == (part is None)


@pytest.mark.usefixtures("_no_pictures")
def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    argv = [*TINY, "--mode", "clustering", "--clusters", "5", "--out", str(tmp_path)]
    aae.main(argv)
    with pytest.raises(SystemExit, match="--resume"):
        aae.main(argv)
    with pytest.raises(SystemExit, match=r"clusters 5 \(now 6\)"):
        aae.main([*argv, "--resume", "--clusters", "6"])
    # More seeds are more of the same.
    metrics = aae.main([*argv, "--resume", "--seeds", "2"])
    assert len(metrics["runs"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "clustering", "--labels", "100"], "--labels is not for --mode clustering"),
        (["--mode", "semi-supervised", "--clusters", "16"], "--clusters is not for"),
        (["--mode", "reduction", "--prior", "mixture"], "--prior is not for"),
        (["--mode", "steered", "--prior", "gaussian"], "needs a prior with parts"),
        (["--prior", "mixture", "--latent", "3"], "in the plane"),
        (["--data", "omniglot"], "invalid choice"),
        (["--clusters", "0"], "at least 1"),
        (["--mode", "clustering", "--noise", "-1"], "--noise"),
        (["--mode", "clustering", "--clusters", "1"], "--clusters"),
        (
            ["--mode", "reduction", "--labels", "30", "--clusters", "12"],
            "not for --mode reduction with --labels",
        ),
        (["--test-size", "19"], "at least 20"),
        (["--batch-size", "1"], "--batch-size"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        aae.parse_args(argv)
    assert message in capsys.readouterr().err


def test_defaults() -> None:
    def of(*argv: str) -> tuple[Any, ...]:
        args = aae.parse_args(list(argv))
        return args.prior, args.latent, args.labels, args.clusters, args.epochs

    assert of() == ("gaussian", 8, None, None, 200)
    assert of("--prior", "swiss-roll") == ("swiss-roll", 2, None, None, 200)
    assert of("--mode", "steered") == ("mixture", 2, 300, None, 200)
    assert of("--mode", "semi-supervised") == (None, 3, 100, None, 100)
    assert of("--mode", "semi-supervised", "--data", "mnist") == (None, 10, 100, None, 100)
    assert of("--mode", "semi-supervised", "--latent", "7") == (None, 7, 100, None, 100)
    assert of("--mode", "clustering", "--clusters", "30") == (None, 3, None, 30, 100)
    assert of("--mode", "reduction") == (None, 2, None, 20, 100)
    assert of("--mode", "reduction", "--labels", "100") == (None, 2, 100, None, 100)


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        ("", "aae-unsupervised-digits"),
        ("--prior gaussian", "aae-unsupervised-digits"),
        ("--prior swiss-roll", "aae-unsupervised-swiss-roll-digits"),
        ("--prior mixture --data mnist", "aae-unsupervised-mixture-mnist"),
        ("--mode steered --prior mixture", "aae-steered-digits"),
        ("--mode steered --prior swiss-roll", "aae-steered-swiss-roll-digits"),
        ("--mode reduction", "aae-reduction-digits"),
        ("--mode reduction --labels 100", "aae-reduction-labels-digits"),
        ("--mode semi-supervised --labels 50", "aae-semi-supervised-digits"),
        ("--mode clustering --smoke", "smoke/aae-clustering-digits"),
        ("--mode reduction --labels 100 --smoke", "smoke/aae-reduction-labels-digits"),
    ],
)
def test_default_folder(argv: str, folder: str) -> None:
    assert aae.parse_args(argv.split()).out == Path("results", folder)


def test_help_tells_the_defaults_by_mode(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        aae.parse_args(["--help"])
    printed = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    assert "None" not in printed
    for name, modes in {
        "labels": ("steered", "semi-supervised"),
        "clusters": ("clustering", "reduction"),
        "latent": ("semi-supervised", "clustering", "reduction"),
        "noise": MODES,
    }.items():
        told = printed.split(f"--{name} {name.upper()} ")[1].split(" --")[0]
        for mode in modes:
            # On MNIST: digits are told apart from it in words.
            default = getattr(aae.parse_args(["--mode", mode, "--data", "mnist"]), name)
            assert f"{default} in {mode}" in told


@pytest.mark.parametrize("below", ["", "below"])
def test_out_that_is_a_file(below: str, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("")
    with pytest.raises(SystemExit) as raised:
        aae.main(["--smoke", "--out", str(file / below)])
    assert str(raised.value) == f"error: --out {file / below}: {file} is a file, name a folder"


@pytest.mark.usefixtures("_no_pictures")
def test_errors_of_the_system_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit) as raised:
        aae.main(["--smoke", "--out", str(tmp_path / "new")])
    assert str(raised.value) == f"error: {tmp_path / 'new' / 'seed-0'}: Permission denied"


@pytest.mark.usefixtures("_no_pictures")
def test_words_for_one_and_for_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TINY, "--mode", "clustering"]
    aae.main([*argv, "--epochs", "1", "--out", str(tmp_path / "a")])
    assert "clustering on digits, 1 epoch, 1 run\n" in capsys.readouterr().out
    aae.main([*argv, "--seeds", "2", "--out", str(tmp_path / "b")])
    assert "clustering on digits, 3 epochs, 2 runs\n" in capsys.readouterr().out


def test_too_few_images_for_the_labels(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="less than one for each of the 10 classes"):
        aae.main(["--mode", "semi-supervised", "--labels", "9", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="training images, and 20 are to be labelled"):
        aae.main(["--mode", "steered", "--labels", "200", "--train-size", "100", "--out", str(tmp_path)])


# What must hold, in short runs; docs/reproduction.md has the full ones.


@pytest.mark.slow
def test_unlabelled_images_help_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aae.aae_pictures, "save_all", lambda *_, **__: None)
    argv = ["--mode", "semi-supervised", "--epochs", "40", "--hidden", "128", "--seeds", "3"]
    summary = aae.main([*argv, "--out", str(tmp_path)])["summary"]["error_difference"]
    assert summary["mean"] < -0.015
    assert summary["mean"] < -2 * summary["standard_error"]


@pytest.mark.slow
def test_clusters_are_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aae.aae_pictures, "save_all", lambda *_, **__: None)
    argv = ["--mode", "clustering", "--epochs", "40", "--hidden", "128", "--seeds", "2"]
    metrics = aae.main([*argv, "--out", str(tmp_path)])
    assert all(run["results"]["error_majority"] <= 0.25 for run in metrics["runs"])
