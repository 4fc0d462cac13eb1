"""A VAE on tables with missing values, and imputation by importance weights (Mattei & Frellsen, 1812.02633).

Half of a table's values are deleted at random. The likelihood is masked where they were, so the bound of a
row is one on the evidence of what is left of it, and nothing has to be filled in to train. The weights of
particles z from the guide then turn the decoder into the distribution of what is missing, given what is not::

    p(missing | observed) ≈ Σ_k w_k p(missing | z_k) / Σ_k w_k

Resampling z by weight and drawing from p(missing | z) gives multiple imputations. (What the paper calls MIWAE is
IWAE on masked data, and not the bound with M groups.) Try::

    python examples/missing_data.py                            # half a minute
    python examples/missing_data.py --data wine --missing 0.3

Columns are standardised by their observed values; RMSE and log-likelihood are those of a missing value.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pyro.infer import SVI
from torch import Tensor, nn
from vae import LOSSES, make_loss, mlp, positive_float, positive_int, progress_bar, unit_interval

from pyro_iw import ImportanceSampler

DATA = ("breast-cancer", "wine", "diabetes")
SMOKE = {"epochs": 2, "num_particles": 50, "hidden": 16}
LEVELS = torch.linspace(0.05, 0.95, 19)
# Rows that are imputed at once.
ROWS = 100


def load(name: str, missing: float, seed: int) -> tuple[Tensor, Tensor]:
    """A standardised table ``[N, D]``, and which of its values are observed, of the same shape."""
    from sklearn import datasets

    table = torch.tensor(getattr(datasets, f"load_{name.replace('-', '_')}")().data, dtype=torch.float32)
    observed = torch.rand(table.shape, generator=torch.Generator().manual_seed(seed)) >= missing
    seen = table.masked_fill(~observed, torch.nan)
    centre = seen.nanmean(0)
    spread = (seen - centre).square().nanmean(0).sqrt()
    if not bool((spread > 0).all()):
        raise ValueError(f"a column of {name} has no two different observed values: lower --missing")
    return (table - centre) / spread, observed


class TableVAE(nn.Module):
    """p(z) = N(0, I), p(x | z) a Student's t for each of the D columns, and the guide q(z | observed)."""

    def __init__(self, columns: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = mlp(2 * columns, hidden, hidden, 2 * latent)
        self.decoder = mlp(latent, hidden, hidden, 3 * columns)

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """The columns' distributions, of batch shape ``[*leading, D]`` for z ``[*leading, latent]``."""
        loc, scale, df = self.decoder(z).chunk(3, -1)
        return dist.StudentT(3 + F.softplus(df), loc, 0.01 + F.softplus(scale))

    def model(self, x: Tensor, observed: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z).mask(observed).to_event(1), obs=x)

    def guide(self, x: Tensor, observed: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            # Zero is the mean of a column; the mask tells it from a value that happens to be zero.
            seen = torch.cat([x * observed, observed.to(x.dtype)], -1)
            loc, log_scale = self.encoder(seen).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def train(vae: TableVAE, x: Tensor, observed: Tensor, args: argparse.Namespace) -> list[float]:
    """The bound per row after each epoch."""
    optimiser = pyro.optim.ClippedAdam({"lr": args.learning_rate, "lrd": 0.1 ** (1 / args.epochs)})
    svi = SVI(vae.model, vae.guide, optimiser, make_loss(args.loss, args.M, args.K, estimator=args.estimator))
    history = []
    with progress_bar(args.epochs, f"{args.loss} on {args.data}") as bar:
        for _ in range(args.epochs):
            batches = torch.randperm(len(x)).split(args.batch_size)
            history.append(-sum(svi.step(x[rows], observed[rows]) for rows in batches) / len(x))
            bar.set_postfix_str(f"bound {history[-1]:.2f}", refresh=False)
            bar.update()
    return history


@torch.no_grad()
def impute(vae: TableVAE, x: Tensor, observed: Tensor, num_particles: int) -> dict[str, Tensor]:
    """What the weighted particles say of every value, given what is observed in its row.

    Returns:
        ``mean``, and ``log_prob`` and ``cdf`` at ``x``, the latter from one posterior draw of z for each particle;
        all of shape ``[N, D]``.
    """
    parts = []
    for rows in torch.arange(len(x)).split(ROWS):
        sampler = ImportanceSampler(vae.model, vae.guide, num_particles, progress=False)
        samples = sampler(x[rows], observed[rows])
        columns = vae.likelihood(samples.values["z"])
        log_weights = samples.log_weights.log_softmax(0).unsqueeze(-1)
        imputed = {
            "mean": samples.expectation(lambda z: vae.likelihood(z["z"]).mean, event_dim=1),
            "log_prob": (log_weights + columns.log_prob(x[rows])).logsumexp(0),
        }
        parts.append(imputed)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
