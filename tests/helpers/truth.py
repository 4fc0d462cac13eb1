"""Independent truths that the tests compare against. Nothing in here uses pyro_iw."""

import math
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pyro.distributions as dist
import torch

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def normal(x, loc, scale):
    """Log density of a normal, written out."""
    scale = torch.as_tensor(scale)
    return -((x - loc) ** 2) / (2 * scale**2) - scale.log() - LOG_SQRT_2PI


class RecordedNormal(dist.Normal):
    """A normal that keeps the standard normal draws behind its reparameterised samples."""

    draws: ClassVar = []

    def rsample(self, sample_shape=()):
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype)
        RecordedNormal.draws.append(noise)
        return self.loc + self.scale * noise


def logmeanexp(terms):
    """Over a list of scalars, by subtracting the largest."""
    top = max(float(term.detach()) for term in terms)
    return top + torch.log(sum(torch.exp(term - top) for term in terms) / len(terms))


BETA, ALPHA, PARTITIONS = 0.3, 0.3, (0.0, 0.2, 0.7, 1.0)


def objectives(name, log_w, M, K):
    """(model's objective, guide's objective) of one cell, by loops over its M * K log-weights."""
    groups = [[log_w[m * K + k] for k in range(K)] for m in range(M)]
    everything = [term for group in groups for term in group]
    miwae = sum(logmeanexp(group) for group in groups) / M
    iwae = logmeanexp(everything)
    elbo = sum(everything) / len(everything)
    if name == "PIWAE":
        return iwae, miwae
    if name == "VR":
        value = logmeanexp([(1 - ALPHA) * term for term in everything]) / (1 - ALPHA)
    elif name == "TVO":
        value = 0.0
        for low, high in pairwise(PARTITIONS):
            tempered = [torch.exp(low * term) for term in everything]
            mean = sum(t * term for t, term in zip(tempered, everything, strict=True)) / sum(tempered)
            value = value + (high - low) * mean
    else:
        value = {"IWAE": iwae, "MIWAE": miwae, "CIWAE": BETA * elbo + (1 - BETA) * iwae}[name]
    return value, value


class ConjugateGaussian:
    """z ~ N(0, 1), x | z ~ N(z, noise), guide N(loc, scale): all known by integrals over z."""

    def __init__(self, x=1.3, noise=0.8, loc=0.4, scale=0.9):
        self.x, self.noise, self.loc, self.scale = x, noise, loc, scale
        grid = np.linspace(-12, 12, 40001)
        self._mass = np.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
        z = loc + scale * grid
        log_p = -0.5 * z**2 - 0.5 * ((x - z) / noise) ** 2 - math.log(noise) - 2 * LOG_SQRT_2PI
        log_q = -0.5 * grid**2 - math.log(scale) - LOG_SQRT_2PI
        self._log_w = log_p - log_q

    @property
    def log_evidence(self):
        variance = 1 + self.noise**2
        return -0.5 * self.x**2 / variance - 0.5 * math.log(variance) - LOG_SQRT_2PI

    @property
    def elbo(self):
        """E[log w] in closed form."""
        square = self.loc**2 + self.scale**2
        error = (self.x - self.loc) ** 2 + self.scale**2
        entropy = 0.5 + LOG_SQRT_2PI + math.log(self.scale)
        expected_log_p = -0.5 * square - 0.5 * error / self.noise**2 - math.log(self.noise) - 2 * LOG_SQRT_2PI
        return expected_log_p + entropy

    def expected_iwae(self, K):
        """E[log 1/K sum_k w_k] from E log X = int_0^inf (e^-t - E e^-tX) / t dt, with t = e^u."""
        w = np.exp(self._log_w - self.log_evidence)
        u = np.linspace(-40, 60, 4001)
        laplace = np.array([(self._mass * np.exp(-np.exp(s) * w)).sum() for s in u])
        integrand = np.exp(-np.exp(u)) - laplace**K
        expected_log_sum = ((integrand[1:] + integrand[:-1]) / 2 * np.diff(u)).sum()
        return expected_log_sum - math.log(K) + self.log_evidence
