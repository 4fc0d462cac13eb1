r"""One PyTorch optimiser for all parameters of an ``SVI``, where Pyro's own make one for each.

Pyro's :class:`~pyro.optim.PyroOptim` steps its optimisers in a Python loop over the parameters, which for a
small network takes as long as the gradient itself. Here all parameters share one optimiser, so that its fused
or multi-tensor kernels do their work in one call.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ._support.warn import warn
from .ranks.gradients import AveragedGradients

__all__ = ["FusedOptim", "averages", "full_state", "replace_state", "waiting_state"]


class FusedOptim(PyroOptim):
    """One :class:`torch.optim.Optimizer` over all parameters, in place of :class:`~pyro.optim.PyroOptim`.

    Takes the same steps as ``PyroOptim`` with the same arguments, and reads and writes the same state; a
    scheduler of :mod:`torch.optim.lr_scheduler` goes on :attr:`optimizer`, once a step has made it.
    Parameters that appear later join as they come, and those that model and guide leave out in a step rest. A
    parameter that they use, but that the loss does not depend on, has a gradient of zero once it has had
    another, as under Pyro: momentum and the running means of Adam move it on. Late ones with the keywords of
    others go on at the learning rate that a scheduler has brought these to. A step leaves ``.grad`` at
    None, as :meth:`torch.optim.Optimizer.zero_grad` does, where Pyro leaves zeros.

    Arguments:
        optim_constructor: an optimiser class of :mod:`torch.optim`, or a function that makes one from
            parameter groups and keywords.
        optim_args: its keywords; or a function of a parameter's name that returns them. Under PyTorch's own
            optimisers, parameters with equal keywords share a group. ``fused=True`` is added where the
            constructor has it and the parameters allow it, unless ``fused``, ``foreach`` or
            ``differentiable`` is among them.
        clip_args: ``clip_norm`` and ``clip_value`` as in ``PyroOptim``, for each parameter by itself.
        process_group: the ranks that train one model together, each on its own data: a process group of
            :mod:`torch.distributed`, or a mesh of one dimension. A step is then along the mean of their
            gradients, taken before clipping, and leaves all of them with the same parameters; see
            :mod:`~pyro_iw.ranks.gradients`. Running statistics of batch normalisation are averaged with them
            (each rank normalises by its own minibatch; ``torch.nn.SyncBatchNorm`` does so by that of all).

    Raises:
        ValueError: if ``optim_constructor`` does not make an optimiser (but is one, or makes a scheduler or
            one of Pyro's wrappers), ``optim_args`` is neither a dict nor a function, or ``process_group`` is
            no group that this process belongs to.

    Example:
        >>> optim = FusedOptim(torch.optim.Adam, {"lr": 1e-3})
        >>> svi = SVI(model, guide, optim, loss=IWAE_ELBO(K=64))
        >>> loss = svi.step(data)
        >>> [group["lr"] for group in optim.optimizer.param_groups]
        [0.001]
    """

    def __init__(
        self,
        optim_constructor: Callable[..., Any],
        optim_args: dict[str, Any] | Callable[..., dict[str, Any]],
        clip_args: dict[str, float] | Callable[..., dict[str, float]] | None = None,
        process_group: Any = None,
    ) -> None:
        _check_constructor(optim_constructor)
        if not (callable(optim_args) or isinstance(optim_args, dict)):
            raise ValueError(
                "optim_args must be a dict of the optimiser's keywords, such as {'lr': 1e-3}, or a function "
                f"of a parameter's name that returns one; got {optim_args!r}"
            )
        super().__init__(optim_constructor, optim_args, clip_args)
        self._make = optim_constructor
        #: The optimiser, None before the first step.
        self.optimizer: torch.optim.Optimizer | None = None
        self._has_fused = "fused" in inspect.signature(optim_constructor).parameters
        # PyTorch's own leave their groups alone; others may count steps in there, of each parameter by
        # itself.
        self._shares_groups = getattr(optim_constructor, "__module__", "").startswith("torch.optim")
        # By device and dtype, whether a fused step has been found to run there.
        self._fuses: dict[tuple[str, torch.dtype], bool] = {}
        self._known: set[Tensor] = set()
        # The options that the optimiser's groups began with, by their first parameter.
        self._begun: dict[Tensor, dict[str, Any]] = {}
        # Those that were never in the param store.
        self._nameless: set[Tensor] = set()
        # Those that have had a gradient, which Pyro would fill with zeros.
        self._moved: set[Tensor] = set()
        #: What averages the gradients over ranks, None without ``process_group``.
        self.averaged: AveragedGradients | None = None
        if process_group is not None:
            self.averaged = AveragedGradients(process_group, self._describe)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedOptim:
        other = copy.copy(self)
        memo[id(self)] = other
        for name, value in vars(self).items():
            if name != "averaged":
                setattr(other, name, copy.deepcopy(value, memo))
        if self.averaged is not None:
            other.averaged = self.averaged.copy(other._describe)
        return other

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Take a step.

        Arguments:
            params: the parameters to step, with their gradients in ``.grad``.
            args: positional arguments of the optimiser's ``step``.
            kwargs: keyword arguments of it.
        """
        params = set(params)
        if self.averaged is not None:
            groups = [] if self.optimizer is None else self.optimizer.param_groups
            rates = sorted({rate for group in groups if isinstance(rate := group.get("lr"), float)})
            params = self.averaged(params, self._known, rates)
        if not params:
            return
        new = not params <= self._known
        if new:
            self._add(params - self._known)
        for param in params:
            if param.grad is not None:
                if param not in self._moved:
                    new = True
                    self._moved.add(param)
                    if param.grad.is_sparse:
                        self._leave_fused(param)
            elif param in self._moved:
                param.grad = torch.zeros_like(param)
            if self.grad_clip[param] is not None:
                self.grad_clip[param](param)
        # Another loss may have left gradients in parameters that are none of this step's.
        others = [(param, param.grad) for param in self._known - params if param.grad is not None]
        for param, _ in others:
            param.grad = None
        assert self.optimizer is not None
        # An optimiser may write to its groups (ClippedAdam decays the learning rate), also to those that
        # rest.
        resting = [
            (group, dict(group))
            for group in self.optimizer.param_groups
            if params.isdisjoint(group["params"])
        ]
        try:
            with _unfused(self.optimizer) if new else nullcontext():
                self.optimizer.step(*args, **kwargs)
        finally:
            for group, options in resting:
                group.update(options)
            for param in params:
                param.grad = None  # else SVI would fill it with zeros, one parameter at a time
            for param, grad in others:
                param.grad = grad

    def _add(self, params: set[Tensor]) -> None:
        """Take in new parameters, with the state that waits for them; all of them, or none after an error."""
        store = pyro.get_param_store()
        groups: list[dict[str, Any]] = []
        states: dict[Tensor, Any] = {}
        clips: dict[Tensor, Any] = {}
        joining: list[tuple[dict[str, Any], Tensor]] = []
        begun = {} if self.optimizer is None else dict(self._begun)
        # A set's order changes from run to run, that of names does not.
        for param in sorted(params, key=lambda param: store.param_name(param) or ""):
            clips[param] = self._get_grad_clip(param)  # type: ignore[arg-type]
            options = self._options(param)
            # An optimiser of its own fills in defaults, and casts the state to the parameter's dtype.
            alone = self._make([param], **options)
            if not isinstance(alone, torch.optim.Optimizer):
                raise ValueError(
                    f"optim_constructor has made a {type(alone).__name__} of parameters, not a "
                    "torch.optim.Optimizer. Pass an optimiser class, such as torch.optim.Adam."
                )
            name = store.param_name(param)
            saved = None if name is None else self._state_waiting_to_be_consumed.get(name)
            if saved is not None:
                group = {**saved["param_groups"][0], **_kernel(options)}
                alone.load_state_dict({**saved, "param_groups": [group]})
            states[param] = alone.state.get(param)  # some optimisers make it at once
            complete = alone.param_groups[0]
            own = _beginning(complete)
            mates: list[dict[str, Any]] = []
            if self._shares_groups:
                there = [] if self.optimizer is None else self.optimizer.param_groups
                mates = [g for g in [*there, *groups] if g["params"] and begun.get(g["params"][0]) == own]
            if mates:
                joining.append((mates[0], param))
            else:
                groups.append({**complete, "params": [param]})
                begun[param] = own
        for group, param in joining:
            group["params"].append(param)
        if self.optimizer is None:
            self.optimizer = self._make(groups, **options)
        else:
            _warn_of_scheduler(self.optimizer, groups, store.param_name)
            for group in groups:
                self.optimizer.add_param_group(group)
        for param, state in states.items():
            if state:
                self.optimizer.state[param] = state
            name = store.param_name(param)
            self._state_waiting_to_be_consumed.pop(name, None)
            if name is None:
                self._nameless.add(param)
        self.grad_clip.update(clips)
        self._begun = begun
        self._known |= params

    def _leave_fused(self, param: Tensor) -> None:
        """Without a fused kernel, of which none takes a sparse gradient, where one was chosen here."""
        assert self.optimizer is not None
        if self._get_optim_args(param).get("fused") is None:
            for group in self.optimizer.param_groups:
                if group.get("fused") and any(param is other for other in group["params"]):
                    group["fused"] = False

    def _options(self, param: Tensor) -> dict[str, Any]:
        """The keywords for a parameter, with ``fused`` where it is for us to choose."""
        options = dict(self._get_optim_args(param))
        chosen = any(options.get(name) is not None for name in ("fused", "foreach"))
        if self._has_fused and not chosen and not options.get("differentiable"):
            kind = param.device.type, param.dtype
            if kind not in self._fuses:
                self._fuses[kind] = self._can_fuse(param, options)
            options["fused"] = self._fuses[kind]
        return options

    def _describe(self, name: str, param: Tensor) -> Any:
        """What a new parameter is given to begin with."""
        kind = getattr(self._make, "__qualname__", None)
        clip: Any = self._get_grad_clip_args(param)  # type: ignore[arg-type]
        return kind, self._options(param), clip, self._state_waiting_to_be_consumed.get(name)

    def _can_fuse(self, param: Tensor, options: dict[str, Any]) -> bool:
        """Whether there is a fused kernel for such a parameter; PyTorch says so when a step is taken."""
        trial = torch.zeros(1, dtype=param.dtype, device=param.device, requires_grad=True)
        trial.grad = torch.zeros_like(trial)
        try:
            self._make([trial], **options, fused=True).step()
        except (RuntimeError, NotImplementedError):
            return False
        return True

    def get_state(self) -> dict[str, Any]:
        """State dicts by parameter name, each as that parameter's own optimiser would give it."""
        states = dict(self._state_waiting_to_be_consumed)
        nameless = False
        if self.optimizer is not None:
            store = pyro.get_param_store()
            for group in self.optimizer.param_groups:
                options = {key: value for key, value in group.items() if key != "params"}
                for param in group["params"]:
                    name = store.param_name(param)
                    if name is None:  # never in the store, or in one that was cleared
                        nameless = nameless or param in self._nameless
                        continue
                    state = self.optimizer.state.get(param)
                    states[name] = {
                        "state": {0: dict(state)} if state else {},
                        "param_groups": [{**options, "params": [0]}],
                    }
        if nameless:
            warn(
                "Some parameters are not in the param store, so the optimiser's state, which goes by its "
                "names, is without theirs. Do without module_local_params to have all of it in a checkpoint."
            )
        return states

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`get_state` of this class or of ``PyroOptim`` gave.

        Each parameter takes its state up at its next step, which makes a new :attr:`optimizer`: put a
        scheduler on that one.
        """
        # What is not in there keeps the state it has.
        self._state_waiting_to_be_consumed = {**self.get_state(), **state_dict}
        self.optimizer = None
        self._known.clear()


def averages(optim: PyroOptim) -> bool:
    """Whether a step of an optimiser is one of all ranks of a group."""
    return getattr(optim, "averaged", None) is not None


def waiting_state(optim: PyroOptim) -> dict[str, Any]:
    """The states that an optimiser was given and no step has taken up, by parameter name; its own dict."""
    return getattr(optim, "_state_waiting_to_be_consumed", {})


def full_state(optim: PyroOptim) -> dict[str, Any]:
    """An optimiser's state by parameter name, with what no step has taken up yet."""
    return {**waiting_state(optim), **optim.get_state()}


def replace_state(optim: PyroOptim, state: dict[str, Any]) -> None:
    """Set an optimiser's state; ``set_state`` would keep what the new one does not have."""
    optim.optim_objs.clear()
    waiting_state(optim).clear()
    if isinstance(optim, FusedOptim):
        optim.optimizer = None
    optim.set_state(state)


@contextmanager
def _unfused(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Without SGD's fused kernel, in a step in which some parameters get their first momentum: that kernel
    takes one either of all parameters or of none.
    """
    groups = [
        group
        for group in optimizer.param_groups
        if isinstance(optimizer, torch.optim.SGD) and group.get("fused") and group["momentum"]
    ]
    for group in groups:
        group["fused"] = False
    try:
        yield
    finally:
        for group in groups:
            group["fused"] = True


def _beginning(group: dict[str, Any]) -> dict[str, Any]:
    """The options that a group had before a scheduler moved its learning rate, without the parameters."""
    options = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
    return {**options, "lr": group["initial_lr"]} if "initial_lr" in group else options


def _warn_of_scheduler(
    optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]], name: Callable[[Tensor], Any]
) -> None:
    """Warn of new groups beside those that a scheduler moves."""
    if groups and any("initial_lr" in group for group in optimizer.param_groups):
        names = ", ".join(repr(name(param)) for group in groups for param in group["params"])
        warn(
            f"Parameter(s) {names} have come after a scheduler was put on FusedOptim's optimizer, with other "
            "keywords than the groups it moves, so it may leave their learning rate as it is, or fail. "
            "Make the scheduler after a step that uses all parameters."
        )


def _check_constructor(given: Any) -> None:
    """Refuse what makes no optimiser out of parameters, and say what does."""
    if isinstance(given, PyroOptim | torch.optim.Optimizer):
        raise ValueError(
            f"optim_constructor is an object, a {type(given).__name__} made already. Pass the class and its "
            "keywords apart: FusedOptim(torch.optim.Adam, {'lr': 1e-3})."
        )
    if not callable(given):
        raise ValueError(
            f"optim_constructor must be an optimiser class, such as torch.optim.Adam; got {given!r}"
        )
    name = getattr(given, "__name__", "")
    wrappers = [key for key, value in vars(pyro.optim).items() if value is given]
    if wrappers and not isinstance(given, type):
        name = wrappers[0]
    if _is_scheduler(given) or (wrappers and _is_scheduler(getattr(torch.optim.lr_scheduler, name, None))):
        raise ValueError(
            f"{name} is a scheduler of the learning rate, not an optimiser. Pass the optimiser, "
            "FusedOptim(torch.optim.Adam, {'lr': 1e-3}); after the first step put the scheduler on its "
            f"attribute optimizer: torch.optim.lr_scheduler.{name}(optim.optimizer, ...)."
        )
    if isinstance(given, type) and issubclass(given, PyroOptim):
        raise ValueError(
            f"{name} is one of Pyro's wrappers around an optimiser, as FusedOptim is. Pass what it wraps, "
            "such as torch.optim.Adam."
        )
    if wrappers and not isinstance(given, type):
        raise ValueError(
            f"pyro.optim.{name} makes an optimiser for each parameter. Pass the class that it does so with: "
            f"FusedOptim({_wrapped_by(name)}, ...)."
        )


def _is_scheduler(given: Any) -> bool:
    kinds = (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    return isinstance(given, type) and issubclass(given, kinds)


def _wrapped_by(name: str) -> str:
    """The optimiser class behind a function of :mod:`pyro.optim`."""
    if hasattr(torch.optim, name):
        return f"torch.optim.{name}"
    modules = {"ClippedAdam": "clipped_adam", "DCTAdam": "dct_adam", "AdagradRMSProp": "adagrad_rmsprop"}
    return f"pyro.optim.{modules[name]}.{name}" if name in modules else "torch.optim.Adam"


def _kernel(options: dict[str, Any]) -> dict[str, Any]:
    """The keywords that say how a step is computed and not what it does."""
    return {name: options[name] for name in ("fused", "foreach") if name in options}
