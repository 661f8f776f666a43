"""gradient_tolerance of heads and optimizers: what moves, what is refused, its memory."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support import F64, run_python
from support.sparsity import (
    N,
    cosines,
    with_cosines,
)
from torch import Tensor, nn

from cosface_kernels import (
    FusedCombinedMarginLoss,
    FusedCosFaceLoss,
    FusedCurricularFaceLoss,
    FusedMVSoftmaxLoss,
    cosface_loss,
    ops,
)
from cosface_kernels.backends import BACKENDS, cpu
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.options import CACHE_BYTES, Options

RESHAPING_HEADS = {
    "curricularface": FusedCurricularFaceLoss,
    "mv_softmax": FusedMVSoftmaxLoss,
    "filter": partial(FusedCombinedMarginLoss, filter_above=0.2),
}


def head_and_batch(make=FusedCosFaceLoss, scale=128.0, **options) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    head = make(2000, 256, scale=scale, backend="cpu", **options)
    with torch.no_grad():
        head.weight.mul_(100)
    labels = torch.randint(2000, (16,))
    x = head.weight.detach()[labels].float() + 0.5 * torch.randn(16, 256)
    return head, x, labels


@pytest.mark.parametrize("make", [FusedCosFaceLoss, FusedMVSoftmaxLoss])
@pytest.mark.parametrize(
    ("optimizer", "dtype", "rtol"),
    [(FusedSGD, torch.float32, 1e-5), (FusedAdamW, torch.float32, 1e-4), (FusedSGD, torch.bfloat16, 1e-2)],
)
def test_rows_that_move_inside_backward(optimizer, dtype, rtol, make):
    """The same steps through a dense dw of the same tolerance; rounding to bfloat16 is stochastic."""
    heads = []
    for accumulate in (True, False):
        head, x, labels = head_and_batch(make, gradient_tolerance=1e-2, dtype=dtype)
        step = optimizer(head.parameters(), lr=0.1, weight_decay=0.1, accumulate=accumulate)
        for _ in range(3):
            loss, stats = head(x, labels, return_stats=True)
            assert not stats.sparsity.exact.all()
            loss.backward()
            step.step()
            step.zero_grad()
        heads.append(head.weight.detach().float())
    assert float((heads[1] - heads[0]).norm() / heads[0].norm()) < rtol


@pytest.mark.parametrize("regime", ["confident", "random"])
@pytest.mark.parametrize("name", RESHAPING_HEADS)
def test_heads_that_reshape_negatives(name, regime):
    """Three steps' gradients against the exact ones, within the bound on all of dw and on each row of dx."""
    gradients = []
    for tolerance in (1e-2, 0.0):
        options = {"gradient_tolerance": tolerance, "dtype": torch.float64}
        head, x, labels = head_and_batch(RESHAPING_HEADS[name], scale=400.0, **options)
        labels[5] = -100
        x = (torch.randn_like(x) if regime == "random" else x).double().requires_grad_()
        for _ in range(3):
            loss, stats = head(x, labels, return_stats=True)
            loss.backward()
        gradients.append((x.grad, head.weight.grad))
        if tolerance:
            sparsity = stats.sparsity
    assert not sparsity.exact.any()
    assert 0 < float(sparsity.dropped.max()) <= 1e-2
    steepest = (2 if name == "curricularface" else 1) + float(getattr(head.margin, "t", 0))
    bound = 3 * 400 / 15 * steepest * sparsity.dropped * (labels >= 0)  # (N,): |d loss / d lse| <= 1 / 15
    (dx, dw), (want_dx, want_dw) = gradients
    dx_error, dw_error = (dx - want_dx).norm(dim=1), (dw - want_dw).norm(dim=1)
    assert bool((dx_error * x.detach().norm(dim=1) <= bound + 1e-12).all())
    assert float((dw_error * head.weight.detach().norm(dim=1)).sum()) <= float(bound.sum()) + 1e-12


def test_module_returns_what_it_dropped():
    head, x, labels = head_and_batch(gradient_tolerance=1e-3)
    loss, stats = head(x.requires_grad_(), labels, return_stats=True)
    assert stats.sparsity.dropped.shape == stats.sparsity.kept.shape == (16,)
    assert 0 < float(stats.sparsity.dropped.max()) <= 1e-3
    loss.backward()
    sparse = x.grad.clone()
    exact_head, x, labels = head_and_batch()
    loss, stats = exact_head(x.requires_grad_(), labels, return_stats=True)
    assert stats.sparsity is None
    loss.backward()
    assert 0 < float((sparse - x.grad).norm() / x.grad.norm()) < 0.1


def test_a_frozen_head_gives_embeddings_the_same_gradient():
    gradients = []
    for frozen in (False, True):
        head, x, labels = head_and_batch(gradient_tolerance=0.1)
        head.requires_grad_(not frozen)
        loss, stats = head(x.requires_grad_(), labels, return_stats=True)
        assert not stats.sparsity.exact.any()
        loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_nothing_is_kept_where_there_is_no_gradient():
    head, x, labels = head_and_batch(gradient_tolerance=1e-3)
    with torch.no_grad():
        assert head(x, labels, return_stats=True)[1].sparsity is None


@pytest.mark.parametrize("tolerance", [-0.1, 1, math.nan, "0.1"])
def test_refuses_a_tolerance_out_of_range(tolerance):
    with pytest.raises(ValueError, match=r"gradient_tolerance must be in \[0, 1\), got"):
        FusedCosFaceLoss(10, 4, gradient_tolerance=tolerance)
    with pytest.raises(ValueError, match=r"gradient_tolerance must be in \[0, 1\), got"):
        cosface_loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), gradient_tolerance=tolerance)


@pytest.mark.parametrize("name", sorted(BACKENDS.keys() - {"cpu", "triton"}))
def test_other_backends_refuse(name):
    refusal = BACKENDS[name].unsupported(torch.ones(1, 2), torch.ones(3, 2), Options(gradient_tolerance=0.1))
    assert refusal is not None
    assert "gradient_tolerance" in refusal or "CPU" in refusal or "device" in refusal or "GPU" in refusal


def test_weights_that_are_not_normalised():
    i = with_cosines(cosines("heavy tail"), F64, scale=60.0)
    outputs = [
        ops.lmcl(i.x, w, i.targets, i.scale, 0.35, "cpu", None, 0, 1e-2, normalize)
        for w, normalize in ((torch.nn.functional.normalize(i.w), False), (i.w, True))
    ]
    for mine, want in zip(*(ops.kept_entries(o[5], N) for o in outputs), strict=True):
        torch.testing.assert_close(mine, want)


def test_opcheck():
    i = with_cosines(cosines("heavy tail"))
    x, w = i.x.requires_grad_(), i.w.requires_grad_()
    arguments = (x, w, i.targets, i.scale, 0.35, "cpu", None, 0, 1e-2)
    torch.library.opcheck(torch.ops.cosface.lmcl, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("make", [FusedCosFaceLoss, FusedMVSoftmaxLoss])
def test_compiles_to_one_graph(make):
    head, x, labels = head_and_batch(make, gradient_tolerance=1e-2)
    x.requires_grad_()
    head(x, labels).backward()
    eager, head.weight.grad, x.grad = (x.grad, head.weight.grad), None, None
    torch.compile(head, fullgraph=True, backend="aot_eager")(x, labels).backward()
    assert torch.equal(x.grad, eager[0])
    assert torch.equal(head.weight.grad, eager[1])


MEMORY = """
import sys, torch
from support.memory import raised_by
from cosface_kernels import FusedCosFaceLoss
N, D, C = 256, 16, int(sys.argv[1])
torch.set_num_threads(2)
for classes in (2000, C):
    torch.manual_seed(0)
    head = FusedCosFaceLoss(classes, D, scale=10.0, gradient_tolerance=1e-3)
    x, labels = torch.randn(N, D, requires_grad=True), torch.randint(classes, (N,))
    kept = []
    def step():
        loss, stats = head(x, labels, return_stats=True)
        loss.backward()
        kept.append(stats.sparsity)
    print(raised_by(step), int(kept[0].exact.sum()))
"""


def test_entries_stay_within_their_budget():
    """Flat logits, of which nearly all entries would be kept: 600 MB at 6 bytes each."""
    classes = 400_000
    done = run_python(MEMORY, str(classes), MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    peak, exact = map(int, done.stdout.splitlines()[-1].split())
    budget = 256 * classes * 6 // 6 + 6 * 2**20
    assert exact == 256
    assert peak - classes * 16 * 4 <= budget + CACHE_BYTES


def test_named_in_what_the_backend_takes():
    for reshaped in ({}, {"thresholds": torch.ones(1), "negatives": torch.ones(3)}):
        options = Options(gradient_tolerance=0.1, **reshaped)
        assert cpu.unsupported(torch.ones(1, 2), torch.ones(3, 2), options) is None
