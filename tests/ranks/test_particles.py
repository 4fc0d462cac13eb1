"""Particles divided among ranks: the loss and the gradients of one process on the same draws."""

import math

import pyro
import pyro.distributions
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import pyro_iw
from helpers import two_levels as hierarchy
from helpers.chains import Chain
from helpers.groups import FromTensor, Powers, averaged
from helpers.ranks import run_on_ranks
from helpers.recorded import Draws, joined
from helpers.steps import value_and_grads
from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, TVO_ELBO, VR_ELBO, LocallyEnhancedELBO
from pyro_iw.bounds import IWAE, MIWAE, PIWAE

M, K = 2, 4


LOSSES = {
    "IWAE": lambda **kw: IWAE_ELBO(K=M * K, **kw),
    "MIWAE": lambda **kw: MIWAE_ELBO(M=M, K=K, **kw),
    "ELBO": lambda **kw: MIWAE_ELBO(M=M * K, K=1, **kw),
    "CIWAE": lambda **kw: CIWAE_ELBO(K=M * K, beta=0.3, **kw),
    "PIWAE": lambda **kw: PIWAE_ELBO(M=M, K=K, **kw),
    "VR": lambda **kw: VR_ELBO(alpha=0.3, K=M * K, **kw),
    "TVO": lambda **kw: TVO_ELBO(K=M * K, partitions=(0.0, 0.2, 1.0), **kw),
    "own": lambda **kw: pyro_iw.ImportanceWeightedELBO(Powers(M=M, K=K), **kw),
}
PATHS, SCORES = ["reparam", "stl", "dreg"], ["score", "vimco", "ovis", "rws"]


class Pair(Chain):
    """A chain whose minibatch can be given."""

    given = None

    def plate(self):
        if self.given is None:
            return super().plate()
        return pyro.plate("data", 9, subsample=self.given, dim=-1)


def step(pair, make, draws=(), seed=0):
    """A step's loss and gradients, on these draws if any are given; and what was drawn, in order."""
    loss = make()
    torch.manual_seed(100 + seed)
    Draws.give()
    loss.loss(pair.model, pair.guide)  # which gets to know the pair
    pair.indices.clear()
    Draws.give(list(draws))
    torch.manual_seed(seed)
    value, gradients = pair.gradients(loss)
    return value, gradients, list(Draws.made)


def check(mesh, make, data_rank=0, chunk_size=None, vectorize=True, subsample=True, given=False, **options):
    """One step of the group, and one of a process on the draws of all its ranks."""
    size = mesh.size()
    pair = Pair(subsample=subsample, **options)
    with torch.no_grad():
        pair.x += data_rank
    own = M * K // size
    sizes = [own]
    if chunk_size is not None:
        sizes = [min(chunk_size, own - start) for start in range(0, own, chunk_size)]
    keywords = {"chunk_size": chunk_size, "vectorize_particles": vectorize}
    seed = data_rank + 10 * mesh.get_local_rank()
    grouped = lambda: make(particle_group=mesh, **keywords)  # noqa: E731
    value, gradients, draws = step(pair, grouped, seed=seed)
    if given:  # so that nothing else but the choice of particles is drawn
        value, gradients, draws = step(pair, grouped, draws, seed)
    indices = pair.indices[0]
    assert all(torch.equal(indices, each) for each in pair.indices)
    if len(sizes) > 1:
        draws = draws[: len(draws) // 2]
    draws = joined(draws, sizes, pair.num_sites, vectorize)
    everyone = [None] * size
    dist.all_gather_object(everyone, (draws, indices.tolist()), group=mesh.get_group())
    assert all(indices == everyone[0][1] for _, indices in everyone)
    if vectorize:
        draws = [torch.cat(site) for site in zip(*(draws for draws, _ in everyone), strict=True)]
    else:
        draws = [draw for draws, _ in everyone for draw in draws]
    pair.given = indices
    expected, truth, _ = step(pair, lambda: make(vectorize_particles=vectorize), draws)
    assert value == pytest.approx(expected, rel=1e-12, abs=1e-12)
    gradients, truth = averaged(gradients), averaged(truth)
    for name, gradient in truth.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-12, atol=1e-12)
    return value


def combinations():
    """Every bound with some of the estimators, and every estimator with some of the bounds."""
    for i, name in enumerate(LOSSES):
        for j, estimator in enumerate(PATHS + SCORES):
            if (i + j) % 3:  # nothing of an exchange depends on both
                continue
            if name == "ELBO" and estimator in ("vimco", "ovis", "rws"):
                continue
            if estimator == "ovis" and name not in ("IWAE", "MIWAE", "PIWAE", "VR"):
                continue
            yield name, estimator


def every_bound_and_estimator(rank):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "particles"))["particles"]
    assert {name for name, _ in combinations()} == {*LOSSES}
    assert {estimator for _, estimator in combinations()} == {*PATHS, *SCORES}
    for name, estimator in combinations():
        discrete = estimator in SCORES
        make = lambda **kw: LOSSES[name](estimator=estimator, **kw)  # noqa: B023, E731
        try:
            check(mesh, make, discrete=discrete)
            check(mesh, make, discrete=discrete, chunk_size=2)
        except Exception as error:
            raise AssertionError(f"{name} {estimator}") from error


def test_every_bound_and_estimator():
    run_on_ranks(every_bound_and_estimator, 2)


def other_ways(rank):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "particles"))["particles"]
    for estimator in ("reparam", "score"):
        discrete = estimator == "score"
        make = lambda **kw: LOSSES["PIWAE"](estimator=estimator, **kw)  # noqa: B023, E731
        check(mesh, make, discrete=discrete, vectorize=False)
        check(mesh, make, discrete=discrete, vectorize=False, chunk_size=2)
        check(mesh, lambda **kw: make(kl_weight=0.3, **kw), discrete=discrete)  # noqa: B023
    for estimator in ("reparam", "dreg"):
        make = lambda **kw: LOSSES["MIWAE"](estimator=estimator, **kw)  # noqa: B023, E731
        check(mesh, make, enumerate_kind=True)
        check(mesh, make, enumerate_kind=True, chunk_size=3)
    # Particles chosen by weight: k' below, at and above the number of a rank's own.
    for name, estimator in (("PIWAE", "dreg"), ("MIWAE", "stl"), ("IWAE", "score"), ("own", "reparam")):
        for count in (1, 3, 4, 5) if name == "PIWAE" else (3,):
            make = lambda **kw: LOSSES[name](estimator=estimator, backward_particles=count, **kw)  # noqa: B023, E731
            check(mesh, make, discrete=estimator == "score", subsample=False, given=True)


def test_one_by_one_enumerated_and_chosen_by_weight():
    run_on_ranks(other_ways, 2)


def meshes(rank, shapes):
    for shape in shapes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "particles"))
        data_rank = mesh["data"].get_local_rank()
        for name, estimator, discrete in (("PIWAE", "dreg", False), ("MIWAE", "vimco", True)):
            make = lambda **kw: LOSSES[name](estimator=estimator, **kw)  # noqa: B023, E731
            check(mesh["particles"], make, data_rank, discrete=discrete)
            check(mesh["particles"], make, data_rank, chunk_size=1, discrete=discrete)


@pytest.mark.parametrize("shapes", [[(1, 2), (2, 1)], [(1, 4), (2, 2)]], ids=["2 ranks", "4 ranks"])
def test_meshes(shapes):
    run_on_ranks(meshes, math.prod(shapes[0]), shapes)


def two_levels(rank):
    groups = [dist.new_group([0]), dist.new_group([1])]
    cases = [
        ("reparam", IWAE(4), {}),
        ("dreg", MIWAE(4, 1), {"subsample": 2}),
        ("score", PIWAE(2, 2), {"discrete": True}),
    ]
    for estimator, outer, options in cases:
        pair, found = hierarchy.Pair(**options), []
        for group in (groups[rank], dist.group.WORLD):
            pyro.clear_param_store()
            hierarchy.parameters()
            keywords = {"outer": outer, "estimator": estimator, "chunk_size": 2, "particle_group": group}
            loss = LocallyEnhancedELBO(IWAE(3), "data", **keywords)
            pyro.set_rng_seed(1)
            values = [loss.loss(pair.model, pair.guide, *hierarchy.data())]
            value, gradients = value_and_grads(loss, pair.model, pair.guide, *hierarchy.data())
            found.append(([*values, value], averaged(gradients)))
        (values, gradients), (expected, truth) = found
        assert values == expected
        torch.testing.assert_close(gradients, truth, rtol=1e-12, atol=1e-12)


def test_global_particles_of_two_levels():
    run_on_ranks(two_levels, 2)


class Encoded(nn.Module):
    """A decoder and an encoder, on noise ``[S, B, 2]`` that is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.decoder, self.encoder = nn.Linear(2, 3).double(), nn.Linear(3, 4).double()
        self.noise = None

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", 20, len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", pyro.distributions.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", 20, len(x)):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", FromTensor(loc, scale.exp(), self.noise).to_event(1))


def wrapped(rank):
    """Two steps under DistributedDataParallel on a mesh of 2 x 2, and on the union of the minibatches."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "particles"))
    data, particles = (mesh[name].get_local_rank() for name in ("data", "particles"))
    generator = torch.Generator().manual_seed(3)
    ours, theirs = Encoded(), Encoded()
    loss = PIWAE_ELBO(M=M, K=K, estimator="dreg", particle_group=mesh["particles"])
    engine = nn.parallel.DistributedDataParallel(loss(Plain(ours, "model"), Plain(ours, "guide")))
    alone = PIWAE_ELBO(M=M, K=K, estimator="dreg")
    optims = [torch.optim.SGD(module.parameters(), 0.01) for module in (ours, theirs)]
    own, block = slice(5 * data, 5 * data + 5), slice(4 * particles, 4 * particles + 4)
    for _ in range(2):
        x = torch.randn(10, 3, generator=generator).double()
        theirs.noise = torch.randn(M * K, 10, 2, generator=generator).double()
        ours.noise = theirs.noise[block, own]
        for optim in optims:
            optim.zero_grad()
        value = engine(x[own])
        value.backward()
        expected = alone.loss_and_grads(theirs.model, theirs.guide, x)
        value = value.detach()
        dist.all_reduce(value)
        assert value.item() / 4 == pytest.approx(expected, rel=1e-12)
        for optim in optims:
            optim.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    engine = nn.parallel.DistributedDataParallel(engine.module, process_group=mesh["particles"].get_group())
    with pytest.warns(UserWarning, match=f"over the ranks {2 * data}, {2 * data + 1} of 4 alone"):
        engine(x[own])


class Plain(nn.Module):
    """A method of a module as a module of the same parameters."""

    def __init__(self, module, name):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *args):
        return getattr(self.module, self.name)(*args)


def test_under_distributed_data_parallel():
    run_on_ranks(wrapped, 4)


def counted(rank):
    """What a step sends, in operations and bytes: the log-weights of this rank's particles, and 64 bytes."""
    sent, all_gather = [], dist.all_gather

    def counting(outputs, tensor, group=None):
        sent.append(tensor.numel() * tensor.element_size())
        return all_gather(outputs, tensor, group=group)

    dist.all_gather = counting
    pair = Pair(subsample=False)
    for make, numbers in (
        (LOSSES["PIWAE"], 4 * 9),
        (lambda **kw: LOSSES["IWAE"](backward_particles=3, **kw), 5 * 9),
    ):
        loss = make(particle_group=dist.group.WORLD)
        pyro.set_rng_seed(rank)
        for step in range(5):
            sent.clear()
            pair.gradients(loss) if step < 4 else loss.loss(pair.model, pair.guide)
            averaged({name: p.grad for name, p in pair.p.items()})
            if 0 < step < 4:  # in the first, the ranks say what size it has
                assert sent == [8 * numbers + 64]


def test_bytes_of_a_step():
    run_on_ranks(counted, 2)
