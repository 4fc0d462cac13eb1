r"""Whether the guide's density is that of exactly the model's latents.

An importance weight is :math:`p_\theta(x, z) / q_\phi(z \mid x)`, with the density of the same z above
and below. All latent sites of the guide count in :math:`q`, those that the model observes or does not have
(marked ``infer={"is_auxiliary": True}`` or not) included. What is observed in the guide does not: no particle
is drawn from it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyro.distributions import Unit
from pyro.util import check_model_guide_match

from .change_of_variables import Verdict, angles_beyond, change_of_variables, deltas, points
from .messages import has_no_density
from .traces import Pair, PairTraces, plate_nesting

__all__ = ["Pattern", "check_guide", "pattern_of"]


class Pattern(NamedTuple):
    """The sites of a guide that have no counterpart among the model's latents.

    Attributes:
        unmatched: its latent sites.
        observed: its observed sites that have a density.
        factors: its ``pyro.factor`` statements.
    """

    unmatched: tuple[str, ...]
    observed: tuple[str, ...]
    factors: tuple[str, ...]


def pattern_of(traces: PairTraces) -> Pattern:
    """The guide's sites without a counterpart in one run of a pair."""
    unmatched, observed, factors = [], [], []
    nodes: dict[str, Any] = dict(traces.model.nodes)
    for name, site in dict[str, Any](traces.guide.nodes).items():
        if site["type"] != "sample":
            continue
        if not site["is_observed"]:
            model = nodes.get(name)
            if model is None or model["type"] != "sample" or model["is_observed"]:
                unmatched.append(name)
        elif isinstance(site["fn"], Unit):
            factors.append(name)
        elif not has_no_density(site):
            observed.append(name)
    return Pattern(tuple(unmatched), tuple(observed), tuple(factors))


def check_guide(pair: Pair, traces: PairTraces, *, strict: bool) -> list[str]:
    """Refuse a guide whose density is not that of the model's latents.

    Arguments:
        pair: the pair and its arguments.
        traces: one run of it, of one particle.
        strict: whether the weights are to give the evidence, as a sampler's are. Then a guide that its sites
            without a counterpart make a mixture is an error; in training it is a warning.

    Returns:
        Warnings to give.

    Raises:
        ValueError: if the guide samples what the model observes, or a site has more values in one of them
            than in the other, or, if ``strict``, the sites without a counterpart are no change of variables;
            naming the sites.
    """
    pattern = pattern_of(traces)
    _refuse_observed_in_model(pattern, traces)
    _check_shapes(traces)
    messages = [_observed(pattern.observed)] if pattern.observed and not strict else []
    verdict = Verdict()
    if pattern.unmatched:
        verdict = change_of_variables(pair, traces, pattern.unmatched)
    elif strict:
        verdict = Verdict(points(pair, traces, list(deltas(traces))))
    if verdict.fault is not None and strict:
        raise ValueError(verdict.fault)
    messages += [message for message in (verdict.fault, verdict.surplus) if message is not None]
    messages += angles_beyond(pair, traces, pattern.unmatched)
    if strict:
        messages += map(_point, verdict.points)
        if pattern.factors and not verdict.exact:
            messages.append(_factor(pattern.factors))
    return messages


def _refuse_observed_in_model(pattern: Pattern, traces: PairTraces) -> None:
    nodes: dict[str, Any] = dict(traces.model.nodes)
    for name in pattern.unmatched:
        if name in nodes and nodes[name]["type"] == "sample" and not has_no_density(nodes[name]):
            raise ValueError(
                f"Site {name!r} is observed in the model, but the guide samples it, and would count with its "
                f"density there although no latent of the model has that density. Leave {name!r} out of the "
                "guide where it is observed (make an AutoGuide of the conditioned model), or give the guide "
                f"the same value: poutine.block(poutine.condition(guide, data={{{name!r}: ...}}), "
                f"hide=[{name!r}])."
            )


def _check_shapes(traces: PairTraces) -> None:
    """Refuse a site of another shape in the guide, whose density would count another number of times."""
    nesting: Any = math.inf
    if any("_enumerate_dim" in site.get("infer", {}) for site in dict[str, Any](traces.model.nodes).values()):
        nesting = max(plate_nesting(traces.model), plate_nesting(traces.guide))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of which names are where, something is said elsewhere
        check_model_guide_match(traces.model, traces.guide, nesting)


def _observed(names: Sequence[str]) -> str:
    return (
        f"Site(s) {', '.join(map(repr, names))} are observed in the guide, so no particle is drawn from them "
        "and their density does not count (Trace_ELBO subtracts it, without limit). Parameters that only "
        "they depend on are not trained: to train a classifier, say, observe such a site in the model. If it "
        f"is meant, hide them by poutine.block(guide, hide={list(names)!r})."
    )


def _factor(names: Sequence[str]) -> str:
    return (
        f"pyro.factor({', '.join(map(repr, names))}) of the guide counts as part of log q. Only if that is "
        "the density of a distribution, as after a change of variables, is the evidence estimated, and this "
        "cannot be told. Take dist.TransformedDistribution or dist.Delta(value, log_density=...) instead."
    )


def _point(name: str) -> str:
    return (
        f"Guide site {name!r} is a point estimate (a Delta), so what is estimated is the density of the data "
        f"together with that point, not the evidence with {name!r} integrated out. Take a guide with a "
        "density, such as AutoNormal, to integrate over it."
    )
