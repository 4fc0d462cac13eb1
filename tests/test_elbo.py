"""The losses: values against quadrature and Pyro, gradients against hand-written computations."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.optim import Adam

from helpers.by_hand import LOSSES, K, M, gradients, hand_written
from helpers.cases import CASES, DataPlate
from helpers.truth import ConjugateGaussian, RecordedNormal
from pyro_iw import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    Bound,
    ImportanceWeightedELBO,
)


@pytest.mark.filterwarnings("ignore:.*tempered density")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case_class", CASES, ids=lambda case: case.__name__)
def test_loss_and_gradients_against_hand_written_loops(case_class, name, vectorize, dtype):
    case = case_class(dtype)
    loss = LOSSES[name](vectorize_particles=vectorize)
    value, grads, draws = gradients(loss, case)
    if not vectorize:  # one draw a particle and site, site by site within a particle
        sites = len(draws) // (M * K)
        draws = [torch.stack(draws[site::sites]) for site in range(sites)]
    expected, theta_grads, phi_grads = hand_written(name, case, draws)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    assert value == pytest.approx(expected, rel=tolerance["rtol"])
    for key, grad in grads.items():
        truth = sum(side[key] for side in (theta_grads, phi_grads) if key in side)
        torch.testing.assert_close(grad, truth, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
def test_three_ways_to_the_loss_agree_to_the_last_bit(name, vectorize):
    case = DataPlate()
    loss = LOSSES[name](vectorize_particles=vectorize)
    for name in {**case.theta, **case.phi}:
        case.param(name)
    values = []
    for evaluate in (loss.loss, loss.loss_and_grads, loss.differentiable_loss, loss.loss):
        pyro.set_rng_seed(3)
        values.append(float(torch.as_tensor(evaluate(case.model, case.guide)).detach()))
    assert len(set(values)) == 1
    grads = {name: value.unconstrained().grad for name, value in pyro.get_param_store().items()}
    module = loss(case.model, case.guide)
    pyro.set_rng_seed(3)
    out = module()
    params = [value.unconstrained() for value in pyro.get_param_store().values()]
    for key, grad in zip(pyro.get_param_store().keys(), torch.autograd.grad(out, params), strict=True):
        assert torch.equal(grad, grads[key])


def test_gradients_accumulate_and_scale_like_any_loss():
    case = DataPlate()
    case.param("w")
    loss = IWAE_ELBO(K=3)
    pyro.set_rng_seed(0)
    (3 * loss.differentiable_loss(case.model, case.guide)).backward()
    weight = pyro.param("w").unconstrained()
    tripled, weight.grad = weight.grad, None
    pyro.set_rng_seed(0)
    loss.differentiable_loss(case.model, case.guide).backward()
    torch.testing.assert_close(tripled, 3 * weight.grad)


def test_a_second_derivative_is_refused():
    case = DataPlate()
    loss = IWAE_ELBO(K=3).differentiable_loss(case.model, case.guide)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        loss.backward(create_graph=True)


class TestAgainstPyro:
    def both(self, ours, theirs, case):
        value, grads, _ = gradients(ours, case)
        expected, expected_grads, _ = gradients(theirs, case)
        assert value == pytest.approx(expected, rel=1e-6)
        for key in grads:
            torch.testing.assert_close(grads[key], expected_grads[key], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "ours",
        [
            IWAE_ELBO(K=1),
            MIWAE_ELBO(M=1, K=1),
            CIWAE_ELBO(K=1, beta=0.3),
            PIWAE_ELBO(M=1, K=1),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("case_class", CASES, ids=lambda case: case.__name__)
    def test_one_particle_is_the_elbo_sample_by_sample(self, ours, case_class):
        self.both(ours, Trace_ELBO(), case_class())

    @pytest.mark.parametrize("ours", [MIWAE_ELBO(M=6, K=1), CIWAE_ELBO(K=6, beta=1)], ids=repr)
    @pytest.mark.parametrize("case_class", CASES, ids=lambda case: case.__name__)
    def test_many_particles_outside_the_logarithm_are_the_elbo_too(self, ours, case_class):
        nesting = len(case_class.shape) if case_class.__name__ != "Sequence" else 1
        theirs = Trace_ELBO(6, vectorize_particles=True, max_plate_nesting=nesting)
        self.both(ours, theirs, case_class())

    def test_without_subsampling_iwae_is_renyi_at_alpha_zero(self):
        theirs = RenyiELBO(alpha=0, num_particles=6, vectorize_particles=True, max_plate_nesting=1)
        self.both(IWAE_ELBO(K=6), theirs, DataPlate())


def conjugate_pair(truth, count, full_size=None):
    """Independent copies of one datapoint, so that a single pass is a sample of ``count`` bounds."""
    x = torch.full((count,), truth.x, dtype=torch.float64)

    def plate():
        return pyro.plate("data", full_size or count, subsample_size=count)

    def model():
        with plate():
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, truth.noise), obs=x)

    def guide():
        with plate():
            pyro.sample("z", dist.Normal(torch.tensor(truth.loc, dtype=torch.float64), truth.scale))

    return model, guide


class TestExpectedValues:
    """Values against one-dimensional quadrature, within 4 standard errors of 20 000 bounds."""

    truth = ConjugateGaussian()
    count = 20_000

    def check(self, loss, expected):
        model, guide = conjugate_pair(self.truth, self.count)
        pyro.set_rng_seed(11)
        particles = loss.particles(model, guide)
        log_w = particles.log_weights.reshape(loss.bound.M, loss.bound.K, -1)
        standard_error = loss.bound.value(log_w).std().item() / math.sqrt(self.count)
        pyro.set_rng_seed(11)
        mean = -loss.loss(model, guide) / self.count
        assert abs(mean - expected) < 4 * standard_error, (mean, expected, standard_error)
        # The test would notice a wrong constant: log 2 is far outside of its tolerance.
        assert standard_error < 0.01

    def test_the_quadrature_itself(self):
        assert self.truth.expected_iwae(1) == pytest.approx(self.truth.elbo, abs=1e-8)
        values = [self.truth.expected_iwae(k) for k in (1, 2, 5, 20, 50, 200)]
        assert values == sorted(values)
        assert values[-1] < self.truth.log_evidence < values[-1] + 0.002

    @pytest.mark.parametrize("k", [1, 5, 50])
    def test_iwae(self, k):
        self.check(IWAE_ELBO(K=k), self.truth.expected_iwae(k))

    @pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 1), (1, 5), (4, 5), (2, 50)])
    def test_miwae(self, m, k):
        self.check(MIWAE_ELBO(M=m, K=k), self.truth.expected_iwae(k))

    @pytest.mark.parametrize("k", [1, 5, 50])
    def test_ciwae(self, k):
        expected = 0.3 * self.truth.elbo + 0.7 * self.truth.expected_iwae(k)
        self.check(CIWAE_ELBO(K=k, beta=0.3), expected)

    @pytest.mark.parametrize(("m", "k"), [(1, 1), (1, 5), (5, 1), (5, 10)])
    def test_piwae_reports_the_models_objective(self, m, k):
        self.check(PIWAE_ELBO(M=m, K=k), self.truth.expected_iwae(m * k))

    def test_the_bound_increases_in_k(self):
        model, guide = conjugate_pair(self.truth, self.count)
        losses = [IWAE_ELBO(K=k).loss(model, guide) for k in (1, 5, 50)]
        assert losses == sorted(losses, reverse=True)


class TestSubsampling:
    """x_n ~ N(z_n, 1), z_n ~ N(0, 1), guide = prior: log p(x) is known and the bound is per datapoint."""

    size, batch, K = 1000, 10, 100

    def setup_method(self):
        pyro.set_rng_seed(1)
        self.data = 2**0.5 * torch.randn(self.size)
        self.drawn = []

    def model(self):
        with pyro.plate("data", self.size, subsample_size=self.batch) as index:
            self.drawn.append(index)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.data[index])

    def guide(self):
        with pyro.plate("data", self.size, subsample_size=self.batch) as index:
            self.drawn.append(index)
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def full_model(self):
        with pyro.plate("data", self.size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.data)

    def full_guide(self):
        with pyro.plate("data", self.size):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def test_the_bound_per_datapoint_is_that_of_the_full_data(self):
        loss = IWAE_ELBO(K=self.K)
        draws = torch.tensor([-loss.loss(self.model, self.guide) for _ in range(400)]) / self.size
        full = [-loss.loss(self.full_model, self.full_guide) / self.size for _ in range(20)]
        full = torch.tensor(full)
        error = (draws.var() / len(draws) + full.var() / len(full)).sqrt()
        assert abs(draws.mean() - full.mean()) < 4 * error
        assert error < 0.03
        # The scale inside the logarithm, as in Pyro's RenyiELBO, is off by much more than the error.
        inside = RenyiELBO(alpha=0, num_particles=self.K, vectorize_particles=True, max_plate_nesting=1)
        theirs = -sum(inside.loss(self.model, self.guide) for _ in range(50)) / 50 / self.size
        assert theirs - full.mean() > 0.5

    @pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
    @pytest.mark.parametrize("name", LOSSES)
    def test_all_particles_see_one_minibatch(self, name, vectorize):
        loss = LOSSES[name](vectorize_particles=vectorize)
        loss.loss(self.model, self.guide)
        first = None
        for _ in range(2):
            self.drawn.clear()
            loss.loss_and_grads(self.model, self.guide)
            assert all(torch.equal(index, self.drawn[0]) for index in self.drawn)
            assert len(self.drawn) == (2 if vectorize else 2 * M * K)
            assert first is None or not torch.equal(first, self.drawn[0])
            first = self.drawn[0]

    @pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
    def test_a_plate_of_the_model_alone_draws_once_too(self, vectorize):
        def model():
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with pyro.plate("data", self.size, subsample_size=self.batch) as index:
                self.drawn.append(index)
                pyro.sample("x", dist.Normal(b, 1.0), obs=self.data[index])

        def guide():
            pyro.sample("b", dist.Normal(0.0, 1.0))

        loss = MIWAE_ELBO(M=6, K=1, vectorize_particles=vectorize)
        loss.loss(model, guide)
        self.drawn.clear()
        loss.loss(model, guide)
        assert all(torch.equal(index, self.drawn[0]) for index in self.drawn)
        assert len(self.drawn) == (1 if vectorize else 6)


class TestUnevenWeights:
    """PIWAE where theta's and phi's weights differ by more than 1e12, against two backward passes."""

    def test_against_two_separate_backward_passes(self):
        # The second group of particles sits 60 standard deviations from the data.
        x = torch.tensor([0.3, -0.2])
        shift = torch.tensor([0.0, 0.0, 0.0, 9.0, 9.5, 10.0]).reshape(6, 1)
        w = torch.tensor(1.2, requires_grad=True)
        a = torch.tensor(0.4, requires_grad=True)

        def model():
            weight = pyro.param("w", w)
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(weight * z, 0.8), obs=x)

        def guide():
            slope = pyro.param("a", a)
            with pyro.plate("data", 2):
                together = len(pyro.poutine.runtime.get_plates()) > 1
                # One by itself is the middle particle at the first index, and the next one at the second.
                loc = slope * x + (shift if together else shift[3:5, 0])
                pyro.sample("z", RecordedNormal(loc, torch.tensor(0.7)))

        loss = PIWAE_ELBO(M=2, K=3)
        loss.loss(model, guide)
        RecordedNormal.draws.clear()
        loss.loss_and_grads(model, guide)
        (noise,) = RecordedNormal.draws
        got = {name: pyro.param(name).unconstrained().grad for name in ("w", "a")}

        w64 = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
        a64 = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        loc = a64 * x.double() + shift.double()
        z = loc + 0.7 * noise.double()

        def log_density(value, mean, scale):
            return -0.5 * ((value - mean) / scale) ** 2

        log_w = log_density(z, 0.0, 1.0) + log_density(x.double(), w64 * z, 0.8) - log_density(z, loc, 0.7)
        iwae = log_w.logsumexp(0).sum()
        miwae = log_w.reshape(2, 3, 2).logsumexp(1).mean(0).sum()
        (w_grad,) = torch.autograd.grad(-iwae, w64, retain_graph=True)
        (a_grad,) = torch.autograd.grad(-miwae, a64)
        a_weights = log_w.softmax(0)
        b_weights = log_w.reshape(2, 3, 2).softmax(1).reshape(6, 2) / 2
        assert (a_weights / b_weights).min() < 1e-12
        torch.testing.assert_close(got["w"].double(), w_grad, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(got["a"].double(), a_grad, rtol=2e-6, atol=1e-7)


class TestRetainGraph:
    """A model that keeps a part of its graph, as the prior of GPyTorch's variational GPs is kept."""

    def pair(self):
        kept = []

        def model(x):
            if not kept:
                kept.append(pyro.param("w", torch.tensor(0.7)).exp().sin())
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(kept[0], 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            a = pyro.param("a", torch.tensor(0.3))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(a * x, 1.0))

        return model, guide

    @pytest.mark.parametrize("run", [{}, {"vectorize_particles": False}, {"backward_particles": 2}])
    def test_a_second_step(self, run):
        x = torch.tensor([0.3, -0.5])
        loss, (model, guide) = IWAE_ELBO(K=3, **run), self.pair()
        loss.loss_and_grads(model, guide, x)
        with pytest.raises(RuntimeError, match="retain_graph"):
            loss.loss_and_grads(model, guide, x)
        pyro.clear_param_store()
        loss, gradients = IWAE_ELBO(K=3, retain_graph=True, **run), []
        model, guide = self.pair()
        for _ in range(2):
            torch.manual_seed(0)
            loss.loss_and_grads(model, guide, x)
            gradients.append([pyro.param(name).grad.item() for name in "wa"])
        assert gradients[1] == pytest.approx([2 * gradient for gradient in gradients[0]])
        assert "retain_graph=True" in repr(loss)

    @pytest.mark.parametrize("other", [{"chunk_size": 2}, {"compile": True}])
    def test_what_leaves_no_graph(self, other):
        with pytest.raises(ValueError, match=f"retain_graph=True .* {next(iter(other))}"):
            IWAE_ELBO(K=3, retain_graph=True, **other)


class TestKLWeight:
    def log_terms(self, case, noise):
        likelihood, kl = [], []
        for eps in noise[0]:
            z = case.phi["a"] * case.x + case.phi["c"] * eps
            likelihood.append(dist.Normal(case.theta["w"] * z, case.theta["s"]).log_prob(case.x))
            prior = dist.Normal(0.0, 1.0).log_prob(z)
            kl.append(dist.Normal(case.phi["a"] * case.x, case.phi["c"]).log_prob(z) - prior)
        return torch.stack(likelihood), torch.stack(kl)

    @pytest.mark.parametrize("beta", [0.0, 0.25, 1.0, 4.0])
    def test_weighs_the_prior_and_the_guide_but_not_the_likelihood(self, beta):
        case = DataPlate()
        value, _, noise = gradients(IWAE_ELBO(K=6, kl_weight=beta), case)
        likelihood, kl = self.log_terms(case, noise)
        expected = -((likelihood - beta * kl).logsumexp(0) - math.log(6)).sum().item()
        assert value == pytest.approx(expected, rel=1e-5)

    def test_the_gradient_is_that_of_the_weighted_loss(self):
        case = DataPlate(torch.float64)
        loss = IWAE_ELBO(K=6, kl_weight=0.25)
        _, grads, _ = gradients(loss, case)
        eps, weight = 1e-5, pyro.param("a")
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.fill_(case.phi["a"] + sign * eps)
            pyro.set_rng_seed(0)
            sides.append(loss.differentiable_loss(case.model, case.guide).item())
        assert grads["a"].item() == pytest.approx((sides[0] - sides[1]) / (2 * eps), rel=1e-6)

    def test_a_schedule_sees_the_number_of_gradient_steps(self):
        case, seen = DataPlate(), []

        def schedule(step):
            seen.append(step)
            return min(1.0, step / 3)

        loss = IWAE_ELBO(K=2, kl_weight=schedule)
        loss.loss_and_grads(case.model, case.guide)
        loss.loss(case.model, case.guide)
        loss.differentiable_loss(case.model, case.guide)
        with torch.no_grad():
            loss.differentiable_loss(case.model, case.guide)
        loss.loss_and_grads(case.model, case.guide)
        assert seen == [0, 1, 2, 2]
        assert loss.steps == 3

    def test_loss_evaluates_the_bound_itself(self):
        case = DataPlate()
        values = []
        for beta in (0.1, 1.0):
            pyro.set_rng_seed(0)
            values.append(IWAE_ELBO(K=2, kl_weight=beta).loss(case.model, case.guide))
        assert values[0] == values[1]

    @pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "1", None, True, torch.ones(2)], ids=repr)
    def test_must_be_a_finite_number(self, bad):
        with pytest.raises(ValueError, match="kl_weight must be a finite number >= 0"):
            IWAE_ELBO(K=2, kl_weight=bad)
        if bad is not None:
            case = DataPlate()
            with pytest.raises(ValueError, match="kl_weight must be"):
                IWAE_ELBO(K=2, kl_weight=lambda step: bad).loss_and_grads(case.model, case.guide)


class TestDegenerateWeights:
    """x ~ Uniform(z, z + 1): a particle is worth nothing unless z lies within 1 below x."""

    def pair(self, x, scale=0.1):
        x = torch.as_tensor(x)

        def model():
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Uniform(z, z + 1, validate_args=False), obs=x)

        def guide():
            loc = pyro.param("loc", torch.tensor(0.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, scale))

        return model, guide

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
    def test_minus_infinity_is_counted_and_named_and_gives_no_gradient(self, name, vectorize):
        model, guide = self.pair([0.5, 50.0, 0.6, -50.0])
        loss = LOSSES[name](vectorize_particles=vectorize)
        message = (
            r"-inf in 2 of 4 cell\(s\), where \d+ particles have zero density \(first at site 'x' \(model\)"
        )
        with pytest.warns(RuntimeWarning, match=message):
            assert loss.loss(model, guide) == math.inf
        pyro.set_rng_seed(2)
        with pytest.warns(RuntimeWarning, match=message):
            assert loss.loss_and_grads(model, guide) == math.inf
        grad = pyro.param("loc").unconstrained().grad
        assert torch.isfinite(grad)
        assert grad != 0

    def test_the_other_cells_have_the_gradient_they_would_have_alone(self):
        grads = []
        for x in ([0.5, 0.6], [0.5, 0.6, 50.0]):
            pyro.clear_param_store()
            model, guide = self.pair(x, scale=1e-4)
            loss = IWAE_ELBO(K=2)
            if len(x) == 3:
                with pytest.warns(RuntimeWarning, match="-inf in 1 of 3"):
                    loss.loss_and_grads(model, guide)
            else:
                loss.loss_and_grads(model, guide)
            grads.append(pyro.param("loc").unconstrained().grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-3)

    @pytest.mark.parametrize("validate", [True, False])
    @pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "one_by_one"])
    def test_a_nan_is_refused_and_its_site_named(self, vectorize, validate):
        def model():
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("fine", dist.Normal(z, 1.0), obs=torch.zeros(3))
                x = torch.tensor([1.0, math.nan, 1.0])
                pyro.sample("broken", dist.Normal(z, 1.0, validate_args=False), obs=x)
                pyro.sample("later", dist.Normal(z, 1.0), obs=torch.zeros(3))

        def guide():
            loc = pyro.param("loc", torch.tensor(0.0))
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(loc, 1.0))

        loss = IWAE_ELBO(K=4, vectorize_particles=vectorize)
        with pyro.validation_enabled(validate):
            for evaluate in (loss.loss, loss.loss_and_grads):
                with pytest.raises(ValueError, match=r"4 of 12 log-weights are NaN.*'broken' \(model\)"):
                    evaluate(model, guide)
        if validate:
            with pytest.raises(ValueError, match="'broken'"):
                loss.differentiable_loss(model, guide)
        assert pyro.param("loc").unconstrained().grad is None

    def test_a_bound_that_is_nan_by_itself_is_refused(self):
        class Broken(Bound):
            def value(self, log_w):
                return (log_w - log_w).sum((0, 1)) / 0.0

        case = DataPlate()
        with pytest.raises(ValueError, match=r"Broken\(M=1, K=3\) is NaN or \+inf in 4 of 4 cell\(s\)"):
            ImportanceWeightedELBO(Broken(K=3)).loss(case.model, case.guide)

    def test_an_infinite_weight_is_refused(self):
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("spike", 0 * z + math.inf)

        def guide():
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

        with pytest.raises(ValueError, match=r"log-weights are \+inf.*'spike'"):
            IWAE_ELBO(K=4).loss_and_grads(model, guide)


class TestPublicFace:
    def test_svi_trains(self):
        case = DataPlate()
        svi = SVI(case.model, case.guide, Adam({"lr": 0.02}), loss=MIWAE_ELBO(M=4, K=4))
        losses = [svi.step() for _ in range(200)]
        assert sum(losses[-50:]) < sum(losses[:50])
        assert svi.evaluate_loss() == pytest.approx(losses[-1], abs=3)

    def test_the_same_seed_gives_the_same_run(self):
        runs = []
        for _ in range(2):
            pyro.clear_param_store()
            pyro.set_rng_seed(4)
            case = DataPlate()
            svi = SVI(case.model, case.guide, Adam({"lr": 0.02}), loss=PIWAE_ELBO(M=2, K=2))
            runs.append([svi.step() for _ in range(5)])
        assert runs[0] == runs[1]

    def test_a_users_own_bound(self):
        class Half(Bound):
            def value(self, log_w):
                return 2 * ((0.5 * log_w).logsumexp((0, 1)) - math.log(self.num_particles))

        case = DataPlate()
        value, grads, noise = gradients(ImportanceWeightedELBO(Half(K=6)), case)
        phi = {k: torch.tensor(v, requires_grad=True) for k, v in case.phi.items()}
        theta = {k: torch.tensor(v, requires_grad=True) for k, v in case.theta.items()}
        log_p, log_q = case.log_weights(theta, phi, noise)
        expected = 0.0
        for cell in range(4):
            log_w = torch.stack([p[cell] - q[cell] for p, q in zip(log_p, log_q, strict=True)])
            expected = expected - 2 * (torch.exp(log_w / 2).mean()).log()
        expected.backward()
        assert value == pytest.approx(expected.item(), rel=1e-5)
        for key, leaf in {**theta, **phi}.items():
            torch.testing.assert_close(grads[key], leaf.grad, rtol=1e-4, atol=1e-5)

    def test_the_log_weights_of_an_evaluation(self):
        case = DataPlate()
        loss = MIWAE_ELBO(M=2, K=3)
        particles = loss.particles(case.model, case.guide)
        assert particles.log_weights.shape == (6, 4)
        assert [frame.name for frame in particles.plates] == ["data"]
        pyro.set_rng_seed(7)
        log_w = loss.particles(case.model, case.guide).log_weights
        pyro.set_rng_seed(7)
        expected = -(log_w.reshape(2, 3, 4).logsumexp(1).mean(0) - math.log(3)).sum().item()
        assert loss.loss(case.model, case.guide) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("loss", [make() for make in LOSSES.values()], ids=repr)
    def test_copies_and_pickles(self, loss):
        case = DataPlate()
        loss.loss(case.model, case.guide)
        for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            pyro.set_rng_seed(1)
            value = loss.loss(case.model, case.guide)
            pyro.set_rng_seed(1)
            assert again.loss(case.model, case.guide) == value
            assert repr(again) == repr(loss)

    def test_repr(self):
        assert repr(CIWAE_ELBO(K=4, beta=0.5)) == "CIWAE_ELBO(K=4, beta=0.5)"
        loss = IWAE_ELBO(K=4, estimator="dreg", plates="data", kl_weight=0.5, vectorize_particles=False)
        assert repr(loss) == (
            "IWAE_ELBO(K=4, estimator='dreg', plates=('data',), kl_weight=0.5, vectorize_particles=False)"
        )

    def test_nothing_to_train_is_no_error(self):
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

        expected = -dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)).item()
        assert IWAE_ELBO(K=3).loss_and_grads(model, lambda: None) == pytest.approx(expected)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: IWAE_ELBO(K=0),
            lambda: MIWAE_ELBO(M=0, K=2),
            lambda: PIWAE_ELBO(M=2, K=2.5),
            lambda: CIWAE_ELBO(K=2, beta=1.5),
            lambda: IWAE_ELBO(K=2, estimator="magic"),
            lambda: ImportanceWeightedELBO("IWAE"),
        ],
    )
    def test_bad_arguments(self, make):
        with pytest.raises(ValueError, match="must be"):
            make()

    def test_scale_outside_under_an_odd_minibatch(self):
        """29 of 1000: N / B has no exact float, and the shared user scale must still be recognised."""
        x = torch.randn(29)

        def model():
            with pyro.plate("data", 1000, subsample=torch.arange(29)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide():
            with pyro.plate("data", 1000, subsample=torch.arange(29)):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        values = []
        for scale in (1.0, 1 / 1000):
            pyro.set_rng_seed(0)
            scaled = poutine.scale(model, scale), poutine.scale(guide, scale)
            values.append(IWAE_ELBO(K=7).loss(*scaled))
        assert values[1] == pytest.approx(values[0] / 1000, rel=1e-6)
