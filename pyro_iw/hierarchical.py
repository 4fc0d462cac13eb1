r"""Hierarchical models: importance weights for global latents, and for every local one given those."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .bounds import MIWAE, Bound
from .elbo import ImportanceWeightedELBO
from .gradients.two_levels import LocallyEnhanced, TwoLevelEstimator
from .tracing.levels import check_local_plates, collect_levels
from .tracing.sites import read_sites
from .tracing.traces import Traces

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["LocallyEnhancedELBO"]


class LocallyEnhancedELBO(ImportanceWeightedELBO):
    r"""A bound for each local latent of a hierarchical model, inside a bound for its global ones.

    For global latents g (a population, weights, hyper-parameters) and local ones :math:`z_n` in a plate of
    data, one joint importance weight over all of them collapses as the plate grows. Here each local latent is
    weighted on its own, given each of S global particles:

    .. math::
        \ell_{snl} &= \log p_\theta(z_{snl}, x_n \mid g_s) - \log q_\phi(z_{snl} \mid g_s, x_n), \\
        \ell_s &= \log p_\theta(g_s) - \log q_\phi(g_s) + \sum_n c_n\, U(\ell_{sn1}, \dots, \ell_{snL}), \\
        \mathcal L &= V(\ell_1, \dots, \ell_S)

    with the local bound U, the outer bound V, and :math:`c_n = N / B` on a minibatch of B out of N. One local
    particle is the ELBO in the locals. The expected value is a lower bound of :math:`\log p(x)` for every
    pair of lower bounds where nothing is subsampled. On minibatches it is one where V is linear, as the
    default is and any ``MIWAE(M, 1)``; any other V is refused there.

    Everything outside of the local plates counts on the upper level, observations too. The cells of a local
    plate are its indices and those of plates around it; plates inside of it are summed within a cell. Guide
    and model run once: outside of the local plates on tensors of S particles, and only what depends on a
    local latent takes S L of them.

    Arguments:
        local: the bound of the local particles of each cell, for the plate that ``over`` names; or a mapping
            from the names of several plates side by side to a bound for each.
        over: the name of the plate.
        outer: the bound of the global particles; that of a single one unless given.
        estimator: ``"reparam"`` (``"auto"``), ``"stl"``, ``"dreg"``; ``"score"``, ``"vimco"`` and
            ``"ovis"`` where there are latents without a path. See :mod:`~pyro_iw.gradients.two_levels`.
        kl_weight: see :class:`ImportanceWeightedELBO`.
        vectorize_particles: run all particles of both levels in one pass; otherwise one by one.
        chunk_size: run no more than that many global particles at once, each with all of its local ones.
        max_plate_nesting: see :class:`ImportanceWeightedELBO`, as the rest.
        strict_enumeration_warning: whether to warn of sites marked for sequential enumeration.
        retain_graph: as of ``Tensor.backward``.
        compile: compile gradient steps.
        particle_group: the ranks that the global particles are divided among, each with all of its local
            ones, see :class:`ImportanceWeightedELBO`. Their number divides that of the global particles.

    Raises:
        ValueError: if an argument is out of range, or a local bound has another for the guide, as
            :class:`~pyro_iw.bounds.PIWAE` does. When it runs: if a local plate is not in the model, is a
            Python loop, or has no latent that the guide draws in it; if a latent lies inside of it in one of
            model and guide alone; if a site outside depends on a latent inside, or an index on the latents of
            others; and if it is a minibatch and the outer bound is not linear.

    References:
        | Variational Inference with Locally Enhanced Bounds for Hierarchical Models (Geffner & Domke, 2022),
          https://arxiv.org/abs/2203.04432

    Example:
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 1000, len(x)):
        ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     mean = pyro.sample("mean", dist.Normal(loc, 0.1))
        ...     with pyro.plate("data", 1000, len(x)):
        ...         pyro.sample("z", dist.Normal((mean + x) / 2, 0.7))
        >>> loss = LocallyEnhancedELBO(local=pyro_iw.bounds.IWAE(16), over="data")
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=loss)
        >>> value = svi.step(torch.randn(100))  # a minibatch, a global latent and importance weights
        >>> loss
        LocallyEnhancedELBO(local=IWAE(K=16), over='data', outer=MIWAE(M=1, K=1))
    """

    bound: LocallyEnhanced  # type: ignore[assignment]

    def __init__(
        self,
        local: Bound | Mapping[str, Bound],
        over: str | None = None,
        outer: Bound | None = None,
        *,
        estimator: str = "auto",
        kl_weight: float | Callable[[int], float] = 1.0,
        vectorize_particles: bool = True,
        chunk_size: int | None = None,
        max_plate_nesting: float = math.inf,
        strict_enumeration_warning: bool = True,
        retain_graph: bool | None = None,
        compile: bool = False,
        particle_group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        by_plate = _by_plate(local, over)
        outer = MIWAE(1, 1) if outer is None else outer
        if not isinstance(outer, Bound):
            raise ValueError(f"outer must be a pyro_iw.Bound, got {outer!r}")
        super().__init__(
            outer,
            estimator=estimator,
            kl_weight=kl_weight,
            vectorize_particles=vectorize_particles,
            chunk_size=chunk_size,
            max_plate_nesting=max_plate_nesting,
            strict_enumeration_warning=strict_enumeration_warning,
            retain_graph=retain_graph,
            compile=compile,
            particle_group=particle_group,
        )
        self.local, self.over, self.outer = local, over, outer
        self.bound = LocallyEnhanced(outer, by_plate)
        self._estimator = TwoLevelEstimator(estimator, self.bound)  # type: ignore[assignment]
        self._runner.local = self.bound.numbers

    @property
    def _bounds(self) -> list[Bound]:
        return [self.bound.outer, *self.bound.local.values()]

    def _check_pair(self, traces: Traces) -> None:
        check_local_plates(read_sites(traces), list(self.bound.local))
        super()._check_pair(traces)

    def _read(self, kl_weight: float, traces: Traces) -> Any:
        local_is_linear = {name: inner.is_linear for name, inner in self.bound.local.items()}
        return collect_levels(
            traces, self.bound.numbers, self.bound.is_linear, local_is_linear, kl_weight, self._warn_once
        )

    def __repr__(self) -> str:
        over = "" if self.over is None else f", over={self.over!r}"
        return f"{type(self).__name__}(local={self.local!r}{over}, outer={self.outer!r}{self._options()})"


def _by_plate(local: Bound | Mapping[str, Bound], over: str | None) -> dict[str, Bound]:
    """The local bounds by the name of their plate."""
    if isinstance(local, Bound):
        if not isinstance(over, str):
            raise ValueError(
                f"over must name the plate that {local!r} is a bound in, got {over!r}. For several plates "
                "pass a mapping: local={'students': IWAE(16), 'items': IWAE(8)}."
            )
        return {over: local}
    valid = isinstance(local, Mapping) and bool(local)
    if not valid or not all(isinstance(key, str) and isinstance(local[key], Bound) for key in local):
        raise ValueError(
            f"local must be a pyro_iw.Bound or a mapping from names of plates to bounds, got {local!r}"
        )
    if over is not None:
        raise ValueError(
            f"over={over!r} names the plate of one local bound, but local names its own. Drop it."
        )
    return dict(local)
