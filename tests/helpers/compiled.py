"""Eager and compiled training compared; models whose settings change."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_iw import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO
from pyro_iw.compiling.program import Program

LOSSES = {
    "iwae": lambda **kw: IWAE_ELBO(K=5, **kw),
    "elbo": lambda **kw: MIWAE_ELBO(M=1, K=1, **kw),
    "miwae": lambda **kw: MIWAE_ELBO(M=2, K=3, **kw),
    "piwae": lambda **kw: PIWAE_ELBO(M=2, K=3, **kw),
    "ciwae-dreg": lambda **kw: CIWAE_ELBO(K=4, beta=0.3, estimator="dreg", **kw),
    "stl": lambda **kw: IWAE_ELBO(K=5, estimator="stl", **kw),
    "score": lambda **kw: MIWAE_ELBO(M=2, K=3, estimator="score", **kw),
    "vimco": lambda **kw: IWAE_ELBO(K=5, estimator="vimco", **kw),
    "ovis": lambda **kw: IWAE_ELBO(K=5, estimator="ovis", **kw),
    "rws": lambda **kw: IWAE_ELBO(K=5, estimator="rws", **kw),
    "loop": lambda **kw: IWAE_ELBO(K=3, vectorize_particles=False, **kw),
    "resampled": lambda **kw: IWAE_ELBO(K=6, backward_particles=2, **kw),
    "resampled-piwae": lambda **kw: PIWAE_ELBO(M=2, K=3, backward_particles=2, **kw),
    "resampled-dreg": lambda **kw: MIWAE_ELBO(M=2, K=3, backward_particles=3, estimator="dreg", **kw),
}


def records_generators():
    """Whether this PyTorch can record an operation that is given a generator; 2.4 cannot."""
    generator = torch.Generator()
    try:
        make_fx(lambda x: x * torch.randn(4, generator=generator))(torch.ones(4))
    except NotImplementedError:
        return False
    return True


def compiled_programs(loss):
    return [p for p in loss._compiler._programs.values() if isinstance(p, Program)]


def run(loss, model, guide, args=(), steps=6, lr=0.01):
    """Losses and parameters of a short training run, from one seed."""
    pyro.clear_param_store()
    svi = SVI(model, guide, Adam({"lr": lr}), loss=loss)
    pyro.set_rng_seed(11)
    losses = [svi.step(*args) for _ in range(steps)]
    return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def check_same(make_loss, make_pair, args=(), steps=6, rtol=1e-5):
    """Eager and compiled training from one seed agree; returns the compiled loss."""
    pyro.set_rng_seed(0)
    eager, eager_params = run(make_loss(), *make_pair(), args, steps)
    pyro.set_rng_seed(0)
    loss = make_loss(compile=True)
    losses, params = run(loss, *make_pair(), args, steps)
    assert compiled_programs(loss), "nothing was compiled"
    assert losses == pytest.approx(eager, rel=rtol)
    assert params.keys() == eager_params.keys()
    for name, value in params.items():
        torch.testing.assert_close(value, eager_params[name], rtol=rtol, atol=1e-5, msg=name)
    return loss


def pair(case):
    return lambda: (case.model_callable, case.guide_callable)


def refused(loss, match, model, guide, *args):
    """Both steps run eagerly, the second after one warning."""
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss=loss)
    svi.step(*args)
    with pytest.warns(RuntimeWarning, match=match):
        svi.step(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step(*args)
    assert not compiled_programs(loss)


class SmallVAE(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 5))
        self.encoder = nn.Sequential(
            nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6)
        )

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def binary(rows=8):
    return (torch.rand(rows, 5, generator=torch.Generator().manual_seed(0)) < 0.4).float()


def follows(loss, model, guide, change, *args, eager=None):
    """Whether the steps after a change give what eager ones give, on the same noise."""
    eager = eager or IWAE_ELBO(K=3)
    for _ in range(2):
        loss.loss_and_grads(model, guide, *args)
    assert compiled_programs(loss)
    change()
    for _ in range(3):
        pyro.set_rng_seed(6)
        value = loss.loss_and_grads(model, guide, *args)
        pyro.set_rng_seed(6)
        if value != pytest.approx(eager.loss_and_grads(model, guide, *args), rel=1e-6):
            return False
    return bool(compiled_programs(loss))


class Configured(nn.Module):
    beta = 1.0

    def __init__(self):
        super().__init__()
        self.gamma = 1.0
        self.options = {"shift": 0.0}
        self.register_buffer("x", torch.linspace(-1, 1, 4))
        self.net = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5), nn.Linear(3, 1))

    def model(self):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(self.options["shift"], self.gamma))
            pyro.sample("x", dist.Normal(self.beta * z, 1.0 if self.training else 2.0), obs=self.x)

    def guide(self):
        pyro.module("net", self.net)
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(self.net(self.x.unsqueeze(-1)).squeeze(-1), 1.0))


DATA = torch.linspace(-1, 1, 4)


def prior_pair(scale):
    """A pair whose prior's scale is what a function of nothing gives."""

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, scale()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)

    return model, guide_of(DATA)


def guide_of(x):
    def guide():
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(a * x, 1.0))

    return guide


def model_of(loc):
    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc(z), 1.0), obs=torch.ones(4))

    return model
