"""A deep Markov model of sequences of unequal lengths, with a guide that reads them backwards.

The data are piano rolls: a Markov chain of chords, each of which sounds with a few wrong and missing notes.
That is a hidden Markov model, so the best log-likelihood to be had is known. The deep Markov model (Krishnan
et al., 1609.09869) does not know of chords::

    z_t | z_{t-1} ~ Normal(transition(z_{t-1})),  x_t | z_t ~ Bernoulli(emission(z_t))

and its guide draws z_t from z_{t-1} and the state of a GRU that has run from the sequence's end back to t.
What is beyond the end is masked, in model and guide. A sequence has one weight, of all its steps, so longer
ones need more particles. Try::

    python examples/dmm.py                                     # two minutes
    python examples/dmm.py --loss elbo

All bounds are reported in nats per time step.
"""

from __future__ import annotations

import argparse
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from pyro_iw import ImportanceSampler
from pyro_iw.bounds import IWAE
from shared.networks import mlp
from shared.options import loss_of, positive_int
from shared.skeleton import finish, fit, parse, training_parser

KEYS, CHORDS, SHORTEST, LONGEST = 24, 6, 4, 16
STAY, SOUND, WRONG = 0.2, 0.9, 0.03
SMOKE = {"epochs": 1, "train_size": 30, "test_size": 6, "num_particles": 16}


class Music:
    """A hidden Markov model of chords: four notes each, and two others that may follow."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        notes = torch.stack([torch.randperm(KEYS, generator=generator)[:4] for _ in range(CHORDS)])
        self.emission = torch.full((CHORDS, KEYS), WRONG).scatter(1, notes, SOUND)
        steps = (1 - STAY) / 2 * (torch.eye(CHORDS).roll(1, 1) + torch.eye(CHORDS).roll(2, 1))
        self.transition = STAY * torch.eye(CHORDS) + steps

    def play(self, size: int) -> tuple[Tensor, Tensor]:
        """Rolls ``[size, LONGEST, KEYS]``, zero from their lengths ``[size]`` on."""
        lengths = torch.randint(SHORTEST, LONGEST + 1, (size,))
        chord, rolls = torch.randint(CHORDS, (size,)), []
        for _ in range(LONGEST):
            rolls.append(torch.bernoulli(self.emission[chord]))
            chord = torch.multinomial(self.transition[chord], 1).squeeze(1)
        inside = torch.arange(LONGEST) < lengths[:, None]
        return torch.stack(rolls, 1) * inside.unsqueeze(-1), lengths

    def log_prob(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The forward algorithm, ``[N]``."""
        heard = dist.Bernoulli(self.emission).log_prob(x.unsqueeze(-2)).sum(-1)  # [N, T, CHORDS]
        log_alpha = heard[:, 0] - math.log(CHORDS)
        for t in range(1, x.shape[1]):
            onward = (log_alpha.unsqueeze(-1) + self.transition.log()).logsumexp(1) + heard[:, t]
            log_alpha = torch.where((t < lengths).unsqueeze(-1), onward, log_alpha)
        return log_alpha.logsumexp(-1)


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence of ``[N, T, D]`` from its own end to its start; the padding stays where it is."""
    time = torch.arange(x.shape[1])
    order = torch.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


class DMM(nn.Module):
    """The model and its guide, with z_t of dimension ``latent`` and networks of width ``hidden``."""

    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(latent))
        self.transition = mlp(latent, hidden, 2 * latent)
        self.emission = mlp(latent, hidden, KEYS)
        self.reader = nn.GRU(KEYS, hidden, batch_first=True)
        self.combiner = nn.Linear(latent, hidden)
        self.proposal = nn.Linear(hidden, 2 * latent)

    def model(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        with pyro.plate("data", len(x)):
            z = self.start.expand(len(x), -1)
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", self.next(z))
                    notes = dist.Bernoulli(logits=self.emission(z), validate_args=False)
                    pyro.sample(f"x_{t}", notes.to_event(1), obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        # Data alone: the GRU runs once for all particles.
        ahead = reverse(self.reader(reverse(x, lengths))[0], lengths)
        with pyro.plate("data", len(x)):
            z = self.start.expand(len(x), -1)
            for t in pyro.markov(range(int(lengths.max()))):
                # A sum, and not torch.cat: z has the particles' dim, which the GRU's state lacks.
                loc, scale = self.proposal(torch.tanh(self.combiner(z) + ahead[:, t])).chunk(2, -1)
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, F.softplus(scale)).to_event(1))

    def next(self, z: Tensor) -> dist.TorchDistribution:
        """p(z_t | z_{t-1})."""
        loc, scale = self.transition(z).chunk(2, -1)
        return dist.Normal(loc, F.softplus(scale)).to_event(1)

    @torch.no_grad()
    def play(self, steps: int) -> Tensor:
        """A roll ``[steps, KEYS]`` of probabilities, drawn from the model."""
        z, rolls = self.start, []
        for _ in range(steps):
            z = self.next(z).sample()
            rolls.append(self.emission(z).sigmoid())
        return torch.stack(rolls)


def run(args: argparse.Namespace) -> dict:
    """Train and judge: what ``dmm.json`` holds."""
    music = Music()
    train, (x, lengths) = music.play(args.train_size), music.play(args.test_size)
    steps = int(lengths.sum())
    dmm = DMM(args.latent, args.hidden)
    history = fit(dmm.model, dmm.guide, train, loss_of(args), args, args.loss)
    frequencies = (train[0].sum((0, 1)) / train[1].sum()).clamp(0.001, 0.999)
    inside = (torch.arange(LONGEST) < lengths[:, None]).unsqueeze(-1)
    alone = (dist.Bernoulli(frequencies).log_prob(x) * inside).sum().item() / steps
    samples = ImportanceSampler(dmm.model, dmm.guide, args.num_particles)(x, lengths)
    groups = (2**i for i in range(args.num_particles.bit_length()))
    return {
        "history": history,
        "frequencies": alone,
        "truth": music.log_prob(x, lengths).sum().item() / steps,
        "bounds": {K: samples.bound(IWAE(K)).sum().item() / steps for K in groups},
        "lengths": lengths.tolist(),
        "ess": samples.ess.tolist(),
        "heard": x[lengths.argmax()].tolist(),
        "played": dmm.play(LONGEST).tolist(),
    }


def table(results: dict) -> str:
    """Nats per time step."""
    bounds = results["bounds"]
    lines = [
        ("notes by their frequency", results["frequencies"]),
        *((f"deep Markov model, K = {K}", bounds[K]) for K in (1, max(bounds))),
        ("the truth", results["truth"]),
    ]
    return "\n".join(f"{name:<30}{value:8.3f} nats per time step" for name, value in lines)


def draw(results: dict) -> Figure:
    """A held-out roll and one by the model, the bounds over K and the ESS over the lengths."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    (heard, bound), (played, ess) = figure.subplots(2, 2)
    for axes, name, title in (
        (heard, "heard", "a held-out sequence"),
        (played, "played", "drawn from the model"),
    ):
        roll = torch.tensor(results[name]).T.numpy()
        axes.imshow(roll, aspect="auto", origin="lower", cmap="Greys", vmin=0, vmax=1)
        axes.set(title=title, xlabel="time step", ylabel="key")
    bounds = results["bounds"]
    bound.plot(list(bounds), list(bounds.values()), "o-", markersize=4, label="deep Markov model")
    bound.axhline(results["truth"], color="black", linestyle="--", label="the truth")
    bound.axhline(results["frequencies"], color="C1", linestyle="--", label="notes by their frequency")
    bound.set_xscale("log", base=2)
    bound.set(xlabel="K", ylabel="bound [nats per time step]")
    bound.legend(fontsize=8, loc=(0.5, 0.2))
    ess.scatter(results["lengths"], results["ess"], s=10)
    ess.set(xlabel="length of the sequence", ylabel=f"ESS of {max(bounds)}", yscale="log")
    bound.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> dict:
    defaults = {"M": 1, "K": 8, "estimator": "dreg", "epochs": 120, "batch_size": 50, "learning_rate": 5e-3}
    parser = training_parser(__doc__, "results/dmm", **defaults)
    add = parser.add_argument
    add("--latent", type=positive_int, default=8, help="dimension of z_t")
    add("--hidden", type=positive_int, default=64, help="width of the networks")
    add("--train-size", type=positive_int, default=400, help="sequences to train on")
    add("--test-size", type=positive_int, default=100, help="held-out sequences")
    add("--num-particles", type=positive_int, default=1024, help="a held-out sequence")
    return finish(parse(parser, argv, SMOKE), "dmm", run, draw, table)


if __name__ == "__main__":
    main()
