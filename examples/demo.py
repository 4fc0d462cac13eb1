"""Five bounds at one budget: the same VAE, images, epochs and seed, 64 particles a datapoint.

This is what ``make demo`` runs. It trains on scikit-learn's 8×8 digits, so nothing is downloaded,
and writes pictures, a table and a figure that compares the bounds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import vae
from matplotlib.figure import Figure

from pyro_iw import IWAE_ELBO
from shared import options
from shared.evaluation import plus_minus
from shared.running import in_one_line, smoke_apart

M, K = 8, 8
# First the bound of the package's front page, then the others.
LOSSES = ("miwae", "elbo", "iwae", "ciwae", "piwae")
ORDER = ("elbo", "iwae", "miwae", "ciwae", "piwae")
TITLES = {
    "elbo": "ELBO",
    "iwae": f"IWAE({M * K})",
    "miwae": f"MIWAE({M}, {K})",
    "ciwae": f"CIWAE({M * K}, β = 0.5)",
    "piwae": f"PIWAE({M}, {K})",
}
COMMON_BOUND = f"heldout_iwae_{M * K}"
HEADER = ("bound", "NLL", "active units", "held-out bound", "−KL", "seconds")


def train_one(loss: str, out: Path, *, smoke: bool, epochs: int, seed: int) -> dict:
    """Train with one loss; the IWAE bound is recorded each epoch, so that curves compare."""
    argv = ["--loss", loss, "-M", str(M), "-K", str(K), "--out", str(out), "--seed", str(seed)]
    argv += ["--epochs", str(epochs), "--batch-size", "50", "--learning-rate", "3e-3"]
    args = vae.parse_args(argv + ["--smoke"] * smoke)
    return vae.run(args, heldout_losses={COMMON_BOUND: IWAE_ELBO(K=M * K)})


def table_rows(metrics: dict[str, dict]) -> list[tuple[str, ...]]:
    """One row a bound, in the order of :data:`HEADER`."""
    rows = []
    for loss in ORDER:
        results = metrics[loss]["results"]
        rows.append(
            (
                TITLES[loss],
                plus_minus(results["heldout_nll"], results["nll_monte_carlo_error"]),
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
    """The same held-out bound over the epochs, one curve a training loss."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for loss in ORDER:
        history = metrics[loss]["history"]
        epochs = [record["epoch"] for record in history]
        bounds = [-record[COMMON_BOUND] for record in history]
        marker = "o" if len(history) == 1 else None
        axes.plot(epochs, bounds, label=TITLES[loss], marker=marker, linewidth=1.4)
    final = [-metrics[loss]["history"][-1][COMMON_BOUND] for loss in ORDER]
    if len(metrics[ORDER[0]]["history"]) > 4:
        # The first epochs would squeeze what tells the bounds apart into a line.
        early = max(-metrics[loss]["history"][3][COMMON_BOUND] for loss in ORDER)
        axes.set_ylim(min(final) - 0.1, early)
    axes.set_title("The same held-out bound after training with each loss")
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"−(IWAE-{M * K} bound) [nats per datapoint]")
    axes.legend()
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
    parser.add_argument("--epochs", type=options.positive_int, default=30, help="of every bound")
    parser.add_argument("--seed", type=int, default=0, help="of every bound")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: a check that it runs")
    args = smoke_apart(parser, parser.parse_args(argv))
    with in_one_line(OSError, ValueError, kept=f"the bounds that were finished are in {args.out}"):
        return run(args)


def run(args: argparse.Namespace) -> dict[str, dict]:
    """Train with all bounds, and write and print how they compare."""
    start = time.perf_counter()
    metrics: dict[str, dict] = {}
    for number, loss in enumerate(LOSSES, 1):
        print(f"[{number}/{len(LOSSES)}] {TITLES[loss]} ...", flush=True)
        out = args.out if loss == LOSSES[0] else args.out / loss
        metrics[loss] = train_one(loss, out, smoke=args.smoke, epochs=args.epochs, seed=args.seed)
        if number == 1:
            print(f"{vae.summary(metrics[loss])}\npictures are in {out}/", flush=True)

    table = format_table(table_rows(metrics))
    (args.out / "comparison.md").write_text(table + "\n", encoding="utf-8")
    results = {loss: metrics[loss]["results"] for loss in ORDER}
    (args.out / "comparison.json").write_text(json.dumps(results, indent=2) + "\n")
    save_comparison(metrics, args.out / "comparison.png")

    settings, iwae = metrics[LOSSES[0]]["settings"], results[LOSSES[0]]["iwae_particles"]
    print(
        f"\n{settings['train_images']} digits, {settings['epochs']} epochs, {M * K} particles a "
        f"datapoint; {settings['heldout_images']} held out.\n\n{table}\n\n"
        f"NLL = −log p̂(x) from {settings['nll_particles']} draws and −KL = IWAE-{iwae} − log p̂ on the "
        "same draws,\nboth held out, in nats per datapoint, ± their standard error from these draws.\n"
        "Seconds are of training alone.\n"
        f"Pictures: {args.out}/{{samples,reconstructions,latents,learning_curve,comparison}}.png\n"
        f"Table: {args.out}/comparison.md, {args.out}/comparison.json\n"
        f"Took {time.perf_counter() - start:.0f} s."
    )
    return metrics


if __name__ == "__main__":
    main()
