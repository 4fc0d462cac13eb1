"""Leave-one-out densities with local latents integrated out, against those of a multivariate normal."""

import math

import pyro
import pytest
import torch

from helpers.conjugate import Conjugate
from pyro_iw import ImportanceSampler
from pyro_iw._support.optional import is_arviz_0, require
from pyro_iw.posterior.leave_one_out import leave_one_out
from pyro_iw.psis import pareto_smoothed


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sampled(pair, num_particles=2000, num_local=16):
    return ImportanceSampler(
        pair.model, pair.guide, num_particles, local="data", num_local=num_local, chunk_size=None
    )()


@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_closed_form(sigma):
    pair = Conjugate(count=8, sigma=sigma, seed=2)
    found = sampled(pair).leave_one_out()
    assert bool((found.khat < 0.5).all())
    assert bool((found.monte_carlo_errors < 0.05).all())
    assert bool(((found.values - pair.leave_one_out).abs() < 4 * found.monte_carlo_errors).all())
    assert abs(found.elpd - pair.leave_one_out.sum()) < 4 * found.monte_carlo_error
    assert found.standard_error == pytest.approx(math.sqrt(8) * found.values.std().item())
    assert repr(found).endswith("N=8, num_particles=2000)")


def test_errors_are_calibrated():
    # Few local particles add noise, and no bias: the weights of a cell never see its own particles.
    pair = Conjugate(count=4, seed=2, bias=0.3)
    runs = [sampled(pair, 500, 3).leave_one_out() for _ in range(200)]
    exact = pair.leave_one_out
    each = torch.stack([(run.values - exact) / run.monte_carlo_errors for run in runs])
    total = torch.tensor([(run.elpd - exact.sum().item()) / run.monte_carlo_error for run in runs])
    for scores in (*each.T, total):
        assert scores.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.25)
        assert abs(scores.mean()) < 4 / 200**0.5


def test_by_a_loop_over_the_same_particles():
    pair = Conjugate(count=3, wider=(1.5, 1.2))
    samples = sampled(pair, 200, 4)
    top, local = samples.log_p - samples.log_q, samples.local["data"].log_weights
    found = samples.leave_one_out()
    likelihood = local.logsumexp(1) - math.log(4)
    shares = []
    for n in range(3):
        log_r = top + sum(likelihood[:, m] for m in range(3) if m != n)
        smoothed, khat = pareto_smoothed(log_r)
        weights = smoothed.exp()
        density = (weights * likelihood[:, n].exp()).sum() / weights.sum()
        torch.testing.assert_close(found.values[n], density.log())
        torch.testing.assert_close(found.khat[n], khat)
        # A ratio of sums: its relative change with the weight of a particle, by which its error follows.
        shares.append(weights / weights.sum() * (likelihood[:, n].exp() / density - 1))
        torch.testing.assert_close(found.monte_carlo_errors[n], (shares[n] ** 2).sum().sqrt())
    assert found.monte_carlo_error == pytest.approx((sum(shares) ** 2).sum().sqrt().item())


def test_conditional_likelihoods_get_it_wrong():
    # Where x_n says all of z_n, 1 / p(x_n | z_n) has no mean to speak of on draws given x_n.
    pair = Conjugate(count=8, sigma=0.3, seed=2)
    samples = sampled(pair, 4000)
    exact, found = pair.leave_one_out, samples.leave_one_out()
    likelihood = samples.log_likelihood(samples.posterior(4000))["x"]
    smoothed, khat = pareto_smoothed(-likelihood)
    conditional = (smoothed + likelihood).logsumexp(0) - smoothed.logsumexp(0)
    assert bool((khat > 0.6).all())
    assert khat.median() > 0.8
    assert (found.values - exact).abs().max() < 0.05
    assert (conditional - exact).abs().max() > 0.3
    assert conditional.sum() - exact.sum() > 0.5  # too good to be true


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
def test_az_loo_takes_the_integrated_one():
    arviz = require("arviz", "arviz", "This test")
    pair = Conjugate(count=8, sigma=0.3, seed=2)
    data = sampled(pair, 4000).to_arviz(num_samples=4000, predictive=False, prior=False)
    assert data["log_likelihood"].attrs["summed_out"] == "z"
    loo = arviz.loo(data, pointwise=True)
    k = loo.pareto_k.values
    each = loo.loo_i.values if is_arviz_0(arviz) else loo.elpd_i.values
    assert (k < 0.7).all()
    torch.testing.assert_close(torch.tensor(each), pair.leave_one_out, rtol=0, atol=0.1)


def test_weights_that_do_not_reach_are_warned_of():
    pair = Conjugate(count=3, wider=(0.2, 1.1))
    samples = sampled(pair, 400)
    with pytest.warns(RuntimeWarning, match=r"in 3 of 3 cell\(s\).*run the sampler on the data without"):
        samples.leave_one_out()


def test_a_single_cell():
    pyro.set_rng_seed(0)
    found = leave_one_out(torch.randn(400), torch.randn(400))
    assert found.values.shape == ()
    assert math.isnan(found.standard_error)
    assert found.monte_carlo_error == pytest.approx(found.monte_carlo_errors.item())
