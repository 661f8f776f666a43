"""Backend `cuda` beyond the op's suite, which runs on `cuda_host`: chunks, refusals, the compiler's report."""

import functools
import math
import re
from dataclasses import replace

import pytest
import torch
from support import (
    BF16,
    F16,
    F32,
    F64,
    Backend,
    Dtypes,
    check_backend,
    cuda_host,
    evaluate,
    evaluate_oracle,
    make_problem,
    random_upstream,
    relative_error,
)

from bench import cuda_kernels
from bench.__main__ import main
from cosface_kernels import ops, reference
from cosface_kernels.backends import BACKENDS
from cosface_kernels.backends.cuda import driver
from cosface_kernels.options import Options, Update

HOST = Backend("cuda_host", interpreted=True)
CHUNK = "COSFACE_CUDA_CHUNK"


@pytest.mark.parametrize("num_classes", [255, 256, 257, 1023])
@pytest.mark.parametrize("dtypes", [F32, BF16, F16, F64, Dtypes(torch.bfloat16, torch.float32)], ids=str)
def test_any_number_of_chunks(dtypes, num_classes, monkeypatch):
    problem = make_problem(9, num_classes, 24, dtypes)
    monkeypatch.setenv(CHUNK, "1")  # rounded up to 256
    check_backend(HOST, problem)
    monkeypatch.setenv(CHUNK, "100000")
    check_backend(HOST, problem)


SGD = Update("sgd", 2, 7, 0.5, math.inf, lr=20.0, weight_decay=0.1, momentum=0.5, dampening=0.1)
ADAMW = Update("adamw", 2, 7, 0.5, 0.01, lr=0.5, weight_decay=0.1, beta1=0.5, beta2=0.9, eps=1e-3)


def _step(problem, update, state_dtype=None, classes=None, **options):
    """Rows of w and state after a step on `cuda_host`, and what the reference makes of them with backward's dw."""
    rng = torch.Generator().manual_seed(2)
    state_dtype = state_dtype or problem.w.dtype
    state = [
        torch.rand(problem.w.shape, generator=rng, dtype=torch.float64).to(state_dtype)
        for _ in range(1 if update.rule == "sgd" else 3)
    ]
    inputs = (problem.x, problem.w, problem.targets, problem.scale)
    _, top, log_sum, *_, cache, _ = ops.lmcl(*inputs, 0.35, "cuda_host", classes, **options)
    g_lse, g_cos = (torch.randn(len(top), generator=rng, dtype=torch.float64).to(top.dtype) for _ in range(2))
    upstream = (top, log_sum, g_lse, g_cos, cache)
    want_dx, dw, want_dscale = ops.lmcl_backward(*inputs, *upstream, True, True, "cuda_host", classes, **options)
    w, moved = problem.w.clone(), [values.clone() for values in state]
    inputs = (problem.x, w, *inputs[2:])
    dx, dscale = ops.lmcl_backward_update_(
        *inputs, *upstream, moved, None, *update.flat(), True, "cuda_host", classes, **options
    )
    assert torch.equal(dx, want_dx)  # no later chunk has seen a row that moved
    assert torch.equal(dscale, want_dscale)
    rows = torch.arange(len(w)) if classes is None else classes
    want = [values[rows].double() for values in (problem.w, *state)]
    reference.move_rows(want[0], dw.double(), want[1:], update)
    others = torch.ones(len(w), dtype=torch.bool)
    others[rows] = False
    for mine, before in zip((w, *moved), (problem.w, *state), strict=True):
        assert torch.equal(mine[others], before[others])
    return [values[rows] for values in (w, *moved)], want


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("update", [SGD, ADAMW], ids=lambda update: update.rule)
@pytest.mark.parametrize("dtypes", [F32, F64, BF16, Dtypes(torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("dim", [24, 31])
def test_rows_move_by_any_number_of_chunks(dim, dtypes, update, some, monkeypatch):
    problem = make_problem(5, 600, dim, dtypes)
    classes = torch.randperm(600)[:300].sort().values if some else None
    if some:
        problem = replace(problem, targets=torch.randint(-1, 300, (5,)))
    # dw is rounded to its dtype where it exists, and weight and state at random between two neighbours
    eps = torch.finfo(dtypes.w).eps
    for chunk in ("1", "100000"):
        monkeypatch.setenv(CHUNK, chunk)
        for got, want in zip(*_step(problem, update, classes=classes), strict=True):
            assert float((got.double() - want).norm()) <= 4 * eps * float(want.norm())


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtypes", [F32, BF16, Dtypes(torch.float64, torch.bfloat16)], ids=str)
def test_any_dtype_of_state(dtypes, state_dtype):
    problem = make_problem(5, 40, 24, dtypes)
    eps = max(torch.finfo(dtype).eps for dtype in (*dtypes, state_dtype))
    for got, want in zip(*_step(problem, ADAMW, state_dtype), strict=True):
        assert float((got.double() - want).norm()) <= 4 * eps * float(want.norm())


def test_rows_move_where_the_weight_is_not_normalized_and_negatives_are_reshaped():
    problem = make_problem(5, 300, 24, F64, scale=4.0)
    problem = replace(problem, w=problem.w / problem.w.norm(dim=1, keepdim=True))
    tau, negatives = torch.full((5,), 0.1, dtype=torch.float64), torch.tensor([0.5, 1.0, 0.1], dtype=torch.float64)
    for options in ({"normalize_weight": False}, {"thresholds": tau, "negatives": negatives}):
        for got, want in zip(*_step(problem, SGD, **options), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_without_samples_rows_decay():
    problem = make_problem(0, 300, 24, F64)
    for got, want in zip(*_step(problem, SGD), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("width", [24, 33, 1026])
def test_rounding_depends_on_seed_step_and_place_alone(width, monkeypatch):
    """On numbers whose step is exact, also the same as on the CPU."""
    w, g = torch.randint(-128, 128, (2, 300, width)) / 64
    momentum = torch.randint(-128, 128, (300, width)) / 32
    w, g, momentum = w.bfloat16(), g.bfloat16() / 256, momentum.bfloat16()

    def moved(backend="cuda_host", seed=1, step=2):
        update = Update("sgd", step, seed, 1.0, math.inf, lr=1.0, weight_decay=0.0, momentum=0.5)
        v, m = w.clone(), momentum.clone()
        ops.apply_update_(v, g, [m], *update.flat(), backend)
        return torch.stack([v, m])

    first = moved()
    assert torch.equal(first, moved("cpu"))
    assert not torch.equal(first, moved(seed=2))
    assert not torch.equal(first, moved(step=3))
    monkeypatch.setenv(CHUNK, "1")
    assert torch.equal(first, moved())


@pytest.mark.parametrize("bytes_", [10_000, 10**6])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("dtypes", [F32, F64, BF16], ids=str)
def test_rows_move_by_cosines_that_were_kept(dtypes, some, bytes_, monkeypatch):
    problem = make_problem(5, 900, 24, dtypes)
    classes = torch.arange(0, 900, 2) if some else None
    if some:
        problem = replace(problem, targets=torch.randint(-1, 450, (5,)))
    for chunk in ("1", "100000"):
        monkeypatch.setenv(CHUNK, chunk)
        for got, want in zip(*_step(problem, SGD, classes=classes, cache_bytes=bytes_), strict=True):
            assert float((got.double() - want).norm()) <= 4 * torch.finfo(dtypes.w).eps * float(want.norm())


def _both_passes(problem, options, *, zeroed=0):
    """The cache, the calls of forward and of backward, and dx and dw with these bytes of the cache at 0."""
    inputs = (problem.x, problem.w, problem.targets, problem.scale)
    with cuda_host.Calls() as of_forward:
        _, top, log_sum, *_, cache, _ = cuda_host.forward(*inputs, 0.35, options)
    cache[:zeroed] = 0
    upstream = (top, log_sum, torch.ones_like(top), torch.zeros_like(top))
    with cuda_host.Calls() as of_backward:
        dx, dw, _ = cuda_host.backward(*inputs, *upstream, cache, options=options, need_dx=True, need_dw=True)
    return cache, of_forward, of_backward, (dx, dw)


@pytest.mark.parametrize("opposite", [False, True], ids=["near", "opposite"])
def test_a_cosine_beyond_one_is_kept_as_one(opposite, monkeypatch):
    """As TensorFloat-32 makes them, of embeddings at a wrong class's centre and of those opposite to all."""
    multiply = driver.multiply

    def multiply_beyond(out, a, b, **accumulate):
        multiply(out, a, b, **accumulate)
        out.mul_(1 + 2.0**-10)

    problem = make_problem(9, 300, 24, scale=16.0)
    if opposite:
        problem.w.copy_(problem.w[0].clone())
    problem.x.copy_(-problem.w[:9] if opposite else problem.w[(problem.targets + 1) % 300])
    upstream = random_upstream(problem, "loss")
    want = evaluate_oracle(problem, upstream)
    monkeypatch.setattr(driver, "multiply", multiply_beyond)
    for cache_bytes in (0, 10**6):
        got = evaluate(functools.partial(HOST.lmcl, cache_bytes=cache_bytes), problem, upstream)
        assert relative_error(got.dscale, want.dscale) < 0.05, cache_bytes


@pytest.fixture
def sums_in_float16():
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    yield
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


def test_float16_is_upcast_where_torch_may_sum_in_float16(sums_in_float16, monkeypatch):
    """Its products in float32 are not there then; `cuda_host` would not miss them."""
    operands, multiply = set(), driver.multiply

    def note(out, a, b, **accumulate):
        operands.update((a.dtype, b.dtype))
        multiply(out, a, b, **accumulate)

    monkeypatch.setattr(driver, "multiply", note)
    check_backend(HOST, make_problem(9, 300, 24, F16))
    assert operands == {torch.float32}


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("bytes_", [0, 10_000, 10**6])
@pytest.mark.parametrize("dtypes", [F32, F64, BF16, F16, Dtypes(torch.bfloat16, torch.float32)], ids=str)
def test_norms_are_made_once(dtypes, bytes_, some, monkeypatch):
    """Forward leaves all of them, the same for any chunk, and backward has no pass for them."""
    problem = make_problem(5, 1023, 24, dtypes)
    chosen = torch.arange(0, 1023, 2) if some else None
    options = Options(classes=chosen, cache_bytes=bytes_)
    if some:
        problem = replace(problem, targets=problem.targets // 2)
    classes = options.count(problem.w)
    monkeypatch.setenv(CHUNK, "100000")
    whole, *_ = _both_passes(problem, options)
    monkeypatch.setenv(CHUNK, "1")  # rounded up to 256
    cache, of_forward, of_backward, _ = _both_passes(problem, options)
    chunks = math.ceil(classes / 256)
    assert of_forward.launches == {"row_norms": chunks + 1, "class_statistics": chunks, "merge_statistics": 1}
    of_w_hat = chunks if dtypes == F16 else 0
    assert of_backward.launches == {
        "normalize_rows": 1 + of_w_hat, "logit_gradients": chunks, "project_rows": chunks + 1,
    }  # fmt: skip

    sums = torch.float64 if dtypes == F64 else torch.float32
    norms, before = (left[: (classes + 5) * sums.itemsize].view(sums) for left in (cache, whole))
    w = problem.w if chosen is None else problem.w[chosen]
    if dtypes == (torch.bfloat16, torch.float32):
        w = w.bfloat16()  # as the products see it
    assert torch.equal(norms, before)
    for mine, rows in ((norms[:classes], w), (norms[classes:], problem.x)):
        torch.testing.assert_close(1 / mine, rows.to(sums).norm(dim=1), rtol=4 * torch.finfo(sums).eps, atol=0)


@pytest.mark.parametrize("dtypes", [F32, F64, BF16, F16], ids=str)
def test_backward_reads_the_norms_that_forward_left(dtypes):
    """Rows of infinite length have no gradient."""
    problem = make_problem(5, 600, 24, dtypes)
    for zeroed in (0, (600 + 5) * (8 if dtypes == F64 else 4)):
        *_, gradients = _both_passes(problem, Options(cache_bytes=10**6), zeroed=zeroed)
        assert [bool(gradient.any()) for gradient in gradients] == 2 * [not zeroed]


@pytest.mark.parametrize("dtypes", [F32, F64, BF16, F16], ids=str)
def test_where_all_cosines_are_kept_backward_makes_no_products_of_them(dtypes, monkeypatch):
    monkeypatch.setenv(CHUNK, "256")
    problem = make_problem(7, 600, 24, dtypes)
    sums = torch.float64 if dtypes == F64 else torch.float32
    for bytes_, of_cosines in ((0, 3), (10**6, 0)):
        _, of_forward, of_backward, _ = _both_passes(problem, Options(cache_bytes=bytes_))
        assert of_forward.products == 3
        assert of_backward.products == of_cosines + 2 * 3
        of_a_chunk = [dtype for dtype, size in of_backward.sizes if size == 7 * 256]
        products = [sums] if of_cosines and dtypes.x != sums else []  # else G lies over them
        assert of_a_chunk == [*products, dtypes.x]


@pytest.mark.parametrize("bytes_", [0, 10_000, 10**6])
@pytest.mark.parametrize("dtypes", [F32, F64, BF16, F16], ids=str)
def test_moments_of_any_number_of_chunks(dtypes, bytes_, monkeypatch):
    """And by cosines that were kept; in float16 no gradient leaves its range, however large b and c are."""
    problem = make_problem(5, 1023, 24, dtypes, scale=8.0)
    targets = torch.stack([problem.targets, torch.tensor([-1, 0, 255, 256, 1022])])
    inputs = problem.x, problem.w, targets, problem.scale
    rng = torch.Generator().manual_seed(1)
    g_lse, *g_pairs = torch.randn(5, 5, generator=rng, dtype=torch.float64)
    g_cos, g_moments = torch.stack(g_pairs).view(2, 2, 5)
    # N' has no step at the threshold, on whose other side a kept cosine may be
    exact = Options(
        moments=True, g_moments=64 * g_moments, thresholds=torch.full((5,), 0.2, dtype=torch.float64),
        negatives=torch.tensor([1.0, 0.6, 0.04], dtype=torch.float64),
    )  # fmt: skip
    options = replace(exact, cache_bytes=bytes_, g_moments=exact.g_moments.to(dtypes.compute))
    double = [t.double() if t.is_floating_point() else t for t in inputs]
    eps = torch.finfo(dtypes.compute).eps
    allowed = 4 * HOST.rounding(dtypes) + 16 * eps + (1e-3 if bytes_ and dtypes != F64 else 0.0)
    for chunk in ("1", "100000"):  # that of 256 classes is for one block a row, that of all for three
        monkeypatch.setenv(CHUNK, chunk)
        _, top, log_sum, target_cos, _, cache, moments = cuda_host.forward(*inputs, 0.35, options)
        _, *rows, want_cos, _ = reference.forward(*double, 0.35, exact)
        want = reference.moments(*double, *rows, exact)
        assert relative_error(target_cos, want_cos) <= 16 * eps
        assert torch.equal(moments[3].double(), want[3])
        for got, row in zip(moments[:3], want[:3], strict=True):
            assert relative_error(got, row) <= 64 * eps
        upstream = top, log_sum, g_lse.to(top), g_cos.to(top)
        gradients = cuda_host.backward(*inputs, *upstream, cache, options=options, need_dx=True, need_dw=True)
        want = reference.backward(*double, *rows, *(g.double() for g in upstream[2:]), options=exact)
        for got, gradient in zip(gradients, want, strict=True):
            assert relative_error(got, gradient) <= allowed


def test_moments_with_a_large_gradient_of_a_second_target_stay_in_the_range_of_float16():
    problem = make_problem(3, 40, 24, F16)
    targets, options = torch.stack([torch.full((3,), -1), problem.targets]), Options(moments=True)
    inputs = problem.x, problem.w, targets, problem.scale
    _, top, log_sum, *_, cache, _ = cuda_host.forward(*inputs, 0.0, options)
    upstream = top, log_sum, torch.zeros(3), torch.tensor([[0.0], [1000.0]]).expand(2, 3)
    dx, dw, _ = cuda_host.backward(*inputs, *upstream, cache, options=options, need_dx=True, need_dw=True)
    double = (t.double() if t.is_floating_point() else t for t in (*inputs, *upstream))
    for got, want in zip((dx, dw), reference.backward(*double, options=options), strict=False):
        assert relative_error(got, want) <= 4 * HOST.rounding(F16)


def test_moments_take_no_launch_more():
    problem = make_problem(5, 1023, 24)
    _, *plain, _ = _both_passes(problem, Options())
    _, *asked, _ = _both_passes(problem, Options(moments=True, g_moments=torch.ones(2, 5)))
    for mine, calls in zip(asked, plain, strict=True):
        assert (mine.launches, mine.products) == (calls.launches, calls.products)


STEEP = torch.tensor([[0.1, 0.4, 0.3, 0.1, 0.1], [1.0, 2.0, -3.0, 4.0, 5.0]], dtype=torch.float64)
SIGMOIDS = {
    "cross_entropy": Options(sigmoid="cross_entropy", polynomials=STEEP),
    "angle": Options(sigmoid="angle"),
}


def _sigmoids(problem, options, g, g_cos):
    """The inputs, and the sums, dx, dw and dscale of `cuda_host` and of the reference."""
    bias = problem.scale * (1.4 if options.polynomials is None else -0.2)  # p is neither 0 nor 1
    inputs = problem.x, problem.w, problem.targets, problem.scale, bias, g.to(bias), g_cos.to(bias)
    seen = HOST.seen(problem)
    double = (t.double() if t.is_floating_point() else t for t in (seen.x, seen.w, *inputs[2:]))
    got = cuda_host.sigmoid(*inputs, options=options, need_dx=True, need_dw=True)
    want = BACKENDS["reference"].sigmoid(*double, options=options, need_dx=True, need_dw=True)
    return inputs, got, want


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("form", SIGMOIDS)
@pytest.mark.parametrize("dtypes", [F32, F64, BF16, F16, Dtypes(torch.bfloat16, torch.float32)], ids=str)
def test_sigmoids_of_any_number_of_chunks(dtypes, form, some, monkeypatch):
    """Norms are made in their pass, and rows that move are read before."""
    problem = make_problem(6, 1023, 24, dtypes, scale=8.0)
    chosen = torch.arange(0, 1023, 2) if some else None
    problem.targets[:] = torch.tensor([-1, 0, 255, 256, 511, 300])
    options = replace(SIGMOIDS[form], classes=chosen)
    g, g_cos = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g[3] = g_cos[3] = 0
    eps = torch.finfo(dtypes.compute).eps
    for chunk, chunks in (("1", 2 if some else 4), ("100000", 1)):
        monkeypatch.setenv(CHUNK, chunk)
        with cuda_host.Calls() as calls:
            inputs, got, want = _sigmoids(problem, options, g, g_cos)
        of_w_hat = chunks if dtypes == F16 else 0
        assert calls.launches == {
            "row_norms": 1 + chunks, "normalize_rows": 1 + of_w_hat, "sigmoid_gradients": chunks,
            "project_rows": 1 + chunks,
        }  # fmt: skip
        for k, (mine, gradient) in enumerate(zip(got, want, strict=True)):
            rounding = 4 * HOST.rounding(dtypes) if k in (1, 2) else 0
            assert float((mine - gradient).norm()) <= (rounding + 128 * eps) * (float(gradient.norm()) + eps)
        assert not got[0][:, 3].any()
        if dtypes.w == torch.float16:  # its rows do not move
            continue
        x, w, targets, scale, bias, *upstream = inputs
        per_row = targets, scale, torch.zeros_like(bias), -bias, *upstream
        of_update = {"state": [], "finite": None, "update": replace(SGD, momentum=0.0), "options": options}
        cache = torch.empty(cuda_host.cache_size(x, w, options), dtype=torch.uint8)
        dx, dscale = cuda_host.backward_update_(x, w.clone(), *per_row, cache, need_dx=True, **of_update)
        assert torch.equal(dx, got[1])
        assert torch.equal(dscale, got[3])


@pytest.mark.parametrize("form", SIGMOIDS)
@pytest.mark.parametrize("of_target", [0.0, 1000.0])
def test_sigmoids_of_large_gradients_stay_in_the_range_of_float16(form, of_target):
    """Of a negative whose cosine is near 1, where the slope is far above it."""
    problem, options = make_problem(3, 40, 24, F16, regime="wrong"), SIGMOIDS[form]
    if options.polynomials is not None:
        options = replace(options, polynomials=8 * options.polynomials)
    _, (_, *got, _), (_, *want, _) = _sigmoids(problem, options, torch.ones(3), torch.full((3,), of_target))
    for mine, gradient in zip(got, want, strict=True):
        assert relative_error(mine, gradient) <= 4 * HOST.rounding(F16)


def test_a_cache_too_small_for_its_norms_is_refused():
    problem = make_problem(5, 30, 8)
    inputs, row = (problem.x, problem.w, problem.targets, problem.scale), problem.scale
    cache = torch.empty(139, dtype=torch.uint8)
    reason = r"cache must hold the norms of 30 classes and 5 embeddings in 140 bytes, got 139\."
    with pytest.raises(ValueError, match=reason):
        cuda_host.backward(*inputs, row, row, row, row, cache, options=Options(), need_dx=True, need_dw=True)


def test_says_which_option_it_lacks():
    problem = make_problem(2, 5, 3)
    reason = "'cuda_host' cannot run: option 'gradient_tolerance' is not on this backend yet"
    with pytest.raises(RuntimeError, match=reason):
        HOST.lmcl(problem.x, problem.w, problem.targets, problem.scale, 0.35, gradient_tolerance=0.1)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_chunk_must_be_a_number_of_classes(value, monkeypatch):
    monkeypatch.setenv(CHUNK, value)
    with pytest.raises(ValueError, match=re.escape(f"positive number of classes, got '{value}'.")):
        HOST.loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]))


def test_projection_is_orthogonal_to_the_rows():
    """A gradient through a norm has no component along its row, whatever the dtype of the products."""
    problem = make_problem(16, 400, 32, BF16)
    result = evaluate(HOST.lmcl, problem, random_upstream(problem, "loss"))
    for gradient, rows in ((result.dx, problem.x), (result.dw, problem.w)):
        g, v = gradient.double(), rows.double()
        along = (g * v).sum(1).abs() / v.norm(dim=1)
        assert bool((along <= 2 * torch.finfo(torch.bfloat16).eps * g.norm(dim=1) + 1e-12).all())


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7cosface57_GLOBAL__N__cd_kernels_cu21normalize_rows_kernelIfLi32EEvPKT0_' for 'sm_90'
ptxas info    : Function properties for _ZN7cosface57_GLOBAL__N__cd_kernels_cu21normalize_rows_kernelIfLi32EEvPKT0_
    8 bytes stack frame, 16 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 29 registers, used 1 barriers, 32 bytes smem, 408 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN23merge_statistics_kernelIfEEvPK' for 'sm_90'
ptxas info    : Function properties for _ZN23merge_statistics_kernelIfEEvPK
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 424 bytes cmem[0]
"""  # noqa: E501


def test_report_of_the_compiler_is_read():
    spilling, clean = cuda_kernels.read_report(REPORT)
    assert (spilling["kernel"], spilling["arch"], spilling["registers"]) == ("normalize_rows", "sm_90", 29)
    assert (spilling["spill_bytes"], spilling["shared_bytes"]) == (16, 32)
    assert (clean["kernel"], clean["registers"]) == ("merge_statistics", 40)
    assert (clean["spill_bytes"], clean["shared_bytes"]) == (0, 0)


@pytest.mark.parametrize(("spill", "status"), [("0", 0), ("4", 1)])
def test_a_spill_fails_the_check(spill, status, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    report = REPORT.replace(
        "8 bytes stack frame, 16 bytes spill stores, 4", f"{spill} bytes stack frame, 0 bytes spill stores, 0"
    )
    nvcc.write_text(f"#!/bin/sh\ncat <<'END'\n{report}END\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cuda_kernels, "SOURCES", cuda_kernels.SOURCES[:1])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert main(["cuda-kernels", "--arch", "sm_90"]) == status
    shown = capsys.readouterr()
    assert ("spills 4 bytes a thread on sm_90." in shown.err) == bool(status)
    assert f"2 compiled, {status} spill." in shown.out


def test_missing_nvcc_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["cuda-kernels"]) == 2
    assert "nvcc is neither on PATH nor in CUDA_HOME." in capsys.readouterr().err
