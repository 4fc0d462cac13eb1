"""Priors that codes can be matched to: a Gaussian, a mixture of ten, and a swiss roll.

They are Pyro functions to be called in a model. Where the class of an image is known, the prior is the part
of that class, as in Makhzani et al. (1511.05644), Section 2.3.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["COMPONENTS", "PRIORS", "UNLABELLED", "Gaussian", "Mixture", "Prior", "SwissRoll"]

# Of the mixture and of the swiss roll, one a class.
COMPONENTS = 10
# The class id of an image whose class is not known.
UNLABELLED = COMPONENTS


class Prior:
    """A distribution of codes that can be sampled, with or without parts that classes can be given.

    Arguments:
        latent: The dimension of a code.
    """

    #: The number of parts, one a class; 0 if there are none.
    components = 0
    #: What a row and a column of the manifold are.
    rows = "part of the prior"
    columns = "position along the part"

    def __init__(self, latent: int) -> None:
        self.latent = latent

    def sample(self, labels: Tensor) -> Tensor:
        """The site ``z``, shape ``[B, latent]``, in a plate over ``labels``, shape ``[B]``."""
        raise NotImplementedError

    def manifold(self, columns: int) -> Tensor | None:
        """Codes laid out over the prior, ``[rows * columns, latent]``, or ``None`` if there is no layout."""
        raise NotImplementedError

    def nearest(self, z: Tensor) -> Tensor:
        """The part that a code most probably comes from, ``[N]`` for ``z`` of shape ``[N, latent]``."""
        raise NotImplementedError


class Gaussian(Prior):
    """N(0, I)."""

    rows = "second coordinate, by quantiles, upwards"
    columns = "first coordinate, by quantiles"

    def sample(self, labels: Tensor) -> Tensor:
        loc = torch.zeros(self.latent, device=labels.device)
        return pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))

    def manifold(self, columns: int) -> Tensor | None:
        """The quantiles of both coordinates at equal distances, where there are two."""
        if self.latent != 2:
            return None
        quantiles = torch.special.ndtri((torch.arange(columns) + 0.5) / columns)
        return torch.cartesian_prod(quantiles.flip(0), quantiles).flip(1)


class Mixture(Prior):
    """Ten normals in the plane, as petals of a flower: long along the radius, narrow across it."""

    components = COMPONENTS
    columns = "position along the part, outwards: two standard deviations to either side of its mean"
    RADIUS, ALONG, ACROSS = 4.0, 1.0, 0.35

    def __init__(self, latent: int = 2) -> None:
        super().__init__(latent)
        angles = torch.arange(COMPONENTS) * (2 * math.pi / COMPONENTS)
        self.directions = torch.stack([angles.cos(), angles.sin()], -1)
        across = torch.stack([-angles.sin(), angles.cos()], -1)
        self.factors = torch.stack([self.directions * self.ALONG, across * self.ACROSS], -1)

    def component(self, c: Tensor) -> dist.TorchDistribution:
        """The normals of these components, of any shape."""
        # Both columns of a factor are orthogonal: the covariance is exact, and its Cholesky factor exists.
        factors = self.factors.to(c.device)[c]
        means = self.RADIUS * self.directions.to(c.device)[c]
        return dist.MultivariateNormal(means, factors @ factors.mT)

    def sample(self, labels: Tensor) -> Tensor:
        return pyro.sample("z", self.component(draw_component(labels)))

    def nearest(self, z: Tensor) -> Tensor:
        every = self.component(torch.arange(COMPONENTS, device=z.device))
        return every.log_prob(z.unsqueeze(-2)).argmax(-1)

    def manifold(self, columns: int) -> Tensor:
        """A row a component, outwards from two standard deviations below its mean to two above."""
        radii = self.RADIUS + self.ALONG * torch.linspace(-2, 2, columns)
        return (radii[:, None] * self.directions[:, None]).reshape(-1, 2)


class SwissRoll(Prior):
    """A spiral in the plane, with noise around it; its ten parts are of equal probability."""

    components = COMPONENTS
    columns = "position along the part, outwards on the spiral"
    TURNS, RADIUS, NOISE = 2.0, 5.0, 0.1

    def __init__(self, latent: int = 2) -> None:
        super().__init__(latent)

    def spine(self, position: Tensor) -> Tensor:
        """The points ``[*shape, 2]`` below which a share ``position`` in [0, 1] of the probability lies."""
        # The root makes the density along the spiral about constant.
        radius = position.sqrt()
        angle = 2 * math.pi * self.TURNS * radius
        return self.RADIUS * radius[..., None] * torch.stack([angle.cos(), angle.sin()], -1)

    def sample(self, labels: Tensor) -> Tensor:
        c = draw_component(labels)
        zero = torch.zeros((), device=labels.device)
        within = pyro.sample("within", dist.Uniform(zero, zero + 1), infer={"is_auxiliary": True})
        return pyro.sample("z", dist.Normal(self.spine((c + within) / COMPONENTS), self.NOISE).to_event(1))

    def nearest(self, z: Tensor) -> Tensor:
        """By the nearest point of the spiral: the noise is the same everywhere."""
        steps = 200  # a component
        positions = (torch.arange(COMPONENTS * steps, device=z.device) + 0.5) / (COMPONENTS * steps)
        return torch.cdist(z, self.spine(positions)).argmin(-1) // steps

    def manifold(self, columns: int) -> Tensor:
        """A row a component, outwards along the spiral."""
        return self.spine((torch.arange(COMPONENTS * columns) + 0.5) / (COMPONENTS * columns))


def draw_component(labels: Tensor) -> Tensor:
    """The component that a class is given, drawn where the class is not known; in a plate over ``labels``."""
    # Not part of the code: the guide has no such site, and it is no latent of interest.
    weights = torch.ones(COMPONENTS, device=labels.device)
    drawn = pyro.sample("component", dist.Categorical(weights), infer={"is_auxiliary": True})
    return torch.where(labels == UNLABELLED, drawn, labels)


PRIORS = {"gaussian": Gaussian, "mixture": Mixture, "swiss-roll": SwissRoll}
