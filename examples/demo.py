"""Five bounds at one budget: the same VAE, images, epochs and seed, 64 particles a datapoint.

This is what ``make demo`` runs. It trains on scikit-learn's 8×8 digits, so nothing is downloaded,
and writes pictures, a table and a figure that compares the bounds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import vae
from matplotlib.figure import Figure

from pyro_iw import IWAE_ELBO
from shared import options
from shared.evaluation import plus_minus
from shared.running import in_one_line, smoke_apart

M, K = 8, 8


class Way(NamedTuple):
    """A way to train: what tables and pictures call it, and the options of ``vae.py``."""

    title: str
    loss: str
    estimator: str = "auto"


WAYS = {
    "elbo": Way(f"ELBO, {M * K} particles", "elbo"),
    "iwae": Way(f"IWAE({M * K})", "iwae"),
    "iwae-dreg": Way(f"IWAE({M * K}), dreg", "iwae", "dreg"),
    "miwae": Way(f"MIWAE({M}, {K})", "miwae"),
    "ciwae": Way(f"CIWAE({M * K}, β = 0.5)", "ciwae"),
    "piwae": Way(f"PIWAE({M}, {K})", "piwae"),
}
# The bound of the front page is trained first, into the folder itself; all are compared with the ELBO.
FIRST, BASELINE = "miwae", "elbo"
COMMON_BOUND = f"heldout_iwae_{M * K}"
HEADER = ("trained with", "NLL", "less the ELBO's", "active units", "held-out bound", "−KL", "seconds")


def train_one(name: str, out: Path, *, smoke: bool, epochs: int, seed: int) -> dict:
    """Train one way; the IWAE bound is recorded each epoch, so that curves compare."""
    way = WAYS[name]
    argv = ["--loss", way.loss, "-M", str(M), "-K", str(K), "--out", str(out), "--seed", str(seed)]
    argv += ["--estimator", way.estimator]
    argv += ["--epochs", str(epochs), "--batch-size", "50", "--learning-rate", "3e-3"]
    args = vae.parse_args(argv + ["--smoke"] * smoke)
    metrics = vae.run(args, heldout_losses={COMMON_BOUND: IWAE_ELBO(K=M * K)})
    with np.load(out / "heldout.npz") as arrays:
        return {**metrics, "log_p": arrays["log_p"]}


def less_the_baseline(metrics: dict[str, dict], name: str) -> tuple[float, float]:
    """The NLL less the baseline's, in nats per datapoint, and its standard error.

    What makes an image hard is the same for both, so differences are taken image by image. The error is that
    of the held-out images as a sample, with the noise of the draws for log p̂ in it, not that of the seed.
    """
    differences = metrics[BASELINE]["log_p"].astype(float) - metrics[name]["log_p"].astype(float)
    return differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))


def table_rows(metrics: dict[str, dict]) -> list[tuple[str, ...]]:
    """One row a way to train, in the order of :data:`HEADER`."""
    rows = []
    for name, way in WAYS.items():
        results = metrics[name]["results"]
        difference, error = less_the_baseline(metrics, name)
        rows.append(
            (
                way.title,
                plus_minus(results["heldout_nll"], results["nll_monte_carlo_error"]),
                "" if name == BASELINE else f"{difference:+.2f} ± {error:.2f}".replace("-", "−"),
                str(results["active_units"]),
                f"{results['heldout_bound']:.2f}",
                plus_minus(results["minus_kl"], results["minus_kl_error"]),
                f"{results['training_seconds']:.1f}",
            )
        )
    return rows


def format_table(rows: list[tuple[str, ...]]) -> str:
    """A markdown table whose columns also line up as plain text."""
    widths = [max(len(cell) for cell in column) for column in zip(HEADER, *rows, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [f":{'-' * (widths[0] - 1)}"] + [f"{'-' * (width - 1)}:" for width in widths[1:]]
    return "\n".join([line(HEADER), line(tuple(rule)), *map(line, rows)])


def save_comparison(metrics: dict[str, dict], path: Path) -> None:
    """The same held-out bound over the epochs, a curve a way to train, and what each makes of the NLL."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (name, way) in enumerate(WAYS.items()):
        history = metrics[name]["history"]
        epochs = [record["epoch"] for record in history]
        bounds = [-record[COMMON_BOUND] for record in history]
        style = {"marker": "o" if len(history) == 1 else None, "linestyle": "--" if "dreg" in name else "-"}
        curves.plot(epochs, bounds, label=way.title, linewidth=1.4, color=f"C{i}", **style)
        if name == BASELINE:
            bars.axvline(0, color=f"C{i}", linewidth=1.4)
            bars.plot(0, i, marker="o", color=f"C{i}", markersize=5)
            continue
        difference, error = less_the_baseline(metrics, name)
        bars.errorbar(difference, i, xerr=error, fmt="o", color=f"C{i}", markersize=5, capsize=3)
    final = [-metrics[name]["history"][-1][COMMON_BOUND] for name in WAYS]
    if len(metrics[BASELINE]["history"]) > 4:
        # The first epochs would squeeze what tells the bounds apart into a line.
        early = max(-metrics[name]["history"][3][COMMON_BOUND] for name in WAYS)
        curves.set_ylim(min(final) - 0.1, early)
    curves.set_title("The same held-out bound after training with each")
    curves.set_xlabel("epoch")
    curves.set_ylabel(f"−(IWAE-{M * K} bound) [nats per datapoint]")
    curves.legend()
    bars.set_yticks(range(len(WAYS)), [way.title for way in WAYS.values()])
    bars.invert_yaxis()
    bars.set_title("Held-out NLL, lower is better")
    bars.set_xlabel("less the ELBO's [nats], ± s.e. by image")
    for axes in (curves, bars):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    parser = options.new_parser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/demo"),
        help="folder for results; of a smoke run, in results/smoke",
    )
    parser.add_argument("--epochs", type=options.positive_int, default=25, help="of every bound")
    parser.add_argument("--seed", type=int, default=0, help="of every bound")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: a check that it runs")
    args = smoke_apart(parser, parser.parse_args(argv))
    with in_one_line(OSError, ValueError, kept=f"the bounds that were finished are in {args.out}"):
        return run(args)


def run(args: argparse.Namespace) -> dict[str, dict]:
    """Train with all bounds, and write and print how they compare."""
    start = time.perf_counter()
    metrics: dict[str, dict] = {}
    for number, name in enumerate((FIRST, *(name for name in WAYS if name != FIRST)), 1):
        print(f"[{number}/{len(WAYS)}] {WAYS[name].title} ...", flush=True)
        out = args.out if name == FIRST else args.out / name
        metrics[name] = train_one(name, out, smoke=args.smoke, epochs=args.epochs, seed=args.seed)
        if number == 1:
            print(f"{vae.summary(metrics[name])}\npictures are in {out}/", flush=True)

    table = format_table(table_rows(metrics))
    (args.out / "comparison.md").write_text(table + "\n", encoding="utf-8")
    results = {name: dict(metrics[name]["results"]) for name in WAYS}
    for name, own in results.items():
        own["nll_less_elbo"], own["nll_less_elbo_error"] = less_the_baseline(metrics, name)
    (args.out / "comparison.json").write_text(json.dumps(results, indent=2) + "\n")
    save_comparison(metrics, args.out / "comparison.png")

    settings, iwae = metrics[FIRST]["settings"], results[FIRST]["iwae_particles"]
    print(
        f"\n{settings['train_images']} digits, {settings['epochs']} epochs, {M * K} particles a "
        f"datapoint; {settings['heldout_images']} held out.\n\n{table}\n\n"
        f"NLL = −log p̂(x) from {settings['nll_particles']} draws and −KL = IWAE-{iwae} − log p̂ on the "
        "same draws,\nboth held out, in nats per datapoint, ± their standard error from these draws.\n"
        "Less the ELBO's: image by image, ± the standard error over the images, for one seed.\n"
        "Seconds are of training alone.\n"
        f"Pictures: {args.out}/{{samples,reconstructions,latents,learning_curve,comparison}}.png\n"
        f"Table: {args.out}/comparison.md, {args.out}/comparison.json\n"
        f"Took {time.perf_counter() - start:.0f} s."
    )
    return metrics


if __name__ == "__main__":
    main()
