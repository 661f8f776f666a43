"""Cosines kept from forward to backward: the same gradients to their rounding, however many of them fit."""

import pytest
import torch
from support import (
    BF16,
    F32,
    F64,
    evaluate,
    evaluate_oracle,
    make_problem,
    random_upstream,
    relative_error,
    with_lse,
)

from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.optim import FusedSGD
from cosface_kernels.options import Options

STEP = 2.0**-16  # of a cosine in 16-bit fixed point, by which it may be off


def cached(bytes_, classes=None):
    def forward(x, w, targets, scale, margin):
        return with_lse(scale, torch.ops.cosface.lmcl(x, w, targets, scale, margin, "cpu", classes, bytes_))

    return forward


@pytest.mark.parametrize("bytes_", [0, 63, 64, 200_000, 500_000, 10**9])
@pytest.mark.parametrize("dtypes", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("regime", ["random", "confident", "wrong"])
def test_gradients_are_right_to_the_rounding_of_a_cosine(regime, dtypes, bytes_):
    """p moves by s STEP, relative to itself; every gradient is a sum of terms in p."""
    problem = make_problem(300, 1500, 40, dtypes, regime=regime)
    upstream = random_upstream(problem, "loss", "lse")
    got, plain = evaluate(cached(bytes_), problem, upstream), evaluate(cached(0), problem, upstream)
    for name in ("loss", "lse", "target_cos", "max_neg"):
        assert torch.equal(getattr(got, name), getattr(plain, name))
    want = evaluate_oracle(problem, upstream)
    allowed = 64 * STEP if dtypes.compute == torch.float32 else 0
    for name in ("dx", "dw", "dscale"):
        mine, exact = getattr(got, name), getattr(want, name)
        assert relative_error(mine, exact) <= 2 * relative_error(getattr(plain, name), exact) + allowed + 1e-12
    changed = not torch.equal(got.dw, plain.dw)
    assert changed == (bytes_ >= 200_000 and dtypes != F64) or dtypes == BF16


def test_every_tile_fits_and_counts():
    """Where all cosines are kept, backward computes none."""
    problem = make_problem(20, 1000, 8, scale=10.0)
    size = Options(cache_bytes=10**9).cache_size(problem.x, problem.w)
    assert size < 64 + 2 * 20 * 1300
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    arguments = (problem.targets, problem.scale, 0.35, "cpu", None, 10**9)
    outputs = torch.ops.cosface.lmcl(x, w, *arguments)
    _, top, log_sum, target_cos, _, cache = outputs
    assert cache.numel() == size
    zeroed = cache.clone()
    zeroed[64:] = 0
    backward = [
        torch.ops.cosface.lmcl_backward(
            problem.x, problem.w, problem.targets, problem.scale, top, log_sum.detach(), torch.ones(20),
            torch.zeros(20), kept, True, True, "cpu", None, 10**9,
        )[2]
        for kept in (cache, zeroed)
    ]  # fmt: skip
    assert bool((backward[0] != 0).all())
    assert not bool(backward[1].any())  # dscale sums p cos, and all cosines are 0
    assert float(target_cos.detach().abs().max()) <= 1


def test_another_number_of_threads_and_another_tile_in_backward(restore_threads, monkeypatch):
    problem = make_problem(30, 700, 16)
    want = evaluate(cached(10**6), problem, random_upstream(problem, "loss"))
    x, w = problem.x.detach().requires_grad_(), problem.w.detach().requires_grad_()
    loss = cached(10**6)(x, w, problem.targets, problem.scale, problem.margin)[0]
    torch.set_num_threads(5)
    monkeypatch.setenv("COSFACE_CPU_TILE", "17")
    dx, dw = torch.autograd.grad(loss, (x, w), random_upstream(problem, "loss").loss)
    assert relative_error(dx, want.dx) < 1e-5
    assert relative_error(dw, want.dw) < 1e-5


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_module_with_an_optimizer_that_moves_rows(rate):
    heads = []
    for cache_bytes in (0, 30_000, 10**9):
        torch.manual_seed(1)
        head = FusedCosFaceLoss(900, 16, scale=16.0, backend="cpu", cache_bytes=cache_bytes, sample_rate=rate)
        optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
        for _ in range(5):
            head(torch.randn(40, 16), torch.randint(900, (40,))).backward()
            optimizer.step()
        heads.append(head.weight.detach())
    for weight in heads[1:]:
        assert not torch.equal(weight, heads[0])
        assert relative_error(weight, heads[0]) < 16 * STEP


def test_opcheck_with_a_cache():
    problem = make_problem(4, 30, 8)
    arguments = (problem.x, problem.w, problem.targets, problem.scale, 0.35, "cpu", None, 1000)
    torch.library.opcheck(
        torch.ops.cosface.lmcl,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    head = FusedCosFaceLoss(50, 8, backend="cpu", cache_bytes=10**6)
    sizes = []
    real = Options.cache_size
    monkeypatch.setattr(Options, "cache_size", lambda *args: sizes.append(real(*args)) or sizes[-1])
    with torch.no_grad():
        head(torch.randn(3, 8), torch.tensor([1, 2, 3]))
    head(torch.randn(3, 8), torch.tensor([1, 2, 3]))
    assert sizes == [0, 64 + 2 * 3 * (50 + 252)]


@pytest.mark.parametrize("rows", ["x", "w"])
def test_rows_whose_norm_overflows(rows):
    """1e20 squared is infinite in float32, and the row counts as 0, cached or not."""
    problem = make_problem(6, 40, 8, scale=10.0)
    getattr(problem, rows)[3] = 1e20
    upstream = random_upstream(problem, "loss")
    got, plain = (evaluate(cached(bytes_), problem, upstream) for bytes_ in (10**6, 0))
    for name in got._fields:
        torch.testing.assert_close(getattr(got, name), getattr(plain, name), rtol=1e-2, atol=1e-3)
        assert getattr(got, name).isfinite().all()
