"""VAEs with any number of stochastic layers and the schedule that trains them (Burda et al., 1509.00519).

One layer is 50 units between two hidden layers of 200; two layers are z1 of 100 units under z2 of 50,
with hidden layers of 200 below z1 and of 100 between z1 and z2. Further layers halve on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..networks import Encoder, mlp

__all__ = ["DeepVAE", "KLWarmup", "Layer", "Stage", "cut", "layer_widths", "schedule"]

STAGES = 8


@dataclass(frozen=True)
class Layer:
    """Widths of a stochastic layer: its latent units, and both hidden layers next to it below."""

    latent: int
    hidden: int


def layer_widths(layers: int) -> list[Layer]:
    """The widths of a network, from the layer next to the image upwards; the paper's for one and two."""
    if layers == 1:
        return [Layer(50, 200)]
    return [Layer(max(100 >> i, 5), max(200 >> i, 20)) for i in range(layers)]


class DeepVAE(nn.Module):
    """p(z_L) p(z_{L-1} | z_L) ... p(z_1 | z_2) p(x | z_1), and the guide q(z_1 | x) ... q(z_L | z_{L-1}).

    The prior of z_L is N(0, I); the conditionals of z are diagonal normals whose mean and logarithm of the
    scale are linear in the second of two tanh layers; pixels are Bernoulli.

    Arguments:
        pixels: The number of pixels D of an image; ``x`` has shape ``[B, D]``.
        widths: From :func:`layer_widths`.
        mean_image: The training mean, shape ``[D]``; its logit becomes the output bias.
        bfloat16: Whether the networks (not the densities) compute in bfloat16 while in train mode.
    """

    def __init__(
        self, pixels: int, widths: list[Layer], mean_image: Tensor | None = None, bfloat16: bool = False
    ) -> None:
        super().__init__()
        below = [pixels, *(layer.latent for layer in widths)]
        self.latent = widths[-1].latent
        self.bfloat16 = bfloat16
        # encoders[i] gives z_{i+1} from what is below it; decoders[i] gives z_{i+1} from z_{i+2}.
        self.encoders = nn.ModuleList(
            Encoder(width_in, layer.latent, layer.hidden)
            for width_in, layer in zip(below[:-1], widths, strict=True)
        )
        self.decoders = nn.ModuleList(
            Encoder(upper.latent, lower.latent, upper.hidden) for lower, upper in pairwise(widths)
        )
        first = widths[0]
        self.output = mlp(first.latent, first.hidden, first.hidden, pixels)
        if mean_image is not None:
            with torch.no_grad():
                self.output[-1].bias.copy_(mean_image.clamp(0.001, 0.999).logit())

    def _normal(self, network: nn.Module, below: Tensor) -> dist.Distribution:
        with torch.autocast(below.device.type, torch.bfloat16, enabled=self.bfloat16 and self.training):
            loc, scale = network(below)
        return dist.Normal(loc.to(below.dtype), scale.to(below.dtype)).to_event(1)

    def logits(self, z: Tensor) -> Tensor:
        """Logits of the pixels given z_1, shape ``[..., D]``."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bfloat16 and self.training):
            logits = self.output(z)
        return logits.to(z.dtype)

    def sample_latents(self, like: Tensor) -> Tensor:
        """Sample z_L, ..., z_1 from the prior, within a plate; returns z_1."""
        zeros = like.new_zeros(self.latent)
        z = pyro.sample(f"z{len(self.encoders)}", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
        for i in range(len(self.decoders), 0, -1):
            z = pyro.sample(f"z{i}", self._normal(self.decoders[i - 1], z))
        return z

    def model(self, x: Tensor) -> None:
        pyro.module("decoders", self.decoders)
        pyro.module("output", self.output)
        with pyro.plate("data", len(x)):
            z = self.sample_latents(x)
            # Under particles z is [S, B, latent]; x [B, D] broadcasts against the logits.
            pixels = dist.Bernoulli(logits=self.logits(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoders", self.encoders)
        z = x
        with pyro.plate("data", len(x)):
            for i, encoder in enumerate(self.encoders, 1):
                z = pyro.sample(f"z{i}", self._normal(encoder, z))


@dataclass(frozen=True)
class Stage:
    """Gradient steps ``start`` (inclusive) to ``end`` (exclusive) at one learning rate."""

    start: int
    end: int
    learning_rate: float


def schedule(
    steps_per_epoch: int, scale: float = 1.0, learning_rate: float = 1e-3, first: int = 0
) -> list[Stage]:
    """Stages i = 0, ..., 7 of 3^i epochs, 3280 in all; learning rates fall by 10^(-1/7) a stage, to a tenth.

    Arguments:
        steps_per_epoch: Gradient steps an epoch.
        scale: Factor on the length of every stage, of which a step at least remains.
        learning_rate: Of stage 0.
        first: The stage to begin with.
    """
    stages: list[Stage] = []
    for i in range(first, STAGES):
        start = stages[-1].end if stages else 0
        length = max(1, round(scale * 3**i * steps_per_epoch))
        stages.append(Stage(start, start + length, learning_rate * 10 ** (-i / (STAGES - 1))))
    return stages


def cut(stages: list[Stage], steps: int) -> list[Stage]:
    """What of a schedule lies before a number of gradient steps."""
    return [Stage(s.start, min(s.end, steps), s.learning_rate) for s in stages if s.start < steps]


class KLWarmup:
    """The weight of the KL term, from 0 to 1 in even parts over the first gradient steps."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def __call__(self, steps: int) -> float:
        return min(1.0, steps / self.num_steps)
