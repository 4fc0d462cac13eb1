"""The Parzen-window log-likelihood: against scikit-learn, a closed form and a choice by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KernelDensity

from shared import parzen


@pytest.mark.parametrize("sigma", [0.05, 0.2, 3.0])
def test_against_scikit_learn(sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parzen, "CHUNK", 100)  # 40 samples: chunks of 2 points, and a last one of 1
    torch.manual_seed(0)
    samples, heldout = torch.rand(40, 3, 4), torch.rand(21, 3, 4)
    density = KernelDensity(bandwidth=sigma).fit(samples.flatten(1).double().numpy())
    expected = density.score_samples(heldout.flatten(1).double().numpy())
    np.testing.assert_allclose(parzen.log_likelihood(samples, heldout, sigma).numpy(), expected, rtol=1e-9)


def test_far_from_the_origin_and_from_all_samples() -> None:
    sample = torch.full((1, 1), 1e7 / 3, dtype=torch.float64)
    distances = torch.linspace(1, 5, 30, dtype=torch.float64)
    values = parzen.log_likelihood(sample, sample + distances.unsqueeze(1), 0.1)
    for value, distance in zip(values.tolist(), distances.tolist(), strict=True):
        expected = -0.5 * (distance / 0.1) ** 2 - math.log(0.1) - 0.5 * math.log(2 * math.pi)
        assert value == pytest.approx(expected, rel=1e-6)


def test_many_samples_of_a_normal_give_its_convolution() -> None:
    # A normal's samples under a window of sigma are a normal of variance 1 + sigma².
    torch.manual_seed(0)
    samples, point, sigma = torch.randn(200_000, 1), torch.tensor([[0.7]]), 0.5
    variance = 1 + sigma**2
    expected = -0.5 * 0.49 / variance - 0.5 * math.log(2 * math.pi * variance)
    # The density's relative standard error is below 0.7 / √200 000 = 0.0016.
    assert parzen.log_likelihood(samples, point, sigma).item() == pytest.approx(expected, abs=4 * 0.0016)


def test_the_bandwidth_is_the_one_of_the_highest_validation_likelihood() -> None:
    torch.manual_seed(0)
    samples, validation = torch.randn(300, 2), torch.randn(100, 2)
    means = {
        sigma: KernelDensity(bandwidth=sigma).fit(samples.numpy()).score(validation.numpy())
        for sigma in parzen.BANDWIDTHS
    }
    chosen = parzen.choose_bandwidth(samples, validation)
    assert chosen == max(means, key=lambda sigma: means[sigma])
    assert chosen not in (parzen.BANDWIDTHS[0], parzen.BANDWIDTHS[-1])


def test_candidates_span_a_decade() -> None:
    assert len(parzen.BANDWIDTHS) == 10
    assert parzen.BANDWIDTHS[0] == pytest.approx(0.1)
    assert parzen.BANDWIDTHS[-1] == pytest.approx(1.0)


def test_what_makes_no_sense_is_refused() -> None:
    good = torch.rand(5, 3)
    with pytest.raises(ValueError, match=r"\(3,\) each, but held-out points of \(4,\)"):
        parzen.log_likelihood(good, torch.rand(5, 4), 1.0)
    with pytest.raises(ValueError, match="5 samples and 0 held-out points"):
        parzen.log_likelihood(good, good[:0], 1.0)
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="bandwidth must be positive"):
            parzen.log_likelihood(good, good, sigma)
    with pytest.raises(ValueError, match="held-out points are NaN"):
        parzen.log_likelihood(good, good * math.nan, 1.0)
    with pytest.raises(ValueError, match="no bandwidth"):
        parzen.choose_bandwidth(good, good, ())
