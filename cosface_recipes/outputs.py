"""What a command writes: files, checked before its hours of work and with the mode that open() gives; any name."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(path: Path, suffixes: Collection[str] = ()) -> None:
    """Raises ValueError where a file of this name cannot be written, or should end otherwise.

    >>> check_output(Path("features.pkl"), (".npz", ".safetensors"))
    Traceback (most recent call last):
        ...
    ValueError: features.pkl should end in .npz or .safetensors.
    """
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path} should end in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not the name of a file to write.")
    found = next(place for place in (path, *path.absolute().parents) if place.exists())
    if found != path and not found.is_dir():
        raise ValueError(f"{path} cannot be written: {found} is no folder.")
    if not os.access(found, os.W_OK):
        raise ValueError(f"{path} cannot be written: there is no permission to write {found}.")


def print_any_name() -> None:
    """Characters that stdout cannot encode are printed as escapes, such as those of names that are no UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def safetensors_of(path: Path) -> Iterator[None]:
    """A file of safetensors in the mode that open() gives, or, where it cannot be written, an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    give_mode_of_open(path)


def give_mode_of_open(path: Path) -> None:
    """Of a file that safetensors has written, for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
