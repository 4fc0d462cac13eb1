"""Weighted particles: weights, expectations, resampling, predictions and merging, against plain loops."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.poutine.indep_messenger import CondIndepStackFrame

from helpers.cases import GlobalLatent, Masked, NestedPlates, PlateInsideKeptPlate
from pyro_iw import ImportanceSampler
from pyro_iw.bounds import IWAE, MIWAE
from pyro_iw.tracing.latents import own_shape


class Regression:
    """A global weight [3] and noise, a local latent: joint weights; with a deterministic and a factor."""

    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])

    def model(self):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = pyro.deterministic("mean", (w * self.x).sum(-1) + z)
            pyro.sample("y", dist.Normal(mean, 0.7), obs=self.y)
        pyro.deterministic("norm", (w**2).sum(-1))
        pyro.factor("prior", -0.1 * (w**2).sum(-1))

    def guide(self):
        pyro.sample("w", dist.Normal(torch.full((3,), 0.2), 0.5).to_event(1))
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(0.1, 0.8))


def local_pair(count=3):
    x = torch.linspace(-1, 2, count)

    def model():
        with pyro.plate("data", count):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    def guide():
        with pyro.plate("data", count):
            pyro.sample("z", dist.Normal(x[:, None] / 3 * torch.ones(2), 0.8).to_event(1))

    return model, guide, x


def sample(pair, num_particles=40, **keywords):
    return ImportanceSampler(pair.model, pair.guide, num_particles, **keywords)()


class TestShapes:
    @pytest.mark.parametrize("vectorize", [True, False])
    @pytest.mark.parametrize("chunk_size", [1, 7, 40])
    def test_values_have_the_dims_of_their_own_plates(self, vectorize, chunk_size):
        samples = sample(Regression(), vectorize_particles=vectorize, chunk_size=chunk_size)
        assert {name: tuple(v.shape) for name, v in samples.values.items()} == {"w": (40, 3), "z": (40, 5)}
        assert samples.log_p.shape == samples.log_q.shape == samples.log_weights.shape == (40,)
        assert samples.plates == ()

    @pytest.mark.parametrize("vectorize", [True, False])
    def test_densities_belong_to_the_values(self, vectorize):
        pair = Regression()
        samples = sample(pair, 6, vectorize_particles=vectorize, chunk_size=4)
        for s in range(6):
            data = {name: values[s] for name, values in samples.values.items()}
            for fn, expected in ((pair.model, samples.log_p[s]), (pair.guide, samples.log_q[s])):
                trace = poutine.trace(poutine.condition(fn, data=data)).get_trace()
                assert trace.log_prob_sum().item() == pytest.approx(expected.item(), rel=1e-5)

    def test_nested_plates(self):
        samples = sample(NestedPlates())
        assert samples.plates == ("rows", "columns")
        assert samples.log_p.shape == (40, 3, 2)
        assert samples.values["z"].shape == (40, 3, 2)
        inner = sample(PlateInsideKeptPlate())
        assert inner.plates == ("rows",)
        assert inner.log_p.shape == (40, 3)
        assert inner.values["z"].shape == (40, 3, 1)

    def test_auxiliary_sites_of_an_autoguide_are_left_out(self):
        pair = Regression()
        guide = AutoDiagonalNormal(pair.model)
        samples = ImportanceSampler(pair.model, guide, 10)()
        assert set(samples.values) == {"w", "z"}
        assert samples.take(torch.arange(4))["z"].shape == (4, 5)

    def test_repr(self):
        assert (
            repr(sample(NestedPlates()))
            == "ImportanceSamples(S=40, cells={'rows': 3, 'columns': 2}, sites=['z'])"
        )


class TestWeights:
    def test_evidence_and_ess_against_loops(self):
        samples = sample(NestedPlates())
        for i in range(3):
            for j in range(2):
                weights = [math.exp(value) for value in samples.log_weights[:, i, j].tolist()]
                assert samples.log_marginal[i, j].item() == pytest.approx(
                    math.log(sum(weights) / 40), rel=1e-5
                )
                ess = sum(weights) ** 2 / sum(weight**2 for weight in weights)
                assert samples.ess[i, j].item() == pytest.approx(ess, rel=1e-4)
                mean = sum(weights) / 40
                spread = math.sqrt(sum((weight - mean) ** 2 for weight in weights) / 39 / 40)
                assert samples.monte_carlo_error[i, j].item() == pytest.approx(spread / mean, rel=1e-4)
                normalised = [weight / sum(weights) for weight in weights]
                torch.testing.assert_close(samples.weights[:, i, j], torch.tensor(normalised))

    @pytest.mark.parametrize("bound", [IWAE(1), IWAE(7), MIWAE(3, 4), IWAE(40)])
    def test_bounds_on_groups_of_particles(self, bound):
        samples = sample(NestedPlates())
        size = bound.M * bound.K
        groups = [samples.log_weights[i * size : (i + 1) * size] for i in range(40 // size)]
        values = [bound.value(group.reshape(bound.M, bound.K, 3, 2)) for group in groups]
        torch.testing.assert_close(samples.bound(bound), sum(values) / len(values))

    def test_a_bound_of_more_particles_than_there_are(self):
        with pytest.raises(ValueError, match="takes 41 particles; there are 40"):
            sample(NestedPlates()).bound(IWAE(41))


class TestExpectation:
    def test_against_loops(self):
        samples = sample(NestedPlates())
        expected = torch.zeros(3, 2)
        for i in range(3):
            for j in range(2):
                w = samples.log_weights[:, i, j].exp()
                expected[i, j] = (w * samples.values["z"][:, i, j]).sum() / w.sum()
        torch.testing.assert_close(samples.expectation("z"), expected)
        torch.testing.assert_close(samples.expectation(lambda z: 2 * z["z"] + 1), 2 * expected + 1)

    def test_events_and_joint_weights(self):
        samples = sample(Regression())
        w = samples.log_weights.exp() / samples.log_weights.exp().sum()
        torch.testing.assert_close(samples.expectation("w"), (w[:, None] * samples.values["w"]).sum(0))
        square = samples.expectation(lambda z: z["w"] ** 2, event_dim=1)
        torch.testing.assert_close(square, (w[:, None] * samples.values["w"] ** 2).sum(0))

    def test_event_dims_of_a_site_in_a_plate(self):
        model, guide, _ = local_pair()
        samples = ImportanceSampler(model, guide, 50)()
        w = samples.weights
        expected = (w[..., None] * samples.values["z"]).sum(0)
        torch.testing.assert_close(samples.expectation("z"), expected)
        product = samples.expectation(lambda z: z["z"][..., None] * z["z"][..., None, :], event_dim=2)
        assert product.shape == (3, 2, 2)

    def test_a_forgotten_event_dim_that_happens_to_fit(self):
        model, guide, _ = local_pair(2)
        samples = ImportanceSampler(model, guide, 50)()
        with pytest.warns(UserWarning, match="Should it be event_dim=1"):
            samples.expectation(lambda z: z["z"] ** 2)

    def test_errors(self):
        model, guide, _ = local_pair()
        samples = ImportanceSampler(model, guide, 50)()
        with pytest.raises(ValueError, match=r"no latent site 'y'; there are \['z'\]"):
            samples.expectation("y")
        with pytest.raises(ValueError, match=r"shape \(50, 3, 2\).*event_dim=0.*\{'data': 3\}"):
            samples.expectation(lambda z: z["z"])  # forgets the event dim
        with pytest.raises(ValueError, match="event_dim=0"):
            samples.expectation(lambda z: z["z"].mean())


class TestPosterior:
    @pytest.mark.parametrize("method", ["systematic", "multinomial"])
    def test_both_modes_of_a_target_that_the_guide_covers_by_one(self, method):
        target = dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.3, 0.7])),
            dist.Normal(torch.tensor([-3.0, 3.0]), torch.tensor([0.7, 0.5])),
        )
        sampler = ImportanceSampler(
            lambda: pyro.sample("z", target),
            lambda: pyro.sample("z", dist.Normal(0.0, 4.0)),
            num_particles=100_000,
            chunk_size=10_000,
        )
        draws = sampler().posterior(100_000, method)["z"]
        # Particles of relative efficiency 0.3 or so: one standard error is about 0.003.
        assert (draws < 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
        assert draws[draws < 0].std().item() == pytest.approx(0.7, rel=0.03)
        assert draws[draws > 0].mean().item() == pytest.approx(3.0, abs=0.02)

    @pytest.mark.parametrize("method", ["systematic", "multinomial"])
    def test_every_cell_draws_from_its_own_particles_by_its_own_weights(self, method):
        model, guide, x = local_pair()
        samples = ImportanceSampler(model, guide, 4000, chunk_size=1000)()
        draws = samples.posterior(20_000, method)["z"]
        assert draws.shape == (20_000, 3, 2)
        for n in range(3):
            pool = {tuple(row) for row in samples.values["z"][:, n].tolist()}
            assert {tuple(row) for row in draws[:50, n].tolist()} <= pool
        # z1 + z2 ~ N(0, 2), x ~ N(z1 + z2, 1/4): known exactly; 0.03 is 4 standard errors and more.
        total = draws.sum(-1)
        torch.testing.assert_close(total.mean(0), x * 2 / 2.25, atol=0.05, rtol=0)
        torch.testing.assert_close(total.var(0), torch.full((3,), 2 * 0.25 / 2.25), atol=0.03, rtol=0)

    def test_draws_are_in_random_order(self):
        model, guide, _ = local_pair(2)
        indices = ImportanceSampler(model, guide, 500)().resample(5000).double()
        for n in range(2):
            lagged = torch.stack([indices[1:, n], indices[:-1, n]])
            assert abs(torch.corrcoef(lagged)[0, 1].item()) < 0.07
        assert abs(torch.corrcoef(indices.T)[0, 1].item()) < 0.07

    def test_sub_plates_move_with_their_cell(self):
        samples = sample(PlateInsideKeptPlate())
        indices = samples.resample(9)
        taken = samples.take(indices)["z"]
        for k in range(9):
            for i in range(3):
                assert taken[k, i, 0] == samples.values["z"][indices[k, i], i, 0]

    def test_few_effective_particles(self):
        def model():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        def guide():
            pyro.sample("z", dist.Normal(4.0, 0.5))

        samples = ImportanceSampler(model, guide, 100)()
        with pytest.warns(RuntimeWarning, match=r"fewer than 10 effective particles \(least .* of 100\)"):
            samples.posterior(10)

    def test_errors(self):
        samples = sample(NestedPlates())
        with pytest.raises(ValueError, match="num_samples must be an integer >= 1"):
            samples.posterior(0)
        with pytest.raises(ValueError, match=r"\['multinomial', 'systematic'\]"):
            samples.posterior(5, "stratified")


class TestKhat:
    def proposal(self, scale, size=20_000):
        def model():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        return ImportanceSampler(
            model, lambda: pyro.sample("z", dist.Normal(0.0, scale)), size, chunk_size=size
        )()

    def test_tails_of_the_guide(self):
        # Weights exp(c z^2) of a normal with scale s have a tail of shape 1 - s^2 for s < 1, none for s > 1.
        light, good = self.proposal(0.4), self.proposal(1.3)
        assert light.khat.item() > 0.7
        assert good.khat.item() < 0.5

    def test_smoothing_lowers_the_variance_and_warns_where_it_cannot_help(self):
        samples = self.proposal(0.8)
        smoothed = samples.smoothed()
        assert smoothed.is_smoothed
        assert not samples.is_smoothed
        assert smoothed.khat == samples.khat
        assert smoothed.ess >= samples.ess
        assert torch.equal(smoothed.log_p, samples.log_p)
        # Weights below the tail stay what they were.
        low = samples.log_weights < samples.log_weights.quantile(0.5)
        torch.testing.assert_close(smoothed.log_weights[low], samples.log_weights[low])
        with pytest.warns(RuntimeWarning, match=r"k̂ exceeds 0.70 in 1 of 1 cell\(s\).*misses mass"):
            self.proposal(0.4).smoothed()


class TestModelAgain:
    @pytest.mark.parametrize("vectorize", [True, False])
    def test_observed_and_deterministic_sites(self, vectorize):
        pair = Regression()
        samples = sample(pair, vectorize_particles=vectorize, chunk_size=9)
        draws = samples.take(torch.arange(20))
        found = samples.observed(draws)
        assert set(found) == {"y", "mean", "norm"}
        assert found["y"].log_prob.shape == (20, 5)
        assert found["mean"].values.shape == (20, 5)
        assert found["norm"].values.shape == (20,)
        for k in range(20):
            mean = (draws["w"][k] * pair.x).sum(-1) + draws["z"][k]
            torch.testing.assert_close(found["mean"].values[k], mean)
            torch.testing.assert_close(found["norm"].values[k], (draws["w"][k] ** 2).sum())
            torch.testing.assert_close(found["y"].log_prob[k], dist.Normal(mean, 0.7).log_prob(pair.y))

    def test_masked_observations_count_for_nothing(self):
        samples = sample(Masked())
        log_prob = samples.observed(samples.posterior(10))["x"].log_prob
        assert log_prob.shape == (10, 4)
        assert (log_prob[:, [1, 2]] == 0).all()
        assert (log_prob[:, [0, 3]] != 0).all()

    def test_a_deterministic_site_that_mixes_the_draws(self):
        def model():
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.deterministic("mean", w.mean())

        def guide():
            pyro.sample("w", dist.Normal(torch.zeros(3), 0.9).to_event(1))

        samples = ImportanceSampler(model, guide, 50)()
        with pytest.raises(ValueError, match="'mean' has another value when all draws run in one pass"):
            samples.observed(samples.posterior(10))
        alone = ImportanceSampler(model, guide, 50, vectorize_particles=False)()
        assert alone.observed(alone.posterior(10))["mean"].values.shape == (10,)

    @pytest.mark.parametrize("vectorize", [True, False])
    def test_predictive(self, vectorize):
        model, guide, x = local_pair()
        size = 4000 if vectorize else 300
        samples = ImportanceSampler(model, guide, size, chunk_size=500, vectorize_particles=vectorize)()
        drawn = samples.predictive(size)()
        assert set(drawn) == {"x"}
        assert drawn["x"].shape == (size, 3)
        # x' ~ N(E[z1 + z2 | x], var + 1/4), within 5 standard errors of the draws' mean and variance.
        expected, variance = x * 2 / 2.25, 2 * 0.25 / 2.25 + 0.25
        tolerance = 5 * math.sqrt(variance / size) + 5 * math.sqrt(0.3 / len(samples.log_p))
        torch.testing.assert_close(drawn["x"].mean(0), expected, atol=tolerance, rtol=0)
        assert drawn["x"].var(0).mean().item() == pytest.approx(variance, rel=0.25)

    def test_predictive_of_global_latents_and_deterministic_sites(self):
        samples = sample(Regression(), 400)
        drawn = samples.predictive(50)()
        assert {name: v.numel() for name, v in drawn.items()} == {"mean": 250, "norm": 50, "y": 250}
        assert set(samples.predictive(5, return_sites=["y"])()) == {"y"}
        assert set(samples.predictive(5, return_sites="mean")()) == {"mean"}
        latent = next(iter(samples.latents))
        assert set(samples.predictive(5, return_sites=("y", latent, "_RETURN"))()) == {"y", latent, "_RETURN"}

    @pytest.mark.parametrize("vectorize", [True, False])
    def test_predictive_of_sites_that_the_model_does_not_have(self, vectorize):
        pair = Regression()
        samples = ImportanceSampler(pair.model, pair.guide, 200, vectorize_particles=vectorize)()
        with pytest.raises(ValueError, match=r"return_sites names \['u', 'Y'\].*has the sites \[.*'y'"):
            samples.predictive(5, return_sites=["u", "y", "Y"])

    def test_the_way_out_for_a_site_that_is_there_on_other_arguments(self):
        def model(new=False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
            if new:
                pyro.sample("later", dist.Normal(z, 1.0))

        def guide(new=False):
            pyro.sample("z", dist.Normal(0.5, 0.7))

        samples = ImportanceSampler(model, guide, 50)()
        with pytest.raises(ValueError, match=r"take pyro.infer.Predictive\(model, posterior"):
            samples.predictive(5, return_sites=["later"])
        drawn = pyro.infer.Predictive(model, samples.posterior(5))(new=True)
        assert drawn["later"].shape[0] == 5

    @pytest.mark.parametrize("vectorize", [True, False])
    @pytest.mark.parametrize(
        ("proposed", "declared"),
        [
            ({"subsample_size": 4}, {"subsample_size": 4}),
            ({"subsample_size": 4}, {}),
            ({"subsample": torch.tensor([2, 3, 5, 7])}, {}),
        ],
    )
    def test_the_model_runs_again_on_the_same_minibatch(self, proposed, declared, vectorize):
        data = 100.0 * torch.arange(20.0)

        def model():
            with pyro.plate("data", 20, **declared) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(data[rows] + z, 1.0), obs=data[rows])

        def guide():
            with pyro.plate("data", 20, **proposed):
                pyro.sample("z", dist.Normal(0.0, 0.8))

        samples = ImportanceSampler(model, guide, 50, chunk_size=20, vectorize_particles=vectorize)()
        rows = samples.rerun.minibatch.indices["data"]
        assert (samples.predictive(30)()["x"] - data[rows]).abs().max() < 20
        observed = samples.observed(samples.posterior(30))["x"]
        assert torch.equal(observed.values, data[rows])
        draws = samples.posterior(30)
        exact = dist.Normal(data[rows] + draws["z"], 1.0).log_prob(data[rows])
        assert torch.allclose(samples.observed(draws)["x"].log_prob, exact, atol=1e-4)

    def test_a_deterministic_site_that_indexes_from_the_left(self):
        def model():
            w = pyro.sample("w", dist.Normal(torch.zeros(50), 1.0).to_event(1))
            pyro.deterministic("first", w[0])

        def guide():
            pyro.sample("w", dist.Normal(torch.zeros(50), 0.99).to_event(1))

        samples = ImportanceSampler(model, guide, 100, chunk_size=50)()
        for count in (50, 40):
            with pytest.raises(ValueError, match=r"'first' has another value.*index from the right"):
                samples.observed(samples.take(torch.arange(count)))

    def test_reparameterised_sites_are_deterministic(self):
        def base():
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(1.0, 2.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

        model = poutine.reparam(base, config={"z": LocScaleReparam(0.0)})

        def guide():
            with pyro.plate("data", 3):
                pyro.sample("z_decentered", dist.Normal(-0.4, 0.5))  # the posterior's sd is 0.45

        samples = ImportanceSampler(model, guide, 500, chunk_size=200)()
        draws = samples.take(torch.randint(500, (300, 3)))
        observed = samples.observed(draws)
        assert observed["z"].log_prob is None
        torch.testing.assert_close(observed["z"].values, 1 + 2 * draws["z_decentered"])
        data = samples.to_arviz(num_samples=30)
        assert set(data.log_likelihood.data_vars) == {"x"}
        assert {"z", "z_decentered"} == set(data.posterior.data_vars) == set(data.prior.data_vars)

    @pytest.mark.filterwarnings("ignore:k̂ exceeds")
    def test_more_dims_than_the_model_has_plates(self):
        model, guide, _ = local_pair()
        samples = ImportanceSampler(model, guide, 500, max_plate_nesting=3)()
        assert samples.predictive(30)()["x"].shape == (30, 3)
        data = samples.to_arviz(num_samples=20)
        assert data.posterior_predictive["x"].shape == data.prior_predictive["x"].shape == (1, 20, 3)

    def test_a_prior_that_cannot_be_sampled(self):
        def model():
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

        def guide():
            pyro.sample("z", dist.Normal(1.0, 1.1))

        samples = ImportanceSampler(model, guide, 500)()
        assert samples.log_marginal.item() == pytest.approx(0.0, abs=0.05)
        assert samples.predictive(30)()["x"].shape == (30,)
        samples.to_arviz(num_samples=20, prior=False)

    def test_a_likelihood_of_factors_has_nothing_to_predict(self):
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", -(z**2))

        samples = ImportanceSampler(model, lambda: pyro.sample("z", dist.Normal(0.0, 0.7)), 500)()
        with pytest.raises(ValueError, match="only factors"):
            samples.predictive(5)


class TestMerge:
    def test_particles_of_both_runs(self):
        model, guide, _ = local_pair()
        sampler = ImportanceSampler(model, guide, 30)
        one, other = sampler(), ImportanceSampler(model, guide, 20)()
        both = one.merge(other)
        assert both.num_particles == 50
        assert torch.equal(both.log_weights, torch.cat([one.log_weights, other.log_weights]))
        assert torch.equal(both.values["z"], torch.cat([one.values["z"], other.values["z"]]))
        assert both.posterior(10)["z"].shape == (10, 3, 2)
        total = (30 * one.log_marginal.exp() + 20 * other.log_marginal.exp()) / 50
        torch.testing.assert_close(both.log_marginal.exp(), total)

    def test_unlike_runs(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.9))

        def wider(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 1.1))

        x = torch.zeros(3)
        sampler = ImportanceSampler(model, guide, 2000)
        samples = sampler(x)
        samples.merge(sampler(x.clone()))
        refused = [
            (sampler(x + 1), "arguments differ"),
            (sampler(torch.zeros(4)), r"kept plates are \{'data': 3\} in one and \{'data': 4\}"),
            (ImportanceSampler(model, wider, 5)(x), "different models or guides"),
            (ImportanceSampler(model, guide, 5, plates=())(x), r"\{'data': 3\} in one and \{\}"),
            (samples.smoothed(), "smoothed within a run"),
            (3, "the other is a int"),
        ]
        for other, message in refused:
            with pytest.raises(ValueError, match=message):
                samples.merge(other)

    def test_arguments_are_compared_by_value(self):
        def model(x, mask):
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        sampler = ImportanceSampler(model, model, 5)
        x = torch.tensor([1.0, float("nan"), 2.0])
        samples = sampler(x, np.array([1, 2]))
        samples.merge(sampler(x.clone(), np.array([1, 2])))
        with pytest.raises(ValueError, match="arguments differ"):
            samples.merge(sampler(x.clone(), np.array([1, 3])))

    def test_unlike_minibatches(self):
        def model():
            with pyro.plate("data", 50, subsample_size=2):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        sampler = ImportanceSampler(model, model, 5)
        samples = sampler()
        samples.merge(samples)
        with pytest.raises(ValueError, match="different minibatches"):
            samples.merge(sampler())


def test_no_cells_share_a_particle_with_the_global_latent():
    samples = sample(GlobalLatent(), 400)
    draws = samples.posterior(30)
    assert draws["b"].shape == (30,)
    assert draws["z"].shape == (30, 4)
    rows = {tuple(row) for row in torch.cat([samples.values["b"][:, None], samples.values["z"]], 1).tolist()}
    assert {tuple(row) for row in torch.cat([draws["b"][:, None], draws["z"]], 1).tolist()} <= rows


def test_values_that_do_not_vary_over_particles():
    plate = CondIndepStackFrame("data", -1, 2, 0)
    assert own_shape(torch.ones(2), 0, [plate], nesting=1, size=5).shape == (5, 2)
    assert own_shape(torch.ones(5, 1, 3), 1, [], nesting=1, size=5).shape == (5, 3)
    assert own_shape(torch.ones(2, 3), 1, [plate], nesting=1, size=None).shape == (1, 2, 3)


def test_draws_that_mix_in_one_pass_are_refused():
    """One particle a chunk is run as it is by itself, but many draws are not."""
    x = torch.tensor([0, 1, 1])

    def model(dim):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            probs = torch.stack([z, -z], -1).softmax(dim)
            pyro.sample("x", dist.Categorical(probs, validate_args=False), obs=x)

    def guide(dim):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for dim in (1, -1):
        samples = ImportanceSampler(model, guide, 20, chunk_size=1)(dim)
        draws = samples.posterior(5)
        if dim == 1:
            with pytest.raises(ValueError, match="observed site 'x' has another log density"):
                samples.observed(draws)
            with pytest.raises(ValueError, match="observed site 'x' has another log density"):
                samples.predictive_of(draws, ["x"])
        else:
            right = torch.stack([draws["z"], -draws["z"]], -1).log_softmax(-1)
            expected = right.gather(-1, x.expand(5, 3)[..., None])[..., 0]
            torch.testing.assert_close(samples.observed(draws)["x"].log_prob, expected)
            assert samples.predictive_of(draws, ["x"])(dim)["x"].shape == (5, 3)
