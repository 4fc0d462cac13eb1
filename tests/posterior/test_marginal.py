"""Enumerated sites after sampling: draws of them and log-likelihoods without them, by hand."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex

from pyro_iw import ImportanceSampler, ImportanceSamples

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
Y = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)
ENUMERATE = {"enumerate": "parallel"}


def normal(loc, scale, value):
    return dist.Normal(loc, scale).log_prob(value)


def guide(*_):
    pyro.sample("z", dist.Normal(ZERO + 0.2, 1.0))


def local_guide(*_):
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(ZERO + 0.2, 1.0))


def local(x):
    """A component for each datapoint."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(z + MEANS[c], 0.8), obs=x)


def below_a_global_latent(x):
    z = pyro.sample("z", dist.Normal(ZERO, 1.0))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(z + MEANS[c], 0.8), obs=x)


def shared(x):
    """One component for all datapoints."""
    z = pyro.sample("z", dist.Normal(ZERO, 1.0))
    c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=ENUMERATE)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z + MEANS[c], 0.8), obs=x)


def two_views(x, y):
    """Two observed sites of one component, and one that has nothing to do with it."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(z + MEANS[c], 0.8), obs=x)
        pyro.sample("y", dist.Normal(MEANS[c], 1.5), obs=y)
        pyro.sample("v", dist.Normal(z, 2.0), obs=x)


def prior_on_the_component(x):
    """The latent's prior depends on the component, and so does a factor."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=ENUMERATE)
        z = pyro.sample("z", dist.Normal(MEANS[c], 1.0))
        pyro.factor("f", 0.3 * c.to(z))
        pyro.sample("x", dist.Normal(z * (1 + c), 0.8), obs=x)


def chain(x):
    """A hidden Markov model over time, its steps in a loop."""
    z = pyro.sample("z", dist.Normal(ZERO, 1.0))
    c = 0
    for t in pyro.markov(range(len(x))):
        c = pyro.sample(f"c_{t}", dist.Categorical(TRANSITION[c]), infer=ENUMERATE)
        pyro.sample(f"x_{t}", dist.Normal(z + MEANS[c], 0.8), obs=x[t])


TRANSITION = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)


def outer_and_inner(x):
    """A global component and one for each datapoint given it."""
    z = pyro.sample("z", dist.Normal(ZERO, 1.0))
    d = pyro.sample("d", dist.Categorical(torch.tensor([0.4, 0.6], dtype=torch.float64)), infer=ENUMERATE)
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(TRANSITION[d]), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(z + MEANS[c], 0.8), obs=x)


def joint_of_local(z, x):
    """log p(c, x_n | z) for each c, ``[n, N, C]``."""
    return WEIGHTS.log() + normal(z.unsqueeze(-1) + MEANS, 0.8, x.unsqueeze(-1))


WAYS = [{}, {"chunk_size": 70}, {"vectorize_particles": False, "num_particles": 100}]


def sample(model, guide, *args, num_particles=400, **options) -> ImportanceSamples:
    pyro.set_rng_seed(0)
    return ImportanceSampler(model, guide, num_particles, **options)(*args)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("model", "its_guide"), [(local, local_guide), (below_a_global_latent, guide)], ids=["local", "global"]
)
def test_log_likelihood_of_a_datapoint(model, its_guide, way):
    samples = sample(model, its_guide, X, **way)
    draws = samples.posterior(60)
    z = draws["z"] if model is local else draws["z"].unsqueeze(-1)
    expected = joint_of_local(z, X).logsumexp(-1)
    found = samples.log_likelihood(draws)
    assert found.keys() == {"x"}
    torch.testing.assert_close(found["x"], expected)
    # Given the draws of c, the density is that of the component.
    given = normal(z + MEANS[draws["c"]], 0.8, X)
    torch.testing.assert_close(samples.observed(draws)["x"].log_prob, given)


def assert_frequencies(values: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Draws ``[n, ...]`` have the distribution ``[n, ..., C]``, each its own, within five standard errors."""
    hits = torch.nn.functional.one_hot(values, probabilities.shape[-1]).double()
    variance = (probabilities * (1 - probabilities)).sum(0)
    error = (hits - probabilities).sum(0)
    assert (error.abs() < 5 * variance.sqrt() + 1e-9).all()
    # And they follow their own z, not only on average.
    weighted = ((hits - probabilities) * probabilities).sum(0)
    spread = (probabilities**3 * (1 - probabilities)).sum(0).sqrt()
    assert (weighted.abs() < 5 * spread + 1e-9).all()


@pytest.mark.parametrize("way", WAYS)
def test_draws_are_of_the_conditional(way):
    samples = sample(local, local_guide, X, **way)
    draws = samples.posterior(2000 if samples.rerun.vectorize else 250)
    assert draws["c"].shape == draws["z"].shape
    assert_frequencies(draws["c"], joint_of_local(draws["z"], X).softmax(-1))


def test_draws_of_a_shared_component():
    samples = sample(shared, guide, X)
    draws = samples.posterior(2000)
    assert draws["c"].shape == (2000,)
    lik = normal(draws["z"][:, None, None] + MEANS, 0.8, X[:, None]).sum(1)
    assert_frequencies(draws["c"], (WEIGHTS.log() + lik).softmax(-1))
    # Data are dependent but for c, and so taken given its draw.
    expected = normal((draws["z"] + MEANS[draws["c"]])[:, None], 0.8, X)
    torch.testing.assert_close(samples.log_likelihood(draws)["x"], expected)


def test_draws_are_joint():
    samples = sample(outer_and_inner, guide, X)
    draws = samples.posterior(3000)
    assert draws["d"].shape == (3000,)
    assert draws["c"].shape == (3000, 3)
    lik = normal(draws["z"][:, None, None] + MEANS, 0.8, X[:, None])  # [n, N, C]
    given = TRANSITION[:2].log()[:, None] + lik[:, None]  # [n, D, N, C]
    prior = torch.tensor([0.4, 0.6], dtype=torch.float64).log()
    assert_frequencies(draws["d"], (prior + given.logsumexp(-1).sum(-1)).softmax(-1))
    own = given[torch.arange(3000), draws["d"]]
    assert_frequencies(draws["c"], own.softmax(-1))


def test_a_markov_chain():
    samples = sample(chain, guide, X)
    draws = samples.posterior(3000)
    lik = normal(draws["z"][:, None, None] + MEANS, 0.8, X[:, None])  # [n, T, C]
    step = TRANSITION.log()
    paths = (
        (step[0] + lik[:, 0])[:, :, None, None]
        + (step + lik[:, 1][:, None])[:, :, :, None]
        + (step + lik[:, 2][:, None])[:, None]
    )
    found = samples.log_likelihood(draws)
    assert found.keys() == {"x_0 + x_1 + x_2"}
    torch.testing.assert_close(found["x_0 + x_1 + x_2"], paths.logsumexp((1, 2, 3)))
    index = (draws["c_0"] * 3 + draws["c_1"]) * 3 + draws["c_2"]
    assert_frequencies(index, paths.reshape(3000, 27).softmax(-1))


def test_two_observed_sites_of_one_component():
    samples = sample(two_views, local_guide, X, Y)
    draws = samples.posterior(100)
    joint = joint_of_local(draws["z"], X) + normal(MEANS, 1.5, Y.unsqueeze(-1))
    found = samples.log_likelihood(draws)
    assert found.keys() == {"x + y", "v"}
    torch.testing.assert_close(found["x + y"], joint.logsumexp(-1))
    torch.testing.assert_close(found["v"], normal(draws["z"], 2.0, X))


def test_a_prior_that_depends_on_the_component():
    samples = sample(prior_on_the_component, local_guide, X)
    draws = samples.posterior(100)
    z, c = draws["z"].unsqueeze(-1), torch.arange(3)
    prior = WEIGHTS.log() + normal(MEANS, 1.0, z) + 0.3 * c
    joint = prior + normal(z * (1 + c), 0.8, X.unsqueeze(-1))
    expected = joint.logsumexp(-1) - prior.logsumexp(-1)
    torch.testing.assert_close(samples.log_likelihood(draws)["x"], expected)


def test_a_mask():
    mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=ENUMERATE)
            with pyro.poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z + MEANS[c], 0.8), obs=x)

    samples = sample(model, local_guide, X)
    draws = samples.posterior(2000)
    joint = joint_of_local(draws["z"], X)
    expected = torch.where(mask, joint.logsumexp(-1), 0.0)
    torch.testing.assert_close(samples.log_likelihood(draws)["x"], expected)
    assert_frequencies(draws["c"], torch.where(mask[:, None], joint, WEIGHTS.log()).softmax(-1))


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_minibatch_is_not_tempered(vectorize):
    """The scale N / B of a subsampled plate is no part of a datapoint's likelihood."""
    big = torch.linspace(-2, 2, 40, dtype=torch.float64)

    def model():
        with pyro.plate("data", 40, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(z + MEANS[c], 0.8), obs=big[index])

    def guide():
        with pyro.plate("data", 40, subsample_size=3):
            pyro.sample("z", dist.Normal(ZERO + 0.2, 1.0))

    samples = sample(model, guide, vectorize_particles=vectorize, num_particles=100)
    draws = samples.posterior(150)
    joint = joint_of_local(draws["z"], big[samples.rerun.minibatch.indices["data"]])
    torch.testing.assert_close(samples.log_likelihood(draws)["x"], joint.logsumexp(-1))
    assert_frequencies(draws["c"], joint.softmax(-1))


def test_two_plates():
    data = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3)

    def model():
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        with columns:
            loc = pyro.sample("loc", dist.Normal(ZERO, 0.5))
        with rows, columns:
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(z + loc + Vindex(MEANS)[c], 0.8), obs=data)

    def guide():
        with pyro.plate("rows", 2, dim=-2):
            pyro.sample("z", dist.Normal(ZERO, 1.0))
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("loc", dist.Normal(ZERO, 0.5))

    samples = sample(model, guide)
    draws = samples.posterior(2000)
    joint = joint_of_local(draws["z"] + draws["loc"].reshape(2000, 1, 3), data)
    torch.testing.assert_close(samples.log_likelihood(draws)["x"], joint.logsumexp(-1))
    assert_frequencies(draws["c"], joint.softmax(-1))


def test_predictions_follow_the_draws():
    def model(x):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=ENUMERATE)
            twice = pyro.deterministic("twice", 2.0 * c)
            pyro.sample("x", dist.Normal(z + 10 * twice, 0.5), obs=20 * torch.tensor([0.0, 2.0, 1.0]))

    samples = sample(model, guide, X)
    draws = samples.posterior(50)
    assert (draws["c"] == torch.tensor([0, 2, 1])).all()
    shown = samples.observed(draws)
    torch.testing.assert_close(shown["twice"].values, 2.0 * draws["c"])
    torch.manual_seed(0)
    new = samples.predictive_of(draws)(X)
    torch.testing.assert_close(new["x"], draws["z"][:, None] + 20.0 * draws["c"], atol=2.5, rtol=0)
    # Draws of the sampled latents alone are filled up.
    some = samples.predictive_of(samples.take(samples.resample(50)))(X)
    assert (some["x"].div(20).round() == torch.tensor([0, 2, 1])).all()


def test_many_sites_have_a_short_name():
    data = torch.zeros(5, dtype=torch.float64)
    samples = sample(chain, guide, data, num_particles=20)
    (name,) = samples.log_likelihood(samples.posterior(5))
    assert name == "x_0 + ... + x_4"
    assert math.isfinite(samples.log_marginal)
