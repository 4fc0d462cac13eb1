"""Compare random model/guide pairs with a reference, see CONTRIBUTING.md."""

import argparse
import multiprocessing
import re
import sys
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial

import torch
from tqdm import tqdm

from .checks import check


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--pairs", type=int, default=300, help="how many (default 300)")
    parser.add_argument("--start", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--seed", type=int, help="one pair alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2); 0: in this one")
    parser.add_argument("--compile", action="store_true", help="with compile=True (seconds a pair)")
    parser.add_argument("--refusals", action="store_true", help="list what was refused, and how often")
    options = parser.parse_args(arguments)
    seeds = range(options.start, options.start + options.pairs)
    if options.seed is not None:
        seeds, options.jobs = [options.seed], 0
    begin = time.time()
    counts, refused, warned, failed = Counter(), Counter(), Counter(), []
    with ExitStack() as stack:
        outcomes = map(partial(check, compiled=options.compile), seeds)
        if options.jobs:
            spawn = multiprocessing.get_context("spawn")  # forked, PyTorch's threads would be gone
            pool = stack.enter_context(spawn.Pool(options.jobs, torch.set_num_threads, (1,)))
            outcomes = pool.imap_unordered(partial(check, compiled=options.compile), seeds, chunksize=4)
        for outcome in tqdm(outcomes, total=len(seeds), disable=None, desc="pairs"):
            counts["agreed"] += outcome.agreed
            refused.update(map(in_general, outcome.refused))
            warned.update(map(in_general, outcome.warned))
            failed += outcome.failed
            for line in outcome.failed:
                tqdm.write(line[:800], file=sys.stdout)
                sys.stdout.flush()
        if options.jobs:
            pool.close()
            pool.join()
    total = counts["agreed"] + refused.total() + warned.total() + len(failed)
    print(
        f"{total} checks of {len(seeds)} pairs in {time.time() - begin:.0f} s: {counts['agreed']} agreed, "
        f"{refused.total()} refused, {warned.total()} warned, {len(failed)} failed"
    )
    if options.refusals or options.seed is not None:
        for kind, counter in (("refused", refused), ("warned", warned)):
            for message, count in counter.most_common():
                print(f"{count:6d} {kind}: {message}")
    if failed:
        found = dict.fromkeys(int(re.match(r"seed (\d+)", line)[1]) for line in failed)
        print(f"Rerun one alone with --seed. Failed: {' '.join(map(str, sorted(found)))}")
    return bool(failed)


def in_general(message):
    """The beginning of a message without its names and numbers."""
    return re.sub(r"'[^']*'( \(\w+\))?(, )?", "·", re.sub(r"\d+(\.\d+)?", "#", message))[:110]


if __name__ == "__main__":
    raise SystemExit(main())
