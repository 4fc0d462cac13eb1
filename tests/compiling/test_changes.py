"""Changes of modules, parameters and globals are seen by the next step."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from helpers.compiled import DATA, Configured, SmallVAE, binary, compiled_programs, follows
from pyro_iw import IWAE_ELBO

CHANGES = {
    "attribute": lambda pair: setattr(pair, "gamma", 2.0),
    "class attribute": lambda pair: setattr(Configured, "beta", 3.0),
    "container": lambda pair: pair.options.update(shift=1.5),
    "training": lambda pair: pair.eval(),
    "training of a child": lambda pair: pair.net[1].eval(),
    "option of a child": lambda pair: setattr(pair.net[1], "p", 0.0),
    "buffer in place": lambda pair: pair.x.mul_(2),
    "buffer replaced": lambda pair: setattr(pair, "x", torch.zeros(4)),
    "child replaced": lambda pair: pair.net.__setitem__(1, nn.Tanh()),
    "dtype": lambda pair: (pair.net.double(), setattr(pair, "x", pair.x.double())),
    "frozen": lambda pair: pair.net[0].weight.requires_grad_(False),
    "store cleared": lambda pair: pyro.clear_param_store(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_module_are_seen(change):
    pair = Configured()
    loss = IWAE_ELBO(K=3, compile=True)
    warnings.filterwarnings("ignore", ".* was not registered in the param store")
    try:
        assert follows(loss, pair.model, pair.guide, lambda: CHANGES[change](pair))
    finally:
        Configured.beta = 1.0


def test_a_parameter_that_is_frozen_gets_no_gradient_any_more():
    vae, x = SmallVAE().eval(), binary()
    loss = IWAE_ELBO(K=3, compile=True)
    for _ in range(2):
        loss.loss_and_grads(vae.model, vae.guide, x)
    assert compiled_programs(loss)
    vae.zero_grad()
    weight = vae.decoder[0].weight.requires_grad_(False)
    for _ in range(3):
        loss.loss_and_grads(vae.model, vae.guide, x)
    assert compiled_programs(loss)
    assert weight.grad is None
    assert vae.decoder[3].weight.grad is not None


def test_a_module_of_another_dtype_is_recorded_again():
    vae = SmallVAE().eval()
    loss = IWAE_ELBO(K=3, compile=True)
    for _ in range(2):
        loss.loss_and_grads(vae.model, vae.guide, binary())
    (program,) = compiled_programs(loss)
    assert program.changed() is None
    vae.decoder.double()  # the same parameters in other memory
    assert "dtype" in program.changed()


SCALE = 1.0


@pytest.mark.parametrize(
    "what", ["global", "global tensor", "closure", "closure tensor", "nested", "in place"]
)
def test_changes_of_globals_and_closures_are_seen(what, monkeypatch):
    weight, shift = 1.0, torch.tensor(0.1)

    def loc(z):
        return weight * z + shift

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, SCALE))
            pyro.sample("x", dist.Normal(loc(z), 1.0), obs=DATA)

    def guide():
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a * DATA + shift, 1.0))

    def change():
        nonlocal weight, shift
        if what == "global":
            monkeypatch.setitem(globals(), "SCALE", 2.0)
        elif what == "global tensor":
            monkeypatch.setitem(globals(), "DATA", torch.ones(4))
        elif what in ("closure", "nested"):
            weight = 2.0
        elif what == "closure tensor":
            shift = torch.tensor(1.0)
        else:
            shift.fill_(1.0)

    assert follows(IWAE_ELBO(K=3, compile=True), model, guide, change)
