"""Samples on two levels: evidence, weights, expectations and draws against closed forms and double loops."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_mean

from helpers.conjugate import Conjugate
from helpers.two_levels import ByHand, Pair, data, lme
from pyro_iw import HierarchicalSamples, ImportanceSampler, bound_curve, rate_distortion
from pyro_iw.bounds import IWAE
from pyro_iw.psis import pareto_smoothed

WAYS = {
    "one pass": {"chunk_size": None},
    "chunks": {"chunk_size": 3},
    "one by one": {"vectorize_particles": False},
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sampler_of(pair, num_particles, num_local, **options):
    return ImportanceSampler(
        pair.model, pair.guide, num_particles, local="data", num_local=num_local, **options
    )


class TestEvidence:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("num_local", [1, 4])
    def test_that_of_a_double_loop_over_the_same_particles(self, way, num_local):
        pair = Pair()
        samples = sampler_of(pair, 7, num_local, **WAYS[way])(*data())
        shapes = {name: tuple(value.shape) for name, value in samples.values.items()}
        local = (7, num_local, 3)
        assert shapes == {"g1": (7,), "g2": (7,), "z1": local, "z2": local}
        top, local = ByHand(pair, samples.values).log_weights()
        top, local = top.detach(), local.detach()
        torch.testing.assert_close(samples.log_p - samples.log_q, top)
        torch.testing.assert_close(samples.local["data"].log_weights, local)
        rows = [top[s] + sum(lme(local[s, :, n]) for n in range(3)) for s in range(7)]
        torch.testing.assert_close(samples.log_weights, torch.stack(rows))
        torch.testing.assert_close(samples.log_marginal, lme(torch.stack(rows)))
        for n in range(3):
            fewer = [top[s] + sum(lme(local[s, :, m]) for m in range(3) if m != n) for s in range(7)]
            torch.testing.assert_close(samples.without("data")[:, n], torch.stack(fewer))

    @pytest.mark.parametrize("options", [{}, {"vectorize_particles": False}])
    def test_streaming_is_keeping(self, options):
        pair = Conjugate()
        if options:
            sampler = sampler_of(pair, 12, 3, chunk_size=5, **options)
        else:
            sampler = sampler_of(pair, 500, 6, chunk_size=130)
        pyro.set_rng_seed(1)
        value, error, ess = sampler.evidence()
        pyro.set_rng_seed(1)
        samples = sampler()
        pyro.set_rng_seed(1)
        assert sampler.log_marginal() == value
        for one, other in ((value, "log_marginal"), (error, "monte_carlo_error"), (ess, "ess")):
            torch.testing.assert_close(one, getattr(samples, other))

    def test_memory_is_that_of_a_chunk(self):
        pair, seen = Conjugate(), []

        def model():
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 5):
                z = pyro.sample("z", dist.Normal(g, 1.0))
                seen.append(z.numel())
                pyro.sample("x", dist.Normal(z, 1.0), obs=pair.x)

        ImportanceSampler(model, pair.guide, 100, local="data", num_local=2, chunk_size=8).log_marginal()
        assert max(seen) == 8 * 2 * 5

    def test_closed_form(self):
        pair = Conjugate(seed=3)
        value, error, _ = sampler_of(pair, 4000, 8, chunk_size=2000).evidence()
        assert error < 0.02
        assert abs(value - pair.log_evidence) < 4 * error

    def test_unbiased_and_its_error_calibrated(self):
        # Few local particles of a poor guide: the evidence itself is unbiased for any L.
        pair = Conjugate(count=3, wider=(1.3, 0.9), bias=0.3)
        sampler = sampler_of(pair, 100, 2, progress=False)
        runs = [sampler.evidence() for _ in range(300)]
        ratios = torch.stack([(run.log_marginal - pair.log_evidence).exp() for run in runs])
        assert abs(ratios.mean() - 1) < 4 * ratios.std() / 300**0.5
        assert ratios.std() / 300**0.5 < 0.01
        scores = torch.stack([(run.log_marginal - pair.log_evidence) / run.monte_carlo_error for run in runs])
        assert scores.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.15)

    def test_one_local_particle_is_a_joint_weight(self):
        pair = Conjugate()
        samples = sampler_of(pair, 6, 1)()
        for s in range(6):
            values = {"g": samples.values["g"][s], "z": samples.values["z"][s, 0]}
            total = 0.0
            for fn, sign in ((pair.model, 1), (pair.guide, -1)):
                trace = poutine.trace(poutine.condition(fn, data=values)).get_trace()
                total = total + sign * trace.log_prob_sum()
            torch.testing.assert_close(samples.log_weights[s], total)

    def test_more_local_particles_are_better(self):
        pair = Conjugate(count=40, bias=0.4)
        ess = [sampler_of(pair, 400, number)().ess.item() for number in (1, 8, 64)]
        assert ess[0] < 0.3 * ess[1] < 0.3 * ess[2]

    def test_jackknife_and_bound_are_of_the_global_particles(self):
        pair = Conjugate()
        samples = sampler_of(pair, 60, 4)()
        groups = samples.log_weights.reshape(20, 3)
        torch.testing.assert_close(samples.bound(IWAE(3)), torch.stack([lme(row) for row in groups]).mean())
        pyro.set_rng_seed(2)
        plain = sampler_of(pair, 30, 4)()
        pyro.set_rng_seed(2)
        corrected = sampler_of(pair, 30, 4, jackknife=True).log_marginal()
        log_w = plain.log_weights
        without = [lme(torch.cat([log_w[:s], log_w[s + 1 :]])) for s in range(30)]
        torch.testing.assert_close(corrected, 30 * lme(log_w) - 29 * torch.stack(without).mean())

    def test_bound_curve_over_global_particles(self):
        pair = Conjugate(bias=0.3)
        curve = bound_curve(sampler_of(pair, 512, 4), num_particles=[1, 8, 512])
        assert bool((curve.mean.diff() > 0).all())
        assert abs(curve.mean[-1] - pair.log_evidence) < 5 * curve.monte_carlo_error[-1]


class TestLocalWeights:
    def test_ess_by_a_loop(self):
        samples = sampler_of(Pair(), 5, 4)(*data())
        weights, local = samples.weights, samples.local["data"].log_weights.exp()
        for n in range(3):
            each = [local[s, :, n].sum() ** 2 / (local[s, :, n] ** 2).sum() for s in range(5)]
            torch.testing.assert_close(samples.local_ess["data"][n], sum(map(torch.mul, weights, each)))
        # That of a mean of 4 over its square, by their unbiased variance.
        variance = [(local[s].var(0) / 4 / local[s].mean(0) ** 2).sum() for s in range(5)]
        torch.testing.assert_close(samples.local_variance, sum(map(torch.mul, weights, variance)))

    def test_their_variance_is_that_of_repeats(self):
        pair = Conjugate(count=4, bias=0.4)

        def guide():
            pyro.sample("g", dist.Normal(0.4, 1e-9))  # all of one value: only local particles differ
            with pyro.plate("data", 4):
                pyro.sample("z", dist.Normal(pair.x / 2 + 0.6, 0.8))

        samples = ImportanceSampler(pair.model, guide, 4000, local="data", num_local=50)()
        variance = (samples.log_weights - samples.log_p + samples.log_q).var()
        # The sampling error of a variance of 4000 values, with room for the delta method's.
        assert samples.local_variance.item() == pytest.approx(variance.item(), rel=0.12)
        assert sampler_of(pair, 5, 1)().local_variance.isnan()

    def test_joint_weights_collapse_where_two_levels_do_not(self):
        pair = Conjugate(count=1000, wider=(1.0, 1.1), bias=0.2)
        joint = ImportanceSampler(pair.model, pair.guide, 200)()
        assert joint.ess < 3
        samples = sampler_of(pair, 40, 32, chunk_size=20)()
        assert bool((samples.local_ess["data"] > 16).all())
        assert samples.local_ess["data"].shape == (1000,)

    def test_khat_points_at_the_cells_of_a_poor_guide(self):
        pair = Conjugate(count=4)
        narrow = torch.tensor([0.8, 0.2, 0.8, 0.8])  # where the posterior's is 0.71

        def guide():
            g = pyro.sample("g", dist.Normal(pair.of_g[0], 1.2 * pair.of_g[1] ** 0.5))
            with pyro.plate("data", 4):
                pyro.sample("z", dist.Normal((g + pair.x) / 2, narrow))

        samples = ImportanceSampler(pair.model, guide, 500, local="data", num_local=16)()
        khat = samples.local_khat["data"]
        assert khat[1] > 0.7
        with pytest.warns(RuntimeWarning, match=r"in 1 of 4 cell\(s\)"):
            samples.to_arviz(num_samples=10, prior=False, predictive=False)
        assert bool((khat[[0, 2, 3]] < 0.7).all())

    def test_khat_is_of_the_weights_as_they_enter(self):
        pyro.set_rng_seed(4)
        samples = sampler_of(Conjugate(count=2, wider=(0.7, 0.7)), 60, 10)()
        rows = []
        for s in range(60):
            own = samples.local["data"].log_weights[s, :, 1]
            rows += [samples.log_weights[s] + log_w - lme(own) for log_w in own]
        khat = pareto_smoothed(torch.stack(rows))[1]
        torch.testing.assert_close(samples.local_khat["data"][1], khat)


class TestPosterior:
    pair = Conjugate(count=3, sigma=2.0, seed=5)  # whose locals vary most by the global one

    @pytest.fixture
    def samples(self):
        return sampler_of(self.pair, 4000, 8, chunk_size=2000)()

    def test_expectations_by_a_loop(self):
        pair = Pair()
        samples = sampler_of(pair, 6, 4)(*data())
        weights, local = samples.weights, samples.local["data"].log_weights
        g1, z1 = samples.values["g1"], samples.values["z1"]
        z2 = samples.values["z2"]
        mean = product = torch.zeros(3)
        for s in range(6):
            for j in range(4):
                share = weights[s] * local[s, j].exp() / local[s].exp().sum(0)
                mean = mean + share * z1[s, j]
                product = product + share * g1[s] * z2[s, j] ** 2 * z1[s, j]
        torch.testing.assert_close(samples.expectation("z1"), mean)
        torch.testing.assert_close(
            samples.expectation(lambda v: v["g1"] * v["z2"] ** 2 * v["z1"]).squeeze(0), product
        )
        torch.testing.assert_close(samples.expectation("g1"), (weights * g1).sum())
        square = samples.expectation(lambda v: v["g1"] ** 2)
        torch.testing.assert_close(square, (weights * g1**2).sum())

    def test_moments_in_closed_form(self, samples):
        mean, covariance = self.pair.posterior
        g, z = samples.expectation("g"), samples.expectation("z")
        error = 5 * 1.2 / samples.ess.item() ** 0.5  # five standard errors, of a variance of 1.2
        torch.testing.assert_close(g, mean[0], rtol=0, atol=error)
        torch.testing.assert_close(z, mean[1:], rtol=0, atol=error)
        spread = samples.expectation(lambda v: v["z"] ** 2) - z**2
        torch.testing.assert_close(spread, covariance.diag()[1:], rtol=0, atol=2 * error)
        cross = samples.expectation(lambda v: v["g"] * v["z"]) - g * z
        torch.testing.assert_close(cross, covariance[0, 1:], rtol=0, atol=2 * error)

    @pytest.mark.parametrize("method", ["systematic", "multinomial"])
    def test_draws_belong_together(self, samples, method):
        mean, covariance = self.pair.posterior
        draws = samples.posterior(4000, method)
        assert draws["g"].shape == (4000,)
        assert draws["z"].shape == (4000, 3)
        both = torch.cat([draws["g"][:, None], draws["z"]], 1)
        error = 5 * 1.2 * (1 / 4000 + 1 / samples.ess.item()) ** 0.5
        torch.testing.assert_close(both.mean(0), mean, rtol=0, atol=error)
        torch.testing.assert_close(both.T.cov(), covariance, rtol=0, atol=2 * error)
        assert covariance[1, 2] > 0.35 > 2.5 * error  # what two locals share by their global one

    def test_locals_are_those_of_their_global_particle(self):
        def model(x):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 4):
                z = pyro.sample("z", dist.Normal(g, 1e-3))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 4):
                pyro.sample("z", dist.Normal(g, 1e-3))

        samples = ImportanceSampler(model, guide, 300, local="data", num_local=5)(torch.zeros(4))
        draws = samples.posterior(1000)
        assert (draws["g"][:, None] - draws["z"]).abs().max() < 0.01
        assert draws["g"].std() > 0.2

    def test_a_local_particle_is_drawn_by_its_weight(self):
        pair = Conjugate(count=2)
        samples = sampler_of(pair, 3, 4)()
        indices = samples.on_all_levels(torch.full((20000,), 1))
        for n in range(2):
            share = torch.bincount(indices.local["data"][:, n] - 4, minlength=4) / 20000
            wanted = samples.local["data"].log_weights[1, :, n].softmax(0)
            torch.testing.assert_close(share, wanted, rtol=0, atol=5 * 0.5 / 20000**0.5)

    @pytest.mark.parametrize("way", WAYS)
    def test_densities_are_those_of_the_draws(self, way):
        pair = Pair()
        samples = sampler_of(pair, 20, 4, **WAYS[way])(*data())
        indices = samples.on_all_levels(torch.tensor([3, 0, 19, 3]))
        draws, densities = samples.take(indices), samples.densities(indices)
        for i in range(4):
            values = {name: value[i] for name, value in draws.items()}
            for fn, name in ((pair.model, "lp"), (pair.guide, "log_q")):
                trace = poutine.trace(poutine.condition(fn, data=values)).get_trace(*data())
                torch.testing.assert_close(densities[name][i], trace.log_prob_sum())
        torch.testing.assert_close(densities["log_weight"], samples.log_weights[[3, 0, 19, 3]])

    @pytest.mark.parametrize("way", WAYS)
    def test_predictive_and_log_likelihood(self, way):
        pair = Pair()
        samples = sampler_of(pair, 40, 4, **WAYS[way])(*data())
        draws = samples.take(torch.arange(30))
        new = samples.predictive_of(draws)(*data())
        assert new["x"].shape == (30, 2, 3)
        assert new["y"].reshape(-1).shape == (30,)
        likelihood = samples.log_likelihood(draws)["x"]
        exact = dist.Normal(draws["z2"] + 0.2 * draws["z1"], 1.1).log_prob(data()[0][:, None]).movedim(0, 1)
        torch.testing.assert_close(likelihood, exact)

    def test_event_dims(self):
        def model():
            g = pyro.sample("g", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(g, torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor([0.5, -1.0, 2.0]))

        def guide():
            g = pyro.sample("g", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(g, torch.ones(2)).to_event(1))

        samples = ImportanceSampler(model, guide, 50, local="data", num_local=4)()
        assert samples.expectation("z").shape == (3, 2)
        assert samples.expectation("g").shape == (2,)
        both = samples.expectation(lambda v: v["g"] * v["z"], event_dim=1)
        assert both.shape == (3, 2)
        weights = samples.local["data"].log_weights.softmax(1) * samples.weights[:, None, None]
        g, z = samples.values["g"], samples.values["z"]
        torch.testing.assert_close(both, torch.einsum("sln,se,slne->ne", weights, g, z))
        assert samples.posterior(7)["z"].shape == (7, 3, 2)

    def test_smoothed_weighs_the_global_particles(self):
        pair = Conjugate(count=3, wider=(0.6, 1.1))
        samples = sampler_of(pair, 500, 4)()
        assert not torch.equal(samples.smoothed().log_weights, samples.log_weights)
        assert samples.smoothed().expectation("z").shape == (3,)
        torch.testing.assert_close(samples.smoothed().local_khat["data"], samples.local_khat["data"])

    def test_merge(self):
        pair = Conjugate()
        one, other = sampler_of(pair, 30, 4)(), sampler_of(pair, 50, 4)()
        both = one.merge(other)
        assert repr(both).startswith("HierarchicalSamples(S=80, local={'data': 4}")
        torch.testing.assert_close(both.log_weights, torch.cat([one.log_weights, other.log_weights]))
        torch.testing.assert_close(both.expectation("z").shape, torch.Size([5]))
        with pytest.raises(ValueError, match="latent sites are"):
            one.merge(sampler_of(pair, 50, 3)())
        with pytest.raises(ValueError, match="the other is a ImportanceSamples"):
            one.merge(ImportanceSampler(pair.model, pair.guide, 50)())
        with pytest.raises(ValueError, match="the other is a HierarchicalSamples"):
            ImportanceSampler(pair.model, pair.guide, 50)().merge(one)


class Items:
    """Ability of students and difficulty of items, around a global mean; answers are of each pair."""

    answers = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    seen = torch.tensor([0.3, -0.2, 0.9])
    level = torch.tensor([0.5, 0.0, -0.5, 0.2])

    def model(self):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("students", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(g, 1.0))
            pyro.sample("seen", dist.Normal(a, 1.0), obs=self.seen[:, None])
        with pyro.plate("items", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(-g, 1.0))
            pyro.sample("level", dist.Normal(b, 1.0), obs=self.level)

    def guide(self):
        g = pyro.sample("g", dist.Normal(0.0, 0.5))
        with pyro.plate("students", 3, dim=-2):
            pyro.sample("a", dist.Normal((g + self.seen[:, None]) / 2, 0.8))
        with pyro.plate("items", 4, dim=-1):
            pyro.sample("b", dist.Normal((self.level - g) / 2, 0.8))


class TestStructures:
    @pytest.mark.parametrize("options", [{}, {"vectorize_particles": False}])
    def test_several_plates(self, options):
        pair = Items()
        sampler = ImportanceSampler(pair.model, pair.guide, 60, local={"students": 3, "items": 5}, **options)
        samples = sampler()
        a, b, g = (samples.values[name] for name in "abg")
        assert a.shape == (60, 3, 3, 1)
        assert b.shape == (60, 5, 4)
        top = dist.Normal(0.0, 1.0).log_prob(g) - dist.Normal(0.0, 0.5).log_prob(g)
        g = g[:, None, None]
        of_a = dist.Normal(g, 1.0).log_prob(a[..., 0]) + dist.Normal(a[..., 0], 1.0).log_prob(pair.seen)
        of_a = of_a - dist.Normal((g + pair.seen) / 2, 0.8).log_prob(a[..., 0])
        of_b = dist.Normal(-g, 1.0).log_prob(b) + dist.Normal(b, 1.0).log_prob(pair.level)
        of_b = of_b - dist.Normal((pair.level - g) / 2, 0.8).log_prob(b)
        total = top + sum((of.logsumexp(1) - math.log(of.shape[1])).sum(1) for of in (of_a, of_b))
        torch.testing.assert_close(samples.log_weights, total)
        weights = total.softmax(0)[:, None, None]
        wanted = (weights * of_a.softmax(1) * a[..., 0]).sum((0, 1))
        torch.testing.assert_close(samples.expectation("a")[:, 0], wanted)
        product = samples.expectation(lambda v: v["g"] * v["b"], over="items")
        torch.testing.assert_close(product, (weights * of_b.softmax(1) * b * g).sum((0, 1)))
        assert samples.expectation(lambda v: v["g"] ** 2).shape == ()
        with pytest.raises(ValueError, match=r"'b' lies in the local plate 'items'.*over='items'"):
            samples.expectation(lambda v: v["b"])
        with pytest.raises(ValueError, match="'b' lies in the local plate 'items'"):
            samples.expectation(lambda v: v["a"] * v["b"], over="students")
        with pytest.raises(ValueError, match="over must name one of the local plates"):
            samples.leave_one_out()
        draws = samples.posterior(200)
        assert draws["a"].shape == (200, 3, 1)
        assert draws["b"].shape == (200, 4)

    def test_groups_around_the_local_plate(self):
        x = torch.linspace(-1.0, 2.0, 12).reshape(3, 4)  # 4 groups of 3

        def model(x):
            with pyro.plate("groups", x.shape[1], dim=-1):
                g = pyro.sample("g", dist.Normal(0.0, 1.0))
                with pyro.plate("data", 3, dim=-2):
                    z = pyro.sample("z", dist.Normal(g, 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("groups", x.shape[1], dim=-1):
                g = pyro.sample("g", dist.Normal(x.mean(0) / 2, 0.8))
                with pyro.plate("data", 3, dim=-2):
                    pyro.sample("z", dist.Normal((g + x) / 2, 0.8))

        sampler = ImportanceSampler(model, guide, 2000, local="data", num_local=8, chunk_size=1000)
        law = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1)
        samples = sampler(x)
        assert repr(samples).endswith("cells={'groups': 4}, sites=['g', 'z'])")
        exact = law.log_prob(x.T)
        assert bool(((samples.log_marginal - exact).abs() < 4.5 * samples.monte_carlo_error).all())
        assert samples.local_ess["data"].shape == samples.leave_one_out().values.shape == (3, 4)
        assert samples.expectation(lambda v: v["g"] * v["z"]).shape == (3, 4)
        draws = samples.posterior(50)
        assert draws["g"].shape == (50, 4)
        assert draws["z"].shape == (50, 3, 4)
        loader = [part.T for part in x.T.split(2)]
        result = sampler.log_marginal_dataset(loader, bound=IWAE(10))
        assert bool(((result.values - exact).abs() < 4.5 * result.monte_carlo_errors).all())
        assert result.minus_kl < 0

    def test_a_site_summed_out_within_the_cells(self):
        x = torch.tensor([0.2, 3.5, -0.4])

        def model():
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(g, 1.0))
                c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(z + 3 * c, 1.0), obs=x)

        def guide():
            g = pyro.sample("g", dist.Normal(0.2, 0.8))
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(g, 1.2))

        samples = ImportanceSampler(model, guide, 6000, local="data", num_local=8, chunk_size=3000)()
        # x given g is a mixture of two normals of variance 2, and g is one number.
        grid = torch.linspace(-8.0, 8.0, 4001)[:, None]
        law = torch.logaddexp(
            math.log(0.7) + dist.Normal(grid, 2**0.5).log_prob(x),
            math.log(0.3) + dist.Normal(grid + 3, 2**0.5).log_prob(x),
        )
        each = dist.Normal(0.0, 1.0).log_prob(grid[:, 0]) + law.sum(1)
        exact = each.logsumexp(0) + math.log(16 / 4000)
        assert abs(samples.log_marginal - exact) < 4 * samples.monte_carlo_error
        draws = samples.posterior(4000)
        # p(c_n | x) = E[p(c_n | g, x_n)]
        on = (math.log(0.3) + dist.Normal(grid + 3, 2**0.5).log_prob(x) - law).exp()
        exact = (each.softmax(0)[:, None] * on).sum(0)
        torch.testing.assert_close(draws["c"].mean(0), exact, rtol=0, atol=0.05)
        found = samples.to_arviz(num_samples=50)["log_likelihood"]
        assert found.attrs["summed_out"] == "c, z"
        assert dict(found["x"].sizes) == {"chain": 1, "draw": 50, "data": 3}

    def test_log_likelihoods_by_what_they_are_of(self):
        def model():
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(g, 1.0), obs=torch.tensor(0.3))
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(g, 1.0))
                c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(z + 3 * c, 1.0), obs=torch.tensor([0.2, 3.5, -0.4]))
                pyro.sample("w", dist.Normal(z, 1.0), obs=torch.zeros(3))
                pyro.factor("f", -0.1 * z**2)

        def guide():
            g = pyro.sample("g", dist.Normal(0.2, 1.0))
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(g, 1.2))

        samples = ImportanceSampler(model, guide, 400, local="data", num_local=8)()
        found = samples.to_arviz(num_samples=20, prior=False, predictive=False)["log_likelihood"]
        assert {name: dict(v.sizes) for name, v in found.data_vars.items()} == {
            "w + x": {"chain": 1, "draw": 20, "data": 3}, "y": {"chain": 1, "draw": 20}
        }  # fmt: skip

    def test_plates_inside_of_the_cells(self):
        x = torch.linspace(-1.0, 2.0, 8).reshape(2, 4)

        def model():
            with pyro.plate("items", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 4, dim=-1):
                b = pyro.sample("b", dist.Normal(w.sum(-1, keepdim=True), 1.0))
                with pyro.plate("deep", 2, dim=-2):
                    z = pyro.sample("z", dist.Normal(b, 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide():
            with pyro.plate("items", 3, dim=-1):
                pyro.sample("w", dist.Normal(0.1, 0.9))
            with pyro.plate("data", 4, dim=-1):
                b = pyro.sample("b", dist.Normal(0.0, 1.5))
                with pyro.plate("deep", 2, dim=-2):
                    pyro.sample("z", dist.Normal((b + x) / 2, 0.8))

        samples = ImportanceSampler(model, guide, 30, local="data", num_local=5)()
        w, b, z = (samples.values[name] for name in "wbz")
        assert [tuple(v.shape) for v in (w, b, z)] == [(30, 3), (30, 5, 4), (30, 5, 2, 4)]
        inside = dist.Normal(b[:, :, None], 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
        inside = (inside - dist.Normal((b[:, :, None] + x) / 2, 0.8).log_prob(z)).sum(2)
        mean = w.sum(-1)[:, None, None]
        local = dist.Normal(mean, 1.0).log_prob(b) - dist.Normal(0.0, 1.5).log_prob(b) + inside
        top = (dist.Normal(0.0, 1.0).log_prob(w) - dist.Normal(0.1, 0.9).log_prob(w)).sum(-1)
        total = top + (local.logsumexp(1) - math.log(5)).sum(-1)
        torch.testing.assert_close(samples.log_weights, total)
        weights = total.softmax(0)[:, None, None] * local.softmax(1)
        torch.testing.assert_close(samples.expectation("z"), torch.einsum("sln,sldn->dn", weights, z))
        both = samples.expectation(lambda v: v["b"] * v["z"])
        torch.testing.assert_close(both, torch.einsum("sln,sln,sldn->dn", weights, b, z))
        assert samples.expectation(lambda v: v["b"] ** 2).shape == (4,)
        torch.testing.assert_close(samples.expectation(lambda v: v["w"] ** 2), total.softmax(0) @ w**2)
        assert {name: tuple(v.shape) for name, v in samples.take(torch.arange(9)).items()} == {
            "w": (9, 3), "b": (9, 4), "z": (9, 2, 4)
        }  # fmt: skip

    def test_no_global_latent(self):
        x = torch.tensor([0.5, -1.0, 2.0])

        def model():
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide():
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(x / 2, 0.8))

        samples = ImportanceSampler(model, guide, 400, local="data", num_local=50)()
        exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        assert abs(samples.log_marginal - exact.sum()) < 4 * samples.monte_carlo_error
        found = samples.leave_one_out()
        assert bool(((found.values - exact).abs() < 4 * found.monte_carlo_errors).all())

    @pytest.mark.parametrize("name", ["AutoNormal", "AutoGuideList", "AutoHierarchicalNormalMessenger"])
    def test_guides_of_pyro(self, name):
        pair = Conjugate(count=4)
        if name == "AutoGuideList":
            guide = AutoGuideList(pair.model)
            for site in "gz":
                exposed = poutine.block(pair.model, expose=[site])
                guide.append(AutoNormal(exposed, init_scale=0.8, init_loc_fn=init_to_mean))
        else:
            kind = getattr(autoguide, name)
            guide = kind(pair.model, init_scale=0.8, init_loc_fn=init_to_mean)
        value, error, _ = ImportanceSampler(
            pair.model, guide, 4000, local="data", num_local=16, chunk_size=2000
        ).evidence()
        assert error < 0.15
        assert abs(value - pair.log_evidence) < 4 * error

    def test_discrete_locals(self):
        pair = Pair(discrete=True)
        samples = sampler_of(pair, 8, 4)(*data())
        top, local = ByHand(pair, samples.values).log_weights()
        rows = [top[s] + sum(lme(local[s, :, n]) for n in range(3)) for s in range(8)]
        torch.testing.assert_close(samples.log_weights, torch.stack(rows).detach())

    def test_cells_that_no_local_particle_reaches(self):
        def model():
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Normal(g, 1.0))
                pyro.sample(
                    "x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=torch.tensor([0.0, 1.5])
                )

        def guide():
            g = pyro.sample("g", dist.Normal(0.5, 1.0))
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Normal(g, 1.0))

        samples = ImportanceSampler(model, guide, 300, local="data", num_local=2)()
        local, top = samples.local["data"].log_weights, samples.log_p - samples.log_q
        dead = (local.isneginf()).all(1)
        assert 0 < dead[:, 0].sum() < 300
        without = samples.without("data")
        assert torch.equal(without[:, 0].isneginf(), dead[:, 1])
        alive = ~dead[:, 1]
        wanted = top + local[:, :, 1].logsumexp(1) - math.log(2)
        torch.testing.assert_close(without[alive, 0], wanted[alive])
        assert bool(samples.posterior(100)["z"].isfinite().all())
        assert bool(samples.local_khat["data"].isfinite().all())
        draws = samples.posterior(500)["z"]
        assert bool((draws - torch.tensor([0.0, 1.5])).abs().max() <= 1)

    def test_no_particle_at_all(self):
        pair = Conjugate(count=2)

        def model():
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Normal(g, 1.0))
                pyro.sample("x", dist.Uniform(z + 50, z + 51, validate_args=False), obs=torch.zeros(2))

        with pytest.warns(RuntimeWarning, match="none of the 10 particles has positive density.*'x'"):
            samples = ImportanceSampler(model, pair.guide, 10, local="data", num_local=2)()
        with pytest.raises(ValueError, match="every particle has zero density"):
            samples.posterior(3)
        with pytest.raises(ValueError, match="every particle has zero density"):
            samples.leave_one_out()


class TestArviZ:
    @pytest.mark.filterwarnings("ignore:k̂ exceeds:RuntimeWarning")
    def test_dims_and_values(self):
        pair = Pair()
        samples = sampler_of(pair, 400, 4, chunk_size=200)(*data())
        pyro.set_rng_seed(0)
        found = samples.to_arviz(num_samples=60)
        draws = {"chain": 1, "draw": 60}
        of = {
            "posterior": {"g1": draws, "g2": draws, "z1": {**draws, "data": 3}, "z2": {**draws, "data": 3}},
            "sample_stats": dict.fromkeys(("lp", "log_q", "log_weight"), draws),
            "weight_stats": {
                **{key: {"chain": 1} for key in ("ess", "khat", "log_marginal")},
                **{key: {"chain": 1, "data": 3} for key in ("data_ess", "data_khat")},
            },
            "log_likelihood": {"y": draws, "x": {**draws, "data": 3}},
            "posterior_predictive": {"x": {**draws, "deep": 2, "data": 3}, "y": draws},
            "observed_data": {"x": {"deep": 2, "data": 3}, "y": {}},
        }
        for group, variables in of.items():
            got = {str(n): {str(d): s for d, s in v.sizes.items()} for n, v in found[group].data_vars.items()}
            assert got == variables, group
        posterior = {n: torch.tensor(v.values[0]) for n, v in found["posterior"].data_vars.items()}
        for i in (0, 17, 59):
            values = {name: value[i] for name, value in posterior.items()}
            lp = poutine.trace(poutine.condition(pair.model, data=values)).get_trace(*data()).log_prob_sum()
            assert found["sample_stats"]["lp"].values[0, i] == pytest.approx(lp.item())
        # The integrated log-likelihood of the particle that a draw's global latents are.
        for i in (0, 17, 59):
            s = int((samples.values["g1"] == posterior["g1"][i]).nonzero().item())
            wanted = [lme(samples.local["data"].log_weights[s, :, n]).item() for n in range(3)]
            np.testing.assert_allclose(found["log_likelihood"]["x"].values[0, i], wanted)
        y = dist.Normal(posterior["g1"] - posterior["g2"], 0.8).log_prob(data()[1])
        np.testing.assert_allclose(found["log_likelihood"]["y"].values[0], y.numpy())


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"local": "data"}, "num_local= how many"),
            ({"num_local": 4}, "local= names no plate"),
            ({"local": "data", "num_local": 0}, "num_local must be an integer >= 1"),
            ({"local": {"data": 2.5}}, r"local\['data'\] must be an integer >= 1"),
            ({"local": {"data": 2}, "num_local": 4}, "Drop num_local="),
            ({"local": 3, "num_local": 4}, "local must be the name of a plate"),
            ({"local": {}}, "local must be the name of a plate"),
            ({"local": "data", "num_local": 4, "plates": ()}, "Pass one of them"),
        ],
    )
    def test_arguments(self, options, match):
        pair = Conjugate()
        with pytest.raises(ValueError, match=match):
            ImportanceSampler(pair.model, pair.guide, 10, **options)

    def test_an_unknown_plate(self):
        pair = Conjugate()
        sampler = ImportanceSampler(pair.model, pair.guide, 10, local="date", num_local=4)
        with pytest.raises(ValueError, match=r"plate 'date', but .* have \['data'\]"):
            sampler.log_marginal()

    def test_a_minibatch(self):
        x = Conjugate(count=10).x

        def model(subsample):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 10, subsample) as i:
                z = pyro.sample("z", dist.Normal(g, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

        def guide(subsample):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 10, subsample):
                pyro.sample("z", dist.Normal(g, 1.0))

        for options in ({}, {"vectorize_particles": False}):
            sampler = ImportanceSampler(model, guide, 10, local="data", num_local=4, **options)
            with pytest.raises(ValueError, match=r"'data' of the local particles is subsampled \(5 of 10\)"):
                sampler.log_marginal(5)
            assert sampler.log_marginal(10).shape == ()  # the way out

    def test_no_data_set_of_datapoints(self):
        pair = Conjugate()
        sampler = ImportanceSampler(
            lambda x: pair.model(), lambda x: pair.guide(), 10, local="data", num_local=4
        )
        with pytest.raises(ValueError, match="Call evidence on all of the data"):
            sampler.log_marginal_dataset([torch.zeros(3)])

    def test_rate_and_distortion(self):
        with pytest.raises(ValueError, match=r"local=\{'data': 4\}. Pass one without local="):
            rate_distortion(sampler_of(Conjugate(), 10, 4))

    def test_functions_of_several_cells(self):
        samples = sampler_of(Conjugate(), 10, 4)()
        with pytest.raises(ValueError, match="Expectations are taken cell by cell"):
            samples.expectation(lambda v: v["z"].sum(-1))
        with pytest.raises(ValueError, match="no latent site 'w'"):
            samples.expectation("w")
        with pytest.raises(ValueError, match="no latent site 'w'"):
            samples.expectation(lambda v: v["w"])
        with pytest.raises(ValueError, match="over must name one of the local plates"):
            samples.leave_one_out("w")
        with pytest.raises(ValueError, match="over must name one of the local plates"):
            samples.expectation("z", over="w")

    def test_a_site_outside_that_depends_on_one_inside(self):
        def model():
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.5))

        def guide():
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(g, 1.0))

        for options in ({}, {"vectorize_particles": False}):
            with pytest.raises(ValueError, match="lies outside of the plate and depends on a latent inside"):
                ImportanceSampler(model, guide, 10, local="data", num_local=4, **options).log_marginal()

    def test_a_narrow_support_inside_of_the_plate(self):
        def model():
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Uniform(0.0, 2.0))
                pyro.sample("x", dist.Normal(z + g, 1.0), obs=torch.zeros(3))

        def guide():
            pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Uniform(0.5, 1.0))

        with pytest.raises(ValueError, match=r"proposes 'z' from \[0.5, 1\]"):
            ImportanceSampler(model, guide, 10, local="data", num_local=4).log_marginal()


def test_what_a_sampler_gives():
    pair = Conjugate()
    sampler = sampler_of(pair, 10, 4)
    assert repr(sampler) == "ImportanceSampler(num_particles=10, local={'data': 4}, chunk_size=10)"
    assert isinstance(sampler(), HierarchicalSamples)


def test_nothing_outside_of_the_local_plate():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.9))

    torch.set_default_dtype(torch.float32)
    samples = ImportanceSampler(model, guide, 3, local="data", num_local=4, progress=False)(
        torch.tensor([0.5, -1.0], dtype=torch.float64)
    )
    assert samples.log_p.dtype == samples.local_ess["data"].dtype == torch.float64
    wanted = (samples.weights.unsqueeze(-1) * samples.local["data"].ess).sum(0)
    torch.testing.assert_close(samples.local_ess["data"], wanted, rtol=1e-12, atol=0)
