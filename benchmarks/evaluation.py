"""Time of log p by importance sampling, and of annealed chains: by hand, eager and compiled.

The loop by hand draws as many particles, in chunks, adds up their weights and runs the encoder once. Ratios
are taken within a round. Try::

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --models one-layer two-layer conv --sizes 20x5000 --chunk-size 50
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import measuring
import models
import pyro
import torch
from torch import Tensor

from pyro_iw import AnnealedImportanceSampler, ImportanceSampler

BY_HAND, EAGER, COMPILED = "PyTorch by hand", "eager", "compiled"


def by_hand(vae: models.VAE, x: Tensor, particles: int, chunk_size: int) -> Callable[[], Tensor]:
    """The log evidence of every image, of shape ``[B]``, by a loop over chunks."""

    @torch.no_grad()
    def run() -> Tensor:
        total = x.new_full((len(x),), -math.inf)
        given = vae.encode_once(x)
        for start in range(0, particles, chunk_size):
            log_w = vae.log_weights_of(given, x, min(chunk_size, particles - start))
            total = torch.logaddexp(total, log_w.logsumexp(0))
        return total - math.log(particles)

    return run


def contestants(
    vae: models.VAE, x: Tensor, particles: int, chunk_size: int
) -> dict[str, Callable[[], Tensor]]:
    """Each gives the log evidence of every image."""

    def ours(chunk: Any, compile: bool) -> Callable[[], Tensor]:
        sampler = ImportanceSampler(
            vae.model, vae.guide, particles, chunk_size=chunk, compile=compile, progress=False
        )
        return lambda: sampler.log_marginal(x)

    return {
        BY_HAND: by_hand(vae, x, particles, chunk_size),
        EAGER: ours(chunk_size, False),
        COMPILED: ours(chunk_size, True),
        f'{EAGER}, chunk_size="auto"': ours("auto", False),
        f'{COMPILED}, chunk_size="auto"': ours("auto", True),
    }


def chains(vae: models.VAE, x: Tensor, temperatures: int) -> dict[str, Callable[[], Tensor]]:
    """16 annealed chains an image, with as few steps for adaptation as there may be."""

    def ours(compile: bool) -> Callable[[], Tensor]:
        sampler = AnnealedImportanceSampler(
            vae.model, vae.guide, 16, temperatures, num_adaptation=1, compile=compile, progress=False
        )
        return lambda: sampler.log_marginal(x)

    return {EAGER: ours(False), COMPILED: ours(True)}


def size(text: str) -> tuple[int, int]:
    images, _, particles = text.partition("x")
    return measuring.positive_int(images), measuring.positive_int(particles)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=models.MODELS, default=["one-layer"])
    add("--sizes", nargs="+", type=size, default=[(20, 5000), (1, 5000)], metavar="IMAGESxPARTICLES")
    add("--chunk-size", type=measuring.positive_int, default=100)
    add("--chains", nargs="*", type=measuring.positive_int, default=[20, 1], help="images of annealed chains")
    add("--temperatures", type=measuring.positive_int, default=10, help="of the chains")
    add("--rounds", type=measuring.positive_int, default=9, help="blocks that each contestant gets")
    add("--block-seconds", type=float, default=0.3, help="how long a block lasts, about")
    measuring.add_common_arguments(parser)
    args = measuring.parse(parser, argv)
    if args.smoke:
        args.models, args.sizes, args.chunk_size, args.chains = ["one-layer"], [(2, 64)], 16, []
        args.rounds, args.block_seconds = 2, 0.0
    return args


def compare(
    steps: dict[str, Callable[[], Tensor]], against: str, args: argparse.Namespace, label: str
) -> dict[str, Any]:
    """Seconds and ratios of each, once all have compiled what they compile."""
    values = {}
    for name, step in steps.items():
        for _ in range(3):
            values[name] = step()
    blocks = measuring.run_blocks(steps, args.rounds, args.block_seconds, args.device, label)
    return {
        name: {
            "seconds": measuring.Quartiles.of(block.seconds),
            "ratio": block.ratios(blocks[against]),
            "cores": measuring.Quartiles.of(block.cores).median,
            "mean": values[name].mean().item(),
        }
        for name, block in blocks.items()
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What each takes, by the model and the size."""
    results: dict[str, Any] = {}
    for name in args.models:
        torch.manual_seed(0)
        vae = models.MODELS[name]().to(args.device)
        for images, particles in args.sizes:
            x = torch.bernoulli(torch.full((images, vae.pixels), 0.3)).to(args.device)
            label = f"{name}, {images} images, {particles} particles"
            steps = contestants(vae, x, particles, args.chunk_size)
            results[label] = compare(steps, BY_HAND, args, label)
        for images in args.chains:
            x = torch.bernoulli(torch.full((images, vae.pixels), 0.3)).to(args.device)
            label = f"{name}, {images} images, annealed chains"
            results[label] = compare(chains(vae, x, args.temperatures), EAGER, args, label)
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    measuring.prepare(args)
    with pyro.validation_enabled(False):
        results = run(args)
    for label, rows in results.items():
        print(f"\n{label}, on {args.device}")
        table = [
            (
                name,
                f"{1e3 * row['seconds'].median:.1f}",
                str(row["ratio"]),
                f"{row['mean']:.2f}",
                f"{row['cores']:.2f}",
            )
            for name, row in rows.items()
        ]
        print(measuring.table(("", "ms", "ratio", "mean log p", "cores"), table))
    path = measuring.save(args, "evaluation", results=results)
    print(f"\n{path}", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
