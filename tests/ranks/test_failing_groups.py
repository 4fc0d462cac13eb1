"""What ranks of a particle group do where one of them is not as the others are: all end, and say which."""

import copy
import datetime
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from pyro.infer import SVI
from torch.distributed.device_mesh import DeviceMesh

from helpers.ranks import names_lost, run_on_ranks
from pyro_iw import (
    FIVO_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    FusedOptim,
    ImportanceSampler,
    LocallyEnhancedELBO,
    RankError,
    check,
)
from pyro_iw.bounds import IWAE, MIWAE
from pyro_iw.gradients.snr import gradient_snr
from pyro_iw.ranks import group as the_group


class Pair:
    def __init__(self, x=None, start=0.4):
        self.x = torch.arange(6.0) if x is None else x
        self.a = torch.tensor(start, requires_grad=True)
        self.fails = False
        self.scale = torch.ones(6)
        self.indices = None

    def plate(self):
        return pyro.plate("data", 6, subsample=self.indices)

    def model(self):
        if self.fails:
            raise KeyError("labels")
        with self.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale[: len(self.x)], validate_args=False), obs=self.x)

    def guide(self):
        with self.plate():
            pyro.sample("z", dist.Normal(self.a, 1.0))


def error_of(pair, loss=None, rank=0, seed=None, steps=1, evaluate="loss_and_grads"):
    loss = loss or IWAE_ELBO(K=4, particle_group=torch.distributed.group.WORLD)
    pyro.set_rng_seed(rank if seed is None else seed)
    try:
        for _ in range(steps):
            pair.a.grad = None
            getattr(loss, evaluate)(pair.model, pair.guide)
            with torch.no_grad():
                pair.a -= 0.1 * pair.a.grad
    except Exception as error:
        assert pair.a.grad is None
        return type(error).__name__, str(error)


def faults(rank):
    """One after another: after an error that all have seen, they can go on."""
    odd, found = rank == 1, {}

    def fault(name, pair, **keywords):
        found[name] = error_of(pair, rank=rank, **keywords)

    x = torch.arange(6.0)
    fault("none", Pair())
    broken = Pair()
    broken.scale[2] = torch.nan if odd else 1.0
    fault("NaN", broken)
    with pyro.validation_enabled(False):
        fault("NaN unvalidated", broken)
    failing = Pair()
    failing.fails = odd
    fault("fails", failing)
    fault("fails in a loss", failing, evaluate="loss")
    fault("data", Pair(x.roll(1) if odd else x))
    fault("parameters", Pair(start=0.5 if odd else 0.4))
    fault("drift", Pair(), steps=2)
    fault("seed", Pair(), seed=7)
    fault("kl_weight", Pair(), loss=IWAE_ELBO(K=4, kl_weight=0.5 + rank, particle_group=group()))
    bound = MIWAE_ELBO(M=2, K=2, particle_group=group()) if odd else IWAE_ELBO(K=4, particle_group=group())
    fault("bound", Pair(), loss=bound)
    fault(
        "estimator", Pair(), loss=IWAE_ELBO(K=4, estimator="stl" if odd else "dreg", particle_group=group())
    )
    given = Pair()
    given.indices, given.x = torch.arange(5).roll(rank), x[:5]
    fault("minibatch", given)
    shapes = Pair()
    shapes.plate = lambda: pyro.plate("data", 5 + rank)
    shapes.x = x[: 5 + rank]
    fault("cells", shapes)
    return found


def group():
    return torch.distributed.group.WORLD


def test_one_that_is_not_as_the_others():
    first, second = run_on_ranks(faults, 2, timeout=60)
    assert first.pop("none") is second.pop("none") is None
    for name in ("NaN", "NaN unvalidated"):
        kind, message = second.pop(name)
        assert kind == "ValueError"
        assert "log-weights are NaN (first at site 'x' (model))" in message
        kind, message = first.pop(name)
        assert kind == "RankError"
        assert "Log-weights are NaN or +inf on rank 1 (2), and none on this rank" in message
    for name in ("fails", "fails in a loss"):
        assert second.pop(name) == ("KeyError", "'labels'")
        assert first.pop(name) == ("RankError", "the log-weights of a step: rank 1 raised KeyError: 'labels'")
    expected = {
        "data": "Rank 1 observes other data than rank 0. The ranks of a particle group share",
        "parameters": "Rank 1 has other parameters than rank 0. All ranks have to begin with the same",
        "drift": "Rank 1 has other parameters than rank 0.",
        "seed": "Rank 1 has drawn the same particles as rank 0",
        "kl_weight": "rank 0 has",
        "bound": "rank 1 has",
        "estimator": "the ranks do not bring the same. rank 0 has",
        "minibatch": "Rank 1 takes other minibatches of its plates than rank 0.",
        "cells": "torch.float32, [10]); rank 1 has",
    }
    assert first == second
    assert first.keys() == expected.keys()
    for name, words in expected.items():
        kind, message = first[name] or (None, "")
        assert kind == "RankError", name
        assert words in message


def dies(rank, how):
    the_group._GRACE = datetime.timedelta(seconds=1)
    loss = IWAE_ELBO(K=4, particle_group=group())
    pair = Pair()
    pyro.set_rng_seed(rank)
    for step in range(3):
        if rank == 1 and step == 2:
            if how == "ends":
                return
            time.sleep(12)
            return
        pair.a.grad = None
        loss.loss_and_grads(pair.model, pair.guide)


@pytest.mark.parametrize("how", ["ends", pytest.param("is stuck", marks=pytest.mark.slow)])
def test_a_rank_that_does_not_come(how):
    start = time.monotonic()
    first, second = run_on_ranks(dies, 2, how, timeout=3, expect_errors=True)
    assert second is None
    assert first[0] == "RankError"
    assert names_lost(first[1], 1), first
    assert time.monotonic() - start < 40


def refusals(rank):
    with pytest.raises(ValueError, match=r"P=2 ranks.* M K = 5 particles of IWAE\(K=5\).* take K=4 or K=6"):
        IWAE_ELBO(K=5, particle_group=group())
    with pytest.raises(ValueError, match=r"With M=3, take K=2"):
        MIWAE_ELBO(M=3, K=1, particle_group=group())
    MIWAE_ELBO(M=3, K=2, particle_group=group())
    with pytest.raises(ValueError, match=r"M K = 1 particles of MIWAE\(M=1, K=1\)"):
        LocallyEnhancedELBO(IWAE(4), "data", particle_group=group())
    LocallyEnhancedELBO(IWAE(4), "data", outer=MIWAE(2, 1), particle_group=group())
    with pytest.raises(ValueError, match="FIVO_ELBO resamples"):
        FIVO_ELBO(K=4, particle_group=group())
    pair = Pair()
    with pytest.raises(ValueError, match="particle_group"):
        gradient_snr(IWAE_ELBO(K=4, particle_group=group()), pair.model, pair.guide)
    for another in torch.distributed.new_group([0]), DeviceMesh("cpu", [0]):
        if rank == 0:
            IWAE_ELBO(K=4, particle_group=another)
            continue
        with pytest.raises(
            ValueError, match=r"particle_group is a group that this process \(rank 1\) is not"
        ):
            IWAE_ELBO(K=4, particle_group=another)


def test_what_cannot_be_divided_is_refused():
    run_on_ranks(refusals, 2)


def copied(rank):
    """A loss of a group that was checked, on one rank alone, and a copy that goes on with the others."""
    pair = Pair()
    loss = IWAE_ELBO(K=4, particle_group=group())
    loss.loss_and_grads(pair.model, pair.guide)
    if rank == 0:
        found = check(pair.model, pair.guide, loss=loss)
        assert found.error is None
        assert found.estimators["dreg"] is None
    other = copy.deepcopy(loss)
    assert other.particle_group is group()
    values = []
    for one in loss, other:
        pyro.set_rng_seed(rank)
        values.append(one.loss(pair.model, pair.guide))
    assert values[0] == values[1]
    return values


def test_checks_and_copies():
    first, second = run_on_ranks(copied, 2)
    assert first == second


def advised(rank):
    """SVI, with the optimiser that the error of drifting parameters names."""

    def model():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(6.0))

    def guide():
        loc = pyro.param("loc", torch.zeros(6))
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(loc, 1.0))

    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1}, process_group=group())
    pyro.set_rng_seed(rank)
    svi = SVI(model, guide, optim, loss=IWAE_ELBO(K=4, particle_group=group()))
    losses = [svi.step() for _ in range(4)]
    results = losses, pyro.param("loc").tolist()
    # One is at its next step while the other has gone on to an evaluation, of which it knows nothing.
    sampler = ImportanceSampler(model, guide, 20, progress=False)
    with pytest.raises(
        RankError, match=r"rank 0 has .*'a gradient step'.*rank 1 has .*the data set"
    ) as caught:
        svi.step() if rank == 0 else sampler.log_marginal_dataset([()], data_group=group())
    return results, str(caught.value).split(": ", 1)[1]


def test_svi_with_the_optimiser_that_errors_name():
    start = time.monotonic()
    first, second = run_on_ranks(advised, 2, timeout=60)
    assert first == second
    assert time.monotonic() - start < 50  # nobody waits for one that knows already
