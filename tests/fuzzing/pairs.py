"""A model and a guide built from a description, see :mod:`.draw` for random ones."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer import autoguide

from .families import BUILD, EVENT_DIM, summary

LOG_2 = 0.6931471805599453
ABOVE_ZERO = ("lognormal", "gamma", "exponential", "halfnormal")
ON_THE_LINE = ("normal", "laplace", "student")


@dataclass(eq=False)
class Plate:
    name: str
    size: int
    subsample: int | None
    dim: int


@dataclass(eq=False)
class Site:
    """A sample site; a latent one has a counterpart in the guide."""

    name: str
    family: str
    plates: tuple[int, ...]  # as indices
    parents: tuple[str, ...] = ()
    guide_family: str = ""
    guide_parents: tuple[str, ...] = ()
    role: str = "latent"  # latent, enumerated, observed, factor, deterministic
    mask: torch.Tensor | None = None
    masked_in: tuple[str, ...] = ("model", "guide")
    scales: dict = field(default_factory=dict)  # poutine.scale by role, a number or a tensor
    shared: bool = False  # whether model and guide share a parameter
    auxiliary: bool = False  # whether the guide's value is a function of another site's
    data: torch.Tensor | None = None
    obs_mask: torch.Tensor | None = None


@dataclass(eq=False)
class Pair:
    """A pair: the callables :meth:`model` and :meth:`guide`."""

    seed: int
    plates: list[Plate] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    guide_order: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float64
    scale: object = None  # of the whole of both
    values: dict[str, float] = field(default_factory=dict)  # initial ones of the parameters
    offsets: dict[str, torch.Tensor] = field(default_factory=dict)  # what varies over the cells
    v: torch.Tensor | None = None
    auto: str = ""  # kind of a guide of Pyro's own
    extra: str = ""  # what else the guide has: factor, factor_none, mixture, observed
    conditioned: str = ""  # the latent that the model conditions away
    left: str = ""  # the site whose children count its dims from the left
    validate: bool = True
    # Why it must not pass in silence, by estimator; "" for all.
    improper: dict[str, str] = field(default_factory=dict)

    @property
    def traits(self):
        """What is unusual about the pair, for its reader."""
        has = {
            "float32": self.dtype == torch.float32,
            "enumerated": self.enumerated,
            "straight-through": any(s.guide_family == "through" for s in self.sites),
            "NaN": any(s.data is not None and bool(s.data.isnan().any()) for s in self.sites),
            "obs_mask": any(s.obs_mask is not None for s in self.sites),
            "tempered": any(s.scales for s in self.sites),
            "dims from the left": self.left,
            "no validation": not self.validate,
        }
        found = [self.auto, self.extra, *(name for name, there in has.items() if there)]
        return [trait for trait in found if trait]

    @property
    def has_levels(self):
        """Whether the reference for two levels of particles knows all that the pair has."""
        usual = not (self.enumerated or self.extra or self.conditioned or self.improper or self.left)
        plain = not any(s.scales or s.guide_family in ("through", "interval") for s in self.sites)
        return bool(self.plates) and usual and plain and not torch.is_tensor(self.scale)

    @property
    def by_name(self):
        return {site.name: site for site in self.sites}

    @property
    def enumerated(self):
        sizes = {"bernoulli": 2, "categorical": len(self.v)}
        return {s.name: sizes[s.family] for s in self.sites if s.role == "enumerated"}

    @property
    def names(self):
        return [x.name for x in (*self.sites, *self.plates)] + ["extra", "_Auto"]

    def start(self):
        """Fresh parameters."""
        pyro.clear_param_store()
        self._auto = None
        if self.auto:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self._auto = self.make_auto()
                self._auto()

    def make_auto(self):
        model = poutine.block(self.model, hide=[*self.enumerated])
        if self.auto != "list":
            return getattr(autoguide, self.auto)(model)
        guide = autoguide.AutoGuideList(model)
        half = self.guide_order[: len(self.guide_order) // 2]
        rest = [name for name in self.guide_order if name not in half]
        for kind, names in (("AutoNormal", half), ("AutoDiagonalNormal", rest)):
            guide.append(getattr(autoguide, kind)(poutine.block(self.model, expose=names)))
        return guide

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

    def summary(self, name, value):
        if name == self.left:
            return (torch.softmax(value, 1) * self.v).sum(-1)
        return summary(self.by_name[name].family, value, self.v)

    def distribution(self, role, site, values, plates, shift=0.0):
        prefix = f"{role}.{site.name}"
        parents = site.parents if role == "model" else site.guide_parents
        family = site.family if role == "model" else site.guide_family
        bias = f"model.{site.name}.b" if site.shared else f"{prefix}.b"
        eta = self.param(bias) + self.local(self.offsets[prefix], site, plates) + shift
        for parent in parents:
            eta = eta + self.param(f"{prefix}.{parent}") * self.summary(parent, values[parent])
        return BUILD[family](eta, self.param(f"{prefix}.s").exp(), self.v)

    def around(self, stack, role, site, plates):
        for i in site.plates:
            stack.enter_context(plates[i])
        if role in site.scales:
            scale = site.scales[role]
            scale = self.local(scale, site, plates) if torch.is_tensor(scale) else scale
            stack.enter_context(poutine.scale(scale=scale))
        if site.mask is not None and role in site.masked_in:
            stack.enter_context(poutine.mask(mask=self.local(site.mask, site, plates)))

    def scaled(self, stack):
        if self.scale is not None:
            stack.enter_context(poutine.scale(scale=self.scale))

    def model(self):
        model = self._model
        if self.conditioned:
            fixed = torch.full(self.shape(self.by_name[self.conditioned]), 0.3, dtype=self.dtype)
            model = poutine.condition(model, data={self.conditioned: fixed})
        model()

    def _model(self):
        plates, values = self.open_plates(), {}
        with ExitStack() as whole:
            self.scaled(whole)
            for site in self.sites:
                with ExitStack() as stack:
                    self.around(stack, "model", site, plates)
                    self.model_site(site, values, plates)

    def model_site(self, site, values, plates):
        if site.role in ("factor", "deterministic"):
            total = sum(self.summary(parent, values[parent]) for parent in site.parents)
            make = pyro.factor if site.role == "factor" else pyro.deterministic
            make(site.name, self.param(f"model.{site.name}.b") * total)
            return
        fn = self.distribution("model", site, values, plates)
        if site.role == "observed":
            data = self.local(site.data, site, plates, EVENT_DIM.get(site.family, 0))
            options = {}
            if site.obs_mask is not None:
                options["obs_mask"] = self.local(site.obs_mask, site, plates)
            pyro.sample(site.name, fn, obs=data, **options)
        else:
            infer = {"enumerate": "parallel"} if site.role == "enumerated" else {}
            values[site.name] = pyro.sample(site.name, fn, infer=infer)

    def guide(self):
        with ExitStack() as whole:
            self.scaled(whole)
            return self._auto() if self._auto is not None else self._guide()

    def _guide(self):
        plates, values, shift = self.open_plates(), {}, 0.0
        if self.extra == "mixture":
            which = dist.Bernoulli(logits=self.param("guide.extra"))
            shift = pyro.sample("extra", which, infer={"is_auxiliary": True})
        elif self.extra == "observed":
            pyro.sample("extra", dist.Normal(self.param("guide.extra"), 1.0), obs=torch.tensor(0.3))
        for name in self.guide_order:
            site = self.by_name[name]
            with ExitStack() as stack:
                self.around(stack, "guide", site, plates)
                fn = self.distribution("guide", site, values, plates, shift)
                if site.auxiliary:
                    values[name] = self.change_of_variables(site, fn)
                elif site.role == "observed":
                    stack.enter_context(poutine.mask(mask=~self.local(site.obs_mask, site, plates)))
                    pyro.sample(f"{name}_unobserved", fn)
                else:
                    values[name] = pyro.sample(name, fn)
                if self.extra.startswith("factor") and name == self.guide_order[0]:
                    weight = self.param("guide.extra") * self.summary(name, values[name])
                    pyro.factor("extra", weight, has_rsample=self.extra == "factor")

    def change_of_variables(self, site, fn):
        """A Delta of another site: z = exp(u) above zero, z = 2 u on the line."""
        u = pyro.sample(f"{site.name}_u", fn, infer={"is_auxiliary": True})
        value, log_density = (u.exp(), -u) if site.family in ABOVE_ZERO else (2 * u, 0 * u - LOG_2)
        return pyro.sample(site.name, dist.Delta(value, log_density=log_density))

    def shape(self, site):
        """The sizes of all plates of a site, at their dims."""
        shape = [1] * max((-self.plates[i].dim for i in site.plates), default=0)
        for i in site.plates:
            shape[self.plates[i].dim] = self.plates[i].size
        return shape
