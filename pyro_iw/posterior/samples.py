r"""Weighted particles: what one run of an importance sampler knows of the posterior.

Particles :math:`z_s \sim q(z \mid x)` with weights :math:`w_s = p(x, z_s) / q(z_s \mid x)` stand for the
posterior in expectation. Weights are normalised in each cell of the kept plates: every datapoint of a VAE has
a posterior of its own. Resampling by weight turns them into equally weighted draws.

References:
    | Sampling-Importance-Resampling (Rubin, 1987)
    | Reinterpreting Importance-Weighted Autoencoders (Cremer et al., 2017), https://arxiv.org/abs/1704.02916
    | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from pyro.infer import Predictive
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .._support.arguments import positive_integer
from .._support.warn import warn
from ..bounds import Bound
from ..logmean import logmeanexp, softmax
from ..psis import pareto_smoothed, warn_of_khat
from ..resampling import multinomial, systematic
from ..running import RunningBound, RunningLogMean
from ..tracing.latents import Latent, cat, place
from .marginal import LogLikelihood
from .merging import check_mergeable
from .predictive import Observed, Rerun

__all__ = ["ImportanceSamples", "weighted_sum"]

_METHODS = {"systematic": systematic, "multinomial": multinomial}

# Fewer effective particles than this, and draws are copies of a few.
_FEW = 10


class ImportanceSamples:
    r"""S particles of a model/guide pair and their weights, as :class:`~pyro_iw.ImportanceSampler` draws
    them.

    Shapes: S particles, ``cells`` the kept plates, ``batch`` the plates around a site from its outermost one
        on.

    Attributes:
        log_p: :math:`\log p(x, z_s)`, of shape ``[S, *cells]``, in nats.
        log_q: :math:`\log q(z_s \mid x)`, likewise.
        log_weights: their difference, likewise; smoothed, where :meth:`smoothed` made this (``is_smoothed``).
        latents: the same with their plates; ``frames``: the kept plates.
        rerun: runs the model again on some of the particles.

    Example:
        >>> samples = ImportanceSampler(model, guide, num_particles=2000)(data)
        >>> samples
        ImportanceSamples(S=2000, cells={'data': 3}, sites=['z'])
        >>> torch.allclose(samples.expectation("z"), data / 2, atol=0.1)  # the exact posterior mean
        True
        >>> draws = samples.posterior(num_samples=500)
        >>> draws["z"].shape
        torch.Size([500, 3])
    """

    def __init__(
        self,
        latents: Mapping[str, Latent],
        log_p: Tensor,
        log_q: Tensor,
        frames: tuple[CondIndepStackFrame, ...],
        rerun: Rerun,
    ) -> None:
        self.latents = dict(latents)
        self.frames = frames
        self.rerun = rerun
        self.log_p = log_p
        self.log_q = log_q
        self.log_weights = log_p - log_q
        self.is_smoothed = False

    @property
    def values(self) -> dict[str, Tensor]:
        """Latent values by site, each of shape ``[S, *batch, *event]``."""
        return {name: latent.values for name, latent in self.latents.items()}

    @property
    def plates(self) -> tuple[str, ...]:
        """Names of the kept plates, in the order of ``cells``."""
        return tuple(frame.name for frame in self.frames)

    @property
    def num_particles(self) -> int:
        """The number S of particles."""
        return len(self.log_p)

    # ------------------------------------------------------------------------------------------------
    # How good the weights are
    # ------------------------------------------------------------------------------------------------

    @property
    def log_marginal(self) -> Tensor:
        """Log of the mean weight, ``[*cells]``, in nats: :math:`\\log \\hat p(x)`."""
        return logmeanexp(self.log_weights, 0)

    @property
    def monte_carlo_error(self) -> Tensor:
        """Standard error of :attr:`log_marginal` from the finite number of particles (delta method),
        ``[*cells]``.

        NaN for a single particle or a dead cell. It knows nothing of mass that no particle has reached.
        """
        running = RunningLogMean()
        running.add(self.log_weights)
        return running.standard_error.to(self.log_p.dtype)

    def bound(self, bound: Bound) -> Tensor:
        """A bound with M K particles, averaged over as many disjoint groups of particles as there are.

        Returns:
            The estimate of the bound's expectation, of shape ``[*cells]``, in nats.

        Raises:
            ValueError: if the bound takes more particles than there are.

        Example:
            >>> samples = ImportanceSampler(model, guide, num_particles=2000)(data)
            >>> elbo, iwae = samples.bound(pyro_iw.bounds.IWAE(1)), samples.bound(pyro_iw.bounds.IWAE(50))
            >>> bool((elbo < iwae).all())
            True
        """
        if bound.num_particles > self.num_particles:
            raise ValueError(
                f"{bound!r} takes {bound.num_particles} particles; there are {self.num_particles}."
            )
        running = RunningBound(bound)
        running.add(self.log_weights)
        return running.value.to(self.log_p.dtype)

    @property
    def weights(self) -> Tensor:
        """Weights normalised in each cell, ``[S, *cells]``; 0 throughout where all particles are dead."""
        return softmax(self.log_weights, 0)

    @property
    def ess(self) -> Tensor:
        r"""Effective number of particles :math:`(\sum w)^2 / \sum w^2`, ``[*cells]``; 0 if all are dead."""
        running = RunningLogMean()
        running.add(self.log_weights)
        return running.ess.to(self.log_p.dtype)

    @property
    def khat(self) -> Tensor:
        """Shape k̂ of the weights' tail, ``[*cells]``; see :func:`~pyro_iw.psis.pareto_smoothed`.

        Above 0.7 (less for few particles, see :func:`~pyro_iw.psis.khat_threshold`) the guide misses mass of
        the posterior: neither the log evidence nor expectations are to be trusted, however many particles
        there are.

        Raises:
            ImportError: if ArviZ is missing.
        """
        return self._psis[1]

    @cached_property
    def _psis(self) -> tuple[Tensor, Tensor]:
        return pareto_smoothed(self.log_weights)

    def smoothed(self) -> ImportanceSamples:
        """The same particles with Pareto-smoothed weights: a little bias for much less variance.

        Warns where k̂ is too high for smoothing to help. Errors are those of :attr:`khat`.
        """
        warn_of_khat(self.khat, self.num_particles)
        smoothed = copy.copy(self)
        smoothed.log_weights, smoothed.is_smoothed = self._psis[0], True
        return smoothed

    def warn_of_tails(self) -> None:
        """Warn where k̂ says that the guide misses mass; of smoothed samples :meth:`smoothed` has."""
        if not self.is_smoothed:
            warn_of_khat(self.khat, self.num_particles)

    # ------------------------------------------------------------------------------------------------
    # The posterior
    # ------------------------------------------------------------------------------------------------

    def expectation(self, what: str | Callable[[dict[str, Tensor]], Tensor], event_dim: int = 0) -> Tensor:
        r"""Self-normalised estimate :math:`\sum_s w_s f(z_s) / \sum_s w_s` of a posterior expectation.

        Arguments:
            what: a site, for its mean; or the function f of :attr:`values`, whose result has the shape
                ``[S, *batch, *event]``, with the kept plates at their own dims of ``batch``. A latent outside
                of all plates is ``[S, *event]`` here, and needs dims of size 1 beside one inside.
            event_dim: the number of event dims of the function's result.

        Returns:
            Of shape ``[*batch, *event]``.

        Raises:
            ValueError: if the site is unknown, the shape does not fit or a cell has no living particle.

        Example:
            >>> samples = ImportanceSampler(model, guide, num_particles=5000)(data)
            >>> variance = samples.expectation(lambda z: z["z"] ** 2) - samples.expectation("z") ** 2
            >>> torch.allclose(variance, torch.tensor(0.5), atol=0.05)
            True
        """
        self._check_alive("an expectation")
        if isinstance(what, str):
            self._check_site(what)
            values, event_dim = self.latents[what].values, self.latents[what].event_dim
        else:
            values = what(self.values)
        mean = weighted_sum(values, self.weights, self.frames, event_dim)
        if mean is None:
            raise ValueError(
                f"The function's result has shape {tuple(values.shape)}, but should be [S, *batch, *event] "
                f"with event_dim={event_dim}, for S={self.num_particles} and the kept plates "
                f"{self._cells()} at their own dims of batch. Say by event_dim= how many of its rightmost "
                "dims are no plates."
            )
        if callable(what):
            self._check_event_dim(values, event_dim, self.values)
        return mean

    def resample(self, num_samples: int, method: str = "systematic") -> Tensor:
        """Indices of particles drawn by weight, in each cell by itself and in random order.

        Arguments:
            num_samples: number of draws; an integer >= 1.
            method: ``"systematic"``, which has less variance, or ``"multinomial"``, independent draws.

        Returns:
            Indices into the particles, of shape ``[num_samples, *cells]``.

        Raises:
            ValueError: if an argument is out of range or a cell has no living particle.
        """
        positive_integer("num_samples", num_samples)
        if method not in _METHODS:
            raise ValueError(f"method must be one of {sorted(_METHODS)}, got {method!r}")
        self._check_alive("a draw")
        ess = self.ess
        few = ess < min(_FEW, self.num_particles / 2)
        if bool(few.any()):
            warn(
                f"In {int(few.sum())} of {few.numel()} cell(s) the weights amount to fewer than {_FEW} "
                f"effective particles (least {ess.min().item():.1f} of {self.num_particles}), so the draws "
                "repeat a few values and their spread is too small. Draw more particles, or train a guide "
                "that covers more of the posterior's mass.",
                RuntimeWarning,
            )
        indices = _METHODS[method](self.weights, num_samples)
        # Systematic draws come in the particles' order, which would pair and correlate what is independent.
        order = torch.rand(indices.shape, device=indices.device).argsort(0)
        return indices.gather(0, order)

    def posterior(self, num_samples: int, method: str = "systematic") -> dict[str, Tensor]:
        """Equally weighted draws from the posterior, by resampling (:math:`q^{(k)}` of Cremer et al., 2017).

        Enumerated sites of the model are there as well, see :meth:`with_enumerated`. Arguments and errors are
        those of :meth:`resample`. Warns where the weights amount to fewer than 10 particles.

        Returns:
            Draws by site, each of shape ``[num_samples, *batch, *event]``.
        """
        return self.complete(self.resample(num_samples, method))

    def on_all_levels(self, indices: Tensor) -> Any:
        """The indices of :meth:`resample`, for :meth:`take`; with local particles, see
        :class:`HierarchicalSamples`.
        """
        return indices

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Latent values at the indices ``[n, *cells]`` of :meth:`resample`, each ``[n, *batch, *event]``."""
        taken = {}
        for name, (values, event_dim, _) in self.latents.items():
            placed = place(indices, self.frames, values.dim() - 1 - event_dim, event_dim)
            taken[name] = values.gather(0, placed.expand(len(indices), *values.shape[1:]))
        return taken

    def complete(self, indices: Tensor) -> dict[str, Tensor]:
        """:meth:`take`, and the enumerated sites drawn given that."""
        draws = self.take(indices)
        return self.with_enumerated(draws) if self.rerun.enumerated else draws

    def with_enumerated(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""Draws of the enumerated sites beside those of the latents that the guide samples.

        For each draw z, they are one joint draw from :math:`p(c \mid z, x)`, by Pyro's
        :func:`~pyro.infer.infer_discrete`.

        Arguments:
            draws: of the latents that the guide samples, as :meth:`take` gives them. Values of enumerated
                sites among them are replaced.

        Returns:
            Draws by site, each of shape ``[n, *batch, *event]``.
        """
        sampled = {name: latent._replace(values=draws[name]) for name, latent in self.latents.items()}
        drawn = self.rerun.draw_enumerated(sampled)
        return {**draws, **{name: latent.values for name, latent in drawn.items()}}

    def densities(self, indices: Tensor) -> dict[str, Tensor]:
        """Of draws at the indices of :meth:`resample`, each of shape ``[n, *cells]``: the log joint density
        ``lp``, that of the guide ``log_q``, and ``log_weight``.
        """
        found = {"lp": self.log_p, "log_q": self.log_q, "log_weight": self.log_weights}
        return {name: values.gather(0, indices) for name, values in found.items()}

    def weight_stats(self) -> dict[str, tuple[Tensor, tuple[CondIndepStackFrame, ...]]]:
        """What is known of the weights, each of shape ``[*cells]`` with the plates of its cells."""
        found = {"ess": self.ess, "khat": self.khat, "log_marginal": self.log_marginal}
        return {name: (values, self.frames) for name, values in found.items()}

    def pointwise(
        self, indices: Tensor, latents: Mapping[str, Latent], shown: Mapping[str, Observed]
    ) -> dict[str, LogLikelihood]:
        """The log-likelihoods to leave data out by, on draws at some indices.

        Arguments:
            indices: those of the draws.
            latents: the draws, of all latents.
            shown: what :meth:`observed` gives on them.
        """
        return self.rerun.log_likelihood(latents, shown)

    def log_likelihood(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The log-likelihood of the data on draws, by site, in nats; each of shape ``[n, *batch]``, 0 where
        masked.

        An enumerated site that shares all its plates with the data that depend on it is summed out; data
        that depend on the same one have a joint log-likelihood, called ``"x + y"``. Where it lies outside of
        a plate of theirs, data depend on one another but for its value: their log-likelihood is then given
        the draw of it.

        Arguments:
            draws: as :meth:`posterior` gives them.

        Example:
            >>> samples = ImportanceSampler(model, guide, num_particles=2000)(data)
            >>> samples.log_likelihood(samples.posterior(500))["x"].shape
            torch.Size([500, 3])
        """
        latents = self.as_latents(draws)
        parts = self.rerun.log_likelihood(latents, self.rerun.observed(latents))
        return {name: part.log_prob for name, part in parts.items()}

    def observed(self, draws: Mapping[str, Tensor]) -> dict[str, Observed]:
        """Run the model on draws: the density of its observed sites, the value of deterministic ones.

        Arguments:
            draws: of all latent sites, as :meth:`posterior` gives them. Enumerated ones that are missing are
                drawn, see :meth:`with_enumerated`; the densities are given their values.

        Example:
            >>> samples = ImportanceSampler(model, guide, num_particles=2000)(data)
            >>> samples.observed(samples.posterior(500))["x"].log_prob.shape
            torch.Size([500, 3])
        """
        return self.rerun.observed(self.as_latents(draws))

    def predictive(
        self, num_samples: int, *, method: str = "systematic", return_sites: Sequence[str] | None = None
    ) -> Predictive:
        """Pyro's :class:`~pyro.infer.Predictive` on draws from the posterior, for new observations.

        Observed sites are sampled, although it is called with the data. Arguments and errors are those of
        :meth:`resample`, and :meth:`observed`'s.

        Arguments:
            num_samples: number of draws.
            method: as in :meth:`resample`.
            return_sites: the sites to return; None for observed and deterministic ones.

        Raises:
            ValueError: also if the model has no site of one of these names, naming those it has.

        Example:
            >>> samples = ImportanceSampler(model, guide, num_particles=2000)(data)
            >>> samples.predictive(500)(data)["x"].shape
            torch.Size([500, 3])
        """
        return self.predictive_of(self.posterior(num_samples, method), return_sites)

    def predictive_of(
        self, draws: Mapping[str, Tensor], return_sites: Sequence[str] | None = None
    ) -> Predictive:
        """:meth:`predictive` on given draws."""
        if isinstance(return_sites, str):
            return_sites = [return_sites]
        if return_sites is None:
            return_sites = list(self.observed({name: values[:1] for name, values in draws.items()}))
            if not return_sites:
                raise ValueError("The model has no observed or deterministic site to predict, only factors.")
        return self.rerun.predictive(self.as_latents(draws), return_sites)

    def merge(self, other: ImportanceSamples) -> ImportanceSamples:
        """These particles and those of another run on the same arguments, as one.

        Parameters may have moved in between: each particle has the weight by which it was drawn.

        Raises:
            ValueError: if the other run is of another model or guide, other arguments, or has other sites,
                plates or shapes, or its weights are smoothed.
        """
        check_mergeable(self, other)
        latents = {name: cat([latent, other.latents[name]]) for name, latent in self.latents.items()}
        return ImportanceSamples(
            latents,
            torch.cat([self.log_p, other.log_p]),
            torch.cat([self.log_q, other.log_q]),
            self.frames,
            self.rerun,
        )

    def to_arviz(self, **options: Any) -> Any:
        """Everything ArviZ works on; see :func:`pyro_iw.posterior.to_arviz.to_arviz` for the options."""
        from .to_arviz import to_arviz  # ArviZ is optional

        return to_arviz(self, **options)

    def as_latents(self, draws: Mapping[str, Tensor]) -> dict[str, Latent]:
        """Draws with the plates and event dims of their sites; enumerated ones that are missing are drawn."""
        if not self.rerun.enumerated.keys() <= draws.keys():
            draws = self.with_enumerated(draws)
        latents = {name: latent._replace(values=draws[name]) for name, latent in self.latents.items()}
        enumerated = self.rerun.enumerated.items()
        return latents | {name: Latent(draws[name], *site) for name, site in enumerated}

    def _check_site(self, name: str) -> None:
        if name not in self.latents:
            raise ValueError(
                f"There is no latent site {name!r}; there are {sorted(self.latents)}. For a deterministic "
                "site pass the function that computes it."
            )

    def _check_event_dim(self, values: Tensor, event_dim: int, given: Mapping[str, Tensor]) -> None:
        """Warn of a function's result that looks like a site's values with their event dims forgotten."""
        for name, latent in self.latents.items():
            if self.frames and values.shape == given[name].shape and event_dim < latent.event_dim:
                warn(
                    f"The function's result has the shape {tuple(values.shape)} of site {name!r}, which has "
                    f"{latent.event_dim} event dim(s), but event_dim={event_dim} was given. Should it be "
                    f"event_dim={latent.event_dim}?"
                )

    def _check_alive(self, purpose: str) -> None:
        dead = self.log_weights.amax(0).isneginf()
        if bool(dead.any()):
            raise ValueError(
                f"In {int(dead.sum())} of {dead.numel()} cell(s) every particle has zero density, so there "
                f"is nothing to take {purpose} from. The guide proposes values outside the model's "
                "support, or the data do not fit the model's."
            )

    def _cells(self) -> dict[str, int]:
        return dict(zip(self.plates, self.log_p.shape[1:], strict=True))

    def __repr__(self) -> str:
        cells, sites = self._cells(), list(self.latents)
        return f"ImportanceSamples(S={self.num_particles}, cells={cells}, sites={sites})"


def weighted_sum(
    values: Tensor, weights: Tensor, frames: Sequence[CondIndepStackFrame], event_dim: int
) -> Tensor | None:
    """The sum over particles of values ``[n, *batch, *event]``, each times its weight ``[n, *cells]``.

    None where the cells' plates ``frames`` are not among the values' batch dims.
    """
    try:
        placed = place(weights, frames, values.dim() - 1 - event_dim, event_dim)
        fits = torch.broadcast_shapes(placed.shape, values.shape) == values.shape
    except (RuntimeError, IndexError):
        fits = False
    return (placed * values).sum(0) if fits else None
