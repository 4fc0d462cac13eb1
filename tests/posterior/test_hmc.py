"""The kernel of annealed chains: that it leaves its target as it is, and finds step sizes for it."""

import math

import pytest
import torch

from pyro_iw.posterior.annealing import Annealing, temperatures
from pyro_iw.posterior.hmc import Point, Setting, Tuning, transition

DTYPE = torch.float64


class GammaAndNormal:
    """Cells with one coordinate each from the path N(0, 1) -> log of a Gamma, or a normal of a given scale.

    Coordinates ``[S, cells, 1]``. At the end cell n has the density of ``target`` scaled by ``scales[n]``.
    """

    def __init__(self, scales, skewed):
        self.scales = torch.as_tensor(scales, dtype=DTYPE)
        self.skewed = skewed

    def log_end(self, u):
        v = u / self.scales
        # The log of a Gamma(2, 1) variable has the density exp(2 v - e^v).
        log_p = 2 * v - v.exp() if self.skewed else -0.5 * v**2 - 0.5 * math.log(2 * math.pi)
        return log_p - self.scales.log()

    def at(self, coordinates):
        (u,) = coordinates
        u = u.detach().requires_grad_()
        log_q = (-0.5 * u**2 - 0.5 * math.log(2 * math.pi)).sum(-1)
        log_w = self.log_end(u.squeeze(-1)) - log_q
        grads = [torch.autograd.grad(part.sum(), u, retain_graph=True)[0] for part in (log_q, log_w)]
        return Point([u.detach()], log_q.detach(), log_w.detach(), [grads[0]], [grads[1]])

    def to_cells(self, per_coordinate):
        return per_coordinate[0].sum(-1)

    def spread(self, per_cell):
        return [per_cell.reshape(-1, len(self.scales), 1)]


def draws(path, num_chains):
    return path.at([torch.randn(num_chains, len(path.scales), 1, dtype=DTYPE)])


class TestTransition:
    @pytest.mark.parametrize("step_size", [0.3, 1.1])
    def test_leaves_a_skewed_target_as_it_is(self, step_size):
        """Chains that begin at exact draws still have its moments and quantiles after many transitions."""
        path = GammaAndNormal([1.0, 3.0], skewed=True)
        size = 10_000
        gamma = torch.distributions.Gamma(torch.tensor(2.0, dtype=DTYPE), 1.0)
        exact = gamma.sample((size, 2)).log() * path.scales
        point = path.at([exact.unsqueeze(-1)])
        setting = Setting(step_size * path.scales, [torch.ones(1, 1, 1, dtype=DTYPE)])
        accepted = []
        for _ in range(10):
            point, probability = transition(path, point, 1.0, setting, 4)
            accepted.append(probability.mean().item())
        assert 0.3 < sum(accepted) / 10 < 0.999  # that something is rejected, and something is not
        v = point.coordinates[0].squeeze(-1) / path.scales
        mean, variance = 1 - 0.5772156649015329, math.pi**2 / 6 - 1  # digamma(2), trigamma(2)
        fourth = (v - mean) ** 4
        assert ((v.mean(0) - mean).abs() < 4 * math.sqrt(variance / size)).all()
        error = (fourth.mean(0) - variance**2).sqrt() / math.sqrt(size)
        assert (((v - mean) ** 2).mean(0) - variance).abs().lt(4 * error).all()
        for share, quantile in ((0.1, 0.5318116), (0.5, 1.6783470), (0.9, 3.8897202)):  # of Gamma(2, 1)
            below = (v.exp() < quantile).double().mean(0)
            assert (below - share).abs().lt(4 * math.sqrt(share * (1 - share) / size)).all()

    def test_reaches_a_target_from_elsewhere(self):
        path = GammaAndNormal([1.0], skewed=True)
        point = path.at([torch.full((5000, 1, 1), 2.0, dtype=DTYPE)])
        setting = Setting(torch.tensor([0.5], dtype=DTYPE), [torch.ones(1, 1, 1, dtype=DTYPE)])
        for _ in range(60):
            point, _ = transition(path, point, 1.0, setting, 4)
        v = point.coordinates[0]
        assert abs(v.mean().item() - 0.4227843) < 4 * math.sqrt(0.6449341 / 5000)

    @pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
    def test_target_at_a_temperature(self, beta):
        """N(0, 1) to N(0, s^2): in between the precision is 1 - beta + beta / s^2."""
        path = GammaAndNormal([0.2], skewed=False)
        precision = 1 - beta + beta / 0.2**2
        size = 10_000
        point = path.at([torch.randn(size, 1, 1, dtype=DTYPE) / math.sqrt(precision)])
        setting = Setting(
            torch.tensor([0.9], dtype=DTYPE), [torch.full((1, 1, 1), precision**-0.5, dtype=DTYPE)]
        )
        for _ in range(10):
            point, _ = transition(path, point, beta, setting, 3)
        variance = point.coordinates[0].square().mean().item()
        assert abs(variance * precision - 1) < 4 * math.sqrt(2 / size)

    def test_a_trajectory_that_leaves_the_numbers_is_rejected(self):
        path = GammaAndNormal([1.0, 1.0], skewed=True)
        point = draws(path, 8)
        setting = Setting(torch.tensor([1e6, 0.1], dtype=DTYPE), [torch.ones(1, 1, 1, dtype=DTYPE)])
        moved, probability = transition(path, point, 1.0, setting, 3)
        assert (probability[:, 0] == 0).all()
        assert (probability[:, 1] > 0.5).all()
        assert torch.equal(moved.coordinates[0][:, 0], point.coordinates[0][:, 0])
        assert not torch.equal(moved.coordinates[0][:, 1], point.coordinates[0][:, 1])


class TestTuning:
    @pytest.mark.parametrize("num_chains", [1, 16])
    def test_acceptance_in_every_cell(self, num_chains):
        """Cells whose ends differ in scale by two orders of magnitude, from one step size."""
        path = GammaAndNormal([0.05, 1.0, 5.0], skewed=False)
        tuning = Tuning(path, [torch.ones(1, 3, 1, dtype=DTYPE)], 4, 0.65)
        tuning.run(draws(path, num_chains), temperatures(300)[1:])
        annealing = Annealing(path, tuning, temperatures(1000), 4)
        acceptance = annealing.forwards(draws(path, num_chains)).acceptance
        assert ((acceptance > 0.5) & (acceptance < 0.8)).all(), acceptance

    def test_settings_do_not_change_once_chains_count(self):
        path = GammaAndNormal([0.2, 2.0], skewed=True)
        tuning = Tuning(path, [torch.ones(1, 2, 1, dtype=DTYPE)], 4, 0.65)
        tuning.run(draws(path, 8), temperatures(60)[1:])
        before = [tuning.at(share) for share in (0.0, 0.37, 1.0)]
        Annealing(path, tuning, temperatures(100), 4).forwards(draws(path, 8))
        after = [tuning.at(share) for share in (0.0, 0.37, 1.0)]
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one.step_size, other.step_size)
            assert all(map(torch.equal, one.scales, other.scales))

    def test_between_two_notes(self):
        path = GammaAndNormal([0.2], skewed=True)
        tuning = Tuning(path, [torch.ones(1, 1, 1, dtype=DTYPE)], 4, 0.65)
        tuning.run(draws(path, 8), temperatures(3)[1:])  # three notes, at 0, 0.5 and 1
        first, second = tuning.at(0.0).step_size, tuning.at(0.5).step_size
        assert torch.allclose(tuning.at(0.125).step_size, 0.75 * first + 0.25 * second)
        assert not torch.equal(first, second)


class TestAnnealing:
    @pytest.mark.parametrize("num_temperatures", [1, 2, 7])
    def test_unbiased_both_ways(self, num_temperatures):
        """E[w] = p(x) forwards, E[1 / w] = 1 / p(x) backwards, whatever T; here p(x) is 1."""
        path = GammaAndNormal([0.7, 1.3], skewed=True)
        tuning = Tuning(path, [torch.ones(1, 2, 1, dtype=DTYPE)], 3, 0.65)
        tuning.run(draws(path, 16), temperatures(20)[1:])
        annealing = Annealing(path, tuning, temperatures(num_temperatures), 3)
        size = 10_000
        forwards = annealing.forwards(draws(path, size)).log_w
        gamma = torch.distributions.Gamma(torch.tensor(2.0, dtype=DTYPE), 1.0)
        exact = path.at([(gamma.sample((size, 2)).log() * path.scales).unsqueeze(-1)])
        backwards = annealing.backwards(exact).log_w
        for weights in (forwards.exp(), (-backwards).exp()):
            error = weights.std(0) / math.sqrt(size)
            assert ((weights.mean(0) - 1).abs() < 4 * error).all()
            assert (error < 0.1).all()


class TestTemperatures:
    def test_sigmoidal(self):
        betas = temperatures(10)
        assert betas[0] == 0
        assert betas[-1] == 1
        assert len(betas) == 11
        curve = [1 / (1 + math.exp(-4 * (2 * t / 10 - 1))) for t in range(11)]
        expected = [(c - curve[0]) / (curve[-1] - curve[0]) for c in curve]
        assert betas == pytest.approx(expected, abs=1e-12)

    def test_given(self):
        assert temperatures(2, [0.0, 0.1, 1.0]) == [0.0, 0.1, 1.0]
        assert temperatures(2, torch.tensor([0.0, 0.5, 1.0])) == [0.0, 0.5, 1.0]

    @pytest.mark.parametrize(
        "schedule", [[0.0, 1.0], [0.0, 0.5, 0.5, 1.0], [0.1, 0.5, 0.7, 1.0], [0.0, 0.5, 0.7, 0.9], 0.3]
    )
    def test_refused(self, schedule):
        with pytest.raises(ValueError, match=r"4 numbers that increase from 0 to 1.*num_temperatures=3"):
            temperatures(3, schedule)

    def test_unknown(self):
        with pytest.raises(ValueError, match="'sigmoidal', 'linear'"):
            temperatures(3, "cosine")
