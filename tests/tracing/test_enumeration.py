"""Enumerated model sites against the same models with the sums written out."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from helpers.steps import value_and_grads
from helpers.truth import normal
from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, ImportanceSampler

PARALLEL = {"enumerate": "parallel"}
LOSSES = {
    "one": lambda **kw: IWAE_ELBO(K=1, **kw),
    "IWAE": lambda **kw: IWAE_ELBO(K=4, **kw),
    "MIWAE": lambda **kw: MIWAE_ELBO(M=2, K=2, **kw),
    "CIWAE": lambda **kw: CIWAE_ELBO(K=4, beta=0.5, **kw),
    "PIWAE": lambda **kw: PIWAE_ELBO(M=2, K=2, **kw),
    "IWAE-dreg": lambda **kw: IWAE_ELBO(K=4, estimator="dreg", **kw),
}


class Mixture:
    """z_n ~ N(0, 1), c_n ~ Categorical(weights), x_n ~ N(w z_n + means[c_n], 1); guide z_n ~ N(a x_n, 1)."""

    def __init__(self, plate=lambda: pyro.plate("data", 5), mask=None):
        self.x = torch.randn(5, generator=torch.Generator().manual_seed(3))
        self.plate = plate
        self.mask = poutine.mask(mask=torch.ones(5, dtype=torch.bool) if mask is None else mask)

    def params(self):
        weights = torch.tensor([0.2, 0.5, 0.3])
        return (
            pyro.param("weights", weights, constraint=dist.constraints.simplex),
            pyro.param("means", torch.tensor([-1.0, 0.5, 2.0])),
            pyro.param("w", torch.tensor(0.7)),
        )

    def model(self):
        weights, means, w = self.params()
        with self.plate(), self.mask:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(weights), infer=PARALLEL)
            pyro.sample("x", dist.Normal(w * z + means[c], 1.0), obs=self.x)

    def summed(self):
        weights, means, w = self.params()
        with self.plate(), self.mask:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            components = dist.Normal(w * z.unsqueeze(-1) + means, 1.0)
            mixture = dist.MixtureSameFamily(dist.Categorical(weights), components)
            pyro.sample("x", mixture, obs=self.x)

    def guide(self):
        a = pyro.param("a", torch.tensor(0.4))
        with self.plate(), self.mask:
            pyro.sample("z", dist.Normal(a * self.x, 1.0))


class GlobalSwitch:
    """One enumerated switch above the data, whose product is taken inside its sum; the latents are joint."""

    x = torch.tensor([0.3, -0.2, 1.5])

    def latents(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0)), pyro.param("means", torch.tensor([-1.0, 2.0]))

    def model(self):
        z, means = self.latents()
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])), infer=PARALLEL)
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z + means[c], 1.0), obs=self.x)

    def summed(self):
        z, means = self.latents()
        terms = [
            torch.tensor(p).log() + normal(self.x, z.unsqueeze(-1) + mean, 1.0).sum(-1)
            for p, mean in zip((0.3, 0.7), means, strict=True)
        ]
        pyro.factor("x", torch.stack(terms).logsumexp(0))

    def guide(self):
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.4)), 1.0))


class HiddenMarkov:
    """An enumerated chain of states in a data plate, over a continuous latent; summed by the forward pass."""

    x = torch.tensor([[0.3, -0.2, 1.5, 0.1], [1.0, 2.0, -1.0, 0.0]])  # [time... ] rows are time, columns data
    start = torch.tensor([0.4, 0.6])
    step = torch.tensor([[0.8, 0.2], [0.3, 0.7]])

    def means(self):
        return pyro.param("means", torch.tensor([-1.0, 1.0]))

    def model(self):
        means = self.means()
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            probs = self.start
            for t in pyro.markov(range(2)):
                c = pyro.sample(f"c_{t}", dist.Categorical(probs), infer=PARALLEL)
                pyro.sample(f"x_{t}", dist.Normal(z + means[c], 1.0), obs=self.x[t])
                probs = self.step[c]

    def summed(self):
        means = self.means()
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            likelihoods = [normal(x.unsqueeze(-1), z.unsqueeze(-1) + means, 1.0).exp() for x in self.x]
            alpha = self.start * likelihoods[0]
            alpha = (alpha @ self.step) * likelihoods[1]
            pyro.factor("x", alpha.sum(-1).log())

    def guide(self):
        a = pyro.param("a", torch.tensor(0.4))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a * self.x[0], 1.0))


def run(loss, model, guide):
    """Loss and gradients, the pair probed before."""
    loss.loss(model, guide)
    pyro.set_rng_seed(0)
    return value_and_grads(loss, model, guide)


def assert_same(first, second):
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        torch.testing.assert_close(grad, second[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("problem", [Mixture, GlobalSwitch, HiddenMarkov])
def test_enumerated_equals_summed_by_hand(problem, name, vectorize):
    problem, loss = problem(), LOSSES[name](vectorize_particles=vectorize)
    enumerated = run(loss, problem.model, problem.guide)
    assert_same(enumerated, run(loss, problem.summed, problem.guide))


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
def test_on_a_minibatch_the_scale_stays_outside(vectorize):
    problem = Mixture(lambda: pyro.plate("data", 50, subsample=torch.arange(5)))
    loss = IWAE_ELBO(K=4, vectorize_particles=vectorize)
    assert_same(run(loss, problem.model, problem.guide), run(loss, problem.summed, problem.guide))
    assert loss.particles(problem.model, problem.guide).scale == pytest.approx(10)


@pytest.mark.parametrize("scale", [0.1, torch.tensor(0.1), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])], ids=repr)
def test_a_shared_scale_stays_outside(scale):
    problem, loss = Mixture(), IWAE_ELBO(K=4)
    guide = poutine.scale(problem.guide, scale)
    first = run(loss, poutine.scale(problem.model, scale), guide)
    assert_same(first, run(loss, poutine.scale(problem.summed, scale), guide))


@pytest.mark.filterwarnings("ignore:.*tempered density")
def test_components_may_differ_in_scale():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(0.3), infer=PARALLEL)
        pyro.sample("x", dist.Normal(z + c, 1.0), obs=torch.tensor(1.0))
        with poutine.scale(scale=2.0):
            d = pyro.sample("d", dist.Bernoulli(0.6), infer=PARALLEL)
            pyro.sample("y", dist.Normal(z - d, 1.0), obs=torch.tensor(0.5))

    def summed():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for name, p, x, sign, scale in (("x", 0.3, 1.0, 1.0, 1.0), ("y", 0.6, 0.5, -1.0, 2.0)):
            log_probs = [normal(torch.tensor(x), z + sign * value, 1.0) for value in (0.0, 1.0)]
            mix = torch.stack([math.log(1 - p) + log_probs[0], math.log(p) + log_probs[1]])
            pyro.factor(name, scale * mix.logsumexp(0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.4)), 1.0))

    assert_same(run(IWAE_ELBO(K=4), model, guide), run(IWAE_ELBO(K=4), summed, guide))


def test_under_a_mask():
    problem = Mixture(mask=torch.tensor([True, True, False, True, False]))
    loss = IWAE_ELBO(K=4)
    assert_same(run(loss, problem.model, problem.guide), run(loss, problem.summed, problem.guide))
    log_w = loss.particles(problem.model, problem.guide).log_weights
    torch.testing.assert_close(log_w[:, [2, 4]], torch.zeros(4, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("problem", [Mixture, GlobalSwitch, HiddenMarkov])
def test_one_particle_is_pyros_enumerated_elbo(problem):
    problem = problem()
    nesting = 0 if isinstance(problem, GlobalSwitch) else 1
    theirs = TraceEnum_ELBO(max_plate_nesting=max(nesting, 1))
    assert_same(run(IWAE_ELBO(K=1), problem.model, problem.guide), run(theirs, problem.model, problem.guide))


def test_the_kept_plates_are_those_of_the_summed_model():
    assert IWAE_ELBO(K=3).particles(Mixture().model, Mixture().guide).log_weights.shape == (3, 5)
    switch = GlobalSwitch()
    assert IWAE_ELBO(K=3).particles(switch.model, switch.guide).log_weights.shape == (3,)


@pytest.mark.parametrize("place", ["inside", "above"])
@pytest.mark.parametrize(
    "run", [{}, {"vectorize_particles": False}, {"chunk_size": 2}, {"backward_particles": 2}]
)
def test_a_single_value(run, place):
    """A sum of one term: the same as the site's only value."""

    def model(enumerate_it=True):
        weights = torch.ones(1)

        def site():
            return 1.0 * pyro.sample("c", dist.Categorical(weights), infer=PARALLEL) if enumerate_it else 0.0

        above = site() if place == "above" else None
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0 if above is None else above, 1.0))
            c = site() if above is None else above
            pyro.sample("x", dist.Normal(z + c, pyro.param("s", torch.tensor(0.8))), obs=torch.arange(4.0))

    def guide(enumerate_it=True):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.4)) * torch.arange(4.0), 1.0))

    found = []
    for enumerate_it in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(0)
        loss = IWAE_ELBO(K=5, plates=(), **run)
        value = loss.loss_and_grads(model, guide, enumerate_it)
        found.append([value, *(pyro.param(name).grad.item() for name in "sa")])
        torch.manual_seed(0)
        sampler = ImportanceSampler(
            model, guide, 10, plates=(), chunk_size=4, vectorize_particles="vectorize_particles" not in run
        )
        found[-1].append(sampler.log_marginal(enumerate_it).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_pair_that_begins_to_enumerate_later():
    infer = {}
    problem = Mixture()

    def model():
        weights, means, w = problem.params()
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Categorical(weights)
            c = pyro.sample("c", fn, infer=infer) if infer else torch.tensor(0)
            pyro.sample("x", dist.Normal(w * z + means[c], 1.0), obs=problem.x)

    loss = IWAE_ELBO(K=4)
    loss.loss(model, problem.guide)
    infer.update(PARALLEL)
    assert_same(run(loss, model, problem.guide), run(loss, problem.summed, problem.guide))


class TestRefusals:
    @pytest.mark.parametrize("vectorize", [True, False])
    def test_a_distribution_without_a_finite_support(self, vectorize):
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Poisson(2.0), infer=PARALLEL)
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=torch.tensor(1.0))

        def guide():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        with pytest.raises(NotImplementedError, match=r"Site 'c' of the model.*Poisson has no values"):
            IWAE_ELBO(K=4, vectorize_particles=vectorize).loss(model, guide)

    def test_sampled_enumeration(self):
        def model():
            pyro.sample("c", dist.Bernoulli(0.5), infer={**PARALLEL, "num_samples": 3})

        with pytest.raises(NotImplementedError, match="Site 'c' of the model asks for num_samples"):
            IWAE_ELBO(K=4).loss(model, lambda: None)

    def test_scales_that_differ_inside_the_sum(self):
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.5), infer=PARALLEL)
            with poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(z + c, 1.0), obs=torch.tensor(1.0))

        def guide():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        with pytest.raises(NotImplementedError, match="'x' hang together by enumeration but differ in scale"):
            IWAE_ELBO(K=4).loss(model, guide)

    def test_a_weighted_prior_that_is_summed_with_the_likelihood(self):
        def model():
            c = pyro.sample("c", dist.Bernoulli(0.5), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(2 * c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

        def guide():
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))

        IWAE_ELBO(K=4).loss_and_grads(model, guide)
        with pytest.raises(NotImplementedError, match=r"kl_weight other than 1.*prior of 'z' depends on"):
            IWAE_ELBO(K=4, kl_weight=0.5).loss_and_grads(model, guide)

    def test_a_structure_that_cannot_be_contracted(self):
        """Two independent plates of enumerated sites meet in one observation."""

        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
            with rows:
                a = pyro.sample("a", dist.Bernoulli(0.5), infer=PARALLEL)
            with columns:
                b = pyro.sample("b", dist.Bernoulli(0.5), infer=PARALLEL)
            with rows, columns:
                pyro.sample("x", dist.Normal(z + a + b, 1.0), obs=torch.zeros(2, 3))

        def guide():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        with pytest.raises(NotImplementedError, match=r"site\(s\) 'a', 'b' cannot be summed out .* 'x'"):
            IWAE_ELBO(K=4).loss(model, guide)
