"""Expected gradients of every (bound, estimator) pair, against hand-written truths.

Every parameter is a vector with one equal entry for each of N independent copies of the problem, so that one
backward pass gives N draws of the gradient. Means are compared within 4 standard errors of their difference,
5 where a test looks at several dozen numbers at once.
"""

import itertools
import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoStructured

from helpers.truth import normal
from pyro_iw import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    TVO_ELBO,
    VR_ELBO,
    Bound,
    ImportanceWeightedELBO,
    bounds,
)
from pyro_iw.gradients.estimators import get_estimator

N_DRAWS = 20_000
N_TRUTH = 100_000
PARTITIONS = (0.0, 0.3, 1.0)


class PowerMean(Bound):
    """A user's own bound: no closed form but the value."""

    def value(self, log_w):
        return 3 * ((log_w / 3).logsumexp((0, 1)) - math.log(self.num_particles))


LOSSES = {
    "ELBO": lambda **kw: MIWAE_ELBO(M=4, K=1, **kw),
    "IWAE": lambda **kw: IWAE_ELBO(K=4, **kw),
    "MIWAE": lambda **kw: MIWAE_ELBO(M=2, K=2, **kw),
    "CIWAE": lambda **kw: CIWAE_ELBO(K=4, beta=0.3, **kw),
    "PIWAE": lambda **kw: PIWAE_ELBO(M=2, K=2, **kw),
    "VR": lambda **kw: VR_ELBO(alpha=0.5, K=4, **kw),
    "VR<0": lambda **kw: VR_ELBO(alpha=-0.5, K=4, **kw),
    "TVO": lambda **kw: TVO_ELBO(K=4, partitions=PARTITIONS, **kw),
    "own": lambda **kw: ImportanceWeightedELBO(PowerMean(K=4), **kw),
}


def objectives(name, log_w):
    """(model's, guide's) objective of four particles on dim 0, written out."""
    w = log_w.exp()
    elbo, iwae = log_w.mean(0), w.mean(0).log()
    miwae = (w[:2].mean(0).log() + w[2:].mean(0).log()) / 2
    tempered = w ** PARTITIONS[1]
    value = {
        "ELBO": elbo,
        "IWAE": iwae,
        "MIWAE": miwae,
        "CIWAE": 0.3 * elbo + 0.7 * iwae,
        "PIWAE": iwae,
        "VR": 2 * (w**0.5).mean(0).log(),
        "VR<0": (w**1.5).mean(0).log() / 1.5,
        "TVO": 0.3 * elbo + 0.7 * (tempered * log_w).sum(0) / tempered.sum(0),
        "own": 3 * (w ** (1 / 3)).mean(0).log(),
    }[name]
    return value, (miwae if name == "PIWAE" else value)


class Problem:
    """A pair with N copies of its parameters, and its log-weights written out."""

    theta: ClassVar[dict]
    phi: ClassVar[dict]
    latents = 1
    x = 1.2

    def __init__(self, count):
        self.count = count
        self.p = {
            name: torch.full((count,), value, dtype=torch.float64, requires_grad=True)
            for name, value in {**self.theta, **self.phi}.items()
        }
        self.obs = torch.full((count,), self.x, dtype=torch.float64)

    def __hash__(self):
        return id(self)

    def plate(self):
        return pyro.plate("copies", self.count)

    def gradients(self, loss):
        """N draws of the gradient by the package, of shape [N] for each parameter."""
        value = loss.differentiable_loss(self.model, self.guide)
        return dict(zip(self.p, torch.autograd.grad(value, list(self.p.values())), strict=True))

    @classmethod
    def truth(cls, name):
        """N draws of the gradient of minus the objectives by hand, theta's and phi's roles apart."""
        generator = torch.Generator().manual_seed(123)
        noise = torch.randn(cls.latents, 4, N_TRUTH, dtype=torch.float64, generator=generator)

        def parameters(values):
            return {
                k: torch.full((N_TRUTH,), v, dtype=torch.float64, requires_grad=True)
                for k, v in values.items()
            }

        theta, phi = parameters(cls.theta), parameters(cls.phi)
        sides = objectives(name, cls.log_weights(theta, phi, noise))
        grads = {}
        for role, objective in zip((theta, phi), sides, strict=True):
            found = torch.autograd.grad(-objective.sum(), list(role.values()), retain_graph=True)
            for key, grad in zip(role, found, strict=True):
                grads[key] = grads.get(key, 0.0) + grad
        return grads


class Gaussian(Problem):
    """One latent, a prior with a parameter: z ~ N(w, 1), x ~ N(z, s); guide N(a, c)."""

    theta: ClassVar = {"w": 0.3, "s": 0.8}
    phi: ClassVar = {"a": 0.2, "c": 0.9}

    def model(self):
        with self.plate():
            z = pyro.sample("z", dist.Normal(self.p["w"], 1.0))
            pyro.sample("x", dist.Normal(z, self.p["s"]), obs=self.obs)

    def guide(self):
        with self.plate():
            pyro.sample("z", dist.Normal(self.p["a"], self.p["c"]))

    @classmethod
    def log_weights(cls, theta, phi, noise):
        z = phi["a"] + phi["c"] * noise[0]
        log_p = normal(z, theta["w"], 1.0) + normal(cls.x, z, theta["s"])
        return log_p - normal(z, phi["a"], phi["c"])


class Hierarchy(Problem):
    """Three levels, q(z1) q(z2 | z1) q(z3 | z2, z1), with parameters of the guide at every one."""

    theta: ClassVar = {"w": 0.6, "s": 0.8}
    phi: ClassVar = {"a1": 0.4, "c1": 0.8, "a2": 0.5, "c2": 0.7, "a3": 0.3, "c3": 0.9}
    latents = 3
    nonreparameterized = ()

    def model(self):
        with self.plate():
            z3 = pyro.sample("z3", dist.Normal(self.p["w"], 1.0))
            z2 = pyro.sample("z2", dist.Normal(self.p["w"] * z3, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, self.p["s"]), obs=self.obs)

    def site(self, name, loc, scale):
        fn = dist.Normal(loc, scale)
        if name in self.nonreparameterized:
            fn = fn.has_rsample_(False)
        return pyro.sample(name, fn)

    def guide(self):
        p = self.p
        with self.plate():
            z1 = self.site("z1", p["a1"], p["c1"])
            z2 = self.site("z2", p["a2"] * z1, p["c2"] * torch.exp(0.3 * z1))
            self.site("z3", p["a3"] * (z2 + z1), p["c3"] * torch.exp(0.2 * z2))

    @classmethod
    def log_weights(cls, theta, phi, noise):
        z1 = phi["a1"] + phi["c1"] * noise[0]
        scale2 = phi["c2"] * torch.exp(0.3 * z1)
        z2 = phi["a2"] * z1 + scale2 * noise[1]
        scale3 = phi["c3"] * torch.exp(0.2 * z2)
        z3 = phi["a3"] * (z2 + z1) + scale3 * noise[2]
        log_p = normal(z3, theta["w"], 1.0) + normal(z2, theta["w"] * z3, 1.0)
        log_p = log_p + normal(z1, z2, 1.0) + normal(cls.x, z1, theta["s"])
        log_q = normal(z1, phi["a1"], phi["c1"]) + normal(z2, phi["a2"] * z1, scale2)
        return log_p - log_q - normal(z3, phi["a3"] * (z2 + z1), scale3)


class Flow(Problem):
    """The guide pushes a normal through exp and an affine map with parameters of their own."""

    theta: ClassVar = {"w": 0.3, "s": 0.8}
    phi: ClassVar = {"a": -0.3, "c": 0.5, "m": -0.2, "t": 1.1}

    model = Gaussian.model

    def guide(self):
        p = self.p
        transforms = [
            dist.transforms.ExpTransform(),
            dist.transforms.AffineTransform(p["m"], p["t"]),
        ]
        with self.plate():
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(p["a"], p["c"]), transforms))

    @classmethod
    def log_weights(cls, theta, phi, noise):
        u = phi["a"] + phi["c"] * noise[0]
        z = phi["m"] + phi["t"] * torch.exp(u)
        log_p = normal(z, theta["w"], 1.0) + normal(cls.x, z, theta["s"])
        return log_p - (normal(u, phi["a"], phi["c"]) - u - phi["t"].log())


class Tied(Problem):
    """One parameter in the prior and in the guide."""

    theta: ClassVar = {"w": 0.3, "s": 0.8}
    phi: ClassVar = {"w": 0.3, "c": 0.9}

    model = Gaussian.model

    def guide(self):
        with self.plate():
            pyro.sample("z", dist.Normal(0.5 + self.p["w"], self.p["c"]))

    @classmethod
    def log_weights(cls, theta, phi, noise):
        z = 0.5 + phi["w"] + phi["c"] * noise[0]
        log_p = normal(z, theta["w"], 1.0) + normal(cls.x, z, theta["s"])
        return log_p - normal(z, 0.5 + phi["w"], phi["c"])


class MixedUp(Hierarchy):
    """The middle level cannot be reparameterised: paths lead into its parameters and out of its value."""

    nonreparameterized = ("z2",)


class MixedEnds(Hierarchy):
    """The first and the last level cannot be reparameterised."""

    nonreparameterized = ("z1", "z3")


_TRUTHS = {}


def truth(problem, name):
    key = (problem.log_weights.__func__, name)
    if key not in _TRUTHS:
        _TRUTHS[key] = {k: (g.mean(), g.var() / len(g)) for k, g in problem.truth(name).items()}
    return _TRUTHS[key]


def deviations(grads, expected):
    """How many standard errors each parameter's mean gradient is off."""
    return {
        key: float((grads[key].mean() - mean) / (grads[key].var() / len(grads[key]) + variance).sqrt())
        for key, (mean, variance) in expected.items()
    }


UNBIASED = [(name, "reparam") for name in LOSSES] + [(name, "dreg") for name in LOSSES] + [("ELBO", "stl")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "estimator"), UNBIASED)
@pytest.mark.parametrize("problem", [Gaussian, Hierarchy, Flow, Tied])
def test_unbiased(problem, name, estimator):
    grads = problem(N_DRAWS).gradients(LOSSES[name](estimator=estimator))
    off = deviations(grads, truth(problem, name))
    assert max(map(abs, off.values())) < 5, off


class Weighted(Gaussian):
    """The guide's density and the prior weighted by 0.3 in the log-weight, by kl_weight."""

    @classmethod
    def log_weights(cls, theta, phi, noise):
        z = phi["a"] + phi["c"] * noise[0]
        kl = normal(z, phi["a"], phi["c"]) - normal(z, theta["w"], 1.0)
        return normal(cls.x, z, theta["s"]) - 0.3 * kl


class Tempered(Gaussian):
    """The guide's density alone weighted by 0.3, by its scale."""

    def guide(self):
        with poutine.scale(scale=0.3):
            super().guide()

    @classmethod
    def log_weights(cls, theta, phi, noise):
        z = phi["a"] + phi["c"] * noise[0]
        log_p = normal(z, theta["w"], 1.0) + normal(cls.x, z, theta["s"])
        return log_p - 0.3 * normal(z, phi["a"], phi["c"])


@pytest.mark.filterwarnings("ignore:.*tempered density")
@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["reparam", "dreg"])
@pytest.mark.parametrize("name", ["ELBO", "IWAE", "PIWAE", "VR"])
@pytest.mark.parametrize("problem", [Weighted, Tempered])
def test_unbiased_under_a_weight_on_the_guides_density(problem, name, estimator):
    loss = LOSSES[name](estimator=estimator, kl_weight=0.3 if problem is Weighted else 1.0)
    off = deviations(problem(N_DRAWS).gradients(loss), truth(problem, name))
    assert max(map(abs, off.values())) < 5, off


@pytest.mark.filterwarnings("ignore:.*tempered density")
def test_dreg_refuses_weights_that_differ_between_sites():
    class Uneven(Hierarchy):
        def site(self, name, loc, scale):
            with poutine.scale(scale=0.5 if name == "z2" else 1.0):
                return super().site(name, loc, scale)

    with pytest.raises(ValueError, match="Guide sites 'z1', 'z2', 'z3' differ in"):
        Uneven(3).gradients(IWAE_ELBO(K=4, estimator="dreg"))
    Uneven(3).gradients(IWAE_ELBO(K=4, estimator="reparam"))


@pytest.mark.slow
@pytest.mark.parametrize("problem", [Gaussian, Hierarchy])
def test_dreg_one_by_one(problem):
    loss = IWAE_ELBO(K=4, estimator="dreg", vectorize_particles=False)
    off = deviations(problem(N_DRAWS).gradients(loss), truth(problem, "IWAE"))
    assert max(map(abs, off.values())) < 5, off


SCORED = [
    (name, estimator)
    for name in ("ELBO", "IWAE", "MIWAE", "CIWAE", "PIWAE", "VR", "TVO", "own")
    for estimator in ("score", "vimco")
    if (name, estimator) != ("ELBO", "vimco")
] + [(name, "ovis") for name in ("IWAE", "MIWAE", "PIWAE", "VR")]


MIXED = [(MixedUp, *pair) for pair in SCORED] + [(MixedEnds, *pair) for pair in SCORED if pair[0] == "PIWAE"]


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "name", "estimator"), MIXED)
def test_mixed_sites_are_unbiased(problem, name, estimator):
    """The truth is that of the same hierarchy with all of its sites reparameterised."""
    grads = problem(N_DRAWS).gradients(LOSSES[name](estimator=estimator))
    off = deviations(grads, truth(problem, name))
    assert max(map(abs, off.values())) < 5, off


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IWAE", "MIWAE", "PIWAE", "CIWAE"])
def test_stl_is_biased_for_more_than_one_particle_inside(name):
    grads = Gaussian(N_DRAWS).gradients(LOSSES[name](estimator="stl"))
    off = deviations(grads, truth(Gaussian, name))
    assert max(abs(off[key]) for key in Gaussian.phi) > 10
    assert max(abs(off[key]) for key in Gaussian.theta) < 5


@pytest.mark.slow
def test_dreg_has_less_noise_than_reparam():
    for problem in (Gaussian, Hierarchy):
        noise = [
            problem(2000).gradients(IWAE_ELBO(K=64, estimator=estimator)) for estimator in ("reparam", "dreg")
        ]
        for key in problem.phi:
            assert noise[1][key].std() < 0.5 * noise[0][key].std()


@pytest.mark.parametrize("estimator", ["stl", "dreg"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_is_left_when_the_guide_is_the_posterior(name, estimator):
    """z ~ N(0, 1), x | z ~ N(z, 1): the posterior is N(x / 2, 1 / 2)."""
    x = torch.tensor([1.0, -2.0])
    slope = torch.tensor(0.5, requires_grad=True)
    scale = torch.tensor(0.5**0.5, requires_grad=True)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(slope * x, scale))

    for _ in range(5):
        loss = LOSSES[name](estimator=estimator).differentiable_loss(model, guide)
        grads = torch.autograd.grad(loss, [slope, scale])
        torch.testing.assert_close(torch.stack(grads), torch.zeros(2), rtol=0, atol=1e-5)


class Bernoulli:
    """z ~ Bernoulli(1/2), x ~ N(2 z - w, 1); guide Bernoulli(sigmoid(logit)): all outcomes can be listed."""

    w, logit, x = 0.4, 0.3, 0.9

    def log_terms(self, w, logit):
        """log p and log q of z = 0 and z = 1."""
        z = torch.tensor([0.0, 1.0], dtype=torch.float64)
        log_p = math.log(0.5) + normal(torch.tensor(self.x, dtype=torch.float64), 2 * z - w, 1.0)
        log_q = torch.stack([torch.nn.functional.logsigmoid(-logit), torch.nn.functional.logsigmoid(logit)])
        return log_p, log_q

    def leaves(self):
        return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (self.w, self.logit)]

    def exact(self, name):
        """Gradient of minus E[objective] over all 2^4 outcomes, theta's and phi's objectives apart."""
        grads = []
        for role in (0, 1):
            w, logit = self.leaves()
            log_p, log_q = self.log_terms(w, logit)
            expected = 0.0
            for outcome in itertools.product((0, 1), repeat=4):
                index = list(outcome)
                objective = objectives(name, log_p[index] - log_q[index])[role]
                expected = expected + log_q[index].sum().exp() * objective
            grads.append(torch.autograd.grad(-expected, (w, logit))[role].item())
        return grads

    def exact_wake(self, weights):
        """E[sum_i weight_i d log q(z_i) / d logit], the weights a function of the four log-weights."""
        w, logit = self.leaves()
        log_p, log_q = self.log_terms(w, logit)
        (slope0,) = torch.autograd.grad(log_q[0], logit, retain_graph=True)
        (slope1,) = torch.autograd.grad(log_q[1], logit, retain_graph=True)
        slopes = torch.stack([slope0, slope1]).detach()
        total = 0.0
        for outcome in itertools.product((0, 1), repeat=4):
            index = list(outcome)
            log_w = (log_p - log_q)[index].detach()
            total += (log_q[index].sum().exp().detach() * (weights(log_w) * slopes[index]).sum()).item()
        return -total

    def draws(self, loss, count):
        w = torch.full((count,), self.w, dtype=torch.float64, requires_grad=True)
        logit = torch.full((count,), self.logit, dtype=torch.float64, requires_grad=True)

        def model():
            with pyro.plate("copies", count):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
                x = torch.tensor(self.x, dtype=torch.float64)
                pyro.sample("x", dist.Normal(2 * z - w, 1.0), obs=x)

        def guide():
            with pyro.plate("copies", count):
                pyro.sample("z", dist.Bernoulli(logits=logit))

        return torch.autograd.grad(loss.differentiable_loss(model, guide), (w, logit))


@pytest.mark.parametrize(
    ("name", "estimator", "vectorize"),
    [(*pair, True) for pair in SCORED] + [("IWAE", "vimco", False), ("PIWAE", "score", False)],
)
def test_a_discrete_latent_against_all_outcomes(name, estimator, vectorize):
    problem = Bernoulli()
    loss = LOSSES[name](estimator=estimator, vectorize_particles=vectorize)
    for grad, exact in zip(problem.draws(loss, 40_000), problem.exact(name), strict=True):
        error = grad.std() / len(grad) ** 0.5
        assert abs(grad.mean() - exact) < 4 * error
        assert abs(exact) > 8 * error  # a lost factor or a zero gradient would be seen


@pytest.mark.parametrize("K", [8, 128])
def test_ovis_in_closed_form(K):
    """What multiplies the scores of a group is -log(1 - s) - s; in float32, too, where that is of 1 / K^2."""
    log_w = torch.randn(1, K, 5, generator=torch.Generator().manual_seed(0))
    bound = IWAE_ELBO(K=K).bound
    weights = get_estimator("ovis").weights(bound, log_w[0], 1.0, 1.0)
    s = torch.softmax(log_w[0].double(), 0)
    expected = -torch.log1p(-s) - s
    # That on -log q takes s off the score's.
    assert torch.allclose((weights.guide[1].double() - weights.guide[0].double()), expected, atol=3e-8)
    assert torch.allclose(weights.path.double(), s, rtol=1e-5)


def test_the_signal_of_ovis_grows_with_the_particles():
    """Score's and vimco's fall. SNR from 4000 copies of one problem."""
    problem = Bernoulli()

    def snr(estimator, K):
        gradient = problem.draws(IWAE_ELBO(K=K, estimator=estimator), 4000)[1]
        return (gradient.mean().abs() / gradient.std()).item()

    assert snr("ovis", 64) > 2.5 * snr("ovis", 4)
    assert snr("ovis", 64) > 3 * max(snr("score", 64), snr("vimco", 64))


@pytest.mark.parametrize("loss", [LOSSES["ELBO"], LOSSES["CIWAE"], LOSSES["TVO"]])
def test_ovis_needs_a_bound_that_bears_a_weight_of_0(loss):
    problem = Bernoulli()
    with pytest.raises(ValueError, match=r"estimator='ovis'.*is not finite there.*'vimco' or 'score'"):
        problem.draws(loss(estimator="ovis"), 3)
    with pytest.raises(ValueError, match="is not finite there"):
        problem.draws(IWAE_ELBO(K=1, estimator="ovis"), 3)


def test_one_particle_without_a_control_variate():
    problem = Bernoulli()
    w, logit = problem.leaves()
    log_p, log_q = problem.log_terms(w, logit)
    (exact,) = torch.autograd.grad(-(log_q.exp() * (log_p - log_q)).sum(), logit)
    _, grad = problem.draws(IWAE_ELBO(K=1, estimator="score"), 100_000)
    assert abs(grad.mean() - exact) < 4 * grad.std() / len(grad) ** 0.5


def test_control_variates_reduce_the_noise():
    problem = Bernoulli()
    spread = {
        name: problem.draws(IWAE_ELBO(K=4, estimator=name), 20_000)[1].std() for name in ("score", "vimco")
    }

    loss = IWAE_ELBO(K=4, estimator="score")
    loss._estimator.replacement = lambda bound, log_w: None
    bare = problem.draws(loss, 20_000)[1].std()
    assert max(spread.values()) < 0.8 * bare


@pytest.mark.parametrize("name", ["IWAE", "MIWAE", "PIWAE"])
def test_wake_wake_against_all_outcomes(name):
    """theta climbs the bound, the guide the weighted log q, the weights normalised in each group."""

    def weights(log_w):
        if name == "IWAE":
            return log_w.softmax(0)
        return torch.cat([log_w[:2].softmax(0), log_w[2:].softmax(0)]) / 2

    problem = Bernoulli()
    w_grad, logit_grad = problem.draws(LOSSES[name](estimator="rws"), 100_000)
    for grad, exact in ((w_grad, problem.exact(name)[0]), (logit_grad, problem.exact_wake(weights))):
        error = grad.std() / len(grad) ** 0.5
        assert abs(grad.mean() - exact) < 4 * error
        assert abs(exact) > 10 * error


def test_wake_wake_sends_no_gradient_through_reparameterised_values():
    """By hand on the same draws: sum_i s_i d log q(stopped z_i), parents stopped as well."""
    phi: ClassVar = {
        k: torch.tensor(v, requires_grad=True) for k, v in {"a": 0.4, "c": 0.8, "b": 0.5}.items()
    }
    kept = {}

    def model():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(u, 1.0))
        pyro.sample("x", dist.Normal(v, 1.0), obs=torch.tensor(1.0))

    def guide():
        kept["u"] = u = pyro.sample("u", dist.Normal(phi["a"], phi["c"]))
        kept["v"] = pyro.sample("v", dist.Normal(phi["b"] * u, phi["c"]))

    elbo = IWAE_ELBO(K=5, estimator="rws")
    elbo.loss(model, guide)  # the first run is followed by one of a single particle
    loss = elbo.differentiable_loss(model, guide)
    grads = torch.autograd.grad(loss, list(phi.values()))
    u, v = kept["u"], kept["v"]
    assert not u.requires_grad
    log_p = normal(u, 0.0, 1.0) + normal(v, u, 1.0) + normal(torch.tensor(1.0), v, 1.0)
    log_q = normal(u, phi["a"], phi["c"]) + normal(v, phi["b"] * u, phi["c"])
    s = (log_p - log_q).detach().softmax(0)
    expected = torch.autograd.grad(-(s * log_q).sum(), list(phi.values()))
    for grad, truth_ in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, truth_)


def test_pyros_renyi_elbo_gives_a_discrete_guide_no_gradient():
    """What the score-type estimators are for: at alpha = 0 Pyro's loss is silent about it."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=torch.tensor(0.9))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))

    def gradient(loss):
        pyro.clear_param_store()
        loss.loss_and_grads(model, guide)
        return pyro.param("logit").unconstrained().grad

    renyi = RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    assert gradient(renyi) == 0
    assert gradient(IWAE_ELBO(K=4, estimator="vimco")) != 0


@pytest.mark.parametrize("estimator", ["score", "vimco"])
def test_a_masked_site_that_the_model_uses_keeps_its_score(estimator):
    """Its density is out of the log-weight, but its value is still drawn with the guide's parameters."""
    likelihood = torch.tensor([0.2, 0.9], dtype=torch.float64)
    logit = torch.full((20_000,), 0.3, dtype=torch.float64, requires_grad=True)

    def pair(probs, observe):
        with pyro.plate("copies", 20_000):
            with poutine.mask(mask=False):
                z = pyro.sample("z", dist.Bernoulli(logits=probs))
            if observe:
                pyro.factor("x", likelihood[z.long()].log())

    loss = IWAE_ELBO(K=2, estimator=estimator).differentiable_loss(
        lambda: pair(torch.zeros((), dtype=torch.float64), True), lambda: pair(logit, False)
    )
    (grad,) = torch.autograd.grad(loss, logit)
    leaf = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    q = torch.stack([1 - leaf.sigmoid(), leaf.sigmoid()])
    expected = sum(
        q[i] * q[j] * ((likelihood[i] + likelihood[j]) / 2).log() for i in range(2) for j in range(2)
    )
    (exact,) = torch.autograd.grad(-expected, leaf)
    error = grad.std() / len(grad) ** 0.5
    assert abs(grad.mean() - exact) < 4 * error
    assert abs(exact) > 10 * error


class TestLateParameters:
    """Guides whose parameters act after the sampling: their density at stopped values has no score."""

    x = torch.tensor(1.0)

    def model(self):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=self.x)

    def transformed(self):
        loc, scale = pyro.param("loc", torch.tensor(0.2)), pyro.param("scale", torch.tensor(0.8))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(loc + scale * noise, log_density=-scale.log()))

    def point(self):
        pyro.sample("z", dist.Delta(pyro.param("loc", torch.tensor(0.2))))

    def factor(self):
        loc = pyro.param("loc", torch.tensor(0.2))
        pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.factor("penalty", 3 * loc**2, has_rsample=True)

    @pytest.mark.parametrize("estimator", ["stl", "dreg", "rws"])
    @pytest.mark.parametrize("guide", ["transformed", "point", "factor"])
    def test_are_refused_by_name(self, guide, estimator):
        name = "penalty" if guide == "factor" else "z"
        with pytest.raises(ValueError, match=rf"Guide site\(s\) '{name}' depend on parameters after"):
            IWAE_ELBO(K=3, estimator=estimator).loss_and_grads(self.model, getattr(self, guide))

    def test_so_is_autostructured(self):
        guide = AutoStructured(self.model, conditionals="normal")
        with pytest.raises(ValueError, match="depend on parameters after sampling"):
            IWAE_ELBO(K=3, estimator="dreg").loss_and_grads(self.model, guide)
        IWAE_ELBO(K=3).loss_and_grads(self.model, guide)

    def test_a_jacobian_of_reparameterised_draws_alone_is_none_of_these(self):
        def guide():
            noise = pyro.sample(
                "noise", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 1.0), infer={"is_auxiliary": True}
            )
            pyro.sample("z", dist.Delta(noise.sinh(), log_density=-noise.cosh().log()))

        for estimator in ("stl", "dreg", "rws"):
            IWAE_ELBO(K=3, estimator=estimator).loss_and_grads(self.model, guide)


def test_dropout_in_the_guide_is_noticed():
    dropout = torch.nn.Dropout(0.5)

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))

    def guide():
        pyro.sample("z", dist.Normal(dropout(pyro.param("loc", torch.ones(8))), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"another density when it is run again.*eval mode"):
        IWAE_ELBO(K=3, estimator="dreg").loss_and_grads(model, guide)
    dropout.eval()
    IWAE_ELBO(K=3, estimator="dreg").loss_and_grads(model, guide)


@pytest.mark.parametrize(
    "loss",
    [
        VR_ELBO(alpha=2.0, K=8, estimator="rws"),
        TVO_ELBO(K=8, partitions=2, estimator="rws"),
        CIWAE_ELBO(K=8, beta=0.9, estimator="rws"),
    ],
    ids=repr,
)
def test_wake_wake_normalises_the_importance_weights_whatever_the_bound(loss):
    problem = Bernoulli()
    pyro.set_rng_seed(0)
    _, grad = problem.draws(loss, 100)
    pyro.set_rng_seed(0)
    _, expected = problem.draws(IWAE_ELBO(K=8, estimator="rws"), 100)
    torch.testing.assert_close(grad, expected)


def signals(estimator, bound, log_w):
    """The weights of the score term for a guide with discrete sites."""
    _, (_, signal) = get_estimator(estimator).guide_weights(bound, log_w, bound.weights(log_w), 1.0)
    return signal


@pytest.mark.parametrize("estimator", ["score", "vimco"])
def test_a_dead_particle_counts_against_its_value(estimator):
    bound = IWAE_ELBO(K=4).bound
    dead, unlikely = (
        signals(estimator, bound, torch.tensor([[x, -1.0, -1.5, -2.0]])) for x in (-math.inf, -60.0)
    )
    if estimator == "score":
        torch.testing.assert_close(dead, unlikely)
    else:  # the mean of the others is that of the live ones
        value = math.log((math.exp(-1) + math.exp(-1.5) + math.exp(-2)) / 4)
        without = math.log((math.exp(-1) + 2 * math.exp(-1.5) + math.exp(-2)) / 4)
        assert dead[0, 0].item() == pytest.approx(value - without, rel=1e-5)
    assert dead[0, 0] < -0.1
    two = signals(estimator, IWAE_ELBO(K=2).bound, torch.tensor([[-math.inf, -1.0]]))
    torch.testing.assert_close(two, torch.tensor([[-math.log(2), 0.0]]))


@pytest.mark.parametrize("estimator", ["score", "vimco"])
def test_the_signal_keeps_its_digits_under_large_log_weights(estimator):
    bound = IWAE_ELBO(K=64).bound
    log_w = (torch.randn(1, 64, 5) - 1e5).float()
    exact = signals(estimator, bound, log_w.double())
    torch.testing.assert_close(signals(estimator, bound, log_w).double(), exact, rtol=1e-3, atol=1e-5)
    naive = bound.value(log_w) - bound.replaced(log_w, get_estimator(estimator).replacement(bound, log_w))
    assert (naive - exact).abs().mean() > 0.05 * exact.abs().mean()  # what float32 makes of it uncentred


@pytest.mark.parametrize("size", [100_000, 1_000_000])
@pytest.mark.parametrize("estimator", ["score", "vimco"])
@pytest.mark.parametrize("name", ["IWAE", "CIWAE", "VR", "VR near 1", "TVO"])
def test_float32_adds_nothing_to_the_noise_of_many_particles(name, estimator, size):
    bound = {
        "IWAE": bounds.IWAE(size),
        "CIWAE": bounds.CIWAE(size, 0.2),
        "VR": bounds.VR(0.5, size),
        "VR near 1": bounds.VR(1 - 1e-8, size),
        "TVO": bounds.TVO(size, 5),
    }[name]
    # The guide's density at z is one of Normal(loc, 1), its score z - loc.
    z = torch.randn(1, size, dtype=torch.float64)
    log_w = -((z - 1) ** 2) - 80
    exact, found = (signals(estimator, bound, w).double() for w in (log_w, log_w.float()))
    noise = (exact * z).square().sum().sqrt()  # of the estimate, its terms being all but independent
    assert abs(((found - exact) * z).sum()) < 1e-2 * noise
