"""What backward's Triton kernel of the logits' gradients makes of a tile whose classes count each on its own."""

import triton
import triton.language as tl

from cosface_kernels.backends.triton.kernels.common import LOG2_E


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1]: 2 artanh t of t = e / (2 + e) <= 1/3, whose series is cut off at 1e-8 of it."""
    t = e * (1 / (2.0 + e))
    t2 = t * t
    q = t2 * (1 / 13) + 1 / 11
    q = q * t2 + 1 / 9
    q = q * t2 + 1 / 7
    q = q * t2 + 1 / 5
    q = q * t2 + 1 / 3
    q = q * t2 + 1.0
    return 2.0 * t * q


@triton.jit
def _arccos(c):
    """arccos c, of c beyond 1 and -1 that of these.

    arcsin r = r + r^3 q(r^2) for r <= 1/2, with the coefficients of Cephes' asinf; beyond, arccos |c| =
    2 arcsin sqrt((1 - |c|) / 2).
    """
    clamped = tl.where(c > 1.0, 1.0, tl.where(c < -1.0, -1.0, c))  # so that nan passes
    size = tl.abs(clamped)
    is_near = size > 0.5
    square = tl.where(is_near, 0.5 - 0.5 * size, size * size)
    root = tl.where(is_near, tl.sqrt(square), size)
    q = square * 4.2163199048e-2 + 2.4181311049e-2
    q = q * square + 4.5470025998e-2
    q = q * square + 7.4953002686e-2
    q = q * square + 1.6666752422e-1
    arcsin = root + root * square * q
    of_size = tl.where(is_near, 2.0 * arcsin, 1.57079633 - arcsin)
    return tl.where(clamped < 0.0, 3.14159265 - of_size, of_size)


@triton.jit
def _polynomial(coefficients, c):
    """By its coefficients of 1, c, c^2, c^3 and c^4."""
    value = tl.load(coefficients + 4) * c + tl.load(coefficients + 3)
    value = value * c + tl.load(coefficients + 2)
    value = value * c + tl.load(coefficients + 1)
    return value * c + tl.load(coefficients)


@triton.jit
def _add(slots, values, is_row):
    tl.store(slots, tl.load(slots, mask=is_row, other=0.0) + values, mask=is_row)


@triton.jit
def _sigmoid_gradients(
    cos,
    is_negative,
    s,
    row_log_sum,
    row_g,
    polynomials,
    negative_dot,
    scale_dot,
    sums,
    rows,
    is_row,
    tile,
    N,
    ANGLE: tl.constexpr,
):
    """G_ij = s g p N'(cos) of the negatives, 0 elsewhere; N and N' by the polynomials, (2, 5).

    p = 1 / (1 + e^-z) with z = s N(cos) - log_sum; with ANGLE N(cos) = -arccos(cos), and G_ij = g p.
    negative_dot, scale_dot: (class tiles, N), += sum G_ij cos_ij, and sum g p N(cos), which ANGLE leaves alone.
    sums: (class tiles, 2, N), += sum log(1 + e^z), with ANGLE sum p cos, and sum p.
    """
    slots = tile.to(tl.int64) * N + rows
    sum_slots = slots + tile.to(tl.int64) * N  # two for each row
    shaped = -_arccos(cos) if ANGLE else _polynomial(polynomials, cos)
    # Of a class that is not there p would not be 0 by itself.
    z = tl.where(is_negative, s[:, None] * shaped - row_log_sum[:, None], -float("inf"))
    e = tl.exp2(tl.abs(z) * -LOG2_E)
    # Each sum before what follows from its terms, as in logit_gradients.
    if not ANGLE:
        _add(sums + sum_slots, tl.sum(tl.maximum(z, 0.0) + _log1p(e), 1), is_row)
    inverse = 1 / (1.0 + e)  # the quotient of two tiles takes 60 registers more on sm_100, and spills
    p = tl.where(z > 0.0, inverse, e * inverse)
    _add(sums + (sum_slots + N), tl.sum(p, 1), is_row)
    if ANGLE:
        gradient = row_g[:, None] * p
        _add(sums + sum_slots, tl.sum(p * cos, 1), is_row)
    else:
        _add(scale_dot + slots, row_g * tl.sum(p * shaped, 1), is_row)
        gradient = (s * row_g)[:, None] * p * _polynomial(polynomials + 5, cos)
    _add(negative_dot + slots, tl.sum(gradient * cos, 1), is_row)
    return gradient
