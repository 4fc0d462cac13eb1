"""The VAE of vae.py on several processes, which divide the images, the particles of each, or both.

A mesh of D × P processes: D parts of the images, and P parts of the M·K particles of every image. One process
or many, a laptop's CPU or GPUs, the script is the same::

    python examples/distributed_vae.py                                    # one process
    torchrun --nproc_per_node 2 examples/distributed_vae.py               # 2 parts of the images
    torchrun --nproc_per_node 4 examples/distributed_vae.py --particle-ranks 2        # a mesh of 2 × 2
    torchrun --nproc_per_node 8 examples/distributed_vae.py --device cuda --data mnist

Three things make it so: ``particle_group=`` tells the loss and the sampler who shares the particles;
``DistributedDataParallel`` around ``loss(model, guide)`` averages gradients over all processes; and the plate
knows how many images there are, ``plate("data", N, len(x))``, so that the average is the gradient on all.

After every epoch the folder ``--out`` gets a checkpoint by ``torch.distributed.checkpoint``, from which
``--resume`` goes on, with as many processes as there are then. With the same number of data ranks the
particles, and so the parameters, are the same whatever the number of particle ranks.

All bounds are reported in nats per datapoint.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from pyro_iw import ImportanceSampler, ImportanceWeightedELBO
from shared import checkpoint, datasets
from shared.datasets import ImageData, binarize, heldout_images
from shared.evaluation import EVALUATION_BATCH, EVALUATION_ROWS, plus_minus
from shared.networks import Encoder, mlp
from shared.options import (
    add_loss_options,
    as_settings,
    at_smoke_size,
    loss_of,
    new_parser,
    positive_float,
    positive_int,
)
from shared.running import Diverged, in_one_line, results_folder

SMOKE = {
    "train_size": 100,
    "test_size": 30,
    "epochs": 2,
    "batch_size": 25,
    "nll_particles": 50,
    "hidden": 20,
    "latent": 5,
}


class Model(nn.Module):
    """p(z) = N(0, I), p(x | z) = Bernoulli(decoder(z))."""

    def __init__(self, mean_image: Tensor, latent: int, hidden: int) -> None:
        super().__init__()
        self.latent = latent
        self.decoder = mlp(latent, hidden, hidden, len(mean_image))
        with torch.no_grad():
            self.decoder[-1].bias.copy_(mean_image.clamp(0.001, 0.999).logit())

    def forward(self, x: Tensor, num_images: int | None = None) -> None:
        """A minibatch ``x`` of so many images; of all of them, if that is not said."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", num_images or len(x), len(x)):
            loc = x.new_zeros(self.latent)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            pixels = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=x)


class Guide(nn.Module):
    """q(z | x)."""

    def __init__(self, pixels: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.encoder = Encoder(pixels, latent, hidden)

    def forward(self, x: Tensor, num_images: int | None = None) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", num_images or len(x), len(x)):
            loc, scale = self.encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """What this script and its version under Lightning ask for alike."""
    add = parser.add_argument
    add("--particle-ranks", type=positive_int, default=1, help="P, the parts of the particles")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cpu talks by gloo, cuda by NCCL")
    add_loss_options(parser)
    add("--latent", type=positive_int, default=50, help="dimension of z")
    add("--hidden", type=positive_int, default=200, help="width of both hidden layers")
    add("--data", choices=datasets.NAMES, default="digits", help="the images")
    add("--data-dir", type=Path, default=Path("data"), help="where their files are; not for digits")
    add("--epochs", type=positive_int, default=20, help="passes over the training images")
    add("--batch-size", type=positive_int, default=20, help="images a gradient step and data rank")
    add("--learning-rate", type=positive_float, default=1e-3, help="Adam's")
    add("--seed", type=int, default=0, help="of everything random")
    add("--nll-particles", type=positive_int, default=1000, help="draws an image for the NLL, of all ranks")
    add("--train-size", type=positive_int, help="use that many training images")
    add("--test-size", type=positive_int, help="use that many held-out images")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data-ranks", type=positive_int, help="D, the parts of the images (default: what P leaves)")
    add(
        "--chunk-size",
        type=positive_int,
        help="particles in memory at once, and drawn from a stream of their own (default: 8, and all of them "
        "with --backward-particles)",
    )
    add_training_options(parser)
    add("--out", type=Path, help="folder for the results (default: results/distributed-vae-<data>-<loss>)")
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = at_smoke_size(make_parser().parse_args(argv), SMOKE)
    if args.chunk_size is None and args.backward_particles is None:
        args.chunk_size = 8
    if args.out is None:
        args.out = results_folder(f"distributed-vae-{args.data}-{args.loss}", args.smoke)
    return args


# ----------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------


def join_processes(device: str) -> None:
    """Meet the processes that torchrun has started; without torchrun there is this one alone."""
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def make_mesh(args: argparse.Namespace) -> DeviceMesh:
    """The mesh of D × P processes.

    Raises:
        ValueError: If these are more or fewer than there are.
    """
    world, particles = torch.distributed.get_world_size(), args.particle_ranks
    data = args.data_ranks or max(world // particles, 1)
    if data * particles != world:
        raise ValueError(
            f"--data-ranks {data} times --particle-ranks {particles} are {data * particles} processes, but "
            f"{world} have been started (torchrun --nproc_per_node)"
        )
    return init_device_mesh(args.device, (data, particles), mesh_dim_names=("data", "particles"))


# ----------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------


class Training:
    """A model, its guide, and how far their training has come.

    Arguments:
        args: From :func:`parse_args`.
        mesh: The processes.
        images: Training probabilities, ``[N, D]``, all of them.
        binary: Whether these are binarised already.
    """

    def __init__(self, args: argparse.Namespace, mesh: DeviceMesh, images: Tensor, binary: bool) -> None:
        self.args, self.mesh, self.images, self.binary = args, mesh, images, binary
        pyro.set_rng_seed(args.seed)  # the same on all ranks: they begin with the same parameters
        self.model = Model(images.mean(0), args.latent, args.hidden).to(args.device)
        self.guide = Guide(images.shape[1], args.latent, args.hidden).to(args.device)
        loss: ImportanceWeightedELBO = loss_of(
            args, chunk_size=args.chunk_size, particle_group=mesh["particles"]
        )
        self.elbo = DistributedDataParallel(loss(self.model, self.guide))
        self.optimiser = torch.optim.Adam(self.elbo.parameters(), lr=args.learning_rate)
        self.history: list[dict[str, float]] = []
        # A loss gets to know its pair in its first run, by draws of its own: before training, and so in a run
        # that is resumed as in one that is not.
        loss.loss(self.model, self.guide, images[:2].to(args.device), len(images))

    def run_epoch(self) -> None:
        """Every data rank takes its part of the images, and particle ranks the same one."""
        epoch, data_rank = len(self.history), self.mesh["data"].get_local_rank()
        start = time.perf_counter()
        # From the seed, the epoch and the rank alone: a run that was resumed draws what it would have drawn.
        pyro.set_rng_seed(self._seed(epoch, data_rank, self.mesh["particles"].get_local_rank()))
        generator = torch.Generator(self.images.device).manual_seed(self._seed(epoch, data_rank))
        part = DistributedSampler(self.images, self.mesh["data"].size(), data_rank, seed=self.args.seed)
        part.set_epoch(epoch)
        total = torch.zeros(2, device=self.args.device)
        for rows in torch.tensor(list(part)).split(self.args.batch_size):
            batch = self.images[rows]
            batch = (batch if self.binary else binarize(batch, generator)).to(self.args.device)
            loss = self.elbo(batch, len(self.images)) / len(self.images)  # a mean over all images
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            total += torch.stack([-loss.detach() * len(rows), loss.new_tensor(float(len(rows)))])
        torch.distributed.all_reduce(total)
        bound = (total[0] / total[1]).item()
        if not math.isfinite(bound):
            raise Diverged(f"training diverged: the bound is {bound}. Lower --learning-rate.")
        seconds = time.perf_counter() - start
        self.history.append({"epoch": epoch + 1, "train_bound": bound, "seconds": seconds})

    def _seed(self, *names: int) -> int:
        """A seed for each epoch and rank."""
        return hash((self.args.seed, *names)) % 2**31

    # What a checkpoint holds does not depend on the ranks: all of them have the same parameters.

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the epochs so far, in the place of those before."""
        model, optimiser = get_state_dict(self.elbo, self.optimiser)
        state = {"model": model, "optimiser": optimiser, "history": self.history}
        place = folder / f"epoch-{len(self.history):05}"
        dcp.save(state, checkpoint_id=place)
        if torch.distributed.get_rank() == 0:
            for older in sorted(folder.glob("epoch-*")):
                if older != place:
                    shutil.rmtree(older)
        torch.distributed.barrier()

    def load(self, folder: Path) -> None:
        """Go on from the last checkpoint in a folder.

        Raises:
            FileNotFoundError: If there is none.
        """
        # The last thing that is written of a checkpoint is its metadata.
        places = sorted(path.parent for path in folder.glob("epoch-*/.metadata"))
        if not places:
            raise FileNotFoundError(f"there is no checkpoint in {folder} to --resume from")
        model, optimiser = get_state_dict(self.elbo, self.optimiser)
        history = [dict.fromkeys(("epoch", "train_bound", "seconds"), 0.0)] * int(places[-1].name[6:])
        state = {"model": model, "optimiser": optimiser, "history": [*map(dict, history)]}
        dcp.load(state, checkpoint_id=places[-1])
        set_state_dict(
            self.elbo, self.optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"]
        )
        self.history = state["history"]


# ----------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------


def evaluate(training: Training, heldout: Tensor) -> dict[str, float]:
    """The held-out log-likelihood: data ranks have a part of the images, particle ranks of the particles."""
    args, mesh = training.args, training.mesh
    pyro.set_rng_seed(args.seed)
    sampler = ImportanceSampler(
        training.model,
        training.guide,
        args.nll_particles,
        chunk_size=min(EVALUATION_ROWS // EVALUATION_BATCH, max(1, args.nll_particles // 8)),
        particle_group=mesh["particles"],
    )
    part = DistributedSampler(heldout, mesh["data"].size(), mesh["data"].get_local_rank(), shuffle=False)
    loader = DataLoader(heldout, EVALUATION_BATCH, sampler=part)
    found = sampler.log_marginal_dataset(loader, lambda x: x.to(args.device), data_group=mesh["data"])
    return {
        "heldout_nll": -found.mean,
        "nll_monte_carlo_error": found.monte_carlo_error,
        "heldout_images": len(found.values),
    }


def run(args: argparse.Namespace) -> dict:
    """Load, train, evaluate, and write the folder ``args.out``.

    Returns:
        What ``metrics.json`` holds, on every rank.
    """
    mesh = make_mesh(args)
    data: ImageData = datasets.load(args.data, args.data_dir)
    data = data.subset(args.train_size, args.test_size, seed=args.seed)
    pyro.clear_param_store()
    training = Training(args, mesh, data.train.flatten(1), data.binary)
    folder = args.out / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    if args.resume:
        training.load(folder)
    while len(training.history) < args.epochs:
        training.run_epoch()
        training.save(folder)
        if torch.distributed.get_rank() == 0:
            record = training.history[-1]
            print(f"epoch {record['epoch']:<4}bound {record['train_bound']:.2f}, {record['seconds']:.1f} s")
    results = evaluate(training, heldout_images(data, args.seed).flatten(1))
    results["train_bound"] = training.history[-1]["train_bound"]
    settings = {**as_settings(args), "mesh": list(mesh.shape)}
    metrics = {"settings": settings, "history": training.history, "results": results}
    if torch.distributed.get_rank() == 0:
        checkpoint.write_json(args.out / "metrics.json", metrics)
    return metrics


def summary(metrics: dict) -> str:
    """The results as a table to print."""
    settings, results = metrics["settings"], metrics["results"]
    nll = plus_minus(results["heldout_nll"], results["nll_monte_carlo_error"])
    data, particles = settings["mesh"]
    rows = [
        ("processes", f"{data} parts of the images × {particles} parts of the particles"),
        ("training bound", f"{results['train_bound']:.2f} nats per datapoint (last epoch)"),
        ("held-out NLL", f"{nll} nats, {settings['nll_particles']} draws"),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with in_one_line(OSError, ValueError, kept="--resume goes on from the last epoch"):
        joined = not torch.distributed.is_initialized()
        if joined:
            join_processes(args.device)
        try:
            metrics = run(args)
            if torch.distributed.get_rank() == 0:
                print(f"{args.loss} on {args.data}, {args.epochs} epochs\n{summary(metrics)}")
        finally:
            if joined:
                torch.distributed.destroy_process_group()
    return metrics


if __name__ == "__main__":
    main()
