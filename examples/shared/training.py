"""What trainings share: the loop of a VAE on images, and learning rates that change on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import pyro
import torch
from pyro.infer import ELBO, SVI
from pyro.optim import PyroOptim
from torch import Tensor

from .datasets import binarize
from .evaluation import mean_bound
from .networks import VAE
from .running import progress_bar, step

__all__ = ["set_learning_rate", "train"]


def train(
    vae: VAE,
    images: Tensor,
    heldout: Tensor,
    loss: ELBO,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    binary: bool = False,
    heldout_losses: Mapping[str, ELBO] | None = None,
    description: str = "training",
) -> list[dict[str, float]]:
    """Train with ``SVI`` and record the bounds after every epoch.

    Arguments:
        vae: The model and its guide.
        images: Training probabilities, shape ``[N, D]``.
        heldout: Binarised held-out images, shape ``[N', D]``.
        loss: What to minimise.
        epochs: Passes over the training images.
        batch_size: Images a gradient step.
        learning_rate: Adam's.
        seed: Of the order of the images, their binarisation and the held-out draws.
        binary: Whether the images are binarised already.
        heldout_losses: Losses to evaluate on the held-out images after every epoch, by name;
            ``{"heldout_bound": loss}`` by default.
        description: The progress bar's label.

    Returns:
        A dict an epoch: ``epoch``, ``train_bound`` (the mean over the epoch), the held-out bounds
        and ``seconds``, the training time alone.
    """
    optimiser = pyro.optim.Adam({"lr": learning_rate, "eps": 1e-4})
    svi = SVI(vae.model, vae.guide, optimiser, loss=loss)
    heldout_losses = {"heldout_bound": loss} if heldout_losses is None else heldout_losses
    generator = torch.Generator(images.device).manual_seed(seed)
    history: list[dict[str, float]] = []
    done = 0
    with progress_bar(epochs * math.ceil(len(images) / batch_size), description) as bar:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            total = 0.0
            order = torch.randperm(len(images), generator=generator, device=images.device)
            for rows in order.split(batch_size):
                batch = images[rows] if binary else binarize(images[rows], generator)
                step_loss = step(svi, (batch,), learning_rate, done)
                done += 1
                total -= step_loss
                postfix = f"epoch {epoch}/{epochs}, train bound {-step_loss / len(rows):.2f}"
                bar.set_postfix_str(postfix, refresh=False)
                bar.update()
            record = {
                "epoch": epoch,
                "train_bound": total / len(images),
                "seconds": time.perf_counter() - start,
            }
            for name, heldout_loss in heldout_losses.items():
                record[name] = mean_bound(vae, heldout, heldout_loss, seed=seed)
            history.append(record)
    return history


def set_learning_rate(optimiser: PyroOptim, rate: float) -> None:
    """Of the steps to come."""
    # By way of its state: after it has been loaded there is no optimiser yet whose rate could be set.
    states = optimiser.get_state()
    for state in states.values():
        for group in state["param_groups"]:
            group["lr"] = rate
    optimiser.set_state(states)
