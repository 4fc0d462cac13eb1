"""A linear-Gaussian state-space model of Pyro's SMC protocol, and the Kalman filter written out."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

A, B, Q, R, S0 = 0.9, 1.2, 0.5, 0.7, 1.3


class Walk:
    """z_0 ~ N(0, S0), z_t ~ N(A z_{t-1}, Q), x_t ~ N(B z_t, R); all scalar, one row of ``x [T, N]`` a
    step."""

    def __init__(self, transition=A, noise=R, plate=True):
        self.transition, self.noise, self.plate = transition, noise, plate

    def init(self, state):
        state["z"] = None

    def step(self, state, x):
        with data(x, self.plate):
            before = state["z"]
            prior = dist.Normal(torch.zeros(()).to(x), S0) if before is None else self.next(before)
            z = pyro.sample("z", prior)
            state["z"] = z
            pyro.sample("x", dist.Normal(B * z, self.noise), obs=x)

    def next(self, z):
        return dist.Normal(self.transition * z, Q)


class Proposal:
    """q(z_t | z_{t-1}, x_t) = N(a z_{t-1} + b x_t, s), and q(z_0 | x_0) by another b and s if given."""

    def __init__(self, a=0.5, b=0.4, s=0.6, plate=True, start=None):
        self.a, self.b, self.s, self.plate = a, b, s, plate
        self.start = (b, s) if start is None else start

    def init(self, state):
        pass

    def step(self, state, x):
        with data(x, self.plate):
            before = state["z"]
            if before is None:
                pyro.sample("z", dist.Normal(self.start[0] * x, self.start[1]))
            else:
                pyro.sample("z", dist.Normal(self.a * before + self.b * x, self.s))


def near_optimal(noise=R, scale=1.1) -> Proposal:
    """The optimal q(z_t | z_{t-1}, x_t), with its scale off by a factor."""
    gain, first = (spread**2 * B / (B**2 * spread**2 + noise**2) for spread in (Q, S0))
    start = first, scale * math.sqrt((1 - first * B) * S0**2)
    return Proposal(A * (1 - gain * B), gain, scale * math.sqrt((1 - gain * B) * Q**2), start=start)


def data(x, plate):
    if not plate:
        return pyro.plate_stack("none", ())
    return pyro.plate("data", len(x), dim=-1)


def simulate(steps: int, size: int, seed: int = 0) -> Tensor:
    """Sequences ``[T, N]`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    z, rows = S0 * draw(), []
    for _ in range(steps):
        rows.append(B * z + R * draw())
        z = A * z + Q * draw()
    return torch.stack(rows)


def kalman(x: Tensor, transition=A, noise=R) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x), ``[N]``, and the filtering means and variances, ``[T, N]``."""
    mean, variance = torch.zeros_like(x[0]), torch.full_like(x[0], S0**2)
    total, means, variances = torch.zeros_like(x[0]), [], []
    for row in x:
        spread = B**2 * variance + noise**2
        error = row - B * mean
        total = total - 0.5 * (error**2 / spread + spread.log() + math.log(2 * math.pi))
        gain = variance * B / spread
        mean, variance = mean + gain * error, (1 - gain * B) * variance
        means.append(mean)
        variances.append(variance)
        mean, variance = transition * mean, transition**2 * variance + Q**2
    return total, torch.stack(means), torch.stack(variances)
