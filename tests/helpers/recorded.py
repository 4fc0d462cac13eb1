"""Distributions whose random draws are recorded, or given: one run can be fed the draws of another."""

from typing import ClassVar

import pyro.distributions as dist
import torch


class Draws:
    """The draws of one family of runs, in order.

    ``made`` holds what was drawn. Draws in ``given`` are taken, in order, before any is made.
    """

    made: ClassVar = []
    given: ClassVar = []

    @classmethod
    def next(cls, shape, dtype):
        # Given draws lack dims of size 1, or have them too much, where a dim for particles comes and goes.
        draw = cls.given.pop(0).reshape(shape) if cls.given else torch.rand(shape, dtype=dtype)
        cls.made.append(draw)
        return draw

    @classmethod
    def give(cls, draws=()):
        cls.made.clear()
        cls.given[:] = draws


class Uniformly(dist.Normal):
    """A normal, by the inverse of its cumulative distribution at a recorded uniform draw."""

    def rsample(self, sample_shape=()):
        uniform = Draws.next(self._extended_shape(torch.Size(sample_shape)), self.loc.dtype)
        return self.loc + self.scale * 2**0.5 * torch.erfinv(2 * uniform - 1)


class Coin(dist.Bernoulli):
    """A Bernoulli that compares its probability with a recorded uniform draw."""

    def sample(self, sample_shape=()):
        uniform = Draws.next(self._extended_shape(torch.Size(sample_shape)), self.probs.dtype)
        return (uniform < self.probs).to(self.probs.dtype)


def joined(draws, sizes, num_sites, vectorized=True):
    """Draws of a chunked pass as those of one pass over all particles.

    Arguments:
        draws: in the order made, chunk by chunk and site by site.
        sizes: sizes of the chunks.
        num_sites: number of sites that draw.
        vectorized: whether a chunk makes one draw a site; otherwise one a particle and site.
    """
    if not vectorized:
        return list(draws)
    sites = [[] for _ in range(num_sites)]
    for index, size in enumerate(sizes):
        for site in range(num_sites):
            draw = draws[index * num_sites + site]
            # A chunk of one particle runs without a dim for it.
            sites[site].append(draw if size > 1 else draw.unsqueeze(0))
    rank = [max(draw.dim() for draw in site) for site in sites]
    return [
        torch.cat([draw.reshape(len(draw), *[1] * (r - draw.dim()), *draw.shape[1:]) for draw in site])
        for site, r in zip(sites, rank, strict=True)
    ]
