"""Random rounding of rows that move: its expected value, its streams, and the dtypes of weight and state."""

import math
from dataclasses import replace

import pytest
import torch
from support import (
    BF16,
    DEFAULT_DEVICE,
    F32,
    Backend,
    evaluate_oracle,
    random_upstream,
    relative_error,
)
from support.updates import UPDATES, draw_inputs, draw_upstream, moved_rows, updates
from torch import Tensor

from cosface_kernels import ops, optim
from cosface_kernels.optim import FusedAdamW
from cosface_kernels.options import Update

# -- stochastic rounding -----------------------------------------------------------------------------------------


@updates
def test_rounding_to_bfloat16_keeps_the_expected_value(backend):
    """A step far below an ulp moves the mean of many rows by as much; rounding to nearest would move none."""
    rows, lr = 250, 2.0**-13
    w = torch.ones(rows, 64, dtype=torch.bfloat16, device=backend.device)
    g = torch.ones_like(w)
    for step in range(1, 17):
        ops.apply_update_(w, g, [], *Update("sgd", step, 9, 1.0, math.inf, lr, 0.0).flat(), backend.name)
    moved = 1 - w.double()
    standard_error = float(moved.std()) / math.sqrt(moved.numel())
    assert abs(float(moved.mean()) - 16 * lr) < 4 * standard_error
    assert set(w.unique().tolist()) <= {1 - k * 2.0**-8 for k in range(17)}


def _rounded_up(backend: Backend, step: int = 1, seed: int = 5) -> Tensor:
    """(4, 400, 62) of the weight and AdamW's means, where all of the exact values lie half-way: which went up."""
    half = 1 + 2.0**-8  # between 1 and 1 + 2^-7
    w = torch.ones(400, 62, dtype=torch.bfloat16, device=backend.device)
    state = [torch.zeros_like(w) for _ in range(3)]
    root = 1 - 1 / half
    update = Update("adamw", step, seed, -half, math.inf, 2.0**-8, 0.0, beta1=0.0, beta2=root**step, eps=0.0)
    if step > 1:
        update = replace(update, beta2=root)
    ops.apply_update_(w, torch.ones_like(w), state, *update.flat(), backend.name)
    return torch.stack([values.abs() > 1 for values in (w, *state)]).double()


@updates
def test_rounding_of_tensors_elements_steps_and_seeds_is_independent(backend):
    up = [_rounded_up(backend), _rounded_up(backend, seed=6)]
    signs = [2 * values - 1 for values in up]
    count = signs[0][0].numel()
    deviation = 5 / math.sqrt(count)
    assert float(signs[0].mean(dim=(1, 2)).abs().max()) < deviation, "half of them go up"
    for i in range(4):
        for j in range(i):
            assert abs(float((signs[0][i] * signs[0][j]).mean())) < deviation, f"tensors {i} and {j}"
        assert abs(float((signs[0][i] * signs[1][i]).mean())) < deviation, "seeds"
        for shift in (1, 2, 3, 4, 31, 32):
            assert abs(float((signs[0][i] * signs[0][i].roll(shift, 1)).mean())) < deviation, f"columns {shift}"
        assert abs(float((signs[0][i] * signs[0][i].roll(1, 0)).mean())) < deviation, "rows"
    assert torch.equal(up[0], _rounded_up(backend)), "the same seed and step, the same bits"


@updates
@pytest.mark.parametrize("seed", [0, 2**31 + 5, 2**62 + 1])
def test_rounding_differs_between_steps_with_any_seed(backend, seed):
    w = torch.ones(60, 40, dtype=torch.bfloat16, device=backend.device)
    moved = []
    for step in (1, 2, 16, 17, 2):
        v = w.clone()
        update = Update("sgd", step, seed, 1.0, math.inf, 2.0**-9, 0.0)
        ops.apply_update_(v, torch.ones_like(w), [], *update.flat(), backend.name)
        moved.append(v)
    assert torch.equal(moved[1], moved[4])
    for i in range(4):
        for j in range(i):
            assert 0.3 < float((moved[i] != moved[j]).double().mean()) < 0.7


@pytest.mark.option("updates", "classes")
def test_rounding_depends_on_the_place_in_the_weight(backend):
    """Rows that are chosen are rounded as they are among all; the reference draws for those that it moves."""
    tolerance = 2**-7 if backend.name == "reference" else 0
    w, state = draw_inputs("adamw", torch.bfloat16, 700, backend.device)
    x, y, scale, top, log_sum, g_lse, g_cos = draw_upstream(w, 4)
    upstream = [x, y, scale, top, log_sum, g_lse * 0, g_cos * 0]  # only decay, of which every row has its own
    classes = torch.arange(0, 700, 2, device=backend.device)
    everywhere = moved_rows(backend.name, w, state, UPDATES["adamw"], upstream)[2:]
    chosen = moved_rows(backend.name, w, state, UPDATES["adamw"], upstream, classes)[2:]
    for all_rows, some in zip(everywhere, chosen, strict=True):
        torch.testing.assert_close(all_rows[classes], some[classes], rtol=tolerance, atol=tolerance)


@updates
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.3895e38], ids=str)
def test_rounding_keeps_what_is_not_finite(backend, value):
    w = torch.full((50, 33), 1.0, dtype=torch.bfloat16, device=backend.device)
    g = torch.full_like(w, -value)
    ops.apply_update_(w, g, [], *Update("sgd", 1, 0, 1.0, math.inf, 1.0, 0.0).flat(), backend.name)
    assert torch.equal(w.isnan(), g.isnan())
    assert g.isnan().all() or torch.equal(w, -g)


@updates
def test_rounding_keeps_a_nan_of_any_bits(backend):
    """Also of those that a GPU makes, all ones, to which nothing can be added."""
    w = torch.ones(50, 33, dtype=torch.bfloat16, device=backend.device)
    momentum = torch.full(w.shape, 0x7FFFFFFF, dtype=torch.int32, device=backend.device).view(torch.float32)
    update = Update("sgd", 2, 0, 1.0, math.inf, 0.1, 0.0, momentum=0.9)
    ops.apply_update_(w, torch.ones_like(w), [momentum], *update.flat(), backend.name)
    assert w.isnan().all()


@updates
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtypes", [F32, BF16], ids=str)
def test_dtypes_of_weight_and_state_may_differ(backend, dtypes, state_dtype):
    problem = backend.problem(6, 90, 16, dtypes, scale=8.0)
    w = problem.w.clone().requires_grad_()
    exact = problem.w.double().requires_grad_()
    optimizer = FusedAdamW([w], lr=0.05, eps=0.1, state_dtype=state_dtype)
    theirs = torch.optim.AdamW([exact], lr=0.05, eps=0.1)
    for _ in range(2):
        upstream = random_upstream(problem, "loss")
        loss = optim.lmcl(w, problem.x, w, problem.targets, problem.scale, problem.margin, backend.name)[0]
        loss.backward(upstream.loss)
        exact.grad = evaluate_oracle(replace(problem, w=exact.detach()), upstream).dw
        optimizer.step()
        with DEFAULT_DEVICE:
            theirs.step()
    state = optimizer.state[w]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == state_dtype
    tolerance = 2**-6 if torch.bfloat16 in (dtypes.w, state_dtype) else 1e-4
    assert relative_error(w, exact) < tolerance
    for name in ("exp_avg", "exp_avg_sq"):
        assert relative_error(state[name], theirs.state[exact][name]) < 4 * tolerance, name
