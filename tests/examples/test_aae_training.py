"""Training of the adversarial autoencoders' example: batches, labels, learning rates, losses."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch.nn import functional as F

from helpers.tiny_aae import tiny_trainer
from shared.aae.networks import ClassAAE, Encoder, HeadsAAE, LatentAAE
from shared.aae.priors import UNLABELLED, Mixture
from shared.aae.training import Trainer, choose_labelled, decay, train_classifier


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
        # A single number is no layer's: FusedOptim tries on one whether there is a fused step.
        if sum(p.numel() for group in self.param_groups for p in group["params"]) > 1:
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


def test_what_is_measured_after_an_epoch_is_in_the_history() -> None:
    trainer = tiny_trainer(epochs=2)
    modes = []

    def measure() -> dict[str, float]:
        modes.append((trainer.pair.training, torch.is_grad_enabled()))
        return {"error": float(len(modes))}

    trainer.run(save=lambda: None, save_every=100, description="", measure=measure)
    assert modes == [(False, False)] * 2
    assert trainer.pair.training
    assert [record["error"] for record in trainer.history] == [1, 2]


def test_a_pair_that_is_told_the_classes_is_told_the_right_ones() -> None:
    x, labels = torch.eye(8), torch.arange(8)
    pair = ClassAAE(8, classes=10, latent=2, hidden=3)
    trainer = Trainer(
        pair, x, None, labels=labels, hidden=3, batch_size=3, epochs=2, learning_rate=1e-2, seed=0
    )
    images, few = trainer.next_batch()
    (told, classes), supervised = pair.batch(images, few)
    assert supervised is None
    assert torch.equal(told, images)
    assert torch.equal(x[classes], images)
    trainer.run(save=lambda: None, save_every=100, description="")
    assert set(trainer.history[0]) == {"epoch", "seconds", "reconstruction", "discriminator_z", "guide_z"}


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
