r"""Chains along a path of densities, forwards and backwards, and the weights they gather.

With temperatures :math:`0 = \beta_0 < \dots < \beta_T = 1` and transitions :math:`K_t` that leave
:math:`f_t = f_{\beta_t}` as it is,

.. math:: u_0 \sim q, \quad u_t \sim K_t(u_{t-1}), \qquad
    \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log w(u_{t-1})

has :math:`E[w] = p(x)`, whatever T and the transitions are, so that :math:`\log w` falls short of
:math:`\log p(x)` in expectation. A chain run backwards from an exact draw :math:`u_T \sim p(u \mid x)` has
:math:`E[1 / w] = 1 / p(x)`, so that its :math:`\log w` exceeds it.

References:
    | Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
    | Sandwiching the Marginal Likelihood (Grosse et al., 2015), https://arxiv.org/abs/1511.02543
    | On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017),
      https://arxiv.org/abs/1611.04273
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._support.devices import wide
from .hmc import Path, Point, Tuning, transition

__all__ = ["Annealed", "Annealing", "temperatures"]

# The sigmoid runs from minus this to this, as in Wu et al.
_STEEPNESS = 4.0


def temperatures(number: int, schedule: str | Sequence[float] | Tensor = "sigmoidal") -> list[float]:
    r"""The inverse temperatures :math:`\beta_0 = 0, \dots, \beta_T = 1`.

    Arguments:
        number: the number T of steps between them.
        schedule: ``"sigmoidal"``, small steps at both ends (a logistic function from -4 to 4, shifted and
            scaled); ``"linear"``; or the T + 1 temperatures themselves.

    Raises:
        ValueError: if there is no such schedule, or it is not increasing from 0 to 1 in T steps.

    Example:
        >>> temperatures(4, "linear")
        [0.0, 0.25, 0.5, 0.75, 1.0]
        >>> [round(beta, 3) for beta in temperatures(4)]
        [0.0, 0.105, 0.5, 0.895, 1.0]
    """
    even = torch.linspace(0, 1, number + 1, dtype=torch.float64)
    if isinstance(schedule, str):
        if schedule not in ("sigmoidal", "linear"):
            raise ValueError(
                f"schedule must be 'sigmoidal', 'linear' or the temperatures themselves, got {schedule!r}"
            )
        if schedule == "linear":
            return even.tolist()
        curve = (_STEEPNESS * (2 * even - 1)).sigmoid()
        betas = (curve - curve[0]) / (curve[-1] - curve[0])
        betas[-1] = 1.0
        return betas.tolist()
    betas = torch.as_tensor(schedule, dtype=torch.float64).detach().cpu()
    if betas.shape != even.shape or betas[0] != 0 or betas[-1] != 1 or not bool((betas.diff() > 0).all()):
        raise ValueError(
            f"schedule must be {number + 1} numbers that increase from 0 to 1, one more than "
            f"num_temperatures={number}, got a tensor of shape {tuple(betas.shape)}."
        )
    return betas.tolist()


class Annealed(NamedTuple):
    """Chains at the end of their path.

    Attributes:
        point: where they are.
        log_w: what they have gathered, in float64 where the device has it, of shape ``[S, *cells]``.
        acceptance: mean probability with which their moves were accepted, of shape ``[*cells]``.
    """

    point: Point
    log_w: Tensor
    acceptance: Tensor


class Annealing:
    """Runs chains along a path, with transitions that are settled beforehand.

    Arguments:
        path: the densities.
        tuning: step sizes and scales along it.
        betas: the temperatures, see :func:`temperatures`.
        num_leapfrog: the number of leapfrog steps of a transition.
        tick: called after each transition.
    """

    def __init__(
        self,
        path: Path,
        tuning: Tuning,
        betas: Sequence[float],
        num_leapfrog: int,
        tick: Callable[[], Any] = lambda: None,
    ) -> None:
        self.path = path
        self.tuning = tuning
        self.betas = betas
        self.num_leapfrog = num_leapfrog
        self.tick = tick

    def forwards(self, point: Point) -> Annealed:
        """From the path's beginning to its end; :math:`E[w] = p(x)`.

        Arguments:
            point: draws from the path's beginning.
        """
        log_w = torch.zeros_like(wide(point.log_w))
        acceptance = torch.zeros_like(log_w)
        for step in range(1, len(self.betas)):
            log_w += (self.betas[step] - self.betas[step - 1]) * wide(point.log_w)
            point, probability = self._transition(point, step)
            acceptance += probability
        return Annealed(point, log_w, acceptance.mean(0) / (len(self.betas) - 1))

    def backwards(self, point: Point) -> Annealed:
        """From its end to its beginning; :math:`E[1 / w] = 1 / p(x)`.

        Arguments:
            point: draws from the path's end, the posterior; the chains may share one.
        """
        log_w = torch.zeros_like(wide(point.log_w))
        acceptance = torch.zeros_like(log_w)
        for step in range(len(self.betas) - 1, 0, -1):
            point, probability = self._transition(point, step)
            acceptance += probability
            log_w += (self.betas[step] - self.betas[step - 1]) * wide(point.log_w)
        return Annealed(point, log_w, acceptance.mean(0) / (len(self.betas) - 1))

    def _transition(self, point: Point, step: int) -> tuple[Point, Tensor]:
        steps = len(self.betas) - 1
        setting = self.tuning.at((step - 1) / max(steps - 1, 1))
        moved = transition(self.path, point, self.betas[step], setting, self.num_leapfrog)
        self.tick()
        return moved
