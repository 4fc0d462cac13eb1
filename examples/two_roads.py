"""Two roads for one VAE: importance-weighted bounds, and a discriminator in place of the KL term.

The pair of ``vae.py`` with few latents is trained with the ELBO, IWAE and MIWAE (as many particles each) and
with AdversarialSVI. All four stand in one table: how well the aggregated posterior fits the prior (accuracy
of a two-sample classifier, MMD), reconstruction, samples (Parzen window), and likelihood, by L_K (with the
share of images whose weights have too heavy a tail, and the guide's median scale) and, for two latents, by a
sum over a grid that needs no guide. Try::

    python examples/two_roads.py                                   # 8×8 digits, some minutes
    python examples/two_roads.py --latent 8
    python examples/two_roads.py --data mnist --data-dir data --epochs 10 --test-size 1000

Bounds and reconstruction are in nats per held-out image.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyro
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor, nn

from pyro_iw import (
    AdversarialSVI,
    ImportanceSampler,
    TwoSamples,
    active_units,
    aggregated_posterior,
    rate_distortion,
)
from pyro_iw.psis import pareto_smoothed
from shared import datasets, parzen
from shared.datasets import ImageData, binarize, heldout_images
from shared.evaluation import EVALUATION_BATCH, log_marginal
from shared.networks import VAE
from shared.options import make_loss, new_parser, positive_float, positive_int
from shared.pictures import tile
from shared.running import progress_bar
from shared.skeleton import finish, parse

ROADS = {"elbo": "ELBO", "iwae": "IWAE", "miwae": "MIWAE", "adversarial": "adversarial"}
COLUMNS = {
    "accuracy": ("two-sample accuracy", ".3f"),
    "mmd": ("MMD² × 1000", ".2f"),
    "reconstruction": ("reconstruction", ".2f"),
    "parzen": ("Parzen", ".1f"),
    "nll": ("NLL, L_{nll_particles}", ".2f"),
    "nll_grid": ("NLL, grid", ".2f"),
    "khat": ("k̂ > 0.7", ".0%"),
    "scale": ("guide's scale", ".4f"),
    "active_units": ("active units", ".1f"),
}
KHAT_IMAGES = 100
SHOWN_CODES = 1000
SHOWN_SAMPLES = 100
# Half the width and the spacing of the grid over two latents, in standard deviations of the prior. The sum is
# exact to many digits where posteriors are at least as wide as the spacing.
REACH, SPACING = 6.0, 0.02
# Of Adam in the two phases that play against one another, as is usual since Radford et al. (1511.06434): with
# more momentum each answers to where the other was.
PLAYERS_BETAS = (0.5, 0.999)
SMOKE = {
    "epochs": 1,
    "train_size": 100,
    "test_size": 40,
    "nll_particles": 20,
    "parzen_samples": 50,
    "codes": 80,
    "validation_size": 20,
    "seeds": 1,
}


def make_discriminator(latent: int, hidden: int) -> nn.Sequential:
    """Logits of codes ``[cells, latent]``: two hidden layers of rectified units, as in the paper."""
    layers = [nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, 1))


def train(
    road: str, network: VAE, images: Tensor, data: ImageData, seed: int, args: argparse.Namespace
) -> float:
    """Train along one of the roads; minibatches, their bits and the steps are the same for all.

    Returns:
        The seconds it took.
    """
    steps = args.epochs * math.ceil(len(images) / args.batch_size)
    # The rate falls to a tenth: at a constant one the two players of the adversarial road circle one another.
    falling = {"lr": args.learning_rate, "lrd": 0.1 ** (1 / steps)}
    optim = ClippedAdam({**falling, "eps": 1e-4})
    svi: SVI | AdversarialSVI
    if road == "adversarial":
        svi = AdversarialSVI(
            network.model,
            network.guide,
            make_discriminator(args.latent, args.hidden),
            optim,
            discriminator_optim=ClippedAdam({**falling, "betas": PLAYERS_BETAS}),
            guide_optim=ClippedAdam({**falling, "betas": PLAYERS_BETAS}),
        )
    else:
        svi = SVI(network.model, network.guide, optim, loss=make_loss(road, args.M, args.K))
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    with progress_bar(steps, ROADS[road]) as bar:
        for epoch in range(args.epochs):
            bar.set_postfix_str(f"seed {seed}, epoch {epoch + 1}/{args.epochs}", refresh=False)
            for rows in torch.randperm(len(images), generator=generator).split(args.batch_size):
                svi.step(images[rows] if data.binary else binarize(images[rows], generator))
                bar.update()
    return time.perf_counter() - start


@torch.no_grad()
def grid_log_marginal(network: VAE, images: Tensor, spacing: float = SPACING) -> Tensor:
    """log p(x) of bits ``[N, D]`` by a sum over a grid of two latents, ``[N]``: without a guide."""
    axis = torch.arange(-REACH, REACH + spacing / 2, spacing)
    grid = torch.cartesian_prod(axis, axis)
    total = torch.full((len(images),), -math.inf, dtype=torch.float64)
    bar = progress_bar(len(grid), "grid")
    for z in grid.split(10_000):
        logits = network.decoder(z)
        log_p = images @ logits.T - torch.nn.functional.softplus(logits).sum(1)
        log_p += (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(1)
        total = torch.logaddexp(total, log_p.double().logsumexp(1))
        bar.update(len(z))
    bar.close()
    return total + 2 * math.log(spacing)


@torch.no_grad()
def judge(
    network: VAE,
    both: TwoSamples,
    heldout: Tensor,
    validation: Tensor,
    data: ImageData,
    args: argparse.Namespace,
) -> dict[str, float]:
    """The columns of the table.

    Arguments:
        network: The trained pair.
        both: Its codes of training images, beside draws from the prior.
        heldout: Held-out images as bits, ``[N, D]``.
        validation: Intensities ``[V, D]`` of images that are neither trained on nor held out.
        data: With the intensities of the held-out images.
        args: From the command line.
    """
    accuracy, mmd = both.classifier_accuracy(), both.mmd()
    batches = heldout.split(EVALUATION_BATCH)
    sampler = ImportanceSampler(network.model, network.guide, num_particles=100)
    distortion = torch.cat([rate_distortion(sampler, batch).distortion for batch in batches])
    samples = network.decoder(torch.randn(args.parzen_samples, args.latent)).sigmoid()
    sigma = parzen.choose_bandwidth(samples, validation)
    window = parzen.log_likelihood(samples, data.test.flatten(1), sigma)
    results = {
        "accuracy": accuracy.accuracy,
        "accuracy_error": accuracy.standard_error,
        "mmd": 1000 * mmd.squared,
        "mmd_error": 1000 * mmd.standard_error,
        "mmd_p_value": mmd.p_value,
        "reconstruction": distortion.mean().item(),
        "parzen": window.mean().item(),
        "parzen_error": window.std().item() / math.sqrt(len(window)),
        "parzen_bandwidth": sigma,
        "nll": -log_marginal(network, heldout, args.nll_particles, seed=args.seed).mean().item(),
        "active_units": active_units(network.guide, heldout.split(1000))["z"].num_active,
    }
    few = heldout[:KHAT_IMAGES]
    sampler = ImportanceSampler(network.model, network.guide, args.nll_particles)
    khat = pareto_smoothed(torch.cat([particles.log_weights for particles in sampler.particles(few)]))[1]
    results["khat"] = (khat > 0.7).double().mean().item()
    results["scale"] = network.encoder(heldout)[1].median().item()
    if args.latent == 2:
        results["nll_grid"] = -grid_log_marginal(network, heldout).mean().item()
    return results


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and judge each, with the same seeds; pictures are of the first."""
    data = datasets.load(args.data, args.data_dir).subset(args.train_size, args.test_size)
    everything, labels = data.train.flatten(1), data.train_labels
    if args.validation_size >= len(everything):
        raise SystemExit(f"error: --validation-size leaves none of {len(everything)} images to train on")
    validation, images = everything[: args.validation_size], everything[args.validation_size :]
    heldout = heldout_images(data, 0).flatten(1)
    seen = images[: args.codes]
    bits = seen if data.binary else binarize(seen, torch.Generator().manual_seed(0))
    roads: dict[str, Any] = {road: {"runs": []} for road in ROADS}
    for seed in range(args.seed, args.seed + args.seeds):
        for road, found in roads.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            network = VAE(images.shape[1], args.latent, args.hidden, images.mean(0))
            seconds = train(road, network, images, data, seed, args)
            both = aggregated_posterior(network.model, network.guide, bits.split(1000))["z"]
            columns = judge(network, both, heldout, validation, data, args)
            found["runs"].append({**columns, "training_seconds": seconds})
            if seed == args.seed:
                with torch.no_grad():
                    samples = network.decoder(torch.randn(SHOWN_SAMPLES, args.latent)).sigmoid()
                found["codes"] = plane(both.guide)[:SHOWN_CODES].tolist()
                found["samples"] = samples.reshape(-1, *data.image_shape).tolist()
    shown = seen[:SHOWN_SAMPLES].reshape(-1, *data.image_shape)
    classes = None if labels is None else labels[args.validation_size :][: args.codes][:SHOWN_CODES].tolist()
    prior = plane(torch.randn(SHOWN_CODES, args.latent))
    return {"roads": roads, "classes": classes, "prior": prior.tolist(), "images": shown.tolist()}


def plane(codes: Tensor) -> Tensor:
    """Codes ``[N, latent]`` in the plane in which they vary most, ``[N, 2]``.

    The standard normal prior looks the same in every plane, so all stand beside the same picture of it.
    """
    if codes.shape[1] <= 2:
        return torch.cat([codes, torch.zeros(len(codes), 2 - codes.shape[1])], 1)
    directions = torch.linalg.svd(codes - codes.mean(0), full_matrices=False).Vh[:2]
    return codes @ directions.T


def table(results: dict[str, Any]) -> str:
    """In markdown, a road a row: means, and where there are several seeds, standard deviations over them."""
    roads = results["roads"]
    columns = {key: column for key, column in COLUMNS.items() if key in roads["elbo"]["runs"][0]}
    titles = [title.format(**results["settings"]) for title, _ in columns.values()]
    lines = [f"| trained by | {' | '.join(titles)} |", "|:--|" + "--:|" * len(titles)]
    for road, found in roads.items():
        entries = []
        for key, (_, form) in columns.items():
            values = [one[key] for one in found["runs"]]
            entries.append(f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if values[1:] else ""))
        lines.append(f"| {ROADS[road]} | {' | '.join(entries)} |")
    error = roads["elbo"]["runs"][0]["accuracy_error"]
    lines.append(f"Two-sample accuracy: 0.5 ± {error:.3f} where codes and prior draws do not differ.")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Figure:
    """Codes and samples of each, beside the prior and the data."""
    roads = results["roads"]
    figure = Figure(figsize=(3 * (1 + len(roads)), 6.4), layout="constrained")
    above, below = figure.subplots(2, 1 + len(roads))
    dims = results["settings"]["latent"]
    plane_of = "" if dims <= 2 else f", the plane in which they vary most, of {dims} dims"
    figure.suptitle(f"Codes of training images by class{plane_of}: seed {results['settings']['seed']}")
    draw_codes(above[0], results["prior"], None, "prior")
    draw_samples(below[0], results["images"], "training images")
    tab10 = colormaps["tab10"]
    low, high = min(results["classes"]), max(results["classes"])
    classes = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=4,
            color=tab10((c - low) / (high - low or 1)),
            label=c,
        )
        for c in sorted(set(results["classes"]))
    ]
    figure.legend(handles=classes, title="class", loc="outside right upper", fontsize=8, title_fontsize=8)
    for codes, samples, (road, found) in zip(above[1:], below[1:], roads.items(), strict=True):
        title = f"{ROADS[road]}: accuracy {found['runs'][0]['accuracy']:.2f}"
        draw_codes(codes, found["codes"], results["classes"], title)
        draw_samples(samples, found["samples"], "decoded prior draws")
    return figure


def draw_codes(axes: Axes, codes: list[list[float]], classes: list[int] | None, title: str) -> None:
    colours = {"color": "grey"} if classes is None else {"c": classes, "cmap": "tab10"}
    axes.scatter(*zip(*codes, strict=True), s=4, **colours)
    # All with the same limits; further out than that are a few in 100 000 of the prior's draws.
    axes.set(title=title, xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal", xlabel="z1", ylabel="z2")


def draw_samples(axes: Axes, images: list, title: str) -> None:
    axes.imshow(tile(torch.tensor(images), 10).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(title=title)
    axes.set_axis_off()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", choices=datasets.NAMES, default="digits", help="the images")
    add("--data-dir", default="data", help="where their files are; not for digits")
    add("-M", type=positive_int, default=4, help="averages outside the log (miwae)")
    add("-K", type=positive_int, default=4, help="particles inside; elbo and iwae take M·K in all")
    add("--latent", type=positive_int, default=2, help="dimension of z; 2 for the exact likelihood")
    add("--hidden", type=positive_int, default=200, help="width of the hidden layers")
    add("--epochs", type=positive_int, default=60, help="passes over the training images")
    add("--batch-size", type=positive_int, default=50, help="images a gradient step")
    add("--learning-rate", type=positive_float, default=2e-3, help="Adam's at first, in every phase")
    add("--codes", type=positive_int, default=5000, help="training images to compare with the prior, at most")
    add("--validation-size", type=positive_int, default=150, help="images to choose Parzen's bandwidth by")
    add("--parzen-samples", type=positive_int, default=10_000, help="samples under the Parzen window")
    add("--nll-particles", type=positive_int, default=1000, help="draws an image for L_K")
    add("--train-size", type=positive_int, default=60_000, help="training images, at most")
    add("--test-size", type=positive_int, default=10_000, help="held-out images, at most")
    add("--seeds", type=positive_int, default=3, help="runs of each")
    add("--seed", type=int, default=0, help="the first of them")
    add(
        "--out",
        type=Path,
        default=Path("results/two-roads"),
        help="folder for the results; of a smoke run, in results/smoke",
    )
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    return finish(parse(parser, argv, SMOKE), "two_roads", run, draw, table)


if __name__ == "__main__":
    main()
