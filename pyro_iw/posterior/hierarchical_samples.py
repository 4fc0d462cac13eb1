r"""Weighted particles on two levels: what a sampler with local particles knows of a hierarchical posterior.

Global particles have weights :math:`w_s`, and given each of them local ones their own, see
:mod:`~pyro_iw.posterior.local_weights`. A draw from the posterior takes a global particle by its weight, and
then in every cell n one of *its* local particles by theirs: together they are a draw of all latents at once.

References:
    | Variational Inference with Locally Enhanced Bounds for Hierarchical Models (Geffner & Domke, 2022),
      https://arxiv.org/abs/2203.04432
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from ..psis import pareto_smoothed, warn_of_khat
from ..resampling import multinomial
from ..tracing.latents import Latent, cat, place
from ..tracing.local_particles import local_plate_of
from .leave_one_out import LeaveOneOut, leave_one_out
from .local_weights import LocalWeights
from .marginal import LogLikelihood
from .merging import check_mergeable
from .predictive import Observed, Rerun
from .samples import ImportanceSamples, weighted_sum

__all__ = ["HierarchicalSamples", "JointIndices"]


class _OfOnePlate(dict[str, Tensor]):
    """Values by site, that says where those are that it does not hold."""

    def __init__(self, plates: Mapping[str, str | None]) -> None:
        super().__init__()
        self.plates = plates

    def __missing__(self, name: str) -> Tensor:
        if name not in self.plates:
            raise ValueError(f"There is no latent site {name!r}; there are {sorted(self.plates)}.")
        raise ValueError(
            f"Latent site {name!r} lies in the local plate {self.plates[name]!r}. An expectation takes the "
            f"local latents of one plate, which over={self.plates[name]!r} names; compute what needs several "
            "from draws of posterior()."
        )


class JointIndices(NamedTuple):
    """Which particles on both levels some draws are.

    Attributes:
        top: indices into the S particles, of shape ``[n, *cells]``.
        local: by plate, indices s L + l into the S L local particles, of shape ``[n, *cells]`` with the
            plate's cells.
    """

    top: Tensor
    local: dict[str, Tensor]


class HierarchicalSamples(ImportanceSamples):
    r"""S particles of the global latents and for each of them L local ones, with their weights, as
    ``ImportanceSampler(..., local="data", num_local=L)`` draws them.

    Everything that :class:`ImportanceSamples` says of weights (``log_weights``, ``weights``, ``ess``,
    ``khat``, ``log_marginal``, ``bound``, ``smoothed``) is about the global particles, whose weight is

    .. math:: w_s = \frac{p(g_s)}{q(g_s)} \prod_n \frac1L \sum_l w_{snl}.

    Draws (:meth:`posterior`, :meth:`predictive`, :meth:`to_arviz`) are of globals and locals that belong
    together. In ArviZ's group ``log_likelihood`` a cell's local latents are integrated out, so that
    ``az.loo`` predicts it from the globals alone; :meth:`leave_one_out` needs no draws for the same.

    Attributes:
        log_p: of what lies outside of the local plates, of shape ``[S, *cells]``, in nats.
        log_q: likewise.
        latents: of shape ``[S, *batch, *event]``, and in a local plate ``[S, L, *batch, *event]``.
        local: the weights of the local particles, by the name of their plate; see
            :class:`~pyro_iw.posterior.local_weights.LocalWeights`.

    Example:
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     mean = pyro.sample("mean", dist.Normal(x.mean(), 0.3))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal((mean + x) / 2, 0.8))
        >>> sampler = ImportanceSampler(model, guide, num_particles=500, local="data", num_local=16)
        >>> samples = sampler(torch.randn(100) * 2**0.5)
        >>> samples
        HierarchicalSamples(S=500, local={'data': 16}, cells={}, sites=['mean', 'z'])
        >>> draws = samples.posterior(200)
        >>> draws["mean"].shape, draws["z"].shape
        (torch.Size([200]), torch.Size([200, 100]))
        >>> samples.local_ess["data"].shape
        torch.Size([100])
        >>> samples.leave_one_out()  # the exact mean of log Normal(0, 3**0.5) and a little more
        LeaveOneOut(elpd=-1..., standard_error=..., N=100, num_particles=500)
    """

    def __init__(
        self,
        latents: Mapping[str, Latent],
        log_p: Tensor,
        log_q: Tensor,
        frames: tuple[CondIndepStackFrame, ...],
        rerun: Rerun,
        local: Mapping[str, LocalWeights],
    ) -> None:
        super().__init__(latents, log_p, log_q, frames, rerun)
        self.local = dict(local)
        self.log_weights = self.without()

    def plate_of(self, site: str) -> str | None:
        """The local plate that a latent site lies in; None for a global one."""
        return local_plate_of(site, self.latents[site].frames, self.local)

    def without(self, left_out: str | None = None) -> Tensor:
        r"""Log-weights of the global particles, in nats.

        Arguments:
            left_out: the name of a plate, each of whose cells is left out of the product in turn.

        Returns:
            Of shape ``[S, *cells]`` with all cells in it; else with the cells of that plate.
        """
        total, dead = self.log_p - self.log_q, torch.zeros_like(self.log_p)
        for level in self.local.values():
            value = level.log_likelihood
            total = total + level.scale.add_up(value.masked_fill(value.isneginf(), 0.0))
            dead = dead + level.scale._replace(scale=1.0).add_up(value.isneginf().to(dead.dtype))
        if left_out is not None:
            level = self.local[left_out]
            value = level.log_likelihood
            total = level.spread(total) - level.scale.scale * value.masked_fill(value.isneginf(), 0.0)
            dead = level.spread(dead) - value.isneginf().to(dead.dtype)
        return total.masked_fill(dead > 0.5, -torch.inf)

    # ------------------------------------------------------------------------------------------------
    # How good the local weights are
    # ------------------------------------------------------------------------------------------------

    @property
    def local_ess(self) -> dict[str, Tensor]:
        r"""Effective number of local particles out of L, by plate, of shape ``[*cells]``.

        It is :math:`(\sum_l w_{snl})^2 / \sum_l w_{snl}^2` of each global particle, averaged over these by
        their weights: those that the posterior does not visit do not count.
        """
        return {
            name: self._average(level, level.ess).to(self.log_p.dtype) for name, level in self.local.items()
        }

    @property
    def local_variance(self) -> Tensor:
        r"""Variance that the finite number of local particles adds to the log-weights, ``[*cells]``.

        .. math:: \sum_n \frac{L}{L - 1} \Big(\frac{1}{\mathrm{ESS}_{sn}} - \frac1L\Big),

        by the delta method, averaged over the global particles by their weights; NaN where L is 1. It grows
        with the number of cells and falls as 1/L. Where it exceeds 1 it is what makes :attr:`ess` small, and
        ``num_local`` is to be raised (to keep it, in proportion to the cells); well below 1 a small
        :attr:`ess` is the doing of the guide of the global latents.
        """
        total = torch.zeros_like(self.log_p)
        for level in self.local.values():
            number = level.number
            if number == 1:
                return torch.full_like(self.ess, torch.nan)
            spread = (1 / level.ess.clamp(min=1) - 1 / number).clamp(min=0) * number / (number - 1)
            # The square of the factor of a cell's term in the sum.
            total = total + level.scale.add_up(level.scale.scale * spread).to(total.dtype)
        return (self.weights * total).sum(0)

    @cached_property
    def local_khat(self) -> dict[str, Tensor]:
        r"""Shape k̂ of the tail of each cell's S L weights, by plate, of shape ``[*cells]``.

        For each cell n the evidence is a mean over all of its local particles,

        .. math:: \hat p(x) = \frac{1}{S L} \sum_{s, l} r_{sn}\, w_{snl}, \qquad
            r_{sn} = \frac{p(g_s)}{q(g_s)} \prod_{m \neq n} \hat p(x_m \mid g_s),

        and an expectation of its latents, one with the same weights :math:`r_{sn} w_{snl}`. It is their tail
        that says whether these have settled. (The local weights of one global particle are few, and those of
        one without weight are of no consequence.) Where :attr:`khat` is low and that of some cells is above
        0.7, the guide of these cells' latents is to blame. Where :attr:`khat` is high, so are these.

        Raises:
            ImportError: if ArviZ is missing.
        """
        found = {}
        total = self.without()
        for name, level in self.local.items():
            own = level.log_weights - level.log_likelihood.unsqueeze(1)
            log_w = level.spread(total).unsqueeze(1) + own
            log_w = log_w.masked_fill(log_w.isnan(), -torch.inf)  # of cells whose particles are all dead
            found[name] = pareto_smoothed(log_w.flatten(0, 1))[1]
        return found

    def warn_of_tails(self) -> None:
        """Warn where k̂ says that the guide misses mass, on either level."""
        super().warn_of_tails()
        for name, khat in self.local_khat.items():
            warn_of_khat(khat, self.num_particles * self.local[name].number)

    def _average(self, level: LocalWeights, values: Tensor) -> Tensor:
        """The mean of ``[S, *cells]`` over the particles by their weights."""
        return (level.spread(self.weights) * values).sum(0)

    def leave_one_out(self, over: str | None = None) -> LeaveOneOut:
        """The log predictive density of every cell given all others, its latents integrated out; see
        :func:`~pyro_iw.posterior.leave_one_out.leave_one_out`.

        A cell is predicted with all of its data, factors included; one whose data are masked has the
        density 1.

        Arguments:
            over: the plate, where there are local particles in several.
        """
        self._check_alive("a predictive density")
        name = self._plate(over)
        return leave_one_out(self.without(name), self.local[name].log_likelihood)

    # ------------------------------------------------------------------------------------------------
    # The posterior
    # ------------------------------------------------------------------------------------------------

    def expectation(
        self,
        what: str | Callable[[dict[str, Tensor]], Tensor],
        event_dim: int = 0,
        over: str | None = None,
    ) -> Tensor:
        r"""Self-normalised estimate of a posterior expectation, by the weights of both levels:
        :math:`\sum_s w_s \sum_l v_{snl} f(g_s, z_{snl}) / \sum_s w_s` with :math:`v` the weights of the local
        particles, normalised for each global one.

        Arguments:
            what: a site, for its mean; or the function f of global latents and of the local ones of one cell.
                It is given values with all dims of the plates, for them to broadcast against one another:
                ``[S, 1, *batch, *event]`` of global sites and ``[S, L, *batch, *event]`` of local ones, with
                size 1 at plates that a site is outside of. The result has the same dims. What needs the
                latents of several cells at once (their product, a maximum over them) is to be computed from
                draws of :meth:`posterior`; for a sum over cells, add up the result.
            event_dim: the number of event dims of the function's result.
            over: the plate of the local latents that the function takes, where there are several.

        Returns:
            Of shape ``[*batch, *event]``, without dims of size 1 on the left.

        Raises:
            ValueError: if the site is unknown, the shape does not fit or a cell has no living particle.

        Example:
            >>> def model(x):
            ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> def guide(x):
            ...     mean = pyro.sample("mean", dist.Normal(x.mean(), 0.6))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("z", dist.Normal((mean + x) / 2, 0.8))
            >>> sampler = ImportanceSampler(model, guide, num_particles=2000, local="data", num_local=8)
            >>> samples = sampler(data)
            >>> product = samples.expectation(lambda v: v["mean"] * v["z"])
            >>> covariance = product - samples.expectation("mean") * samples.expectation("z")
            >>> torch.allclose(covariance, torch.tensor(0.2), atol=0.05)
            True
        """
        self._check_alive("an expectation")
        inside = self._plate(over) if over is not None or len(self.local) == 1 else None
        if isinstance(what, str):
            self._check_site(what)
            latent, plate = self.latents[what], self.plate_of(what)
            values = latent.values if plate is None else latent.values.flatten(0, 1)
            mean = weighted_sum(values, *self._joint_weights(plate), latent.event_dim)
            assert mean is not None
            return mean
        given = self._broadcast(inside)
        values = what(given)
        # Weights of a single local particle are 1.
        varies = inside is not None and values.dim() > 1 and values.shape[1] == self.local[inside].number > 1
        plate = inside if varies else None
        merged = values.flatten(0, 1) if values.dim() > 1 else values
        weights, frames = self._joint_weights(plate)
        mean = weighted_sum(merged, weights, frames, event_dim)
        if mean is None:
            cells = {frame.name: size for frame, size in zip(frames, weights.shape[1:], strict=True)}
            raise ValueError(
                f"The function's result has shape {tuple(values.shape)}, but should be [S, L, *batch, "
                f"*event] with event_dim={event_dim}, for S={self.num_particles}, L={self._numbers()} (1 if "
                f"it is of global latents alone) and the cells {cells} at their plates' dims of batch. "
                "Expectations are taken cell by cell: add up over cells afterwards, and compute what needs "
                "several at once from draws of posterior()."
            )
        self._check_event_dim(values, event_dim, given)
        rank = max((-frame.dim for frame in frames if frame.dim is not None), default=0)
        while mean.dim() - event_dim > rank and mean.shape[0] == 1:
            mean = mean.squeeze(0)
        return mean

    def _broadcast(self, plate: str | None) -> dict[str, Tensor]:
        """Global latents and those of a plate, with dims for local particles and all plates, of size 1 where
        they have none.
        """
        given: dict[str, Tensor] = _OfOnePlate({name: self.plate_of(name) for name in self.latents})
        for name, (values, event_dim, _) in self.latents.items():
            if self.plate_of(name) is None:
                values = values.unsqueeze(1)
            elif self.plate_of(name) != plate:
                continue
            missing = self.rerun.nesting - (values.dim() - 2 - event_dim)
            given[name] = values.reshape(*values.shape[:2], *[1] * missing, *values.shape[2:])
        return given

    def _joint_weights(self, plate: str | None) -> tuple[Tensor, tuple[CondIndepStackFrame, ...]]:
        """Normalised weights ``[S, *cells]``, or of a plate's local particles ``[S L, *cells]``."""
        if plate is None:
            return self.weights, self.frames
        level = self.local[plate]
        return (level.spread(self.weights).unsqueeze(1) * level.weights).flatten(0, 1), level.frames

    def on_all_levels(self, indices: Tensor) -> JointIndices:
        """Local particles to the particles at the indices ``[n, *cells]`` of :meth:`resample`, drawn in every
        cell by their weights given its particle.
        """
        local = {}
        for name, level in self.local.items():
            wanted = level.spread(indices).expand(len(indices), *level.log_p.shape[2:])
            log_w = level.log_weights.movedim(1, 0)  # [L, S, *cells]
            drawn = []
            for chunk in wanted.split(self.rerun.chunk_size):
                own = log_w.gather(1, chunk.expand(level.number, *chunk.shape))
                drawn.append(multinomial(own.softmax(0), 1)[0])
            local[name] = wanted * level.number + torch.cat(drawn)
        return JointIndices(indices, local)

    def take(self, indices: Tensor | JointIndices) -> dict[str, Tensor]:
        """Latent values at indices, each ``[n, *batch, *event]``.

        Arguments:
            indices: those of :meth:`on_all_levels`; or of :meth:`resample`, to which it is applied.
        """
        if isinstance(indices, Tensor):
            indices = self.on_all_levels(indices)
        taken = {}
        for name, (values, event_dim, _) in self.latents.items():
            plate = self.plate_of(name)
            chosen, frames = indices.top, self.frames
            if plate is not None:
                values, chosen, frames = values.flatten(0, 1), indices.local[plate], self.local[plate].frames
            placed = place(chosen, frames, values.dim() - 1 - event_dim, event_dim)
            taken[name] = values.gather(0, placed.expand(len(chosen), *values.shape[1:]))
        return taken

    def densities(self, indices: JointIndices) -> dict[str, Tensor]:  # type: ignore[override]
        """Of draws at indices, each of shape ``[n, *cells]``: the log joint density ``lp``, that of the guide
        ``log_q``, and the ``log_weight`` of their global particle.
        """
        found = {"lp": self.log_p, "log_q": self.log_q, "log_weight": self.log_weights}
        found = {name: values.gather(0, indices.top) for name, values in found.items()}
        for plate, level in self.local.items():
            for name, values in {"lp": level.log_p, "log_q": level.log_q}.items():
                found[name] = found[name] + level.scale.add_up(level.at(values, indices.local[plate]))
        return found

    def weight_stats(self) -> dict[str, tuple[Tensor, tuple[CondIndepStackFrame, ...]]]:
        """What is known of the weights: of the particles, each of shape ``[*cells]``; and by a plate's name
        in front of the local ones.
        """
        found = super().weight_stats()
        for name, level in self.local.items():
            found[f"{name}_ess"] = self.local_ess[name], level.frames
            found[f"{name}_khat"] = self.local_khat[name], level.frames
        return found

    def pointwise(
        self,
        indices: JointIndices,  # type: ignore[override]
        latents: Mapping[str, Latent],
        shown: Mapping[str, Observed],
    ) -> dict[str, LogLikelihood]:
        r"""Log-likelihoods to leave data out by: :math:`\log \hat p(x_n \mid g)` for the data of each cell of
        a local plate, with its latents integrated out, and those of other data given the global latents.
        """
        parts = {}
        for plate, level in self.local.items():
            data = tuple(name for name in level.data if name in shown and shown[name].log_prob is not None)
            if not data:
                continue
            chosen = level.spread(indices.top).expand(len(indices.top), *level.log_p.shape[2:])
            rank = max((-frame.dim for frame in level.frames if frame.dim is not None), default=0)
            log_prob = place(level.log_likelihood.gather(0, chosen), level.frames, rank, 0)
            sites = [name for name in self.latents if self.plate_of(name) == plate]
            sites += [name for name in level.data if name in self.rerun.enumerated]
            part = LogLikelihood(log_prob, level.frames, data, tuple(sites))
            parts[part.name] = part
        done = {name for part in parts.values() for name in part.sites}
        others = {name: site for name, site in shown.items() if name not in done}
        return {**self.rerun.log_likelihood(latents, others), **parts} if others else parts

    def merge(self, other: ImportanceSamples) -> HierarchicalSamples:
        """These particles and those of another run on the same arguments, as one; see
        :meth:`ImportanceSamples.merge`.
        """
        check_mergeable(self, other)
        assert isinstance(other, HierarchicalSamples)
        local = {
            name: level._replace(
                log_p=torch.cat([level.log_p, other.local[name].log_p]),
                log_q=torch.cat([level.log_q, other.local[name].log_q]),
            )
            for name, level in self.local.items()
        }
        return HierarchicalSamples(
            {name: cat([latent, other.latents[name]]) for name, latent in self.latents.items()},
            torch.cat([self.log_p, other.log_p]),
            torch.cat([self.log_q, other.log_q]),
            self.frames,
            self.rerun,
            local,
        )

    def _plate(self, name: str | None) -> str:
        """The local plate of that name, or the only one."""
        if name is None and len(self.local) == 1:
            return next(iter(self.local))
        if name not in self.local:
            given = "there are local particles in several plates" if name is None else f"got over={name!r}"
            raise ValueError(f"over must name one of the local plates {list(self.local)}; {given}.")
        return name

    def _numbers(self) -> dict[str, int]:
        return {name: level.number for name, level in self.local.items()}

    def __repr__(self) -> str:
        return (
            f"HierarchicalSamples(S={self.num_particles}, local={self._numbers()}, cells={self._cells()}, "
            f"sites={list(self.latents)})"
        )
