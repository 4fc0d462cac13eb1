"""What resampling buys, and what its gradient leaves out, where log p(x) is known: a walk seen through noise.

    z_t ~ Normal(a z_{t-1}, 0.5),  x_t ~ Normal(z_t, 0.7)

Left: how far the bounds of IWAE and FIVO are from log p(x), over the length of the sequence, with as many
particles. Right: the gradient of FIVO's bound in the model's ``a``, with fixed ancestors and with the score
of the resampling, over K, beside that of log p(x). The first has little noise and is off, however many
particles there are; the second is right for the bound, on average. Try::

    python examples/filter_toy.py                    # half a minute
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_iw import FIVO_ELBO
from shared.options import new_parser, positive_int
from shared.running import progress_bar
from shared.skeleton import finish, parse

A, Q, R = 0.9, 0.5, 0.7
LENGTHS, SIZES, GRADIENT_LENGTH = (5, 10, 25, 50, 100, 200), (2, 4, 8, 16, 32, 64), 10
SMOKE = {"repeats": 3, "gradients": 20, "longest": 10}


class Walk:
    """The model; ``a`` is a number, or one for each of the repetitions in the plate."""

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def init(self, state: dict) -> None:
        state["z"] = torch.zeros(())

    def step(self, state: dict, x: Tensor) -> None:
        with pyro.plate("repetitions", len(x)):
            state["z"] = pyro.sample("z", dist.Normal(self.a * state["z"], Q))
            pyro.sample("x", dist.Normal(state["z"], R), obs=x)


class Guide:
    """Half-way between the walk and what is seen, and a little too wide."""

    def init(self, state: dict) -> None:
        pass

    def step(self, state: dict, x: Tensor) -> None:
        with pyro.plate("repetitions", len(x)):
            pyro.sample("z", dist.Normal((A * state["z"] + x) / 2, 0.6))


def generate(steps: int) -> Tensor:
    """A sequence ``[T]``."""
    z, xs = torch.zeros(()), []
    for _ in range(steps):
        z = A * z + Q * torch.randn(())
        xs.append(z + R * torch.randn(()))
    return torch.stack(xs)


def kalman(xs: Tensor, a: Tensor) -> Tensor:
    """log p(x), in nats."""
    mean, variance, total = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for x in xs:
        mean, variance = a * mean, a**2 * variance + Q**2
        spread = variance + R**2
        total = total - 0.5 * ((x - mean) ** 2 / spread + (2 * math.pi * spread).log())
        mean, variance = mean + variance / spread * (x - mean), variance * R**2 / spread
    return total


def gaps(xs: Tensor, K: int, repeats: int) -> dict[str, list[float]]:
    """log p(x) less the mean of each bound, over the lengths."""
    found: dict[str, list[float]] = {"IWAE": [], "FIVO": []}
    for length in [length for length in LENGTHS if length <= len(xs)]:
        truth = kalman(xs[:length], torch.tensor(A)).item()
        many = xs[:length, None].expand(-1, repeats)
        for name, threshold in (("IWAE", 0.0), ("FIVO", 0.5)):
            loss = FIVO_ELBO(K, threshold).loss(Walk(torch.tensor(A)), Guide(), many)
            found[name].append(truth + loss / repeats)
    return found


def gradients(xs: Tensor, K: int, number: int) -> dict[str, tuple[float, float, float]]:
    """Mean, its standard error and the standard deviation of one gradient in ``a``, by kind."""
    found = {}
    many = xs[:, None].expand(-1, number)
    for name, scored in (("fixed ancestors", False), ("with the score", True)):
        a = torch.full((number,), A, requires_grad=True)
        loss = FIVO_ELBO(K, 1.0, "multinomial", scored).differentiable_loss(Walk(a), Guide(), many)
        (grad,) = torch.autograd.grad(-loss, a)
        found[name] = grad.mean().item(), (grad.std() / math.sqrt(number)).item(), grad.std().item()
    return found


def run(args: argparse.Namespace) -> dict:
    """What ``filter_toy.json`` holds."""
    xs = generate(args.longest)
    short = xs[:GRADIENT_LENGTH]
    a = torch.tensor(A, requires_grad=True)
    (truth,) = torch.autograd.grad(kalman(short, a), a)
    sizes = SIZES[:2] if args.smoke else SIZES
    results: dict = {"gaps": gaps(xs, args.K, args.repeats), "truth": truth.item(), "gradients": {}}
    with progress_bar(len(sizes), "gradients") as bar:
        for K in sizes:
            results["gradients"][K] = gradients(short, K, args.gradients)
            bar.update()
    results["lengths"] = [length for length in LENGTHS if length <= args.longest]
    return results


def table(results: dict) -> str:
    lines = ["log p(x) − bound [nats]", f"{'T':>5}{'IWAE':>10}{'FIVO':>10}"]
    for i, length in enumerate(results["lengths"]):
        numbers = "".join(f"{results['gaps'][name][i]:>10.3f}" for name in ("IWAE", "FIVO"))
        lines.append(f"{length:>5}{numbers}")
    lines.append(f"gradient in a at T = {GRADIENT_LENGTH}; of log p(x): {results['truth']:.3f}")
    lines.append(f"{'K':>5}{'fixed ancestors':>30}{'with the score':>30}")
    for K, row in results["gradients"].items():
        cells = (f"{mean:.3f} ± {error:.3f} (sd {sd:.2f})" for mean, error, sd in row.values())
        lines.append(f"{K:>5}" + "".join(f"{cell:>30}" for cell in cells))
    return "\n".join(lines)


def draw(results: dict) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in results["gaps"].items():
        left.plot(results["lengths"], values, "o-", markersize=4, label=name)
    left.set(xscale="log", yscale="log", xlabel="length T", ylabel="log p(x) − bound [nats]")
    for name in ("fixed ancestors", "with the score"):
        rows = [row[name] for row in results["gradients"].values()]
        mean, error, _ = zip(*rows, strict=True)
        sizes = list(results["gradients"])
        right.errorbar(sizes, mean, error, marker="o", markersize=4, capsize=3, label=name)
    right.axhline(results["truth"], color="black", linestyle="--", label="of log p(x)")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="particles K", ylabel="gradient in a")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> dict:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("-K", type=positive_int, default=16, help="particles of the bounds on the left")
    add("--repeats", type=positive_int, default=400, help="runs that each bound is averaged over")
    add("--gradients", type=positive_int, default=20_000, help="runs that each gradient is averaged over")
    add("--longest", type=positive_int, default=200, help="time steps of the sequence")
    add("--seed", type=int, default=0, help="of everything random")
    add("--out", type=Path, default=Path("results/filter_toy"), help="folder for the results")
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    return finish(parse(parser, argv, SMOKE), "filter_toy", run, draw, table)


if __name__ == "__main__":
    main()
