"""Compiled steps of a particle group: the numbers of one process, whatever the other ranks do."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed

import pyro_iw
from helpers.groups import Powers, averaged
from helpers.ranks import run_on_ranks
from pyro_iw import MIWAE_ELBO, PIWAE_ELBO

M, K = 2, 4


class FromTensor(dist.Normal):
    """A normal whose noise for all particles is read from a tensor ``[S, 5]``."""

    def __init__(self, loc, scale, noise=None, validate_args=None):
        self.noise = noise
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return FromTensor(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + self.scale * (self.noise[: shape[0]] if len(shape) > 1 else self.noise[0])


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


def compiled(rank, size, stubborn):
    """Steps on new noise each; one that is not compiled on one of the ranks, if it is ``stubborn``."""
    group = torch.distributed.group.WORLD
    own = M * K // size
    generator = torch.Generator().manual_seed(0)
    for name, make in LOSSES.items():
        every = torch.zeros(2, M * K, 5).double()
        mine = torch.zeros(2, own, 5).double()
        pair, alone = Pair(mine), Pair(every)
        ours = make(particle_group=group, compile=not (stubborn and rank == 1))
        theirs = make()
        for i in range(4):
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
    return True


@pytest.mark.parametrize("stubborn", [False, True], ids=["all ranks", "all but one"])
def test_compiled_steps(stubborn):
    assert run_on_ranks(compiled, 2, 2, stubborn, timeout=120) == [True] * 2
