"""Whoever takes training steps side by side: this package, and what a user would pick instead.

All train the same network from the same weights on the same batch, with the same draws a step and Adam at
the same settings. ``step`` takes one training step and returns its loss; ``reset`` puts the initial weights
back, so that the very steps that are timed can also be compared by their loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import models
import pyro
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import Tensor

import pyro_iw

__all__ = ["REFERENCE", "Case", "Contestant", "Skip", "bound_of", "reference_loss", "registry"]

#: The contestant that all others are measured against.
REFERENCE = "PyTorch by hand"


class Skip(Exception):
    """A contestant that cannot take part, with the reason in a few words."""


@dataclass
class Case:
    """What is trained.

    Attributes:
        model: one of :data:`models.MODELS`.
        x: the batch, binary, of shape ``[B, D]``.
        particles: draws a datapoint.
        options: keywords of the model.
        seed: of the initial weights.
        learning_rate: of everyone's Adam.
        batches: where given, each step takes the next of these instead of ``x``.
        precision: of the networks' matrix products: ``"float32"``, ``"tf32"`` or ``"bfloat16"``.
    """

    model: str
    x: Tensor
    particles: int
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    learning_rate: float = 1e-3
    batches: Callable[[], Tensor] | None = None
    precision: str = "float32"

    @property
    def adam(self) -> dict[str, float]:
        """Adam's settings."""
        return {"lr": self.learning_rate, "eps": 1e-4}

    def next_batch(self) -> Tensor:
        return self.x if self.batches is None else self.batches()

    def make(self, tag: str | None = None) -> models.VAE:
        """The network, the same for each contestant."""
        # Forked, so that what trains already keeps its noise.
        with torch.random.fork_rng(devices=[self.x.device] if self.x.is_cuda else []):
            torch.manual_seed(self.seed)
            vae = models.MODELS[self.model](**self.options, tag=tag).to(self.x.device)
        if self.precision == "bfloat16":
            for network in (vae.encoder, vae.decoder):
                models.in_bfloat16(network)
        return vae


@dataclass
class Contestant:
    """One way to train.

    Attributes:
        name: its label in tables.
        step: takes one training step and returns the loss, as a number or something with ``item()``.
        reset: puts the initial weights back.
        bound: which number its loss is: ``iwae``, ``elbo``, ``miwae``, ``ciwae``, or ``weighted``, the
            log-weights' mean under their own softmax, whose gradient, the softmax held, is that of ``iwae``.
        against: the contestant it is measured against.
        vae: the network that it trains, where that is PyTorch's.
    """

    name: str
    step: Callable[[], Any]
    reset: Callable[[], None]
    bound: str = "iwae"
    against: str = REFERENCE
    vae: models.VAE | None = None


def bound_of(name: str, log_w: Tensor) -> Tensor:
    """The bound of every datapoint by hand, of shape ``[B]``, from log-weights ``[K, B]``."""
    if name == "elbo":
        return log_w.mean(0)
    if name == "weighted":
        return (log_w.softmax(0) * log_w).sum(0)
    if name == "miwae":
        groups = log_w.unflatten(0, (8, -1))
        return (groups.logsumexp(1) - math.log(groups.shape[1])).mean(0)
    iwae = log_w.logsumexp(0) - math.log(len(log_w))
    return 0.5 * log_w.mean(0) + 0.5 * iwae if name == "ciwae" else iwae


def reference_loss(vae: models.VAE, case: Case, bound: str = "iwae") -> float:
    """One draw of the loss by hand, without gradients."""
    with torch.no_grad():
        return -bound_of(bound, vae.log_weights(case.x, case.particles)).sum().item()


def _restorer(parameters: Iterable[Tensor]) -> Callable[[], None]:
    parameters = list(parameters)
    initial = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def reset() -> None:
        torch._foreach_copy_(parameters, initial)

    return reset


def _fused_adam(case: Case, parameters: Iterable[Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, **case.adam, fused=True)


def by_hand(name: str, case: Case, compiled: bool = False) -> Contestant:
    """PyTorch without Pyro, as one would write it for this model alone."""
    vae = case.make()

    def loss_of(x: Tensor) -> Tensor:
        log_w = vae.log_weights(x, case.particles)
        return -(log_w.logsumexp(0) - math.log(case.particles)).sum()

    function = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    optimiser = _fused_adam(case, vae.parameters())

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = function(case.next_batch())
        loss.backward()
        optimiser.step()
        return loss.detach()

    return Contestant(name, step, _restorer(vae.parameters()), vae=vae)


_tags = 0


def _svi(name: str, case: Case, loss: Any, optimiser: Any = None, **facts: Any) -> Contestant:
    global _tags
    _tags += 1  # one parameter store serves all contestants, so each has names of its own
    vae = case.make(tag=f"contestant{_tags}")
    svi = SVI(vae.model, vae.guide, optimiser or pyro.optim.Adam(case.adam), loss=loss)
    reset = _restorer(vae.parameters())
    return Contestant(name, lambda: svi.step(case.next_batch()), reset, vae=vae, **facts)


def _module(name: str, case: Case, loss: Any, **facts: Any) -> Contestant:
    vae = case.make()
    elbo = loss(*vae.modules_of_pair())
    optimiser = _fused_adam(case, vae.parameters())

    def step() -> Tensor:
        optimiser.zero_grad()
        value = elbo(case.next_batch())
        value.backward()
        optimiser.step()
        return value.detach()

    return Contestant(name, step, _restorer(vae.parameters()), vae=vae, **facts)


def pyro_loss(name: str, case: Case, kind: type, bound: str) -> Contestant:
    """Pyro's own losses, all particles in one pass; one particle needs no plate."""
    keywords: dict[str, Any] = {"num_particles": case.particles, "vectorize_particles": case.particles > 1}
    if kind is RenyiELBO:
        if case.particles == 1:
            raise Skip("needs K > 1")
        keywords["alpha"] = 0
    return _svi(name, case, kind(**keywords), bound=bound)


def ours(
    name: str,
    case: Case,
    way: str,
    make: Callable[..., Any] = pyro_iw.IWAE_ELBO,
    sizes: dict[str, int] | None = None,
    bound: str = "iwae",
    against: str = REFERENCE,
    **keywords: Any,
) -> Contestant:
    """A loss of this package.

    Arguments:
        name: the label.
        case: what to train.
        way: of stepping: ``"svi"`` with Pyro's Adam, ``"fused"`` for SVI with one fused Adam, or ``"module"``
            with ``torch.optim`` and its fused Adam.
        make: the loss.
        sizes: its M and K, if not the case's number of particles.
        bound: see :class:`Contestant`.
        against: see :class:`Contestant`.
        keywords: further keywords of the loss.
    """
    if sizes is not None and math.prod(sizes.values()) != case.particles:
        raise Skip(f"has {math.prod(sizes.values())} particles")
    if keywords.get("backward_particles", 0) >= case.particles:
        raise Skip("needs more particles")
    try:
        loss = make(**(sizes or {"K": case.particles}), **keywords)
    except TypeError as error:
        raise Skip("no such keyword in this version") from error
    if way == "module":
        return _module(name, case, loss, bound=bound, against=against)
    optimiser = None
    if way == "fused":
        if not hasattr(pyro_iw, "FusedOptim"):
            raise Skip("no FusedOptim in this version")
        optimiser = pyro_iw.FusedOptim(torch.optim.Adam, case.adam)
    return _svi(name, case, loss, optimiser, bound=bound, against=against)


def numpyro_loss(name: str, case: Case) -> Contestant:
    """NumPyro's RenyiELBO, or its ELBO for one particle; each step jitted and waited for."""
    if case.precision != "float32":
        raise Skip("is timed in float32 alone")
    try:
        import jax
        import numpyro
        import numpyro_models
    except ImportError as error:
        raise Skip("not installed") from error
    if case.batches is not None:
        raise Skip("steps on one batch alone")
    device = jax.devices("gpu" if case.x.is_cuda else "cpu")[0]
    with jax.default_device(device):
        model, guide = numpyro_models.make_pair(case.make())
        x = jax.numpy.array(case.x.cpu().numpy())
        if case.particles > 1:
            loss = numpyro.infer.RenyiELBO(alpha=0, num_particles=case.particles)
        else:
            loss = numpyro.infer.Trace_ELBO()
        svi = numpyro.infer.SVI(
            model, guide, numpyro.optim.Adam(step_size=case.learning_rate, eps=case.adam["eps"]), loss=loss
        )
        initial = svi.init(jax.random.PRNGKey(case.seed), x)
    update = jax.jit(svi.update)
    state = initial

    def step() -> Any:
        nonlocal state
        state, value = update(state, x)
        return jax.block_until_ready(value)

    def reset() -> None:
        nonlocal state
        state = initial._replace(rng_key=state.rng_key)

    return Contestant(name, step, reset)


def pythae_loss(name: str, case: Case) -> Contestant:
    """pythae's IWAE on the same layers; it averages over the batch, so its loss is taken times B."""
    if case.precision != "float32":
        raise Skip("is timed in float32 alone")
    if case.model == "two-layer":
        raise Skip("has one latent layer")
    try:
        from pythae.models import IWAE, IWAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
    except ImportError as error:
        raise Skip("not installed") from error
    vae = case.make()

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = vae.encoder

        def forward(self, x: Tensor) -> Any:
            loc, log_scale = self.layers(x)
            return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = vae.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.layers(z).sigmoid())

    settings = IWAEConfig(
        input_dim=(vae.pixels,),
        latent_dim=vae.latent,
        reconstruction_loss="bce",
        number_samples=case.particles,
    )
    network = IWAE(settings, encoder=Encoder(), decoder=Decoder()).to(case.x.device)
    optimiser = _fused_adam(case, network.parameters())

    def step() -> Tensor:
        optimiser.zero_grad()
        x = case.next_batch()
        loss = network({"data": x}).loss * len(x)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return Contestant(name, step, _restorer(vae.parameters()), bound="weighted", vae=vae)


Factory = Callable[[str, Case], Contestant]


def registry() -> dict[str, Factory]:
    """All contestants by their label, the reference first."""

    def our(way: str, **options: Any) -> Factory:
        return lambda name, case: ours(name, case, way, **options)

    everyone: dict[str, Factory] = {
        REFERENCE: by_hand,
        "PyTorch by hand, compiled": lambda name, case: by_hand(name, case, compiled=True),
        "Pyro Trace_ELBO": lambda name, case: pyro_loss(name, case, Trace_ELBO, "elbo"),
        "Pyro RenyiELBO": lambda name, case: pyro_loss(name, case, RenyiELBO, "iwae"),
        "NumPyro RenyiELBO, jit": numpyro_loss,
        "pythae IWAE": pythae_loss,
        "ours, SVI": our("svi"),
        "ours, SVI, FusedOptim": our("fused"),
        "ours, module": our("module"),
        "ours compiled, SVI": our("svi", compile=True),
        "ours compiled, SVI, FusedOptim": our("fused", compile=True),
        "ours compiled, module": our("module", compile=True),
        "ours compiled, backward 8, SVI": our("svi", compile=True, backward_particles=8),
        "ours compiled, backward 8, module": our("module", compile=True, backward_particles=8),
    }
    variants: dict[str, dict[str, Any]] = {
        "MIWAE(8, 8)": {"make": pyro_iw.MIWAE_ELBO, "sizes": {"M": 8, "K": 8}, "bound": "miwae"},
        "CIWAE(64)": {"make": _ciwae, "sizes": {"K": 64}, "bound": "ciwae"},
        "PIWAE(8, 8)": {"make": pyro_iw.PIWAE_ELBO, "sizes": {"M": 8, "K": 8}},
        "IWAE(64), dreg": {"sizes": {"K": 64}, "estimator": "dreg"},
    }
    for label, options in variants.items():
        everyone[f"{label}, module"] = our("module", against="ours, module", **options)
        everyone[f"{label}, compiled, module"] = our(
            "module", against="ours compiled, module", compile=True, **options
        )
    return everyone


def _ciwae(**keywords: Any) -> Any:
    return pyro_iw.CIWAE_ELBO(beta=0.5, **keywords)
