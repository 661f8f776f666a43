"""Types of the numbers of a command line: argparse names the option beside what they refuse, before any work."""

from __future__ import annotations

import argparse
import math

LARGEST = 2**63 - 1  # of tensors' integers; torch's generators take the double, so seed + step fits


def count(text: str) -> int:
    """From 1 on.

    >>> count("0")
    Traceback (most recent call last):
        ...
    argparse.ArgumentTypeError: '0' is not a positive whole number.
    """
    return _integer(text, 1, "a positive whole number")


def counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def whole(text: str) -> int:
    """From 0 on."""
    return _integer(text, 0, "a whole number from 0 on")


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number.")
    return value


def positive(text: str) -> float:
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive.")
    return value


def _integer(text: str, least: int, kind: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind}.")
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is above 2^63 - 1.")
    return value
