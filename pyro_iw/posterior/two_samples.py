r"""Two samples compared: by maximum mean discrepancy, and by a classifier that tries to tell them apart.

References:
    | A Kernel Two-Sample Test (Gretton et al., 2012), https://jmlr.org/papers/v13/gretton12a.html
    | Revisiting Classifier Two-Sample Tests (Lopez-Paz & Oquab, 2017), https://arxiv.org/abs/1610.06545
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._support.arguments import positive_integer
from .._support.devices import wide
from .._support.optional import require
from .._support.progress import progress_bar

__all__ = ["KERNELS", "MMD", "ClassifierAccuracy", "TwoSamples"]

KERNELS = ("imq", "gaussian")
# The median distance is known well enough from so many draws.
_MEDIAN_DRAWS = 2000
# Under fewer pairs the unbiased variance of MMD² does not exist.
_FEWEST_FOR_MMD = 4
# Under fewer an accuracy has a standard error above 0.1.
_FEWEST_FOR_CLASSIFIER = 20


class MMD(NamedTuple):
    """Squared maximum mean discrepancy of two samples.

    Attributes:
        squared: the unbiased estimate of MMD², which may be negative; in units of the kernel, whose largest
            value is 1.
        standard_error: of it, over draws of both samples.
        p_value: share of random swaps within pairs that gave at least as much; small where the samples
            differ.
        bandwidth: the kernel's, in units of the latent.
    """

    squared: float
    standard_error: float
    p_value: float
    bandwidth: float


class ClassifierAccuracy(NamedTuple):
    r"""How well a classifier tells two samples apart that it was not trained on.

    Attributes:
        accuracy: share of held-out draws that it gives to the right sample; 0.5 where it cannot tell.
        standard_error: :math:`\sqrt{1 / (4 n)}` for n held-out draws, which is (at most) the one that the
            accuracy has if both samples have the same distribution.
        num_held_out: the number n.
    """

    accuracy: float
    standard_error: float
    num_held_out: int


@dataclass(frozen=True, eq=False, repr=False)
class TwoSamples:
    r"""Codes of the guide beside draws from the prior, row by row from the same datapoint's arguments.

    .. math:: z_n \sim q_\phi(z \mid x_n), \qquad z'_n \sim p_\theta(z)

    Attributes:
        guide: the guide's codes, ``[N, D]``.
        prior: draws from the model's prior, ``[N, D]``.

    Raises:
        ValueError: if they are not matrices of one shape, are empty, or hold a NaN or an infinite value.

    Example:
        >>> same = TwoSamples(torch.randn(500, 2), torch.randn(500, 2))
        >>> same
        TwoSamples(N=500, D=2)
        >>> abs(same.mmd().squared) < 0.01 and same.mmd().p_value > 0.05
        True
        >>> shifted = TwoSamples(torch.randn(500, 2) + 1.0, torch.randn(500, 2))
        >>> shifted.mmd().squared > 10 * shifted.mmd().standard_error
        True
    """

    guide: Tensor
    prior: Tensor

    def __post_init__(self) -> None:
        for whose, values in (("guide", self.guide), ("prior", self.prior)):
            if values.dim() != 2 or not values.numel():
                raise ValueError(f"{whose} must be of shape [N, D], not empty, but has {tuple(values.shape)}")
        if self.guide.shape != self.prior.shape:
            raise ValueError(
                f"guide has shape {tuple(self.guide.shape)} and prior {tuple(self.prior.shape)}: they must "
                "have as many rows and as many columns as one another"
            )
        for whose, values in (("guide", self.guide), ("prior", self.prior)):
            bad = (~values.isfinite()).any(1)
            if bool(bad.any()):
                raise ValueError(
                    f"{int(bad.sum())} of {len(values)} draws of the {whose} hold a NaN or an infinite value "
                    f"(first in row {int(bad.nonzero()[0])})"
                )

    def __repr__(self) -> str:
        return f"TwoSamples(N={self.guide.shape[0]}, D={self.guide.shape[1]})"

    def mmd(
        self,
        kernel: str = "imq",
        bandwidth: float | None = None,
        *,
        num_permutations: int = 200,
        chunk_size: int = 1000,
        seed: int = 0,
        progress: bool = True,
    ) -> MMD:
        r"""The squared maximum mean discrepancy, unbiased.

        With codes :math:`z_i` and prior draws :math:`z'_i`,

        .. math:: \widehat{\mathrm{MMD}}{}^2 = \frac{1}{N(N-1)} \sum_{i \neq j} h_{ij}, \qquad
            h_{ij} = k(z_i, z_j) + k(z'_i, z'_j) - k(z_i, z'_j) - k(z_j, z'_i)

        for the kernel :math:`k = 1 / (1 + d^2 / \sigma^2)` (``"imq"``, inverse multiquadric, whose tails
        still see codes far out) or :math:`k = \exp(-d^2 / 2 \sigma^2)` (``"gaussian"``) of the distance d. It
        is 0 in expectation exactly if both have the same distribution. Pairs need be independent, but not
        the two of a pair: a prior that depends on the datapoint is compared in the mean over the data.

        The standard error is the root of the unbiased variance of this U-statistic (with its variance between
        rows taken as 0 where the estimate of that is negative). Near equality the distribution is far from a
        normal one; then ``p_value`` is what counts. It comes from swapping the two of every pair at random,
        which turns :math:`h_{ij}` into :math:`s_i s_j h_{ij}` with random signs and changes nothing if they
        are exchangeable.

        Time grows with :math:`N^2`, memory with N times ``chunk_size``. All is computed in float64
        (in float32 on a device without it).

        References:
            | A Kernel Two-Sample Test (Gretton et al., 2012), lemma 6
            | Wasserstein Auto-Encoders (Tolstikhin et al., 2018), https://arxiv.org/abs/1711.01558, for
              ``"imq"``
            | Unbiased estimators for the variance of MMD estimators (Sutherland & Deka, 2019),
              https://arxiv.org/abs/1906.02104

        Arguments:
            kernel: ``"imq"`` or ``"gaussian"``.
            bandwidth: :math:`\sigma`, in units of the latent. By default the median distance between prior
                draws (of the first 2000, those at the same point left out): it does not depend on the guide,
                so guides under one prior are judged by nearly the same kernel. Pass one to judge them by
                exactly the same.
            num_permutations: number of random swaps, >= 1; the p-value is at least 1 / (this + 1).
            chunk_size: rows whose distances to all others are in memory at once.
            seed: of the swaps.
            progress: whether to show a progress bar, if it takes more than two seconds.

        Raises:
            ValueError: if there are fewer than 4 pairs, the kernel is unknown, the bandwidth is not positive,
                or, where none is given, all prior draws are the same.
        """
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {kernel!r}")
        size = self._at_least(_FEWEST_FOR_MMD, "the variance of MMD²")
        positive_integer("num_permutations", num_permutations)
        positive_integer("chunk_size", chunk_size)
        # Distances by |a|² - 2 a·b + |b|² lose the digits that a common mean takes.
        mean = wide(self.prior).mean(0)
        guide, prior = wide(self.guide.detach()) - mean, wide(self.prior.detach()) - mean
        if bandwidth is None:
            bandwidth = _median_distance(prior[:_MEDIAN_DRAWS])
        elif not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth must be positive, got {bandwidth!r}")
        k = partial(_kernel, kernel, bandwidth)
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size, num_permutations), generator=generator) * 2.0 - 1.0
        signs = signs.to(guide)
        swapped = guide.new_zeros(num_permutations)
        rows = []
        squares = guide.new_zeros(())
        for start in progress_bar(range(0, size, chunk_size), show=progress, desc="MMD"):
            some = slice(start, start + chunk_size)
            h = k(guide[some], guide) + k(prior[some], prior)
            h -= k(guide[some], prior) + k(prior[some], guide)
            h.diagonal(start).zero_()
            rows.append(h.sum(1))
            squares += h.square().sum()
            swapped += (signs[some] * (h @ signs)).sum(0)
        by_row = torch.cat(rows)
        total = by_row.sum()
        # The sum itself takes part in rounding: without a tolerance equal samples would seem to differ.
        at_least = int((swapped >= total - 1e-9 * squares.sqrt()).sum())
        return MMD(
            squared=total.item() / (size * (size - 1)),
            standard_error=math.sqrt(_variance(size, by_row, squares)),
            p_value=(at_least + 1) / (num_permutations + 1),
            bandwidth=float(bandwidth),
        )

    def classifier_accuracy(self, classifier: Any = None, *, seed: int = 0) -> ClassifierAccuracy:
        r"""Accuracy of a classifier trained to tell the two samples apart, on pairs held out from it.

        Half of the pairs, at random, train it (on label 1 for the guide, 0 for the prior); the other half
        test it. Where both have the same distribution its accuracy is 0.5, with a standard error of
        :math:`\sqrt{1 / (4 n)}` on n held-out draws, whatever it has learnt. How far it gets above that
        depends on the classifier: 0.5 says only that this one sees no difference.

        References:
            | Revisiting Classifier Two-Sample Tests (Lopez-Paz & Oquab, 2017), https://arxiv.org/abs/1610.06545

        Arguments:
            classifier: anything with ``fit(X, y)`` and ``predict(X)`` in scikit-learn's manner, for arrays
                ``[n, D]`` of float64 and labels ``[n]``; it is fitted in place. By default a network of two
                hidden layers of 64 units on standardised values, which needs scikit-learn.
            seed: of the split, and of the default classifier.

        Raises:
            ValueError: if there are fewer than 20 pairs, or the predictions are not one 0 or 1 a row.
            TypeError: if the classifier has no ``fit`` or ``predict``.
            ImportError: if there is no scikit-learn for the default classifier.

        Example:
            >>> shifted = TwoSamples(torch.randn(1000, 1) + 2.0, torch.randn(1000, 1))
            >>> result = shifted.classifier_accuracy()  # at best 0.841, the normal's distribution at 1
            >>> abs(result.accuracy - 0.841) < 4 * result.standard_error
            True
        """
        size = self._at_least(_FEWEST_FOR_CLASSIFIER, "an accuracy")
        by_default = classifier is None
        if by_default:
            classifier = _default_classifier(seed)
        missing = [name for name in ("fit", "predict") if not callable(getattr(classifier, name, None))]
        if missing:
            raise TypeError(f"{type(classifier).__name__} has no {' and no '.join(missing)} to classify with")
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        # Both of a pair go to the same half: they may depend on the same datapoint.
        train, test = order[: size // 2], order[size // 2 :]
        values, labels = self._labelled(train)
        with warnings.catch_warnings():
            if by_default:  # whose accuracy counts whether or not it would learn on
                warnings.filterwarnings("ignore", message=".*iterations.* reached", category=UserWarning)
            classifier.fit(values.numpy(), labels.numpy())
        values, labels = self._labelled(test)
        predictions = torch.as_tensor(classifier.predict(values.numpy()))
        if predictions.shape != labels.shape or not bool(((predictions == 0) | (predictions == 1)).all()):
            raise ValueError(
                f"{type(classifier).__name__}.predict must give 0 or 1 for each of {len(labels)} rows, but "
                f"gave values of shape {tuple(predictions.shape)}, {predictions.flatten()[:3].tolist()} ..."
            )
        accuracy = (predictions == labels).double().mean().item()
        return ClassifierAccuracy(accuracy, math.sqrt(0.25 / len(labels)), len(labels))

    def _at_least(self, fewest: int, what: str) -> int:
        """The number of pairs."""
        size = len(self.guide)
        if size < fewest:
            raise ValueError(
                f"There are only {size} pairs, but {what} needs {fewest} or more: run more batches."
            )
        return size

    def _labelled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``[2 n, D]`` and labels ``[2 n]`` of these pairs."""
        values = torch.cat([self.guide.detach().cpu()[rows], self.prior.detach().cpu()[rows]]).double()
        return values, torch.cat([torch.ones_like(rows), torch.zeros_like(rows)])


def _kernel(kernel: str, bandwidth: float, a: Tensor, b: Tensor) -> Tensor:
    """The kernel of every row of a with every row of b."""
    ratio = _squared_distances(a, b).div_(bandwidth**2)
    if kernel == "imq":
        return ratio.add_(1).reciprocal_()
    return ratio.mul_(-0.5).exp_()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return squares.addmm_(a, b.T, alpha=-2).clamp_(min=0)


def _median_distance(values: Tensor) -> float:
    """Median distance between rows that differ."""
    distances = torch.pdist(values)
    distances = distances[distances > 0]
    if not len(distances):
        raise ValueError("All prior draws are the same, so there is no median distance: pass bandwidth=.")
    return distances.median().item()


def _variance(size: int, by_row: Tensor, squares: Tensor) -> float:
    r"""Variance of the U-statistic of :math:`h`, from its sums over rows and its sum of squares.

    It is :math:`(4 (N - 2) \zeta_1 + 2 \zeta_2) / (N (N - 1))` with :math:`\zeta_1 = E[h_{12} h_{13}] -
    E[h]^2` and :math:`\zeta_2 = E[h^2] - E[h]^2`; each mean is over tuples of distinct indices, so unbiased.
    """
    pairs = size * (size - 1)
    triples = pairs * (size - 2)
    quadruples = triples * (size - 3)
    sum_of_squares = squares.item()
    square_of_rows = by_row.square().sum().item()
    total = by_row.sum().item()
    squared_mean = (total**2 - 4 * square_of_rows + 2 * sum_of_squares) / quadruples
    between = (square_of_rows - sum_of_squares) / triples - squared_mean
    single = sum_of_squares / pairs - squared_mean
    return max(0.0, (4 * (size - 2) * max(between, 0.0) + 2 * single) / pairs)


def _default_classifier(seed: int) -> Any:
    purpose = "The default classifier of classifier_accuracy"
    networks = require("sklearn.neural_network", "examples", purpose)
    pipeline = require("sklearn.pipeline", "examples", purpose)
    preprocessing = require("sklearn.preprocessing", "examples", purpose)
    network = networks.MLPClassifier(hidden_layer_sizes=(64, 64), max_iter=100, random_state=seed)
    return pipeline.make_pipeline(preprocessing.StandardScaler(), network)
