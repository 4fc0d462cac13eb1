"""Resampling: counts against the weights, and the corners where rounding could break it."""

import math

import pytest
import torch

from pyro_iw.resampling import multinomial, systematic

SCHEMES = [systematic, multinomial]


def counts(indices, num_particles):
    """How often each particle was drawn, of shape ``[S, *cells]``, by comparing with all indices."""
    particles = torch.arange(num_particles).reshape(-1, 1, *[1] * (indices.dim() - 1))
    return (indices == particles).sum(1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cells", [(), (3,), (2, 3)], ids=str)
def test_shape_dtype_and_range(scheme, cells):
    indices = scheme(torch.rand(5, *cells), 7)
    assert indices.shape == (7, *cells)
    assert indices.dtype == torch.int64
    assert indices.min() >= 0
    assert indices.max() < 5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_samples", [1, 3, 8])
def test_expected_counts_are_proportional_to_the_weights(scheme, num_samples):
    # 40 000 cells are as many independent draws; 5 standard errors.
    weights = torch.tensor([0.5, 0.0, 2.0, 0.01, 1.3])
    drawn = counts(scheme(weights.unsqueeze(-1).expand(5, 40_000), num_samples), 5).double()
    expected = num_samples * weights.double() / weights.double().sum()
    error = drawn.std(-1) / math.sqrt(40_000)
    assert ((drawn.mean(-1) - expected).abs() <= 5 * error).all()
    assert error.max() < 0.02


def test_systematic_counts_are_the_expected_ones_rounded():
    weights = torch.rand(6, 1000)
    drawn = counts(systematic(weights, 10), 6)
    expected = 10 * weights.double() / weights.double().sum(0)
    assert (drawn >= expected.floor()).all()
    assert (drawn <= expected.ceil()).all()


def test_systematic_draws_ascend_and_use_one_uniform_a_cell():
    weights = torch.ones(4, 1000)
    indices = systematic(weights, 4)
    assert torch.equal(indices, torch.arange(4).unsqueeze(-1).expand(4, 1000))
    single = systematic(weights, 1)
    assert single.unique().tolist() == [0, 1, 2, 3]  # cells have offsets of their own


def test_multinomial_draws_are_independent():
    indices = multinomial(torch.ones(2, 40_000), 2)
    agree = (indices[0] == indices[1]).double().mean()
    assert abs(agree - 0.5) < 5 * 0.5 / 200


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53], ids=["lowest", "highest"])
def test_particles_of_weight_zero_are_never_drawn(scheme, dtype, uniform, monkeypatch):
    """At either end of the interval too, where the last position rounds to the total."""
    real = torch.rand

    def extreme(shape, **kw):
        return torch.full_like(real(shape, **kw), uniform)

    monkeypatch.setattr(torch, "rand", extreme)
    weights = torch.tensor([0.0, 0.1, 0.0, 0.3, 1e-30, 0.0, 0.0], dtype=dtype)
    assert set(scheme(weights, 1000).tolist()) <= {1, 3, 4}
    assert scheme(weights, 3).max() <= 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sums_in_another_order_do_not_draw_particles_of_weight_zero_either(scheme, monkeypatch):
    """As on an accelerator, where running sums need neither ascend nor stay put where nothing is added."""
    real = torch.Tensor.cumsum

    def parallel(tensor, dim):
        jitter = torch.tensor([0.0, 0.02, -0.02, 0.03, 0.01, 0.05], dtype=tensor.dtype)
        return real(tensor, dim) + jitter

    monkeypatch.setattr(torch.Tensor, "cumsum", parallel)
    indices = scheme(torch.tensor([0.3, 0.0, 0.0, 0.4, 0.0, 0.0]), 10_000)
    assert indices.unique().tolist() == [0, 3]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cell_without_weight_gives_its_first_particle(scheme):
    weights = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 2.0]])
    indices = scheme(weights, 6)
    assert torch.equal(indices[:, 0], torch.zeros(6, dtype=torch.int64))
    assert set(indices[:, 1].tolist()) <= {0, 2}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1.0, 1e300])
def test_weights_need_not_be_normalised(scheme, scale):
    torch.manual_seed(0)
    expected = scheme(torch.tensor([[1.0], [3.0], [4.0]], dtype=torch.float64), 20)
    torch.manual_seed(0)
    scaled = scheme(scale * torch.tensor([[1.0], [3.0], [4.0]], dtype=torch.float64), 20)
    assert torch.equal(scaled, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_particles_in_single_precision_keep_their_share(scheme):
    """A running sum in float32 would stop growing: the later half is drawn as often as the earlier."""
    weights = torch.cat([torch.full((1, 1), 2.0**24), torch.ones(2**20, 1)])
    later = (scheme(weights, 2**14) > 2**19).double().mean().item()
    share = 2**19 / (2**24 + 2**20)
    assert later == pytest.approx(share, abs=5 * math.sqrt(share / 2**14))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_neither_nan_nor_infinity_leads_out_of_range(scheme):
    for bad in (math.nan, math.inf):
        indices = scheme(torch.tensor([1.0, bad, 2.0]), 5)
        assert indices.min() >= 0
        assert indices.max() <= 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_samples", [0, -1, 2.5, True, "3"])
def test_bad_numbers_of_samples_are_refused(scheme, num_samples):
    with pytest.raises(ValueError, match="num_samples must be an integer >= 1"):
        scheme(torch.ones(3), num_samples)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3)], ids=str)
def test_no_particles_are_refused(scheme, shape):
    with pytest.raises(ValueError, match="with S >= 1"):
        scheme(torch.ones(shape), 2)


@pytest.mark.parametrize("resample", [systematic, multinomial])
def test_a_single_draw_can_be_gathered_with(resample):
    """The gather of torch 2.4 and 2.5 takes strides (1, 1) of a single row for those of an expanded index."""
    weights, values = torch.rand(4, 5), torch.arange(20.0).reshape(4, 5)
    indices = resample(weights, 1)
    assert indices.stride() == (5, 1)
    assert torch.equal(values.gather(0, indices)[0], values[indices[0], torch.arange(5)])
