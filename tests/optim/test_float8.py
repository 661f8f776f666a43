"""Weights and states in float8: what is computed with them, and how their rows move."""

import math
from dataclasses import replace

import pytest
import torch
from support import Backend
from support.updates import UPDATES, C, D, draw_inputs, draw_upstream, moved_rows
from torch import Tensor

from cosface_kernels import float8, ops, reference
from cosface_kernels.float8 import FLOAT8, LARGEST
from cosface_kernels.options import Options, Update

pytestmark = pytest.mark.option("float8", "updates")

X_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS_OF = {"sgd": 1, "adamw": 3}


def _draw_float8(rule: str, num_classes: int, device: str, dtypes: list[torch.dtype] | None = None):
    """A weight in float8, and what an update of it takes: its state, in float8 or these dtypes, and exponents."""
    w, state = draw_inputs(rule, torch.float32, num_classes, device)
    scales = torch.exp2(torch.randint(-9, 9, (num_classes, 1), device=device).float())
    rows, exponents = [], []
    for each, dtype in zip((scales * w, *state), [FLOAT8, *(dtypes or [FLOAT8] * len(state))], strict=True):
        is_square = rule == "adamw" and len(rows) > 1
        if dtype is FLOAT8:
            each, e = float8.quantized(each.sqrt() if is_square else each)
            exponents.append(e)
        rows.append(each.to(dtype))
    return rows[0], [*rows[1:], *exponents]


def _held(rule: str, w: Tensor, state: list[Tensor]) -> list[Tensor]:
    """What they stand for, in float64."""
    tensors = [w, *(each for each in state if each.dtype != torch.int8)]
    exponents = iter(each for each in state if each.dtype == torch.int8)
    held = []
    for k, each in enumerate(tensors):
        value = each.double() if each.dtype is not FLOAT8 else float8.values(each, next(exponents), torch.float64)
        is_root = each.dtype is FLOAT8 and rule == "adamw" and k > 1
        held.append(value.square() if is_root else value)
    return held


def _exact(rule: str, w: Tensor, state: list[Tensor], dw: Tensor, update: Update) -> list[Tensor]:
    """The same step of `reference.move_rows` in float64, by the gradient of what w stands for."""
    v, *means = _held(rule, w, state)
    reference.move_rows(v, dw.double() / float8.units(state[ROWS_OF[rule]], torch.float64), means, update)
    return [v, *means]


# -- the same products as of a weight that holds the same numbers ------------------------------------------------


@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"classes": True}, {"cache_bytes": 0}], ids=str)
def test_results_are_those_of_the_same_rows_in_another_dtype(backend, dtype, options):
    """Bit for bit: a row of float8 is exact in any of them."""
    problem = backend.problem(37, C, D)
    x, exponent = problem.x.to(dtype), torch.zeros(C, dtype=torch.int8, device=backend.device)
    w, _ = float8.quantized(problem.w * torch.exp2(torch.arange(C, device=backend.device) % 40 - 20.0)[:, None])
    w[5] = 0
    targets, rows = problem.targets, []
    if "classes" in options:
        options = {"classes": torch.arange(0, C, 3, device=backend.device)}
        targets = torch.where(targets >= 0, targets // 3, targets)
    scale = problem.scale.to(reference.compute_dtype(x, w))
    for weight in (w, w.to(dtype)):
        given = Options(**options, exponents=exponent if weight is w else None).flat()
        results = ops.lmcl(x, weight, targets, scale, 0.35, backend.name, *given)
        _, top, log_sum, *_, cache, _ = results
        g = torch.linspace(-1, 1, len(x), dtype=scale.dtype, device=backend.device)
        tensors = (x, weight, targets, scale, top, log_sum, g, -g, cache)
        dx, _, dscale = ops.lmcl_backward(*tensors, True, False, backend.name, *given)
        rows.append((*results[:5], dx, dscale))
    for got, want in zip(*rows, strict=True):
        assert torch.equal(got, want)


def test_a_gradient_of_float8_is_refused(backend):
    problem = backend.problem(3, 5, 4)
    rows = [problem.scale] * 4
    w, empty = problem.w.to(FLOAT8), torch.empty(0, dtype=torch.uint8, device=backend.device)
    with pytest.raises(TypeError, match=r"torch\.float8_e4m3fn has no gradient dw of its own"):
        ops.lmcl_backward(
            problem.x, w, problem.targets, problem.scale, *rows, empty, True, True, backend.name, cache_bytes=0
        )


def test_nearest_are_those_of_the_same_rows(backend):
    problem = backend.problem(9, C, D)
    w, _ = float8.quantized(problem.w)
    for got, want in zip(*(ops.nearest(problem.x, v, 7, True, backend.name) for v in (w, w.float())), strict=True):
        assert torch.equal(got, want)


# -- rows that move ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", UPDATES)
def test_a_step_keeps_the_expected_value_of_weight_and_state(backend, rule):
    """The mean over seeds is the exact step, and each draw is one of the two neighbours of it."""
    w, state = _draw_float8(rule, 33, backend.device)
    dw = torch.linspace(-1, 1, w.numel(), device=backend.device).view_as(w).sin() * 64
    update = replace(UPDATES[rule], max_row_norm=math.inf, gradient_factor=1.0)
    exact = _exact(rule, w, state, dw, update)
    draws, sums = 200, [torch.zeros_like(each) for each in exact]
    for seed in range(draws):
        moved, of_rows = w.clone(), [each.clone() for each in state]
        ops.apply_update_(moved, dw, of_rows, *replace(update, seed=seed).flat(), backend.name)
        exponents = [each for each in of_rows if each.dtype == torch.int8]
        for k, (got, want, e) in enumerate(zip(_held(rule, moved, of_rows), exact, exponents, strict=True)):
            if rule == "adamw" and k > 1:  # whose roots keep theirs
                got, want = got.sqrt(), want.sqrt()
            unit = float8.units(e, torch.float64)
            step = torch.exp2(torch.frexp(want / unit).exponent.double().clamp_min(-5) - 4) * unit
            assert bool(((got - want).abs() < step * 1.0001).all()), f"tensor {k}"
            sums[k] += (got - want) / step
    for k, total in enumerate(sums):  # the deviation of a draw is at most 1/2: six of the mean's
        assert float(total.abs().max()) / draws < 3 / math.sqrt(draws), f"tensor {k}"
        assert abs(float(total.mean())) / draws < 2.5 / math.sqrt(draws * total.numel()), f"mean of tensor {k}"


@pytest.mark.parametrize("rule", UPDATES)
def test_each_row_has_the_exponent_of_its_largest_number(backend, rule):
    w, state = _draw_float8(rule, C, backend.device)
    w[3], state[0][3] = 0, 0
    dw = torch.ones(w.shape, device=backend.device) * torch.exp2(state[ROWS_OF[rule]].float())[:, None]
    dw[3] = 0
    update = replace(UPDATES[rule], weight_decay=0.0, max_row_norm=math.inf)
    before = [each.clone() for each in state if each.dtype == torch.int8]
    exact = _exact(rule, w, state, dw, update)
    ops.apply_update_(w, dw, state, *update.flat(), backend.name)
    for k, (got, want) in enumerate(zip(state[ROWS_OF[rule] :], exact, strict=True)):
        size = (want.sqrt() if rule == "adamw" and k > 1 else want).abs().amax(1)
        near = (torch.frexp(size).mantissa - 0.875).abs() < 1e-5  # whose float32 may be on the other side
        assert torch.equal(got[~near], float8.exponents_for(size, before[k])[~near]), f"tensor {k}"
    largest = w.float().abs().amax(1)
    assert bool(((largest > LARGEST / 2 - 1) & (largest <= LARGEST) | (largest == 0)).all())
    if rule == "sgd":  # of a row of zeros, what it was
        assert float(largest[3]) == 0
        assert int(state[1][3]) == int(before[0][3])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, FLOAT8], ids=str)
@pytest.mark.parametrize("rule", UPDATES)
def test_rows_move_inside_backward_as_by_a_gradient_that_exists(backend, rule, state_dtype):
    """Off the exact step by a step of the format, which is what rounding may do."""
    w, state = _draw_float8(rule, C, backend.device, [state_dtype] * ROWS_OF[rule])
    upstream = draw_upstream(w.float(), C)
    update = replace(UPDATES[rule], max_row_norm=math.inf)
    doubled = [each.double() if each.is_floating_point() else each for each in upstream]
    _, dw, _ = reference.backward(doubled[0], w.double(), *doubled[1:])
    exact = _exact(rule, w, state, dw, update)
    _, _, moved, *of_rows = moved_rows(backend.name, w, state, update, upstream)
    for k, (got, want) in enumerate(zip(_held(rule, moved, of_rows), exact, strict=True)):
        largest = want.abs().amax(1, keepdim=True)
        eps = {FLOAT8: 2**-3, torch.bfloat16: 2**-7, torch.float32: 2**-20}[moved.dtype if k == 0 else state_dtype]
        assert bool(((got - want).abs() <= 2.1 * eps * want.abs() + 2e-5 * largest).all()), f"tensor {k}"


@pytest.mark.parametrize("rule", UPDATES)
def test_rows_of_other_classes_stay_as_they_are(backend, rule):
    w, state = _draw_float8(rule, C, backend.device)
    classes = torch.arange(2, C, 5, device=backend.device)
    *_, moved, of_rows = _moved(backend, w, state, replace(UPDATES[rule], max_row_norm=math.inf), classes)
    others = torch.ones(C, dtype=torch.bool, device=backend.device)
    others[classes] = False
    for k, (before, after) in enumerate(zip((w, *state), (moved, *of_rows), strict=True)):
        bits = (before.view(torch.uint8), after.view(torch.uint8))
        assert torch.equal(*(each[others] for each in bits)), f"tensor {k}"
    assert not torch.equal(w.view(torch.uint8)[classes], moved.view(torch.uint8)[classes])


def _moved(backend: Backend, w: Tensor, state: list[Tensor], update: Update, classes: Tensor | None = None):
    upstream = draw_upstream(w.float(), C if classes is None else len(classes))
    dx, dscale, moved, *of_rows = moved_rows(backend.name, w, state, update, upstream, classes)
    return dx, dscale, moved, of_rows


def test_a_thousand_tiny_steps_move_the_mean_as_they_should(backend):
    """Each far below a step of the format, of a weight and its momentum: to the nearest nothing would move."""
    rows, width, steps = 64, 32, 1000
    torch.manual_seed(0)
    start = torch.randn(rows, width, device=backend.device)
    w, e = float8.quantized(start)
    g = torch.randn(rows, width, device=backend.device)
    momentum, of_momentum = torch.zeros_like(w), torch.zeros_like(e)
    exact = float8.values(w, e, torch.float64)
    mean = torch.zeros_like(exact)
    before = exact.clone()
    stored = float8.quantized(before - 1e-4 * g)[0].float() != w.float()
    assert float(stored.float().mean()) < 0.05
    for step in range(1, steps + 1):
        update = Update("sgd", step, 7, 1.0, math.inf, 1e-4, 0.0, momentum=0.9)
        dw = g * float8.units(e, torch.float32)  # of what is stored
        ops.apply_update_(w, dw, [momentum, e, of_momentum], *update.flat(), backend.name)
        reference.move_rows(exact, g.double(), [mean], replace(update, seed=step))
    got, want = float8.values(w, e, torch.float64) - before, exact - before
    along = g.double() / g.double().norm()
    moved, meant = float((got * along).sum()), float((want * along).sum())
    # each step rounds by at most a 16th of the number, up or down, which adds up like a random walk
    deviation = float((got - want).norm()) / math.sqrt(rows * width)
    assert abs(moved - meant) < 5 * deviation
    assert abs(moved / meant - 1) < 0.02
    held = float8.values(momentum, of_momentum, torch.float64)
    assert abs(float((held * along).sum()) / float((mean * along).sum()) - 1) < 0.02


def test_roots_of_squares_never_become_zero(backend):
    """Where they could, the next step of that number would be hundreds of times too long."""
    w, state = _draw_float8("adamw", 16, backend.device)
    dw = torch.zeros(w.shape, device=backend.device)
    dw[:, 0], dw[:, 1] = 1.0, 1e-9  # six decades and more below the row's largest
    for each in state[:3]:
        each.zero_()
    update = replace(UPDATES["adamw"], max_row_norm=math.inf)
    for step in range(1, 30):
        ops.apply_update_(w, dw, state, *replace(update, step=step, seed=step).flat(), backend.name)
        assert bool((state[1].float() > 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_spoils_its_row_alone(backend, value):
    w, state = _draw_float8("sgd", 16, backend.device)
    dw = torch.ones(w.shape, device=backend.device)
    clean, of_clean = w.clone(), [each.clone() for each in state]
    update = replace(UPDATES["sgd"], max_row_norm=math.inf)
    ops.apply_update_(clean, dw, of_clean, *update.flat(), backend.name)
    dw[4, 2] = value
    ops.apply_update_(w, dw, state, *update.flat(), backend.name)
    assert bool(w[4].float().isnan().any())
    others = torch.arange(16, device=backend.device) != 4
    assert torch.equal(w[others].view(torch.uint8), clean[others].view(torch.uint8))


def test_what_an_update_needs_is_asked_for(backend):
    w, state = _draw_float8("sgd", 16, backend.device)
    dw = torch.ones(w.shape, device=backend.device)
    momentum, of_weight, of_momentum = state
    for given, message in [
        ([momentum, of_weight], "exponents"),
        ([momentum], "exponents"),
        ([momentum, of_weight, of_momentum, of_momentum], "exponents"),
        ([momentum, of_weight[1:], of_momentum], r"exponents must have shape \[16\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.apply_update_(w, dw, given, *UPDATES["sgd"].flat(), backend.name)
    with pytest.raises(TypeError, match=r"x must be float64, float32, bfloat16 or float16"):
        ops.lmcl(w, w, torch.zeros(16, dtype=torch.int64, device=backend.device), dw[:, 0], 0.0, backend.name)


# -- the format --------------------------------------------------------------------------------------------------


def test_quantized_rows_are_the_nearest_at_their_scale():
    torch.manual_seed(0)
    scales = torch.exp2(torch.arange(300, dtype=torch.float64, device="cpu") - 150)[:, None]
    rows = scales * torch.randn(300, 40, dtype=torch.float64, device="cpu")
    rows[7] = 0
    q, e = float8.quantized(rows)
    held = float8.values(q, e, torch.float64)
    inside = (torch.frexp(rows.abs().amax(1)).exponent - 9).abs() < 118
    worst = ((held - rows).abs() / rows.abs().amax(1, keepdim=True).clamp_min(1e-300))[inside].amax()
    assert float(worst) <= 2**-4
    assert bool(((held - rows).abs() <= rows.abs() / 16 + 2.0**-10 * float8.units(e, torch.float64))[inside].all())
    assert float(held[7].abs().max()) == 0


def test_error_of_a_cosine_is_a_thousandth():
    """At D = 512, 2.6 % of an entry in the root mean square over sqrt(D), and sqrt(2) times that at random."""
    torch.manual_seed(0)
    w, x = (torch.randn(2000, 512, dtype=torch.float64, device="cpu") for _ in range(2))
    q, e = float8.quantized(w)
    at_random = float8.rounded(w / float8.units(e, torch.float64), torch.Generator().manual_seed(1))
    for stored, least, most in ((q, 1.0e-3, 1.3e-3), (at_random, 1.5e-3, 1.8e-3)):
        held = float8.values(stored, e, torch.float64)
        error = torch.cosine_similarity(held, x) - torch.cosine_similarity(w, x)
        assert least < float(error.square().mean().sqrt()) < most
        assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(2000)
