"""What several processes compute beside what one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cosface_kernels import (
    FusedLSoftmaxLoss,
)
from support import F32, Dtypes, make_problem

IGNORED = -100


@dataclass(frozen=True)
class Case:
    """A global batch, how its rows fall to the ranks, and how the loss is called."""

    name: str
    classes: int = 103  # 2, 3 and 4 ranks own unequal shares
    samples: tuple[int, ...] = (8, 8, 8, 8)  # rows of each rank
    dtypes: Dtypes = F32
    regime: str = "random"
    scale: float = 64.0
    backend: str = "cpu"
    reduction: str = "mean"
    margin: str = "cosface"
    ignored: tuple[int, ...] = ()
    scale_kind: str = "number"
    weighted: bool = False
    own_classes: tuple[int, int] | None = None  # all labels fall in this range
    zero_rows: bool = False

    def __str__(self) -> str:
        return self.name


class Batch(NamedTuple):
    x: Tensor
    w: Tensor
    labels: Tensor
    scale: Tensor
    sample_weight: Tensor | None
    upstream: Tensor  # (N,) gradient of each row's loss, for reduction "none"


def make_batch(case: Case, world: int) -> Batch:
    n = sum(case.samples[:world])
    problem = make_problem(n, case.classes, 24, case.dtypes, regime=case.regime, scale=case.scale)
    labels, x, w = problem.targets.clone(), problem.x, problem.w
    if case.own_classes:
        low, high = case.own_classes
        labels = low + labels % (high - low)
    labels[[i for i in case.ignored if i < n]] = IGNORED
    if case.zero_rows and n > 1:
        x[1] = 0
        w[case.classes // 2] = 0
    rng = torch.Generator().manual_seed(3)
    draw = torch.rand(n, generator=rng, dtype=torch.float64).to(case.dtypes.compute)
    upstream = torch.randn(n, generator=rng, dtype=torch.float64).to(case.dtypes.compute)
    scales = {
        "number": torch.tensor(case.scale),
        "parameter": torch.tensor(case.scale, dtype=case.dtypes.compute),
        "vector": case.scale * (0.5 + draw),
    }
    return Batch(x, w, labels, scales[case.scale_kind], 0.1 + draw if case.weighted else None, upstream)


RAGGED = (5, 1, 7, 3)


def assert_as_good_as_one(name: str, got: Tensor, one: Tensor, exact: Tensor, ulp: float) -> None:
    """|got - exact| <= 2 |one - exact| + 4 ulp |exact|, with infinities and nan at the same places."""
    assert (got.shape, got.dtype) == (one.shape, one.dtype), name
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), name
    assert torch.equal(got[~finite].nan_to_num(), one[~finite].nan_to_num()), name
    got, one, exact = got[finite].double(), one[finite].double(), exact[finite]
    error, allowed = (got - exact).norm(), 2 * (one - exact).norm() + 4 * ulp * exact.norm()
    assert error <= allowed, f"{name} is {error:.3g} away, allowed {allowed:.3g}, norm {exact.norm():.3g}"


ON_ONE_PROCESS = FusedLSoftmaxLoss  # its margin reads the norms of the targets' class centres
