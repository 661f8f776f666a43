"""This machine: its name, the memory of this process, and the rate of its float32 matrix product."""

import ctypes
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SQUARE_SIZES = (2048, 3072)
TILE_CLASSES = 8192  # of the problem's own matrix products; larger ones are slower, being bound by memory
SECONDS_PER_SHAPE = 0.1


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """The commit of this checkout, "-dirty" if tracked files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def die_first() -> None:
    """Makes this process the first to be killed when memory runs out, where the system has such an order."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return


def release_memory() -> None:
    """Returns what is free to the system, so that it does not count as resident."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def reset_peak_resident() -> int | None:
    """Restarts this process's peak resident memory at its present resident memory, and returns that in bytes.

    None where the system cannot (it is the kernel's VmHWM, reset through /proc/self/clear_refs).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak_resident()


def peak_resident() -> int | None:
    """Bytes of peak resident memory since the last reset; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


class Matmul:
    """The rate of float32 torch.mm into memory that is already there, turn by turn.

    Square matrices show what the machine can do; the products of the loss (x w^T and g^T x, for TILE_CLASSES
    classes) what it can do with these sizes.
    """

    def __init__(self, batch: int, dim: int, threads: int) -> None:
        torch.set_num_threads(threads)
        square = {f"square {n}": _operands(n, n, n) for n in SQUARE_SIZES}
        ours = {
            f"({batch}, {dim}) x ({dim}, {TILE_CLASSES})": _operands(batch, dim, TILE_CLASSES),
            f"({TILE_CLASSES}, {batch}) x ({batch}, {dim})": _operands(TILE_CLASSES, batch, dim),
        }
        self.operands = square | ours
        for a, b, out in self.operands.values():
            torch.mm(a, b, out=out)

    def turn(self) -> dict[str, float]:
        """GFLOP/s by shape."""
        return {shape: _gflops(*operands) for shape, operands in self.operands.items()}


def best_shape(turns: Sequence[dict[str, float]]) -> tuple[str, float]:
    """The shape whose median rate over the turns is the highest, and that rate in GFLOP/s."""
    medians = median_rates(turns)
    shape = max(medians, key=medians.__getitem__)
    return shape, medians[shape]


def median_rates(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {shape: statistics.median(turn[shape] for turn in turns) for shape in turns[0]}


def _operands(rows: int, inner: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, inner), torch.randn(inner, columns), torch.zeros(rows, columns)


def _gflops(a: Tensor, b: Tensor, out: Tensor) -> float:
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    seconds: list[float] = []
    while sum(seconds) < SECONDS_PER_SHAPE:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return flops / statistics.median(seconds) / 1e9
