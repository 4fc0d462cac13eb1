r"""Bayesian regression with global weights: what two AutoGuides make of it, before and after weighting.

The diabetes data (442 patients, ten columns, some of them nearly collinear) with unknown noise::

    λ ~ Gamma(2, 1),  w_j ~ Normal(0, 1 / √λ),  y_n ~ Normal(x_n · w, 1 / √λ)

The prior is conjugate, so evidence and posterior are known. ``AutoNormal`` takes the latents for independent,
and is too narrow where columns are collinear: so narrow that its weights cannot make up for it, and their k̂
says so. ``AutoMultivariateNormal`` has next to nothing to correct. All the data have one weight. Try::

    python examples/regression.py                              # half a minute
    python examples/regression.py --loss elbo
    python examples/regression.py --loss iwae                  # wider, and a harder fit
"""

from __future__ import annotations

import argparse
import math

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_iw import ImportanceSampler
from shared.options import loss_of, positive_int
from shared.skeleton import finish, fit, parse, training_parser

SHAPE, RATE = 2.0, 1.0
GUIDES = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}
SMOKE = {"epochs": 20, "num_particles": 200}


def load() -> tuple[Tensor, Tensor, list[str]]:
    """Standardised columns ``[442, 10]``, standardised outcomes ``[442]``, and the columns' names."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    X, y = torch.tensor(bunch.data), torch.tensor(bunch.target)
    X, y = ((values - values.mean(0)) / values.std(0) for values in (X, y))
    return X.float(), y.float(), list(bunch.feature_names)


def model(X: Tensor, y: Tensor) -> None:
    precision = pyro.sample("precision", dist.Gamma(SHAPE, RATE))
    # Under particles λ is [S, 1], of which the 1 is the data's; the weights are [S, 1, D].
    scale = precision.rsqrt()
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), scale.unsqueeze(-1)).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal((X * w).sum(-1), scale), obs=y)  # X @ w would not broadcast


def exact(X: Tensor, y: Tensor) -> tuple[float, Tensor, Tensor]:
    """Log evidence, and means and sds ``[D + 1]`` of the weights and λ, of the normal-gamma posterior."""
    X, y = X.double(), y.double()
    n, d = X.shape
    precision = X.T @ X + torch.eye(d, dtype=X.dtype)
    mean = torch.linalg.solve(precision, X.T @ y)
    shape, rate = SHAPE + n / 2, RATE + (y @ y - mean @ precision @ mean).item() / 2
    log_evidence = SHAPE * math.log(RATE) - shape * math.log(rate) + math.lgamma(shape) - math.lgamma(SHAPE)
    log_evidence -= (precision.logdet().item() + n * math.log(2 * math.pi)) / 2
    sd = (precision.inverse().diagonal() * rate / (shape - 1)).sqrt()
    scalar = torch.tensor([shape, shape**0.5], dtype=X.dtype) / rate
    return log_evidence, torch.cat([mean, scalar[:1]]), torch.cat([sd, scalar[1:]])


def quantities(values: dict[str, Tensor]) -> Tensor:
    """Draws ``[S, D + 1]`` of the weights and λ."""
    return torch.cat([values["w"].flatten(1), values["precision"].reshape(-1, 1)], 1)


def judge(guide: AutoNormal, X: Tensor, y: Tensor, num_particles: int) -> dict:
    """The guide by itself and weighted: moments of all latents, and how good the weights are."""
    samples = ImportanceSampler(model, guide, num_particles, chunk_size=1000)(X, y)
    drawn = quantities(samples.values).double()
    weights = samples.weights.double()
    mean = weights @ drawn
    moments = {
        "guide": {"mean": drawn.mean(0).tolist(), "sd": drawn.std(0).tolist()},
        "weighted": {"mean": mean.tolist(), "sd": (weights @ (drawn - mean).square()).sqrt().tolist()},
    }
    return {
        **moments,
        "elbo": samples.log_weights.mean().item(),
        "log_evidence": samples.log_marginal.item(),
        "error": samples.monte_carlo_error.item(),
        "ess": samples.ess.item(),
        "khat": samples.khat.item(),
    }


def run(args: argparse.Namespace) -> dict:
    """Fit both guides: what ``regression.json`` holds."""
    X, y, names = load()
    log_evidence, mean, sd = exact(X, y)
    guides = {}
    for name, auto in GUIDES.items():
        pyro.clear_param_store()
        guide = auto(model, init_scale=0.1)
        history = fit(model, guide, (X, y), loss_of(args), args, f"{args.loss}, {name}")
        with torch.no_grad():
            guides[name] = {"history": history, **judge(guide, X, y, args.num_particles)}
    moments = {"mean": mean.tolist(), "sd": sd.tolist()}
    return {"names": [*names, "λ"], "log_evidence": log_evidence, "exact": moments, "guides": guides}


def distances(results: dict, moments: dict) -> tuple[float, float, float]:
    """Largest difference of a mean in posterior sds; smallest and largest ratio of the sds."""
    truth = {key: torch.tensor(value) for key, value in results["exact"].items()}
    shift = (torch.tensor(moments["mean"]) - truth["mean"]).abs() / truth["sd"]
    ratio = torch.tensor(moments["sd"]) / truth["sd"]
    return shift.max().item(), ratio.min().item(), ratio.max().item()


def table(results: dict) -> str:
    """Two lines a guide."""
    lines = [
        f"exact log evidence {results['log_evidence']:.2f}",
        f"{'':<36}{'largest Δ':>10}{'sd ratios':>14}",
    ]
    for name, found in results["guides"].items():
        for label in ("guide", "weighted"):
            shift, least, most = distances(results, found[label])
            lines.append(f"{name + ', ' + label:<36}{shift:>10.2f}{least:>8.2f}–{most:.2f}")
        lines.append(
            f"  ELBO {found['elbo']:.2f}, log p̂ {found['log_evidence']:.2f} ± {found['error']:.2f}, "
            f"k̂ {found['khat']:.2f}, ESS {found['ess']:.0f} of {results['settings']['num_particles']}"
        )
    return "\n".join(lines)


def draw(results: dict) -> Figure:
    """Ratios of the sds to the exact ones, and the differences of the means in exact sds."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    truth, names = results["exact"], results["names"]
    heights = range(len(names))
    for i, (name, found) in enumerate(results["guides"].items()):
        for label, marker in (("guide", "o"), ("weighted", "x")):
            pairs = zip(found[label]["mean"], truth["mean"], truth["sd"], strict=True)
            style = {"marker": marker, "color": f"C{i}", "label": f"{name}, {label}"}
            left.scatter([(one - other) / sd for one, other, sd in pairs], heights, **style)
            ratios = [one / sd for one, sd in zip(found[label]["sd"], truth["sd"], strict=True)]
            right.scatter(ratios, heights, **style)
    left.set_yticks(heights, names)
    left.invert_yaxis()
    left.axvline(0, color="grey", linewidth=1)
    right.axvline(1, color="grey", linewidth=1)
    left.set(xlabel="mean − exact mean [exact sd]")
    right.set(xlabel="sd / exact sd")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def make_parser() -> argparse.ArgumentParser:
    defaults = {"M": 4, "K": 4, "estimator": "dreg", "epochs": 1500, "learning_rate": 0.02}
    parser = training_parser(__doc__, "results/regression", minibatches=False, **defaults)
    parser.add_argument("--num-particles", type=positive_int, default=10_000, help="to weight the guide with")
    return parser


def main(argv: list[str] | None = None) -> dict:
    return finish(parse(make_parser(), argv, SMOKE), "regression", run, draw, table)


if __name__ == "__main__":
    main()
