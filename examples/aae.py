"""Adversarial autoencoders: the six uses of Makhzani et al. (1511.05644), as modes.

``unsupervised`` matches the codes of images to a prior: a Gaussian, a mixture, a swiss roll. ``steered``
gives each class a part of the prior, from a few labels. ``supervised`` tells the decoder the class of every
image, which leaves the style to the code. ``semi-supervised`` splits images into class and style from a few
labels, ``clustering`` does so without any, and ``reduction`` puts the clusters into a plane. Try::

    python examples/aae.py --mode clustering                       # on 8×8 digits, under a minute
    python examples/aae.py --mode semi-supervised --seeds 5        # beside a classifier of the same labels
    python examples/aae.py --mode unsupervised --prior swiss-roll
    python examples/aae.py --mode steered --labels 100 --epochs 400
    python examples/aae.py --mode supervised --data svhn --data-dir data --device cuda
    python examples/aae.py --mode reduction --data mnist --hidden 1000 --out results/plane --resume

A run can be killed at any time; ``--resume`` goes on to the bit. Losses are in nats per image.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import pyro
import torch

from shared import checkpoint, datasets
from shared.aae import evaluation, pictures
from shared.aae.layers import Convolutional, FullyConnected
from shared.aae.networks import ClassAAE, HeadsAAE, LatentAAE
from shared.aae.priors import COMPONENTS, PRIORS
from shared.aae.training import Data, Trainer, choose_labelled, train_classifier
from shared.evaluation import seeded
from shared.options import as_settings, at_smoke_size, new_parser, positive_float, positive_int, torch_device
from shared.running import results_folder

KIND = "examples/aae.py"
DATA = ("digits", "mnist", "fashion-mnist", *datasets.COLOUR)
# What a mode does where the command line does not say.
DEFAULTS: dict[str, dict[str, Any]] = {
    "unsupervised": {"prior": "gaussian", "noise": 0.0, "epochs": 200},
    "steered": {"prior": "mixture", "noise": 0.1, "labels": 300, "epochs": 200},
    "supervised": {"latent": 10, "noise": 0.1},
    "semi-supervised": {"latent": 10, "noise": 0.3, "labels": 100},
    "clustering": {"latent": 5, "noise": 0.1, "clusters": 16},
    "reduction": {"latent": 2, "noise": 0.1, "clusters": 20},
}
# Where the code, or a part of it, is a style.
STYLED = ("supervised", "semi-supervised", "clustering")
# Where a mode has none of its own.
EPOCHS, LATENT = 100, 2
# In more dims than this the style of 8×8 images holds their class too.
DIGITS_LATENT = 3
# The style of a photograph has more to hold: colours, light, the digits to the left and right.
COLOUR_LATENT = 20
# On colours.
COLOUR_LABELS, COLOUR_CHANNELS = 1000, 32
# The paper's, for its Parzen windows.
GAUSSIAN_LATENT = 8
SMOKE = {"train_size": 120, "test_size": 40, "epochs": 2, "hidden": 16, "parzen_samples": 100, "labels": 30}
# Of the training images, for the bandwidth of the Parzen windows alone.
VALIDATION_SHARE = 0.1
# Images that a two-sample test takes at least.
FEWEST = 20
# How far apart the heads of a reduction are to be, in standard deviations of the style.
DISTANCE = 5.0
# What may differ when a run goes on.
FREE_SETTINGS = ("seeds", "resume", "out", "checkpoint_every", "data_dir", "device", "parzen_samples")


def load_data(args: argparse.Namespace, seed: int) -> Data:
    """The set as it is; the rows that are labelled depend on the seed."""
    data = datasets.load(args.data, args.data_dir, extra=bool(args.extra))
    data = data.subset(args.train_size, args.test_size, seed=seed)
    assert data.train_labels is not None
    assert data.test_labels is not None
    generator = torch.Generator().manual_seed(seed)
    images, labels = data.train.flatten(1), data.train_labels
    left_out = round(len(images) * VALIDATION_SHARE) if args.mode == "unsupervised" else 0
    order = torch.randperm(len(images), generator=generator)
    validation, kept = images[order[:left_out]], order[left_out:]
    images, labels = images[kept].to(args.device), labels[kept].to(args.device)
    few = None
    if args.labels:
        rows = choose_labelled(labels.cpu(), args.labels, generator).to(args.device)
        few = images[rows], labels[rows]
    rest = (tensor.to(args.device) for tensor in (data.test.flatten(1), data.test_labels, validation))
    return Data(images, labels, *rest, few, data.image_shape)


def make_pair(args: argparse.Namespace, shape: tuple[int, ...]) -> LatentAAE | HeadsAAE | ClassAAE:
    layers = Convolutional(shape, args.channels) if args.channels else FullyConnected(math.prod(shape))
    if args.mode == "supervised":
        return ClassAAE(layers, COMPONENTS, args.latent, args.hidden, args.noise)
    if args.prior:
        prior = PRIORS[args.prior](args.latent)
        return LatentAAE(layers, prior, args.hidden, args.noise, steered=args.mode == "steered")
    heads = COMPONENTS if args.labels else args.clusters
    distance = DISTANCE if args.mode == "reduction" else None
    return HeadsAAE(layers, heads, args.latent, args.hidden, args.noise, distance)


def compare_classifier(data: Data, args: argparse.Namespace, seed: int, steps: int) -> dict[str, float]:
    """The error of the same classifier trained on the labels alone, with as many steps of the same kind."""
    assert data.few is not None
    with seeded(seed):
        pair = make_pair(args, data.shape).to(args.device)
        options = {"batch_size": args.batch_size, "learning_rate": args.learning_rate, "seed": seed}
        train_classifier(pair.encoder, data.few, steps=steps, **options)
        pair.eval()
        with torch.no_grad():
            predicted = pair.encoder.logits(data.heldout).argmax(-1)
    return {"error_labels_alone": evaluation.error(predicted, data.heldout_labels)}


def run_seed(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Train, evaluate and write one folder; returns its ``results`` and ``history``."""
    data = load_data(args, seed)
    settings = {name: value for name, value in as_settings(args).items() if name not in FREE_SETTINGS}
    settings |= {"seed": seed, "data_checksum": zlib.crc32(data.images.cpu().numpy())}
    settings["device_type"] = args.device.type  # a generator's state is of one kind of device
    path = folder / "checkpoint.pt"
    if path.exists() and not args.resume:
        raise FileExistsError(f"{path} is there already: go on with --resume, or name another --out")
    folder.mkdir(parents=True, exist_ok=True)

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    pair = make_pair(args, data.shape).to(args.device)
    options = {name: getattr(args, name) for name in ("hidden", "batch_size", "epochs", "learning_rate")}
    known = data.labels if args.mode == "supervised" else None
    trainer = Trainer(pair, data.images, data.few, labels=known, seed=seed, **options)
    if path.exists():
        saved = checkpoint.load(path, KIND)
        if differing := [name for name, value in settings.items() if saved["settings"].get(name) != value]:
            listed = ", ".join(f"{n} {saved['settings'].get(n)} (now {settings[n]})" for n in differing)
            raise ValueError(f"{path} was trained with {listed}")
        trainer.load_state(saved["training"])

    def save() -> None:
        checkpoint.save(path, KIND, {"settings": settings, "training": trainer.state()})

    description = f"{args.mode} on {args.data}, seed {seed}"
    options = {"save_every": args.checkpoint_every, "description": description}
    trainer.run(save=save, measure=lambda: evaluation.classification_error(pair, data), **options)
    results = evaluation.evaluate(pair, data, args.mode, parzen_samples=args.parzen_samples, seed=seed)
    if args.mode == "semi-supervised":
        results |= compare_classifier(data, args, seed, trainer.step)
        results["error_difference"] = results["error"] - results["error_labels_alone"]
    results["training_seconds"] = sum(record["seconds"] for record in trainer.history)
    plane = args.mode == "reduction" and args.latent == 2
    pictures.save_all(pair, data, trainer.history, plane=plane, seed=seed, folder=folder)
    metrics = {"settings": settings, "results": results, "history": trainer.history}
    checkpoint.write_json(folder / "metrics.json", metrics)
    return metrics


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every seed in a folder of its own; returns what ``metrics.json`` above them holds."""
    for folder in (args.out, *args.out.parents):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"--out {args.out}: {folder} is a file, name a folder")
    seeds = range(args.seed, args.seed + args.seeds)
    runs = [run_seed(args, seed, args.out / f"seed-{seed}") for seed in seeds]
    metrics = {
        "settings": as_settings(args),
        "summary": evaluation.summarise(metrics["results"] for metrics in runs),
        "runs": runs,
    }
    checkpoint.write_json(args.out / "metrics.json", metrics)
    return metrics


def by_mode(name: str) -> str:
    """The defaults of an option in the modes that have one of their own."""
    return ", ".join(f"{values[name]} in {mode}" for mode, values in DEFAULTS.items() if name in values)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and complete the command line; exits with a message where it makes no sense."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--mode", choices=DEFAULTS, default="unsupervised", help="which of the paper's uses")
    add("--prior", choices=PRIORS, help=f"of the code (default: {by_mode('prior')})")
    labels = (
        f"images whose class is known (default: {by_mode('labels')}, or {COLOUR_LABELS} of svhn; "
        "optional in reduction, without default)"
    )
    add("--labels", type=positive_int, help=labels)
    clusters = f"heads where there are no labels (default: {by_mode('clusters')})"
    add("--clusters", type=positive_int, help=clusters)
    latent = (
        f"dimension of the code, or of the style (default: {GAUSSIAN_LATENT} in unsupervised with a gaussian "
        f"prior, else {LATENT}; {by_mode('latent')}; of these, at most {DIGITS_LATENT} on digits; "
        f"of a style {COLOUR_LATENT} on svhn)"
    )
    add("--latent", type=positive_int, help=latent)
    noise = f"standard deviation of what is added to the encoder's images (default: {by_mode('noise')})"
    add("--noise", type=float, help=noise)
    add("--data", choices=DATA, default="digits", help="the images")
    add("--data-dir", type=Path, default=Path("data"), help="where their files are; not for digits")
    add("--hidden", type=positive_int, default=256, help="width of both hidden layers; 1000 in the paper")
    channels = (
        f"of the finest convolution (default: {COLOUR_CHANNELS} on svhn; else all layers are fully connected)"
    )
    add("--channels", type=positive_int, help=channels)
    # None without it, as in the settings of checkpoints that know nothing of it.
    extra = "add the 531131 extra images of svhn to the training images: 8 GB, and twice that in the making"
    add("--extra", action="store_true", default=None, help=extra)
    epochs = f"passes over the training images (default: {by_mode('epochs')}; else {EPOCHS})"
    add("--epochs", type=positive_int, help=epochs)
    add("--batch-size", type=positive_int, default=100, help="images a step, and labelled ones beside")
    add("--learning-rate", type=positive_float, default=1e-3, help="of all phases, at first")
    add("--parzen-samples", type=positive_int, default=10_000, help="draws for the Parzen windows")
    add("--train-size", type=positive_int, help="use that many training images")
    add("--test-size", type=positive_int, help="use that many held-out images")
    add("--checkpoint-every", type=positive_int, default=2000, help="steps; and at the end")
    add("--resume", action="store_true", help="go on from the checkpoints in --out, if there are any")
    add("--device", type=torch_device, default="cpu", help="a torch device, such as cuda")
    add("--seed", type=int, default=0, help="of everything random; of the first run, if there are more")
    add("--seeds", type=positive_int, default=1, help="runs")
    add(
        "--out",
        type=Path,
        help="folder for the results (default: results/aae-<mode>-<data>, of a smoke run in results/smoke; "
        "a prior other than the mode's, or the labels of a reduction, are named after the mode)",
    )
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    args = parser.parse_args(argv)
    complete(args, parser)
    return args


def complete(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in the defaults of the mode, and refuse what the mode does not have."""
    defaults = {"epochs": EPOCHS, "latent": LATENT, **DEFAULTS[args.mode]}
    if args.mode == "reduction" and args.labels:
        del defaults["clusters"]  # the heads are the classes
    elif args.data == "digits":
        defaults["latent"] = min(defaults["latent"], DIGITS_LATENT)
    if args.data in datasets.COLOUR:
        args.channels = args.channels or COLOUR_CHANNELS
        if args.mode in STYLED:
            defaults["latent"] = COLOUR_LATENT
        if args.mode == "semi-supervised":
            defaults["labels"] = COLOUR_LABELS
    elif args.extra:
        parser.error(f"--extra: only svhn has extra images, not --data {args.data}")
    if (args.prior or defaults.get("prior")) == "gaussian":
        defaults["latent"] = GAUSSIAN_LATENT
    for name in ("prior", "labels", "clusters", "latent", "noise", "epochs"):
        given = getattr(args, name)
        if given is None:
            setattr(args, name, defaults.get(name))
        elif name not in defaults and (args.mode, name) != ("reduction", "labels"):
            few = " with --labels" if args.mode == "reduction" and args.labels else ""
            parser.error(f"--{name} is not for --mode {args.mode}{few}")
    if args.prior in ("mixture", "swiss-roll") and args.latent != 2:
        parser.error(f"--prior {args.prior} is in the plane: --latent is 2, not {args.latent}")
    if args.mode == "steered" and args.prior == "gaussian":
        parser.error("--mode steered needs a prior with parts: --prior mixture or swiss-roll")
    if not 0 <= args.noise < math.inf:
        parser.error(f"--noise is a standard deviation, at least 0, not {args.noise}")
    if args.clusters == 1:
        parser.error("--clusters: there is nothing to tell apart in one")
    if args.batch_size == 1:
        parser.error("--batch-size: batch normalisation needs two images at least")
    if min(args.train_size or FEWEST, args.test_size or FEWEST) < FEWEST:
        parser.error(f"--train-size and --test-size: at least {FEWEST}, to compare codes with the prior")
    # Where a mode takes no labels, it takes none in a smoke run.
    at_smoke_size(args, {name: size for name, size in SMOKE.items() if name != "labels" or args.labels})
    if args.out is None:
        args.out = default_folder(args)


def default_folder(args: argparse.Namespace) -> Path:
    """One for each kind of run, so that none finds the checkpoint of another."""
    parts = ["aae", args.mode]
    if args.prior != DEFAULTS[args.mode].get("prior"):
        parts.append(args.prior)
    if args.mode == "reduction" and args.labels:
        parts.append("labels")
    return results_folder("-".join([*parts, args.data]), args.smoke)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    try:
        metrics = run(args)
    except (OSError, ValueError) as error:
        # The system's own errors come with a number that tells nobody anything.
        plain = isinstance(error, OSError) and error.strerror and error.filename
        raise SystemExit(
            f"error: {error.filename}: {error.strerror}" if plain else f"error: {error}"
        ) from None
    except KeyboardInterrupt:
        print(f"interrupted: --resume goes on from the checkpoint in {args.out}", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"{args.mode} on {args.data}, {count(args.epochs, 'epoch')}, {count(args.seeds, 'run')}")
    print(evaluation.table(metrics["summary"]))
    over = "the runs" if args.seeds > 1 else "the held-out images"
    print(
        f"± is a standard error over {over}; a two-sample accuracy of 0.5 is a perfect match with the prior"
    )
    for run_metrics in metrics["runs"]:
        print(*sorted((args.out / f"seed-{run_metrics['settings']['seed']}").iterdir()), sep="\n")
    print(args.out / "metrics.json")
    return metrics


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    main()
