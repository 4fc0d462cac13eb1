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
from collections.abc import Callable, Mapping
from pathlib import Path

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from shared import checkpoint, datasets, pictures
from shared.datasets import ImageData, heldout_images
from shared.evaluation import evaluate, guide_means, plus_minus
from shared.networks import VAE
from shared.options import (
    add_loss_options,
    as_settings,
    at_smoke_size,
    loss_of,
    new_parser,
    positive_float,
    positive_int,
    torch_device,
)
from shared.running import in_one_line, results_folder
from shared.training import train

SMOKE = {
    "train_size": 100,
    "test_size": 40,
    "epochs": 1,
    "batch_size": 25,
    "nll_particles": 50,
}


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
    results, log_p = evaluate(
        vae,
        heldout,
        loss,
        nll_particles=args.nll_particles,
        num_particles=args.M * args.K,
        seed=args.seed,
    )
    # An image each, so that runs can be compared image by image.
    checkpoint.write_arrays(args.out / "heldout.npz", {"log_p": log_p.cpu()})
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
