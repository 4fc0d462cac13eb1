r"""The models that all contestants train: three VAEs, by hand and for Pyro over one set of layers.

By hand means the log-weights :math:`\ell_{kn} = \log p_\theta(x_n, z_{kn}) - \log q_\phi(z_{kn} \mid x_n)` as
a tensor of shape ``[K, B]``, in as few operations as PyTorch allows: the encoder runs once a datapoint, and
:math:`\log q` is read off the noise. The constants of the normal densities cancel between model and guide.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "MODELS",
    "VAE",
    "ConvVAE",
    "Gaussian",
    "OneLayerVAE",
    "Product",
    "TwoLayerVAE",
    "in_bfloat16",
    "mlp",
]


class Product(NamedTuple):
    """A matrix product of a layer in the forward pass; a convolution counts as the product it stands for.

    Attributes:
        rows: rows of the left matrix (particles times images times positions).
        width_in: its columns, summed over.
        width_out: columns of the result.
        elements_in: numbers that the layer reads, weights aside.
        elements_out: numbers that it writes.
        needs_input_grad: whether its backward pass goes on below it.
    """

    rows: int
    width_in: int
    width_out: int
    elements_in: int
    elements_out: int
    needs_input_grad: bool = True


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with a tanh behind each, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [_linear(width_in, width_out), nn.Tanh()]
    return nn.Sequential(*layers)


def _linear(width_in: int, width_out: int, gain: float = 1.0) -> nn.Linear:
    linear = nn.Linear(width_in, width_out)
    nn.init.xavier_uniform_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def _head(width_in: int, width_out: int) -> nn.Linear:
    """A last layer, so small that log-weights spread by a few nats, as in a trained model."""
    return _linear(width_in, width_out, gain=0.2)


class Gaussian(nn.Module):
    """A diagonal normal given its input: mean and log standard deviation, of shape ``[*batch, width]``."""

    def __init__(self, trunk: nn.Module, hidden: int, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.loc = _head(hidden, width)
        self.log_scale = _head(hidden, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.loc(h), self.log_scale(h)

    def distribution(self, x: Tensor) -> dist.Distribution:
        loc, log_scale = self(x)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


def _draw(loc: Tensor, log_scale: Tensor, num_particles: int | None) -> tuple[Tensor, Tensor]:
    """Values and their log q without its constant; particles go on a new leftmost dim, if there are any."""
    shape = loc.shape if num_particles is None else (num_particles, *loc.shape)
    noise = torch.randn(shape, device=loc.device, dtype=loc.dtype)
    z = torch.addcmul(loc, noise, log_scale.exp())
    return z, -0.5 * noise.square().sum(-1) - log_scale.sum(-1)


def _log_standard_normal(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(-1)


def _log_bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    target = x.expand_as(logits)
    return -F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)


def in_bfloat16(network: nn.Module) -> None:
    """Have a network's matrix products run in bfloat16, with float32 at both ends."""
    for part in network if isinstance(network, nn.ModuleList) else [network]:
        part.forward = _narrowed(part.forward)


def _narrowed(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def narrow(x: Tensor) -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            result = forward(x)
        return result.float() if isinstance(result, Tensor) else tuple(part.float() for part in result)

    return narrow


class VAE(nn.Module):
    """Base class.

    Arguments:
        tag: where given, model and guide register their layers with Pyro under this name, as ``SVI`` needs;
            not, for ``torch.optim``. Two networks in one process need two tags.
    """

    encoder: nn.Module
    decoder: nn.Module
    pixels: int

    def __init__(self, tag: str | None = None) -> None:
        super().__init__()
        self.tag = tag

    def log_weights(self, x: Tensor, num_particles: int) -> Tensor:
        """By hand: log p(x, z) - log q(z | x), of shape ``[K, B]``, for ``x`` of shape ``[B, D]``."""
        return self.log_weights_of(self.encode_once(x), x, num_particles)

    def encode_once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By hand: what the guide computes of the data alone, mean and log scale of its first layer."""
        raise NotImplementedError

    def log_weights_of(self, given: tuple[Tensor, Tensor], x: Tensor, num_particles: int) -> Tensor:
        """:meth:`log_weights`, with that at hand."""
        raise NotImplementedError

    def model(self, x: Tensor) -> None:
        """For Pyro: p(x, z)."""
        raise NotImplementedError

    def guide(self, x: Tensor) -> None:
        """For Pyro: q(z | x)."""
        raise NotImplementedError

    def products(self, batch: int, particles: int) -> list[Product]:
        """The matrix products of one forward pass."""
        raise NotImplementedError

    def register(self, name: str) -> None:
        if self.tag is not None:
            pyro.module(f"{self.tag}.{name}", getattr(self, name))

    def modules_of_pair(self) -> tuple[nn.Module, nn.Module]:
        """Model and guide as modules, for ``elbo(model, guide)``."""
        return _Half(self, "decoder", "model"), _Half(self, "encoder", "guide")


class _Half(nn.Module):
    """The model or the guide, with the layers that it trains."""

    def __init__(self, vae: VAE, layers: str, method: str) -> None:
        super().__init__()
        self.layers = getattr(vae, layers)
        self.run = getattr(vae, method)

    def forward(self, x: Tensor) -> None:
        self.run(x)


class OneLayerVAE(VAE):
    """One latent layer (Burda et al., 2016): pixels-200-200-50 with tanh units, decoder mirrored."""

    def __init__(
        self, pixels: int = 784, hidden: int = 200, latent: int = 50, tag: str | None = None
    ) -> None:
        super().__init__(tag)
        self.pixels, self.latent = pixels, latent
        self.widths = (pixels, hidden, hidden)
        self.encoder = Gaussian(mlp(*self.widths), hidden, latent)
        self.decoder = nn.Sequential(mlp(latent, hidden, hidden), _head(hidden, pixels))

    def encode_once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(x)

    def log_weights_of(self, given: tuple[Tensor, Tensor], x: Tensor, num_particles: int) -> Tensor:
        z, log_q = _draw(*given, num_particles)
        return _log_bernoulli(self.decoder(z), x) + _log_standard_normal(z) - log_q

    def model(self, x: Tensor) -> None:
        self.register("decoder")
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(self.latent)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        self.register("encoder")
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder.distribution(x))

    def products(self, batch: int, particles: int) -> list[Product]:
        hidden, rows = self.widths[-1], batch * particles
        return [
            *_dense(batch, *self.widths, from_data=True),
            *_dense(batch, hidden, self.latent) * 2,
            *_dense(rows, self.latent, *reversed(self.widths)),
        ]


class TwoLayerVAE(VAE):
    """Two latent layers (Burda et al., 2016): z1 of 100 units through 200-200, z2 of 50 through 100-100."""

    def __init__(
        self,
        pixels: int = 784,
        hidden: tuple[int, int] = (200, 100),
        latent: tuple[int, int] = (100, 50),
        tag: str | None = None,
    ) -> None:
        super().__init__(tag)
        self.pixels, self.hidden, self.latent = pixels, hidden, latent
        (low, high), (z1, z2) = hidden, latent
        self.encoder = nn.ModuleList(
            [Gaussian(mlp(pixels, low, low), low, z1), Gaussian(mlp(z1, high, high), high, z2)]
        )
        self.decoder = nn.ModuleList(
            [
                Gaussian(mlp(z2, high, high), high, z1),
                nn.Sequential(mlp(z1, low, low), _head(low, pixels)),
            ]
        )

    def encode_once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder[0](x)

    def log_weights_of(self, given: tuple[Tensor, Tensor], x: Tensor, num_particles: int) -> Tensor:
        z1, log_q1 = _draw(*given, num_particles)
        z2, log_q2 = _draw(*self.encoder[1](z1), None)
        loc, log_scale = self.decoder[0](z2)
        log_p1 = -0.5 * ((z1 - loc) * (-log_scale).exp()).square().sum(-1) - log_scale.sum(-1)
        log_p = _log_standard_normal(z2) + log_p1 + _log_bernoulli(self.decoder[1](z1), x)
        return log_p - log_q1 - log_q2

    def model(self, x: Tensor) -> None:
        self.register("decoder")
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(self.latent[1])
            z2 = pyro.sample("z2", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            z1 = pyro.sample("z1", self.decoder[0].distribution(z2))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder[1](z1)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        self.register("encoder")
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", self.encoder[0].distribution(x))
            pyro.sample("z2", self.encoder[1].distribution(z1))

    def products(self, batch: int, particles: int) -> list[Product]:
        (low, high), (z1, z2), rows = self.hidden, self.latent, batch * particles
        return [
            *_dense(batch, self.pixels, low, low, from_data=True),
            *_dense(batch, low, z1) * 2,
            *_dense(rows, z1, high, high),
            *_dense(rows, high, z2) * 2,
            *_dense(rows, z2, high, high),
            *_dense(rows, high, z1) * 2,
            *_dense(rows, z1, low, low, self.pixels),
        ]


class ConvVAE(VAE):
    """Convolutions of stride 2 down to a quarter of the side and up again, ReLU units, one latent layer."""

    KERNEL = 4

    def __init__(
        self, side: int = 28, channels: tuple[int, int] = (16, 32), latent: int = 32, tag: str | None = None
    ) -> None:
        super().__init__(tag)
        self.pixels, self.side, self.channels, self.latent = side**2, side, channels, latent
        (few, many), small, kernel = channels, side // 4, self.KERNEL
        flat = many * small**2
        trunk = nn.Sequential(
            nn.Unflatten(-1, (1, side, side)),
            nn.Conv2d(1, few, kernel, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(few, many, kernel, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(-3),
        )
        self.encoder = Gaussian(trunk, flat, latent)
        self.decoder = nn.Sequential(
            _linear(latent, flat),
            nn.ReLU(),
            nn.Unflatten(-1, (many, small, small)),
            nn.ConvTranspose2d(many, few, kernel, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(few, 1, kernel, stride=2, padding=1),
            nn.Flatten(-3),
        )

    def decode(self, z: Tensor) -> Tensor:
        """Logits, of shape ``[*batch, D]``; particles are folded into the one batch dim of convolutions."""
        return self.decoder(z.flatten(0, -2)).reshape(*z.shape[:-1], self.pixels)

    def encode_once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(x)

    def log_weights_of(self, given: tuple[Tensor, Tensor], x: Tensor, num_particles: int) -> Tensor:
        z, log_q = _draw(*given, num_particles)
        return _log_bernoulli(self.decode(z), x) + _log_standard_normal(z) - log_q

    def model(self, x: Tensor) -> None:
        self.register("decoder")
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(self.latent)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decode(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        self.register("encoder")
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder.distribution(x))

    def products(self, batch: int, particles: int) -> list[Product]:
        (few, many), taps, rows = self.channels, self.KERNEL**2, batch * particles
        whole, half, small = ((self.side // factor) ** 2 for factor in (1, 2, 4))
        flat = many * small
        return [
            Product(batch * half, taps, few, batch * whole, batch * half * few, needs_input_grad=False),
            Product(batch * small, few * taps, many, batch * half * few, batch * flat),
            *_dense(batch, flat, self.latent) * 2,
            *_dense(rows, self.latent, flat),
            Product(rows * small, many, few * taps, rows * flat, rows * half * few),
            Product(rows * half, few, taps, rows * half * few, rows * whole),
        ]


def _dense(rows: int, *widths: int, from_data: bool = False) -> list[Product]:
    return [
        Product(rows, wide, narrow, rows * wide, rows * narrow, not (from_data and index == 0))
        for index, (wide, narrow) in enumerate(pairwise(widths))
    ]


#: The models by the name that ``--models`` takes.
MODELS: dict[str, type[VAE]] = {"one-layer": OneLayerVAE, "two-layer": TwoLayerVAE, "conv": ConvVAE}
