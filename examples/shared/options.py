"""What the examples' command lines share: types of arguments, and the options that name a loss."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch

from pyro_iw import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    TVO_ELBO,
    VR_ELBO,
    ImportanceWeightedELBO,
)

__all__ = [
    "ESTIMATORS",
    "LOSSES",
    "LOSS_OPTIONS",
    "add_loss_options",
    "as_settings",
    "at_smoke_size",
    "finite_float",
    "loss_of",
    "make_loss",
    "new_parser",
    "positive_float",
    "positive_int",
    "torch_device",
    "unit_interval",
]

LOSSES = ("elbo", "iwae", "miwae", "ciwae", "piwae", "vr", "tvo")
ESTIMATORS = ("auto", "reparam", "stl", "dreg", "rws")
# The options of add_loss_options, under which a command line keeps them: keywords of make_loss.
LOSS_OPTIONS = ("loss", "M", "K", "beta", "alpha", "partitions", "estimator", "backward_particles")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Says an option's default, unless there is none or the help itself says it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line that is described by the first paragraph of a module's docstring."""
    return argparse.ArgumentParser(description=(doc or "").split("\n\n")[0], formatter_class=_Defaults)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return value


def finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, not {text}")
    return value


def unit_interval(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], not {text}")
    return value


def torch_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return device


def add_loss_options(parser: argparse.ArgumentParser, loss: str = "miwae", M: int = 8, K: int = 8) -> None:
    """Add :data:`LOSS_OPTIONS`, with these defaults."""
    add = parser.add_argument
    add(
        "--loss",
        choices=LOSSES,
        default=loss,
        help="the bound; all spend M·K particles a datapoint: elbo averages them outside the log, and those "
        "without an M of their own take K = M·K",
    )
    add("-M", type=positive_int, default=M, help="averages outside the log")
    add("-K", type=positive_int, default=K, help="particles inside the log")
    add("--beta", type=unit_interval, default=0.5, help="the ELBO's share in ciwae")
    add("--alpha", type=finite_float, default=0.5, help="the order of vr: 0 is iwae, 1 the elbo")
    add("--partitions", type=positive_int, default=5, help="steps from the prior to the posterior in tvo")
    add("--estimator", choices=ESTIMATORS, default="auto", help="of the guide's gradient")
    add(
        "--backward-particles",
        type=positive_int,
        help="go backward through that many particles an image, chosen by weight (default: all of them)",
    )


def at_smoke_size(args: argparse.Namespace, sizes: Mapping[str, float]) -> argparse.Namespace:
    """The arguments; in a smoke run, none of those with these names exceeds the size given."""
    for name, size in sizes.items() if args.smoke else ():
        given = getattr(args, name)
        setattr(args, name, size if given is None else min(given, size))
    return args


def as_settings(args: argparse.Namespace) -> dict[str, int | float | str | None]:
    """The arguments as a JSON file can hold them."""
    return {
        name: value if isinstance(value, int | float | None) else str(value)
        for name, value in vars(args).items()
    }


def make_loss(
    loss: str,
    M: int = 8,
    K: int = 8,
    *,
    beta: float = 0.5,
    alpha: float = 0.5,
    partitions: int = 5,
    **keywords: Any,
) -> ImportanceWeightedELBO:
    """The loss of that name, with any keywords; all of them spend M·K particles a datapoint."""
    if loss == "elbo":
        return MIWAE_ELBO(M=M * K, K=1, **keywords)
    if loss == "iwae":
        return IWAE_ELBO(K=M * K, **keywords)
    if loss == "miwae":
        return MIWAE_ELBO(M=M, K=K, **keywords)
    if loss == "ciwae":
        return CIWAE_ELBO(K=M * K, beta=beta, **keywords)
    if loss == "piwae":
        return PIWAE_ELBO(M=M, K=K, **keywords)
    if loss == "vr":
        return VR_ELBO(alpha=alpha, K=M * K, **keywords)
    if loss == "tvo":
        return TVO_ELBO(K=M * K, partitions=partitions, **keywords)
    raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}")


def loss_of(args: argparse.Namespace, **keywords: Any) -> ImportanceWeightedELBO:
    """The loss that the options of :func:`add_loss_options` ask for, with further keywords."""
    return make_loss(**{name: getattr(args, name) for name in LOSS_OPTIONS}, **keywords)
