"""Time per training step of a particle filter, with resampling and without, on a deep Markov model.

The same model, guide, K and batch, ``ess_threshold`` alone differs: 0 never resamples, which is the
importance-weighted bound; 0.5 does where the effective sample size asks for it; 1 does at every step. Ratios
are taken within a round, to the run without resampling. Try::

    python benchmarks/filter_step.py
    python benchmarks/filter_step.py --latent 32 --hidden 256 --schemes systematic multinomial
"""

from __future__ import annotations

import argparse
from typing import Any

import measuring
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_iw import FIVO_ELBO

KEYS = 88


class Networks(nn.Module):
    """Transition, emission and proposal of a deep Markov model."""

    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.latent = latent
        self.transition = _mlp(latent, hidden, 2 * latent)
        self.emission = _mlp(latent, hidden, KEYS)
        self.reading = nn.Linear(KEYS, hidden)
        self.memory = nn.Linear(latent, hidden)
        self.proposal = nn.Linear(hidden, 2 * latent)


class Model:
    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    def init(self, state: dict) -> None:
        pyro.module("networks", self.networks)
        state["z"] = next(self.networks.parameters()).new_zeros(self.networks.latent)

    def step(self, state: dict, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            state["z"] = pyro.sample("z", _normal(self.networks.transition(state["z"])))
            logits = self.networks.emission(state["z"])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class Guide(Model):
    def init(self, state: dict) -> None:
        pyro.module("networks", self.networks)

    def step(self, state: dict, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            hidden = self.networks.memory(state["z"]) + self.networks.reading(x)
            pyro.sample("z", _normal(self.networks.proposal(hidden.tanh())))


def _mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.ReLU(), nn.Linear(hidden, width_out))


def _normal(parameters: Tensor) -> dist.TorchDistribution:
    loc, scale = parameters.chunk(2, -1)
    return dist.Normal(loc, F.softplus(scale)).to_event(1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("-K", type=measuring.positive_int, default=64, help="particles")
    add("--batch", type=measuring.positive_int, default=100, help="sequences")
    add("--steps", type=measuring.positive_int, default=10, help="length of the sequences")
    add("--latent", type=measuring.positive_int, default=8, help="dimension of z_t")
    add("--hidden", type=measuring.positive_int, default=64, help="width of the networks")
    add("--thresholds", type=float, nargs="+", default=[0.5, 1.0], help="beside 0, the reference")
    add("--schemes", nargs="+", default=["systematic"], choices=("systematic", "multinomial"))
    add("--rounds", type=measuring.positive_int, default=9, help="blocks of steps that each contestant gets")
    add("--block-seconds", type=float, default=0.5, help="how long a block lasts, about")
    measuring.add_common_arguments(parser)
    args = measuring.parse(parser, argv)
    if args.smoke:
        args.K, args.batch, args.steps, args.rounds, args.block_seconds = 4, 3, 2, 2, 0.0
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a step of each, and ratios to the one without resampling."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    networks = Networks(args.latent, args.hidden).to(args.device)
    x = torch.bernoulli(torch.full((args.steps, args.batch, KEYS), 0.1)).to(args.device)
    pair = Model(networks), Guide(networks)
    losses = {"without resampling": FIVO_ELBO(args.K, 0.0)}
    for scheme in args.schemes:
        for threshold in args.thresholds:
            losses[f"ess_threshold={threshold:g}, {scheme}"] = FIVO_ELBO(args.K, threshold, scheme)

    def step(loss: FIVO_ELBO) -> None:
        loss.loss_and_grads(*pair, x)
        networks.zero_grad()

    steps = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
    blocks = measuring.run_blocks(steps, args.rounds, args.block_seconds, args.device, "steps")
    reference = blocks["without resampling"]
    return {
        name: {
            "milliseconds": measuring.Quartiles.of([1e3 * s for s in block.seconds]),
            "ratio": block.ratios(reference),
        }
        for name, block in blocks.items()
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    measuring.prepare(args)
    with pyro.validation_enabled(False):
        results = run(args)
    rows = [(name, str(found["milliseconds"]), str(found["ratio"])) for name, found in results.items()]
    print(f"K = {args.K}, batch {args.batch}, T = {args.steps}, on {args.device}")
    print(measuring.table(("", "ms a step", "ratio"), rows))
    measuring.save(args, "filter_step", results=results)
    return results


if __name__ == "__main__":
    main()
