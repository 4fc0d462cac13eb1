"""What a filter estimates: against a Kalman filter, quadrature on a grid, and the forward algorithm."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor

from helpers.linear_gaussian import S0, B, Proposal, Walk, kalman, near_optimal, simulate
from pyro_iw import FIVO_ELBO, IWAE_ELBO, ParticleFilter
from pyro_iw.sequences.protocol import Protocol, read_sequences

SETTINGS = list(itertools.product((0.0, 0.5, 1.0), ("systematic", "multinomial")))
NOISE = 2.0  # little is seen, so that the weights of 50 steps stay within reach


@torch.no_grad()
def values(loss: FIVO_ELBO, model, guide, *args, **kwargs) -> Tensor:
    """The bound of every sequence."""
    return loss._estimate(Protocol(model, guide), read_sequences(args, kwargs), 1.0)[1].bound


def agrees(log_estimates: Tensor, truth: Tensor, width: float = 4.0) -> bool:
    """Whether the mean of the estimates is the truth within their standard error; draws on the last dim."""
    ratio = (log_estimates - truth.unsqueeze(-1)).exp()
    error = ratio.std(-1) / math.sqrt(ratio.shape[-1])
    assert (error < 0.1).all(), error
    return bool(((ratio.mean(-1) - 1).abs() < width * error).all())


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "scheme"), SETTINGS)
def test_the_mean_of_the_estimate_is_the_likelihood(threshold, scheme) -> None:
    x = simulate(50, 2)
    truth, *_ = kalman(x, noise=NOISE)
    many = values(
        FIVO_ELBO(32, threshold, scheme), Walk(noise=NOISE), near_optimal(NOISE), x.repeat_interleave(4000, 1)
    )
    assert agrees(many.reshape(2, 4000), truth)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["systematic", "multinomial"])
def test_the_bound_rises_with_the_number_of_particles(scheme) -> None:
    x = simulate(50, 1)
    truth, *_ = kalman(x)
    draws = x.expand(50, 1000)
    means = [values(FIVO_ELBO(K, 0.5, scheme), Walk(), Proposal(), draws).mean() for K in (2, 8, 32, 128)]
    gaps = [(truth - mean).item() for mean in means]
    assert all(high > 2 * low for high, low in itertools.pairwise(gaps)), gaps
    assert 0 < gaps[-1] < 0.5


@pytest.mark.slow
def test_long_sequences() -> None:
    """At T = 200 and K = 16 the gap is less than a tenth of that of the importance-weighted bound."""
    x = simulate(200, 1)
    truth, *_ = kalman(x)
    draws = x.expand(200, 200)
    filtered, weighted = (
        (truth - values(FIVO_ELBO(16, threshold), Walk(), near_optimal(scale=2.0), draws).mean()).item()
        for threshold in (0.5, 0.0)
    )
    assert 0 < filtered < weighted / 10, (filtered, weighted)


class Whole:
    """The same walk as one ordinary model and guide."""

    def model(self, x):
        z = None
        with pyro.plate("data", x.shape[1], dim=-1):
            for t, row in enumerate(x):
                prior = dist.Normal(torch.zeros(()).to(x), S0) if z is None else Walk().next(z)
                z = pyro.sample(f"z_{t}", prior)
                pyro.sample(f"x_{t}", dist.Normal(B * z, 0.7), obs=row)

    def guide(self, x):
        z, q = None, Proposal()
        with pyro.plate("data", x.shape[1], dim=-1):
            for t, row in enumerate(x):
                loc = q.b * row if z is None else q.a * z + q.b * row
                z = pyro.sample(f"z_{t}", dist.Normal(loc, q.s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("K", [1, 5])
def test_without_resampling_it_is_iwae_to_the_bit(K, dtype) -> None:
    x, whole = simulate(9, 4).to(dtype), Whole()
    FIVO_ELBO(K, 0.0).loss(Walk(), Proposal(), x)
    IWAE_ELBO(K).loss(whole.model, whole.guide, x)
    losses = []
    filters, weighted = FIVO_ELBO(K, 0.0), IWAE_ELBO(K)
    for loss, pair in ((filters, (Walk(), Proposal())), (weighted, (whole.model, whole.guide))):
        loss.loss(*pair, x)  # the first run looks at the pair
        pyro.set_rng_seed(3)
        losses.append(loss.loss(*pair, x))
    assert losses[0] == losses[1]


def test_all_ways_to_the_loss_are_one() -> None:
    x = simulate(9, 4)
    p = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    model, guide = Walk(), Proposal(p)
    loss = FIVO_ELBO(6)
    seen = []
    for evaluate in (loss.loss, loss.loss_and_grads, loss.differentiable_loss, loss(model, guide)):
        pyro.set_rng_seed(5)
        pair = () if isinstance(evaluate, torch.nn.Module) else (model, guide)
        value = evaluate(*pair, x)
        if isinstance(value, Tensor):
            value.backward()
        seen.append(
            (
                float(value.detach() if isinstance(value, Tensor) else value),
                None if p.grad is None else p.grad.item(),
            )
        )
        p.grad = None
    assert len({value for value, _ in seen}) == 1
    assert len({grad for _, grad in seen[1:]}) == 1
    assert seen[0][1] is None
    assert loss.steps == 3


class Spline:
    """A nonlinear walk in one dimension (Kitagawa, 1996, without its forcing): z/2 + 5 z / (1 + z²)."""

    def init(self, state):
        state["z"] = torch.zeros((), dtype=torch.float64)

    def step(self, state, x):
        with pyro.plate("data", len(x)):
            z = state["z"]
            state["z"] = pyro.sample("z", dist.Normal(z / 2 + 5 * z / (1 + z**2), 1.5))
            pyro.sample("x", dist.Normal(state["z"] ** 2 / 5, 1.0), obs=x)


class SplineGuide:
    def init(self, state):
        pass

    def step(self, state, x):
        with pyro.plate("data", len(x)):
            z = state["z"]
            pyro.sample("z", dist.Normal(z / 2 + 4 * z / (1 + z**2), 2.0))


def on_a_grid(x: Tensor) -> Tensor:
    """log p(x) by the trapezoidal rule."""
    grid = torch.linspace(-16, 16, 1601, dtype=torch.float64)
    step = grid[1] - grid[0]
    z = torch.zeros(1, dtype=torch.float64)
    density, total = torch.ones(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for value in x:
        moved = dist.Normal(z / 2 + 5 * z / (1 + z**2), 1.5).log_prob(grid[:, None]).exp()
        density = (moved * density).sum(-1) * (1.0 if len(z) == 1 else step)
        density = density * dist.Normal(grid**2 / 5, 1.0).log_prob(value).exp()
        mass = density.sum() * step
        total, density, z = total + mass.log(), density / mass, grid
    return total


@pytest.mark.parametrize(("threshold", "scheme"), SETTINGS[2:])
def test_a_nonlinear_walk_against_quadrature(threshold, scheme) -> None:
    x = torch.tensor([0.3, 1.0, 2.5, 4.0, 1.0, 0.0, 3.0, 5.0], dtype=torch.float64)
    many = values(FIVO_ELBO(24, threshold, scheme), Spline(), SplineGuide(), x[:, None].expand(8, 3000))
    assert agrees(many, on_a_grid(x))


MOVE = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4]], dtype=torch.float64)
EMIT = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


class Hidden:
    """A hidden Markov model of three states, its first drawn at init."""

    def init(self, state, size):
        with pyro.plate("data", size):
            state["c"] = pyro.sample("c", dist.Categorical(START))

    def step(self, state, x):
        with pyro.plate("data", len(x)):
            state["c"] = pyro.sample("c", dist.Categorical(MOVE[state["c"]]))
            pyro.sample("x", dist.Categorical(EMIT[state["c"]]), obs=x)


class HiddenGuide:
    def init(self, state, size):
        with pyro.plate("data", size):
            pyro.sample("c", dist.Categorical(torch.full((3,), 1 / 3, dtype=torch.float64)))

    def step(self, state, x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(MOVE[state["c"]] * EMIT.T[x] + 0.1))


@pytest.mark.parametrize(("threshold", "scheme"), SETTINGS[2:])
def test_a_hidden_markov_model_against_the_forward_algorithm(threshold, scheme) -> None:
    x = torch.tensor([0, 0, 2, 1, 1, 0, 2, 2, 2, 1, 0, 0])
    alpha, truth = START, torch.zeros((), dtype=torch.float64)
    for value in x:
        alpha = (alpha @ MOVE) * EMIT[:, value]
        truth, alpha = truth + alpha.sum().log(), alpha / alpha.sum()
    many = values(
        FIVO_ELBO(10, threshold, scheme), Hidden(), HiddenGuide(), x[:, None].expand(12, 4000), size=4000
    )
    assert agrees(many, truth)


def test_without_plates_there_is_one_filter() -> None:
    x = simulate(4, 1)
    truth, *_ = kalman(x)
    loss = FIVO_ELBO(2000, 1.0)
    assert loss.loss(Walk(plate=False), Proposal(plate=False), x[:, 0]) == pytest.approx(
        -truth.item(), abs=0.3
    )


class Scaled:
    """A walk in a subsampled plate."""

    def __init__(self, part, indices):
        self.part, self.indices = part, indices

    def init(self, state):
        self.part.init(state)

    def step(self, state, x):
        size = x.shape[-1]

        def plate(x, _):
            return pyro.plate("data", 12, subsample=self.indices)

        import helpers.linear_gaussian as module

        before, module.data = module.data, plate
        try:
            self.part.step(state, x[self.indices] if size == 12 else x)
        finally:
            module.data = before


def test_a_minibatch_is_scaled_outside() -> None:
    x, indices = simulate(6, 12), torch.tensor([1, 5, 8])
    loss = FIVO_ELBO(5)
    pair = Scaled(Walk(), indices), Scaled(Proposal(), indices)
    loss.loss(*pair, x)
    loss.loss(Walk(), Proposal(), x[:, indices])
    pyro.set_rng_seed(1)
    minibatch = loss.loss(*pair, x)
    pyro.set_rng_seed(1)
    alone = loss.loss(Walk(), Proposal(), x[:, indices])
    assert minibatch == pytest.approx(4 * alone, rel=1e-12)


class Subsampling:
    """A plate that draws its own minibatch, the same at every step."""

    def __init__(self, seen=None):
        self.seen = seen

    def init(self, state):
        if self.seen is not None:
            state["z"] = torch.zeros((), dtype=torch.float64)

    def step(self, state, x):
        with pyro.plate("data", 12, subsample_size=4) as indices:
            if self.seen is not None:
                self.seen.append(indices.tolist())
            z = pyro.sample("z", dist.Normal(0.9 * state["z"], 1.0))
            if self.seen is None:
                return
            state["z"] = z
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[indices])


def test_one_minibatch_a_run() -> None:
    model = Subsampling([])
    loss = FIVO_ELBO(5)
    for _ in range(3):
        model.seen.clear()
        loss.loss(model, Subsampling(), simulate(6, 12))
        assert len({tuple(indices) for indices in model.seen[-6:]}) == 1


def test_a_scale_that_all_share_goes_outside() -> None:
    x = simulate(6, 3)

    class Weighted:
        def __init__(self, part, scales):
            self.part, self.scales, self.init = part, scales, part.init

        def step(self, state, x, scale):
            with poutine.scale(scale=scale):
                self.part.step(state, x)

    pair = Weighted(Walk(), 1), Weighted(Proposal(), 1)
    losses = []
    for scale in (1.0, 0.25):
        FIVO_ELBO(5).loss(*pair, x, [scale] * 6)
        pyro.set_rng_seed(2)
        losses.append(FIVO_ELBO(5).loss(*pair, x, [scale] * 6))
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-12)
    with pytest.raises(ValueError, match=r"At step 2 the bound is scaled by 0\.5, and at step 0 by 1"):
        FIVO_ELBO(5).loss(*pair, x, [1.0, 1.0, 0.5, 0.5, 0.5, 0.5])


class Learnt(PyroModule):
    def __init__(self):
        super().__init__()
        self.drift = torch.nn.Parameter(torch.tensor(0.0))
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)
        self.emission = torch.nn.Linear(1, 1)

    def init(self, state):
        state["z"] = torch.zeros(())

    def step(self, state, x):
        with pyro.plate("data", len(x)):
            state["z"] = pyro.sample("z", dist.Normal(state["z"] + self.drift, self.scale))
            pyro.sample("x", dist.Normal(self.emission(state["z"].unsqueeze(-1)).squeeze(-1), 1.0), obs=x)


class LearntGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5))

    def init(self, state):
        pass

    def step(self, state, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((1 - self.gain) * state["z"] + self.gain * x, 0.7))


def test_pyro_modules_with_parameters_of_their_own() -> None:
    pyro.settings.set(module_local_params=True)
    elbo = FIVO_ELBO(K=8)(Learnt(), LearntGuide())
    elbo(simulate(6, 5).float()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in elbo.parameters())
    assert not pyro.get_param_store()


def test_pyro_modules_train() -> None:
    x = simulate(6, 5).float()
    model, guide = Learnt(), LearntGuide()
    svi = SVI(model, guide, Adam({"lr": 0.1}), loss=FIVO_ELBO(K=8))
    before = {
        name: value.detach().clone() for name, value in [*model.named_parameters(), *guide.named_parameters()]
    }
    for _ in range(3):
        svi.step(x)
    after = dict([*model.named_parameters(), *guide.named_parameters()])
    assert all((after[name] - value).abs().max() > 0.01 for name, value in before.items())
    elbo = FIVO_ELBO(K=8)(model, guide)
    elbo(x).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in elbo.parameters())


def test_kl_weight_tempers_the_target() -> None:
    """With weight 0 only the likelihood counts: each step's mean over the guide's draws."""
    x = simulate(3, 2)
    loss = FIVO_ELBO(4, 0.0, kl_weight=0.0)
    filtered, estimate = loss._estimate(Protocol(Walk(), Proposal()), read_sequences((x,), {}), 0.0)
    z = torch.stack([moment.traces.pairs[0].guide.nodes["z"]["value"] for moment in filtered.moments])
    likelihood = dist.Normal(B * z, 0.7).log_prob(x.unsqueeze(1)).sum(0)
    torch.testing.assert_close(estimate.bound, likelihood.logsumexp(0) - math.log(4))
    seen = []
    loss = FIVO_ELBO(4, kl_weight=lambda steps: seen.append(steps) or 0.5)
    for _ in range(3):
        loss.loss_and_grads(Walk(), Proposal(), x)
    assert seen == [0, 1, 2]


class Second:
    """Remembers two steps, so that ``state["before"]`` has particles from the second step on alone."""

    def init(self, state, start=None):
        state["z"] = pyro.sample("z0", dist.Normal(0.0, 1.0)) if start is None else start
        if start is None:
            pyro.sample("x0", dist.Normal(state["z"], 0.5), obs=torch.tensor(1.5))
        state["before"] = torch.zeros(())

    def step(self, state, x):
        z = pyro.sample("z", dist.Normal(0.5 * state["z"] + state["before"], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        state["before"], state["z"] = state["z"], z


class SecondGuide:
    def init(self, state, start=None):
        if start is None:
            pyro.sample("z0", dist.Normal(0.0, 1.0))

    def step(self, state, x):
        pyro.sample("z", dist.Normal(0.5 * state["z"] + state["before"], 1.0))


@pytest.mark.parametrize("shorter", [True, False])
def test_what_begins_to_have_particles_later_is_resampled(shorter) -> None:
    """After a run in which it had none: on a shorter sequence, or from a start that was given."""
    x = torch.tensor([1.5, 2.0, -1.0, 2.5, 3.0, -2.0])
    start = {"start": torch.zeros(())}
    judge = ParticleFilter(Second(), SecondGuide(), 4000, num_filters=8, ess_threshold=1)
    judge(x[:1] if shorter else x, **start)
    pyro.set_rng_seed(3)
    filtered = judge(x, **start) if shorter else judge(x)
    # All are jointly Gaussian: the z are A times independent noises, with z0 the first.
    A = torch.zeros(7, 7, dtype=torch.float64)
    A[0, 0] = 1
    for t in range(1, 7):
        A[t] = 0.5 * A[t - 1] + (A[t - 2] if t > 1 else 0)
        A[t, t] += 1
    if shorter:
        A[:, 0] = 0
    covariance = A @ A.T + torch.diag(torch.tensor([0.25] + [1.0] * 6, dtype=torch.float64))
    seen = torch.cat([torch.tensor([1.5]), x]).double()[shorter:]
    covariance = covariance[shorter:, shorter:]
    exact = dist.MultivariateNormal(torch.zeros_like(seen), covariance).log_prob(seen)
    assert filtered.monte_carlo_error < 0.08
    assert abs(filtered.log_marginal - exact) < 4 * filtered.monte_carlo_error
