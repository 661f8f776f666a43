"""Peak memory of this process, and of one step of a head."""

from __future__ import annotations

import ctypes
import gc
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
            before = restart_peak()
            step()
            after = peak_since_restart()
            if before is None or after is None:
                return None
            rises.append(after - before)
    except (OSError, AttributeError):
        return None
    return int(statistics.median(rises))


def restart_peak() -> int | None:
    """Restarts the peak of this process's resident memory at its present memory, and returns that in bytes.

    None where the system cannot (anything but Linux).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak_since_restart()


def peak_since_restart() -> int | None:
    """Bytes of resident memory at their most; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def peak_resident_bytes() -> int:
    """The largest memory of this process so far."""
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
