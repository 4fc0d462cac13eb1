"""Bounds: closed forms against loops and autograd, and what happens at the edges."""

import math

import numpy as np
import pytest
import torch

from helpers.truth import objectives
from pyro_iw.bounds import CIWAE, IWAE, MIWAE, PIWAE, TVO, VR, Bound
from pyro_iw.logmean import leave_one_out_logmeanexp, leave_one_out_mean

BOUNDS = {
    "IWAE": lambda M, K: IWAE(K=M * K),
    "MIWAE": lambda M, K: MIWAE(M=M, K=K),
    "CIWAE": lambda M, K: CIWAE(K=M * K, beta=0.3),
    "PIWAE": lambda M, K: PIWAE(M=M, K=K),
    "VR": lambda M, K: VR(alpha=0.3, K=M * K),
    "TVO": lambda M, K: TVO(K=M * K, partitions=(0.0, 0.2, 0.7, 1.0)),
}
SIZES = [(1, 1), (1, 6), (6, 1), (2, 3), (3, 2)]


def grouped(log_w, bound):
    return log_w.reshape(bound.M, bound.K, *log_w.shape[1:])


@pytest.mark.parametrize(("M", "K"), SIZES)
@pytest.mark.parametrize("name", BOUNDS)
def test_value_and_weights_against_loops(name, M, K):
    """Values, first and second derivatives of both objectives, by loops over scalars and autograd."""
    bound = BOUNDS[name](M, K)
    leaf = (3 * torch.randn(M * K, 4, 2, dtype=torch.float64)).requires_grad_()
    values = torch.zeros(4, 2, dtype=torch.float64)
    objective = [0.0, 0.0]
    for i in range(4):
        for j in range(2):
            sides = objectives(name, list(leaf[:, i, j]), M, K)
            values[i, j] = sides[0].detach()
            objective = [total + side for total, side in zip(objective, sides, strict=True)]
    log_w = grouped(leaf.detach(), bound)
    torch.testing.assert_close(bound.value(log_w), values)
    for side, total in zip((bound, bound.guide_bound), objective, strict=True):
        (first,) = torch.autograd.grad(total, leaf, create_graph=True)
        second = torch.zeros_like(leaf)
        for k in range(M * K):
            if first.requires_grad:
                (row,) = torch.autograd.grad(first[k].sum(), leaf, retain_graph=True, allow_unused=True)
                second[k] = 0.0 if row is None else row[k]
        first = first.detach()
        torch.testing.assert_close(side.weights(log_w), grouped(first, bound))
        torch.testing.assert_close(side.path_weights(log_w), grouped(first - second, bound))
        torch.testing.assert_close(side.weights(log_w).sum((0, 1)), torch.ones(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", BOUNDS)
def test_closed_forms_agree_with_the_autograd_of_a_users_own_bound(name):
    bound = BOUNDS[name](2, 3)
    log_w = grouped(torch.randn(6, 5), bound)
    torch.testing.assert_close(bound.weights(log_w), Bound.weights(bound, log_w))
    torch.testing.assert_close(bound.path_weights(log_w), Bound.path_weights(bound, log_w))
    replacement = torch.randn_like(log_w)
    torch.testing.assert_close(
        bound.difference(log_w, replacement), Bound.difference(bound, log_w, replacement)
    )


def _difference_by_hand(bound, log_w, replacement):
    """The bound less that with one log-weight replaced, one by one."""
    expected = torch.empty_like(log_w)
    for m in range(bound.M):
        for k in range(bound.K):
            changed = log_w.clone()
            changed[m, k] = replacement[m, k]
            expected[m, k] = bound.value(log_w) - bound.value(changed)
    return expected


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("name", BOUNDS)
def test_differences_are_those_of_two_values(name, spread):
    # Up to a particle that has all of the weight, and one that takes all of it when it is replaced.
    bound = BOUNDS[name](3, 4)
    log_w = grouped(spread * torch.randn(12, 40, dtype=torch.float64), bound)
    for replacement in (spread * torch.randn_like(log_w), log_w + 1e-3, log_w, log_w.roll(1, 1)):
        expected = _difference_by_hand(bound, log_w, replacement)
        torch.testing.assert_close(bound.difference(log_w, replacement), expected, rtol=1e-9, atol=1e-11)


def test_differences_where_particles_are_dead():
    log_w = torch.tensor([[-math.inf, 0.0, 1.0], [-math.inf, -math.inf, 2.0]], dtype=torch.float64)
    replacement = torch.tensor([[0.5, -math.inf, 1.0], [-math.inf, 0.3, -math.inf]], dtype=torch.float64)
    bound = MIWAE(2, 3)
    expected = _difference_by_hand(bound, log_w.unsqueeze(-1), replacement.unsqueeze(-1))[..., 0]
    assert expected[1, 2] == math.inf  # nothing is left of that group
    torch.testing.assert_close(bound.difference(log_w, replacement), expected)


@pytest.mark.parametrize("size", [1000, 100_000, 1_000_000])
@pytest.mark.parametrize(
    "make",
    [
        lambda K: IWAE(K),
        lambda K: MIWAE(4, K // 4),
        lambda K: MIWAE(K, 1),
        lambda K: CIWAE(K, 0.3),
        lambda K: PIWAE(4, K // 4),
        lambda K: VR(0.5, K),
        lambda K: VR(1 - 1e-8, K),
        lambda K: VR(1 + 1e-12, K),
        lambda K: VR(1, K),
        lambda K: TVO(K, 5),
    ],
    ids=["IWAE", "MIWAE", "ELBO", "CIWAE", "PIWAE", "VR", "VR near 1", "VR above 1", "VR 1", "TVO"],
)
def test_differences_keep_their_digits_in_float32(make, size):
    bound = make(size)
    log_w = (2 * torch.randn(bound.M, bound.K)).clamp(max=6)
    replacement = leave_one_out_mean(log_w.reshape(1, -1)).reshape(log_w.shape)
    exact = bound.difference(log_w.double(), replacement.double())
    found = bound.difference(log_w, replacement).double()
    assert (found - exact).norm() < 1e-5 * exact.norm()
    # The exact ones against the bound itself, of a few particles of many sizes; in float64 the two values
    # agree to 1e-15 and their differences are some 1e-6.
    value = bound.value(log_w.double())
    for index in log_w.flatten().argsort()[:: size // 5].tolist():
        changed = log_w.double().flatten()
        changed[index] = replacement.flatten()[index]
        expected = value - bound.value(changed.reshape(log_w.shape))
        scale = exact.abs().mean().item() + abs(expected.item())
        assert abs(exact.flatten()[index].item() - expected.item()) < 3e-5 * scale + 1e-14 / abs(
            1 - getattr(bound, "alpha", 0) or 1
        )


@pytest.mark.parametrize("alpha", [1 - 1e-6, 1 - 1e-12, 1 + 1e-12])
def test_differences_of_the_renyi_bound_close_to_the_elbo_are_those_of_the_elbo(alpha):
    log_w, replacement = torch.randn(2, 1, 1000)
    found = VR(alpha, 1000).difference(log_w, replacement)
    torch.testing.assert_close(found, (log_w - replacement) / 1000, rtol=1e-4, atol=1e-9)


def test_a_users_own_bound_is_subtracted_in_float64():
    class Own(Bound):
        def value(self, log_w):
            return log_w.logsumexp((0, 1)) - math.log(self.K)

    log_w = torch.randn(1, 500) - 1000
    replacement = leave_one_out_mean(log_w)
    exact = IWAE(500).difference(log_w.double(), replacement.double())
    found = Own(K=500).difference(log_w, replacement)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-9)


def test_a_linear_bound_of_a_users_own_has_no_curvature():
    class Mean(Bound):
        def value(self, log_w):
            return log_w.mean((0, 1))

    weights = Mean(M=2, K=2).path_weights(torch.randn(2, 2, 3))
    torch.testing.assert_close(weights, torch.full((2, 2, 3), 0.25))


def test_leave_one_out_means():
    log_w = torch.randn(2, 4, 3, dtype=torch.float64)
    for m in range(2):
        for k in range(4):
            others = log_w[m, [j for j in range(4) if j != k]]
            torch.testing.assert_close(leave_one_out_mean(log_w)[m, k], others.mean(0))
            lme = others.exp().mean(0).log()
            torch.testing.assert_close(leave_one_out_logmeanexp(log_w)[m, k], lme)


def test_leaving_out_a_particle_that_dominates_keeps_the_others():
    """log(sum - own) would be -inf or noise here: the others are e-100 of the whole."""
    log_w = torch.tensor([[0.0, -100.0, -101.0]])
    others = leave_one_out_logmeanexp(log_w)[0, 0].item()
    assert others == pytest.approx(math.log((1 + math.exp(-1)) / 2) - 100, abs=1e-4)


def test_limits_of_the_renyi_bound():
    log_w = torch.randn(1, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(VR(alpha=0, K=5).value(log_w), IWAE(K=5).value(log_w))
    mean = log_w.mean((0, 1))
    torch.testing.assert_close(VR(alpha=1, K=5).value(log_w), mean)
    for alpha in (1 - 1e-7, 1 + 1e-7):
        torch.testing.assert_close(VR(alpha=alpha, K=5).value(log_w), mean, rtol=1e-5, atol=1e-5)
    values = [VR(alpha=alpha, K=5).value(log_w)[0] for alpha in (-2, 0, 0.5, 1, 2)]
    assert values == sorted(values, reverse=True)


def test_the_renyi_bound_close_to_the_elbo_keeps_its_digits():
    log_w = torch.randn(1, 5, 3) - 100
    for alpha in (0.9999, 0.99999, 1 - 1e-7, 1 + 1e-7):
        exact = VR(alpha=alpha, K=5).value(log_w.double())
        torch.testing.assert_close(VR(alpha=alpha, K=5).value(log_w).double(), exact, rtol=1e-6, atol=1e-5)


def test_limits_of_the_thermodynamic_objective():
    log_w = torch.randn(1, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(TVO(K=5, partitions=1).value(log_w), log_w.mean((0, 1)))
    # The integral of E[l] over beta is the log of the mean weight; its left sum tends to it from below.
    fine = TVO(K=5, partitions=[i / 2000 for i in range(2001)]).value(log_w)
    torch.testing.assert_close(fine, IWAE(K=5).value(log_w), rtol=0, atol=2e-3)
    assert (fine < IWAE(K=5).value(log_w)).all()
    assert TVO(K=5, partitions=2).partitions == pytest.approx((0.0, 0.025, 1.0))


@pytest.mark.parametrize("name", BOUNDS)
def test_large_log_weights_neither_overflow_nor_vanish(name):
    bound = BOUNDS[name](2, 3)
    log_w = grouped(torch.randn(6, 5), bound)
    for shift in (1e4, -1e4):
        torch.testing.assert_close(bound.value(log_w + shift) - shift, bound.value(log_w), atol=2e-3, rtol=0)
        torch.testing.assert_close(bound.weights(log_w + shift), bound.weights(log_w), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", BOUNDS)
def test_cells_do_not_mix(name):
    bound = BOUNDS[name](2, 3)
    log_w = grouped(torch.randn(6, 5), bound)
    other = log_w.clone()
    other[..., 1:] += 100 * torch.rand(4)
    assert bound.value(other)[0] == bound.value(log_w)[0]
    torch.testing.assert_close(bound.weights(other)[..., 0], bound.weights(log_w)[..., 0])


@pytest.mark.parametrize("name", BOUNDS)
def test_a_cell_without_density_is_minus_infinity_and_weighs_nothing(name):
    bound = BOUNDS[name](2, 3)
    log_w = grouped(torch.randn(6, 2), bound)
    log_w[..., 0] = -math.inf
    value, weights = bound.value(log_w), bound.weights(log_w)
    assert value[0] == -math.inf
    assert torch.isfinite(value[1])
    for weight in (weights, bound.guide_bound.weights(log_w)):
        assert (weight[..., 0] == 0).all()
        torch.testing.assert_close(weight[..., 1].sum(), torch.tensor(1.0))
    assert (bound.path_weights(log_w)[..., 0] == 0).all()


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (IWAE(K=2), math.log(0.5)),
        (CIWAE(K=2, beta=0.0), math.log(0.5)),
        (CIWAE(K=2, beta=0.5), -math.inf),
        (CIWAE(K=2, beta=1.0), -math.inf),
        (MIWAE(M=2, K=1), -math.inf),
        (PIWAE(M=2, K=1), math.log(0.5)),
        (VR(alpha=0.5, K=2), 2 * math.log(0.5)),
        (VR(alpha=1.0, K=2), -math.inf),
        (VR(alpha=2.0, K=2), -math.inf),
        (TVO(K=2, partitions=(0.0, 0.5, 1.0)), -math.inf),
    ],
    ids=repr,
)
def test_one_particle_without_density(bound, expected):
    log_w = grouped(torch.tensor([-math.inf, 0.0]), bound)
    assert bound.value(log_w).item() == pytest.approx(expected)
    for weight in (bound.weights(log_w), bound.guide_bound.weights(log_w), bound.path_weights(log_w)):
        assert weight.flatten()[0] == 0
        assert torch.isfinite(weight).all()


def test_a_nan_stays_one():
    log_w = torch.tensor([[math.nan, 0.0]])
    assert IWAE(K=2).value(log_w).isnan()
    assert IWAE(K=2).weights(log_w).isnan().any()


def test_a_users_own_bound_gives_no_weight_to_dead_particles():
    class PowerMean(Bound):
        def value(self, log_w):
            return 2 * ((0.5 * log_w).logsumexp((0, 1)) - math.log(self.num_particles))

    log_w = torch.tensor([[0.0, math.log(4.0), -math.inf]])
    bound = PowerMean(K=3)
    assert bound.value(log_w).item() == pytest.approx(0.0)  # ((1 + 2 + 0) / 3) ** 2 = 1
    torch.testing.assert_close(bound.weights(log_w), torch.tensor([[1 / 3, 2 / 3, 0.0]]))
    assert (bound.weights(torch.full((1, 3), -math.inf)) == 0).all()


@pytest.mark.parametrize("bad", [0, -1, 1.5, "3", None, True])
def test_counts_must_be_positive_integers(bad):
    for make in (lambda: IWAE(K=bad), lambda: MIWAE(M=bad, K=2), lambda: PIWAE(M=2, K=bad)):
        with pytest.raises(ValueError, match="must be an integer >= 1"):
            make()
    with pytest.raises(ValueError, match=r"^M must be"):
        MIWAE(M=bad, K=2)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, "0.5", None])
def test_beta_must_lie_in_the_unit_interval(bad):
    with pytest.raises(ValueError, match=r"beta must be a number in \[0, 1\]"):
        CIWAE(K=2, beta=bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "0.5", None, True])
def test_alpha_must_be_a_finite_number(bad):
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        VR(alpha=bad, K=2)


@pytest.mark.parametrize("make", [tuple, np.array, np.float32, torch.tensor, iter, dict.fromkeys])
def test_partitions_in_any_container(make):
    bound = TVO(K=3, partitions=make([0.0, 0.25, 0.5, 1.0]))
    assert bound.partitions == (0.0, 0.25, 0.5, 1.0)
    assert repr(bound) == "TVO(K=3, partitions=(0.0, 0.25, 0.5, 1.0))"


@pytest.mark.parametrize("count", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_the_number_of_partitions_may_be_an_array_of_one(count):
    assert TVO(K=3, partitions=count).partitions == TVO(K=3, partitions=3).partitions


@pytest.mark.parametrize(
    "bad",
    [
        *(0, -1, (0.0,), (0.0, 0.5), (0.1, 1.0), (0.0, 0.5, 0.5, 1.0), (0.0, 2.0, 1.0)),
        *(torch.eye(2), np.array([0.0, 2.0]), "all", torch.tensor(1.5), [None, 1.0], []),
    ],
)
def test_partitions_must_increase_from_0_to_1(bad):
    with pytest.raises(ValueError, match="partitions must"):
        TVO(K=2, partitions=bad)


def test_numpy_integers_count():
    assert MIWAE(M=np.int64(2), K=np.int32(3)).num_particles == 6


def test_linear_bounds_are_those_that_average_outside_the_logarithm():
    linear = [IWAE(K=1), MIWAE(M=9, K=1), CIWAE(K=9, beta=1), CIWAE(K=1, beta=0), PIWAE(M=1, K=1)]
    linear += [VR(alpha=1, K=9), VR(alpha=0.5, K=1), TVO(K=9, partitions=1)]
    assert all(bound.is_linear for bound in linear)
    nonlinear = [IWAE(K=2), MIWAE(M=1, K=2), CIWAE(K=2, beta=0.9), PIWAE(M=2, K=1)]
    nonlinear += [VR(alpha=0.9, K=2), TVO(K=2, partitions=2), Bound()]  # of a user's own nothing is known
    assert not any(bound.is_linear for bound in nonlinear)


def test_repr_shows_the_arguments():
    assert repr(IWAE(K=5)) == "IWAE(K=5)"
    assert repr(CIWAE(K=5, beta=0.5)) == "CIWAE(K=5, beta=0.5)"
    assert repr(PIWAE(M=2, K=3)) == "PIWAE(M=2, K=3)"


def test_a_bound_without_a_value_says_so():
    with pytest.raises(NotImplementedError, match="must define value"):
        Bound(K=2).value(torch.zeros(1, 2))
