"""A simulated accelerator: tensors that say they lie on a device of their own and compute on the CPU.

The device is PyTorch's private-use backend under the name ``sim``, registered from Python. That cannot be
undone, so :func:`in_use` belongs into a process of its own. The tensors

* refuse to be mixed with those of the CPU, as CUDA's do; a CPU tensor without dims is a number to most
  operations,
* draw from a generator of their own, which :func:`torch.manual_seed` seeds like the CPU's, so that for one
  seed both devices draw the same,
* count what makes a host wait for a device: values read in Python, operations whose shapes depend on values,
  and copies from one to the other.

With the environment variable ``PYRO_IW_DEVICE=cuda`` a real device takes its place, with the CPU's noise.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_iter, tree_map_only

from .host_noise import HostNoise

__all__ = ["DEVICE", "IS_REAL", "NAME", "Counts", "counting", "in_use", "is_supported", "module"]

NAME = os.environ.get("PYRO_IW_DEVICE", "sim")
IS_REAL = NAME != "sim"
DEVICE = torch.device("privateuseone", 0)
_aten = torch.ops.aten

# Operations that take a tensor without dims for what it is, and want it on the device.
_STRICT = {
    *(_aten.cat, _aten.stack, _aten.gather, _aten.scatter, _aten.scatter_add),
    *(_aten.searchsorted, _aten.index_select, _aten.mm, _aten.bmm, _aten.addmm, _aten.dot),
}
# Indices may lie on the CPU, and are copied. Those of bools wait to be counted.
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
# The host waits for their result, or for its shape.
_WAITING = {
    *(_aten._local_scalar_dense, _aten.is_nonzero, _aten.equal, _aten.allclose),
    *(_aten.nonzero, _aten.masked_select, _aten.bincount, _aten.repeat_interleave),
    *(_aten._unique2, _aten.unique_dim, _aten.linalg_cholesky),
}
# All others are made of an empty tensor, which these resize.
_FACTORIES = """
empty.memory_format empty_strided arange arange.start arange.start_step linspace logspace eye eye.m randperm
tril_indices triu_indices
"""
# What autocast does in fewer digits, of all that it would.
_CAST = "linear mm bmm addmm matmul conv2d"


@dataclass
class Counts:
    """What has happened meanwhile: the operations in order.

    Attributes:
        reads: those that the host waits for.
        to_device: copies from the host to the device.
        to_host: copies back, other than of a single number that is read.
    """

    reads: list = field(default_factory=list)
    to_device: list = field(default_factory=list)
    to_host: list = field(default_factory=list)


_watching: list[Counts] = []


@contextmanager
def counting():
    """The :class:`Counts` of what runs inside."""
    counts = Counts()
    _watching.append(counts)
    try:
        yield counts
    finally:
        _watching.remove(counts)


def _note(kind, func):
    for counts in _watching:
        getattr(counts, kind).append(str(func))


class SimTensor(Tensor):
    """A tensor on the device, around one of the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw):
        tensor = Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        tensor.raw = raw
        return tensor

    def __repr__(self):
        return f"SimTensor({self.raw})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


class _Module:
    """What :func:`torch.get_device_module` gives for the device."""

    def __init__(self):
        self.generator = torch.Generator()
        #: Whether it has float64, as Apple's does not.
        self.has_float64 = True

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def manual_seed_all(self, seed):
        self.generator.manual_seed(seed)

    def get_rng_state(self, device=NAME):
        return self.generator.get_state()

    def set_rng_state(self, new_state, device=NAME):
        self.generator.set_state(new_state)

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


module = _Module()
_libraries: list[torch.library.Library] = []


def is_supported() -> bool:
    """Whether this PyTorch can have a backend registered from Python alone."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@contextmanager
def in_use():
    """While it lasts a real device draws the CPU's noise; ``sim`` is there from then on."""
    if IS_REAL:
        with HostNoise(NAME, _WAITING, _note):
            yield
    else:
        _register()
        yield


def _register() -> None:
    """Make ``sim`` a device of this process, for good."""

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self):
            return True

        def has_primary_context(self, dev_id):
            return True

        def is_built(self):
            return True

    backend_registration._setup_privateuseone_for_python_backend(NAME, module, Hook())
    library = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES.split():
        library.impl(name, _factory(name), "PrivateUse1")
    # ``torch.tensor`` copies below where subclasses dispatch.
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in _CAST.split():
        library.impl(name, _in_lower_precision(name), "AutocastPrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _libraries.extend([library, others])


def _dispatch(func, args, kwargs):
    """Run an operation on the CPU, as the device would."""
    packet = func.overloadpacket
    if packet in (_aten._to_copy, _aten.copy_):
        return _copy(func, args, dict(kwargs))
    tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
    ours = [one for one in tensors if isinstance(one, SimTensor)]
    host = [one for one in tensors if not isinstance(one, SimTensor)]
    indices = [one for one in args[1] if one is not None] if packet in _INDEXING else []
    for index in indices:
        if not isinstance(index, SimTensor):
            _note("to_device", func)
            host = [one for one in host if one is not index]
    if host and ours and (packet in _STRICT or any(one.dim() for one in host)):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got some of {NAME} and of the CPU"
        )
    if packet in _WAITING or any(index.dtype == torch.bool for index in indices):
        _note("reads", func)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    raw_args, raw_kwargs = tree_map_only(SimTensor, lambda one: one.raw, (args, kwargs))
    with _own_generator(torch.Tag.nondeterministic_seeded in func.tags):
        result = func(*raw_args, **raw_kwargs)
    return _on_device(result, ours)


def _on_device(result, ours=()):
    """The results as tensors of the device; what was changed in place, as the one it was."""
    known = {id(one.raw): one for one in ours}

    def wrapped(raw):
        if raw.dtype == torch.float64 and not module.has_float64:
            raise TypeError(f"{NAME} has no float64")
        before = known.get(id(raw))
        assert before is None or before.shape == raw.shape, "an operation that resizes its argument"
        return SimTensor(raw) if before is None else before

    return tree_map_only(Tensor, wrapped, result)


def _copy(func, args, kwargs):
    """``copy_`` and ``to``, in any direction."""
    target = args[0] if func.overloadpacket is _aten.copy_ else None
    source = args[0] if target is None else args[1]
    begins = isinstance(source, SimTensor)
    device = kwargs.pop("device", None)
    ends = isinstance(target, SimTensor) if target is not None else begins
    if device is not None:
        ends = torch.device(device).type == NAME
    if begins != ends:
        _note("to_device" if ends else "to_host", func)
    if target is not None:
        func(*(one.raw if isinstance(one, SimTensor) else one for one in (target, source)), *args[2:])
        return target
    kwargs = {name: kwargs[name] for name in kwargs if name not in ("pin_memory", "non_blocking")}
    raw = func(source.raw if begins else source, **kwargs)
    return _on_device(raw) if ends else raw


def _copy_from(source, target, non_blocking=False):
    return _copy(_aten.copy_.default, (target, source), {})


@contextmanager
def _own_generator(draws):
    """The device's generator in the place of the CPU's, for what draws."""
    if not draws:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(module.generator.get_state())
    try:
        yield
    finally:
        module.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def _factory(name):
    packet, _, overload = name.partition(".")
    func = getattr(getattr(_aten, packet), overload or "default")
    return lambda *args, **kwargs: _dispatch(func, args, {**kwargs, "device": DEVICE})


def _in_lower_precision(name):
    func = getattr(_aten, name)

    def cast(*args, **kwargs):
        dtype = torch.get_autocast_dtype(NAME)
        args = tree_map_only(Tensor, lambda one: one.to(dtype) if one.dtype == torch.float32 else one, args)
        with torch.autocast(NAME, enabled=False):
            return func(*args, **kwargs)

    return cast
