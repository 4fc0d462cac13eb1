"""Bounds of the log evidence from both sides, on simulated data whose evidence is known."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoStructured

import pyro_iw.posterior.sandwich as module
from pyro_iw import Sandwich, sandwich

X = torch.zeros(40, 4)


def model(x, scale=1.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)


def bad(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x + 0.7, 0.5).to_event(1))


@pytest.fixture
def simulated(monkeypatch):
    """The arguments that were simulated, in order."""
    seen = []
    simulate = module._simulate

    def spy(*args):
        result = simulate(*args)
        seen.append(result[0].args[0])
        return result

    monkeypatch.setattr(module, "_simulate", spy)
    return seen


def run(*args, num_temperatures=40, num_chains=8, **options):
    return sandwich(
        *args,
        num_temperatures=num_temperatures,
        num_chains=num_chains,
        num_leapfrog=3,
        progress=False,
        **options,
    )


class TestBounds:
    def test_on_either_side_and_tighter_with_more_temperatures(self, simulated):
        """Means over datapoints of bound less truth; lower below 0, upper above, shrinking by steps of T."""
        gaps = []
        for number in (1, 5, 40):
            bounds = run(model, bad, X, num_temperatures=number, num_chains=16)
            assert bounds.lower.shape == bounds.upper.shape == (1, 40)
            exact = dist.Normal(0.0, 2**0.5).log_prob(simulated[-1]).sum(-1)
            for off in (exact - bounds.lower[0], bounds.upper[0] - exact):
                assert off.mean() > -4 * off.std() / math.sqrt(40)
            if number == 1:  # where it is plain
                assert (exact - bounds.lower[0]).mean() > 0.15
                assert (bounds.upper[0] - exact).mean() > 0.15
            gaps.append(bounds.mean_gap)
        assert gaps[0] > 1.5 * gaps[1]
        assert gaps[1] > gaps[2], gaps
        assert abs(gaps[2]) < 0.25

    def test_data_are_drawn_from_the_model(self, simulated):
        run(model, bad, X, num_temperatures=2, num_simulations=3)
        x = torch.cat(simulated)
        assert x.shape == (120, 4)
        assert abs(x.mean().item()) < 4 * math.sqrt(2 / 480)
        assert abs(x.var().item() - 2) < 4 * 2 * math.sqrt(2 / 480)

    @pytest.mark.parametrize("kind", [None, AutoNormal, AutoDiagonalNormal])
    def test_global_and_constrained_latents(self, kind, simulated):
        def hierarchy(x):
            s = pyro.sample("s", dist.Gamma(4.0, 4.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, s), obs=x)

        guide = None if kind is None else kind(hierarchy, init_scale=0.8)
        bounds = run(hierarchy, guide, torch.zeros(3), num_temperatures=40, num_simulations=2)
        assert bounds.gap.shape == (2,)
        grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) * 5e-4
        for n, x in enumerate(simulated):
            sd = (1 + grid**2).sqrt()
            density = dist.Normal(0.0, sd).log_prob(x.double().unsqueeze(-1)).sum(0)
            exact = (density + dist.Gamma(4.0, 4.0).log_prob(grid)).logsumexp(0).item() + math.log(5e-4)
            error = bounds.lower_errors[n].item() + bounds.upper_errors[n].item()
            assert bounds.lower[n].item() < exact + 4 * error + 0.05
            assert bounds.upper[n].item() > exact - 4 * error - 0.05
            assert bounds.gap[n].item() < 2

    def test_one_by_one_and_a_matrix(self):
        def correlated(x):
            factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=x)

        for vectorize in (True, False):
            options = {"num_temperatures": 20, "num_chains": 4 if vectorize else 2}
            bounds = run(correlated, None, torch.zeros(4, 3), vectorize_particles=vectorize, **options)
            assert bounds.gap.shape == (1,)
            assert abs(bounds.mean_gap) < 3
            assert math.isnan(bounds.mean_gap_error)

    def test_what_it_says(self):
        bounds = Sandwich(
            torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 3.5]]), torch.ones(1, 2), torch.ones(1, 2), 4, 9
        )
        assert bounds.mean_gap == 1.0
        assert bounds.mean_gap_error == pytest.approx(0.5)
        assert torch.allclose(bounds.gap_errors, torch.tensor(2**0.5))
        assert repr(bounds).startswith("Sandwich(mean_gap=1.000, mean_gap_error=0.5, lower=1.500, upper=2.5")


class TestArguments:
    def test_reshaped_nested_and_of_another_dtype(self, simulated):
        def flat(batch, scale=1.0):
            x = batch["image"].flatten(1)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)

        image = torch.zeros(5, 2, 2)
        bounds = run(flat, None, {"image": image, "id": 3}, num_temperatures=2)
        assert bounds.gap.shape == (1, 5)
        assert simulated[0]["image"].shape == (5, 2, 2)
        assert simulated[0]["id"] == 3
        assert set(simulated[0]["image"].unique().tolist()) == {0.0, 1.0}

    def test_made_by_the_user(self):
        def scaled(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x / 10)

        with pytest.raises(ValueError, match=r"observed site\(s\) 'x' are none of the arguments.*to_args="):
            run(scaled, None, torch.ones(3))
        bounds = run(scaled, None, torch.ones(3), num_temperatures=2, to_args=lambda sites: 10 * sites["x"])
        assert bounds.gap.shape == (1, 3)
        with pytest.raises(ValueError, match="'x' does not observe what was simulated"):
            run(scaled, None, torch.ones(3), to_args=lambda sites: sites["x"])

    def test_keyword_arguments(self):
        def guide(x, scale):
            bad(x)

        assert run(model, guide, X[:3], scale=0.5, num_temperatures=2).gap.shape == (1, 3)


class TestRefused:
    def test_factors(self):
        def penalised(x):
            pyro.factor("penalty", torch.tensor(-1.0))
            model(x)

        with pytest.raises(ValueError, match=r"pyro.factor\('penalty'.*cannot be simulated"):
            run(penalised, None, X)

    def test_no_data(self):
        def nothing():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match="no observed site"):
            run(nothing, None)

    def test_draws_that_cannot_be_told(self):
        guide = AutoStructured(model)
        with pytest.raises(ValueError, match=r"'z_aux'.*cannot be told.*AutoNormal, or guide=None"):
            run(model, guide, X[:3], plates=())

    def test_a_scale_inside(self):
        def tempered(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                with poutine.scale(scale=0.5):
                    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        with (
            pytest.warns(UserWarning, match="tempered density"),
            pytest.raises(ValueError, match=r"'x' have a poutine\.scale inside"),
        ):
            run(tempered, None, X[:3])

    def test_discrete_latents(self):
        def discrete(x):
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Normal(c, 1.0), obs=x)

        with pytest.raises(ValueError, match="'c' is discrete"):
            run(discrete, None, torch.zeros(3))
