"""Pairs whose guide enumerates discrete sites, written twice: in Pyro, and as loops over the particles.

Each case has ``model()`` and ``guide()``, parameters ``theta`` and ``phi``, ``values`` (joint values y), and
``densities(theta, phi, noise, n, y)``: the scalars (log p(x, y, z), log q(z | y), log q(y)) of cell n.
``noise`` gives the standard normal draw of a guide site by ``noise(site, *values, n)``, with the values that
the site is drawn for.
"""

import itertools
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch

from helpers.truth import RecordedNormal, logmeanexp, normal, objectives

PARALLEL = {"enumerate": "parallel"}
F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def log_softmax(logits, y):
    return logits[y] - torch.logsumexp(logits, 0)


class Case:
    x = tensor(0.3, -1.2, 2.0)
    theta: ClassVar = {"w": 0.7, "s": 0.9, "m": [-1.0, 0.5, 1.7], "pi": [0.3, -0.2, 0.4]}
    phi: ClassVar = {"a": [0.4, -0.7, 0.2], "b": [0.1, 0.6, -0.3], "c": 0.8}
    cells = 3
    outer = 1.0
    is_free = True
    values: ClassVar = [(0,), (1,), (2,)]
    infer = PARALLEL

    def param(self, name):
        return pyro.param(name, torch.tensor({**self.theta, **self.phi}[name], dtype=F64))

    def plate(self):
        return pyro.plate("data", 3)


class PerValue(Case):
    """y ~ Cat, z ~ N(m_y, 1), x ~ N(w z, s); guide y ~ Cat(a x), z ~ N(b_y x, c): as the M2 model."""

    def model(self):
        w, s, m, pi = map(self.param, ("w", "s", "m", "pi"))
        with self.plate():
            y = pyro.sample("y", dist.Categorical(logits=pi))
            z = pyro.sample("z", dist.Normal(m[y], 1.0))
            pyro.sample("x", dist.Normal(w * z, s), obs=self.x)

    def guide(self):
        a, b, c = map(self.param, ("a", "b", "c"))
        with self.plate():
            y = pyro.sample("y", dist.Categorical(logits=a * self.x[:, None]), infer=self.infer)
            pyro.sample("z", RecordedNormal(b[y] * self.x, c))

    def densities(self, theta, phi, noise, n, y):
        (y,) = y
        z = phi["b"][y] * self.x[n] + phi["c"] * noise(0, y, n)
        log_p = log_softmax(theta["pi"], y) + normal(z, theta["m"][y], 1.0)
        log_p = log_p + normal(self.x[n], theta["w"] * z, theta["s"])
        log_q = normal(z, phi["b"][y] * self.x[n], phi["c"])
        return log_p, log_q, log_softmax(phi["a"] * self.x[n], y)


class Minibatch(PerValue):
    """A minibatch of 3 of 30, with a common poutine.scale."""

    outer = 10.0 * 0.25

    def plate(self):
        return pyro.plate("data", 30, subsample=torch.tensor([3, 17, 20]))

    def model(self):
        with poutine.scale(scale=0.25):
            super().model()

    def guide(self):
        with poutine.scale(scale=0.25):
            super().guide()


class Masked(PerValue):
    """Cell 1 is masked altogether; in cell 2 y does not exist, and the model takes y = 1 there."""

    cell = torch.tensor([True, False, True])
    exists = torch.tensor([True, True, False])

    def model(self):
        w, s, m, pi = map(self.param, ("w", "s", "m", "pi"))
        with self.plate(), poutine.mask(mask=self.cell):
            with poutine.mask(mask=self.exists):
                y = pyro.sample("y", dist.Categorical(logits=pi))
            used = torch.where(self.exists, y, 1)
            z = pyro.sample("z", dist.Normal(m[used], 1.0))
            pyro.sample("x", dist.Normal(w * z, s), obs=self.x)

    def guide(self):
        a, b, c = map(self.param, ("a", "b", "c"))
        with self.plate(), poutine.mask(mask=self.cell):
            with poutine.mask(mask=self.exists):
                y = pyro.sample("y", dist.Categorical(logits=a * self.x[:, None]), infer=self.infer)
            used = torch.where(self.exists, y, 1)
            pyro.sample("z", RecordedNormal(b[used] * self.x, c))

    def densities(self, theta, phi, noise, n, y):
        (y,) = y
        used = 1 if n == 2 else y
        z = phi["b"][used] * self.x[n] + phi["c"] * noise(0, y, n)
        log_p = normal(z, theta["m"][used], 1.0) + normal(self.x[n], theta["w"] * z, theta["s"])
        log_q = normal(z, phi["b"][used] * self.x[n], phi["c"])
        log_q_y = log_softmax(phi["a"] * self.x[n], y)
        if n == 0:
            log_p = log_p + log_softmax(theta["pi"], y)
        if n == 1:
            log_p, log_q = 0 * log_p, 0 * log_q
        return log_p, log_q, log_q_y

    def counted(self, n):
        return n == 0


class Shared(Case):
    """z is drawn once for all y, which the model alone puts together."""

    def model(self):
        w, s, m, pi = map(self.param, ("w", "s", "m", "pi"))
        with self.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            y = pyro.sample("y", dist.Categorical(logits=pi))
            pyro.sample("x", dist.Normal(w * z + m[y], s), obs=self.x)

    def guide(self):
        a, b, c = map(self.param, ("a", "b", "c"))
        with self.plate():
            pyro.sample("y", dist.Categorical(logits=a * self.x[:, None]), infer=self.infer)
            pyro.sample("z", RecordedNormal(b.sum() * self.x, c))

    def densities(self, theta, phi, noise, n, y):
        (y,) = y
        loc = phi["b"].sum() * self.x[n]
        z = loc + phi["c"] * noise(0, n)
        log_p = normal(z, 0.0, 1.0) + log_softmax(theta["pi"], y)
        log_p = log_p + normal(self.x[n], theta["w"] * z + theta["m"][y], theta["s"])
        return log_p, normal(z, loc, phi["c"]), log_softmax(phi["a"] * self.x[n], y)


class Upstream(Case):
    """y is enumerated given a draw u, and z drawn given both: as scANVI. r(y) is a mixture over particles."""

    is_free = False

    def model(self):
        w, s, m, pi = map(self.param, ("w", "s", "m", "pi"))
        with self.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            y = pyro.sample("y", dist.Categorical(logits=pi))
            u = pyro.sample("u", dist.Normal(w * z + m[y], 1.0))
            pyro.sample("x", dist.Normal(u, s), obs=self.x)

    def guide(self):
        a, b, c = map(self.param, ("a", "b", "c"))
        with self.plate():
            u = pyro.sample("u", RecordedNormal(a.sum() * self.x, c))
            y = pyro.sample("y", dist.Categorical(logits=a * u[..., None]), infer=self.infer)
            pyro.sample("z", RecordedNormal(b[y] * u, c * torch.exp(0.3 * u)))

    def densities(self, theta, phi, noise, n, y):
        (y,) = y
        loc = phi["a"].sum() * self.x[n]
        u = loc + phi["c"] * noise(0, n)
        scale = phi["c"] * torch.exp(0.3 * u)
        z = phi["b"][y] * u + scale * noise(1, y, n)
        log_p = normal(z, 0.0, 1.0) + log_softmax(theta["pi"], y)
        log_p = log_p + normal(u, theta["w"] * z + theta["m"][y], 1.0) + normal(self.x[n], u, theta["s"])
        log_q = normal(u, loc, phi["c"]) + normal(z, phi["b"][y] * u, scale)
        return log_p, log_q, log_softmax(phi["a"] * u, y)


class TwoSites(Case):
    """Two enumerated sites, the second given the first, and a draw given both."""

    values: ClassVar = list(itertools.product(range(3), range(2)))

    def model(self):
        w, s, m, pi = map(self.param, ("w", "s", "m", "pi"))
        with self.plate():
            y = pyro.sample("y", dist.Categorical(logits=pi))
            v = pyro.sample("v", dist.Bernoulli(logits=m[y]))
            z = pyro.sample("z", dist.Normal(m[y] - v, 1.0))
            pyro.sample("x", dist.Normal(w * z, s), obs=self.x)

    def guide(self):
        a, b, c = map(self.param, ("a", "b", "c"))
        with self.plate():
            y = pyro.sample("y", dist.Categorical(logits=a * self.x[:, None]), infer=self.infer)
            v = pyro.sample("v", dist.Bernoulli(logits=b[y] * self.x), infer=self.infer)
            pyro.sample("z", RecordedNormal(b[y] * self.x - v, c))

    def densities(self, theta, phi, noise, n, y):
        y, v = y
        x = self.x[n]
        loc = phi["b"][y] * x - v
        z = loc + phi["c"] * noise(0, v, y, n)

        def coin(logit):
            return torch.nn.functional.logsigmoid(logit if v else -logit)

        log_p = log_softmax(theta["pi"], y) + coin(theta["m"][y]) + normal(z, theta["m"][y] - v, 1.0)
        log_p = log_p + normal(x, theta["w"] * z, theta["s"])
        return log_p, normal(z, loc, phi["c"]), log_softmax(phi["a"] * x, y) + coin(phi["b"][y] * x)


class Global(Case):
    """y above the data: one joint weight, the product over the data inside of it."""

    cells = 1

    def model(self):
        w, s, m, pi = map(self.param, ("w", "s", "m", "pi"))
        y = pyro.sample("y", dist.Categorical(logits=pi))
        with self.plate():
            z = pyro.sample("z", dist.Normal(m[y], 1.0))
            pyro.sample("x", dist.Normal(w * z, s), obs=self.x)

    def guide(self):
        a, b, c = map(self.param, ("a", "b", "c"))
        y = pyro.sample("y", dist.Categorical(logits=a), infer=self.infer)
        with self.plate():
            pyro.sample("z", RecordedNormal(b[y] * self.x, c))

    def densities(self, theta, phi, noise, n, y):
        (y,) = y
        log_p, log_q = log_softmax(theta["pi"], y), 0.0
        for i in range(3):
            z = phi["b"][y] * self.x[i] + phi["c"] * noise(0, y, i)
            log_p = log_p + normal(z, theta["m"][y], 1.0) + normal(self.x[i], theta["w"] * z, theta["s"])
            log_q = log_q + normal(z, phi["b"][y] * self.x[i], phi["c"])
        return log_p, log_q, log_softmax(phi["a"], y)


class BothSides(PerValue):
    """A site of the model, given y, is summed out of the model as well."""

    def model(self):
        w, s, m, pi = map(self.param, ("w", "s", "m", "pi"))
        with self.plate():
            y = pyro.sample("y", dist.Categorical(logits=pi))
            h = pyro.sample("h", dist.Bernoulli(logits=m[y]), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(m[y] + h, 1.0))
            pyro.sample("x", dist.Normal(w * z, s), obs=self.x)

    def densities(self, theta, phi, noise, n, y):
        _, log_q, log_q_y = super().densities(theta, phi, noise, n, y)
        (y,) = y
        z = phi["b"][y] * self.x[n] + phi["c"] * noise(0, y, n)
        coin = torch.nn.functional.logsigmoid
        sums = torch.stack(
            [
                coin(-theta["m"][y]) + normal(z, theta["m"][y], 1.0),
                coin(theta["m"][y]) + normal(z, theta["m"][y] + 1, 1.0),
            ]
        ).logsumexp(0)
        log_p = log_softmax(theta["pi"], y) + sums + normal(self.x[n], theta["w"] * z, theta["s"])
        return log_p, log_q, log_q_y


CASES = [PerValue, Minibatch, Masked, Shared, Upstream, TwoSites, Global, BothSides]


def set_up(case):
    pyro.clear_param_store()
    for name in {**case.theta, **case.phi}:
        case.param(name)


def gradients(loss, case, seed=0, backward=None):
    """Loss and gradients by the package (or Pyro), and the noise that they were computed on."""
    set_up(case)
    pyro.set_rng_seed(seed)
    loss.loss(case.model, case.guide)  # the pair is probed here
    RecordedNormal.draws.clear()
    pyro.set_rng_seed(seed)
    value = (backward or loss.loss_and_grads)(case.model, case.guide)
    grads = {name: value.unconstrained().grad for name, value in pyro.get_param_store().items()}
    return value, grads, list(RecordedNormal.draws)


def per_particle(draws, num_particles, sizes):
    """The noise of each particle, as a function of site, values and cell.

    Arguments:
        draws: what was drawn, one tensor a site for each chunk.
        num_particles: the number of particles.
        sizes: the number of particles in each chunk; None for a run without a particle dim.
    """
    sites = len(draws) // len(sizes)
    found = []
    for chunk, size in enumerate(sizes):
        own = draws[chunk * sites : (chunk + 1) * sites]
        for k in range(size or 1):
            found.append([d if size is None else d.select(-2, k if d.shape[-2] > 1 else 0) for d in own])
    assert len(found) == num_particles
    return [lambda site, *index, own=own: own[site][index] for own in found]


def hand_written(name, case, noise, M, K, inside=False):
    """Loss and gradients by loops: (loss, theta's gradients, phi's gradients)."""
    theta = {k: torch.tensor(v, dtype=F64, requires_grad=True) for k, v in case.theta.items()}
    phi = {k: torch.tensor(v, dtype=F64, requires_grad=True) for k, v in case.phi.items()}
    model_side = guide_side = 0.0
    for n in range(case.cells):
        particles = [[case.densities(theta, phi, draw, n, y) for y in case.values] for draw in noise]
        counted = case.counted(n) if hasattr(case, "counted") else True
        join = stratified if inside else outside
        for_theta, for_phi = join(name, particles, M, K, counted)
        model_side = model_side - case.outer * for_theta
        guide_side = guide_side - case.outer * for_phi
    theta_grads = torch.autograd.grad(model_side, list(theta.values()), retain_graph=True, allow_unused=True)
    phi_grads = torch.autograd.grad(guide_side, list(phi.values()), allow_unused=True)
    return (
        model_side.item(),
        dict(zip(theta, theta_grads, strict=True)),
        dict(zip(phi, phi_grads, strict=True)),
    )


def outside(name, particles, M, K, counted):
    """The objectives of a cell, with the values summed over outside the logarithm.

    Arguments:
        particles: for each of M K particles and each value (log p, log q of draws, log q of the value).
        counted: whether log q of the values is part of the log-weights here; else they do not exist.
    """
    groups = [particles[m * K : (m + 1) * K] for m in range(M)]
    if name == "ELBO":
        grouped = [[particle] for particle in particles]
        total = sum(_mixed("IWAE", group, counted, 1, 1)[0] for group in grouped) / len(grouped)
        return total, total
    miwae = sum(_mixed("IWAE", group, counted, 1, K)[0] for group in groups) / M
    if name == "MIWAE":
        return miwae, miwae
    if name == "PIWAE":
        return _mixed("IWAE", particles, counted, M, K)[0], miwae
    return _mixed(name, particles, counted, M, K)


def _mixed(name, particles, counted, M, K):
    total = [0.0, 0.0]
    for y in range(len(particles[0])):
        r = sum(particle[y][2].exp() for particle in particles) / len(particles)
        log_w = [p - q - (r.log() if counted else 0.0) for p, q, _ in (particle[y] for particle in particles)]
        both = objectives(name, log_w, M, K)
        total = [so_far + r * value for so_far, value in zip(total, both, strict=True)]
    return total


def stratified(name, particles, M, K, counted):
    """The objectives of a cell, with the values summed over inside the logarithm."""
    log_w = []
    for particle in particles:
        terms = torch.stack([p - q for p, q, _ in particle])
        log_w.append(torch.logsumexp(terms, 0))
    if name == "ELBO":
        total = sum(log_w) / len(log_w)
        return total, total
    return objectives(name, log_w, M, K)


__all__ = ["CASES", "gradients", "hand_written", "logmeanexp", "per_particle", "set_up"]
