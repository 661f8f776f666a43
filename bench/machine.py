"""This machine: its name, the memory of this process on a device, and the rate of a matrix product there."""

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

from cosface_recipes.memory import peak_since_restart, restart_peak

SQUARE_SIZES = {"cpu": (2048, 3072), "cuda": (4096, 8192)}
TILE_CLASSES = 8192  # of the problem's own matrix products; larger ones are slower, being bound by memory
SECONDS_PER_SHAPE = 0.1


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


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


def available_bytes(device: str) -> int | None:
    """Memory that can be had, on the CPU without swapping; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
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


def synchronize(device: str) -> None:
    """Waits for what was launched on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def release_memory() -> None:
    """Returns what is free to the system, so that it does not count as resident."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def reset_peak(device: str) -> int | None:
    """Restarts this process's peak memory at its present memory, and returns that in bytes.

    On a GPU that is what torch's allocator has handed out; on the CPU resident memory, and None where the system
    cannot.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return restart_peak()


def peak(device: str) -> int | None:
    """Bytes of peak memory since the last reset; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_since_restart()


class Matmul:
    """The rate of torch.mm into memory that is already there, turn by turn.

    Square matrices show what the machine can do; the products of the loss (x w^T and g^T x, for TILE_CLASSES
    classes) what it can do with these sizes.
    """

    def __init__(self, batch: int, dim: int, threads: int, device: str = "cpu", dtype: str = "float32") -> None:
        torch.set_num_threads(threads)
        self.device = device
        sizes = {f"square {n}": (n, n, n) for n in SQUARE_SIZES[device]} | {
            f"({batch}, {dim}) x ({dim}, {TILE_CLASSES})": (batch, dim, TILE_CLASSES),
            f"({TILE_CLASSES}, {batch}) x ({batch}, {dim})": (TILE_CLASSES, batch, dim),
        }
        options = {"device": device, "dtype": getattr(torch, dtype)}
        self.operands = {shape: _operands(*size, **options) for shape, size in sizes.items()}
        for a, b, out in self.operands.values():
            torch.mm(a, b, out=out)

    def turn(self) -> dict[str, float]:
        """GFLOP/s by shape."""
        return {shape: _gflops(*operands, self.device) for shape, operands in self.operands.items()}


def best_shape(turns: Sequence[dict[str, float]]) -> tuple[str, float]:
    """The shape whose median rate over the turns is the highest, and that rate in GFLOP/s."""
    medians = median_rates(turns)
    shape = max(medians, key=medians.__getitem__)
    return shape, medians[shape]


def median_rates(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {shape: statistics.median(turn[shape] for turn in turns) for shape in turns[0]}


def _operands(
    rows: int, inner: int, columns: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, out = (
        torch.randn(size, device=device, dtype=dtype)
        for size in ((rows, inner), (inner, columns), (rows, columns))
    )
    return a, b, out


def _gflops(a: Tensor, b: Tensor, out: Tensor, device: str) -> float:
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    seconds: list[float] = []
    while sum(seconds) < SECONDS_PER_SHAPE:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return flops / statistics.median(seconds) / 1e9
