"""Pairs all of whose tensors lie on a device, and a step on them."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import nn

__all__ = ["Hierarchy", "Pair", "Steered", "Walk", "X", "step"]

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))


class Pair:
    """A small autoencoder of a minibatch, all of whose tensors lie on a device; its numbers too, for PyTorch
    would copy them."""

    def __init__(self, device, path=True, size=60):
        pyro.clear_param_store()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(2, 2).to(device), nn.Linear(1, 2).to(device)
        self.x = X.to(device)
        self.indices = torch.arange(len(X)).to(device)
        self.zero, self.one = torch.zeros((), device=device), torch.ones((), device=device)
        self.path, self.size = path, size

    def plate(self):
        return pyro.plate("data", self.size, subsample=self.indices)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with self.plate():
            z = pyro.sample("z", dist.Normal(self.zero, self.one))
            pyro.sample("x", dist.Normal(self.decoder(z.unsqueeze(-1)), self.one).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with self.plate():
            loc, log_scale = self.encoder(x).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).has_rsample_(self.path))


class Hierarchy:
    """A global latent and one for each datapoint."""

    def __init__(self, device, size=60):
        pyro.clear_param_store()
        self.x, self.indices = X[:, 0].to(device), torch.arange(len(X)).to(device)
        self.zero, self.one = torch.zeros((), device=device), torch.ones((), device=device)
        self.size = size

    def plate(self):
        return pyro.plate("data", self.size, subsample=self.indices)

    def model(self, x):
        mean = pyro.sample("mean", dist.Normal(self.zero, self.one))
        with self.plate():
            z = pyro.sample("z", dist.Normal(mean, self.one))
            pyro.sample("x", dist.Normal(z, self.one), obs=x)

    def guide(self, x):
        loc = pyro.param("loc", lambda: self.zero + 0.2)
        mean = pyro.sample("mean", dist.Normal(loc, 0.3 * self.one))
        with self.plate():
            pyro.sample("z", dist.Normal((mean + x) / 2, 0.7 * self.one))


class Walk:
    def __init__(self, device):
        pyro.clear_param_store()
        self.zero, self.one = torch.zeros((), device=device), torch.ones((), device=device)

    def init(self, state):
        state["z"] = self.zero

    def step(self, state, x):
        a = pyro.param("a", lambda: 0.9 * self.one)
        with pyro.plate("data", len(x)):
            z = state["z"] = pyro.sample("z", dist.Normal(a * state["z"], self.one))
            pyro.sample("x", dist.Normal(z, self.one), obs=x)


class Steered(Walk):
    def init(self, state):
        pass

    def step(self, state, x):
        b = pyro.param("b", lambda: 0.5 * self.one)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(b * (state["z"] + x), 0.7 * self.one))


def step(loss, pair, seed):
    """A loss and its gradients, which are taken away again."""
    pyro.set_rng_seed(seed)
    with poutine.trace(param_only=True) as capture:
        value = loss.differentiable_loss(pair.model, pair.guide, pair.x)
        value.backward()
    grads = {}
    for name, site in capture.trace.nodes.items():
        leaf = site["value"].unconstrained()
        grads[name], leaf.grad = leaf.grad, None
    return value.detach(), grads
