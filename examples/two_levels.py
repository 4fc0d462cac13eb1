"""Why two levels: effective particles of a joint weight and of local ones, as a plate of data grows.

g ~ N(0, 1), z_n ~ N(g, 1), x_n ~ N(z_n, 1) for n up to 1000. The guide of g is the exact posterior, that of
z_n given g the exact one but for its location, which is off by half its scale. One joint weight over all z_n
is a product of N factors and comes down to its largest particle. The local weights of two levels know nothing
of N. All is normal, so that log p(x) is known. Try::

    python examples/two_levels.py                  # seconds
"""

from __future__ import annotations

import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_iw import IWAE_ELBO, LocallyEnhancedELBO
from pyro_iw.bounds import IWAE
from shared.checkpoint import write_json
from shared.options import new_parser, positive_int
from shared.running import in_one_line

SIZES = (1, 3, 10, 30, 100, 300, 1000)
OFF = 0.5  # of the local guide's location, in its scales
SCALE = 0.5**0.5


def model(x: Tensor) -> None:
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    precision = 1 + len(x) / 2
    g = pyro.sample("g", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((g + x) / 2 + OFF * SCALE, SCALE))


def log_evidence(x: Tensor) -> float:
    """Of x, whose covariance is 2 I + 1 1ᵀ."""
    x, n = x.double(), len(x)
    square = (x @ x - x.sum() ** 2 / (2 + n)) / 2
    return -0.5 * (square.item() + (n - 1) * math.log(2) + math.log(2 + n) + n * math.log(2 * math.pi))


def kl(n: int) -> float:
    """KL(q ‖ p(g, z | x)), by which the ELBO falls short."""
    return n * OFF**2 / 2


def effective(log_w: Tensor, dim: int) -> Tensor:
    """Effective sample sizes along a dim."""
    return 1 / log_w.softmax(dim).square().sum(dim)


@torch.no_grad()
def measure(x: Tensor, particles: int, repeats: int) -> dict[str, float]:
    """Mean ESS, and log p(x) less the mean bound, with so many joint particles and so many local ones."""
    one, two = IWAE_ELBO(K=particles), LocallyEnhancedELBO(local=IWAE(particles), over="data")
    log_p = log_evidence(x)
    found: dict[str, list[float]] = {"joint ESS": [], "local ESS": [], "joint gap": [], "two-level gap": []}
    for _ in range(repeats):
        log_w = one.particles(model, guide, x).log_weights  # [K]
        found["joint ESS"].append(effective(log_w, 0).item())
        found["joint gap"].append(log_p - log_w.logsumexp(0).item() + math.log(particles))
        local = two.particles(model, guide, x).local["data"].log_weights  # [1, L, N]
        found["local ESS"].append(effective(local, 1).mean().item())
        found["two-level gap"].append(log_p + two.loss(model, guide, x))
    return {name: sum(values) / repeats for name, values in found.items()} | {"ELBO gap": kl(len(x))}


def table(results: dict) -> str:
    """A line a quantity, a column a size of the plate."""
    lines = [f"{'indices in the plate':<22}" + "".join(f"{size:>9}" for size in results["sizes"])]
    for name, values in results["found"].items():
        lines.append(f"{name:<22}" + "".join(f"{value:>9.2f}" for value in values))
    return "\n".join(lines)


def draw(results: dict) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes, found = results["sizes"], results["found"]
    left.axhline(results["particles"], color="0.6", linestyle="--", linewidth=1, label="all particles")
    left.semilogx(sizes, found["joint ESS"], marker="o", color="C1", label="one joint weight")
    left.semilogx(sizes, found["local ESS"], marker="o", color="C2", label="local weights, two levels")
    left.set(xlabel="indices in the plate, N", ylabel=f"ESS of {results['particles']}", ylim=(0, None))
    for name, label, colour in (
        ("ELBO gap", "ELBO", "C0"),
        ("joint gap", "joint IWAE", "C1"),
        ("two-level gap", "two levels", "C2"),
    ):
        right.loglog(sizes, [max(gap, 1e-3) for gap in found[name]], marker="o", color=colour, label=label)
    # Less than that is the noise of the draws.
    right.set(xlabel="indices in the plate, N", ylabel="log p(x) − bound [nats]", ylim=(1e-2, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> dict:
    parser = new_parser(__doc__)
    parser.add_argument("--particles", type=positive_int, default=64, help="joint ones, and local ones")
    parser.add_argument("--repeats", type=positive_int, default=200, help="draws of all of them")
    parser.add_argument("--out", type=Path, default=Path("results/two-levels"), help="folder for the figure")
    args = parser.parse_args(argv)
    pyro.set_rng_seed(0)
    data = 3**0.5 * torch.randn(max(SIZES))
    rows = [measure(data[:size], args.particles, args.repeats) for size in SIZES]
    found = {name: [row[name] for row in rows] for name in rows[0]}
    results = {"sizes": list(SIZES), "particles": args.particles, "found": found}
    with in_one_line():
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "two_levels.json", results)
        draw(results).savefig(args.out / "two_levels.png", dpi=100)
    print(table(results), args.out / "two_levels.png", sep="\n")
    return results


if __name__ == "__main__":
    main()
