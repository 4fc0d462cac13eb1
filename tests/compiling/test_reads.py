"""Changes of what a model reads are seen, wherever it is and by whatever way it gets at it."""

import argparse
import array
import collections
import contextvars
import dataclasses
import enum
import functools
import os
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from helpers.compiled import (
    DATA,
    follows,
    prior_pair,
)
from pyro_iw import IWAE_ELBO


class Settings:
    beta = 1.0


class Kind(enum.Enum):
    narrow, wide = 1.0, 3.0


@dataclasses.dataclass(slots=True)
class Slotted:
    beta: float = 1.0


class OneSlot:
    __slots__ = "beta"

    def __init__(self):
        self.beta = 1.0


class Nested:
    def __init__(self):
        self.inner = Settings()
        self.table = {"prior": {"scale": 1.0}}
        self.values = [1.0]
        self.kind = Kind.narrow
        self.number = np.float32(1.0)
        self.prior = dist.Normal(0.0, 1.0)


class Unused(nn.Module):
    """Read by a model, its own forward never run."""

    def __init__(self):
        super().__init__()
        self.beta = 1.0
        self.scale = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.scale.weight)

    def replace(self):
        self.scale = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.scale.weight, 3.0)


def scale_of(z):
    return 1.0


# What a model reads its prior's scale from, and how that changes.
READS = {
    "class": (lambda: Settings, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "shadowed": (Settings, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "namespace": (
        lambda: argparse.Namespace(beta=1.0),
        lambda c: c.beta,
        lambda c: setattr(c, "beta", 3.0),
    ),
    "slots": (Slotted, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "one slot": (OneSlot, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "object in object": (Nested, lambda c: c.inner.beta, lambda c: setattr(c.inner, "beta", 3.0)),
    "dict in dict": (
        Nested,
        lambda c: c.table["prior"]["scale"],
        lambda c: c.table["prior"].update(scale=3.0),
    ),
    "dict replaced": (
        Nested,
        lambda c: c.table["prior"]["scale"],
        lambda c: c.table.update(prior={"scale": 3.0}),
    ),
    "appended": (Nested, lambda c: sum(c.values), lambda c: c.values.append(2.0)),
    "enum": (Nested, lambda c: c.kind.value, lambda c: setattr(c, "kind", Kind.wide)),
    "numpy number": (Nested, lambda c: float(c.number), lambda c: setattr(c, "number", np.float32(3.0))),
    "distribution": (
        Nested,
        lambda c: c.prior.scale,
        lambda c: setattr(c, "prior", dist.Normal(0.0, 3.0)),
    ),
    "function": (lambda: scale_of, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "module": (Unused, lambda c: c.beta, lambda c: setattr(c, "beta", 3.0)),
    "module's flag": (Unused, lambda c: 1.0 + c.training, lambda c: c.eval()),
    "module's child": (Unused, lambda c: c.scale.weight[0, 0], Unused.replace),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("where", ["closure", "partial"])
def test_changes_wherever_a_model_reads_are_seen(name, where, monkeypatch):
    make, read, change = READS[name]
    monkeypatch.setattr(Settings, "beta", 1.0)
    monkeypatch.setattr(scale_of, "beta", 1.0, raising=False)
    settings = make()

    def body(scale):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)

    def model():
        body(read(settings))

    def model_of(given):
        body(read(given))

    def guide():
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a * DATA, 1.0))

    run_model = model if where == "closure" else functools.partial(model_of, settings)
    assert follows(IWAE_ELBO(K=3, compile=True), run_model, guide, lambda: change(settings))


class Tagged(dict):
    """A dict of the user's own."""


class Shared(type):
    beta = 1.0


class OfShared(metaclass=Shared):
    pass


class Outer:
    class Inner:
        beta = 1.0


TABLE = {"scale": 1.0}
LEVEL = 1.0


def of_default(nested=([1.0],)):
    return nested[0][0]


@functools.lru_cache
def cached_scale():
    return TABLE["scale"]


def set_table(cached):
    TABLE["scale"] = 3.0
    cached.cache_clear()
    cached()  # as full as it was


def put(key):
    return lambda c: c.__setitem__(key, 3.0)


# What a scale is read from, by which code, and how it changes.
DEEP = {
    "lists": (lambda: [[[[[1.0]]]]], lambda c: c[0][0][0][0][0], lambda c: put(0)(c[0][0][0][0])),
    "long list": (lambda: [1.0] * 100, lambda c: c[70], put(70)),
    "long dict": (lambda: dict.fromkeys(range(1000), 1.0), lambda c: c[7], put(7)),
    "tensors": (
        lambda: [torch.ones(())] * 100,
        lambda c: c[70],
        lambda c: c.__setitem__(70, torch.tensor(3.0)),
    ),
    "deque": (lambda: collections.deque([1.0]), lambda c: c[0], put(0)),
    "rotated": (lambda: collections.deque([1.0, 3.0]), lambda c: c[0], lambda c: c.rotate()),
    "set": (lambda: {(1.0,)}, lambda c: sum(v for (v,) in c), lambda c: c.add((3.0,))),
    "own dict": (lambda: Tagged(a=[1.0], b=DATA), lambda c: c["a"][0], lambda c: put(0)(c["a"])),
    "user dict": (lambda: collections.UserDict(a=1.0), lambda c: c["a"], put("a")),
    "chain": (lambda: collections.ChainMap({"a": 1.0}), lambda c: c["a"], put("a")),
    "array": (lambda: np.ones(3), lambda c: float(c[0]), put(0)),
    "array in list": (lambda: [np.ones(3)], lambda c: float(c[0][0]), lambda c: put(0)(c[0])),
    "array of Python's": (lambda: array.array("d", [1.0]), lambda c: c[0], put(0)),
    "bytes": (lambda: bytearray([1]), lambda c: float(c[0]), lambda c: c.__setitem__(0, 3)),
    "partial": (
        lambda: functools.partial(lambda table: table["a"][0], {"a": [1.0]}),
        lambda c: c(),
        lambda c: put(0)(c.args[0]["a"]),
    ),
    "inner class": (lambda: Outer, lambda c: c.Inner.beta, lambda c: setattr(c.Inner, "beta", 3.0)),
    "metaclass": (lambda: OfShared, lambda c: c.beta, lambda c: setattr(Shared, "beta", 3.0)),
    "within a distribution": (
        lambda: [dist.Normal(0.0, 1.0)],
        lambda c: c[0].scale,
        lambda c: setattr(c[0], "scale", torch.tensor(3.0)),
    ),
    "optimiser": (
        lambda: [torch.optim.SGD([torch.zeros(1)], lr=1.0)],
        lambda c: c[0].param_groups[0]["lr"],
        lambda c: c[0].param_groups[0].update(lr=3.0),
    ),
    "context": (lambda: contextvars.ContextVar("c", default=1.0), lambda c: c.get(), lambda c: c.set(3.0)),
    "default": (lambda: of_default, lambda c: c(), lambda c: put(0)(c.__defaults__[0][0])),
    "type": (lambda: {"a": 1}, lambda c: 3.0 if type(c["a"]) is float else 1.0, lambda c: c.update(a=1.0)),
    "cache": (lambda: cached_scale, lambda c: c(), set_table),
    "globals": (lambda: None, lambda c: globals()["LEVEL"], lambda c: globals().update(LEVEL=3.0)),
    "globals by a name": (
        lambda: "LEVEL",
        lambda c: globals()[c],
        lambda c: globals().update(LEVEL=3.0),
    ),
    "vars": (
        lambda: None,
        lambda c: vars(sys.modules[__name__])["LEVEL"],
        lambda c: globals().update(LEVEL=3.0),
    ),
    "environment": (
        lambda: None,
        lambda c: float(os.environ.get("PYRO_IW_LEVEL", "1")),
        lambda c: os.environ.update(PYRO_IW_LEVEL="3"),
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_changes_deep_inside_are_seen(name, monkeypatch):
    for owner, attribute in ((Outer.Inner, "beta"), (Shared, "beta")):
        monkeypatch.setattr(owner, attribute, 1.0)
    monkeypatch.setitem(globals(), "LEVEL", 1.0)
    monkeypatch.setitem(TABLE, "scale", 1.0)
    monkeypatch.setattr(of_default, "__defaults__", ([[1.0]],))
    monkeypatch.setenv("PYRO_IW_LEVEL", "1")
    cached_scale.cache_clear()
    make, read, change = DEEP[name]
    given = make()
    model, guide = prior_pair(lambda: read(given))
    assert follows(IWAE_ELBO(K=3, compile=True), model, guide, lambda: change(given))


def test_a_module_imported_by_the_model_is_watched(tmp_path, monkeypatch):
    (tmp_path / "level_of_a_test.py").write_text("class Prior:\n    scale = [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)

    def scale():
        import level_of_a_test

        return level_of_a_test.Prior.scale[0]

    def change():
        sys.modules["level_of_a_test"].Prior.scale[0] = 3.0

    assert follows(IWAE_ELBO(K=3, compile=True), *prior_pair(scale), change)


def test_what_nothing_names_may_be_large_or_unreadable():
    class Trainer:
        def __init__(self):
            self.images = [0.0] * 100_000
            self.features = np.zeros(1_000_000)
            self.batches = iter(range(3))
            self.beta = 1.0

        def scale(self):
            return self.beta

    trainer = Trainer()
    loss = IWAE_ELBO(K=3, compile=True)
    assert follows(loss, *prior_pair(trainer.scale), lambda: setattr(trainer, "beta", 3.0))
    assert next(trainer.batches) == 0


def test_each_closure_of_one_factory_is_watched():
    def layer(weight):
        def forward(z):
            return weight * z

        def set_weight(value):
            nonlocal weight
            weight = value

        return forward, set_weight

    (one, set_one), (other, set_other) = layer(1.0), layer(2.0)

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(other(one(z)), 1.0), obs=DATA)

    def guide():
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a * DATA, 1.0))

    loss = IWAE_ELBO(K=3, compile=True)
    assert follows(loss, model, guide, lambda: set_one(3.0))
    assert follows(loss, model, guide, lambda: set_other(-1.0))
