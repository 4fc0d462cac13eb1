"""Distributions for the sites of random pairs, each from one number a cell and a scale."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch.distributions import transforms

# A site's distribution is built from eta (one number a cell), a positive scale s and a fixed vector v.
# event: shape of an event. Discrete families have no path.


def _events(eta, v):
    return eta.unsqueeze(-1) + v


def _matrix(eta, v):
    return eta[..., None, None] + torch.stack([v, -v])


def _tril(s, v):
    size = len(v)
    return s * (torch.eye(size, dtype=v.dtype) + 0.3 * torch.ones(size, size, dtype=v.dtype).tril(-1))


def _logit_normal(e, s):
    return dist.TransformedDistribution(dist.Normal(e, s), [transforms.SigmoidTransform()])


BUILD = {
    # on the line
    "normal": lambda e, s, v: dist.Normal(e, s),
    "laplace": lambda e, s, v: dist.Laplace(e, s),
    "student": lambda e, s, v: dist.StudentT(5.0, e, s),
    "interval": lambda e, s, v: dist.Uniform(e - 1 - s, e + 1 + s),  # its ends move with its parameters
    # above zero
    "lognormal": lambda e, s, v: dist.LogNormal(e, s),
    "gamma": lambda e, s, v: dist.Gamma(1 + e.exp(), 1 / s),
    "exponential": lambda e, s, v: dist.Exponential(e.exp()),
    "halfnormal": lambda e, s, v: dist.HalfNormal(s * e.exp()),
    # between zero and one
    "beta": lambda e, s, v: dist.Beta(1 + e.exp(), 1 + s),
    "logitnormal": lambda e, s, v: _logit_normal(e, s),
    "uniform": lambda e, s, v: dist.Uniform(torch.zeros_like(e), torch.ones_like(e)),
    # vectors
    "normals": lambda e, s, v: dist.Normal(_events(e, v), s).to_event(1),
    "mvn": lambda e, s, v: dist.MultivariateNormal(_events(e, v), scale_tril=_tril(s, v)),
    "matrix": lambda e, s, v: dist.Normal(_matrix(e, v), s).to_event(2),
    "dirichlet": lambda e, s, v: dist.Dirichlet(1 + _events(e, v).exp()),
    # discrete
    "bernoulli": lambda e, s, v: dist.Bernoulli(logits=e),
    "poisson": lambda e, s, v: dist.Poisson(e.clamp(-2, 2).exp()),
    "geometric": lambda e, s, v: dist.Geometric(logits=e.clamp(-1, 2)),
    "categorical": lambda e, s, v: dist.Categorical(logits=e.unsqueeze(-1) * v),
    "onehot": lambda e, s, v: dist.OneHotCategorical(logits=e.unsqueeze(-1) * v),
    "through": lambda e, s, v: dist.OneHotCategoricalStraightThrough(logits=e.unsqueeze(-1) * v),
    "bits": lambda e, s, v: dist.Bernoulli(logits=_events(e, v)).to_event(1),
}

EVENT_DIM = {"normals": 1, "mvn": 1, "matrix": 2, "dirichlet": 1, "onehot": 1, "through": 1, "bits": 1}

#: Priors, and the guide distributions that reach over the same values.
PRIORS = {
    "normal": ["normal", "normal", "laplace", "student"],
    "lognormal": ["lognormal", "gamma", "exponential"],
    "beta": ["beta", "logitnormal", "uniform"],
    "normals": ["normals", "mvn"],
    "matrix": ["matrix"],
    "dirichlet": ["dirichlet"],
    "bernoulli": ["bernoulli"],
    "poisson": ["poisson"],
    "geometric": ["geometric"],
    "categorical": ["categorical"],
    "onehot": ["onehot"],
    "bits": ["bits"],
}
PRIORS |= dict.fromkeys(("laplace", "student"), PRIORS["normal"])
PRIORS |= dict.fromkeys(("gamma", "exponential", "halfnormal"), PRIORS["lognormal"])
PRIORS |= {"uniform": PRIORS["beta"], "mvn": PRIORS["normals"]}
DISCRETE = ["bernoulli", "poisson", "geometric", "categorical", "onehot", "bits"]
CONTINUOUS = [name for name in PRIORS if name not in DISCRETE]
ENUMERABLE = ["bernoulli", "categorical"]
OBSERVED = ["normal", "student", "gamma", "beta", "normals", "mvn", "dirichlet", *DISCRETE]


def summary(family, value, v):
    """One number a cell, between -1 and 1, that children depend on."""
    if family == "categorical":
        return torch.tanh(v)[value.long()]
    event_dim = EVENT_DIM.get(family, 0)
    if family == "matrix":
        value = value * torch.stack([v, -v])
    elif event_dim:
        value = value * v
    return torch.tanh(value.sum(tuple(range(-event_dim, 0)))) if event_dim else torch.tanh(value)
