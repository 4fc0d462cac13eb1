r"""One particle of a vectorised run once more, by itself: does it have the same densities?

Under particles a model that counts dims from the left, or by size, means something else than with one
particle: ``softmax(h, 1)``, ``mean(0)``, ``z[:, 0]``, a bare ``squeeze()``. Where the shapes happen to fit,
nothing fails and all log-weights are wrong. So one particle of a pair's first vectorised run is taken out,
its latent values are given to guide and model without the particle dim, and the log densities of both runs
are compared, site by site in the order in which they ran.

On two levels the indices of a local plate get different local particles. So an index whose density depends on
the latents of others, for which there is no local weight, shows as well.

What differs by itself is no evidence: layers that draw their own noise (dropout), models that count their
calls, computations so ill-conditioned that rounding shows. A difference is therefore held against that
between two runs of the single particle, with other random numbers and with its values moved by a few
roundings, and counts where it is a hundred times as large. Draws from few values may happen to be the same
twice, so there are several such runs before a difference counts.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from .._support.devices import autocast_dtype, wide
from .guide_values import ids_of, is_enumerated_in_guide
from .latents import own_frames, own_shape
from .messages import base_of, latent_sites
from .minibatches import OneMinibatch
from .sites import Site, read_sites
from .traces import Pair, PairTraces, Traces, is_transformed, trace_particle

__all__ = ["Alone"]

#: Relative accuracy that log densities are expected to have, whatever the order of operations.
_ACCURACY = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
#: How much larger than what the particle differs by from itself a difference has to be.
_CLEARLY = 100.0
#: Runs of the single particle for that, until one differs: a coin shows one side alone in 1e-6 of cases.
_RUNS = 20
#: Latent values are moved by at most this much, relative to their size.
_ROUNDING = 5e-7
#: What cannot be run or read by itself says nothing here; what is wrong with it is said elsewhere, by name.
_FAILURES = (ValueError, RuntimeError, IndexError, TypeError, AssertionError, KeyError, AttributeError)


class _Difference(NamedTuple):
    """Where two log densities of a site differ most."""

    size: float
    together: float
    alone: float


class Alone:
    """A particle of a vectorised run, to be run by itself.

    It is the middle one: a wrong index from the left or the right most often takes the first or the last.

    Arguments:
        pair: the pair and its arguments.
        traces: the traces of the run, as it was made: with or without gradients.
        minibatch: the subsamples that it drew, by the name of their plate.
    """

    def __init__(self, pair: Pair, traces: Traces, minibatch: dict[str, Any]) -> None:
        self._pair = pair
        self._traces = traces
        self._minibatch = minibatch
        self._particle = traces.num_particles // 2
        self._gradients = torch.is_grad_enabled()
        self._sites: list[Site] | None = None

    def run(self) -> bool:
        """Run it; whether that is possible."""
        self._sites = self._read_again(move=0.0)
        return self._sites is not None

    def compare(self) -> bool:
        """Compare its densities with those it has among the others.

        Returns:
            Whether something can be said of all of its sites.

        Raises:
            ValueError: if the particles' densities depend on one another; the first such site is named.
        """
        together = self._read_together()
        if self._sites is None or together is None:
            return False
        alone = {(site.role, site.name): site for site in self._sites}
        differences = {}
        for site in together:
            single = alone.get((site.role, site.name))
            if single is not None:
                difference = self._difference(site, single)
                if difference is not None:
                    differences[site.role, site.name] = site, difference
        if not differences:
            return True
        suspects = {key: found for key, found in differences.items() if self._is_inverse_exact(found[0])}
        for _ in range(_RUNS):
            again = self._read_again(move=_ROUNDING) if suspects else None
            if again is None:
                return False
            twice = {(site.role, site.name): site for site in again}
            for key, (_, difference) in list(suspects.items()):
                if key in twice:
                    noise = _largest(self._values(alone[key]), self._values(twice[key]), None)
                    if difference.size > _CLEARLY * (0.0 if noise is None else noise.size):
                        continue
                del suspects[key]
        for site, difference in suspects.values():
            raise ValueError(self._message(site, difference))
        return False

    def _read_together(self) -> list[Site] | None:
        """The sites of the vectorised run, read off a copy of its traces.

        As the run itself reads them, with or without gradients: distributions keep what they have evaluated
        (Pyro's rejection samplers, transforms), and will give it out again.
        """
        traces = self._traces._replace(pairs=[_copy(self._traces.pairs[0])])
        with torch.set_grad_enabled(self._gradients):
            return _read(traces)

    def _read_again(self, move: float) -> list[Site] | None:
        """The sites of a run of the particle by itself."""
        # Without particles' dims the first free one lies further to the right.
        enum_dim = self._traces.local_dim or self._traces.particle_dim if self._traces.enum_dim else None
        if ids_of(self._traces.pairs[0].guide):
            enum_dim = self._traces.enum_dim  # where values given to the model have theirs
        try:
            with OneMinibatch(self._minibatch):
                traced = trace_particle(self._pair, self._latents(move), enum_dim)
        except _FAILURES:
            return None
        self._fill_in(traced.guide)
        return _read(Traces([traced], 1, None, enum_dim))

    def _latents(self, move: float) -> dict[str, Tensor]:
        """The particle's latent values, as they are without the particle dim.

        Those of a Delta are left to be computed: they would have to be met to the last bit. So are those that
        are enumerated.
        """
        values = {}
        for name, site in latent_sites(self._traces.pairs[0].guide).items():
            if isinstance(base_of(site["fn"]), Delta) or is_enumerated_in_guide(site):
                continue
            value: Any = self._take(site, site["value"])
            if move and _is_real(site["fn"]):
                value = value * (1 + min(4 * torch.finfo(value.dtype).eps, move))
            if hasattr(site["value"], "_unquantize"):  # what a straight-through value is scored at
                value._unquantize = self._take(site, site["value"]._unquantize)
            values[name] = value
        return values

    def _take(self, site: Any, value: Tensor) -> Tensor:
        """A latent site's value, or a tensor of its shape, without the particle dim."""
        assert self._traces.particle_dim is not None
        event_dim, nesting = getattr(site["fn"], "event_dim", 0), -self._traces.particle_dim - 1
        local_dim = self._traces.local_dim
        if local_dim is not None:
            value = self._one_local(value, local_dim, site["cond_indep_stack"], event_dim)
        size = self._traces.num_particles
        if value.dim() - event_dim > nesting + 1:  # of each of the values that the guide enumerates
            dim = -nesting - 1 - event_dim
            return value.narrow(dim, self._particle if value.shape[dim] > 1 else 0, 1).clone()
        return own_shape(value, event_dim, own_frames(site), nesting, size)[self._particle].clone()

    def _one_local(self, tensor: Tensor, dim: int, frames: Any, event_dim: int = 0) -> Tensor:
        """One of the local particles, on a dim of size 1: another one in each cell of their plate.

        Cells are independent given what lies outside, so any local particles together are a joint value. What
        depends on those of other cells has another density among them.
        """
        dim -= event_dim
        if tensor.dim() < -dim:
            return tensor
        number, shape = tensor.shape[dim], [1] * tensor.dim()
        index = torch.tensor([number // 2], device=tensor.device)
        for frame in frames:
            if frame.name in self._traces.local and frame.dim is not None:
                shape[frame.dim - event_dim] = tensor.shape[frame.dim - event_dim]
                index = index + torch.arange(shape[frame.dim - event_dim], device=tensor.device)
        size = list(tensor.shape)
        size[dim] = 1
        return tensor.gather(dim, (index % number).reshape(shape).expand(size))

    def _fill_in(self, guide: Trace) -> None:
        """Give sites that cannot be scored here (flows without an inverse) the density that they had."""
        before = self._traces.pairs[0].guide.nodes
        for name, site in latent_sites(guide).items():
            if is_transformed(site["fn"]) and name in before:
                known: Any = before[name].get("unscaled_log_prob")
                try:
                    site["unscaled_log_prob"] = site["fn"].log_prob(site["value"])
                except _FAILURES:
                    if known is not None:
                        site["unscaled_log_prob"] = self._select(known, site["cond_indep_stack"])

    def _select(self, density: Tensor, frames: Any) -> Tensor:
        """The particle's part of a log density of all, or one of its own as it is."""
        dim = self._traces.particle_dim
        assert dim is not None
        if density.dim() >= -dim:
            density = density.select(dim, self._particle if density.shape[dim] > 1 else 0)
        local_dim = self._traces.local_dim
        if local_dim is not None and density.dim() >= -local_dim:
            density = self._one_local(density, local_dim, frames).squeeze(local_dim)
        return density

    def _values(self, site: Site) -> Tensor:
        # What the guide draws follows its distribution, and goes on to other sites, whatever a mask says.
        drawn = site.role == "guide" and site.is_latent
        density = scale_and_mask(site.log_prob, mask=None if drawn else site.message["mask"])
        return self._select(density, site.frames)

    def _difference(self, together: Site, alone: Site) -> _Difference | None:
        """Where a site's densities differ most, if by more than rounding explains."""
        one, other = self._values(together), self._values(alone)
        value = together.message.get("value")
        size = value.numel() / max(together.log_prob.numel(), 1) if isinstance(value, Tensor) else 1.0
        # Rounding errors of as many terms as there are in an event.
        return _largest(one, other, (_accuracy(one, other), math.sqrt(max(size, 1.0))))

    def _is_inverse_exact(self, site: Site) -> bool:
        """Whether a transformed distribution scores the values it has made as it does those it has not."""
        fn = site.message["fn"]
        if site.role == "model" or not is_transformed(fn):
            return True
        try:
            uncached = self._select(fn.log_prob(site.message["value"].clone()), site.frames)
        except _FAILURES:
            return False
        cached = self._select(site.log_prob, site.frames)
        return _largest(cached, uncached, (_accuracy(cached, uncached), 1.0)) is None

    def _message(self, site: Site, difference: _Difference) -> str:
        number, dim = self._traces.num_particles, self._traces.particle_dim
        local = "".join(
            f" Or an index of plate {frame.name!r} depends on latents of others (z.mean(-1), z.roll(1, -1)), "
            "however the particles run: then there is no local weight for each index. Sample such "
            "latents outside of the plate, or use a bound with one joint weight (IWAE_ELBO with plates=())."
            for frame in site.frames
            if frame.name in self._traces.local
        )
        return (
            f"Particles are not independent of one another at site {site}: the log density of one of them is "
            f"{difference.together:.6g} when {number} run in one pass, but {difference.alone:.6g} when it "
            "runs by itself, so the importance weights would be wrong. What is computed for that site counts "
            "dims from the left or by size (softmax(h, 1), mean(0), cat(..., 0), z[:, 0], a bare squeeze()), "
            f"which under particles (on dim {dim}) are other dims, or takes statistics over all of a batch. "
            "Count dims from the right (softmax(h, -1), z[..., 0]), or pass vectorize_particles=False to run "
            f"the particles one by one.{local}"
        )


def _read(traces: Traces) -> list[Site] | None:
    """The sites with their log densities; None if they are refused, which the run itself will be as well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's own reading says it
            return read_sites(traces)
    except _FAILURES:
        return None


def _copy(pair: PairTraces) -> PairTraces:
    """Traces whose messages can be written to."""
    copies = []
    for trace in (pair.model, pair.guide):
        copy = trace.copy()
        for name, site in trace.nodes.items():
            message: Any = {**site, "infer": dict(site["infer"] or {})} if "infer" in site else dict(site)
            copy.nodes[name] = message
        copies.append(copy)
    model, guide = copies
    return PairTraces(model, guide)


def _is_real(fn: Any) -> bool:
    """Whether all real numbers are values, so that one can be moved a little."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return False
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _accuracy(*densities: Tensor) -> float:
    """The relative accuracy to expect of log densities, given what they may have been computed from."""
    kind = densities[0].device.type
    dtypes = {density.dtype for density in densities} | {torch.get_default_dtype()}
    autocast = autocast_dtype(kind)
    if autocast is not None:
        dtypes.add(autocast)
    cuda = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if (kind == "cuda" and cuda) or torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # as many digits as TF32
    return max(_ACCURACY.get(dtype, 0.0) for dtype in dtypes)


def _largest(one: Tensor, other: Tensor, tolerance: tuple[float, float] | None) -> _Difference | None:
    """Where two log densities differ most; None if nowhere by more than relative accuracy times the size."""
    try:
        one, other = torch.broadcast_tensors(wide(one), wide(other))
    except RuntimeError:  # they do not even have the same shape
        return _Difference(math.inf, math.nan, math.nan)
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, (one - other).abs()).nan_to_num(nan=math.inf)
    if tolerance is not None:
        accuracy, extra = tolerance
        gap = gap.masked_fill(gap <= accuracy * (torch.minimum(one.abs(), other.abs()) + extra), 0.0)
    if gap.numel() == 0:
        return None
    index = int(gap.argmax())
    size = float(gap.reshape(-1)[index])
    if size == 0:
        return None
    return _Difference(size, float(one.reshape(-1)[index]), float(other.reshape(-1)[index]))
