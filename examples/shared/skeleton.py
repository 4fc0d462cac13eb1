"""The skeleton of the smaller examples: options, a training loop, and the files they leave behind."""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI
from torch import Tensor

from pyro_iw import ImportanceWeightedELBO

from .options import (
    add_loss_options,
    as_settings,
    at_smoke_size,
    new_parser,
    positive_float,
    positive_int,
)
from .running import in_one_line, progress_bar, smoke_apart, step

__all__ = ["finish", "fit", "parse", "training_parser"]


def training_parser(doc: str, out: str, minibatches: bool = True, **defaults: Any) -> argparse.ArgumentParser:
    """The options of training; what ``defaults`` leaves out is as in ``vae.py``.

    Arguments:
        doc: The example's docstring, whose first line is the description.
        out: The folder for the results.
        minibatches: Whether a step may see less than all data, which under global latents it may not.
        defaults: Other defaults, by option.
    """
    parser = new_parser(doc)
    add = parser.add_argument
    add_loss_options(parser)
    add("--epochs", type=positive_int, default=20, help="passes over the training data")
    if minibatches:
        add("--batch-size", type=positive_int, default=20, help="datapoints a gradient step")
    add("--learning-rate", type=positive_float, default=1e-3, help="at first; it falls to a tenth")
    add("--seed", type=int, default=0, help="of everything random")
    add(
        "--out", type=Path, default=Path(out), help="folder for the results; of a smoke run, in results/smoke"
    )
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    parser.set_defaults(**defaults)
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, smoke: Mapping[str, int]
) -> argparse.Namespace:
    """Parse the command line; in a smoke run no size exceeds those of ``smoke``."""
    return smoke_apart(parser, at_smoke_size(parser.parse_args(argv), smoke))


def fit(
    model: Callable,
    guide: Callable,
    data: tuple[Tensor, ...],
    loss: ImportanceWeightedELBO,
    args: argparse.Namespace,
    description: str = "training",
) -> list[float]:
    """Train on minibatches with clipped Adam, whose learning rate falls to a tenth.

    Arguments:
        model: Called with a minibatch of each tensor.
        guide: Likewise.
        data: Tensors ``[N, ...]``, shuffled together.
        loss: What to minimise.
        args: ``epochs``, ``learning_rate`` and ``batch_size``, without which a step sees all data.
        description: The progress bar's label.

    Returns:
        The bound in nats per datapoint, averaged over each epoch.
    """
    size = len(data[0])
    batch_size = getattr(args, "batch_size", size)
    steps = args.epochs * math.ceil(size / batch_size)
    optimiser = pyro.optim.ClippedAdam({"lr": args.learning_rate, "lrd": 0.1 ** (1 / steps)})
    svi = SVI(model, guide, optimiser, loss=loss)
    history, done = [], 0
    with progress_bar(steps, description) as bar:
        for _ in range(args.epochs):
            total = 0.0
            for rows in torch.randperm(size).split(batch_size):
                batch = tuple(tensor[rows] for tensor in data)
                total -= step(svi, batch, args.learning_rate, done)
                done += 1
                bar.update()
            history.append(total / size)
            bar.set_postfix_str(f"bound {history[-1]:.2f}", refresh=False)
    return history


def finish(
    args: argparse.Namespace,
    name: str,
    run: Callable[[argparse.Namespace], dict],
    draw: Callable[[dict], Figure],
    table: Callable[[dict], str],
    also: Mapping[str, Callable[[dict], Figure]] | None = None,
) -> dict:
    """Seed, run, and leave ``<name>.json``, ``<name>.png`` and a table on the screen.

    Arguments:
        args: ``out`` and ``seed``.
        name: Of the files.
        run: Makes the results.
        draw: The figure of results.
        table: Results in words.
        also: Further figures, by the names of their files.

    Returns:
        The results, with ``settings`` and ``seconds``, as in the file.
    """
    start = time.perf_counter()
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    with in_one_line():
        args.out.mkdir(parents=True, exist_ok=True)
        results = {"settings": as_settings(args), **run(args)}
        results["seconds"] = time.perf_counter() - start
        # JSON knows neither NaN nor the infinite k̂ of too few particles.
        text = re.sub(r"-?\b(NaN|Infinity)\b", "null", json.dumps(results, indent=2))
        (args.out / f"{name}.json").write_text(text + "\n")
        figures = {name: draw, **(also or {})}
        for file, make in figures.items():
            make(results).savefig(args.out / f"{file}.png", dpi=100)
    print(table(results), f"Took {results['seconds']:.0f} s.", sep="\n")
    print(args.out / f"{name}.json", *(args.out / f"{file}.png" for file in figures), sep="\n")
    return results
