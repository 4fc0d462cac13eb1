"""Seconds of training to a given held-out NLL on scikit-learn's 8×8 digits, for several ways to train.

All start from the same weights and see the same batches. The NLL is that of one evaluator for all, the
IWAE bound by hand with many draws, evaluated off the clock after every epoch. Try::

    python benchmarks/time_to_nll.py --particles 64 --target 23.5
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import measuring
import models
import pyro
import torch
from contestants import REFERENCE, Case, Contestant, Skip, registry
from torch import Tensor

NAMES = (
    REFERENCE,
    "PyTorch by hand, compiled",
    "Pyro RenyiELBO",
    "ours, SVI",
    "ours, module",
    "ours compiled, module",
    "ours compiled, backward 8, module",
    "IWAE(64), dreg, module",
    "MIWAE(8, 8), module",
)
SMOKE_NAMES = (REFERENCE, "Pyro RenyiELBO", "ours, module")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--target", type=float, default=24.0, help="held-out NLL to reach, in nats per datapoint")
    add("--particles", type=measuring.positive_int, default=64, help="draws a datapoint in training")
    add("--batch", type=measuring.positive_int, default=20, help="images a step")
    add("--learning-rate", type=float, default=1e-3, help="Adam's")
    add("--epochs", type=measuring.positive_int, default=40, help="passes over the data at the most")
    add("--seeds", type=measuring.positive_int, default=3, help="runs of each, for the median")
    add("--nll-particles", type=measuring.positive_int, default=500, help="draws an image of the evaluator")
    measuring.add_common_arguments(parser)
    args = measuring.parse(parser, argv)
    if args.smoke:
        args.particles, args.epochs, args.seeds, args.nll_particles = 4, 1, 1, 10
    return args


def digits(device: torch.device, smoke: bool) -> tuple[Tensor, Tensor]:
    """Training probabilities ``[N, 64]``, and held-out images as bits drawn once."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit(
            "error: the digits come with scikit-learn: pip install 'pyro-iw[examples]'"
        ) from None
    generator = torch.Generator().manual_seed(0)
    images = torch.as_tensor(load_digits().data, dtype=torch.float32) / 16
    images = images[torch.randperm(len(images), generator=generator)]
    train, test = (images[:60], images[60:90]) if smoke else (images[:1500], images[1500:])
    return train.to(device), torch.bernoulli(test, generator=generator).to(device)


def shuffled(train: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches without end, each drawn as bits anew; the same ones for the same seed."""
    generator = torch.Generator(train.device).manual_seed(seed)
    while True:
        order = torch.randperm(len(train), generator=generator, device=train.device)
        for rows in order[: len(train) // batch * batch].split(batch):
            yield torch.bernoulli(train[rows], generator=generator)


@torch.no_grad()
def held_out_nll(vae: models.VAE, images: Tensor, particles: int) -> float:
    """Minus the IWAE bound, in nats per datapoint, in a random state of its own."""
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(1)
        total = 0.0
        for part in images.split(100):
            log_w = vae.log_weights(part, particles)
            total -= (log_w.logsumexp(0) - math.log(particles)).sum().item()
    return total / len(images)


def train(
    contestant: Contestant, test: Tensor, steps: int, args: argparse.Namespace, bar: Any
) -> dict[str, Any]:
    """Train up to the target or the last epoch."""
    assert contestant.vae is not None
    # The first steps compile or probe: they are timed apart, and taken back.
    start = time.perf_counter()
    contestant.step()
    contestant.step()
    measuring.synchronize(args.device)
    first = time.perf_counter() - start
    contestant.reset()
    curve, seconds = [], 0.0
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        for _ in range(steps):
            contestant.step()
        measuring.synchronize(args.device)
        seconds += time.perf_counter() - start
        curve.append((seconds, held_out_nll(contestant.vae, test, args.nll_particles)))
        bar.set_postfix_str(f"{contestant.name}, epoch {epoch}, NLL {curve[-1][1]:.2f}", refresh=False)
        bar.update()
        if curve[-1][1] <= args.target:
            break
    reached = curve[-1][1] <= args.target
    return {
        "seconds": seconds if reached else None,
        "epochs": len(curve),
        "nll": curve[-1][1],
        "milliseconds": 1e3 * seconds / (steps * len(curve)),
        "first_steps": first,
        "curve": curve,
    }


def run(args: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """The runs of each contestant, one a seed, and the reasons of those left out."""
    images, test = digits(args.device, args.smoke)
    steps = len(images) // args.batch
    names = SMOKE_NAMES if args.smoke else NAMES
    factories = {name: make for name, make in registry().items() if name in names}
    options = {"pixels": images.shape[1]} | ({"hidden": 20, "latent": 5} if args.smoke else {})
    results: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    with measuring.progress(len(factories) * args.seeds * args.epochs, "training") as bar:
        for seed in range(args.seeds):
            for name, make in factories.items():
                pyro.set_rng_seed(seed)
                batches = shuffled(images, args.batch, seed)
                case = Case(
                    "one-layer",
                    images[: args.batch],
                    args.particles,
                    options,
                    seed=seed,
                    learning_rate=args.learning_rate,
                    batches=lambda batches=batches: next(batches),
                )
                done = bar.n
                try:
                    results.setdefault(name, []).append(train(make(name, case), test, steps, args, bar))
                except Skip as reason:
                    results.pop(name)
                    skipped[name] = str(reason)
                bar.update(done + args.epochs - bar.n)
    return results, skipped


def show(results: dict[str, list[dict[str, Any]]], skipped: dict[str, str], args: argparse.Namespace) -> str:
    rows = []
    for name, runs in results.items():
        reached = [found["seconds"] for found in runs if found["seconds"] is not None]
        median = f"{statistics.median(reached):.1f}" if reached else "not reached"
        if reached and len(reached) < len(runs):
            median += f" ({len(reached)} of {len(runs)} runs)"
        cells = [median]
        for key, form in (("epochs", ".0f"), ("milliseconds", ".2f"), ("nll", ".2f"), ("first_steps", ".1f")):
            cells.append(format(statistics.median(found[key] for found in runs), form))
        rows.append([name, *cells])
    header = ["", f"s to NLL {args.target:g}", "epochs", "ms a step", "last NLL", "first steps, s"]
    left_out = "".join(f"\nleft out: {name} ({reason})" for name, reason in skipped.items())
    return measuring.table(header, rows) + left_out


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    measuring.prepare(args)
    with pyro.validation_enabled(False):
        results, skipped = run(args)
    print(f"8×8 digits, one-layer VAE, B = {args.batch}, {args.particles} particles, {args.device};")
    print(f"medians of {args.seeds} seed(s); first steps (compilation) and evaluation are off the clock\n")
    print(show(results, skipped, args))
    path = measuring.save(args, "time_to_nll", results=results, skipped=skipped)
    print(f"\n{path}")
    return {"results": results, "skipped": skipped}


if __name__ == "__main__":
    main()
