"""How a VAE is judged on held-out images: its bound, log p̂(x), the gap between them and active units."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_iw import ImportanceSampler, LogMarginal, active_units
from pyro_iw._support.random_state import set_back
from pyro_iw.bounds import IWAE, Bound

from .networks import VAE

__all__ = [
    "EVALUATION_BATCH",
    "evaluate",
    "evidence",
    "guide_means",
    "log_marginal",
    "mean_bound",
    "plus_minus",
    "sampler_and_batches",
    "seeded",
]

# Rows (particles × images) that one evaluation pass holds in memory.
EVALUATION_ROWS = 10_000
EVALUATION_BATCH = 100


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A scope with its own random state, so that to evaluate does not change the training."""
    with set_back():
        torch.manual_seed(seed)
        yield


def mean_bound(vae: VAE, images: Tensor, loss: ELBO, *, seed: int) -> float:
    """The bound of ``loss`` on binarised images, in nats per datapoint."""
    with seeded(seed), torch.no_grad():
        batches = images.split(EVALUATION_BATCH)
        return -sum(loss.loss(vae.model, vae.guide, batch) for batch in batches) / len(images)


def sampler_and_batches(
    vae: VAE, images: Tensor, num_particles: int, max_rows: int = EVALUATION_ROWS
) -> tuple[ImportanceSampler, tuple[Tensor, ...]]:
    """A sampler of that many particles, and the batches to call it with, ``max_rows`` in memory at once."""
    batches = images.split(EVALUATION_BATCH)
    chunk_size = max(1, max_rows // len(batches[0]))
    return ImportanceSampler(vae.model, vae.guide, num_particles, chunk_size=chunk_size), batches


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
    sampler, batches = sampler_and_batches(vae, images, num_particles, max_rows)
    with seeded(seed):
        return sampler.log_marginal_dataset(batches, bound=bound)


@torch.no_grad()
def guide_means(vae: VAE, images: Tensor) -> Tensor:
    """The guide's mean of z for every image, shape ``[N, latent]``."""
    return torch.cat([vae.encoder(batch)[0] for batch in images.split(1000)])


def evaluate(
    vae: VAE, images: Tensor, loss: ELBO, *, nll_particles: int, num_particles: int, seed: int
) -> tuple[dict[str, float], Tensor]:
    """Held-out results, in nats per datapoint where not a count, and log p̂ of each image, ``[N]``.

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
    results = {
        "heldout_bound": mean_bound(vae, images, loss, seed=seed),
        "heldout_iwae_bound": found.mean + found.minus_kl,
        "iwae_particles": bound.K,
        "heldout_nll": -found.mean,
        "nll_monte_carlo_error": found.monte_carlo_error,
        "minus_kl": found.minus_kl,
        "minus_kl_error": found.minus_kl_error,
        "active_units": active,
    }
    return results, found.values


def plus_minus(value: float, error: float) -> str:
    """A number with its standard error, where that is known, to the digits that it knows (two at least)."""
    if not math.isfinite(error):
        return f"{value:.2f}"
    digits = 2 if error == 0 else min(max(2, 1 - math.floor(math.log10(error))), 6)
    return f"{value:.{digits}f} ± {error:.{digits}f}"
