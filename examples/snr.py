r"""The signal in the gradients: the experiment of Rainforth et al. (1802.04537), with any estimator.

z ~ N(μ, I) and x | z ~ N(z, I) in 20 dimensions; the guide is N(A x + b, 2/3 I), where the posterior's
variance is 1/2. The parameters lie around their optimum (μ the mean of the data, A = I/2, b = μ/2) with a
standard deviation of 0.01, and the gradient of the whole batch is drawn there again and again. Ratios are the
paper's, |E g| / sd g of every element, averaged over the elements of μ for θ and over those of b for φ.
(Those of A have the same slopes, and are in the log as well.) A ratio less than four times the floor of its
estimate, 1/√draws, is measured again with more draws. Try::

    python examples/snr.py                                       # minutes on two cores
    python examples/snr.py --bounds iwae --estimators stl dreg
    python examples/snr.py --max-k 1024 --draws 10000 --device cuda

The axis is the number S = M·K of particles: elbo has M = S and K = 1; iwae and ciwae have K = S and M = 1;
miwae and piwae have M = K = √S.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from pyro_iw import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    GradientSNR,
    ImportanceWeightedELBO,
    gradient_snr,
)
from shared.options import new_parser, positive_int, torch_device
from shared.running import in_one_line, progress_bar, smoke_apart

BOUNDS = ("elbo", "iwae", "miwae", "piwae", "ciwae")
ESTIMATORS = ("reparam", "stl", "dreg")
PERTURBATION = 0.01
# Slopes are fitted over the particles between these; theirs are the asymptotes that the paper derives.
WINDOWS = {
    "theta": {"all S": (1, math.inf), "S ≥ 64": (64, math.inf)},
    "phi": {"S ≤ 64": (1, 64), "S ≥ 16": (16, math.inf)},
}
SYMBOLS = {"theta": "θ", "phi": "φ"}
# PIWAE's gradient of θ is IWAE's and that of φ MIWAE's.
SAME_AS = {("piwae", "theta"): "iwae", ("piwae", "phi"): "miwae"}
SMOKE = {"datapoints": 32, "draws": 20, "max_draws": 20, "max_k": 16, "dimension": 3}
# How far above the floor of its own estimate a ratio has to lie.
CLEAR = 4.0


class Isotropic(dist.TorchDistribution):
    """N(loc, scale² I), of event dim 1: as ``Normal(...).to_event(1)``, in a third of its time.

    That has the logarithm of a scale for every element, where this has one number.
    """

    arg_constraints = {}  # noqa: RUF012 - as in PyTorch
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: float) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> Isotropic:
        return Isotropic(self.loc.expand(torch.Size(batch_shape) + self.event_shape), self.scale)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - as in PyTorch
        shape = self._extended_shape(sample_shape)
        return torch.randn(shape, device=self.loc.device).mul_(self.scale).add(self.loc)

    def log_prob(self, value: Tensor) -> Tensor:
        constant = self.loc.shape[-1] * math.log(2 * math.pi * self.scale**2)
        return -0.5 * ((value - self.loc).square().sum(-1) / self.scale**2 + constant)


class Gaussian:
    """The pair, with its parameters around the optimum.

    Arguments:
        dimension: of z and of x.
        datapoints: their number N, drawn from the model with μ ~ N(0, I).
        seed: of the data and of the parameters.
        device: where to.
    """

    def __init__(self, dimension: int, datapoints: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, generator=generator)

        x = normal(dimension) + normal(datapoints, dimension, scale=math.sqrt(2))
        optimum = x.mean(0)
        self.x = x.to(device)
        self.mu = (optimum + normal(dimension, scale=PERTURBATION)).to(device)
        self.A = (torch.eye(dimension) / 2 + normal(dimension, dimension, scale=PERTURBATION)).to(device)
        self.b = (optimum / 2 + normal(dimension, scale=PERTURBATION)).to(device)

    def model(self) -> None:
        mu = pyro.param("mu", self.mu)
        with pyro.plate("data", len(self.x)):
            z = pyro.sample("z", Isotropic(mu, 1.0))
            pyro.sample("x", Isotropic(z, 1.0), obs=self.x)

    def guide(self) -> None:
        A, b = pyro.param("A", self.A), pyro.param("b", self.b)
        with pyro.plate("data", len(self.x)):
            pyro.sample("z", Isotropic(self.x @ A.T + b, math.sqrt(2 / 3)))


def make_loss(bound: str, particles: int, estimator: str) -> ImportanceWeightedELBO:
    """The loss with S particles, S a square."""
    root = math.isqrt(particles)
    if bound == "elbo":
        return MIWAE_ELBO(M=particles, K=1, estimator=estimator)
    if bound == "iwae":
        return IWAE_ELBO(K=particles, estimator=estimator)
    if bound == "miwae":
        return MIWAE_ELBO(M=root, K=root, estimator=estimator)
    if bound == "piwae":
        return PIWAE_ELBO(M=root, K=root, estimator=estimator)
    if bound == "ciwae":
        return CIWAE_ELBO(K=particles, beta=0.5, estimator=estimator)
    raise ValueError(f"unknown bound {bound!r}: choose one of {', '.join(BOUNDS)}")


def powers_of_four(largest: int) -> list[int]:
    """1, 4, 16, ... up to ``largest``."""
    return [4**i for i in range(largest.bit_length()) if 4**i <= largest]


def slope(particles: list[int], ratios: list[float], low: float, high: float) -> float:
    """Least-squares slope of log SNR against log S, over low <= S <= high; NaN with fewer than two points."""
    points = [(math.log(s), math.log(r)) for s, r in zip(particles, ratios, strict=True) if low <= s <= high]
    if len(points) < 2:
        return math.nan
    x, y = torch.tensor(points, dtype=torch.float64).T
    x = x - x.mean()
    return (x @ y / (x @ x)).item()


def ratios(result: GradientSNR) -> dict[str, float]:
    """The numbers kept of a measurement: elementwise means for μ, b and A, and the groups' norms."""
    return {
        "theta": result.snr["mu"].mean().item(),
        "phi": result.snr["b"].mean().item(),
        "A": result.snr["A"].mean().item(),
        "theta_norm": result.model.norm,
        "phi_norm": result.guide.norm,
        "floor": result.floor,
    }


class Counted:
    """A loss that says when a gradient of it is drawn, so that a bar can move within a measurement."""

    def __init__(self, loss: ImportanceWeightedELBO, tell: Callable[[], Any]) -> None:
        self.loss, self.tell = loss, tell

    def differentiable_loss(self, *args: Any) -> Tensor:
        self.tell()
        return self.loss.differentiable_loss(*args)


def measure(
    pair: Gaussian,
    loss: ImportanceWeightedELBO,
    *,
    draws: int,
    max_draws: int,
    seed: int,
    bar: tqdm | None = None,
) -> dict[str, float]:
    """One point of a curve, from a random state of its own, so that it does not depend on the others.

    ``bar`` counts particles; its total is to hold ``draws`` gradients of this loss, and grows with more.
    """
    counted: Any = loss
    if bar is not None:
        counted = Counted(loss, lambda: bar.update(loss.bound.num_particles))
    while True:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        with pyro.validation_enabled(False):
            result = gradient_snr(counted, pair.model, pair.guide, num_draws=draws, progress=False)
        point = ratios(result)
        smallest = min(point["theta"], point["phi"])
        if smallest >= CLEAR * result.floor or draws >= max_draws:
            return point
        # Without any signal the ratio would be that of |normal|, sqrt(2 / π) times the floor.
        signal = max(smallest**2 - 2 / math.pi * result.floor**2, smallest**2 / 4)
        draws = min(max_draws, math.ceil(1.1 * CLEAR**2 / signal))
        if bar is not None:
            bar.total += draws * loss.bound.num_particles


def run(args: argparse.Namespace) -> dict:
    """Measure every curve.

    Arguments:
        args: from :func:`parse_args`.

    Returns:
        What ``snr.json`` holds: ``settings``, the grid ``particles``, and ``curves`` by name: each has the
        ratios of θ (μ), φ (b) and A, those by norm and the floor, and its slopes and seconds.
    """
    pair = Gaussian(args.dimension, args.datapoints, args.seed, args.device)
    grid = powers_of_four(args.max_k)
    curves: dict[str, dict] = {}
    names = [(bound, estimator) for bound in args.bounds for estimator in args.estimators]
    total = len(names) * sum(grid) * args.draws
    with progress_bar(total, "signal-to-noise", unit=" particles", unit_scale=True) as bar:
        for bound, estimator in names:
            start = time.perf_counter()
            points = []
            for particles in grid:
                bar.set_postfix_str(f"{bound}, {estimator}, {particles} particles")
                points.append(
                    measure(
                        pair,
                        make_loss(bound, particles, estimator),
                        draws=args.draws,
                        max_draws=max(args.draws, args.max_draws),
                        seed=args.seed + 1,
                        bar=bar,
                    )
                )
            curve: dict = {key: [point[key] for point in points] for key in points[0]}
            curve["slopes"] = {
                group: {name: slope(grid, curve[group], *window) for name, window in windows.items()}
                for group, windows in WINDOWS.items()
            }
            curve["seconds"] = time.perf_counter() - start
            curves[f"{bound}, {estimator}"] = curve
    settings = {**vars(args), "device": str(args.device), "out": str(args.out)}
    return {"settings": settings, "particles": grid, "curves": curves}


def table(results: dict) -> str:
    """Ratios and slopes of every curve, one line each."""
    lines = []
    width = max(len(name) for name in results["curves"])
    for group, windows in WINDOWS.items():
        head = [f"{s:>8}" for s in results["particles"]] + [f"{name:>8}" for name in windows]
        lines.append(f"{f'SNR({SYMBOLS[group]})':<{width}}{''.join(head)}")
        for name, curve in results["curves"].items():
            cells = [f"{ratio:8.3f}" for ratio in curve[group]]
            cells += [f"{curve['slopes'][group][window]:+8.2f}" for window in windows]
            lines.append(f"{name:<{width}}{''.join(cells)}")
        lines.append("")
    clear = min(
        ratio / floor
        for curve in results["curves"].values()
        for group in WINDOWS
        for ratio, floor in zip(curve[group], curve["floor"], strict=True)
    )
    lines.append(f"Every ratio is at least {clear:.1f} times the floor of its estimate, 1/√draws.")
    if clear < CLEAR:
        lines.append(f"(Below {CLEAR:.0f} times, slopes are too flat: allow more --max-draws.)")
    return "\n".join(lines)


def distinct(results: dict, group: str) -> dict[str, tuple[str, str, str]]:
    """The curves that differ, by label: name of the curve to draw, bound and estimator.

    The estimator makes no difference to θ, and bounds of :data:`SAME_AS` none. Of curves that are one but for
    the noise of their draws, the one with the most draws stands for all.
    """
    same: dict[tuple[str, str], list[str]] = {}
    for name in results["curves"]:
        bound, estimator = name.split(", ")
        bound = SAME_AS.get((bound, group), bound)
        same.setdefault((bound, "" if group == "theta" else estimator), []).append(name)
    found = {}
    for (bound, estimator), names in same.items():
        bounds = list(dict.fromkeys(name.split(", ")[0].upper() for name in names))
        best = min(names, key=lambda name: sum(results["curves"][name]["floor"]))
        found[" = ".join(bounds) + (f", {estimator}" if estimator else "")] = (best, bound, estimator)
    return found


def draw_guide(axes: Axes, particles: list[int], start: float, order: float, label: str) -> None:
    """A dotted line of one slope, labelled at its end."""
    ends = [start * s**order for s in (particles[0], particles[-1])]
    axes.plot([particles[0], particles[-1]], ends, color="0.3", linestyle=(0, (1, 2)), linewidth=1.2)
    above = order > 0
    middle = math.sqrt(particles[0] * particles[-1])
    place, offset = (middle, start * middle**order), (-4, 4) if above else (-4, -4)
    axes.annotate(
        label,
        place,
        offset,
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        fontsize=9,
        color="0.3",
    )


def save_figure(results: dict, path: Path) -> None:
    """SNR(θ) and SNR(φ) against the number of particles, a line for all curves that are one.

    Dotted lines have the slopes that the paper derives: 1/2 for particles outside the logarithm, and -1/2
    for φ under those inside.
    """
    particles, curves = results["particles"], results["curves"]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    colours = {bound: f"C{i}" for i, bound in enumerate(BOUNDS)}
    styles = dict(zip(ESTIMATORS, ("-", ":", "--"), strict=True)) | {"": "-"}
    markers = dict(zip(ESTIMATORS, ("o", "^", "s"), strict=True)) | {"": "o"}
    all_axes = figure.subplots(1, 2)
    for axes, group in zip(all_axes, WINDOWS, strict=True):
        for label, (name, bound, estimator) in distinct(results, group).items():
            style = {"color": colours[bound], "linestyle": styles[estimator], "marker": markers[estimator]}
            axes.loglog(particles, curves[name][group], label=label, markersize=4, **style)
        floors = [
            min((curve[group][i], curve["floor"][i]) for curve in curves.values())[1]
            for i in range(len(particles))
        ]
        axes.plot(particles, floors, color="0.6", linewidth=1, label="1/√draws: below, all is noise")
        # Clear of the curves, which begin at no more than a few places.
        starts = [curve[group][0] for curve in curves.values()]
        draw_guide(axes, particles, 1.8 * max(starts), 0.5, "slope +½")
        if group == "phi":
            draw_guide(axes, particles, min(starts) / 1.8, -0.5, "slope −½")
        estimators = "any estimator" if group == "theta" else "by estimator"
        axes.set_title(f"SNR({SYMBOLS[group]}), {estimators}")
        axes.set_xlabel("particles S = M·K")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False)
    all_axes[0].set_ylabel("mean over elements of |E g| / sd g")
    figure.savefig(path, dpi=100)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and complete the command line; exits with a message where it makes no sense."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--bounds", nargs="+", choices=BOUNDS, default=["elbo", "iwae", "miwae", "piwae"], help="the bounds")
    add("--estimators", nargs="+", choices=ESTIMATORS, default=["reparam", "dreg"], help="of each bound")
    add("--dimension", type=positive_int, default=20, help="of z and x")
    add("--datapoints", type=positive_int, default=1024, help="in the batch")
    add("--draws", type=positive_int, default=100, help="gradients drawn for each ratio, at least 2")
    add("--max-draws", type=positive_int, default=4000, help="of a ratio too close to its floor")
    add("--max-k", type=positive_int, default=256, help="largest number of particles; powers of 4 up to it")
    add("--seed", type=int, default=0, help="of everything random")
    add(
        "--out",
        type=Path,
        default=Path("results/snr"),
        help="folder for the results; of a smoke run, in results/smoke",
    )
    add("--device", type=torch_device, default="cpu", help="a torch device, such as cuda")
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    args = parser.parse_args(argv)
    if args.draws < 2:
        parser.error("--draws: must be at least 2")
    if args.smoke:
        for name, value in SMOKE.items():
            setattr(args, name, min(getattr(args, name), value))
    smoke_apart(parser, args)
    # Each once, in the order given.
    args.bounds, args.estimators = list(dict.fromkeys(args.bounds)), list(dict.fromkeys(args.estimators))
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    start = time.perf_counter()
    with in_one_line():
        args.out.mkdir(parents=True, exist_ok=True)
        results = run(args)
        # JSON knows no NaN, which the slope of a single point is.
        text = json.dumps(results, indent=2).replace("NaN", "null")
        (args.out / "snr.json").write_text(text + "\n")
        save_figure(results, args.out / "snr.png")
    print(table(results))
    print(f"{args.out / 'snr.json'}\n{args.out / 'snr.png'}\nTook {time.perf_counter() - start:.0f} s.")
    return results


if __name__ == "__main__":
    main()
