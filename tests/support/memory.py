"""Peaks of memory, for tests that run what they measure in a process of its own."""

import pathlib
from collections.abc import Callable

FORGET = pathlib.Path("/proc/self/clear_refs")  # of Linux


def raised_by(step: Callable[[], object]) -> int:
    """Bytes by which a step raises the resident memory of this process at its peak."""
    FORGET.write_text("5")  # the peak so far
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
