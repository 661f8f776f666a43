"""The Triton kernels that move rows of which more must be known before a number is stored than that number.

A row in float8, of the weight or a state, is 2^e times what is stored, and its largest decides on e; a weight_norm
asks for the length. So a block of a row is computed twice: first for these, then to be stored. The kernels of
`update` do not call the rules here, because that takes AdamW more registers.
"""

import triton
import triton.language as tl

from cosface_kernels.backends.triton.kernels.common import EPS, _offsets, _upcast, _weight_rows
from cosface_kernels.backends.triton.kernels.update import _noise, _row_factor, _store_moved

SMALLEST = tl.constexpr(2.0**-9)  # step of float8, up to its smallest normal number
LARGEST_BITS, NORMAL_BITS = tl.constexpr(0x43E00000), tl.constexpr(0x3C800000)  # 448 and 2^-6 in float32
LARGEST_EXPONENT = tl.constexpr(118)  # rows then are within the range of float32


@triton.jit
def _exponent(tensor, exponents, rows, is_class):
    """e of rows in float8, which are 2^e times what is stored; 0 of others."""
    if tensor.dtype.element_ty == tl.int8:
        return tl.load(exponents + rows, mask=is_class, other=0).to(tl.int32)
    return tl.zeros(rows.shape, tl.int32)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _held(tensor, exponent, mask, ROOTS: tl.constexpr = False):
    """A block of w or of a state; float8 has the ROOTS of AdamW's squares, which have twice a gradient's range."""
    held = _upcast(tl.load(tensor, mask=mask, other=0.0), tl.float32)
    if tensor.dtype.element_ty == tl.int8:
        held *= _power_of_two(exponent)[:, None]
        if ROOTS:
            held *= held
    return held


@triton.jit
def _larger(largest, v):
    """The largest magnitude of each row, nan aside, with a block of it more."""
    return tl.maximum(largest, tl.max(tl.where(v == v, tl.abs(v), 0.0), 1))


@triton.jit
def _next_exponent(tensor, exponents, rows, is_class, largest, exponent):
    """The one that puts the row's largest in (224, 448]; as it was of zeros, and of what is not finite."""
    if tensor.dtype.element_ty == tl.int8:
        # 448 = 1.75 2^8: what is above 1.75 times a power of two belongs to the next one.
        bits = largest.to(tl.int32, bitcast=True)
        after = ((bits + 0x1FFFFF) >> 23) - (127 + 8)
        after = tl.minimum(tl.maximum(after, -LARGEST_EXPONENT), LARGEST_EXPONENT)
        exponent = tl.where((largest > 0.0) & (largest < float("inf")), after, exponent)
        tl.store(exponents + rows, exponent.to(tl.int8), mask=is_class)
    return exponent


@triton.jit
def _to_float8(v, noise):
    """Its byte, of |v| <= 448, up or down by 16 random bits, so that the expected value is kept; else nan.

    Bit for bit as `round_to_float8` in csrc/philox.h.
    """
    bits = v.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    is_normal = magnitude >= NORMAL_BITS
    normal = ((magnitude + (noise << 4) + 8) >> 20) - (120 << 3)
    steps = tl.where(is_normal, 0.0, tl.abs(v)) * (65536.0 / SMALLEST)
    byte = tl.where(is_normal, normal, (steps.to(tl.int32) + noise) >> 16)
    byte = tl.where(magnitude > LARGEST_BITS, 0x7F, byte)
    return (byte | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def _store(to, v, noise, mask, largest, exponent, ROOTS: tl.constexpr = False):
    """v, rounded by the lower 16 bits of the noise; no root of a row that has one becomes 0: it would leap."""
    if to.dtype.element_ty == tl.int8:
        v = tl.sqrt_rn(v) if ROOTS else v
        # Were it rounded otherwise than for the largest, that one could pass 448.
        v = tl.maximum(v, -largest[:, None], propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, largest[:, None], propagate_nan=tl.PropagateNan.ALL)
        v *= _power_of_two(-exponent)[:, None]
        if ROOTS:
            least = tl.where(largest > 0.0, SMALLEST, 0.0)
            v = tl.maximum(v, least[:, None], propagate_nan=tl.PropagateNan.ALL)
        tl.store(to, _to_float8(v, (noise & 0xFFFF).to(tl.int32)), mask=mask)
    else:
        _store_moved(to, v, noise, mask)


@triton.jit
def _to_length(squares, weight_norm, NORM: tl.constexpr):
    """What gives rows with these sums of squares the length that is asked for; 1 if NORM does not ask."""
    if NORM:
        return weight_norm / tl.maximum(tl.sqrt(squares), EPS)
    return tl.full(squares.shape, 1.0, tl.float32)


@triton.jit
def _sgd(
    dw, w, momentum_buffer, mask, w_e, b_e, factor, lr, weight_decay, momentum, fresh, of_gradient, of_momentum,
    MOMENTUM: tl.constexpr,
):  # fmt: skip
    """A block of w and of its momentum as they will be."""
    v = _held(w, w_e, mask)
    g = tl.load(dw, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
    g += weight_decay * v
    b = g
    if MOMENTUM:
        b = momentum * _held(momentum_buffer, b_e, mask) + fresh * g
        g = of_gradient * g + of_momentum * b
    return v - lr * g, b


@triton.jit(do_not_specialize=["C", "seed", "step"])
def sgd_whole_rows(
    dw,
    w,
    momentum_buffer,
    w_exponents,
    momentum_buffer_exponents,
    chosen,
    finite,
    C,
    first_class,
    chunk,
    seed,
    step,
    gradient_factor,
    max_row_norm,
    weight_norm,
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
    NORM: tl.constexpr,
):
    """Rows of w and of their momentum, moved in place by dw (chunk, D); a program owns whole rows.

    w -= lr (of_gradient g + of_momentum b) with b = momentum b + fresh g, where there is momentum.
    """
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if MAY_STAY:
        C *= tl.load(finite).to(tl.int32)
    is_class = (columns < chunk) & (first_class + columns < C)
    rows = _weight_rows(chosen, first_class + columns, is_class, CHOSEN)
    w_e = _exponent(w, w_exponents, rows, is_class)
    b_e = _exponent(momentum_buffer, momentum_buffer_exponents, rows, is_class)
    gradient_factor *= _power_of_two(-w_e)  # dw is the gradient of what is stored
    factor = _row_factor(dw, columns, is_class, gradient_factor, max_row_norm, D, BLOCK_C, BLOCK_D, CLIP)
    largest_w = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    largest_b = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = is_class[:, None] & (d < D)[None, :]
        place = _offsets(rows, d, D)
        v, b = _sgd(
            dw + _offsets(columns, d, D), w + place, momentum_buffer + place, mask, w_e, b_e, factor, lr,
            weight_decay, momentum, fresh, of_gradient, of_momentum, MOMENTUM,
        )  # fmt: skip
        largest_w, largest_b = _larger(largest_w, v), _larger(largest_b, b)
        if NORM:
            squares += tl.sum(v * v, 1)
    to_length = _to_length(squares, weight_norm, NORM)
    largest_w *= to_length
    tl.debug_barrier()  # every warp has read the exponents
    next_w_e = _next_exponent(w, w_exponents, rows, is_class, largest_w, w_e)
    if MOMENTUM:
        next_b_e = _next_exponent(momentum_buffer, momentum_buffer_exponents, rows, is_class, largest_b, b_e)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = is_class[:, None] & (d < D)[None, :]
        place = _offsets(rows, d, D)
        noise = _noise(seed, step, 0, rows, first, D, BLOCK_C, BLOCK_D)
        v, b = _sgd(
            dw + _offsets(columns, d, D), w + place, momentum_buffer + place, mask, w_e, b_e, factor, lr,
            weight_decay, momentum, fresh, of_gradient, of_momentum, MOMENTUM,
        )  # fmt: skip
        if MOMENTUM:
            _store(momentum_buffer + place, b, noise >> 16, mask, largest_b, next_b_e)
        _store(w + place, v * to_length[:, None], noise, mask, largest_w, next_w_e)


@triton.jit
def _adamw(
    dw, w, exp_avg, exp_avg_sq, max_exp_avg_sq, mask, w_e, m_e, q_e, p_e, factor, step_size, kept, fresh1, beta2,
    fresh2, root_correction, eps, AMSGRAD: tl.constexpr,
):  # fmt: skip
    """A block of w, of its running means m and q, and of the largest q so far with AMSGRAD, as they will be."""
    v = _held(w, w_e, mask)
    g = tl.load(dw, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
    m = _held(exp_avg, m_e, mask)
    m += fresh1 * (g - m)
    q = beta2 * _held(exp_avg_sq, q_e, mask, True) + fresh2 * g * g
    p = q
    if AMSGRAD:
        p = tl.maximum(q, _held(max_exp_avg_sq, p_e, mask, True), propagate_nan=tl.PropagateNan.ALL)
    return kept * v - step_size * m / (tl.sqrt_rn(p) / root_correction + eps), m, q, p


@triton.jit(do_not_specialize=["C", "seed", "step"])
def adamw_whole_rows(
    dw,
    w,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    w_exponents,
    exp_avg_exponents,
    exp_avg_sq_exponents,
    max_exp_avg_sq_exponents,
    chosen,
    finite,
    C,
    first_class,
    chunk,
    seed,
    step,
    gradient_factor,
    max_row_norm,
    weight_norm,
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
    NORM: tl.constexpr,
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
    w_e = _exponent(w, w_exponents, rows, is_class)
    m_e = _exponent(exp_avg, exp_avg_exponents, rows, is_class)
    q_e = _exponent(exp_avg_sq, exp_avg_sq_exponents, rows, is_class)
    p_e = _exponent(max_exp_avg_sq, max_exp_avg_sq_exponents, rows, is_class)
    gradient_factor *= _power_of_two(-w_e)  # dw is the gradient of what is stored
    factor = _row_factor(dw, columns, is_class, gradient_factor, max_row_norm, D, BLOCK_C, BLOCK_D, CLIP)
    largest_w = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    largest_m = tl.zeros((BLOCK_C,), tl.float32)
    largest_q = tl.zeros((BLOCK_C,), tl.float32)
    largest_p = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = is_class[:, None] & (d < D)[None, :]
        place = _offsets(rows, d, D)
        v, m, q, p = _adamw(
            dw + _offsets(columns, d, D), w + place, exp_avg + place, exp_avg_sq + place,
            max_exp_avg_sq + place, mask, w_e, m_e, q_e, p_e, factor, step_size, kept, fresh1, beta2, fresh2,
            root_correction, eps, AMSGRAD,
        )  # fmt: skip
        largest_w, largest_m = _larger(largest_w, v), _larger(largest_m, m)
        largest_q, largest_p = _larger(largest_q, q), _larger(largest_p, p)
        if NORM:
            squares += tl.sum(v * v, 1)
    to_length = _to_length(squares, weight_norm, NORM)
    largest_w *= to_length
    largest_q, largest_p = tl.sqrt_rn(largest_q), tl.sqrt_rn(largest_p)
    tl.debug_barrier()  # every warp has read the exponents
    next_w_e = _next_exponent(w, w_exponents, rows, is_class, largest_w, w_e)
    next_m_e = _next_exponent(exp_avg, exp_avg_exponents, rows, is_class, largest_m, m_e)
    next_q_e = _next_exponent(exp_avg_sq, exp_avg_sq_exponents, rows, is_class, largest_q, q_e)
    if AMSGRAD:
        next_p_e = _next_exponent(max_exp_avg_sq, max_exp_avg_sq_exponents, rows, is_class, largest_p, p_e)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = is_class[:, None] & (d < D)[None, :]
        place = _offsets(rows, d, D)
        noise = _noise(seed, step, 0, rows, first, D, BLOCK_C, BLOCK_D)
        more_noise = _noise(seed, step, 1, rows, first, D, BLOCK_C, BLOCK_D)
        v, m, q, p = _adamw(
            dw + _offsets(columns, d, D), w + place, exp_avg + place, exp_avg_sq + place,
            max_exp_avg_sq + place, mask, w_e, m_e, q_e, p_e, factor, step_size, kept, fresh1, beta2, fresh2,
            root_correction, eps, AMSGRAD,
        )  # fmt: skip
        _store(exp_avg + place, m, noise >> 16, mask, largest_m, next_m_e)
        _store(exp_avg_sq + place, q, more_noise, mask, largest_q, next_q_e, True)
        if AMSGRAD:
            _store(max_exp_avg_sq + place, p, more_noise >> 16, mask, largest_p, next_p_e, True)
        _store(w + place, v * to_length[:, None], noise, mask, largest_w, next_w_e)
