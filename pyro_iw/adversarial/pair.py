r"""Codes and prior draws: what adversarial training takes from a model/guide pair.

The guide is run for its values alone, and none of its densities is evaluated. The model gives draws of its
prior, for which it is left as soon as its latent sites are drawn, and the log density of what it observes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor, nn

from ..tracing.batch_norm import watch_batch_norm
from ..tracing.handlers import GivenValues
from ..tracing.messages import (
    check_broadcasts,
    guide_messenger,
    has_no_density,
    is_auxiliary,
    latent_sites,
    sample_sites,
    unmasked,
)
from ..tracing.paths import class_name
from ..tracing.sites import Site
from ..tracing.traces import Pair

__all__ = ["Cells", "Prior", "Run", "observed_terms", "parameters", "run_guide", "run_pair"]


class Cells(NamedTuple):
    """Unmasked values of a site ``[cells, *event]``, and the features that go with them ``[cells, C]``."""

    values: Tensor
    features: Tensor | None

    @classmethod
    def read(cls, name: str, value: Tensor, drawn: Any, guided: Any, features: Tensor | None) -> Cells:
        """The cells of a site that neither model nor guide masks.

        Arguments:
            name: the site's name.
            value: its values.
            drawn: its message in the model.
            guided: its message in the guide.
            features: features ``[*batch, C]`` or what broadcasts to it.

        Raises:
            ValueError: if features or a mask do not broadcast to the batch shape.
        """
        batch = value.shape[: value.dim() - drawn["fn"].event_dim]
        values = value.reshape(math.prod(batch), *value.shape[len(batch) :])
        if features is not None:
            features = _flat_features(name, features, batch)
            if not features.is_floating_point() and value.is_floating_point():
                features = features.to(value.dtype)  # as of one_hot
        kept = unmasked(name, batch, (drawn, guided), value.device)
        if kept is not None:
            # Selected, though that waits for the device: what is masked is to be in no batch statistics.
            kept = kept.reshape(len(values))
            values = values[kept]
            features = None if features is None else features[kept]
        return cls(values, features)

    def detach(self) -> Cells:
        """The same without the graph."""
        return self._replace(values=self.values.detach())

    def cat(self, other: Cells) -> Cells:
        """These and others, in the others' dtype."""
        values = torch.cat([self.values.to(other.values.dtype), other.values])
        if self.features is None or other.features is None:
            return Cells(values, None)
        return Cells(values, torch.cat([self.features, other.features]))


class Prior(Messenger):
    """Draws latent sites from the model and leaves it once they are drawn: what follows is the decoder.

    Arguments:
        names: the sites.

    Attributes:
        sites: messages of the sample sites that were met, by name.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.sites: dict[str, Any] = {}
        self._missing = set(names)

    def run(self, pair: Pair) -> None:
        """Run the model; to its end, if it does not draw all of the sites."""
        try:
            with self:
                pair.model(*pair.args, **pair.kwargs)
        except _AllDrawn:
            pass

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self.sites[msg["name"]] = msg
        if not msg["is_observed"]:
            self._missing.discard(msg["name"])
        if not self._missing:
            raise _AllDrawn


class _AllDrawn(BaseException):
    """Leaves the model, past any ``except Exception`` of its own."""


class Run(NamedTuple):
    """What guide, prior and model gave.

    Attributes:
        guide_params: the guide's parameters by name, unconstrained.
        model_params: the model's.
        terms: minus the log density of every observed site of the model, scaled and summed; in nats.
        left_out: latent sites of the model that it drew itself, and that are not marked as auxiliary.
        prior: the prior's draws.
        features: features of the cells ``[*batch, C]``.
        real: the prior's cells by site.
        fake: the guide's.
    """

    guide_params: dict[str, Tensor]
    model_params: dict[str, Tensor]
    terms: dict[str, Tensor]
    left_out: list[str]
    prior: Prior
    features: Tensor | None
    real: dict[str, Cells]
    fake: dict[str, Cells]

    def again(self, pair: Pair) -> tuple[dict[str, Cells], dict[str, Tensor]]:
        """Cells of another run of the guide, and its parameters."""
        latents, params = run_guide(pair)
        _check_sites(self.prior, latents)
        cells = _read_cells(self.prior, latents, self.features)
        return cells, _guides_own(pair, params, self.model_params)


def run_pair(
    pair: Pair,
    choose: Callable[[Mapping[str, Any]], Collection[str]],
    condition: Callable[..., Tensor] | None = None,
) -> Run:
    """Run guide, prior and model once.

    Arguments:
        pair: the pair and its arguments.
        choose: given the guide's latent sites, the names of those to draw from the prior.
        condition: function of the arguments that returns features ``[*batch, C]``.

    Raises:
        ValueError: if the sites of both do not match, no gradient flows through one of the guide's, or the
            model observes nothing; naming the site.
        NotImplementedError: if a latent site is marked to be enumerated.
    """
    latents, guide_params = run_guide(pair)
    prior = Prior(choose(latents))
    with torch.no_grad(), watch_batch_norm(restore=True):
        prior.run(pair)
        features = None if condition is None else _check_features(condition(*pair.args, **pair.kwargs))
    _check_sites(prior, latents)
    if torch.is_grad_enabled():
        _check_gradients(prior, latents)
    real = _read_cells(prior, latents, features, of_prior=True)
    fake = _read_cells(prior, latents, features)
    with GivenValues({name: site["value"] for name, site in latents.items()}):
        trace = poutine.trace(pair.model).get_trace(*pair.args, **pair.kwargs)
    _check_regularised(prior.names, latents, latent_sites(trace))  # now also of what comes after the prior
    _check_decoders_own(trace, latents, prior.sites)
    terms = observed_terms(trace, "model")
    if not terms:
        raise ValueError(
            "The model has no observed site, so there is nothing to reconstruct. Pass the data as obs= of a "
            "pyro.sample statement."
        )
    model_params = parameters(trace)
    return Run(
        guide_params=_guides_own(pair, guide_params, model_params),
        model_params=model_params,
        terms=terms,
        left_out=_left_out(trace, latents),
        prior=prior,
        features=features,
        real=real,
        fake=fake,
    )


def run_guide(pair: Pair) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Messages of the guide's latent sites, and the unconstrained parameters met on the way, by name."""
    messenger = guide_messenger(pair.guide)
    if messenger is None:
        trace = poutine.trace(pair.guide).get_trace(*pair.args, **pair.kwargs)
        return latent_sites(trace), parameters(trace)
    with poutine.trace(param_only=True) as capture:
        pair.guide(*pair.args, **pair.kwargs)
    return latent_sites(messenger.trace), parameters(capture.trace)


def parameters(trace: Any) -> dict[str, Tensor]:
    """Unconstrained parameters of a trace by name."""
    return {
        name: site["value"].unconstrained() for name, site in trace.nodes.items() if site["type"] == "param"
    }


def observed_terms(trace: Any, role: str) -> dict[str, Tensor]:
    """Minus the log density of every observed site, scaled, masked and summed; in nats.

    Arguments:
        trace: the trace.
        role: what it is of, for the errors.

    Raises:
        ValueError: if a density cannot be evaluated, or has another shape than plates and mask say.
    """
    terms = {}
    for name, site in sample_sites(trace).items():
        if not site["is_observed"] or has_no_density(site):
            continue
        log_prob = Site.read(role, name, site, 0).log_prob
        if is_validation_enabled():
            nesting: Any = math.inf
            check_site_shape({**site, "log_prob": log_prob}, nesting)
        for kind in ("mask", "scale"):
            if isinstance(site[kind], Tensor):
                check_broadcasts(kind, name, site[kind].shape, log_prob.shape)
        terms[name] = -scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
    return terms


def _guides_own(pair: Pair, met: dict[str, Tensor], models: Collection[str]) -> dict[str, Tensor]:
    """The guide's parameters; a guide messenger has met the model's as well, which it runs."""
    if guide_messenger(pair.guide) is None:
        return met
    return {name: param for name, param in met.items() if name not in models}


def _read_cells(
    prior: Prior, latents: Mapping[str, Any], features: Tensor | None, of_prior: bool = False
) -> dict[str, Cells]:
    """The guide's cells or the prior's, by site."""
    cells = {}
    for name in prior.names:
        drawn, guided = prior.sites[name], latents[name]
        value = (drawn if of_prior else guided)["value"]
        cells[name] = Cells.read(name, value, drawn, guided, features)
    return cells


def _check_features(features: Any) -> Tensor:
    """What condition has returned, as features."""
    if not isinstance(features, Tensor) or not features.dim():
        kind = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"condition has to return a tensor [*batch, C], got {kind}.")
    if not features.is_floating_point() and features.dim() == 1:
        raise ValueError(
            f"condition has to return features [*batch, C], but {features.dtype} of shape "
            f"{tuple(features.shape)} seems to be ids of classes: return torch.nn.functional.one_hot of them."
        )
    return features


def _flat_features(name: str, features: Tensor, batch: torch.Size) -> Tensor:
    """Features ``[cells, C]``."""
    size = features.shape[-1]
    check_broadcasts("result of condition, but for its last dim,", name, features.shape[:-1], batch)
    return features.expand(*batch, size).reshape(math.prod(batch), size)


def _left_out(trace: Any, latents: Collection[str]) -> list[str]:
    """Latent sites that the model draws itself, without being marked for that."""
    found = []
    for name, site in latent_sites(trace).items():
        if name in latents:
            continue
        _check_enumerated(name, site, "model")
        # What obs_mask= makes of a site: its missing entries, which count nowhere.
        missing = name.endswith("_unobserved") and name[: -len("_unobserved")] in trace.nodes
        if not is_auxiliary(site) and not missing:
            found.append(name)
    return found


def _check_sites(prior: Prior, latents: Mapping[str, Any]) -> None:
    """Refuse latents of prior and guide that do not match."""
    sites, names = prior.sites, prior.names
    drawn = [name for name, site in sites.items() if not site["is_observed"]]
    known = f"Latent sites of the model: {drawn}; of the guide: {list(latents)}."
    for name in names:
        where = f"A discriminator is given for site {name!r}, which "
        if name not in sites and name not in latents:
            raise ValueError(f"{where}is neither in the model nor in the guide. {known}")
        if name not in sites:
            raise ValueError(
                f"{where}the guide has but not the model, so there is no prior to draw from. {known}"
            )
        if sites[name]["is_observed"]:
            raise ValueError(
                f"{where}is observed in the model; only latent sites have codes to compare. {known}"
            )
        if name not in latents:
            raise ValueError(f"{where}the model has but not the guide, so it has no codes. {known}")
    for name, guided in latents.items():
        _check_enumerated(name, guided, "guide")
        if name in names:
            _check_enumerated(name, sites[name], "model")
            _check_shapes(name, guided, sites[name])
    _check_regularised(names, latents, sites)


def _check_regularised(names: Collection[str], latents: Mapping[str, Any], sites: Collection[str]) -> None:
    """Refuse latents of the guide that have no discriminator, unless they are noise that only it has."""
    for name, guided in latents.items():
        if name not in names and (name in sites or not is_auxiliary(guided)):
            raise ValueError(
                f"Latent site {name!r} of the guide has no discriminator, so nothing keeps it near its "
                f"prior. Give it one: discriminators={{{name!r}: ...}}; a site of mere noise, that the "
                "model does not have, is to be marked infer={'is_auxiliary': True}."
            )


def _check_enumerated(name: str, site: Any, role: str) -> None:
    if site["infer"].get("enumerate"):
        raise NotImplementedError(
            f"Site {name!r} of the {role} is to be enumerated, but adversarial training draws every latent. "
            "Remove its infer={'enumerate': ...}. In place of a OneHotCategorical the guide can give "
            "Delta(softmax(logits), event_dim=1); a site that only the model has is drawn from it."
        )


def _check_shapes(name: str, guided: Any, drawn: Any) -> None:
    codes, draws = (
        f"{tuple(site['value'].shape)} with {site['fn'].event_dim} event dim(s)" for site in (guided, drawn)
    )
    if codes != draws:
        raise ValueError(
            f"At site {name!r} the guide's values have shape {codes}, the prior's draws {draws}. Both have "
            "to agree: look at .to_event(), Delta(..., event_dim=...) and the plates around the site."
        )


def _check_gradients(prior: Prior, latents: Mapping[str, Any]) -> None:
    """Refuse guide sites through which no gradient flows."""
    for name, site in latents.items():
        fn = site["fn"]
        where = f"No gradient flows through the values of site {name!r} of the guide: "
        if not getattr(fn, "has_rsample", False) and _is_learnt(fn):
            raise ValueError(
                f"{where}{class_name(fn)} is not reparameterised. Use Delta(probabilities, event_dim=1) for "
                "a deterministic guide with soft values, RelaxedOneHotCategorical, or "
                "OneHotCategoricalStraightThrough."
            )
        if name in prior.names and not site["value"].requires_grad:
            raise ValueError(
                f"{where}they depend on no parameter that requires one. Was a network frozen, detached or "
                "run under no_grad?"
            )


def _check_decoders_own(trace: Any, latents: Collection[str], before: Collection[str]) -> None:
    """Refuse draws of the decoder's own that hold up the gradient of what they are drawn from."""
    for name, site in latent_sites(trace).items():
        fn = site["fn"]
        own = name not in latents and name not in before
        if own and not getattr(fn, "has_rsample", False) and _is_learnt(fn):
            raise ValueError(
                f"No gradient flows through site {name!r} of the model, which it draws itself: "
                f"{class_name(fn)} is not reparameterised, so what it depends on would not learn. Give the "
                "site to the guide, with a discriminator, or sum it out in the likelihood "
                "(MixtureSameFamily)."
            )


def _is_learnt(value: Any) -> bool:
    """Whether a distribution, or a part of one, has parameters that require gradients."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, nn.Module) and any(param.requires_grad for param in value.parameters()):
        return True
    parts: Iterable[Any] = ()
    if isinstance(value, (list, tuple)):
        parts = value
    elif isinstance(value, (torch.distributions.Distribution, torch.distributions.Transform)):
        parts = vars(value).values()
    return any(map(_is_learnt, parts))
