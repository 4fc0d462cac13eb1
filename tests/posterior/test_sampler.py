"""The importance sampler: log evidence against closed forms, quadrature and loops over recorded draws."""

import math
import os
import subprocess
import sys
import textwrap
import warnings
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
    AutoStructured,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from helpers.cases import CASES, GlobalLatent
from helpers.truth import ConjugateGaussian, RecordedNormal, logmeanexp
from pyro_iw import IWAE_ELBO, ImportanceSampler
from pyro_iw.bounds import IWAE, MIWAE

TRUTH = ConjugateGaussian()


def pair(count, dtype=torch.float64):
    """The conjugate Gaussian on that many copies of one datapoint."""
    x = torch.full((count,), TRUTH.x, dtype=dtype)

    def model(x=x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
            pyro.sample("x", dist.Normal(z, TRUTH.noise), obs=x)

    def guide(x=x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor(TRUTH.loc, dtype=dtype), TRUTH.scale))

    return model, guide


class ReplayedNormal(dist.Normal):
    """Reparameterised samples from standard normal draws made beforehand, particle by particle."""

    noise = None
    position = 0

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        each = self.noise[0].numel()
        rows = max(shape.numel() // each, 1)
        taken = type(self).noise[type(self).position : type(self).position + rows]
        type(self).position += rows
        return self.loc + self.scale * taken.reshape(shape)


class TestLogMarginal:
    @pytest.mark.parametrize("num_particles", [1, 10])
    def test_expectation_against_quadrature(self, num_particles):
        # E[L_K] over 40 000 independent datapoints; the tolerance is 4 standard errors.
        values = ImportanceSampler(*pair(40_000), num_particles).log_marginal()
        assert values.shape == (40_000,)
        expected = TRUTH.expected_iwae(num_particles) if num_particles > 1 else TRUTH.elbo
        assert abs(values.mean().item() - expected) < 4 * values.std().item() / 200

    def test_many_particles_against_the_evidence(self):
        # At K = 5000 the bias of L_K is 1e-4 of its standard error's size.
        values = ImportanceSampler(*pair(200), 5000, chunk_size=300).log_marginal()
        error = values.std().item() / math.sqrt(200)
        assert abs(values.mean().item() - TRUTH.log_evidence) < 4 * error
        assert values.std().item() < 0.02

    @pytest.mark.parametrize("chunk_size", [1, 7, 25, 50, 1000])
    def test_every_chunk_size_gives_the_same_on_the_same_draws(self, chunk_size):
        ReplayedNormal.noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(3))
        x = torch.tensor([0.3, -1.0, 2.0])

        def model():
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        def guide():
            with pyro.plate("data", 3):
                pyro.sample("z", ReplayedNormal(x / 2, torch.full((3,), 0.8)))

        sampler = ImportanceSampler(model, guide, 50, chunk_size=chunk_size)
        ReplayedNormal.position = 0
        sampler._runner.run(pyro_pair(model, guide), 1)  # the probe draws as well
        ReplayedNormal.position = 0
        value = sampler.log_marginal()
        for n in range(3):
            terms = []
            for row in ReplayedNormal.noise:
                z = x[n] / 2 + 0.8 * row[n]
                log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x[n])
                terms.append(log_p - dist.Normal(x[n] / 2, 0.8).log_prob(z))
            assert value[n].item() == pytest.approx(logmeanexp(terms).item(), rel=1e-5, abs=1e-5)

    @pytest.mark.parametrize("chunk_size", [1, 100, 2000])
    def test_chunk_sizes_agree_within_monte_carlo_error(self, chunk_size):
        result = ImportanceSampler(*pair(20), 2000, chunk_size=chunk_size).log_marginal()
        # Standard error of a mean of 20 estimates, each about 0.5 / sqrt(2000).
        assert result.mean().item() == pytest.approx(TRUTH.log_evidence, abs=4 * 0.5 / math.sqrt(40_000))

    def test_a_joint_model_gives_a_scalar(self):
        case = GlobalLatent()
        value = ImportanceSampler(case.model, case.guide, 200).log_marginal()
        assert value.shape == ()

    def test_no_scale_of_subsampling_and_one_minibatch_for_all_chunks(self):
        data = torch.arange(20.0)
        seen = []

        def model():
            with pyro.plate("data", 20, subsample_size=4) as rows:
                seen.append(rows)
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=data[rows])

        def guide():
            with pyro.plate("data", 20, subsample_size=4) as rows:
                pyro.sample("z", dist.Normal(data[rows] / 2, 0.5**0.5))

        sampler = ImportanceSampler(model, guide, 10, chunk_size=3)
        value = sampler.log_marginal()
        rows = seen[-1]
        assert all(torch.equal(rows, other) for other in seen[-4:])
        # The guide is the posterior, so that every weight is the evidence.
        torch.testing.assert_close(value, dist.Normal(0.0, 2**0.5).log_prob(data[rows]))
        sampler.log_marginal()
        assert not torch.equal(seen[-1], rows)

    def test_a_new_pair_draws_the_minibatch_that_its_seed_says(self):
        def model():
            with pyro.plate("data", 1000, subsample_size=2) as rows:
                pyro.sample("z", dist.Normal(rows.float(), 1.0))

        def guide():
            with pyro.plate("data", 1000, subsample_size=2) as rows:
                pyro.sample("z", dist.Normal(rows.float(), 1.2))

        sampler = ImportanceSampler(model, guide, 10)
        values = []
        for _ in range(2):  # the first call gets to know the pair, by a run of its own
            pyro.set_rng_seed(3)
            values.append(sampler().rerun.minibatch.indices["data"])
        assert torch.equal(*values)

    @pytest.mark.parametrize("case_class", CASES)
    @pytest.mark.parametrize("vectorize", [True, False])
    def test_weights_against_hand_written_densities(self, case_class, vectorize):
        case = case_class(torch.float64)
        sampler = ImportanceSampler(
            case.model_callable, case.guide_callable, 6, chunk_size=6, vectorize_particles=vectorize
        )
        tempered = case_class.__name__ == "Tempered"
        with pytest.warns(UserWarning, match="'x'.*tempered density") if tempered else nullcontext():
            sampler.log_marginal()
        RecordedNormal.draws.clear()
        samples = sampler()
        draws = RecordedNormal.draws
        if not vectorize:
            sites = len(draws) // 6
            draws = [torch.stack([draws[k * sites + s] for k in range(6)]) for s in range(sites)]
        theta, phi = (
            {n: torch.tensor(v, dtype=torch.float64) for n, v in p.items()} for p in (case.theta, case.phi)
        )
        log_p, log_q = case.log_weights(theta, phi, draws)
        for ours, theirs in ((samples.log_p, log_p), (samples.log_q, log_q)):
            expected = torch.tensor([[float(cell) for cell in row] for row in theirs], dtype=torch.float64)
            torch.testing.assert_close(ours.reshape(expected.shape), expected)

    def test_vectorised_or_not_and_seeds(self):
        model, guide = pair(3)
        values = []
        for _ in range(2):
            pyro.set_rng_seed(4)
            values.append(ImportanceSampler(model, guide, 50, chunk_size=20).log_marginal())
        assert torch.equal(*values)

    def test_needs_and_leaves_no_gradients(self):
        model, guide = pair(3)
        weight = torch.tensor(1.0, requires_grad=True, dtype=torch.float64)
        scaled = poutine.scale(lambda: model(weight * torch.ones(3, dtype=torch.float64)), 1.0)
        samples = ImportanceSampler(scaled, guide, 5)()
        assert not samples.log_p.requires_grad
        assert torch.is_grad_enabled()

    def test_grad_mode_is_the_callers_own_between_chunks(self):
        for particles in ImportanceSampler(*pair(3), 10, chunk_size=5).particles():
            assert torch.is_grad_enabled()
            assert len(particles.log_p) == 5
            break


def pyro_pair(model, guide):
    from pyro_iw.tracing.traces import Pair

    return Pair(model, guide)


class TestJackknife:
    def test_against_a_loop(self):
        from pyro_iw.running import jackknife

        log_w = torch.randn(6, 2, dtype=torch.float64)
        for n in range(2):
            everything = logmeanexp(list(log_w[:, n]))
            left_out = [logmeanexp([log_w[j, n] for j in range(6) if j != i]) for i in range(6)]
            expected = 6 * everything - 5 * sum(left_out) / 6
            assert jackknife(log_w)[n].item() == pytest.approx(expected.item(), rel=1e-12)

    def test_it_takes_away_most_of_the_bias(self):
        plain = ImportanceSampler(*pair(100_000), 10).log_marginal().mean().item()
        model, guide = pair(100_000)
        corrected = ImportanceSampler(model, guide, 10, jackknife=True).log_marginal()
        error = corrected.std().item() / math.sqrt(100_000)
        bias = TRUTH.expected_iwae(10) - TRUTH.log_evidence
        assert bias < -10 * error  # there is something to see
        assert abs(plain - TRUTH.log_evidence - bias) < 5 * error
        assert abs(corrected.mean().item() - TRUTH.log_evidence) < abs(bias) / 3

    def test_one_particle_with_all_of_the_weight_is_left_alone(self):
        from pyro_iw.running import jackknife

        log_w = torch.tensor([[3.0], [-math.inf], [-math.inf]])
        assert jackknife(log_w).item() == pytest.approx(3.0 - math.log(3))

    def test_it_needs_two_particles(self):
        with pytest.raises(ValueError, match="num_particles > 1"):
            ImportanceSampler(*pair(3), 1, jackknife=True)


class TestDataset:
    def test_ragged_batches_in_any_form(self):
        x = torch.linspace(-2, 2, 11, dtype=torch.float64)
        labels = torch.arange(11)

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):  # the posterior, so that one particle is exact
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

        exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        sampler = ImportanceSampler(model, guide, 2)
        forms = [
            (DataLoader(x, batch_size=4), None),
            (DataLoader(TensorDataset(x), batch_size=4), None),
            (DataLoader(TensorDataset(x, labels), batch_size=4), lambda batch: batch[0]),
            ([{"x": part} for part in x.split(4)], None),
            ((part for part in x.split(4)), None),
        ]
        for loader, to_args in forms:
            result = sampler.log_marginal_dataset(loader, to_args)
            torch.testing.assert_close(result.values, exact)
            assert result.mean == pytest.approx(exact.mean().item())
            assert result.monte_carlo_error == pytest.approx(0.0, abs=1e-6)
            assert result.sampling_error == pytest.approx(exact.std().item() / math.sqrt(11))

    def test_monte_carlo_error_is_the_spread_of_repetitions(self):
        # 400 repetitions: their standard deviation is known to 4 %, twice that is let pass four times over.
        result = ImportanceSampler(*pair(400), 100).log_marginal_dataset(
            [torch.full((400,), TRUTH.x).double()]
        )
        assert result.monte_carlo_errors.mean().item() == pytest.approx(result.values.std().item(), rel=0.15)
        expected = result.monte_carlo_errors.square().sum().sqrt() / 400
        assert result.monte_carlo_error == pytest.approx(expected.item())

    def test_a_single_datapoint_has_no_sampling_error(self):
        result = ImportanceSampler(*pair(1), 100).log_marginal_dataset([torch.tensor([TRUTH.x]).double()])
        assert math.isnan(result.sampling_error)
        assert math.isfinite(result.monte_carlo_error)

    @pytest.mark.parametrize("bound", [IWAE(1), IWAE(8), MIWAE(2, 4)])
    def test_another_bound_on_the_same_particles(self, bound):
        x = torch.full((4000,), TRUTH.x).double()
        result = ImportanceSampler(*pair(4000), 80, chunk_size=11).log_marginal_dataset([x], bound=bound)
        expected = {1: TRUTH.elbo, 8: TRUTH.expected_iwae(8), 4: TRUTH.expected_iwae(4)}[bound.K]
        error = result.bounds.std().item() / math.sqrt(4000)
        assert abs(result.bounds.mean().item() - expected) < 4 * error
        gap = result.bounds.mean().item() - result.values.mean().item()
        assert result.minus_kl == pytest.approx(gap)
        spread = (result.bounds - result.values).std().item()
        assert result.minus_kl_errors.square().mean().sqrt().item() == pytest.approx(spread, rel=0.12)
        expected = result.minus_kl_errors.square().sum().sqrt().item() / 4000
        assert result.minus_kl_error == pytest.approx(expected)

    @pytest.mark.parametrize("chunk_size", [3, 60])
    def test_dead_particles_in_several_chunks(self, chunk_size):
        # The prior is Uniform(0, 1): half of the guide's particles have no density, in every chunk.
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Uniform(torch.tensor(0.0).double(), 1.0, validate_args=False))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0))

        x = torch.linspace(0, 1, 4).double()
        sampler = ImportanceSampler(model, guide, 60, chunk_size=chunk_size)
        with pyro.validation_enabled(False):
            elbo = sampler.log_marginal_dataset([x], bound=IWAE(1))
            tighter = sampler.log_marginal_dataset([x], bound=IWAE(20))
        assert (elbo.bounds == -math.inf).all()
        assert elbo.minus_kl == -math.inf
        assert math.isnan(elbo.minus_kl_error)
        assert math.isfinite(elbo.mean)
        assert -1 < tighter.minus_kl < 0
        assert math.isfinite(tighter.minus_kl_error)

    def test_a_datapoint_that_no_particle_reaches(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Uniform(torch.tensor(0.0).double(), 1.0, validate_args=False))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.tensor([0.5, 50.0]).double(), 0.01))

        sampler = ImportanceSampler(model, guide, 60, chunk_size=7, check_support=False)
        with pyro.validation_enabled(False), pytest.warns(RuntimeWarning, match="none of the 60"):
            result = sampler.log_marginal_dataset([torch.zeros(2).double()], bound=IWAE(1))
        assert result.minus_kl == -math.inf

    def test_errors(self):
        sampler = ImportanceSampler(*pair(3), 4)
        with pytest.raises(ValueError, match="no batch"):
            sampler.log_marginal_dataset([])
        with pytest.raises(ValueError, match="takes 8 particles"):
            sampler.log_marginal_dataset([torch.zeros(3).double()], bound=IWAE(8))
        without = sampler.log_marginal_dataset([torch.zeros(3).double()])
        for name in ("minus_kl", "minus_kl_error"):
            with pytest.raises(ValueError, match="pass bound="):
                getattr(without, name)
        case = GlobalLatent()
        with pytest.raises(ValueError, match=r"one plate.*shape \(\)"):
            ImportanceSampler(lambda _: case.model(), lambda _: case.guide(), 4).log_marginal_dataset(
                [torch.zeros(3)]
            )


def test_chunk_size_none_is_all_particles_at_once():
    sampler = ImportanceSampler(*pair(3), 250, chunk_size=None)
    assert sampler.chunk_size == 250
    x = torch.zeros(3).double()
    pyro.set_rng_seed(1)
    found = sampler(x).log_weights
    pyro.set_rng_seed(1)
    assert torch.equal(found, ImportanceSampler(*pair(3), 250, chunk_size=250)(x).log_weights)


class TestBadInput:
    def test_arguments(self):
        model, guide = pair(3)
        for keywords in ({"num_particles": 0}, {"num_particles": 2.5}, {"chunk_size": 0}):
            with pytest.raises(ValueError, match="integer >= 1"):
                ImportanceSampler(model, guide, **keywords)
        with pytest.raises(ValueError, match="names of plates"):
            ImportanceSampler(model, guide, plates=[3])

    def test_no_latent_site(self):
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

        with pytest.raises(ValueError, match="no latent site"):
            ImportanceSampler(model, lambda: None, 10).log_marginal()

    @pytest.mark.parametrize(
        ("prior", "proposal"),
        [
            (dist.Normal(0.0, 1.0), dist.HalfNormal(1.0)),
            (dist.HalfNormal(1.0), dist.Uniform(0.0, 3.0)),
            (dist.Uniform(-1.0, 1.0), dist.Uniform(-1.0, 0.5)),
        ],
    )
    def test_a_guide_with_too_small_a_support(self, prior, proposal):
        def model():
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

        sampler = ImportanceSampler(model, lambda: pyro.sample("z", proposal), 10)
        with pytest.raises(ValueError, match=r"The guide proposes 'z' from .* prior reaches over"):
            sampler.log_marginal()

    @pytest.mark.parametrize(
        ("prior", "proposal"),
        [
            (dist.HalfNormal(1.0), dist.LogNormal(0.0, 1.0)),
            (dist.Uniform(-1.0, 1.0, validate_args=False), dist.Normal(0.0, 1.0)),
            (dist.Beta(2.0, 2.0), dist.Uniform(0.0, 1.0)),
            (dist.Dirichlet(torch.ones(3)), dist.Dirichlet(2 * torch.ones(3))),
            (dist.Categorical(torch.ones(3) / 3), dist.Categorical(torch.tensor([0.2, 0.2, 0.6]))),
        ],
    )
    def test_supports_that_do(self, prior, proposal):
        def model():
            pyro.sample("z", prior)

        value = ImportanceSampler(model, lambda: pyro.sample("z", proposal), 20_000).log_marginal()
        assert value.item() == pytest.approx(0.0, abs=0.1)

    def test_particles_outside_the_support_of_the_model_count_for_nothing(self):
        def model(low):
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Uniform(low, low + 1.0, validate_args=False))

        def guide(low):
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Uniform(torch.zeros(2), 4.0))

        value = ImportanceSampler(model, guide, 20_000).log_marginal(torch.tensor([0.5, 2.0]))
        assert value.exp().mean().item() == pytest.approx(1.0, abs=0.05)

    def test_a_cell_that_no_particle_reaches(self):
        def model():
            with pyro.plate("data", 2):
                low = torch.tensor([0.0, 50.0])
                pyro.sample("z", dist.Uniform(low, low + 1, validate_args=False))

        def guide():
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Normal(0.5, 0.2))

        sampler = ImportanceSampler(model, guide, 50)
        with pytest.warns(
            RuntimeWarning, match=r"In 1 of 2 cell\(s\) none of the 50 particles.*'z' \(model\)"
        ):
            value = sampler.log_marginal()
        assert value[1].item() == -math.inf
        assert value[0].isfinite()
        with pytest.warns(RuntimeWarning, match="In 1 of 2"):
            samples = sampler()
        assert samples.ess[1] == 0
        with pytest.raises(ValueError, match=r"In 1 of 2 cell\(s\) every particle has zero density"):
            samples.posterior(10)
        with pytest.raises(ValueError, match="every particle has zero density"):
            samples.expectation("z")

    def test_nan_names_its_site(self):
        def model(x):
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

        def guide(x):
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        sampler = ImportanceSampler(model, guide, 5)
        with pytest.raises(ValueError, match=r"NaN or \+inf.*'x' \(model\)"):
            sampler.log_marginal(torch.tensor([1.0, math.nan]))

    @pytest.mark.parametrize("kind", ["list", "structured", "laplace"])
    def test_a_point_estimate_beside_a_latent_with_a_density(self, kind):
        def model():
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

        if kind == "list":
            guide = AutoGuideList(model)
            guide.append(AutoDelta(poutine.block(model, expose=["mu"])))
            guide.append(AutoNormal(poutine.block(model, expose=["z"])))
        elif kind == "structured":
            guide = AutoStructured(model, conditionals={"mu": "delta", "z": "normal"})
        else:
            guide = AutoLaplaceApproximation(model)
        guide()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ImportanceSampler(model, guide, 50).log_marginal()
        named = {str(warning.message).split("'")[1] for warning in caught}
        assert named == ({"mu", "z"} if kind == "laplace" else {"mu"})

    def test_a_joint_guide_is_no_point_estimate(self):
        def model():
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))

        guide = AutoDiagonalNormal(model)
        for num_particles in (1, 50):
            ImportanceSampler(model, guide, num_particles).log_marginal()

    def test_what_is_no_loader(self):
        x = torch.zeros(3).double()
        for loader in (x, TensorDataset(x)):
            with pytest.raises(ValueError, match="gives single datapoints and not batches"):
                ImportanceSampler(*pair(3), 5).log_marginal_dataset(loader)

    def test_a_loader_without_a_length(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(torch.zeros(6).double())

        result = ImportanceSampler(*pair(3), 5).log_marginal_dataset(DataLoader(Stream(), batch_size=4))
        assert len(result.values) == 6

    def test_supports_may_differ_where_the_user_says_so(self):
        # y ~ U(0, n), so that n < max y has no likelihood and the guide need not go there.
        y = torch.tensor([3.0, 7.0])

        def model():
            n = pyro.sample("n", dist.Uniform(0.0, 10.0))
            pyro.sample("y", dist.Uniform(0.0, n[..., None] + 0 * y).to_event(1), obs=y)

        def guide():
            pyro.sample("n", dist.Uniform(7.0, 10.0))

        with pytest.raises(ValueError, match="check_support=False"):
            ImportanceSampler(model, guide, 20_000).log_marginal()
        value = ImportanceSampler(model, guide, 20_000, check_support=False, chunk_size=5000).log_marginal()
        exact = math.log((1 / 7 - 1 / 10) / 10)  # ∫ n^-2 / 10 over [7, 10]
        assert value.item() == pytest.approx(exact, abs=0.01)

    def test_sites_that_not_every_particle_has(self):
        def model():
            a = pyro.sample("a", dist.Bernoulli(0.5))
            if a:
                pyro.sample("b", dist.Normal(0.0, 1.0))

        sampler = ImportanceSampler(model, model, 50, vectorize_particles=False)
        assert sampler.log_marginal().item() == pytest.approx(0.0, abs=1e-6)
        with pytest.raises(ValueError, match="'b' is not there for every particle"):
            sampler()

    def test_a_point_estimate_is_no_proposal(self):
        def model():
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))

        guide = AutoDelta(model)
        guide()
        with pytest.warns(UserWarning, match="'mu' is a point estimate"):
            ImportanceSampler(model, guide, 5).log_marginal()

    def test_another_batch_size_than_the_guide_was_made_for(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoNormal(model)
        SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(torch.zeros(5))
        sampler = ImportanceSampler(model, guide, 5)
        assert sampler.log_marginal(torch.zeros(5)).shape == (5,)
        with pytest.raises(ValueError, match=r"'data'|'x'|'z'"):
            sampler.log_marginal(torch.zeros(3))

    def test_batch_sizes_may_change_for_an_amortised_guide(self):
        sampler = ImportanceSampler(*pair(3), 5, chunk_size=2)
        for count in (3, 1, 7):
            assert sampler.log_marginal(torch.zeros(count).double()).shape == (count,)


def test_the_log_evidence_is_the_iwae_bound_of_as_many_particles():
    model, guide = pair(5)
    sampler = ImportanceSampler(model, guide, 12, chunk_size=12)
    sampler.log_marginal()
    loss = IWAE_ELBO(K=12)
    loss.loss(model, guide)
    pyro.set_rng_seed(8)
    value = sampler.log_marginal().sum().item()
    pyro.set_rng_seed(8)
    assert -loss.loss(model, guide) == pytest.approx(value, rel=1e-12)


MEMORY = """
    import sys
    import pyro, pyro.distributions as dist, torch
    from pyro_iw import ImportanceSampler

    def model(x):
        with pyro.plate("data", 20):
            z = pyro.sample("z", dist.Normal(torch.zeros(200), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 20):
            pyro.sample("z", dist.Normal(torch.zeros(200), 1.1).to_event(1))

    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    x = torch.zeros(20)
    pyro.enable_validation(False)
    ImportanceSampler(model, guide, 2).log_marginal(x)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = peak()
    ImportanceSampler(model, guide, int(sys.argv[1]), chunk_size=100, progress=False).log_marginal(x)
    print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory")
def test_memory_does_not_grow_with_the_number_of_particles():
    def peak(num_particles):
        command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(num_particles)]
        # Or freed blocks stay in the heap, in pieces, and the process's size measures those.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return int(run.stdout)

    few, many = peak(500), peak(50_000)
    assert few > 5_000  # kilobytes: a chunk's tensors have 1600 each
    assert many < 1.1 * few


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations that hand a tensor's value to Python, for which an accelerator is waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        self.count += torch.Tag.data_dependent_output in func.tags
        return func(*args, **(kwargs or {}))


def test_no_chunk_waits_for_values():
    pyro.enable_validation(False)  # which looks at them
    try:
        counts = []
        for chunks in (2, 9):
            sampler = ImportanceSampler(*pair(3), 10 * chunks, chunk_size=10)
            sampler.log_marginal()
            with Reads() as reads:
                sampler.log_marginal()
            counts.append(reads.count)
    finally:
        pyro.enable_validation(True)
    assert 0 < counts[0] == counts[1]  # those of the first chunk and of the result
