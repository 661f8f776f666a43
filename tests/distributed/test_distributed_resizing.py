"""Sharded classes that come, go and change ranks: as on one process, with the optimizer's state."""

from typing import Any

import pytest
import torch
from support.ranks import LARGEST_WORLD
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.distributed import own_rows
from cosface_kernels.optim import FusedAdamW, FusedSGD

DIM, SAMPLES = 4, 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
OPTIMIZERS = {
    "FusedSGD": (FusedSGD, {"lr": 0.1, "momentum": 0.9}),
    "FusedAdamW": (FusedAdamW, {"lr": 0.1}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}
CHANGES: dict[str, tuple[int, Any, int]] = {
    "grown": (5, None, 6),
    "reversed": (11, list(range(10, -1, -1)), 0),
    "fewer than ranks": (9, [8, 1], 0),
    "from one to many": (1, {0: 6}, 8),
    "mapped": (10, {9: 0, 0: 5, 4: 3, 3: 4}, 3),
    "all new": (6, [], 5),
}


def batch(num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(num_classes)
    x = torch.randn(SAMPLES * LARGEST_WORLD, DIM, generator=rng).to(dtype)
    return x, torch.randint(num_classes, (len(x),), generator=rng)


def own(rank: int, world: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """The rank's share of LARGEST_WORLD shares, of which the last rank has the rest."""
    stop = None if rank == world - 1 else (rank + 1) * SAMPLES
    return tuple(each[rank * SAMPLES : stop] for each in rows)


def changed(
    rank: int, group: ProcessGroup | None, optimizer_name: str, change: str, dtype: torch.dtype, imprints: bool
) -> dict[str, Tensor]:
    """This rank's rows of the weight and of the state after a step, a change and another step."""
    (kind, options), (num_classes, keep, new) = OPTIMIZERS[optimizer_name], CHANGES[change]
    world = group.size() if group else 1
    torch.manual_seed(0)
    head = FusedCosFaceLoss(num_classes, DIM, process_group=group, dtype=dtype)
    optimizer = kind(head.parameters(), **options)
    weight = head.weight

    def step() -> None:
        optimizer.zero_grad()
        head(*own(rank, world, *batch(head.num_classes, dtype))).backward()
        optimizer.step()

    step()
    total = len(keep if keep is not None else range(num_classes)) + new
    rng = torch.Generator().manual_seed(1)
    init = torch.randn(LARGEST_WORLD * SAMPLES, DIM, generator=rng), torch.arange(LARGEST_WORLD * SAMPLES) % total
    torch.manual_seed(1)
    head.resize_classes_(keep, new, init=own(rank, world, *init) if imprints else None, optimizer=optimizer)
    assert head.weight is weight
    assert isinstance(weight, DTensor) == (group is not None)
    result = {"resized": own_rows(weight).clone()}
    step()
    result["trained"] = own_rows(weight)
    return result | {k: own_rows(v) for k, v in optimizer.state[weight].items() if torch.is_tensor(v) and v.dim()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_on_one_process(ranks, change, optimizer, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for imprints in (False, True):
        want = changed(0, None, optimizer, change, dtype, imprints)
        for world in {torch.float64: (1, 2, 3, 4)}.get(dtype, (3,)):
            got = ranks.results(world, changed, optimizer, change, dtype, imprints)
            for name, rows in want.items():
                found = torch.cat([each[name] for each in got])
                torch.testing.assert_close(found, rows, rtol=tolerance, atol=tolerance)


def unlike(rank: int, group: ProcessGroup) -> None:
    FusedCosFaceLoss(10, DIM, process_group=group).resize_classes_([0, 1 + rank])


def without_samples_of_a_class(rank: int, group: ProcessGroup) -> None:
    head = FusedCosFaceLoss(10, DIM, process_group=group)
    head.resize_classes_(new=2, init=(torch.ones(1, DIM), torch.tensor([10])))


def refused_on_one(rank: int, group: ProcessGroup) -> None:
    FusedCosFaceLoss(10, DIM, process_group=group).resize_classes_([0, 9 + rank])


def with_a_state_on_one(rank: int, group: ProcessGroup) -> None:
    head = FusedCosFaceLoss(10, DIM, process_group=group)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(*own(rank, group.size(), *batch(10, torch.float32))).backward()
    optimizer.step()
    head.resize_classes_(new=1, optimizer=None if rank else optimizer)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (with_a_state_on_one, "state of the optimizer must be the same on every rank"),
        (unlike, "keep must be the same on every rank"),
        (without_samples_of_a_class, "every new class, got none of class 11"),
        (refused_on_one, "keep must be in [0, 10), got 10"),
    ],
)
def test_all_ranks_refuse(ranks, function, message):
    for refusal in ranks.run(2, function):
        assert isinstance(refusal, Exception)
        assert message in str(refusal)


def sampled(rank: int, group: ProcessGroup) -> tuple[int, int]:
    head = FusedCosFaceLoss(10, DIM, process_group=group, sample_rate=0.5, sample_seed=100)
    head.resize_classes_(new=11)
    head(*own(rank, group.size(), *batch(21, torch.float32))).backward()
    return head.sampler.num_classes, head.sampler.seed


def test_samplers_draw_from_their_new_classes(ranks):
    assert ranks.results(2, sampled) == [(11, 100), (10, 111)]
