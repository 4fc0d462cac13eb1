r"""Whether the sites that only the guide has are there as a change of variables.

A guide may draw :math:`a` and make latents of the model out of it by Deltas,

.. math:: z = f(a), \qquad \log q(z) = \log q(a) - \log \left| \det \partial f / \partial a \right|,

where the second term comes by ``Delta(..., log_density=)`` or by ``pyro.factor``. AutoGuides, ``EasyGuide``
and hand-written flows do. If :math:`a` is anything else, the guide is a mixture
:math:`\sum_a q(a)\, q(z \mid a)`, of which :math:`q(a)\, q(z \mid a)`, what counts, is not the density: the
"bound" is too high by the entropy of :math:`a` given z, and may grow without limit.

So the guide is run again at other values of :math:`a`, with all other latents held. Which coordinates of the
Deltas move says where :math:`a` goes; the Jacobian, while it is small, whether the density is right. All are
unconstrained coordinates (:func:`torch.distributions.biject_to`), of which a simplex of K entries has K - 1.

References:
    | An Auxiliary Variational Method (Agakov & Barber, 2004)
    | Auxiliary Deep Generative Models (Maaløe et al., 2016), https://arxiv.org/abs/1602.05473
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import MaskedDistribution, Unit
from torch import Tensor
from torch.distributions import biject_to

from .._support.devices import wide
from .._support.random_state import RandomState
from .messages import is_delta, is_latent
from .minibatches import OneMinibatch
from .paths import class_name
from .supports import is_circular, is_discrete, own_support
from .traces import Pair, PairTraces, trace_guide_given

__all__ = ["Verdict", "angles_beyond", "change_of_variables", "deltas", "points"]

#: Coordinates up to which the Jacobian is looked at: as many backward passes, once for each pair.
_SMALL = 64
#: What moves by less than this share stands still.
_STILL = 1e-5


class Verdict(NamedTuple):
    """What was found.

    Attributes:
        points: Deltas at the model's latents that do not depend on the sites in question.
        exact: whether the density was found right, with all factors of the guide.
        fault: why the guide's density is not that of the model's latents.
        surplus: what to say of Deltas with more coordinates than random numbers go into them.
    """

    points: Sequence[str] = ()
    exact: bool = False
    fault: str | None = None
    surplus: str | None = None


def deltas(traces: PairTraces) -> dict[str, Any]:
    """The model's distributions of the latents that are Deltas in the guide and none in the model."""
    guide: dict[str, Any] = dict(traces.guide.nodes)
    return {
        name: site["fn"]
        for name, site in dict[str, Any](traces.model.nodes).items()
        if is_latent(site) and not is_delta(site["fn"])
        if name in guide and is_latent(guide[name]) and is_delta(guide[name]["fn"])
    }


def points(pair: Pair, traces: PairTraces, names: Sequence[str]) -> list[str]:
    """Those Deltas of a guide that has no other randomness which are points: constant, or without density.

    Arguments:
        pair: the pair and its arguments.
        traces: one run of it, of one particle.
        names: the Deltas.
    """
    nodes: dict[str, Any] = dict(traces.guide.nodes)
    bare = [name for name in names if not bool(_delta_log_prob(nodes[name]).any())]
    if len(bare) == len(names):
        return bare
    with OneMinibatch():  # the same subsample for both, other random numbers
        one, other = (dict[str, Any](trace_guide_given(pair, _held(nodes)).nodes) for _ in range(2))
    return [
        name
        for name in names
        if name in bare or not bool(_moves(one[name]["value"], other[name]["value"]).any())
    ]


@torch.enable_grad()
def change_of_variables(pair: Pair, traces: PairTraces, names: Sequence[str]) -> Verdict:
    """Look at the sites that only the guide has.

    Arguments:
        pair: the pair and its arguments.
        traces: one run of it, of one particle.
        names: the guide's latents that are no latents of the model.
    """
    nodes: dict[str, Any] = dict(traces.guide.nodes)
    drawn = [name for name in names if not is_delta(nodes[name]["fn"])]
    if drawn and not deltas(traces):
        return Verdict(fault=_mixture(drawn))
    discrete = [name for name in drawn if is_discrete(nodes[name]["fn"])]
    function = _Function(pair, traces, [name for name in drawn if name not in discrete])
    unfed = [name for name in discrete if not _feeds_a_discrete_delta(function, name)]
    if unfed:
        return Verdict(fault=_mixture(unfed))
    # A discrete Delta that a discrete site goes into is no point.
    targets = [name for name, fn in function.targets.items() if not (discrete and is_discrete(fn))]
    if not function.sizes:
        return Verdict(targets)
    runs = list(function.runs())
    if any(run.coordinates.keys() != function.targets.keys() for run in runs):
        return Verdict()  # its structure is random, and another one in each run
    return _judge(function, runs, targets)


@torch.no_grad()
def angles_beyond(pair: Pair, traces: PairTraces, names: Sequence[str]) -> list[str]:
    """Warnings of angles made of sites that the guide alone has, which leave the circle where those do.

    Arguments:
        pair, traces, names: as of :func:`change_of_variables`.
    """
    angles = {name: fn for name, fn in deltas(traces).items() if is_circular(fn)}
    if not angles:
        return []
    nodes: dict[str, Any] = dict(traces.guide.nodes)
    drawn = [name for name in names if not is_delta(nodes[name]["fn"])]
    function = _Function(pair, traces, [name for name in drawn if not is_discrete(nodes[name]["fn"])])
    found: dict[str, None] = {}
    for sites in function.far_out():
        found |= {name: None for name in angles if bool((sites[name]["value"].abs() > 3.2).any())}
    return [_beyond_circle(name, angles[name]) for name in found]


def _judge(function: _Function, runs: Sequence[_Run], targets: Sequence[str]) -> Verdict:
    given, number = list(function.sizes), sum(function.sizes.values())
    moved = {name: _moved([run.coordinates[name] for run in runs]) for name in targets}
    still = [name for name in targets if not bool(moved[name].any())]
    moving = {name: where for name, where in moved.items() if name not in still}
    count = sum(int(where.sum()) for where in moving.values())
    unused = _unused(runs, function.sizes)
    if unused or count < number:
        return Verdict(still, fault=_mixture(unused or given))
    if count > number:
        return Verdict(still, surplus=_surplus(list(moving), count, given, number))
    whole = all(bool(where.all()) for where in moving.values())
    if number > _SMALL or not function.is_exact or not whole:
        return Verdict(still)
    excess = [value for run in runs if (value := _excess(run, list(moving), still)) is not None]
    if len(excess) < len(runs):
        return Verdict(still)
    off = sorted(excess, key=abs)[len(excess) // 2]  # one of them may lie where a transform saturates
    if not abs(off) <= 0.05 + 0.01 * number:
        return Verdict(still, fault=_wrong_density(list(moving), given, off))
    return Verdict(still, exact=True)


class _Run(NamedTuple):
    """A run of the guide at some values of the sites in question.

    Attributes:
        inputs: those values in unconstrained coordinates, which require grad.
        coordinates: the Deltas' values in unconstrained coordinates, flat.
        terms: what each Delta, site in question and factor adds to log q between unconstrained coordinates,
            beside the density that values are drawn from: all in all, minus the log-determinant.
    """

    inputs: list[Tensor]
    coordinates: dict[str, Tensor]
    terms: dict[str, Tensor]


class _Function:
    """The guide as a function of some of its sites, all other latents but Deltas held.

    Arguments:
        pair: the pair and its arguments.
        traces: one run of it, of one particle.
        names: the sites, with continuous values.

    Attributes:
        nodes: the guide's sites in that run.
        targets: the model's distribution for each Delta.
        held: the values of all latents but Deltas.
        sizes: the number of unconstrained coordinates of each site.
        is_exact: whether all coordinates are unconstrained ones.
    """

    def __init__(self, pair: Pair, traces: PairTraces, names: Sequence[str]) -> None:
        self.nodes: dict[str, Any] = dict(traces.guide.nodes)
        self.targets = deltas(traces)
        self.held = _held(self.nodes)
        self.is_exact = True
        self._pair = pair
        self._random_state = RandomState.now()
        self._minibatch = OneMinibatch()
        self._transforms = {name: self._transform(self.nodes[name]["fn"]) for name in names}
        self._start = {
            name: self.held[name] if transform is None else transform.inv(self.held[name])
            for name, transform in self._transforms.items()
        }
        self.sizes = {name: value.numel() for name, value in self._start.items()}

    def _transform(self, fn: Any) -> Any:
        """From unconstrained coordinates to the values of a distribution; None if there is no such map."""
        try:
            return biject_to(fn.support)
        except NotImplementedError:
            self.is_exact = False
            return None

    def runs(self) -> Iterator[_Run]:
        """Runs at the values that were drawn, and at two others of order 1, where no transform saturates."""
        yield self._run(self._start)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            values = {}
            for name, value in self._start.items():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
                values[name] = self.nodes[name]["fn"]() if self._transforms[name] is None else noise
            yield self._run(values)

    def far_out(self) -> Iterator[dict[str, Any]]:
        """The guide's sites where the unconstrained coordinates are large, of either sign."""
        known = {name: each for name, each in self._transforms.items() if each is not None}
        for far in (-100.0, 100.0):
            values = {name: each(torch.full_like(self._start[name], far)) for name, each in known.items()}
            yield self.at({**self.held, **values})

    def _run(self, start: Mapping[str, Tensor]) -> _Run:
        inputs = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
        values, terms, coordinates = dict(self.held), {}, {}
        for name, value in inputs.items():
            transform = self._transforms[name]
            values[name] = value if transform is None else transform(value)
            if transform is not None:
                terms[name] = -transform.log_abs_det_jacobian(value, values[name]).sum()
        for name, site in self.at(values).items():
            if is_latent(site) and is_delta(site["fn"]):
                terms[name] = _delta_log_prob(site).sum()
                if name in self.targets:
                    coordinates[name], jacobian = self._coordinates(self.targets[name], site["value"])
                    terms[name] = terms[name] + jacobian
            elif isinstance(site.get("fn"), Unit):
                terms[name] = site["fn"].log_factor.sum()
        return _Run(list(inputs.values()), coordinates, terms)

    def at(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """The guide's sites at these values, always on the same minibatch and random numbers."""
        self._random_state.restore()
        with self._minibatch:
            return dict(trace_guide_given(self._pair, values).nodes)

    def _coordinates(self, fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
        transform = None if is_discrete(fn) else self._transform(fn)
        if transform is None:
            return value.reshape(-1), torch.zeros((), device=value.device)
        free = transform.inv(value)
        return free.reshape(-1), transform.log_abs_det_jacobian(free, value).sum()


def _moves(one: Tensor, other: Tensor) -> Tensor:
    one, other = wide(one.detach()), wide(other.detach())
    return ~((one - other).abs() <= _STILL * (1 + one.abs()))


def _moved(values: Sequence[Tensor]) -> Tensor:
    """Which entries of the first are others in any of the rest."""
    return torch.stack([_moves(values[0], other) for other in values[1:]]).any(0)


def _unused(runs: Sequence[_Run], sizes: Mapping[str, int]) -> list[str]:
    """Names of sites of which some coordinate has no gradient from the Deltas in any run."""
    used = {name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()}
    for run in runs:
        outputs = [value for value in run.coordinates.values() if value.requires_grad]
        if not outputs:
            return []  # the guide cuts gradients
        # No two coordinates with the same weight, or they might cancel.
        weighted = [value * torch.linspace(1.0, 2.0, len(value)).sqrt().to(value) for value in outputs]
        gradients = torch.autograd.grad(
            torch.cat(weighted).sum(),
            run.inputs,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for where, gradient in zip(used.values(), gradients, strict=True):
            where |= (gradient.reshape(-1) != 0).cpu()
    return [name for name, where in used.items() if not bool(where.all())]


def _excess(run: _Run, moving: Sequence[str], still: Sequence[str]) -> float | None:
    """How much log q is above that of a change of variables; None if this cannot be told."""
    outputs = torch.cat([run.coordinates[name] for name in moving])
    if not outputs.requires_grad:
        return None
    rows = []
    for output in outputs.unbind():
        gradients = torch.autograd.grad(
            output, run.inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    log_det = wide(torch.stack(rows)).slogdet().logabsdet
    terms = [wide(term.detach()) for name, term in run.terms.items() if name not in still]
    excess = (log_det + torch.stack(terms).sum()).item()
    return None if excess != excess else excess


def _feeds_a_discrete_delta(function: _Function, name: str) -> bool:
    """Whether every entry of a discrete site becomes one of a discrete latent."""
    targets = [latent for latent, fn in function.targets.items() if is_discrete(fn)]
    if not targets:
        return False
    fn, value = function.nodes[name]["fn"], function.nodes[name]["value"]
    other = value + 1
    if getattr(fn, "has_enumerate_support", False):
        support = fn.enumerate_support()
        other = torch.where(value == support[0], support[-1], support[0])
    before, after = (function.at({**function.held, name: values}) for values in (value, other))
    moved = sum(int((before[target]["value"] != after[target]["value"]).sum()) for target in targets)
    return moved >= value.numel()


def _held(nodes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The values of the latents that are no Deltas."""
    return {
        name: site["value"].detach()
        for name, site in nodes.items()
        if is_latent(site) and not is_delta(site["fn"])
    }


def _delta_log_prob(site: Any) -> Tensor:
    """What a Delta gives as its log density, whatever its mask."""
    fn = site["fn"]
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return fn.log_prob(site["value"])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _mixture(names: Sequence[str]) -> str:
    return (
        f"Site(s) {_listed(names)} of the guide are no latents of the model, and no change of variables "
        "either (random numbers that Deltas turn one to one into latents of the model). They make the guide "
        "a mixture over their values, but what counts is the density of these and of what depends on them, "
        "so the bound is too high. Give the guide the density of the mixture (MixtureOfDiagNormals of "
        "pyro.distributions, or MixtureSameFamily with estimator='score'), or the model a site "
        f"{names[0]!r} of any density given its other latents, or remove a site that nothing depends on."
    )


def _wrong_density(names: Sequence[str], given: Sequence[str], excess: float) -> str:
    return (
        f"Site(s) {_listed(names)} of the guide are Deltas of {_listed(given)}, but log q is off by "
        f"{excess:.3g} nats for one particle: the log_density of the Deltas should add up to minus the "
        "log-determinant of how they depend on it. Write dist.Delta(value, log_density=-log|det|), or take "
        "dist.TransformedDistribution, which does so itself."
    )


def _beyond_circle(name: str, fn: Any) -> str:
    return (
        f"Guide site {name!r} is a Delta that goes beyond -pi and pi, but the prior ({class_name(fn)}) is an "
        "angle between them, whose density repeats itself outside: the model counts the same angles again "
        f"there, so bound and evidence may be too high, without limit. {own_support(name, fn)}"
    )


def _surplus(names: Sequence[str], coordinates: int, given: Sequence[str], number: int) -> str:
    return (
        f"Guide site(s) {_listed(names)} are Deltas with {coordinates} free coordinates made of the {number} "
        f"of {_listed(given)}, so the guide has no density over them: the loss is no bound, and what is "
        "estimated is not the evidence. Draw as many random numbers as there are coordinates."
    )
