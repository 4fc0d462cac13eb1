"""Fully connected and convolutional layers of the adversarial autoencoders' encoder and decoder."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

from torch import Tensor, nn

__all__ = ["Convolutional", "FullyConnected", "Layers", "relu_mlp"]


def relu_mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Layers(Protocol):
    """What makes an encoder's trunk and a decoder, for flat images ``[B, D]``."""

    def trunk(self, hidden: int) -> nn.Module:
        """Images ``[B, D]`` to features ``[B, hidden]``."""

    def decoder(self, inputs: int, hidden: int) -> nn.Module:
        """Codes ``[B, inputs]`` to the logits of pixels, ``[B, D]``."""


class FullyConnected:
    """Two hidden layers, as in Makhzani et al. (1511.05644) on MNIST.

    Arguments:
        pixels: The number of pixels D.
    """

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def trunk(self, hidden: int) -> nn.Module:
        return nn.Sequential(relu_mlp(self.pixels, hidden, hidden), nn.ReLU())

    def decoder(self, inputs: int, hidden: int) -> nn.Module:
        return relu_mlp(inputs, hidden, hidden, self.pixels)


class ChannelsFirst(nn.Module):
    """Images ``[B, H, W, C]``, as pictures are kept, to ``[B, C, H, W]``, as convolutions take them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


class ChannelsLast(nn.Module):
    """``[B, C, H, W]`` to ``[B, H, W, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


class Convolutional:
    """Convolutions that halve height and width two or three times, and one full layer beside the code.

    All but the last are batch-normalised.

    Arguments:
        shape: Height and width, both divisible by four; and the number of colours, if they have any.
        channels: Of the finest convolution; every halving doubles them.
    """

    def __init__(self, shape: tuple[int, ...], channels: int) -> None:
        height, width, *colours = shape
        if height % 4 or width % 4:
            raise ValueError(f"images of {height}×{width}: neither may leave a rest when halved twice")
        self.image = (height, width, *(colours or [1]))
        halvings = 2 if height % 8 or width % 8 else 3
        # Coarser and coarser.
        self.widths = [self.image[2], *(channels * 2**i for i in range(halvings))]
        self.coarse = (self.widths[-1], height // 2**halvings, width // 2**halvings)

    @property
    def features(self) -> int:
        channels, height, width = self.coarse
        return channels * height * width

    def trunk(self, hidden: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Unflatten(1, self.image), ChannelsFirst()]
        for width_in, width_out in pairwise(self.widths):
            convolution = nn.Conv2d(width_in, width_out, 4, stride=2, padding=1)
            layers += [convolution, nn.BatchNorm2d(width_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(self.features, hidden), nn.ReLU())

    def decoder(self, inputs: int, hidden: int) -> nn.Module:
        layers: list[nn.Module] = [relu_mlp(inputs, hidden, self.features), nn.Unflatten(1, self.coarse)]
        for width_in, width_out in pairwise(reversed(self.widths)):
            layers += [nn.BatchNorm2d(width_in), nn.ReLU()]
            layers += [nn.ConvTranspose2d(width_in, width_out, 4, stride=2, padding=1)]
        return nn.Sequential(*layers, ChannelsLast(), nn.Flatten())
