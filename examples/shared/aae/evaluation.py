"""The numbers of Makhzani et al. (1511.05644): errors of classes and clusters, and Parzen windows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_iw import aggregated_posterior

from .. import parzen
from ..evaluation import seeded
from .networks import PIXEL_SCALE, ClassAAE, HeadsAAE, LatentAAE, Pair
from .training import Data

__all__ = [
    "classification_error",
    "cluster_labels",
    "cluster_results",
    "encode",
    "error",
    "evaluate",
    "fit_of_codes",
    "head_logits",
    "neighbour_error",
    "parzen_results",
    "prior_draws",
    "reconstruction",
    "summarise",
    "table",
]

BATCH = 1000
# Enough for an accuracy to 0.01.
TWO_SAMPLE_IMAGES = 5000


class Row(NamedTuple):
    """How a number is printed: in words, with decimals and a unit, and which number is its own error."""

    words: str
    decimals: int
    unit: str = ""
    factor: float = 1.0
    error: str | None = None


PERCENT = (1, "%", 100.0)
# By the names of metrics.json, in the order of the table.
ROWS = {
    "error": Row("classification error", *PERCENT),
    "error_labels_alone": Row("the same, trained on the labels alone", *PERCENT),
    "error_difference": Row("difference of the two", 1, "percentage points", 100.0),
    "error_majority": Row("clustering error, by majority", *PERCENT),
    "error_most_confident": Row("clustering error, by most confident image", *PERCENT),
    "clusters_used": Row("clusters used", 0),
    "neighbour_error": Row("error of the 5 nearest codes", *PERCENT),
    "style_error": Row("error of the 5 nearest styles", *PERCENT),
    "parzen": Row("log-likelihood by Parzen windows", 1, "nats per image", error="parzen_error"),
    "parzen_bandwidth": Row("bandwidth of the windows", 2),
    "parzen_samples": Row("draws for the windows", 0),
    "reconstruction": Row("reconstruction, −log p(x | code)", 1, "nats per image"),
    "pixel_error": Row("root mean squared error of a pixel", 3),
    "two_sample_accuracy": Row("two-sample accuracy", 3, error="two_sample_error"),
    "two_sample_accuracy_training": Row(
        "two-sample accuracy, training images", 3, error="two_sample_error_training"
    ),
    "training_seconds": Row("training time", 1, "s"),
}


def encode(pair: Pair, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """What the decoder sees of images ``[N, D]``, in eval mode: z, or head and style, ``[N, width]``.

    With ``labels``, shape ``[N]``, for a pair that is told them; without, its style z alone.
    """
    parts = []
    for x in images.split(BATCH):
        if isinstance(pair, HeadsAAE):
            logits, z = pair.encoder.both(x)
            parts.append(pair.decoder.code(logits.softmax(-1), z))
        else:
            parts.append(pair.encoder(x))
    codes = torch.cat(parts)
    return pair.code(labels, codes) if isinstance(pair, ClassAAE) and labels is not None else codes


def head_logits(pair: HeadsAAE, images: Tensor) -> Tensor:
    """Of images ``[N, D]``, shape ``[N, heads]``."""
    return torch.cat([pair.encoder.logits(x) for x in images.split(BATCH)])


def prior_draws(pair: Pair, number: int) -> Tensor:
    """Codes from the prior over all classes, ``[number, latent]``."""
    device = next(pair.parameters()).device
    _, unknown = pair.batch(torch.empty(number, 0, device=device), None)[0]
    assert isinstance(pair, LatentAAE)
    with pyro.plate("draws", number):
        return pair.prior.sample(unknown)


def reconstruction(pair: Pair, images: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    """−log p(x | code) in nats per image, and the root of the mean squared error of a pixel."""
    both = zip(encode(pair, images, labels).split(BATCH), images.split(BATCH), strict=True)
    squares = sum((pair.images(code) - x).square().sum().item() for code, x in both)
    pixels = images.shape[1]
    constant = 0.5 * pixels * math.log(2 * math.pi * PIXEL_SCALE**2)
    return {
        "reconstruction": squares / len(images) / (2 * PIXEL_SCALE**2) + constant,
        "pixel_error": math.sqrt(squares / images.numel()),
    }


def fit_of_codes(pair: Pair, images: Tensor) -> dict[str, float]:
    """Accuracy of a classifier that tells codes z of images from draws of the prior; 0.5 is best."""
    batches = [pair.batch(x, None)[0] for x in images[:TWO_SAMPLE_IMAGES].split(BATCH)]
    both = aggregated_posterior(pair.model, pair.guide, batches, sites=["z"], progress=False)["z"]
    found = both.classifier_accuracy()
    return {"two_sample_accuracy": found.accuracy, "two_sample_error": found.standard_error}


def parzen_results(pair: Pair, number: int, validation: Tensor, heldout: Tensor) -> dict[str, float]:
    """Log-likelihood of held-out images under windows around decoded draws of the prior, in nats per image.

    Arguments:
        pair: The model.
        number: Of draws.
        validation: Images that the bandwidth is chosen on, shape ``[N, D]``.
        heldout: Those the result is of.
    """
    samples = torch.cat([pair.images(z) for z in prior_draws(pair, number).split(BATCH)])
    sigma = parzen.choose_bandwidth(samples, validation)
    values = parzen.log_likelihood(samples, heldout, sigma)
    return {
        "parzen": values.mean().item(),
        "parzen_error": values.std().item() / math.sqrt(len(values)),
        "parzen_bandwidth": sigma,
        "parzen_samples": number,
    }


def error(predicted: Tensor, labels: Tensor) -> float:
    """The share of wrong predictions, both of shape ``[N]``."""
    return (predicted != labels).double().mean().item()


def classification_error(pair: Pair, data: Data) -> dict[str, float]:
    """The error of a pair that was shown labels on held-out images, in eval mode; else nothing.

    A class is the likelier head, or the part of the prior that a code is in.
    """
    if data.few is None:
        return {}
    if isinstance(pair, HeadsAAE):
        predicted = head_logits(pair, data.heldout).argmax(-1)
    else:
        assert isinstance(pair, LatentAAE)
        predicted = pair.prior.nearest(encode(pair, data.heldout))
    return {"error": error(predicted, data.heldout_labels)}


def cluster_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The class that each head is given, by labelled images that it was trained without the labels of.

    Arguments:
        logits: Of the heads, shape ``[N, heads]``.
        labels: Class ids, shape ``[N]``.

    Returns:
        By majority of the images whose largest logit is the head's (−1 for a head without any); and by the
        one image of highest probability for the head, as in the paper. Each of shape ``[heads]``.
    """
    heads = logits.shape[1]
    counts = torch.zeros(heads, int(labels.max()) + 1, dtype=torch.long, device=logits.device)
    counts.index_put_((logits.argmax(-1), labels), torch.ones_like(labels), accumulate=True)
    # In double precision, and with logarithms: in single precision many probabilities are exactly 1.
    confident = logits.double().log_softmax(-1).argmax(0)
    majority = torch.where(counts.any(-1), counts.argmax(-1), -1)
    return majority, labels[confident]


def cluster_results(
    logits: Tensor, labels: Tensor, heldout_logits: Tensor, heldout_labels: Tensor
) -> dict[str, float]:
    """Errors on held-out images whose heads are labelled by training images; see :func:`cluster_labels`."""
    majority, confident = cluster_labels(logits, labels)
    chosen = heldout_logits.argmax(-1)
    return {
        "error_majority": error(majority[chosen], heldout_labels),
        "error_most_confident": error(confident[chosen], heldout_labels),
        "clusters_used": logits.argmax(-1).unique().numel(),
    }


def neighbour_error(
    codes: Tensor, labels: Tensor, heldout: Tensor, heldout_labels: Tensor, k: int = 5
) -> float:
    """Share of held-out codes ``[N', width]`` whose k nearest training codes outvote their class.

    Of classes with equally many votes, the lowest id is taken.
    """
    wrong = 0.0
    for part, truth in zip(heldout.split(BATCH), heldout_labels.split(BATCH), strict=True):
        nearest = torch.cdist(part, codes).topk(k, largest=False).indices
        wrong += error(labels[nearest].mode(-1).values, truth) * len(truth)
    return wrong / len(heldout_labels)


@torch.no_grad()
def evaluate(pair: Pair, data: Data, mode: str, *, parzen_samples: int, seed: int) -> dict[str, float]:
    """The numbers of a mode on held-out images, and how well images are rebuilt and codes fit the prior.

    Arguments:
        pair: The model and its guide.
        data: What it was trained on, and what was held out.
        mode: One of ``aae.py``'s.
        parzen_samples: Draws for the Parzen windows.
        seed: Of all draws.
    """
    pair.eval()
    heldout, truth = data.heldout, data.heldout_labels
    with seeded(seed):
        results = reconstruction(pair, heldout, truth) | fit_of_codes(pair, heldout)
        training = fit_of_codes(pair, data.images)
        results |= {f"{name}_training": value for name, value in training.items()}
        codes = encode(pair, heldout)
        if mode == "unsupervised":
            results |= parzen_results(pair, parzen_samples, data.validation, heldout)
        elif mode == "supervised":
            known = encode(pair, data.images)
            results["style_error"] = neighbour_error(known, data.labels, codes, truth)
        elif data.few is None:
            assert isinstance(pair, HeadsAAE)
            logits = head_logits(pair, heldout)
            results |= cluster_results(head_logits(pair, data.images), data.labels, logits, truth)
        results |= classification_error(pair, data)
        if mode == "reduction":
            results["neighbour_error"] = neighbour_error(encode(pair, data.images), data.labels, codes, truth)
    return results


def summarise(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard error over runs of every number; of one run alone the error is left out."""
    columns: dict[str, list[float]] = {}
    for results in runs:
        for name, value in results.items():
            columns.setdefault(name, []).append(value)
    summary = {}
    for name, values in columns.items():
        summary[name] = {"mean": statistics.fmean(values)}
        if len(values) > 1:
            summary[name]["standard_error"] = statistics.stdev(values) / math.sqrt(len(values))
    return summary


def table(summary: dict[str, dict[str, float]]) -> str:
    """What :func:`summarise` gave, in words and units, each number with its standard error.

    That is over the runs if there are several. Of one run it is the number's own, over the held-out images,
    where it has one.
    """
    lines = []
    width = max(len(row.words) for row in ROWS.values())
    for name, row in ROWS.items():
        if name not in summary:
            continue
        found = summary[name]
        own = summary[row.error]["mean"] if row.error else None
        spread = found.get("standard_error", own)
        # The mean of different counts is no count.
        decimals = max(row.decimals, 1 if spread else 0)
        value = f"{row.factor * found['mean']:.{decimals}f}".replace("-", "−")
        if spread is not None and decimals:
            value += f" ± {row.factor * spread:.{decimals}f}"
        lines.append(f"{row.words:<{width}}  {value} {row.unit}".rstrip())
    return "\n".join(lines)
