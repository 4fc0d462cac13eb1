"""What is added up chunk by chunk, against the same from all weights at once."""

import math

import pytest
import torch

from pyro_iw.bounds import CIWAE, IWAE, MIWAE
from pyro_iw.streaming import RunningBound, RunningLogMean

LOG_W = torch.randn(50, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_log_mean_and_effective_number(chunk):
    running = RunningLogMean()
    for part in LOG_W.split(chunk):
        running.add(part)
    w = LOG_W.exp()
    torch.testing.assert_close(running.value, w.mean(0).log())
    torch.testing.assert_close(running.ess, w.sum(0) ** 2 / (w**2).sum(0))
    # Delta method: standard error of the mean weight over the mean weight.
    torch.testing.assert_close(running.standard_error, w.std(0) / math.sqrt(50) / w.mean(0))


def test_weights_far_from_one():
    running = RunningLogMean()
    for part in (LOG_W - 5000).split(7):
        running.add(part.float())
    torch.testing.assert_close(running.value, LOG_W.exp().mean(0).log() - 5000, rtol=0, atol=1e-3)


def test_dead_particles_and_cells():
    log_w = LOG_W.clone()
    log_w[:, 0] = -math.inf
    log_w[:25, 1] = -math.inf
    running = RunningLogMean()
    for part in log_w.split(10):
        running.add(part)
    assert (running.value[0] == -math.inf).all()
    assert (running.ess[0] == 0).all()
    assert running.standard_error[0].isnan().all()
    torch.testing.assert_close(running.value[1], log_w[:, 1].exp().mean(0).log())


def test_a_single_particle_has_no_standard_error():
    running = RunningLogMean()
    running.add(LOG_W[:1])
    assert running.standard_error.isnan().all()
    assert (running.ess == 1).all()


@pytest.mark.parametrize("chunk", [1, 7, 50])
@pytest.mark.parametrize("bound", [IWAE(1), IWAE(8), MIWAE(3, 4), CIWAE(5, 0.3), IWAE(50)])
def test_bounds_of_groups(chunk, bound):
    running = RunningBound(bound)
    for part in LOG_W.split(chunk):
        running.add(part)
    size = bound.M * bound.K
    whole = 50 // size
    values = [
        bound.value(LOG_W[i * size : (i + 1) * size].reshape(bound.M, bound.K, 3, 2)) for i in range(whole)
    ]
    assert running.groups == whole
    torch.testing.assert_close(running.value, torch.stack(values).mean(0))
    if whole > 1:
        torch.testing.assert_close(running.standard_error, torch.stack(values).std(0) / math.sqrt(whole))
    else:
        assert running.standard_error.isnan().all()
