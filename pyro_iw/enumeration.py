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

from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.trace_struct import Trace
from torch import Tensor

__all__ = ["Marginals", "is_enumerated", "marginalize"]


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
    values: dict[str, Tensor] = {name: trace.nodes[name]["packed"]["log_prob"] for name in log_probs}
    sum_dims = {dim for name in enumerated for dim in values[name]._pyro_dims} - plates  # type: ignore[attr-defined]
    absorbed = [name for name in log_probs if not sum_dims.isdisjoint(values[name]._pyro_dims)]  # type: ignore[attr-defined]
    absorbed += [name for name in enumerated if name not in absorbed]  # those with a single value

    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    frames = {}
    for name in absorbed:
        stack = [frame for frame in trace.nodes[name]["cond_indep_stack"] if frame.vectorized]
        ordinal = frozenset(trace.plate_to_symbol[frame.name] for frame in stack)
        frames.update({trace.plate_to_symbol[frame.name]: frame for frame in stack})
        tree.setdefault(ordinal, []).append(values[name])
    scale = _common_scale(trace, absorbed)
    try:
        contracted = contract_tensor_tree(tree, sum_dims)
    except (NotImplementedError, ValueError) as error:
        raise NotImplementedError(
            f"The enumerated site(s) {', '.join(map(repr, enumerated))} cannot be summed out together with "
            f"{', '.join(repr(name) for name in absorbed if name not in enumerated)}: {error}"
        ) from error
    terms = []
    for ordinal, tensors in contracted.items():
        message = {
            "type": "sample",
            "fn": None,
            "is_observed": True,
            "mask": None,
            "scale": scale,
            "infer": {},
            "cond_indep_stack": tuple(frames[symbol] for symbol in ordinal),
            # Sampled by the guide, but with a prior that depends on what is enumerated.
            "absorbed_latents": [name for name in absorbed if name in guide_trace.nodes],
        }
        label = " + ".join(absorbed)
        terms += [(label, message, packed.unpack(tensor, trace.symbol_to_dim)) for tensor in tensors]
    return Marginals(set(absorbed), terms)


def _common_scale(trace: Trace, names: list[str]) -> float | Tensor:
    """The scale that all of these sites share, which can be taken out of the sum."""
    scales = [trace.nodes[name]["scale"] for name in names]
    for name, scale in zip(names, scales, strict=True):
        same = scale is scales[0] or (
            not isinstance(scale, Tensor)
            and not isinstance(scales[0], Tensor)
            and math.isclose(scale, scales[0], rel_tol=1e-9)
        )
        if not same:
            raise NotImplementedError(
                f"Sites {names[0]!r} and {name!r} hang together by enumeration but differ in scale (by a "
                "poutine.scale or a subsampled plate around one of them alone), so the sum over the "
                "enumerated values has no scale to take out. Scale both alike, or enumerate inside the plate."
            )
    return scales[0] if scales else 1.0
