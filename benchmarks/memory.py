"""Peak memory of one training step over the number of particles, all at once and in chunks.

Each case runs in a process of its own, on the one-layer VAE. On a CPU the figure is the high-water mark of
resident memory above what the process held after a step with few particles; on a GPU it is
``torch.cuda.max_memory_allocated``, less what was allocated before. Try::

    python benchmarks/memory.py --particles 64 1024 --cap 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import measuring
import pyro
import torch
from contestants import Case, by_hand, ours

from pyro_iw import IWAE_ELBO

#: What is measured, by label: keywords of the loss, or None for PyTorch by hand.
WAYS: dict[str, dict[str, Any] | None] = {
    "PyTorch by hand": None,
    "ours": {},
    "ours, chunks of 64": {"chunk_size": 64},
}
GIB = 2**30


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    sizes = [4**power for power in range(3, 8)]
    add("--particles", nargs="+", type=measuring.positive_int, default=sizes, metavar="K", help="particles")
    add("--batch", type=measuring.positive_int, default=20, help="images a step")
    add(
        "--cap",
        type=float,
        default=6.0,
        help="GiB that no case is to exceed, as foreseen from the one before",
    )
    add("--case", nargs=2, metavar=("WAY", "K"), help="measure this one in this process, and print JSON")
    measuring.add_common_arguments(parser)
    args = measuring.parse(parser, argv)
    if args.smoke:
        args.particles, args.batch = [64], 4
    args.particles = sorted(set(args.particles))
    return args


def _peak(device: torch.device) -> int:
    """Bytes: the most that was in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(way: str, particles: int, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one step in this process, in bytes above the baseline."""
    generator = torch.Generator().manual_seed(0)
    x = torch.bernoulli(torch.full((args.batch, 784), 0.2), generator=generator).to(args.device)
    keywords = WAYS[way]

    def contestant(count: int) -> Any:
        case = Case("one-layer", x, count)
        return by_hand(way, case) if keywords is None else ours(way, case, "module", **keywords)

    pyro.enable_validation(False)
    # Libraries load, Adam makes its moments, the allocator its pools: none of that is the step's.
    contestant(2).step()
    trained = contestant(particles)
    trained.vae.zero_grad()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    before = _in_use(args.device)
    trained.step()
    measuring.synchronize(args.device)
    return {"bytes": max(0, _peak(args.device) - before), "baseline": before}


def in_subprocess(way: str, particles: int, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", way, str(particles), "--batch", str(args.batch)]
    command += ["--device", str(args.device), "--threads", str(args.threads)]
    # Else glibc keeps freed blocks in its heap, in pieces, and the process's size measures those.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode < 0 or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        return {"skipped": f"failed: {last[:80]}"}
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    """All cases, by way and number of particles."""
    results: dict[str, dict[int, dict[str, Any]]] = {}
    with measuring.progress(len(WAYS) * len(args.particles), "memory") as bar:
        for way, keywords in WAYS.items():
            results[way] = {}
            last: tuple[int, int] | None = None
            for particles in args.particles:
                bar.set_postfix_str(f"{way}, {particles} particles", refresh=True)
                bar.update()
                chunked = keywords is not None and "chunk_size" in keywords
                if chunked and not _accepts(keywords):
                    results[way][particles] = {"skipped": "no such keyword in this version"}
                    continue
                if last is not None:
                    # In chunks the memory does not grow with K but for the log-weights themselves.
                    foreseen = last[1] * (1 if chunked else particles / last[0])
                    if foreseen > args.cap * GIB:
                        reason = f"not run: about {foreseen / GIB:.1f} GiB foreseen"
                        results[way][particles] = {"skipped": reason}
                        continue
                results[way][particles] = found = in_subprocess(way, particles, args)
                if "bytes" in found:
                    last = particles, found["bytes"]
    return results


def _accepts(keywords: dict[str, Any]) -> bool:
    try:
        IWAE_ELBO(K=2, **keywords)
    except TypeError:
        return False
    return True


def show(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    def cell(found: dict[str, Any]) -> str:
        return f"{found['bytes'] / 2**20:.1f}" if "bytes" in found else f"({found['skipped']})"

    particles = list(next(iter(results.values())))
    rows = [[f"{count}", *(cell(found[count]) for found in results.values())] for count in particles]
    return measuring.table(["particles", *(f"{way}, MiB" for way in results)], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    measuring.prepare(args)
    if args.case is not None:
        way, particles = args.case
        found = measure(way, int(particles), args)
        print(json.dumps(found))
        return found
    if args.device.type == "cpu" and not Path("/proc/self/status").exists():
        raise SystemExit("error: peak memory on a CPU is read from /proc, which this system does not have")
    results = run(args)
    print(f"peak memory of one training step, one-layer VAE, B = {args.batch}, {args.device}\n")
    print(show(results))
    path = measuring.save(args, "memory", results=results)
    print(f"\n{path}")
    return {"results": results}


if __name__ == "__main__":
    main()
