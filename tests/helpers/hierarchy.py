r"""A conjugate normal hierarchy, its evidence, and the expectation of its bounds by nested quadrature.

:math:`g \sim N(0, 1)`, :math:`z_n \sim N(g, 1)`, :math:`x_n \sim N(z_n, 1)`; guide :math:`g \sim N(m, s)`,
:math:`z_n \sim N(a g + b x_n, w)`.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

X = torch.tensor([-0.7, 0.4, 1.9, 0.1], dtype=torch.float64)
START = {"m": 0.3, "s": -0.9, "a": 0.6, "b": 0.35, "w": -0.1, "slope": 0.9}


def parameters():
    return {name: pyro.param(name, torch.tensor(value).double()) for name, value in START.items()}


def model(x=X, batch=None):
    g = pyro.sample("g", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", len(x), batch) as i:
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(parameters()["slope"] * z, 1.0), obs=x[i])


def guide(x=X, batch=None):
    p = parameters()
    g = pyro.sample("g", dist.Normal(p["m"], p["s"].exp()))
    with pyro.plate("data", len(x), batch) as i:
        pyro.sample("z", dist.Normal(p["a"] * g + p["b"] * x[i], p["w"].exp()))


def log_evidence(x=X, slope=START["slope"]):
    n = len(x)
    covariance = (1 + slope**2) * torch.eye(n).double() + slope**2 * torch.ones(n, n).double()
    return dist.MultivariateNormal(torch.zeros(n).double(), covariance).log_prob(x).item()


def hermite(nodes):
    """Nodes and weights of an expectation under a standard normal."""
    at, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.tensor(at), torch.tensor(weights / math.sqrt(2 * math.pi))


def normal(value, loc, scale):
    return (
        -0.5 * ((value - loc) / scale) ** 2 - torch.log(torch.as_tensor(scale)) - 0.5 * math.log(2 * math.pi)
    )


def expected_bound(p, local, number, x=X, nodes=24):
    r"""The mean over g of log p(g) - log q(g) plus the cells' expected bounds, differentiable in p.

    That of a cell's IWAE bound, by :math:`\log y = \int_0^\infty (e^{-t} - e^{-t y})\, dt / t`, is an
    integral over the Laplace transform of a single weight to the L-th power, for any number L.

    Arguments:
        p: the parameters by name.
        local: maps the expected ELBO and IWAE bound of a cell to that of the local bound.
        number: the number of particles under the logarithm.
        x: the data.
        nodes: of each quadrature.
    """
    e, weights = hermite(nodes)
    g = p["m"] + p["s"].exp() * e[:, None, None]
    top = normal(g, 0.0, torch.ones(()).double()) - normal(g, p["m"], p["s"].exp())
    noise, share = hermite(80)
    z = p["a"] * g + p["b"] * x[:, None] + p["w"].exp() * noise
    log_w = normal(z, g, torch.ones(()).double()) + normal(
        x[:, None], p["slope"] * z, torch.ones(()).double()
    )
    log_w = log_w + 0.5 * noise**2 + p["w"] + 0.5 * math.log(2 * math.pi)
    elbo = (share * log_w).sum(-1)
    shift = elbo.detach()
    u = torch.linspace(-45.0, 12.0, 1200).double()  # log t; beyond, the integrand is nothing
    transform = (share * torch.exp(-(u.exp()[:, None, None, None] * (log_w - shift[..., None]).exp()))).sum(
        -1
    )
    integrand = torch.exp(-u.exp())[:, None, None] - transform**number
    iwae = torch.trapezoid(integrand, u, dim=0) - math.log(number) + shift
    return (weights * (top[:, 0, 0] + local(elbo, iwae).sum(-1))).sum()
