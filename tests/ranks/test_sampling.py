"""The importance sampler over ranks: the whole on each of them, and what one process would have drawn."""

import math
import os
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as dist_
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from helpers.ranks import run_on_ranks
from pyro_iw import AnnealedImportanceSampler, ImportanceSampler, LogMarginal
from pyro_iw.bounds import IWAE, MIWAE
from pyro_iw.ranks.exchange import seed_of


def model(x, size=None):
    with pyro.plate("data", len(x) if size is None else size, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x, size=None):
    with pyro.plate("data", len(x) if size is None else size, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(0.4 * x, 0.9))


def exact(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def hierarchical_model(x):
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hierarchical_guide(x):
    mean = pyro.sample("mean", dist.Normal(x.mean(), 0.4))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((mean + x) / 2, 0.8))


X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


def world(**options):
    return {"particle_group": dist_.group.WORLD, "progress": False, **options}


# ----------------------------------------------------------------------------------------------------
# Particles
# ----------------------------------------------------------------------------------------------------


def everything(rank, seeds):
    """What a sampler of 70 particles in chunks of 9 knows, on this rank."""
    torch.manual_seed(seeds[rank])
    sampler = ImportanceSampler(model, guide, 70, chunk_size=9, **world())
    before = torch.get_rng_state()
    value, error, ess = sampler.evidence(X)
    torch.set_rng_state(before)
    samples = sampler(X)
    torch.set_rng_state(before)
    bounded = sampler.log_marginal_dataset([X], bound=MIWAE(M=2, K=3))
    torch.set_rng_state(before)
    corrected = ImportanceSampler(model, guide, 70, chunk_size=9, jackknife=True, **world()).log_marginal(X)
    torch.set_rng_state(before)
    hierarchical = ImportanceSampler(
        hierarchical_model, hierarchical_guide, 70, local="data", num_local=2, chunk_size=9, **world()
    )(X)
    local = hierarchical.local["data"]
    torch.manual_seed(5)  # from here on each rank is by itself
    found = {
        "value": value,
        "error": error,
        "ess": ess,
        "log_p": samples.log_p,
        "log_q": samples.log_q,
        "z": samples.values["z"],
        "khat": samples.khat,
        "posterior": samples.posterior(20)["z"],
        "predictive": samples.predictive(20)(X)["x"],
        "bound": bounded.bounds,
        "gap error": bounded.minus_kl_errors,
        "jackknife": corrected,
        "hierarchical": hierarchical.log_weights,
        "hierarchical z": hierarchical.values["z"],
        "local": local.log_weights,
        "loo": torch.tensor(hierarchical.leave_one_out().elpd),
    }
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_particles_do_not_depend_on_the_number_of_ranks():
    """8 chunks on 1, 2 and 3 ranks, whatever seeds the ranks but the first one have."""
    (whole,) = run_on_ranks(everything, 1, [11])
    for size, seeds in (2, [11, 12]), (3, [11, 11, 11]):
        for got in run_on_ranks(everything, size, seeds):
            for name, truth in whole.items():
                assert torch.allclose(
                    torch.tensor(got[name]), torch.tensor(truth), rtol=1e-12, atol=1e-12
                ), (name, size)

    # The same particles, drawn chunk by chunk without any ranks.
    torch.manual_seed(11)
    seed = int(torch.randint(2**62, ()))
    drawn = []
    for index, size in enumerate([9] * 7 + [7]):
        torch.manual_seed(seed_of(seed, "chunk", index))
        z = 0.4 * X + 0.9 * torch.randn(size, 3, dtype=X.dtype)
        log_q = dist.Normal(0.4 * X, 0.9).log_prob(z)
        drawn.append(dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X) - log_q)
    log_w = torch.cat(drawn)
    whole = {name: torch.tensor(value) for name, value in whole.items()}
    close = {"rtol": 1e-10, "atol": 1e-12}
    assert torch.allclose(whole["log_p"] - whole["log_q"], log_w, **close)
    assert torch.allclose(whole["value"], log_w.exp().mean(0).log(), **close)
    assert torch.allclose(whole["ess"], log_w.exp().sum(0) ** 2 / log_w.exp().square().sum(0), **close)
    groups = log_w[:66].reshape(11, 2, 3, 3).exp().mean(2).log().mean(1)
    assert torch.allclose(whole["bound"], groups.mean(0), **close)
