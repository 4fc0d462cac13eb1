"""Bounds: closed forms against loops and autograd, and what happens at the edges."""

import math

import numpy as np
import pytest
import torch
from truth import objectives

from pyro_iw.bounds import CIWAE, IWAE, MIWAE, PIWAE, Bound

BOUNDS = {
    "IWAE": lambda M, K: IWAE(K=M * K),
    "MIWAE": lambda M, K: MIWAE(M=M, K=K),
    "CIWAE": lambda M, K: CIWAE(K=M * K, beta=0.3),
    "PIWAE": lambda M, K: PIWAE(M=M, K=K),
}


def grouped(log_w, bound):
    return log_w.reshape(bound.M, bound.K, *log_w.shape[1:])


@pytest.mark.parametrize(("M", "K"), [(1, 1), (1, 6), (6, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("name", BOUNDS)
def test_value_and_weights_against_loops(name, M, K):
    bound = BOUNDS[name](M, K)
    leaf = (3 * torch.randn(M * K, 4, 2, dtype=torch.float64)).requires_grad_()
    values = torch.zeros(4, 2, dtype=torch.float64)
    total_a, total_b = 0.0, 0.0
    for i in range(4):
        for j in range(2):
            model_side, guide_side = objectives(name, list(leaf[:, i, j]), M, K, beta=0.3)
            values[i, j] = model_side.detach()
            total_a, total_b = total_a + model_side, total_b + guide_side
    (a,) = torch.autograd.grad(total_a, leaf, retain_graph=True)
    (b,) = torch.autograd.grad(total_b, leaf)
    log_w = grouped(leaf.detach(), bound)
    weights = bound.weights(log_w)
    torch.testing.assert_close(bound.value(log_w), values)
    torch.testing.assert_close(weights.a, grouped(a, bound))
    torch.testing.assert_close(weights.b, grouped(b, bound))
    torch.testing.assert_close(weights.a.sum((0, 1)), torch.ones(4, 2, dtype=torch.float64))
    torch.testing.assert_close(weights.b.sum((0, 1)), torch.ones(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["IWAE", "MIWAE", "CIWAE"])
def test_closed_form_agrees_with_the_autograd_of_a_users_own_bound(name):
    bound = BOUNDS[name](2, 3)
    log_w = grouped(torch.randn(6, 5), bound)
    closed, derived = bound.weights(log_w), Bound.weights(bound, log_w)
    torch.testing.assert_close(closed.a, derived.a)
    torch.testing.assert_close(closed.b, derived.b)


@pytest.mark.parametrize("name", BOUNDS)
def test_large_log_weights_neither_overflow_nor_vanish(name):
    bound = BOUNDS[name](2, 3)
    log_w = grouped(torch.randn(6, 5), bound)
    for shift in (1e4, -1e4):
        torch.testing.assert_close(bound.value(log_w + shift) - shift, bound.value(log_w), atol=2e-3, rtol=0)
        torch.testing.assert_close(bound.weights(log_w + shift).a, bound.weights(log_w).a, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", BOUNDS)
def test_cells_do_not_mix(name):
    bound = BOUNDS[name](2, 3)
    log_w = grouped(torch.randn(6, 5), bound)
    other = log_w.clone()
    other[..., 1:] += 100 * torch.rand(4)
    assert bound.value(other)[0] == bound.value(log_w)[0]
    torch.testing.assert_close(bound.weights(other).b[..., 0], bound.weights(log_w).b[..., 0])


@pytest.mark.parametrize("name", BOUNDS)
def test_a_cell_without_density_is_minus_infinity_and_weighs_nothing(name):
    bound = BOUNDS[name](2, 3)
    log_w = grouped(torch.randn(6, 2), bound)
    log_w[..., 0] = -math.inf
    value, weights = bound.value(log_w), bound.weights(log_w)
    assert value[0] == -math.inf
    assert torch.isfinite(value[1])
    for weight in weights:
        assert (weight[..., 0] == 0).all()
        torch.testing.assert_close(weight[..., 1].sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (IWAE(K=2), math.log(0.5)),
        (CIWAE(K=2, beta=0.0), math.log(0.5)),
        (CIWAE(K=2, beta=0.5), -math.inf),
        (CIWAE(K=2, beta=1.0), -math.inf),
        (MIWAE(M=2, K=1), -math.inf),
        (PIWAE(M=2, K=1), math.log(0.5)),
    ],
    ids=repr,
)
def test_one_particle_without_density(bound, expected):
    log_w = grouped(torch.tensor([-math.inf, 0.0]), bound)
    assert bound.value(log_w).item() == pytest.approx(expected)
    for weight in bound.weights(log_w):
        assert weight.flatten()[0] == 0
        assert torch.isfinite(weight).all()


def test_a_nan_stays_one():
    log_w = torch.tensor([[math.nan, 0.0]])
    assert IWAE(K=2).value(log_w).isnan()
    assert IWAE(K=2).weights(log_w).a.isnan().any()


def test_a_users_own_bound_gives_no_weight_to_dead_particles():
    class PowerMean(Bound):
        def value(self, log_w):
            return 2 * ((0.5 * log_w).logsumexp((0, 1)) - math.log(self.num_particles))

    log_w = torch.tensor([[0.0, math.log(4.0), -math.inf]])
    bound = PowerMean(K=3)
    assert bound.value(log_w).item() == pytest.approx(0.0)  # ((1 + 2 + 0) / 3) ** 2 = 1
    torch.testing.assert_close(bound.weights(log_w).a, torch.tensor([[1 / 3, 2 / 3, 0.0]]))
    assert (bound.weights(torch.full((1, 3), -math.inf)).a == 0).all()


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


def test_numpy_integers_count():
    assert MIWAE(M=np.int64(2), K=np.int32(3)).num_particles == 6


def test_linear_bounds_are_those_that_average_outside_the_logarithm():
    linear = [IWAE(K=1), MIWAE(M=9, K=1), CIWAE(K=9, beta=1), CIWAE(K=1, beta=0), PIWAE(M=1, K=1)]
    assert all(bound.is_linear for bound in linear)
    nonlinear = [IWAE(K=2), MIWAE(M=1, K=2), CIWAE(K=2, beta=0.9), PIWAE(M=2, K=1)]
    assert not any(bound.is_linear for bound in nonlinear)


def test_repr_shows_the_arguments():
    assert repr(IWAE(K=5)) == "IWAE(K=5)"
    assert repr(CIWAE(K=5, beta=0.5)) == "CIWAE(K=5, beta=0.5)"
    assert repr(PIWAE(M=2, K=3)) == "PIWAE(M=2, K=3)"


def test_a_bound_without_a_value_says_so():
    with pytest.raises(NotImplementedError, match="must define value"):
        Bound(K=2).value(torch.zeros(1, 2))
