"""All ways to spend 64 particles: MIWAE and PIWAE over (M, K) with M·K = 64, CIWAE over β, several seeds.

Trains the one-layer VAE with each and measures on held-out images what Rainforth et al. (1802.04537) do: the
IWAE-64 bound, log p̂, their difference −KL, and the effective sample size of the guide. IWAE is MIWAE(1, 64)
and CIWAE of β = 0; the ELBO is MIWAE(64, 1) and CIWAE of β = 1. Try::

    python examples/mk_grid.py --smoke
    python examples/mk_grid.py                                    # on 8×8 digits
    python examples/mk_grid.py --data mnist --epochs 100 --batch-size 20 --learning-rate 1e-3 --device cuda

Each finished run is a file in the folder ``runs`` and is not repeated: a stopped grid goes on where it was.
All bounds are in nats per datapoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyro
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_iw import IWAE_ELBO, active_units
from pyro_iw.bounds import IWAE
from shared import datasets, options
from shared.checkpoint import write_bytes, write_json
from shared.datasets import ImageData, heldout_images
from shared.evaluation import sampler_and_batches, seeded
from shared.networks import VAE
from shared.running import in_one_line, results_folder
from shared.training import train

METRICS = {
    "iwae": "IWAE-{budget} bound",
    "log_marginal": "log p̂",
    "minus_kl": "−KL",
    "ess": "ESS of {nll_particles} draws",
}
UNITS = dict.fromkeys(METRICS, "nats per datapoint") | {"ess": "effective draws of the guide"}
SETTINGS = ("data", "train_size", "test_size", "epochs", "batch_size", "learning_rate", "estimator")
SETTINGS += ("budget", "nll_particles")
SMOKE = {"train_size": 100, "test_size": 40, "epochs": 1, "nll_particles": 20, "budget": 4, "seeds": 2}
SMOKE_BETAS = [0.5]


@dataclass(frozen=True)
class Cell:
    """A training loss of the grid; ``beta`` is of ciwae alone."""

    loss: str
    M: int
    K: int
    beta: float = 0.0

    @property
    def name(self) -> str:
        if self.loss == "ciwae":
            return f"CIWAE({self.K}, β = {self.beta:g})"
        return f"{self.loss.upper()}({self.M}, {self.K})"

    @property
    def file(self) -> str:
        return f"ciwae-{self.beta:g}" if self.loss == "ciwae" else f"{self.loss}-{self.M}-{self.K}"


def make_cells(budget: int, betas: Iterable[float]) -> list[Cell]:
    """Every loss of the grid once: PIWAE(1, K) is MIWAE(1, K), and the ends of β are MIWAE's."""
    pairs = [(budget // K, K) for K in range(1, budget + 1) if budget % K == 0]
    cells = [Cell("miwae", M, K) for M, K in pairs]
    cells += [Cell("piwae", M, K) for M, K in pairs if M > 1]
    return cells + [Cell("ciwae", 1, budget, beta) for beta in sorted(set(betas) - {0.0, 1.0})]


def train_and_measure(cell: Cell, seed: int, data: ImageData, args: argparse.Namespace) -> dict[str, Any]:
    """Train with one loss and one seed; all but ``ess`` and units is in nats per held-out image."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    images = data.train.flatten(1).to(args.device)
    heldout = heldout_images(data, 0).flatten(1).to(args.device)
    network = VAE(images.shape[1], mean_image=images.mean(0)).to(args.device)
    loss = options.make_loss(cell.loss, cell.M, cell.K, beta=cell.beta, estimator=args.estimator)
    history = train(
        network,
        images,
        heldout,
        loss,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=seed,
        binary=data.binary,
        heldout_losses={"iwae": IWAE_ELBO(K=args.budget)},
        description=f"{cell.name}, seed {seed}",
    )
    sampler, batches = sampler_and_batches(network, heldout, args.nll_particles)
    with seeded(seed):
        evidence = sampler.log_marginal_dataset(batches, bound=IWAE(args.budget))
        units = active_units(network.guide, heldout.split(1000))["z"].num_active
    return {
        "iwae": evidence.mean + evidence.minus_kl,
        "log_marginal": evidence.mean,
        "minus_kl": evidence.minus_kl,
        "minus_kl_error": evidence.minus_kl_error,
        "ess": evidence.ess.double().mean().item(),
        "active_units": units,
        "curve": [record["iwae"] for record in history],
        "training_seconds": sum(record["seconds"] for record in history),
    }


def finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a run that has been done already, or ``None``.

    Raises:
        ValueError: If the file is damaged, or of other settings.
    """
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        results, differing = saved["results"], [k for k in settings if saved["settings"][k] != settings[k]]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not a run of this program; delete it to repeat the run") from error
    if differing:
        raise ValueError(f"{path} is a run with another {', '.join(differing)}: choose another --out")
    return results


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do all runs that have not been done; returns what ``grid.json`` holds, cell by cell."""
    cells = make_cells(args.budget, args.betas)
    data = datasets.load(args.data, args.data_dir).subset(args.train_size, args.test_size, seed=0)
    folder = args.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in SETTINGS}
    grid: dict[str, Any] = {
        cell.file: {
            "name": cell.name,
            "loss": cell.loss,
            "M": cell.M,
            "K": cell.K,
            "beta": cell.beta,
            "runs": [],
        }
        for cell in cells
    }
    total = len(cells) * args.seeds
    # Seed by seed, so that the grid is whole from early on.
    jobs = [(seed, cell) for seed in range(args.seeds) for cell in cells]
    paths = [folder / f"{cell.file}-seed-{seed}.json" for seed, cell in jobs]
    # All of them before the first run: what is of other settings would stop the grid midway.
    known = [finished(path, settings) for path in paths]
    for number, ((seed, cell), path, results) in enumerate(zip(jobs, paths, known, strict=True), 1):
        if results is None:
            print(f"[{number}/{total}] {cell.name}, seed {seed}", flush=True)
            results = train_and_measure(cell, seed, data, args)
            write_json(path, {"settings": settings, "results": results})
        grid[cell.file]["runs"].append(results)
    return {"settings": settings | {"seeds": args.seeds}, "cells": list(grid.values())}


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; NaN for a single one."""
    return mean(values), stdev(values) if len(values) > 1 else math.nan


def format_table(results: dict[str, Any]) -> str:
    """A markdown table, a cell of the grid a row: mean ± standard deviation over the seeds."""
    titles = [title.format(**results["settings"]) for title in METRICS.values()]
    lines = [f"| trained with | {' | '.join(titles)} | active units |", "|:--|" + "--:|" * (len(titles) + 1)]
    for cell in results["cells"]:
        entries = []
        for metric in (*METRICS, "active_units"):
            centre, deviation = spread([one[metric] for one in cell["runs"]])
            digits = 1 if metric in ("ess", "active_units") else 2
            entries.append(f"{centre:.{digits}f}")
            if not math.isnan(deviation):
                entries[-1] += f" ± {deviation:.{digits}f}"
        lines.append(f"| {cell['name']} | {' | '.join(entries)} |")
    return "\n".join(lines)


def draw_curve(axes: Axes, positions: list[float], cells: list[dict], metric: str, **style: Any) -> None:
    centres, deviations = zip(*(spread([one[metric] for one in cell["runs"]]) for cell in cells), strict=True)
    errors = None if math.isnan(deviations[0]) else deviations
    axes.errorbar(positions, centres, errors, marker="o", markersize=3, capsize=2, linewidth=1.2, **style)


def save_figure(results: dict[str, Any], path: Path) -> None:
    """The four metrics over K (above) and over β (below), with the standard deviation over the seeds."""
    cells, budget = results["cells"], results["settings"]["budget"]
    miwae = [cell for cell in cells if cell["loss"] == "miwae"]
    elbo, iwae = miwae[0], miwae[-1]
    piwae = [cell for cell in cells if cell["loss"] == "piwae"] + [iwae]
    ciwae = [cell for cell in cells if cell["loss"] == "ciwae"]
    figure = Figure(figsize=(13, 6), layout="constrained")
    rows = figure.subplots(2, len(METRICS))
    for column, (metric, title) in zip(rows.T, METRICS.items(), strict=True):
        above, below = column
        draw_curve(above, [cell["K"] for cell in miwae], miwae, metric, label="MIWAE(M, K)")
        draw_curve(above, [cell["K"] for cell in piwae], piwae, metric, label="PIWAE(M, K)")
        above.set_xscale("log", base=2)
        above.set_xlabel(f"K, with M·K = {budget}")
        betas = [0.0, *(cell["beta"] for cell in ciwae), 1.0]
        draw_curve(below, betas, [iwae, *ciwae, elbo], metric, color="C2", label=f"CIWAE({budget}, β)")
        below.set_xlabel("β: 0 is IWAE, 1 the ELBO")
        for axes in column:
            axes.set_title(title.format(**results["settings"]))
            axes.set_ylabel(UNITS[metric])
            axes.grid(alpha=0.3)
    for axes in rows[:, 0]:
        axes.legend()
    figure.savefig(path, dpi=100)


def save_learning_curves(results: dict[str, Any], path: Path) -> None:
    """The same held-out bound over the epochs after training with each loss, mean over the seeds."""
    budget = results["settings"]["budget"]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    colours, styles = colormaps["viridis"], {"miwae": "-", "piwae": "--", "ciwae": ":"}
    for cell in results["cells"]:
        curve = [mean(values) for values in zip(*(one["curve"] for one in cell["runs"]), strict=True)]
        # Yellow is the ELBO's side, violet IWAE's.
        share = cell["beta"] if cell["loss"] == "ciwae" else math.log(cell["M"]) / math.log(max(budget, 2))
        style = {"color": colours(0.95 * share), "linestyle": styles[cell["loss"]], "linewidth": 1.2}
        marker = "o" if len(curve) == 1 else None
        axes.plot(range(1, len(curve) + 1), curve, label=cell["name"], marker=marker, **style)
    axes.set_title("The same held-out bound after training with each loss")
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"IWAE-{budget} bound [nats per datapoint]")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=100)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and complete the command line; exits with a message where it makes no sense."""
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    betas = [0.05, 0.25, 0.5, 0.75, 0.95]
    add("--budget", type=options.positive_int, default=64, help="M·K, particles a datapoint")
    add("--betas", type=options.unit_interval, nargs="+", default=betas, help="the ELBO's share in ciwae")
    add("--seeds", type=options.positive_int, default=3, help="runs of every loss")
    add("--estimator", choices=options.ESTIMATORS, default="auto", help="of the guide's gradient")
    add("--data", choices=datasets.NAMES, default="digits", help="the images")
    add("--data-dir", type=Path, default=Path("data"), help="where their files are; not for digits")
    add("--device", type=options.torch_device, default="cpu", help="a torch device, such as cuda")
    add("--epochs", type=options.positive_int, default=30, help="of every run")
    add("--batch-size", type=options.positive_int, default=50, help="images a gradient step")
    add("--learning-rate", type=options.positive_float, default=3e-3, help="Adam's")
    add("--nll-particles", type=options.positive_int, default=1000, help="draws an image for log p̂ and ESS")
    add("--train-size", type=options.positive_int, help="use that many training images")
    add("--test-size", type=options.positive_int, help="use that many held-out images")
    add(
        "--out",
        type=Path,
        help="folder for the results (default: results/mk-grid-<data>, of a smoke run in results/smoke)",
    )
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    args = options.at_smoke_size(parser.parse_args(argv), SMOKE)
    if args.smoke:
        args.betas = SMOKE_BETAS
    if args.nll_particles < args.budget:
        parser.error(f"argument --nll-particles: must be at least the budget, {args.budget}")
    if args.out is None:
        args.out = results_folder(f"mk-grid-{args.data}", args.smoke)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    start = time.perf_counter()
    with in_one_line(OSError, ValueError, kept=f"the finished runs are kept in {args.out / 'runs'}"):
        results = run(args)
        table = format_table(results)
        write_json(args.out / "grid.json", results)
        write_bytes(args.out / "grid.md", f"{table}\n".encode())
        save_figure(results, args.out / "grid.png")
        save_learning_curves(results, args.out / "learning_curves.png")
    print(f"{table}\nTables and pictures are in {args.out}/. Took {time.perf_counter() - start:.0f} s.")
    return results


if __name__ == "__main__":
    main()
