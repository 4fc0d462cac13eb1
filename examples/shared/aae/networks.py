"""The model/guide pairs of Makhzani et al. (1511.05644): an encoder, a decoder, and what is to be matched.

All are ordinary Pyro pairs. The guides are deterministic, so that none of them has a density: what shapes the
codes are the discriminators. An image is modelled as ``Normal(decoder(code), 0.2)``, pixel by pixel.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FullyConnected, Layers, relu_mlp
from .priors import COMPONENTS, UNLABELLED, Prior

__all__ = ["PIXEL_SCALE", "ClassAAE", "Discriminator", "Encoder", "Few", "HeadsAAE", "LatentAAE", "Pair"]

# Images [B, D] and their classes [B].
Few = tuple[Tensor, Tensor]
# Standard deviation of a pixel given the code.
PIXEL_SCALE = 0.2


def as_layers(layers: Layers | int) -> Layers:
    """Fully connected ones, if all that is given is the number of pixels."""
    return FullyConnected(layers) if isinstance(layers, int) else layers


class Encoder(nn.Module):
    """An image to a code z, and to the logits of the heads if there are any.

    Arguments:
        layers: What to see images ``[B, D]`` with, or their number of pixels D for fully connected layers.
        latent: The dimension of z.
        hidden: The width of the hidden layers.
        heads: The number of classes or clusters.
        noise: Standard deviation of the noise added to an image in training.
    """

    def __init__(
        self, layers: Layers | int, latent: int, hidden: int, heads: int = 0, noise: float = 0.0
    ) -> None:
        super().__init__()
        self.noise = noise
        self.trunk = as_layers(layers).trunk(hidden)
        self.code = nn.Linear(hidden, latent)
        # Standardised logits: with every head in use from the start, none has to be brought back to life.
        self.heads = nn.Sequential(nn.Linear(hidden, heads), nn.BatchNorm1d(heads)) if heads else None

    def features(self, x: Tensor) -> Tensor:
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        """z, shape ``[B, latent]``."""
        return self.code(self.features(x))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the heads, shape ``[B, heads]``, and z."""
        assert self.heads is not None
        h = self.features(x)
        return self.heads(h), self.code(h)

    def logits(self, x: Tensor) -> Tensor:
        """The logits of the heads alone, shape ``[B, heads]``."""
        assert self.heads is not None
        return self.heads(self.features(x))


class Discriminator(nn.Module):
    """The logit that a value comes from the prior, ``[cells]`` for values ``[cells, width]``.

    Arguments:
        width: Of a value, and of what it is conditioned on.
        hidden: The width of both hidden layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = relu_mlp(width, hidden, hidden, 1)

    def forward(self, value: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            value = torch.cat([value, condition], -1)
        return self.layers(value).squeeze(-1)


class Pair(nn.Module):
    """What both pairs share: p(x | code), and what a trainer asks of them."""

    encoder: Encoder
    decoder: nn.Module

    def discriminators(self, hidden: int) -> dict[str, nn.Module]:
        """One a latent site, with hidden layers of this width."""
        raise NotImplementedError

    def batch(self, x: Tensor, few: Few | None) -> tuple[tuple[Tensor, ...], Few | None]:
        """What model and guide are called with, and what the supervised phase is.

        Arguments:
            x: Images ``[B, D]``, whatever their classes.
            few: Images and their classes, if there are any that are to be used.
        """
        raise NotImplementedError

    def images(self, code: Tensor) -> Tensor:
        """The means of the pixels, shape ``[N, D]``."""
        return self.decoder(code).sigmoid()

    def observe(self, x: Tensor, code: Tensor) -> None:
        """The site ``x``, in a plate over images ``[B, D]``."""
        pyro.sample("x", dist.Normal(self.images(code), PIXEL_SCALE).to_event(1), obs=x)


class LatentAAE(Pair):
    """One code z under any prior; where a label is known, the prior is the component of that class.

    Arguments:
        layers: See :class:`Encoder`.
        prior: Of z.
        hidden: The width of the hidden layers.
        noise: See :class:`Encoder`.
        steered: Whether the discriminator is told the class.
    """

    def __init__(
        self, layers: Layers | int, prior: Prior, hidden: int, noise: float = 0.0, steered: bool = False
    ) -> None:
        super().__init__()
        self.prior, self.steered = prior, steered
        self.encoder = Encoder(layers, prior.latent, hidden, noise=noise)
        self.decoder = as_layers(layers).decoder(prior.latent, hidden)

    def model(self, x: Tensor, labels: Tensor) -> None:
        """Images ``[B, D]`` and their classes ``[B]``, :data:`UNLABELLED` where not known."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            self.observe(x, self.prior.sample(labels))

    def guide(self, x: Tensor, labels: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))

    def discriminators(self, hidden: int) -> dict[str, nn.Module]:
        told = COMPONENTS + 1 if self.steered else 0
        return {"z": Discriminator(self.prior.latent + told, hidden)}

    def batch(self, x: Tensor, few: Few | None) -> tuple[tuple[Tensor, ...], None]:
        """The few come beside the others, among which they are too: so these follow the whole prior."""
        unknown = torch.full((len(x),), UNLABELLED, device=x.device)
        if few is None:
            return (x, unknown), None
        return (torch.cat([x, few[0]]), torch.cat([unknown, few[1]])), None

    def condition(self, x: Tensor, labels: Tensor) -> Tensor:
        """What the discriminator is told: the class as one-hot, with one more for "not known"."""
        return F.one_hot(labels, COMPONENTS + 1).to(x.dtype)


class HeadsDecoder(nn.Module):
    """Pixels' logits from a choice of heads y and a style z.

    Arguments:
        layers: See :class:`Encoder`.
        heads: The number of heads.
        latent: The dimension of z.
        hidden: The width of the hidden layers.
        distance: If given, all that the decoder sees is W y + z, with heads W that are to be this far apart.
    """

    def __init__(
        self, layers: Layers | int, heads: int, latent: int, hidden: int, distance: float | None
    ) -> None:
        super().__init__()
        self.distance = distance
        self.layers = as_layers(layers).decoder(latent + (0 if distance else heads), hidden)
        self.centres = nn.Parameter(distance * torch.randn(heads, latent)) if distance else None

    def code(self, y: Tensor, z: Tensor) -> Tensor:
        """W y + z, or both side by side."""
        return torch.cat([y, z], -1) if self.centres is None else y @ self.centres + z

    def forward(self, code: Tensor) -> Tensor:
        return self.layers(code)

    def penalty(self) -> Tensor:
        """How much closer than wanted the heads are, summed over pairs; linear, as in the paper."""
        assert self.centres is not None
        assert self.distance is not None
        return (self.distance - F.pdist(self.centres)).clamp(min=0).sum()


class HeadsAAE(Pair):
    """A choice y of heads (classes, clusters) and a style z: y ~ Categorical, z ~ N(0, I), x | y, z.

    The guide's y is a softmax, soft where the prior's is one-hot: that it be one-hot too is for the
    discriminator to enforce.

    Arguments:
        layers: See :class:`Encoder`.
        heads: The number of heads.
        latent: The dimension of z.
        hidden: The width of the hidden layers.
        noise: See :class:`Encoder`.
        distance: See :class:`HeadsDecoder`.
    """

    decoder: HeadsDecoder

    def __init__(
        self,
        layers: Layers | int,
        heads: int,
        latent: int,
        hidden: int,
        noise: float = 0.0,
        distance: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.latent = heads, latent
        self.encoder = Encoder(layers, latent, hidden, heads, noise)
        self.decoder = HeadsDecoder(layers, heads, latent, hidden, distance)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        if self.decoder.distance:
            # Times the batch, as the pixels are summed over it.
            pyro.factor("distances", -len(x) * self.decoder.penalty())
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(self.heads, device=x.device)))
            loc = torch.zeros(self.latent, device=x.device)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            self.observe(x, self.decoder.code(y, z))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            logits, z = self.encoder.both(x)
            pyro.sample("y", dist.Delta(logits.softmax(-1), event_dim=1))
            pyro.sample("z", dist.Delta(z, event_dim=1))

    def discriminators(self, hidden: int) -> dict[str, nn.Module]:
        return {"y": Discriminator(self.heads, hidden), "z": Discriminator(self.latent, hidden)}

    def batch(self, x: Tensor, few: Few | None) -> tuple[tuple[Tensor, ...], Few | None]:
        return (x,), few

    def classify(self, x: Tensor, labels: Tensor) -> None:
        """The supervised phase: images ``[B, D]`` and their classes ``[B]``."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("labelled", len(x)):
            pyro.sample("label", dist.Categorical(logits=self.encoder.logits(x)), obs=labels)


class ClassAAE(Pair):
    """A style z of images whose classes are all known: z ~ N(0, I), x | class, z.

    The decoder is told the class, so that z need not hold it; the encoder is not.

    Arguments:
        layers: See :class:`Encoder`.
        classes: How many there are.
        latent: The dimension of z.
        hidden: The width of the hidden layers.
        noise: See :class:`Encoder`.
    """

    def __init__(
        self, layers: Layers | int, classes: int, latent: int, hidden: int, noise: float = 0.0
    ) -> None:
        super().__init__()
        self.classes, self.latent = classes, latent
        self.encoder = Encoder(layers, latent, hidden, noise=noise)
        self.decoder = as_layers(layers).decoder(latent + classes, hidden)

    def code(self, labels: Tensor, z: Tensor) -> Tensor:
        """What the decoder sees: the class, ``[N]``, as one-hot, and beside it z."""
        return torch.cat([F.one_hot(labels, self.classes).to(z.dtype), z], -1)

    def model(self, x: Tensor, labels: Tensor) -> None:
        """Images ``[B, D]`` and their classes ``[B]``."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            loc = torch.zeros(self.latent, device=x.device)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            self.observe(x, self.code(labels, z))

    def guide(self, x: Tensor, labels: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))

    def discriminators(self, hidden: int) -> dict[str, nn.Module]:
        return {"z": Discriminator(self.latent, hidden)}

    def batch(self, x: Tensor, few: Few | None) -> tuple[tuple[Tensor, ...], None]:
        """The images with their classes; without any, as where z alone is looked at, with some class."""
        return few or (x, torch.zeros(len(x), dtype=torch.long, device=x.device)), None
