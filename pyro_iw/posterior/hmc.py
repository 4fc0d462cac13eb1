r"""Hamiltonian Monte Carlo for many chains and many cells at once, each cell with a step size of its own.

The state of S chains is a list of tensors of unconstrained coordinates; a *cell* is a part of it that is
independent of the rest, such as one datapoint's latents. One call moves all chains in all cells, and every
(chain, cell) accepts or rejects for itself. The densities moved along are

.. math:: f_\beta(u) = q(u)\, w(u)^\beta, \qquad w(u) = p(x, u) / q(u),

the geometric path from q, at :math:`\beta = 0`, to :math:`p(x, u)`, at 1.

A transition draws momenta :math:`v \sim N(0, I)` and takes L leapfrog steps of size :math:`\epsilon` in the
coordinates :math:`u / \sigma`, where :math:`\sigma` is a scale for each coordinate; the step size is jittered
by a tenth each time, lest trajectories close on themselves. With fixed :math:`\epsilon` and :math:`\sigma` it
is reversible with respect to :math:`f_\beta`. :class:`Tuning` finds both, on chains that are thrown away.

References:
    | Hybrid Monte Carlo (Duane et al., 1987)
    | MCMC Using Hamiltonian Dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Path", "Point", "Setting", "Tuning", "transition"]

# The step size varies by this share either way.
_JITTER = 0.1


class Point(NamedTuple):
    """Where the chains are, with what is known of the densities there.

    Attributes:
        coordinates: unconstrained, each of shape ``[S, *batch, *event]``.
        log_q: log density of the path's beginning, of shape ``[S, *cells]``.
        log_w: log-weight of its end against its beginning, of the same shape.
        grad_q: gradient of ``log_q``, of the shapes of ``coordinates``.
        grad_w: gradient of ``log_w``, likewise.
    """

    coordinates: list[Tensor]
    log_q: Tensor
    log_w: Tensor
    grad_q: list[Tensor]
    grad_w: list[Tensor]

    def log_density(self, beta: float) -> Tensor:
        """:math:`\\log f_\\beta`, of shape ``[S, *cells]``."""
        # 0 * -inf would be NaN.
        return self.log_q if beta == 0 else self.log_q + beta * self.log_w

    def gradient(self, beta: float) -> list[Tensor]:
        """The gradient of :meth:`log_density`."""
        if beta == 0:
            return self.grad_q
        return [q + beta * w for q, w in zip(self.grad_q, self.grad_w, strict=True)]


class Path(Protocol):
    """What a transition needs to know of the densities."""

    def at(self, coordinates: Sequence[Tensor]) -> Point:
        """Densities and gradients at some coordinates."""
        ...

    def to_cells(self, per_coordinate: Sequence[Tensor]) -> Tensor:
        """Tensors of the coordinates' shapes, summed to ``[S, *cells]``."""
        ...

    def spread(self, per_cell: Tensor) -> list[Tensor]:
        """``[S, *cells]`` in shapes that broadcast against the coordinates; S may be 1."""
        ...


class Setting(NamedTuple):
    """How far a transition goes.

    Attributes:
        step_size: :math:`\\epsilon`, of shape ``[*cells]``.
        scales: :math:`\\sigma`, which broadcast against the coordinates.
    """

    step_size: Tensor
    scales: list[Tensor]


def transition(
    path: Path, point: Point, beta: float, setting: Setting, num_leapfrog: int
) -> tuple[Point, Tensor]:
    """Move all chains by one transition that leaves :math:`f_\\beta` as it is.

    Arguments:
        path: the densities.
        point: where the chains are.
        beta: the inverse temperature.
        setting: step size and scales.
        num_leapfrog: the number L of leapfrog steps.

    Returns:
        Where they are now, and the probability with which each move was accepted, of shape ``[S, *cells]``.
    """
    jitter = 1 + _JITTER * (2 * torch.rand_like(point.log_q) - 1)
    steps = path.spread(setting.step_size * jitter)
    momenta = [torch.randn_like(u) for u in point.coordinates]
    before = point.log_density(beta) - _kinetic(path, momenta)
    moved = point
    for _ in range(num_leapfrog):
        momenta = _kick(momenta, moved.gradient(beta), steps, setting.scales)
        coordinates = [
            u + step * scale * v
            for u, step, scale, v in zip(moved.coordinates, steps, setting.scales, momenta, strict=True)
        ]
        moved = path.at(coordinates)
        momenta = _kick(momenta, moved.gradient(beta), steps, setting.scales)
    after = moved.log_density(beta) - _kinetic(path, momenta)
    # Where a trajectory has left what floating point can hold, it is rejected.
    log_ratio = (after - before).masked_fill(~(after > -torch.inf), -torch.inf)
    probability = log_ratio.clamp(max=0.0).exp().nan_to_num(nan=0.0)
    accepted = torch.rand_like(probability) < probability
    return _choose(path, accepted, moved, point), probability


def _kick(
    momenta: list[Tensor], gradient: list[Tensor], steps: list[Tensor], scales: list[Tensor]
) -> list[Tensor]:
    """Half a step of the momenta."""
    return [
        v + 0.5 * step * scale * g for v, g, step, scale in zip(momenta, gradient, steps, scales, strict=True)
    ]


def _kinetic(path: Path, momenta: list[Tensor]) -> Tensor:
    return 0.5 * path.to_cells([v.square() for v in momenta])


def _choose(path: Path, accepted: Tensor, new: Point, old: Point) -> Point:
    """The new point where it is accepted, else the old one."""
    where = path.spread(accepted)

    def each(new_parts: list[Tensor], old_parts: list[Tensor]) -> list[Tensor]:
        return [torch.where(w, n, o) for w, n, o in zip(where, new_parts, old_parts, strict=True)]

    return Point(
        each(new.coordinates, old.coordinates),
        torch.where(accepted, new.log_q, old.log_q),
        torch.where(accepted, new.log_w, old.log_w),
        each(new.grad_q, old.grad_q),
        each(new.grad_w, old.grad_w),
    )


class Tuning:
    r"""Step sizes and scales along the path, found by chains that do not count.

    The step size of a cell follows :math:`\log \epsilon \leftarrow \log \epsilon + \gamma (\bar a - a^*)`,
    with :math:`\bar a` the mean acceptance probability of its chains and :math:`a^*` the one wanted; the
    scales follow the spread of the chains, where these are enough to have one. Both are noted on the way.
    Chains that count are run with what was noted, so that nothing they do depends on what they did.

    Arguments:
        path: the densities.
        scales: of each coordinate at the path's beginning, which broadcast against the coordinates.
        num_leapfrog: the number of leapfrog steps of a transition.
        target: the acceptance :math:`a^*`.
    """

    #: Transitions at the path's beginning.
    FIRST = 30
    # The gain of the first of these, which have orders of magnitude to find, and that of all others.
    _FIRST_GAIN, _GAIN = 1.0, 0.25
    # The share of the chains' present spread in the running mean of the squared scales.
    _NEWS = 0.1
    # Chains that have a spread of their own.
    _ENOUGH_CHAINS = 4
    # So many settings are noted along the path; each takes as much memory as a chain.
    _NOTES = 64

    def __init__(self, path: Path, scales: Sequence[Tensor], num_leapfrog: int, target: float) -> None:
        self.path = path
        self.num_leapfrog = num_leapfrog
        self.target = target
        self._scales = list(scales)
        self._notes: list[Setting] = []
        self._places: list[float] = []  # of the notes, as shares of the path

    def run(self, point: Point, betas: Sequence[float], tick: Callable[[], Any] = lambda: None) -> None:
        """Move chains along the path, and note what step sizes and scales they need.

        Arguments:
            point: where they begin, drawn from the path's beginning.
            betas: the temperatures, from above 0 to 1.
            tick: called after each transition.
        """
        num_chains, cells = len(point.log_q), point.log_q[0].numel()
        dims = sum(u[0].numel() for u in point.coordinates) / max(cells, 1)
        log_step = torch.full_like(point.log_q[0], -0.25 * math.log(max(dims, 1.0)))
        stride = math.ceil(len(betas) / self._NOTES)
        for index, beta in enumerate([0.0] * self.FIRST + list(betas), -self.FIRST):
            setting = Setting(log_step.exp(), self._scales)
            point, probability = transition(self.path, point, beta, setting, self.num_leapfrog)
            gain = self._FIRST_GAIN if index < -self.FIRST // 3 else self._GAIN
            log_step = log_step + gain * (probability.mean(0) - self.target)
            if index >= 0:
                if num_chains >= self._ENOUGH_CHAINS:
                    self._follow(point.coordinates)
                if index % stride == 0 or index == len(betas) - 1:
                    self._notes.append(Setting(log_step.exp(), self._scales))
                    self._places.append(index / max(len(betas) - 1, 1))
            tick()

    def _follow(self, coordinates: Sequence[Tensor]) -> None:
        """Let the scales follow the spread of the chains."""
        scales = []
        for scale, u in zip(self._scales, coordinates, strict=True):
            news = u.var(0, keepdim=True)
            mixed = ((1 - self._NEWS) * scale.square() + self._NEWS * news).sqrt()
            scales.append(torch.where(mixed.isfinite() & (mixed > 0), mixed, scale))
        self._scales = scales

    def at(self, share: float) -> Setting:
        """What was noted when that share of the temperatures was past, from 0 to 1; between notes, both."""
        later = min(bisect.bisect_left(self._places, share), len(self._notes) - 1)
        earlier = max(later - 1, 0)
        gap = self._places[later] - self._places[earlier]
        weight = min(max((share - self._places[earlier]) / gap, 0.0), 1.0) if gap else 1.0
        one, other = self._notes[earlier], self._notes[later]
        return Setting(
            torch.lerp(one.step_size, other.step_size, weight),
            [torch.lerp(a, b, weight) for a, b in zip(one.scales, other.scales, strict=True)],
        )
