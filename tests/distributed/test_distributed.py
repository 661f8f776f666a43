"""Several processes compute what one does: losses, gradients, logits, the classes of each."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support import F32, F64
from support.one_process import IGNORED, RAGGED, Batch, Case, assert_as_good_as_one, make_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cosface_kernels import (
    FusedCosFaceLoss,
    margin_softmax_loss,
)
from cosface_kernels.distributed import class_range, empty_weight


def psi_of(name: str):
    if name == "arcface":
        return lambda cos: torch.cos(torch.acos(cos.clamp(-0.999, 0.999)) + 0.5)
    return 0.35


class Result(NamedTuple):
    loss: Tensor
    dx: Tensor
    dw: Tensor
    dscale: Tensor | None
    lse: Tensor
    target_cos: Tensor
    max_neg: Tensor
    accuracy: Tensor


def evaluate(batch: Batch, case: Case, weight: Tensor, rows: slice) -> Result:
    """Loss, gradients and statistics of some rows of the batch, on a weight that may be sharded."""
    x = batch.x[rows].clone().requires_grad_()
    scale: float | Tensor = case.scale
    if case.scale_kind != "number":
        scale = (batch.scale[rows] if case.scale_kind == "vector" else batch.scale).clone().requires_grad_()
    loss, stats = margin_softmax_loss(
        x,
        weight,
        batch.labels[rows],
        margin=psi_of(case.margin),
        scale=scale,
        reduction=case.reduction,
        sample_weight=None if batch.sample_weight is None else batch.sample_weight[rows],
        ignore_index=IGNORED,
        backend=case.backend,
        return_stats=True,
    )
    if case.reduction == "none":
        loss.backward(batch.upstream[rows])
    else:
        loss.backward()
    dw = weight.grad.to_local() if isinstance(weight, DTensor) else weight.grad
    return Result(loss.detach(), x.grad, dw, getattr(scale, "grad", None), *stats[:4])


def on_rank(rank, group, case: Case) -> Result:
    batch = make_batch(case, group.size())
    weight = empty_weight(*batch.w.shape, group, dtype=batch.w.dtype)
    own = class_range(len(batch.w), rank, group.size())
    weight.to_local().copy_(batch.w[own.start : own.stop])
    first = sum(case.samples[:rank])
    return evaluate(batch, case, nn.Parameter(weight), slice(first, first + case.samples[rank]))


def on_one(case: Case, world: int) -> Result:
    batch = make_batch(case, world)
    return evaluate(batch, case, nn.Parameter(batch.w.clone()), slice(None))


CASES = [
    Case("even"),
    Case("ragged", samples=RAGGED),
    Case("a rank without samples", samples=(4, 0, 6, 0)),
    Case("first rank without samples", samples=(0, 5, 1, 2)),
    Case("no samples at all", samples=(0, 0, 0, 0), reduction="sum"),
    Case("fewer classes than ranks", classes=2),
    Case("one class", classes=1),
    Case("labels of one shard", own_classes=(0, 20)),
    Case("labels of the last shard", own_classes=(95, 103), samples=RAGGED),
    Case("ignored", ignored=(0, 3, 8, 9), samples=RAGGED),
    Case("confident", regime="confident"),
    Case("wrong", regime="wrong", samples=RAGGED),
    Case("zero rows", zero_rows=True),
    Case("sum", reduction="sum", samples=RAGGED),
    Case("none", reduction="none", samples=RAGGED, ignored=(2,)),
    Case("arcface", margin="arcface", samples=RAGGED),
    Case("learned scale", scale_kind="parameter", scale=20.0, samples=RAGGED),
    Case("scale of each sample", scale_kind="vector", scale=20.0, samples=RAGGED),
    Case("weighted", weighted=True, samples=RAGGED, ignored=(1,)),
    Case("large scale", scale=2000.0, samples=RAGGED),
    Case("reference", backend="reference", samples=RAGGED),
]


@pytest.mark.parametrize("dtypes", [F64, F32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_compute_what_one_process_does(ranks, world, case, dtypes):
    """The mean over the ranks of the backbone's gradients, which W-fold dx gives, and dw are those of one process.

    To twice the distance of one process from float64, plus a few ulp of the logits.
    """
    case = replace(case, dtypes=dtypes)
    results = ranks.results(world, on_rank, case)
    exact = on_one(replace(case, dtypes=F64), world)
    one = on_one(case, world)
    got = Result(
        torch.cat([r.loss for r in results]) if case.reduction == "none" else results[0].loss,
        torch.cat([r.dx for r in results]) / (1 if case.reduction == "none" else world),
        torch.cat([r.dw for r in results]) * (world if case.reduction == "none" else 1),
        None,
        *(torch.cat([getattr(r, field) for r in results]) for field in ("lse", "target_cos", "max_neg")),
        results[0].accuracy,
    )
    if case.scale_kind == "parameter":
        assert all(torch.equal(r.dscale, results[0].dscale) for r in results)
        got = got._replace(dscale=results[0].dscale)
    elif case.scale_kind == "vector":
        got = got._replace(dscale=torch.cat([r.dscale for r in results]) / world)
    if case.reduction != "none":
        for other in results[1:]:
            assert torch.equal(other.loss, got.loss), "every rank has the same loss, to the bit"
    assert len({str(r.accuracy.item()) for r in results}) == 1
    torch.testing.assert_close(got.accuracy.double(), exact.accuracy.double(), rtol=1e-7, atol=0, equal_nan=True)
    ulp = torch.finfo(dtypes.compute).eps * max(1.0, case.scale)
    for name in Result._fields[:-1]:
        mine, theirs, right = (getattr(result, name) for result in (got, one, exact))
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert_as_good_as_one(name, mine, theirs, right, ulp)


def _weight_of_seed(rank, group):
    torch.manual_seed(5 + rank)
    return FusedCosFaceLoss(103, 24, process_group=group).weight.to_local().detach()


def test_initial_weight_does_not_depend_on_the_world(ranks, world):
    torch.manual_seed(5)
    want = FusedCosFaceLoss(103, 24).weight.detach()
    assert torch.equal(torch.cat(ranks.results(world, _weight_of_seed)), want)


def _dtensor_share(rank, group, classes):
    mesh = DeviceMesh.from_group(group, "cpu")
    share = distribute_tensor(torch.arange(classes), mesh, [Shard(0)]).to_local()
    return share.tolist(), class_range(classes, rank, group.size())


@pytest.mark.parametrize("classes", [1, 2, 5, 9, 100])
def test_shares_are_those_of_dtensor(ranks, world, classes):
    for share, own in ranks.results(world, _dtensor_share, classes):
        assert share == list(own)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("3", 0, 4), "num_classes must be an integer of at least 0, got '3'"),
        ((10, 1.0, 4), r"rank must be in \[0, 4\), got 1\.0"),
        ((10, -1, 4), r"rank must be in \[0, 4\), got -1"),
        ((10, 4, 4), r"rank must be in \[0, 4\), got 4"),
        ((10, 0, 0), "world_size must be a positive integer, got 0"),
    ],
    ids=str,
)
def test_a_share_of_no_rank(arguments, message):
    with pytest.raises(ValueError, match=message):
        class_range(*arguments)


def _logits(rank, group):
    torch.manual_seed(0)
    head = FusedCosFaceLoss(10, 4, process_group=group)
    x = torch.randn(rank + 1, 4)
    return head.get_logits(x), x


def test_logits_over_all_classes(ranks):
    torch.manual_seed(0)
    head = FusedCosFaceLoss(10, 4)
    for logits, x in ranks.results(3, _logits):
        torch.testing.assert_close(logits, head.get_logits(x))
