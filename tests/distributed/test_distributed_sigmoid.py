"""Sharded heads whose classes count each on its own: what one process computes."""

import pytest
import torch
from support.ranks import LARGEST_WORLD
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cosface_kernels import FusedSFaceLoss, FusedSphereFace2Loss, FusedUniFaceLoss
from cosface_kernels.optim import FusedSGD

CLASSES, DIM, SAMPLES = 23, 6, (4, 0, 7, 1)
HEADS = [FusedSphereFace2Loss, FusedUniFaceLoss, FusedSFaceLoss]


def _batch(world: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(world)
    n = sum(SAMPLES[:world])
    labels = torch.randint(CLASSES, (n,), generator=rng)
    labels[1] = -100
    double = {"generator": rng, "dtype": torch.float64}
    return torch.randn(n, DIM, **double), labels, torch.rand(n, **double)


def _head(kind, group: ProcessGroup | None, **options):
    """With a scale that learns."""
    torch.manual_seed(0)
    scale = nn.Parameter(torch.tensor(12.0, dtype=torch.float64))
    return kind(CLASSES, DIM, scale=scale, process_group=group, dtype=torch.float64, **options)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _evaluate(rank, group, world: int, kind, reduction: str, weighted: bool):
    """The loss, and the gradients of embeddings, sample weights and parameters."""
    x, labels, a = _batch(world)
    if group is not None:
        x, labels, a = (t.split(SAMPLES[:world])[rank] for t in (x, labels, a))
    x, a = x.clone().requires_grad_(), a.clone().requires_grad_()
    head = _head(kind, group, reduction=reduction)
    loss, stats = head(x, labels, sample_weight=a if weighted else None, return_stats=3)
    (loss.sum() if reduction == "none" else loss).backward()
    learned = {name: _whole(p.grad) for name, p in head.named_parameters()}
    rows = (x.grad, a.grad if weighted else x.grad, stats.target_cos, stats.lse)
    return loss.detach(), rows, learned, stats.accuracy, stats.top_k_accuracy


@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("world", [2, LARGEST_WORLD])
def test_is_one_process(ranks, world, kind, reduction, weighted):
    results = ranks.results(world, _evaluate, world, kind, reduction, weighted)
    loss, rows, learned, accuracy, top_k = _evaluate(0, None, world, kind, reduction, weighted)
    # each rank calls backward on the sum of its own samples' losses, whose mean over the ranks has these gradients
    mean = world if reduction == "none" else 1
    if reduction == "none":
        torch.testing.assert_close(torch.cat([r[0] for r in results]), loss, rtol=1e-11, atol=1e-12)
    for got_loss, _, got_learned, got_accuracy, got_top_k in results:
        if reduction != "none":
            torch.testing.assert_close(got_loss, loss, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(got_accuracy, accuracy)
        torch.testing.assert_close(got_top_k, top_k)
        for name, want in learned.items():
            rtol = 1e-9 if want.dtype == torch.float64 else 1e-5  # the bias is in float32
            torch.testing.assert_close(mean * got_learned[name], want, rtol=rtol, atol=1e-11)
    for k, want in enumerate(rows):
        factor = mean / world if k < 2 else 1  # the embeddings' gradient is `world` times that of one process
        got = torch.cat([r[1][k] for r in results])
        torch.testing.assert_close(factor * got, want, rtol=1e-9, atol=1e-11)


def _train(rank, group, kind, moves: bool, sample_rate: float):
    head = _head(kind, group, sample_rate=sample_rate)
    optimizer = (FusedSGD if moves else torch.optim.SGD)(head.parameters(), lr=0.1)
    for step in range(3):
        x, labels, _ = _batch(2 + step % 2)
        x, labels = (t.split(-(-len(x) // 2))[rank] for t in (x, labels))
        optimizer.zero_grad()
        head(x, labels).backward()
        optimizer.step()
    return {name: _whole(p.detach()) for name, p in head.named_parameters()}


@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_rows_that_move_in_backward(ranks, kind, sample_rate):
    moved, stepped = (ranks.results(2, _train, kind, moves, sample_rate) for moves in (True, False))
    for ours, theirs in zip(moved, stepped, strict=True):
        for name, value in theirs.items():
            rtol = 1e-9 if value.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=1e-9)
            torch.testing.assert_close(moved[0][name], ours[name], rtol=0, atol=0)


def _ask_alone(rank, group):
    x, labels, _ = _batch(2)
    x, labels = (t.split(SAMPLES[:2])[rank] for t in (x, labels))
    try:
        _head(FusedUniFaceLoss, group)(x, labels, return_stats=rank == 0)
    except ValueError as error:
        return str(error)
    return None


def test_statistics_are_asked_for_by_all(ranks):
    """They take a pass of their own, in which a rank that asked alone would wait for the others."""
    for message in ranks.results(2, _ask_alone):
        assert "presence of return_stats must be the same on every rank, got True on rank 0 and False" in message
