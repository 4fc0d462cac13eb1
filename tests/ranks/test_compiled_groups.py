"""Compiled steps of a particle group: the numbers of one process, whatever the other ranks do."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed

import pyro_iw
import pyro_iw.compiling.inductor as inductor_module
from helpers.chains import Chain
from helpers.compiled import records_generators
from helpers.groups import FromTensor, Powers, averaged
from helpers.ranks import run_on_ranks
from pyro_iw import IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO
from pyro_iw.ranks.group import RankError

M, K = 2, 4


class Pair:
    """Two latents a datapoint, the second given the first, of noise in two tensors."""

    def __init__(self, noise, subsample=None):
        self.noise, self.subsample = noise, subsample
        self.x = torch.linspace(-1.0, 1.0, 20 if subsample else 5).double()
        start = {"w": 0.6, "s": 0.8, "a": 0.4, "c": 0.9, "d": 0.7}
        self.p = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in start.items()}

    def plate(self):
        return pyro.plate("data", len(self.x), subsample_size=self.subsample)

    def model(self, beta):
        p = self.p
        with self.plate() as index:
            z = pyro.sample("z", dist.Normal(p["w"] * torch.ones(()).double(), 1.0))
            y = pyro.sample("y", dist.Normal(beta * p["w"] * z, 1.0))
            pyro.sample("x", dist.Normal(y, p["s"]), obs=self.x[index])

    def guide(self, beta):
        p = self.p
        with self.plate() as index:
            z = pyro.sample("z", FromTensor(p["a"] * self.x[index], p["c"], self.noise[0]))
            pyro.sample("y", FromTensor(p["a"] * z, p["d"] * torch.exp(0.3 * z), self.noise[1]))

    def step(self, loss, beta):
        for parameter in self.p.values():
            parameter.grad = None
        value = loss.loss_and_grads(self.model, self.guide, torch.tensor(beta).double())
        return value, {name: p.grad for name, p in self.p.items()}


LOSSES = {
    "MIWAE dreg": lambda **kw: MIWAE_ELBO(M=M, K=K, estimator="dreg", **kw),
    "PIWAE chosen": lambda **kw: PIWAE_ELBO(M=M, K=K, backward_particles=3, **kw),
    "own": lambda **kw: pyro_iw.ImportanceWeightedELBO(
        Powers(M=M, K=K), kl_weight=lambda s: 0.2 + s / 9, **kw
    ),
}


def compiled(rank, size, stubborn, names, interpreted):
    """Steps on new noise each; they are not compiled on one of the ranks, if that is ``stubborn``."""
    if interpreted:  # operation by operation, without the compiler's seconds
        inductor_module.inductor = lambda graph, inputs: lambda args: graph(*args)
    group = torch.distributed.group.WORLD
    own = M * K // size
    generator = torch.Generator().manual_seed(0)
    for name in names:
        make = LOSSES[name]
        every = torch.zeros(2, M * K, 5).double()
        mine = torch.zeros(2, own, 5).double()
        pair, alone = Pair(mine), Pair(every)
        ours = make(particle_group=group, compile=not (stubborn and rank == 1))
        theirs = make()
        for i in range(3):
            every.normal_(generator=generator)
            mine.copy_(every[:, rank * own : (rank + 1) * own])
            torch.manual_seed(i if rank == 0 else 100 * rank + i)
            value, gradients = pair.step(ours, 1.0 + i / 10)
            torch.manual_seed(i)
            expected, truth = alone.step(theirs, 1.0 + i / 10)
            assert value == pytest.approx(expected, rel=1e-12), (name, i)
            averaged(gradients)
            for key in truth:
                torch.testing.assert_close(
                    gradients[key], truth[key], rtol=1e-10, atol=1e-10, msg=f"{name} {i}"
                )
        assert ours.compile == bool(ours._compiler._programs)


def test_compiled_steps():
    run_on_ranks(compiled, 2, 2, False, ["MIWAE dreg", "own"], True)


def test_a_rank_that_does_not_compile():
    """The other one does."""
    run_on_ranks(compiled, 2, 2, True, ["PIWAE chosen"], True)


@pytest.mark.slow
def test_a_program_of_inductors():
    run_on_ranks(compiled, 2, 2, False, ["PIWAE chosen"], False, timeout=120)


class Drawing(Chain):
    """A chain that draws its minibatches and its noise as all do."""

    def guide(self):
        p = self.p
        with self.plate() as index:
            z = pyro.sample("z", dist.Normal(p["a"] * self.x[0, index], p["c"]))
            b = pyro.sample("b", dist.Bernoulli((p["e"] * z).sigmoid())) if self.discrete else 0.0
            pyro.sample("y", dist.Normal(p["a"] * z + b, p["d"] * torch.exp(0.3 * z)))


def runs(rank, sizes, ways):
    """Losses and parameters of two steps in chunks, by groups of these sizes from one seed."""
    inductor_module.inductor = lambda graph, inputs: lambda args: graph(*args)
    world, found = torch.distributed.get_world_size(), []
    for size in sizes:
        firsts = range(0, world, size)
        groups = [torch.distributed.new_group(list(range(first, first + size))) for first in firsts]
        for bound, keywords in ways:
            loss = bound(M=M, K=K, particle_group=groups[rank // size], **keywords)
            pair = Drawing(discrete="estimator" in keywords)
            pyro.set_rng_seed(3)
            values = [loss.loss(pair.model, pair.guide)]
            for _ in range(2):
                value, gradients = pair.gradients(loss)
                values.append(value)
                averaged(gradients)
                with torch.no_grad():
                    for key, gradient in gradients.items():
                        if gradient is not None:
                            pair.p[key] -= 0.01 * gradient
            # Minibatches are drawn by a generator of the group's own.
            can_compile = bool(keywords.get("compile")) and records_generators()
            assert can_compile == bool(loss._compiler._programs)
            found.append((values, [p.item() for p in pair.p.values()]))
    return found


def test_chunks_are_the_same_for_any_number_of_ranks():
    ways = [(MIWAE_ELBO, {"chunk_size": 2}), (PIWAE_ELBO, {"chunk_size": 1, "estimator": "vimco"})]
    results = run_on_ranks(runs, 4, (1, 2, 4), ways)
    for i in range(len(ways)):
        losses, parameters = results[0][i]
        assert len(set(losses)) == 3
        for found in results:
            for values, parts in found[i :: len(ways)]:
                assert values == losses
                assert parts == pytest.approx(parameters, rel=1e-12)


def test_compiled_chunks():
    """With the numbers of chunks that are not compiled."""
    ways = [(PIWAE_ELBO, {"chunk_size": 2}), (PIWAE_ELBO, {"chunk_size": 2, "compile": True})]
    for found in run_on_ranks(runs, 2, (2,), ways):
        for values, expected in zip(found[1], found[0], strict=True):
            assert values == pytest.approx(expected, rel=1e-12)


def breaks(rank):
    """A compiled step that is NaN on one rank, between steps that are not."""
    inductor_module.inductor = lambda graph, inputs: lambda args: graph(*args)
    pair = Pair(torch.zeros(2, 4, 5).double())
    loss = IWAE_ELBO(K=8, particle_group=torch.distributed.group.WORLD, compile=True)
    errors = []
    for step in range(6):
        pair.noise.normal_()
        if step == 4 and rank == 1:
            pair.noise[0, 2, 3] = torch.nan
        try:
            _, gradients = pair.step(loss, 1.0)
            assert step != 4
            averaged(gradients)
        except (ValueError, RankError) as error:
            errors.append((step, type(error).__name__, str(error)[:40]))
            assert all(p.grad is None for p in pair.p.values())
    assert loss._compiler._programs
    return errors


def test_a_compiled_step_that_is_nan_on_one_rank():
    first, second = run_on_ranks(breaks, 2)
    assert first == [(4, "RankError", "Log-weights are NaN or +inf on rank 1 (1")]
    assert second == [(4, "ValueError", "Expected parameter loc (Tensor of shape ")]  # of its eager run
