"""Command line: ``python -m tests.fuzzing --pairs 1000`` or, for one pair alone, ``--seed 123``."""

import argparse
import time
from collections import Counter

import torch

from .checks import check


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [options.seed] if options.seed is not None else range(options.start, options.start + options.pairs)
    begin = time.time()
    agreed, refused, warned, failed = 0, Counter(), Counter(), []
    for seed in seeds:
        outcome = check(seed)
        agreed += outcome.agreed
        refused.update(message[:60] for message in outcome.refused)
        warned.update(message[:60] for message in outcome.warned)
        failed += outcome.failed
        for line in outcome.failed:
            print(line[:600], flush=True)
    print(f"{agreed} agreed, {refused.total()} refused, {warned.total()} warned, {len(failed)} failed; {time.time() - begin:.1f} s")
    for counter in (refused, warned):
        for message, count in counter.most_common():
            print(f"  {count:5d}  {message}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
