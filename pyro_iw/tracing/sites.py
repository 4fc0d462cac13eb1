r"""Sample sites and their log densities, checked.

Reads the sites that carry a density off the traces of a model/guide pair, evaluates their log densities, and
refuses by name what would make the importance weights wrong: a latent that the guide leaves out, a site
whose enumeration is not to be had, a density whose shape puts particles or batch where they do not belong.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from pyro.distributions import Bernoulli, Delta, Independent, Unit
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .enumeration import is_enumerated, marginalize
from .guide_values import ids_of, is_enumerated_in_guide, value_dims
from .masks import fits, masked_value, with_masks_of_model
from .messages import base_of, has_no_density
from .paths import class_name, draws_hard_values, has_biased_path, has_path
from .precision import in_full_precision
from .supports import is_discrete, own_support, support_moves
from .traces import LOCAL_PLATE, Traces, is_of_particles, is_transformed

__all__ = ["Site", "outside_depends_on_inside", "plate_key", "read_sites"]


class Site(NamedTuple):
    """A sample site that carries a density."""

    role: str  # "model" or "guide"
    name: str
    message: Any
    log_prob: Tensor  # of the batch shape, unscaled and unmasked
    pair: int  # index of the pair of traces it belongs to
    frames: tuple[CondIndepStackFrame, ...]  # its plates, that over particles aside
    scale: float | Tensor = 1.0  # what remains inside the logarithm
    rescored: Any = None  # its message in a second run of the guide, at stopped values

    @classmethod
    def read(cls, role: str, name: str, message: Any, pair: int, log_prob: Tensor | None = None) -> Site:
        """The site of a trace, its log density evaluated unless given; to be called without autocast."""
        if log_prob is None:
            log_prob = _log_prob(role, name, message)
        frames = tuple(f for f in message["cond_indep_stack"] if not is_of_particles(f))
        return cls(role, name, message, log_prob, pair, frames)

    @property
    def is_latent(self) -> bool:
        return not self.message["is_observed"]

    @property
    def is_enumerated(self) -> bool:
        """Whether the guide takes each of its values at once, rather than draw one."""
        return self.role == "guide" and is_enumerated_in_guide(self.message)

    @property
    def is_factor(self) -> bool:
        return isinstance(self.message["fn"], Unit)

    @property
    def is_reparameterized(self) -> bool:
        """Whether its value carries a pathwise gradient, or its density has no parameters to need one."""
        return has_path(self.message["fn"], self.message["infer"]) or not self.log_prob.requires_grad

    @property
    def has_biased_path(self) -> bool:
        """Whether its distribution has an ``rsample`` whose gradient is not that of its draws."""
        return has_biased_path(self.message["fn"])

    @property
    def has_moving_support(self) -> bool:
        """Whether the ends of its support depend on parameters, where upstream values are what they are."""
        return self.is_latent and support_moves((self.rescored or self.message)["fn"])

    @property
    def has_late_parameters(self) -> bool:
        """Whether its density at stopped values depends on parameters, though no sampling from it does."""
        if not self.is_latent:
            site = self if self.rescored is None else self.rescored_site()
            return site.log_prob.requires_grad
        fn = base_of((self.rescored or self.message)["fn"])
        return isinstance(fn, Delta) and (fn.v.requires_grad or fn.log_density.requires_grad)

    def rescored_site(self) -> Site:
        """The same site in the second run."""
        with in_full_precision():
            log_prob = _log_prob(self.role, self.name, self.rescored)
        return self._replace(message=self.rescored, log_prob=log_prob)

    def inside(self, frame: CondIndepStackFrame) -> bool:
        return any(plate_key(frame) == plate_key(other) for other in self.frames)

    def __str__(self) -> str:
        return f"{self.name!r} ({self.role})"


def plate_key(frame: CondIndepStackFrame) -> tuple[str, int | None]:
    """What makes two frames the same plate: its size may differ between model and guide."""
    return frame.name, frame.dim


def read_sites(traces: Traces, roles: Collection[str] = ("guide", "model")) -> list[Site]:
    """The sites that carry a density, guide first, checked and with their log densities.

    Arguments:
        traces: the traces of both.
        roles: whose sites are wanted.

    Raises:
        ValueError: if a latent is missing from the guide or has a density in one of model and guide and a
            mass in the other, shapes clash, or a factor in the guide does not say whether it is
            reparameterised; the site is named.
        NotImplementedError: if a site is to be enumerated and cannot be; it is named.
    """
    with in_full_precision():  # once, for looking whether there is autocast takes its time
        return _read_sites(traces, roles)


def _read_sites(traces: Traces, roles: Collection[str]) -> list[Site]:
    sites: list[Site] = []
    validate = is_validation_enabled()
    nesting = _plate_dims(traces)
    for index, (model_trace, guide_trace, rescored) in enumerate(traces.pairs):
        if traces.local_dim is not None:
            for role, trace in (("guide", guide_trace), ("model", model_trace)):
                _check_local_dim(role, trace, traces)
        _check_names(model_trace, guide_trace)
        ids = ids_of(guide_trace)
        if validate and len(roles) == 2:
            with warnings.catch_warnings():
                # Said better by the error above, and of a site to be enumerated there is nothing to say.
                warnings.filterwarnings("ignore", "Found vars in model but not guide")
                # Marked or not, these are looked at in counterparts.py.
                warnings.filterwarnings("ignore", "Found non-auxiliary vars in guide but not model")
                check_model_guide_match(model_trace, guide_trace, nesting)
        for role, trace in (("guide", guide_trace), ("model", model_trace)):
            if role not in roles:
                continue
            found = []
            for name, message in trace.nodes.items():
                if message["type"] != "sample" or has_no_density(message):
                    continue
                if role == "guide" and message["is_observed"] and not isinstance(message["fn"], Unit):
                    continue  # no particle is drawn from it
                site = Site.read(role, name, message, index)
                if role == "guide" and name in rescored:
                    site = site._replace(rescored=rescored[name])
                if validate:
                    message["log_prob"] = site.log_prob
                    check_site_shape(message, nesting)
                _check_mask_and_scale(site)
                found.append(site)
            if role == "guide":
                found = with_masks_of_model(found, model_trace)
            if role == "model" and traces.enum_dim is not None:
                found = _marginalized(found, model_trace, guide_trace)
                found = [_without_enum_dims(site, nesting) for site in found]
            for site in found:
                _check_particle_dim(site, traces, ids)
            sites += found
    return sites


def _plate_dims(traces: Traces) -> Any:
    """Number of batch dims right of any enumeration: those of plates and particles."""
    if traces.enum_dim is not None:
        return -traces.enum_dim - 1
    return math.inf if traces.particle_dim is None else -traces.particle_dim


def _marginalized(sites: list[Site], model_trace: Any, guide_trace: Any) -> list[Site]:
    """The sites with the enumerated ones, and what depends on them, replaced by what is left of them."""
    log_probs = {site.name: site.log_prob for site in sites}
    absorbed, terms = marginalize(model_trace, guide_trace, log_probs)
    for name, message, _ in terms:
        _check_local_plate(name, message, model_trace, guide_trace)
    pair = sites[0].pair
    return [site for site in sites if site.name not in absorbed] + [
        Site.read("model", name, message, pair, log_prob) for name, message, log_prob in terms
    ]


def _check_local_plate(name: str, term: Any, model_trace: Any, guide_trace: Any) -> None:
    """Refuse a sum outside of the local plates over values that what is inside depends on.

    It would be one of the product over all local particles.
    """
    inside = [each for each in term["absorbed"] if _has_local_particles(model_trace.nodes[each])]
    if not inside or _has_local_particles(term):
        return
    summed = [
        each
        for each in term["absorbed"]
        if each not in inside and is_enumerated(each, model_trace.nodes[each], guide_trace)
    ]
    values, site = ", ".join(map(repr, summed)), f"{name!r} (model)"
    raise ValueError(
        f"The log density at site {site} sums out {values}, outside of the plate of local particles, "
        f"together with what is inside ({', '.join(map(repr, inside))}), so there is no local weight for "
        f"each index of the plate. Let the guide sample {values} (without infer={{'enumerate': 'parallel'}} "
        "in the model, and with estimator='score'), or use a bound with one joint weight (IWAE_ELBO, "
        "MIWAE_ELBO)."
    )


def _has_local_particles(message: Any) -> bool:
    return any(frame.name == LOCAL_PLATE and frame.size > 1 for frame in message["cond_indep_stack"])


def _without_enum_dims(site: Site, nesting: int) -> Site:
    """A site that is not absorbed, though a site of a single value has a dim of size 1 in it."""
    shape = site.log_prob.shape
    extra = len(shape) - nesting
    if extra > 0 and all(size == 1 for size in shape[:extra]):
        return site._replace(log_prob=site.log_prob.reshape(shape[extra:]))
    return site


def _check_names(model_trace: Any, guide_trace: Any) -> None:
    for role, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, message in trace.nodes.items():
            if message["type"] != "sample":
                continue
            latent = not message["is_observed"]
            if latent and message["infer"].get("enumerate") == "parallel":
                _check_enumerated(role, name, message)
            missing = role == "model" and latent and name not in guide_trace.nodes
            if missing and not is_enumerated(name, message, guide_trace):
                finite = getattr(message["fn"], "has_enumerate_support", False)
                enumerate_it = " or mark it infer={'enumerate': 'parallel'} to sum it out," if finite else ""
                raise ValueError(
                    f"Latent site {name!r} of the model is missing from the guide, so its importance weight "
                    f"is unknown. Sample {name!r} in the guide,{enumerate_it} or observe it in the model."
                )
            if role == "model" and latent and not missing:
                _check_measure(name, message["fn"], guide_trace.nodes[name])
            is_factor = isinstance(message["fn"], Unit)
            if role == "guide" and is_factor and "has_rsample" not in vars(message["fn"]):
                raise ValueError(
                    f"pyro.factor({name!r}, ...) in the guide must say whether it arises from "
                    "reparameterised sampling: pass has_rsample=True or has_rsample=False (True also where "
                    "its value follows from the guide's own sample sites and parameters, whatever they are)."
                )


def _check_measure(name: str, fn: Any, guide_message: Any) -> None:
    """Refuse to weigh a density against a mass."""
    if guide_message["type"] != "sample" or guide_message["is_observed"]:
        return
    guide_fn = guide_message["fn"]
    discrete, guide_discrete = is_discrete(fn), is_discrete(guide_fn)
    if discrete is None or guide_discrete is None or (discrete and guide_discrete):
        return
    hard, guide_hard = draws_hard_values(fn), draws_hard_values(guide_fn)
    if discrete != guide_discrete or hard != guide_hard:
        raise ValueError(
            f"Latent site {name!r} is {_measure(discrete, hard)} in the model ({class_name(fn)}), but "
            f"{_measure(guide_discrete, guide_hard)} in the guide ({class_name(guide_fn)}), so their ratio "
            f"is no importance weight. Sample {name!r} from distributions of the same kind: both discrete "
            "(with estimator='vimco', 'score' or 'rws'), or the same relaxation in model and guide."
        )


def _measure(discrete: bool, hard: bool) -> str:
    if discrete:
        return "discrete, with a probability mass,"
    return "a quantised draw, with the density of its relaxation," if hard else "continuous, with a density,"


def _check_enumerated(role: str, name: str, message: Any) -> None:
    if not getattr(message["fn"], "has_enumerate_support", False):
        raise NotImplementedError(
            f"Site {name!r} of the {role} is to be enumerated in parallel, but its distribution "
            f"{type(message['fn']).__name__} has no values to enumerate."
        )
    if message["infer"].get("num_samples"):
        raise NotImplementedError(
            f"Site {name!r} of the {role} asks for num_samples= in its enumeration; only exact sums are "
            "supported. Remove num_samples, or sample the site in the guide."
        )


def _log_prob(role: str, name: str, message: Any) -> Tensor:
    if "unscaled_log_prob" in message:
        return message["unscaled_log_prob"]
    fn, value = message["fn"], masked_value(message)
    try:
        if _is_bits(fn) and not (message["args"] or message["kwargs"]):
            return _log_prob_of_bits(fn, value)
        return fn.log_prob(value, *message["args"], **message["kwargs"])
    except (KeyError, NotImplementedError) as error:
        said = str(error) or f"{type(fn).__name__} raises {type(error).__name__}"
        if not is_transformed(fn):
            raise ValueError(
                f"The log density at site {name!r} ({role}) cannot be evaluated: {said}. Its distribution "
                "has to have a log_prob."
            ) from error
        raise ValueError(
            f"The log density at site {name!r} ({role}) cannot be evaluated at this value: {said}. A "
            "transform without an inverse can score only what it has just made (use it in the guide, with "
            "estimator='reparam' or 'score'), and it has to have a log_abs_det_jacobian."
        ) from error
    except (ValueError, RuntimeError) as error:
        outside = role == "model" and not message["is_observed"] and "within the support" in str(error)
        advice = ""
        if outside:
            advice = f"\nThe guide proposes values that the prior excludes. {own_support(name, fn)}"
        raise ValueError(
            f"Evaluating the log density at site {name!r} ({role}) failed with {type(error).__name__}: "
            f"{error}\nvalue: {tuple(value.shape)}, batch shape: {tuple(fn.batch_shape)}, event shape: "
            f"{tuple(fn.event_shape)}{advice}"
        ) from error


def _is_bits(fn: Any) -> bool:
    """Whether this is an independent Bernoulli for each of some event dims, given by logits."""
    if type(fn) is not Independent or type(fn.base_dist) is not Bernoulli:
        return False
    return fn.reinterpreted_batch_ndims > 0 and "logits" in vars(fn.base_dist)


def _log_prob_of_bits(fn: Any, value: Tensor) -> Tensor:
    """The same as ``fn.log_prob``, but for the negation, here of the sum.

    Over particles × batch × pixels the base distribution's own takes a pass over memory forward and another
    one backward, a tenth of a VAE's step.
    """
    base = fn.base_dist
    if base._validate_args:
        base._validate_sample(value)
    logits, value = torch.broadcast_tensors(base.logits, value)
    cross_entropy = binary_cross_entropy_with_logits(logits, value, reduction="none")
    return -cross_entropy.sum(tuple(range(-fn.reinterpreted_batch_ndims, 0)))


def _check_mask_and_scale(site: Site) -> None:
    """Refuse a mask or scale over dims that the site does not have: it would count the site several times."""
    shape = site.log_prob.shape
    for kind, remedy in (
        ("mask", "Mask over the dims of the plates around the site."),
        ("poutine.scale", "Put a scale over a plate's dims inside that plate, around the sites there alone."),
    ):
        tensor = site.message[kind.removeprefix("poutine.")]
        if isinstance(tensor, Tensor) and not fits(tensor.shape, shape):
            raise ValueError(
                f"The {kind} at site {site} has shape {tuple(tensor.shape)}, which does not broadcast to the "
                f"site's batch shape {tuple(shape)}. {remedy}"
            )


def _check_local_dim(role: str, trace: Any, traces: Traces) -> None:
    """Refuse a site outside of the local plates that varies with their local particles."""
    dim = traces.local_dim
    assert dim is not None
    for name, message in trace.nodes.items():
        shape = tuple(getattr(message.get("fn"), "batch_shape", ())) if message["type"] == "sample" else ()
        if len(shape) < -dim or shape[dim] == 1 or site_is_subsample(message):
            continue
        if not any(frame.name == LOCAL_PLATE for frame in message["cond_indep_stack"]):
            plates = ", ".join(map(repr, traces.local))
            how = f"has shape {shape}, where dim {dim} is that of the local particles of {plates}"
            raise ValueError(outside_depends_on_inside(f"{name!r} ({role})", how))


def outside_depends_on_inside(site: Site | str, how: str) -> str:
    """What to say of a site outside of the local plates whose density varies with local particles.

    Arguments:
        site: the site, or its name and role.
        how: what can be seen of it.
    """
    return (
        f"The log density at site {site} {how}: the site lies outside of the plate and depends on a latent "
        "inside, so there is no local weight for each index of the plate. Move it into the plate, sample "
        "what it depends on outside (in the guide, latents outside of the plate come first), or use a bound "
        "with one joint weight (IWAE_ELBO, MIWAE_ELBO)."
    )


def _check_particle_dim(site: Site, traces: Traces, ids: frozenset[int]) -> None:
    """Refuse a log density with dims left of the particles' own: its particles are elsewhere."""
    dim, log_prob = traces.particle_dim, site.log_prob
    if dim is None or log_prob.dim() < -dim:
        return
    left = log_prob.dim() + dim - len(value_dims(site.message, log_prob, ids))
    left -= log_prob.shape[:dim].count(1) if ids else 0
    if left > 0 or log_prob.shape[dim] not in (1, traces.num_particles):
        raise ValueError(
            f"The log density at site {site} has shape {tuple(log_prob.shape)}, but under "
            f"{traces.num_particles} particles its leftmost dim should be {dim}, of size "
            f"{traces.num_particles}. Let the computation broadcast over leading dims (a latent outside "
            "the plates comes with a dim of size 1 for each: (X * w).sum(-1) for X @ w), declare the other "
            "batch dims by pyro.plate or .to_event(), or pass vectorize_particles=False."
        )
