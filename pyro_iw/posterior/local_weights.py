r"""Weights on two levels: local ones within those of the particles of an importance sampler.

With S particles :math:`g_s` of the global latents and for each of them and each cell n of a local plate L
particles :math:`z_{snl}` of the local ones, of weights :math:`w_{snl} = p(z_{snl}, x_n \mid g_s) /
q(z_{snl} \mid g_s, x_n)`,

.. math:: \hat p(x) = \frac1S \sum_s w_s, \qquad
    w_s = \frac{p(g_s)}{q(g_s)} \prod_n \hat p(x_n \mid g_s), \qquad
    \hat p(x_n \mid g_s) = \frac1L \sum_l w_{snl},

is unbiased for p(x): given :math:`g_s`, the cells' particles are independent, and so the expectation of the
product is the product of the expectations.

References:
    | Variational Inference with Locally Enhanced Bounds for Hierarchical Models (Geffner & Domke, 2022),
      https://arxiv.org/abs/2203.04432
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import Unit
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .._support.arguments import positive_integer
from .._support.devices import wide
from ..logmean import logmeanexp, softmax
from ..tracing.cells import is_subsampled
from ..tracing.levels import LocalScale, TwoLevels, collect_levels
from ..tracing.messages import sample_sites
from ..tracing.particles import Particles
from ..tracing.traces import Traces

__all__ = ["LocalWeights", "collect_local", "join_local", "local_numbers", "total_log_weights"]


class LocalWeights(NamedTuple):
    """The local particles of a plate, L for each of S particles.

    Attributes:
        log_p: :math:`\\log p(z_{snl}, x_n \\mid g_s)`, of shape ``[S, L, *cells]``, in nats.
        log_q: :math:`\\log q(z_{snl} \\mid g_s, x_n)`, likewise.
        frames: the plates whose indices are the cells.
        scale: how the cells add up.
        data: names of the observed sites in the cells.
    """

    log_p: Tensor
    log_q: Tensor
    frames: tuple[CondIndepStackFrame, ...]
    scale: LocalScale
    data: tuple[str, ...]

    @property
    def number(self) -> int:
        """The number L of local particles."""
        return self.log_p.shape[1]

    @property
    def log_weights(self) -> Tensor:
        """:math:`\\log w_{snl}`, of shape ``[S, L, *cells]``, in nats."""
        return self.log_p - self.log_q

    @property
    def weights(self) -> Tensor:
        """The weights normalised over the local particles, likewise; 0 where all of them are dead."""
        return softmax(self.log_weights, 1)

    @property
    def log_likelihood(self) -> Tensor:
        """:math:`\\log \\hat p(x_n \\mid g_s)`, the latents integrated out, ``[S, *cells]``, in nats."""
        return logmeanexp(self.log_weights, 1)

    @property
    def ess(self) -> Tensor:
        """Effective number of the local particles of each particle, ``[S, *cells]``; 0 if all are dead."""
        log_w = wide(self.log_weights)
        return (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp().nan_to_num(nan=0.0)

    def spread(self, per_top: Tensor) -> Tensor:
        """What is ``[n, *cells]`` above, so that it broadcasts to the cells of this plate."""
        return self.scale._replace(scale=1).spread(per_top)  # which keeps integers

    def at(self, values: Tensor, indices: Tensor) -> Tensor:
        """Of ``[S, L, *cells]`` those at indices ``[n, *cells]`` into the S L local particles."""
        return values.flatten(0, 1).gather(0, indices)


def local_numbers(local: str | Mapping[str, int] | None, num_local: int | None) -> dict[str, int]:
    """The number of local particles by the name of their plate; none if there are none.

    Raises:
        ValueError: if a name or number is missing, or there is one too many.
    """
    if local is None:
        if num_local is not None:
            raise ValueError(
                f"num_local={num_local!r} is a number of local particles, but local= names no plate for them."
            )
        return {}
    if isinstance(local, str):
        if num_local is None:
            raise ValueError(
                f"local={local!r} names the plate of the local particles; say by num_local= how many of them "
                "each particle has, such as num_local=16."
            )
        return {local: positive_integer("num_local", num_local)}
    if not isinstance(local, Mapping) or not local or not all(isinstance(name, str) for name in local):
        raise ValueError(
            "local must be the name of a plate, or a mapping from names of plates to numbers of local "
            f"particles, got {local!r}"
        )
    if num_local is not None:
        raise ValueError(f"local={dict(local)} says how many local particles there are. Drop num_local=.")
    return {name: positive_integer(f"local[{name!r}]", number) for name, number in local.items()}


def collect_local(traces: Traces, warn_once: Callable[[str], None]) -> TwoLevels:
    """Read both levels off the traces, where weights are to give the evidence.

    Raises:
        ValueError: if a local plate is subsampled; and as :func:`~pyro_iw.tracing.levels.collect_levels`.
    """
    for pair in traces.pairs[:1]:
        for site in [*sample_sites(pair.guide).values(), *sample_sites(pair.model).values()]:
            frames: Any = site["cond_indep_stack"]
            for frame in frames:
                if frame.name in traces.local and is_subsampled(frame):
                    raise ValueError(
                        f"Plate {frame.name!r} of the local particles is subsampled ({frame.size} of "
                        f"{frame.full_size}), but the weight of a global particle is a product over all of "
                        "the plate: an estimate from a minibatch is not unbiased, nor draws from the "
                        "posterior. Run the plate on all of its data; a smaller chunk_size= saves the memory."
                    )
    return collect_levels(traces, traces.local, is_linear=False, warn_once=warn_once)


def total_log_weights(particles: Particles | TwoLevels) -> Tensor:
    """The particles' log-weights, those of their local particles averaged, of shape ``[S, *cells]``."""
    if isinstance(particles, Particles):
        return particles.log_weights
    averages = [logmeanexp(level.log_weights, 1) for level in particles.local.values()]
    return particles.scale.total(particles.top.log_weights, averages)


def join_local(chunks: Sequence[TwoLevels]) -> dict[str, LocalWeights]:
    """The local particles of several chunks as one, by the name of their plate."""
    joined = {}
    for i, (name, level) in enumerate(chunks[0].local.items()):
        observed = [
            site.message.get("absorbed", [site.name])
            for site in level.sites
            if site.role == "model" and not site.is_latent and not isinstance(site.message["fn"], Unit)
        ]
        joined[name] = LocalWeights(
            torch.cat([chunk.local[name].log_p for chunk in chunks]),
            torch.cat([chunk.local[name].log_q for chunk in chunks]),
            level.plates,
            chunks[0].scale.local[i],
            tuple(dict.fromkeys(other for names in observed for other in names)),
        )
    return joined
