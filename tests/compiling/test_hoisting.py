"""What is the same in every run of a graph is taken out of it, and nothing else."""

import pytest
import torch

from pyro_iw.compiling.hoisting import take_out_constants
from pyro_iw.compiling.private import traced


def split(function, inputs, varying=0):
    """The first part of a function's graph and the rest, each as a function of a list of inputs."""
    graph = traced(function, inputs, {})
    once, results = take_out_constants(graph, inputs, varying)
    return once, graph, results


def products(graph):
    return sum("mm" in str(node.target) for node in graph.graph.nodes)


W, V, X = torch.randn(3, 5), torch.randn(5, 2), torch.randn(4, 3)


def test_networks_of_the_data_and_what_is_made_of_them():
    def function(w, v, x):
        loc = (x @ w).tanh()
        z = loc + torch.randn(10, 4, 5)
        return [z @ v, loc.expand(10, 4, 5).exp() * z]

    once, rest, results = split(function, [W, V, X])
    assert products(once) == 1
    assert products(rest) == 1
    assert {result.untyped_storage().nbytes() for result in results} == {4 * 4 * 5}  # and not ten times that
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = function(W, V, X)
        torch.manual_seed(seed)
        torch.testing.assert_close(rest(W, V, X, *once(W, V, X)), expected)


def test_inputs_that_vary():
    def function(w, v, x, y):
        return [(x @ w) @ v + (y @ w) @ v]

    y = torch.randn(4, 3)
    once, rest, _ = split(function, [W, V, X, y], varying=1)
    assert (products(once), products(rest)) == (2, 2)
    other = torch.randn(4, 3)
    torch.testing.assert_close(rest(W, V, X, other, *once(W, V, X, y)), function(W, V, X, other))


@pytest.mark.parametrize("view", [False, True])
def test_memory_that_is_written_to(view):
    """``w`` changes in each run, so that its product does; also through a view of it."""

    def function(w, v, x):
        out = x @ w
        (w[0] if view else w).mul_(2)
        return [out @ v]

    once, rest, _ = split(function, [W.clone(), V, X])
    assert once is None
    w, w_again = W.clone(), W.clone()
    for _ in range(2):
        torch.testing.assert_close(rest(w, V, X), function(w_again, V, X))
    assert torch.equal(w, w_again)


def test_batch_norm_writes_in_train_mode_alone():
    mean, var = torch.zeros(5), torch.ones(5)

    def function(training):
        def run(w, x, mean, var):
            out = torch.nn.functional.batch_norm(x @ w, mean, var, training=training)
            return [out @ V.new_ones(5, 2) + mean.sum()]

        return run

    once, _, _ = split(function(False), [W, X, mean.clone(), var.clone()])
    assert "batch_norm" in str(once.graph)
    once, rest, _ = split(function(True), [W, X, mean.clone(), var.clone()])
    assert "batch_norm" in str(rest.graph)


@pytest.mark.parametrize(
    "layer",
    [lambda h: torch.nn.functional.dropout(h, 0.5), lambda h: torch.bernoulli(h.sigmoid()), torch.rand_like],
)
def test_random_layers_stay(layer):
    def function(w, v, x):
        return [layer(x @ w) @ v]

    once, rest, _ = split(function, [W, V, X])
    assert (products(once), products(rest)) == (1, 1)


def test_several_results_of_one_operation():
    def function(w, x):
        q, r = torch.linalg.qr(x @ w)
        return [q @ torch.randn(q.shape[-1], 2) + r.sum()]

    once, rest, _ = split(function, [W, X])
    torch.manual_seed(0)
    expected = function(W, X)
    torch.manual_seed(0)
    torch.testing.assert_close(rest(W, X, *once(W, X)), expected)
    assert "qr" in str(once.graph)
    assert "qr" not in str(rest.graph)


def test_nothing_to_take_out():
    once, rest, results = split(lambda x: [x + torch.randn(4, 3)], [X])
    assert once is None
    assert results == []
    torch.manual_seed(0)
    expected = X + torch.randn(4, 3)
    torch.manual_seed(0)
    assert torch.equal(rest(X)[0], expected)
