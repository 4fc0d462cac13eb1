"""Pairs whose draws are recorded or given, for runs of one kind to be fed those of another."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule
from torch import nn

from helpers.recorded import Coin, Uniformly


class Chain:
    """Two latents a datapoint, the second given the first; optionally a discrete one between them.

    Observed in a subsampled plate, with a mask, and a sub-plate of the data's own.
    """

    def __init__(self, discrete=False, subsample=True, enumerate_kind=False):
        self.discrete, self.subsample, self.enumerate_kind = discrete, subsample, enumerate_kind
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(2, 9, generator=generator, dtype=torch.float64)
        self.mask = torch.rand(2, 9, generator=generator) < 0.8
        start = {"w": 0.6, "s": 0.8, "kind": 0.3, "a": 0.4, "c": 0.9, "d": 0.7, "e": 0.2}
        self.p = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in start.items()}
        self.indices = []

    num_sites = property(lambda self: 3 if self.discrete else 2)

    def __hash__(self):
        return id(self)

    def plate(self):
        return pyro.plate("data", 9, subsample_size=4 if self.subsample else None, dim=-1)

    def model(self):
        p, one = self.p, torch.ones((), dtype=torch.float64)
        with self.plate() as index:
            self.indices.append(index)
            z = pyro.sample("z", dist.Normal(p["w"] * one, 1.0))
            b = pyro.sample("b", dist.Bernoulli(p["kind"])) if self.discrete else 0.0
            y = pyro.sample("y", dist.Normal(p["w"] * z + b, 1.0))
            shift = 0.0
            if self.enumerate_kind:
                kind = dist.Categorical(torch.stack([p["kind"], 1 - p["kind"]]))
                shift = 2.0 * pyro.sample("k", kind, infer={"enumerate": "parallel"})
            with pyro.plate("times", 2, dim=-2), poutine.mask(mask=self.mask[:, index]):
                pyro.sample("x", dist.Normal(y + shift, p["s"]), obs=self.x[:, index])

    def guide(self):
        p = self.p
        with self.plate() as index:
            self.indices.append(index)
            z = pyro.sample("z", Uniformly(p["a"] * self.x[0, index], p["c"]))
            b = pyro.sample("b", Coin((p["e"] * z).sigmoid())) if self.discrete else 0.0
            pyro.sample("y", Uniformly(p["a"] * z + b, p["d"] * torch.exp(0.3 * z)))

    def gradients(self, loss, differentiable=False):
        for parameter in self.p.values():
            parameter.grad = None
        if differentiable:
            value = loss.differentiable_loss(self.model, self.guide)
            value.backward()
        else:
            value = loss.loss_and_grads(self.model, self.guide)
        return value.item() if differentiable else value, {
            name: parameter.grad for name, parameter in self.p.items()
        }


class Network(PyroModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def model(self, x):
        pyro.module("network", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.layers(z.reshape(-1, 2)).reshape(*z.shape[:-1], 3)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
