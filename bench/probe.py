"""How `bench gpu` measures: a device, the sizes, times of several kinds, and where figures go."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import launches, tables
from bench.device import Gpu, Host
from bench.head import Head, draw
from cosface_kernels.backends.triton import launch

HOLD = 0.06  # seconds in which the host can enqueue a step
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


@dataclass(frozen=True)
class Sizes:
    batches: tuple[int, ...]
    classes: int
    dim: int
    chunk: int  # classes of the library's products, and a step of the sweep's
    copy_bytes: int  # read, and as many written
    square: int
    race: tuple[int, int, int]  # N, C, D
    race_repeats: int
    small: tuple[int, int, int]  # of a step under a sanitizer
    repeats: int  # of everything that is timed
    factors: tuple[int, ...]  # of the chunk, in a sweep
    variations: int  # of a tile, in a sweep

    @property
    def batch(self) -> int:
        return self.batches[len(self.batches) // 2]


REAL = Sizes(
    (256, 1024, 4096),
    1_000_000,
    512,
    8448,
    2 << 30,
    8192,
    (1024, 65536, 512),
    200,
    (128, 1000, 512),
    7,
    (1, 2, 4, 8),
    9,
)
TOY = Sizes((8, 24), 300, 16, 256, 1 << 20, 64, (24, 200, 16), 3, (8, 100, 16), 1, (1, 2), 2)


class Bench:
    """A device, sizes, and where figures go."""

    def __init__(self, file: Path, toy: bool, dtype: str, backend: str) -> None:
        self.device, self.sizes = (Host(), TOY) if toy else (Gpu(), REAL)
        self.file, self.dtype, self.backend = file, dtype, backend
        self.wrong = False
        self.rows = self.measured = 0

    def add(self, step: str, **figures: Any) -> None:
        """Writes a row, at once; in one call, because steps may run side by side."""
        row = {"step": step, **figures}
        self.rows += 1
        self.measured += "note" not in figures
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(tables.line(row), flush=True)

    def draw(
        self, batch: int, classes: int | None = None, dtype: str = "bfloat16", backend: str = "triton"
    ) -> Head:
        return draw(batch, classes or self.sizes.classes, self.sizes.dim, DTYPES[dtype], self.device, backend)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median time on the device, whatever the host takes."""
        run()
        times = []
        for _ in range(self.sizes.repeats):
            self.device.synchronize()
            self.device.hold(HOLD)
            first = self.device.mark()
            run()
            times.append(self.device.between(first, self.device.mark()))
        return statistics.median(times)

    def wall(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Median time up to a synchronisation, and of the host alone."""
        run()
        times, hosts = [], []
        for _ in range(self.sizes.repeats):
            self.device.synchronize()
            start = time.perf_counter()
            run()
            hosts.append(time.perf_counter() - start)
            self.device.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times), statistics.median(hosts)

    def in_kernels(self, run: Callable[[], Any], wanted: str = "") -> dict[str, tuple[float, int]]:
        """By kernel (or of the wanted alone), the median over runs of its launches' time, and their number."""
        marks: list[tuple[str, Any, Any]] = []

        def record(name: str, launch: Callable[[], None], arguments: tuple[Any, ...]) -> None:
            if wanted not in ("", name):
                return launch()
            first = self.device.mark()
            launch()
            marks.append((name, first, self.device.mark()))

        run()
        totals: dict[str, list[float]] = {}
        launched: dict[str, int] = {}
        for _ in range(self.sizes.repeats):
            self.device.synchronize()
            self.device.hold(HOLD)
            marks.clear()
            with launches.through(record):
                run()
            self.device.synchronize()
            sums: dict[str, float] = {}
            for name, first, last in marks:
                sums[name] = sums.get(name, 0.0) + self.device.between(first, last)
            for name, total in sums.items():
                totals.setdefault(name, []).append(total)
                launched[name] = sum(mark[0] == name for mark in marks)
        return {name: (statistics.median(times), launched[name]) for name, times in totals.items()}

    @contextmanager
    def tried(self, step: str, **what: Any) -> Iterator[None]:
        """A measurement that may be impossible here (a tile too large, too little memory): then a row says why.

        A device that no longer answers raises again, which ends the process: there is nothing to measure.
        """
        try:
            yield
        except (RuntimeError, AssertionError, *_triton_errors()) as error:
            self.wrong |= isinstance(self.device, Host)
            self.add(step, **what, note=f"{type(error).__name__}: {str(error).strip()[:120]}")
            self.device.synchronize()


def _triton_errors() -> tuple[type[Exception], ...]:
    return (launch.triton.errors.TritonError,) if launch.triton else ()
