"""Filtered sequences: what particle filters say of each, and draws of what they have seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .._support.arguments import positive_integer
from .._support.devices import wide
from ..resampling import multinomial
from ..tracing.latents import Latent, place
from .smoothing import Past, smooth

__all__ = ["FilteredSequences", "Observed"]


class Observed(NamedTuple):
    """What was observed at a site: values ``[*batch, *event]``, its number of event dims, its plates."""

    values: Tensor
    event_dim: int
    frames: tuple[CondIndepStackFrame, ...]


@dataclass(frozen=True, eq=False, repr=False)
class FilteredSequences:
    """Particle filters that have run, on the sequences that they ran on.

    Attributes:
        log_marginal: :math:`\\log \\hat p(x)` of each sequence in nats, of shape ``[*cells]``.
        monte_carlo_error: its standard error (delta method), ``[*cells]``; NaN with one filter.
        log_increments: :math:`\\log \\hat p(x_t \\mid x_{<t})`, ``[T, *cells]``, which add up to
            ``log_marginal``; ``init`` counts with the first step. -inf where no particle survives a step, and
            NaN from then on.
        ess: effective number of the K particles after each step, averaged over the filters, ``[T, *cells]``;
            0 for a filter without a living particle, NaN where a sequence is masked.
        weights: of all S = M K particles after each step, summing to 1, ``[T, S, *cells]``.
        ancestors: the particle that each came from in the step before, ``[T, S, *cells]``.
        values: latent sites of the steps, ``[T, S, *batch, *event]``, by name; ``"z"`` for sites that are
            called ``"z_0"``, ``"z_1"``, ... by their step.
        active: whether a sequence is not masked, ``[T, *cells]``.
        num_particles: the number K of particles of a filter.
        num_filters: the number M of filters.
        plates: names of the plates whose cells have a filter each.

    Example:
        >>> class Walk:
        ...     def init(self, state):
        ...         state["z"] = torch.zeros(())
        ...     def step(self, state, y):
        ...         with pyro.plate("data", 3):
        ...             state["z"] = pyro.sample("z", dist.Normal(state["z"], 1.0))
        ...             pyro.sample("y", dist.Normal(state["z"], 1.0), obs=y)
        >>> class Guide:
        ...     def init(self, state):
        ...         pass
        ...     def step(self, state, y):
        ...         with pyro.plate("data", 3):
        ...             pyro.sample("z", dist.Normal((state["z"] + y) / 2, 0.7))
        >>> filtered = ParticleFilter(Walk(), Guide(), num_particles=50)(torch.randn(6, 3))
        >>> torch.allclose(filtered.log_increments.sum(0), filtered.log_marginal)
        True
    """

    log_marginal: Tensor
    monte_carlo_error: Tensor
    log_increments: Tensor
    ess: Tensor
    weights: Tensor
    ancestors: Tensor
    values: dict[str, Tensor]
    active: Tensor
    num_particles: int
    num_filters: int
    plates: tuple[str, ...]
    sites: dict[str, Latent] = field(repr=False)
    observed: dict[str, Observed] = field(repr=False)
    frames: tuple[CondIndepStackFrame, ...] = field(repr=False)
    _past: Past = field(repr=False)

    @property
    def num_steps(self) -> int:
        """The number T of steps."""
        return len(self.weights)

    def mean(self, name: str | None = None) -> Tensor:
        """Filtering means E[z_t | x_1, ..., x_t], of shape ``[T, *batch, *event]``; NaN where masked, and
        where no particle is alive.

        Arguments:
            name: a latent site; may be left out where there is one.

        Raises:
            ValueError: if there is no such site.
        """
        name = self._name(name)
        return self._weighted(name, self.values[name])

    def variance(self, name: str | None = None) -> Tensor:
        """Filtering variances of each element, of the shape of :meth:`mean`; arguments and errors are its."""
        name = self._name(name)
        values = self.values[name]
        return self._weighted(name, (values - self._weighted(name, values).unsqueeze(1)).square())

    def num_ancestors(self) -> Tensor:
        """How many of the K particles of each step have descendants at the end, ``[T, *cells]``.

        The mean over the filters. The first row is the number of distinct roots: where it is 1, all that the
        last particles know of the first step is one draw, and trajectories along the genealogy are one there.
        """
        counts = []
        lineage = self._own()
        for t in range(self.num_steps - 1, -1, -1):
            alive = torch.zeros_like(lineage).scatter(0, lineage, 1)
            counts.append(alive.sum(0).to(self.ess.dtype) / self.num_filters)
            lineage = self.ancestors[t].gather(0, lineage)
        return torch.stack(counts[::-1])

    def trajectories(self, num_samples: int = 100) -> dict[str, Tensor]:
        """Trajectories along the genealogy of the last particles, ``[n, T, *batch, *event]``, by site.

        Draws from p(z_1, ..., z_T | x), of which the early steps of long sequences have few distinct values,
        see :meth:`num_ancestors`; :meth:`smooth` has more.

        Arguments:
            num_samples: the number n of trajectories of each cell; an integer >= 1.

        Raises:
            ValueError: if a sequence has no living particle at the end.
        """
        self._check_alive()
        lineage = multinomial(self.weights[-1], positive_integer("num_samples", num_samples))
        chosen = []
        for t in range(self.num_steps - 1, -1, -1):
            chosen.append(lineage)
            lineage = self.ancestors[t].gather(0, lineage)
        return self._along(chosen[::-1])

    def smooth(self, num_samples: int = 100) -> dict[str, Tensor]:
        """Trajectories by backward sampling, ``[n, T, *batch, *event]``, by site.

        From the last step to the first, each trajectory picks among all particles of a step by

        .. math:: w_{t,k}\\, p(\\tilde z_{t+1}, x_{t+1} \\mid h_{t,k}),

        where :math:`\\tilde z_{t+1}` is what it has picked already. That takes a model whose state after a
        step follows from the step's latents (and data): a Markov model. It costs n S densities a step.

        Arguments:
            num_samples: the number n of trajectories of each cell; an integer >= 1.

        Raises:
            NotImplementedError: if the state remembers more than that, naming the tensor, or the sites of a
                step are not those that were filtered.
            ValueError: if a sequence has no living particle at the end.

        References:
            | Monte Carlo Smoothing for Nonlinear Time Series (Godsill et al., 2004)
        """
        self._check_alive()
        chosen = smooth(self._past, self.weights, positive_integer("num_samples", num_samples))
        return self._along(chosen)

    def to_arviz(self, num_samples: int = 500, smoothed: bool = True, coords: Any = None) -> Any:
        """Trajectories, filtering moments and diagnostics as ArviZ knows them, with a dim ``time``.

        See :func:`pyro_iw.sequences.to_arviz.to_arviz`.
        """
        from .to_arviz import to_arviz

        return to_arviz(self, num_samples=num_samples, smoothed=smoothed, coords=coords)

    def _own(self) -> Tensor:
        first = self.ancestors[0]
        own = torch.arange(len(first), device=first.device)
        return own.reshape(-1, *[1] * (first.dim() - 1)).expand_as(first).contiguous()

    def _along(self, chosen: list[Tensor]) -> dict[str, Tensor]:
        """Values of the particles ``[n, *cells]`` that were chosen at each step."""
        result = {}
        for name, values in self.values.items():
            site = self.sites[name]
            picked = [self._pick(step, index, site) for step, index in zip(values, chosen, strict=True)]
            result[name] = torch.stack(picked, 1)
        return result

    def _pick(self, values: Tensor, index: Tensor, site: Latent) -> Tensor:
        placed = self._placed(index, values, site)
        shape = torch.broadcast_shapes(placed.shape[1:], values.shape[1:])
        values = values.expand(len(values), *shape)
        return values.gather(0, placed.expand(len(placed), *shape))

    def _placed(self, per_cell: Tensor, values: Tensor, site: Latent) -> Tensor:
        return place(per_cell, self.frames, values.dim() - 1 - site.event_dim, site.event_dim)

    def _weighted(self, name: str, values: Tensor) -> Tensor:
        site, means = self.sites[name], []
        for step, weights, active in zip(values, self.weights, self.active, strict=True):
            placed = self._placed(weights, step, site)
            mean = (placed * step).sum(0)
            known = (active & (weights.sum(0) > 0)).unsqueeze(0)
            means.append(mean.masked_fill(~self._placed(known, step, site)[0], math.nan))
        return torch.stack(means)

    def _check_alive(self) -> None:
        dead = ~self.log_marginal.isfinite()
        if bool(dead.any()):
            raise ValueError(
                f"In {int(dead.sum())} of {dead.numel()} sequence(s), the first of them "
                f"{dead.nonzero()[0].tolist()}, log p(x) is -inf or NaN: no particle is left to draw "
                "trajectories from. Filter the other sequences without them, or take a guide that proposes "
                "what the model allows."
            )

    def _name(self, name: str | None) -> str:
        if name is None and len(self.values) == 1:
            return next(iter(self.values))
        if name not in self.values:
            raise ValueError(f"name must be one of the latent sites {sorted(self.values)}, got {name!r}")
        return name

    def __repr__(self) -> str:
        return (
            f"FilteredSequences(log_marginal={wide(self.log_marginal).sum().item():.4f}, "
            f"T={self.num_steps}, sequences={max(1, self.log_marginal.numel())}, "
            f"num_particles={self.num_particles}, num_filters={self.num_filters})"
        )
