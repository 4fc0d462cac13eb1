"""Adversarial training that can be stopped anywhere and goes on to the bit, and a classifier beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_iw import AdversarialSVI, FusedOptim

from ..checkpoint import random_state, restore_random_state
from ..running import progress_bar, stop_signals
from ..training import set_learning_rate
from .networks import ClassAAE, Encoder, Few, HeadsAAE, LatentAAE
from .priors import COMPONENTS

__all__ = ["Data", "Trainer", "choose_labelled", "decay", "train_classifier"]

# Adam's first moment is short, as usual where two networks chase one another.
BETAS = (0.5, 0.999)
PHASES = ("reconstruction", "discriminator", "guide", "supervised")


def decay(progress: float) -> float:
    """The learning rate's factor at a share ``progress`` of the run: 1 up to the middle, then down to 0.1."""
    return 1.0 - 1.8 * max(0.0, progress - 0.5)


def choose_labelled(labels: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Rows of images whose labels are known, as many of each class, at random.

    Arguments:
        labels: Class ids, shape ``[N]``.
        number: How many; what is left after division by the number of classes is left out.
        generator: Of the draws.

    Raises:
        ValueError: If that is less than one a class, or if a class has too few images.
    """
    each = number // COMPONENTS
    if each < 1:
        raise ValueError(f"{number} labels are less than one for each of the {COMPONENTS} classes")
    rows = []
    for c in range(COMPONENTS):
        members = (labels == c).nonzero()[:, 0]
        if len(members) < each:
            raise ValueError(f"class {c} has {len(members)} training images, and {each} are to be labelled")
        rows.append(members[torch.randperm(len(members), generator=generator)[:each]])
    return torch.cat(rows)


class Data(NamedTuple):
    """Images ``[N, D]`` and classes ``[N]``, and what was drawn of them: labels and validation."""

    images: Tensor
    labels: Tensor
    heldout: Tensor
    heldout_labels: Tensor
    validation: Tensor
    few: Few | None
    shape: tuple[int, ...]


class Trainer:
    """Steps of all phases on a pair, and all the state that the next one depends on.

    Arguments:
        pair: The model and its guide.
        images: Training images, shape ``[N, D]``.
        few: Labelled images and their classes, or ``None``; a batch of them comes with every step.
        hidden: The width of the discriminators.
        batch_size: Images a step, at least two.
        epochs: Passes over the images.
        learning_rate: Of all phases, at first; see :func:`decay`.
        seed: Of the order of the images, and of which labelled ones are seen when.
        labels: The classes of all images, shape ``[N]``, for a pair that is told them.

    Attributes:
        step: Steps taken.
        history: A dict an epoch: ``epoch``, ``seconds``, and the means of all losses since the last one, in
            nats per image, those of discriminators and guide per code. Where heads are to be apart, their
            ``penalty`` is no part of ``reconstruction``. And what ``run`` was told to measure.
    """

    def __init__(
        self,
        pair: LatentAAE | HeadsAAE | ClassAAE,
        images: Tensor,
        few: Few | None,
        *,
        hidden: int,
        batch_size: int,
        epochs: int,
        learning_rate: float,
        seed: int,
        labels: Tensor | None = None,
    ) -> None:
        self.pair, self.images, self.few, self.labels = pair, images, few, labels
        self.batch_size, self.epochs, self.learning_rate = batch_size, epochs, learning_rate
        self.discriminators = nn.ModuleDict(pair.discriminators(hidden)).to(images.device)
        options = {"lr": learning_rate, "betas": BETAS}
        self.optimisers = {phase: FusedOptim(torch.optim.Adam, dict(options)) for phase in PHASES}
        supervised = isinstance(pair, HeadsAAE) and few is not None
        self.svi = AdversarialSVI(
            pair.model,
            pair.guide,
            dict(self.discriminators.items()),
            self.optimisers["reconstruction"],
            discriminator_optim=self.optimisers["discriminator"],
            guide_optim=self.optimisers["guide"],
            supervised=pair.classify if supervised else None,
            supervised_optim=self.optimisers["supervised"] if supervised else None,
            condition=pair.condition if isinstance(pair, LatentAAE) and pair.steered else None,
        )
        self.generator = torch.Generator(images.device).manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long, device=images.device)
        self.position = self.step = 0
        self.history: list[dict[str, float]] = []
        self._totals: dict[str, float] = {}
        self._seconds = 0.0

    @property
    def steps_per_epoch(self) -> int:
        size = len(self.images)
        return math.ceil(size / self.batch_size) - (size % self.batch_size == 1)

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on, for :func:`checkpoint.save`."""
        return {
            "pair": self.pair.state_dict(),
            "discriminators": self.discriminators.state_dict(),
            "optimisers": self.svi.get_state(),
            "random": random_state(),
            "generator": self.generator.get_state(),
            "order": self.order,
            "position": self.position,
            "step": self.step,
            "history": self.history,
            "since_record": (self._totals, self._seconds),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.pair.load_state_dict(state["pair"])
        self.discriminators.load_state_dict(state["discriminators"])
        self.svi.set_state(state["optimisers"])
        restore_random_state(state["random"])
        self.generator.set_state(state["generator"])
        self.order = state["order"].to(self.images.device)
        self.position, self.step = state["position"], state["step"]
        self.history = state["history"]
        self._totals, self._seconds = state["since_record"]

    def next_batch(self) -> tuple[Tensor, Few | None]:
        """The next images, in a new random order every epoch, and labelled ones: the same, if all are."""
        device = self.images.device
        if self.position == len(self.order):
            self.order = torch.randperm(len(self.images), generator=self.generator, device=device)
            self.position = 0
            rate = self.learning_rate * decay(self.step / self.steps_per_epoch / self.epochs)
            for optimiser in self.optimisers.values():
                set_learning_rate(optimiser, rate)
        # One image alone has no variance for batch normalisation: the last one then joins those before.
        lonely = len(self.order) - self.position == self.batch_size + 1
        rows = self.order[self.position : self.position + self.batch_size + lonely]
        self.position += len(rows)
        if self.labels is not None:
            return self.images[rows], (self.images[rows], self.labels[rows])
        if self.few is None:
            return self.images[rows], None
        size = len(self.few[0])
        drawn = torch.randperm(size, generator=self.generator, device=device)[: self.batch_size]
        return self.images[rows], (self.few[0][drawn], self.few[1][drawn])

    def take_step(self) -> dict[str, float]:
        """A step of every phase; returns its losses in nats per image, those of codes in nats per code."""
        start = time.perf_counter()
        args, labelled = self.pair.batch(*self.next_batch())
        penalty = None
        if isinstance(self.pair, HeadsAAE) and self.pair.decoder.distance:
            # Before the step, as the loss is that of the parameters before it.
            penalty = self.pair.decoder.penalty().item()
        losses = self.svi.step(*args, labelled=labelled)
        found = {"reconstruction": losses.reconstruction / len(args[0])}
        if penalty is not None:
            found["reconstruction"] -= penalty
            found["penalty"] = penalty
        for site, value in losses.discriminator.items():
            found[f"discriminator_{site}"] = value
        for site, value in losses.guide.items():
            found[f"guide_{site}"] = value
        if labelled is not None and losses.supervised is not None:
            found["supervised"] = losses.supervised / len(labelled[0])
        for name, value in {**found, "steps": 1.0}.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
        self._seconds += time.perf_counter() - start
        self.step += 1
        return found

    def record(self, measured: dict[str, float]) -> None:
        """Add to the history: the means of the losses, and what was measured beside them."""
        steps = self._totals.pop("steps")
        means = {name: total / steps for name, total in self._totals.items()}
        epoch = self.step / self.steps_per_epoch
        self.history.append({"epoch": epoch, **means, **measured, "seconds": self._seconds})
        self._totals, self._seconds = {}, 0.0

    def measured(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What ``measure`` says of the pair in eval mode, where it draws nothing."""
        self.pair.eval()
        with torch.no_grad():
            found = measure()
        self.pair.train()
        return found

    def run(
        self,
        *,
        save: Callable[[], None],
        save_every: int,
        description: str,
        measure: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Train to the end of the last epoch.

        Arguments:
            save: Called at the end, before a stop and every ``save_every`` steps.
            save_every: In steps.
            description: The progress bar's label.
            measure: Called at the end of every epoch, in eval mode; what it gives goes into the history.

        Raises:
            KeyboardInterrupt: At the end of a step, when a signal has asked for it.
        """
        self.pair.train()
        self.discriminators.train()
        end = self.epochs * self.steps_per_epoch
        bar = progress_bar(end, description)
        bar.update(self.step)
        # Checking arguments of distributions takes as long as a small network's densities.
        with bar, stop_signals() as received, pyro.validation_enabled(False):
            while self.step < end:
                losses = self.take_step()
                text = f"epoch {-(-self.step // self.steps_per_epoch)}/{self.epochs}, "
                bar.set_postfix_str(text + f"-log p(x|z) {losses['reconstruction']:.2f}", refresh=False)
                bar.update()
                if self.position == len(self.order):
                    self.record(self.measured(measure))
                if received or self.step == end or self.step % save_every == 0:
                    save()
                if received:
                    raise KeyboardInterrupt


def train_classifier(
    encoder: Encoder, few: Few, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> None:
    """Train an encoder's heads on labelled images alone, as the supervised phase does, with as many steps.

    Arguments:
        encoder: Trained in place.
        few: Images ``[N, D]`` and their classes ``[N]``.
        steps: Gradient steps.
        batch_size: Images a step.
        learning_rate: At first; see :func:`decay`.
        seed: Of which images are seen when.
    """
    images, labels = few
    generator = torch.Generator(images.device).manual_seed(seed)
    optimiser = torch.optim.Adam(encoder.parameters(), learning_rate, betas=BETAS)
    encoder.train()
    with progress_bar(steps, "labels alone") as bar:
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * decay(step / steps)
            rows = torch.randperm(len(images), generator=generator, device=images.device)[:batch_size]
            optimiser.zero_grad()
            F.cross_entropy(encoder.logits(images[rows]), labels[rows], reduction="sum").backward()
            optimiser.step()
            bar.update()
