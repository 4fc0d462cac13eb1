"""Model/guide pairs written twice: in Pyro, and as a hand-made density of the same particles.

Each case has ``model()`` and ``guide()`` for Pyro, initial parameters ``theta`` and ``phi``, and
``log_weights(theta, phi, noise)``: the pairs (log p, log q), each a list over particles of a list over cells
of scalars, from the standard normal draws ``noise`` (one tensor a guide site, particles on dim 0).
``outer`` is the factor each cell's bound is multiplied by.
"""

from typing import ClassVar

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch

from helpers.truth import RecordedNormal, normal


class Case:
    theta: ClassVar = {"w": 1.3, "s": 0.7}
    phi: ClassVar = {"a": 0.4, "c": 0.9}
    outer = 1.0

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(self.shape, generator=generator, dtype=dtype)

    def param(self, name):
        value = {**self.theta, **self.phi}[name]
        return pyro.param(name, torch.tensor(value, dtype=self.dtype))

    @property
    def model_callable(self):
        return self.model

    @property
    def guide_callable(self):
        return self.guide


class DataPlate(Case):
    """z_n ~ N(0, 1), x_n ~ N(w z_n, s); guide z_n ~ N(a x_n, c)."""

    shape = (4,)

    def plate(self):
        return pyro.plate("data", 4)

    def model(self):
        w, s = self.param("w"), self.param("s")
        with self.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros_like(w), 1.0))
            pyro.sample("x", dist.Normal(w * z, s), obs=self.x)

    def guide(self):
        a, c = self.param("a"), self.param("c")
        with self.plate():
            pyro.sample("z", RecordedNormal(a * self.x, c))

    def log_joint(self, theta, z, n):
        return normal(z, 0.0, 1.0) + normal(self.x[n], theta["w"] * z, theta["s"])

    def log_weights(self, theta, phi, noise):
        log_p, log_q = [], []
        for eps in noise[0]:
            row_p, row_q = [], []
            for n in range(4):
                z = phi["a"] * self.x[n] + phi["c"] * eps[n]
                row_p.append(self.log_joint(theta, z, n))
                row_q.append(normal(z, phi["a"] * self.x[n], phi["c"]))
            log_p.append(row_p)
            log_q.append(row_q)
        return log_p, log_q


class Subsampled(DataPlate):
    """The same as a minibatch of 4 out of 40."""

    outer = 10.0

    def plate(self):
        return pyro.plate("data", 40, subsample=torch.tensor([3, 17, 20, 39]))


class SharedScale(Subsampled):
    """A minibatch, with the common poutine.scale(1 / N) on model and guide."""

    outer = 10.0 / 40

    @property
    def model_callable(self):
        return poutine.scale(self.model, 1 / 40)

    @property
    def guide_callable(self):
        return poutine.scale(self.guide, 1 / 40)


class ScaledPerCell(DataPlate):
    """A tensor of scales, one a datapoint, on model and guide: outside the logarithm too."""

    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])

    @property
    def outer(self):
        return self.weights.to(self.dtype)

    @property
    def model_callable(self):
        return poutine.scale(self.model, self.outer)

    @property
    def guide_callable(self):
        return poutine.scale(self.guide, self.outer)


class Tempered(Subsampled):
    """poutine.scale on the likelihood alone: inside the logarithm, as the user asked."""

    def model(self):
        w, s = self.param("w"), self.param("s")
        with self.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros_like(w), 1.0))
            with poutine.scale(scale=0.25):
                pyro.sample("x", dist.Normal(w * z, s), obs=self.x)

    def log_joint(self, theta, z, n):
        return normal(z, 0.0, 1.0) + 0.25 * normal(self.x[n], theta["w"] * z, theta["s"])


class Masked(DataPlate):
    """Cell 1 has no observation, cell 2 is masked altogether, in model and guide."""

    seen = torch.tensor([True, False, False, True])
    cell = torch.tensor([True, True, False, True])

    def model(self):
        w, s = self.param("w"), self.param("s")
        with self.plate(), poutine.mask(mask=self.cell):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(w), 1.0))
            with poutine.mask(mask=self.seen):
                pyro.sample("x", dist.Normal(w * z, s), obs=self.x)

    def guide(self):
        with poutine.mask(mask=self.cell):
            super().guide()

    def log_weights(self, theta, phi, noise):
        log_p, log_q = [], []
        for eps in noise[0]:
            row_p, row_q = [], []
            for n in range(4):
                z = phi["a"] * self.x[n] + phi["c"] * eps[n]
                p, q = normal(z, 0.0, 1.0), normal(z, phi["a"] * self.x[n], phi["c"])
                if n in (0, 3):
                    p = p + normal(self.x[n], theta["w"] * z, theta["s"])
                row_p.append(0 * p if n == 2 else p)
                row_q.append(0 * q if n == 2 else q)
            log_p.append(row_p)
            log_q.append(row_q)
        return log_p, log_q


class NestedPlates(Case):
    """z and x in both of two plates: one bound for each of the 3 x 2 cells."""

    shape = (3, 2)
    latent_in_both = True

    def model(self):
        w, s = self.param("w"), self.param("s")
        with pyro.plate("rows", 3, dim=-2):
            if not self.latent_in_both:
                z = pyro.sample("z", dist.Normal(torch.zeros_like(w), 1.0))
            with pyro.plate("columns", 2, dim=-1):
                if self.latent_in_both:
                    z = pyro.sample("z", dist.Normal(torch.zeros_like(w), 1.0))
                pyro.sample("x", dist.Normal(w * z, s), obs=self.x)

    def guide(self):
        a, c = self.param("a"), self.param("c")
        with pyro.plate("rows", 3, dim=-2):
            if self.latent_in_both:
                with pyro.plate("columns", 2, dim=-1):
                    pyro.sample("z", RecordedNormal(a * self.x, c))
            else:
                pyro.sample("z", RecordedNormal(a * self.x[:, :1], c))

    def log_weights(self, theta, phi, noise):
        log_p, log_q = [], []
        for eps in noise[0]:
            row_p, row_q = [], []
            for i in range(3):
                for j in range(2):
                    loc = phi["a"] * self.x[i, j]
                    z = loc + phi["c"] * eps[i, j]
                    row_p.append(normal(z, 0.0, 1.0) + normal(self.x[i, j], theta["w"] * z, theta["s"]))
                    row_q.append(normal(z, loc, phi["c"]))
            log_p.append(row_p)
            log_q.append(row_q)
        return log_p, log_q


class PlateInsideKeptPlate(NestedPlates):
    """z in the outer plate alone: one bound for each of the 3 rows, its columns summed inside."""

    latent_in_both = False

    def log_weights(self, theta, phi, noise):
        log_p, log_q = [], []
        for eps in noise[0]:
            row_p, row_q = [], []
            for i in range(3):
                loc = phi["a"] * self.x[i, 0]
                z = loc + phi["c"] * eps[i, 0]
                p = normal(z, 0.0, 1.0)
                for j in range(2):
                    p = p + normal(self.x[i, j], theta["w"] * z, theta["s"])
                row_p.append(p)
                row_q.append(normal(z, loc, phi["c"]))
            log_p.append(row_p)
            log_q.append(row_q)
        return log_p, log_q


class Sequence(Case):
    """A chain of latents in one data plate, each observed; the guide a chain too.

    Its second scale depends on the first latent. With a location and a scale alone the guide's entropy would
    be the same for all particles, and its weights could be anything that sums to 1.
    """

    shape = (3, 2)  # [data, time], time on the rightmost dim

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.steps = [self.x[:, t] for t in range(2)]

    def model(self):
        w, s = self.param("w"), self.param("s")
        with pyro.plate("data", 3):
            h = torch.zeros_like(w)
            for t in pyro.markov(range(2)):
                h = pyro.sample(f"h_{t}", dist.Normal(w * h, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(h, s), obs=self.steps[t])

    def guide(self):
        a, c = self.param("a"), self.param("c")
        with pyro.plate("data", 3):
            h = torch.zeros_like(a)
            for t in pyro.markov(range(2)):
                scale = c * torch.exp(0.5 * h)
                h = pyro.sample(f"h_{t}", RecordedNormal(a * (self.steps[t] + h), scale))

    def log_weights(self, theta, phi, noise):
        log_p, log_q = [], []
        for k in range(len(noise[0])):
            row_p, row_q = [], []
            for n in range(3):
                p = q = 0.0
                previous = torch.zeros((), dtype=self.dtype)
                for t in range(2):
                    loc = phi["a"] * (self.x[n, t] + previous)
                    scale = phi["c"] * torch.exp(0.5 * previous)
                    h = loc + scale * noise[t][k, n]
                    p = p + normal(h, theta["w"] * previous, 1.0) + normal(self.x[n, t], h, theta["s"])
                    q = q + normal(h, loc, scale)
                    previous = h
                row_p.append(p)
                row_q.append(q)
            log_p.append(row_p)
            log_q.append(row_q)
        return log_p, log_q


class GlobalLatent(Case):
    """A weight shared by the data: one joint importance weight."""

    shape = (4,)

    def model(self):
        w, s = self.param("w"), self.param("s")
        b = pyro.sample("b", dist.Normal(torch.zeros_like(w), 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(w * b, 1.0))
            pyro.sample("x", dist.Normal(z, s), obs=self.x)

    def guide(self):
        a, c = self.param("a"), self.param("c")
        b = pyro.sample("b", RecordedNormal(a, c))
        with pyro.plate("data", 4):
            pyro.sample("z", RecordedNormal(a * self.x + b, c))

    def log_weights(self, theta, phi, noise):
        log_p, log_q = [], []
        for eps_b, eps_z in zip(noise[0], noise[1], strict=True):
            b = phi["a"] + phi["c"] * eps_b.reshape(())
            p, q = normal(b, 0.0, 1.0), normal(b, phi["a"], phi["c"])
            for n in range(4):
                loc = phi["a"] * self.x[n] + b
                z = loc + phi["c"] * eps_z[n]
                p = p + normal(z, theta["w"] * b, 1.0) + normal(self.x[n], z, theta["s"])
                q = q + normal(z, loc, phi["c"])
            log_p.append([p])
            log_q.append([q])
        return log_p, log_q


class Tied(DataPlate):
    """The same as DataPlate, with one parameter in model and guide: its gradient is the sum of its roles."""

    theta: ClassVar = {"w": 0.6, "s": 0.7}
    phi: ClassVar = {"w": 0.6, "c": 0.9}

    def guide(self):
        w, c = self.param("w"), self.param("c")
        with self.plate():
            pyro.sample("z", RecordedNormal(w * self.x, c))

    def log_weights(self, theta, phi, noise):
        return super().log_weights(theta, {"a": phi["w"], "c": phi["c"]}, noise)


CASES = [
    DataPlate,
    Subsampled,
    SharedScale,
    ScaledPerCell,
    Tempered,
    Masked,
    NestedPlates,
    PlateInsideKeptPlate,
    Sequence,
    GlobalLatent,
    Tied,
]
