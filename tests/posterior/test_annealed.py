"""Annealed importance sampling: the evidence against closed forms and quadrature, and what is refused."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from torch import nn

from pyro_iw import ImportanceSampler
from pyro_iw.posterior.annealed import AnnealedImportanceSampler

X = torch.tensor([0.5, -1.0, 2.0])
EXACT = dist.Normal(0.0, 2**0.5).log_prob(X)


def model(x=X):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x=X):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x, 0.8))


def quiet(*args, num_adaptation=30, num_leapfrog=4, **options):
    return AnnealedImportanceSampler(
        *args, num_adaptation=num_adaptation, num_leapfrog=num_leapfrog, progress=False, **options
    )


def close(samples, exact, errors=4, atol=0.0):
    """Whether the log evidence is within that many standard errors, and these say something."""
    error = samples.monte_carlo_error
    assert samples.log_marginal.shape == torch.as_tensor(exact).shape
    assert (error < 0.5).all(), error
    off = (samples.log_marginal - exact).abs()
    assert (off < errors * error + atol).all(), (samples.log_marginal, exact, error)


class TestTruths:
    def test_unbiased_over_many_repeats(self):
        """E[p^(x)] = p(x) with a poor guide, few chains and temperatures: 4000 cells repeat a datapoint."""
        x = torch.full((4000,), 1.0)

        def narrow(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.9, 0.6))

        samples = quiet(model, narrow, 3, 4, num_adaptation=10)(x)
        ratio = (samples.log_marginal - dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))).double().exp()
        error = ratio.std().item() / math.sqrt(len(x))
        assert error < 0.05
        assert abs(ratio.mean().item() - 1) < 4 * error

    @pytest.mark.slow
    def test_a_bad_guide_in_fifty_dimensions(self):
        torch.manual_seed(1)
        x = torch.randn(3, 50) * 2**0.5
        sd = 0.5**0.5

        def wide(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(50), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def bad(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2 + 2 * sd, sd / 2).to_event(1))

        exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1)
        samples = quiet(wide, bad, 16, 1500)(x)
        close(samples, exact)
        assert ((samples.acceptance > 0.5) & (samples.acceptance < 0.8)).all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (ImportanceSampler(wide, bad, 5000).log_marginal(x) < exact - 20).all()

    def test_funnel_against_quadrature(self):
        x = torch.tensor([[0.3, -1.0, 0.2], [3.0, 4.0, -5.0]])

        def funnel(x):
            with pyro.plate("data", len(x)):
                v = pyro.sample("v", dist.Normal(0.0, 1.5))
                scale = (v / 2).exp().unsqueeze(-1).expand(*v.shape, 3)
                z = pyro.sample("z", dist.Normal(0.0, scale).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        sd = (grid.exp() + 1).sqrt().unsqueeze(-1)
        likelihood = dist.Normal(0.0, sd).log_prob(x.double().unsqueeze(1)).sum(-1)
        exact = (dist.Normal(0.0, 1.5).log_prob(grid) + likelihood).logsumexp(-1) + math.log(24 / 4000)
        close(quiet(funnel, None, 16, 300)(x), exact.float())

    def test_two_modes_against_the_closed_form(self):
        def two_modes(y):
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Normal(0.0, 3.0))
                pyro.sample("y", dist.Normal(z.abs(), 0.3), obs=y)

        y = torch.tensor([3.0, 1.5, 5.0])
        # The mass of z < 0 under the likelihood of z > 0 is less than 1e-6.
        exact = math.log(2) + dist.Normal(0.0, math.hypot(3.0, 0.3)).log_prob(y)
        samples = quiet(two_modes, None, 32, 200)(y)
        close(samples, exact)
        share = samples.expectation(lambda z: (z["z"] > 0).float())
        assert ((share - 0.5).abs() < 4 * 0.5 / math.sqrt(32 / 2)).all()  # both are there

    def test_beta(self):
        def successes(k):
            with pyro.plate("data", len(k)):
                p = pyro.sample("p", dist.Beta(2.0, 3.0))
                pyro.sample("k", dist.Binomial(20, p), obs=k)

        def uniform(k):
            with pyro.plate("data", len(k)):
                pyro.sample("p", dist.Uniform(0.0, 1.0))

        k = torch.tensor([0.0, 3.0, 19.0])
        log_beta = lambda a, b: torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)  # noqa: E731
        choose = torch.lgamma(torch.tensor(21.0)) - torch.lgamma(k + 1) - torch.lgamma(21 - k)
        exact = choose + log_beta(2 + k, 23 - k) - log_beta(torch.tensor(2.0), torch.tensor(3.0))
        for start in (None, uniform):
            close(quiet(successes, start, 16, 100)(k), exact)

    def test_dirichlet(self):
        prior = torch.tensor([1.0, 2.0, 3.0])

        def counts(c):
            with pyro.plate("data", len(c)):
                p = pyro.sample("p", dist.Dirichlet(prior))
                pyro.sample("c", dist.Multinomial(8, p), obs=c)

        c = torch.tensor([[3.0, 0.0, 5.0], [6.0, 1.0, 1.0]])
        exact = torch.lgamma(torch.tensor(9.0)) - torch.lgamma(c + 1).sum(-1)
        exact = exact + torch.lgamma(prior.sum()) - torch.lgamma(prior).sum()
        exact = exact + torch.lgamma(prior + c).sum(-1) - torch.lgamma((prior + c).sum(-1))
        close(quiet(counts, None, 16, 150)(c), exact)

    @pytest.mark.parametrize("options", [{}, {"vectorize_particles": False, "num_chains": 5}])
    def test_lkj(self, options):
        """E[det(R) ** a] under LKJ(eta), which is a ratio of its normalising constants."""
        eta, a, size = 1.5, 4.0, 3

        def correlations():
            factor = pyro.sample("factor", dist.LKJCholesky(size, torch.tensor(eta)))
            pyro.factor("power", 2 * a * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1))

        def log_constant(eta):
            terms = (
                0.5 * k * math.log(math.pi)
                + math.lgamma(eta + (size - 1 - k) / 2)
                - math.lgamma(eta + (size - 1) / 2)
                for k in range(1, size)
            )
            return sum(terms)

        exact = torch.tensor(log_constant(eta + a) - log_constant(eta))
        close(quiet(correlations, num_temperatures=60, **options)(), exact, atol=0.02)

    def test_a_support_that_depends_on_a_latent(self):
        def interval(x):
            with pyro.plate("data", len(x)):
                width = pyro.sample("width", dist.Exponential(1.0))
                z = pyro.sample("z", dist.Uniform(-width, width))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        x = torch.tensor([0.5, -2.0])
        # Given the width, x is uniform plus normal: a difference of two normal distribution functions.
        grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) * 1e-4
        normal = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 0.5)
        at = x.double().unsqueeze(-1)
        density = (normal.cdf(at + grid) - normal.cdf(at - grid)) / (2 * grid)
        exact = (density * (-grid).exp()).sum(-1).log() + math.log(1e-4)
        close(quiet(interval, None, 16, 150)(x), exact.float())

    def test_enumerated_sites_are_summed_out(self):
        def mixture(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(z + 3 * c, 1.0), obs=x)

        parts = [math.log(p) + dist.Normal(m, 2**0.5).log_prob(X) for p, m in ((0.7, 0.0), (0.3, 3.0))]
        exact = torch.logaddexp(*parts)
        samples = quiet(mixture, None, 32, 20, num_leapfrog=3)(X)
        close(samples, exact)
        assert samples.posterior(9)["c"].shape == (9, 3)

    def test_global_latents(self):
        def hierarchy(x):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        exact = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1).log_prob(X)
        for options in ({}, {"vectorize_particles": False, "num_chains": 6, "num_leapfrog": 2}):
            samples = quiet(hierarchy, num_temperatures=40, **options)(X)
            close(samples, exact)
            assert samples.values["z"].shape[1:] == (3,)
            assert samples.values["mu"].dim() == 1

    def test_nested_plates_and_a_joint_weight(self):
        def nested(x):
            with pyro.plate("group", 2, dim=-2):
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
                with pyro.plate("data", 3, dim=-1):
                    z = pyro.sample("z", dist.Normal(a, 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.3, 1.0]])
        exact = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1).log_prob(x)
        close(quiet(nested, None, 16, 100)(x), exact)
        close(quiet(nested, None, 16, 100, plates=())(x), exact.sum())

    def test_masks_and_minibatches(self):
        kept = torch.tensor([True, False, True])

        def masked(x):
            with pyro.plate("data", 100, len(x)), poutine.mask(mask=kept):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def own_masks(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(kept))
                pyro.sample("x", dist.Normal(z, 1.0).mask(kept), obs=x)

        for pair in (masked, own_masks):
            samples = quiet(pair, None, 16, 60)(X)
            close(samples, EXACT * kept, atol=1e-6)
            # What is masked stays distributed as the guide has it.
            assert samples.values["z"][:, 1].abs().max() < 5


class TestGuides:
    @pytest.mark.parametrize("kind", [AutoNormal, AutoNormalMessenger])
    def test_one_weight_a_datapoint(self, kind):
        if kind is AutoNormal:
            fitted = AutoNormal(model, init_scale=0.6)
        else:
            fitted = AutoNormalMessenger(model, init_scale=0.6)
        close(quiet(model, fitted, 16, 100)(X), EXACT)

    @pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoIAFNormal, AutoStructured])
    def test_joint_draws(self, kind):
        options = {"init_scale": 0.7} if kind is AutoMultivariateNormal else {}
        fitted = kind(model, **options)
        # plates=() asks for the joint weight.
        close(quiet(model, fitted, 16, 60, plates=())(X), EXACT.sum())

    def test_a_constrained_latent_of_an_automatic_guide(self):
        def scaled(x):
            with pyro.plate("data", len(x)):
                s = pyro.sample("s", dist.Gamma(3.0, 2.0))
                pyro.sample("x", dist.Poisson(s), obs=x)

        x = torch.tensor([0.0, 2.0, 5.0])
        exact = dist.NegativeBinomial(3.0, probs=torch.tensor(1 / 3)).log_prob(x)
        close(quiet(scaled, AutoNormal(scaled, init_scale=0.8), 64, 60)(x), exact)

    def test_a_guide_of_a_flow_with_an_inverse(self):
        def flow(x):
            with pyro.plate("data", len(x)):
                base = dist.Normal(torch.zeros(len(x)), 0.5)
                shift = transforms.AffineTransform(0.4 * x, 1.2)
                pyro.sample("z", dist.TransformedDistribution(base, [shift]))

        close(quiet(model, flow, 16, 60)(X), EXACT)


class TestSamples:
    def test_ends_weights_and_posterior(self):
        x = torch.randn(400)
        samples = quiet(model, guide, 16, 15)(x)
        z = samples.values["z"]
        log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
        assert torch.allclose(samples.log_p, log_p, atol=1e-5)
        assert torch.allclose(samples.log_weights, samples.log_p - samples.log_q, atol=1e-5)
        # The posterior is N(x / 2, 1 / 2).
        off = samples.expectation("z") - x / 2
        assert abs(off.mean().item()) < 4 * off.std().item() / 20
        second = samples.expectation(lambda z: (z["z"] - x / 2) ** 2)
        assert abs(second.mean().item() - 0.5) < 4 * second.std().item() / 20
        draws = samples.posterior(8)
        assert draws["z"].shape == (8, 400)
        assert (samples.ess <= 16.001).all()
        assert (samples.ess >= 1).all()
        assert "AnnealedSamples(S=16" in repr(samples)

    def test_to_arviz_and_merge(self):
        sampler = quiet(model, guide, 40, 30)
        one, other = sampler(X), sampler(X)
        both = one.merge(other)
        assert both.num_particles == 80
        assert torch.allclose(
            both.log_marginal, (one.log_marginal.exp() / 2 + other.log_marginal.exp() / 2).log()
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a high k̂ of few chains
            assert one.to_arviz(num_samples=5)["posterior"]["z"].shape == (1, 5, 3)

    def test_same_seed_same_result(self):
        results = []
        for _ in range(2):
            pyro.set_rng_seed(3)
            results.append(quiet(model, guide, 4, 10).log_marginal(X))
        assert torch.equal(*results)

    def test_dead_chains_weigh_nothing(self):
        def positive(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.HalfNormal(1.0, validate_args=False))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def both_signs(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.3, 1.0))

        x = torch.tensor([1.0, 0.2])
        grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) * 1e-4
        log_joint = dist.HalfNormal(1.0).log_prob(grid) + dist.Normal(grid, 1.0).log_prob(
            x.double().unsqueeze(-1)
        )
        exact = log_joint.logsumexp(-1) + math.log(1e-4)
        samples = quiet(positive, both_signs, 64, 40)(x)
        assert samples.log_weights.isneginf().any()
        assert not samples.log_weights.isnan().any()
        close(samples, exact.float())

    def test_inference_leaves_no_gradients(self):
        weight = torch.tensor(1.0, requires_grad=True)

        def learnt(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

        samples = quiet(learnt, None, 4, 5)(X)
        assert not samples.log_weights.requires_grad
        assert weight.grad is None


class TestDataSets:
    def test_one_result_a_datapoint(self):
        x = torch.randn(7)
        result = quiet(model, guide, 16, 60).log_marginal_dataset(x.split(3))
        exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        assert result.values.shape == (7,)
        assert result.num_particles == 16
        assert ((result.values - exact).abs() < 4 * result.monte_carlo_errors).all()

    def test_resumed_is_as_uninterrupted(self, tmp_path):
        x = torch.randn(7)
        sampler = quiet(model, guide, 4, 10)
        pyro.set_rng_seed(1)
        whole = sampler.log_marginal_dataset(x.split(2))

        def interrupted():
            yield from x.split(2)[:2]
            raise KeyboardInterrupt

        pyro.set_rng_seed(1)
        file = tmp_path / "results" / "ais.pt"
        with pytest.raises(KeyboardInterrupt):
            sampler.log_marginal_dataset(interrupted(), resume=file)
        pyro.set_rng_seed(99)
        resumed = sampler.log_marginal_dataset(x.split(2), resume=file)
        assert torch.equal(resumed.values, whole.values)
        assert torch.equal(resumed.monte_carlo_errors, whole.monte_carlo_errors)
        again = sampler.log_marginal_dataset(x.split(2), resume=file)
        assert torch.equal(again.values, whole.values)

    def test_a_file_of_another_run_is_refused(self, tmp_path):
        file = tmp_path / "ais.pt"
        quiet(model, guide, 4, 10).log_marginal_dataset([X], resume=file)
        with pytest.raises(ValueError, match="first draws of batch 0 have other log-weights"):
            quiet(model, guide, 4, 10).log_marginal_dataset([X + 1], resume=file)
        with pytest.raises(ValueError, match=r"holds the results of .*num_temperatures=10"):
            quiet(model, guide, 4, 20).log_marginal_dataset([X], resume=file)
        file.write_bytes(b"nothing")
        with pytest.raises(ValueError, match="no results to go on from"):
            quiet(model, guide, 4, 10).log_marginal_dataset([X], resume=file)

    def test_leaves_the_random_state_alone(self):
        pyro.set_rng_seed(0)
        quiet(model, guide, 2, 3).log_marginal_dataset([X])
        one = torch.rand(())
        pyro.set_rng_seed(0)
        quiet(model, guide, 2, 30).log_marginal_dataset([X])
        assert torch.equal(one, torch.rand(()))

    def test_joint_weights_and_no_batches_are_refused(self):
        with pytest.raises(ValueError, match="one importance weight for each index of one plate"):
            quiet(model, guide, 4, 10, plates=()).log_marginal_dataset([X])
        with pytest.raises(ValueError, match="no batch"):
            quiet(model, guide, 4, 10).log_marginal_dataset([])


class TestRefused:
    def test_discrete_latents(self):
        def categories(x):
            with pyro.plate("data", len(x)):
                c = pyro.sample("kind", dist.Bernoulli(0.3))
                z = pyro.sample("z", dist.Normal(3 * c, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(ValueError, match=r"'kind' is discrete \(Bernoulli\).*enumerate"):
            quiet(categories)(X)
        # The way out, with a guide for what depends on the enumerated site.
        enumerated = poutine.infer_config(
            categories, lambda site: {"enumerate": "parallel"} if site["name"] == "kind" else {}
        )
        with pytest.raises(ValueError, match=r"prior of 'z' depends on an enumerated site.*Pass a guide"):
            quiet(enumerated)(X)
        hidden = AutoNormal(poutine.block(enumerated, hide=["kind"]), init_scale=0.7)
        parts = [math.log(p) + dist.Normal(m, 2**0.5).log_prob(X) for p, m in ((0.7, 0.0), (0.3, 3.0))]
        close(quiet(enumerated, hidden, 32, 20, num_leapfrog=3)(X), torch.logaddexp(*parts))

    def test_counts_have_no_enumeration_to_offer(self):
        def counts(x):
            with pyro.plate("data", len(x)):
                n = pyro.sample("n", dist.Poisson(3.0))
                pyro.sample("x", dist.Normal(n, 1.0), obs=x)

        with pytest.raises(ValueError, match=r"'n' is discrete \(Poisson\).*alone\. Use ImportanceSampler"):
            quiet(counts)(X)

    def test_point_estimates(self):
        with pytest.raises(ValueError, match=r"'z' are point estimates.*guide=None"):
            quiet(model, AutoDelta(model))(X)

    def test_a_flow_without_an_inverse(self):
        torch.manual_seed(0)
        planar = transforms.Planar(2)

        def plane(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

        def bent(x):
            with pyro.plate("data", len(x)):
                base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
                pyro.sample("z", dist.TransformedDistribution(base, [planar]))

        with pytest.raises(ValueError, match=r"density of guide site 'z'.*given values.*guide=None"):
            quiet(plane, bent, 4, 5)(X)

    def test_random_layers(self):
        layer = nn.Dropout(0.5)

        def noisy(x):
            with pyro.plate("data", len(x)):
                loc = layer(torch.ones(len(x)))
                pyro.sample("z", dist.Normal(loc, 0.3))

        x = torch.zeros(30)
        with pytest.raises(ValueError, match="eval mode"):
            quiet(model, noisy, 16, 5)(x)
        layer.eval()
        quiet(model, noisy, 16, 5)(x)

    def test_nothing_to_sample(self):
        def observed(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

        with pytest.raises(ValueError, match="no latent site in common"):
            quiet(observed)(X)

    def test_a_latent_of_some_particles_alone(self):
        def sometimes(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if z.sum() > 0:
                pyro.sample("more", dist.Normal(0.0, 1.0))
            with pyro.plate("again", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(ValueError, match="'more' is not there for every particle"):
            quiet(sometimes, None, 12, 5, vectorize_particles=False)(X)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"num_chains": 0}, "num_chains must be an integer >= 1"),
            ({"num_temperatures": 2.5}, "num_temperatures must be"),
            ({"num_leapfrog": 0}, "num_leapfrog must be"),
            ({"num_adaptation": 0}, "num_adaptation must be"),
            ({"target_acceptance": 1.0}, "target_acceptance must be between 0 and 1"),
            ({"schedule": "quadratic"}, "schedule must be"),
            ({"plates": [3]}, "plates must be"),
        ],
    )
    def test_arguments(self, options, match):
        with pytest.raises(ValueError, match=match):
            quiet(model, **options)

    def test_chains_that_do_not_move_are_warned_of(self):
        sampler = quiet(model, guide, 16, 10, num_adaptation=5, target_acceptance=0.001)
        with pytest.warns(RuntimeWarning, match="moves were accepted"):
            sampler(X)


def test_given_schedule():
    betas = np.linspace(0, 1, 41) ** 2
    close(quiet(model, guide, 16, 40, schedule=betas)(X), EXACT)
    assert "schedule='given'" in repr(quiet(model, guide, 16, 40, schedule=betas))


def test_an_angle_is_refused_and_the_advice_gives_the_evidence():
    x = torch.tensor(2.0)
    for wrapped in (lambda fn: fn, lambda fn: fn.mask(True)):

        def model(x, wrapped=wrapped):
            z = pyro.sample("z", wrapped(dist.VonMises(torch.tensor(0.0), 0.05)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        for guide in (None, AutoNormal(model)):
            with pytest.raises(ValueError, match=r"'z' \(.*\) is an angle from -pi to pi"):
                quiet(model, guide, 4, 10)(x)

    def advised(x):
        z = pyro.sample("z", dist.Uniform(-math.pi, math.pi))
        angle = dist.VonMises(torch.tensor(0.0), 0.05)
        pyro.factor("angle", angle.log_prob(z) + math.log(2 * math.pi))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    grid = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)
    density = dist.VonMises(torch.tensor(0.0), 0.05).log_prob(grid) + dist.Normal(grid, 1.0).log_prob(x)
    exact = density.logsumexp(0) + math.log(2 * math.pi / 20_000)
    pyro.set_rng_seed(0)
    close(quiet(advised, None, 400, 40)(x), exact.float())


def test_straight_through_draws_are_refused_and_the_advice_gives_the_evidence():
    """Chains would move them between the values that the model knows."""
    x, temperature, prob = torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.3)

    def model(x, hard=True):
        relaxed = dist.RelaxedBernoulliStraightThrough(temperature, prob)
        summed = {} if hard else {"enumerate": "parallel"}
        z = pyro.sample("z", relaxed if hard else dist.Bernoulli(prob), infer=summed)
        y = pyro.sample("y", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(y, 0.5), obs=x)

    with pytest.raises(ValueError, match=r"'z' \(RelaxedBernoulliStraightThrough\) is drawn at discrete"):
        quiet(model, None, 4, 10)(x)

    def guide(x, hard=False):
        pyro.sample("y", dist.Normal(0.5, 1.2))

    means, scale = torch.tensor([0.0, 1.0]), 1.25**0.5
    exact = (dist.Normal(means, scale).log_prob(x).exp() @ torch.stack([1 - prob, prob])).log()
    pyro.set_rng_seed(0)
    close(quiet(model, guide, 200, 20)(x, hard=False), exact)
