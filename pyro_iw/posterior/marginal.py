r"""The log-likelihood of data whose discrete latents are summed out.

Where sites c of the model are enumerated, and x are the data that depend on them,

.. math:: \log p(x \mid z) = \log \sum_c p(c, z, x) - \log \sum_c p(c, z),

one number for each index of the plates that c and x share. The second term is zero unless a sampled latent
or a ``pyro.factor`` depends on c.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..tracing.enumeration import is_enumerated, marginalize
from ..tracing.latents import own_frames
from ..tracing.messages import has_no_density
from ..tracing.precision import in_full_precision
from ..tracing.sites import Site, plate_key

__all__ = ["LogLikelihood", "summed_out"]


class LogLikelihood(NamedTuple):
    """A log-likelihood on draws of the latents.

    Attributes:
        log_prob: in nats, 0 where masked, unscaled, of shape ``[n, *batch]``.
        frames: the plates around it.
        sites: the observed sites whose joint density it is.
        summed_out: the enumerated sites that are summed out in it.
    """

    log_prob: Tensor
    frames: tuple[CondIndepStackFrame, ...]
    sites: tuple[str, ...]
    summed_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The site's name; for several ``"x + y"``, or ``"x_0 + ... + x_9"``."""
        few = self.sites if len(self.sites) <= 3 else (self.sites[0], "...", self.sites[-1])
        return " + ".join(few)


def summed_out(trace: Trace, data: Collection[str]) -> list[LogLikelihood]:
    """The log-likelihoods of data that share all their plates with the enumerated sites they depend on.

    Other data have no density of their own with these sites summed out: under an enumerated site outside
    their plate they are dependent.

    Arguments:
        trace: the model's, with all sampled latents observed, run under Pyro's parallel enumeration.
        data: names of the observed sites that are data.
    """
    sites: dict[str, Any] = dict(trace.nodes)
    with in_full_precision():
        log_probs = {
            name: Site.read("model", name, site, 0).log_prob
            for name, site in sites.items()
            if site["type"] == "sample" and not has_no_density(site)
        }
    found = []
    others = {name: log_prob.clone() for name, log_prob in log_probs.items() if name not in data}
    for _, message, log_prob in marginalize(trace, Trace(), log_probs).terms:
        names: list[str] = message["absorbed"]
        observed = tuple(name for name in names if name in data)
        keys = _keys(message)
        if not observed or any(_keys(sites[name]) != keys for name in observed):
            continue
        rest = [name for name in names if name not in data]
        enumerated = tuple(name for name in rest if is_enumerated(name, sites[name], Trace()))
        if len(rest) > len(enumerated):
            prior = {name: others[name] for name in rest}
            for _, part, value in marginalize(trace, Trace(), prior).terms:
                dims = [frame.dim for frame in part["cond_indep_stack"] if plate_key(frame) not in keys]
                log_prob = log_prob - (value.sum(dims, keepdim=True) if dims else value)
        found.append(LogLikelihood(log_prob, own_frames(message), observed, enumerated))
    return found


def _keys(site: Any) -> set[tuple[str, int | None]]:
    return {plate_key(frame) for frame in site["cond_indep_stack"] if frame.vectorized}
