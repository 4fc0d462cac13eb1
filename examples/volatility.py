"""A stochastic-volatility model of daily returns: ELBO, IWAE and FIVO with the same number of particles.

The logarithm of the variance of a return is a walk that is drawn back to its mean::

    h_t ~ Normal(mu + phi (h_{t-1} - mu), sigma),  r_t ~ Normal(0, exp(h_t / 2))

The returns are generated, so the truth is known, and its log-likelihood is a sum over a grid of h. Each loss
learns mu, phi, sigma and a guide that reads a few returns around t. One long series: an importance weight of
all of it varies so much that IWAE is hardly better than the ELBO, while the filter's bound is close to log
p. Try::

    python examples/volatility.py                    # three minutes
    python examples/volatility.py --num-timesteps 2000 -K 32
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pyro_iw import FIVO_ELBO, ParticleFilter
from shared.networks import mlp
from shared.options import new_parser, positive_float, positive_int
from shared.running import progress_bar
from shared.skeleton import finish, parse

MU, PHI, SIGMA = -1.0, 0.95, 0.3
AROUND = 2  # returns that the guide reads on either side
SMOKE = {"steps": 2, "num_timesteps": 12, "num_particles": 30, "K": 4}


class Volatility(nn.Module):
    """The parameters of the model and the guide's network."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(0.0))
        self.logit_phi = nn.Parameter(torch.tensor(1.0))
        self.log_sigma = nn.Parameter(torch.tensor(-0.7))
        self.reader = mlp(2 * AROUND + 1, 16, 3)

    @property
    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """mu, phi and sigma."""
        return self.mu, self.logit_phi.sigmoid(), self.log_sigma.exp()

    def prior(self, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of h_t given h_{t-1}, or of the walk at rest."""
        mu, phi, sigma = self.values
        if before is None:
            return mu, sigma / (1 - phi**2).sqrt()
        return mu + phi * (before - mu), sigma


class Model:
    def __init__(self, net: Volatility) -> None:
        self.net = net

    def init(self, state: dict) -> None:
        pyro.module("volatility", self.net)
        state["h"] = None

    def step(self, state: dict, r: Tensor, around: Tensor) -> None:
        with pyro.plate("series", len(r)):
            state["h"] = pyro.sample("h", dist.Normal(*self.net.prior(state["h"])))
            pyro.sample("r", dist.Normal(0.0, (state["h"] / 2).exp()), obs=r)


class Guide:
    """The prior of the step times a normal in h_t whose mean and precision are read off the returns."""

    def __init__(self, net: Volatility) -> None:
        self.net = net

    def init(self, state: dict) -> None:
        pyro.module("volatility", self.net)

    def step(self, state: dict, r: Tensor, around: Tensor) -> None:
        prior, spread = self.net.prior(state["h"])
        loc, log_precision, log_scale = self.net.reader(around).unbind(-1)
        precision = 1 / spread**2 + log_precision.exp()
        mean = (prior / spread**2 + loc * log_precision.exp()) / precision
        with pyro.plate("series", len(r)):
            pyro.sample("h", dist.Normal(mean, (log_scale / 4).exp() / precision.sqrt()))


def generate(steps: int) -> Tensor:
    """Returns ``[T]``."""
    h, returns = MU + SIGMA / math.sqrt(1 - PHI**2) * torch.randn(()), []
    for _ in range(steps):
        returns.append((h / 2).exp() * torch.randn(()))
        h = MU + PHI * (h - MU) + SIGMA * torch.randn(())
    return torch.stack(returns)


def windows(r: Tensor) -> Tensor:
    """The logarithms of the sizes of returns around each of ``[T]``, ``[T, 2 AROUND + 1]``."""
    size = r.abs().clamp(min=1e-3).log()
    padded = torch.cat([size[:1].expand(AROUND), size, size[-1:].expand(AROUND)])
    return padded.unfold(0, 2 * AROUND + 1, 1)


def on_a_grid(r: Tensor, mu: float, phi: float, sigma: float, points: int = 400) -> float:
    """log p(r), in nats, summed over a grid of h."""
    at_rest = sigma / math.sqrt(1 - phi**2)
    grid = torch.linspace(mu - 6 * at_rest, mu + 6 * at_rest, points, dtype=torch.float64)
    step = grid[1] - grid[0]
    move = dist.Normal(mu + phi * (grid - mu), sigma).log_prob(grid[:, None]).exp() * step  # [to, from]
    density, total = dist.Normal(mu, at_rest).log_prob(grid).exp() * step, 0.0
    for value in r.double():
        density = density * dist.Normal(0.0, (grid / 2).exp()).log_prob(value).exp()
        total += density.sum().log().item()
        density = move @ (density / density.sum())
    return total


#: A loss of K particles, and how many copies of the series it runs on.
LOSSES = {
    "ELBO": lambda K: (FIVO_ELBO(1, ess_threshold=0), K),
    "IWAE": lambda K: (FIVO_ELBO(K, ess_threshold=0), 1),
    "FIVO": lambda K: (FIVO_ELBO(K), 1),
}


def run(args: argparse.Namespace) -> dict:
    """Train with each loss and judge all alike: what ``volatility.json`` holds."""
    r = generate(args.num_timesteps)
    around, steps = windows(r), len(r)
    results: dict = {"truth": on_a_grid(r, MU, PHI, SIGMA) / steps, "losses": {}, "ess": {}}
    start = Volatility().state_dict()
    for name, make in LOSSES.items():
        loss, copies = make(args.K)
        net = Volatility()
        net.load_state_dict(start)
        pair = Model(net), Guide(net)
        data = r.unsqueeze(1).expand(-1, copies), around.unsqueeze(1).expand(-1, copies, -1)
        optimiser, history = torch.optim.Adam(net.parameters(), args.learning_rate), []
        with progress_bar(args.steps, name) as bar:
            for _ in range(args.steps):
                optimiser.zero_grad()
                value = loss.differentiable_loss(*pair, *data) / (copies * steps)
                value.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimiser.step()
                history.append(-value.item())
                bar.update()
        judge = ParticleFilter(*pair, args.num_particles)
        filtered = judge(r.unsqueeze(1), around.unsqueeze(1))
        results["losses"][name] = {
            "history": history,
            "bound": sum(history[-20:]) / len(history[-20:]),
            "log_marginal": filtered.log_marginal.item() / steps,
            "error": filtered.monte_carlo_error.item() / steps,
            "grid": on_a_grid(r, *(value.item() for value in net.values)) / steps,
            "values": [value.item() for value in net.values],
        }
        results["ess"][name] = filtered.ess.squeeze(1).tolist()
    # The two bounds of the pair that FIVO has trained, over the length.
    results["lengths"], results["by_length"] = [], {"IWAE": [], "FIVO": []}
    length = 5
    while length <= steps:
        results["lengths"].append(length)
        exact = judge.log_marginal(r[:length, None], around[:length, None]).item()
        for name, bounds in results["by_length"].items():
            loss, _ = LOSSES[name](args.K)
            repeated = r[:length, None].expand(-1, 50), around[:length, None].expand(-1, 50, -1)
            bounds.append(exact + loss.loss(*pair, *repeated) / 50)
        length *= 2
    return results


def table(results: dict) -> str:
    lines = [f"{'loss':<6}{'bound':>9}{'log p̂':>9}{'grid':>9}   mu, phi, sigma"]
    for name, row in results["losses"].items():
        numbers = "".join(f"{row[key]:>9.4f}" for key in ("bound", "log_marginal", "grid"))
        lines.append(f"{name:<6}{numbers}   {', '.join(f'{value:.2f}' for value in row['values'])}")
    lines.append(f"{'truth':<6}{results['truth']:>27.4f}   {MU}, {PHI}, {SIGMA}")
    return "\n".join([*lines, "nats per time step"])


def draw(results: dict) -> Figure:
    """Bounds in training, the ESS over time, and how far each bound is from log p over the length."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    bound, ess, gap = figure.subplots(1, 3)
    for name, row in results["losses"].items():
        bound.plot(row["history"], label=name)
    bound.axhline(results["truth"], color="black", linestyle="--", label="log p, true parameters")
    floor = min(min(row["history"][len(row["history"]) // 4 :]) for row in results["losses"].values())
    bound.set(xlabel="gradient step", ylabel="bound [nats per time step]", ylim=(floor, None))
    bound.legend(fontsize=8)
    for name, series in results["ess"].items():
        ess.plot(series, label=name, linewidth=0.8)
    ess.set(xlabel="step", ylabel="ESS of the filter that judges", ylim=(0, None))
    for name, gaps in results["by_length"].items():
        gap.plot(results["lengths"], gaps, "o-", label=name, color={"IWAE": "C1", "FIVO": "C2"}[name])
    gap.set(
        xscale="log", yscale="log", xlabel="length T", ylabel="log p̂ − bound [nats]", title="the same pair"
    )
    gap.legend(fontsize=8)
    gap.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> dict:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("-K", type=positive_int, default=16, help="particles of each loss")
    add("--steps", type=positive_int, default=100, help="gradient steps of each loss")
    add("--learning-rate", type=positive_float, default=0.03, help="of Adam")
    add("--num-timesteps", type=positive_int, default=250, help="length of the series")
    add("--num-particles", type=positive_int, default=1000, help="of each of the filters that judge")
    add("--seed", type=int, default=0, help="of everything random")
    add("--out", type=Path, default=Path("results/volatility"), help="folder for the results")
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    return finish(parse(parser, argv, SMOKE), "volatility", run, draw, table)


if __name__ == "__main__":
    main()
