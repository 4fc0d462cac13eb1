"""Random pairs of sequences, and their filters' bound and gradients by loops."""

from __future__ import annotations

import math
import random
from contextlib import ExitStack
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch

from pyro_iw import FIVO_ELBO


@dataclass(eq=False)
class Steps:
    """A random pair of Pyro's SMC protocol: the objects that :meth:`part` makes."""

    seed: int
    T: int = 1
    cells: int | None = None  # of the only plate, or no plate
    full_size: int | None = None
    latents: dict[str, tuple[str, set[int]]] = field(default_factory=dict)  # family, moments (-1 is init)
    observed: dict[str, set[int]] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # [T + 1, cells], of a latent or observed site
    scale: float = 1.0
    offsets: dict[str, torch.Tensor] = field(default_factory=dict)
    params: dict[str, torch.Tensor] = field(default_factory=dict)

    dtype = torch.float64
    validate = True
    improper: dict = field(default_factory=dict)

    def start(self):
        """Nothing is kept."""

    @property
    def traits(self):
        return ["masked"] * bool(self.masks)

    @property
    def names(self):
        return [*self.latents, *self.observed]

    def eta(self, role, name, t, values, at=...):
        """A number for each cell (or that of one): parents are what each latent was last."""
        total = self.params[f"{role}.{name}"] + self.offsets[f"{role}.{name}"][t + 1][at]
        for parent, value in values.items():
            coefficient = self.params.get(f"{role}.{name}.{parent}")
            total = total if coefficient is None else total + coefficient * torch.tanh(value)
        return total

    def distribution(self, role, name, eta):
        if self.latents.get(name, ("normal",))[0] == "coin":
            return dist.Bernoulli(logits=eta)
        return dist.Normal(eta, self.params[f"{role}.{name}.s"].exp())

    def part(self, role):
        return _Part(self, role)


class _Part:
    def __init__(self, pair, role):
        self.pair, self.role = pair, role

    def init(self, state):
        self.run(state, -1)

    def step(self, state, t):
        self.run(state, t)

    def run(self, state, t):
        pair, values = self.pair, dict(state)
        with ExitStack() as stack:
            if pair.cells is not None:
                stack.enter_context(pyro.plate("data", pair.full_size, subsample=torch.arange(pair.cells)))
            stack.enter_context(poutine.scale(scale=pair.scale))
            for name in pair.names:
                latent = pair.latents.get(name)
                if t not in (latent[1] if latent else pair.observed[name]):
                    continue
                if latent is None and self.role == "guide":
                    continue
                fn = pair.distribution(self.role, name, pair.eta(self.role, name, t, values))
                with poutine.mask(mask=pair.masks[name][t + 1]) if name in pair.masks else ExitStack():
                    if latent is None:
                        pyro.sample(name, fn, obs=pair.offsets[f"data.{name}"][t + 1])
                    else:
                        values[name] = pyro.sample(name, fn)
        if self.role == "model":
            for name in pair.latents.keys() & values.keys():
                state[name] = values[name]


def make_steps(seed: int) -> Steps:
    """The pair of this seed."""
    r = random.Random(seed)
    pair = Steps(seed, T=r.randint(1, 4), cells=r.choice([None, 1, 2, 3]))
    shape = () if pair.cells is None else (pair.cells,)
    if pair.cells is not None:
        pair.full_size = pair.cells + r.choice([0, 0, 2])
    pair.scale = r.choice([1.0, 1.0, 0.5])
    moments = range(-1, pair.T)
    coins = r.random() < 0.3
    for i in range(r.choice([1, 1, 2, 3])):
        when = {t for t in moments if (t >= 0 or r.random() < 0.3) and r.random() < 0.9}
        pair.latents[f"z{i}"] = ("coin" if coins and r.random() < 0.6 else "normal"), when
    for i in range(r.choice([1, 1, 2])):
        pair.observed[f"x{i}"] = {t for t in range(pair.T) if r.random() < 0.9}

    def numbers(*size):
        return torch.tensor([r.gauss(0, 0.7) for _ in range(math.prod(size))], dtype=torch.float64).reshape(
            size
        )

    def leaf(value):
        return torch.tensor(value, dtype=torch.float64, requires_grad=True)

    for name in pair.names:
        for role in ("model", "guide") if name in pair.latents else ("model", "data"):
            pair.offsets[f"{role}.{name}"] = numbers(pair.T + 1, *shape)
            pair.params |= {
                f"{role}.{name}": leaf(r.gauss(0, 0.5)),
                f"{role}.{name}.s": leaf(r.uniform(-0.7, 0.2)),
            }
            for parent in pair.latents:
                if r.random() < 0.7:
                    pair.params[f"{role}.{name}.{parent}"] = leaf(r.gauss(0, 0.7))
    if r.random() < 0.4:  # sequences that end, or data that are missing
        ends = torch.tensor([r.randint(1, pair.T + 1) for _ in range(math.prod(shape))]).reshape(shape)
        running = torch.arange(pair.T + 1).reshape(-1, *[1] * len(shape)) < ends
        seen = numbers(pair.T + 1, *shape) < 0.3
        names, mask = (pair.names, running) if r.random() < 0.6 else (list(pair.observed), seen)
        pair.masks = dict.fromkeys(names, mask)
    return pair


def lme(values):
    return torch.stack(values).logsumexp(0) - math.log(len(values))


class Loop:
    """The bound of filters that have run, from the values that were drawn and the ancestors chosen."""

    def __init__(self, pair, filtered, loss, kl_weight):
        self.pair, self.filtered, self.loss, self.kl_weight = pair, filtered, loss, kl_weight
        joint = loss.plates == () or pair.cells is None
        groups = [None] if joint else range(pair.cells)
        found = [self.cell(group) for group in groups]
        scale = pair.scale * (1.0 if pair.cells is None or joint else pair.full_size / pair.cells)
        self.bound = scale * sum(bound for bound, _ in found)
        self.surrogate = scale * sum(surrogate for _, surrogate in found)

    def values(self, moment, name, k, cell):
        value = moment.traces.pairs[0].guide.nodes[name]["value"].detach()
        value = value[k if len(value) > 1 else 0]
        return value if cell is None else value[cell]

    def density(self, role, name, t, state, value, cell, params=None, masked=True):
        at = ... if cell is None else cell
        kept, self.pair.params = self.pair.params, params or self.pair.params
        result = self.pair.distribution(role, name, self.pair.eta(role, name, t, state, at)).log_prob(value)
        self.pair.params = kept
        if masked and name in self.pair.masks:
            result = torch.where(self.pair.masks[name][t + 1][at], result, 0.0)
        return result.sum()

    def drawn(self, name, t, state, value, cell):
        """The value, along its path."""
        if self.pair.latents[name][0] == "coin":
            return value
        fn = self.pair.distribution(
            "guide", name, self.pair.eta("guide", name, t, state, ... if cell is None else cell)
        )
        return fn.loc + fn.scale * ((value - fn.loc) / fn.scale).detach()

    def particle(self, moment, k, state, cell):
        """The densities of a particle's step: log p, log q, that of coins, and what the state becomes."""
        pair, t, beta = self.pair, moment.index, self.kl_weight
        new, p, q, coins = dict(state), 0.0, 0.0, torch.zeros((), dtype=torch.float64)
        fixed = {name: value.detach() for name, value in pair.params.items()}
        below, direct, alone = {n: v.detach() for n, v in state.items()}, dict(state), 0.0
        s = 0.0
        for name in [name for name in pair.latents if t in pair.latents[name][1]]:
            value = self.values(moment, name, k, cell)
            z = self.drawn(name, t, new, value, cell)
            q = q + beta * self.density("guide", name, t, new, z, cell)
            if pair.latents[name][0] == "coin":
                coins = coins + self.density("guide", name, t, new, value, cell, masked=False)
            p = p + beta * self.density("model", name, t, new, z, cell)
            s = s + beta * self.density("model", name, t, direct, value, cell)
            alone = alone - beta * self.density("guide", name, t, below, z, cell, fixed)
            alone = alone + beta * self.density("model", name, t, below, z, cell, fixed)
            new[name], below[name], direct[name] = z, z, value
        for name in [name for name in pair.observed if t in pair.observed[name]]:
            data = pair.offsets[f"data.{name}"][t + 1]
            data = data if cell is None else data[cell]
            p = p + self.density("model", name, t, new, data, cell)
            s = s + self.density("model", name, t, direct, data, cell)
            alone = alone + self.density("model", name, t, below, data, cell, fixed)
        return p - q, coins, s, alone, new

    def cell(self, cell):
        K, tau = self.loss.K, self.loss.ess_threshold
        state, since = [{} for _ in range(K)], [torch.zeros((), dtype=torch.float64)] * K
        closed, scores, ancestry, extra = [], [], [], 0.0
        at = () if cell is None else (cell,)
        for i, moment in enumerate(self.filtered.moments):
            if i > 0:
                weights = torch.stack(since).detach().softmax(0)
                chosen = tau == 1 or 1 / weights.square().sum() < tau * K
                chosen = chosen and tau > 0 and self.active(self.filtered.moments[i - 1].index, cell)
                draw = moment.draw
                assert chosen == (draw is not None and bool(draw.chosen[(0, *at)])), "what is resampled"
                if chosen:
                    closed.append(lme(since))
                    ancestors = [int(draw.ancestors[(k, *at)]) for k in range(K)]
                    log_w = torch.stack(since).log_softmax(0)
                    ancestry.append((sum(closed).detach(), sum(log_w[a] for a in ancestors)))
                    state = [state[a] for a in ancestors]
                    since = [torch.zeros((), dtype=torch.float64)] * K
            reached = (sum(closed) + lme(since)).detach() if i > 0 else 0.0
            parts = [self.particle(moment, k, state[k], cell) for k in range(K)]
            since = [old + part[0] for old, part in zip(since, parts, strict=True)]
            scores.append((reached, sum(part[1] for part in parts)))
            s = torch.stack(since).detach().softmax(0)
            c = (1 - self.kl_weight) * s + self.kl_weight * s**2
            extra = extra + sum(s[k] * part[2] + c[k] * part[3] for k, part in enumerate(parts))
            state = [part[4] for part in parts]
        bound = sum(closed) + lme(since)
        surrogate = extra if self.loss.estimator == "dreg" else bound
        if self.loss.estimator == "score":
            surrogate = surrogate + sum((bound.detach() - before) * score for before, score in scores)
        if self.loss.resampling_gradient:
            surrogate = surrogate + sum((bound.detach() - before) * score for before, score in ancestry)
        return bound.detach(), surrogate

    def active(self, t, cell):
        """Whether a site of the moment is not masked."""
        pair = self.pair
        when = {**{n: latent[1] for n, latent in pair.latents.items()}, **pair.observed}
        here = [name for name in pair.names if t in when[name]]
        at = ... if cell is None else cell
        return any(name not in pair.masks or bool(pair.masks[name][t + 1][at].any()) for name in here)


def make_loss(pair: Steps, r: random.Random) -> tuple[FIVO_ELBO, float]:
    """A loss for the pair, and its kl_weight."""
    K, tau = r.choice([2, 3, 4]), r.choice([0.0, 0.5, 0.8, 1.0, 1.0])
    if r.random() < 0.1:
        K, tau = 1, 0.0
    coins = any(family == "coin" for family, _ in pair.latents.values())
    estimator = "score" if coins else r.choice(["reparam", "score", "dreg" if tau == 1 else "auto"])
    options = {"estimator": estimator, "resampling": r.choice(["systematic", "multinomial"])}
    options["resampling_gradient"] = (
        tau == 1 and estimator != "dreg" and options["resampling"] == "multinomial" and r.random() < 0.5
    )
    options["plates"] = () if pair.full_size == pair.cells and r.random() < 0.2 else None
    kl_weight = 0.5 if r.random() < 0.2 else 1.0
    return FIVO_ELBO(K, tau, **options, kl_weight=kl_weight), kl_weight
