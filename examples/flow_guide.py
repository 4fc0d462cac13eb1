"""A normalising flow for a guide, beside a diagonal normal on the same model: k̂, ESS and log p̂ of both.

Somebody at an unknown place z in the plane is heard by two stations, each of which measures a distance::

    z ~ Normal(0, 2² I),  x_i ~ Normal(‖z − station_i‖, 0.3)

The posterior is a pair of arcs, mirror images of each other, or one arc where they meet. A normal covers it
badly at best. The flow is two conditional spline layers (Durkan et al., 1906.04032) before that same normal's
location and scale. Both are trained by MIWAE on draws from the model and judged on others, for which the
evidence is known from a grid. Try::

    python examples/flow_guide.py                              # minutes
    python examples/flow_guide.py --loss elbo                  # the normal loses an arc, unseen by most k̂
    python examples/flow_guide.py --estimator dreg
"""

from __future__ import annotations

import argparse
import math

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pyro.distributions.transforms import Permute, conditional_spline_autoregressive
from torch import Tensor, nn

from pyro_iw import ImportanceSampler
from pyro_iw.psis import khat_threshold
from shared.networks import mlp
from shared.options import loss_of, positive_int
from shared.skeleton import finish, fit, parse, training_parser

STATIONS = torch.tensor([[-1.5, 0.0], [1.5, 0.0]])
SPREAD, NOISE = 2.0, 0.3
SMOKE = {"epochs": 1, "train_size": 100, "test_size": 10, "num_particles": 100}
REACH = 8.0
PICTURED = 3
# Contours of the posterior, as shares of its highest density.
LEVELS = (0.05, 0.5)


def distances(z: Tensor) -> Tensor:
    """From both stations, ``[*leading, 2]``."""
    return (z.unsqueeze(-2) - STATIONS).norm(dim=-1)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), SPREAD).to_event(1))
        pyro.sample("x", dist.Normal(distances(z), NOISE).to_event(1), obs=x)


def simulate(size: int) -> Tensor:
    """Distances that the stations measure, ``[size, 2]``."""
    return torch.normal(distances(SPREAD * torch.randn(size, 2)), NOISE)


def log_joint(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """log p(x, z) on a grid, ``[N, steps, steps]``, and the grid's points along either axis."""
    axis = torch.linspace(-REACH, REACH, steps)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    prior = dist.Normal(0.0, SPREAD).log_prob(z).sum(-1)
    return prior + dist.Normal(distances(z), NOISE).log_prob(x[:, None, None]).sum(-1), axis


def log_evidence(x: Tensor, steps: int = 400) -> Tensor:
    """log p(x) by summing over the grid, ``[N]``."""
    cell = math.log(2 * REACH / (steps - 1)) * 2
    return torch.cat([log_joint(rows, steps)[0].logsumexp((1, 2)) + cell for rows in x.split(10)])


class Guide(nn.Module):
    """q(z | x): a normal whose location and scale a network gives, with or without a flow before them.

    Arguments:
        layers: The number of spline layers, 0 for the diagonal normal.
        hidden: The width of the networks.
    """

    def __init__(self, layers: int, hidden: int) -> None:
        super().__init__()
        self.encoder = mlp(2, hidden, hidden, 4)
        options = {"context_dim": 2, "hidden_dims": [hidden], "count_bins": 8, "bound": 4.0}
        self.layers = nn.ModuleList(conditional_spline_autoregressive(2, **options) for _ in range(layers))

    def forward(self, x: Tensor) -> None:
        pyro.module("guide", self)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
        # The order is turned round in between, so that either coordinate depends on the other.
        turned = Permute(torch.tensor([1, 0]))
        flow = [part for layer in self.layers for part in (layer.condition(x), turned)]
        flow.append(dist.transforms.AffineTransform(loc, log_scale.exp(), event_dim=1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(noise, flow))


def run(args: argparse.Namespace) -> dict:
    """Train both guides and judge them: what ``flow_guide.json`` holds."""
    train, test = simulate(args.train_size), simulate(args.test_size)
    truth = log_evidence(test)
    found = {}
    for name, layers in (("normal", 0), ("flow", args.layers)):
        pyro.clear_param_store()
        guide = Guide(layers, args.hidden)
        history = fit(model, guide, (train,), loss_of(args), args, f"{args.loss}, {name}")
        with torch.no_grad():
            samples = ImportanceSampler(model, guide, args.num_particles)(test)
        found[name] = {
            "history": history,
            "elbo": samples.log_weights.mean(0).tolist(),
            "log_evidence": samples.log_marginal.tolist(),
            "ess": samples.ess.tolist(),
            "khat": samples.khat.tolist(),
            "draws": samples.values["z"][:400, :PICTURED].tolist(),
        }
    return {"x": test.tolist(), "log_evidence": truth.tolist(), "guides": found}


def table(results: dict) -> str:
    """A line a guide; medians and means over the held-out datapoints."""
    truth = torch.tensor(results["log_evidence"])
    lines = [f"{'guide':<8}{'ELBO':>8}{'log p̂':>8}{'exact':>8}{'k̂':>7}{'k̂ > 0.7':>9}{'ESS':>7}"]
    for name, found in results["guides"].items():
        elbo, log_p, ess, khat = (torch.tensor(found[k]) for k in ("elbo", "log_evidence", "ess", "khat"))
        lines.append(
            f"{name:<8}{elbo.mean():8.2f}{log_p.mean():8.3f}{truth.mean():8.3f}{khat.median():7.2f}"
            f"{(khat > 0.7).float().mean():9.0%}{ess.median():7.0f}"
        )
    lines.append(f"k̂ and ESS (of {results['settings']['num_particles']}) of the median datapoint")
    return "\n".join(lines)


def window(axis: Tensor, density: Tensor, draws: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits of x and y of a square that holds a posterior's contours, both stations and nearly all draws.

    Arguments:
        axis: The grid's points, shape ``[G]``.
        density: The posterior on the grid, 1 at its highest, shape ``[G, G]`` with y before x.
        draws: Of all guides, shape ``[n, 2]``.
    """
    inside = density > 0.02
    places = [axis[inside.any(dim)] for dim in (0, 1)]
    quantiles = draws.quantile(torch.tensor([0.01, 0.99]), 0).T
    lows, highs = [], []
    for place, ends, stations in zip(places, quantiles, STATIONS.T, strict=True):
        lows.append(min(place.min().item(), ends[0].item(), stations.min().item()))
        highs.append(max(place.max().item(), ends[1].item(), stations.max().item()))
    half = 0.55 * max(high - low for low, high in zip(lows, highs, strict=True))
    x, y = ((low + high) / 2 for low, high in zip(lows, highs, strict=True))
    return (x - half, x + half), (y - half, y + half)


def draw(results: dict) -> Figure:
    """Draws from both guides on the posteriors of a few datapoints."""
    x, guides = torch.tensor(results["x"]), results["guides"]
    figure = Figure(figsize=(3 * PICTURED + 0.6, 3.2 * len(guides) + 0.6), layout="constrained")
    axes = figure.subplots(len(guides), PICTURED, squeeze=False)
    log_p, axis = log_joint(x[:PICTURED], steps=400)
    drawn = {name: torch.tensor(found["draws"]) for name, found in guides.items()}
    for n, column in enumerate(axes.T):
        density = (log_p[n] - log_p[n].max()).exp()
        xlim, ylim = window(axis, density, torch.cat([draws[:, n] for draws in drawn.values()]))
        for place, (name, found) in zip(column, guides.items(), strict=True):
            place.scatter(*drawn[name][:, n].T, s=3, color="C0", alpha=0.5)
            place.contour(axis, axis, density, levels=LEVELS, colors=["C1", "C3"], linewidths=1.2)
            place.scatter(*STATIONS.T, marker="^", color="black", s=20)
            khat = f"{found['khat'][n]:.2f}".replace("-", "−")
            place.set(xlim=xlim, ylim=ylim, aspect="equal", title=f"{name}, k̂ {khat}", xlabel="z₁")
        for place in column[:-1]:
            place.set_xlabel("")
    for place in axes[:, 0]:
        place.set_ylabel("z₂")
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=4, color="C0", label="draws from the guide"),
        Line2D([], [], color="C3", label=f"posterior, {LEVELS[1]:.0%} of its highest density"),
        Line2D([], [], color="C1", label=f"{LEVELS[0]:.0%}"),
        Line2D([], [], linestyle="", marker="^", markersize=5, color="black", label="stations"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def draw_khat(results: dict) -> Figure:
    """k̂ of every held-out datapoint under both guides, and how far log p̂ is off by it."""
    threshold = khat_threshold(results["settings"]["num_particles"])
    truth = torch.tensor(results["log_evidence"])
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    known = {
        # A k̂ of infinity is null in the file.
        name: torch.tensor([math.nan if value is None else value for value in found["khat"]])
        for name, found in results["guides"].items()
    }
    for (name, khat), colour, marker in zip(known.items(), ("C1", "C0"), ("s", "o"), strict=True):
        error = torch.tensor(results["guides"][name]["log_evidence"]) - truth
        ranks = torch.arange(1, len(khat) + 1) / len(khat)
        label = f"{name}: {(khat > threshold).float().mean():.0%} above {threshold:.2f}"
        style = {"s": 12, "color": colour, "marker": marker, "alpha": 0.7, "linewidths": 0}
        left.scatter(ranks, khat.sort().values, label=label, **style)
        right.scatter(khat, error, label=name, **style)
    left.axhline(threshold, color="black", linestyle="--", linewidth=1)
    right.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.2f}")
    right.axhline(0, color="0.6", linewidth=1)
    left.set(xlabel="share of the held-out datapoints, in ascending order", ylabel="Pareto k̂")
    left.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    right.set(xlabel="Pareto k̂", ylabel="log p̂ − log p [nats]")
    left.set_title("Can the weights be trusted?")
    right.set_title("How far the evidence is off")
    left.legend(fontsize=9, loc="upper left")
    right.legend(fontsize=9, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> dict:
    defaults = {"M": 2, "K": 8, "epochs": 75, "batch_size": 50, "learning_rate": 5e-3}
    parser = training_parser(__doc__, "results/flow-guide", **defaults)
    add = parser.add_argument
    add("--layers", type=positive_int, default=2, help="of splines")
    add("--hidden", type=positive_int, default=32, help="width of the networks")
    add("--train-size", type=positive_int, default=1000, help="datapoints to train on")
    add("--test-size", type=positive_int, default=100, help="datapoints to judge by")
    add("--num-particles", type=positive_int, default=2000, help="a datapoint, to judge by")
    return finish(parse(parser, argv, SMOKE), "flow_guide", run, draw, table, also={"khat": draw_khat})


if __name__ == "__main__":
    main()
