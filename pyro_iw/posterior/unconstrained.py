r"""A pair's densities as functions of unconstrained coordinates, with gradients, for every chain and cell.

The coordinates u are those of the guide's own draws a (its latent sites but for Deltas), one bijection
(:func:`torch.distributions.biject_to`) a site. What the guide makes of them by Deltas follows from them, as
in automatic guides. With the weight :math:`w = p(x, z) / q(z \mid x)` that an importance sampler gives to a
particle, whatever masks and scales go into it, the densities over u are

.. math:: q(u) = q(a(u)) \left| \det \partial a / \partial u \right|, \qquad f_\beta(u) = q(u)\, w(u)^\beta,

so that :math:`\int f_1 = E_q[w]`, which is what the sampler estimates: :math:`p(x)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, biject_to

from ..compiling.evaluating import Evaluate, EvaluationCompiler
from ..tracing.latents import own_frames, place
from ..tracing.messages import is_delta, latent_sites
from ..tracing.minibatches import OneMinibatch
from ..tracing.particles import Particles, collect
from ..tracing.paths import class_name
from ..tracing.sites import Site
from ..tracing.traces import (
    PARTICLE_PLATE,
    Pair,
    Traces,
    is_transformed,
    trace_given,
    trace_prior_given,
)
from .hmc import Point
from .movable import Prior, listed

__all__ = ["PairPath", "free_coordinates"]


class _Given(Messenger):
    """Gives latent sites their values.

    Arguments:
        given: what makes the value of each site, by its name.

    Attributes:
        found: what was found of each site on the way.
    """

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.given = given
        self.found: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.given and not msg["is_observed"]:
            msg["value"], self.found[name] = self.make(msg["fn"], self.given[name])
            msg["done"] = True

    def make(self, fn: Any, given: Tensor) -> tuple[Tensor, Tensor]:
        """The value of a site, and what is to be found of it."""
        raise NotImplementedError


class _Coordinates(_Given):
    """Gives values by their unconstrained coordinates; finds the bijections' log-determinants."""

    def make(self, fn: Any, given: Tensor) -> tuple[Tensor, Tensor]:
        transform = biject_to(fn.support)
        value = transform(given)
        log_det = transform.log_abs_det_jacobian(given, value)
        return value, sum_rightmost(log_det, log_det.dim() - given.dim() + _event_dim(fn, transform))


class _Values(_Given):
    """Gives values; finds their unconstrained coordinates."""

    def make(self, fn: Any, given: Tensor) -> tuple[Tensor, Tensor]:
        return given, biject_to(fn.support).inv(given)


def _agree(trace: Any, latents: Mapping[str, Any]) -> bool:
    """Whether a guide has the latent values that it should have, in all of its particles."""
    for name, site in latents.items():
        value = trace.nodes[name]["value"]
        if not torch.allclose(value, site["value"].expand_as(value), rtol=1e-3, atol=1e-4):
            return False
    return True


def _event_dim(fn: Any, transform: Any) -> int:
    """The number of event dims of a site's coordinates: a matrix's may be a vector."""
    return fn.event_dim + transform.domain.event_dim - transform.codomain.event_dim


def free_coordinates(site: Any, value: Tensor) -> Tensor:
    """Where a value lies in the unconstrained coordinates of a site's distribution."""
    return biject_to(site["fn"].support).inv(value)


class _Own(NamedTuple):
    """A latent site of the guide's own.

    Attributes:
        name: its name.
        event_dim: number of event dims of its coordinates.
        rank: number of its batch dims by itself, from the outermost plate around it on.
    """

    name: str
    event_dim: int
    rank: int


class PairPath:
    """The path from a guide to the posterior, evaluated on S chains.

    Coordinates have the shapes ``[S, *plates, *event]``, with a dim for every plate of the pair.

    Arguments:
        pair: the pair and its arguments.
        traces: those of a run of it on S particles, which show where plates, cells and particles lie.
        particles: what was read off them.
        minibatch: the subsample of that run.
        plates: names of the plates to keep, as in :func:`~pyro_iw.tracing.particles.collect`.
        warn_once: called with a message.
        compiler: compiles :meth:`at`, on what is given to a path; None for not at all.

    Raises:
        ValueError: if a latent site is not there for every particle, the prior of one depends on a site that
            is summed out, or a density cannot be evaluated at given values; naming the site.
    """

    def __init__(
        self,
        pair: Pair,
        traces: Traces,
        particles: Particles,
        minibatch: OneMinibatch,
        plates: Sequence[str] | None,
        warn_once: Callable[[str], None],
        compiler: EvaluationCompiler | None = None,
    ) -> None:
        self.pair = pair
        self._compiler = compiler
        self._compiled: Evaluate | None = None
        self._options = (traces.num_particles, traces.particle_dim, traces.enum_dim, plates)
        self.num_chains = traces.num_particles
        self.frames = particles.plates
        self._from_prior = isinstance(pair.guide, Prior)
        self._minibatch = minibatch
        self._collect = partial(collect, plates=plates, is_linear=False, warn_once=warn_once)
        self._particle_dim, self._enum_dim = traces.particle_dim, traces.enum_dim
        self._nesting = traces.plate_nesting if self._particle_dim is None else -self._particle_dim - 1
        if self._from_prior:
            _refuse_unknown_prior(particles.sites)
        self._own = self._own_sites(traces)

    # ------------------------------------------------------------------------------------------------
    # Shapes
    # ------------------------------------------------------------------------------------------------

    def to_cells(self, per_coordinate: Sequence[Tensor]) -> Tensor:
        """Tensors of the coordinates' shapes, summed to ``[S, *cells]``."""
        total: Tensor | None = None
        for tensor, own in zip(per_coordinate, self._own, strict=True):
            term = self._batch_to_cells(sum_rightmost(tensor, own.event_dim))
            total = term if total is None else total + term
        assert total is not None
        return total

    def _batch_to_cells(self, batch: Tensor) -> Tensor:
        """``[S, *plates]`` summed to ``[S, *cells]``."""
        kept = {frame.dim for frame in self.frames}
        drop = [dim for dim in range(-self._nesting, 0) if dim not in kept]
        return batch.sum(drop) if drop else batch

    def spread(self, per_cell: Tensor) -> list[Tensor]:
        """``[S, *cells]`` in shapes that broadcast against the coordinates."""
        return [place(per_cell, self.frames, self._nesting, own.event_dim) for own in self._own]

    def _own_sites(self, traces: Traces) -> list[_Own]:
        found: dict[str, list[_Own]] = {}
        for pair in traces.pairs:
            for name, site in latent_sites(pair.guide).items():
                if is_delta(site["fn"]):
                    continue
                self._check_density(name, site)
                event_dim = _event_dim(site["fn"], biject_to(site["fn"].support))
                rank = max((-frame.dim for frame in own_frames(site) if frame.dim is not None), default=0)
                found.setdefault(name, []).append(_Own(name, event_dim, rank))
        for name, parts in found.items():
            if len(parts) < len(traces.pairs) or len(set(parts)) > 1:
                raise ValueError(
                    f"Latent site {name!r} is not there for every particle, or not of one shape, so no path "
                    "leads from the guide's draws of it to the posterior's. Use ImportanceSampler."
                )
        return [parts[0] for parts in found.values()]

    def _check_density(self, name: str, site: Any) -> None:
        """Refuse a flow that can score only what it has just made."""
        if not is_transformed(site["fn"]):
            return
        try:
            site["fn"].log_prob(site["value"].clone())
        except (KeyError, NotImplementedError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The density of guide site {name!r} ({class_name(site['fn'])}) cannot be evaluated at given "
                f"values ({error or type(error).__name__}), which chains on their way to the posterior need. "
                "Take guide=None for the prior, or a guide whose transforms have an inverse, such as "
                "AutoNormal."
            ) from error

    # ------------------------------------------------------------------------------------------------
    # Densities
    # ------------------------------------------------------------------------------------------------

    def coordinates(self, traces: Traces) -> list[Tensor]:
        """Where the guide's draws lie, of S particles."""
        found = []
        for own in self._own:
            sites: list[Any] = [pair.guide.nodes[own.name] for pair in traces.pairs]
            parts = [free_coordinates(site, site["value"].detach()) for site in sites]
            found.append(self._gather(parts, own.event_dim))
        return found

    def _padded(self, tensor: Tensor, event_dim: int = 0) -> Tensor:
        """With a dim for every plate, those on the left of size 1."""
        missing = self._nesting - (tensor.dim() - event_dim)
        return tensor.reshape((1,) * missing + tensor.shape)

    def coordinates_of(self, latents: Mapping[str, Any]) -> list[Tensor]:
        """Where given values of the model's latents lie, S times the same.

        Arguments:
            latents: messages of the model's latent sites, from a run without particles.

        Raises:
            ValueError: if the guide makes its latents of draws that cannot be told from them.
        """
        given = self._draws_behind(latents)
        if len(given) == len(self._own):
            with torch.no_grad():
                traces, handlers = self._trace(_Values, given)
            if all(_agree(pair.guide, latents) for pair in traces.pairs):
                return [
                    self._gather([handler.found[own.name] for handler in handlers], own.event_dim)
                    for own in self._own
                ]
        raise ValueError(
            f"The guide makes the model's latents of {listed([own.name for own in self._own])}, and which "
            "values of these would give the latents that were simulated cannot be told. Take a guide that "
            "samples the model's latents themselves, AutoNormal, or guide=None for the prior."
        )

    def _draws_behind(self, latents: Mapping[str, Any]) -> dict[str, Tensor]:
        """Values of the guide's own sites that may give those of the model's latents, for all chains."""
        left = dict(latents)
        given, joint = {}, []
        for own in self._own:
            name = own.name.removesuffix("_unconstrained")  # the draw for this site alone in AutoNormal
            if name not in left:
                joint.append(own.name)
                continue
            site = left.pop(name)
            value = site["value"] if name == own.name else free_coordinates(site, site["value"])
            given[own.name] = self._for_all_chains(value, own)
        if len(joint) == 1:
            # The draw for all other sites together in Pyro's automatic guides, in the model's order.
            parts = [free_coordinates(site, site["value"]).flatten() for site in left.values()]
            own = next(own for own in self._own if own.name == joint[0])
            if parts and own.event_dim == 1:
                given[own.name] = self._for_all_chains(torch.cat(parts), own)
        return given

    def _for_all_chains(self, value: Tensor, own: _Own) -> Tensor:
        """``[*batch, *event]`` as ``[S, *plates, *event]``."""
        padded = self._padded(value, value.dim() - own.rank)
        return padded.expand(self.num_chains, *padded.shape)

    def _trace(self, handler: type[_Given], given: Mapping[str, Tensor]) -> tuple[Traces, list[_Given]]:
        """Guide and model with the guide's own sites given, by a handler of that kind for each run.

        Arguments:
            handler: the kind.
            given: what it is given for each site, of shape ``[S, *plates, *event]``.
        """
        trace = trace_prior_given if self._from_prior else trace_given
        handlers, pairs = [], []
        with self._minibatch:
            if self._particle_dim is not None:
                handlers.append(handler(given))
                plate = pyro.plate(PARTICLE_PLATE, self.num_chains, dim=self._particle_dim)
                pairs.append(trace(self.pair, handlers[0], plate, self._enum_dim))
            else:
                for chain in range(self.num_chains):
                    # Without the dims of plates that a site is outside of.
                    outside = {own.name: self._nesting - own.rank for own in self._own}
                    single = {n: u[chain].reshape(u.shape[1 + outside[n] :]) for n, u in given.items()}
                    handlers.append(handler(single))
                    pairs.append(trace(self.pair, handlers[-1], enum_dim=self._enum_dim))
        return Traces(pairs, self.num_chains, self._particle_dim, self._enum_dim), handlers

    def _gather(self, parts: Sequence[Tensor], event_dim: int = 0) -> Tensor:
        """One tensor ``[S, *plates, *event]`` of what each run has."""
        if self._particle_dim is not None:
            return parts[0]
        return torch.stack([self._padded(part, event_dim) for part in parts])

    def run(self, coordinates: Sequence[Tensor]) -> tuple[Particles, Traces, Tensor]:
        """The pair at some coordinates: its particles and traces, and the log-determinants ``[S, *cells]``.

        Gradients with respect to the coordinates are there if they are enabled.
        """
        names = [own.name for own in self._own]
        traces, handlers = self._trace(_Coordinates, dict(zip(names, coordinates, strict=True)))
        with self._minibatch:
            particles = self._collect(traces)
        each = [self._gather([handler.found[name] for handler in handlers]) for name in names]
        log_dets = [self._batch_to_cells(log_det) for log_det in each]
        return particles, traces, torch.stack(torch.broadcast_tensors(*log_dets)).sum(0)

    def at(self, coordinates: Sequence[Tensor]) -> Point:
        """Densities and gradients at some coordinates.

        Values are not validated: a trajectory may leave what floating point can hold, and is then rejected.
        """
        if self._compiler is not None:
            coordinates = [u.contiguous() for u in coordinates]
            if self._compiled is None:
                self._compiled = self._compiler.start(
                    self.pair._replace(args=self._inputs(coordinates), kwargs={}),
                    self._densities_of,
                    self._options,
                    len(coordinates),
                )
            if self._compiled is not None:
                log_q, log_w, *grads = self._compiled(coordinates)
                half = len(coordinates)
                return Point(list(coordinates), log_q, log_w, grads[:half], grads[half:])
        log_q, log_w, *grads = self._densities(coordinates)
        half = len(coordinates)
        return Point([u.detach() for u in coordinates], log_q, log_w, grads[:half], grads[half:])

    def _densities(self, coordinates: Sequence[Tensor]) -> list[Tensor]:
        """log q and log w, of shape ``[S, *cells]``, and the gradients of one and the other."""
        leaves = [u.detach().requires_grad_() for u in coordinates]
        with torch.enable_grad(), pyro.validation_enabled(False):
            particles, _, log_det = self.run(leaves)
            own = {own.name for own in self._own}
            drawn = [_as_drawn(site) for site in particles.guide_sites if site.name in own and site.is_latent]
            log_q = particles.log_prob(drawn, masked=False) + log_det
            log_w = particles.log_weights
        return [log_q.detach(), log_w.detach(), *_gradient(log_q, leaves), *_gradient(log_w, leaves)]

    def _inputs(self, coordinates: Sequence[Tensor]) -> tuple:
        """All tensors that the densities depend on but for parameters, those that vary last."""
        indices = {name: torch.as_tensor(value) for name, value in self._minibatch.indices.items()}
        return self.pair.args, self.pair.kwargs, indices, list(coordinates)

    def _densities_of(self, given: Pair) -> list[Tensor]:
        """:meth:`_densities` as a function of :meth:`_inputs`."""
        args, kwargs, indices, coordinates = given.args
        path = copy.copy(self)
        path.pair = given._replace(args=args, kwargs=kwargs)
        path._minibatch = self._minibatch.with_indices(indices)
        return path._densities(coordinates)


def _gradient(density: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not density.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(
        torch.autograd.grad(
            density.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


def _as_drawn(site: Site) -> Site:
    """The site with the density of what is drawn there, whatever the distribution's own mask says."""
    fn = _without_masks(site.message["fn"])
    if fn is site.message["fn"]:
        return site
    return site._replace(log_prob=fn.log_prob(site.message["value"]))


def _without_masks(fn: Any) -> Any:
    if isinstance(fn, MaskedDistribution):
        return _without_masks(fn.base_dist)
    if isinstance(fn, Independent):
        base = _without_masks(fn.base_dist)
        return fn if base is fn.base_dist else Independent(base, fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        base = _without_masks(fn.base_dist)
        return fn if base is fn.base_dist else base.expand(fn.batch_shape)
    return fn


def _refuse_unknown_prior(sites: Sequence[Site]) -> None:
    for site in sites:
        names = site.message.get("absorbed_latents")
        if names:
            raise ValueError(
                f"The prior of {listed(names)} depends on an enumerated site, with which it is summed out "
                f"in {site}, so it cannot be the path's beginning by itself. Pass a guide that samples "
                f"{listed(names)}, such as AutoNormal of the model with the enumerated sites hidden "
                "(poutine.block)."
            )
