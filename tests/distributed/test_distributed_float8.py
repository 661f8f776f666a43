"""Sharded weights in float8: as on one process, but for the random numbers of their rounding."""

import pytest
import torch
from support.ranks import LARGEST_WORLD
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import FusedCosFaceLoss, checkpoint, convert, float8
from cosface_kernels.distributed import class_range, own_rows
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.optim import FusedSGD

C, D, SAMPLES = 11, 12, 3  # of each rank


def make_head(group: ProcessGroup | None, dtype: torch.dtype = FLOAT8, seed: int = 0, num_classes: int = C):
    torch.manual_seed(seed)
    return FusedCosFaceLoss(num_classes, D, scale=16.0, process_group=group, dtype=dtype)


def own_batch(rank: int, world: int, num_classes: int = C) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(LARGEST_WORLD * SAMPLES, D, generator=rng)
    labels = torch.randint(num_classes, (len(x),), generator=rng)
    stop = None if rank == world - 1 else (rank + 1) * SAMPLES
    return x[rank * SAMPLES : stop], labels[rank * SAMPLES : stop]


def optimizer_of(head: FusedCosFaceLoss) -> FusedSGD:
    return FusedSGD(head.parameters(), lr=0.01, momentum=0.9, state_dtype=FLOAT8)


def rows_of(head: FusedCosFaceLoss) -> Tensor:
    """(C_r, D) float64, of this rank."""
    if head.weight_exponent is None:
        return own_rows(head.weight).double()
    return float8.values(own_rows(head.weight), own_rows(head.weight_exponent), torch.float64)


def step(head: FusedCosFaceLoss, optimizer: FusedSGD, rank: int, world: int) -> tuple[Tensor, Tensor]:
    x, labels = own_batch(rank, world, head.num_classes)
    x.requires_grad_()
    loss = head(x, labels)
    loss.backward()
    optimizer.step()
    return loss.detach(), x.grad / world


def steps(rank: int, group: ProcessGroup | None, dtype: torch.dtype) -> list[Tensor]:
    world = group.size() if group else 1
    head = make_head(group)
    first = rows_of(head)
    head.to(dtype)
    results = step(head, optimizer_of(head), rank, world)
    return [first, *results, rows_of(head)]


def test_a_step_is_that_of_one_process(ranks, world):
    first, loss, dx, moved = (torch.cat([each.view(-1, *each.shape[1:]) for each in of_ranks]) for of_ranks in zip(
        *ranks.results(world, steps, FLOAT8), strict=True
    ))  # fmt: skip
    want_first, want_loss, want_dx, _ = steps(0, None, FLOAT8)
    assert torch.equal(first, want_first)
    torch.testing.assert_close(loss, want_loss.expand(world), rtol=1e-5, atol=0)
    torch.testing.assert_close(dx, want_dx, rtol=1e-4, atol=1e-7)
    *_, exact = steps(0, None, torch.float32)
    largest = exact.abs().amax(1, keepdim=True)
    assert bool(((moved - exact).abs() <= 0.13 * exact.abs() + 2e-5 * largest).all())
    assert not torch.equal(moved, first)


def saved(rank: int, group: ProcessGroup | None, folder: str) -> Tensor:
    head = make_head(group)
    optimizer = optimizer_of(head)
    step(head, optimizer, rank, group.size() if group else 1)
    checkpoint.save(folder, 1, process_group=group, head=head, optimizer=optimizer)
    convert.save_weight(head.weight, f"{folder}/weight.safetensors", head.weight_exponent)
    return rows_of(head)


def loaded(rank: int, group: ProcessGroup | None, folder: str, dtype: torch.dtype) -> list[Tensor]:
    """The rows of a checkpoint, of the state in it, and of a file of the weight."""
    head = make_head(group, dtype, seed=1)
    optimizer = optimizer_of(head)
    checkpoint.load(folder, process_group=group, head=head, optimizer=optimizer)
    other = make_head(group, dtype, seed=2)
    convert.load_weight_(other.weight, f"{folder}/weight.safetensors", weight_exponent=other.weight_exponent)
    state = optimizer.state[head.weight]
    momentum, exponents = (own_rows(state[f"momentum_buffer{name}"]) for name in ("", "_exponent"))
    results = [rows_of(head), rows_of(other), float8.values(momentum, exponents, torch.float64)]
    step(head, optimizer, rank, group.size() if group else 1)  # whatever is loaded goes on
    return results


@pytest.mark.parametrize("dtype", [FLOAT8, torch.float32], ids=str)
def test_checkpoints_go_to_any_number_of_ranks(ranks, world, dtype, tmp_path):
    want = torch.cat(ranks.results(world, saved, str(tmp_path)))
    momenta = []
    for other in (1, 2, LARGEST_WORLD):
        results = ranks.results(other, loaded, str(tmp_path), dtype)
        rows, of_file, momentum = (torch.cat(list(each)) for each in zip(*results, strict=True))
        assert torch.equal(rows, want)
        assert torch.equal(of_file, want)
        momenta.append(momentum)
    assert all(torch.equal(each, momenta[0]) for each in momenta)
    assert bool(momenta[0].any())


def resized(rank: int, group: ProcessGroup | None) -> list[Tensor]:
    head = make_head(group)
    optimizer = optimizer_of(head)
    step(head, optimizer, rank, group.size() if group else 1)
    before = rows_of(head)
    head.resize_classes_([10, 0, 5], 4, optimizer=optimizer)
    after = rows_of(head)
    assert isinstance(head.weight_exponent, DTensor) == (group is not None)
    step(head, optimizer, rank, group.size() if group else 1)
    return [before, after]


def test_classes_come_and_go(ranks, world):
    before, after = (torch.cat(list(each)) for each in zip(*ranks.results(world, resized), strict=True))
    assert torch.equal(after[:3], before[[10, 0, 5]])
    lengths = after.norm(dim=1)
    torch.testing.assert_close(lengths[3:], lengths[:3].mean().expand(4), rtol=0.03, atol=0)


def within_ddp(rank: int, group: ProcessGroup) -> bool:
    """Whether the exponents of a rank are still its own after a forward pass, in which DDP shares buffers."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
            self.head = make_head(group)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.head(self.backbone(x), labels)

    model = Model()
    optimizer = optimizer_of(model.head)
    own_rows(model.head.weight_exponent).fill_(-10 - rank)
    wrapped = DistributedDataParallel(model, process_group=group)
    wrapped(*own_batch(rank, group.size()))
    del optimizer
    exponents = own_rows(model.head.weight_exponent)
    return len(exponents) == len(class_range(C, rank, group.size())) and bool((exponents == -10 - rank).all())


def test_exponents_of_a_shard_are_left_to_its_rank(ranks, world):
    assert ranks.results(world, within_ddp) == [True] * world


def logits(rank: int, group: ProcessGroup | None) -> Tensor:
    return make_head(group).get_logits(own_batch(0, 1)[0]).detach()


def test_logits_are_of_all_classes(ranks, world):
    want = logits(0, None)
    assert all(torch.equal(each, want) for each in ranks.results(world, logits))


def moved_between(rank: int, group: ProcessGroup | None, dtype: torch.dtype) -> list[bool]:
    """Whether an optimizer holds a head that has been on its way, and whether it knows of a step in hand."""
    world = group.size()
    head = make_head(group, dtype)
    optimizer = optimizer_of(head)
    head.to("cpu").to(FLOAT8).to("cpu")
    before = rows_of(head)
    step(head, optimizer, rank, world)
    x, labels = own_batch(rank, world)
    head(x, labels).backward()
    head.to("cpu")
    refused = False
    try:
        head(x, labels).backward()
    except RuntimeError as error:
        refused = "backward ran twice" in str(error)
    return [not torch.equal(rows_of(head), before), refused]


@pytest.mark.parametrize("dtype", [FLOAT8, torch.float32], ids=str)
def test_an_optimizer_holds_a_head_that_is_cast(ranks, world, dtype):
    assert all(all(of_rank) for of_rank in ranks.results(world, moved_between, dtype))


def assigned(rank: int, group: ProcessGroup, dtype: torch.dtype, gives: str) -> bool:
    """Whether rows and exponents are those of a state that is laid out otherwise, and that is assigned."""
    whole, sharded = make_head(None, FLOAT8, seed=4), make_head(group, FLOAT8, seed=5)
    whole.weight_exponent += 3
    giver, taker = (whole, make_head(group, dtype)) if gives == "whole" else (sharded, make_head(None, dtype))
    taker.load_state_dict(giver.state_dict(), assign=True)
    return torch.equal(rows_of(taker), rows_of(giver))


@pytest.mark.parametrize("gives", ["whole", "sharded"])
@pytest.mark.parametrize("dtype", [FLOAT8, torch.float32], ids=str)
def test_exponents_are_assigned_with_their_rows(ranks, world, dtype, gives):
    assert all(ranks.results(world, assigned, dtype, gives))


def other_state(rank: int, group: ProcessGroup) -> str:
    head = make_head(group)
    optimizer = FusedSGD(head.parameters(), lr=0.01, momentum=0.9, state_dtype=FLOAT8 if rank else None)
    try:
        step(head, optimizer, rank, group.size())
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_states_in_other_dtypes_are_refused(ranks):
    for message in ranks.results(2, other_state):
        assert "state_dtype" in message
        assert "torch.float8_e4m3fn" in message
