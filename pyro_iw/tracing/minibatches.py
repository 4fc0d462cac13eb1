"""Minibatches of plates: one for all particles that run one by one, and the same in model and guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["DrawnApart", "OneMinibatch", "SameMinibatch"]


class OneMinibatch(Messenger):
    """Gives every run inside it the subsample that the first one drew.

    A model's plate that declares no subsample gets the guide's, as under ``poutine.replay``, also when the
    model runs alone.

    Arguments:
        indices: subsamples known beforehand, by the name of their plate.

    Attributes:
        indices: subsamples known by now.
    """

    def __init__(self, indices: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.indices: dict[str, Any] = dict(indices or {})
        self._full_sizes: dict[str, int] = {}

    def with_indices(self, indices: Mapping[str, Any]) -> OneMinibatch:
        """The same plates, with these for their subsamples."""
        other = OneMinibatch(indices)
        other._full_sizes.update(self._full_sizes)
        return other

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if not site_is_subsample(msg) or msg["value"] is not None or name not in self.indices:
            return
        # A plate that takes all of its indices may have others than before: it is on other data then.
        if _is_minibatch(msg) or self._full_sizes.get(name) == msg["fn"].size:
            msg["value"] = self.indices[name]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and (_is_minibatch(msg) or len(msg["value"]) < msg["fn"].size):
            self.indices.setdefault(msg["name"], msg["value"])
            self._full_sizes.setdefault(msg["name"], msg["fn"].size)


class DrawnApart(OneMinibatch):
    """Draws the subsamples that it gives to every run inside it, in the place of the plates.

    Arguments:
        draw: draws a number of indices, given the plate's full size and a device.
        plate: name of the plate over particles, if what is observed is to be noted.

    Attributes:
        observed: by the name of their site, values that do not vary over the particles in that plate.
    """

    def __init__(self, draw: Callable[[int, int, torch.device], Tensor], plate: str | None = None) -> None:
        super().__init__()
        self._draw = draw
        self._plate = plate
        self.observed: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            return
        super()._pyro_sample(msg)
        if msg["value"] is None and _is_minibatch(msg):
            plate = msg["fn"]
            indices = self._draw(plate.size, plate.subsample_size, torch.device(plate.device))
            msg["value"] = indices.cuda() if plate.use_cuda else indices
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            super()._pyro_post_sample(msg)
        if self._plate is None or not msg["is_observed"] or not isinstance(msg["value"], Tensor):
            return
        rank = msg["value"].dim() - msg["fn"].event_dim
        if any(frame.name == self._plate and rank < -frame.dim for frame in msg["cond_indep_stack"]):
            self.observed[msg["name"]] = msg["value"].detach()


def _is_minibatch(msg: Any) -> bool:
    """Whether a plate draws from its indices, rather than take them all."""
    size, subsample_size = msg["fn"].size, msg["fn"].subsample_size
    return subsample_size is not None and subsample_size < size


class SameMinibatch(Messenger):
    """Refuses a plate whose minibatch the model is given while the guide has another.

    Replayed, the model's plate has the guide's indices whatever it was given: parameters of some datapoints
    would meet the data of others.

    Arguments:
        guided: the guide's trace.
    """

    def __init__(self, guided: Trace) -> None:
        super().__init__()
        self.guided = guided

    def _pyro_sample(self, msg: Any) -> None:
        name, given = msg["name"], msg["value"]
        if not site_is_subsample(msg) or given is None or name not in self.guided.nodes:
            return
        drawn = self.guided.nodes[name]["value"]
        given, drawn = torch.as_tensor(given), torch.as_tensor(drawn)
        if given.shape != drawn.shape or not torch.equal(given.cpu(), drawn.cpu()):
            raise ValueError(
                f"Plate {name!r} has another minibatch in the guide than the model is given by subsample=: "
                f"{_beginning(drawn)} against {_beginning(given)}. Give the guide the same indices (an "
                f"AutoGuide by create_plates=lambda *args: pyro.plate({name!r}, ..., subsample=indices)), or "
                "let the plate draw them (subsample_size=) and take the data of its indices."
            )


def _beginning(indices: Tensor) -> str:
    first = ", ".join(map(str, indices[:3].tolist()))
    return f"[{first}, ...]" if len(indices) > 3 else f"[{first}]"
