r"""Adversarial autoencoders: a discriminator in place of the KL term, for the same model/guide pairs.

The ELBO keeps each datapoint's codes near the prior, and needs the guide's density for it. Here a
discriminator per latent site learns to tell the guide's codes from draws of the model's prior, and the guide
learns to fool it, so that the *aggregated* posterior :math:`q(z) = E_x[q_\phi(z \mid x)]` goes to the prior
:math:`p(z)`. Of the guide nothing but samples is needed, of the model its prior (to draw from) and its
likelihood.

References:
    | Adversarial Autoencoders (Makhzani et al., 2015), https://arxiv.org/abs/1511.05644
    | Generative Adversarial Networks (Goodfellow et al., 2014), https://arxiv.org/abs/1406.2661
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from .._support.random_state import RandomState
from .._support.warn import warn
from ..optim import averages, full_state, replace_state, waiting_state
from ..ranks.data_axis import phases_among_ranks
from ..tracing.batch_norm import watch_batch_norm
from ..tracing.minibatches import OneMinibatch
from ..tracing.traces import Pair
from .discriminators import Discriminators
from .pair import Run, observed_terms, parameters, run_pair

__all__ = ["AdversarialLosses", "AdversarialSVI"]


class AdversarialLosses(NamedTuple):
    r"""The losses of a step's phases.

    Attributes:
        reconstruction: :math:`-\sum \log p(x \mid z)` in nats, scaled as the losses of ``SVI`` are.
        discriminator: by site, in nats per cell, the two-class cross-entropy, summed over the means of both
            classes; :math:`2 \log 2 \approx 1.386` where codes and prior cannot be told apart.
        guide: by site, in nats per cell, :math:`-\log \sigma(D(z))` of the guide's codes;
            :math:`\log 2 \approx 0.693` where they cannot be told apart.
        supervised: :math:`-\sum \log p(y \mid x)` in nats; None without that phase.

    Example:
        >>> discriminator = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 1))
        >>> losses = AdversarialSVI(model, guide, discriminator, Adam({"lr": 1e-3})).step(data)
        >>> list(losses.discriminator), losses.supervised
        (['z'], None)
    """

    reconstruction: float
    discriminator: dict[str, float]
    guide: dict[str, float]
    supervised: float | None


class AdversarialSVI:
    r"""Trains a model/guide pair as an adversarial autoencoder, in the manner of :class:`~pyro.infer.SVI`.

    A step goes through phases, each with an optimiser and parameters of its own:

    1. *Reconstruction* updates guide and model to minimise :math:`-\log p_\theta(x \mid z)`, the observed
       sites (and factors) of the model, with latents from the guide.
    2. *Discriminators*, updated alone, minimise
       :math:`E_{z \sim p}[\mathrm{softplus}(-D(z))] + E_{z \sim q}[\mathrm{softplus}(D(z))]`. The draws from
       :math:`p` come from the model itself, one a cell, on the same arguments. At its optimum
       :math:`D(z) = \log p(z) / q(z)`.
    3. *The guide*, updated alone, minimises :math:`E_{z \sim q}[\mathrm{softplus}(-D(z))]`, which unlike
       :math:`-E_{z \sim q}[\mathrm{softplus}(D(z))]` has gradients also where the discriminator wins
       ("non-saturating").
    4. *Supervised*, if given: minimises :math:`-\log` of the observed sites of a further Pyro function and
       updates the parameters it uses.

    Cells are the entries of a latent site's batch shape; those that model or guide masks count neither among
    the draws nor among the codes. The terms of phases 2 and 3 are means over cells, whatever
    ``poutine.scale`` and subsampling say; those of phases 1 and 4 are sums, with scales and masks, as in
    ``SVI``. Gradients are taken for the phase's own parameters alone, and none stay in ``.grad``. Parameters
    of the prior alone are in none of the phases.

    In phase 2 the discriminators are in train mode, in phase 3 in eval mode. Guide and model stay in the mode
    they are in; running statistics of their batch normalisation follow from phase 1 (and 4) alone.

    References:
        | Adversarial Autoencoders (Makhzani et al., 2015), https://arxiv.org/abs/1511.05644

    Arguments:
        model: the model. Its latent sites that the guide leaves out (a mixture's component) are drawn from
            it, with a warning unless they are marked ``infer={"is_auxiliary": True}``.
        guide: the guide, of which only samples are used: reparameterised (``Normal``), deterministic
            (``Delta(f(x), event_dim=1)``; also ``Delta(softmax(logits), event_dim=1)`` for a one-hot site of
            the model), or implicit: a ``Delta`` of a function of a noise site that is marked
            ``infer={"is_auxiliary": True}``.
        discriminators: a module for every latent site that both share, by name; a module alone where there is
            one such site. It takes values ``[cells, *event_shape]`` and returns logits, ``[cells]`` or
            ``[cells, 1]``, positive for "from the prior". Its parameters are in the param store as under
            ``pyro.module("discriminator.<site>", ...)``.
        optim: Pyro optimiser of phase 1; unused so far, if copies of it are to be made.
            :class:`~pyro_iw.FusedOptim` is the fastest; with its ``process_group`` several ranks train one
            model, on data of their own each.
        discriminator_optim: that of phase 2; by default, as for those below, a copy of ``optim``.
        guide_optim: that of phase 3. (The attributes of these names are the optimisers at work, for
            learning-rate schedulers to be stepped.)
        supervised: Pyro function with observed sites, called with ``labelled``.
        supervised_optim: its optimiser.
        condition: function of the arguments of model and guide that returns features ``[*batch, C]``, which
            the discriminators get as a second argument ``[cells, C]``; say one-hot labels, with one class
            more for "unlabelled", where the model's prior knows the labels. It runs without gradients.

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
        for name, function in (("condition", condition), ("supervised", supervised)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} has to be a function, got {type(function).__name__}.")
        if supervised is None and supervised_optim is not None:
            raise ValueError("supervised_optim is given without supervised, so it has nothing to update.")
        self._discriminators = Discriminators(discriminators)
        optims = {
            "optim": optim,
            "discriminator_optim": discriminator_optim,
            "guide_optim": guide_optim,
            "supervised_optim": supervised_optim,
        }
        copied = discriminator_optim is None or guide_optim is None
        copied = copied or (supervised is not None and supervised_optim is None)
        _check_optims(optims, copied)
        self.optim = optim
        self.discriminator_optim: PyroOptim = discriminator_optim or copy.deepcopy(optim)
        self.guide_optim: PyroOptim = guide_optim or copy.deepcopy(optim)
        self.supervised_optim: PyroOptim | None = None
        if supervised is not None:
            self.supervised_optim = supervised_optim or copy.deepcopy(optim)
        self._tried_supervised = False
        self._warned = False
        self._stepped = False

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
        if not torch.is_grad_enabled():
            raise ValueError(
                "step is called where gradients are off (torch.no_grad or inference_mode), so it would "
                "update nothing. Call it outside; for the losses alone there is evaluate_loss."
            )
        pair = Pair(self.model, self.guide, args, kwargs)
        with phases_among_ranks(self._optims(), not self._stepped):
            losses = self._step(pair, labelled)
        self._stepped = True
        return losses

    def _step(self, pair: Pair, labelled: Sequence[Any] | None) -> AdversarialLosses:
        critics = self._discriminators
        if labelled is not None and not self._tried_supervised:
            self._try_supervised(labelled)
        with OneMinibatch():
            run = self._run(pair)
            critics.try_on(run.fake)
            critic_params = critics.parameters()
            _check_separate(critic_params, run)
            _check_finite("reconstruction", run.terms)
            _update(self.optim, run.terms, {**run.guide_params, **run.model_params})
            with watch_batch_norm(restore=True):
                fake, guide_params = run.again(pair)

        with critics.mode(train=True):
            discriminator = critics.losses(run.real, {name: cells.detach() for name, cells in fake.items()})
            _check_finite("discriminator", discriminator)
            _update(self.discriminator_optim, discriminator, critic_params)

        with critics.mode(train=False):
            guide = critics.guide_losses(fake)
            _check_finite("guide", guide)
            _update(self.guide_optim, guide, _without(guide_params, critic_params))

        supervised: dict[str, Tensor] | None = None
        if labelled is not None:
            assert self.supervised_optim is not None
            supervised, params = self._run_supervised(labelled)
            _check_finite("supervised", supervised)
            _update(self.supervised_optim, supervised, params)
        elif self.supervised_optim is not None and averages(self.supervised_optim):
            self.supervised_optim([])  # other ranks may have labels
        return _report(run.terms, discriminator, guide, supervised)

    def evaluate_loss(
        self, *args: Any, labelled: Sequence[Any] | None = None, **kwargs: Any
    ) -> AdversarialLosses:
        """The losses with modules in eval mode; no parameter or running statistic changes.

        Modules are found where they are called, where model and guide are one or methods of one, and in their
        closures. Parameters that do not exist yet are made, and the random state advances.

        Arguments:
            args: as in :meth:`step`.
            labelled: likewise.
            kwargs: likewise.

        Raises:
            ValueError: likewise.
            NotImplementedError: likewise.
        """
        self._check_labelled(labelled)
        pair, critics = Pair(self.model, self.guide, args, kwargs), self._discriminators
        fns = [self.model, self.guide, self.supervised, self.condition]
        with torch.no_grad(), _eval_mode(fns):
            with OneMinibatch():
                run = self._run(pair)
            critics.try_on(run.fake)
            with critics.mode(train=False):
                discriminator, guide = critics.losses(run.real, run.fake), critics.guide_losses(run.fake)
            supervised = None if labelled is None else self._run_supervised(labelled)[0]
        return _report(run.terms, discriminator, guide, supervised)

    @property
    def discriminators(self) -> dict[str, nn.Module]:
        """The discriminators by site; empty while one given alone waits for the guide to name its site."""
        return dict(self._discriminators.modules or {})

    def get_state(self) -> dict[str, Any]:
        """The states of the optimisers by phase, for a checkpoint beside the param store's.

        As with an optimiser's own, tensors in it are those at work.
        """
        return {phase: full_state(optim) for phase, optim in self._optims().items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`get_state` gave.

        Raises:
            ValueError: if the state has other phases than this.
        """
        optims = self._optims()
        if state.keys() != optims.keys():
            raise ValueError(f"The state is for the phases {sorted(state)}, this has {sorted(optims)}.")
        for phase, optim in optims.items():
            replace_state(optim, dict(state[phase]))

    def _optims(self) -> dict[str, PyroOptim]:
        optims = {
            "reconstruction": self.optim,
            "discriminators": self.discriminator_optim,
            "guide": self.guide_optim,
        }
        if self.supervised_optim is not None:
            optims["supervised"] = self.supervised_optim
        return optims

    def _run(self, pair: Pair) -> Run:
        """Guide, prior and model once, checked."""
        run = run_pair(pair, self._discriminators.name, self.condition)
        if run.left_out and not self._warned:
            self._warned = True
            warn(
                f"Found latent sites in the model but not in the guide: {run.left_out}. They are drawn from "
                "the model in every phase. If that is meant, mark them infer={'is_auxiliary': True}."
            )
        return run

    def _check_labelled(self, labelled: Any) -> None:
        if labelled is None:
            return
        if self.supervised is None:
            raise ValueError("labelled= is given, but no supervised= function to use it in.")
        if not isinstance(labelled, (tuple, list)):
            raise ValueError(
                f"labelled has to be a tuple of the arguments of supervised, got {type(labelled).__name__}."
            )

    def _try_supervised(self, labelled: Sequence[Any]) -> None:
        state = RandomState.now()
        with torch.no_grad(), watch_batch_norm(restore=True):
            self._run_supervised(labelled)
        state.restore()
        self._tried_supervised = True

    def _run_supervised(self, labelled: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert self.supervised is not None
        trace = poutine.trace(self.supervised).get_trace(*labelled)
        terms = observed_terms(trace, "supervised")
        if not terms:
            raise ValueError(
                "supervised has no observed site. Pass the labels as obs= of a pyro.sample statement."
            )
        return terms, parameters(trace)


def _update(optim: PyroOptim, losses: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Step parameters down the sum of losses, and these alone: no other tensor's ``.grad`` is touched."""
    loss = functools.reduce(torch.add, losses.values())
    leaves = list({id(param): param for param in params.values() if param.requires_grad}.values())
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if leaves and loss.requires_grad:
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    elif not averages(optim):  # else other ranks wait for this one
        return
    moved = []
    try:
        for leaf, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                leaf.grad = grad
                moved.append(leaf)
        optim(moved)
    finally:
        for leaf in moved:
            leaf.grad = None
    # Else the next phase would run on copies of what the parameters were, if a user's autocast is around.
    torch.clear_autocast_cache()


def _without(params: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that are not among others, under whatever name: a module of all parts registers all."""
    ids = {id(param) for param in others.values()}
    return {name: param for name, param in params.items() if id(param) not in ids}


def _check_separate(critic_params: Mapping[str, Tensor], run: Run) -> None:
    """Refuse codes that depend on a discriminator's parameters, which no phase could call its own."""
    own = _without(run.guide_params, critic_params)
    shared = {
        name: param for name, param in run.guide_params.items() if name not in own and param.requires_grad
    }
    codes = [cells.values.sum() for cells in run.fake.values() if cells.values.requires_grad]
    if not shared or not codes:
        return
    grads = torch.autograd.grad(codes, list(shared.values()), retain_graph=True, allow_unused=True)
    used = [name for name, grad in zip(shared, grads, strict=True) if grad is not None]
    if used:
        raise ValueError(
            f"The guide's codes depend on parameters of a discriminator: {used}. The phases pull them in "
            "opposite directions, so give the discriminator layers of its own."
        )


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
        # With its parts: not all are called as modules, and hooks do not reach into a compiled one.
        for part in module.modules() if module.training else ():
            if part.training:
                switched.append(part)
                part.training = False

    for fn in fns:
        for module in _modules_of(fn):
            switch(module)
    hook = nn.modules.module.register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        hook.remove()
        for module in switched:
            module.training = True


def _modules_of(fn: Any) -> Iterator[nn.Module]:
    """What a function is, belongs to, or holds in its closure or as a partial's arguments."""
    fn = poutine.unwrap(fn)
    held = [fn]
    if isinstance(fn, functools.partial):
        held += [fn.func, *fn.args, *fn.keywords.values()]
    for cell in getattr(fn, "__closure__", None) or ():
        with suppress(ValueError):  # of a cell that is empty so far
            held.append(cell.cell_contents)
    for one in held:
        owner = getattr(one, "__self__", one)
        if isinstance(owner, nn.Module):
            yield owner


def _check_optims(optims: Mapping[str, Any], copied: bool) -> None:
    """Refuse optimisers that cannot be, also as what copies are made of."""
    names: dict[int, str] = {}
    for name, optim in optims.items():
        if optim is None:
            continue
        if not isinstance(optim, PyroOptim):
            given = optim.__name__ if isinstance(optim, type) else type(optim).__name__
            raise ValueError(
                f"{name} has to be an optimiser of pyro.optim, such as pyro.optim.Adam({{'lr': 1e-3}}), got "
                f"{given}."
            )
        other = names.setdefault(id(optim), name)
        if other != name:
            raise ValueError(
                f"{other} and {name} are the same optimiser. The phases have different losses, so each needs "
                "moments of its own: give each an optimiser, or leave it out to have a copy made."
            )
    optim = optims["optim"]
    used = optim.optim_objs or getattr(optim, "optimizer", None) or waiting_state(optim)
    if copied and used:
        raise ValueError(
            "optim has a state already, which is none of the other phases', so it cannot be copied for them. "
            "Give an unused one, or one for each phase; a saved state goes into AdversarialSVI.set_state."
        )
