"""Ranks that average gradients take the steps of one process on the data of all, and stop together."""

import datetime
import os
import signal
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as td
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from helpers.ranks import names_lost, run_on_ranks
from helpers.shards import Pair, batch, parameters
from pyro_iw import IWAE_ELBO, AdversarialSVI, FusedOptim
from pyro_iw.ranks import gradients
from pyro_iw.ranks import group as the_group

OPTIMISERS = [
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, {"clip_norm": 0.5}),
    (torch.optim.Adam, {"lr": 0.1}, None),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}, {"clip_value": 0.2}),
]


def train(optim, steps, rank=0, size=1, seed=0):
    """Train a new pair from where the param store is."""
    pair = Pair(seed)
    svi = SVI(pair.model, pair.guide, optim, loss=IWAE_ELBO(K=3))
    pyro.set_rng_seed(rank)
    for step in steps:
        svi.step(*batch(step, rank, size))
    return parameters()


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


def all_optimisers(rank, size, bucket):
    gradients._BUCKET = bucket
    found = []
    for constructor, options, clip in OPTIMISERS:
        pyro.clear_param_store()
        optim = FusedOptim(constructor, options, clip, process_group=td.group.WORLD)
        found.append(train(optim, range(5), rank, size))
    return found


@pytest.mark.parametrize(("size", "bucket"), [(2, 1), (4, 2**20)])
def test_equals_one_process_on_all_data(size, bucket):
    """With a parameter that one rank alone uses, one that comes later, momentum, and clipping afterwards."""
    by_rank = run_on_ranks(all_optimisers, size, size, bucket)
    for i, (constructor, options, clip) in enumerate(OPTIMISERS):
        pyro.clear_param_store()
        expected = train(FusedOptim(constructor, options, clip), range(5))
        assert {"shift", "late"} <= expected.keys()
        for found in by_rank:
            assert_close(found[i], expected)
            assert found[i] == by_rank[0][i]  # to the bit


def checkpoint(values, optim):
    """Parameters and state with arrays for tensors."""
    as_array = lambda leaf: leaf.numpy() if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
    return values, torch.utils._pytree.tree_map(as_array, optim.get_state())


def resumed(rank, size, saved):
    """Three steps from the beginning, or two more from a checkpoint."""
    group = td.group.WORLD if size > 1 else None
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1}, process_group=group)
    if saved is None:
        return checkpoint(train(optim, range(3), rank, size), optim)
    values, state = saved
    as_tensor = lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf  # noqa: E731
    optim.set_state(torch.utils._pytree.tree_map(as_tensor, state))
    pyro.clear_param_store()
    pair = Pair()
    IWAE_ELBO(K=3).loss(pair.model, pair.guide, *batch(2))  # makes the parameters
    for name, param in pyro.get_param_store().named_parameters():
        param.data.copy_(torch.tensor(values[name]).reshape(param.shape))
    svi = SVI(pair.model, pair.guide, optim, loss=IWAE_ELBO(K=3))
    pyro.set_rng_seed(rank)
    for step in (3, 4):
        svi.step(*batch(step, rank, size))
    return checkpoint(parameters(), optim)


def test_a_checkpoint_goes_on_with_another_number_of_ranks():
    expected = resumed(0, 1, resumed(0, 1, None))[0]
    saved = run_on_ranks(resumed, 2, 2, None)
    for values, _ in run_on_ranks(resumed, 4, 4, saved[1]):
        assert_close(values, expected)
    assert_close(resumed(0, 1, saved[0])[0], expected)


def other_starts(rank, size):
    optim = FusedOptim(torch.optim.SGD, {"lr": 0.01}, process_group=td.group.WORLD)
    pair = Pair(seed=rank)
    svi = SVI(pair.model, pair.guide, optim, loss=IWAE_ELBO(K=3))
    pyro.set_rng_seed(rank)
    found = []
    for step in range(3):
        svi.step(*batch(step, rank, size))
        found.append(parameters())
    return found


def test_ranks_that_begin_elsewhere_begin_where_the_first_does():
    by_rank = run_on_ranks(other_starts, 2, 2)
    assert by_rank[0] == by_rank[1]
    # The first step is one of rank 0 on its half of the data. What only rank 1 has stands where it began.
    pair = Pair(0)
    svi = SVI(pair.model, pair.guide, FusedOptim(torch.optim.SGD, {"lr": 0.01}), loss=IWAE_ELBO(K=3))
    svi.step(*batch(0, 0, 2))
    assert_close(by_rank[0][0], {**parameters(), "shift": [Pair(1).start[2].item()]})


def step_of(model, optim):
    """The parameters after one step of a model alone, or the error."""
    try:
        SVI(model, lambda: None, optim, loss=Trace_ELBO()).step()
    except Exception as error:
        return type(error).__name__, str(error)
    return parameters()


def contradictions(rank):
    """What comes of ranks that differ in what has to be the same, by what that is."""
    warnings.simplefilter("ignore")

    def optimiser(lr=0.1, kind=torch.optim.Adam, clip=None):
        pyro.clear_param_store()
        return FusedOptim(kind, {"lr": lr}, clip, process_group=td.group.WORLD)

    def one(length=2, nan=False):
        a = pyro.param("a", torch.ones(length))
        pyro.factor(
            "one", -(a.sum() + ((a - 1.0) ** 2).sqrt().sum() if nan else a.sum())
        )  # of gradient 1 / 0

    def module():
        one()
        if rank == 1:
            pyro.factor("two", -pyro.module("net", nn.Linear(1, 1))(torch.ones(1)).sum())

    def sparse():
        table = pyro.param("table", torch.zeros(4, 1))
        rows = nn.functional.embedding(torch.tensor([rank, 3]), table, sparse=True)
        pyro.factor("rows", -rows.sum())

    found = {"options": step_of(one, optimiser(0.1 + rank))}
    found["kinds"] = step_of(one, optimiser(kind=[torch.optim.Adam, torch.optim.Adamax][rank]))
    found["clipping"] = step_of(one, optimiser(clip={"clip_norm": 1.0 + rank}))
    optim = optimiser()
    step_of(one, optim)
    optim.optimizer.param_groups[0]["lr"] = 0.2 + rank
    found["rates"] = step_of(one, optim)
    found["shapes"] = step_of(lambda: one(2 + rank), optimiser())
    found["module"] = step_of(module, optimiser())
    found["nan"] = step_of(lambda: one(nan=rank == 1), optimiser())
    found["order"] = step_of(one, [optimiser(), optimiser()][rank])
    optim = optimiser()
    step_of(one, optim)
    state = optim.get_state()
    optim = optimiser()
    if rank == 1:
        optim.set_state(state)
    found["state"] = step_of(one, optim)
    try:
        optimiser()([torch.ones(2, requires_grad=True)])
    except ValueError as error:
        found["nameless"] = type(error).__name__, str(error)
    found["fine"] = step_of(one, optimiser())
    pyro.clear_param_store()
    options = {"lr": 1.0, "foreach": False}  # kernels for sparse gradients
    optim = FusedOptim(torch.optim.SGD, options, process_group=td.group.WORLD)
    found["sparse"] = step_of(sparse, optim)
    return found


def test_contradictions_are_named():
    first, second = run_on_ranks(contradictions, 2)
    for found in (first, second):
        assert found.pop("fine") == {"a": pytest.approx([0.9, 0.9])}
        assert found.pop("sparse") == {"table": [-0.5, -0.5, 0.0, -1.0]}
    for found in (first, second):
        name, message = found.pop("nameless")
        assert name == "ValueError"
        assert "DistributedDataParallel(loss(model, guide))" in message
        assert {name for name, _ in found.values()} == {"RankError"}
    words = {
        "nan": "On rank 1 the gradient of parameter 'a' is not finite",
        "rates": "Rank 0 has the learning rates [0.2], rank 1 [1.2]",
        "shapes": "'a' is [2] of torch.float32 on rank 0 and [3] of torch.float32 on rank 1",
        "module": "'net$$$bias' of a module is used by rank 1, and rank 0 has not registered it",
        "order": "rank 0 brings those of optimiser 8, rank 1 those of optimiser 9",
    }
    for what in ("options", "kinds", "clipping", "state"):
        words[what] = "'a' has another optimiser, or another state or other options of it"
    for what, expected in words.items():
        assert expected in first[what][1]
        assert second[what][1] == first[what][1]


def batch_norms(rank, size):
    """Statistics of a network and of a critic in training, and parameters, after SVI and AdversarialSVI."""
    x = torch.randn(6, 1, generator=torch.Generator().manual_seed(rank)) + rank
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1))
    critic = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    labels = nn.Linear(1, 1)
    torch.manual_seed(rank)

    def model(x):
        with pyro.plate("data", 12, len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * pyro.param("slope", torch.tensor(1.0)), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", 12, len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    def supervised(x, y):
        pyro.module("labels", labels)
        with pyro.plate("labelled", len(x)):
            pyro.sample("y", dist.Normal(labels(x), 1.0).to_event(1), obs=y)

    optim = FusedOptim(torch.optim.Adam, {"lr": 0.05}, process_group=td.group.WORLD)
    svi = SVI(model, guide, optim, loss=IWAE_ELBO(K=1))
    for _ in range(3):
        svi.step(x)
    expected = encoder[1].running_mean.clone()
    encoder.train()
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.05}, process_group=td.group.WORLD)
    pyro.module("labels", labels)
    svi = AdversarialSVI(model, guide, critic, optim, supervised=supervised)
    for step in range(3):
        svi.step(x, labelled=(x, x + 1.0) if rank == 1 and step != 1 else None)
    numbers = [encoder[1].running_mean, encoder[1].running_var, critic[1].running_mean, critic[1].running_var]
    return [expected.tolist(), *(one.tolist() for one in numbers), parameters()]


def test_batch_norms_and_adversarial_training():
    first, second = run_on_ranks(batch_norms, 2, 2)
    assert first == second
    assert {"labels$$$weight", "discriminator.z$$$0.weight", "slope"} <= first[-1].keys()
    # Three steps of momentum 0.1 towards the mean of the ranks' means.
    assert 0.0 < abs(first[0][0]) < 3.0


def falls_silent(rank, how):
    """A rank whose loss is NaN in its second step, or that ends in it."""
    the_group._GRACE = datetime.timedelta(seconds=1)
    pair = Pair()
    optim = FusedOptim(torch.optim.Adam, {"lr": 0.1}, process_group=td.group.WORLD)
    svi = SVI(pair.model, pair.guide, optim, loss=IWAE_ELBO(K=3))
    pyro.set_rng_seed(rank)
    for step in range(3):
        x, noise, _ = batch(step, rank, 4)
        if rank == 2 and step == 1:
            if how == "dead":
                os.kill(os.getpid(), signal.SIGKILL)
            x = x * float("nan")
        svi.step(x, noise, step)


@pytest.mark.parametrize("how", ["nan", "dead"])
def test_all_ranks_end_with_one_that_fails(how):
    answers = run_on_ranks(falls_silent, 4, how, expect_errors=True)
    failed = answers.pop(2)
    assert failed is None if how == "dead" else failed[0] == "ValueError"
    for name, message in answers:
        assert name == "RankError"
        assert names_lost(message, 2) if how == "dead" else "rank 2 raised ValueError" in message, message
