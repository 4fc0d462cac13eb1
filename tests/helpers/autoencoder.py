"""A small adversarial autoencoder in double precision, and what its tests compare."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

D, PIXELS = 2, 5


def pair(noise: float | None = 0.3, norm: bool = False, classes: int = 0) -> SimpleNamespace:
    """A small autoencoder in double precision: linear, with batch normalisation and dropout if asked for."""
    torch.manual_seed(1)
    encoder, decoder = nn.Linear(PIXELS, D + classes), nn.Linear(D + classes, PIXELS)
    critic: nn.Module = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 1))
    if norm:
        encoder = nn.Sequential(nn.BatchNorm1d(PIXELS), encoder)
        decoder = nn.Sequential(decoder, nn.BatchNorm1d(PIXELS))
        critic = nn.Sequential(
            nn.Linear(D, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 1)
        )
    for module in (encoder, decoder, critic):
        module.double()
    critics: Any = {"z": critic}
    if classes:
        critics["y"] = nn.Linear(classes, 1).double()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 2.0).to_event(1))
            if classes:
                y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(classes)))
                z = torch.cat([z, y], -1)
            pyro.sample("x", dist.Normal(decoder(z), 0.7).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            code = encoder(x)
            loc = code[:, :D]
            fn = dist.Delta(loc, event_dim=1) if noise is None else dist.Normal(loc, noise).to_event(1)
            pyro.sample("z", fn)
            if classes:
                pyro.sample("y", dist.Delta(code[:, D:].softmax(-1), event_dim=1))

    return SimpleNamespace(
        model=model, guide=guide, encoder=encoder, decoder=decoder, critics=critics, critic=critic
    )


def images(size: int = 6, seed: int = 2) -> Tensor:
    return torch.randn(size, PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sgd(lr: float) -> PyroOptim:
    return PyroOptim(torch.optim.SGD, {"lr": lr})


def values() -> dict[str, Tensor]:
    """All parameters there are."""
    return {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The modules whose parameters have changed."""
    return {name.split("$$$")[0] for name in after if not torch.equal(before[name], after[name])}


def standard_normal(size: int) -> Tensor:
    shape = (size, D)
    return torch.normal(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))


def with_labels(p: SimpleNamespace) -> tuple[Callable, tuple[Tensor, Tensor]]:
    def supervised(x: Tensor, y: Tensor) -> None:
        pyro.module("encoder", p.encoder)
        with pyro.plate("labelled", len(x)):
            pyro.sample("label", dist.Categorical(logits=p.encoder(x)), obs=y)

    return supervised, (images(4, seed=7), torch.tensor([0, 1, 1, 0]))


class Recorder(nn.Module):
    """Passes on what it gets, and notes its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, values: Tensor) -> Tensor:
        self.seen.append((self.training, values.requires_grad))
        return values
