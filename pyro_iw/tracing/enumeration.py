r"""Discrete model sites summed out exactly, inside the log density of each particle.

Sites of the model marked ``infer={"enumerate": "parallel"}`` that the guide leaves out are enumerated by
Pyro, each on a batch dim of its own, left of the particles'. What depends on them is contracted here by
Pyro's tensor variable elimination into terms

.. math:: \log \sum_c p_\theta(c)\, p_\theta(x \mid c, z_s),

one for each connected component, which then stand among the model's sites like any observed one. Products
over plates below an enumerated site are taken inside the sum.

References:
    | Tensor Variable Elimination for Plated Factor Graphs (Obermeyer et al., 2019),
      https://arxiv.org/abs/1902.03210
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .._support.devices import wide
from .guide_values import ids_of, is_enumerated_in_guide

__all__ = ["Marginals", "common_scale", "components", "is_enumerated", "marginalize"]


class Marginals(NamedTuple):
    """What is left of a model's enumerated part.

    Attributes:
        absorbed: names of the sites that have gone into the terms.
        terms: each term's name, its message (plates, scale), and its log density of the batch shape.
    """

    absorbed: set[str]
    terms: list[tuple[str, dict[str, Any], Tensor]]


def is_enumerated(name: str, message: Any, guide_trace: Trace) -> bool:
    """Whether a site of the model is to be summed out: marked so, and left out of the guide."""
    return (
        message["type"] == "sample"
        and not message["is_observed"]
        and message["infer"].get("enumerate") == "parallel"
        and name not in guide_trace.nodes
    )


def marginalize(trace: Trace, guide_trace: Trace, log_probs: dict[str, Tensor]) -> Marginals:
    """Sum the enumerated sites out of a model trace.

    Arguments:
        trace: the model's, run under Pyro's parallel enumeration.
        guide_trace: the guide's.
        log_probs: log densities of the sites, unscaled and unmasked, with their enumeration dims.

    Raises:
        NotImplementedError: if the structure cannot be contracted, or sites of one component differ in
            scale; naming the sites.
    """
    enumerated = [name for name in log_probs if is_enumerated(name, trace.nodes[name], guide_trace)]
    for name, log_prob in log_probs.items():
        message: Any = trace.nodes[name]
        # An enumerated site keeps its density whatever its mask: it sums to 1 where all else is masked.
        mask = None if name in enumerated else message["mask"]
        message["log_prob"] = message["unscaled_log_prob"] = scale_and_mask(log_prob, mask=mask)
    trace.pack_tensors()
    plates = set(trace.plate_to_symbol.values())
    kept = _symbols_of_guide(trace, guide_trace)
    values: dict[str, Tensor] = {name: trace.nodes[name]["packed"]["log_prob"] for name in log_probs}
    sum_dims = {dim for name in enumerated for dim in values[name]._pyro_dims}  # type: ignore[attr-defined]
    sum_dims -= plates | kept.keys()
    absorbed = [name for name in log_probs if not sum_dims.isdisjoint(values[name]._pyro_dims)]  # type: ignore[attr-defined]
    absorbed += [name for name in enumerated if name not in absorbed]  # those with a single value

    dims = {name: set(values[name]._pyro_dims) & sum_dims for name in absorbed}  # type: ignore[attr-defined]
    terms = []
    for component in components(absorbed, dims):
        _check_plates(component, trace, guide_trace, values, kept)
        terms += _contract(component, trace, guide_trace, values, sum_dims, kept)
    return Marginals(set(absorbed), terms)


def _symbols_of_guide(trace: Trace, guide_trace: Trace) -> dict[str, int]:
    """Symbols of the dims of what the guide enumerates, which are not summed over here, and their ids."""
    ids = ids_of(guide_trace)
    found: dict[str, int] = {}
    for message in trace.nodes.values() if ids else ():
        infer: Any = message.get("infer") or {}
        symbols = infer.get("_dim_to_symbol", {})
        found.update({symbols[dim]: id_ for dim, id_ in infer.get("_dim_to_id", {}).items() if id_ in ids})
    return found


def _check_plates(
    names: list[str], trace: Trace, guide_trace: Trace, values: dict[str, Tensor], kept: dict[str, int]
) -> None:
    """Refuse a sum over the model's values around a plate in which the guide enumerates."""
    met = {symbol for name in names for symbol in values[name]._pyro_dims} & kept.keys()  # type: ignore[attr-defined]
    if not met:
        return
    enumerated = [name for name in names if is_enumerated(name, trace.nodes[name], guide_trace)]
    for site in map(str, guide_trace.nodes):
        message: Any = guide_trace.nodes[site]
        if not is_enumerated_in_guide(message):
            continue
        infer = message["infer"]
        if infer["_dim_to_id"][infer["_enumerate_dim"]] not in {kept[symbol] for symbol in met}:
            continue
        inner = {frame.name for frame in message["cond_indep_stack"] if frame.vectorized}
        for name in enumerated:
            outer = {frame.name for frame in trace.nodes[name]["cond_indep_stack"] if frame.vectorized}
            if not inner <= outer:
                raise NotImplementedError(
                    f"Site {name!r} is to be summed out of the model, but the guide enumerates {site!r}, on "
                    "which the same sites depend, in plate(s) "
                    f"{', '.join(map(repr, sorted(inner - outer)))} inside of it. Enumerate {name!r} "
                    f"in the guide as well, or leave {site!r} out of the guide, too."
                )


def components(names: list[str], dims: dict[str, set[str]]) -> list[list[str]]:
    """The names in groups that share enumeration dims, directly or through one another."""
    groups: list[tuple[set[str], list[str]]] = []
    for name in names:
        linked, members = set(dims[name]), [name]
        apart = []
        for group in groups:
            if linked.isdisjoint(group[0]):
                apart.append(group)
            else:
                linked, members = linked | group[0], group[1] + members
        groups = [*apart, (linked, members)]
    return [sorted(members, key=names.index) for _, members in groups]


def _contract(
    names: list[str],
    trace: Trace,
    guide_trace: Trace,
    values: dict[str, Tensor],
    sum_dims: set[str],
    kept: dict[str, int],
) -> list[tuple[str, dict[str, Any], Tensor]]:
    """One component summed out."""
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    frames = {}
    for name in names:
        stack = [frame for frame in trace.nodes[name]["cond_indep_stack"] if frame.vectorized]
        frames.update({trace.plate_to_symbol[frame.name]: frame for frame in stack})
        ordinal = frozenset(trace.plate_to_symbol[frame.name] for frame in stack)
        tree.setdefault(ordinal, []).append(values[name])
    scale = common_scale([(name, trace.nodes[name]["scale"]) for name in names], one_context=len(tree) == 1)
    enumerated = [name for name in names if is_enumerated(name, trace.nodes[name], guide_trace)]
    try:
        contracted = contract_tensor_tree(tree, sum_dims)
    except (NotImplementedError, ValueError) as error:
        raise NotImplementedError(
            f"The enumerated site(s) {', '.join(map(repr, enumerated))} cannot be summed out together with "
            f"{', '.join(repr(name) for name in names if name not in enumerated)}: {error}"
        ) from error
    terms = []
    for ordinal, tensors in contracted.items():
        message: dict[str, Any] = {
            "type": "sample",
            "fn": None,
            "is_observed": True,
            "mask": None,
            "scale": scale,
            "infer": {},
            "cond_indep_stack": tuple(frames[symbol] for symbol in ordinal),
            "absorbed": names,
            # Sampled by the guide, but with a prior that depends on what is enumerated.
            "absorbed_latents": {name: trace.nodes[name] for name in names if name in guide_trace.nodes},
        }
        label = " + ".join(names)
        for tensor in tensors:
            left = {
                trace.symbol_to_dim[symbol]: kept[symbol] for symbol in tensor._pyro_dims if symbol in kept
            }
            infer = {"_dim_to_id": left}
            unpacked = packed.unpack(tensor, trace.symbol_to_dim)
            terms.append((label, {**message, "infer": infer}, unpacked))
    return terms


def common_scale(scales: list[tuple[str, Any]], one_context: bool) -> float | Tensor:
    """The scale that all of these sites, given by name, share, which can be taken out of the sum."""
    first_name, first = scales[0]
    for name, scale in scales:
        if isinstance(scale, Tensor) or isinstance(first, Tensor):
            here, there = torch.as_tensor(scale), torch.as_tensor(first)
            same = here.shape == there.shape and torch.allclose(wide(here), wide(there), rtol=1e-6)
            # A scale that varies over a plate inside the sum has no place outside of it.
            same = same and (here.numel() == 1 or one_context)
        else:
            same = math.isclose(scale, first, rel_tol=1e-9)
        if not same:
            raise NotImplementedError(
                f"Sites {first_name!r} and {name!r} hang together by enumeration but differ in scale (by a "
                "poutine.scale or a subsampled plate around one of them alone), so the sum over the "
                "enumerated values has no scale to take out. Scale both alike, or enumerate inside the plate."
            )
    return first
