"""Aggregated posteriors: pairs as the batches give them, MMD by loops and closed forms, Bayes accuracies."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_iw import TwoSamples, aggregated_posterior


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def kernel_by_hand(kernel, a, b, sigma):
    squared = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return 1 / (1 + squared / sigma**2) if kernel == "imq" else math.exp(-squared / (2 * sigma**2))


def h_by_hand(kernel, z, prior, sigma):
    """h as nested lists."""

    def h(i, j):
        within = kernel_by_hand(kernel, z[i], z[j], sigma) + kernel_by_hand(kernel, prior[i], prior[j], sigma)
        across = kernel_by_hand(kernel, z[i], prior[j], sigma) + kernel_by_hand(kernel, z[j], prior[i], sigma)
        return within - across

    return [[h(i, j) for j in range(len(z))] for i in range(len(z))]


def mean_over_distinct(h, size, take):
    values = [take(*indices) for indices in itertools.permutations(range(len(h)), size)]
    return sum(values) / len(values)


def gaussian_mean(m, v, sigma, dim=1):
    """E[k(d)] of the Gaussian kernel for differences d ~ N(m, v) in each of ``dim`` dims."""
    one = (1 + v / sigma**2) ** -0.5 * math.exp(-(m**2) / (2 * (sigma**2 + v)))
    return one**dim


class TestMMD:
    @pytest.mark.parametrize("kernel", ["imq", "gaussian"])
    @pytest.mark.parametrize("chunk_size", [1, 3, 6, 100])
    def test_against_loops(self, kernel, chunk_size):
        torch.manual_seed(1)
        guide, prior, sigma = torch.randn(6, 3), torch.randn(6, 3), 1.3
        guide += torch.linspace(0.0, 3.0, 6).unsqueeze(1)  # rows that differ in their mean h
        h = h_by_hand(kernel, guide.double().tolist(), prior.double().tolist(), sigma)
        mean = mean_over_distinct(h, 2, lambda i, j: h[i][j])
        mean_square = mean_over_distinct(h, 2, lambda i, j: h[i][j] ** 2)
        neighbours = mean_over_distinct(h, 3, lambda i, j, k: h[i][j] * h[i][k])
        squared_mean = mean_over_distinct(h, 4, lambda i, j, k, m: h[i][j] * h[k][m])
        assert neighbours > squared_mean  # or the floor of 0 would hide the term
        variance = (4 * 4 * (neighbours - squared_mean) + 2 * (mean_square - squared_mean)) / (6 * 5)
        result = TwoSamples(guide, prior).mmd(kernel, sigma, chunk_size=chunk_size)
        assert result.squared == pytest.approx(mean, rel=1e-10)
        assert result.standard_error == pytest.approx(math.sqrt(variance), rel=1e-8)
        assert result.bandwidth == sigma

    def test_the_level_against_all_swaps(self):
        torch.manual_seed(2)
        guide, prior = torch.randn(7, 2) + 0.6, torch.randn(7, 2)
        sigma = 1.0
        observed = TwoSamples(guide, prior).mmd("gaussian", sigma, num_permutations=1).squared
        swapped = []
        for flips in itertools.product([False, True], repeat=7):
            where = torch.tensor(flips).unsqueeze(1)
            first, second = torch.where(where, prior, guide), torch.where(where, guide, prior)
            h = h_by_hand("gaussian", first.double().tolist(), second.double().tolist(), sigma)
            swapped.append(mean_over_distinct(h, 2, lambda i, j, h=h: h[i][j]))
        exact = sum(value >= observed - 1e-9 for value in swapped) / len(swapped)
        assert 0.03 < exact < 0.5  # else there is little to compare
        draws = 20_000
        estimate = TwoSamples(guide, prior).mmd("gaussian", sigma, num_permutations=draws, seed=3).p_value
        assert abs(estimate - exact) < 4 * math.sqrt(exact * (1 - exact) / draws)

    @pytest.mark.parametrize(("shift", "scale", "dim"), [(1.0, 1.0, 1), (0.3, 0.5, 2), (0.0, 2.0, 3)])
    def test_closed_form_of_two_normals(self, shift, scale, dim):
        pyro.set_rng_seed(0)
        sigma = 0.8
        expected = (
            gaussian_mean(0.0, 2 * scale**2, sigma, dim)
            + gaussian_mean(0.0, 2.0, sigma, dim)
            - 2 * gaussian_mean(shift, scale**2 + 1, sigma, dim)
        )
        result = TwoSamples(torch.randn(2000, dim) * scale + shift, torch.randn(2000, dim)).mmd(
            "gaussian", sigma, num_permutations=1
        )
        assert expected > 5 * result.standard_error
        assert abs(result.squared - expected) < 4 * result.standard_error

    @pytest.mark.parametrize("shift", [0.0, 0.8])
    def test_estimate_and_variance_are_unbiased(self, shift):
        pyro.set_rng_seed(0)
        results = [
            TwoSamples(torch.randn(30, 1) + shift, torch.randn(30, 1)).mmd(
                "gaussian", 1.0, num_permutations=1
            )
            for _ in range(600)
        ]
        squared = torch.tensor([result.squared for result in results])
        expected = 2 * gaussian_mean(0.0, 2.0, 1.0) - 2 * gaussian_mean(shift, 2.0, 1.0)
        assert abs(squared.mean() - expected) < 4 * squared.std() / math.sqrt(600)
        variances = torch.tensor([result.standard_error for result in results]).square()
        # The spread of 600 values (skewed ones for no shift) is known to about 10 % here. At equality the
        # floor under the variance between rows makes the error larger than it is, never smaller.
        ratio = (variances.mean() / squared.var()).item()
        assert 0.75 < ratio < (1.25 if shift else 2.5)

    @pytest.mark.parametrize("dependent", [False, True])
    def test_the_level_is_uniform_where_both_are_the_same(self, dependent):
        pyro.set_rng_seed(0)
        levels = []
        for _ in range(300):
            common = torch.randn(40, 2) * 3 if dependent else torch.zeros(40, 2)
            samples = TwoSamples(torch.randn(40, 2) + common, torch.randn(40, 2) + common)
            levels.append(samples.mmd(num_permutations=99, seed=len(levels)).p_value)
        for level in (0.1, 0.5):
            share = sum(p <= level for p in levels) / len(levels)
            assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / len(levels))

    def test_what_differs_has_the_smallest_level(self):
        pyro.set_rng_seed(0)
        # The same mean and variance.
        guide = torch.randint(0, 2, (400, 1)) * 2.0 - 1.0 + 0.1 * torch.randn(400, 1)
        result = TwoSamples(guide, torch.randn(400, 1)).mmd(num_permutations=99)
        assert result.p_value == 0.01
        assert result.squared > 4 * result.standard_error

    def test_equal_samples(self):
        values = torch.randn(50, 2)
        result = TwoSamples(values, values.clone()).mmd()
        assert result.squared == pytest.approx(0.0, abs=1e-12)
        assert result.p_value == 1.0

    def test_far_from_the_origin(self):
        torch.manual_seed(0)
        guide, prior = torch.randn(50, 2).double() + 0.5, torch.randn(50, 2).double()
        near, far = TwoSamples(guide, prior).mmd(), TwoSamples(guide + 1e6, prior + 1e6).mmd()
        assert far.squared == pytest.approx(near.squared, rel=1e-6)
        assert far.bandwidth == pytest.approx(near.bandwidth, rel=1e-6)

    def test_the_bandwidth_is_the_median_distance_of_the_prior(self):
        torch.manual_seed(0)
        guide, prior = torch.randn(31, 2) * 7, torch.randn(31, 2)
        distances = [
            math.dist(prior[i].tolist(), prior[j].tolist()) for i, j in itertools.combinations(range(31), 2)
        ]
        assert TwoSamples(guide, prior).mmd().bandwidth == pytest.approx(np.median(distances), rel=1e-6)

    def test_the_bandwidth_of_codes_that_coincide(self):
        codes = torch.eye(2)[torch.randint(0, 2, (60,))]
        assert TwoSamples(codes, codes).mmd().bandwidth == pytest.approx(math.sqrt(2))
        with pytest.raises(ValueError, match=r"All prior draws are the same.*pass bandwidth"):
            TwoSamples(torch.randn(9, 1), torch.ones(9, 1)).mmd()
        assert TwoSamples(torch.randn(9, 1), torch.ones(9, 1)).mmd(bandwidth=1.0).squared > 0

    def test_it_leaves_no_trace(self):
        guide = torch.randn(30, 2, requires_grad=True)
        samples = TwoSamples(guide, torch.randn(30, 2))
        before, state = guide.detach().clone(), torch.get_rng_state()
        assert samples.mmd() == samples.mmd()
        assert samples.mmd(seed=1).p_value != samples.mmd(num_permutations=3).p_value
        torch.testing.assert_close(guide.detach(), before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), state)
        assert guide.grad is None

    def test_what_makes_no_sense_is_refused(self):
        samples = TwoSamples(torch.randn(9, 2), torch.randn(9, 2))
        with pytest.raises(ValueError, match="kernel must be one of 'imq', 'gaussian', got 'rbf'"):
            samples.mmd("rbf")
        for bandwidth in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="bandwidth must be positive"):
                samples.mmd(bandwidth=bandwidth)
        with pytest.raises(ValueError, match="num_permutations"):
            samples.mmd(num_permutations=0)
        with pytest.raises(ValueError, match="chunk_size"):
            samples.mmd(chunk_size=0)
        with pytest.raises(ValueError, match="only 3 pairs, but the variance of MMD² needs 4"):
            TwoSamples(torch.randn(3, 2), torch.randn(3, 2)).mmd()


class Recorder:
    """Remembers what it is given and predicts as told."""

    def __init__(self, predict=None):
        self.seen = {}
        self._predict = predict

    def fit(self, values, labels):
        self.seen["train"] = values, labels

    def predict(self, values):
        self.seen["test"] = values
        return (values[:, 0] > 0).astype(int) if self._predict is None else self._predict(values)


class TestClassifierAccuracy:
    @pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
    def test_bayes_accuracy_of_two_normals(self, shift):
        pyro.set_rng_seed(0)
        result = TwoSamples(torch.randn(2500, 1) + shift, torch.randn(2500, 1)).classifier_accuracy()
        bayes = normal_cdf(shift / 2)
        error = math.sqrt(bayes * (1 - bayes) / 2500)
        assert result.num_held_out == 2500
        # A learnt classifier may miss the best threshold by a little.
        assert bayes - 4 * error - 0.01 < result.accuracy < bayes + 4 * error

    def test_a_difference_that_no_line_finds(self):
        pyro.set_rng_seed(0)
        prior = torch.randn(1500, 2)
        angle = torch.rand(1500, 1) * 2 * math.pi
        # A ring of radius √2: mean and covariance are the prior's.
        ring = math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], 1)
        assert TwoSamples(ring, prior).classifier_accuracy().accuracy > 0.85

    def test_half_where_both_are_the_same(self):
        pyro.set_rng_seed(0)
        result = TwoSamples(torch.randn(1000, 3), torch.randn(1000, 3)).classifier_accuracy()
        assert result.standard_error == pytest.approx(0.5 / math.sqrt(1000))
        assert abs(result.accuracy - 0.5) < 4 * result.standard_error

    def test_any_classifier(self):
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        pyro.set_rng_seed(0)
        samples = TwoSamples(torch.randn(2500, 1) + 1.0, torch.randn(2500, 1))
        result = samples.classifier_accuracy(LinearDiscriminantAnalysis())
        assert abs(result.accuracy - normal_cdf(0.5)) < 4 * result.standard_error

    def test_pairs_stay_together_and_the_guide_is_class_one(self):
        # Row i is ±(i + 1): the guide's is positive.
        rows = torch.arange(1, 32).double().unsqueeze(1)
        judge = Recorder()
        result = TwoSamples(rows, -rows).classifier_accuracy(judge, seed=4)
        values, labels = judge.seen["train"]
        test = judge.seen["test"]
        assert values.shape == (30, 1)
        assert test.shape == (32, 1)
        assert ((values[:, 0] > 0) == (labels == 1)).all()
        for side in (values, test):
            assert sorted(side[side > 0]) == sorted(-side[side < 0])
        assert set(np.abs(values[:, 0])) | set(np.abs(test[:, 0])) == set(range(1, 32))
        assert not set(np.abs(values[:, 0])) & set(np.abs(test[:, 0]))
        assert sorted(np.abs(values[:15, 0])) != list(range(1, 16))  # at random
        assert result == (1.0, pytest.approx(math.sqrt(1 / (4 * 32))), 32)
        turned = Recorder(lambda values: (values[:, 0] < 0).astype(int))
        assert TwoSamples(rows, -rows).classifier_accuracy(turned).accuracy == 0.0

    def test_a_seed_gives_one_result_and_spends_no_randomness(self):
        samples = TwoSamples(torch.randn(100, 2).requires_grad_(), torch.randn(100, 2) + 0.3)
        state = torch.get_rng_state()
        assert samples.classifier_accuracy() == samples.classifier_accuracy()
        assert len({samples.classifier_accuracy(seed=seed).accuracy for seed in range(4)}) > 1
        assert torch.equal(torch.get_rng_state(), state)

    def test_what_makes_no_sense_is_refused(self):
        samples = TwoSamples(torch.randn(30, 2), torch.randn(30, 2))
        with pytest.raises(ValueError, match="only 19 pairs, but an accuracy needs 20"):
            TwoSamples(torch.randn(19, 2), torch.randn(19, 2)).classifier_accuracy()
        with pytest.raises(TypeError, match="object has no fit and no predict"):
            samples.classifier_accuracy(object())
        with pytest.raises(
            ValueError, match=r"0 or 1 for each of 30 rows, but gave values of shape \(30, 2\)"
        ):
            samples.classifier_accuracy(Recorder(lambda values: values))
        with pytest.raises(ValueError, match="0 or 1 for each of 30 rows"):
            samples.classifier_accuracy(Recorder(lambda values: values[:, 0]))

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.neural_network", None)
        samples = TwoSamples(torch.randn(30, 2), torch.randn(30, 2))
        with pytest.raises(ImportError, match=r"default classifier.*needs sklearn.*pyro-iw\[examples\]"):
            samples.classifier_accuracy()
        assert samples.classifier_accuracy(Recorder()).num_held_out == 30


class TestTwoSamples:
    def test_what_makes_no_sense_is_refused(self):
        good = torch.randn(5, 2)
        with pytest.raises(ValueError, match=r"guide must be of shape \[N, D\], not empty, but has \(5,\)"):
            TwoSamples(good[:, 0], good)
        with pytest.raises(ValueError, match=r"prior must be of shape \[N, D\], not empty, but has \(0, 2\)"):
            TwoSamples(good, good[:0])
        with pytest.raises(ValueError, match=r"guide has shape \(5, 2\) and prior \(4, 2\)"):
            TwoSamples(good, good[:4])
        bad = good.clone()
        bad[3, 1] = math.nan
        bad[4, 0] = math.inf
        with pytest.raises(ValueError, match=r"2 of 5 draws of the guide .* \(first in row 3\)"):
            TwoSamples(bad, good)
        with pytest.raises(ValueError, match="2 of 5 draws of the prior"):
            TwoSamples(good, bad)

    def test_repr(self):
        assert repr(TwoSamples(torch.randn(5, 2), torch.randn(5, 2))) == "TwoSamples(N=5, D=2)"


def pair_of(prior, posterior):
    """A pair over one plate, its distributions given as functions of the data."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x))
            pyro.sample("x", dist.Normal(z.flatten(1).sum(1) if z.dim() > 1 else z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    return model, guide


class TestAggregatedPosterior:
    def test_moments_of_a_conjugate_pair(self):
        pyro.set_rng_seed(0)
        # x ~ N(0, 2), z | x ~ N(x/2, 1/2): the exact posterior's aggregate is the prior.
        model, guide = pair_of(
            lambda x: dist.Normal(torch.zeros(len(x)), 1.0), lambda x: dist.Normal(x / 2, 0.5**0.5)
        )
        loader = DataLoader(torch.randn(2500) * 2**0.5, batch_size=300)
        both = aggregated_posterior(model, guide, loader)
        assert list(both) == ["z"]
        for values in (both["z"].guide, both["z"].prior):
            assert values.shape == (2500, 1)
            assert abs(values.mean()) < 4 / math.sqrt(2500)
            assert abs(values.var() - 1) < 4 * math.sqrt(2 / 2500)
        assert abs(torch.corrcoef(torch.cat([both["z"].guide, both["z"].prior], 1).T)[0, 1]) < 4 / 2500**0.5
        assert abs(both["z"].classifier_accuracy().accuracy - 0.5) < 4 * 0.5 / math.sqrt(2500)
        assert both["z"].mmd().p_value > 0.01

    def test_rows_are_the_datapoints_in_order(self):
        data = torch.arange(10.0)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(x.unsqueeze(1) ** 2, event_dim=1))

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(100 + x.unsqueeze(1), 0.001).to_event(1))
                pyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x)

        both = aggregated_posterior(model, guide, data.split(4))["z"]
        torch.testing.assert_close(both.guide[:, 0], data**2)
        torch.testing.assert_close(both.prior[:, 0], 100 + data, rtol=0, atol=0.01)

    def test_batches_of_every_kind(self):
        data, labels = torch.arange(6.0), torch.arange(6)
        model, guide = pair_of(lambda x: dist.Normal(x, 1.0), lambda x: dist.Delta(x))
        loader = DataLoader(TensorDataset(data, labels), batch_size=4)
        for batches, to_args in (
            ([data], None),
            ([(data[:3],), [data[3:]]], None),
            ([{"x": data}], None),
            (loader, lambda batch: batch[0]),
            ((part for part in data.split(2)), None),
        ):
            both = aggregated_posterior(model, guide, batches, to_args=to_args)["z"]
            torch.testing.assert_close(both.guide[:, 0], data)

    def test_model_and_guide_see_one_minibatch(self):
        data = torch.arange(50.0)

        def run(fn):
            with pyro.plate("data", 50, subsample_size=7) as rows:
                return fn(data[rows])

        def model():
            run(lambda x: pyro.sample("z", dist.Normal(x, 1e-4)))

        def guide():
            run(lambda x: pyro.sample("z", dist.Delta(x)))

        both = aggregated_posterior(model, guide, [()] * 5)["z"]
        assert both.guide.shape == (35, 1)
        torch.testing.assert_close(both.guide, both.prior, rtol=0, atol=1e-2)
        assert not torch.equal(both.guide[:7], both.guide[7:14])

    def test_sites_of_every_shape(self):
        def sites(x, is_guide):
            with pyro.plate("outer", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(3, len(x), 2, 2), 1.0).to_event(2))
                y = dist.Delta(torch.ones(3, len(x), 4) / 4, event_dim=1)
                pyro.sample("y", y if is_guide else dist.OneHotCategorical(torch.ones(4)))
                pyro.sample("k", dist.Categorical(torch.ones(5)))
                if not is_guide:
                    pyro.sample("mixture", dist.Categorical(torch.ones(3)))
                    pyro.sample("x", dist.Normal(z.sum((-1, -2)), 1.0), obs=x)

        def model(x):
            sites(x, False)

        def guide(x):
            with pyro.plate("noises", len(x)):
                pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            sites(x, True)

        both = aggregated_posterior(model, guide, [torch.zeros(5), torch.zeros(2)])
        assert {name: tuple(value.guide.shape) for name, value in both.items()} == {
            "z": (21, 4),
            "y": (21, 4),
            "k": (21, 1),
        }
        for values in both.values():
            assert values.guide.shape == values.prior.shape
            assert values.guide.dtype == values.prior.dtype == torch.float32
        assert (both["y"].guide == 0.25).all()
        assert (both["y"].prior.sum(1) == 1).all()
        assert (both["y"].prior.max(1).values == 1).all()
        assert list(aggregated_posterior(model, guide, [torch.zeros(5)], sites=["k", "z"])) == ["k", "z"]

    def test_masked_cells_are_left_out_of_both(self):
        x = torch.arange(6.0)
        in_model, in_guide = torch.tensor([1, 1, 0, 1, 1, 1]).bool(), torch.tensor([0, 1, 1, 1, 1, 0]).bool()
        model, guide = pair_of(lambda x: dist.Normal(x, 1e-4), lambda x: dist.Delta(x))
        pair = poutine.mask(model, mask=in_model), poutine.mask(guide, mask=in_guide)
        both = aggregated_posterior(*pair, [x])["z"]
        for values in (both.guide, both.prior):
            torch.testing.assert_close(values[:, 0], torch.tensor([1.0, 3.0, 4.0]), rtol=0, atol=1e-2)
        inside = pair_of(lambda x: dist.Normal(x, 1.0).mask(in_model), lambda x: dist.Delta(x).mask(in_guide))
        torch.testing.assert_close(aggregated_posterior(*inside, [x])["z"].guide, x[[1, 3, 4]].unsqueeze(1))
        with pytest.raises(ValueError, match="Every cell of site 'z' is masked"):
            aggregated_posterior(poutine.mask(model, mask=False), guide, [x])
        with pytest.raises(ValueError, match=r"mask at site 'z' has shape \(4,\)"):
            aggregated_posterior(model, poutine.mask(guide, mask=torch.ones(4).bool()), [x])

    def test_autoguides(self):
        model, _ = pair_of(lambda x: dist.Normal(torch.zeros(len(x)), 1.0), lambda x: None)
        for make in (AutoNormal, AutoNormalMessenger):
            both = aggregated_posterior(model, make(model), [torch.randn(8)])["z"]
            assert both.guide.shape == both.prior.shape == (8, 1)
            assert not torch.equal(both.guide, both.prior)

    def test_no_gradients_and_modes_as_they_are(self):
        encoder = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
        model, guide = pair_of(
            lambda x: dist.Normal(torch.zeros(len(x)), 1.0),
            lambda x: dist.Delta(encoder(x.unsqueeze(1))[:, 0]),
        )
        data = torch.ones(200)
        both = aggregated_posterior(model, guide, [data])["z"]
        assert not both.guide.requires_grad
        assert encoder.training
        assert 0 < (both.guide == 0).sum() < 200  # dropped out
        encoder.eval()
        values = aggregated_posterior(model, guide, [data])["z"].guide
        assert (values == values[0]).all()
        assert not encoder.training
        assert all(parameter.grad is None for parameter in encoder.parameters())

    def test_nothing_is_recorded_for_gradients(self):
        codes = torch.randn(6, requires_grad=True)
        recorded = []

        def posterior(x):
            recorded.append(torch.is_grad_enabled())
            return dist.Delta(codes)

        both = aggregated_posterior(*pair_of(lambda x: dist.Normal(x, 1.0), posterior), [torch.zeros(6)])["z"]
        assert recorded == [False]
        assert not both.guide.requires_grad

    def test_what_makes_no_sense_is_refused(self):
        x = torch.randn(5)
        model, guide = pair_of(lambda x: dist.Normal(torch.zeros(len(x)), 1.0), lambda x: dist.Delta(x))

        def refused(match, model=model, guide=guide, batches=(x,), sites=None):
            with pytest.raises(ValueError, match=match):
                aggregated_posterior(model, guide, batches, sites)

        refused(r"no sample site 'w'.*share the latent sites \['z'\]", sites=["w"])
        refused("'x' cannot be compared: the guide leaves it out", sites=["x"])
        refused(r"sites must be a sequence of names, such as \['z'\]", sites="z")
        refused("gives single datapoints", batches=x)
        refused("No batch was given", batches=())
        refused("The guide has no latent site", guide=lambda x: None)

        def with_extra(x):
            guide(x)
            pyro.sample("extra", dist.Normal(0.0, 1.0))

        refused("'extra' cannot be compared: the guide has it and the model has not", guide=with_extra)
        fixed = pyro.condition(model, data={"z": x})
        refused("'z' cannot be compared: it is observed in the model", model=fixed)
        refused("observed in the guide", guide=pyro.condition(guide, data={"z": x}), sites=["z"])
        wide = pair_of(lambda x: dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1), lambda x: None)[0]
        refused(
            r"'z' has batch shape \(5,\) and event shape \(\) in the guide, but \(5,\) and \(3,\)", model=wide
        )
        refused(
            "Site 'z': 5 of 5 draws of the guide hold a NaN",
            guide=pair_of(lambda x: None, lambda x: dist.Delta(x * math.nan, validate_args=False))[1],
        )
        growing = lambda x, k: dist.Normal(torch.zeros(len(x), k), 1.0).to_event(1)  # noqa: E731
        sizes = {4: 1, 5: 2}
        pair = pair_of(lambda x: growing(x, sizes[len(x)]), lambda x: growing(x, sizes[len(x)]))
        refused(r"'z' has values of \[1, 2\] elements", *pair, batches=[x, x[:4]])

        def alone(x):
            pyro.sample("z", dist.Normal(0.0, 1.0))

        refused("'z' lies in no plate", model=alone, guide=alone)
