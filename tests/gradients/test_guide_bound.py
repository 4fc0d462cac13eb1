"""A guide that climbs another bound, of another split: gradients against those written out by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

import pyro_iw.compiling.inductor as inductor
from helpers.truth import normal
from pyro_iw import ImportanceWeightedELBO
from pyro_iw.bounds import CIWAE, IWAE, MIWAE, TVO, VR, Bound
from pyro_iw.compiling.program import Program

X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
NOISE, PRIOR = torch.tensor([0.8, 0.4], dtype=torch.float64)


class Split(Bound):
    """A bound for the model and another for the guide."""

    def __init__(self, outer, inner):
        super().__init__(outer.M, outer.K)
        self.outer, self.inner = outer, inner

    guide_bound = property(lambda self: self.inner)

    def value(self, log_w):
        return self.outer.value(log_w)


class Switched:
    """y ~ Bernoulli, z | y and x | z normal; without y, every site has a path."""

    def __init__(self, x, path=True):
        self.x, self.path, self.drawn = x, path, []
        self.w = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        self.a = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
        self.c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def model(self):
        w = pyro.param("w", self.w)
        with pyro.plate("data", len(self.x)):
            y = pyro.sample("y", dist.Bernoulli(PRIOR)) if not self.path else 0.0
            z = pyro.sample("z", dist.Normal(w + y, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=self.x)
        both = y + torch.zeros_like(z), z.detach()
        self.drawn.append(tuple(value.reshape(-1, len(self.x)) for value in both))

    def guide(self):
        a, c = pyro.param("a", self.a), pyro.param("c", self.c)
        with pyro.plate("data", len(self.x)):
            y = 0.0
            if not self.path:
                y = pyro.sample("y", dist.Bernoulli(logits=a + self.x))
            pyro.sample("z", dist.Normal(0.5 * self.x + a + 0.2 * y, c))

    def particles(self, count):
        """(y, z) of the last particles drawn, each ``[count, N]``."""
        return tuple(torch.cat(values)[-count:] for values in zip(*self.drawn, strict=True))

    def gradients(self, loss, seed=0):
        pyro.clear_param_store()
        loss.loss(self.model, self.guide)  # here the pair is got to know, by runs of its own
        self.drawn.clear()
        pyro.set_rng_seed(seed)
        loss.loss_and_grads(self.model, self.guide)
        found = {}
        for name in ("w", "a", "c"):
            unconstrained = pyro.param(name).unconstrained()
            found[name], unconstrained.grad = unconstrained.grad.clone(), None
        return found


def lme(terms):
    return torch.stack(terms).logsumexp(0) - math.log(len(terms))


def bound_of(split, terms):
    """Of M groups of K, written out; linear if K = 1."""
    M, K = split
    return sum(lme(terms[m * K : (m + 1) * K]) for m in range(M)) / M


def by_hand(problem, outer, inner, estimator):
    """Gradients of minus the bounds, by loops over the particles that were drawn."""
    count = outer[0] * outer[1]
    y, z = (value.detach() for value in problem.particles(count))
    w, a, c = (leaf.detach().clone().requires_grad_() for leaf in (problem.w, problem.a, problem.c))
    x = problem.x

    def log_p(y, z):
        value = normal(z, w + y, 1.0) + normal(x, z, NOISE)
        return value if problem.path else value + dist.Bernoulli(PRIOR).log_prob(y)

    def log_q_y(y):
        return 0.0 if problem.path else dist.Bernoulli(logits=a + x).log_prob(y)

    def log_q(y, z, a, c):
        return normal(z, 0.5 * x + a + 0.2 * y, c)

    # Sampling again from the same noise gives z its path.
    loc = 0.5 * x + a + 0.2 * y
    path = loc + c * ((z - loc) / c).detach()
    stopped = [log_p(y[i], z[i]) - log_q(y[i], z[i], a, c) - log_q_y(y[i]) for i in range(count)]
    log_w = [term.detach() for term in stopped]
    (of_w,) = torch.autograd.grad(-bound_of(outer, stopped).sum(), w)
    if estimator == "rws":
        M, K = inner
        total = 0.0
        for m in range(M):
            weights = torch.softmax(torch.stack(log_w[m * K : (m + 1) * K]), 0)
            for k in range(K):
                i = m * K + k
                total = total + weights[k] * (log_q(y[i], z[i], a, c) + log_q_y(y[i])) / M
    elif estimator == "dreg":
        # Path alone; the weight of particle i is s² within its group of the guide's bound, over M.
        M, K = inner
        total = 0.0
        for m in range(M):
            weights = torch.softmax(torch.stack(log_w[m * K : (m + 1) * K]), 0)
            for k in range(K):
                i = m * K + k
                along = log_p(y[i], path[i]) - log_q(y[i], path[i], a.detach(), c.detach())
                total = total + weights[k] ** 2 * along / M
    else:
        along = [log_p(y[i], path[i]) - log_q(y[i], path[i], a, c) - log_q_y(y[i]) for i in range(count)]
        total = bound_of(inner, along)
        if not problem.path:
            M, K = inner
            for i in range(count):
                group = range(count) if K == 1 else range(i // K * K, i // K * K + K)
                others = [log_w[j] for j in group if j != i]
                mean = sum(others) / len(others)
                instead = lme(others) if K > 1 and estimator == "score" else mean
                changed = [*log_w[:i], instead, *log_w[i + 1 :]]
                total = total + (bound_of(inner, log_w) - bound_of(inner, changed)) * log_q_y(y[i])
    of_a, of_c = torch.autograd.grad(-total.sum(), [a, c])
    return {"w": of_w, "a": of_a, "c": of_c}


SPLITS = [((1, 8), (8, 1)), ((1, 8), (2, 4)), ((2, 4), (1, 8)), ((8, 1), (4, 2)), ((4, 2), (2, 4))]
WAYS = {
    "vectorised": {},
    "one by one": {"vectorize_particles": False},
    "chunks": {"chunk_size": 3},
}


def covered(estimator, inner):
    return inner[1] > 1 or estimator not in ("vimco", "rws")


CASES = [
    (outer, inner, estimator, path)
    for outer, inner in SPLITS
    for estimator, path in [
        ("reparam", True),
        ("dreg", True),
        ("rws", True),
        ("score", False),
        ("vimco", False),
        ("rws", False),
    ]
    if covered(estimator, inner)
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("outer", "inner", "estimator", "path"), CASES)
def test_gradients(outer, inner, estimator, path, way):
    problem = Switched(X, path)
    loss = ImportanceWeightedELBO(Split(MIWAE(*outer), MIWAE(*inner)), estimator=estimator, **WAYS[way])
    found = problem.gradients(loss)
    expected = by_hand(problem, outer, inner, estimator)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("outer", "inner"), SPLITS[:3])
def test_backward_on_a_few_particles(outer, inner):
    # The mean over 4000 cells of an unbiased gradient; its noise is that of the choice of particles alone.
    x = X.repeat(1334)
    problem = Switched(x)
    bound = Split(MIWAE(*outer), MIWAE(*inner))
    found = [
        problem.gradients(ImportanceWeightedELBO(bound, backward_particles=4), seed) for seed in range(6)
    ]
    for name in found[0]:
        each = []
        for seed, one in enumerate(found):
            problem.gradients(ImportanceWeightedELBO(bound), seed)
            each.append(one[name] - by_hand(problem, outer, inner, "reparam")[name])
        off = torch.stack(each)
        assert abs(off.mean()) < 5 * off.std() / 6**0.5
        assert off.abs().max() < 0.1 * len(x)


def plain_model(x):
    with pyro.plate("data", 3):
        y = pyro.sample("y", dist.Bernoulli(0.4))
        z = pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.4)) + y, 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def plain_guide(x):
    a = pyro.param("a", torch.tensor(-0.3))
    with pyro.plate("data", 3):
        y = pyro.sample("y", dist.Bernoulli(logits=a + x))
        pyro.sample("z", dist.Normal(0.5 * x + a + 0.2 * y, 0.7))


@pytest.mark.parametrize("estimator", ["score", "vimco", "rws"])
@pytest.mark.parametrize(
    "bound",
    [Split(IWAE(8), MIWAE(2, 4)), IWAE(8), CIWAE(8, 0.3), VR(0.5, 8), VR(1 - 1e-8, 8), TVO(8, 4)],
    ids=repr,
)
def test_compiled(bound, estimator, monkeypatch):
    monkeypatch.setattr(inductor, "inductor", lambda graph, inputs: lambda args: graph(*args))
    found = {}
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        loss = ImportanceWeightedELBO(bound, estimator=estimator, compile=compile)
        svi = SVI(plain_model, plain_guide, Adam({"lr": 0.01}), loss=loss)
        losses = [svi.step(X.float()) for _ in range(5)]
        found[compile] = [*losses, pyro.param("w").item(), pyro.param("a").item()]
    assert any(isinstance(program, Program) for program in loss._compiler._programs.values())
    assert found[True] == pytest.approx(found[False], rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inner", [MIWAE(3, 2), IWAE(4), VR(0.5, 9)], ids=repr)
def test_another_number_of_particles_is_refused(inner, way):
    loss = ImportanceWeightedELBO(Split(IWAE(8), inner), **WAYS[way])
    message = (
        rf"guide_bound of Split\(.*\) is .*, of {inner.num_particles} particles, but there are 8.*M \* K = 8"
    )
    with pytest.raises(ValueError, match=message):
        Switched(X).gradients(loss)


def test_a_linear_bound_with_a_guide_bound_that_is_not_minds_the_scale():
    """A subsampled plate below a global latent scales what is inside the guide's logarithm."""

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=2):
            pyro.sample("x", dist.Normal(g, 1.0), obs=torch.zeros(2))

    def guide():
        pyro.sample("g", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    ImportanceWeightedELBO(MIWAE(4, 1)).loss_and_grads(model, guide)
    with pytest.raises(ValueError, match="data"):
        ImportanceWeightedELBO(Split(MIWAE(4, 1), IWAE(4))).loss_and_grads(model, guide)
