"""A broken sample stays alone: NaN and inf in one embedding reach neither loss nor dx of the others."""

import math

import pytest
import torch
from support import F32, evaluate, random_upstream, relative_error

from cosface_kernels import margin_softmax_loss

BROKEN = 4
OTHERS = [0, 1, 2, 3, 5, 6, 7, 8]


def _break(problem, value, whole_row):
    broken = problem.x.clone()
    broken[BROKEN, slice(None) if whole_row else 3] = value
    return broken


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("whole_row", [False, True], ids=["one_number", "whole_row"])
def test_broken_embedding_spoils_its_own_loss_alone(backend, dtypes, value, whole_row):
    problem = backend.problem(9, 530, 24, dtypes)
    upstream = random_upstream(problem, "loss")
    want = evaluate(backend.lmcl, problem, upstream)
    problem.x.copy_(_break(problem, value, whole_row))
    got = evaluate(backend.lmcl, problem, upstream)
    assert not got.loss[BROKEN].isfinite()
    assert got.dx[BROKEN].isnan().any()
    for name in ("loss", "lse", "target_cos", "max_neg", "dx", "dscale"):
        assert torch.equal(getattr(got, name)[OTHERS], getattr(want, name)[OTHERS]), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_public_loss_of_a_broken_embedding(backend, reduction):
    problem = backend.problem(9, 60, 24, F32)
    problem.x[BROKEN, 0] = math.nan
    x = problem.x.requires_grad_()
    loss = backend.loss(x, problem.w, problem.targets, reduction=reduction)
    if reduction == "none":
        assert loss.isnan().tolist() == [i == BROKEN for i in range(9)]
    else:
        assert loss.isnan()
    loss.sum().backward()
    assert x.grad.isnan().any(dim=1).tolist() == [i == BROKEN for i in range(9)]


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("general", [False, True], ids=["cosface", "any_margin"])
def test_ignored_broken_embedding_poisons_nothing(backend, dtypes, value, general):
    """Not even dw: an ignored sample takes no part."""
    problem = backend.problem(9, 530, 24, dtypes)
    labels = problem.targets.clone()
    labels[BROKEN] = -100
    margin = (lambda cos: cos - 0.35) if general else 0.35

    def run(embeddings, labels):
        x, w = embeddings.detach().requires_grad_(), problem.w.detach().requires_grad_()
        loss, stats = margin_softmax_loss(x, w, labels, margin=margin, backend=backend.name, return_stats=True)
        loss.backward()
        return loss.detach(), x.grad, w.grad, stats.accuracy

    want = run(problem.x[OTHERS], labels[OTHERS])
    got = run(_break(problem, value, whole_row=True), labels)
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-6)
    assert not got[1][BROKEN].any()
    assert relative_error(got[1][OTHERS], want[1]) < torch.finfo(dtypes.x).eps + 1e-6
    assert relative_error(got[2], want[2]) < torch.finfo(dtypes.w).eps + 1e-6
    assert got[3] == want[3]


@pytest.mark.parametrize("outputs", [("loss",), ("lse", "target_cos")], ids="+".join)
def test_broken_sample_with_no_upstream_gradient_poisons_nothing(backend, dtypes, outputs):
    """Whoever drops the broken losses, as in loss[loss.isfinite()].mean(), keeps them out of dw."""
    problem = backend.problem(9, 530, 24, dtypes)
    upstream = random_upstream(problem, *outputs)
    for g in upstream:
        if g is not None:
            g[BROKEN] = 0
    want = evaluate(backend.lmcl, problem, upstream)
    problem.x[BROKEN] = math.nan
    got = evaluate(backend.lmcl, problem, upstream)
    assert torch.equal(got.dx[OTHERS], want.dx[OTHERS])
    assert got.dw.isfinite().all()
    assert relative_error(got.dw, want.dw) < torch.finfo(dtypes.w).eps + 1e-6


def test_broken_class_is_seen(backend):
    """A NaN class centre is a negative of everyone: it must not be lost in a maximum."""
    problem = backend.problem(5, 700, 24, F32)
    problem.w[650, 3] = math.nan
    problem.targets.clamp_(max=600)
    assert backend.loss(problem.x, problem.w, problem.targets, reduction="none").isnan().all()
