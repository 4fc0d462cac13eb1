"""Draws that only claim a path, densities against masses, supports that move, and factors of the guide."""

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints, transforms
from pyro.distributions.testing.rejection_exponential import RejectionExponential
from pyro.distributions.testing.rejection_gamma import (
    RejectionGamma,
    ShapeAugmentedBeta,
    ShapeAugmentedDirichlet,
    ShapeAugmentedGamma,
)
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.nn.functional import logsigmoid

from pyro_iw import IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, ImportanceSampler
from pyro_iw.tracing.paths import has_biased_path, has_path
from pyro_iw.tracing.supports import is_discrete, support_moves

PATHS = ["auto", "reparam", "stl", "dreg"]
SCORES = ["score", "vimco"]
WAYS = [{}, {"chunk_size": 5}, {"backward_particles": 3}, {"vectorize_particles": False}]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def param(name, value):
    return pyro.param(name, torch.as_tensor(value).clone())


def gradients(loss, model, guide, names, runs=40):
    """Mean and standard error of the gradients of some parameters, in their unconstrained form."""
    rows = []
    for seed in range(runs):
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        loss.loss_and_grads(model, guide)
        rows.append(torch.cat([pyro.param(name).unconstrained().grad.reshape(-1) for name in names]))
    table = torch.stack(rows)
    return table.mean(0), table.std(0) / runs**0.5


def assert_agree(found, exact, sds=5):
    mean, error = found
    exact = torch.cat([torch.as_tensor(part).reshape(-1) for part in exact])
    assert ((mean - exact).abs() <= sds * error + 1e-12).all(), (mean, exact, error)
    assert (error < 0.05 * exact.abs().max() + 1e-12).all()


# A one-hot site with a discrete one below it: everything by enumeration.

TASTES = torch.tensor([1.2, -0.8, 0.4, 0.9], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
SLOPES = torch.tensor([0.5, -0.3, 0.2, 0.1], dtype=torch.float64)


def one_hot_model():
    z = pyro.sample("z", dist.OneHotCategorical(torch.ones(4) / 4))
    k = pyro.sample("k", dist.Bernoulli(logits=(z * TASTES).sum(-1)))
    pyro.factor("likelihood", 1.5 * (z * TASTES.flip(0)).sum(-1) * (1 + k))


def one_hot_guide(kind, infer=None, wrap=lambda fn: fn):
    z = pyro.sample("z", wrap(kind(logits=param("logits", LOGITS))), infer=infer or {})
    pyro.sample("k", dist.Bernoulli(logits=(z * param("slopes", SLOPES)).sum(-1)))


def two_particles(log_q, log_w):
    """Minus the bound of K = 2, by enumeration of both particles."""
    pairs = itertools.product(range(len(log_q)), repeat=2)
    return sum(
        -(log_q[i] + log_q[j]).exp() * (torch.logaddexp(log_w[i], log_w[j]) - math.log(2)) for i, j in pairs
    )


def one_hot_exact():
    logits, slopes = LOGITS.clone().requires_grad_(), SLOPES.clone().requires_grad_()

    def of_k(h):
        return torch.stack([logsigmoid(-h), logsigmoid(h)], -1)

    log_q = (logits.log_softmax(0)[:, None] + of_k(slopes)).flatten()
    log_p = (of_k(TASTES) - math.log(4) + 1.5 * TASTES.flip(0)[:, None] * torch.tensor([1, 2])).flatten()
    return torch.autograd.grad(two_particles(log_q, log_p - log_q), (logits, slopes))


@pytest.mark.parametrize("estimator", SCORES)
@pytest.mark.parametrize("wrap", [lambda fn: fn, lambda fn: fn.mask(True)], ids=["bare", "masked"])
def test_a_straight_through_site_gets_the_exact_gradient_in_the_mean(estimator, wrap):
    """And so does the site below it. With its rsample's path: (-.23, .07, .58, -.42) for the logits."""
    guide = partial(one_hot_guide, dist.OneHotCategoricalStraightThrough, wrap=wrap)
    loss = MIWAE_ELBO(M=1000, K=2, estimator=estimator)
    assert_agree(gradients(loss, one_hot_model, guide, ["logits", "slopes"]), one_hot_exact())


@pytest.mark.parametrize("estimator", [*SCORES, "rws"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_straight_through_site_is_what_it_samples(estimator, way):
    """On the same draws, to the last digits, a one-hot categorical."""
    found = []
    for kind in (dist.OneHotCategoricalStraightThrough, dist.OneHotCategorical):
        pyro.clear_param_store()
        loss = MIWAE_ELBO(M=3, K=4, estimator=estimator, **way)
        pyro.set_rng_seed(0)
        loss.loss_and_grads(one_hot_model, partial(one_hot_guide, kind))
        found.append([pyro.param(name).grad for name in ("logits", "slopes")])
    for through, plain in zip(*found, strict=True):
        torch.testing.assert_close(through, plain)


BIASED = {
    "OneHotCategoricalStraightThrough": lambda p: dist.OneHotCategoricalStraightThrough(logits=p * TASTES),
    "torch's own": lambda p: torch.distributions.OneHotCategoricalStraightThrough(logits=p * TASTES),
    "RelaxedBernoulliStraightThrough": lambda p: dist.RelaxedBernoulliStraightThrough(
        torch.tensor(0.7), logits=p
    ),
    "RelaxedOneHotCategoricalStraightThrough": lambda p: dist.RelaxedOneHotCategoricalStraightThrough(
        torch.tensor(0.7), logits=p * TASTES
    ),
    "RejectionGamma": lambda p: RejectionGamma(p, torch.ones(())),
    "RejectionExponential": lambda p: RejectionExponential(p, torch.tensor(0.7)),
    "ShapeAugmentedGamma": lambda p: ShapeAugmentedGamma(p, torch.ones(())),
    "ShapeAugmentedBeta": lambda p: ShapeAugmentedBeta(p, torch.ones(())),
    "ShapeAugmentedDirichlet": lambda p: ShapeAugmentedDirichlet(p * torch.ones(3)),
}
WRAPPERS = {
    "bare": lambda fn: fn,
    "event": lambda fn: dist.Independent(fn.expand((2,)), 1),
    "masked": lambda fn: dist.MaskedDistribution(fn, torch.tensor(True)),
    "expanded": lambda fn: dist.ExpandedDistribution(fn, (3,)),
    "mixture": lambda fn: dist.MaskedMixture(torch.tensor(True), fn, fn),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", BIASED)
def test_a_claim_to_a_path_is_seen_through_wrappers(kind, wrapper):
    fn = WRAPPERS[wrapper](BIASED[kind](torch.tensor(1.5)))
    assert fn.has_rsample
    assert has_biased_path(fn)
    assert not has_path(fn, {})
    assert has_path(fn, {"biased_path": True})


def test_a_flow_over_rejection_has_a_biased_path():
    base = RejectionGamma(torch.tensor(1.5), torch.ones(()))
    assert has_biased_path(dist.TransformedDistribution(base, [transforms.AffineTransform(0.0, 2.0)]))


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(0.0, 1.0),
        dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(False),
        dist.Gamma(2.0, 1.0).expand([3]),
        dist.RelaxedBernoulli(torch.tensor(0.7), logits=torch.zeros(2)),
        dist.RelaxedOneHotCategorical(torch.tensor(0.7), logits=torch.zeros(2)),
        dist.Delta(torch.tensor(1.0)),
        dist.MixtureOfDiagNormals(torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2)),
        dist.ProjectedNormal(torch.ones(3)),
        dist.LogNormal(0.0, 1.0),
        dist.StableWithLogProb(1.7, 0.1),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_an_exact_path_counts_as_one(fn):
    assert has_path(fn, {})


@pytest.mark.parametrize("estimator", PATHS)
def test_a_biased_path_is_refused_by_name_with_advice_that_works(estimator):
    loss = IWAE_ELBO(K=4, estimator=estimator)
    guide = partial(one_hot_guide, dist.OneHotCategoricalStraightThrough)

    def model():
        z = pyro.sample("z", dist.OneHotCategorical(torch.ones(4) / 4))
        pyro.sample("x", dist.Normal((z * SLOPES).sum(-1), 1.0), obs=torch.tensor(0.5))

    def alone(**keywords):
        kind = dist.OneHotCategoricalStraightThrough
        pyro.sample("z", kind(logits=param("logits", LOGITS)), **keywords)

    with pytest.raises(
        ValueError,
        match=r"Guide site\(s\) 'z' cannot be reparameterised.*'vimco'.*The rsample of "
        r"OneHotCategoricalStraightThrough has .*infer={'biased_path': True} at 'z'",
    ):
        loss.loss_and_grads(model, alone)
    loss.loss_and_grads(model, partial(alone, infer={"biased_path": True}))
    assert pyro.param("logits").grad.abs().max() > 1e-3  # through x alone, for stl and dreg
    with pytest.raises(ValueError, match=r"'z', 'k' cannot be reparameterised.*at 'z'"):
        loss.loss_and_grads(one_hot_model, guide)


def test_the_biased_path_on_purpose_is_that_of_rsample():
    """By hand on the same noise, in a plate, whose expansion a flag on the distribution would not survive."""
    weights, size = torch.tensor([0.4, -1.0, 0.3, 2.0]), 3

    def model():
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(4) / 4))
            pyro.sample("x", dist.Normal((z * weights).sum(-1), 1.0), obs=torch.ones(size))

    def guide():
        with pyro.plate("data", size):
            fn = dist.OneHotCategoricalStraightThrough(logits=param("logits", LOGITS))
            pyro.sample("z", fn, infer={"biased_path": True})

    pyro.set_rng_seed(0)
    IWAE_ELBO(K=5).loss_and_grads(model, guide)
    logits = LOGITS.clone().requires_grad_()
    fn = dist.OneHotCategoricalStraightThrough(logits=logits).expand((5, size))
    pyro.set_rng_seed(0)
    z = fn.rsample()
    log_w = dist.Normal((z * weights).sum(-1), 1.0).log_prob(torch.ones(())) - math.log(4) - fn.log_prob(z)
    (-(log_w.logsumexp(0) - math.log(5)).sum()).backward()
    torch.testing.assert_close(pyro.param("logits").grad, logits.grad)


# Rejection samplers, against the closed form of a divergence.


@pytest.mark.parametrize("estimator", SCORES)
@pytest.mark.parametrize("kind", [RejectionGamma, ShapeAugmentedGamma])
def test_a_rejection_sampler_gets_the_gradient_of_the_divergence(kind, estimator):
    """With RejectionGamma's path d KL / d a is -1.64, where -1.50 is right."""

    def model():
        pyro.sample("z", dist.Gamma(3.0, 1.0))

    def guide():
        pyro.sample("z", kind(param("a", 1.3), param("b", 0.7)))

    a, b = torch.tensor(1.3, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    divergence = torch.distributions.kl_divergence(dist.Gamma(a, b), dist.Gamma(3.0, 1.0))
    if estimator == "score":
        exact = torch.autograd.grad(divergence, (a, b))
        found = gradients(MIWAE_ELBO(M=4000, K=1, estimator=estimator), model, guide, ["a", "b"])
        assert_agree(found, exact)
        return

    def plain():
        pyro.sample("z", dist.Gamma(param("a", 1.3), param("b", 0.7)))

    loss = MIWAE_ELBO(M=2000, K=2, estimator=estimator)
    exact, error = gradients(MIWAE_ELBO(M=20000, K=2), model, plain, ["a", "b"])
    mean, own = gradients(loss, model, guide, ["a", "b"])
    assert ((mean - exact).abs() < 5 * (own.square() + error.square()).sqrt()).all()


def test_acceptance_alone_has_no_gradient():
    """``factor`` of RejectionExponential moves its rsample, though not what it samples from."""

    def model():
        pyro.sample("z", dist.Exponential(1.0))

    def guide():
        pyro.sample("z", RejectionExponential(param("rate", 1.3), param("factor", 0.7)))

    pyro.set_rng_seed(0)
    MIWAE_ELBO(M=500, K=2, estimator="score").loss_and_grads(model, guide)
    grad = pyro.param("factor").grad
    assert grad is None or abs(grad) < 1e-12
    assert pyro.param("rate").grad.abs() > 0.01


# Relaxed straight-through: a hard value, with the density of the soft one that is attached to it.

DATA = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
START = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


def hard_model():
    with pyro.plate("data", 3):
        fn = dist.RelaxedBernoulliStraightThrough(torch.tensor(0.7), logits=torch.zeros(3))
        z = pyro.sample("z", fn)
        pyro.sample("x", dist.Normal(z, 0.5), obs=DATA)


def hard_guide(**infer):
    logits = param("logits", START)
    with pyro.plate("data", 3):
        fn = dist.RelaxedBernoulliStraightThrough(torch.tensor(0.7), logits=logits)
        pyro.sample("z", fn, infer=infer)


def test_a_relaxed_straight_through_site_gets_the_gradient_of_its_integral():
    logits = START.clone().requires_grad_()
    h = torch.linspace(-40, 40, 200_002)[:, None]  # the soft value's logit; no point at 0, where it jumps
    q = LogitRelaxedBernoulli(torch.tensor(0.7), logits=logits)
    p = LogitRelaxedBernoulli(torch.tensor(0.7), logits=torch.zeros(3))
    log_q = q.log_prob(h)
    log_w = p.log_prob(h) - log_q + dist.Normal((h > 0).to(h.dtype), 0.5).log_prob(DATA)
    (exact,) = torch.autograd.grad(-torch.trapezoid(log_q.exp() * log_w, h[:, 0], dim=0).sum(), logits)
    loss = MIWAE_ELBO(M=2000, K=1, estimator="score")
    assert_agree(gradients(loss, hard_model, hard_guide, ["logits"]), [exact])


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("estimator", ["auto", "stl", "dreg", *SCORES, "rws"])
def test_the_soft_value_travels_with_the_hard_one(estimator, way, validate):
    """Without it PIWAE's loss was -1052 for 5.3, and dreg's gradient NaN."""
    guide = partial(hard_guide, biased_path=estimator in PATHS)
    loss = PIWAE_ELBO(M=3, K=4, estimator=estimator, **way)
    with pyro.validation_enabled(validate):
        loss.loss(hard_model, guide)
        pyro.set_rng_seed(0)
        value = loss.loss(hard_model, guide)
        pyro.set_rng_seed(0)
        assert loss.loss_and_grads(hard_model, guide) == value
    grad = pyro.param("logits").grad
    assert grad.isfinite().all()
    assert (grad != 0).any()
    if "backward_particles" not in way:
        other = PIWAE_ELBO(M=3, K=4, estimator=estimator)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        other.loss_and_grads(hard_model, guide)
        torch.testing.assert_close(pyro.param("logits").grad, grad)


def test_the_sampler_weighs_soft_values_and_shows_hard_ones():
    with torch.no_grad():
        exact = torch.stack([dist.Normal(k, 0.5).log_prob(DATA) for k in (0.0, 1.0)]).logsumexp(0) - math.log(
            2
        )
    pyro.set_rng_seed(0)
    samples = ImportanceSampler(hard_model, hard_guide, 5000, progress=False)()
    torch.testing.assert_close(samples.log_marginal, exact, atol=0.06, rtol=0)
    z = samples.posterior(50)["z"]
    assert ((z == 0) | (z == 1)).all()


# Densities and masses.

RELAXED = dist.RelaxedOneHotCategorical(torch.tensor(0.7), logits=TASTES)
MISMATCHED = {
    "relaxed guide": (dist.OneHotCategorical(torch.ones(4)), RELAXED),
    "relaxed model": (RELAXED, dist.OneHotCategoricalStraightThrough(torch.ones(4))),
    "relaxed bits": (
        dist.Bernoulli(torch.ones(2) / 2).to_event(1),
        dist.RelaxedBernoulli(torch.tensor(0.7), logits=torch.ones(2)).to_event(1),
    ),
    "bits for a probability": (dist.Beta(1.0, 1.0), dist.Bernoulli(0.5)),
    "counts for a rate": (dist.Gamma(1.0, 1.0), dist.Poisson(1.0)),
    "hard guide": (
        dist.RelaxedBernoulli(torch.tensor(0.7), logits=torch.zeros(2)).to_event(1),
        dist.RelaxedBernoulliStraightThrough(torch.tensor(0.7), logits=torch.zeros(2)).to_event(1),
    ),
    "hard model": (
        dist.RelaxedBernoulliStraightThrough(torch.tensor(0.7), logits=torch.zeros(())),
        dist.RelaxedBernoulli(torch.tensor(0.7), logits=torch.zeros(())),
    ),
}


def site(fn):
    def run():
        with pyro.plate("data", 3):
            pyro.sample("z", fn)

    return run


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("case", MISMATCHED)
def test_a_density_is_not_weighed_against_a_mass(case, vectorize):
    model, guide = map(site, MISMATCHED[case])
    loss = IWAE_ELBO(K=3, estimator="score", vectorize_particles=vectorize)
    sampler = ImportanceSampler(model, guide, 5, progress=False, vectorize_particles=vectorize)
    for evaluate in (loss.loss, loss.loss_and_grads):
        with pytest.raises(ValueError, match=r"Latent site 'z' is .* in the model.*is no importance weight"):
            evaluate(model, guide)
    with pytest.raises(ValueError, match="Latent site 'z'"):
        sampler.log_marginal()


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (dist.Poisson(1.0), dist.Delta(torch.tensor(2.0))),
        (dist.Normal(0.0, 1.0), dist.Delta(torch.tensor(2.0))),
        (
            dist.Poisson(1.0),
            dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Poisson(torch.tensor([1.0, 2.0]))),
        ),
        (dist.Poisson(1.0), dist.ZeroInflatedPoisson(rate=torch.tensor(2.0), gate=torch.tensor(0.3))),
        (dist.MaskedMixture(torch.tensor(True), dist.Poisson(1.0), dist.Poisson(2.0)), dist.Geometric(0.3)),
        (dist.OneHotCategorical(torch.ones(4)), dist.OneHotCategoricalStraightThrough(torch.ones(4))),
        (dist.Beta(1.0, 1.0), dist.Uniform(0.0, 1.0)),
        (RELAXED, RELAXED),
    ],
    ids=str,
)
def test_what_goes_together_is_let_pass(model, guide):
    assert math.isfinite(IWAE_ELBO(K=3).loss(site(model), site(guide)))


def test_a_support_of_nobody_knows_what_is_not_judged():
    class Own(constraints.Constraint):
        def check(self, value):
            return torch.ones_like(value, dtype=torch.bool)

    class Counts(dist.TorchDistribution):
        support = Own()
        arg_constraints = {}  # noqa: RUF012

    assert is_discrete(Counts(validate_args=False)) is None


# Supports that move.


def learnt(value=1.7):
    return torch.tensor(value, requires_grad=True)


def transformed(base, *parts):
    return dist.TransformedDistribution(base, list(parts))


def affine(loc, scale):
    return transforms.AffineTransform(loc, scale)


class Truncated(dist.TorchDistribution):
    """A stranger: uniform up to ``b``, which its support says."""

    has_rsample = True
    arg_constraints = {}  # noqa: RUF012

    def __init__(self, b):
        self.b = b
        super().__init__(b.shape, validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self):
        return constraints.interval(0.0, self.b)


UNIT = dist.Uniform(0.0, 1.0)
SIGMOID = transforms.SigmoidTransform()
MOVING = {
    "Uniform": lambda: dist.Uniform(0.0, learnt()),
    "its lower end": lambda: dist.Uniform(learnt(), 3.0),
    "in events": lambda: dist.Uniform(torch.zeros(2), learnt()).to_event(1).mask(True),
    "expanded": lambda: dist.ExpandedDistribution(dist.Uniform(0.0, learnt()), (3,)),
    "without path": lambda: dist.Uniform(0.0, learnt()).has_rsample_(False),
    "Pareto": lambda: dist.Pareto(learnt(), 3.0),
    "GeneralizedPareto": lambda: dist.GeneralizedPareto(torch.tensor(0.0), learnt(), torch.tensor(-0.5)),
    "a stranger": lambda: Truncated(learnt()),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Uniform(0.0, torch.stack([learnt(), learnt(2.0)]))
    ),
    "scaled uniform": lambda: transformed(UNIT, affine(0.0, learnt())),
    "scaled by the inverse": lambda: transformed(UNIT, affine(0.0, learnt()).inv),
    "in one transform": lambda: transformed(UNIT, transforms.ComposeTransform([affine(0.0, learnt())])),
    "twice transformed": lambda: transformed(transformed(UNIT, affine(1.0, 2.0)), affine(0.0, learnt())),
    "after a cache": lambda: transformed(UNIT, affine(0.0, learnt()).with_cache(1)),
    "scaled Beta": lambda: transformed(dist.Beta(1.0, 2.0), affine(0.0, learnt())),
    "shifted exponential": lambda: transformed(dist.Exponential(1.0), affine(learnt(), 1.0)),
    "folded": lambda: transformed(dist.HalfNormal(1.0), affine(learnt(), 1.0)),
    "logistic on (0, b)": lambda: transformed(dist.Logistic(0.0, 1.0), SIGMOID, affine(0.0, learnt())),
    "spline": lambda: transformed(
        dist.Uniform(torch.zeros(1), torch.ones(1)).to_event(1), transforms.Spline(1, bound=3.0)
    ),
}
FIXED = {
    "Normal": lambda: dist.Normal(learnt(), 1.0),
    "Uniform": lambda: dist.Uniform(0.0, 1.0),
    "Delta": lambda: dist.Delta(learnt()),
    "Beta": lambda: dist.Beta(learnt(), 1.0),
    "Gamma": lambda: dist.Gamma(learnt(), learnt()),
    "Gumbel": lambda: dist.Gumbel(learnt(), learnt()),
    "Weibull": lambda: dist.Weibull(learnt(), learnt()),
    "Kumaraswamy": lambda: dist.Kumaraswamy(learnt(), learnt()),
    "LogNormal": lambda: dist.LogNormal(learnt(), learnt()),
    "InverseGamma": lambda: dist.InverseGamma(learnt(), learnt()),
    "Pareto's slope": lambda: dist.Pareto(1.0, learnt()),
    "GeneralizedPareto": lambda: dist.GeneralizedPareto(torch.tensor(0.0), learnt(), torch.tensor(0.5)),
    "Binomial": lambda: dist.Binomial(5, logits=learnt()),
    "Poisson": lambda: dist.Poisson(learnt()),
    "scaled exponential": lambda: transformed(dist.Exponential(1.0), affine(0.0, learnt())),
    "logistic": lambda: transformed(UNIT, SIGMOID.inv, affine(learnt(), learnt())),
    "normal on (0, b)": lambda: transformed(dist.Normal(0.0, 1.0), SIGMOID, affine(0.0, learnt())),
    "shifted lognormal": lambda: transformed(dist.LogNormal(0.0, 1.0), affine(learnt(), 1.0)),
    "flow": lambda: transformed(dist.Normal(torch.zeros(2), 1.0).to_event(1), transforms.Planar(2)),
    "spline": lambda: transformed(
        dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1), transforms.Spline(1)
    ),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.stack([learnt(), learnt(2.0)]), 1.0)
    ),
}
if not hasattr(dist, "GeneralizedPareto"):
    del MOVING["GeneralizedPareto"], FIXED["GeneralizedPareto"]


@pytest.mark.parametrize("case", MOVING)
def test_a_support_that_moves(case):
    fn = MOVING[case]()
    fn.log_prob(torch.ones(fn.batch_shape + fn.event_shape)) if case == "after a cache" else None
    assert support_moves(fn)


@pytest.mark.parametrize("case", FIXED)
def test_a_support_that_stays(case):
    assert not support_moves(FIXED[case]())


def test_a_support_that_is_moved_and_moved_back():
    b = learnt()
    assert not support_moves(transformed(dist.Uniform(0.0, b), affine(0.0, b).inv))


def smooth_model():
    pyro.sample("z", dist.Normal(0.3, 0.8))


def uniform_guide(path=True):
    fn = dist.Uniform(0.0, param("b", 1.7))
    pyro.sample("z", fn if path else fn.has_rsample_(False))


@pytest.mark.parametrize("estimator", ["reparam", "score", "vimco"])
def test_along_the_path_a_support_may_move(estimator):
    """By quadrature over both particles. stl has .52 and dreg .23 for -.07."""
    b = torch.tensor(1.7, requires_grad=True)
    n = 1000
    z = b * (torch.arange(n) + 0.5) / n
    log_w = dist.Normal(0.3, 0.8).log_prob(z) + b.log()
    value = -(torch.logaddexp(log_w[:, None], log_w) - math.log(2)).mean()
    (exact,) = torch.autograd.grad(value, b)
    loss = MIWAE_ELBO(M=4000, K=2, estimator=estimator)
    assert_agree(gradients(loss, smooth_model, uniform_guide, ["b"]), [exact])


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("estimator", ["stl", "dreg", "rws"])
def test_without_the_score_a_support_may_not_move(estimator, way):
    loss = MIWAE_ELBO(M=3, K=2, estimator=estimator, **way)
    with pytest.raises(ValueError, match=r"The support of guide site\(s\) 'z' has ends that move.*reparam"):
        loss.loss_and_grads(smooth_model, uniform_guide)
    assert pyro.param("b").grad is None
    loss.loss(smooth_model, uniform_guide)


@pytest.mark.parametrize("estimator", SCORES)
def test_nor_may_that_of_a_site_without_a_path(estimator):
    loss = MIWAE_ELBO(M=3, K=2, estimator=estimator)
    with pytest.raises(ValueError, match=f"'z' has ends that move .* estimator='{estimator}' relies"):
        loss.loss_and_grads(smooth_model, partial(uniform_guide, path=False))


@pytest.mark.parametrize("estimator", ["reparam", "stl", "dreg"])
def test_a_support_that_moves_with_another_latent_is_fixed_in_both(estimator):
    """z2 in (0, z1): the two together have a support without parameters. By quadrature, K = 1."""

    def model():
        pyro.sample("z1", dist.LogNormal(0.5, 1.0))
        pyro.sample("z2", dist.Normal(0.3, 0.8))

    def guide():
        z1 = pyro.sample("z1", dist.LogNormal(param("m", 0.2), 0.5))
        pyro.sample("z2", dist.Uniform(0.0, z1))

    m, n = torch.tensor(0.2, requires_grad=True), 1000
    middle = (torch.arange(n) + 0.5) / n
    z1 = (m + 0.5 * dist.Normal(0.0, 1.0).icdf(middle)).exp()[:, None]
    log_w = dist.LogNormal(0.5, 1.0).log_prob(z1) - dist.LogNormal(m, 0.5).log_prob(z1)
    log_w = log_w + dist.Normal(0.3, 0.8).log_prob(z1 * middle) + z1.log()
    (exact,) = torch.autograd.grad(-log_w.mean(), m)
    loss = MIWAE_ELBO(M=4000, K=1, estimator=estimator)
    assert_agree(gradients(loss, model, guide, ["m"]), [exact])


# Factors of the guide.


def bit_model():
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(2 * k, 1.0), obs=torch.tensor(1.4))


def bit_guide(has_rsample, hold=False):
    k = pyro.sample("k", dist.Bernoulli(logits=param("logit", 0.2)))
    c = torch.tensor(0.5) if hold else param("c", 0.5)
    pyro.factor("penalty", c * (k + 0.3), has_rsample=has_rsample)


@pytest.mark.parametrize("estimator", SCORES)
def test_a_factor_of_the_guide_needs_no_score(estimator):
    """Nothing is drawn from it: its derivative within the log-weight is the whole. By enumeration.

    With a score of its own, d loss / d c was .89 for .76.
    """
    logit, c = torch.tensor(0.2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    k = torch.tensor([0.0, 1.0])
    log_q = dist.Bernoulli(logits=logit).log_prob(k)
    log_p = dist.Bernoulli(0.3).log_prob(k) + dist.Normal(2 * k, 1.0).log_prob(torch.tensor(1.4))
    exact = torch.autograd.grad(two_particles(log_q, log_p - log_q - c * (k + 0.3)), (logit, c))
    loss = MIWAE_ELBO(M=2000, K=2, estimator=estimator)
    assert_agree(gradients(loss, bit_model, partial(bit_guide, True), ["logit", "c"]), exact)


@pytest.mark.parametrize("estimator", [*PATHS, *SCORES])
def test_a_factor_that_may_need_one_is_refused(estimator):
    loss = MIWAE_ELBO(M=2, K=2, estimator=estimator)
    with pytest.raises(ValueError, match=r"Factor\(s\) 'penalty' of the guide .* pass has_rsample=True"):
        loss.loss_and_grads(bit_model, partial(bit_guide, False))
    loss.loss(bit_model, partial(bit_guide, False))


def test_a_factor_without_parameters_has_nothing_to_tell():
    loss = MIWAE_ELBO(M=3, K=2, estimator="score")
    found = []
    for has_rsample in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss.loss_and_grads(bit_model, partial(bit_guide, has_rsample, hold=True))
        found.append(pyro.param("logit").grad)
    assert torch.equal(*found)
