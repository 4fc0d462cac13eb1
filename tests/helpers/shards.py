"""A pair whose noise comes with the data, so that ranks with a part of the data each can be put together."""

import pyro
import pyro.distributions as dist
import torch
from pyro.optim import PyroOptim
from torch import nn

N, S = 8, 3  # datapoints, particles
X = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)
# Noise by step, particle and datapoint.
NOISE = torch.randn(6, S, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Given(dist.Normal):
    """A normal whose draws come from outside."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def rsample(self, sample_shape=()):
        noise = self.noise[:1, :] if len(self.loc.expand(self.batch_shape).shape) == 1 else self.noise
        return (self.loc + self.scale * noise).reshape(self.batch_shape)

    def expand(self, batch_shape, _instance=None):
        return Given(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)


class Pair:
    """An encoder, parameters of the model, one that a part of the data uses, one that comes in step 2."""

    def __init__(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
            self.start = torch.randn(3, dtype=torch.float64)

    def model(self, x, noise, step, full=N):
        scale = pyro.param("scale", self.start[0].exp(), constraint=dist.constraints.positive)
        loc = pyro.param("loc", self.start[1])
        if (x > 1.5).any():  # the last datapoints alone
            loc = loc + pyro.param("shift", self.start[2]) * (x > 1.5)
        if step >= 2:
            loc = loc + pyro.param("late", torch.tensor(0.1, dtype=torch.float64)) ** 2
        with pyro.plate("data", full, len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z + loc, scale), obs=x)

    def guide(self, x, noise, step, full=N):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", full, len(x)):
            pyro.sample("z", Given(self.encoder(x[:, None])[:, 0], torch.tensor(0.7).double(), noise))


def batch(step, rank=0, size=1):
    """The part of a rank of a step's data, and its noise."""
    part = slice(rank * N // size, (rank + 1) * N // size)
    return X[part], NOISE[step, :, part], step


def parameters():
    """All parameters, unconstrained, as lists by name."""
    return {name: value.flatten().tolist() for name, value in pyro.get_param_store().named_parameters()}


def clear():
    pyro.clear_param_store()


__all__ = ["NOISE", "Given", "N", "Pair", "PyroOptim", "S", "X", "batch", "clear", "parameters"]
