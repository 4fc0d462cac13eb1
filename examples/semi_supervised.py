"""A VAE whose latents cluster by class, from a hundred labels: unknown classes are summed out.

Each class has a normal of its own in the latent space (as in VaDE, 1611.05148)::

    c ~ Categorical(1/10),  z | c ~ Normal(μ_c, σ_c),  x | z ~ Bernoulli(decoder(z))

Where a label is known c is observed. Elsewhere it is latent (``obs_mask``), marked for parallel enumeration
and left out of the guide: Σ_c p(c) p(z | c) p(x | z) is exact for each particle, and the guide proposes z.
Classes come from weighted particles, without a classifier: p(c | x) ≈ Σ_k w_k p(c | z_k). Try::

    python examples/semi_supervised.py                         # a minute or two
    python examples/semi_supervised.py --labels 30
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import config_enumerate
from torch import Tensor, nn

from pyro_iw import ImportanceSampler
from shared import datasets
from shared.datasets import ImageData, binarize
from shared.networks import Encoder, mlp
from shared.options import loss_of, positive_int
from shared.pictures import tile
from shared.skeleton import finish, fit, parse, training_parser

CLASSES = 10
EACH = 12
SMOKE = {"epochs": 1, "unlabelled": 60, "test_size": 20, "num_particles": 20}


class ClassVAE(nn.Module):
    """p(c), p(z | c), p(x | z), and the guide q(z | x).

    Arguments:
        pixels: The number of pixels D.
        latent: The dimension of z.
        hidden: The width of the hidden layers.
    """

    def __init__(self, pixels: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.encoder = Encoder(pixels, latent, hidden)
        self.decoder = mlp(latent, hidden, hidden, pixels)
        self.centres = nn.Parameter(torch.randn(CLASSES, latent))
        self.log_scales = nn.Parameter(torch.zeros(CLASSES, latent))

    def prior(self, c: Tensor) -> dist.TorchDistribution:
        """p(z | c), for classes of any shape."""
        return dist.Normal(self.centres[c], self.log_scales[c].exp()).to_event(1)

    @config_enumerate  # reaches the part of obs_mask that is not observed, where infer= does not
    def model(self, x: Tensor, labels: Tensor, known: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(CLASSES)), obs=labels, obs_mask=known)
            z = pyro.sample("z", self.prior(c))
            pixels = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x: Tensor, labels: Tensor, known: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def classes(self, z: Tensor) -> Tensor:
        """p(c | z), ``[*leading, CLASSES]`` for z ``[*leading, latent]``: the prior is uniform."""
        return self.prior(torch.arange(CLASSES)).log_prob(z.unsqueeze(-2)).softmax(-1)


@torch.no_grad()
def judge(vae: ClassVAE, x: Tensor, num_particles: int) -> tuple[Tensor, Tensor]:
    """p(c | x), ``[N, 10]``, and log p(x), ``[N]``, of images without labels."""
    unknown = torch.zeros(len(x), dtype=torch.long)
    samples = ImportanceSampler(vae.model, vae.guide, num_particles)(x, unknown, unknown.bool())
    probabilities = samples.expectation(lambda draws: vae.classes(draws["z"]), event_dim=1)
    return probabilities, samples.log_marginal


def split(data: ImageData, labels: int, unlabelled: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Images ``[N, D]``, labels ``[N]`` and whether they are known: all of them, and the labelled alone.

    Classes are labelled equally often. Labelled images come as often as unlabelled ones, or the few nats that
    a class is worth would be lost beside those of the pixels; each time with other bits.
    """
    images, classes = data.train.flatten(1), data.train_labels
    rank = torch.zeros_like(classes)  # of an image within its class
    for c in range(CLASSES):
        rank[classes == c] = torch.arange(int((classes == c).sum()))
    known = rank < labels // CLASSES
    few, rest = images[known], images[~known][:unlabelled]
    times = max(1, -(-len(rest) // len(few)))
    labelled = (
        binarize(few.repeat(times, 1)),
        classes[known].repeat(times),
        torch.ones(times * len(few)).bool(),
    )
    hidden = (binarize(rest), torch.zeros(len(rest), dtype=torch.long), torch.zeros(len(rest)).bool())
    return tuple(map(torch.cat, zip(labelled, hidden, strict=True))), labelled


def logistic_regression(x: Tensor, y: Tensor, test: Tensor) -> Tensor:
    """Classes of the test images, from the same labelled bits."""
    from sklearn.linear_model import LogisticRegression

    return torch.from_numpy(LogisticRegression(max_iter=1000).fit(x.numpy(), y.numpy()).predict(test.numpy()))


def run(args: argparse.Namespace) -> dict:
    """Train with and without the unlabelled images: what ``semi_supervised.json`` holds."""
    data = datasets.load("digits").subset(test_size=args.test_size, seed=args.seed)
    every, labelled = split(data, args.labels, args.unlabelled)
    test, truth = binarize(data.test.flatten(1)), data.test_labels

    def accuracy(classes: Tensor) -> float:
        return (classes == truth).float().mean().item()

    methods = {"logistic regression": {"accuracy": accuracy(logistic_regression(*labelled[:2], test))}}
    for name, rows in (("labels alone", labelled), ("with unlabelled", every)):
        pyro.clear_param_store()
        vae = ClassVAE(test.shape[1], args.latent, args.hidden)
        history = fit(vae.model, vae.guide, rows, loss_of(args), args, f"{args.loss}, {name}")
        for size in (1, args.num_particles):
            probabilities, log_p = judge(vae, test, size)
            found = {"accuracy": accuracy(probabilities.argmax(-1)), "log_p": log_p.mean().item()}
            methods[f"VAE, {name}, {size}"] = found
    confusion = torch.zeros(CLASSES, CLASSES).index_put_(
        (truth, probabilities.argmax(-1)), torch.ones(len(test)), accumulate=True
    )
    with torch.no_grad():
        z = vae.prior(torch.arange(CLASSES).repeat_interleave(EACH)).sample()
        samples = vae.decoder(z).sigmoid().reshape(-1, *data.image_shape)
    return {
        "methods": methods,
        "history": history,
        "confusion": confusion.tolist(),
        "samples": samples.tolist(),
    }


def table(results: dict) -> str:
    """A line for each way to classify."""
    lines = [f"{'':<32}{'accuracy':>10}{'log p̂(x)':>10}"]
    for name, found in results["methods"].items():
        log_p = f"{found['log_p']:10.2f}" if "log_p" in found else ""
        lines.append(f"{name:<32}{found['accuracy']:>10.1%}{log_p}")
    return "\n".join(lines)


def draw(results: dict) -> Figure:
    """Draws from each class, and which class the held-out images are taken for."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    samples = torch.tensor(results["samples"])
    left.imshow(tile(samples, EACH).numpy(), cmap="gray", vmin=0, vmax=1)
    rows = [(c + 0.5) * (samples.shape[1] + 1) for c in range(CLASSES)]
    left.set(title="Draws from each class", ylabel="class", xticks=[])
    left.set_yticks(rows, range(CLASSES))
    confusion = torch.tensor(results["confusion"])
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    right.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row, column in confusion.nonzero().tolist():
        count = int(confusion[row, column])
        colour = "white" if shares[row, column] > 0.5 else "black"
        right.text(column, row, count, ha="center", va="center", fontsize=7, color=colour)
    right.set(xlabel="most probable class", ylabel="class", title="Held-out images")
    right.set(xticks=range(CLASSES), yticks=range(CLASSES))
    return figure


def main(argv: list[str] | None = None) -> dict:
    defaults = {"M": 1, "K": 8, "estimator": "dreg", "epochs": 60, "batch_size": 100, "learning_rate": 3e-3}
    parser = training_parser(__doc__, "results/semi-supervised", **defaults)
    add = parser.add_argument
    add("--labels", type=positive_int, default=100, help="how many images keep theirs, at least 10")
    add("--unlabelled", type=positive_int, default=1400, help="how many more images to train on, at most")
    add("--latent", type=positive_int, default=20, help="dimension of z")
    add("--hidden", type=positive_int, default=128, help="width of the hidden layers")
    add("--test-size", type=positive_int, default=297, help="held-out images")
    add("--num-particles", type=positive_int, default=200, help="to classify with")
    args = parse(parser, argv, SMOKE)
    if args.labels < CLASSES:
        parser.error(f"argument --labels: one for each of the {CLASSES} classes, at least")
    return finish(args, "semi_supervised", run, draw, table)


if __name__ == "__main__":
    main()
