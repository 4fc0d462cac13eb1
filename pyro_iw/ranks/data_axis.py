"""What goes wrong where several ranks have data of their own each, found in the first step.

Who averages the gradients is told by who has called the loss: a ``DistributedDataParallel`` around it, or an
``SVI`` with an optimiser that averages. In the first step under each, all ranks compare what they have, once,
and warn or refuse by name. Where nobody averages, ranks that have nothing to do with one another (a sweep of
settings) are as likely as ranks that should, so that this is a warning and no error.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pyro
import pyro.poutine as poutine
import torch.distributed as dist
from pyro.infer import SVI
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from .._support.warn import warn
from .exchange import checksum
from .group import Group, RankError
from .seeds import random_digests, warn_of_same_seed

__all__ = ["DataAxis", "among_ranks", "phases_among_ranks", "refuse_sharded", "warn_of_drift", "wrapped"]

#: Where the code of those that call a loss is, and how far up it is looked for.
_CALLERS = {SVI.step.__code__.co_filename, DistributedDataParallel.forward.__code__.co_filename}
_DEPTH = 50


def among_ranks() -> bool:
    """Whether this process is one of several that know of one another."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class DataAxis:
    """Watches the gradient steps of a loss on several ranks.

    Arguments:
        warn: called with a message.
        hidden: names of plates that are not the user's.
    """

    def __init__(self, warn: Callable[[str], None], hidden: Iterable[str] = ()) -> None:
        self._warn = warn
        self._hidden = frozenset(hidden)
        self._met: weakref.WeakSet[Any] = weakref.WeakSet()
        self._of_scale: str | None = None

    @contextmanager
    def step(
        self,
        model: Callable,
        guide: Callable,
        same_seeds: bool = False,
        clock: Callable[[], str] = str,
    ) -> Iterator[None]:
        """A gradient step of the loss, which runs inside.

        Arguments:
            model: the model.
            guide: the guide.
            same_seeds: whether the ranks are to draw the same random numbers.
            clock: says where the ``kl_weight`` of the step is.

        Raises:
            ValueError: if ``DistributedDataParallel`` does not know some of the parameters.
            RankError: if another rank has failed in its first step, or has another ``kl_weight``.
        """
        caller = _caller()
        optim = caller.optim if isinstance(caller, SVI) else None
        averaged = getattr(optim, "averaged", None)
        group: Group | None = None if averaged is None else averaged.group
        if caller is not None and caller not in self._met:
            self._met.add(caller)
            if isinstance(caller, DistributedDataParallel):
                group = Group.of("process_group", caller.process_group)
            if same_seeds and averaged is not None:
                averaged.leave_seeds()
            if group is None and not any(wrapped(fn) for fn in (model, guide)):
                warn_of_drift("SVI", [optim], self._warn)
            if group is not None and same_seeds and 1 < group.size < dist.get_world_size():
                ranks = ", ".join(map(str, group.world_ranks))
                self._warn(
                    f"Gradients are averaged over the ranks {ranks} of {dist.get_world_size()} alone, and "
                    "other ranks train a model of their own. With particle_group= on a mesh average over all "
                    "of its ranks: process_group=torch.distributed.group.WORLD. If it is meant: "
                    "warnings.filterwarnings('ignore', 'Gradients are averaged over the ranks')."
                )
            if group is not None and group.size > 1:
                with self._first_step(caller, group, same_seeds or averaged is not None, clock):
                    yield
                return
        try:
            yield
        except Exception as error:
            if averaged is not None:
                averaged.report(error)
            raise

    @contextmanager
    def _first_step(
        self, caller: Any, group: Group, seeds_known: bool, clock: Callable[[], str]
    ) -> Iterator[None]:
        parameters = _parameters(caller)
        look = _Look(self._hidden)
        before = random_digests()
        try:
            with group.meeting("the first step of a loss"):
                now = clock()
                with look:
                    yield
                _refuse_late(parameters, _parameters(caller))
            _refuse_other_clocks(group, now)
        except RankError:
            if isinstance(caller, SVI):  # which will not come to clear them
                for _, param in pyro.get_param_store().named_parameters():
                    param.grad = None
            raise
        if not seeds_known:
            warn_of_same_seed(group, before, random_digests(), self._warn)
        if isinstance(caller, DistributedDataParallel):
            known = set(map(id, caller.parameters()))
            for name, param in look.params.items():
                # A module runs on its own parameters, whatever the param store has under its name.
                if id(param) not in known and "$$$" not in name:
                    self._warn(
                        f"Parameter {name!r} of a pyro.param statement is no parameter of the module that "
                        "DistributedDataParallel wraps, which does not synchronise it between the ranks. "
                        "Make it a torch.nn.Parameter or pyro.nn.PyroParam of model or guide."
                    )
        told = group.hear((look.plates, look.observed))
        self._compare_plates(group, [plates for plates, _ in told])
        self._compare_data(group, look, [observed for _, observed in told])

    def warn_of_scale(self, loss: Any) -> None:
        """Warn of a gradient that is too small by the number of ranks, unless the loss is a mean over data.

        Arguments:
            loss: what the step has given; a tensor tells in its backward pass what it is divided by.
        """
        message, self._of_scale = self._of_scale, None
        if message is None:
            return
        if not isinstance(loss, Tensor):
            self._warn(message)
        elif loss.requires_grad:
            loss.register_hook(lambda grad: self._warn(message) if bool(grad == 1) else None)

    def _compare_plates(self, group: Group, told: list[dict[str, tuple[int, int]]]) -> None:
        """Find minibatches that do not count alike, as those of a union would."""
        ranks = group.world_ranks
        for name in sorted(set.intersection(*map(set, told))):
            sizes = [plates[name] for plates in told]
            if all(full == size for full, size in sizes):
                continue  # the data tell
            for rank, (full, size) in zip(ranks, sizes, strict=True):
                if full != sizes[0][0]:
                    self._warn(
                        f"Plate {name!r} has the size {sizes[0][0]} on rank {ranks[0]} and {full} on rank "
                        f"{rank}, and gradients are averaged over the ranks. Give it the number N of all "
                        f"ranks' data on all of them, in model and guide: pyro.plate({name!r}, N, len(data))."
                    )
                    break
                if size != sizes[0][1]:
                    self._warn(
                        f"Plate {name!r} has a minibatch of {sizes[0][1]} on rank {ranks[0]} and of {size} "
                        f"on rank {rank}. The mean of the gradients counts both alike, and so a datapoint of "
                        "the smaller one for more. Give all ranks minibatches of one size, as a "
                        "DistributedSampler does."
                    )
                    break

    def _compare_data(self, group: Group, look: _Look, told: list[dict[str, tuple[str | None, int]]]) -> None:
        """Find sites that hold other data on other ranks, all of which count as all there is."""
        for name, (plate, _) in look.observed.items():
            if len({said[name][1] for said in told if name in said}) == 1:
                continue
            where = f"Plate {plate!r}" if plate else f"The model, in which site {name!r} is in no plate,"
            way_out = f"pyro.plate({plate or 'data'!r}, N, len(data))"
            message = (
                f"{where} takes a rank's data for all there is, but the {group.size} ranks have different "
                f"data (site {name!r}). The mean of their gradients is 1 / {group.size} of that of all data"
            )
            apart = sorted(latent for latent, plates in look.latents.items() if plate not in plates)
            if apart:
                message += f", beside which the prior of {apart[0]!r} counts once a rank"
            message += f". Give the plate the number N of all ranks' data, in model and guide: {way_out}."
            if apart:
                self._warn(message)
            else:
                self._of_scale = message
            return


@contextmanager
def phases_among_ranks(optims: Mapping[str, PyroOptim], is_first: bool) -> Iterator[None]:
    """A step that runs inside, of several phases with an optimiser each, that takes gradients past hooks.

    Arguments:
        optims: the optimisers by phase.
        is_first: whether this is the first step.

    Raises:
        ValueError: if some of the optimisers average gradients and others do not, or none does and a module
            waits for hooks to do so.
    """
    found = {phase: getattr(optim, "averaged", None) for phase, optim in optims.items()}
    averaged = [one for one in found.values() if one is not None]
    hook = None
    if is_first and among_ranks():
        alone = [phase for phase, one in found.items() if one is None]
        if alone and averaged:
            raise ValueError(
                f"The optimiser of phase {alone[0]!r} averages no gradients over the ranks, and others do. "
                "Pass process_group to all of them, or leave them out to have copies of optim made."
            )
        if alone:
            hook = register_module_forward_pre_hook(_refuse_wrapped)
    try:
        yield
        if hook is not None:
            warn_of_drift("AdversarialSVI", optims.values(), warn)
    except Exception as error:
        if averaged and not any(one.broken for one in averaged):
            averaged[0].report(error)
        for one in averaged:
            one.broken = False
        raise
    finally:
        if hook is not None:
            hook.remove()


def _refuse_wrapped(module: nn.Module, _: Any) -> None:
    if isinstance(module, DistributedDataParallel) or _is_sharded(module):
        raise ValueError(
            f"A {type(module).__name__} is called in AdversarialSVI, which takes gradients without the hooks "
            "that would synchronise it. Pass the module itself, and "
            "FusedOptim(torch.optim.Adam, {'lr': ...}, process_group=torch.distributed.group.WORLD)."
        )


class _Look(Messenger):
    """Notes what is observed, where no plate around it is a minibatch and no scale weighs it.

    Attributes:
        observed: by name of the site, its outermost plate and a checksum of its values.
        latents: by name of a latent site, its plates.
        params: unconstrained parameters by name.
        plates: full size and size by name.
    """

    def __init__(self, hidden: frozenset[str]) -> None:
        super().__init__()
        self._hidden = hidden
        self.observed: dict[str, tuple[str | None, int]] = {}
        self.latents: dict[str, set[str | None]] = {}
        self.params: dict[str, Tensor] = {}
        self.plates: dict[str, tuple[int, int]] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        self.params[msg["name"]] = value.unconstrained() if hasattr(value, "unconstrained") else value

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or not isinstance(msg["value"], Tensor):
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name not in self._hidden and frame.full_size is not None:
                self.plates[frame.name] = frame.full_size, frame.size
        if not msg["is_observed"]:
            # Latents without a plate go with data without one.
            names = {frame.name for frame in msg["cond_indep_stack"]} - self._hidden
            self.latents[msg["name"]] = names or {None}
            return
        plates = [frame for frame in msg["cond_indep_stack"] if frame.name not in self._hidden]
        is_whole = all(frame.full_size in (None, frame.size) for frame in plates)
        if (
            not is_whole
            or isinstance(msg["scale"], Tensor)
            or msg["scale"] != 1
            or msg["name"] in self.observed
        ):
            return
        outermost = min(
            plates, key=lambda frame: -sys.maxsize if frame.dim is None else frame.dim, default=None
        )
        plate = None if outermost is None else outermost.name
        self.observed[msg["name"]] = plate, checksum(msg["value"])


def _caller() -> Any:
    """The ``SVI`` or ``DistributedDataParallel`` that the loss was called by, None if by neither."""
    frame: Any = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return None
        if frame.f_code.co_filename in _CALLERS:
            owner = frame.f_locals.get("self")
            if isinstance(owner, SVI | DistributedDataParallel):
                return owner
        frame = frame.f_back
    return None


def _parameters(caller: Any) -> dict[str, Tensor]:
    if not isinstance(caller, DistributedDataParallel):
        return {}
    return {name: param for name, param in caller.module.named_parameters() if param.requires_grad}


def _refuse_late(before: dict[str, Tensor], now: dict[str, Tensor]) -> None:
    known = set(map(id, before.values()))
    late = [name for name, param in now.items() if id(param) not in known]
    if late:
        names = ", ".join(late[:3]) + (", ..." if len(late) > 3 else "")
        raise ValueError(
            f"DistributedDataParallel does not know the parameters {names}, which were made in this first "
            "run, and would never synchronise them. Run the pair once before: elbo = loss(model, guide); "
            "elbo(data); elbo = DistributedDataParallel(elbo)."
        )


def _refuse_other_clocks(group: Group, clock: str) -> None:
    told = group.hear(clock)
    for rank, theirs in zip(group.world_ranks, told, strict=True):
        if theirs != told[0]:
            raise RankError(
                f"Rank {rank} trains with {theirs}, rank {group.world_ranks[0]} with {told[0]}. Give all "
                "ranks the same, and load the loss's steps on all of them: they are in the state_dict of "
                "loss(model, guide) and in that of the loss."
            )


def refuse_sharded(model: Callable, guide: Callable, what: str) -> None:
    """Refuse layers that gather their parameters whenever they are called (FSDP).

    Arguments:
        model: the model.
        guide: the guide.
        what: what they do not go together with.

    Raises:
        ValueError: if there are such.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return  # nobody can have sharded anything
    for fn, role in ((model, "model"), (guide, "guide")):
        for module in _parts(fn):
            if _is_sharded(module):
                raise ValueError(
                    f"A {type(module).__name__} of the {role} is sharded by itself and gathers its "
                    f"parameters each time it is called, which {what} does not allow: its gradient would be "
                    "wrong. Shard the loss as a whole and nothing inside it: elbo = loss(model, guide); "
                    "fully_shard(elbo)."
                )


def wrapped(fn: Callable) -> nn.Module | None:
    """A module in a function that synchronises its own gradients, if there is one."""
    for module in _parts(fn):
        if isinstance(module, DistributedDataParallel) or _is_sharded(module):
            return module
    return None


def _is_sharded(module: nn.Module) -> bool:
    names = {kind.__name__ for kind in type(module).__mro__}
    return not names.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})


def _parts(fn: Any) -> Iterator[nn.Module]:
    """Modules that a function is, belongs to, or names."""
    fn = poutine.unwrap(fn)
    held = [fn]
    if isinstance(fn, functools.partial):
        held += [fn.func, *fn.args, *fn.keywords.values()]
    function = getattr(fn, "__func__", fn)
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # of a cell that is empty so far
            held.append(cell.cell_contents)
    code = getattr(function, "__code__", None)
    held += [function.__globals__.get(name) for name in code.co_names] if code else []
    for one in held:
        owner = getattr(one, "__self__", one)
        if isinstance(owner, nn.Module):
            yield from owner.modules()


def warn_of_drift(name: str, optims: Iterable[Any], warn: Callable[[str], None]) -> None:
    """Warn of ranks whose optimisers average nothing, where there is more than one rank.

    An optimiser of the user's own may do so, and is trusted to.

    Arguments:
        name: what trains.
        optims: its optimisers.
        warn: called with a message.
    """
    for optim in optims:
        kind = type(optim)
        if kind.__module__.split(".")[0] not in ("pyro", "pyro_iw") or "horovod" in kind.__module__:
            continue
        if isinstance(optim, PyroOptim) and getattr(optim, "averaged", None) is None:
            warn(
                f"{name} on each of {dist.get_world_size()} ranks trains a model of its own, as its "
                "optimiser averages nothing. To train one model on the data of all, pass "
                "FusedOptim(torch.optim.Adam, {'lr': ...}, process_group=torch.distributed.group.WORLD). If "
                "the ranks are to have nothing to do with one another: "
                f"warnings.filterwarnings('ignore', '{name} on each of')."
            )
            return
