"""A hierarchical pair, its bound and gradients by a double loop over particles, without the package."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch

N, DEEP = 3, 2
PARAMETERS = {
    "model.spread": 0.2,
    "model.slope": 0.7,
    "guide.loc": 0.3,
    "guide.scale": -0.6,
    "guide.tilt": 0.4,
    "guide.a": 0.5,
    "guide.b": -0.3,
    "guide.width": -0.2,
    "guide.link": 0.6,
}


def data():
    return torch.linspace(-1.0, 1.5, N * DEEP, dtype=torch.float64).reshape(DEEP, N), torch.tensor(
        0.4
    ).double()


def parameters():
    return {name: pyro.param(name, torch.tensor(value).double()) for name, value in PARAMETERS.items()}


def normal(value, loc, scale):
    """Log density, written out."""
    return (
        -0.5 * ((value - loc) / scale) ** 2 - torch.log(torch.as_tensor(scale)) - 0.5 * math.log(2 * math.pi)
    )


class Pair:
    """Globals g1 -> g2, locals z1 -> z2 for each of N, three observations of each inside, and one outside.

    With ``discrete`` z1 is a coin; ``scale`` is a poutine.scale around the plate.
    """

    def __init__(self, subsample=None, discrete=False, size=N, scale=1.0):
        self.subsample, self.discrete, self.size, self.scale = subsample, discrete, size, scale

    def model(self, x, y):
        p = parameters()
        g1 = pyro.sample("g1", dist.Normal(torch.zeros(()).double(), 1.0))
        g2 = pyro.sample("g2", dist.Normal(0.5 * g1, p["model.spread"].exp()))
        pyro.sample("y", dist.Normal(g1 - g2, 0.8), obs=y)
        with poutine.scale(scale=self.scale), pyro.plate("data", self.size, self.subsample, dim=-1) as i:
            if self.discrete:
                z1 = pyro.sample("z1", dist.Bernoulli(logits=g1))
            else:
                z1 = pyro.sample("z1", dist.Normal(g1, 1.0))
            z2 = pyro.sample("z2", dist.Normal(p["model.slope"] * z1 + g2, 0.9))
            with pyro.plate("deep", DEEP, dim=-2):
                pyro.sample("x", dist.Normal(z2 + 0.2 * z1, 1.1), obs=x[:, i])

    def guide(self, x, y):
        p = parameters()
        g1 = pyro.sample("g1", dist.Normal(p["guide.loc"], p["guide.scale"].exp()))
        g2 = pyro.sample("g2", dist.Normal(p["guide.tilt"] * g1, p["guide.scale"].exp()))
        with poutine.scale(scale=self.scale), pyro.plate("data", self.size, self.subsample, dim=-1) as i:
            loc = p["guide.a"] * g2 + p["guide.b"] * x[:, i].mean(0)
            if self.discrete:
                z1 = pyro.sample("z1", dist.Bernoulli(logits=loc))
            else:
                z1 = pyro.sample("z1", dist.Normal(loc, p["guide.width"].exp()))
            pyro.sample("z2", dist.Normal(p["guide.link"] * z1 + g1, p["guide.width"].exp()))


class ByHand:
    """The terms of every particle of both levels, one at a time, at given values.

    Arguments:
        pair: the pair.
        values: of g1 and g2, of shape ``[S]``; of z1 and z2, of shape ``[S, L, B]``.
        index: the indices of the minibatch.
    """

    def __init__(self, pair, values, index=None):
        self.pair = pair
        self.values = {name: value.detach() for name, value in values.items()}
        self.index = list(range(pair.size)) if index is None else [int(i) for i in index]
        self.x, self.y = data()
        self.p = {name: value.detach().clone().requires_grad_() for name, value in parameters().items()}
        self.still = {name: value.detach() for name, value in self.p.items()}

    # Each takes the values and the parameters to evaluate with.
    def log_p_top(self, g1, g2, p):
        zero = torch.zeros(()).double()
        return (
            normal(g1, zero, torch.ones(()).double())
            + normal(g2, 0.5 * g1, p["model.spread"].exp())
            + normal(self.y, g1 - g2, torch.tensor(0.8).double())
        )

    def log_q_top(self, g1, g2, p):
        return normal(g1, p["guide.loc"], p["guide.scale"].exp()) + normal(
            g2, p["guide.tilt"] * g1, p["guide.scale"].exp()
        )

    def log_p_local(self, n, z1, z2, g1, g2, p, at=0):
        """Prior and likelihood of an index of the plate, whose indices of g are given."""
        total = normal(z2, p["model.slope"] * z1 + g2, torch.tensor(0.9).double())
        if self.pair.discrete:
            total = total + z1 * g1 - torch.nn.functional.softplus(g1)
        else:
            total = total + normal(z1, g1, torch.ones(()).double())
        for d in range(DEEP):
            total = total + normal(self.x[d, n], z2 + 0.2 * z1, torch.tensor(1.1).double())
        return total

    def loc(self, n, g2, p):
        return p["guide.a"] * g2 + p["guide.b"] * self.x[:, n].mean()

    def log_q_z1(self, n, z1, g2, p):
        if self.pair.discrete:
            logit = self.loc(n, g2, p)
            return z1 * logit - torch.nn.functional.softplus(logit)
        return normal(z1, self.loc(n, g2, p), p["guide.width"].exp())

    def log_q_local(self, n, z1, z2, g1, g2, p):
        return self.log_q_z1(n, z1, g2, p) + normal(z2, p["guide.link"] * z1 + g1, p["guide.width"].exp())

    def on_path(self, s):
        """The globals of a particle as functions of the parameters, by the noise that gave them."""
        p, q, v = self.p, self.still, self.values
        e1 = (v["g1"][s] - q["guide.loc"]) / q["guide.scale"].exp()
        e2 = (v["g2"][s] - q["guide.tilt"] * v["g1"][s]) / q["guide.scale"].exp()
        g1 = p["guide.loc"] + p["guide.scale"].exp() * e1
        return g1, p["guide.tilt"] * g1 + p["guide.scale"].exp() * e2

    def local_on_path(self, s, j, i, g1, g2):
        p, q, v, n = self.p, self.still, self.values, self.index[i]
        z1 = v["z1"][s, j, i]
        if not self.pair.discrete:
            e1 = (z1 - self.loc(n, v["g2"][s], q)) / q["guide.width"].exp()
            z1 = self.loc(n, g2, p) + p["guide.width"].exp() * e1
        e2 = (v["z2"][s, j, i] - q["guide.link"] * v["z1"][s, j, i] - v["g1"][s]) / q["guide.width"].exp()
        return z1, p["guide.link"] * z1 + g1 + p["guide.width"].exp() * e2

    @property
    def sizes(self):
        return self.values["z1"].shape

    @property
    def scale(self):
        return self.pair.scale * self.pair.size / len(self.index)

    def log_weights(self):
        """Those of both levels as differentiable functions of the parameters: ``[S]`` and ``[S, L, B]``."""
        S, L, B = self.sizes
        top, rows = [], []
        for s in range(S):
            g1, g2 = self.on_path(s)
            top.append(self.log_p_top(g1, g2, self.p) - self.log_q_top(g1, g2, self.p))
            for j in range(L):
                for i in range(B):
                    z1, z2 = self.local_on_path(s, j, i, g1, g2)
                    n = self.index[i]
                    rows.append(
                        self.log_p_local(n, z1, z2, g1, g2, self.p)
                        - self.log_q_local(n, z1, z2, g1, g2, self.p)
                    )
        return torch.stack(top), torch.stack(rows).reshape(S, L, B)

    def value(self, outer, inner, top, local):
        """The bound by the functions of two log-weight matrices, ``[S]`` and ``[L]`` to a number."""
        S, _, B = self.sizes
        rows = []
        for s in range(S):
            rows.append(top[s] + self.scale * sum(inner(local[s, :, i]) for i in range(B)))
        return outer(torch.stack(rows))

    def grads(self, total):
        """Minus the gradients of a scalar by each parameter."""
        found = torch.autograd.grad(-total, list(self.p.values()), allow_unused=True)
        return {
            name: torch.zeros(()).double() if grad is None else grad
            for name, grad in zip(self.p, found, strict=True)
        }

    def reparam(self, outer, inner):
        return self.grads(self.value(outer, inner, *self.log_weights()))

    def derivatives(self, outer, inner):
        """Value, first derivatives by top and local log-weights, second ones by each local log-weight."""
        top, local = (part.detach().requires_grad_() for part in self.log_weights())
        value = self.value(outer, inner, top, local)
        a, u = torch.autograd.grad(value, (top, local), create_graph=True)
        second = torch.zeros_like(local)
        if u.requires_grad:
            for where in torch.cartesian_prod(*map(torch.arange, local.shape)).tolist():
                (row,) = torch.autograd.grad(u[tuple(where)], local, retain_graph=True)
                second[tuple(where)] = row[tuple(where)]
        return value.detach(), a.detach(), u.detach(), second

    def model_part(self, a, u):
        """The gradient of the model's parameters, whatever the estimator."""
        S, L, B = self.sizes
        v, total = self.values, 0.0
        for s in range(S):
            g1, g2 = v["g1"][s], v["g2"][s]
            total = total + a[s] * self.log_p_top(g1, g2, self.p)
            for j in range(L):
                for i in range(B):
                    z1, z2 = v["z1"][s, j, i], v["z2"][s, j, i]
                    total = total + u[s, j, i] * self.log_p_local(self.index[i], z1, z2, g1, g2, self.p)
        return total

    def stl(self, outer, inner):
        """All weights along the paths alone: densities with parameters held, values as functions of them."""
        _, a, u, _ = self.derivatives(outer, inner)
        S, L, B = self.sizes
        total, still = self.model_part(a, u), self.still
        for s in range(S):
            g1, g2 = self.on_path(s)
            total = total + a[s] * (self.log_p_top(g1, g2, still) - self.log_q_top(g1, g2, still))
            for j in range(L):
                for i in range(B):
                    z1, z2 = self.local_on_path(s, j, i, g1, g2)
                    n = self.index[i]
                    total = total + u[s, j, i] * (
                        self.log_p_local(n, z1, z2, g1, g2, still)
                        - self.log_q_local(n, z1, z2, g1, g2, still)
                    )
        return self.grads(total)

    def dreg(self, outer, inner, outer_is_linear):
        """Doubly reparameterised in the locals, as docs/theory.md has it."""
        _, a, u, second = self.derivatives(outer, inner)
        S, L, B = self.sizes
        total, still, v = self.model_part(a, u), self.still, self.values
        for s in range(S):
            g1, g2 = self.on_path(s)
            h1, h2 = v["g1"][s], v["g2"][s]
            total = total + a[s] * self.log_p_top(g1, g2, still)
            total = total - a[s] * self.log_q_top(g1, g2, still if outer_is_linear else self.p)
            for j in range(L):
                for i in range(B):
                    n = self.index[i]
                    z1, z2 = self.local_on_path(s, j, i, g1, g2)
                    w1, w2 = v["z1"][s, j, i], v["z2"][s, j, i]
                    path = self.log_p_local(n, z1, z2, h1, h2, still) - self.log_q_local(
                        n, z1, z2, h1, h2, still
                    )
                    total = total + (u - second)[s, j, i] * path
                    total = total + u[s, j, i] * self.log_p_local(n, w1, w2, g1, g2, still)
        return self.grads(total)

    def score(self, outer, inner, suggest):
        """The total derivative, and for the coins V less V with their log-weight replaced."""
        S, L, B = self.sizes
        top, local = self.log_weights()
        total = self.value(outer, inner, top, local)
        value, fixed, above = total.detach(), local.detach(), top.detach()
        for s in range(S):
            _, g2 = self.on_path(s)
            for j in range(L):
                for i in range(B):
                    changed = fixed.clone()
                    changed[s, j, i] = suggest(torch.cat([fixed[s, :j, i], fixed[s, j + 1 :, i]]))
                    signal = value - self.value(outer, inner, above, changed)
                    z1 = self.values["z1"][s, j, i]
                    total = total + signal * self.log_q_z1(self.index[i], z1, g2, self.p)
        return self.grads(total)


def lme(log_w):
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))
