"""A gated PixelCNN as the likelihood of a VAE: p(x | z) = Π_i p(x_i | x_<i, z), pixels in reading order."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_iw.nn import FoldBatch

from .networks import VAE, mlp

__all__ = ["AutoregressiveBernoulli", "GatedPixelCNN", "PixelCNN", "PixelVAE"]

# A layer sees so many rows up, and so many columns to each side.
REACH = 2
# Channels of the map of z.
CODE_CHANNELS = 4


def gate(features: Tensor) -> Tensor:
    """tanh(a) · σ(b) of the two halves of the channels."""
    a, b = features.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class VerticalStack(nn.Module):
    """What a pixel may know of the rows above it, all of their columns within reach.

    Images ``[N, 1, H, W]`` to features ``[N, 2·channels, H, W]`` for every layer. In row i they depend on
    rows i − 1 and up alone.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        width = 2 * REACH + 1
        # The first leaves out the row that it stands in. What those after it see there is of rows above.
        first = nn.Conv2d(1, 2 * channels, (REACH, width))
        rest = (nn.Conv2d(channels, 2 * channels, (REACH + 1, width)) for _ in range(layers - 1))
        self.convolutions = nn.ModuleList([first, *rest])
        self.links = nn.ModuleList(nn.Conv2d(2 * channels, 2 * channels, 1) for _ in range(layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        height, given = x.shape[-2], []
        for convolution, link in zip(self.convolutions, self.links, strict=True):
            seen = convolution(pad(x, (REACH, REACH, REACH, 0)))[..., :height, :]
            given.append(link(seen))
            x = gate(seen)
        return given


class HorizontalStack(nn.Module):
    """The logits ``[N, 1, H, W]``, from the pixels to the left, the code and the vertical stack.

    No row depends on another one but by what is given: the map of z, ``[N, 4, H, W]``, and the features of
    the vertical stack, one ``[N, 2·channels, H, W]`` a layer.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        first = nn.Conv2d(1, 2 * channels, (1, REACH))
        rest = (nn.Conv2d(channels, 2 * channels, (1, REACH + 1)) for _ in range(layers - 1))
        self.convolutions = nn.ModuleList([first, *rest])
        self.codes = nn.ModuleList(
            nn.Conv2d(CODE_CHANNELS, 2 * channels, 1, bias=False) for _ in range(layers)
        )
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(layers))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, 1, 1)
        )

    def forward(self, x: Tensor, code: Tensor, *above: Tensor) -> Tensor:
        width, h = x.shape[-1], x
        for i, convolution in enumerate(self.convolutions):
            left = convolution(pad(h, (REACH, 0, 0, 0)))[..., :width]
            gated = self.outputs[i](gate(left + self.codes[i](code) + above[i]))
            # Not past the first layer: x itself holds the pixel that is to be predicted.
            h = gated if i == 0 else h + gated
        return self.head(h)


class GatedPixelCNN(nn.Module):
    r"""The logit of every pixel given z and the pixels before it, in reading order.

    .. math:: \log p(x \mid z) = \sum_i \log \mathrm{Bernoulli}(x_i \mid \sigma(l_i)), \qquad
        l_i = f(x_{<i}, z)

    Two stacks, so that nothing above lies in a blind spot: with L layers a pixel sees 2L rows up, 2L columns
    to each side there, and 2L pixels to its left. z enters every layer of the horizontal stack by a map of
    its own, the paper's s = m(h): a fully connected network, as a VAE has for a decoder. The vertical stack
    does not see z, and so is computed once for all particles.

    References:
        | Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016),
          https://arxiv.org/abs/1606.05328

    Arguments:
        image_shape: Height H and width W.
        latent: The dimension of z.
        channels: Of each stack.
        layers: L.
        hidden: The width of both hidden layers of the map.
    """

    def __init__(
        self,
        image_shape: tuple[int, int],
        latent: int,
        channels: int = 16,
        layers: int = 4,
        hidden: int = 200,
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        height, width = self.image_shape
        self.code = nn.Sequential(
            mlp(latent, hidden, hidden, CODE_CHANNELS * height * width),
            nn.Unflatten(-1, (CODE_CHANNELS, height, width)),
        )
        # Each has the leading dims of what it is given: no particles in the one, particles in the other.
        self.vertical = FoldBatch(VerticalStack(channels, layers), event_dim=3)
        self.horizontal = FoldBatch(HorizontalStack(channels, layers), event_dim=3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Logits ``[*leading, H·W]`` of bits ``[*leading, H·W]`` under z ``[*leading, latent]``."""
        # Off is −1, so that it is not what lies outside the image.
        images = (2 * x - 1).unflatten(-1, (1, *self.image_shape))
        return self.horizontal(images, self.code(z), *self.vertical(images)).flatten(-3)

    @torch.no_grad()
    def sample(self, z: Tensor) -> Tensor:
        """Bits ``[*leading, H·W]``, pixel by pixel, under z ``[*leading, latent]``."""
        code = self.code(z)
        images = -torch.ones_like(code[..., :1, :, :])
        height, width = self.image_shape
        for i in range(height):
            row = images[..., i : i + 1, :]  # a view: what is drawn is seen by what follows
            above = [seen[..., i : i + 1, :] for seen in self.vertical(images[..., : i + 1, :])]
            for j in range(width):
                logits = self.horizontal(row, code[..., i : i + 1, :], *above)
                row[..., j] = 2 * torch.bernoulli(logits[..., j].sigmoid()) - 1
        return (images.flatten(-3) + 1) / 2


class AutoregressiveBernoulli(TorchDistribution):
    """p(x | z) of a :class:`GatedPixelCNN`: a density in one pass, draws in one pass a pixel.

    Arguments:
        network: Gives the logits.
        z: ``[*batch_shape, latent]``.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - as in torch
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, network: GatedPixelCNN, z: Tensor, validate_args: bool | None = None) -> None:
        self.network, self.z = network, z
        height, width = network.image_shape
        super().__init__(z.shape[:-1], torch.Size([height * width]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> AutoregressiveBernoulli:
        z = self.z.expand(*batch_shape, self.z.shape[-1])
        return AutoregressiveBernoulli(self.network, z, validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        pixels = dist.Bernoulli(logits=self.network(x, self.z), validate_args=False)
        return pixels.log_prob(x).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.network.sample(self.z.expand(*sample_shape, *self.z.shape))


class PixelVAE(VAE):
    """The VAE with a gated PixelCNN for its decoder; prior and guide are the same.

    Arguments:
        image_shape: Height and width.
        latent: The dimension of z.
        channels: Of the PixelCNN.
        layers: Likewise.
    """

    def __init__(
        self, image_shape: tuple[int, int], latent: int, channels: int = 16, layers: int = 4
    ) -> None:
        super().__init__(image_shape[0] * image_shape[1], latent)
        self.decoder = GatedPixelCNN(image_shape, latent, channels, layers)

    def likelihood(self, z: Tensor) -> TorchDistribution:
        return AutoregressiveBernoulli(self.decoder, z)


class PixelCNN(PixelVAE):
    """The PixelCNN alone: p(x | z = 0), without latents. Its ELBO is log p(x)."""

    def likelihood(self, z: Tensor) -> TorchDistribution:
        return super().likelihood(torch.zeros_like(z))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.likelihood(x.new_zeros(len(x), self.latent)), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing to guess."""
