"""How far the guide's estimate falls short: annealed chains on held-out images, a sandwich on simulated."""

from __future__ import annotations

import argparse
import time
from typing import Any

from torch import Tensor

from pyro_iw import AnnealedImportanceSampler, Sandwich, sandwich

from . import options
from .evaluation import plus_minus, seeded

__all__ = ["SMOKE", "add_annealed_options", "annealed_lines", "annealed_report"]

SMOKE = {"ais_images": 5, "ais_chains": 4, "ais_temperatures": 20}


def add_annealed_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--ais`` and what goes with it."""
    add = parser.add_argument
    add("--ais", action="store_true", help="annealed importance sampling as well; takes minutes")
    add("--ais-images", type=options.positive_int, default=100, help="held-out images for that")
    add("--ais-chains", type=options.positive_int, default=16, help="chains, an image")
    add("--ais-temperatures", type=options.positive_int, default=1000, help="steps from guide to posterior")


def annealed_report(
    network: Any, images: Tensor, estimates: Tensor, args: argparse.Namespace
) -> tuple[dict[str, Any], Sandwich]:
    """What annealed chains find, in nats per image, and the bounds on simulated images.

    Arguments:
        network: Has a model and a guide.
        images: Binarised held-out images, shape ``[N, D]``; the first of them are taken.
        estimates: Their log p̂(x) by the guide alone, shape ``[N]``.
        args: With the options of :func:`add_annealed_options` and a seed.
    """
    images, estimates = images[: args.ais_images], estimates[: args.ais_images].double().cpu()
    sizes = {"num_chains": args.ais_chains, "num_temperatures": args.ais_temperatures}
    start = time.process_time()
    with seeded(args.seed):
        sampler = AnnealedImportanceSampler(network.model, network.guide, **sizes)
        found = sampler.log_marginal_dataset(images.split(100))
        seconds = time.process_time() - start
        bounds = sandwich(network.model, network.guide, images[:100], **sizes)
    values = found.values.double().cpu()
    shortfall = values - estimates
    report = {
        "images": len(images),
        "chains": args.ais_chains,
        "temperatures": args.ais_temperatures,
        "nll": -found.mean,
        "nll_monte_carlo_error": found.monte_carlo_error,
        "nll_of_guide": -estimates.mean().item(),
        "shortfall": shortfall.mean().item(),
        "shortfall_error": _error(shortfall),
        "largest_shortfall": shortfall.max().item(),
        "ess_median": found.ess.median().item(),
        "sandwich_gap": bounds.mean_gap,
        "sandwich_gap_error": bounds.mean_gap_error,
        "cpu_seconds": seconds,
    }
    return report, bounds


def annealed_lines(report: dict[str, Any], num_particles: int) -> list[tuple[str, str]]:
    """The report as rows of a table to print."""
    r = report
    by = f"{r['chains']} chains, T = {r['temperatures']}, {r['images']} images"
    return [
        ("NLL, annealed", f"{plus_minus(r['nll'], r['nll_monte_carlo_error'])} nats ({by})"),
        (f"NLL of these, L_{num_particles}", f"{r['nll_of_guide']:.3f} nats"),
        ("shortfall of that", f"{plus_minus(r['shortfall'], r['shortfall_error'])} nats by the images"),
        ("sandwich, gap", f"{plus_minus(r['sandwich_gap'], r['sandwich_gap_error'])} nats, simulated images"),
    ]


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
