"""Batches of a sharded head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cosface_kernels import (
    FusedCosFaceLoss,
)
from cosface_kernels.distributed import own_classes, own_rows
from cosface_kernels.optim import FusedSGD
from support import F64, Dtypes, make_problem

IGNORED = -100


DIM = 24


RAGGED = (5, 0, 7, 3)


@dataclass(frozen=True)
class Case:
    """Some steps of a head alone: a global batch each, and how its rows fall to the ranks."""

    name: str
    optimizer: type = FusedSGD
    options: dict[str, Any] = field(default_factory=dict)
    classes: int = 103  # 2, 3 and 4 ranks own unequal shares
    samples: tuple[int, ...] = RAGGED
    dtypes: Dtypes = F64
    confident: bool = False
    scale: float = 64.0
    reduction: str = "mean"
    ignored: tuple[int, ...] = ()
    backend: str = "cpu"
    head: dict[str, Any] = field(default_factory=dict)
    steps: int = 4

    def __str__(self) -> str:
        return self.name


def centres(case: Case) -> Tensor:
    return make_problem(1, case.classes, DIM, case.dtypes).w


def make_head(case: Case, group) -> FusedCosFaceLoss:
    head = FusedCosFaceLoss(
        case.classes, DIM, scale=case.scale, reduction=case.reduction, ignore_index=IGNORED, dtype=case.dtypes.w,
        backend=case.backend, process_group=group, **case.head,
    )  # fmt: skip
    own = own_classes(head.weight)
    own_rows(head.weight).copy_(centres(case)[own.start : own.stop])
    return head


def batches(case: Case, rank: int, group):
    """This rank's rows of each step's batch."""
    samples = case.samples if group is None else case.samples[: group.size()]
    rng = torch.Generator().manual_seed(7)
    for _ in range(case.steps):
        x = torch.randn(sum(samples), DIM, generator=rng, dtype=torch.float64)
        labels = torch.randint(case.classes, (sum(samples),), generator=rng)
        if case.confident:
            x = centres(case)[labels] + 0.01 * x
        labels[[i for i in case.ignored if i < len(labels)]] = IGNORED
        x = x.to(case.dtypes.x)
        yield (x, labels) if group is None else tuple(t.split(samples)[rank].clone() for t in (x, labels))


MOMENTUM = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
