"""Does an autoregressive decoder ignore z? A gated PixelCNN beside the fully connected VAE.

A decoder that sees the pixels before each pixel can model images without latents: the posterior then
collapses to the prior. Five models of the same images, trained alike: the fully connected VAE and the one
with a gated PixelCNN (van den Oord et al., 1606.05328) for its decoder, each with and without a warm-up of
the KL term, and the PixelCNN alone. For each: log p̂, rate and distortion, active units, and draws, of which
those in a row share their z. Try::

    python examples/pixel_vae.py                               # MIWAE(2, 4) on 8×8 digits: 6 minutes of CPU
    python examples/pixel_vae.py --layers 1                    # a PixelCNN that sees two pixels far
    python examples/pixel_vae.py --loss iwae --estimator dreg
    python examples/pixel_vae.py --data mnist --data-dir data --channels 8 -K 2 --train-size 6000 \\
        --test-size 200 --epochs 2 --kl-warmup 1 --learning-rate 2e-3 --nll-particles 50

All bounds are reported in nats per datapoint.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_iw import ImportanceSampler, active_units, rate_distortion
from pyro_iw.bounds import IWAE
from shared import datasets
from shared.datasets import ImageData, heldout_images
from shared.deep.networks import KLWarmup
from shared.evaluation import EVALUATION_BATCH, evidence, plus_minus, seeded
from shared.networks import VAE
from shared.options import loss_of, positive_float, positive_int, torch_device
from shared.pictures import tile
from shared.pixels import PixelCNN, PixelVAE
from shared.running import Diverged, in_one_line
from shared.skeleton import finish, parse, training_parser
from shared.training import train

DEFAULTS = {"M": 2, "K": 4, "epochs": 30}
SMOKE = {
    "train_size": 60,
    "test_size": 20,
    "epochs": 1,
    "kl_warmup": 0.5,
    "nll_particles": 20,
    "channels": 4,
    "layers": 2,
    "latent": 4,
}
FULLY, ALONE, PIXEL = "fully connected", "PixelCNN alone", "PixelCNN"
WARM = ", warm-up"
ARMS = (FULLY, FULLY + WARM, ALONE, PIXEL, PIXEL + WARM)
COLOURS = ("tab:blue", "tab:cyan", "black", "tab:red", "tab:orange")
MARKERS = ("o", "^", "s", "o", "^")
# Particles an image for the rate and the distortion.
RATE_PARTICLES = 50
# Pixels in memory at once: particles × images × pixels of an image.
MAX_PIXELS = 400_000
# Draws a picture: those of a row have one z.
ROWS, COLUMNS = 6, 5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__, "results/pixel-vae", **DEFAULTS)
    add = parser.add_argument
    add("--latent", type=positive_int, default=16, help="dimension of z")
    add("--channels", type=positive_int, default=16, help="of each stack of the PixelCNN")
    add("--layers", type=positive_int, default=4, help="of the PixelCNN: it sees twice as many pixels far")
    add("--kl-warmup", type=positive_float, default=10, help="epochs until the KL term has its full weight")
    add("--data", choices=datasets.NAMES, default="digits", help="the images")
    add("--data-dir", type=Path, default=Path("data"), help="where their files are; not for digits")
    add("--device", type=torch_device, default="cpu", help="a torch device, such as cuda")
    add("--train-size", type=positive_int, help="use that many training images")
    add("--test-size", type=positive_int, help="use that many held-out images")
    add("--nll-particles", type=positive_int, default=500, help="draws an image for the NLL")
    return parse(parser, argv, SMOKE)


def make(arm: str, data: ImageData, args: argparse.Namespace) -> VAE:
    """The model of that name and its guide. All guides begin with the same weights."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    if arm.startswith(FULLY):
        return VAE(math.prod(data.image_shape), args.latent, mean_image=data.train.flatten(1).mean(0))
    kind = PixelCNN if arm == ALONE else PixelVAE
    return kind(data.image_shape, args.latent, args.channels, args.layers)


def training_loss(arm: str, num_images: int, args: argparse.Namespace) -> ELBO:
    """What it is trained with; without latents all bounds are log p(x)."""
    if arm == ALONE:
        return Trace_ELBO()
    if arm.endswith(WARM):
        steps = args.kl_warmup * math.ceil(num_images / args.batch_size)
        return loss_of(args, kl_weight=KLWarmup(max(1, round(steps))))
    return loss_of(args)


@torch.no_grad()
def evaluate(vae: VAE, images: Tensor, args: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Held-out results in nats per datapoint, and log p̂ of every image ``[N]``, exact without latents."""
    if isinstance(vae, PixelCNN):
        z = images.new_zeros(len(images), vae.latent)
        batches = zip(images.split(EVALUATION_BATCH), z.split(EVALUATION_BATCH), strict=True)
        log_p = torch.cat([vae.likelihood(z).log_prob(x) for x, z in batches])
        nll = -log_p.double().mean().item()
        return {"nll": nll, "nll_monte_carlo_error": 0.0, "rate": 0.0, "distortion": nll, "gap": 0.0}, log_p
    max_rows = max(1, MAX_PIXELS // images.shape[1])
    found = evidence(vae, images, args.nll_particles, seed=args.seed, bound=IWAE(1), max_rows=max_rows)
    chunk_size = max(1, max_rows // EVALUATION_BATCH)
    sampler = ImportanceSampler(vae.model, vae.guide, RATE_PARTICLES, chunk_size=chunk_size)
    with seeded(args.seed):
        parts = [rate_distortion(sampler, x) for x in images.split(EVALUATION_BATCH)]
    activity = active_units(vae.guide, images.split(1000), progress=False)["z"]
    results = {
        "nll": -found.mean,
        "nll_monte_carlo_error": found.monte_carlo_error,
        "rate": torch.cat([part.rate for part in parts]).mean().item(),
        "distortion": torch.cat([part.distortion for part in parts]).mean().item(),
        # Of the guide from the posterior: log p̂ − ELBO, on the same draws.
        "gap": -found.minus_kl,
        "active_units": activity.num_active,
        "variances": activity.variances.tolist(),
    }
    return results, found.values


def draws(vae: VAE, args: argparse.Namespace) -> list[str]:
    """Images drawn from the model, as strings of bits, row by row; the images of a row have one z."""
    with seeded(args.seed), torch.no_grad():
        z = torch.randn(ROWS, 1, vae.latent).expand(ROWS, COLUMNS, vae.latent).to(args.device)
        images = vae.likelihood(z).sample().flatten(0, 1)
    return ["".join(str(int(bit)) for bit in image) for image in images.tolist()]


def run(args: argparse.Namespace) -> dict[str, Any]:
    with in_one_line(OSError, ValueError):
        data = datasets.load(args.data, args.data_dir).subset(args.train_size, args.test_size, seed=args.seed)
    images = data.train.flatten(1).to(args.device)
    heldout = heldout_images(data, args.seed).flatten(1).to(args.device)
    arms, log_p = {}, {}
    for arm in ARMS:
        vae = make(arm, data, args).to(args.device)
        history = train(
            vae,
            images,
            heldout,
            training_loss(arm, len(images), args),
            epochs=args.epochs,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            seed=args.seed,
            binary=data.binary,
            description=f"{arm} on {args.data}",
        )
        results, log_p[arm] = evaluate(vae, heldout, args)
        seconds = sum(record["seconds"] for record in history)
        arms[arm] = {**results, "training_seconds": seconds, "history": history, "draws": draws(vae, args)}
    for arm, results in arms.items():
        gain = (log_p[arm] - log_p[ALONE]).double()
        results["gain"] = gain.mean().item()
        results["gain_error"] = gain.std().item() / math.sqrt(len(gain))
    return {"image_shape": data.image_shape, "heldout_images": len(heldout), "arms": arms}


def table(results: dict[str, Any]) -> str:
    """The results in words."""
    settings = results["settings"]
    lines = [
        f"{settings['loss']} on {settings['data']}, {settings['epochs']} epochs, "
        f"{results['heldout_images']} held-out images, nats per image",
        f"{'decoder':<25}{'NLL':>14}{'log p̂ − alone':>17}{'rate':>8}{'distortion':>12}{'gap':>7}"
        f"{'active':>8}",
    ]
    for arm, r in results["arms"].items():
        nll = plus_minus(r["nll"], r["nll_monte_carlo_error"])
        gain = f"{r['gain']:+.2f} ± {r['gain_error']:.2f}"
        if arm == ALONE:
            nll, gain = f"{r['nll']:.2f}", ""
        lines.append(
            f"{arm:<25}{nll:>14}{gain:>17}{r['rate']:>8.2f}{r['distortion']:>12.2f}{r['gap']:>7.2f}"
            f"{r.get('active_units', 0):>8}"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Figure:
    """Rate against distortion, the units' activity, and draws."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    plane, units = above.subplots(1, 2)
    arms = results["arms"]
    for arm, colour, marker in zip(ARMS, COLOURS, MARKERS, strict=True):
        r = arms[arm]
        look = {"color": colour, "marker": marker, "label": arm}
        plane.scatter(r["rate"], r["distortion"], s=70, zorder=3, **look)
        if "variances" in r:
            ordered = sorted(r["variances"], reverse=True)
            units.plot(range(1, len(ordered) + 1), ordered, **look)
    _equal_elbo(plane, arms[ALONE]["nll"])
    plane.set_title("What the latents cost, and what they leave to explain")
    plane.set_xlabel("rate KL(q(z | x) ‖ p(z)) [nats per image]")
    plane.set_ylabel("distortion −E log p(x | z) [nats per image]")
    plane.legend()
    threshold = units.axhline(0.01, color="grey", linestyle="--", label="active above")
    units.set_yscale("log")
    units.set_title("Activity of the latent units")
    units.set_xlabel("units, the most active one first")
    units.set_ylabel("variance over images of the guide's mean")
    units.legend(handles=[threshold], loc="upper right")  # colours and marks are those of the plane
    below.suptitle("Draws from the models: those of a row have one z")
    for axes, arm in zip(below.subplots(1, len(ARMS)), ARMS, strict=True):
        bits = torch.tensor([[float(bit) for bit in image] for image in arms[arm]["draws"]])
        grid = tile(bits.unflatten(1, results["image_shape"]), COLUMNS)
        axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(arm)
        axes.set_axis_off()
    return figure


def _equal_elbo(plane: Any, nll: float) -> None:
    """Lines of equal ELBO, the one of the PixelCNN alone among them."""
    (left, right), (low, high) = plane.get_xlim(), plane.get_ylim()
    step = max(1, round((right - left) / 5))
    for i in range(-20, 21):
        label = "equal ELBO" if i == 0 else None
        weight = 1.2 if i == 0 else 0.5
        line = nll + i * step
        plane.plot(
            (left, right),
            (line - left, line - right),
            color="grey",
            linestyle=":",
            linewidth=weight,
            label=label,
        )
    plane.set_xlim(left, right)
    plane.set_ylim(low, high)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    with in_one_line(OSError, Diverged):
        return finish(parse_args(argv), "pixel_vae", run, draw, table)


if __name__ == "__main__":
    main()
