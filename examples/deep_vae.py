"""Burda et al. (1509.00519) from first to last: VAEs of one, two or more stochastic layers.

Their networks, initialisation, data and schedule of 3280 epochs, with any of the bounds and estimators; a run
can be killed at any time and goes on to the bit. Try::

    python examples/deep_vae.py --smoke
    python examples/deep_vae.py --layers 2 -K 5 --epochs-scale 0.01          # on 8×8 digits
    python examples/deep_vae.py --layers 2 -K 50 --data mnist --device cuda --out results/iwae --resume
    python examples/deep_vae.py --layers 2 -K 50 --data mnist --device cuda --out results/vae-of-iwae \\
        --switch-to elbo -K 1 --start-from results/iwae

The last one goes on with a trained model under another bound (the paper's Table 2).
All bounds are in nats per datapoint.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_iw import ImportanceWeightedELBO, active_units
from pyro_iw.bounds import IWAE
from shared import annealed, checkpoint, datasets, pictures
from shared.datasets import ImageData, heldout_images
from shared.deep.networks import DeepVAE, KLWarmup, cut, layer_widths, schedule
from shared.deep.training import Trainer
from shared.evaluation import sampler_and_batches, seeded
from shared.options import (
    LOSS_OPTIONS,
    LOSSES,
    add_loss_options,
    as_settings,
    at_smoke_size,
    make_loss,
    new_parser,
    positive_float,
    positive_int,
    torch_device,
)
from shared.running import results_folder

KIND = "examples/deep_vae.py"
# K of the IWAE bound that the log evidence is compared with, as in Rainforth et al. (2018).
IWAE_PARTICLES = 64
PRECISIONS = ("float32", "tf32", "bfloat16")
# What has to agree for a run to go on: with the model and its data, and with how it is trained.
MODEL_SETTINGS = ("layers", "data", "train_size", "test_size", "binarisation", "seed", "data_checksum")
MODEL_SETTINGS += ("device_type",)  # a generator's state is of one kind of device
TRAINING_SETTINGS = (*LOSS_OPTIONS, "switch_to", "kl_warmup", "epochs_scale", "learning_rate", "batch_size")
TRAINING_SETTINGS += ("precision",)
SMOKE = {"train_size": 100, "test_size": 40, "nll_particles": 50, "epochs_scale": 0.002, **annealed.SMOKE}


def load_data(args: argparse.Namespace) -> tuple[ImageData, Tensor, Tensor, bool]:
    """The set, the training images ``[N, D]``, held-out bits ``[N', D]``, and whether the former are bits."""
    data = datasets.load(args.data, args.data_dir)
    data = data.subset(args.train_size, args.test_size, seed=args.seed)
    if args.binarisation == "fresh" and data.binary:
        raise ValueError(
            f"the images of {args.data} are bits already: --binarisation fresh has nothing to draw"
        )
    train = data.train
    if args.binarisation == "static" and not data.binary:
        train = datasets.binarize(train, torch.Generator().manual_seed(args.seed))
    binary = data.binary or args.binarisation == "static"
    heldout = heldout_images(data, args.seed)
    return data, train.flatten(1), heldout.flatten(1), binary


def training_loss(args: argparse.Namespace, steps_per_epoch: int) -> ImportanceWeightedELBO:
    """The loss of the run, or the one it switches to, with the warm-up of the KL term."""
    keywords: dict[str, Any] = {}
    if args.kl_warmup:
        keywords["kl_weight"] = KLWarmup(max(1, round(args.kl_warmup * steps_per_epoch)))
    if args.compile:
        keywords["compile"] = True
    given = {name: getattr(args, name) for name in LOSS_OPTIONS}
    return make_loss(**{**given, "loss": args.switch_to or args.loss}, **keywords)


def load_checkpoint(folder: Path, settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The checkpoint of a run, whose settings of these names have to be the same.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, of another program or of other settings.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    saved = checkpoint.load(path, KIND)
    differing = [name for name in names if saved["settings"].get(name) != settings[name]]
    if differing:
        listed = ", ".join(
            f"{name} {saved['settings'].get(name)} (now {settings[name]})" for name in differing
        )
        raise ValueError(f"{path} was trained with {listed}")
    return saved


@torch.no_grad()
def evaluate(
    network: DeepVAE, heldout: Tensor, nll_particles: int, seed: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Held-out NLL by L_K and IWAE-64 in nats per datapoint, ESS, and active units, lowest layer first.

    Returns:
        These, and what they are means of: ``log_p``, ``iwae_bound`` and ``ess`` of every image, ``[N']``.
    """
    network.eval()
    bound = IWAE(min(IWAE_PARTICLES, nll_particles))
    sampler, batches = sampler_and_batches(network, heldout, nll_particles)
    with seeded(seed):
        evidence = sampler.log_marginal_dataset(batches, bound=bound)
        activity = active_units(network.guide, heldout.split(1000))
    layers = [activity[f"z{i}"] for i in range(1, len(network.encoders) + 1)]
    assert evidence.bounds is not None
    per_image = {"log_p": evidence.values, "iwae_bound": evidence.bounds, "ess": evidence.ess}
    results = {
        "heldout_nll": -evidence.mean,
        "nll_monte_carlo_error": evidence.monte_carlo_error,
        "nll_sampling_error": evidence.sampling_error,
        "iwae_particles": bound.K,
        "iwae_bound": evidence.mean + evidence.minus_kl,
        "minus_kl": evidence.minus_kl,
        "minus_kl_error": evidence.minus_kl_error,
        "ess": evidence.ess.double().mean().item(),
        "active_units": [layer.num_active for layer in layers],
        "units": [layer.variances.numel() for layer in layers],
    }
    return results, {name: values.cpu() for name, values in per_image.items()}


@torch.no_grad()
def save_pictures(
    network: DeepVAE, heldout: Tensor, data: ImageData, history: list[dict], args: argparse.Namespace
) -> None:
    """What the trained model makes of noise and of held-out images, and its learning curve."""
    with seeded(args.seed), pyro.plate("pictures", 64):
        samples = network.logits(network.sample_latents(heldout)).sigmoid()
    title = "Decoder means of prior draws"
    pictures.save_images(samples.reshape(-1, *data.image_shape), 8, title, args.out / "samples.png")
    originals = heldout[:24]
    rebuilt = network.logits(network.encoders[0](originals)[0]).sigmoid()
    images = (tensor.reshape(-1, *data.image_shape) for tensor in (originals, rebuilt))
    pictures.save_reconstructions(*images, args.out / "reconstructions.png")
    pictures.save_learning_curve(history, args.switch_to or args.loss, args.out / "learning_curve.png")


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """A scope in which matrix products on a GPU may take TensorFloat32."""
    before = torch.get_float32_matmul_precision()
    if name == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and complete the command line; exits with a message where it makes no sense."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--layers", type=positive_int, default=1, help="stochastic layers")
    add_loss_options(parser, "iwae", M=1, K=50)
    add(
        "--switch-to",
        choices=LOSSES,
        help="go on under this bound, with -M and -K, from --start-from",
    )
    add("--start-from", type=Path, help="folder of the trained run, for --switch-to")
    add("--kl-warmup", type=positive_float, help="epochs over which the KL term's weight grows to 1")
    add("--data", choices=datasets.NAMES, default="digits", help="the images")
    add("--data-dir", type=Path, default=Path("data"), help="where their files are; not for digits")
    add(
        "--binarisation",
        choices=("fresh", "static"),
        help="draw the training bits at every access, or once (default: fresh, unless the images are bits)",
    )
    add(
        "--epochs-scale",
        type=positive_float,
        default=1.0,
        help="factor on the schedule's 3280 epochs",
    )
    add(
        "--stop-after",
        type=positive_float,
        metavar="EPOCHS",
        help="stop there on the schedule, from where --resume with more can go on",
    )
    add(
        "--learning-rate",
        type=positive_float,
        default=1e-3,
        help="Adam's in the first stage; a tenth in the last",
    )
    add("--batch-size", type=positive_int, default=20, help="images a gradient step")
    add(
        "--checkpoint-every",
        type=positive_int,
        default=10_000,
        help="gradient steps; and every stage",
    )
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--device", type=torch_device, default="cpu", help="a torch device, such as cuda")
    add("--precision", choices=PRECISIONS, default="float32", help="of the networks' matrix products")
    add(
        "--compile",
        action="store_true",
        help="run the gradient step as one compiled program; goes on after --resume to rounding only",
    )
    add("--seed", type=int, default=0, help="of everything random")
    add("--nll-particles", type=positive_int, default=5000, help="draws an image for the NLL")
    annealed.add_annealed_options(parser)
    add("--train-size", type=positive_int, help="use that many training images")
    add("--test-size", type=positive_int, help="use that many held-out images")
    add("--out", type=Path, help="folder for the results (default: results/deep-<data>-<layers>-<loss>)")
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    args = at_smoke_size(parser.parse_args(argv), SMOKE)
    if (args.switch_to is None) != (args.start_from is None):
        parser.error("--switch-to and --start-from go together")
    if args.binarisation is None:
        args.binarisation = "static" if args.data == "binarized-mnist" else "fresh"
    if args.out is None:
        name = f"{args.loss}-to-{args.switch_to}" if args.switch_to else args.loss
        # Apart from the others, which would take a smoke run's checkpoint for one of theirs.
        args.out = results_folder(f"deep-{args.data}-{args.layers}-{name}", args.smoke)
    return args


def run(args: argparse.Namespace) -> dict:
    """Load, train, evaluate and write the folder ``args.out``; returns what ``metrics.json`` holds."""
    data, images, heldout, binary = load_data(args)
    settings: dict[str, Any] = dict(as_settings(args))
    settings["data_checksum"] = zlib.crc32(heldout.numpy(), zlib.crc32(images.numpy()))
    settings["device_type"] = args.device.type
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "checkpoint.pt"
    if path.exists() and not args.resume:
        raise FileExistsError(f"{path} is there already: go on with --resume, or name another --out")

    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    bfloat16 = args.precision == "bfloat16"
    network = DeepVAE(images.shape[1], layer_widths(args.layers), images.mean(0), bfloat16).to(args.device)
    images, heldout = images.to(args.device), heldout.to(args.device)
    loss = training_loss(args, -(-len(images) // args.batch_size))
    trainer = Trainer(network, loss, images, binary=binary, batch_size=args.batch_size, seed=args.seed)
    metrics: dict[str, Any] = {"settings": settings, "before_switch": None, "results": None}
    if path.exists():
        saved = load_checkpoint(args.out, settings, MODEL_SETTINGS + TRAINING_SETTINGS)
        trainer.load_state(saved["training"])
        metrics["before_switch"] = saved["before_switch"]
    elif args.switch_to:
        trainer.load_state(load_checkpoint(args.start_from, settings, MODEL_SETTINGS)["training"])
        metrics["before_switch"], _ = evaluate(network, heldout, args.nll_particles, args.seed)
        metrics["before_switch"]["step"] = trainer.step
        trainer.restart()
    # After a switch, as in the paper, another 3^7 epochs at the last learning rate.
    first = 7 if args.switch_to else 0
    stages = schedule(trainer.steps_per_epoch, args.epochs_scale, args.learning_rate, first)
    if args.stop_after is not None:
        stages = cut(stages, max(1, round(args.stop_after * trainer.steps_per_epoch)))

    def save() -> None:
        state = {"settings": settings, "before_switch": metrics["before_switch"], "training": trainer.state()}
        checkpoint.save(path, KIND, state)
        checkpoint.write_json(args.out / "metrics.json", {**metrics, "history": trainer.history})

    trainer.run(
        stages,
        heldout,
        seed=args.seed,
        save=save,
        save_every=args.checkpoint_every,
        description=f"{args.switch_to or args.loss} on {args.data}",
    )
    start = time.perf_counter()
    metrics["results"], per_image = evaluate(network, heldout, args.nll_particles, args.seed)
    metrics["results"]["steps"] = trainer.step
    metrics["results"]["training_seconds"] = sum(record["seconds"] for record in trainer.history)
    if args.ais:
        network.eval()
        metrics["results"]["annealed"], _ = annealed.annealed_report(
            network, heldout, per_image["log_p"], args
        )
    metrics["results"]["evaluation_seconds"] = time.perf_counter() - start
    metrics["history"] = trainer.history
    save_pictures(network, heldout, data, trainer.history, args)
    checkpoint.write_arrays(args.out / "heldout.npz", per_image)
    checkpoint.write_json(args.out / "metrics.json", metrics)
    return metrics


def summary(results: dict[str, Any]) -> str:
    """NLL and active units in one line, as the paper has them."""
    units = "+".join(map(str, results["active_units"]))
    error = results["nll_monte_carlo_error"]
    return f"NLL {results['heldout_nll']:.3f} ± {error:.3f} by the draws, active units {units}"


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    try:
        with matmul_precision(args.precision):
            metrics = run(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print(f"interrupted: --resume goes on from the checkpoint in {args.out}", file=sys.stderr)
        raise SystemExit(130) from None
    if metrics["before_switch"]:
        print(f"before the switch: {summary(metrics['before_switch'])}")
    results = metrics["results"]
    print(f"{args.switch_to or args.loss} on {args.data}: {summary(results)}")
    if "annealed" in results:
        for name, value in annealed.annealed_lines(results["annealed"], args.nll_particles):
            print(f"{name:<25}{value}")
    per_step = 1000 * results["training_seconds"] / results["steps"]
    print(f"{results['steps']} steps of {per_step:.2f} ms in {args.out}")
    return metrics


if __name__ == "__main__":
    main()
