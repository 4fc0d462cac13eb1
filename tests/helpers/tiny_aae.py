"""A tiny run of the adversarial autoencoders' example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aae
import torch

from helpers.resuming import flat
from shared import checkpoint
from shared.aae.networks import HeadsAAE
from shared.aae.training import Trainer

MODES = tuple(aae.DEFAULTS)
# 3 steps an epoch, the last of them a small one, in 3 epochs.
TINY = ["--train-size", "50", "--test-size", "30", "--batch-size", "20", "--epochs", "3", "--hidden", "8"]
TINY += ["--parzen-samples", "20", "--checkpoint-every", "1"]


def training(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind in its checkpoint but for the seconds."""
    leaves = flat(checkpoint.load(folder / "seed-0" / "checkpoint.pt", aae.KIND)["training"])
    return {name: leaf for name, leaf in leaves.items() if not name.endswith(("seconds", "since_record/1"))}


def tiny_trainer(few: bool = True, images: int = 8, **options: Any) -> Trainer:
    """Three steps an epoch, the last of them a small one."""
    pair = HeadsAAE(images, heads=10, latent=2, hidden=3)
    labelled = (torch.rand(4, images), torch.arange(4)) if few else None
    options = {"hidden": 3, "batch_size": 3, "epochs": 4, "learning_rate": 1e-2, "seed": 0, **options}
    return Trainer(pair, torch.eye(images), labelled, **options)
