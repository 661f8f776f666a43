"""Classes sharded over 1, 2, 3 and 4 real processes: the loss and gradients of one process, and refusals on all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import LARGEST_WORLD
from support import F32, F64, Dtypes, make_problem, plain_forward, relative_error
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import FusedCosFaceLoss, cosface_loss, margin_softmax_loss, reference
from cosface_kernels.distributed import class_range, clip_grad_norm_, empty_weight

WORLDS = range(1, LARGEST_WORLD + 1)
IGNORED = -100


@pytest.fixture(params=WORLDS, ids="{} ranks".format, scope="module")
def world(request):
    return request.param


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
        "parameter": torch.tensor(case.scale),
        "vector": case.scale * (0.5 + draw),
    }
    return Batch(x, w, labels, scales[case.scale_kind], 0.1 + draw if case.weighted else None, upstream)


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
    return Result(loss.detach(), x.grad, dw, getattr(scale, "grad", None), *stats)


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


RAGGED = (5, 1, 7, 3)
CASES = [
    Case("even"),
    Case("ragged", samples=RAGGED),
    Case("a rank without samples", samples=(4, 0, 6, 0)),
    Case("first rank without samples", samples=(0, 5, 1, 2)),
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


def assert_same(name: str, got: Tensor, want: Tensor, tolerance: float, size: Tensor | None = None) -> None:
    """|got - want| <= tolerance |size|, with infinities and nan at the same places."""
    assert got.shape == want.shape, (name, got.shape, want.shape)
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), name
    assert torch.equal(got[~finite & ~want.isnan()].double(), want[~finite & ~want.isnan()].double()), name
    error = (got[finite].double() - want[finite].double()).norm()
    allowed = tolerance * (want[finite] if size is None else size).double().norm()
    assert error <= allowed, f"{name} is {error:.3g} away, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtypes", [F64, F32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_compute_what_one_process_does(ranks, world, case, dtypes):
    """The mean over the ranks of the backbone's gradients, which W-fold dx gives, and dw are those of one process.

    In float64 to 1e-11; in float32 to twice the distance of one float32 process from float64, plus an ulp of the
    logits.
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
    assert torch.equal(torch.stack([r.accuracy for r in results]), got.accuracy.expand(world))
    for name in Result._fields:
        mine, theirs, right = (getattr(result, name) for result in (got, one, exact))
        if right is None:
            assert mine is None
            continue
        assert mine.dtype == theirs.dtype, name
        finite = right.isfinite()
        distance = (theirs[finite].double() - right[finite]).norm() / right[finite].norm().clamp_min(1e-300)
        ulp = torch.finfo(dtypes.compute).eps * max(1.0, case.scale)
        assert_same(name, mine, right.to(mine.dtype) if name == "accuracy" else right, 2 * float(distance) + 4 * ulp)
