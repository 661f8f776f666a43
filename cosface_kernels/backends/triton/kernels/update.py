"""The Triton kernels that move rows of the weight, and of an optimizer's state."""

import triton
import triton.language as tl

from cosface_kernels.backends.triton.kernels.common import (
    _norms,
    _offsets,
    _weight_rows,
)


@triton.jit
def _row_factor(
    dw,
    columns,
    is_class,
    gradient_factor,
    max_row_norm,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLIP: tl.constexpr,
):
    """What each row of the gradient is multiplied by, (BLOCK_C,)."""
    factor = tl.zeros((BLOCK_C,), tl.float32) + gradient_factor
    if CLIP:
        norm = tl.abs(gradient_factor) * _norms(dw, columns, is_class, D, BLOCK_C, BLOCK_D)
        factor *= tl.where(norm > max_row_norm, max_row_norm / norm, 1.0)
    return factor


@triton.jit
def _noise(
    seed, step, stream: tl.constexpr, rows, first, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):
    """32 random bits for each element (row, first + k), (BLOCK_C, BLOCK_D), that depend on its place alone.

    Philox4x32-10 makes 128 bits at a time, which four neighbours share: ten rounds for each element would be most
    of the arithmetic of a step.
    """
    group = _offsets(rows, first // 4 + tl.arange(0, BLOCK_D // 4), (D + 3) // 4)
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, low * 0 + step, low * 0 + stream)
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_C, BLOCK_D))


@triton.jit
def _store_moved(to, v, noise, mask):
    """v, rounded to bfloat16 up or down by the lower 16 bits of the noise, so that the expected value is kept."""
    if to.dtype.element_ty == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True) + (noise & 0xFFFF).to(tl.int32)
        v = tl.where(v == v, (bits & -0x10000).to(tl.float32, bitcast=True), v)
    tl.store(to, v.to(to.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["C", "seed", "step"])
def sgd_rows(
    dw,
    w,
    momentum_buffer,
    chosen,
    finite,
    C,
    first_class,
    chunk,
    seed,
    step,
    gradient_factor,
    max_row_norm,
    lr,
    weight_decay,
    momentum,
    fresh,
    of_gradient,
    of_momentum,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLIP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    CHOSEN: tl.constexpr,
    MAY_STAY: tl.constexpr,
):
    """Rows of w and of their momentum, moved in place by dw (chunk, D); a program owns whole rows.

    w -= lr (of_gradient g + of_momentum b) with b = momentum b + fresh g, where there is momentum.
    """
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if MAY_STAY:
        C *= tl.load(finite).to(tl.int32)
    is_class = (columns < chunk) & (first_class + columns < C)
    rows = _weight_rows(chosen, first_class + columns, is_class, CHOSEN)
    factor = _row_factor(dw, columns, is_class, gradient_factor, max_row_norm, D, BLOCK_C, BLOCK_D, CLIP)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = is_class[:, None] & (d < D)[None, :]
        place = _offsets(rows, d, D)
        noise = _noise(seed, step, 0, rows, first, D, BLOCK_C, BLOCK_D)
        v = tl.load(w + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dw + _offsets(columns, d, D), mask=mask, other=0.0).to(tl.float32) * factor[:, None]
        g += weight_decay * v
        if MOMENTUM:
            b = momentum * tl.load(momentum_buffer + place, mask=mask, other=0.0).to(tl.float32) + fresh * g
            _store_moved(momentum_buffer + place, b, noise >> 16, mask)
            g = of_gradient * g + of_momentum * b
        _store_moved(w + place, v - lr * g, noise, mask)


@triton.jit(do_not_specialize=["C", "seed", "step"])
def adamw_rows(
    dw,
    w,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    chosen,
    finite,
    C,
    first_class,
    chunk,
    seed,
    step,
    gradient_factor,
    max_row_norm,
    step_size,
    kept,
    fresh1,
    beta2,
    fresh2,
    root_correction,
    eps,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLIP: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CHOSEN: tl.constexpr,
    MAY_STAY: tl.constexpr,
):
    """Rows of w and of their running means, moved in place by dw (chunk, D); a program owns whole rows.

    w = kept w - step_size m / (sqrt(q) / root_correction + eps) with m += fresh1 (g - m) and
    q = beta2 q + fresh2 g^2, with AMSGRAD the largest q so far.
    """
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if MAY_STAY:
        C *= tl.load(finite).to(tl.int32)
    is_class = (columns < chunk) & (first_class + columns < C)
    rows = _weight_rows(chosen, first_class + columns, is_class, CHOSEN)
    factor = _row_factor(dw, columns, is_class, gradient_factor, max_row_norm, D, BLOCK_C, BLOCK_D, CLIP)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = is_class[:, None] & (d < D)[None, :]
        place = _offsets(rows, d, D)
        noise = _noise(seed, step, 0, rows, first, D, BLOCK_C, BLOCK_D)
        more_noise = _noise(seed, step, 1, rows, first, D, BLOCK_C, BLOCK_D)
        v = tl.load(w + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dw + _offsets(columns, d, D), mask=mask, other=0.0).to(tl.float32) * factor[:, None]
        m = tl.load(exp_avg + place, mask=mask, other=0.0).to(tl.float32)
        m += fresh1 * (g - m)
        q = beta2 * tl.load(exp_avg_sq + place, mask=mask, other=0.0).to(tl.float32) + fresh2 * g * g
        _store_moved(exp_avg + place, m, noise >> 16, mask)
        _store_moved(exp_avg_sq + place, q, more_noise, mask)
        if AMSGRAD:
            largest = tl.load(max_exp_avg_sq + place, mask=mask, other=0.0).to(tl.float32)
            q = tl.maximum(q, largest, propagate_nan=tl.PropagateNan.ALL)
            _store_moved(max_exp_avg_sq + place, q, more_noise >> 16, mask)
        _store_moved(w + place, kept * v - step_size * m / (tl.sqrt_rn(q) / root_correction + eps), noise, mask)
