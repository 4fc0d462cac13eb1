"""Draw the pictures of ``docs/images`` again, by the commands that the documentation states.

A picture that no command makes goes stale: :data:`PICTURES` says for each how it is made, what file that
writes, and about how many CPU minutes it takes. Everything runs below ``results/``, with one thread. A
picture is replaced only after all of its commands have gone well::

    make pictures                                # all, some hours
    make pictures PICTURES="snr bias"
    .venv/bin/python scripts/pictures.py --list

After a change of drawing code alone, ``--copy`` takes the file that an earlier run has left.
"""

from __future__ import annotations

import argparse
import doctest
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
MNIST = "--data mnist --data-dir data --epochs-scale 0.0025 --learning-rate 5e-3 --test-size 1000 --compile"
LONG = "--data mnist --data-dir data --epochs-scale 0.02 --learning-rate 3e-3 --test-size 2000 --compile"


class Picture(NamedTuple):
    """How a picture is made.

    Attributes:
        commands: One after the other, from the root of the repository; the documentation states them.
        file: What the last of them writes, and becomes ``docs/images/<name>.png``.
        minutes: About how long they take, in minutes of one core.
        page: Instead of commands, the page whose own code draws it, in a variable ``figure``.
    """

    commands: tuple[str, ...]
    file: str
    minutes: float
    page: str | None = None


def deep(loss: str, out: str, options: str = MNIST) -> str:
    """A run on a part of the schedule of Burda et al."""
    return f"python examples/deep_vae.py {loss} {options} --out results/{out}"


PICTURES = {
    "aae_codes": Picture(
        ("python examples/aae.py --mode steered",), "results/aae-steered-digits/seed-0/codes.png", 0.5
    ),
    "bias": Picture(("python examples/bias_toy.py",), "results/bias/bias.png", 0.2),
    "bound_curve": Picture((), "results/pages/bound_curve.png", 0.2, page="docs/evaluation.md"),
    "comparison": Picture(("python examples/demo.py",), "results/demo/comparison.png", 2),
    "dmm_losses": Picture(
        ("python examples/dmm.py --compare --epochs 25 --train-size 200 --test-size 60",),
        "results/dmm/dmm_losses.png",
        10,
    ),
    "eight_schools": Picture(
        ("python examples/eight_schools.py",), "results/eight-schools/eight_schools.png", 2
    ),
    "filter_toy": Picture(("python examples/filter_toy.py",), "results/filter_toy/filter_toy.png", 0.3),
    "item_response": Picture(
        ("python examples/item_response.py",), "results/item-response/item_response.png", 3
    ),
    "khat": Picture(("python examples/flow_guide.py --loss elbo",), "results/flow-guide/khat.png", 1.5),
    "mk_grid": Picture(
        ("python examples/mk_grid.py --seeds 3 --epochs 15 --betas 0.05 0.5 0.95",),
        "results/mk-grid-digits/grid.png",
        9,
    ),
    "mnist_curves": Picture(
        (
            deep("--loss elbo -K 1", "vae-1"),
            deep("--loss iwae -K 5", "iwae-5"),
            deep("--loss iwae -K 50", "iwae-50"),
            deep("--loss iwae -K 64", "iwae-64"),
            deep("--loss miwae -M 8 -K 8", "miwae-8-8"),
            deep("--layers 2 --loss iwae -K 5", "2-iwae-5"),
            deep("--layers 2 --loss iwae -K 50", "2-iwae-50"),
            "python examples/compare_runs.py results/vae-1 results/iwae-5 results/iwae-50 results/iwae-64 "
            "results/miwae-8-8 results/2-iwae-5 results/2-iwae-50",
        ),
        "results/comparison/learning_curves.png",
        50,
    ),
    "mnist_long": Picture(
        (
            deep("--loss elbo -K 1", "long-vae", LONG),
            deep("--loss iwae -K 5", "long-iwae-5", f"{LONG} --stop-after 40"),
            deep("--loss iwae -K 50", "long-iwae-50", f"{LONG} --stop-after 40"),
            deep("--loss miwae -M 8 -K 8", "long-miwae", f"{LONG} --stop-after 40"),
            deep("--loss piwae -M 8 -K 8", "long-piwae", f"{LONG} --stop-after 40"),
            deep("--layers 2 --loss iwae -K 50", "long-2-iwae-50", f"{LONG} --stop-after 40"),
            "python examples/compare_runs.py results/long-vae results/long-iwae-5 results/long-iwae-50 "
            "results/long-miwae results/long-piwae results/long-2-iwae-50 --epochs-only",
        ),
        "results/comparison/learning_curves.png",
        300,
    ),
    "pixel_vae": Picture(("python examples/pixel_vae.py",), "results/pixel-vae/pixel_vae.png", 7),
    "radon": Picture(("python examples/radon.py",), "results/radon/radon.png", 5),
    "snr": Picture(("python examples/snr.py",), "results/snr/snr.png", 12),
    "two_levels": Picture(("python examples/two_levels.py",), "results/two-levels/two_levels.png", 1),
    "two_roads": Picture(("python examples/two_roads.py",), "results/two-roads/two_roads.png", 4),
}


def draw_page(page: Path, name: str, target: Path) -> None:
    """Run the examples of a page up to its picture ``images/<name>.png``, and save their ``figure``.

    Raises:
        ValueError: If the page does not show the picture, or has no figure before it.
    """
    import pyro
    from matplotlib.figure import Figure

    before, found, _ = page.read_text(encoding="utf-8").partition(f"(images/{name}.png)")
    if not found:
        raise ValueError(f"{page} shows no images/{name}.png")
    names: dict[str, Any] = {"__name__": "__page__"}
    # What conftest.py gives to the doctests.
    exec("import math, torch, pyro, pyro_iw, pyro.distributions as dist, pyro.poutine as poutine", names)
    exec("from pyro_iw import *\nfrom pyro.infer import SVI, Trace_ELBO\nfrom pyro.optim import Adam", names)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    for example in doctest.DocTestParser().get_examples(before):
        exec(compile(example.source, str(page), "exec"), names)
    if not isinstance(names.get("figure"), Figure):
        raise ValueError(f"{page} makes no `figure` before images/{name}.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    names["figure"].savefig(target, dpi=100)


def make(name: str, copy: bool) -> None:
    """Draw one picture and put it into ``docs/images``."""
    picture = PICTURES[name]
    file = ROOT / picture.file
    if not copy:
        began = time.time()
        for command in picture.commands:
            print(f"$ {command}", flush=True)
            first, *rest = shlex.split(command)
            assert first == "python"
            paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
            subprocess.run([sys.executable, *rest], cwd=ROOT, env=environment, check=True)
        if picture.page is not None:
            print(f"the code of {picture.page}", flush=True)
            draw_page(ROOT / picture.page, name, file)
        if not file.is_file() or file.stat().st_mtime < began - 2:
            raise FileNotFoundError(f"{picture.file} has not been written")
    shutil.copyfile(file, IMAGES / f"{name}.png")
    print(f"docs/images/{name}.png", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="picture", help="which (default: all)")
    parser.add_argument("--list", action="store_true", help="say how each is made, and draw none")
    parser.add_argument("--copy", action="store_true", help="take what an earlier run has left in results/")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in PICTURES]
    if unknown:
        parser.error(f"no picture {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    failed = []
    for name in args.names or PICTURES:
        picture = PICTURES[name]
        if args.list:
            made = " && ".join(picture.commands) or f"the code of {picture.page}"
            print(f"{name}: {made}\n    {picture.file}, {picture.minutes:g} minutes")
            continue
        try:
            make(name, args.copy)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
    if failed:
        print(f"not drawn: {' '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
