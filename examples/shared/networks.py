"""The one-layer VAE of Burda et al. (1509.00519): its networks, and its model and guide."""

from __future__ import annotations

from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["VAE", "Encoder", "mlp"]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        linear = nn.Linear(width_in, width_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """q(z | x): the mean and the standard deviation of a diagonal normal."""

    def __init__(self, pixels: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(mlp(pixels, hidden, hidden), nn.Tanh())
        self.loc = mlp(hidden, latent)
        self.log_scale = mlp(hidden, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.loc(h), self.log_scale(h).exp()


class VAE(nn.Module):
    """p(z) = N(0, I), p(x | z) = Bernoulli(decoder(z)), and the guide q(z | x).

    Arguments:
        pixels: The number of pixels D of an image; ``x`` has shape ``[B, D]``.
        latent: The dimension of z.
        hidden: The width of both hidden layers.
        mean_image: The training mean, shape ``[D]``; its logit becomes the decoder's output bias.
    """

    def __init__(
        self, pixels: int, latent: int = 50, hidden: int = 200, mean_image: Tensor | None = None
    ) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = Encoder(pixels, latent, hidden)
        self.decoder = mlp(latent, hidden, hidden, pixels)
        if mean_image is not None:
            with torch.no_grad():
                self.decoder[-1].bias.copy_(mean_image.clamp(0.001, 0.999).logit())

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(self.latent)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            pyro.sample("x", self.likelihood(z), obs=x)

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) of an image, one for each z ``[*batch, latent]``."""
        # Under particles z is [S, B, latent]; x [B, D] broadcasts against the logits.
        return dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))
