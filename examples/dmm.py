"""A deep Markov model of sequences of unequal lengths, with a guide that reads them backwards.

The data are piano rolls: a Markov chain of chords, each of which sounds with a few wrong and missing notes.
That is a hidden Markov model, so the best log-likelihood to be had is known. The deep Markov model (Krishnan
et al., 1609.09869) does not know of chords::

    z_t | z_{t-1} ~ Normal(transition(z_{t-1})),  x_t | z_t ~ Bernoulli(emission(z_t))

and its guide draws z_t from z_{t-1} and the state of a GRU that has run from the sequence's end back to t.
What is beyond the end is masked, in model and guide. A sequence has one weight, of all its steps, so longer
ones need more particles. With ``--compare``, sequences are longer, and the same networks are trained three
times, with K particles each: by the ELBO, by IWAE, and by FIVO, for which model and guide take the steps of a
particle filter. A filter of many particles judges them all. Try::

    python examples/dmm.py                                     # two minutes
    python examples/dmm.py --loss elbo
    python examples/dmm.py --compare                           # ten minutes

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

from pyro_iw import FIVO_ELBO, IWAE_ELBO, MIWAE_ELBO, ImportanceSampler, ParticleFilter
from pyro_iw.bounds import IWAE
from shared.networks import mlp
from shared.options import loss_of, positive_int
from shared.running import progress_bar
from shared.skeleton import finish, fit, parse, training_parser

KEYS, CHORDS, SHORTEST, LONGEST = 24, 6, 4, 16
STAY, SOUND, WRONG = 0.2, 0.9, 0.03
SMOKE = {"epochs": 1, "train_size": 30, "test_size": 6, "num_particles": 16, "longest": 8}


class Music:
    """A hidden Markov model of chords: four notes each, and two others that may follow."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        notes = torch.stack([torch.randperm(KEYS, generator=generator)[:4] for _ in range(CHORDS)])
        self.emission = torch.full((CHORDS, KEYS), WRONG).scatter(1, notes, SOUND)
        steps = (1 - STAY) / 2 * (torch.eye(CHORDS).roll(1, 1) + torch.eye(CHORDS).roll(2, 1))
        self.transition = STAY * torch.eye(CHORDS) + steps

    def play(self, size: int, longest: int = LONGEST) -> tuple[Tensor, Tensor]:
        """Rolls ``[size, longest, KEYS]``, zero from their lengths ``[size]`` on."""
        lengths = torch.randint(SHORTEST, longest + 1, (size,))
        chord, rolls = torch.randint(CHORDS, (size,)), []
        for _ in range(longest):
            rolls.append(torch.bernoulli(self.emission[chord]))
            chord = torch.multinomial(self.transition[chord], 1).squeeze(1)
        inside = torch.arange(longest) < lengths[:, None]
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


class Model:
    """The model in steps, for a particle filter."""

    def __init__(self, net: DMM) -> None:
        self.net = net

    def init(self, state: dict, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self.net)
        state["z"], state["t"], state["lengths"] = self.net.start, 0, lengths

    def step(self, state: dict, notes: Tensor) -> None:
        with pyro.plate("data", len(notes)), poutine.mask(mask=state["t"] < state["lengths"]):
            state["z"] = pyro.sample("z", self.net.next(state["z"]))
            heard = dist.Bernoulli(logits=self.net.emission(state["z"]), validate_args=False)
            pyro.sample("x", heard.to_event(1), obs=notes)
        state["t"] += 1


class Guide:
    """The guide in steps. What it has read of the data is no particle's, and stays in ``self``."""

    def __init__(self, net: DMM) -> None:
        self.net = net

    def init(self, state: dict, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self.net)
        self.ahead = reverse(self.net.reader(reverse(x, lengths))[0], lengths)

    def step(self, state: dict, notes: Tensor) -> None:
        hidden = torch.tanh(self.net.combiner(state["z"]) + self.ahead[:, state["t"]])
        loc, scale = self.net.proposal(hidden).chunk(2, -1)
        with pyro.plate("data", len(notes)), poutine.mask(mask=state["t"] < state["lengths"]):
            pyro.sample("z", dist.Normal(loc, F.softplus(scale)).to_event(1))


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


# ----------------------------------------------------------------------------------------------------
# ELBO, IWAE and FIVO
# ----------------------------------------------------------------------------------------------------


def in_steps(x: Tensor, lengths: Tensor) -> tuple[tuple[Tensor], dict[str, Tensor]]:
    """What the filters take: sequences with time first, and what ``init`` reads."""
    return (x.transpose(0, 1),), {"x": x, "lengths": lengths}


def train(net: DMM, name: str, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> list[float]:
    """The bound in nats per time step, averaged over each epoch."""
    losses = {"ELBO": MIWAE_ELBO(M=args.K, K=1), "IWAE": IWAE_ELBO(args.K), "FIVO": FIVO_ELBO(args.K)}
    pair = (Model(net), Guide(net)) if name == "FIVO" else (net.model, net.guide)
    size = len(data[0])
    steps = args.epochs * math.ceil(size / args.batch_size)
    optimiser = torch.optim.Adam(net.parameters(), args.learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.1 ** (1 / steps))
    history = []
    with progress_bar(steps, name) as bar:
        for _ in range(args.epochs):
            total = 0.0
            for rows in torch.randperm(size).split(args.batch_size):
                batch = data[0][rows], data[1][rows]
                sequences, given = in_steps(*batch) if name == "FIVO" else (batch, {})
                optimiser.zero_grad()
                loss = losses[name].differentiable_loss(*pair, *sequences, **given)
                (loss / batch[1].sum()).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 5.0)
                optimiser.step()
                schedule.step()
                total -= loss.item()
                bar.update()
            history.append(total / data[1].sum().item())
    return history


def compare(args: argparse.Namespace) -> dict:
    """Train by each loss and judge all alike: what ``dmm_losses.json`` holds."""
    music = Music()
    data, (x, lengths) = music.play(args.train_size, args.longest), music.play(args.test_size, args.longest)
    steps = lengths.sum().item()
    sequences, given = in_steps(x, lengths)
    start = DMM(args.latent, args.hidden).state_dict()
    results: dict = {"truth": music.log_prob(x, lengths).sum().item() / steps, "losses": {}}
    for name in ("ELBO", "IWAE", "FIVO"):
        net = DMM(args.latent, args.hidden)
        net.load_state_dict(start)
        history = train(net, name, data, args)
        pair = Model(net), Guide(net)
        judge = ParticleFilter(*pair, args.num_particles, num_filters=4)
        filtered = judge(*sequences, **given)
        few = {
            bound: ParticleFilter(*pair, max(args.K, 2), num_filters=1, ess_threshold=threshold)
            for bound, threshold in (("IWAE", 0.0), ("FIVO", 0.5))
        }
        gaps = {
            bound: (filtered.log_marginal - judge.log_marginal(*sequences, **given)).tolist()
            for bound, judge in few.items()
        }
        results["losses"][name] = {
            "history": history,
            "log_marginal": filtered.log_marginal.sum().item() / steps,
            "error": filtered.monte_carlo_error.square().sum().sqrt().item() / steps,
            "ess": filtered.ess.nanmean(1).tolist(),
            "gaps": gaps,
        }
    return {**results, "lengths": lengths.tolist()}


def table_of_losses(results: dict) -> str:
    """Nats per time step."""
    lines = [f"{'trained by':<12}{'its bound':>12}{'log p̂':>12}{'IWAE gap':>12}{'FIVO gap':>12}"]
    steps = sum(results["lengths"])
    for name, row in results["losses"].items():
        gaps = "".join(f"{sum(row['gaps'][bound]) / steps:>12.4f}" for bound in ("IWAE", "FIVO"))
        lines.append(f"{name:<12}{row['history'][-1]:>12.3f}{row['log_marginal']:>12.3f}{gaps}")
    lines.append(f"{'the truth':<24}{results['truth']:>12.3f}")
    return "\n".join([*lines, "nats per time step"])


def draw_losses(results: dict) -> Figure:
    """The bounds in training, the ESS over time, and the gap of two bounds of one pair over the length."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    bound, ess, gap = figure.subplots(1, 3)
    for name, row in results["losses"].items():
        bound.plot(row["history"], label=name)
        ess.plot(row["ess"], label=f"trained by {name}")
    bound.set(xlabel="epoch", ylabel="bound [nats per time step]")
    bound.axhline(results["truth"], color="black", linestyle="--", label="the truth")
    ess.set(xlabel="time step", ylabel="ESS of the filter that judges", ylim=(0, None))
    for name, gaps in results["losses"]["FIVO"]["gaps"].items():
        gap.scatter(results["lengths"], gaps, s=8, label=name, color={"IWAE": "C1", "FIVO": "C2"}[name])
    gap.set(xlabel="length of the sequence", ylabel="log p̂ − bound [nats]", title="trained by FIVO")
    for axes in (bound, ess, gap):
        axes.legend(fontsize=8)
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
    add("--compare", action="store_true", help="ELBO, IWAE and FIVO with K particles, on longer sequences")
    add("--longest", type=positive_int, default=50, help="time steps of the longest sequence to compare on")
    args = parse(parser, argv, SMOKE)
    if args.compare:
        return finish(args, "dmm_losses", compare, draw_losses, table_of_losses)
    return finish(args, "dmm", run, draw, table)


if __name__ == "__main__":
    main()
