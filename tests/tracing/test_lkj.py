"""Draws of LKJCholesky have the density that it gives, wherever they are weighed by it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_iw import IWAE_ELBO, ImportanceSampler
from pyro_iw.posterior.predictive import SampleData
from pyro_iw.tracing.lkj import RightDraws


def correlations(factor):
    rows, columns = torch.tril_indices(factor.shape[-1], factor.shape[-1], -1)
    return (factor @ factor.mT)[..., rows, columns]


@pytest.mark.parametrize("handler", [RightDraws, SampleData])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_correlations_of_all_pairs_have_their_beta_distribution(handler, size) -> None:
    eta, n = 1.5, 40_000
    pyro.set_rng_seed(0)
    fn = dist.LKJCholesky(size, torch.tensor(eta)).expand([2])
    with handler():
        found = correlations(pyro.sample("factor", fn.expand([n, 2]).to_event(1)))
    # Each is 2 B - 1 with B ~ Beta(a, a), a = eta + (size - 2) / 2.
    a = eta + (size - 2) / 2
    variance = 1 / (2 * a + 1)
    fourth = 3 / ((2 * a + 1) * (2 * a + 3))
    error = math.sqrt((fourth - variance**2) / n)
    assert torch.allclose(found.square().mean(0), torch.tensor(variance), atol=4.5 * error, rtol=0)


def test_the_evidence_with_the_prior_as_guide() -> None:
    """E[det(R)^a] under LKJ(eta) is a ratio of its normalising constants; here of 3 x 3 matrices."""
    eta, a = 1.5, 1.0

    def guide():
        pyro.sample("factor", dist.LKJCholesky(3, eta))

    def model():
        factor = pyro.sample("factor", dist.LKJCholesky(3, eta))
        pyro.factor("power", 2 * a * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    def log_constant(eta):
        return sum(math.lgamma(eta + (2 - k) / 2) - math.lgamma(eta + 1) for k in (1, 2))

    exact = log_constant(eta + a) - log_constant(eta)
    pyro.set_rng_seed(1)
    samples = ImportanceSampler(model, guide, num_particles=40_000)()
    assert samples.monte_carlo_error < 0.005
    assert abs(samples.log_marginal - exact) < 4 * samples.monte_carlo_error
    assert abs(-IWAE_ELBO(40_000).loss(model, guide) - exact) < 4 * samples.monte_carlo_error
