"""Forward and backward of backend `cpu` with a gradient_tolerance."""

from __future__ import annotations

from torch import Tensor

from cosface_kernels import (
    ops,
)
from support.sparsity import (
    Inputs,
    Negatives,
)

KINDS = ("equal", "one heavy", "heavy tail", "normal", "steps", "ascending", "descending", "late flood")


def lmcl(
    i: Inputs,
    tolerance: float,
    classes: Tensor | None = None,
    cache_bytes: int = 0,
    by: Negatives | None = None,
) -> tuple[Tensor, ...]:
    thresholds, polynomial = by or (None, None)
    return ops.lmcl(
        i.x, i.w, i.targets, i.scale, 0.35, "cpu", classes, cache_bytes, tolerance, thresholds=thresholds,
        negatives=polynomial,
    )  # fmt: skip
