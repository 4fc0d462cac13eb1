"""How the examples run and end: where results go, bars, steps that diverge, signals, errors in one line."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyro.infer import SVI
from tqdm import tqdm

__all__ = [
    "Diverged",
    "in_one_line",
    "progress_bar",
    "results_folder",
    "smoke_apart",
    "step",
    "stop_signals",
]


class Diverged(ValueError):
    """Training that has run out of the finite numbers."""


def results_folder(name: str, smoke: bool) -> Path:
    """Where results go unless ``--out`` says so; those of a smoke run apart, to overwrite no others."""
    return Path("results", *(["smoke"] if smoke else []), name)


def smoke_apart(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments; in a smoke run, with a default ``--out`` replaced by one in ``results/smoke``."""
    if args.smoke and args.out is parser.get_default("out"):
        args.out = results_folder(args.out.name, smoke=True)
    return args


def step(svi: SVI, batch: tuple[Any, ...], learning_rate: float, number: int) -> float:
    """A gradient step, and its loss.

    Arguments:
        svi: Takes the step.
        batch: Arguments of model and guide.
        learning_rate: For the message.
        number: How many steps have gone well before.

    Raises:
        Diverged: If the loss is not finite, or what has worked before meets impossible parameters.
    """
    advice = f"Lower --learning-rate, which is {learning_rate:g}."
    try:
        loss = svi.step(*batch)
    except ValueError as error:
        if number == 0:  # not for what the steps before have done
            raise
        reason = str(error).splitlines()[0].rstrip(":")
        raise Diverged(f"training diverged after {number} steps ({reason}). {advice}") from error
    if not math.isfinite(loss):
        raise Diverged(f"training diverged: the loss is {loss} after {number} steps. {advice}")
    return loss


@contextmanager
def in_one_line(*errors: type[Exception], kept: str = "nothing is saved before the end") -> Iterator[None]:
    """Say in one line what is wrong with data or files, or that Ctrl-C or SIGTERM has ended the program.

    Arguments:
        errors: What is an error of the user's; by default of files, and of a training that diverges.
        kept: What is left behind of a program that is interrupted.
    """
    kinds = errors or (OSError, Diverged)
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except kinds as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print(f"interrupted: {kept}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def progress_bar(total: int, description: str, **options: Any) -> tqdm:
    """A progress bar, on a terminal alone: a log file would get a line for each look of it.

    Further options are tqdm's.
    """
    return tqdm(total=total, desc=description, leave=False, disable=None, **options)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The list of Ctrl-C and SIGTERM received: the first only asks, the second one is as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(signum: int, _: Any) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
