"""Random model/guide pairs, each from one integer."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch

from .families import BUILD, CONTINUOUS, DISCRETE, ENUMERABLE, EVENT_DIM, OBSERVED, PRIORS, summary


@dataclass(eq=False)
class Plate:
    name: str
    size: int
    subsample: int | None
    dim: int


@dataclass(eq=False)
class Site:
    """A sample site; a latent one has a counterpart in the guide unless it is enumerated."""

    name: str
    family: str
    plates: tuple[int, ...]
    parents: tuple[str, ...] = ()
    guide_family: str = ""
    guide_parents: tuple[str, ...] = ()
    role: str = "latent"  # latent, enumerated, observed, factor, deterministic
    mask: torch.Tensor | None = None
    scale: float = 1.0  # in the model
    guide_scale: float = 1.0
    shared: bool = False  # whether model and guide share a parameter
    auxiliary: bool = False  # whether the guide's value is a function of another site's
    data: torch.Tensor | None = None
    obs_mask: bool = False


@dataclass(eq=False)
class Pair:
    """A model and a guide, methods :meth:`model` and :meth:`guide`."""

    seed: int
    plates: list[Plate] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    guide_order: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float64
    scale: object = None  # of the whole of both
    improper: dict[str, str] = field(default_factory=dict)  # estimator, or "" for all: why not in silence
    values: dict[str, float] = field(default_factory=dict)  # initial ones of the parameters
    offsets: dict[str, torch.Tensor] = field(default_factory=dict)
    v: torch.Tensor | None = None
    auto: str = ""
    guide_factor: str = ""
    validate: bool = True

    @property
    def enumerated(self):
        sizes = {"bernoulli": 2, "categorical": len(self.v)}
        return {s.name: sizes[s.family] for s in self.sites if s.role == "enumerated"}

    @property
    def names(self):
        return [x.name for x in (*self.sites, *self.plates)] + ["correction"]

    def param(self, name):
        return pyro.param(name, torch.tensor(self.values[name], dtype=self.dtype))

    def open_plates(self):
        return [pyro.plate(p.name, p.size, p.subsample, dim=p.dim) for p in self.plates]

    def local(self, tensor, site, plates, event_dim=0):
        """The part of a tensor over all cells that the minibatches hold."""
        for i in site.plates:
            plate = self.plates[i]
            if plate.subsample is not None:
                tensor = tensor.index_select(plate.dim - event_dim, plates[i].indices)
        return tensor

    def distribution(self, role, site, values, plates):
        prefix = f"{role}.{site.name}"
        parents = site.parents if role == "model" else site.guide_parents
        family = site.family if role == "model" else site.guide_family
        bias = f"model.{site.name}.b" if site.shared else f"{prefix}.b"
        eta = self.param(bias) + self.local(self.offsets[prefix], site, plates)
        families = {s.name: s.family for s in self.sites}
        for parent in parents:
            eta = eta + self.param(f"{prefix}.{parent}") * summary(families[parent], values[parent], self.v)
        return BUILD[family](eta, self.param(f"{prefix}.s").exp(), self.v)

    def around(self, stack, site, plates, scale):
        for i in site.plates:
            stack.enter_context(plates[i])
        if scale != 1:
            stack.enter_context(poutine.scale(scale=scale))
        if site.mask is not None:
            stack.enter_context(poutine.mask(mask=self.local(site.mask, site, plates)))

    def scaled(self, stack):
        if self.scale is not None:
            stack.enter_context(poutine.scale(scale=self.scale))

    def model(self):
        plates, values = self.open_plates(), {}
        with ExitStack() as whole:
            self.scaled(whole)
            for site in self.sites:
                with ExitStack() as stack:
                    self.around(stack, site, plates, site.scale)
                    self.model_site(site, values, plates)

    def model_site(self, site, values, plates):
        if site.role in ("factor", "deterministic"):
            terms = [values[parent] for parent in site.parents]
            families = {s.name: s.family for s in self.sites}
            total = self.param(f"model.{site.name}.b") * sum(
                summary(families[p], t, self.v) for p, t in zip(site.parents, terms, strict=True)
            )
            make = pyro.factor if site.role == "factor" else pyro.deterministic
            make(site.name, total)
            return
        fn = self.distribution("model", site, values, plates)
        if site.role == "observed":
            data = self.local(site.data, site, plates, EVENT_DIM.get(site.family, 0))
            pyro.sample(site.name, fn, obs=data)
        else:
            infer = {"enumerate": "parallel"} if site.role == "enumerated" else {}
            values[site.name] = pyro.sample(site.name, fn, infer=infer)

    def guide(self):
        plates, values = self.open_plates(), {}
        sites = {site.name: site for site in self.sites}
        with ExitStack() as whole:
            self.scaled(whole)
            for name in self.guide_order:
                site = sites[name]
                with ExitStack() as stack:
                    self.around(stack, site, plates, site.guide_scale)
                    fn = self.distribution("guide", site, values, plates)
                    if site.auxiliary:
                        values[name] = self.change_of_variables(site, fn)
                    else:
                        values[name] = pyro.sample(name, fn)
            if self.guide_factor:
                first = sites[self.guide_order[0]]
                with ExitStack() as stack:
                    self.around(stack, first, plates, 1.0)
                    weight = self.param("guide.factor") * summary(first.family, values[first.name], self.v)
                    pyro.factor("correction", weight, has_rsample=self.guide_factor == "path")

    def change_of_variables(self, site, fn):
        """A Delta of another site: z = exp(u) above zero, z = 2 u on the line."""
        u = pyro.sample(f"{site.name}_u", fn, infer={"is_auxiliary": True})
        value, log_density = (u.exp(), -u) if site.family in PRIORS_ABOVE_ZERO else (2 * u, 0 * u - LOG_2)
        return pyro.sample(site.name, dist.Delta(value, log_density=log_density))


LOG_2 = 0.6931471805599453
PRIORS_ABOVE_ZERO = ("lognormal", "gamma", "exponential", "halfnormal")
ON_THE_LINE = ("normal", "laplace", "student")


def make_pair(seed: int) -> Pair:
    """The pair of this seed."""
    r = random.Random(seed)
    pair = Pair(seed, dtype=torch.float32 if r.random() < 0.15 else torch.float64)
    pair.v = torch.tensor([r.uniform(-1, 1) for _ in range(r.randint(2, 3))], dtype=pair.dtype)
    for i in range(r.choice([0, 1, 1, 1, 2, 2, 3])):
        size = r.choice([1, 2, 2, 3])
        subsample = r.randint(1, size) if r.random() < 0.25 else None
        pair.plates.append(Plate(f"p{i}", size, subsample, -1 - i))
    r.shuffle(pair.plates)
    everywhere = tuple(i for i in range(len(pair.plates)) if r.random() < 0.7)
    latents = r.choice([1, 1, 2, 2, 3, 3, 4, 5, 6])
    discrete = r.random() < 0.4  # whether some of the guide's sites have no path
    enumerate_some = r.random() < 0.2
    for i in range(latents + r.choice([1, 1, 2, 3])):
        more = [j for j in range(len(pair.plates)) if j not in everywhere and r.random() < 0.5]
        where = tuple(sorted({*everywhere, *more} if r.random() < 0.85 else more))
        site = Site(f"z{i}" if i < latents else f"x{i}", "", where)
        known = [s for s in pair.sites if s.role in ("latent", "enumerated") and set(s.plates) <= set(where)]
        site.parents = tuple(s.name for s in known if r.random() < 0.6)
        pair.sites.append(site)
        if i < latents:
            add_latent(r, pair, site, discrete, enumerate_some)
        else:
            add_observed(r, pair, site)
    order_guide(r, pair)
    add_handlers(r, pair)
    add_numbers(r, pair)
    return pair


def add_latent(r, pair, site, discrete, enumerate_some):
    families = DISCRETE + CONTINUOUS if discrete else CONTINUOUS
    site.family = r.choice(families)
    chain = [s for s in pair.sites if s.role == "enumerated"]
    nested = all(set(site.plates) <= set(s.plates) or set(s.plates) <= set(site.plates) for s in chain)
    if enumerate_some and len(chain) < 2 and nested and r.random() < 0.6:
        site.family, site.role = r.choice(ENUMERABLE), "enumerated"
        return
    site.guide_family = r.choice(PRIORS[site.family])
    if site.family == "normal" and r.random() < 0.03:
        site.guide_family = "interval"
        pair.improper |= dict.fromkeys(["stl", "dreg"], f"the support of {site.name!r} moves")
    if site.family == "onehot" and r.random() < 0.3:
        site.guide_family = "through"
    changeable = site.family in (*PRIORS_ABOVE_ZERO, *ON_THE_LINE)
    if changeable and r.random() < 0.12:
        site.auxiliary, site.guide_family = True, r.choice(["normal", "laplace"])


def add_observed(r, pair, site):
    site.role = "observed"
    kind = r.random()
    if kind < 0.2 and site.parents:
        site.role, site.family = r.choice(["factor", "deterministic"]), "normal"
    else:
        site.family = r.choice(OBSERVED)


def order_guide(r, pair):
    """The guide's sites in an order of their own, and what each depends on."""
    latents = [s for s in pair.sites if s.role == "latent"]
    if not latents:  # all of them enumerated
        site = Site("z", "normal", pair.sites[0].plates, guide_family="normal")
        pair.sites.insert(0, site)
        latents = [site]
    r.shuffle(latents)
    pair.guide_order = [site.name for site in latents]
    for i, site in enumerate(latents):
        known = [s for s in latents[:i] if set(s.plates) <= set(site.plates)]
        site.guide_parents = tuple(s.name for s in known if r.random() < 0.5)
    if r.random() < 0.05:
        pair.guide_factor = r.choice(["path", "none"])


def add_handlers(r, pair):
    tempered = r.random() < 0.1
    for site in pair.sites:
        shape = _shape(pair, site)
        if site.role in ("latent", "observed", "factor") and r.random() < 0.12:
            mask = [r.random() < 0.6 for _ in range(torch.Size(shape).numel())]
            site.mask = torch.tensor(mask).reshape(shape)
        if tempered and not pair.enumerated and r.random() < 0.4:
            site.scale = r.choice([0.5, 2.0])
            site.guide_scale = r.choice([1.0, site.scale])
        site.shared = site.role == "latent" and r.random() < 0.15
    if r.random() < 0.12:
        pair.scale = r.choice([0.5, 3.0])


def _shape(pair, site):
    rank = max((-pair.plates[i].dim for i in site.plates), default=0)
    shape = [1] * rank
    for i in site.plates:
        shape[pair.plates[i].dim] = pair.plates[i].size
    return shape


def add_numbers(r, pair):
    """Parameters' initial values, what varies over the cells, and data."""

    def numbers(*shape, spread=0.7):
        count = torch.Size(shape).numel()
        return torch.tensor([r.gauss(0, spread) for _ in range(count)], dtype=pair.dtype).reshape(shape)

    for site in pair.sites:
        shape = _shape(pair, site)
        for role, parents in (("model", site.parents), ("guide", site.guide_parents)):
            prefix = f"{role}.{site.name}"
            pair.offsets[prefix] = numbers(*shape)
            pair.values |= {f"{prefix}.b": r.gauss(0, 0.5), f"{prefix}.s": r.uniform(-0.7, 0.2)}
            pair.values |= {f"{prefix}.{parent}": r.gauss(0, 0.7) for parent in parents}
        if site.role == "observed":
            state = torch.get_rng_state()
            torch.manual_seed(r.randrange(2**31))
            eta = numbers(*shape)
            site.data = BUILD[site.family](eta, torch.ones((), dtype=pair.dtype), pair.v).sample()
            torch.set_rng_state(state)
    pair.values["guide.factor"] = r.gauss(0, 0.5)
