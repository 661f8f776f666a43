"""Weights in float8 that are not normalised, as plain softmax has them: a row has the length of its exponent."""

import math
from dataclasses import replace

import pytest
import torch
from support import Backend, Dtypes, Problem, relative_error
from torch import Tensor

from cosface_kernels import float8, ops, reference
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import Options, Update

N, C, D = 21, 300, 24
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
OPTIONS = ["plain", "classes", "thresholds", "moments", "gradient_tolerance"]


def _draw(backend: Backend, dtype: torch.dtype) -> tuple[Problem, Tensor, Tensor]:
    """Rows of many lengths, one of zeros, one too short for 16 bits; what they stand for in float64; exponents."""
    problem = backend.problem(N, C, D, Dtypes(dtype, dtype), scale=4.0, margin=0.0)
    places = torch.arange(C, device=backend.device)
    q, exponent = float8.quantized(problem.w.double() * torch.exp2(places % 7 - 5.0)[:, None])
    q[5] = 0
    exponent[6] = -118
    problem.scale[:] /= 1 + places[:N] % 3
    return replace(problem, w=q), float8.values(q, exponent, torch.float64), exponent


def _options(backend: Backend, name: str) -> Options:
    on_device = {"device": backend.device, "dtype": torch.float32}
    shaped = {
        "thresholds": torch.full((N,), 0.4, **on_device),
        "negatives": torch.tensor([0.0, 1.5, -0.2], **on_device),  # N is continuous there
    }
    of_moments = {"moments": True, "g_moments": torch.linspace(-1, 1, 2 * N, **on_device).view(2, N)}
    options = {
        "plain": {},
        "classes": {"classes": torch.arange(1, C, 2, device=backend.device)},
        "thresholds": shaped,
        "moments": shaped | of_moments,
        "gradient_tolerance": {"gradient_tolerance": 1e-7, "cache_bytes": None},
    }
    return Options(**{"cache_bytes": 0, "normalize_weight": False, **options[name]})


@DTYPES
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.option(name)) for name in OPTIONS])
def test_results_are_those_of_what_the_rows_stand_for(backend, dtype, name):
    """Rows then move by the gradient of what they stand for, which is their momentum."""
    problem, values, exponent = _draw(backend, dtype)
    options = _options(backend, name)
    rows = slice(1, None, 2) if name == "classes" else slice(None)
    problem.targets.clamp_(max=len(values[rows]) - 1)[0] = -1
    inputs = problem.x, problem.w, problem.targets, problem.scale
    given = replace(options, exponents=exponent).flat()
    *results, cache, moments = ops.lmcl(*inputs, 0.25, backend.name, *given)
    double = problem.x.double(), values[rows], problem.targets, problem.scale.double()
    want = reference.forward(*double, 0.25, replace(options, classes=None))
    allowed = 2e-5 + 2 * backend.rounding(Dtypes(dtype, FLOAT8))
    for got, exact in zip(results, want, strict=True):
        assert relative_error(got, exact) < allowed
    if options.moments:
        exact = reference.moments(*double, *want[1:3], options)
        assert relative_error(moments, exact) < allowed

    g = torch.linspace(-1, 1, N, device=backend.device)
    upstream = results[1], results[2], g, g.flip(0) / 4
    want_dx, dw, want_dscale = reference.backward(
        *double, *(each.double() for each in upstream), options=replace(options, classes=None)
    )
    momentum, moved = torch.zeros_like(problem.w, dtype=torch.float32), problem.w.clone()
    update = Update("sgd", 3, 5, 1.0, math.inf, 0.5, 0.0, momentum=0.9)
    dx, dscale = ops.lmcl_backward_update_(
        problem.x, moved, *inputs[2:], *upstream, cache, [momentum, exponent], None, *update.flat(), True,
        backend.name, *given,
    )  # fmt: skip
    allowed += options.gradient_tolerance * 100
    assert relative_error(dx, want_dx) < allowed
    assert relative_error(dscale, want_dscale) < allowed
    assert relative_error(momentum[rows], dw) < allowed
    off = (float8.values(moved, exponent, torch.float64)[rows] - (values[rows] - 0.5 * momentum[rows])).abs()
    unit = float8.units(exponent[rows], torch.float64)
    assert bool((off <= (values[rows] - 0.5 * momentum[rows]).abs() / 8 + 2.0**-9 * unit).all())


@DTYPES
@pytest.mark.parametrize("shift", [-60, 60])
def test_no_length_is_lost(backend, dtype, shift):
    """2^k times the rows with 2^-k times the scale: the same loss, and gradients of x that differ by 2^k."""
    problem, _, exponent = _draw(backend, dtype)
    exponent.clamp_(min=-12)
    results = []
    for k in (0, shift):
        scale = problem.scale * 2.0**-k
        given = Options(cache_bytes=0, normalize_weight=False, exponents=(exponent + k).to(torch.int8)).flat()
        inputs = problem.x, problem.w, problem.targets, scale
        loss, top, log_sum, *_, cache, _ = ops.lmcl(*inputs, 0.0, backend.name, *given)
        upstream = top, log_sum, torch.ones_like(loss), -scale
        dx, _, dscale = ops.lmcl_backward(*inputs, *upstream, cache, True, False, backend.name, *given)
        results.append((loss, dx, dscale * 2.0**-k))
    for got, want in zip(*results, strict=True):
        assert bool(want.any())
        assert relative_error(got, want) < 1e-6


@DTYPES
@pytest.mark.parametrize("samples", [0, 3])
def test_the_gradient_of_x_has_its_dtype_whatever_is_multiplied(backend, dtype, samples):
    problem, _, exponent = _draw(backend, dtype)
    given = Options(cache_bytes=0, normalize_weight=False, exponents=exponent).flat()
    inputs = problem.x[:samples], problem.w, problem.targets[:samples], problem.scale[:samples]
    _, top, log_sum, *_, cache, _ = ops.lmcl(*inputs, 0.25, backend.name, *given)
    g = torch.ones_like(top)
    dx, *_ = ops.lmcl_backward(*inputs, top, log_sum, g, -g, cache, True, False, backend.name, *given)
    assert dx.dtype == dtype
    assert dx.shape == inputs[0].shape


def test_nearest_are_those_of_what_the_rows_stand_for(backend):
    problem, values, exponent = _draw(backend, torch.float32)
    for got, want in zip(
        ops.nearest(problem.x, problem.w, 7, False, backend.name, exponent),
        ops.nearest(problem.x, values.float(), 7, False, backend.name),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("std", [0.01, 512**-0.5, 0.25, 0.3, 1.0, 1.0001, 32.0, 64.0, 65.0, 2.0**20])
def test_new_rows_are_in_the_upper_half_of_the_range(std):
    assert float8.INITIAL_STD / 2 < std / 2.0 ** float8.initial_exponent(std) <= float8.INITIAL_STD


@pytest.mark.parametrize("largest", [1e-3, 1.0, 223.9, 224.0, 224.1, 447.9, 448.0, 448.1, 896.0, 1e9])
def test_the_largest_of_a_row_is_in_the_upper_half_of_the_format(largest):
    exponent = float8.exponents_for(torch.tensor([largest]), torch.zeros(1, dtype=torch.int8))
    assert float8.LARGEST / 2 < largest / 2.0 ** int(exponent) <= float8.LARGEST
