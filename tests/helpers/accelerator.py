"""A simulated accelerator: tensors that say they lie on a device of their own and compute on the CPU.

The device is PyTorch's private-use backend under the name ``sim``, registered from Python, which cannot be
undone: import this module in a process that may end with it. Its tensors

* refuse to be mixed with those of the CPU, as CUDA's do; a CPU tensor without dims is a number to most
  operations,
* draw from a generator of their own, which :func:`torch.manual_seed` seeds like the CPU's, so that for one seed
  both devices draw the same,
* count what would make a host wait: values read in Python, operations whose shapes depend on values, and copies
  from device to host and back.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only

NAME = "sim"
aten = torch.ops.aten


@dataclass
class Counts:
    """What has happened while they were taken, each as the operations in order.

    Attributes:
        reads: values of the device read on the host, which waits for it.
        to_device: copies from the host to the device.
        to_host: copies back.
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

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


DEVICE = torch.device("privateuseone", 0)


class Module:
    """What :func:`torch.get_device_module` gives for the device."""

    def __init__(self):
        self.generator = torch.Generator()
        self.initialized = True
        #: Whether it has float64, as Apple's does not.
        self.has_float64 = True

    def is_initialized(self):
        return self.initialized

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


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self):
        return True

    def has_primary_context(self, dev_id):
        return True

    def is_built(self):
        return True


_module = Module()
backend_registration._setup_privateuseone_for_python_backend(NAME, _module, _Hook())


# Operations that take a tensor without dims for what it is.
_STRICT = {aten.cat, aten.stack, aten.gather, aten.scatter, aten.searchsorted, aten.index_select, aten.mm, aten.dot}
# Indices may lie on the CPU; they are copied.
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# On a device the shape of the result has to be waited for.
_WAITING = {
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.unique_dim,
    aten._unique2,
    aten.bincount,
    aten.repeat_interleave,
    aten.is_nonzero,
    aten._local_scalar_dense,
    aten.allclose,
    aten.linalg_cholesky,
}


def dispatch(func, args, kwargs):
    """Run an operation on the CPU, as the device would."""
    packet = func.overloadpacket
    tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
    ours = [one for one in tensors if isinstance(one, SimTensor)]
    host = [one for one in tensors if not isinstance(one, SimTensor)]
    device = kwargs.get("device")
    if packet in (aten._to_copy, aten.copy_):
        return _copy(func, args, kwargs)
    if host and ours:
        if packet in _INDEXING:
            indices = [one for one in tree_iter(args[1]) if isinstance(one, Tensor)]
            for one in indices:
                if not isinstance(one, SimTensor):
                    _note("to_device", func)
            host = [one for one in host if not any(one is index for index in indices)]
        if packet in _STRICT or any(one.dim() for one in host):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got one of {NAME} and one of the CPU"
            )
    if packet in _INDEXING and any(
        one is not None and one.dtype == torch.bool for one in args[1]
    ):
        _note("reads", func)
    if packet in _WAITING:
        _note("reads", func)
    to_host = device is not None and torch.device(device).type == "cpu"
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    kwargs = {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs
    inner_args, inner_kwargs = tree_map_only(SimTensor, lambda one: one.raw, (args, kwargs))
    if torch.Tag.nondeterministic_seeded in func.tags:
        with _own_generator():
            result = func(*inner_args, **inner_kwargs)
    else:
        result = func(*inner_args, **inner_kwargs)
    if to_host:
        return result
    return _rewrap(result, ours)


def _rewrap(result, ours):
    if not _module.has_float64:
        for one in tree_iter(result):
            if isinstance(one, Tensor) and one.dtype == torch.float64:
                raise TypeError(f"{NAME} has no float64")
    by_raw = {id(one.raw): one for one in ours}

    def wrap(raw):
        known = by_raw.get(id(raw))
        if known is None:
            return SimTensor(raw)
        if known.shape != raw.shape or known.stride() != raw.stride():
            raise NotImplementedError("an operation that changes the shape in place")
        return known

    return tree_map_only(Tensor, wrap, result)


def _copy(func, args, kwargs):
    if func.overloadpacket is aten.copy_:
        target, source = args[:2]
        ours = isinstance(target, SimTensor), isinstance(source, SimTensor)
        if ours == (True, False):
            _note("to_device", func)
        if ours == (False, True):
            _note("to_host", func)
        raw = [one.raw if isinstance(one, SimTensor) else one for one in (target, source)]
        func(*raw, *args[2:])
        return target
    source = args[0]
    device = kwargs.pop("device", None)
    is_here = isinstance(source, SimTensor)
    stays = is_here if device is None else torch.device(device).type == NAME
    if is_here and not stays:
        _note("to_host", func)
    if stays and not is_here:
        _note("to_device", func)
    kwargs.pop("pin_memory", None)
    kwargs.pop("non_blocking", None)
    raw = func(source.raw if is_here else source, **kwargs)
    return _rewrap(raw, []) if stays else raw


@contextmanager
def _own_generator():
    """The device's generator in the place of the CPU's."""
    before = torch.get_rng_state()
    torch.set_rng_state(_module.generator.get_state())
    try:
        yield
    finally:
        _module.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def _factory(name):
    packet, _, overload = name.partition(".")
    func = getattr(getattr(aten, packet), overload or "default")

    def make(*args, **kwargs):
        return dispatch(func, args, {**kwargs, "device": DEVICE})

    return make


_library = torch.library.Library("aten", "IMPL")
# All others are made of an empty tensor, which these resize.
_FACTORIES = """
empty.memory_format empty_strided arange arange.start arange.start_step linspace logspace eye eye.m randperm
tril_indices triu_indices
"""
for _name in _FACTORIES.split():
    _library.impl(_name, _factory(_name), "PrivateUse1")
_library.impl("_copy_from", lambda source, target, non_blocking=False: _copy(aten.copy_.default, (target, source), {}), "PrivateUse1")
