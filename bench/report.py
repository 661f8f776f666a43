"""Results as rows: a JSON list, and a table to read."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cosface_recipes.tables import aligned

MISSING = "-"


@dataclass(frozen=True)
class Row:
    """One implementation on one problem. What could not be measured is None, and the note says why."""

    impl: str
    batch: int
    dim: int
    classes: int
    dtype: str
    median_s: float | None
    min_s: float | None
    peak_extra_mib: float | None  # peak memory on the device beyond inputs and gradients
    matmul_gflops: float | None  # of the device, between the steps; on a GPU in dtype, of float8 in bfloat16
    fraction_of_matmul: float | None  # flops N C D / median_s, relative to matmul_gflops
    max_rel_err: float | None  # of loss, dx and dw against float64
    threads: int
    torch: str
    commit: str | None
    flops_per_ncd: int  # 6 with the logits kept, 8 with them recomputed
    matmul_shape: str | None
    steps: int
    rounds: int
    margin: float | None  # None: one of its own, or a search, which has neither
    scale: float | None
    seed: int
    device: str  # its maker's name
    note: str | None


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Replaces the file as a whole, so that an interruption leaves the last complete one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    os.replace(partial, path)


def table(rows: Sequence[Row]) -> str:
    """The rows of one problem, with the ratio of each time to that of `fused`, or of `fused+FusedSGD`."""
    fused = next((row.median_s for row in rows if row.impl in ("fused", "fused+FusedSGD")), None)
    header = ("impl", "median", "min", "/ fused", "extra MiB", "of matmul", "max rel err", "steps", "note")
    lines = [header, *(_cells(row, fused) for row in rows)]
    return aligned(lines, left=(0, len(header) - 1))


def _cells(row: Row, fused: float | None) -> tuple[str, ...]:
    ratio = row.median_s / fused if row.median_s and fused else None
    return (
        row.impl,
        duration(row.median_s),
        duration(row.min_s),
        _or_missing(ratio, "{:.2f}"),
        _or_missing(row.peak_extra_mib, "{:,.1f}"),
        _or_missing(row.fraction_of_matmul, "{:.1%}"),
        _or_missing(row.max_rel_err, "{:.1e}"),
        str(row.steps),
        row.note or "",
    )


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.3f} ms"


def _or_missing(value: float | None, form: str) -> str:
    return MISSING if value is None else form.format(value)
