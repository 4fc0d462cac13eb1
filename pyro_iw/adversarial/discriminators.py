r"""Discriminators of latent sites: their losses, their modes, and what makes one unfit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.nn.functional import softplus

from .._support.random_state import RandomState
from ..tracing.messages import is_auxiliary
from .pair import Cells

__all__ = ["Discriminators"]

# What a discriminator that does not fit its values may raise; an error of any other type goes on as it is.
_MISFIT = (ValueError, RuntimeError, IndexError, TypeError, AssertionError)
# Nodes of the graph that pass on what there is in another shape.
_RESHAPES = ("View", "Squeeze", "Unsqueeze", "Reshape", "UnsafeView", "Select", "Alias")


class Discriminators:
    """The discriminators of a pair's latent sites.

    Arguments:
        modules: modules by site, or one alone.

    Attributes:
        modules: modules by site; None while one alone waits for a guide's only site.

    Raises:
        ValueError: if there is none or one is no module.
    """

    def __init__(self, modules: Mapping[str, nn.Module] | nn.Module) -> None:
        self.modules: dict[str, nn.Module] | None = None
        self._alone: nn.Module | None = None
        self._tried: dict[str, Any] = {}
        if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleDict):
            self._alone = modules
            return
        if not isinstance(modules, (Mapping, nn.ModuleDict)) or not len(modules):
            raise ValueError(
                "discriminators has to be a module, or a dict of modules by latent site with at least one "
                f"entry, got {modules!r}."
            )
        for name, module in modules.items():
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"The discriminator of site {name!r} has to be a torch.nn.Module, got "
                    f"{type(module).__name__}."
                )
        self.modules = dict(modules.items())

    def name(self, latents: Mapping[str, Any]) -> list[str]:
        """Their sites' names; one alone goes to the guide's only site.

        Arguments:
            latents: messages of the guide's latent sites.

        Raises:
            ValueError: if the guide has none or several.
        """
        if self.modules is None:
            names = [name for name, site in latents.items() if not is_auxiliary(site)]
            if len(names) != 1:
                raise ValueError(
                    f"One discriminator is given, but the guide has {len(names)} latent sites {names}. Give "
                    "a dict with a discriminator for each (sites of mere noise are to be marked "
                    "infer={'is_auxiliary': True}; a code is drawn by pyro.sample, if need be from "
                    "Delta(..., event_dim=...), and not by pyro.deterministic)."
                )
            assert self._alone is not None
            self.modules = {names[0]: self._alone}
        return list(self.modules)

    @contextmanager
    def mode(self, train: bool) -> Iterator[None]:
        """Train or eval mode for all; each module has its own back at the end."""
        assert self.modules is not None
        modes = [(part, part.training) for module in self.modules.values() for part in module.modules()]
        try:
            for module in self.modules.values():
                module.train(train)
            yield
        finally:
            for part, training in modes:
                part.training = training

    def parameters(self) -> dict[str, Tensor]:
        """Those that require gradients, registered in the param store, by their names there.

        Raises:
            ValueError: if the store has others under these names.
        """
        params = {}
        assert self.modules is not None
        for site, module in self.modules.items():
            for name, param in module.named_parameters():
                if not param.requires_grad:
                    continue
                # As pyro.module does, which warns of those that are frozen.
                full = param_with_module_name(f"discriminator.{site}", name)
                stored: Any = pyro.param(full, param)
                params[full] = stored.unconstrained()
                if params[full] is not param:
                    raise ValueError(
                        f"The param store has another parameter {full!r} than the discriminator of site "
                        f"{site!r}. If it is of an earlier run, call pyro.clear_param_store() first; if of "
                        "another AdversarialSVI at work, run each in a pyro.get_param_store().scope(); if it "
                        f"was loaded, pyro.module('discriminator.{site}', module, update_module_params=True) "
                        "puts it into the module."
                    )
        return params

    def try_on(self, cells: Mapping[str, Cells]) -> None:
        """Call each on values of a kind that it has not seen, to refuse it before anything is updated.

        Raises:
            ValueError: if one fails, returns another shape than logits have, or ends in a sigmoid.
        """
        for name, (values, features) in cells.items():
            kind = (
                values.shape[1:],
                values.dtype,
                values.device,
                None if features is None else features.shape[1:],
            )
            if self._tried.get(name) == kind or not len(values):
                continue
            state = RandomState.now()
            with torch.enable_grad(), self.mode(train=False):
                # A clone, since a leaf would not take a first operation in place.
                logits = self._logits(name, Cells(values.detach().requires_grad_().clone(), features))
            state.restore()
            if _is_sigmoid(logits):
                raise ValueError(
                    f"The discriminator of site {name!r} ends in a sigmoid, but it has to return logits: "
                    "leave the sigmoid out."
                )
            self._tried[name] = kind

    def losses(self, real: Mapping[str, Cells], fake: Mapping[str, Cells]) -> dict[str, Tensor]:
        """What the discriminators minimise by site, in nats per cell.

        Arguments:
            real: cells of the prior.
            fake: cells of the guide.
        """
        losses = {}
        for name in fake:
            # In one call, for batch normalisation to see both classes in one batch: of two batches it would
            # take away the means, and so what the classes differ by.
            logits = self._logits(name, real[name].cat(fake[name]))
            of_real, of_fake = logits.split([len(real[name].values), len(fake[name].values)])
            losses[name] = _mean(softplus(-of_real)) + _mean(softplus(of_fake))
        return losses

    def guide_losses(self, fake: Mapping[str, Cells]) -> dict[str, Tensor]:
        """What the guide minimises by site, in nats per cell."""
        return {name: _mean(softplus(-self._logits(name, cells))) for name, cells in fake.items()}

    def _logits(self, name: str, cells: Cells) -> Tensor:
        """A discriminator's logits, ``[cells]``."""
        values, features = cells
        if not len(values):  # all masked, and not every module takes an empty batch
            return values.reshape(0)
        args = (values,) if features is None else (values, features)
        shapes = " and ".join(str(tuple(arg.shape)) for arg in args)
        assert self.modules is not None
        try:
            logits = self.modules[name](*args)
        except Exception as error:
            # Running out of memory is none of its faults.
            if type(error) not in _MISFIT or "allocate memory" in str(error):
                raise
            hint = "" if values.dim() > 1 else " (a scalar site: begin with nn.Unflatten(0, (-1, 1)))"
            hint += "" if features is None else " (called with features too, since condition= is given)"
            raise ValueError(
                f"The discriminator of site {name!r} failed on values of shape {shapes}{hint} with "
                f"{type(error).__name__}: {error}"
            ) from error
        size = len(values)
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if shape not in ((size,), (size, 1)):
            raise ValueError(
                f"The discriminator of site {name!r} has to return one logit a cell, of shape {(size,)} or "
                f"{(size, 1)} for values of shape {shapes}, but it returned {shape}."
            )
        return logits.reshape(size)


def _mean(losses: Tensor) -> Tensor:
    """The mean, 0 where all is masked."""
    return losses.sum() / max(len(losses), 1)


def _is_sigmoid(logits: Tensor) -> bool:
    """Whether a tensor has just come out of a sigmoid, be it a module or a function."""
    node: Any = logits.grad_fn
    while node is not None and node.name().startswith(_RESHAPES):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(("Sigmoid", "LogSigmoid"))
