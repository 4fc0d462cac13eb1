"""Held-out results of a VAE, against quadrature and against the same draws taken by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_iw import IWAE_ELBO, ImportanceSampler
from shared import evaluation
from shared.networks import VAE


@pytest.mark.parametrize(("draws", "size"), [(60, 8), (8, 8), (5, 5)])
def test_minus_kl_compares_bounds_of_the_same_draws(draws: int, size: int) -> None:
    network = VAE(6, latent=2, hidden=3)
    images = (torch.rand(9, 6) < 0.5).float()
    loss = IWAE_ELBO(K=8)
    found, values = evaluation.evaluate(network, images, loss, nll_particles=draws, num_particles=8, seed=3)
    assert found["iwae_particles"] == size
    # The draws again, taken by hand in groups of 8.
    with evaluation.seeded(3):
        particles = ImportanceSampler(network.model, network.guide, draws).particles(images)
        log_w = torch.cat([part.log_weights for part in particles]).double()
    log_p = (log_w.logsumexp(0) - math.log(draws)).mean().item()
    groups = log_w[: draws // size * size].reshape(-1, size, 9)
    iwae = (groups.logsumexp(1) - math.log(size)).mean().item()
    torch.testing.assert_close(values.double(), log_w.logsumexp(0) - math.log(draws), rtol=0, atol=1e-4)
    assert found["heldout_nll"] == pytest.approx(-log_p, abs=1e-5)
    assert found["heldout_iwae_bound"] == pytest.approx(iwae, abs=1e-5)
    assert found["minus_kl"] == pytest.approx(iwae - log_p, abs=1e-5)
    assert (found["minus_kl_error"] == 0) == (draws == size)


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (-0.5812, 0.0231, "-0.581 ± 0.023"),
        (22.864, 0.31, "22.86 ± 0.31"),
        (1234.5, 42.0, "1234.50 ± 42.00"),
        (-0.02, 0.00012, "-0.02000 ± 0.00012"),
        (0.0, 0.0, "0.00 ± 0.00"),
        (-3.0, math.nan, "-3.00"),
    ],
)
def test_numbers_with_their_errors(value: float, error: float, expected: str) -> None:
    assert evaluation.plus_minus(value, error) == expected


def test_evaluation_is_seeded() -> None:
    network = VAE(6, latent=2, hidden=3)
    images = torch.ones(4, 6)
    loss = IWAE_ELBO(K=2)

    def both(seed: int) -> tuple[float, list[float]]:
        log_p = evaluation.log_marginal(network, images, 5, seed=seed)
        return evaluation.mean_bound(network, images, loss, seed=seed), log_p.tolist()

    torch.manual_seed(10)
    first = both(0)
    torch.manual_seed(11)
    assert both(0) == first
    assert both(1) != first


@pytest.mark.parametrize("max_rows", [1, 70, 10_000])
def test_log_marginal_against_quadrature(max_rows: int) -> None:
    """A one-dimensional z, so that p(x) is an integral on a grid; ragged chunks included."""
    torch.manual_seed(0)
    network = VAE(4, latent=1, hidden=5).double()
    with torch.no_grad():
        network.decoder[-1].weight.mul_(3)
    images = torch.bernoulli(torch.full((6, 4), 0.5, dtype=torch.float64))
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        probabilities = network.decoder(z).sigmoid()
    likelihood = torch.where(images[:, None] == 1, probabilities, 1 - probabilities).prod(-1)
    prior = (-(z[:, 0] ** 2) / 2).exp() / math.sqrt(2 * math.pi)
    exact = torch.trapezoid(likelihood * prior, z[:, 0]).log()

    # One particle a chunk; 36 chunks of 11 and a ragged one of 7; all in one chunk.
    num_particles = 43 if max_rows == 1 else 403
    estimates = evaluation.log_marginal(network, images, num_particles, seed=1, max_rows=max_rows)
    assert estimates.shape == (6,)
    # The guide is untrained but close to the prior, so weights vary mildly.
    torch.testing.assert_close(estimates, exact, rtol=0, atol=0.5 if max_rows == 1 else 0.2)
