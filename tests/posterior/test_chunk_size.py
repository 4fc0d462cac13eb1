"""Chunks sized by memory."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_iw.posterior.chunk_size as chunk_size
from pyro_iw import ImportanceSampler
from pyro_iw.posterior.chunk_size import Peak, particles_that_fit


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def test_peak_counts_what_is_alive_at_once():
    with Peak() as peak:
        a = torch.zeros(1000)  # 4 kB
        b = a.reshape(10, 100)  # a view: the same memory
        c = a + 1  # 8 kB
        del a, b
        d = c * 2  # 8 kB
        del c, d
        torch.zeros(100)
    assert peak.history == [4000, 8000, 8000, 400]


def test_particles_that_fit(monkeypatch):
    """Each particle takes 4000 bytes, beside 40 000 that all share and that are more than a few particles."""
    sizes = []

    def run(size):
        sizes.append(size)
        return torch.ones(10_000).sum() + torch.ones(size, 1000)

    monkeypatch.setattr(chunk_size, "_budget", lambda device: 800_000)
    found = particles_that_fit(run, 1000)
    # Two tensors of [size, 1000] are alive at once: 100 fit.
    assert found == 100
    assert max(sizes) < 10
    assert particles_that_fit(run, 150) == 75  # two chunks of one size
    assert particles_that_fit(run, 90) == 90
    assert particles_that_fit(run, 3) == 3
    monkeypatch.setattr(chunk_size, "_budget", lambda device: 1)
    assert particles_that_fit(run, 1000) == 1


@pytest.mark.parametrize("compile", [False, True])
def test_auto_draws_nothing_and_gives_the_same_as_its_chunks(compile, monkeypatch):
    import pyro_iw.compiling.inductor as inductor_module

    monkeypatch.setattr(inductor_module, "inductor", lambda graph, inputs: lambda args: graph(*args))
    monkeypatch.setattr(chunk_size, "_CPU_BUDGET", 20_000)
    x = torch.linspace(-1.0, 1.0, 50)
    sampler = ImportanceSampler(model, guide, 200, chunk_size="auto", compile=compile)
    for _ in range(3):
        pyro.set_rng_seed(0)
        found = sampler.log_marginal(x)
    (size,) = sampler._fits.values()
    assert 2 < size < 200
    pyro.set_rng_seed(0)
    expected = ImportanceSampler(model, guide, 200, chunk_size=size).log_marginal(x)
    torch.testing.assert_close(found, expected)
    sampler.log_marginal(x[:5])
    assert len(sampler._fits) == 2
    assert max(sampler._fits.values()) > size
    assert sampler(x).posterior(10)["z"].shape == (10, 50)
    assert repr(sampler) == "ImportanceSampler(num_particles=200, chunk_size='auto')"


def test_any_other_word_is_refused():
    with pytest.raises(
        ValueError, match="chunk_size must be an integer >= 1, 'auto', or None for all, got 'all'"
    ):
        ImportanceSampler(model, guide, chunk_size="all")


def test_auto_leaves_the_statistics_of_batch_norm_alone():
    """The runs that it measures are none of the evaluation's."""
    norm = torch.nn.BatchNorm1d(1)

    def normed(x):
        loc = norm(x[:, None])[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    ImportanceSampler(model, normed, 10, chunk_size="auto").log_marginal(torch.arange(3.0))
    assert int(norm.num_batches_tracked) == 1
