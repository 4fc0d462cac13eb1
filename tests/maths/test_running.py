"""What is added up chunk by chunk, against the same from all weights at once."""

import math

import pytest
import torch

from pyro_iw.bounds import CIWAE, IWAE, MIWAE, PIWAE, VR
from pyro_iw.running import RunningBound, RunningGap, RunningLogMean

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


@pytest.mark.parametrize("chunk", [1, 7, 50])
@pytest.mark.parametrize("dead", [[3], [3, 30], [3, 8, 40], list(range(50))])
@pytest.mark.parametrize("kind", [RunningBound, RunningGap])
def test_dead_particles_in_several_chunks(chunk, dead, kind):
    log_w = LOG_W.clone()
    log_w[dead, 1] = -math.inf
    elbo, alive = kind(IWAE(1)), kind(IWAE(1))
    for part in log_w.split(chunk):
        elbo.add(part)
    for part in LOG_W.split(chunk):
        alive.add(part)
    assert (elbo.value[1] == -math.inf).all()
    assert elbo.standard_error[1].isnan().all()
    for cell in (0, 2):
        torch.testing.assert_close(elbo.value[cell], LOG_W[:, cell].mean(0))
        torch.testing.assert_close(elbo.standard_error[cell], alive.standard_error[cell])


def test_groups_that_are_dead_one_and_all_beside_groups_that_are_not():
    # Of 10 groups of 5 particles: all alive, one of them dead, all dead.
    log_w = LOG_W[..., :1].clone()
    log_w[20:25, 1] = log_w[:, 2] = -math.inf
    running, everything = RunningGap(IWAE(5)), RunningLogMean()
    for part in log_w.split(5):
        running.add(part)
        everything.add(part)
    assert running.value[0].isfinite().all()
    assert (running.value[1:] == -math.inf).all()
    error = running.gap_error(everything)
    assert error[0].isfinite().all()
    assert error[1:].isnan().all()


BOUNDS = [IWAE(1), IWAE(8), IWAE(16), MIWAE(3, 4), CIWAE(5, 0.3), VR(0.5, 10)]


@pytest.mark.parametrize("chunk", [1, 7, 50])
@pytest.mark.parametrize("bound", BOUNDS)
def test_error_of_a_gap_from_all_weights_at_once(chunk, bound):
    shifted = LOG_W + 3000 * torch.arange(3).reshape(3, 1) + 5 * torch.arange(50).reshape(50, 1, 1).sin()
    running, everything = RunningGap(bound), RunningLogMean()
    for part in shifted.split(chunk):
        running.add(part)
        everything.add(part)
    size = bound.M * bound.K
    count = 50 // size
    ratio = (shifted - shifted.logsumexp(0) + math.log(50)).exp()
    groups = shifted[: count * size].reshape(count, bound.M, bound.K, 3, 2)
    values = torch.stack([bound.value(group) for group in groups])
    each = values / count - ratio[: count * size].reshape(count, size, 3, 2).sum(1) / 50
    variance = (each - each.mean(0)).square().sum(0) * count / (count - 2)
    variance += (50 - count * size) / 50**2 * ratio.var(0)
    torch.testing.assert_close(running.gap_error(everything), variance.sqrt(), rtol=1e-7, atol=0)


def test_too_few_groups_have_no_gap_error():
    running, everything = RunningGap(IWAE(20)), RunningLogMean()
    running.add(LOG_W)
    everything.add(LOG_W)
    assert running.groups == 2
    assert running.gap_error(everything).isnan().all()


@pytest.mark.parametrize("bound", [IWAE(50), PIWAE(5, 10)])
def test_the_log_mean_weight_itself_has_no_gap(bound):
    running, everything = RunningGap(bound), RunningLogMean()
    for part in LOG_W.split(7):
        running.add(part)
        everything.add(part)
    torch.testing.assert_close(running.value, everything.value)
    assert (running.gap_error(everything) == 0).all()


@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("bound", BOUNDS)
def test_error_of_a_gap_is_the_spread_of_repetitions(bound, spread):
    # 4000 repetitions know their standard deviation to some 2 % (the gap is skewed); the delta method errs
    # by a few more at 100 particles.
    log_w = spread * torch.randn(100, 4000, dtype=torch.float64)
    running, everything = RunningGap(bound), RunningLogMean()
    for part in log_w.split(33):
        running.add(part)
        everything.add(part)
    gaps = running.value - everything.value
    errors = running.gap_error(everything)
    assert errors.square().mean().sqrt().item() == pytest.approx(gaps.std().item(), rel=0.12)
    # Both sides as if they were independent would be wider at least by half.
    apart = (running.standard_error**2 + everything.standard_error**2).mean().sqrt()
    assert apart > 1.5 * gaps.std()


def test_parts_that_were_added_up_apart_merge():
    """Also where all groups of one part are dead in some cells, and where a part has none."""
    log_w = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    log_w[:12, 1] = -math.inf
    log_w[:, 2] = -math.inf
    bound = MIWAE(M=2, K=3)
    whole, whole_gap = RunningLogMean(), RunningGap(bound)
    merged, merged_gap = RunningLogMean(), RunningGap(bound)
    for running in whole, whole_gap:
        running.add(log_w)
    for rows in log_w[:12], log_w[:0], log_w[12:]:
        part, part_gap = RunningLogMean(), RunningGap(bound)
        for running in part, part_gap:
            running.add(rows)
        merged.merge(part)
        merged_gap.merge(part_gap)
    close = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
    for name in "value", "ess", "standard_error":
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), **close)
    torch.testing.assert_close(merged_gap.value, whole_gap.value, **close)
    torch.testing.assert_close(merged_gap.gap_error(merged), whole_gap.gap_error(whole), **close)
