"""Checkpoints of a training: written whole or not at all, read without running anything."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch


def save(state: dict[str, object], path: Path) -> None:
    """Write tensors, numbers, strings, and lists and dicts of them.

    The file appears under its name once all of it is on the disk; until then, what was there before stays. A crash
    at any moment leaves the old checkpoint or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, object]:
    """The state that `save` wrote, on the CPU.

    Raises:
        ValueError: the file is damaged, or holds anything but data.
        OSError: there is no such file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"The checkpoint {path} cannot be read: {error}") from error
