"""The one-layer VAE of Burda et al. (1509.00519), trained with any bound and estimator.

Decoder 50–200–200–pixels with tanh units, guide mirrored, trained by Pyro's own ``SVI``: the loss
is the only line that knows about importance weighting. Try::

    python examples/vae.py                                     # MIWAE(8, 8) on 8×8 digits
    python examples/vae.py --loss piwae -M 4 -K 16
    python examples/vae.py --loss iwae --estimator dreg
    python examples/vae.py --latent 2                          # with a picture of the latent manifold
    python examples/vae.py --data mnist --data-dir data --epochs 50

All bounds are reported in nats per datapoint.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import checkpoint
import datasets
import pictures
import pyro
import pyro.distributions as dist
import torch
from datasets import ImageData, binarize
from options import (
    add_loss_options,
    as_settings,
    at_smoke_size,
    loss_of,
    new_parser,
    positive_float,
    positive_int,
    torch_device,
)
from pyro.infer import ELBO, SVI
from running import in_one_line, results_folder, step
from torch import Tensor, nn
from tqdm import tqdm

from pyro_iw import ImportanceSampler, active_units
from pyro_iw.bounds import IWAE, Bound
from pyro_iw.posterior.sampler import LogMarginal

# Rows (particles × images) that one evaluation pass holds in memory.
EVALUATION_ROWS = 10_000
EVALUATION_BATCH = 100
SMOKE = {
    "train_size": 100,
    "test_size": 40,
    "epochs": 1,
    "batch_size": 25,
    "nll_particles": 50,
}


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        linear = nn.Linear(width_in, width_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """q(z | x): the mean and the standard deviation of a diagonal normal."""

    def __init__(self, pixels: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(mlp(pixels, hidden, hidden), nn.Tanh())
        self.loc = mlp(hidden, latent)
        self.log_scale = mlp(hidden, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.loc(h), self.log_scale(h).exp()


class VAE(nn.Module):
    """p(z) = N(0, I), p(x | z) = Bernoulli(decoder(z)), and the guide q(z | x).

    Arguments:
        pixels: The number of pixels D of an image; ``x`` has shape ``[B, D]``.
        latent: The dimension of z.
        hidden: The width of both hidden layers.
        mean_image: The training mean, shape ``[D]``; its logit becomes the decoder's output bias.
    """

    def __init__(
        self, pixels: int, latent: int = 50, hidden: int = 200, mean_image: Tensor | None = None
    ) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = Encoder(pixels, latent, hidden)
        self.decoder = mlp(latent, hidden, hidden, pixels)
        if mean_image is not None:
            with torch.no_grad():
                self.decoder[-1].bias.copy_(mean_image.clamp(0.001, 0.999).logit())

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(self.latent)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            # Under particles z is [S, B, latent]; x [B, D] broadcasts against the logits.
            pixels = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def progress_bar(total: int, description: str) -> tqdm:
    """A progress bar, on a terminal alone: a log file would get a line for each look of it."""
    return tqdm(total=total, desc=description, leave=False, disable=None)


def train(
    vae: VAE,
    images: Tensor,
    heldout: Tensor,
    loss: ELBO,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    binary: bool = False,
    heldout_losses: Mapping[str, ELBO] | None = None,
    description: str = "training",
) -> list[dict[str, float]]:
    """Train with ``SVI`` and record the bounds after every epoch.

    Arguments:
        vae: The model and its guide.
        images: Training probabilities, shape ``[N, D]``.
        heldout: Binarised held-out images, shape ``[N', D]``.
        loss: What to minimise.
        epochs: Passes over the training images.
        batch_size: Images a gradient step.
        learning_rate: Adam's.
        seed: Of the order of the images, their binarisation and the held-out draws.
        binary: Whether the images are binarised already.
        heldout_losses: Losses to evaluate on the held-out images after every epoch, by name;
            ``{"heldout_bound": loss}`` by default.
        description: The progress bar's label.

    Returns:
        A dict an epoch: ``epoch``, ``train_bound`` (the mean over the epoch), the held-out bounds
        and ``seconds``, the training time alone.
    """
    optimiser = pyro.optim.Adam({"lr": learning_rate, "eps": 1e-4})
    svi = SVI(vae.model, vae.guide, optimiser, loss=loss)
    heldout_losses = {"heldout_bound": loss} if heldout_losses is None else heldout_losses
    generator = torch.Generator(images.device).manual_seed(seed)
    history: list[dict[str, float]] = []
    done = 0
    with progress_bar(epochs * math.ceil(len(images) / batch_size), description) as bar:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            total = 0.0
            order = torch.randperm(len(images), generator=generator, device=images.device)
            for rows in order.split(batch_size):
                batch = images[rows] if binary else binarize(images[rows], generator)
                step_loss = step(svi, (batch,), learning_rate, done)
                done += 1
                total -= step_loss
                postfix = f"epoch {epoch}/{epochs}, train bound {-step_loss / len(rows):.2f}"
                bar.set_postfix_str(postfix, refresh=False)
                bar.update()
            record = {
                "epoch": epoch,
                "train_bound": total / len(images),
                "seconds": time.perf_counter() - start,
            }
            for name, heldout_loss in heldout_losses.items():
                record[name] = mean_bound(vae, heldout, heldout_loss, seed=seed)
            history.append(record)
    return history


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A scope with its own random state, so that to evaluate does not change the training."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def mean_bound(vae: VAE, images: Tensor, loss: ELBO, *, seed: int) -> float:
    """The bound of ``loss`` on binarised images, in nats per datapoint."""
    with seeded(seed, images.device), torch.no_grad():
        batches = images.split(EVALUATION_BATCH)
        return -sum(loss.loss(vae.model, vae.guide, batch) for batch in batches) / len(images)


def log_marginal(
    vae: VAE,
    images: Tensor,
    num_particles: int,
    *,
    seed: int,
    max_rows: int = EVALUATION_ROWS,
) -> Tensor:
    """log p̂(x) = L_K with K = ``num_particles``, in O(max_rows) memory.

    Arguments:
        vae: The model and its guide.
        images: Binarised images, shape ``[N, D]``.
        num_particles: K, the draws from the guide for every image.
        seed: Of the draws.
        max_rows: How many rows (particles × images) one pass may hold.

    Returns:
        One estimate an image, shape ``[N]``.
    """
    return evidence(vae, images, num_particles, seed=seed, max_rows=max_rows).values


def evidence(
    vae: VAE,
    images: Tensor,
    num_particles: int,
    *,
    seed: int,
    bound: Bound | None = None,
    max_rows: int = EVALUATION_ROWS,
) -> LogMarginal:
    """The same with its errors, and another bound on the same draws."""
    batches = images.split(EVALUATION_BATCH)
    chunk_size = max(1, max_rows // len(batches[0]))
    sampler = ImportanceSampler(vae.model, vae.guide, num_particles, chunk_size=chunk_size)
    with seeded(seed, images.device):
        return sampler.log_marginal_dataset(batches, bound=bound)


@torch.no_grad()
def guide_means(vae: VAE, images: Tensor) -> Tensor:
    """The guide's mean of z for every image, shape ``[N, latent]``."""
    return torch.cat([vae.encoder(batch)[0] for batch in images.split(1000)])


def evaluate(
    vae: VAE, images: Tensor, loss: ELBO, *, nll_particles: int, num_particles: int, seed: int
) -> dict[str, float]:
    """Held-out results, in nats per datapoint where not a count.

    Arguments:
        vae: The model and its guide.
        images: Binarised held-out images, shape ``[N, D]``.
        loss: The training loss, for its own bound.
        nll_particles: Draws an image for the negative log-likelihood.
        num_particles: M·K; the IWAE bound with as many particles (of the draws for the NLL, if there are
            enough), minus log p̂, is −KL. Both are of the same draws, whose noise they share.
        seed: Of the draws.
    """
    bound = IWAE(min(num_particles, nll_particles))
    found = evidence(vae, images, nll_particles, seed=seed, bound=bound)
    active = active_units(vae.guide, images.split(1000))["z"].num_active
    return {
        "heldout_bound": mean_bound(vae, images, loss, seed=seed),
        "heldout_iwae_bound": found.mean + found.minus_kl,
        "iwae_particles": bound.K,
        "heldout_nll": -found.mean,
        "nll_monte_carlo_error": found.monte_carlo_error,
        "minus_kl": found.minus_kl,
        "minus_kl_error": found.minus_kl_error,
        "active_units": active,
    }


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def make_parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    parser = new_parser(description)
    add = parser.add_argument
    add_loss_options(parser)
    add("--latent", type=positive_int, default=50, help="dimension of z; of two, the manifold is drawn")
    add("--data", choices=datasets.NAMES, default="digits", help="the images")
    add("--data-dir", type=Path, default=Path("data"), help="where their files are; not for digits")
    add("--device", type=torch_device, default="cpu", help="a torch device, such as cuda")
    add("--epochs", type=positive_int, default=20, help="passes over the training images")
    add("--batch-size", type=positive_int, default=20, help="images a gradient step")
    add("--learning-rate", type=positive_float, default=1e-3, help="Adam's")
    add("--seed", type=int, default=0, help="of everything random")
    add("--nll-particles", type=positive_int, default=1000, help="draws an image for the NLL")
    add("--train-size", type=positive_int, help="use that many training images")
    add("--test-size", type=positive_int, help="use that many held-out images")
    add(
        "--out",
        type=Path,
        help="folder for the results (default: results/vae-<data>-<loss>, of a smoke run in results/smoke)",
    )
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and complete the command line; exits with a message where it makes no sense."""
    parser = make_parser()
    args = at_smoke_size(parser.parse_args(argv), SMOKE)
    if args.out is None:
        args.out = results_folder(f"vae-{args.data}-{args.loss}", args.smoke)
    return args


def fully_connected(data: ImageData, latent: int) -> VAE:
    """The VAE of Burda et al. for these images."""
    return VAE(math.prod(data.image_shape), latent, mean_image=data.train.flatten(1).mean(0))


def run(
    args: argparse.Namespace,
    heldout_losses: Mapping[str, ELBO] | None = None,
    build: Callable[[ImageData, int], VAE] = fully_connected,
) -> dict:
    """Load, train, evaluate and write the folder ``args.out``.

    Arguments:
        args: From :func:`parse_args`.
        heldout_losses: Further losses to evaluate after every epoch, by the name they get in the
            history.
        build: Makes the model and its guide, for images flattened to vectors and a dimension of z.

    Returns:
        What ``metrics.json`` holds: ``settings``, ``history`` and ``results``.
    """
    start = time.perf_counter()
    data = datasets.load(args.data, args.data_dir)
    data = data.subset(args.train_size, args.test_size, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    images = data.train.flatten(1).to(args.device)
    heldout = heldout_images(data, args.seed).flatten(1).to(args.device)
    vae = build(data, args.latent).to(args.device)
    loss = loss_of(args)

    history = train(
        vae,
        images,
        heldout,
        loss,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        binary=data.binary,
        heldout_losses={"heldout_bound": loss, **(heldout_losses or {})},
        description=f"{args.loss} on {args.data}",
    )
    settings = {**as_settings(args), "train_images": len(images), "heldout_images": len(heldout)}
    # First what took longest to make, and from the CPU, so that a machine without this device can load it.
    state = {name: tensor.cpu() for name, tensor in vae.state_dict().items()}
    checkpoint.write_torch(args.out / "vae.pt", {"state_dict": state, "settings": settings})
    results: dict[str, float] = dict(
        evaluate(
            vae,
            heldout,
            loss,
            nll_particles=args.nll_particles,
            num_particles=args.M * args.K,
            seed=args.seed,
        )
    )
    training_seconds = sum(record["seconds"] for record in history)
    results["train_bound"] = history[-1]["train_bound"]
    results["training_seconds"] = training_seconds
    results["seconds_per_epoch"] = training_seconds / len(history)

    results["wall_seconds"] = time.perf_counter() - start
    metrics = {"settings": settings, "history": history, "results": results}
    checkpoint.write_json(args.out / "metrics.json", metrics)
    save_pictures(vae, heldout, data, history, args)
    return metrics


@torch.no_grad()
def save_pictures(
    vae: VAE, heldout: Tensor, data: ImageData, history: list[dict[str, float]], args: argparse.Namespace
) -> None:
    """What the trained model makes of noise and of held-out images, its latents and its learning curve."""
    z = torch.randn(64, vae.latent, generator=torch.Generator().manual_seed(args.seed)).to(args.device)
    samples = vae.decoder(z).sigmoid().reshape(-1, *data.image_shape)
    pictures.save_images(samples, 8, "Decoder means of prior draws", args.out / "samples.png")
    means = guide_means(vae, heldout)
    rebuilt = vae.decoder(means[:24]).sigmoid().reshape(-1, *data.image_shape)
    originals = heldout[:24].reshape(-1, *data.image_shape)
    pictures.save_reconstructions(originals, rebuilt, args.out / "reconstructions.png")
    pictures.save_latents(means, data.test_labels, args.out / "latents.png")
    if vae.latent == 2:

        def decode(z: Tensor) -> Tensor:
            return vae.decoder(z.to(args.device)).sigmoid()

        pictures.save_manifold(decode, data.image_shape, args.out / "manifold.png")
    pictures.save_learning_curve(history, args.loss, args.out / "learning_curve.png")


def heldout_images(data: ImageData, seed: int) -> Tensor:
    """Held-out images as bits, drawn once, so that every epoch and every loss sees the same."""
    if data.binary:
        return data.test
    return binarize(data.test, torch.Generator().manual_seed(seed))


def plus_minus(value: float, error: float) -> str:
    """A number with its standard error, where that is known, to the digits that it knows (two at least)."""
    if not math.isfinite(error):
        return f"{value:.2f}"
    digits = 2 if error == 0 else min(max(2, 1 - math.floor(math.log10(error))), 6)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def summary(metrics: dict) -> str:
    """The results as a table to print."""
    settings, results = metrics["settings"], metrics["results"]
    rows = [
        ("training bound", f"{results['train_bound']:.2f} nats per datapoint (last epoch)"),
        ("held-out bound", f"{results['heldout_bound']:.2f} nats per datapoint"),
        (
            "held-out NLL",
            f"{plus_minus(results['heldout_nll'], results['nll_monte_carlo_error'])} nats, "
            f"{settings['nll_particles']} draws",
        ),
        (
            f"IWAE-{results['iwae_particles']} − log p̂",
            f"{plus_minus(results['minus_kl'], results['minus_kl_error'])} nats",
        ),
        ("active units", f"{results['active_units']}"),
        (
            "training time",
            f"{results['training_seconds']:.1f} s, {results['seconds_per_epoch']:.2f} s an epoch",
        ),
        ("wall time", f"{results['wall_seconds']:.1f} s"),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


def main(argv: list[str] | None = None) -> dict:
    return report(parse_args(argv))


def report(args: argparse.Namespace, build: Callable[[ImageData, int], VAE] = fully_connected) -> dict:
    """:func:`run`, with its results printed and what is wrong with its data or files in one line."""
    with in_one_line(OSError, ValueError, kept="nothing is saved before the end of training"):
        metrics = run(args, build=build)
    print(f"{args.loss} on {args.data}, {args.epochs} epochs\n{summary(metrics)}")
    print("\n".join(str(path) for path in sorted(args.out.iterdir())))
    return metrics


if __name__ == "__main__":
    main()
