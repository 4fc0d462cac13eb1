"""A real accelerator with the CPU's random numbers, for a comparison number by number.

What draws does so on the CPU and is copied; what makes the host wait, or copies, is counted, as of the
simulated one.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

__all__ = ["HostNoise"]

_aten = torch.ops.aten
_COPIES = {_aten._to_copy, _aten.copy_}


class HostNoise(TorchDispatchMode):
    """While it is entered, the CPU's generator serves a device too.

    Arguments:
        kind: the device's type.
        waiting: operations that the host waits for.
        note: called with ``reads``, ``to_device`` or ``to_host`` and the operation.
    """

    def __init__(self, kind, waiting, note):
        super().__init__()
        self.kind, self.waiting, self.note = kind, waiting, note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        there = any(one.device.type == self.kind for one in tensors)
        if there and func.overloadpacket in self.waiting:
            self.note("reads", func)
        given = kwargs.get("device")
        wanted = given is not None and torch.device(given).type == self.kind
        if torch.Tag.nondeterministic_seeded in func.tags and (there or wanted):
            return self._draw(func, args, kwargs)
        result = func(*args, **kwargs)
        if func.overloadpacket in _COPIES:
            source = args[1] if func.overloadpacket is _aten.copy_ else args[0]
            begins, ends = (one.device.type == self.kind for one in (source, result))
            if begins != ends:
                self.note("to_device" if ends else "to_host", func)
        return result

    def _draw(self, func, args, kwargs):
        device = torch.device(kwargs.get("device") or self.kind)
        own = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        here = {id(one): one.cpu() for one in own}
        here_args, here_kwargs = tree_map_only(Tensor, lambda one: here[id(one)], (args, kwargs))
        if "device" in kwargs:
            here_kwargs["device"] = torch.device("cpu")
        result = func(*here_args, **here_kwargs)
        changed = {id(here[id(one)]): one for one in own}

        def back(raw):
            one = changed.get(id(raw))
            return raw.to(device) if one is None else one.copy_(raw)

        return tree_map_only(Tensor, back, result)
