"""Bounds by their formulas, beside the package's own objects."""

import itertools
import math

import torch

import pyro_iw
from pyro_iw.bounds import CIWAE, IWAE, MIWAE, PIWAE, TVO, VR


class Formula:
    """A bound: its value and that which the guide climbs, as functions of log-weights [M, K, *cells]."""

    def __init__(self, package, value, guide_value=None, linear=None):
        self.package, self.M, self.K = package, package.M, package.K
        self.value, self.guide_value = value, guide_value or value
        self.linear = self.K == 1 if linear is None else linear


def lme(log_w, dims):
    count = math.prod(log_w.shape[dim] for dim in dims)
    return torch.logsumexp(log_w, dims) - math.log(count)


class Bent(pyro_iw.Bound):
    """A bound of a user's own; not equivariant to shifts."""

    def value(self, log_w):
        return (log_w.logsumexp(1) - math.log(self.K)).mean(0) + 0.1 * torch.tanh(log_w.mean((0, 1)))


def iwae(r):
    return Formula(IWAE(r.choice([1, 2, 3, 5])), lambda log_w: lme(log_w, (0, 1)))


def miwae(r):
    return Formula(MIWAE(r.choice([2, 3]), r.choice([1, 2, 3])), lambda log_w: lme(log_w, (1,)).mean(0))


def ciwae(r):
    beta = r.choice([0.0, 0.3, 1.0])
    bound = CIWAE(r.choice([2, 4]), beta)
    return Formula(
        bound, lambda log_w: beta * log_w.mean((0, 1)) + (1 - beta) * lme(log_w, (0, 1)), linear=beta == 1
    )


def piwae(r):
    return Formula(
        PIWAE(r.choice([2, 3]), r.choice([2, 3])),
        lambda log_w: lme(log_w, (0, 1)),
        lambda log_w: lme(log_w, (1,)).mean(0),
    )


def vr(r):
    alpha = r.choice([-0.5, 0.3, 0.999, 1.0, 1.5])
    bound = VR(alpha, r.choice([2, 4]))
    if alpha == 1:
        return Formula(bound, lambda log_w: log_w.mean((0, 1)), linear=True)
    return Formula(bound, lambda log_w: lme((1 - alpha) * log_w, (0, 1)) / (1 - alpha))


def tvo(r):
    betas = r.choice([(0.0, 1.0), (0.0, 0.2, 0.7, 1.0)])

    def value(log_w):
        return sum(
            (high - low) * (torch.softmax(low * log_w, 1) * log_w).sum((0, 1))
            for low, high in itertools.pairwise(betas)
        )

    return Formula(TVO(r.choice([2, 4]), betas), value, linear=len(betas) == 2)


def bent(r):
    bound = Bent(r.choice([1, 2]), r.choice([1, 3]))
    return Formula(
        bound, lambda log_w: lme(log_w, (1,)).mean(0) + 0.1 * torch.tanh(log_w.mean((0, 1))), linear=False
    )


BOUNDS = {"IWAE": iwae, "MIWAE": miwae, "CIWAE": ciwae, "PIWAE": piwae, "VR": vr, "TVO": tvo, "own": bent}


def derivatives(value, log_w):
    """First derivatives by the log-weights and the diagonal of the second ones."""
    log_w = log_w.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(log_w).sum(), log_w, create_graph=True)
    second = torch.zeros_like(log_w)
    for index in itertools.product(range(log_w.shape[0]), range(log_w.shape[1])):
        if first.requires_grad:
            second[index] = torch.autograd.grad(first[index].sum(), log_w, retain_graph=True)[0][index]
    return first.detach(), second


def signal(bound, log_w, estimator):
    """The guide's bound less its value with a particle's log-weight replaced by what the others suggest."""
    value, result = bound.guide_value(log_w), torch.empty_like(log_w)
    for m, k in itertools.product(range(bound.M), range(bound.K)):
        changed, other = log_w.clone(), replacement(bound, log_w, m, k, estimator)
        if other is not None:
            changed[m, k] = other
        result[m, k] = value - (0.0 if other is None else bound.guide_value(changed))
    return result


def replacement(bound, log_w, m, k, estimator):
    """What the others suggest for the log-weight of a particle; None if there are none."""
    if estimator == "ovis":
        return torch.full_like(log_w[m, k], -torch.inf)
    others = [log_w[m, j] for j in range(bound.K) if j != k] if bound.K > 1 else []
    if estimator == "score" and (bound.linear or bound.K == 1):
        others = [log_w[n, j] for n in range(bound.M) for j in range(bound.K) if (n, j) != (m, k)]
    if not others:
        return None
    others = torch.stack(others)
    mean = torch.logsumexp(others, 0) - math.log(len(others))
    return others.mean(0) if estimator == "vimco" or bound.linear else mean


def has_ovis(bound):
    """Whether the guide's bound is finite where a particle weighs nothing."""
    log_w = torch.zeros(bound.M, bound.K, dtype=torch.float64)
    log_w[0, 0] = -torch.inf
    return bound.K > 1 and bool(bound.guide_value(log_w).isfinite())
