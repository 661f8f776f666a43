"""Peak memory of this process, and of one step of a head."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's parameters, in glibc's malloc.h


def peak_extra_bytes(step: Callable[[], object], repeats: int = 5) -> int | None:
    """Median over `repeats` of the bytes by which resident memory rises above its level before `step()`.

    The kernel keeps a high-water mark of the process's resident pages; it is reset before each call. So that
    a buffer always means fresh pages, and not what an earlier step left in the allocator's pool, malloc is
    told to take every buffer of 64 KiB or more straight from the system, for the rest of the process (which
    makes whatever runs afterwards slower: measure last). One call goes first and is not counted; what it
    allocates for good, such as thread pools and packed buffers of the matrix library, is part of the level.

    Returns:
        The median, which has the precision of a few pages per thread; None where the system offers no such
        counters (anything but Linux with glibc).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
        libc.mallopt(M_TRIM_THRESHOLD, 0)
        step()
        rises = []
        for _ in range(repeats):
            gc.collect()
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before = resident_bytes("VmRSS")
            step()
            rises.append(resident_bytes("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None
    return int(statistics.median(rises))


def resident_bytes(counter: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[counter].split()[0]) * 1024


def peak_resident_bytes() -> int:
    """The largest memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
