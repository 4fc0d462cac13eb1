"""Conversion to ArviZ: groups, names and values against the samples; both majors' containers."""

import importlib.machinery
import importlib.util
import sys
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

import pyro_iw
from helpers.cases import NestedPlates
from pyro_iw import ImportanceSampler
from pyro_iw._support.optional import is_arviz_0, require

arviz = require("arviz", "arviz", "This test")
# ArviZ 0.23 is behind the matplotlib it is tested with here.
pytestmark = pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")

SIGMA = torch.tensor([1.0, 2.0, 0.5])
Y = torch.tensor([0.5, -1.0, 2.0])


def global_model(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("school", 3):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def global_guide(sigma, y):
    pyro.sample("mu", dist.Normal(0.6, 1.0))
    with pyro.plate("school", 3):
        pyro.sample("eta", dist.Normal(0.0, 1.0))


def image_model(x):
    with pyro.plate("images", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        logits = z.sum(-1, keepdim=True) + torch.zeros(5)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def image_guide(x):
    with pyro.plate("images", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.fixture
def samples():
    return ImportanceSampler(global_model, global_guide, 4000)(SIGMA, Y)


@pytest.fixture
def data(samples):
    return samples.to_arviz(num_samples=300, coords={"school": ["A", "B", "C"]})


def groups(data):
    return set(data.groups() if is_arviz_0(arviz) else data.children)


def sizes(variable):
    return {str(name): size for name, size in variable.sizes.items()}


class TestGroups:
    def test_dims_of_all_groups(self, data):
        draws = {"chain": 1, "draw": 300}
        expected = {
            "posterior": {
                "mu": draws,
                "eta": {**draws, "school": 3},
                "theta": {**draws, "school": 3},
            },
            "prior": {"mu": draws, "eta": {**draws, "school": 3}, "theta": {**draws, "school": 3}},
            "sample_stats": {"lp": draws, "log_q": draws, "log_weight": draws},
            "weight_stats": {name: {"chain": 1} for name in ("ess", "khat", "log_marginal")},
            "log_likelihood": {"y": {**draws, "school": 3}},
            "posterior_predictive": {"y": {**draws, "school": 3}},
            "prior_predictive": {"y": {**draws, "school": 3}},
            "observed_data": {"y": {"school": 3}},
            "constant_data": {"sigma": {"sigma_dim_0": 3}},
        }
        assert groups(data) == set(expected)
        for group, variables in expected.items():
            assert {str(n): sizes(v) for n, v in data[group].data_vars.items()} == variables
        assert data.posterior["school"].values.tolist() == ["A", "B", "C"]

    def test_values(self, samples, data):
        posterior = data.posterior
        theta = posterior["mu"].values[..., None] + posterior["eta"].values
        np.testing.assert_allclose(posterior["theta"].values, theta, rtol=1e-5, atol=1e-6)
        log_lik = dist.Normal(torch.tensor(theta), SIGMA).log_prob(Y)
        np.testing.assert_allclose(data.log_likelihood["y"].values, log_lik.numpy(), rtol=1e-4, atol=1e-5)
        stats = data.sample_stats
        np.testing.assert_allclose(stats["log_weight"], stats["lp"] - stats["log_q"], atol=1e-4)
        lp = dist.Normal(0.0, 2.0).log_prob(torch.tensor(posterior["mu"].values))
        lp = lp + dist.Normal(0.0, 1.0).log_prob(torch.tensor(posterior["eta"].values)).sum(-1)
        np.testing.assert_allclose(stats["lp"].values, (lp + log_lik.sum(-1)).numpy(), rtol=1e-4)
        log_q = dist.Normal(0.6, 1.0).log_prob(torch.tensor(posterior["mu"].values))
        log_q = log_q + dist.Normal(0.0, 1.0).log_prob(torch.tensor(posterior["eta"].values)).sum(-1)
        np.testing.assert_allclose(stats["log_q"].values, log_q.numpy(), rtol=1e-4)
        for name, value in data.weight_stats.data_vars.items():
            assert value.item() == pytest.approx(getattr(samples, name).item())
        np.testing.assert_array_equal(data.observed_data["y"].values, Y.numpy())
        np.testing.assert_array_equal(data.constant_data["sigma"].values, SIGMA.numpy())
        # 300 draws of variance 4 and about 1: five standard errors.
        assert abs(data.prior["mu"].mean().item()) < 5 * 2 / 300**0.5
        assert data.posterior["mu"].mean().item() == pytest.approx(samples.expectation("mu").item(), abs=0.3)
        # Predictive draws scatter about their own theta with their own sigma.
        residual = (data.posterior_predictive["y"] - posterior["theta"]).values / SIGMA.numpy()
        assert residual.std() == pytest.approx(1.0, abs=0.12)

    def test_events_and_one_posterior_a_datapoint(self):
        x = torch.ones(4, 5)
        samples = ImportanceSampler(image_model, image_guide, 500)(x)
        data = samples.to_arviz(
            num_samples=50,
            dims={"z": ["unit"], "x": ["pixel"]},
            coords={"unit": ["u", "v"], "images": [7, 8, 9, 10]},
        )
        draws = {"chain": 1, "draw": 50, "images": 4}
        assert sizes(data.posterior["z"]) == {**draws, "unit": 2}
        assert sizes(data.log_likelihood["x"]) == draws
        assert sizes(data.posterior_predictive["x"]) == {**draws, "pixel": 5}
        assert sizes(data.weight_stats["khat"]) == {"chain": 1, "images": 4}
        assert sizes(data.observed_data["x"]) == {"images": 4, "pixel": 5}
        assert "constant_data" not in groups(data)
        assert data.posterior["images"].values.tolist() == [7, 8, 9, 10]

    def test_nested_plates(self):
        pair = NestedPlates()
        data = ImportanceSampler(pair.model, pair.guide, 500)().to_arviz(num_samples=20)
        draws = {"chain": 1, "draw": 20, "rows": 3, "columns": 2}
        assert (
            sizes(data.posterior["z"]) == sizes(data.prior["z"]) == sizes(data.log_likelihood["x"]) == draws
        )
        assert sizes(data.weight_stats["ess"]) == {"chain": 1, "rows": 3, "columns": 2}
        np.testing.assert_array_equal(data.observed_data["x"].values, pair.x.numpy())

    def test_kept_plates_that_are_not_the_rightmost(self):
        def model():
            with pyro.plate("a", 4, dim=-3), pyro.plate("b", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.plate("c", 5, dim=-1):
                    pyro.sample("x", dist.Normal(z, 3.0), obs=torch.ones(4, 3, 5))

        def guide():
            with pyro.plate("a", 4, dim=-3), pyro.plate("b", 3, dim=-2):
                pyro.sample("z", dist.Normal(0.5, 1.0))

        samples = ImportanceSampler(model, guide, 500)()
        data = samples.to_arviz(num_samples=20)
        assert sizes(data.weight_stats["khat"]) == {"chain": 1, "a": 4, "b": 3}
        assert sizes(data.sample_stats["lp"]) == {"chain": 1, "draw": 20, "a": 4, "b": 3}
        np.testing.assert_allclose(data.weight_stats["ess"].values[0], samples.ess.numpy())
        assert sizes(data.log_likelihood["x"]) == {"chain": 1, "draw": 20, "a": 4, "b": 3, "c": 5}

    def test_values_of_size_one_in_a_plate(self):
        def model():
            with pyro.plate("rows", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.plate("columns", 4, dim=-1):
                    pyro.sample("x", dist.Normal(z, 3.0), obs=torch.ones(3, 1))

        def guide():
            with pyro.plate("rows", 3, dim=-2):
                pyro.sample("z", dist.Normal(0.5, 1.0))

        data = ImportanceSampler(model, guide, 500)().to_arviz(num_samples=20)
        assert sizes(data.observed_data["x"]) == {"rows": 3, "columns": 4}
        for group in groups(data):
            assert all(variable.values.flags.writeable for variable in data[group].data_vars.values())

    def test_constants_of_a_module_and_names_for_their_dims(self):
        class Model(pyro.nn.PyroModule):
            def forward(self, scale, x):
                with pyro.plate("data", 3):
                    z = pyro.sample("z", dist.Normal(0.0, 1.0))
                    pyro.sample("x", dist.Normal(z, scale), obs=x)

        def guide(scale, x):
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(0.0, 0.9))

        samples = ImportanceSampler(Model(), guide, 500)(torch.full((3,), 2.0), torch.zeros(3))
        data = samples.to_arviz(num_samples=20, dims={"scale": ["data"]})
        assert sizes(data.constant_data["scale"]) == {"data": 3}
        named = samples.to_arviz(num_samples=20, constant_data={"labels": ["a", "b"]})
        assert named.constant_data["labels"].values.tolist() == ["a", "b"]

    def test_a_minibatch_is_labelled_by_its_indices(self):
        def model():
            with pyro.plate("data", 20, subsample_size=3):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        samples = ImportanceSampler(model, model, 500)()
        data = samples.to_arviz(num_samples=20)
        expected = samples.rerun.minibatch.indices["data"].tolist()
        assert data.posterior["data"].values.tolist() == expected

    def test_groups_may_be_left_out(self, samples):
        data = samples.to_arviz(num_samples=10, log_likelihood=False, predictive=False, prior=False)
        stats = {"sample_stats", "weight_stats"}
        assert groups(data) == {"posterior", *stats, "observed_data", "constant_data"}
        given = samples.to_arviz(num_samples=10, prior=False, constant_data={"year": [1981]})
        assert given.constant_data["year"].values.tolist() == [1981]

    def test_without_vectorisation(self):
        sampler = ImportanceSampler(global_model, global_guide, 300, vectorize_particles=False)
        data = sampler(SIGMA, Y).to_arviz(num_samples=20)
        assert sizes(data.prior["mu"]) == {"chain": 1, "draw": 20}
        assert sizes(data.posterior_predictive["y"]) == {"chain": 1, "draw": 20, "school": 3}

    def test_enumerated_sites(self):
        """Draws of them from their conditional, and the log-likelihood with them summed out."""

        def model(x, y):
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                c = pyro.sample("c", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
                pyro.deterministic("sum", z + c)
                pyro.sample("x", dist.Normal(z + 4.0 * c, 1.0), obs=x)
                pyro.sample("y", dist.Normal(0.0 * z, 1.0), obs=y)

        def guide(x, y):
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        x = torch.tensor([0.0, 2.0, 4.0])
        data = ImportanceSampler(model, guide, 1000)(x, Y).to_arviz(num_samples=500)
        draws = {"chain": 1, "draw": 500, "data": 3}
        for group in ("posterior", "prior"):
            found = {str(name): sizes(values) for name, values in data[group].data_vars.items()}
            assert found == {"z": draws, "c": draws, "sum": draws}
        posterior = data.posterior
        np.testing.assert_allclose(posterior["sum"], posterior["z"] + posterior["c"], rtol=1e-6)
        # c = 0 and c = 1 are symmetric about the middle datapoint: five standard errors.
        means = posterior["c"].values.mean((0, 1))
        assert means[0] < 0.05 < 0.95 < means[2]
        assert abs(means[1] - 0.5) < 5 * 0.5 / 500**0.5
        z = torch.tensor(posterior["z"].values).unsqueeze(-1)
        both = dist.Normal(z + torch.tensor([0.0, 4.0]), 1.0).log_prob(x[:, None])
        expected = both.logsumexp(-1) - np.log(2)
        np.testing.assert_allclose(data.log_likelihood["x"].values, expected.numpy(), rtol=1e-4, atol=1e-5)
        assert set(data.log_likelihood.data_vars) == set(data.observed_data.data_vars) == {"x", "y"}
        assert data.log_likelihood.attrs["summed_out"] == "c"
        residual = data.posterior_predictive["x"] - posterior["z"] - 4 * posterior["c"]
        assert residual.values.std() == pytest.approx(1.0, abs=5 / (2 * 1500) ** 0.5)

    def test_a_joint_log_likelihood(self):
        def model():
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                c = pyro.sample("c", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
                scale = 1.0 + c.unsqueeze(-1)
                pyro.sample("x", dist.Normal(torch.zeros(2), scale).to_event(1), obs=torch.ones(3, 2))
                pyro.sample("y", dist.Normal(0.0, 1.0 + c), obs=torch.ones(3))

        def guide():
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(0.3, 1.0))

        data = ImportanceSampler(model, guide, 500)().to_arviz(num_samples=10, dims={"x": ["coordinate"]})
        assert {str(n): sizes(v) for n, v in data.log_likelihood.data_vars.items()} == {
            "x + y": {"chain": 1, "draw": 10, "data": 3}
        }
        assert sizes(data.observed_data["x"]) == {"data": 3, "coordinate": 2}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtypes_that_numpy_or_netcdf_lack(self, dtype, tmp_path):
        def model(half):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("rounded", z.to(dtype))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5, dtype=dtype))

        half = torch.tensor([0.1, 0.2], dtype=dtype)
        samples = ImportanceSampler(model, lambda half: pyro.sample("z", dist.Normal(0.2, 0.9)), 200)(half)
        data = samples.to_arviz(num_samples=20)
        assert data.observed_data["x"].item() == 0.5
        np.testing.assert_array_equal(data.constant_data["half"].values, half.float().numpy())
        np.testing.assert_allclose(data.posterior["rounded"], data.posterior["z"], rtol=0.01)
        data.to_netcdf(str(tmp_path / "half.nc"))

    def test_the_version_is_the_package_s_own(self, samples):
        data = samples.to_arviz(num_samples=5, prior=False, predictive=False)
        assert data.posterior.attrs["inference_library_version"] == pyro_iw.__version__


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # of leaving out one of three schools
class TestArviZ:
    """What ArviZ does with it."""

    def test_summary_and_comparison(self, data):
        summary = arviz.summary(data, kind="stats", round_to="none")
        assert {"mu", "eta[A]", "theta[C]"} <= set(summary.index)
        assert summary.loc["mu", "mean"] == pytest.approx(data.posterior["mu"].mean().item(), abs=1e-3)
        loo = arviz.loo(data, pointwise=True)
        log_lik = data.log_likelihood["y"].values[0]
        naive = np.log(1 / np.exp(-log_lik).mean(0)).sum()  # plain importance-sampling LOO
        elpd = loo.elpd_loo if is_arviz_0(arviz) else loo.elpd
        assert elpd == pytest.approx(naive, abs=0.3)

    def test_compare(self, data):
        sharp = ImportanceSampler(global_model, global_guide, 4000)(SIGMA / 5, Y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of k, in a model that does not fit
            table = arviz.compare({"given": data, "sharp": sharp.to_arviz(num_samples=300)})
        assert set(table.index) == {"given", "sharp"}
        assert table["rank"].loc[table["elpd_loo" if is_arviz_0(arviz) else "elpd"].idxmax()] == 0

    def test_every_group_of_draws_has_a_summary(self, data):
        for group in ("posterior", "sample_stats", "prior"):
            assert len(arviz.summary(data, group=group, kind="stats"))

    @pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.5), (1.0, 1.0), (2.0, 1.0)])
    def test_the_summary_knows_of_the_weights(self, loc, scale):
        """ESS of draws that repeat particles: that of the weights, as far as there are as many draws."""

        def model():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        def guide():
            pyro.sample("z", dist.Normal(loc, scale))

        samples = ImportanceSampler(model, guide, 1000)()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of k̂, and of a single chain
            summary = arviz.summary(samples.to_arviz(num_samples=1000), round_to="none")
        assert 0.4 < float(summary.loc["z", "ess_bulk"]) / samples.ess.item() < 2

    def test_cells_draw_apart(self):
        """Copies stand side by side in each cell, in an order of its own."""

        def model():
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        def guide():
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Normal(0.5, 1.0))

        data = ImportanceSampler(model, guide, 1000)().to_arviz(num_samples=2000)
        one, other = data.posterior["z"].values[0].T
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2
        for draws in (one, other):
            assert (np.diff(draws) != 0).sum() + 1 == len(set(draws))

    def test_runs_as_chains(self, samples, data):
        other = samples.to_arviz(num_samples=300, coords={"school": ["A", "B", "C"]})
        if is_arviz_0(arviz):
            both = arviz.concat(data, other, dim="chain")
        else:
            shifted = other.map_over_datasets(
                lambda group: group.assign_coords(chain=[1]) if "chain" in group.coords else group
            )
            both = xarray.DataTree.from_dict(
                {
                    name: xarray.concat([data[name].to_dataset(), shifted[name].to_dataset()], "chain")
                    for name in groups(data)
                    if "chain" in data[name].coords
                }
            )
        assert sizes(both["posterior"]["eta"]) == {"chain": 2, "draw": 300, "school": 3}
        assert sizes(both["weight_stats"]["khat"]) == {"chain": 2}
        summary = arviz.summary(both, round_to="none")
        assert (summary["r_hat"].astype(float) < 1.05).all()

    @pytest.mark.filterwarnings("ignore:The (inplace|copy) keyword")  # ArviZ 0.23 is behind pandas 3
    @pytest.mark.skipif(not is_arviz_0(arviz), reason="a DataTree has no to_dataframe")
    def test_to_dataframe(self, data):
        table = data.to_dataframe()
        assert len(table) == 300
        assert ("sample_stats", "lp") in table.columns

    def test_plots(self, data):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        loo = arviz.loo(data, pointwise=True)
        if is_arviz_0(arviz):
            arviz.plot_posterior(data, var_names=["mu"])
            arviz.plot_ppc(data)
        else:
            arviz.plot_dist(data, var_names=["mu"], backend="matplotlib")
            arviz.plot_forest(data, backend="matplotlib")
            arviz.plot_ppc_dist(data, backend="matplotlib")
            arviz.plot_trace(data, var_names=["mu"], backend="matplotlib")
        arviz.plot_khat(loo)
        plt.close("all")

    def test_netcdf_round_trip(self, data, tmp_path):
        data.to_netcdf(str(tmp_path / "posterior.nc"))
        back = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
        assert groups(back) == groups(data)
        for group in groups(data):
            for name, variable in data[group].data_vars.items():
                xarray.testing.assert_equal(back[group][name].load(), variable)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_samples": 0}, "num_samples must be an integer >= 1"),
            ({"dims": {"nu": ["school"]}}, r"dims names \['nu'\], but there are only the sites"),
            ({"dims": {"eta": ["a", "b"]}}, r"gives 2 names \['a', 'b'\] for 'eta', which has 1 dims"),
            (
                {"coords": {"schol": ["A", "B", "C"]}},
                "coords names dim 'schol', but there are only .*'school'",
            ),
            ({"coords": {"school": ["A", "B"]}}, "coords has 2 labels for dim 'school' of size 3"),
        ],
    )
    def test_errors(self, samples, options, message):
        with pytest.raises(ValueError, match=message):
            samples.to_arviz(**{"num_samples": 10, **options})

    def test_names_that_are_taken(self, samples):
        """Of a variable for a dim, and of ArviZ's dims for a site."""
        with pytest.raises(ValueError, match="'mu' is a variable, and by dims= a dim of 'eta' beside it"):
            samples.to_arviz(num_samples=10, dims={"eta": ["mu"]}, log_likelihood=False)
        data = samples.to_arviz(num_samples=10, dims={"eta": ["school_2"]})
        assert sizes(data["posterior"]["eta"])["school_2"] == 3
        named_draw = ImportanceSampler(*[lambda: pyro.sample("draw", dist.Normal(0.0, 1.0))] * 2, 30)()
        with pytest.raises(ValueError, match="Site 'draw' has the name of a dim"):
            named_draw.to_arviz(num_samples=10)

    def test_a_prior_that_cannot_be_sampled(self):
        def model(y):
            mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        samples = ImportanceSampler(model, lambda y: pyro.sample("mu", dist.Normal(y, 1.0)), 30)(Y[0])
        with pytest.raises(ValueError, match=r"ImproperUniform.*Pass prior=False"):
            samples.to_arviz(num_samples=10)
        assert "prior" not in groups(samples.to_arviz(num_samples=10, prior=False))

    def test_a_guide_that_misses_mass(self):
        def model():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        samples = ImportanceSampler(model, lambda: pyro.sample("z", dist.Normal(0.0, 0.3)), 5000)()
        with pytest.warns(RuntimeWarning, match="the guide misses mass of the posterior"):
            samples.to_arviz(num_samples=10)

    def test_without_arviz(self, samples, monkeypatch):
        monkeypatch.setitem(sys.modules, "arviz", None)
        with pytest.raises(ImportError, match=r"pip install 'pyro-iw\[arviz\]'"):
            samples.to_arviz()


def fake_arviz_1(monkeypatch):
    """A module arviz without InferenceData, which it answers for as version 1.1 does."""

    def answer(name):
        if name == "InferenceData":
            warnings.warn("ArviZ now uses xarray's DataTree", FutureWarning, stacklevel=2)
            return xarray.DataTree
        raise AttributeError(name)

    fake = types.ModuleType("arviz")
    fake.__spec__ = importlib.machinery.ModuleSpec("arviz", None)
    fake.__getattr__ = answer
    monkeypatch.setitem(sys.modules, "arviz", fake)


@pytest.mark.skipif(
    importlib.util.find_spec("arviz_stats") is None or not hasattr(xarray, "DataTree"),
    reason="needs what ArviZ 1 does its statistics with, and xarray >= 2024.10",
)
class TestVersionOne:
    def test_it_is_a_datatree(self, samples, monkeypatch):
        fake_arviz_1(monkeypatch)
        assert not is_arviz_0(sys.modules["arviz"])
        tree = samples.to_arviz(num_samples=30)
        assert isinstance(tree, xarray.DataTree)
        assert set(tree.children) >= {"posterior", "sample_stats", "log_likelihood", "prior"}
        assert sizes(tree["posterior"]["eta"]) == {"chain": 1, "draw": 30, "school": 3}

    def test_arviz_stats_works_on_it(self, samples, monkeypatch):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import arviz_stats as stats

            fake_arviz_1(monkeypatch)
            tree = samples.to_arviz(num_samples=300)
            summary = stats.summary(tree, var_names=["mu"], kind="stats", round_to="none")
        assert float(summary.loc["mu", "mean"]) == pytest.approx(
            tree["posterior"]["mu"].values.mean(), abs=1e-6
        )

    @pytest.mark.skipif(not is_arviz_0(arviz), reason="needs version 0 as well")
    def test_both_smooth_alike(self, samples, monkeypatch):
        from pyro_iw.psis import pareto_smoothed

        log_w = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)).double() * 1.5
        old, old_khat = pareto_smoothed(log_w)
        fake_arviz_1(monkeypatch)
        new, new_khat = pareto_smoothed(log_w)
        # They fit slightly different tails; the body is the input itself in both.
        torch.testing.assert_close(new_khat, old_khat, atol=0.05, rtol=0)
        torch.testing.assert_close(new, old, atol=0.2, rtol=0)
