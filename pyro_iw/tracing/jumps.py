r"""Model densities that end, or jump, where the guide goes on.

Let the model's density drop at an end :math:`b` of its support, inside the guide's. The importance weight of
a particle that crosses :math:`b` jumps, and the gradient of the bound has a term for what flows over the end,

.. math:: \nabla_\phi E[V] = E[\nabla_\phi V]
    + E\big[q_\phi(b)\, (V_{z = b-} - V_{z = b+})\, \nabla_\phi z \big|_{z = b}\big] \cdot (\pm 1),

which no derivative along a path sees, nor that with respect to a parameter of the model that moves the end.
Scores and wake-wake need no path, and lack nothing where the end stays.

Reference:
    Reparameterization Gradient for Non-differentiable Models (Lee, Yu & Yang, 2018),
    https://arxiv.org/abs/1806.00176
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from .messages import is_delta, is_latent, masks_of
from .paths import class_name, has_path
from .sites import Site, read_sites
from .supports import is_discrete, limits, own_support, stripped, support_moves
from .traces import Traces

__all__ = ["find_jumps", "wrong_outside"]


class _Edge(NamedTuple):
    """Ends of a prior that lie inside the guide's support.

    Attributes:
        end: where they are.
        sign: 1 for lower ends, -1 for upper ones: the direction to the inside.
        crossed: for which entries the guide goes on.
        value: values of the site, for a scale.
    """

    end: Tensor
    sign: int
    crossed: Tensor
    value: Tensor

    def at(self, step: float) -> Tensor:
        """Points inside (or outside, for negative steps) by a fraction of the values' distance."""
        distance = (self.value - self.end).abs()
        distance = torch.where(distance > 0, distance, 1.0)
        return self.end + self.sign * step * distance

    def density(self, fn: Any, step: float) -> Tensor | None:
        """The log density there, of the entries that are crossed; None where it is not given."""
        try:
            log_prob = fn.log_prob(self.at(step))
            return log_prob.masked_select(self.crossed.to(log_prob.device).expand(log_prob.shape))
        except (ValueError, RuntimeError, IndexError, NotImplementedError):
            return None  # as by Pyro's validation


def find_jumps(traces: Traces, *, has_paths: bool, is_linear: bool) -> list[str]:
    """Warnings of a pair whose gradients would miss what flows over an end of the model's density.

    Reads values, and so belongs to a pair's first run alone, with gradients.

    Arguments:
        traces: the traces of that run.
        has_paths: whether the estimator differentiates along the guide's draws.
        is_linear: whether the bound is the mean of the log-weights, which is -inf where a particle has zero
            density, as is said by the loss.
    """
    messages = []
    model, guide = dict(traces.pairs[0].model.nodes), dict(traces.pairs[0].guide.nodes)
    judged = set()
    for name, prior, proposal in _latents(model, guide):
        wrong = wrong_outside(name, prior, proposal)
        if wrong is not None:
            messages.append(wrong)
            continue
        if limits(prior["fn"]) is not None and limits(proposal["fn"]) is not None:
            judged.add(name)
        moves = support_moves(prior["fn"])
        along = has_paths and has_path(proposal["fn"], proposal["infer"])
        if not is_linear and (along or moves) and any(map(_jumps_at(prior), _edges(prior, proposal))):
            messages.append(_jump(name, prior, proposal, moves))
    if not is_linear and has_paths:
        messages += _dead(traces, guide, judged)
    return messages


def wrong_outside(name: str, prior: Any, proposal: Any) -> str | None:
    """Warning of a prior that gives a number where its density is 0, if the guide goes there.

    Arguments:
        name: the site's name.
        prior: the message of the model.
        proposal: that of the guide.
    """
    if is_discrete(prior["fn"]) is not False:
        return None
    fn = stripped(prior["fn"])
    for edge in _edges(prior, proposal):
        density = edge.density(fn, -0.1)
        if density is not None and bool(density.isfinite().any()):
            return (
                f"{_beyond(name, prior, proposal)} With Pyro's validation off, "
                f"{class_name(prior['fn'])}.log_prob does not say so there, but gives a number that is no "
                "density, so the importance weights of particles outside are wrong. "
                + own_support(name, prior["fn"])
            )
    return None


def _beyond(name: str, prior: Any, proposal: Any) -> str:
    """Where a guide goes on and the prior does not."""
    low, high = limits(prior["fn"]) or (-math.inf, math.inf)
    low, high = (torch.as_tensor(end).detach() for end in (low, high))
    return (
        f"The prior of {name!r} ({class_name(prior['fn'])}) is confined to [{float(low.min()):g}, "
        f"{float(high.max()):g}], but the guide ({class_name(proposal['fn'])}) goes beyond."
    )


def _jump(name: str, prior: Any, proposal: Any, moves: bool) -> str:
    lacks = "the gradients of the guide and of what the ends move with" if moves else "the guide's gradient"
    other = (
        f" Or sample u where the ends stay, on the unit interval, and make {name!r} of it."
        if moves
        else " Or do without a path: estimator='rws', or 'score' or 'vimco' with .has_rsample_(False) on "
        "the guide's distribution."
    )
    return (
        f"{_beyond(name, prior, proposal)} A particle's weight jumps to 0 at the end, so "
        f"{lacks} would lack what flows over it, however many particles there are. "
        + own_support(name, prior["fn"])
        + other
    )


def _latents(model: dict[str, Any], guide: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The model's latents with their messages in model and guide, where those have a density."""
    for name, prior in model.items():
        proposal = guide.get(name)
        if proposal is None or not is_latent(prior) or not is_latent(proposal):
            continue
        if is_delta(proposal["fn"]) or any(mask is False for mask in masks_of(prior)):
            continue
        yield name, prior, proposal


def _edges(prior: Any, proposal: Any) -> Iterator[_Edge]:
    """The ends of the prior that the guide goes beyond."""
    ours, theirs, value = limits(prior["fn"]), limits(proposal["fn"]), prior["value"]
    if ours is None or theirs is None or not isinstance(value, Tensor):
        return
    for sign, end, other in zip((1, -1), ours, theirs, strict=True):
        # Numbers stay on the host, where they can be looked at without waiting for a device.
        end, other = (torch.as_tensor(limit).detach() for limit in (end, other))
        beyond = sign * (end - other) > 1e-6 * end.abs()  # and not by rounding
        crossed = end.isfinite() & beyond
        if bool(crossed.any()):
            yield _Edge(torch.where(crossed, end, 0.0), sign, crossed, value.detach())


def _jumps_at(prior: Any) -> Callable[[_Edge], bool]:
    """Whether the density falls to 0 at an end at once, and not in the manner of a Beta(2, 2)."""
    fn = stripped(prior["fn"])

    def jumps(edge: _Edge) -> bool:
        outside, near, far = (edge.density(fn, step) for step in (-1e-3, 2.0**-20, 2.0**-10))
        if outside is None or near is None or far is None:
            return False
        # x^a near the end is 2^(10 a) times as much at the farther point.
        return bool((outside.isneginf() & near.isfinite() & (far - near < 0.1 * math.log(2.0**10))).any())

    return jumps


def _dead(traces: Traces, guide: dict[str, Any], judged: set[str]) -> list[str]:
    """Warning of other sites that kill some particles, where no discrete draw can be the reason."""
    draws = [site for site in guide.values() if is_latent(site) and not is_delta(site["fn"])]
    if not draws or not all(has_path(site["fn"], site["infer"]) for site in draws):
        return []
    sites: dict[str, list[Site]] = {}
    for site in read_sites(traces, roles=("model",)):
        if site.name not in judged:
            sites.setdefault(site.name, []).append(site)
    found = [name for name, particles in sites.items() if _kills_some(particles, traces)]
    if not found:
        return []
    names = ", ".join(map(repr, found))
    return [
        f"Site(s) {names} of the model give zero density to some particles of the guide and not to others. "
        "If the density jumps to 0 there (an end of a support, a comparison, a factor of -inf), what flows "
        "over the jump is missing from a derivative along particles' paths, however many they are, and the "
        "guide's gradient is wrong. Take a guide that keeps to where the density is positive, or do "
        "without a path: estimator='rws', or 'score' or 'vimco' with .has_rsample_(False) on the guide's "
        "distributions."
    ]


def _kills_some(sites: list[Site], traces: Traces) -> bool:
    """Whether a site, in one run of all particles or one of each, is dead in some but not in all."""
    dead = [scale_and_mask(site.log_prob.detach(), mask=site.message["mask"]).isneginf() for site in sites]
    dim = traces.particle_dim
    if dim is not None:
        if dead[0].dim() < -dim:  # the same for all particles
            return False
        dead = list(dead[0].unbind(dim))
        if traces.local_dim is not None and dead[0].dim() >= -traces.local_dim:
            dead = [local for particle in dead for local in particle.unbind(traces.local_dim)]
    try:
        together = torch.stack(torch.broadcast_tensors(*dead))
    except RuntimeError:  # of shapes that vary with what is drawn
        return False
    return bool((together.any(0) & ~together.all(0)).any())
