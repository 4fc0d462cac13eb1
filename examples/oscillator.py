"""Pyro's particle-filter example, a noisy harmonic oscillator, with one line of loss added.

The state turns by a quarter of a circle at each step, is shaken, and its first component is seen through
noise::

    z_t ~ Normal(A z_{t-1}, process noise),  y_t ~ Normal(z_t[0], measurement noise)

Model and guide are those of ``pyro.infer.SMCFilter``: ``init(state, initial)`` and ``step(state, y)``. There
they are run with noises that are known; ``FIVO_ELBO`` learns both noises, and the guide with them. The model
is linear and Gaussian, so a Kalman filter says what there was to be had. Try::

    python examples/oscillator.py
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_iw import FIVO_ELBO, ParticleFilter
from shared.options import new_parser, positive_float, positive_int
from shared.running import progress_bar
from shared.skeleton import finish, parse

A = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
PROCESS, MEASUREMENT = 0.6, 1.0
SMOKE = {"steps": 3, "num_timesteps": 8, "num_particles": 40}


class Oscillator(PyroModule):
    """The model; its memory is in ``state``, and it counts the steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.process = PyroParam(torch.tensor(2.0), constraint=constraints.positive)
        self.measurement = PyroParam(torch.tensor(2.0), constraint=constraints.positive)

    def init(self, state: dict, initial: Tensor) -> None:
        self.t = 0
        state["z"] = pyro.sample("z_init", dist.Delta(initial, event_dim=1))

    def step(self, state: dict, y: Tensor) -> None:
        self.t += 1
        moved = dist.Normal(state["z"] @ A.T, self.process).to_event(1)
        state["z"] = pyro.sample(f"z_{self.t}", moved)
        pyro.sample(f"y_{self.t}", dist.Normal(state["z"][..., 0], self.measurement), obs=y)


class Guide(PyroModule):
    """Moves as the model does, and a learnt share of the way towards what is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))
        self.scale = PyroParam(torch.ones(2), constraint=constraints.positive)

    def init(self, state: dict, initial: Tensor) -> None:
        self.t = 0
        pyro.sample("z_init", dist.Delta(initial, event_dim=1))

    def step(self, state: dict, y: Tensor) -> None:
        self.t += 1
        moved = state["z"] @ A.T
        shift = self.gain * (y - moved[..., 0])
        loc = torch.stack([moved[..., 0] + shift, moved[..., 1]], -1)
        pyro.sample(f"z_{self.t}", dist.Normal(loc, self.scale).to_event(1))


def generate(steps: int, initial: Tensor) -> Tensor:
    """Measurements ``[T]``."""
    z, ys = initial, []
    for _ in range(steps):
        z = A @ z + PROCESS * torch.randn(2)
        ys.append(z[0] + MEASUREMENT * torch.randn(()))
    return torch.stack(ys)


def kalman(ys: Tensor, initial: Tensor, process: float, measurement: float) -> float:
    """log p(y), in nats."""
    mean, covariance, total = initial.double(), torch.zeros(2, 2, dtype=torch.float64), 0.0
    turn, seen = A.double(), torch.tensor([1.0, 0.0], dtype=torch.float64)
    for y in ys.double():
        mean, covariance = turn @ mean, turn @ covariance @ turn.T + process**2 * torch.eye(2)
        spread = (seen @ covariance @ seen).item() + measurement**2
        error = (y - seen @ mean).item()
        total -= 0.5 * (error**2 / spread + math.log(2 * math.pi * spread))
        gain = covariance @ seen / spread
        mean, covariance = mean + gain * error, covariance - torch.outer(gain, seen @ covariance)
    return total


def run(args: argparse.Namespace) -> dict:
    """Train and judge: what ``oscillator.json`` holds."""
    initial = torch.tensor([1.0, 0.0])
    ys = generate(args.num_timesteps, initial)
    model, guide = Oscillator(), Guide()
    svi = SVI(model, guide, Adam({"lr": args.learning_rate}), loss=FIVO_ELBO(K=args.K))  # the line
    history = []
    with progress_bar(args.steps, "training") as bar:
        for _ in range(args.steps):
            history.append(-svi.step(ys, initial=initial) / len(ys))
            bar.update()
    filtered = ParticleFilter(model, guide, args.num_particles)(ys, initial=initial)
    noises = model.process.item(), model.measurement.item()
    return {
        "history": history,
        "noises": noises,
        "log_marginal": filtered.log_marginal.item(),
        "error": filtered.monte_carlo_error.item(),
        "kalman": kalman(ys, initial, *noises),
        "kalman_truth": kalman(ys, initial, PROCESS, MEASUREMENT),
        "measurements": ys.tolist(),
        "mean": filtered.mean("z")[:, 0].tolist(),
        "sd": filtered.variance("z")[:, 0].sqrt().tolist(),
        "ess": filtered.ess.tolist(),
    }


def table(results: dict) -> str:
    process, measurement = results["noises"]
    return (
        f"process noise {process:.2f} (truth {PROCESS}), measurement noise {measurement:.2f} "
        f"(truth {MEASUREMENT})\n"
        f"log p(y) by filters {results['log_marginal']:.3f} ± {results['error']:.3f}, "
        f"by Kalman {results['kalman']:.3f}; at the true noises {results['kalman_truth']:.3f}"
    )


def draw(results: dict) -> Figure:
    """The bound over the steps of training, the filtered state, the ESS."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    bound, state, ess = figure.subplots(1, 3)
    bound.plot(results["history"])
    bound.set(title="FIVO", xlabel="gradient step", ylabel="bound [nats per time step]")
    mean, sd = torch.tensor(results["mean"]), torch.tensor(results["sd"])
    state.plot(results["measurements"], "k.", markersize=4, label="measurements")
    state.plot(mean, label="filtering mean")
    state.fill_between(range(len(mean)), mean - 2 * sd, mean + 2 * sd, alpha=0.2)
    state.set(title="z[0] given the data so far", xlabel="step")
    state.legend(fontsize=8)
    ess.plot(results["ess"])
    ess.set(title="effective number of particles", xlabel="step", ylim=(0, None))
    return figure


def main(argv: list[str] | None = None) -> dict:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("-K", type=positive_int, default=16, help="particles of the loss")
    add("--steps", type=positive_int, default=300, help="gradient steps")
    add("--learning-rate", type=positive_float, default=0.02, help="of Adam")
    add("--num-timesteps", type=positive_int, default=50, help="length of the series")
    add("--num-particles", type=positive_int, default=1000, help="of each of the filters that judge")
    add("--seed", type=int, default=0, help="of everything random")
    add("--out", type=Path, default=Path("results/oscillator"), help="folder for the results")
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    return finish(parse(parser, argv, SMOKE), "oscillator", run, draw, table)


if __name__ == "__main__":
    main()
