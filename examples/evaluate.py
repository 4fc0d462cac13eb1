"""Judges a VAE that ``examples/vae.py`` has trained, by importance sampling with its guide.

Reads the run's folder, draws the images that it held out, and writes a report, pictures and a file for ArviZ.
Try::

    python examples/vae.py --out results/vae
    python examples/evaluate.py results/vae
    python examples/evaluate.py results/vae --num-particles 10000 --test-size 100
    python examples/evaluate.py results/vae --num-particles 5000 --ais

All bounds are in nats per datapoint.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_iw import ImportanceSampler, active_units, bound_curve, plots, rate_distortion
from pyro_iw.bounds import IWAE
from pyro_iw.psis import khat_threshold, pareto_smoothed
from shared import annealed, checkpoint, datasets, options
from shared.datasets import ImageData, heldout_images
from shared.evaluation import guide_means, plus_minus, seeded
from shared.networks import VAE

# K of the IWAE bound that the log evidence is compared with, as in Rainforth et al. (2018).
IWAE_PARTICLES = 64
SMOKE = {"num_particles": 50, "test_size": 40, "khat_images": 20, "arviz_images": 4, **annealed.SMOKE}


def load_vae(run: Path) -> tuple[VAE, dict[str, Any]]:
    """The trained VAE and the settings of its run.

    Arguments:
        run: The folder that ``vae.py`` wrote, or its ``vae.pt``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not what ``vae.py`` saves.
    """
    path = run / "vae.pt" if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; train a model with: python examples/vae.py --out {run}")
    try:
        saved = checkpoint.read_torch(path)
        state, settings = saved["state_dict"], saved["settings"]
        hidden, latent = state["decoder.0.weight"].shape
        network = VAE(state["encoder.trunk.0.0.weight"].shape[1], latent, hidden)
        network.load_state_dict(state)
        wanted = ("data", "data_dir", "train_size", "test_size", "seed", "heldout_images")
        return network.eval(), {name: settings[name] for name in wanted}
    except Exception as error:  # whatever a damaged file stops the unpickler with
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is no model saved by examples/vae.py ({reason})") from error


def load_heldout(settings: dict[str, Any], data_dir: Path | None) -> tuple[ImageData, Tensor]:
    """The data of the run and its held-out images ``[N, D]``, with the same bits as there."""
    data = datasets.load(settings["data"], settings["data_dir"] if data_dir is None else data_dir)
    data = data.subset(settings["train_size"], settings["test_size"], seed=settings["seed"])
    images = heldout_images(data, settings["seed"]).flatten(1)
    if len(images) != settings["heldout_images"]:
        raise ValueError(
            f"the run held out {settings['heldout_images']} images, but there are {len(images)}: the files "
            "are not those it was trained on; name their folder with --data-dir"
        )
    return data, images


def evaluate(sampler: ImportanceSampler, images: Tensor, args: argparse.Namespace) -> tuple[dict, dict]:
    """The numbers of the report, and what the pictures draw.

    Arguments:
        sampler: Draws from the trained pair.
        images: Binarised held-out images, shape ``[N, D]``, shuffled.
        args: From :func:`parse_args`.
    """
    batches = images.split(args.batch_size)
    bound = IWAE(min(IWAE_PARTICLES, args.num_particles))
    steps = 4 if args.ais else 3
    print(
        f"[1/{steps}] log evidence of {len(images)} images, {args.num_particles} particles each", flush=True
    )
    evidence = sampler.log_marginal_dataset(batches, bound=bound)
    print(f"[2/{steps}] rate, distortion and active units", flush=True)
    parts = [rate_distortion(sampler, batch) for batch in batches]
    activity = active_units(sampler.guide, batches)["z"]
    few = images[: args.khat_images]
    print(f"[3/{steps}] tail of the weights and bound over K, {len(few)} of the images", flush=True)
    # k̂ takes all the weights of an image at once, but not its latents.
    log_weights = torch.cat([particles.log_weights for particles in sampler.particles(few)])
    khat = pareto_smoothed(log_weights)[1]
    threshold = khat_threshold(args.num_particles)
    curve = bound_curve(sampler, few)
    results = {
        "num_particles": args.num_particles,
        "nll": -evidence.mean,
        "nll_monte_carlo_error": evidence.monte_carlo_error,
        "nll_sampling_error": evidence.sampling_error,
        "iwae": evidence.mean + evidence.minus_kl,
        "iwae_particles": bound.K,
        "minus_kl": evidence.minus_kl,
        "minus_kl_error": evidence.minus_kl_error,
        "elbo": torch.cat([part.elbo for part in parts]).mean().item(),
        "distortion": torch.cat([part.distortion for part in parts]).mean().item(),
        "rate": torch.cat([part.rate for part in parts]).mean().item(),
        "active_units": activity.num_active,
        "units": activity.variances.numel(),
        "ess_median": evidence.ess.median().item(),
        "ess_5_percent": evidence.ess.quantile(0.05).item(),
        "khat_images": len(few),
        "khat_threshold": threshold,
        "khat_share_above": (khat > threshold).double().mean().item(),
        "bound_curve": {
            "num_particles": list(curve.num_particles),
            "mean": curve.mean.tolist(),
            "monte_carlo_error": curve.monte_carlo_error.tolist(),
        },
    }
    bounds = None
    if args.ais:
        print(f"[4/{steps}] annealed importance sampling, {args.ais_images} of the images", flush=True)
        results["annealed"], bounds = annealed.annealed_report(sampler, images, evidence.values, args)
    level = evidence.values[: len(few)].mean()
    drawn = {"curve": curve, "level": level, "ess": evidence.ess, "khat": khat, "log_weights": log_weights}
    return results, drawn | {"bounds": bounds}


def save_pictures(
    network: VAE, images: Tensor, labels: Tensor | None, data: ImageData, drawn: dict, folder: Path
) -> None:
    def save(name: str, plot: Callable[..., Axes], *args: Any, height: float = 4.2, **options: Any) -> None:
        figure = Figure(figsize=(6, height), layout="constrained")
        plot(*args, ax=figure.add_subplot(), **options)
        figure.savefig(folder / f"{name}.png", dpi=120)

    size = len(drawn["log_weights"])
    save("bound", plots.plot_bound_curve, drawn["curve"], label="IWAE bound", log_marginal=drawn["level"])
    save("ess", plots.plot_ess, drawn["ess"], size)
    save("khat", plots.plot_khat, drawn["khat"], size)
    save("weights", plots.plot_weights, drawn["log_weights"])
    if drawn["bounds"] is not None:
        save("sandwich", plots.plot_sandwich, drawn["bounds"])
    save("latents", plots.plot_latents, guide_means(network, images), labels, height=5.2)
    if network.latent == 2:

        def decode(z: Tensor) -> Tensor:
            return network.decoder(z.to(images.device)).sigmoid()

        save("manifold", plots.plot_manifold, decode, data.image_shape, height=6)


def summary(results: dict) -> str:
    """The results as a table to print."""
    r = results
    mc, sampling = r["nll_monte_carlo_error"], r["nll_sampling_error"]
    rows = [
        ("NLL, −log p̂(x)", f"{r['nll']:.3f} nats, ± {mc:.3f} by the draws, ± {sampling:.2f} by the images"),
        (f"IWAE-{r['iwae_particles']} bound", f"{r['iwae']:.3f} nats"),
        (
            f"−KL, IWAE-{r['iwae_particles']} − log p̂",
            f"{plus_minus(r['minus_kl'], r['minus_kl_error'])} nats",
        ),
        ("ELBO", f"{r['elbo']:.3f} nats"),
        ("distortion", f"{r['distortion']:.3f} nats"),
        ("rate", f"{r['rate']:.3f} nats"),
        ("active units", f"{r['active_units']} of {r['units']}"),
        ("ESS", f"{r['ess_median']:.1f} (median), {r['ess_5_percent']:.1f} (5% quantile)"),
        (f"k̂ above {r['khat_threshold']:.2f}", f"{r['khat_share_above']:.1%} of {r['khat_images']} images"),
    ]
    if "annealed" in r:
        rows += annealed.annealed_lines(r["annealed"], r["num_particles"])
    return "\n".join(f"{name:<25}{value}" for name, value in rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and complete the command line; exits with a message where it makes no sense."""
    parser = options.new_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="folder that vae.py wrote, or its vae.pt")
    add(
        "--out",
        type=Path,
        help="folder for the results (default: evaluation, of a smoke run "
        "evaluation-smoke, in the run's folder)",
    )
    add("--num-particles", type=options.positive_int, default=1000, help="draws from the guide, an image")
    add("--chunk-size", type=options.positive_int, default=100, help="of them in memory at once")
    add("--batch-size", type=options.positive_int, default=100, help="images in memory at once")
    add("--device", type=options.torch_device, default="cpu", help="a torch device, such as cuda")
    add("--seed", type=int, default=0, help="of the draws and of which images are taken")
    add("--test-size", type=options.positive_int, help="use that many of the run's held-out images")
    add("--khat-images", type=options.positive_int, default=200, help="of these, for k̂ and the bound over K")
    add("--arviz-images", type=options.positive_int, default=20, help="of these, for the posterior's draws")
    annealed.add_annealed_options(parser)
    add("--data-dir", type=Path, help="where the image files are (default: where the run had them)")
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    args = options.at_smoke_size(parser.parse_args(argv), SMOKE)
    if args.num_particles == 1:
        parser.error("argument --num-particles: must be at least 2, for there to be an error")
    if args.out is None:
        folder = args.run if args.run.is_dir() else args.run.parent
        args.out = folder / ("evaluation-smoke" if args.smoke else "evaluation")
    return args


def run(args: argparse.Namespace) -> dict:
    """Load, evaluate and write the folder ``args.out``; returns what ``report.json`` holds."""
    start = time.perf_counter()
    network, settings = load_vae(args.run)
    data, images = load_heldout(settings, args.data_dir)
    pixels = network.decoder[-1].out_features
    if images.shape[1] != pixels:
        raise ValueError(f"the model's images have {pixels} pixels, but those of the data {images.shape[1]}")
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.test_size]
    images = images[rows].to(args.device)
    labels = None if data.test_labels is None else data.test_labels[rows]
    # Pyro would put parameters that it knows by the same names in place of the loaded ones.
    pyro.clear_param_store()
    network.to(args.device)
    sampler = ImportanceSampler(network.model, network.guide, args.num_particles, chunk_size=args.chunk_size)
    args.out.mkdir(parents=True, exist_ok=True)
    # Moved when all of them are there, so that what is in the folder is whole and of one evaluation.
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=args.out) as unfinished:
        folder = Path(unfinished)
        with seeded(args.seed):
            results, drawn = evaluate(sampler, images, args)
            with warnings.catch_warnings():
                # Of a high k̂ or a low ESS, which the report states.
                warnings.simplefilter("ignore", RuntimeWarning)
                samples = sampler(images[: args.arviz_images])
                posterior = samples.to_arviz(dims={"z": ["unit"], "x": ["pixel"]})
            posterior.to_netcdf(str(folder / "posterior.nc"))
        save_pictures(network, images, labels, data, drawn, folder)
        results["wall_seconds"] = time.perf_counter() - start
        report = {"settings": vars(args), "training": settings, "images": len(images), "results": results}
        text = json.dumps(report, indent=2, default=str) + "\n"
        (folder / "report.json").write_text(text)
        for path in folder.iterdir():
            path.replace(args.out / path.name)
    return json.loads(text)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    try:
        report = run(args)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.run}, {report['images']} held-out images\n{summary(report['results'])}")
    print("\n".join(str(path) for path in sorted(args.out.iterdir())))
    return report


if __name__ == "__main__":
    main()
