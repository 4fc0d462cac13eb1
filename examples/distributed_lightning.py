"""The VAE of distributed_vae.py under Lightning, which brings the processes, the loop and the checkpoints.

It needs the extra ``lightning``. One process or many, started by Lightning or by torchrun::

    python examples/distributed_lightning.py                              # one process
    python examples/distributed_lightning.py --devices 2                  # 2 parts of the images
    torchrun --nproc_per_node 2 examples/distributed_lightning.py         # the same
    torchrun --nproc_per_node 4 examples/distributed_lightning.py --particle-ranks 2      # a mesh of 2 × 2

A training step is ``self.elbo(batch, N)``, the loss of the pair as a module. Lightning wraps it in
``DistributedDataParallel``, so that all that distributed_vae.py says of ranks holds here. What is left to do:
a seed of its own for each rank, and with ``--particle-ranks`` a sampler that knows the data ranks.

All bounds are reported in nats per datapoint.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.distributed
from distributed_vae import SMOKE, Guide, Model, add_training_options
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler

from pyro_iw import ImportanceSampler
from pyro_iw._support.optional import require
from shared import datasets
from shared.datasets import heldout_images
from shared.evaluation import EVALUATION_BATCH, plus_minus
from shared.options import at_smoke_size, loss_of, new_parser, positive_int
from shared.running import Diverged, in_one_line, results_folder

lightning = require("lightning", "lightning", "examples/distributed_lightning.py")


class Training(lightning.LightningModule):
    """Model, guide and loss, as Lightning wants them.

    Arguments:
        args: From :func:`parse_args`.
        images: Training probabilities, ``[N, D]``.
        heldout: Held-out bits, ``[N', D]``.
    """

    def __init__(self, args: argparse.Namespace, images: Tensor, heldout: Tensor) -> None:
        super().__init__()
        self.args, self.images, self.heldout = args, images, heldout
        # In a tuple, for their parameters are to be those of the loss alone.
        self.pair = (
            Model(images.mean(0), args.latent, args.hidden),
            Guide(images.shape[1], args.latent, args.hidden),
        )
        self.mesh: DeviceMesh | None = None

    def setup(self, stage: str) -> None:
        """Called once the processes know of one another, before Lightning looks for parameters."""
        if torch.distributed.is_initialized():
            world, particles = torch.distributed.get_world_size(), self.args.particle_ranks
            if world % particles:
                raise ValueError(f"--particle-ranks {particles} does not divide the {world} processes")
            kind = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            shape = (world // particles, particles)
            self.mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "particles"))
        elif self.args.particle_ranks > 1:
            raise ValueError(f"--particle-ranks {self.args.particle_ranks} needs as many --devices")
        group = self.mesh["particles"] if self.mesh else None
        self.loss = loss_of(self.args, particle_group=group)
        self.elbo = self.loss(*self.pair)  # whose state, the loss's clock too, is in checkpoints

    def loader(self, images: Tensor, batch_size: int, shuffle: bool) -> DataLoader:
        """This data rank's part of the images."""
        ranks, rank = (self.mesh["data"].size(), self.mesh["data"].get_local_rank()) if self.mesh else (1, 0)
        sampler = DistributedSampler(images, ranks, rank, shuffle=shuffle, seed=self.args.seed)
        return DataLoader(images, batch_size, sampler=sampler)

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.images, self.args.batch_size, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimiser = torch.optim.Adam(self.elbo.parameters(), lr=self.args.learning_rate)
        self.loss.count_steps_of(optimiser)  # also where gradients are accumulated
        return optimiser

    def on_train_start(self) -> None:
        pyro.set_rng_seed(self.args.seed + 1 + self.global_rank)
        data_rank = self.mesh["data"].get_local_rank() if self.mesh else 0
        self.bits = torch.Generator(self.device).manual_seed(self.args.seed + data_rank)

    def training_step(self, batch: Tensor) -> Tensor:
        batch = datasets.binarize(batch, self.bits)  # the same on all particle ranks
        loss = self.elbo(batch, len(self.images)) / len(self.images)
        self.log("bound", -loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch))
        return loss

    def on_train_epoch_end(self) -> None:
        bound = self.trainer.callback_metrics["bound"].item()
        if not math.isfinite(bound):
            raise Diverged(f"training diverged: the bound is {bound}. Lower --learning-rate.")
        if self.trainer.is_global_zero:
            print(f"epoch {self.current_epoch + 1:<4}bound {bound:.2f}")

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """The held-out log-likelihood, the same on all ranks, each of which does its part."""
        groups = {name: self.mesh[name] if self.mesh else None for name in ("data", "particles")}
        pyro.set_rng_seed(self.args.seed)
        sampler = ImportanceSampler(
            *self.pair,
            self.args.nll_particles,
            chunk_size=max(1, self.args.nll_particles // 8),
            particle_group=groups["particles"],
        )
        found = sampler.log_marginal_dataset(
            self.loader(self.heldout, EVALUATION_BATCH, shuffle=False),
            lambda x: x.to(self.device),
            data_group=groups["data"],
        )
        return {"heldout_nll": -found.mean, "nll_monte_carlo_error": found.monte_carlo_error}

    def on_train_end(self) -> None:
        self.results = self.evaluate()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add(
        "--devices",
        type=positive_int,
        default=1,
        help="processes to start; those of torchrun go before",
    )
    add_training_options(parser)
    add("--accumulate", type=positive_int, default=1, help="batches whose gradients make one step")
    add("--out", type=Path, help="folder for the results (default: results/lightning-<data>-<loss>)")
    add("--smoke", action="store_true", help="tiny sizes: a check that it runs, in seconds")
    args = at_smoke_size(parser.parse_args(argv), SMOKE)
    if args.out is None:
        args.out = results_folder(f"lightning-{args.data}-{args.loss}", args.smoke)
    return args


def run(args: argparse.Namespace) -> Training:
    """Load, train and evaluate; checkpoints are in the folder ``args.out``."""
    data = datasets.load(args.data, args.data_dir)
    data = data.subset(args.train_size, args.test_size, seed=args.seed)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)  # the same on all ranks: they begin with the same parameters
    training = Training(args, data.train.flatten(1), heldout_images(data, args.seed).flatten(1))
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", args.devices))
    trainer = lightning.Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=devices,
        num_nodes=int(os.environ.get("WORLD_SIZE", devices)) // devices,
        strategy="ddp" if int(os.environ.get("WORLD_SIZE", devices)) > 1 else "auto",
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        use_distributed_sampler=False,  # which would divide the images among particle ranks too
        default_root_dir=args.out,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(args.out, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(training, ckpt_path=args.out / "last.ckpt" if args.resume else None)
    return training


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    with in_one_line(OSError, ValueError, kept="--resume goes on from the last epoch"):
        training = run(args)
    if training.global_rank == 0:
        nll = plus_minus(training.results["heldout_nll"], training.results["nll_monte_carlo_error"])
        print(f"{args.loss} on {args.data}: held-out NLL {nll} nats, {args.nll_particles} draws")
    return training.results


if __name__ == "__main__":
    main()
