"""A training run that can be stopped anywhere and goes on to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_iw import FusedOptim, ImportanceWeightedELBO

from ..checkpoint import random_state, restore_random_state
from ..datasets import binarize
from ..evaluation import log_marginal, mean_bound
from ..running import progress_bar, stop_signals
from ..training import set_learning_rate
from .networks import DeepVAE, Stage

__all__ = ["Trainer"]

# Held-out images and draws for the NLL during training: a second or two an epoch.
CURVE_IMAGES, CURVE_PARTICLES = 500, 500


class Trainer:
    """Gradient steps on a network, and all the state that the next one depends on.

    Arguments:
        network: The pair.
        loss: What to minimise.
        images: Training probabilities, or bits if ``binary``, shape ``[N, D]``.
        binary: Whether the images are bits; otherwise they are binarised afresh at every access.
        batch_size: Images a step.
        seed: Of the order of the images and of their binarisation.

    Attributes:
        step: Steps taken.
        history: A dict an epoch, and one at the end of a stage that ends within an epoch: ``step``,
            ``epoch``, ``learning_rate``, ``train_bound`` (the mean since the last one; no bound during a
            warm-up of the KL term), ``heldout_bound``, ``heldout_nll`` and ``seconds`` of training. The
            NLL, which alone compares runs with different bounds, is :data:`CURVE_PARTICLES` draws' on
            :data:`CURVE_IMAGES` images.
    """

    def __init__(
        self,
        network: DeepVAE,
        loss: ImportanceWeightedELBO,
        images: Tensor,
        *,
        binary: bool,
        batch_size: int,
        seed: int,
    ) -> None:
        self.network, self.loss, self.images = network, loss, images
        self.binary, self.batch_size = binary, batch_size
        self.steps_per_epoch = math.ceil(len(images) / batch_size)
        # Adam's epsilon is the paper's; the learning rate is set at the beginning of a stage.
        self.optimiser = FusedOptim(torch.optim.Adam, lambda _: {"lr": self.learning_rate, "eps": 1e-4})
        self.svi = SVI(network.model, network.guide, self.optimiser, loss=loss)
        self.learning_rate = 0.0
        self.generator = torch.Generator(images.device).manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long, device=images.device)
        self.position = 0
        self.restart()

    def restart(self) -> None:
        """Count steps from 0 again and forget the history; parameters, moments and generators stay."""
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._total = self._seconds = 0.0
        self._seen = 0

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on, for :func:`checkpoint.save`."""
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.get_state(),
            "loss_steps": self.loss.steps,
            "random": random_state(),
            "generator": self.generator.get_state(),
            "order": self.order,
            "position": self.position,
            "step": self.step,
            "history": self.history,
            "since_record": (self._total, self._seen, self._seconds),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.network.load_state_dict(state["network"])
        self.optimiser.set_state(state["optimiser"])
        self.loss.steps = state["loss_steps"]
        restore_random_state(state["random"])
        self.generator.set_state(state["generator"])
        self.order = state["order"].to(self.images.device)
        self.position = state["position"]
        self.step = state["step"]
        self.history = state["history"]
        self._total, self._seen, self._seconds = state["since_record"]

    def begin(self, stage: Stage) -> None:
        """Take the learning rate of a stage, at its start or on the way."""
        self.learning_rate = stage.learning_rate
        set_learning_rate(self.optimiser, stage.learning_rate)

    def next_batch(self) -> Tensor:
        """The next images as bits, in a new random order every epoch."""
        if self.position == len(self.order):
            self.order = torch.randperm(len(self.images), generator=self.generator, device=self.images.device)
            self.position = 0
        rows = self.order[self.position : self.position + self.batch_size]
        self.position += len(rows)
        batch = self.images[rows]
        return batch if self.binary else binarize(batch, self.generator)

    def take_step(self) -> float:
        """A gradient step; returns the batch's bound in nats per datapoint."""
        start = time.perf_counter()
        batch = self.next_batch()
        bound = -self.svi.step(batch)
        self._total += bound
        self._seen += len(batch)
        self._seconds += time.perf_counter() - start
        self.step += 1
        return bound / len(batch)

    def record(self, heldout: Tensor, seed: int) -> None:
        """Add to the history."""
        self.network.eval()
        shown = heldout[:CURVE_IMAGES]
        record = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "learning_rate": self.learning_rate,
            "train_bound": self._total / self._seen,
            "heldout_bound": mean_bound(self.network, heldout, self.loss, seed=seed),
            "heldout_nll": -log_marginal(self.network, shown, CURVE_PARTICLES, seed=seed).mean().item(),
            "seconds": self._seconds,
        }
        self.network.train()
        self.history.append(record)
        self._total = self._seconds = 0.0
        self._seen = 0

    def run(
        self,
        stages: list[Stage],
        heldout: Tensor,
        *,
        seed: int,
        save: Callable[[], None],
        save_every: int,
        description: str,
    ) -> None:
        """Train to the end of the last stage.

        Arguments:
            stages: The schedule.
            heldout: Held-out bits, shape ``[N', D]``.
            seed: Of the draws on held-out images.
            save: Called at the end of every stage, before a stop and every ``save_every`` steps.
            save_every: In steps.
            description: The progress bar's label.

        Raises:
            KeyboardInterrupt: At the end of a step, when a signal has asked for it.
        """
        self.network.train()
        bar = progress_bar(stages[-1].end, description)
        bar.update(self.step)
        # Checking arguments of distributions takes as long as a small network's densities.
        with bar, stop_signals() as received, pyro.validation_enabled(False):
            for number, stage in enumerate(stages, 1):
                if self.step >= stage.end:
                    continue
                self.begin(stage)
                while self.step < stage.end:
                    bound = self.take_step()
                    text = f"stage {number}/{len(stages)}, train bound {bound:.2f}"
                    bar.set_postfix_str(text, refresh=False)
                    bar.update()
                    if self.position == len(self.order) or self.step == stage.end:
                        self.record(heldout, seed)
                    if received or self.step == stage.end or self.step % save_every == 0:
                        save()
                    if received:
                        raise KeyboardInterrupt
