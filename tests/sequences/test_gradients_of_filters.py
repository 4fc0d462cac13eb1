"""Gradients of filters: against a loop over particles on the same draws, and against exact expectations."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor
from torch.distributions import Normal

from helpers.linear_gaussian import S0, B, Proposal, Q, Walk, simulate
from pyro_iw import FIVO_ELBO
from pyro_iw.sequences.protocol import Protocol, read_sequences

K, T, N = 4, 6, 3
OPTIONS = [
    {"ess_threshold": 0.0},
    {"ess_threshold": 0.7},
    {"ess_threshold": 1.0},
    {"ess_threshold": 1.0, "resampling": "multinomial"},
    {"ess_threshold": 1.0, "resampling": "multinomial", "resampling_gradient": True},
    {"ess_threshold": 1.0, "estimator": "dreg"},
]


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def parameters() -> dict[str, Tensor]:
    return {"transition": leaf(0.9), "noise": leaf(0.7), "a": leaf(0.5), "b": leaf(0.4), "s": leaf(0.6)}


def pair(p: dict[str, Tensor]) -> Protocol:
    return Protocol(Walk(p["transition"], p["noise"]), Proposal(p["a"], p["b"], p["s"]))


def by_hand(p: dict[str, Tensor], x: Tensor, filtered, loss: FIVO_ELBO) -> tuple[Tensor, Tensor]:
    """The bound, and a scalar with its gradient: loops over sequences, steps and particles."""
    bound, surrogate = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for n in range(x.shape[1]):
        state, since = [None] * K, [torch.zeros((), dtype=torch.float64)] * K
        parts, scores = [], []
        for t, moment in enumerate(filtered.moments):
            values = moment.traces.pairs[0].guide.nodes["z"]["value"].detach()[:, n]
            if moment.draw is not None and bool(moment.draw.chosen[0, n]):
                total = torch.stack(since)
                parts.append(total.logsumexp(0) - math.log(K))
                ancestors = moment.draw.ancestors[:, n].tolist()
                scores.append((len(parts), sum(total.log_softmax(0)[a] for a in ancestors)))
                state = [state[a] for a in ancestors]
                since = [torch.zeros((), dtype=torch.float64)] * K
            new, densities = [], []
            for k in range(K):
                h = state[k]
                loc = p["b"] * x[t, n] if h is None else p["a"] * h + p["b"] * x[t, n]
                noise = ((values[k] - loc) / p["s"]).detach()
                z = loc + p["s"] * noise
                densities.append((h, loc, z, t))
                since[k] = since[k] + log_p(p, x, n, h, z, t) - Normal(loc, p["s"]).log_prob(z)
                new.append(z)
            if loss.estimator == "dreg":
                fixed = {name: value.detach() for name, value in p.items()}
                s = torch.stack(since).detach().softmax(0)
                for k, (h, loc, z, t) in enumerate(densities):
                    h_fixed = None if h is None else h.detach()
                    alone = log_p(fixed, x, n, h_fixed, z, t) - Normal(loc.detach(), fixed["s"]).log_prob(z)
                    surrogate = surrogate + s[k] * log_p(p, x, n, h, z.detach(), t) + s[k] ** 2 * alone
            state = new
        parts.append(torch.stack(since).logsumexp(0) - math.log(K))
        bound = bound + sum(parts)
        if loss.estimator != "dreg":
            surrogate = surrogate + sum(parts)
        if loss.resampling_gradient:
            for index, score in scores:
                surrogate = surrogate + sum(parts[index:]).detach() * score
    return bound, surrogate


def log_p(p, x, n, h, z, t):
    prior = Normal(torch.zeros((), dtype=torch.float64), S0) if h is None else Normal(p["transition"] * h, Q)
    return prior.log_prob(z) + Normal(B * z, p["noise"]).log_prob(x[t, n])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_a_loop_on_the_same_particles_and_ancestors(options, parameters) -> None:
    x = simulate(T, N)
    loss = FIVO_ELBO(K, **options)
    filtered, estimate = loss._estimate(pair(parameters), read_sequences((x,), {}), 1.0)
    estimate.loss.backward()
    bound, surrogate = by_hand(parameters, x, filtered, loss)
    resampled = sum(int(moment.draw.chosen.sum()) for moment in filtered.moments if moment.draw is not None)
    assert resampled == {0.0: 0, 1.0: N * (T - 1)}.get(loss.ess_threshold, resampled)
    assert loss.ess_threshold in (0, 1) or 0 < resampled < N * (T - 1)
    torch.testing.assert_close(estimate.loss, -bound, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(-surrogate, list(parameters.values()))
    for (name, parameter), grad in zip(parameters.items(), expected, strict=True):
        torch.testing.assert_close(
            parameter.grad, grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


NODES = 14
X = torch.tensor([1.5, -0.5], dtype=torch.float64)


def expectation(p: dict[str, Tensor], fixed_ancestors: bool) -> Tensor:
    """E[V] of two particles over two steps, resampled in between: Gauss-Hermite over four draws of noise.

    Arguments:
        p: the parameters.
        fixed_ancestors: leave out the derivative of the ancestors' probabilities.
    """
    nodes, weights = (torch.tensor(part) for part in hermegauss(NODES))
    weights = weights / weights.sum()
    grid = torch.cartesian_prod(nodes, nodes)  # the noise of two particles
    mass = torch.cartesian_prod(weights, weights).prod(-1)

    def step(h, x):
        loc = p["b"] * x if h is None else p["a"] * h + p["b"] * x
        z = loc + p["s"] * (grid if h is None else grid.unsqueeze(1))
        prior = (
            Normal(torch.zeros((), dtype=torch.float64), S0) if h is None else Normal(p["transition"] * h, Q)
        )
        log_w = prior.log_prob(z) + Normal(B * z, p["noise"]).log_prob(x) - Normal(loc, p["s"]).log_prob(z)
        return z, log_w

    z, log_w = step(None, X[0])
    total = (mass * (log_w.logsumexp(-1) - math.log(2))).sum()
    probabilities = log_w.softmax(-1)
    if fixed_ancestors:
        probabilities = probabilities.detach()
    for i, j in itertools.product(range(2), repeat=2):
        _, second = step(torch.stack([z[:, i], z[:, j]], -1).unsqueeze(0), X[1])  # [noise, noise before, 2]
        inner = (mass.unsqueeze(-1) * (second.logsumexp(-1) - math.log(2))).sum(0)
        total = total + (mass * probabilities[:, i] * probabilities[:, j] * inner).sum()
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"resampling_gradient": True}, {}, {"estimator": "dreg"}],
    ids=str,
)
def test_expected_gradients_against_quadrature(options, parameters) -> None:
    """With the resampling's score unbiased; without it, as if its probabilities were constants."""
    draws = 200_000
    truth = torch.autograd.grad(expectation(parameters, False), list(parameters.values()))
    fixed = torch.autograd.grad(expectation(parameters, True), list(parameters.values()))
    p = {name: v.detach().expand(draws).clone().requires_grad_() for name, v in parameters.items()}
    loss = FIVO_ELBO(2, 1.0, "multinomial", **options)
    loss.differentiable_loss(*pair(p), X.unsqueeze(-1).expand(2, draws)).backward()
    biased = 0
    for name, exact, plain in zip(p, truth, fixed, strict=True):
        grads = -p[name].grad
        error = grads.std() / math.sqrt(draws)
        expected = exact if "resampling_gradient" in options else plain
        assert abs(grads.mean() - expected) < 4 * error, name
        biased += int(abs(grads.mean() - exact) > 10 * error)
    assert (biased == 0) == ("resampling_gradient" in options)


def test_dreg_is_zero_at_the_posterior_of_a_single_step() -> None:
    """Where all weights are equal there is nothing to learn, and no noise; the score is noise alone."""
    gain = S0**2 * B / (B**2 * S0**2 + 0.49)
    grads = {}
    for estimator in ("reparam", "dreg"):
        s = leaf(math.sqrt((1 - gain * B) * S0**2))
        loss = FIVO_ELBO(64, 1.0, estimator=estimator)
        loss.differentiable_loss(Walk(), Proposal(0.0, gain, s), simulate(1, 100)).backward()
        grads[estimator] = s.grad.abs()
    assert grads["dreg"] < 1e-9 < 0.1 < grads["reparam"]


class Coins:
    """A hidden coin a step, whose probability of staying is learnt; a guide of coins with learnt logits."""

    def __init__(self, p, guided=None):
        self.p, self.guided = p, guided

    def init(self, state):
        if self.guided is None:
            state["c"] = torch.zeros((), dtype=torch.float64)

    def step(self, state, x):
        with pyro.plate("data", len(x)):
            if self.guided is not None:
                pyro.sample("c", dist.Bernoulli(logits=self.guided * x + state["c"]))
                return
            stay = torch.where(state["c"] > 0, self.p, 1 - self.p)
            state["c"] = pyro.sample("c", dist.Bernoulli(stay))
            pyro.sample("x", dist.Normal(2 * state["c"], 1.0), obs=x)


@pytest.mark.slow
def test_the_score_of_discrete_sites_is_unbiased() -> None:
    draws, x = 200_000, torch.tensor([1.5, 0.2], dtype=torch.float64)
    p, g = leaf(0.7), leaf(0.3)

    def log_weight(before, now, t):
        stay = p if before else 1 - p
        log_prior = (stay if now else 1 - stay).log()
        q = torch.sigmoid(g * x[t] + before)
        log_q = (q if now else 1 - q).log()
        return log_prior + Normal(2.0 * now, 1.0).log_prob(x[t]) - log_q, log_q

    coins = list(itertools.product(range(2), repeat=2))
    total = torch.zeros((), dtype=torch.float64)
    for first in coins:
        w, q = zip(*(log_weight(0, c, 0) for c in first), strict=True)
        w, mass = torch.stack(w), sum(q).exp()
        total = total + mass * (w.logsumexp(0) - math.log(2))
        for ancestors, second in itertools.product(coins, coins):
            chance = math.prod(w.softmax(0)[a] for a in ancestors)
            w2, q2 = zip(
                *(log_weight(first[a], c, 1) for a, c in zip(ancestors, second, strict=True)), strict=True
            )
            total = total + mass * chance * sum(q2).exp() * (torch.stack(w2).logsumexp(0) - math.log(2))
    truth = torch.autograd.grad(total, [p, g])
    many = [value.detach().expand(draws).clone().requires_grad_() for value in (p, g)]
    loss = FIVO_ELBO(2, 1.0, "multinomial", True, estimator="score")
    loss.differentiable_loss(
        Coins(many[0]), Coins(None, many[1]), x.unsqueeze(-1).expand(2, draws)
    ).backward()
    for parameter, exact in zip(many, truth, strict=True):
        grads = -parameter.grad
        assert abs(grads.mean() - exact) < 4 * grads.std() / math.sqrt(draws)


def test_a_discrete_guide_without_its_score_is_refused() -> None:
    guide = Coins(None, leaf(0.3))
    with pytest.raises(ValueError, match=r"At step 0: Guide site\(s\) 'c' cannot.*estimator='score'"):
        FIVO_ELBO(2).differentiable_loss(Coins(leaf(0.7)), guide, simulate(3, 2))
    FIVO_ELBO(2, estimator="score").differentiable_loss(Coins(leaf(0.7)), guide, simulate(3, 2)).backward()
    assert guide.guided.grad != 0


@pytest.mark.parametrize("estimator", ["reparam", "score"])
def test_a_sequence_without_a_living_particle_gives_no_gradient(estimator) -> None:
    class Walled(Coins):
        def step(self, state, x):
            super().step(state, x)
            with pyro.plate("wall", len(x)):
                pyro.factor("no", torch.where(torch.arange(len(x)) == 1, -math.inf, 0.0))

    p, g = leaf(0.7), leaf(0.3) if estimator == "score" else 0.3
    loss = FIVO_ELBO(3, 1.0, "multinomial", True, estimator=estimator, plates=())
    with pytest.warns(RuntimeWarning, match="give no gradient"):
        value = loss.differentiable_loss(Walled(p), Coins(None, g), simulate(3, 2))
    value.backward()
    assert value == math.inf
    assert p.grad == 0
    loss.differentiable_loss(Coins(p), Coins(None, g), simulate(3, 2)).backward()
    assert p.grad != 0


@pytest.mark.parametrize("estimator", ["reparam", "dreg"])
def test_nor_do_the_steps_before_and_after_its_death(estimator) -> None:
    each = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    class Walled:
        def init(self, state):
            state["z"] = torch.zeros((), dtype=torch.float64)

        def step(self, state, x, t):
            with pyro.plate("data", 2):
                state["z"] = pyro.sample("z", dist.Normal(state["z"] + each, 1.0))
                dead = torch.tensor([False, t == 1])
                pyro.factor("no", torch.where(dead, -math.inf, torch.zeros(2, dtype=torch.float64)))

    class Free:
        def init(self, state):
            pass

        def step(self, state, x, t):
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Normal(state["z"] + x + each, 1.0))

    loss = FIVO_ELBO(3, 1.0, estimator=estimator)
    with pytest.warns(RuntimeWarning, match="give no gradient"):
        loss.loss_and_grads(Walled(), Free(), simulate(3, 2), range(3))
    assert each.grad[0] != 0
    assert each.grad[1] == 0
