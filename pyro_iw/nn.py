r"""Networks that take exactly one batch dim, under particles and plates.

Particles put a dim left of every plate, so a decoder sees latents of shape ``[S, B, ...]``. ``nn.Linear`` and
everything elementwise broadcast over that; convolutions, batch normalisation and recurrent layers want one
batch dim. :class:`FoldBatch` gives it to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FoldBatch"]


class FoldBatch(nn.Module):
    r"""Runs a module that expects one batch dim under any number of them, none included.

    All dims left of the ``event_dim`` rightmost are folded into one for the module, and unfolded in what it
    returns:

    .. math:: [*\text{leading}, *\text{event}] \to [N, *\text{event}] \to [N, *\text{output}] \to
        [*\text{leading}, *\text{output}], \qquad N = \prod \text{leading}.

    - **Several tensors** (as positional arguments) have their leading dims broadcast against each other.
      What else is passed, by position or by keyword, reaches the module as it is.
    - **What is shared is computed once.** A leading dim along which every argument is expanded (a stride of
      0, as :meth:`torch.Tensor.expand` leaves it) or of size 1 is not written out: the module runs on one of
      its entries, and the output is expanded, so that it cannot be written to in place. Dropout then has one
      mask for all of them.
    - **Batch statistics** are those of all N rows. ``BatchNorm`` in train mode therefore normalises over
      particles as well as data wherever its input has particles, which makes one particle's density depend
      on the others: the losses warn of it, and it has to be in eval mode or give way to ``LayerNorm`` or
      ``GroupNorm``. Where the input has none, as in the encoder of a VAE, nothing is different.
    - **Recurrent layers**, attention and transformers have to be ``batch_first``. Final states of a recurrent
      layer have the batch on dim 1, where the leading dims take its place: ``nn.GRU`` gives ``[*leading,
      time, hidden]`` and ``[layers, *leading, hidden]``, and ``h_n[-1]`` is the last layer's, as always. An
      initial state cannot be passed.
    - **Names** of parameters are the module's, after ``module.``, in ``named_parameters``, ``state_dict`` and
      Pyro's param store alike. ``load_state_dict`` also takes what was saved before the module was wrapped.

    Arguments:
        module: what to run. It returns a tensor, or a tuple, list or dict of them, nested or not.
        event_dim: how many of the rightmost dims of its argument are no batch: 3 for ``[channels, height,
            width]``, 2 for ``[time, features]``. A sequence has one for each tensor argument.
        batch_dims: where the batch of size N is in what the module returns: one dim for all tensors or one
            for each, in their order (in that of the keys in a dict). Dim 0 by default, and 1 for the final
            states of ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``.

    Raises:
        ValueError: if ``event_dim`` or ``batch_dims`` is negative, or a recurrent layer or transformer not
            ``batch_first``; when called, if an argument has too few dims, leading dims do not broadcast, or
            the module changes the size of the batch; with the shapes.
        TypeError: if the module returns anything else than tensors.

    Example:
        >>> from pyro_iw.nn import FoldBatch
        >>> decoder = FoldBatch(torch.nn.ConvTranspose2d(4, 1, kernel_size=4), event_dim=3)
        >>> decoder(torch.randn(8, 10, 4, 5, 5)).shape  # 8 particles, 10 images
        torch.Size([8, 10, 1, 8, 8])
        >>> decoder(torch.randn(4, 5, 5)).shape
        torch.Size([1, 8, 8])
        >>> h, h_n = FoldBatch(torch.nn.GRU(3, 6, batch_first=True), event_dim=2)(torch.randn(8, 10, 7, 3))
        >>> h.shape, h_n.shape
        (torch.Size([8, 10, 7, 6]), torch.Size([1, 8, 10, 6]))
    """

    def __init__(
        self,
        module: nn.Module,
        event_dim: int | Sequence[int],
        *,
        batch_dims: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if _wants_time_first(module):
            raise ValueError(
                f"{type(module).__name__} has to have batch_first=True to be folded: else it takes the batch "
                "for the steps of a sequence."
            )
        if isinstance(module, nn.RNNBase) and batch_dims is None:
            batch_dims = (0, 1, 1) if isinstance(module, nn.LSTM) else (0, 1)
        self.module = module
        self.event_dim = _dims("event_dim", event_dim)
        self.batch_dims = _dims("batch_dims", 0 if batch_dims is None else batch_dims)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module.

        Arguments:
            args: tensors ``[*leading, *event]``, and what else the module takes.
            kwargs: passed on as they are.

        Returns:
            What the module returns, with the leading dims in place of the batch in each tensor.
        """
        given = [arg for arg in args if isinstance(arg, Tensor)]
        if isinstance(self.module, nn.RNNBase) and len(args) + len(kwargs) > 1:
            raise ValueError(
                f"{self._name} takes no initial state, whose batch is not where the input's is: wrap a "
                "module of your own that makes the state."
            )
        event_dims = self._event_dims(given)
        leading, computed = self._leading(given, event_dims)
        folded = iter([_fold(*pair, leading, computed) for pair in zip(given, event_dims, strict=True)])
        passed = [next(folded) if isinstance(arg, Tensor) else arg for arg in args]
        returned = self.module(*passed, **kwargs)
        return self._unfold(returned, computed, leading, _batch_dims(self.batch_dims))

    @property
    def _name(self) -> str:
        return f"FoldBatch({type(self.module).__name__})"

    def _event_dims(self, given: list[Tensor]) -> list[int]:
        """Number of event dims of each tensor."""
        if isinstance(self.event_dim, int):
            event_dims = [self.event_dim] * len(given)
        else:
            event_dims = list(self.event_dim)
        if not given or len(event_dims) != len(given):
            raise ValueError(
                f"{self._name} with event_dim={self.event_dim} was called with {len(given)} tensor(s) as "
                "positional arguments."
            )
        for tensor, event_dim in zip(given, event_dims, strict=True):
            if tensor.dim() < event_dim:
                raise ValueError(
                    f"{self._name} has event_dim={event_dim}, but an argument has the shape "
                    f"{tuple(tensor.shape)}, which is fewer dims."
                )
        return event_dims

    def _leading(self, given: list[Tensor], event_dims: list[int]) -> tuple[list[int], list[int]]:
        """The leading dims together, and those with size 1 for what all entries of a dim share."""
        shapes = [tensor.shape[: tensor.dim() - n] for tensor, n in zip(given, event_dims, strict=True)]
        try:
            leading = list(torch.broadcast_shapes(*shapes))
        except RuntimeError:
            raise ValueError(
                f"The leading dims of {self._name}'s arguments do not broadcast: shapes "
                f"{', '.join(str(tuple(tensor.shape)) for tensor in given)} with event_dim={self.event_dim}."
            ) from None
        computed = list(leading)
        for i, size in enumerate(leading):
            # From the right, as shapes are aligned; the dim's own stride tells an expanded one.
            dims = [(tensor, i - len(leading) - n) for tensor, n in zip(given, event_dims, strict=True)]
            if size > 1 and all(_is_shared(tensor, dim) for tensor, dim in dims):
                computed[i] = 1
        return leading, computed

    def _unfold(self, returned: Any, computed: list[int], leading: list[int], dims: Iterator[int]) -> Any:
        """The leading dims in place of the batch, in whatever the module returned."""
        if returned is None:
            return None
        if isinstance(returned, Tensor):
            dim, size = next(dims, None), math.prod(computed)
            if dim is None:
                raise ValueError(f"{self._name} has batch_dims={self.batch_dims} for more tensors than that.")
            if returned.dim() <= dim or returned.shape[dim] != size:
                raise ValueError(
                    f"The module of {self._name} was given a batch of {size} (leading dims "
                    f"{tuple(computed)}) and returned the shape {tuple(returned.shape)}, which has no such "
                    f"batch on dim {dim}. It has to leave the batch as it is (no reshape to a fixed size); "
                    "if it has it elsewhere, say where by batch_dims=."
                )
            before, after = returned.shape[:dim], returned.shape[dim + 1 :]
            return returned.reshape(*before, *computed, *after).expand(*before, *leading, *after)
        if isinstance(returned, Mapping):
            return {key: self._unfold(part, computed, leading, dims) for key, part in returned.items()}
        if isinstance(returned, tuple | list):
            parts = [self._unfold(part, computed, leading, dims) for part in returned]
            if hasattr(returned, "_fields"):  # a named tuple
                return type(returned)(*parts)
            return type(returned)(parts)
        raise TypeError(
            f"The module of {self._name} returned a {type(returned).__name__}. It has to return tensors, "
            "alone or in tuples, lists and dicts; make distributions of them outside."
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The module's own names, as they were before it was wrapped.
        names = {f"{prefix}{name}": f"{prefix}module.{name}" for name in self.module.state_dict()}
        if not any(name in state_dict for name in names.values()):
            for plain, name in names.items():
                if plain in state_dict:
                    state_dict[name] = state_dict.pop(plain)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the module."""
        batch_dims = "" if self.batch_dims == 0 else f", batch_dims={self.batch_dims}"
        return f"event_dim={self.event_dim}{batch_dims}"


def _wants_time_first(module: nn.Module) -> bool:
    """Whether a module takes sequences with their steps on dim 0."""
    if isinstance(module, nn.Sequential | nn.TransformerEncoder | nn.TransformerDecoder):
        parts = module if isinstance(module, nn.Sequential) else module.layers
        return any(map(_wants_time_first, parts))
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    kinds = nn.RNNBase | nn.MultiheadAttention | nn.Transformer
    return isinstance(module, kinds) and not module.batch_first


def _dims(name: str, dims: int | Sequence[int]) -> int | tuple[int, ...]:
    """An integer or a tuple of them, none negative."""
    each = [dims] if isinstance(dims, int) else list(dims)
    if any(not isinstance(dim, int) or dim < 0 for dim in each):
        raise ValueError(f"{name} must be an integer >= 0 or a sequence of them, got {dims!r}")
    return dims if isinstance(dims, int) else tuple(dims)


def _batch_dims(dims: int | tuple[int, ...]) -> Iterator[int]:
    return repeat(dims) if isinstance(dims, int) else iter(dims)


def _is_shared(tensor: Tensor, dim: int) -> bool:
    """Whether all entries of the dim are the same memory."""
    return tensor.dim() < -dim or tensor.shape[dim] == 1 or tensor.stride(dim) == 0


def _fold(tensor: Tensor, event_dim: int, leading: list[int], computed: list[int]) -> Tensor:
    """The tensor as ``[N, *event]``."""
    event = tensor.shape[tensor.dim() - event_dim :]
    tensor = tensor.expand(*leading, *event)
    for dim, (size, kept) in enumerate(zip(leading, computed, strict=True)):
        if kept != size:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.reshape(math.prod(computed), *event)
