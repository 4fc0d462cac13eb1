r"""Local particles: for each particle of the global latents, several of those in a named plate.

Under two levels of particles a pair runs once, on two batch dims left of its own plates: S global particles
on the outer one, and on the inner one, at the sites inside a named plate alone, L local particles for each of
them. A global latent has size 1 there, so that a network that sees no local latent runs on ``[S, 1, ...]``
and only what depends on one is ``[S, L, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .messages import latent_sites
from .traces import LOCAL_PLATE, PARTICLE_PLATE

__all__ = ["LocalParticles", "local_plate_of", "particles_on_two_levels", "values_outside"]


class LocalParticles(Messenger):
    """A plate over local particles around the sites inside of some plates, and around no others.

    Arguments:
        numbers: the number of local particles, by the name of the plate.
        dim: the batch dim that they lie on.
    """

    def __init__(self, numbers: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.dim = dim

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name = local_plate_of(msg["name"], msg["cond_indep_stack"], self.numbers)
        if name is not None:
            frame = CondIndepStackFrame(LOCAL_PLATE, self.dim, self.numbers[name], 0)
            msg["cond_indep_stack"] = (frame, *msg["cond_indep_stack"])
            BroadcastMessenger._pyro_sample(msg)


def local_plate_of(site: str, frames: Any, names: Any) -> str | None:
    """The local plate around a site, the outermost where one lies in another; None if there is none.

    Arguments:
        site: the site's name.
        frames: the plates around it, the outermost first.
        names: the names of the local plates.

    Raises:
        ValueError: if there are two.
    """
    found = [frame.name for frame in frames if frame.name in names]
    if len(found) > 1:
        raise ValueError(
            f"Site {site!r} lies in {len(found)} of the plates with local particles, "
            f"{', '.join(map(repr, found))}. Each site has one set of local particles: name the outer plate "
            "alone (what lies deeper is summed within its cells), or, where the plates cross, one of them, "
            "and sample the other's latents outside of it."
        )
    return found[0] if found else None


def particles_on_two_levels(
    number: int, numbers: Mapping[str, int], dim: int
) -> Callable[[Callable], Callable]:
    """What wraps a guide or a model to run on particles and, if there are any, their local particles.

    Arguments:
        number: the number of particles.
        numbers: that of the local particles of each, by plate; may be empty.
        dim: the dim of the particles, left of that of the local ones.
    """
    plate = pyro.plate(PARTICLE_PLATE, number, dim=dim)
    if not numbers:
        return plate
    return lambda fn: plate(LocalParticles(numbers, dim + 1)(fn))


def values_outside(guide: Trace, names: Any) -> dict[str, Tensor]:
    """Values of a guide's latent sites outside of the local plates, with their graphs.

    Arguments:
        guide: the guide's trace.
        names: the names of the local plates.
    """
    return {
        name: site["value"]
        for name, site in latent_sites(guide).items()
        if local_plate_of(name, site["cond_indep_stack"], names) is None
    }
