"""What the benchmarks share: interleaved timing, paired ratios, tables, the machine's facts, the roofline."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import models
import torch
from tqdm import tqdm

__all__ = [
    "Blocks",
    "Quartiles",
    "Rates",
    "Work",
    "add_common_arguments",
    "measure_rates",
    "positive_int",
    "prepare",
    "progress",
    "run_blocks",
    "save",
    "set_matmul_precision",
    "synchronize",
    "table",
    "work_of",
]


# Arguments and the machine


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def torch_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return device


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=torch_device, default="cpu", help="a torch device, such as cuda")
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads of every contestant")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/bench"),
        help="folder for the JSON file; of a smoke run, results/smoke/bench",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with a smoke run's results apart, to overwrite no others."""
    args = parser.parse_args(argv)
    if args.smoke and args.out is parser.get_default("out"):
        args.out = Path("results/smoke/bench")
    return args


def prepare(args: argparse.Namespace) -> None:
    """Hold PyTorch and JAX to the same number of threads, and to float32 throughout."""
    torch.set_num_threads(args.threads)
    # XLA reads these when JAX is first imported.
    os.environ.setdefault("NPROC", str(args.threads))
    if args.threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_cpu_multi_thread_eigen" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # on a GPU the default would be TF32
    set_matmul_precision("float32")


def machine(device: torch.device) -> dict[str, Any]:
    """What a number depends on."""
    versions = {}
    for package in ("torch", "pyro-ppl", "jax", "numpyro", "pythae"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def save(args: argparse.Namespace, name: str, **content: Any) -> Path:
    """Write ``name.json`` with the machine's facts and the arguments."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    settings = {
        key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()
    }
    content = {"machine": machine(args.device), "settings": settings, **content}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


# Timing


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Blocks(NamedTuple):
    """Measurements of one contestant, one a round.

    Attributes:
        seconds: wall time a step.
        cores: CPU time over wall time: how many cores were at work.
    """

    seconds: list[float]
    cores: list[float]

    def ratios(self, other: Blocks) -> Quartiles:
        """Quartiles of the times over the other's in the same round."""
        return Quartiles.of([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _block(step: Callable[[], Any], steps: int, device: torch.device) -> tuple[float, float]:
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / steps, cpu / wall


def run_blocks(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    block_seconds: float,
    device: torch.device,
    label: str = "",
) -> dict[str, Blocks]:
    """Time everyone in turn, round by round, so that a ratio is of neighbours in time.

    Arguments:
        steps: one training step of each contestant, warmed up.
        rounds: how many blocks each gets.
        block_seconds: a block takes as many steps as last about that long.
        device: where the work is done.
        label: of the progress bar.
    """
    counts = {}
    for name, step in steps.items():
        seconds = min(_block(step, 3, device)[0] for _ in range(2))
        counts[name] = max(1, round(block_seconds / seconds))
    results = {name: Blocks([], []) for name in steps}
    names = list(steps)
    gc.collect()
    gc.freeze()
    try:
        with progress(rounds * len(names), label) as bar:
            for index in range(rounds):
                first = index % len(names)
                for name in names[first:] + names[:first]:
                    # What the one before left in the caches is nobody's fault: one step off the clock.
                    steps[name]()
                    seconds, cores = _block(steps[name], counts[name], device)
                    results[name].seconds.append(seconds)
                    results[name].cores.append(cores)
                    bar.update()
    finally:
        gc.unfreeze()
    return results


def progress(total: int, label: str) -> tqdm:
    """A progress bar, on a terminal alone: a log file would get a line for each look of it."""
    return tqdm(total=total, desc=label, leave=False, disable=None)


# The roofline


class Work(NamedTuple):
    """What one training step has to do at the least.

    Attributes:
        flops: of the matrix products. A product of ``[r, i]`` by ``[i, o]`` takes 2·r·i·o in the forward
            pass, as many for the gradient of the weights, and as many for that of its input, which the layer
            on the data does without.
        bytes: moved by these products and by Adam. A layer reads its input and weights and writes its output;
            its backward pass reads the output's gradient and the input, writes the weights' gradient, and
            where it goes on reads the weights and writes the input's gradient. Adam reads weights, gradients
            and two moments, and writes all but the gradients. Elementwise passes in between are left out.
    """

    flops: int
    bytes: int


class Rates(NamedTuple):
    """What the device does at its best, as measured: FLOP/s of a large float32 product, bytes/s of a copy."""

    flops: float
    bytes: float
    tf32: float | None = None
    bfloat16: float | None = None

    def seconds(self, work: Work, precision: str = "float32") -> float:
        """The least time for this work, bound by arithmetic in a precision or by memory.

        A CPU's is counted as float32's throughout.
        """
        flops = {"tf32": self.tf32, "bfloat16": self.bfloat16}.get(precision) or self.flops
        return max(work.flops / flops, work.bytes / self.bytes)

    def __str__(self) -> str:
        text = f"matrix product {self.flops / 1e9:.0f} GFLOP/s in float32"
        if self.tf32 is not None:
            text += f", {self.tf32 / 1e9:.0f} in TF32"
        if self.bfloat16 is not None:
            text += f", {self.bfloat16 / 1e9:.0f} in bfloat16"
        return f"{text}; copy {self.bytes / 1e9:.0f} GB/s"


def work_of(vae: models.VAE, batch: int, particles: int) -> Work:
    """The least work of a training step, from the shapes of the layers; see :class:`Work`."""
    size = 4  # bytes of a float32
    num_parameters = sum(parameter.numel() for parameter in vae.parameters())
    flops, moved = 0, 7 * num_parameters
    for product in vae.products(batch, particles):
        flops += 2 * product.rows * product.width_in * product.width_out * (2 + product.needs_input_grad)
        weights = product.width_in * product.width_out
        moved += 2 * (product.elements_in + product.elements_out) + 2 * weights
        if product.needs_input_grad:
            moved += product.elements_in + weights
    return Work(flops, moved * size)


def set_matmul_precision(name: str) -> None:
    """Have float32 matrix products on a GPU take TensorFloat32 if that is the name, else all digits."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")


def measure_rates(device: torch.device, smoke: bool = False) -> Rates:
    """The best of a few large products and copies."""
    size = 256 if smoke else 8192 if device.type == "cuda" else 2048
    length = 2**18 if smoke else 2**28 if device.type == "cuda" else 2**25

    def best(function: Callable[[], Any]) -> float:
        function()
        return min(_block(function, 2, device)[0] for _ in range(5))

    def product_rate(dtype: torch.dtype) -> float:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / best(lambda: torch.mm(a, b, out=out))

    source = torch.zeros(length, device=device)
    target = torch.empty_like(source)
    moved = 2 * 4 * length / best(lambda: target.copy_(source))
    single = product_rate(torch.float32)
    if device.type != "cuda":
        return Rates(single, moved)
    set_matmul_precision("tf32")
    tf32 = product_rate(torch.float32)
    set_matmul_precision("float32")
    return Rates(single, moved, tf32, product_rate(torch.bfloat16))


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
