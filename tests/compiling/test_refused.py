"""What would be frozen by a recording is refused, with a reason, and undone."""

import itertools
import os
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn

import pyro_iw.compiling.inductor as inductor_module
from helpers.cases import DataPlate, ScaledPerCell
from helpers.compiled import Configured, compiled_programs, guide_of, model_of, records_generators, refused
from pyro_iw import IWAE_ELBO


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, z):
        self.calls += 1
        return z / self.calls


def forked(z):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return z * torch.randn(4)


def set_back(z):
    state = torch.get_rng_state()
    torch.manual_seed(3)
    z = z * torch.randn(4)
    torch.set_rng_state(state)
    return z


def drawn_twice(z):
    state = TORCH_GENERATOR.get_state()
    z = z * torch.randn(4, generator=TORCH_GENERATOR)
    TORCH_GENERATOR.set_state(state)
    return z


LARGE = [1.0] * 5000
LARGE_ARRAY = np.ones(100_000)
STREAM = itertools.count()
WEIGHTS = torch.tensor([0.5])
TORCH_GENERATOR = torch.Generator()
GENERATOR = np.random.default_rng(0)
REFUSED = {
    "branch": (lambda z: z if z.mean() > 0 else -z, "reads a tensor's value"),
    "item": (lambda z: z * WEIGHTS.item(), "reads a tensor's value"),
    "float": (lambda z: z * float(z.detach().sum()), "reads a tensor's value"),
    "tolist": (lambda z: z * torch.tensor(z.tolist()), "reads a tensor's value"),
    "numpy": (lambda z: z + torch.from_numpy(np.tanh(WEIGHTS.numpy())), "reads a tensor's value"),
    "equal": (lambda z: z if torch.equal(WEIGHTS, 2 * WEIGHTS) else z / 2, "reads a tensor's value"),
    "shape": (lambda z: z + z[z > 0].sum(), "shape depends on values"),
    "python random": (lambda z: z * random.random(), "Python's random"),
    "numpy random": (lambda z: z * np.random.rand(), "numpy.random"),  # noqa: NPY002
    "numpy generator": (lambda z: z * GENERATOR.random(), "generator 'GENERATOR'"),
    "fresh values": (lambda z: z * torch.tensor(list(os.urandom(9))).sum(), "other values"),
    "forked": (forked, "seeds a random generator, or puts its state back"),
    "set back": (set_back, "seeds a random generator, or puts its state back"),
    "seeded handler": (poutine.seed(lambda z: z * torch.randn(4), 1), "seeds a random generator"),
    "own generator": (
        lambda z: z * torch.randn(4, generator=torch.Generator().manual_seed(3)),
        "torch.Generator of its own",
    ),
    "generator seeded": (
        lambda z: z * torch.randn(4, generator=TORCH_GENERATOR.manual_seed(3)),
        "seeds a random generator",
    ),
    "generator set back": (drawn_twice, "seeds a random generator, or puts its state back"),
    "large container": (lambda z: z * LARGE[7], "'LARGE', a container of 5000 entries"),
    "large array": (lambda z: z * LARGE_ARRAY[7], "'LARGE_ARRAY', a large NumPy array"),
    "iterator": (lambda z: z * next(STREAM), "'STREAM', an iterator"),
    "one-hot": (lambda z: z + nn.functional.one_hot(torch.arange(4))[0], "pass num_classes"),
    "picked": (lambda z: z + torch.cat([z[z > 0], z[z <= 0]]).sum(), "shape depends on values"),
    "counter": (Counter(), "changes as it runs"),
    "seed": (lambda z: z + 0 * torch.manual_seed(5).initial_seed(), "seeds a random generator"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_would_be_frozen_is_refused(why):
    loc, match = REFUSED[why]
    if why in ("own generator", "generator seeded", "generator set back") and not records_generators():
        match = "NotImplementedError.*Generator"
    # One by one and with one weight: some of these read what is of all particles or all indices of the plate.
    loss = IWAE_ELBO(K=3, vectorize_particles=False, plates=(), compile=True)
    refused(loss, match, model_of(loc), guide_of(torch.ones(4)))


def steps_with(loss, loc, generator, state, count=4):
    """Losses of some steps, from one state of the user's own generator, and its state after them."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    generator.set_state(state)
    model, guide = model_of(loc), guide_of(torch.ones(4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "compile=True is left aside")
        return [loss.loss_and_grads(model, guide) for _ in range(count)], generator.get_state()


@pytest.mark.parametrize("can", [True, False])
def test_a_generator_of_ones_own_is_where_the_eager_steps_leave_it(can):
    def loc(z):
        z = z * torch.randn(4, generator=TORCH_GENERATOR)
        return z if can or z.mean() < 100 else -z

    state = TORCH_GENERATOR.get_state()
    loss = IWAE_ELBO(K=3, compile=True)
    losses, after = steps_with(loss, loc, TORCH_GENERATOR, state)
    eager, expected = steps_with(IWAE_ELBO(K=3), loc, TORCH_GENERATOR, state)
    assert bool(compiled_programs(loss)) is (can and records_generators())
    assert losses == pytest.approx(eager, rel=1e-6)
    assert torch.equal(after, expected)


def test_generators_of_numpy_and_python_are_not_advanced_by_a_failed_recording():
    draws = []
    for compile in (False, True):
        own, pythons = np.random.default_rng(0), random.Random(0)
        loss = IWAE_ELBO(K=3, compile=compile)
        model = model_of(lambda z, own=own, pythons=pythons: z * own.random() * pythons.random())
        guide = guide_of(torch.ones(4))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "compile=True is left aside")
            for _ in range(3):
                loss.loss_and_grads(model, guide)
        draws.append((own.random(), pythons.random()))
    assert draws[0] == draws[1]


def test_a_tensor_of_scales_is_compared_by_value_and_refused():
    case = ScaledPerCell()
    refused(IWAE_ELBO(K=3, compile=True), "reads a tensor's value", case.model_callable, case.guide_callable)


def test_arguments_of_unknown_types_are_refused():
    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(x))

    def guide(x):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.3)), 1.0))

    loss = IWAE_ELBO(K=3, compile=True)
    with pytest.warns(RuntimeWarning, match="argument is of type ndarray"):
        loss.loss_and_grads(model, guide, np.ones(4, dtype=np.float32))


def test_without_a_compiler_the_step_is_eager(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("No C++ compiler found\nand more")

    monkeypatch.setattr(inductor_module, "inductor", broken)
    case = DataPlate()
    refused(IWAE_ELBO(K=3, compile=True), "No C.. compiler found", case.model, case.guide)


def test_what_keeps_changing_is_left_to_run_eagerly():
    pair = Configured()
    loss = IWAE_ELBO(K=3, compile=True)

    def train():
        for step in range(40):
            pair.gamma = 1.0 + step // 3
            loss.loss_and_grads(pair.model, pair.guide)

    with pytest.warns(RuntimeWarning, match="'gamma' keeps changing"):
        train()
    assert loss.steps == 40
