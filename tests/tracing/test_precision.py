"""Autocast: networks in bfloat16, densities and weights in float32."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch import nn

from pyro_iw import (
    FIVO_ELBO,
    IWAE_ELBO,
    AnnealedImportanceSampler,
    ImportanceSampler,
    LocallyEnhancedELBO,
    ParticleFilter,
)
from pyro_iw.bounds import IWAE, MIWAE
from pyro_iw.tracing.precision import _widened

N, X = 4, 10
WAYS = {
    "one pass": {},
    "one by one": {"vectorize_particles": False},
    "chunks": {"chunk_size": 2},
    "subset": {"backward_particles": 2},
    "compiled": {"compile": True},
}


def pair(latents):
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(X, 2 * latents), nn.Linear(latents, X)
    x = torch.randn(N, X)

    def model():
        pyro.module("decoder", decoder)
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=(x > 0).float())

    def guide():
        pyro.module("encoder", encoder)
        with pyro.plate("data", N):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def message(particles, role, name):
    return next(site.message for site in particles.sites if (site.role, site.name) == (role, name))


def exact(message):
    """The log density in float64 of the very parameters and value."""
    base, value = message["fn"].base_dist, message["value"].double()
    if "logits" in vars(base):
        return dist.Bernoulli(logits=base.logits.double()).log_prob(value).sum(-1)
    return dist.Normal(base.loc.double(), base.scale.double()).log_prob(value).sum(-1)


@pytest.mark.parametrize("latents", [20, 64, 256])
def test_log_densities_have_the_digits_of_float32(latents):
    """Summed in bfloat16 they were off by 0.19, 0.37 and 1.28 nats."""
    with bfloat16():
        particles = IWAE_ELBO(K=8).particles(*pair(latents))
    for role, name in (("guide", "z"), ("model", "x")):
        found = particles.log_q if role == "guide" else None
        site = message(particles, role, name)
        logits = site["fn"].base_dist
        half = (logits.logits if name == "x" else logits.loc).detach()
        assert torch.equal(half, half.bfloat16().float())  # what the network gave has bfloat16's digits
        if found is not None:
            torch.testing.assert_close(found.double(), exact(site), rtol=0, atol=2e-4)
    assert particles.log_weights.dtype == torch.float32
    log_p = exact(message(particles, "model", "x")) + exact(message(particles, "model", "z"))
    torch.testing.assert_close(particles.log_p.double(), log_p, rtol=0, atol=2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running_gives_the_same(way):
    model, guide = pair(20)
    found = []
    for options in ({}, WAYS[way]):
        loss = IWAE_ELBO(K=4, **options)
        for _ in range(2 if way == "compiled" else 1):
            pyro.set_rng_seed(1)
            with bfloat16():
                found.append(loss.loss_and_grads(model, guide))
    assert found == pytest.approx([found[0]] * len(found), rel=1e-5)


def test_the_sampler():
    model, guide = pair(64)
    pyro.set_rng_seed(0)
    with bfloat16():
        samples = ImportanceSampler(model, guide, 50, chunk_size=20, progress=False)()
    assert samples.log_weights.dtype == torch.float32
    assert len(samples.log_weights.unique()) == 50 * N  # and not one of a few hundred numbers


def test_two_levels():
    model, guide = pair(20)
    with bfloat16():
        levels = LocallyEnhancedELBO(IWAE(4), "data", MIWAE(2, 1)).particles(model, guide)
    assert levels.local["data"].log_weights.dtype == torch.float32
    torch.testing.assert_close(
        levels.local["data"].log_q.double(), exact(message(levels, "guide", "z")), rtol=0, atol=2e-4
    )


def test_the_noise_has_the_digits_of_float32():
    model, guide = pair(256)
    with bfloat16():
        z = message(IWAE_ELBO(K=8).particles(model, guide), "guide", "z")
    noise = (z["value"] - z["fn"].base_dist.loc) / z["fn"].base_dist.scale
    assert not torch.equal(noise, noise.bfloat16().float())
    assert noise.mean().abs() < 4 / math.sqrt(noise.numel())


def test_matrices_are_not_multiplied_in_bfloat16():
    """A multivariate normal samples and scores by matrix products, which autocast would take over."""

    def model():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(6), torch.eye(6)))

    factor = (torch.eye(6) + 0.3 * torch.ones(6, 6)).tril()

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(6), scale_tril=factor))

    with bfloat16():
        particles = IWAE_ELBO(K=5).particles(model, guide)
    z = message(particles, "guide", "z")["value"].double()
    wanted = torch.distributions.MultivariateNormal(torch.zeros(6).double(), scale_tril=factor.double())
    torch.testing.assert_close(particles.log_q.double(), wanted.log_prob(z), rtol=1e-5, atol=1e-5)


def test_a_normal_of_low_rank():
    """Its small matrix, multiplied under autocast as it is made, cost some 0.05 nats."""
    factor = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

    def run():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.LowRankMultivariateNormal(torch.zeros(6), factor, torch.full((6,), 0.3)))

    with bfloat16():
        particles = IWAE_ELBO(K=5).particles(run, run)
    z = message(particles, "guide", "z")["value"].double()
    covariance = factor.double() @ factor.double().mT + 0.3 * torch.eye(6)
    wanted = torch.distributions.MultivariateNormal(torch.zeros(6).double(), covariance)
    torch.testing.assert_close(particles.log_q.double(), wanted.log_prob(z), rtol=1e-5, atol=1e-4)


class Walk:
    """A chain of ten latents, each of 64 numbers, by networks."""

    def __init__(self):
        torch.manual_seed(0)
        self.move, self.emit = nn.Linear(64, 64), nn.Linear(64, X)
        self.x = torch.randn(5, N, X)

    def init(self, state):
        state["z"] = torch.zeros(64)

    def step(self, state, x):
        pyro.module("move", self.move), pyro.module("emit", self.emit)
        with pyro.plate("data", N):
            state["z"] = pyro.sample("z", dist.Normal(self.move(state["z"]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.emit(state["z"]), 1.0).to_event(1), obs=x)


class Steered(Walk):
    def init(self, state):
        pass

    def step(self, state, x):
        pyro.module("steer", self.move)
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(self.move(state["z"]), 1.1).to_event(1))


def test_particle_filters():
    """Densities of all moments in float32: without autocast they differ by the digits of the networks."""
    model, guide = Walk(), Steered()
    found = []
    for autocast in (True, False):
        pyro.set_rng_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            # Not resampled, where digits decide who goes on.
            found.append(FIVO_ELBO(K=8, ess_threshold=0).loss_and_grads(model, guide, model.x))
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=2e-3)
    pyro.set_rng_seed(0)
    with bfloat16():
        filtered = ParticleFilter(model, guide, 50, num_filters=2)(model.x)
    assert filtered.log_marginal.dtype == filtered.weights.dtype == torch.float32
    # In bfloat16 they would be among 256 numbers between 2 powers of 2.
    assert not torch.equal(filtered.log_marginal, filtered.log_marginal.bfloat16().float())


def test_annealing():
    """The evidence of a linear decoder in closed form; bfloat16 decoded with 0.4 % of error."""
    torch.manual_seed(0)
    decoder, encoder = nn.Linear(4, 3), nn.Linear(3, 8)
    x = torch.randn(N, 3)

    def model():
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide():
        with pyro.plate("data", N):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    covariance = decoder.weight @ decoder.weight.T + 0.25 * torch.eye(3)
    exact = torch.distributions.MultivariateNormal(decoder.bias, covariance).log_prob(x).detach()
    pyro.set_rng_seed(0)
    with bfloat16():
        sampler = AnnealedImportanceSampler(model, guide, 64, 40, num_adaptation=20, progress=False)
        samples = sampler()
    for part in (samples.log_p, samples.log_weights):
        assert part.dtype == torch.float32
        assert not torch.equal(part, part.bfloat16().float())
    off = (samples.log_marginal - exact).abs()
    assert (off < 4 * samples.monte_carlo_error + 0.05).all(), (off, samples.monte_carlo_error)


class TestChains:
    """Distributions of whole sequences, which compute as they are made."""

    def test_a_discrete_hidden_markov_model_sums_to_one(self):
        generator = torch.Generator().manual_seed(0)
        start, move, emit = (torch.randn(shape, generator=generator) for shape in ((4,), (4, 4), (4, 2)))
        with bfloat16():
            move, emit = (nn.Identity()(3 * part).bfloat16() for part in (move, emit))
            fn = dist.DiscreteHMM(start.bfloat16(), move.expand(3, 4, 4), dist.Categorical(logits=emit))
        before = fn.transition_logits
        wide = _widened(fn, {})
        outcomes = torch.tensor(list(itertools.product((0, 1), repeat=3)))
        assert abs(fn.log_prob(outcomes).float().exp().sum() - 1) > 1e-3
        assert abs(wide.log_prob(outcomes).exp().sum() - 1) < 1e-5
        assert fn.transition_logits is before

    def chain(self, matrix):
        normal = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
        return dist.GaussianHMM(normal, matrix, normal, torch.eye(2), normal, duration=4)

    def run(self, make):
        def model():
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", make(), obs=torch.zeros(4, 2))

        def guide():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        with bfloat16():
            return IWAE_ELBO(K=2, vectorize_particles=False).loss(model, guide)

    def test_a_gaussian_one_is_refused_and_the_way_out_works(self):
        matrix = torch.tensor([[0.5, 0.1], [0.2, 0.4]])
        with pytest.raises(ValueError, match=r"GaussianHMM of site 'x'.*enabled=False"):
            self.run(lambda: self.chain(matrix))

        def outside():
            with torch.autocast("cpu", enabled=False):
                return self.chain(matrix)

        exact = self.chain(matrix).log_prob(torch.zeros(4, 2))
        assert self.run(outside) == pytest.approx(-exact.item(), rel=1e-5)


class TestWidening:
    def test_without_autocast_everything_stays(self):
        fn = dist.Normal(torch.zeros(2, dtype=torch.bfloat16), 1.0)

        def run():
            with pyro.plate("data", 2):
                pyro.sample("z", fn)

        levels = IWAE_ELBO(K=2).particles(run, run)
        assert levels.log_q.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        "fn",
        [
            dist.Normal(torch.tensor([0.1, 0.2]).bfloat16(), torch.tensor(2.0).bfloat16()),
            dist.Bernoulli(logits=torch.tensor([0.1, -1.0]).bfloat16()),
            dist.OneHotCategorical(logits=torch.tensor([0.1, -1.0]).bfloat16()),
            dist.MultivariateNormal(torch.zeros(2).bfloat16().float(), scale_tril=torch.eye(2)),
            dist.MixtureSameFamily(
                dist.Categorical(logits=torch.tensor([0.1, -1.0]).bfloat16()),
                dist.Normal(torch.tensor([0.5, 1.0]).bfloat16(), 1.0),
            ),
            dist.TransformedDistribution(
                dist.Normal(torch.tensor([0.1, 0.2]).bfloat16(), torch.ones(2).bfloat16()).to_event(1),
                [transforms.AffineTransform(torch.tensor(0.3).bfloat16(), torch.tensor(2.0).bfloat16())],
            ),
            dist.Delta(torch.tensor([0.1, 0.2]).bfloat16(), log_density=torch.tensor(0.3).bfloat16()),
            dist.Normal(torch.tensor(0.1).bfloat16(), 1.0)
            .expand([3])
            .mask(torch.tensor([True, False, True])),
        ],
        ids=lambda fn: type(fn).__name__,
    )
    def test_of_every_part(self, fn):
        """Values and densities are float32; the distribution given stays as it was."""
        before = dict(vars(fn))
        wide = _widened(fn, {})
        value = wide.sample()
        assert value.dtype == torch.float32
        assert wide.log_prob(value).dtype == torch.float32
        assert all(vars(fn)[name] is part for name, part in before.items())
        assert wide.event_shape == fn.event_shape
        assert wide.batch_shape == fn.batch_shape

    @pytest.mark.parametrize("kind", [dist.Categorical, dist.OneHotCategorical])
    @pytest.mark.parametrize("parameter", ["logits", "probs"])
    def test_probabilities_sum_to_one(self, kind, parameter):
        """Normalised in bfloat16 they summed to 1 within 0.01, so that every label cost that many nats."""
        given = 3 * torch.randn(6, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
        fn = kind(**{parameter: given if parameter == "logits" else given.exp()})
        expanded = _widened(fn.expand([2, 6]), {})
        fn.probs, fn.logits  # one of them is computed from the other, and kept  # noqa: B018
        wide = _widened(fn, {})
        total = wide.log_prob(wide.enumerate_support()).exp().sum(0)
        torch.testing.assert_close(total, torch.ones(6), rtol=0, atol=1e-5)
        torch.testing.assert_close(wide.logits.exp(), wide.probs, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(wide.probs, torch.softmax(given.float(), -1), rtol=0.1, atol=1e-3)
        if parameter == "logits":  # PyTorch itself expands the logits of probabilities, clamped as they are
            torch.testing.assert_close(expanded.logits, wide.logits.expand(2, 6, 20))

    def test_the_inverse_of_a_transform_is_of_the_wide_one(self):
        """A transform that has been inverted before holds its inverse, made of what it was then."""
        shift = transforms.AffineTransform(torch.tensor(0.3).bfloat16(), torch.tensor(3.0).bfloat16())
        for transform in (shift, shift.inv):
            fn = dist.TransformedDistribution(dist.Normal(torch.zeros(2).bfloat16(), 1.0), [transform])
            inverse = transform.inv
            assert inverse.inv is transform
            value = torch.tensor([0.123456, 1.234567])
            wide = _widened(fn, {})
            loc, scale = shift.loc.double(), shift.scale.double()
            if transform is not shift:
                loc, scale = -loc / scale, 1 / scale
            exact = torch.distributions.Normal(loc, scale).log_prob(value.double())
            torch.testing.assert_close(wide.log_prob(value).double(), exact, rtol=1e-6, atol=1e-6)
            assert transform.inv is inverse

    def test_what_is_expanded_stays_so(self):
        fn = dist.Normal(torch.zeros(3).bfloat16(), torch.ones(()).bfloat16()).expand([1000, 3])
        loc = _widened(fn, {}).loc
        assert loc.dtype == torch.float32
        assert loc.shape == (1000, 3)
        assert loc.untyped_storage().nbytes() == 12


def test_float16_is_refused_as_itself():
    """By name, and not wrapped in what is said of shapes."""
    model, guide = pair(4)
    for options in ({}, {"vectorize_particles": False}, {"chunk_size": 2}):
        with (
            torch.autocast("cpu", torch.float16),
            pytest.raises(ValueError, match=r"^Particle weights that differ"),
        ):
            IWAE_ELBO(K=3, estimator="dreg", **options).loss_and_grads(model, guide)
