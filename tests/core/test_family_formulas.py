"""Heads of the family are their papers' formulas, and swap with pytorch-metric-learning's."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import DEFAULT_DEVICE, relative_error
from support.formulas import DIM, LOSSES, NAMES, NUM_CLASSES, Formula, as_leaves, formula_problem, make_head
from torch import Tensor

from cosface_kernels import (
    FusedArcFaceLoss,
    FusedASoftmaxLoss,
    FusedCosFaceLoss,
    FusedLSoftmaxLoss,
    FusedMarginLoss,
    FusedSoftmaxLoss,
    margin_softmax_loss,
)
from cosface_kernels.margins import MVSoftmaxMargin

STRAIGHT_THROUGH = (
    "arcface",
    "combined",
    "sphereface",
    "adaface",
    "x2_softmax",
    "sphereface2",
    "sphereface2_a",
    "sphereface2_m",
)


def _check_against_formula(head: FusedMarginLoss, formula, x: Tensor, labels: Tensor) -> None:
    """Loss and gradients, under a non-uniform upstream gradient."""
    upstream = torch.linspace(-1, 2, len(x), dtype=x.dtype, device=x.device)
    ours, theirs, w = *as_leaves(x, x), *as_leaves(head.weight)
    want, got = formula(theirs, w, labels), head(ours, labels)
    # state is in float32, and one of its ulps moves the logits
    tolerance = 64 * 1e-7 if len(head.state_dict()) > 1 else 1e-9
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-12)
    want_dx, want_dw = torch.autograd.grad(want, (theirs, w), upstream)
    got_dx, got_dw = torch.autograd.grad(got, (ours, head.weight), upstream)
    assert relative_error(got_dx, want_dx) < max(tolerance, 1e-7)
    assert relative_error(got_dw, want_dw) < max(tolerance, 1e-7)


@pytest.mark.float64
@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("name", NAMES)
def test_is_the_formula(backend, name, regime):
    x, w, labels = formula_problem(regime, device=backend.device)
    _check_against_formula(make_head(name, w, backend=backend.name, reduction="none"), LOSSES[name][1], x, labels)


@pytest.mark.parametrize("regime", ["random", "wrong"])
@pytest.mark.parametrize("name", STRAIGHT_THROUGH)
def test_straight_through_gradient(name, regime):
    x, w, labels = formula_problem(regime)
    head = make_head(name, w, reduction="none", straight_through=True)

    def formula(x, w, labels):
        theirs = LOSSES[name][1]
        if name == "arcface":  # insightface has no guard
            theirs = Formula(lambda theta, *_: (theta + 0.5).cos())
        if name == "combined":
            theirs = Formula(lambda theta, *_: (1.2 * theta + 0.3).cos() - 0.1)
        return theirs(x, w, labels, straight_through=True)

    _check_against_formula(head, formula, x, labels)


@pytest.mark.float64
@pytest.mark.parametrize("normalize_embeddings", [False, True])
def test_thresholds_of_rows_that_are_not_normalised(backend, normalize_embeddings):
    """A negative is hard where it is above the target as both are, <x, w> / |x|."""
    x, w, labels = formula_problem("random", device=backend.device)
    x, w = as_leaves(F.normalize(x) * 3, 0.4 * w)
    got = margin_softmax_loss(
        x, w, labels, margin=MVSoftmaxMargin(0.1, t=0.3), scale=2.0, normalize_embeddings=normalize_embeddings,
        normalize_weight=False, backend=backend.name,
    )  # fmt: skip
    cos = F.normalize(x) @ w.T  # (N, C)
    target = cos.gather(1, labels[:, None])  # (N, 1)
    psi = torch.where(target > 0, target - 0.1, target)
    logits = torch.where(cos > (target - 0.1).detach(), 1.3 * cos + 0.3, cos).scatter(1, labels[:, None], psi)
    scale = 2.0 if normalize_embeddings else 2 * x.norm(dim=1, keepdim=True)
    want = F.cross_entropy(scale * logits, labels)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, (x, w)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.float64
@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
def test_arcface_swaps_with_pytorch_metric_learning(backend, regime):
    x, w, labels = formula_problem(regime, device=backend.device)
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    with DEFAULT_DEVICE:
        theirs = pml.ArcFaceLoss(NUM_CLASSES, DIM, margin=math.degrees(0.5), scale=64).to(x)
    ours = backend.head(NUM_CLASSES, DIM, 0.5, 64.0, kind=FusedArcFaceLoss)
    _check_against_pml(ours, theirs, x, w, labels)


@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("m", [2, 3, 4])
def test_sphereface_swaps_with_pytorch_metric_learning(regime, m):
    x, w, labels = formula_problem(regime)
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = pml.SphereFaceLoss(NUM_CLASSES, DIM, margin=m, scale=0.7).double()
    ours = FusedASoftmaxLoss(NUM_CLASSES, DIM, m, 0.7, base=0.0, lambda_min=0.0)
    _check_against_pml(ours, theirs, x, w, labels)


@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize("m", [2, 4])
def test_l_softmax_swaps_with_pytorch_metric_learning(regime, m):
    x, w, labels = formula_problem(regime)
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = pml.LargeMarginSoftmaxLoss(NUM_CLASSES, DIM, margin=m, scale=0.3).double()
    _check_against_pml(FusedLSoftmaxLoss(NUM_CLASSES, DIM, m, 0.3), theirs, x, w, labels)


@pytest.mark.parametrize("make", [FusedSoftmaxLoss, FusedASoftmaxLoss, FusedCosFaceLoss])
def test_logits_are_those_of_the_loss(make):
    x, _, labels = formula_problem("random")
    head = make(NUM_CLASSES, DIM, dtype=x.dtype)
    del head.margin
    head.margin = 0.0
    torch.testing.assert_close(head(x, labels), F.cross_entropy(head.get_logits(x), labels))


def test_curricularface_averages_target_cosines():
    _, w, _ = formula_problem("random")
    head, t = make_head("curricularface", w), 0.0
    for seed in range(3):
        x, _, labels = formula_problem("confident", seed=seed)
        head(x, labels)
        t = 0.99 * t + 0.01 * (F.normalize(x) * F.normalize(w)[labels]).sum(1).mean().item()
        assert head.margin.t.item() == pytest.approx(t)


def _check_against_pml(ours, theirs, x, w, labels):
    ours.to(x.dtype)
    with torch.no_grad():
        ours.weight.copy_(w)
        theirs.W.copy_(w.T)
    a, b = as_leaves(x, x)
    with DEFAULT_DEVICE:
        want = theirs(a, labels)
    got = ours(b, labels)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    want_dx, want_dw = torch.autograd.grad(want, (a, theirs.W))
    got_dx, got_dw = torch.autograd.grad(got, (b, ours.weight))
    assert relative_error(got_dx, want_dx) < 1e-6  # their cosine is clamped with an epsilon
    assert relative_error(got_dw, want_dw.T) < 1e-6


def test_the_paper_s_example():
    """Cosines 0.71 and 0.70: the softmax of NSL is content, and m = 0.35 is not."""
    x = torch.tensor([[0.71, 0.70, math.sqrt(1 - 0.71**2 - 0.70**2)]], dtype=torch.float64)
    w, label = torch.eye(3, dtype=torch.float64)[:2], torch.tensor([0])
    for margin, logit in ((0.0, 0.01), (0.35, -0.34)):
        head = FusedCosFaceLoss(2, 3, margin, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(w)
        want = math.log1p(math.exp(-64 * logit))
        assert head(x, label).item() == pytest.approx(want, rel=1e-9)


def test_any_function_is_a_margin(backend):
    x, _, labels = formula_problem("random", device=backend.device)
    head, same = (
        backend.head(NUM_CLASSES, DIM, margin, kind=FusedMarginLoss) for margin in (lambda cos: cos**3 - 0.2, 0.2)
    )
    same.load_state_dict(head.state_dict())
    x = x.float()
    _, stats = head(x, labels, return_stats=True)
    _, again = same(x, labels, return_stats=True)
    assert torch.equal(stats.target_cos, again.target_cos)
    want = F.softplus(stats.lse - 64 * (stats.target_cos**3 - 0.2)).mean()
    torch.testing.assert_close(head(x, labels), want)


@pytest.mark.parametrize("name", ["curricularface", "mv_softmax", "circle_loss", "filter"])
def test_of_reshaped_negatives_lse_is_what_they_become_and_the_largest_cosine_is_not(name):
    x, w, labels = formula_problem("random")
    head = make_head(name, w, reduction="none")
    _, stats = head(x, labels, return_stats=True)
    z = stats.lse - head.scale * head.margin(stats.target_cos)
    torch.testing.assert_close(F.softplus(z, threshold=1000), LOSSES[name][1](x, w, labels), rtol=1e-6, atol=0)
    cos = (F.normalize(x) @ F.normalize(w).T).scatter(1, labels[:, None], -math.inf)
    torch.testing.assert_close(stats.max_negative_cos, cos.amax(1))
