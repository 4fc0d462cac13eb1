"""Which pairs chains can move, and the model's own prior as a guide to begin from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.poutine as poutine
from torch.distributions import biject_to

from ..tracing.change_of_variables import change_of_variables, deltas, points
from ..tracing.counterparts import check_guide, pattern_of
from ..tracing.messages import is_delta, latent_sites
from ..tracing.paths import class_name, draws_hard_values
from ..tracing.supports import is_circular, is_discrete
from ..tracing.traces import Pair, PairTraces

__all__ = ["Prior", "check_pair", "listed"]


class Prior:
    """The model's own prior as its guide: all latents that are not summed out, without the data.

    Arguments:
        model: the model.
    """

    def __init__(self, model: Callable) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with poutine.block(hide_fn=_is_no_latent_of_prior):
            self.model(*args, **kwargs)


def _is_no_latent_of_prior(message: Any) -> bool:
    if message["type"] != "sample":
        return False
    return message["is_observed"] or (message["infer"] or {}).get("enumerate") == "parallel"


def check_pair(pair: Pair, traces: PairTraces) -> list[str]:
    """:func:`~pyro_iw.tracing.counterparts.check_guide`, and no latent that the chains could not move.

    Raises:
        ValueError: as there; and if a latent is discrete, has no unconstrained coordinates or is a point
            estimate; naming the site.
    """
    messages = check_guide(pair, traces, strict=True)
    for name, site in latent_sites(traces.guide).items():
        if not is_delta(site["fn"]):
            _check_movable(name, site["fn"], isinstance(pair.guide, Prior))
    for trace in (traces.model, traces.guide):
        for name, site in latent_sites(trace).items():
            _refuse_angle(name, site["fn"])
            _refuse_hard_values(name, site["fn"])
    names = list(deltas(traces))
    if names:
        aside = pattern_of(traces).unmatched
        fixed = change_of_variables(pair, traces, aside).points if aside else points(pair, traces, names)
        if fixed:
            raise ValueError(
                f"Guide site(s) {listed(fixed)} are point estimates (Deltas), from which no path leads to a "
                "posterior. Take a guide with a density, such as AutoNormal, or guide=None for the prior."
            )
    return messages


def _check_movable(name: str, fn: Any, from_prior: bool) -> None:
    discrete = is_discrete(fn)
    if discrete:
        finite = getattr(fn, "has_enumerate_support", False)
        leave = "" if from_prior else " and leave it out of the guide"
        remedy = (
            f"Mark it infer={{'enumerate': 'parallel'}} in the model{leave}, to have it summed out, or use "
            if finite
            else "Use "
        )
        raise ValueError(
            f"Latent site {name!r} is discrete ({class_name(fn)}), and Hamiltonian Monte Carlo moves "
            f"continuous ones alone. {remedy}ImportanceSampler."
        )
    try:
        biject_to(fn.support)
    except (NotImplementedError, AttributeError):
        raise ValueError(
            f"Latent site {name!r} ({class_name(fn)}) has a support without unconstrained coordinates "
            "(torch.distributions.biject_to knows none), along which Hamiltonian Monte Carlo moves. Register "
            "a bijection by torch.distributions.biject_to.register, or use ImportanceSampler."
        ) from None


def _refuse_angle(name: str, fn: Any) -> None:
    if is_circular(fn):
        raise ValueError(
            f"Latent site {name!r} ({class_name(fn)}) is an angle from -pi to pi, but its support says all "
            "real numbers, where its density repeats itself: chains that leave the interval would count what "
            "is not there. Sample it from dist.Uniform(-math.pi, math.pi) in the model, times the density by "
            "pyro.factor(..., angle.log_prob(value) + math.log(2 * math.pi)), or use ImportanceSampler with "
            "dist.VonMises in the guide."
        )


def _refuse_hard_values(name: str, fn: Any) -> None:
    if draws_hard_values(fn):
        raise ValueError(
            f"Latent site {name!r} ({class_name(fn)}) is drawn at discrete values, between which Hamiltonian "
            "Monte Carlo would move it. Use ImportanceSampler, or a Bernoulli or OneHotCategorical marked "
            "infer={'enumerate': 'parallel'} in the model, to have it summed out."
        )


def listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Names in words."""
    return ", ".join(map(repr, names))
