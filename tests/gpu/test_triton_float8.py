"""Weights and states in float8 on backend `triton`: every byte, what is rounded, and rows that move."""

import importlib
import itertools
import math
from dataclasses import replace

import pytest
import torch
from support import (
    BF16,
    F16,
    F32,
    Backend,
    Dtypes,
    Problem,
    assert_as_good_as_plain,
    evaluate,
    evaluate_oracle,
    natural_norms,
    plain_forward,
    random_upstream,
    relative_error,
)
from support.updates import UPDATES
from torch import Tensor

from cosface_kernels import float8, ops, reference
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import Update

pytestmark = [pytest.mark.triton_only, pytest.mark.option("updates")]
EMBEDDINGS = [F32, BF16, F16]
embeddings = pytest.mark.parametrize("embeddings", EMBEDDINGS, ids=str)
STEP = 1 / 8  # the largest distance of neighbours in float8, relative to them
PLAIN = Update("sgd", 1, 5, 1.0, math.inf, 0.5, 0.0)


def own_kernel(name: str):
    return getattr(importlib.import_module("support.float8_kernel"), name)


def problem_of(backend: Backend, dtypes: Dtypes, *sizes: int, **options) -> tuple[Problem, Tensor, Tensor]:
    """With a weight in float32 that float8 holds; what it stores; exponents."""
    problem = backend.problem(*sizes, Dtypes(dtypes.x, torch.float32), **options)
    q, exponents = float8.quantized(problem.w)
    return replace(problem, w=q.float()), q, exponents


def test_every_byte_is_the_number_that_torch_has(backend):
    stored = torch.arange(256, dtype=torch.uint8, device=backend.device)
    want = stored.view(FLOAT8).float()
    # Triton's interpreter multiplies no bfloat16, nor do the kernels then.
    for dtype in (torch.float32, torch.float16, *([] if backend.interpreted else [torch.bfloat16])):
        out = torch.empty_like(want)
        to = getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))
        own_kernel("decoded")[(1,)](stored.view(torch.int8), out, TO=to, BLOCK=256)
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out.signbit() | out.isnan(), want.signbit() | want.isnan())


def _steps(v: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of |v| from 0 in the steps of float8 there, and the step."""
    step = torch.where(v.abs() < 2.0**-6, 2.0**-9, torch.exp2(torch.frexp(v).exponent - 4.0))
    return v.abs() / step, step


def test_rounding_is_that_of_the_other_backends(backend):
    """By 16 bits of noise, half of the last one more for normal numbers; a fraction of a step in 16 bits below."""
    edges = torch.tensor([0.0, 2.0**-30, 2.0**-10, 2.0**-9, 2.0**-6, 1.0, 1.99, 240.0, 447.0, 448.0], device="cpu")
    drawn = torch.exp2(18 * torch.rand(600, dtype=torch.float64, device="cpu") - 10).clamp_max(448).float()
    sizes = torch.cat([edges, torch.nextafter(edges[1:-1], edges.new_zeros(())), drawn])
    noise = torch.tensor([0, 1, 0x7FFF, 0x8000, 0xFFFF], dtype=torch.int32, device="cpu")
    sizes = torch.cat([sizes, -sizes])
    v, bits = sizes.repeat_interleave(len(noise)), noise.repeat(len(sizes))
    steps, step = _steps(v.double())
    is_normal = v.abs() >= 2.0**-6
    up = torch.where(is_normal, (16 * bits + 8.0) / 2**20, bits / 2.0**16)
    steps = torch.where(is_normal, steps, (steps * 2**16).floor() / 2**16)
    want = torch.copysign((steps + up).floor() * step, v.double()).to(FLOAT8)
    assert_rounded(backend, v, bits, want)


@pytest.mark.parametrize("value", [math.nan, math.inf, 448.1, 1e30], ids=str)
def test_what_float8_does_not_hold_becomes_nan(backend, value):
    v = torch.tensor([value, -value, 448.0], device="cpu")
    noise = torch.full((3,), 0xFFFF, dtype=torch.int32, device="cpu")
    assert_rounded(backend, v, noise, torch.tensor([math.nan, math.nan, 448.0], device="cpu").to(FLOAT8))


def assert_rounded(backend: Backend, v: Tensor, noise: Tensor, want: Tensor) -> None:
    block = 256
    padding = -len(v) % block
    v, noise = (torch.nn.functional.pad(each, (0, padding)).to(backend.device) for each in (v, noise))
    got = torch.empty_like(noise, dtype=torch.int8)
    own_kernel("rounded")[(len(v) // block,)](v, noise, got, BLOCK=block)
    got, want = got.view(FLOAT8)[: len(want)].float().cpu(), want.float()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    numbers = ~want.isnan()
    assert torch.equal(got.signbit()[numbers], want.signbit()[numbers])


@embeddings
@pytest.mark.parametrize("sizes", [(5, 70, 33), (40, 300, 40), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_results_are_as_good_as_with_the_same_weight_in_another_dtype(backend, embeddings, sizes, cache_bytes):
    """Ragged tiles of rows, of classes and of columns; but for dw, which float8 does not have."""
    problem, q, _ = problem_of(backend, embeddings, *sizes)
    problem.targets[1] = -1
    upstream = random_upstream(problem, "loss", "target_cos")

    def forward(x: Tensor, w: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return backend.lmcl(x, q, *rest, cache_bytes=cache_bytes)

    got, plain = (evaluate(each, problem, upstream) for each in (forward, plain_forward))
    want, natural = evaluate_oracle(problem, upstream), natural_norms(problem, upstream)
    half = backend.operand(Dtypes(embeddings.x, FLOAT8))
    for name in ("loss", "lse", "target_cos", "max_neg", *(() if cache_bytes else ("dx", "dscale"))):
        results = (getattr(each, name) for each in (got, want, plain, natural))
        assert_as_good_as_plain(name, *results, scale=64.0, compute=torch.float32, operand=half)
    # A cosine that is kept is off by 2^-16, and its p by 64 times as much.
    off = float((got.dx.double() - want.dx).norm())
    assert off <= (4 * backend.rounding(embeddings) + 3e-3) * float(natural.dx)


@embeddings
def test_losses_without_a_softmax(backend, embeddings):
    problem, q, _ = problem_of(backend, embeddings, 7, 300, 24, scale=8.0)
    ones = torch.ones_like(problem.scale)
    rest = problem.targets, problem.scale, -4 * ones, ones, -ones
    sums, dx, _, _ = ops.sigmoid(problem.x, q, *rest, True, False, backend.name, sigmoid="angle")
    double = [each.double() if each.is_floating_point() else each for each in rest]
    want = ops.sigmoid(problem.x.double(), q.double(), *double, True, False, "reference", sigmoid="angle")
    allowed = 2e-5 + 2 * backend.rounding(embeddings)
    assert relative_error(sums, want[0]) < 2e-5
    assert relative_error(dx, want[1]) < allowed


def test_a_class_that_is_nan_makes_every_loss_nan(backend):
    problem, q, _ = problem_of(backend, BF16, 6, 70, 33)
    q.view(torch.int8)[50, 7] = 0x7F
    problem.targets.clamp_(max=40)
    loss, *_ = ops.lmcl(problem.x, q, problem.targets, problem.scale, problem.margin, backend.name)
    assert loss.isnan().all()
    chosen = torch.arange(50, device=backend.device)
    loss, *_ = ops.lmcl(problem.x, q, problem.targets, problem.scale, problem.margin, backend.name, chosen)
    assert loss.isfinite().all()


@pytest.mark.parametrize(
    ("embeddings", "sizes", "some"),
    [*((each, (9, 300, 33), some) for each in EMBEDDINGS for some in (False, True)), (F32, (3, 10, 600), True)],
    ids=str,
)
def test_rows_move_inside_backward_by_the_gradient_of_the_specification(backend, embeddings, sizes, some):
    """A momentum in float32 that begins is the gradient of w, 2^-e times that of what is stored."""
    problem, q, exponents = problem_of(backend, embeddings, *sizes, scale=8.0)
    classes = torch.arange(0, len(q), 2, device=backend.device) if some else None
    rows = slice(None, None, 2) if some else slice(None)
    problem.targets.clamp_(max=len(q[rows]) - 1)
    q[4] = 0  # a class of zeros has a gradient all the same
    momentum, before = torch.zeros_like(q, dtype=torch.float32), q.clone()
    inputs = problem.x, q, problem.targets, problem.scale
    _, top, log_sum, _, _, cache, _ = ops.lmcl(*inputs, problem.margin, backend.name, classes)
    g = random_upstream(problem, "loss", "lse")
    update = Update("sgd", 3, 5, 0.5, math.inf, 0.5, 0.0, momentum=0.9)
    unit = float8.units(exponents, torch.float64)
    upstream = top, log_sum, g.loss, g.lse
    want_dx, dw, _ = reference.backward(
        problem.x.double(), q[rows].double(), problem.targets, *(v.double() for v in (problem.scale, *upstream))
    )
    dx, _ = ops.lmcl_backward_update_(
        *inputs, *upstream, cache, [momentum, exponents], None, *update.flat(), True, backend.name, classes
    )
    allowed = 2e-5 + 2 * backend.rounding(embeddings)
    assert relative_error(dx, want_dx) < allowed
    others = torch.ones(len(q), dtype=torch.bool, device=backend.device)
    others[rows] = False
    assert not momentum[others].any()
    assert torch.equal(q[others].view(torch.int8), before[others].view(torch.int8))
    exact_g = 0.5 * dw / unit[rows]
    lengths = [each.norm(dim=1).clamp_min(1e-30) for each in (momentum[rows].double() - exact_g, exact_g)]
    assert float((lengths[0] / lengths[1]).median()) < allowed
    assert relative_error(momentum[rows], exact_g) < allowed
    check_held(before.double()[rows] * unit[rows] - 0.5 * momentum[rows], q[rows], exponents[rows])


def check_held(exact: Tensor, q: Tensor, exponents: Tensor, *, is_square: bool = False) -> None:
    """Rows in float8 are the exact ones, rounded to a neighbour; their exponents are the specification's."""
    exact = exact.double().sqrt() if is_square else exact.double()
    largest = exact.abs().amax(1)
    low, high = (float8.exponents_for(largest * (1 + off), exponents) for off in (-1e-5, 1e-5))
    assert bool(((low <= exponents) & (exponents <= high)).all())
    in_units = exact / float8.units(exponents, torch.float64)
    _, step = _steps(in_units)
    off = (q.double() - in_units).abs() / step
    assert float(off.max()) <= 1 + 1e-3
    assert float(off.max()) > 0.5 or q.numel() < 100, "rounding is random"


def drawn(backend: Backend, dtype: torch.dtype, C: int, D: int, seed: int, is_square: bool = False):
    """Rows of several sizes, and their exponents where they are in float8, of squares those of the roots."""
    rng = torch.Generator("cpu").manual_seed(seed)
    rows = torch.randn(C, D, generator=rng, device="cpu")
    rows *= torch.exp2(torch.randint(-20, 20, (C, 1), generator=rng, device="cpu").float())
    rows = rows.abs() if is_square else rows
    if dtype is FLOAT8:
        return [each.to(backend.device) for each in float8.quantized(rows)]
    return [(rows.square() if is_square else rows).to(dtype).to(backend.device)]


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("D", [20, 515])
@pytest.mark.parametrize(
    "dtypes",
    [pair for pair in itertools.product((FLOAT8, torch.float32, torch.bfloat16), repeat=2) if FLOAT8 in pair],
    ids=str,
)
def test_update_is_that_of_the_specification_rounded(backend, dtypes, rule, D):
    """Each dtype of a weight with each of a state; all that is not rounded is as exact as in float32."""
    C, (of_w, of_state) = 9, dtypes
    w, *exponents = drawn(backend, of_w, C, D, 0)
    state = []
    for k in range({"sgd": 1, "adamw": 3}[rule]):
        rows, *of_rows = drawn(backend, of_state, C, D, 1 + k, is_square=k > 0)
        state.append(rows)
        exponents += of_rows
    dw = drawn(backend, torch.float32, C, D, 7)[0]
    exact = [each.clone() for each in (w, *state)]
    of_exact = iter(exponents)
    for k, rows in enumerate(exact):
        of_rows = next(of_exact) if rows.dtype is FLOAT8 else None
        exact[k] = reference._held(rows, of_rows, k > 1, torch.float64)
    g = dw.double() / (float8.units(exponents[0], torch.float64) if of_w is FLOAT8 else 1)
    reference.move_rows(exact[0], g, exact[1:], UPDATES[rule])
    ops.apply_update_(w, dw, [*state, *exponents], *UPDATES[rule].flat(), backend.name)
    of_moved = iter(exponents)
    for k, (rows, want) in enumerate(zip((w, *state), exact, strict=True)):
        if rows.dtype is FLOAT8:
            check_held(want, rows, next(of_moved), is_square=k > 1)
        else:
            each = (rows.double() - want).norm(dim=1) / want.norm(dim=1)
            assert float(each.max()) < (2**-7 if rows.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("D", [20, 700])
def test_exact_moves_have_the_bits_of_the_specification(backend, D):
    """Nothing to round: rows that stay, that halve, and of which the exponent was another's."""
    q, exponents = drawn(backend, FLOAT8, 9, D, 0)
    q[:, 0] = 448.0
    q = q.float().where(q.float().abs() >= 8 * 2.0**-6, 0).to(FLOAT8)
    small = (q.float() / 8).to(FLOAT8)  # of normal numbers, exactly
    for rows, off, decay, change in ((q, 0, 0.0, 0), (q, 0, 1.0, -1), (small, 3, 0.0, -3), (small, 3, 1.0, -4)):
        moved, of_moved = rows.clone(), exponents + off
        update = replace(PLAIN, weight_decay=decay)
        ops.apply_update_(
            moved, torch.zeros_like(q, dtype=torch.float32), [of_moved], *update.flat(), backend.name
        )
        assert torch.equal(of_moved, exponents + off + change)
        assert torch.equal(moved.view(torch.int8), q.view(torch.int8))


def test_exponents_at_the_ends_of_their_ranges(backend):
    """A momentum of 448 2^k is one of the exponent k, the next number one of k + 1; the least and the largest."""
    ends = torch.tensor([448.0, 224.0, 7.0, 2.0**-100, 3e38, 2e-38], device=backend.device)
    largest = torch.cat([ends, torch.nextafter(ends, torch.zeros_like(ends)), torch.nextafter(ends, 2 * ends)])
    w = torch.zeros(len(largest), 20, device=backend.device)
    dw, momentum = w.clone(), w.to(FLOAT8)
    dw[:, 3] = -largest
    exponents = torch.full((len(w),), 5, dtype=torch.int8, device=backend.device)
    update = replace(PLAIN, lr=0.0, momentum=0.9)
    ops.apply_update_(w, dw, [momentum, exponents], *update.flat(), backend.name)
    assert torch.equal(exponents, float8.exponents_for(largest, exponents))


def test_rounding_to_float8_keeps_the_expected_value(backend):
    """A step far below the distance of neighbours moves the mean of many rows by as much."""
    rows, lr = 250, 2.0**-8
    w = torch.full((rows, 64), 256.0, device=backend.device).to(FLOAT8)
    exponents = torch.full((rows,), -8, dtype=torch.int8, device=backend.device)
    for step in range(1, 5):
        update = replace(PLAIN, step=step, lr=lr)
        dw = torch.full((rows, 64), 2.0**-8, device=backend.device)  # of what is stored
        ops.apply_update_(w, dw, [exponents], *update.flat(), backend.name)
    moved = 1 - float8.values(w, exponents, torch.float64)
    standard_error = float(moved.std()) / math.sqrt(moved.numel())
    assert standard_error > 0
    assert abs(float(moved.mean()) - 4 * lr) < 4 * standard_error


def test_no_root_of_a_row_that_has_one_becomes_zero(backend):
    w = torch.zeros(4, 40, device=backend.device)
    state = [torch.zeros_like(w).to(FLOAT8) for _ in range(3)]
    exponents = [torch.full((4,), k, dtype=torch.int8, device=backend.device) for k in range(3)]
    dw = torch.zeros_like(w)
    dw[:3, 0] = torch.tensor([1.0, 1e-15, 1e15], device=backend.device)
    update = replace(UPDATES["adamw"], max_row_norm=math.inf, gradient_factor=1.0)
    ops.apply_update_(w, dw, [*state, *exponents], *update.flat(), backend.name)
    for k in (1, 2):
        assert (state[k][:3].float() > 0).all()
        assert not state[k][3].float().any()
        assert exponents[k][3] == k
        assert (state[k][:3, 1:].float() == 2.0**-9).all()
    assert not state[0][:, 1:].float().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_keep_their_exponent_and_no_other_row_notices(backend, value):
    q, exponents = drawn(backend, FLOAT8, 6, 40, 0)
    q[5], dw = 0, torch.zeros(6, 40, device=backend.device)
    before, of_before = q.clone(), exponents.clone()
    dw[2] = value
    ops.apply_update_(q, dw, [exponents], *PLAIN.flat(), backend.name)
    assert torch.equal(exponents, of_before)
    assert q[2].float().isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(q[others].view(torch.int8), before[others].view(torch.int8))


def test_a_batch_that_is_not_finite_or_empty_moves_what_it_should(backend):
    problem, q, exponents = problem_of(backend, BF16, 4, 70, 33)
    q[:, 0] = 448.0
    before, of_before = q.clone(), exponents.clone()
    finite = torch.zeros((), dtype=torch.bool, device=backend.device)
    for x, finite_, unchanged in ((problem.x, finite, True), (problem.x[:0], None, False)):
        n = len(x)
        inputs = x, q, problem.targets[:n], problem.scale[:n]
        _, top, log_sum, _, _, cache, _ = ops.lmcl(*inputs, problem.margin, backend.name)
        update = replace(PLAIN, weight_decay=1.0)
        ops.lmcl_backward_update_(
            *inputs, top, log_sum, torch.ones_like(top), torch.ones_like(top), cache, [exponents], finite_,
            *update.flat(), True, backend.name,
        )  # fmt: skip
        assert torch.equal(q.view(torch.int8), before.view(torch.int8))  # halved, it has another exponent
        assert torch.equal(exponents, of_before - (0 if unchanged else 1))


@pytest.mark.option("gradient_tolerance")
@embeddings
def test_gradient_tolerance(backend, embeddings):
    """What is left out of a sample is at most the tolerance of its mass; twice that bounds what dx misses."""
    problem, q, _ = problem_of(backend, embeddings, 5, 500, 16, scale=30.0)
    inputs = problem.x, q, problem.targets, problem.scale
    g = torch.ones_like(problem.scale)
    found = []
    for tolerance in (0.0, 0.05):
        options = {"gradient_tolerance": tolerance}
        _, top, log_sum, _, _, cache, _ = ops.lmcl(*inputs, 0.35, backend.name, **options)
        dx, *_ = ops.lmcl_backward(*inputs, top, log_sum, g, -g, cache, True, False, backend.name, **options)
        found.append(dx)
    _, kept = ops.kept_entries(cache, len(problem.x))
    assert bool((kept < 1).all())
    of_terms = natural_norms(problem, random_upstream(problem, "loss")).dx
    assert (
        0
        < float((found[0].double() - found[1].double()).norm())
        < 0.1 * 30 * float((1 / problem.x.double().norm(dim=1)).norm())
        + float(of_terms) * backend.rounding(embeddings)
    )


def test_nearest_classes(backend):
    problem, q, _ = problem_of(backend, BF16, 6, 70, 33)
    got = ops.nearest(problem.x, q, 5, True, backend.name)
    want = ops.nearest(problem.x.double(), q.double(), 5, True, "reference")
    assert torch.equal(got[1], want[1])
