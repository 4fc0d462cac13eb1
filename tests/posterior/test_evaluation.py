"""Bound curves, rate and distortion, active units: against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch.utils.data import DataLoader

from helpers.cases import NestedPlates
from helpers.truth import ConjugateGaussian
from pyro_iw import ImportanceSampler, active_units, bound_curve, rate_distortion

TRUTH = ConjugateGaussian()


def conjugate(count):
    def model():
        with pyro.plate("data", count):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, TRUTH.noise), obs=torch.full((count,), TRUTH.x))

    def guide():
        with pyro.plate("data", count):
            pyro.sample("z", dist.Normal(torch.full((count,), TRUTH.loc), TRUTH.scale))

    return model, guide


class TestBoundCurve:
    def test_against_quadrature(self):
        curve = bound_curve(ImportanceSampler(*conjugate(2000), 96, chunk_size=40), num_particles=[1, 3, 10])
        assert curve.num_particles == (1, 3, 10)
        expected = [TRUTH.elbo, TRUTH.expected_iwae(3), TRUTH.expected_iwae(10)]
        for mean, error, value in zip(curve.mean, curve.monte_carlo_error, expected, strict=True):
            assert abs(mean.item() - value) < 4 * error.item()

    def test_the_error_is_the_spread_of_repetitions(self):
        curves = [
            bound_curve(ImportanceSampler(*conjugate(20), 64), num_particles=[4, 64]) for _ in range(60)
        ]
        means = torch.stack([curve.mean for curve in curves])
        errors = torch.stack([curve.monte_carlo_error for curve in curves]).mean(0)
        # 60 repetitions know their spread to 9 %; the delta method at one group of 64 is rougher.
        torch.testing.assert_close(errors, means.std(0), rtol=0.35, atol=0)

    def test_powers_of_two_by_default(self):
        assert bound_curve(ImportanceSampler(*conjugate(2), 20)).num_particles == (1, 2, 4, 8, 16)

    @pytest.mark.parametrize("chunk_size", [1, 4, 64])
    def test_dead_particles_in_several_chunks(self, chunk_size):
        def model():
            z = pyro.sample("z", dist.Uniform(torch.tensor(0.0).double(), 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5).double())

        def guide():
            pyro.sample("z", dist.Normal(torch.tensor(0.5).double(), 1.0))

        with pyro.validation_enabled(False):
            curve = bound_curve(
                ImportanceSampler(model, guide, 64, chunk_size=chunk_size), num_particles=[1, 2, 64]
            )
        assert curve.mean[:2].tolist() == [-math.inf, -math.inf]
        assert curve.monte_carlo_error[:2].isnan().all()
        assert curve.mean[2].isfinite()
        assert curve.monte_carlo_error[2].isfinite()

    def test_more_particles_than_the_sampler_draws(self):
        with pytest.raises(ValueError, match="draws 20 particles, too few for K=64"):
            bound_curve(ImportanceSampler(*conjugate(2), 20), num_particles=[64])
        with pytest.raises(ValueError, match="no K"):
            bound_curve(ImportanceSampler(*conjugate(2), 20), num_particles=[])


class TestRateDistortion:
    def test_against_closed_forms(self):
        parts = rate_distortion(ImportanceSampler(*conjugate(4000), 20))
        rate = 0.5 * (TRUTH.scale**2 + TRUTH.loc**2 - 1) - math.log(TRUTH.scale)
        error = (TRUTH.x - TRUTH.loc) ** 2 + TRUTH.scale**2
        distortion = 0.5 * error / TRUTH.noise**2 + math.log(TRUTH.noise) + 0.5 * math.log(2 * math.pi)
        for values, expected in (
            (parts.rate, rate),
            (parts.distortion, distortion),
            (parts.elbo, TRUTH.elbo),
        ):
            assert values.shape == (4000,)
            assert abs(values.mean().item() - expected) < 4 * values.std().item() / math.sqrt(4000)

    def test_every_layer_has_its_own_share(self):
        def model():
            with pyro.plate("data", 5):
                top = pyro.sample("top", dist.Normal(0.0, 1.0))
                low = pyro.sample("low", dist.Normal(top, 1.0))
                pyro.sample("x", dist.Normal(low, 1.0), obs=torch.zeros(5))
                pyro.factor("bonus", torch.full((5,), 0.25))

        def guide():
            with pyro.plate("data", 5):
                low = pyro.sample("low", dist.Normal(0.3, 0.5))
                pyro.sample("top", dist.Normal(low, 2.0))

        sampler = ImportanceSampler(model, guide, 20_000, chunk_size=5000)
        parts = rate_distortion(sampler)
        assert set(parts.rates) == {"top", "low"}
        # top ~ N(low, 2) in the guide, so E[log q(top | low)] is minus the entropy of N(0, 2).
        entropy = 0.5 * math.log(2 * math.pi * math.e)
        square = 0.3**2 + 0.5**2 + 4.0
        top = -(entropy + math.log(2.0)) + 0.5 * square + 0.5 * math.log(2 * math.pi)
        low = -(entropy + math.log(0.5)) + 0.5 * 4.0 + 0.5 * math.log(2 * math.pi)
        assert parts.rates["top"].mean().item() == pytest.approx(top, abs=0.04)
        assert parts.rates["low"].mean().item() == pytest.approx(low, abs=0.04)
        distortion = 0.5 * (0.3**2 + 0.5**2) + 0.5 * math.log(2 * math.pi) - 0.25
        assert parts.distortion.mean().item() == pytest.approx(distortion, abs=0.01)

    def test_it_adds_up_to_the_mean_log_weight(self):
        pair = NestedPlates()
        pyro.set_rng_seed(1)
        sampler = ImportanceSampler(pair.model, pair.guide, 12, chunk_size=12)
        sampler.log_marginal()
        pyro.set_rng_seed(1)
        parts = rate_distortion(sampler)
        pyro.set_rng_seed(1)
        torch.testing.assert_close(parts.elbo.float(), sampler().log_weights.mean(0))

    def test_joint_guides_have_an_auxiliary_share(self):
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

        guide = AutoDiagonalNormal(model)
        pyro.set_rng_seed(2)
        sampler = ImportanceSampler(model, guide, 50)
        sampler.log_marginal()
        pyro.set_rng_seed(2)
        parts = rate_distortion(sampler)
        assert len(parts.rates) == 2
        pyro.set_rng_seed(2)
        assert parts.elbo.item() == pytest.approx(sampler().log_weights.mean().item(), rel=1e-5)


X = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))


class TestActiveUnits:
    def test_variance_of_the_means(self):
        weight = torch.tensor([1.0, 0.5, 0.05])

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(weight * x, 1.0).to_event(1))

        result = active_units(guide, DataLoader(X, batch_size=300))["z"]
        torch.testing.assert_close(result.variances.float(), (weight * X).var(0))
        assert result.num_active == 2
        assert active_units(guide, [X], threshold=0.5)["z"].num_active == 1

    def test_deeper_layers_marginalise_the_ones_above(self):
        # E[deep | x] = 0.3 x; the first unit's mean given shallow alone varies by 0.3² (1 + 4), and the
        # second's does not depend on x at all, though its conditional mean moves with the noise of shallow.
        def guide(x):
            with pyro.plate("data", len(x)):
                shallow = pyro.sample("shallow", dist.Normal(x[:, 0], 2.0))
                noise = pyro.sample("noise", dist.Normal(torch.zeros(len(x)), 2.0))
                loc = torch.stack([0.3 * shallow, 0.5 * noise], -1)
                pyro.sample("deep", dist.Normal(loc, 0.1).to_event(1))

        result = active_units(guide, X.split(500), num_samples=20)
        # Each estimate's own noise, 1 of variance over 20 samples, is subtracted; its remainder is about
        # 0.002.
        assert result["deep"].variances[0].item() == pytest.approx(0.09 * X[:, 0].var().item(), abs=0.006)
        assert result["deep"].variances[1].item() == pytest.approx(0.0, abs=0.006)
        assert result["deep"].num_active == 1
        assert result["shallow"].num_active == 1
        assert result["noise"].num_active == 0

    @pytest.mark.parametrize("size", [60, 20, 7])
    @pytest.mark.parametrize("kind", ["shift", "slope", "both"])
    def test_noise_that_all_datapoints_of_a_run_share(self, kind, size):
        # E[z | x] = 0.5 x in each of 2000 units, whose noise is each unit's own and common to the datapoints,
        # the second latent's to those of either sign. The mean over the units is exact to its standard error.
        def guide(x):
            zeros = torch.zeros(2000)
            common = pyro.sample("common", dist.Normal(zeros, 1.0).to_event(1))
            other = pyro.sample("other", dist.Normal(zeros, 0.5).to_event(1))
            with pyro.plate("data", len(x)):
                loc = 0.5 * x[:, None] * (1 + (0.5 * common if kind != "shift" else 0.0))
                if kind != "slope":
                    loc = loc + other * (1.0 if kind == "shift" else x[:, None].sign())
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

        x = X[:60, 0]
        variances = active_units(guide, x.split(size), sites=["z"], num_samples=40)["z"].variances
        exact = 0.25 * x.double().var().item()
        error = variances.std().item() / 2000**0.5
        assert error < 0.003
        assert (variances > 0).all()  # none was cut off at 0, which would be a bias
        assert abs(variances.mean().item() - exact) < 4 * error + 1e-6

    def test_a_shift_of_all_datapoints_is_no_activity_and_hides_none(self):
        def guide(x):
            common = pyro.sample("common", dist.Normal(0.0, 5.0))
            with pyro.plate("data", len(x)):
                loc = torch.stack([common + 0.15 * x[:, 0], common + 0 * x[:, 0]], -1)
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

        result = active_units(guide, [X], sites=["z"])["z"]
        assert result.variances[0].item() == pytest.approx(0.15**2 * X[:, 0].var().item(), rel=1e-4)
        assert result.variances[1].item() == pytest.approx(0.0, abs=1e-6)
        assert result.num_active == 1

    def test_flows_have_no_mean_in_closed_form(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                base = dist.Normal(x, 0.5)
                pyro.sample(
                    "z", dist.TransformedDistribution(base, [transforms.SigmoidTransform()]).to_event(1)
                )

        result = active_units(guide, [X], num_samples=30)["z"]
        expected = (
            torch.stack([torch.sigmoid(X + 0.5 * torch.randn_like(X)) for _ in range(300)]).mean(0).var(0)
        )
        torch.testing.assert_close(result.variances.float(), expected, rtol=0.1, atol=0)

    @pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
    def test_autoguides(self, kind):
        def model(x):
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = kind(
            model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"z": torch.tensor([-1.0, 0, 1])})
        )
        x = torch.zeros(3)
        guide(x)
        result = active_units(guide, [x], num_samples=2000)
        assert set(result) == {"z"}
        assert result["z"].variances.item() == pytest.approx(1.0, abs=0.05)

    def test_one_hot_and_categorical(self):
        probs = torch.tensor([[0.9, 0.1], [0.1, 0.9]])

        def one_hot(x):
            with pyro.plate("data", 2):
                pyro.sample("y", dist.OneHotCategorical(probs))

        result = active_units(one_hot, [X])["y"]
        torch.testing.assert_close(result.variances.float(), probs.var(0))

        def categorical(x):
            with pyro.plate("data", 2):
                pyro.sample("y", dist.Categorical(probs))
                pyro.sample("z", dist.Normal(x[:2, 0], 1.0))

        with pytest.raises(ValueError, match=r"'y' has no mean.*OneHotCategorical"):
            active_units(categorical, [X])
        assert set(active_units(categorical, [X], sites=["z"])) == {"z"}

    def test_errors(self):
        def guide(x):
            pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x[:, 0], 1.0))

        with pytest.raises(ValueError, match="'w' lies in no plate"):
            active_units(guide, [X])
        with pytest.raises(ValueError, match=r"sites names \['y'\].*\['w', 'z'\]"):
            active_units(guide, [X], sites=["y"])
        with pytest.raises(ValueError, match="more than one datapoint"):
            active_units(guide, [X[:1]], sites=["z"])
        with pytest.raises(ValueError, match="No batch"):
            active_units(guide, [])
        with pytest.raises(ValueError, match="num_samples must be at least 2"):
            active_units(guide, [X], num_samples=1)

    def test_what_the_guide_masks_is_no_datapoint(self):
        """Padded sequences, whose padding would seem the most active of all."""
        x = torch.tensor([[0.0, 1.0, 50.0], [2.0, -60.0, 50.0], [70.0, -60.0, 50.0]])
        kept = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])

        def guide(rows, kept, by_distribution):
            with pyro.plate("rows", len(rows), dim=-2), pyro.plate("steps", 3, dim=-1):
                fn = dist.Normal(rows, 1.0)
                with pyro.poutine.mask(mask=True if by_distribution else kept):
                    pyro.sample("z", fn.mask(kept) if by_distribution else fn)

        for by_distribution in (False, True):
            batches = [(x[i : i + 1], kept[i : i + 1], by_distribution) for i in range(3)]
            assert active_units(guide, batches)["z"].variances.item() == pytest.approx(1.0)  # of 0, 1 and 2

    @pytest.mark.parametrize("fn", [dist.HalfCauchy(X[:, 0].exp()), dist.StudentT(X[:, 0] + 5, X[:, 0] / 0)])
    def test_a_mean_that_is_not_finite(self, fn):
        def guide():
            with pyro.plate("data", len(X)):
                pyro.sample("z", fn)

        with pytest.raises(ValueError, match=r"The mean of site 'z' \(\w+\) is NaN or infinite at"):
            active_units(guide, [()])
