"""Guides that enumerate discrete sites: values and gradients against loops over values and particles."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.ops.indexing import Vindex

from helpers.enumerated import (
    CASES,
    PARALLEL,
    Masked,
    Upstream,
    gradients,
    hand_written,
    outside,
    per_particle,
    set_up,
    stratified,
)
from helpers.truth import normal
from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, TVO_ELBO, VR_ELBO

M, K = 2, 3
NOT_TRAINED = pytest.mark.filterwarnings("ignore:.*is not trained")
LOSSES = {
    "ELBO": lambda **kw: MIWAE_ELBO(M=M * K, K=1, **kw),
    "IWAE": lambda **kw: IWAE_ELBO(K=M * K, **kw),
    "MIWAE": lambda **kw: MIWAE_ELBO(M=M, K=K, **kw),
    "CIWAE": lambda **kw: CIWAE_ELBO(K=M * K, beta=0.3, **kw),
    "PIWAE": lambda **kw: PIWAE_ELBO(M=M, K=K, **kw),
    "VR": lambda **kw: VR_ELBO(alpha=0.3, K=M * K, **kw),
    "TVO": lambda **kw: TVO_ELBO(K=M * K, partitions=(0.0, 0.2, 0.7, 1.0), **kw),
}
MODES = ["one_pass", "one_by_one", "chunks"]
# Every loss in one pass; the other ways of running, on those with one and with two sets of weights.
COMBINATIONS = [
    (name, mode) for name in LOSSES for mode in MODES if mode == "one_pass" or name in ("MIWAE", "PIWAE")
]
RUNS = {
    "one_pass": ({}, [M * K]),
    "one_by_one": ({"vectorize_particles": False}, [None] * (M * K)),
    "chunks": ({"chunk_size": 4}, [4, 2]),
}


def assert_same(found, truth, case):
    value, grads, _ = found
    loss, theta, phi = truth
    assert value == pytest.approx(loss, rel=1e-9)
    for name, grad in {**theta, **phi}.items():
        if grad is None:
            assert grads[name] is None or not grads[name].any()
        else:
            torch.testing.assert_close(grads[name], grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize(("name", "run"), COMBINATIONS)
@pytest.mark.parametrize("case", CASES)
def test_outside_the_logarithm(case, name, run):
    case, (keywords, sizes) = case(), RUNS[run]
    found = gradients(LOSSES[name](**keywords), case)
    draws = found[2][: len(found[2]) // 2] if run == "chunks" else found[2]
    noise = per_particle(draws, M * K, sizes)
    assert_same(found, hand_written(name, case, noise, M, K), case)


@pytest.mark.parametrize("case", [case for case in CASES if case is not Masked])
def test_one_particle_is_pyros_enumerated_elbo(case):
    """Pyro counts entries of a masked guide site once for each value, so that it is left out."""
    case = case()
    nesting = 1
    theirs = gradients(TraceEnum_ELBO(max_plate_nesting=nesting), case)
    ours = gradients(IWAE_ELBO(K=1), case)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case is not Masked])
def test_particles_outside_are_pyros_enumerated_elbo(case):
    case = case()
    theirs = TraceEnum_ELBO(max_plate_nesting=1, num_particles=5, vectorize_particles=True)
    theirs, ours = gradients(theirs, case), gradients(MIWAE_ELBO(M=5, K=1), case)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-10, atol=1e-12)


@NOT_TRAINED
@pytest.mark.parametrize(("name", "run"), COMBINATIONS)
@pytest.mark.parametrize("case", [case for case in CASES if case is not Masked])
def test_inside_the_logarithm(case, name, run):
    case, (keywords, sizes) = case(), RUNS[run]
    found = gradients(LOSSES[name](stratified=True, **keywords), case)
    draws = found[2][: len(found[2]) // 2] if run == "chunks" else found[2]
    noise = per_particle(draws, M * K, sizes)
    assert_same(found, hand_written(name, case, noise, M, K, inside=True), case)


@pytest.mark.slow
@pytest.mark.parametrize("stratify", [False, True])
@NOT_TRAINED
def test_compiled(stratify, monkeypatch):
    monkeypatch.setattr("helpers.enumerated.RecordedNormal", dist.Normal)  # a list that grows is no program
    case, found = Upstream(), []
    set_up(case)
    parameters = [value.unconstrained() for value in pyro.get_param_store().values()]
    for compile in (False, True):
        loss = IWAE_ELBO(K=4, compile=compile, stratified=stratify)
        for _ in range(3):  # eager, recorded, run
            for parameter in parameters:
                parameter.grad = None
            pyro.set_rng_seed(0)
            value = loss.loss_and_grads(case.model, case.guide)
        found.append([torch.tensor(value), *(p.grad for p in parameters if p.grad is not None)])
        assert not loss._compiler._refused
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-10)


def test_where_one_density_is_for_all_particles():
    for case in CASES:
        case = case()
        gradients(IWAE_ELBO(K=4), case)
        values = IWAE_ELBO(K=4).particles(case.model, case.guide).values
        assert values.is_free == (not isinstance(case, Upstream))


# ----------------------------------------------------------------------------------------------------
# Other estimators: expected gradients, from N copies of a problem in one plate
# ----------------------------------------------------------------------------------------------------

N = 20_000
X = 0.8


def copies(name, value):
    """A parameter with a copy of its own for each problem."""
    value = torch.tensor(value, dtype=torch.float64)
    return pyro.param(name, value.expand(N, *value.shape).clone())


def at(table, index):
    """Each copy's entry of a parameter."""
    return Vindex(table)[..., torch.arange(N), index]


class Continuous:
    """A draw for each value, and one before it where ``shared``, on which y depends where ``upstream``."""

    def __init__(self, shared=False, upstream=False):
        self.shared, self.upstream = shared, upstream

    def model(self):
        means = torch.tensor([-1.0, 0.5, 1.7], dtype=torch.float64)
        with pyro.plate("copies", N):
            u = (
                pyro.sample("u", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
                if self.shared
                else 0.0
            )
            y = pyro.sample("y", dist.Categorical(logits=torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)))
            z = pyro.sample("z", dist.Normal(means[y] + u, 1.0))
            pyro.sample("x", dist.Normal(0.7 * z, 0.9), obs=torch.full((N,), X, dtype=torch.float64))

    def guide(self):
        a, b = copies("a", [0.4, -0.7, 0.2]), copies("b", [0.1, 0.6, -0.3])
        c, d = copies("c", 0.8), copies("d", 0.3)
        with pyro.plate("copies", N):
            u = pyro.sample("u", dist.Normal(d, c)) if self.shared else torch.zeros(N, dtype=torch.float64)
            logits = a * X + (a * u[..., None] if self.upstream else 0.0)
            y = pyro.sample("y", dist.Categorical(logits=logits), infer=PARALLEL)
            pyro.sample("z", dist.Normal(at(b, y) * X + d * u, c * torch.exp(0.3 * u)))


def drawn(loss, pair, seed):
    """Gradients of all copies, of shape [N, parameters]."""
    pyro.clear_param_store()
    pair.guide()
    pyro.set_rng_seed(seed)
    loss.loss_and_grads(pair.model, pair.guide)
    values = [value.unconstrained() for _, value in sorted(pyro.get_param_store().items())]
    return torch.cat([(torch.zeros_like(v) if v.grad is None else v.grad).reshape(N, -1) for v in values], 1)


def assert_same_mean(grads, others):
    """Within 4 standard errors of the difference."""
    error = ((grads.var(0) + others.var(0)) / N).sqrt()
    assert ((grads.mean(0) - others.mean(0)).abs() <= 4 * error + 1e-12).all()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["ELBO", "MIWAE", "CIWAE", "PIWAE"])
def test_the_path_alone_is_unbiased(name, shared):
    pair = Continuous(shared)
    total = drawn(LOSSES[name](), pair, 0)
    path = drawn(LOSSES[name](estimator="dreg"), pair, 1)
    assert_same_mean(total, path)
    b = slice(3, 6)
    assert (path.var(0)[b] < 0.6 * total.var(0)[b]).all()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["dreg", "stl", "score"])
def test_a_mean_of_enumerations_given_draws(estimator):
    pair = Continuous(shared=True, upstream=True)
    total = drawn(LOSSES["ELBO"](), pair, 0)
    assert_same_mean(total, drawn(LOSSES["ELBO"](estimator=estimator), pair, 1))


class Discrete:
    """A draw d without a path: ``per`` value of y, ``shared`` by all, or ``upstream`` of y."""

    means = torch.tensor([[-1.0, 0.5], [0.3, 1.7]], dtype=torch.float64)

    def __init__(self, kind):
        self.kind = kind

    def model(self):
        with pyro.plate("copies", N):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            d = pyro.sample("d", dist.Bernoulli(torch.where(y > 0, 0.3, 0.8).double()))
            loc = Vindex(self.means)[y.long(), d.long()]
            pyro.sample("x", dist.Normal(loc, 0.7), obs=torch.full((N,), 0.9, dtype=torch.float64))

    def guide(self):
        a, b = copies("a", 0.4), copies("b", [0.1, 0.6])
        with pyro.plate("copies", N):
            if self.kind == "upstream":
                d = pyro.sample("d", dist.Bernoulli(logits=b[:, 0]))
                pyro.sample("y", dist.Bernoulli(logits=a + b[:, 1] * d), infer=PARALLEL)
            else:
                y = pyro.sample("y", dist.Bernoulli(logits=a), infer=PARALLEL)
                pyro.sample("d", dist.Bernoulli(logits=at(b, y.long()) if self.kind == "per" else b[:, 0]))

    def log_p(self, y, d):
        prior = (0.3 if d else 0.7) if y else (0.8 if d else 0.2)
        x = torch.tensor(0.9, dtype=torch.float64)
        return math.log((0.4 if y else 0.6) * prior) + normal(x, self.means[y, d], 0.7)

    def gradient(self, name, M, K, inside):
        """Of minus the expected objective of the guide, by listing all draws."""
        a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        b = torch.tensor([0.1, 0.6], dtype=torch.float64, requires_grad=True)

        def coin(value, logit):
            return torch.nn.functional.logsigmoid(logit if value else -logit)

        def log_q_d(d, y):
            return coin(d, b[y] if self.kind == "per" else b[0])

        def log_q_y(y, d):
            return coin(y, a + b[1] * d if self.kind == "upstream" else a)

        join, total = stratified if inside else outside, 0.0
        width = 2 if self.kind == "per" else 1
        for draws in itertools.product((0, 1), repeat=M * K * width):
            each = [draws[k * width : (k + 1) * width] * (3 - width) for k in range(M * K)]  # d for y = 0, 1
            particles = [
                [(self.log_p(y, d[y]), log_q_d(d[y], y), log_q_y(y, d[y])) for y in (0, 1)] for d in each
            ]
            probability = sum(log_q_d(d[y], y) for d in each for y in range(width)).exp()
            total = total + probability * join(name, particles, M, K, True)[1]
        grads = torch.autograd.grad(-total, [a, b], allow_unused=True)
        return torch.cat([torch.zeros(1) if g is None else g.reshape(-1) for g in grads])


@NOT_TRAINED
@pytest.mark.parametrize("estimator", ["score", "vimco"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["per", "shared", "upstream"])
@pytest.mark.parametrize("name", ["ELBO", "IWAE", "MIWAE", "PIWAE"])
def test_scores_of_other_sites(name, kind, inside, estimator):
    if (kind == "upstream" and not inside and name != "ELBO") or (name == "ELBO" and estimator == "vimco"):
        return  # refused
    m, k = {"ELBO": (2, 1), "IWAE": (1, 2)}.get(name, (2, 2))
    make = {"ELBO": MIWAE_ELBO, "MIWAE": MIWAE_ELBO, "PIWAE": PIWAE_ELBO}.get(name)
    keywords = {"estimator": estimator, "stratified": inside}
    loss = make(M=m, K=k, **keywords) if make else IWAE_ELBO(K=k, **keywords)
    pair = Discrete(kind)
    grads = drawn(loss, pair, 3)
    error = (grads.var(0) / N).sqrt()
    truth = pair.gradient(name, m, k, inside)
    assert ((grads.mean(0) - truth).abs() <= 4.5 * error + 1e-12).all()
