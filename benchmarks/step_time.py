"""Time per training step, Adam included, of this package and of what a user would pick instead.

All contestants run in one process, in turn, round after round; a ratio is taken within a round, and its
median and quartiles over the rounds are printed. Their losses at the common initial weights are compared
with the loss by hand before anything is timed. Try::

    python benchmarks/step_time.py --models one-layer --sizes 20x1 20x64
    python benchmarks/step_time.py --only ours --validation both
    python benchmarks/step_time.py --device cuda --precisions float32 tf32 bfloat16
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import re
import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import measuring
import models
import pyro
import torch
from contestants import REFERENCE, Case, Contestant, Skip, reference_loss, registry
from measuring import Blocks, Quartiles, Rates

#: Ratios to the reference to aim for, of the one-layer model on a CPU, by batch size and particles.
TARGETS: dict[str, dict[tuple[int, int], float]] = {
    "ours, SVI": {(20, 1): 2.2, (20, 64): 1.15, (100, 64): 1.08},
    "ours, module": {(20, 1): 1.6, (20, 64): 1.10, (100, 64): 1.05},
    "ours compiled, SVI": {(20, 1): 1.6, (20, 64): 0.85, (100, 64): 0.85},
    "ours compiled, module": {(20, 1): 0.85, (20, 64): 0.75, (100, 64): 0.80},
    "ours compiled, backward 8, module": {(20, 64): 0.45, (100, 64): 0.40},
}
# So small that the weights stay where they are and everyone is timed at the same ones. Training on one batch
# would soon spread the log-weights so far that gradients hold denormal numbers, which slow a CPU down
# several times over.
LEARNING_RATE = 1e-8
PRECISIONS = ("float32", "tf32", "bfloat16")
# How many standard errors of a difference count as the same loss.
TOLERANCE = 4.5


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"must read BATCHxPARTICLES, such as 20x64, not {text!r}")
    return int(match[1]), int(match[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=models.MODELS, default=list(models.MODELS), help="what is trained")
    sizes = [(20, 1), (20, 5), (20, 64), (100, 64)]
    add("--sizes", nargs="+", type=size, default=sizes, metavar="BxK", help="batch sizes and particles")
    add(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="contestants whose name contains one of these, or fits "
        "it with wildcards; the reference always runs",
    )
    add(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=PRECISIONS[:1],
        help="of the networks' matrix products; those behind the first are a GPU's",
    )
    add("--validation", choices=("off", "on", "both"), default="off", help="Pyro's validation")
    add("--rounds", type=measuring.positive_int, default=15, help="blocks of steps that each contestant gets")
    add("--block-seconds", type=float, default=0.3, help="how long a block lasts, about")
    add("--checks", type=measuring.positive_int, default=40, help="losses that are averaged and compared")
    measuring.add_common_arguments(parser)
    args = measuring.parse(parser, argv)
    if args.smoke:
        args.models, args.sizes, args.rounds, args.block_seconds = args.models[:1], [(4, 3)], 2, 0.0
        args.checks = min(args.checks, 5)
        args.only = args.only or ["PyTorch by hand", "Pyro*", "ours, *"]
        args.only = [pattern for pattern in args.only if "compiled" not in pattern]
    return args


def selected(name: str, patterns: list[str] | None) -> bool:
    if name == REFERENCE or not patterns:
        return True
    return any(pattern in name or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def images(batch: int, pixels: int, device: torch.device) -> torch.Tensor:
    """Fixed binary images, a fifth of the pixels on, of shape ``[B, D]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.bernoulli(torch.full((batch, pixels), 0.2), generator=generator).to(device)


def build(case: Case, args: argparse.Namespace) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that can take part, after their first steps, and the reasons of those that cannot."""
    ready: dict[str, Contestant] = {}
    skipped: dict[str, str] = {}
    factories = {name: make for name, make in registry().items() if selected(name, args.only)}
    if args.smoke:
        factories = {name: make for name, make in factories.items() if "compiled" not in name}
    with measuring.progress(len(factories), "first steps") as bar:
        for name, make in factories.items():
            bar.set_postfix_str(name, refresh=True)
            try:
                contestant = make(name, case)
                contestant.step()  # compiles, where it does
                ready[name] = contestant
            except Skip as reason:
                skipped[name] = str(reason)
            except Exception as error:
                # One that breaks must not take the others' numbers along, but it has to be seen.
                skipped[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
            bar.update()
    return ready, skipped


def check(contestant: Contestant, case: Case, count: int, expected: dict[str, tuple[float, float]]) -> dict:
    """The mean loss at the initial weights against that by hand, with standard errors.

    Arguments:
        contestant: whose timed step gives the losses.
        case: what is trained.
        count: how many losses are averaged.
        expected: mean and standard error by hand, filled in for each bound.
    """
    if contestant.bound not in expected:
        vae = case.make()
        expected[contestant.bound] = _mean(
            [reference_loss(vae, case, contestant.bound) for _ in range(4 * count)]
        )
    losses = []
    for _ in range(count):
        contestant.reset()
        loss = contestant.step()
        losses.append(float(loss.item() if hasattr(loss, "item") else loss))
    mean, error = _mean(losses)
    expected_mean, expected_error = expected[contestant.bound]
    # Rounding of float32 sums counts too.
    allowed = TOLERANCE * math.hypot(error, expected_error) + 1e-5 * abs(expected_mean)
    same = math.isfinite(mean) and abs(mean - expected_mean) <= allowed
    return {"loss": mean, "error": error, "by_hand": expected_mean, "same": same}


def _mean(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def run_case(case: Case, args: argparse.Namespace, rates: Rates) -> dict[str, Any]:
    """Build, compare and time all contestants on one case; the rows of its table, as JSON has them."""
    batch, particles = len(case.x), case.particles
    ready, skipped = build(case, args)
    if REFERENCE not in ready:
        raise SystemExit(f"error: the reference {skipped[REFERENCE]}")
    expected: dict[str, tuple[float, float]] = {}
    checks = {}
    with measuring.progress(len(ready), "comparing losses") as bar:
        for name, contestant in ready.items():
            checks[name] = check(contestant, case, args.checks, expected)
            bar.update()
    steps: dict[str, Callable[[], Any]] = {name: contestant.step for name, contestant in ready.items()}
    label = f"{case.model} {batch}x{particles}"
    blocks = measuring.run_blocks(steps, args.rounds, args.block_seconds, args.device, label)
    work = measuring.work_of(case.make(), batch, particles)
    rows = {
        name: _row(name, contestant, blocks, checks[name], work, rates, case)
        for name, contestant in ready.items()
    }
    return {
        "model": case.model,
        "batch": batch,
        "particles": particles,
        "precision": case.precision,
        "flops": work.flops,
        "bytes": work.bytes,
        "rows": rows,
        "skipped": skipped,
    }


def _row(
    name: str,
    contestant: Contestant,
    blocks: dict[str, Blocks],
    checked: dict,
    work: measuring.Work,
    rates: Rates,
    case: Case,
) -> dict[str, Any]:
    against = contestant.against if contestant.against in blocks else REFERENCE
    seconds = Quartiles.of(blocks[name].seconds)
    target = None
    if case.model == "one-layer" and case.x.device.type == "cpu" and case.precision == "float32":
        target = TARGETS.get(name, {}).get((len(case.x), case.particles))
    return {
        "milliseconds": [1e3 * value for value in seconds],
        "ratio": list(blocks[name].ratios(blocks[against])),
        "against": against,
        "target": target,
        "gflops": work.flops / seconds.median / 1e9,
        "of_roofline": rates.seconds(work, case.precision) / seconds.median,
        "cores": statistics.median(blocks[name].cores),
        "check": checked,
        "seconds": blocks[name].seconds,
    }


def show(result: dict[str, Any], validation: str) -> str:
    """One case as a table."""
    rows = []
    for name, row in result["rows"].items():
        check, target = row["check"], row["target"]
        ratio = str(Quartiles(*row["ratio"]))
        rows.append(
            [
                name,
                f"{row['milliseconds'][1]:.3f}",
                ratio if row["against"] == REFERENCE else f"{ratio} of {row['against']}",
                "" if target is None else f"{target:.2f}" + ("" if row["ratio"][1] <= target else " missed"),
                f"{row['gflops']:.1f}",
                f"{row['of_roofline']:.0%}",
                f"{row['cores']:.1f}",
                f"{check['loss']:.2f} ± {check['error']:.2f}" + ("" if check["same"] else " MISMATCH"),
                f"{check['by_hand']:.2f}",
            ]
        )
    title = (
        f"{result['model']}, B = {result['batch']}, {result['particles']} particles, "
        f"{result['precision']}, validation {validation}"
    )
    work = f"{result['flops'] / 1e9:.3f} GFLOP and {result['bytes'] / 1e6:.1f} MB a step at the least"
    header = [
        "",
        "ms a step",
        "ratio [quartiles]",
        "target",
        "GFLOP/s",
        "roofline",
        "cores",
        "loss",
        "by hand",
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in result["skipped"].items():
        reasons.setdefault(reason, []).append(name)
    left_out = "".join(f"\nleft out ({reason}): {'; '.join(names)}" for reason, names in reasons.items())
    return f"\n{title}; {work}\n\n{measuring.table(header, rows)}{left_out}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    measuring.prepare(args)
    rates = measuring.measure_rates(args.device, args.smoke)
    print(f"{args.threads} thread(s) on {args.device}: {rates}")
    results = []
    modes = ("off", "on") if args.validation == "both" else (args.validation,)
    for model in args.models:
        options = {"pixels": 64, "hidden": 20, "latent": 5} if args.smoke and model == "one-layer" else {}
        pixels = models.MODELS[model](**options).pixels
        for (batch, particles), precision, validation in product(args.sizes, args.precisions, modes):
            pyro.clear_param_store()
            torch.compiler.reset()
            x = images(batch, pixels, args.device)
            case = Case(model, x, particles, options, learning_rate=LEARNING_RATE, precision=precision)
            measuring.set_matmul_precision(precision)
            with pyro.validation_enabled(validation == "on"):
                result = run_case(case, args, rates)
            print(show(result, validation), flush=True)
            results.append({**result, "validation": validation})
            path = measuring.save(args, "step_time", rates=rates._asdict(), results=results)
    print(f"\n{path}")
    return {"rates": rates._asdict(), "results": results}


if __name__ == "__main__":
    main()
