r"""Sums over the values of the discrete sites that the guide enumerates.

With y the values of those sites, :math:`z_y` what the guide draws given them, and

.. math:: \ell_y = \log p_\theta(x, y, z_y) - \log q_\phi(y \mid x) - \log q_\phi(z_y \mid y, x),

there are three ways to sum.

* **Outside the logarithm**, :math:`\sum_y q_\phi(y \mid x)\, V(\ell_y)`: the joint values y are cells, which
  :mod:`~pyro_iw.gradients.over_values` weighs. Nothing is summed here.
* **Outside, of a mean** (the ELBO), where the sum goes into each log density: :class:`Expectation`. Entries
  of a plate, and links of a chain, then have their own sums.
* **Inside the logarithm**, :math:`\log \sum_y p_\theta(x, y, z_y) / q_\phi(z_y \mid y, x)`: the values are
  the strata of one importance weight, :func:`stratified`. Pyro's variable elimination takes the sum, with the
  guide's densities among the factors.

References:
    | Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014),
      https://arxiv.org/abs/1406.5298
    | Tensor Variable Elimination for Plated Factor Graphs (Obermeyer et al., 2019),
      https://arxiv.org/abs/1902.03210
"""

from __future__ import annotations

import string
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .enumeration import common_scale, components
from .guide_values import ValueDims, ids_of, joint_values, value_dims
from .paths import has_path
from .sites import Site
from .traces import Traces

__all__ = ["Expectation", "OverValues", "Stratified", "over_values", "stratified", "warn_of_dropped"]


class Expectation:
    r"""Expected log densities, :math:`\sum_y q_\phi(y \mid x) \log p_\theta(\cdot \mid y)`, site by site.

    Arguments:
        sites: the guide's enumerated sites.
        traces: the traces that they are from.
    """

    def __init__(self, sites: Sequence[Site], traces: Traces) -> None:
        self._ids = [ids_of(pair.guide) for pair in traces.pairs]
        self._sites: dict[tuple[int, int], Site] = {}
        for site in sites:
            infer = site.message["infer"]
            self._sites[site.pair, infer["_dim_to_id"][infer["_enumerate_dim"]]] = site

    def dims(self, site: Site) -> dict[int, int]:
        """The dims of a site's log density that hold values, and the ids of those."""
        return value_dims(site.message, site.log_prob, self._ids[site.pair])

    def of(self, site: Site, stopped: bool = False) -> Site:
        """The site with its expected log density, its mask applied.

        Arguments:
            site: a site of model or guide.
            stopped: whether no gradient flows through the probabilities.

        Raises:
            NotImplementedError: if it depends on values in a plate that is not around it.
        """
        dims = self.dims(site)
        if not dims:
            return site
        log_prob = scale_and_mask(site.log_prob, mask=site.message["mask"])
        weights = self._probabilities(site, dims, log_prob.dim())
        if stopped:
            weights = weights.detach()
        terms = weights * log_prob.masked_fill(weights == 0, 0.0)  # a value that cannot be: 0 * -inf
        total = terms.sum(tuple(dims), keepdim=True)
        while total.dim() and total.shape[0] == 1:
            total = total.squeeze(0)
        message = {**site.message, "mask": None, "is_expected": True}
        return site._replace(message=message, log_prob=total)

    def _probabilities(self, site: Site, dims: dict[int, int], rank: int) -> Tensor:
        """The joint probability of the values that a site depends on, to broadcast to its log density."""
        needed: list[int] = []
        pending = list(dims.values())
        while pending:
            id_ = pending.pop()
            if id_ not in needed:
                needed.append(id_)
                above = self._sites[site.pair, id_]
                for frame in above.frames:
                    if frame.vectorized and not site.inside(frame):
                        raise NotImplementedError(
                            f"Site {site} lies outside plate {frame.name!r}, but depends on "
                            f"{above.name!r}, which the guide enumerates inside of it. Move {site.name!r} "
                            f"into the plate, or sample {above.name!r}: remove its infer={{'enumerate': "
                            "'parallel'}."
                        )
                pending += self.dims(above).values()
        symbols = _Symbols()
        operands, subscripts = [], []
        for id_ in sorted(needed):  # from the first one drawn on, so that a chain is summed link by link
            above = self._sites[site.pair, id_]
            tensor, names = symbols.pack(above.log_prob, self.dims(above))
            operands.append(tensor.exp())
            subscripts.append(names)
        plates = [key for key in symbols.known if key[0] == "dim"]
        kept = [("value", id_) for id_ in dims.values()] + plates
        output = "".join(symbols.known[key] for key in kept if key in symbols.known)
        joint = torch.einsum(f"{','.join(subscripts)}->{output}", *operands)
        places = {("value", id_): dim for dim, id_ in dims.items()} | {key: key[1] for key in plates}
        shape, order = (
            [1] * rank,
            sorted((key for key in kept if key in symbols.known), key=places.__getitem__),
        )
        joint = joint.permute([output.index(symbols.known[key]) for key in order])
        for key, size in zip(order, joint.shape, strict=True):
            shape[places[key]] = size
        return joint.reshape(shape)


class _Symbols:
    """Letters for the dims of tensors: a value by its id, another batch dim by its place."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, int], str] = {}

    def of(self, key: tuple[str, int]) -> str:
        number = len(self.known)
        letter = string.ascii_letters[number] if number < 52 else chr(140 + number)
        return self.known.setdefault(key, letter)

    def pack(self, tensor: Tensor, dims: dict[int, int]) -> tuple[Tensor, str]:
        """The tensor without its dims of size 1, and letters for the others."""
        keys = [
            ("value", dims[dim]) if dim in dims else ("dim", dim)
            for dim in range(-tensor.dim(), 0)
            if tensor.shape[dim] > 1
        ]
        return tensor.squeeze(), "".join(map(self.of, keys))


class OverValues(NamedTuple):
    """Sites whose values are summed over outside the logarithm.

    Attributes:
        sites: all of them.
        counted: those whose log densities make up the log-weights of a joint value.
        rescored: the guide's at stopped values, where they are not those of ``counted``.
        enumerated: the guide's enumerated ones.
        dims: the dims that joint values keep in the log-weights; none, if the densities are expected ones.
    """

    sites: list[Site]
    counted: list[Site]
    rescored: list[Site] | None
    enumerated: tuple[Site, ...]
    dims: ValueDims


def over_values(
    sites: list[Site], kept: Sequence[CondIndepStackFrame], traces: Traces, is_linear: bool
) -> OverValues:
    """How values are summed over outside the logarithm.

    Arguments:
        sites: all sites, guide first.
        kept: the kept plates.
        traces: the traces that they are from.
        is_linear: whether the bound is a mean of log-weights, for which expected log densities will do.

    Raises:
        NotImplementedError: as :func:`joint_values` and :class:`Expectation`.
    """
    enumerated = tuple(site for site in sites if site.is_enumerated)
    if is_linear:
        expectation = Expectation(enumerated, traces)
        # A draw without a path, made for each value, has a score of its own for each.
        scored = [site for site in sites if _needs_score(site) and expectation.dims(site)]
        if not (scored and is_joint(enumerated, kept, len(traces.pairs))):
            rescored = None
            if any(site.rescored is not None for site in sites):
                again = [site.rescored_site() for site in sites if site.role == "guide"]
                rescored = [expectation.of(site, stopped=True) for site in again]
            expected = [expectation.of(site) for site in sites]
            return OverValues(expected, expected, rescored, enumerated, ValueDims())
    joint_values(enumerated, kept, len(traces.pairs))
    counted = [site for site in sites if not site.is_enumerated]
    first = [site for site in enumerated if site.pair == 0]
    return OverValues(sites, counted, None, enumerated, ValueDims.of(first))


def _needs_score(site: Site) -> bool:
    is_sampled = site.role == "guide" and site.is_latent and not site.is_enumerated
    return is_sampled and not has_path(site.message["fn"], site.message["infer"])


def is_joint(enumerated: Sequence[Site], kept: Sequence[CondIndepStackFrame], num_pairs: int) -> bool:
    """Whether :func:`joint_values` allows these sites."""
    try:
        joint_values(enumerated, kept, num_pairs)
    except NotImplementedError:
        return False
    return True


def warn_of_dropped(enumerated: Sequence[Site], warn_once: Callable[[str], None]) -> None:
    """Warn of densities with parameters that drop out of a sum inside the logarithm."""
    names = dict.fromkeys(repr(site.name) for site in enumerated if site.log_prob.requires_grad)
    if names:
        warn_once(
            f"stratified=True sums the values of guide site(s) {', '.join(names)} inside the logarithm, "
            "where their probabilities drop out: what they alone depend on is not trained. Leave out "
            "stratified=True to train it, or detach the probabilities where it is trained otherwise."
        )


class Stratified(NamedTuple):
    """Sites with the guide's enumerated ones summed out.

    Attributes:
        sites: the guide's first; what depended on values is in terms of both.
        absorbed: the guide's sampled sites that have gone into terms.
    """

    sites: list[Site]
    absorbed: tuple[Site, ...]


def stratified(sites: Sequence[Site], enumerated: Sequence[Site], traces: Traces) -> Stratified:
    r"""Sum the values out inside the log-weight.

    The term of sites that hang together,
    :math:`L = \log \sum_y p_\theta(\cdot, y, z_y) / q_\phi(z_y \mid y)`, is split in two by its gradient: a
    site of the model, of value L, has the derivative in :math:`p_\theta`; one of the guide, of value 0, that
    in :math:`q_\phi`. The density :math:`q_\phi(y \mid x)` drops out.

    Arguments:
        sites: all sites, guide first.
        enumerated: the guide's enumerated ones.
        traces: the traces that they are from.

    Raises:
        NotImplementedError: if the structure cannot be contracted, or sites of one component differ in scale;
            naming the sites.
    """
    guide: list[Site] = []
    model: list[Site] = []
    absorbed: list[Site] = []
    for index, pair in enumerate(traces.pairs):
        own = [site for site in sites if site.pair == index]
        ids = ids_of(pair.guide)
        names = {site.name for site in enumerated if site.pair == index}
        factors = [site for site in own if site.role == "model" or site.name not in names]
        dims = [value_dims(site.message, site.log_prob, ids) for site in factors]
        linked = {i: {str(id_) for id_ in found.values()} for i, found in enumerate(dims) if found}
        for i, site in enumerate(factors):
            if i not in linked and site.role == "model" and site.name in names:
                linked[i] = {f"single {site.name}"}  # a single value has no dim
        keys = {str(i): found for i, found in linked.items()}
        for component in components(list(keys), keys):
            members = [int(i) for i in component]
            terms = _contract([factors[i] for i in members], [dims[i] for i in members], ids)
            model += [term for term in terms if term.role == "model"]
            guide += [term for term in terms if term.role == "guide"]
        absorbed += [factors[i] for i in linked if factors[i].role == "guide"]
        rest = [site for i, site in enumerate(factors) if i not in linked]
        guide += [site for site in rest if site.role == "guide"]
        model += [site for site in rest if site.role == "model"]
    return Stratified(guide + model, tuple(absorbed))


def _contract(sites: list[Site], dims: list[dict[int, int]], ids: frozenset[int]) -> list[Site]:
    """The terms of one component: those of the model, and those of the guide that carry its gradient."""
    symbols = _Symbols()
    ordinals, tensors = [], []
    frames = {}
    for site, found in zip(sites, dims, strict=True):
        # An enumerated site keeps its density whatever its mask: it sums to 1 where all else is masked.
        mask = None if is_value(site) else site.message["mask"]
        value = scale_and_mask(site.log_prob, mask=mask)
        tensor, names = symbols.pack(value, found)
        tensors.append((tensor, names))
        own = {symbols.of(("dim", frame.dim)): frame for frame in site.frames if frame.dim is not None}
        frames.update(own)
        ordinals.append(list(own))
    # The particles' dim is around all of them.
    free = [letter for (kind, dim), letter in symbols.known.items() if kind == "dim" and letter not in frames]
    contexts = [frozenset([*ordinal, *free]) for ordinal in ordinals]
    scale = common_scale([(s.name, s.message["scale"]) for s in sites], one_context=len(set(contexts)) == 1)
    sums = {letter for (kind, _), letter in symbols.known.items() if kind == "value"}
    places = {letter: place for (kind, place), letter in symbols.known.items() if kind == "dim"}

    def contract(stop_model: bool, stop_guide: bool) -> list[tuple[frozenset[str], Tensor]]:
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for site, (tensor, names), context in zip(sites, tensors, contexts, strict=True):
            factor = tensor if site.role == "model" else -tensor
            if stop_model if site.role == "model" else stop_guide:
                factor = factor.detach()
            factor = factor.reshape(factor.shape)  # a tensor of its own to carry names
            factor._pyro_dims = names  # type: ignore[attr-defined]
            tree.setdefault(context, []).append(factor)
        try:
            found = contract_tensor_tree(tree, sums)
        except (NotImplementedError, ValueError) as error:
            raise NotImplementedError(_uncontractable(sites, error)) from error
        return [
            (context, packed.unpack(tensor, places))
            for context, factors in found.items()
            for tensor in factors
        ]

    latents = {s.name: s.message for s in sites if s.role == "model" and s.is_latent}
    template = sites[0]
    label = " + ".join(site.name for site in sites if site.role == "model")
    message: dict[str, Any] = {
        "type": "sample",
        "fn": None,
        "is_observed": True,
        "mask": None,
        "scale": scale,
        "infer": {},
        "cond_indep_stack": (),
        "absorbed_latents": latents,
    }

    def site_of(role: str, context: frozenset[str], log_prob: Tensor) -> Site:
        own = tuple(frames[letter] for letter in context if letter in frames)
        return Site(role, label, message, log_prob, template.pair, own)

    has_guide = any(site.role == "guide" and site.log_prob.requires_grad for site in sites)
    terms = [site_of("model", *found) for found in contract(False, stop_guide=has_guide)]
    if has_guide and torch.is_grad_enabled():
        for context, value in contract(stop_model=True, stop_guide=False):
            value = value.masked_fill(value.isneginf(), 0.0)
            terms.append(site_of("guide", context, value.detach() - value))
    return terms


def is_value(site: Site) -> bool:
    """Whether this is the model's density of a site that the guide enumerates."""
    return site.role == "model" and site.message["infer"].get("_enumerate_dim") is not None


def _uncontractable(sites: Sequence[Site], error: Exception) -> str:
    values = [site for site in sites if is_value(site)]
    others = [site for site in sites if not is_value(site)]
    return (
        f"The site(s) {', '.join(repr(site.name) for site in values)}, which the guide enumerates, cannot be "
        f"summed out together with {', '.join(map(str, others))}: {error}. Sample them instead: remove their "
        "infer={'enumerate': 'parallel'}."
    )
