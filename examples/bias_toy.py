"""Why to average inside the logarithm: the bias of log p̂ on a model whose log p(x) is known.

z ~ N(0, 1), x | z ~ N(z, 1), and a guide that is off. By Jensen's inequality E[log w] falls short of log p(x)
by KL(q ‖ p), whatever the number of draws: an average outside the log takes away noise, and no bias. An
average of K weights inside it varies less, and over that narrower range the log is closer to a line: the bias
becomes Var[w] / (2 K p(x)²) to leading order. Try::

    python examples/bias_toy.py
"""

from __future__ import annotations

import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_iw import ImportanceSampler
from shared.checkpoint import write_json
from shared.options import new_parser, positive_int

X = 2.0
POSTERIOR_LOC, POSTERIOR_VARIANCE = X / 2, 0.5
LOG_P = -0.5 * math.log(2 * math.pi * 2) - X**2 / 4
GUIDE_LOC, GUIDE_SCALE = 0.3, 0.8
# The draws are split into M groups of K for the curve between the two others.
GROUPS = 8
SHOWN = (1, 8, 64)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(GUIDE_LOC, GUIDE_SCALE))


def kl() -> float:
    """KL(q ‖ p(z | x)), which is the bias of the ELBO."""
    ratio = GUIDE_SCALE**2 / POSTERIOR_VARIANCE
    return 0.5 * (ratio - 1 - math.log(ratio) + (GUIDE_LOC - POSTERIOR_LOC) ** 2 / POSTERIOR_VARIANCE)


def relative_variance() -> float:
    """Var[w] / p(x)², the chi-squared divergence of the posterior from the guide."""
    q, p = GUIDE_SCALE**2, POSTERIOR_VARIANCE
    shift = (GUIDE_LOC - POSTERIOR_LOC) ** 2
    return q / math.sqrt(p * (2 * q - p)) * math.exp(shift / (2 * q - p)) - 1


def log_mean(log_w: Tensor, K: int) -> Tensor:
    """Logarithms of the means of K log-weights each, shape ``[S // K]``."""
    groups = log_w[: len(log_w) // K * K].reshape(-1, K)
    return groups.logsumexp(1) - math.log(K)


def save_figure(log_w: Tensor, curves: dict[str, list[float]], sizes: list[int], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for K in SHOWN:
        values = log_mean(log_w, K).numpy()
        left.hist(values, bins=120, range=(-6, 0), density=True, histtype="step", label=f"K = {K}")
    left.axvline(LOG_P, color="0.3", linestyle="--", linewidth=1, label="log p(x)")
    left.set_title("log of the mean of K weights")
    left.set_xlabel("log p̂(x) [nats]")
    left.set_ylabel("density")
    left.legend(loc="upper left")
    for name, bias in curves.items():
        style = {"ls": "--", "color": "0.3"} if "leading" in name else {"marker": "o", "markersize": 3}
        points = [(size, value) for size, value in zip(sizes, bias, strict=True) if value is not None]
        right.loglog(*zip(*points, strict=True), label=name, **style)
    right.set_xscale("log", base=2)
    right.set_title("bias")
    right.set_xlabel("weights used, M·K")
    right.set_ylabel("log p(x) − E[bound] [nats]")
    right.legend(fontsize=8, loc="lower left")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def format_table(sizes: list[int], curves: dict[str, list[float]]) -> str:
    """A line a curve, a column a number of weights."""
    lines = [f"{'bias in nats, weights used':<42}" + "".join(f"{size:>9}" for size in sizes)]
    for name, bias in curves.items():
        values = ("" if value is None else f"{value:.4f}" for value in bias)
        lines.append(f"{name:<42}" + "".join(f"{value:>9}" for value in values))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    parser = new_parser(__doc__)
    parser.add_argument("--draws", type=positive_int, default=2**22, help="weights in all")
    parser.add_argument("--out", type=Path, default=Path("results/bias"), help="folder for the figure")
    args = parser.parse_args(argv)
    sizes = [2**i for i in range(9)]
    if args.draws < sizes[-1]:
        parser.error(f"argument --draws: must be at least {sizes[-1]}")
    pyro.set_rng_seed(0)
    sampler = ImportanceSampler(model, guide, args.draws, chunk_size=2**18)
    log_w = torch.cat([chunk.log_weights for chunk in sampler.particles(torch.tensor([X]))])[:, 0].double()
    inside = {K: LOG_P - log_mean(log_w, K).mean().item() for K in sizes}
    curves = {
        "outside the log: ELBO": [inside[1]] * len(sizes),
        f"M = {GROUPS} outside, the rest inside: MIWAE": [inside.get(size // GROUPS) for size in sizes],
        "inside the log: IWAE": [inside[size] for size in sizes],
        "leading order, Var[w] / (2 K p²)": [relative_variance() / (2 * size) for size in sizes],
    }
    results = {"sizes": sizes, "log_p": LOG_P, "kl": kl(), "bias": curves}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "bias.json", results)
        save_figure(log_w, curves, sizes, args.out / "bias.png")
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
    print(format_table(sizes, curves), args.out / "bias.png", sep="\n")
    return results


if __name__ == "__main__":
    main()
