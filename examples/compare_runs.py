"""Finished runs of ``deep_vae.py`` side by side: paired differences in a table, all curves in one plot.

Every run is compared with the first one, image by image: what makes an image hard is the same for both, so
that the differences have far smaller standard errors than the figures themselves. Runs that differ in
nothing but the seed make one line. Try::

    for loss in elbo iwae miwae; do
        python examples/deep_vae.py --loss $loss -M 8 -K 8 --epochs-scale 0.01 --out results/$loss
    done
    python examples/compare_runs.py results/elbo results/iwae results/miwae
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from deep_vae import MODEL_SETTINGS, TRAINING_SETTINGS
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from shared.checkpoint import write_bytes, write_json
from shared.options import new_parser

# Of one line's runs these may differ: the bits of the images are drawn with the seed.
FREE = ("seed", "data_checksum")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Its folder.
        settings: Its command line.
        results: What it measured on held-out images.
        history: Of its training.
        log_p: Estimates of the log evidence, an image each, shape ``[N]``.
    """

    path: Path
    settings: dict[str, Any]
    results: dict[str, Any]
    history: list[dict[str, float]]
    log_p: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Run:
        """The run in a folder.

        Raises:
            ValueError: If there is none, or none that is finished and whole.
        """
        try:
            metrics = json.loads((path / "metrics.json").read_text())
            with np.load(io.BytesIO((path / "heldout.npz").read_bytes())) as arrays:
                log_p = arrays["log_p"]
            run = cls(path, metrics["settings"], metrics["results"], metrics["history"], log_p)
            if not math.isclose(-log_p.mean(dtype=float), run.results["heldout_nll"], rel_tol=1e-6):
                raise ValueError("metrics.json and heldout.npz are of different runs")
        except Exception as error:  # whatever a damaged file gives
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} holds no finished run of examples/deep_vae.py ({reason})") from error
        return run

    @property
    def name(self) -> str:
        """Bound, particles and layers, such as ``MIWAE(8, 8), 2 layers``."""
        s = self.settings
        loss, particles = s["switch_to"] or s["loss"], s["M"] * s["K"]
        own = f"{loss.upper()}({particles})"
        if loss in ("miwae", "piwae"):
            own = f"{loss.upper()}({s['M']}, {s['K']})"
        elif loss in ("ciwae", "vr"):
            order = f"β = {s['beta']:g}" if loss == "ciwae" else f"α = {s['alpha']:g}"
            own = f"{loss.upper()}({particles}, {order})"
        parts = [f"{s['loss']} → {own}" if s["switch_to"] else own]
        parts += [f"{s['layers']} layers"] if s["layers"] > 1 else []
        parts += [s["estimator"]] if s["estimator"] != "auto" else []
        return ", ".join(parts)


def group(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ in their seeds alone, together, in the order given.

    Raises:
        ValueError: If a run is given twice, or has other data than the first.
    """
    names = [name for name in (*MODEL_SETTINGS, *TRAINING_SETTINGS, "start_from") if name not in FREE]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same_seed = next(other for other in runs if other.settings["seed"] == run.settings["seed"])
        if run.settings["data_checksum"] != same_seed.settings["data_checksum"]:
            raise ValueError(f"{run.path} and {same_seed.path} have different images, and cannot be paired")
        line = groups.setdefault(repr([run.settings.get(name) for name in names]), [])
        if any(other.settings["seed"] == run.settings["seed"] for other in line):
            raise ValueError(f"{run.path} repeats {line[0].path} with the same seed")
        line.append(run)
    return list(groups.values())


def paired_difference(runs: list[Run], baseline: list[Run]) -> tuple[float, float]:
    """The mean NLL less the baseline's over seeds that both have, in nats, and its standard error.

    With one seed the error is that of the images alone, with several that of the seeds.

    Raises:
        ValueError: If there is no such seed.
    """
    first = {run.settings["seed"]: run for run in baseline}
    pairs = [(run, first[run.settings["seed"]]) for run in runs if run.settings["seed"] in first]
    if not pairs:
        raise ValueError(f"{runs[0].path} has no seed in common with {baseline[0].path}")
    differences = [other.log_p.astype(float) - run.log_p.astype(float) for run, other in pairs]
    if len(pairs) == 1:
        return differences[0].mean(), differences[0].std(ddof=1) / math.sqrt(len(differences[0]))
    means = [difference.mean() for difference in differences]
    return mean(means), stdev(means) / math.sqrt(len(means))


def compare(groups: list[list[Run]]) -> list[dict[str, Any]]:
    """A line of the table for every group."""
    lines = []
    for runs in groups:
        difference, error = paired_difference(runs, groups[0])
        results = [run.results for run in runs]
        line: dict[str, Any] = {"name": runs[0].name, "seeds": [run.settings["seed"] for run in runs]}
        line |= {"steps": results[0]["steps"], "epochs": runs[0].history[-1]["epoch"]}
        line |= {"nll": mean(r["heldout_nll"] for r in results), "difference": difference, "error": error}
        for name in ("iwae_bound", "minus_kl", "ess", "training_seconds"):
            line[name] = mean(r[name] for r in results)
        units = zip(*(r["active_units"] for r in results), strict=True)
        line["active_units"] = [mean(layer) for layer in units]
        lines.append(line)
    return lines


def format_table(lines: list[dict[str, Any]], iwae_particles: int, nll_particles: int) -> str:
    """The lines in Markdown."""
    head = [
        "",
        "NLL",
        "less the first's",
        f"IWAE-{iwae_particles}",
        "−KL",
        f"ESS of {nll_particles}",
        "active units",
        "epochs",
        "seeds",
    ]
    rows = [head, [":--", *["--:"] * (len(head) - 1)]]
    for i, line in enumerate(lines):
        units = "+".join(f"{layer:g}" for layer in line["active_units"])
        difference = f"{line['difference']:+.2f} ± {line['error']:.2f}" if i else ""
        numbers = [f"{line[name]:.2f}" for name in ("iwae_bound", "minus_kl")]
        cells = [line["name"], f"{line['nll']:.2f}", difference, *numbers, f"{line['ess']:.0f}", units]
        rows.append([*cells, f"{line['epochs']:.3g}", str(len(line["seeds"]))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(groups: list[list[Run]], epochs_only: bool = False) -> Figure:
    """The NLL during training, over epochs, and over the seconds that training took."""
    figure = Figure(figsize=(8 if epochs_only else 11, 4.6), layout="constrained")
    left, *others = figure.subplots(1, 1 if epochs_only else 2, sharey=True, squeeze=False)[0]
    for i, runs in enumerate(groups):
        for run in runs:
            history = run.history
            curve = [record["heldout_nll"] for record in history]
            style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--", "linewidth": 1.4}
            label = run.name if run is runs[0] else None
            left.plot([record["epoch"] for record in history], curve, label=label, **style)
            for right in others:
                right.plot(np.cumsum([record["seconds"] for record in history]), curve, **style)
    # The first steps fall from far above: what is to be seen comes after them.
    history = [record for runs in groups for run in runs for record in run.history]
    settled = [run.history[len(run.history) // 3 :] for runs in groups for run in runs]
    shown = [record["heldout_nll"] for records in settled for record in records]
    margin = 0.1 * (max(shown) - min(shown)) or 1.0
    left.set_ylim(min(shown) - margin, max(shown) + margin)
    left.set_xlim(left=0.9 * min(r["epoch"] for r in history if r["heldout_nll"] <= max(shown)))
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel("epoch")
    for right in others:
        right.set_xlabel("seconds of training")
    left.set_ylabel("held-out NLL [nats per datapoint]")
    for axes in (left, *others):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = new_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that deep_vae.py wrote")
    parser.add_argument("--out", type=Path, default=Path("results/comparison"), help="folder for the results")
    parser.add_argument(
        "--epochs-only", action="store_true", help="no curves over seconds, for runs of several machines"
    )
    args = parser.parse_args(argv)
    try:
        groups = group([Run.read(path) for path in args.runs])
        lines = compare(groups)
        first = groups[0][0]
        table = format_table(lines, first.results["iwae_particles"], first.settings["nll_particles"])
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "comparison.json", lines)
        write_bytes(args.out / "comparison.md", f"{table}\n".encode())
        draw(groups, args.epochs_only).savefig(args.out / "learning_curves.png", dpi=100)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{table}\nTables and the learning curves are in {args.out}/.")
    return lines


if __name__ == "__main__":
    main()
