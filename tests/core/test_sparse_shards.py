"""gradient_tolerance where classes are sharded over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from support import F64
from support.sparse_runs import KINDS, lmcl
from support.sparsity import (
    SAMPLES,
    C,
    N,
    assert_within_bound,
    cosines,
    negatives_of,
    oracle,
    run_sharded,
    with_cosines,
)
from torch import Tensor

from cosface_kernels import (
    FusedCosFaceLoss,
    ops,
)
from cosface_kernels.distributed import class_range, own_rows
from cosface_kernels.margins import CombinedMargin, MVSoftmaxMargin
from cosface_kernels.optim import FusedSGD


@pytest.mark.parametrize("world", SAMPLES)
@pytest.mark.parametrize("tolerance", [0.3, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_within_the_bound(ranks, kind, tolerance, world):
    """That of the whole softmax, whatever share of it a rank has: in "late flood" nearly all is on the last."""
    gradients, sparsity, i = run_sharded(ranks, world, with_cosines(cosines(kind)), tolerance)
    assert_within_bound(gradients, sparsity, tolerance, i)


RESHAPING_MARGINS = (MVSoftmaxMargin(0.303), CombinedMargin((1, 0, 0.3), filter_above=0.24))


@pytest.mark.parametrize("margin", RESHAPING_MARGINS, ids=lambda margin: type(margin).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_shards_with_reshaped_negatives_are_within_the_bound(ranks, kind, margin):
    for scale in (20.0, 64.0):
        i = with_cosines(cosines(kind), scale=scale)
        by = negatives_of(margin, i)
        gradients, sparsity, i = run_sharded(ranks, 3, i, 1e-2, margin=margin)
        assert_within_bound(gradients, sparsity, 1e-2, i, by=by)


def test_shards_report_what_the_gradient_lacks(ranks):
    """As on one process, of ranks that own unlike shares of the heavy entries, and of the mass."""
    cos = torch.full((N, C), 0.25, dtype=torch.float64)
    cos[:, ::40] = torch.tensor([0.39, 0.35, 0.37, 0.36, 0.38, 0.34], dtype=torch.float64)[:, None]
    cos[:, 1000:2000:40] -= 0.03
    gradients, sparsity, i = run_sharded(ranks, 3, with_cosines(cos, F64, scale=90.0), 0.1)
    assert_within_bound(gradients, sparsity, 0.1, i)
    assert bool((sparsity.dropped > 0).any())
    assert not bool(sparsity.exact.any())
    lacks = oracle(i).dscale - gradients.dscale
    torch.testing.assert_close(lacks, i.g_lse * sparsity.dropped * 0.25, rtol=1e-6, atol=1e-10)


def test_shards_add_up_what_they_keep(ranks, restore_threads):
    """The first two ranks are exact in every sample, and the last in none."""
    torch.set_num_threads(1)  # as the ranks have
    cos = cosines("equal")
    cos[:, 2000:] = cosines("one heavy", classes=1000)
    i = with_cosines(cos, scale=60.0)
    _, sparsity, _ = run_sharded(ranks, 3, i, 1e-2)
    kept = torch.zeros(N, dtype=torch.float64)
    for rank in range(3):
        own = class_range(C, rank, 3)
        targets = torch.where((i.targets >= own.start) & (i.targets < own.stop), i.targets - own.start, -1)
        outputs = lmcl(i._replace(w=i.w[own.start : own.stop], targets=targets), 1e-2)
        share = ops.kept_entries(outputs[5], N)[1]
        assert share.eq(1).tolist() == [rank < 2] * N
        kept += share * (len(own) - (targets >= 0).double())
    assert not sparsity.exact.any()
    torch.testing.assert_close(sparsity.kept, kept / (C - (i.targets >= 0).double()))
    flat = run_sharded(ranks, 3, with_cosines(cosines("equal")), 1e-2)[1]
    assert bool(flat.exact.all())
    assert not flat.dropped.any()


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_shards_without_classes_or_negatives(ranks, classes):
    cos = torch.linspace(-0.3, 0.3, N * classes, dtype=torch.float64).view(N, classes)
    gradients, sparsity, i = run_sharded(ranks, 4, with_cosines(cos, F64), 0.1)
    assert_within_bound(gradients, sparsity, 0.1, i)
    exact = run_sharded(ranks, 4, with_cosines(cos, F64), 0.0)[0] if classes == 1 else gradients
    for mine, want in zip(gradients, exact, strict=True):
        torch.testing.assert_close(mine, want)


def test_a_broken_sample_of_shards_drops_nothing(ranks):
    i = with_cosines(cosines("one heavy"), scale=60.0)
    i.x[3, 0] = math.nan
    gradients, sparsity, _ = run_sharded(ranks, 2, i, 1e-2)
    assert sparsity.exact.tolist() == [row == 3 for row in range(N)]
    assert float(sparsity.dropped[3]) == 0
    assert gradients.dx.isnan().all(1).tolist() == [row == 3 for row in range(N)]


def _train_shards(rank: int, group, accumulate: bool, sample_rate: float) -> Tensor:
    torch.manual_seed(0)
    options = {"gradient_tolerance": 1e-2, "sample_rate": sample_rate}
    head = FusedCosFaceLoss(2000, 256, scale=200.0, process_group=group, **options)
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, accumulate=accumulate)
    for _ in range(3):
        x, labels = torch.randn(16, 256), torch.randint(2000, (16,))
        loss, stats = head(x, labels, return_stats=True)
        assert not stats.sparsity.exact.any()
        assert 0 < float(stats.sparsity.dropped.max()) <= 1e-2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return own_rows(head.weight)


@pytest.mark.parametrize("sample_rate", [1.0, 0.8])
def test_rows_of_shards_move_inside_backward(ranks, sample_rate):
    """As through a dense dw; of sampled classes the rows that were drawn alone, without the others' decay."""
    moved, dense = (ranks.results(3, _train_shards, accumulate, sample_rate) for accumulate in (False, True))
    if sample_rate == 1:
        for mine, want in zip(moved, dense, strict=True):
            assert float((mine - want).norm() / want.norm()) < 1e-5
