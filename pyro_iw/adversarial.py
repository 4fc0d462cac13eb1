r"""Adversarial autoencoders: a discriminator in place of the KL term, for the same model/guide pairs.

The ELBO pays for codes that are unlikely under the prior, one datapoint at a time, and needs the guide's density
for it. Here a discriminator per latent site learns to tell the guide's codes from draws of the model's prior,
and the guide learns to fool it, so that the *aggregated* posterior
:math:`q(z) = E_{x}[q_\phi(z \mid x)]` goes to the prior :math:`p(z)`. Of the guide nothing but samples is
needed, of the model its prior (to draw from) and its likelihood.

References:
    | Adversarial Autoencoders (Makhzani et al., 2015), https://arxiv.org/abs/1511.05644
    | Generative Adversarial Networks (Goodfellow et al., 2014), https://arxiv.org/abs/1406.2661
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.optim import PyroOptim
from pyro.params.param_store import param_with_module_name
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor, nn
from torch.nn.functional import softplus

from .probe import watch_batch_norm
from .random_state import RandomState
from .sites import Site
from .traces import OneMinibatch
from .warn import warn

__all__ = ["AdversarialLosses", "AdversarialSVI"]

# What a discriminator that does not fit its values may raise; an error of any other type goes on as it is.
_MISFIT = (ValueError, RuntimeError, IndexError, TypeError, AssertionError)


class AdversarialLosses(NamedTuple):
    r"""The losses of a step's phases.

    Attributes:
        reconstruction: :math:`-\sum \log p(x \mid z)` in nats, scaled as the losses of ``SVI`` are.
        discriminator: by site, in nats per cell, the two-class cross-entropy, summed over the means of both
            classes; :math:`2 \log 2 \approx 1.386` where codes and prior cannot be told apart.
        guide: by site, in nats per cell, :math:`-\log \sigma(D(z))` of the guide's codes;
            :math:`\log 2 \approx 0.693` where they cannot be told apart.
        supervised: :math:`-\sum \log p(y \mid x)` in nats; None without that phase.
    """

    reconstruction: float
    discriminator: dict[str, float]
    guide: dict[str, float]
    supervised: float | None


class AdversarialSVI:
    r"""Trains a model/guide pair as an adversarial autoencoder, in the manner of :class:`~pyro.infer.SVI`.

    A step goes through phases, each with an optimiser and parameters of its own:

    1. *Reconstruction* updates guide and model to minimise :math:`-\log p_\theta(x \mid z)`, the observed sites
       (and factors) of the model, with latents from the guide.
    2. *Discriminators*, updated alone, minimise
       :math:`E_{z \sim p}[\mathrm{softplus}(-D(z))] + E_{z \sim q}[\mathrm{softplus}(D(z))]`. The draws from
       :math:`p` come from the model itself, one a cell, on the same arguments. At its optimum
       :math:`D(z) = \log p(z) / q(z)`.
    3. *The guide*, updated alone, minimises :math:`E_{z \sim q}[\mathrm{softplus}(-D(z))]`, which unlike
       :math:`-E_{z \sim q}[\mathrm{softplus}(D(z))]` has gradients also where the discriminator wins
       ("non-saturating").
    4. *Supervised*, if given: minimises :math:`-\log` of the observed sites of a further Pyro function and
       updates the parameters it uses.

    Cells are the entries of a latent site's batch shape; masked ones take no part. The terms of the
    adversarial phases are means over cells, whatever ``poutine.scale`` and subsampling say; phases 1 and 4 are
    sums, with scales and masks, as in ``SVI``. Gradients are taken for the phase's own parameters alone, and
    none stay in ``.grad``. The prior's own parameters, if any, are in none of the phases.

    In phase 2 the discriminators are in train mode, in phase 3 in eval mode. Guide and model stay in the mode
    they are in; running statistics of their batch normalisation follow from phase 1 (and 4) alone.

    References:
        | Adversarial Autoencoders (Makhzani et al., 2015), https://arxiv.org/abs/1511.05644

    Arguments:
        model: the model. Its latent sites that the guide leaves out (a mixture's component) are drawn from it,
            with a warning unless they are marked ``infer={"is_auxiliary": True}``.
        guide: the guide, of which only samples are used: reparameterised (``Normal``), deterministic
            (``Delta(f(x), event_dim=1)``; also ``Delta(softmax(logits), event_dim=1)`` for a one-hot site of
            the model), or implicit: a ``Delta`` of a function of a noise site that is marked
            ``infer={"is_auxiliary": True}``.
        discriminators: a module for every latent site that both share, by name; a module alone where there is
            one such site. It takes values ``[cells, *event_shape]`` and returns logits, ``[cells]`` or
            ``[cells, 1]``, positive for "from the prior". Its parameters are in the param store as under
            ``pyro.module("discriminator.<site>", ...)``.
        optim: Pyro optimiser of phase 1; unused so far.
        discriminator_optim: that of phase 2; by default, as for those below, a copy of ``optim``.
        guide_optim: that of phase 3.
        supervised: Pyro function with observed sites, called with ``labelled``.
        supervised_optim: its optimiser.
        condition: function of the arguments of model and guide that returns features ``[*batch, C]``, which
            the discriminators get as a second argument ``[cells, C]``; say one-hot labels, with one class more
            for "unlabelled", where the model's prior knows the labels.

    Raises:
        ValueError: if there is no discriminator or an argument is not of the kind described.

    Example:
        >>> discriminator = torch.nn.Sequential(
        ...     torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)
        ... )
        >>> svi = AdversarialSVI(model, guide, discriminator, Adam({"lr": 1e-3}))
        >>> losses = svi.step(data)
        >>> sorted(losses.discriminator), losses.supervised
        (['z'], None)
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        discriminators: Mapping[str, nn.Module] | nn.Module,
        optim: PyroOptim,
        *,
        discriminator_optim: PyroOptim | None = None,
        guide_optim: PyroOptim | None = None,
        supervised: Callable | None = None,
        supervised_optim: PyroOptim | None = None,
        condition: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model = model
        self.guide = guide
        self.supervised = supervised
        self.condition = condition
        if supervised is None and supervised_optim is not None:
            raise ValueError("supervised_optim is given without supervised, so it has nothing to update.")
        #: The discriminators by site; None while a module alone waits for the first step to name its site.
        self.discriminators: dict[str, nn.Module] | None = _by_site(discriminators)
        self._alone = discriminators if self.discriminators is None else None
        optims = {
            "optim": optim,
            "discriminator_optim": discriminator_optim,
            "guide_optim": guide_optim,
            "supervised_optim": supervised_optim,
        }
        _check_optims(optims)
        self.optim = optim
        self.discriminator_optim: PyroOptim = discriminator_optim or copy.deepcopy(optim)
        self.guide_optim: PyroOptim = guide_optim or copy.deepcopy(optim)
        self.supervised_optim: PyroOptim | None = None
        if supervised is not None:
            self.supervised_optim = supervised_optim or copy.deepcopy(optim)
        self._tried: dict[str, Any] = {}
        self._tried_supervised = False
        self._warned = False

    def step(self, *args: Any, labelled: Sequence[Any] | None = None, **kwargs: Any) -> AdversarialLosses:
        """All phases once.

        What can be checked is checked before the first of them updates anything.

        Arguments:
            args: positional arguments of model, guide and ``condition``.
            labelled: arguments of ``supervised``; without them that phase is left out.
            kwargs: further keyword arguments of model, guide and ``condition``.

        Returns:
            The losses, each before the update of its own phase.

        Raises:
            ValueError: if a site, a discriminator or a loss is not as it has to be, naming it.
            NotImplementedError: if a latent site is marked to be enumerated.
        """
        self._check_labelled(labelled)
        call = _Call(args, kwargs)
        with OneMinibatch():
            run = self._run(call)
            self._try_discriminators(run)
            if labelled is not None and not self._tried_supervised:
                self._try_supervised(labelled)
            _check_finite("reconstruction", run.terms)
            _update(self.optim, _total(run.terms), {**run.guide_params, **run.model_params})

            with watch_batch_norm(restore=True):
                latents, guide_params = self._run_guide(call)
            _check_sites(self._known(), latents, run.prior)
            fake = run.read(latents)

        with self._discriminators_in_mode(True):
            discriminator = self._discriminator_losses(
                run.real, {name: c.detach() for name, c in fake.items()}
            )
        _check_finite("discriminator", discriminator)
        _update(self.discriminator_optim, _total(discriminator), self._register())
        with self._discriminators_in_mode(False):
            guide = self._guide_losses(fake)
        _check_finite("guide", guide)
        if isinstance(poutine.unwrap(self.guide), GuideMessenger):  # it runs the model as well
            guide_params = {
                name: guide_params[name] for name in guide_params.keys() - run.model_params.keys()
            }
        _update(self.guide_optim, _total(guide), guide_params)

        supervised: dict[str, Tensor] | None = None
        if labelled is not None:
            supervised, params = self._run_supervised(labelled)
            _check_finite("supervised", supervised)
            assert self.supervised_optim is not None
            _update(self.supervised_optim, _total(supervised), params)
        return _report(run.terms, discriminator, guide, supervised)

    def evaluate_loss(
        self, *args: Any, labelled: Sequence[Any] | None = None, **kwargs: Any
    ) -> AdversarialLosses:
        """The losses with all modules in eval mode; nothing is updated.

        Arguments:
            args: as in :meth:`step`.
            labelled: likewise.
            kwargs: likewise.

        Raises:
            ValueError: likewise.
            NotImplementedError: likewise.
        """
        self._check_labelled(labelled)
        fns = [self.model, self.guide, self.supervised, self.condition]
        with torch.no_grad(), _eval_mode(fns):
            with OneMinibatch():
                run = self._run(_Call(args, kwargs))
            discriminator = self._discriminator_losses(run.real, run.fake)
            guide = self._guide_losses(run.fake)
            supervised = None if labelled is None else self._run_supervised(labelled)[0]
        return _report(run.terms, discriminator, guide, supervised)

    def get_state(self) -> dict[str, Any]:
        """The states of the optimisers by phase, for a checkpoint beside the param store's.

        As with an optimiser's own, tensors in it are those at work.
        """
        return {
            phase: {**optim._state_waiting_to_be_consumed, **optim.get_state()}
            for phase, optim in self._optims().items()
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`get_state` gave.

        Raises:
            ValueError: if the state has other phases than this.
        """
        optims = self._optims()
        if state.keys() != optims.keys():
            raise ValueError(f"The state is for the phases {sorted(state)}, this has {sorted(optims)}.")
        for phase, optim in optims.items():
            # Pyro's reads a state for parameters that it has not met yet, and leaves the others as they are.
            state_now = {**optim._state_waiting_to_be_consumed, **optim.get_state(), **state[phase]}
            optim.optim_objs.clear()
            optim.set_state(state_now)

    def _optims(self) -> dict[str, PyroOptim]:
        optims = {
            "reconstruction": self.optim,
            "discriminators": self.discriminator_optim,
            "guide": self.guide_optim,
        }
        if self.supervised_optim is not None:
            optims["supervised"] = self.supervised_optim
        return optims

    def _run(self, call: _Call) -> _Run:
        """Guide, prior and model once, checked."""
        latents, guide_params = self._run_guide(call)
        discriminators = self._name_discriminators(latents)
        prior = _Prior(discriminators)
        with torch.no_grad(), watch_batch_norm(restore=True):
            prior.run(self.model, call)
            features = None if self.condition is None else self.condition(*call.args, **call.kwargs)
        _check_sites(discriminators, latents, prior)
        if torch.is_grad_enabled():
            _check_gradients(discriminators, latents)
        replay = _Replay({name: site["value"] for name, site in latents.items()})
        with replay:
            trace, model_params = _trace(self.model, call)
        self._check_left_out(trace, latents)
        terms = _observed_terms(trace, "model")
        if not terms:
            raise ValueError(
                "The model has no observed site, so there is nothing to reconstruct. Pass the data as obs= of a "
                "pyro.sample statement."
            )
        run = _Run(guide_params, model_params, terms, prior, features)
        return run._replace(real=run.read(prior.sites), fake=run.read(latents))

    def _run_guide(self, call: _Call) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The guide's latent sites, and the parameters met on the way, by name."""
        messenger = poutine.unwrap(self.guide)
        if not isinstance(messenger, GuideMessenger):
            trace, params = _trace(self.guide, call)
            return _latents(trace), params
        with poutine.trace(param_only=True) as capture:
            self.guide(*call.args, **call.kwargs)
        return _latents(messenger.trace), _params(capture.trace)

    def _name_discriminators(self, latents: Mapping[str, Any]) -> dict[str, nn.Module]:
        """The discriminators by site; one alone goes to the guide's only site."""
        if self.discriminators is None:
            names = [name for name, site in latents.items() if not site["infer"].get("is_auxiliary")]
            if len(names) != 1:
                raise ValueError(
                    f"One discriminator is given, but the guide has {len(names)} latent sites {names}. Give a "
                    "dict with a discriminator for each (sites of mere noise are to be marked "
                    "infer={'is_auxiliary': True})."
                )
            assert isinstance(self._alone, nn.Module)
            self.discriminators = {names[0]: self._alone}
        return self.discriminators

    def _check_left_out(self, trace: Any, latents: Mapping[str, Any]) -> None:
        """Warn once of latents that the model draws itself."""
        left_out = []
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site) or name in latents:
                continue
            _check_enumerated(name, site, "model")
            # What obs_mask= makes of a site: its missing entries, which count nowhere.
            missing = name.endswith("_unobserved") and name[: -len("_unobserved")] in trace.nodes
            if not site["infer"].get("is_auxiliary") and not missing:
                left_out.append(name)
        if left_out and not self._warned:
            self._warned = True
            warn(
                f"Found latent sites in the model but not in the guide: {left_out}. They are drawn from the "
                "model in every phase. If that is meant, mark them infer={'is_auxiliary': True}."
            )

    def _try_discriminators(self, run: _Run) -> None:
        """Call them on values of a new kind, so that none fails when other parameters are updated already."""
        for name, discriminator in self._known().items():
            cells = run.fake[name].detach()
            features = None if cells.features is None else cells.features.shape[1:]
            kind = cells.values.shape[1:], cells.values.dtype, cells.values.device, features
            if self._tried.get(name) == kind or not len(cells.values):
                continue
            state = RandomState.now()
            with torch.enable_grad(), self._discriminators_in_mode(False):
                logits = self._logits(name, cells._replace(values=cells.values.requires_grad_()))
            state.restore()
            if _is_sigmoid(logits):
                raise ValueError(
                    f"The discriminator of site {name!r} ({type(discriminator).__name__}) ends in a sigmoid, but "
                    "it has to return logits: leave the sigmoid out."
                )
            self._tried[name] = kind

    def _try_supervised(self, labelled: Sequence[Any]) -> None:
        state = RandomState.now()
        with torch.no_grad(), watch_batch_norm(restore=True):
            self._run_supervised(labelled)
        state.restore()
        self._tried_supervised = True

    def _run_supervised(self, labelled: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert self.supervised is not None
        trace, params = _trace(self.supervised, _Call(tuple(labelled), {}))
        terms = _observed_terms(trace, "supervised")
        if not terms:
            raise ValueError(
                "supervised has no observed site. Pass the labels as obs= of a pyro.sample statement."
            )
        return terms, params

    def _check_labelled(self, labelled: Any) -> None:
        if labelled is None:
            return
        if self.supervised is None:
            raise ValueError("labelled= is given, but no supervised= function to use it in.")
        if not isinstance(labelled, (tuple, list)):
            raise ValueError(
                f"labelled has to be a tuple of the arguments of supervised, got {type(labelled).__name__}."
            )

    def _known(self) -> dict[str, nn.Module]:
        assert self.discriminators is not None
        return self.discriminators

    @contextmanager
    def _discriminators_in_mode(self, train: bool) -> Iterator[None]:
        modes = [(m, m.training) for d in self._known().values() for m in d.modules()]
        try:
            for discriminator in self._known().values():
                discriminator.train(train)
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    def _register(self) -> dict[str, Tensor]:
        """The discriminators' parameters by their name in the param store."""
        params = {}
        for site, discriminator in self._known().items():
            for name, param in discriminator.named_parameters():
                if not param.requires_grad:
                    continue
                full = param_with_module_name(f"discriminator.{site}", name)
                params[full] = pyro.param(full, param).unconstrained()
                if params[full] is not param:
                    raise ValueError(
                        f"The param store has another parameter {full!r} than that of the discriminator of "
                        f"site {site!r}. If it is of an earlier run, call pyro.clear_param_store() first; if it "
                        f"was loaded, pyro.module('discriminator.{site}', discriminator, "
                        "update_module_params=True) puts it into the module."
                    )
        return params

    def _discriminator_losses(
        self, real: Mapping[str, _Cells], fake: Mapping[str, _Cells]
    ) -> dict[str, Tensor]:
        losses = {}
        for name in self._known():
            # In one call: batch normalisation shall see both classes in one batch, else it shifts each to mean 0
            # and so takes away by what they differ.
            logits = self._logits(name, real[name].cat(fake[name]))
            of_real, of_fake = logits.split([len(real[name].values), len(fake[name].values)])
            losses[name] = _mean(softplus(-of_real)) + _mean(softplus(of_fake))
        return losses

    def _guide_losses(self, fake: Mapping[str, _Cells]) -> dict[str, Tensor]:
        return {name: _mean(softplus(-self._logits(name, fake[name]))) for name in self._known()}

    def _logits(self, name: str, cells: _Cells) -> Tensor:
        """A discriminator's logits, ``[cells]``."""
        values, features = cells
        if not len(values):  # all masked, and not every module takes an empty batch
            return values.reshape(0)
        args = (values,) if features is None else (values, features)
        shapes = ", ".join(str(tuple(arg.shape)) for arg in args)
        try:
            logits = self._known()[name](*args)
        except Exception as error:
            # Running out of memory is none of its faults.
            if type(error) not in _MISFIT or "allocate memory" in str(error):
                raise
            hint = "" if values.dim() > 1 else " (nn.Unflatten(0, (-1, 1)) makes features of a scalar site)"
            raise ValueError(
                f"The discriminator of site {name!r} failed on values of shape {shapes}{hint} with "
                f"{type(error).__name__}: {error}"
            ) from error
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if shape not in ((len(values),), (len(values), 1)):
            raise ValueError(
                f"The discriminator of site {name!r} has to return one logit a cell, of shape ({len(values)},) or "
                f"({len(values)}, 1) for values of shape {shapes}, but it returned {shape}."
            )
        return logits.reshape(len(values))


class _Call(NamedTuple):
    """Arguments."""

    args: tuple
    kwargs: dict[str, Any]


class _Cells(NamedTuple):
    """Unmasked values of a site ``[cells, *event]``, and the features that go with them ``[cells, C]``."""

    values: Tensor
    features: Tensor | None

    @classmethod
    def read(cls, name: str, site: Any, event_dim: int, features: Tensor | None) -> _Cells:
        """The cells of a site."""
        value = site["value"]
        batch = value.shape[: value.dim() - event_dim]
        values = value.reshape(math.prod(batch), *value.shape[len(batch) :])
        if features is not None:
            try:
                features = features.expand(*batch, features.shape[-1]).reshape(
                    len(values), features.shape[-1]
                )
            except (RuntimeError, IndexError, AttributeError) as error:
                shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(
                    f"condition has to return a tensor [*batch, C] with the batch shape {tuple(batch)} of site "
                    f"{name!r}, got {shape}."
                ) from error
        kept = None
        for mask in (site["mask"], getattr(site["fn"], "_mask", None)):
            if mask is None or mask is True:
                continue
            mask = torch.as_tensor(mask, dtype=torch.bool, device=value.device)
            try:
                mask = mask.expand(batch).reshape(len(values))
            except RuntimeError as error:
                raise ValueError(
                    f"The mask at site {name!r} has shape {tuple(mask.shape)}, which does not broadcast to the "
                    f"site's batch shape {tuple(batch)}. Mask over the dims of the plates around the site."
                ) from error
            kept = mask if kept is None else kept & mask
        if kept is not None:
            # Selected, for all that it costs a synchronisation: what is masked is to be in no batch statistics.
            values = values[kept]
            features = None if features is None else features[kept]
        return cls(values, features)

    def detach(self) -> _Cells:
        return self._replace(values=self.values.detach())

    def cat(self, other: _Cells) -> _Cells:
        """These and others."""
        values = torch.cat([self.values.to(other.values.dtype), other.values])
        if self.features is None or other.features is None:
            return _Cells(values, None)
        return _Cells(values, torch.cat([self.features, other.features]))


class _Run(NamedTuple):
    """What guide, prior and model gave.

    Attributes:
        guide_params: parameters that the guide met.
        model_params: parameters that the model met.
        terms: minus the log density of every observed site, scaled and summed.
        prior: the prior's draws.
        features: what ``condition`` returned.
        real: the prior's cells by site.
        fake: the guide's.
    """

    guide_params: dict[str, Tensor]
    model_params: dict[str, Tensor]
    terms: dict[str, Tensor]
    prior: _Prior
    features: Tensor | None
    real: dict[str, _Cells] = {}  # noqa: RUF012 - never written to
    fake: dict[str, _Cells] = {}  # noqa: RUF012

    def read(self, sites: Mapping[str, Any]) -> dict[str, _Cells]:
        """The cells of the sites that have a discriminator."""
        return {
            name: _Cells.read(name, sites[name], self.prior.sites[name]["fn"].event_dim, self.features)
            for name in self.prior.names
        }


class _AllDrawn(Exception):
    """Leaves the model."""


class _Prior(Messenger):
    """Draws latent sites from the model, which is left once it has drawn them: what follows is the decoder.

    Arguments:
        names: the sites.

    Attributes:
        sites: messages of the sample sites so far, by name.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.sites: dict[str, Any] = {}
        self._missing = set(names)

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self.sites[msg["name"]] = msg
        if not msg["is_observed"]:
            self._missing.discard(msg["name"])
        if not self._missing:
            raise _AllDrawn

    def run(self, model: Callable, call: _Call) -> None:
        try:
            with self:
                model(*call.args, **call.kwargs)
        except _AllDrawn:
            pass


class _Replay(Messenger):
    """Puts values in, as ``poutine.replay`` does, but leaves a site's ``infer`` its own."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


def _trace(fn: Callable, call: _Call) -> tuple[Any, dict[str, Tensor]]:
    """A function's trace, and its parameters by name."""
    trace = poutine.trace(fn).get_trace(*call.args, **call.kwargs)
    return trace, _params(trace)


def _params(trace: Any) -> dict[str, Tensor]:
    """Unconstrained parameters by name."""
    return {
        name: site["value"].unconstrained() for name, site in trace.nodes.items() if site["type"] == "param"
    }


def _latents(trace: Any) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def _observed_terms(trace: Any, role: str) -> dict[str, Tensor]:
    """Minus the log density of every observed site, scaled and summed."""
    terms = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or site_is_subsample(site):
            continue
        if site["mask"] is False or getattr(site["fn"], "_mask", None) is False:
            continue  # for the record only, as pyro.deterministic
        log_prob = Site.read(role, name, site, 0).log_prob
        if is_validation_enabled():
            check_site_shape({**site, "log_prob": log_prob}, math.inf)
        scored = scale_and_mask(log_prob, site["scale"], site["mask"])
        if scored.numel() != log_prob.numel():
            raise ValueError(
                f"Scale and mask at site {name!r} ({role}) do not broadcast to the site's batch shape "
                f"{tuple(log_prob.shape)}. Mask over the dims of the plates around the site."
            )
        terms[name] = -scored.sum()
    return terms


def _mean(losses: Tensor) -> Tensor:
    """The mean, 0 where all is masked."""
    return losses.sum() / max(len(losses), 1)


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return functools.reduce(torch.add, losses.values())


def _update(optim: PyroOptim, loss: Tensor, params: Mapping[str, Tensor]) -> None:
    """Step parameters, and these alone: no other tensor's ``.grad`` is touched."""
    leaves = list({id(param): param for param in params.values() if param.requires_grad}.values())
    if not leaves or not loss.requires_grad:
        return
    moved = []
    try:
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
            if grad is not None:
                leaf.grad = grad
                moved.append(leaf)
        optim(moved)
    finally:
        for leaf in moved:
            leaf.grad = None


def _check_finite(phase: str, losses: Mapping[str, Tensor]) -> None:
    """Refuse a loss before its update, where to look at it does not hold up a device."""
    for site, loss in losses.items():
        if loss.device.type == "cpu":
            _refuse_infinite(phase, site, loss.item())


def _refuse_infinite(phase: str, site: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"The {phase} loss at site {site!r} is {loss}. Look for it in the data, or for parameters that "
            "have grown without bound (a smaller learning rate, clip_args of the optimiser)."
        )


def _report(
    reconstruction: Mapping[str, Tensor],
    discriminator: Mapping[str, Tensor],
    guide: Mapping[str, Tensor],
    supervised: Mapping[str, Tensor] | None,
) -> AdversarialLosses:
    """All losses as numbers, in one transfer from the device."""
    phases = {"reconstruction": reconstruction, "discriminator": discriminator, "guide": guide}
    phases["supervised"] = supervised or {}
    tensors = [loss.detach() for losses in phases.values() for loss in losses.values()]
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    device = tensors[0].device
    numbers = iter(torch.stack([tensor.to(device, dtype) for tensor in tensors]).tolist())
    found = {phase: {site: next(numbers) for site in losses} for phase, losses in phases.items()}
    for phase, values in found.items():
        for site, value in values.items():
            _refuse_infinite(phase, site, value)
    return AdversarialLosses(
        sum(found["reconstruction"].values()),
        found["discriminator"],
        found["guide"],
        None if supervised is None else sum(found["supervised"].values()),
    )


@contextmanager
def _eval_mode(fns: Collection[Any]) -> Iterator[None]:
    """All modules in eval mode: those that the functions are or belong to, and any that are called."""
    switched = []

    def switch(module: nn.Module, _: Any = None) -> None:
        if module.training:
            switched.append(module)
            module.training = False

    for fn in fns:
        fn = poutine.unwrap(fn)
        owner = getattr(fn, "__self__", fn)
        for module in owner.modules() if isinstance(owner, nn.Module) else ():
            switch(module)
    hook = nn.modules.module.register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        hook.remove()
        for module in switched:
            module.training = True


def _is_sigmoid(logits: Tensor) -> bool:
    """Whether a tensor has just come out of a sigmoid, but for its shape."""
    node: Any = logits.grad_fn
    while node is not None and node.name().startswith(("View", "Squeeze", "Reshape", "UnsafeView", "Select")):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(("Sigmoid", "LogSigmoid"))


def _by_site(discriminators: Any) -> dict[str, nn.Module] | None:
    """The discriminators by site; None if there is one alone."""
    if isinstance(discriminators, nn.Module) and not isinstance(discriminators, nn.ModuleDict):
        return None
    if not isinstance(discriminators, (Mapping, nn.ModuleDict)) or not len(discriminators):
        raise ValueError(
            "discriminators has to be a module, or a dict of modules by latent site with at least one entry, "
            f"got {discriminators!r}."
        )
    for name, discriminator in discriminators.items():
        if not isinstance(discriminator, nn.Module):
            raise ValueError(
                f"The discriminator of site {name!r} has to be a torch.nn.Module, got "
                f"{type(discriminator).__name__}."
            )
    return dict(discriminators.items())


def _check_optims(optims: Mapping[str, Any]) -> None:
    names: dict[int, str] = {}
    for name, optim in optims.items():
        if optim is None:
            continue
        if not isinstance(optim, PyroOptim):
            raise ValueError(f"{name} has to be an optimiser of pyro.optim, got {type(optim).__name__}.")
        other = names.setdefault(id(optim), name)
        if other != name:
            raise ValueError(
                f"{other} and {name} are the same optimiser. The phases have different losses, so each needs "
                "moments of its own: give each an optimiser, or leave it out to have a copy made."
            )
    optim = optims["optim"]
    if (
        optim.optim_objs
        or getattr(optim, "optimizer", None) is not None
        or optim._state_waiting_to_be_consumed
    ):
        raise ValueError(
            "optim has a state already, which is none of the other phases'. Give an unused one; set_state of "
            "AdversarialSVI takes up a saved state."
        )


def _check_enumerated(name: str, site: Any, role: str) -> None:
    if site["infer"].get("enumerate"):
        raise NotImplementedError(
            f"Site {name!r} of the {role} is to be enumerated, but adversarial training draws every latent. Remove "
            "its infer={'enumerate': ...}; the guide can give the probabilities as "
            "Delta(softmax(logits), event_dim=1) for a OneHotCategorical, and a site that only the model has is "
            "drawn from it."
        )


def _check_sites(names: Collection[str], latents: Mapping[str, Any], prior: _Prior) -> None:
    """Refuse discriminators and latents that do not match."""
    sites = prior.sites
    drawn = [name for name, site in sites.items() if not site["is_observed"]]
    for name in names:
        where = f"A discriminator is given for site {name!r}, which "
        if name not in sites and name not in latents:
            raise ValueError(
                f"{where}is neither in the model nor in the guide. Latent sites of the model: {drawn}; of the "
                f"guide: {list(latents)}."
            )
        if name not in sites:
            raise ValueError(
                f"{where}the guide has but not the model, so there is no prior to draw from. Latent sites of the "
                f"model: {drawn}."
            )
        if sites[name]["is_observed"]:
            raise ValueError(
                f"{where}is observed in the model; only latent sites have an aggregated posterior. Latent sites "
                f"of the model: {drawn}."
            )
        if name not in latents:
            raise ValueError(
                f"{where}the model has but not the guide, so nothing is to be told from the prior. Latent sites of "
                f"the guide: {list(latents)}."
            )
    for name, guided in latents.items():
        _check_enumerated(name, guided, "guide")
        if name in names:
            _check_enumerated(name, sites[name], "model")
            _check_shapes(name, guided, sites[name])
        elif name in sites or not guided["infer"].get("is_auxiliary"):
            raise ValueError(
                f"Latent site {name!r} of the guide has no discriminator, so nothing keeps it near its prior. Give "
                f"it one: discriminators={{{name!r}: ...}}; a site of mere noise, that the model does not have, is "
                "to be marked infer={'is_auxiliary': True}."
            )


def _check_shapes(name: str, guided: Any, drawn: Any) -> None:
    shapes = [tuple(site["value"].shape) for site in (guided, drawn)]
    dims = [site["fn"].event_dim for site in (guided, drawn)]
    if shapes[0] != shapes[1] or dims[0] != dims[1]:
        raise ValueError(
            f"At site {name!r} the guide's values have shape {shapes[0]} with {dims[0]} event dim(s), the "
            f"prior's draws {shapes[1]} with {dims[1]}. Both have to agree (.to_event(), Delta(..., event_dim=), "
            "the plates around the site)."
        )


def _check_gradients(names: Collection[str], latents: Mapping[str, Any]) -> None:
    """Refuse guide sites through which no gradient flows."""
    for name, site in latents.items():
        fn = site["fn"]
        if not getattr(fn, "has_rsample", False) and _is_learnt(fn):
            raise ValueError(
                f"No gradient flows through the values of site {name!r} of the guide: "
                f"{_base_name(fn)} is not reparameterised. Use Delta(probabilities, event_dim=1) for a deterministic "
                "guide with soft values, RelaxedOneHotCategorical, or OneHotCategoricalStraightThrough."
            )
        if name in names and not site["value"].requires_grad:
            raise ValueError(
                f"No gradient flows through the values of site {name!r} of the guide: they depend on no parameter "
                "that requires one. Was a network detached, frozen or run under no_grad?"
            )


def _is_learnt(value: Any) -> bool:
    """Whether a distribution has parameters that require gradients."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, nn.Module) and any(param.requires_grad for param in value.parameters()):
        return True
    if isinstance(value, (list, tuple)):
        return any(map(_is_learnt, value))
    parts = isinstance(value, (torch.distributions.Distribution, torch.distributions.Transform))
    return parts and any(map(_is_learnt, vars(value).values()))


def _base_name(fn: Any) -> str:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return type(fn).__name__
