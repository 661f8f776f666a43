"""The specification itself, pinned by hand-computed cases and by definitions that share no code with it."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import (
    F64,
    Problem,
    Upstream,
    brute_force_losses,
    evaluate,
    evaluate_oracle,
    logits,
    make_problem,
    natural_norms,
    random_upstream,
    specification,
)
from torch import Tensor

from cosface_kernels import reference


def explicit_loss(x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float) -> tuple[Tensor]:
    """Logits with the margin in them, then cross-entropy: the textbook."""
    return (F.cross_entropy(logits(x, w, targets, scale, margin), targets, ignore_index=-1, reduction="none"),)


@pytest.mark.parametrize("margin", [0.0, 0.35, 0.9])
@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0, 128.0])
@pytest.mark.parametrize("regime", ["random", "wrong"])
def test_equals_cross_entropy_of_explicit_logits(regime, scale, margin):
    problem = make_problem(16, 57, 24, F64, regime=regime, scale=scale, margin=margin)
    problem = replace(problem, targets=problem.targets.where(torch.arange(16) % 5 != 0, -1))
    upstream = random_upstream(problem, "loss")
    got = evaluate_oracle(problem, upstream)
    want = evaluate(lambda *args: explicit_loss(*args) * 4, problem, upstream)
    for name in ("loss", "dx", "dw", "dscale"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
@pytest.mark.parametrize(("num_classes", "dim"), [(1, 3), (2, 1), (3, 64), (40, 512)])
def test_equals_brute_force(num_classes, dim, regime):
    problem = make_problem(6, num_classes, dim, F64, regime=regime)
    loss = reference.forward(*[getattr(problem, k) for k in ("x", "w", "targets", "scale", "margin")])[0]
    for got, want in zip(loss.tolist(), brute_force_losses(problem), strict=True):
        assert got == pytest.approx(want, rel=1e-11, abs=0)


def test_statistics_are_those_of_the_negatives():
    problem = make_problem(9, 31, 8, F64, scale=20.0)
    problem.targets[4] = -1
    cos = F.normalize(problem.x) @ F.normalize(problem.w).T
    _, lse, target_cos, max_neg = specification(
        problem.x, problem.w, problem.targets, problem.scale, problem.margin
    )
    for i, target in enumerate(problem.targets.tolist()):
        negatives = torch.cat([cos[i, :target], cos[i, target + 1 :]]) if target >= 0 else cos[i]
        assert lse[i].item() == pytest.approx(torch.logsumexp(20 * negatives, 0).item(), rel=1e-13)
        assert max_neg[i] == negatives.max()
        assert target_cos[i] == (cos[i, target] if target >= 0 else 0)


def _two_classes_at(cos_target: float, cos_other: float, scale: float, margin: float) -> Problem:
    x = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    w = torch.tensor(
        [[cos_target, math.sqrt(1 - cos_target**2)], [2 * cos_other, 2 * math.sqrt(1 - cos_other**2)]],
        dtype=torch.float64,
    )
    return Problem(x, w, torch.tensor([0]), torch.tensor([scale], dtype=torch.float64), margin)


# cos .71 to the own class and .70 to the other: softmax calls it right, and with m = .35 LMCL still pushes.
@pytest.mark.parametrize(
    ("scale", "margin", "loss", "sigma"),
    [
        (64.0, 0.0, 0.423496510222534, 0.345246539393681),  # softplus(64 (.70 - .71))       = log(1 + e^-0.64)
        (64.0, 0.35, 21.7600000003546, 0.999999999645389),  # softplus(64 (.70 - .71 + .35)) = 21.76 + e^-21.76
        (1.0, 0.35, 0.877528111454829, 0.584190522935407),  # softplus(.34)
    ],
)
def test_two_close_classes_by_hand(scale, margin, loss, sigma):
    problem = _two_classes_at(0.71, 0.70, scale, margin)
    got = evaluate_oracle(problem, Upstream(loss=torch.ones(1, dtype=torch.float64)))
    assert got.loss.item() == pytest.approx(loss, rel=1e-12)
    assert got.target_cos.item() == pytest.approx(0.71, rel=1e-14)
    assert got.max_neg.item() == pytest.approx(0.70, rel=1e-14)
    assert got.lse.item() == pytest.approx(scale * 0.70, rel=1e-14)
    # dx = s sigma (what_1 - what_0), less its part along x, over |x| = 3
    across = scale * sigma * (math.sqrt(1 - 0.70**2) - math.sqrt(1 - 0.71**2)) / 3
    torch.testing.assert_close(got.dx, torch.tensor([[0.0, across]], dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_orthogonal_classes_by_hand():
    """x = (1, 0) of class 0, w = identity, s = 2, m = 1/2: the loss is softplus(0 - 2 (1 - 1/2))."""
    eye = torch.eye(2, dtype=torch.float64)
    problem = Problem(eye[:1], eye, torch.tensor([0]), torch.tensor([2.0], dtype=torch.float64), 0.5)
    got = evaluate_oracle(problem, Upstream(loss=torch.ones(1, dtype=torch.float64)))
    sigma = 0.2689414213699951  # 1 / (1 + e)
    assert got.loss.item() == pytest.approx(0.31326168751822286, rel=1e-14)
    torch.testing.assert_close(got.dx, torch.tensor([[0.0, 2 * sigma]], dtype=torch.float64))
    torch.testing.assert_close(got.dw, torch.tensor([[0.0, 0.0], [2 * sigma, 0.0]], dtype=torch.float64))
    assert got.dscale.item() == pytest.approx(-sigma * 0.5, rel=1e-14)  # d softplus(-s/2) / ds


def test_zero_embedding_by_hand():
    """All cosines are 0, so the loss is log(1 + (C - 1) e^(s m)) whatever w is."""
    problem = make_problem(1, 5, 4, F64, scale=8.0, margin=0.25)
    problem.x.zero_()
    got = evaluate_oracle(problem, random_upstream(problem, "loss"))
    assert got.loss.item() == pytest.approx(math.log1p(4 * math.exp(2.0)), rel=1e-14)


def test_one_class_costs_nothing():
    problem = make_problem(3, 1, 4, F64)
    got = evaluate_oracle(problem, random_upstream(problem, "loss"))
    assert got.loss.tolist() == [0.0, 0.0, 0.0]
    assert got.lse.tolist() == got.max_neg.tolist() == [-math.inf] * 3
    assert not any(g.any() for g in (got.dx, got.dw, got.dscale))


def test_written_out_backward_equals_autograd():
    problem = make_problem(12, 33, 7, F64, scale=30.0)
    problem.targets[3] = -1
    upstream = random_upstream(problem, "lse", "target_cos")
    want = evaluate_oracle(problem, upstream)
    inputs = (problem.x, problem.w, problem.targets, problem.scale)
    _, top, log_sum, *_ = reference.forward(*inputs, problem.margin)
    dx, dw, dscale = reference.backward(
        *inputs,
        top,
        log_sum,
        upstream.lse,
        upstream.target_cos.where(problem.targets >= 0, 0),
    )
    for got, expected in ((dx, want.dx), (dw, want.dw), (dscale, want.dscale)):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
def test_terms_bound_the_gradients(regime):
    """The yardstick of the tolerances: no gradient is longer than the terms it is summed from."""
    problem = make_problem(16, 57, 24, F64, regime=regime)
    upstream = random_upstream(problem, "loss", "lse", "target_cos")
    got, terms = evaluate_oracle(problem, upstream), natural_norms(problem, upstream)
    for name in ("dx", "dw", "dscale"):
        size = float(getattr(got, name).norm())
        assert 1e-3 * float(getattr(terms, name)) < size <= float(getattr(terms, name)) * (1 + 1e-12)
