"""What goes wrong in silence where ranks have data of their own is right, refused, or warned of by name."""

import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as td
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam, PyroOptim
from torch import nn
from torch.distributed import fsdp
from torch.nn.parallel import DistributedDataParallel

from helpers.ranks import run_on_ranks
from pyro_iw import FIVO_ELBO, IWAE_ELBO, AdversarialSVI, FusedOptim

N = 8
X = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)[:, None]


class Model(PyroModule):
    """A decoder of codes in a plate of the data, with features in a plate inside; or in no plate."""

    def __init__(self, full=None, plates=2):
        super().__init__()
        self.net = nn.Linear(1, 1).double()
        self.full, self.plates = full, plates

    def forward(self, x):
        if not self.plates:
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(2), obs=x)
            return
        with pyro.plate("data", self.full or len(x), len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 1, dtype=x.dtype), 1.0))
            with pyro.plate("features", 1, dim=-1):
                pyro.sample("x", dist.Normal(self.net(z), 1.0), obs=x)


class Guide(Model):
    def forward(self, x):
        if not self.plates:
            pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(2))
            return
        with pyro.plate("data", self.full or len(x), len(x), dim=-2):
            pyro.sample("z", dist.Normal(self.net(x), 0.5))


def pair(full=None, plates=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(full, plates), Guide(full, plates)


def outcome(function, *args):
    """The warnings of a function, without numbers of ranks, or its error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function(*args)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return [
        str(one.message)
        for one in caught
        if "draw the same" in str(one.message) or "rank" in str(one.message)
    ]


def shard(rank, size=2):
    return X[rank::size]


def twice(step, *args):
    step(*args)
    step(*args)


class GlobalModel(Model):
    """With a scale that all datapoints share, and a parameter of a ``pyro.param`` statement."""

    def forward(self, x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        shift = pyro.param("shift", torch.tensor(0.0, dtype=x.dtype))
        with pyro.plate("data", self.full or len(x), len(x), dim=-2):
            pyro.sample("x", dist.Normal(self.net(x) + shift, scale), obs=x)


class GlobalGuide(Guide):
    def forward(self, x):
        pyro.sample("scale", dist.LogNormal(self.net(x).mean(), 0.5))


def ddp(rank):
    """What is said of pairs under DDP, by what is special about them, and the gradients at the end."""
    pyro.set_rng_seed(rank)

    def step(model, guide, x=None, divisor=1, **kwargs):
        elbo = DistributedDataParallel(IWAE_ELBO(K=3, **kwargs)(model, guide))
        x = shard(rank) if x is None else x
        twice(lambda: (elbo(x) / divisor).backward())
        return elbo

    lazy = Model(N)
    found = {
        "whole": outcome(step, *pair()),
        "whole, a mean": outcome(step, *pair(), None, 4),
        "minibatch": outcome(step, *pair(N)),
        "same data": outcome(step, *pair(), X),
        "no plate": outcome(step, *pair(None, 0)),
        "global": outcome(step, GlobalModel(), GlobalGuide(), None, 4),
        "lazy": outcome(step, lazy, AutoNormal(lazy, create_plates=_plates)),
    }
    guide = AutoNormal(lazy, create_plates=_plates)
    IWAE_ELBO(K=3)(lazy, guide)(shard(rank))
    found["lazy, run before"] = outcome(step, lazy, guide)
    pyro.set_rng_seed(7)
    found["same seed"] = outcome(step, *pair(N))
    alone = [td.new_group([one]) for one in range(2)][rank]
    found["same seed, particles of one rank"] = outcome(partial(step, particle_group=alone), *pair(N))
    return found, [param.grad.tolist() for param in guide.parameters()]


def _plates(x):
    return pyro.plate("data", N, len(x), dim=-2)


def test_under_ddp():
    (first, gradients), (second, others) = run_on_ranks(ddp, 2)
    assert gradients == others
    assert first == second
    assert "ValueError: DistributedDataParallel does not know the parameters guide.locs.z" in first["lazy"]
    (message,) = first["whole"]
    assert "Plate 'data' takes a rank's data for all there is" in message
    assert "pyro.plate('data', N, len(data))" in message
    (message,) = first["no plate"]
    assert "The model, in which site 'x' is in no plate, takes" in message
    for what in ("same seed", "same seed, particles of one rank"):
        (message,) = first[what]
        assert message.startswith("Ranks 0, 1 draw the same random numbers")
    statement, message = first["global"]
    assert statement.startswith("Parameter 'shift' of a pyro.param statement")
    assert "beside which the prior of 'scale' counts once a rank" in message
    for fine in ("whole, a mean", "minibatch", "same data", "lazy, run before"):
        assert not first[fine]


class OwnOptim(PyroOptim):
    """One that might average gradients, for all that is known."""


def svi(rank):
    pyro.set_rng_seed(rank)
    adam = torch.optim.Adam, {"lr": 0.1}

    def train(optim, full=N, loss=None, silent=False, x=None):
        pyro.clear_param_store()
        if silent:
            warnings.filterwarnings("ignore", "SVI on each of")
        model, guide = pair(full)
        svi = SVI(model, guide, optim, loss=loss or IWAE_ELBO(K=3))
        twice(svi.step, shard(rank) if x is None else x)

    averaged = FusedOptim(*adam, process_group=td.group.WORLD)
    found = {
        "plain": outcome(train, Adam({"lr": 0.1})),
        "fused": outcome(train, FusedOptim(*adam)),
        "silenced": outcome(train, Adam({"lr": 0.1}), N, None, True),
        "own": outcome(train, OwnOptim(*adam)),
        "averaged": outcome(train, averaged),
        "whole": outcome(train, FusedOptim(*adam, process_group=td.group.WORLD), None),
    }

    def train_averaged(*args):
        train(FusedOptim(*adam, process_group=td.group.WORLD), *args)

    found["a rank's N"] = outcome(train_averaged, 4 + 2 * rank, None, False, X[:3])
    found["sizes"] = outcome(train_averaged, N, None, False, X[: 6 - 2 * rank])
    loss = IWAE_ELBO(K=3, kl_weight=lambda steps: 0.5 + 0.25 * steps)
    loss.steps = rank  # as if one rank alone had gone on from a checkpoint
    found["clock"] = outcome(train_averaged, N, loss)
    pyro.set_rng_seed(7)
    # Pyro's own loss looks at nothing; the optimiser sees that all draw the same.
    optim = FusedOptim(*adam, process_group=td.group.WORLD)
    found["same seed"] = outcome(train, optim, N, Trace_ELBO())
    found["same seed again"] = outcome(train, FusedOptim(*adam, process_group=td.group.WORLD))
    return found


def test_under_svi():
    first, second = run_on_ranks(svi, 2)
    assert first == second
    for what in ("plain", "fused"):
        (message,) = first[what]
        assert message.startswith("SVI on each of 2 ranks trains a model of its own")
    for fine in ("silenced", "own", "averaged"):
        assert not first[fine]
    for what, words in {
        "whole": "Plate 'data' takes",
        "a rank's N": "Plate 'data' has the size 4 on rank 0 and 6 on rank 1",
        "sizes": "Plate 'data' has a minibatch of 6 on rank 0 and of 4 on rank 1",
    }.items():
        (message,) = first[what]
        assert message.startswith(words)
    words = "Rank 1 trains with kl_weight after 1 steps, rank 0 with kl_weight after 0 steps"
    assert first["clock"].startswith(f"RankError: {words}")
    for what in ("same seed", "same seed again"):
        (message,) = first[what]
        assert message.startswith("Ranks 0, 1 draw the same random numbers")


def adversarial(rank):
    def train(optims, wrap=lambda module: module):
        pyro.clear_param_store()
        torch.manual_seed(0)
        encoder, decoder, critic = (wrap(nn.Linear(1, 1).double()) for _ in range(3))
        torch.manual_seed(rank)

        def model(x):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        def guide(x):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(encoder(x), event_dim=1))

        twice(AdversarialSVI(model, guide, critic, *optims[:1], **dict(optims[1:])).step, shard(rank))

    def averaged():
        return FusedOptim(torch.optim.Adam, {"lr": 0.1}, process_group=td.group.WORLD)

    found = {
        "plain": outcome(train, [Adam({"lr": 0.1})]),
        "wrapped": outcome(train, [Adam({"lr": 0.1})], DistributedDataParallel),
        "some": outcome(train, [averaged(), ("guide_optim", Adam({"lr": 0.1}))]),
        "averaged": outcome(train, [averaged()]),
    }
    return found, {name: value.tolist() for name, value in pyro.get_param_store().items()}


def test_under_adversarial_svi():
    (first, parameters), (second, others) = run_on_ranks(adversarial, 2)
    assert first == second
    assert parameters == others
    (message,) = first["plain"]
    assert message.startswith("AdversarialSVI on each of 2 ranks trains a model of its own")
    assert first["wrapped"].startswith("ValueError: A DistributedDataParallel is called in AdversarialSVI")
    assert first["some"].startswith("ValueError: The optimiser of phase 'guide' averages no gradients")
    assert not first["averaged"]


def sharded(rank):
    pyro.settings.set(module_local_params=True)
    warnings.simplefilter("ignore")

    def gradients(shard_what, **options):
        model, guide = pair(N)
        elbo = IWAE_ELBO(K=4, **options)(model, guide)
        if shard_what == "inside":
            fsdp.fully_shard(model.net)
            fsdp.fully_shard(guide.net)
        elif shard_what == "whole":
            fsdp.fully_shard(elbo)
        torch.manual_seed(rank)
        elbo(shard(rank)).backward()
        found = {name: param.grad for name, param in elbo.named_parameters()}
        if not shard_what:
            for grad in found.values():
                td.all_reduce(grad)
                grad /= 2
            return found
        return {name: grad.full_tensor() for name, grad in found.items()}

    def numbers(*args, **options):
        return {name: grad.tolist() for name, grad in gradients(*args, **options).items()}

    return {
        "alone": numbers(None, chunk_size=2),
        "whole": numbers("whole", chunk_size=2),
        "inside": numbers("inside", backward_particles=2) and None,
        "chunks": outcome(lambda: gradients("inside", chunk_size=2)),
        "compile": outcome(lambda: gradients("inside", compile=True)),
    }


@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="fully_shard came with PyTorch 2.6")
def test_sharded_layers():
    for found in run_on_ranks(sharded, 2):
        for what, words in (("chunks", "chunk_size"), ("compile", "compile")):
            assert found[what].startswith("ValueError: A FSDPLinear of the model is sharded by itself")
            assert words in found[what]
        for name, grad in found["alone"].items():
            np.testing.assert_allclose(found["whole"][name], grad, rtol=1e-12)


def accumulated(rank):
    """Gradients of two micro-batches, of which the first waits, with the clock of the optimiser."""
    pyro.settings.set(module_local_params=True)
    found = []
    for options in ({}, {"chunk_size": 2}):
        seen = []

        def weight(steps, seen=seen):
            seen.append(steps)
            return min(1.0, 0.5 + steps / 4)

        loss = IWAE_ELBO(K=4, kl_weight=weight, **options)
        elbo = DistributedDataParallel(loss(*pair(N)))
        optim = torch.optim.SGD(elbo.parameters(), 0.01)
        loss.count_steps_of(optim)
        pyro.set_rng_seed(rank)
        for _ in range(2):
            optim.zero_grad()
            with elbo.no_sync():
                (elbo(shard(rank)[:2]) / 2).backward()
            (elbo(shard(rank)[2:]) / 2).backward()
            optim.step()
        state = elbo.state_dict()
        found.append((seen, {name: value.tolist() for name, value in state.items()}))
    return found


def test_accumulated_gradients():
    first, second = run_on_ranks(accumulated, 2)
    assert first == second
    for seen, state in first:
        assert seen == [0, 0, 1, 1]
        assert state["module._extra_state"] == 2


def drifting_filter(rank):
    class Sequence:
        def init(self, state):
            state["z"] = pyro.sample("z_0", dist.Normal(0.0, 1.0))

        def step(self, state, x=None):
            state["z"] = pyro.sample("z", dist.Normal(state["z"], pyro.param("s", torch.tensor(1.0))))
            pyro.sample("x", dist.Normal(state["z"], 1.0), obs=x)

    loss = FIVO_ELBO(K=3)
    svi = SVI(Sequence(), Sequence(), Adam({"lr": 0.1}), loss=loss)
    return outcome(svi.step, torch.zeros(3)), loss.state_dict()
