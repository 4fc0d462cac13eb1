r"""Judging a model of sequences by particle filters: evidence, filtering means, and what became of the
particles.

M independent filters of K particles run side by side. Each gives an unbiased :math:`\hat p_m(x)`, so that

.. math:: \log \hat p(x) = \log \frac1M \sum_m \hat p_m(x)

has a Monte Carlo error that can be read off their spread (delta method), and particles of all filters count
by :math:`\hat p_m` times their weight within the filter.

References:
    | Feynman-Kac Formulae (Del Moral, 2004)
    | A tutorial on particle filtering and smoothing: fifteen years later (Doucet & Johansen, 2011)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._support.arguments import as_plate_names, positive_integer
from .._support.warn import warn
from ..logmean import logmeanexp
from .filtered import FilteredSequences
from .filtering import Filter
from .history import History, Watch
from .protocol import Protocol, read_sequences

__all__ = ["ParticleFilter"]


class ParticleFilter:
    r"""Judges a model of sequences by particle filters, with the guide as proposal.

    .. math:: \log \hat p(x) = \log \frac1M \sum_{m=1}^M \hat p_m(x)

    Model and guide are objects with ``init(state, ...)`` and ``step(state, ...)``; sequences are given as to
    :class:`FIVO_ELBO`.

    Arguments:
        model: the model.
        guide: the guide.
        num_particles: the number K of particles of a filter; an integer >= 2.
        num_filters: the number M of independent filters of each sequence, run in one pass; an integer >= 1.
            They tell the Monte Carlo error, and at a given K M more particles in fewer filters are better.
        ess_threshold: as of :class:`FIVO_ELBO`.
        resampling: as of :class:`FIVO_ELBO`.
        plates: name or names of the plates whose cells have a filter each; ``()`` for a joint one; None for
            the plates common to all sample sites.
        max_plate_nesting: number of batch dims that the plates of the pair take; found by running the pair if
            infinite.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> class Model:
        ...     def init(self, state):
        ...         state["z"] = torch.zeros(())
        ...     def step(self, state, y):
        ...         with pyro.plate("data", len(y)):
        ...             state["z"] = pyro.sample("z", dist.Normal(state["z"], 1.0))
        ...             pyro.sample("y", dist.Normal(state["z"], 1.0), obs=y)
        >>> class Guide:
        ...     def init(self, state):
        ...         pass
        ...     def step(self, state, y):
        ...         with pyro.plate("data", len(y)):
        ...             pyro.sample("z", dist.Normal((state["z"] + y) / 2, 0.7))
        >>> filtered = ParticleFilter(Model(), Guide(), num_particles=100)(torch.randn(6, 3))  # T = 6
        >>> filtered.log_marginal.shape, filtered.mean("z").shape, filtered.smooth(20)["z"].shape
        (torch.Size([3]), torch.Size([6, 3]), torch.Size([20, 6, 3]))
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        num_particles: int = 1000,
        *,
        num_filters: int = 8,
        ess_threshold: float = 0.5,
        resampling: str = "systematic",
        plates: str | Iterable[str] | None = None,
        max_plate_nesting: float = math.inf,
    ) -> None:
        self.model = model
        self.guide = guide
        self.num_particles = positive_integer("num_particles", num_particles)
        if self.num_particles == 1:
            raise ValueError("num_particles=1 leaves nothing to resample; a filter needs 2 or more.")
        self.num_filters = positive_integer("num_filters", num_filters)
        self._warned: set[str] = set()
        self._filter = Filter(
            self.num_particles,
            ess_threshold,
            resampling,
            as_plate_names(plates),
            max_plate_nesting,
            self._warn_once,
            self.num_filters,
        )

    @torch.no_grad()
    def log_marginal(self, *args: Any, **kwargs: Any) -> Tensor:
        """The log evidence of every sequence, ``[*cells]``, in nats, in the memory of one step.

        A sequence with a NaN or without a living particle has NaN or -inf, and leaves the others untouched; a
        warning names the step and the site.

        Arguments:
            args: sequences, of which each step gets an entry.
            kwargs: arguments of ``init``.

        Raises:
            ValueError: as :meth:`FIVO_ELBO.loss`, NaN aside.
        """
        watch = Watch(self.num_filters, self.num_particles)
        filtered = self._filter.run(self._pair, read_sequences(args, kwargs), visit=watch)
        return logmeanexp(filtered.value, 0)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> FilteredSequences:
        """Filter sequences, and keep all steps.

        Arguments, errors and warnings are those of :meth:`log_marginal`.
        """
        sequences = read_sequences(args, kwargs)
        history = History(self._pair, self.num_filters, self.num_particles)
        filtered = self._filter.run(self._pair, sequences, visit=history)
        return history.collect(filtered, sequences)

    @property
    def _pair(self) -> Protocol:
        return Protocol(self.model, self.guide)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)
