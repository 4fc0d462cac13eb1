r"""Item responses: items are global latents, students local ones, and a minibatch is some of the students.

A questionnaire whose answers to item i depend on D abilities of student n (multidimensional two-parameter
model; a matrix factorisation with a logit)::

    θ_n ~ Normal(0, I),   a_id ~ Normal(0, 1),   b_i ~ Normal(0, 2),   y_ni ~ Bernoulli(σ(a_i · θ_n + b_i))

Each student answers some of the items, and a fifth of the answers is held out. The guide has a normal for
each number of the items, and a network that reads a student's answers, which takes abilities for independent.
With 20 000 students and 160 000 answers to train on, NUTS would need dozens of gradients of everything for
each of its draws. Minibatches of students are within reach of the ELBO, and of two levels: an outer mean over
draws of the items, and in it an IWAE bound for each student. Try::

    python examples/item_response.py                         # four minutes on one core
    python examples/item_response.py --local-particles 64

The data are generated, so that there is a best: the density with the items known, and abilities weighted.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_iw import MIWAE_ELBO, ImportanceWeightedELBO, LocallyEnhancedELBO
from pyro_iw.bounds import IWAE, MIWAE
from shared.networks import mlp
from shared.options import new_parser, positive_float, positive_int
from shared.running import progress_bar, step
from shared.skeleton import finish, parse

METHODS = {"elbo": "ELBO", "levels": "two levels"}
HELD_OUT = 0.2
SMOKE = {"students": 60, "items": 8, "answers": 6, "epochs": 2, "batch_size": 30}
SMOKE |= {"local_particles": 3, "num_particles": 20, "item_draws": 2}
CHECKS = 12  # of the held-out density along the training
FEW = 2000  # students for those
ROWS = 500  # students at once, there and in the end


class Answers(NamedTuple):
    """Answers of 0 and 1, ``[N, I]``; which of them are there to train on; and which are held out."""

    y: Tensor
    seen: Tensor
    held_out: Tensor

    def of(self, students: Tensor | slice) -> Answers:
        return Answers(*(table[students] for table in self))


def generated(
    students: int, items: int, answers: int, abilities: int, seed: int
) -> tuple[Answers, Tensor, Tensor]:
    """Answers, and the slopes ``[I, D]`` and offsets ``[I]`` of the items that they are from."""
    noise = torch.Generator().manual_seed(seed)
    theta = torch.randn(students, abilities, generator=noise)
    slope = torch.randn(items, abilities, generator=noise)
    offset = torch.randn(items, generator=noise)
    y = torch.bernoulli((theta @ slope.T + offset).sigmoid(), generator=noise)
    rank = torch.rand(students, items, generator=noise).argsort(1).argsort(1)
    asked = rank < answers
    held_out = asked & (torch.rand(students, items, generator=noise) < HELD_OUT)
    return Answers(y, asked & ~held_out, held_out), slope, offset


class ItemResponse(nn.Module):
    """The pair; ``N`` students in all."""

    def __init__(self, N: int, items: int, abilities: int, hidden: int) -> None:
        super().__init__()
        self.N, self.items, self.abilities = N, items, abilities
        self.network = mlp(2 * items, hidden, hidden, 2 * abilities)
        self.guide_of_items = AutoNormal(
            poutine.block(self.model, expose=["slope", "offset"]), init_scale=0.1
        )

    def model(self, batch: Answers) -> None:
        shape = (self.items, self.abilities)
        slope = pyro.sample("slope", dist.Normal(torch.zeros(shape), 1.0).to_event(2))
        offset = pyro.sample("offset", dist.Normal(torch.zeros(self.items), 2.0).to_event(1))
        with pyro.plate("students", self.N, len(batch.y)):
            theta = pyro.sample("theta", standard_normal(self.abilities))
            answers = dist.Bernoulli(logits=logits(theta, slope, offset))
            pyro.sample("y", answers.mask(batch.seen).to_event(1), obs=batch.y)

    def of_students(self, batch: Answers) -> dist.TorchDistribution:
        """The guide of the abilities, of batch shape ``[B]``."""
        seen = batch.seen.float()
        read = torch.cat([(2 * batch.y - 1) * seen, seen], -1)
        loc, log_scale = self.network(read).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def guide(self, batch: Answers) -> None:
        pyro.module("network", self.network)
        self.guide_of_items(batch)
        with pyro.plate("students", self.N, len(batch.y)):
            pyro.sample("theta", self.of_students(batch))


@torch.no_grad()
def held_out_density(pair: ItemResponse, data: Answers, draws: int, particles: int) -> dict[str, float]:
    """Log density of a held-out answer, in nats: by abilities of the ``guide``, and ``weighted``.

    For each draw of the items, abilities from the guide are weighted by the answers that were seen; the
    density is the mean over both.
    """
    found: dict[str, list[Tensor]] = {"guide": [], "weighted": []}
    for batch in (data.of(rows) for rows in torch.arange(len(data.y)).split(ROWS)):
        q = pair.of_students(batch)
        parts = []
        for _ in range(draws):
            items = pair.guide_of_items(batch)
            parts.append(densities(batch, items["slope"], items["offset"], q, particles))
        for name, part in zip(found, zip(*parts, strict=True), strict=True):
            found[name].append((torch.stack(part).logsumexp(0) - math.log(draws))[batch.held_out])
    return {name: torch.cat(values).mean().item() for name, values in found.items()}


@torch.no_grad()
def density_of_known_items(data: Answers, slope: Tensor, offset: Tensor, particles: int) -> float:
    """The weighted density with the items that made the data, and abilities drawn from their prior."""
    found = []
    for batch in (data.of(rows) for rows in torch.arange(len(data.y)).split(ROWS)):
        prior = standard_normal(slope.shape[1]).expand((len(batch.y),))
        found.append(densities(batch, slope, offset, prior, particles)[1][batch.held_out])
    return torch.cat(found).mean().item()


def densities(
    batch: Answers, slope: Tensor, offset: Tensor, q: dist.TorchDistribution, particles: int
) -> tuple[Tensor, Tensor]:
    """Log densities of all answers ``[B, I]`` by abilities drawn from q: all alike, and weighted."""
    theta = q.sample((particles,))
    log_prob = dist.Bernoulli(logits=logits(theta, slope, offset)).log_prob(batch.y)  # [particles, B, I]
    log_w = (log_prob * batch.seen).sum(-1) + standard_normal(theta.shape[-1]).log_prob(theta)
    log_w = (log_w - q.log_prob(theta)).log_softmax(0)
    return log_prob.logsumexp(0) - math.log(particles), (log_prob + log_w.unsqueeze(-1)).logsumexp(0)


def standard_normal(size: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def logits(theta: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """``[..., I]`` of abilities ``[..., D]``, slopes ``[..., I, D]`` and offsets ``[..., I]``."""
    return (theta.unsqueeze(-2) @ slope.mT).squeeze(-2) + offset


def make_losses(S: int, L: int) -> dict[str, ImportanceWeightedELBO]:
    """A loss for each of :data:`METHODS`, all of S L particles."""
    local = {"local": IWAE(L), "over": "students", "outer": MIWAE(S, 1)}
    return {
        "elbo": MIWAE_ELBO(M=S * L, K=1),
        "levels": LocallyEnhancedELBO(**local, estimator="dreg"),
    }


def fit(
    pair: ItemResponse, data: Answers, loss: ImportanceWeightedELBO, args: argparse.Namespace, label: str
) -> dict:
    """Train on minibatches: seconds of the processor, and after these the bound and a held-out density."""
    steps = args.epochs * math.ceil(len(data.y) / args.batch_size)
    optimiser = pyro.optim.ClippedAdam({"lr": args.learning_rate, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(pair.model, pair.guide, optimiser, loss=loss)
    looks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    found: dict = {"at": [], "density": [], "bound": []}
    seconds, bounds = 0.0, []
    few, draws, particles = data.of(slice(FEW)), min(2, args.item_draws), min(100, args.num_particles)
    with progress_bar(steps, label) as bar:
        rows: list[Tensor] = []
        for number in range(steps):
            rows = rows or list(torch.randperm(len(data.y)).split(args.batch_size))
            start = time.process_time()  # a machine with other work to do has other clocks
            bounds.append(-step(svi, (data.of(rows.pop()),), args.learning_rate, number))
            seconds += time.process_time() - start
            bar.update()
            if number + 1 in looks:
                density = held_out_density(pair, few, draws, particles)["weighted"]
                found["at"].append(seconds)
                found["density"].append(density)
                found["bound"].append(sum(bounds) / len(bounds) / len(data.y))
                bounds = []
                bar.set_postfix_str(f"held out {density:.4f}", refresh=False)
    return {**found, "seconds": seconds}


def gradient_seconds(pair: ItemResponse, data: Answers) -> float:
    """Seconds of one gradient of the log joint of all the data, of which NUTS takes many for a draw."""
    theta = torch.zeros(len(data.y), pair.abilities, requires_grad=True)
    slope = torch.randn(pair.items, pair.abilities, requires_grad=True)
    offset = torch.zeros(pair.items, requires_grad=True)
    start = time.process_time()
    for _ in range(3):
        answers = dist.Bernoulli(logits=theta @ slope.T + offset).log_prob(data.y)
        log_joint = (answers * data.seen).sum() - sum(x.square().sum() / 2 for x in (theta, slope, offset))
        torch.autograd.grad(log_joint, (theta, slope, offset))
    return (time.process_time() - start) / 3


def run(args: argparse.Namespace) -> dict:
    """Train by both losses: what ``item_response.json`` holds."""
    data, slope, offset = generated(args.students, args.items, args.answers, args.abilities, args.seed)
    methods = {}
    for method, loss in make_losses(args.global_particles, args.local_particles).items():
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        pair = ItemResponse(args.students, args.items, args.abilities, args.hidden)
        found = fit(pair, data, loss, args, METHODS[method])
        methods[method] = found | held_out_density(pair, data, args.item_draws, args.num_particles)
    return {
        "answers": int(data.seen.sum()),
        "held_out": int(data.held_out.sum()),
        "known": density_of_known_items(data, slope, offset, 4 * args.num_particles),
        "latents": args.students * args.abilities + args.items * (1 + args.abilities),
        "gradient_seconds": gradient_seconds(pair, data),
        "methods": methods,
    }


def table(results: dict) -> str:
    """A line a method."""
    settings, per_gradient = results["settings"], results["gradient_seconds"]
    lines = [
        f"{settings['students']} students: {results['answers']} answers to train on, "
        f"{results['held_out']} held out",
        f"{'':<14}{'bound a student':>16}{'held out, guide':>18}{'held out, weighted':>20}{'CPU s':>8}",
    ]
    for method, label in METHODS.items():
        own = results["methods"][method]
        lines.append(
            f"{label:<14}{own['bound'][-1]:>16.3f}{own['guide']:>18.4f}{own['weighted']:>20.4f}"
            f"{own['seconds']:>8.0f}"
        )
    lines.append(f"{'known items':<48}{results['known']:>20.4f}")
    # A short tree and a short chain, to be generous.
    hours = per_gradient * 63 * 2000 / 3600
    lines.append(
        f"One gradient of all {results['latents']} latents takes {1000 * per_gradient:.0f} ms: 2000 draws of "
        f"NUTS, 63 of them each, {hours:.1f} h"
    )
    return "\n".join(lines)


def draw(results: dict) -> Figure:
    """Held-out density over seconds of training."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for method, colour in (("elbo", "C0"), ("levels", "C2")):
        own = results["methods"][method]
        axes.plot(own["at"], own["density"], marker="o", markersize=3, color=colour, label=METHODS[method])
    axes.axhline(results["known"], color="0.6", linestyle="--", linewidth=1, label="known items")
    axes.set(xlabel="seconds of training, of the processor", ylabel="log density of a held-out answer [nats]")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--students", type=positive_int, default=20_000, help="in all")
    add("--items", type=positive_int, default=50, help="of the questionnaire")
    add("--answers", type=positive_int, default=10, help="of each student; a fifth is held out")
    add("--abilities", type=positive_int, default=3, help="of each student")
    add("--hidden", type=positive_int, default=64, help="width of the guide's network")
    add("--epochs", type=positive_int, default=10, help="passes over the students")
    add("--batch-size", type=positive_int, default=200, help="students a gradient step")
    add("--learning-rate", type=positive_float, default=0.01, help="at first; it falls to a hundredth")
    add("--global-particles", type=positive_int, default=2, help="of the items")
    add("--local-particles", type=positive_int, default=16, help="of a student, for each of those")
    add("--num-particles", type=positive_int, default=200, help="of a student, for the held-out density")
    add("--item-draws", type=positive_int, default=4, help="of the items, for the held-out density")
    add("--seed", type=int, default=0, help="of everything random")
    add(
        "--out",
        type=Path,
        default=Path("results/item-response"),
        help="folder; of a smoke run, in results/smoke",
    )
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    return parser


def main(argv: list[str] | None = None) -> dict:
    return finish(parse(make_parser(), argv, SMOKE), "item_response", run, draw, table)


if __name__ == "__main__":
    main()
