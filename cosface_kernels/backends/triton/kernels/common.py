"""What the Triton kernels of several stages share."""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)  # smallest norm that is divided by, as in F.normalize
# G / unit is at most 1: 2^12 lifts probabilities down to 1.5e-8 out of float16's subnormal range. Likewise the
# normalised embeddings, by 2^8; both leave room below 65504.
G_LIFT = tl.constexpr(4096.0)
X_LIFT = tl.constexpr(256.0)
COSINE_STEP = tl.constexpr(1 / 32767)  # of the cosines that forward keeps for backward, in 16 bits

FROM_BIAS = tl.constexpr(2.0**120)  # of float8's exponents to float32's, 127 - 7; to float16's it is 2^8

LOG2_E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-30)


@triton.jit
def _offsets(rows, columns, row_length):
    """Of a contiguous matrix."""
    return rows[:, None].to(tl.int64) * row_length + columns[None, :].to(tl.int64)


@triton.jit
def _upcast(tile, TO: tl.constexpr):
    """What was loaded of w or of a state, TO a dtype that computes; exactly where these are bytes of float8.

    float8_e4m3fn has the fields of any other, but its exponents count from -7, theirs from -15 or -127. The
    largest byte of either sign is nan. By integers, as no GPU before Hopper knows the dtype.
    """
    if tile.dtype == tl.int8:
        if TO.is_fp16():
            tile = ((tile.to(tl.int16) << 7) & -0x4080).to(TO, bitcast=True) * 256.0
        elif TO.is_bf16():
            tile = ((tile.to(tl.int16) << 4) & -0x7810).to(TO, bitcast=True) * FROM_BIAS
        else:
            tile = ((tile.to(tl.int32) << 20) & -0x78100000).to(TO, bitcast=True) * FROM_BIAS
        tile = tl.where(tl.abs(tile) > 448.0, float("nan"), tile)
    return tile.to(TO)


@triton.jit
def _weight_rows(chosen, classes, is_class, CHOSEN: tl.constexpr):
    """Where these classes are in w."""
    return tl.load(chosen + classes, mask=is_class, other=0) if CHOSEN else classes


@triton.jit
def _norms(
    x,
    rows,
    is_row,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr = tl.float32,
):
    """|x_i| of a block of rows, rounded to operands."""
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = tl.load(x + _offsets(rows, d, D), mask=is_row[:, None] & (d < D)[None, :], other=0.0)
        tile = _upcast(tile, OPERAND).to(tl.float32)
        squares += tl.sum(tile * tile, 1)
    return tl.sqrt(squares)


@triton.jit
def _dot_tile(
    x,
    w,
    rows,
    w_rows,
    is_row,
    is_class,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<x_i, w_j> (BLOCK_N, BLOCK_C).

    The product is the one user of its tiles: of a tile that something else reads too (a norm, say), Triton's
    pipeliner keeps one copy too few, and a load overwrites what a pending product of Hopper still reads.
    """
    dot = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        is_d = (d < D)[None, :]
        x_tile = tl.load(x + _offsets(rows, d, D), mask=is_row[:, None] & is_d, other=0.0)
        w_tile = tl.load(w + _offsets(w_rows, d, D), mask=is_class[:, None] & is_d, other=0.0)
        dot = tl.dot(x_tile.to(OPERAND), tl.trans(_upcast(w_tile, OPERAND)), dot, input_precision=PRECISION)
    return dot


@triton.jit
def _class_factor(w_norm, classes, is_class, NORMALIZE: tl.constexpr):
    """1 / |w_j| of a block of classes; without NORMALIZE 1, or 2^e_j where w_norm has exponents of float8."""
    if NORMALIZE:
        return 1 / tl.maximum(tl.load(w_norm + classes, mask=is_class, other=1.0), EPS)
    elif w_norm.dtype.element_ty == tl.int8:
        exponent = tl.load(w_norm + classes, mask=is_class, other=0).to(tl.int32)
        return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    else:
        return tl.full(classes.shape, 1.0, tl.float32)


@triton.jit
def _target_cos(
    x,
    w,
    chosen,
    w_norm,
    x_norm,
    target,
    rows,
    is_row,
    C,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """cos of each row with its target, 0 where it has none; operands rounded as for the product."""
    has_target = is_row & (target >= 0) & (target < C)
    w_rows = _weight_rows(chosen, target, has_target, CHOSEN)
    # Before the loop, whose registers then need not hold what it is made of.
    factor = 1 / tl.maximum(tl.load(x_norm + rows, mask=is_row, other=1.0), EPS)
    factor *= _class_factor(w_norm, target, has_target, NORMALIZE)
    dot = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        is_d = (d < D)[None, :]
        x_tile = tl.load(x + _offsets(rows, d, D), mask=is_row[:, None] & is_d, other=0.0)
        w_tile = tl.load(w + _offsets(w_rows, d, D), mask=has_target[:, None] & is_d, other=0.0)
        dot += tl.sum(x_tile.to(OPERAND).to(tl.float32) * _upcast(w_tile, OPERAND).to(tl.float32), 1)
    return tl.where(has_target, dot * factor, 0.0)


@triton.jit
def _reshape(cos, thresholds, negatives, rows, is_row, SLOPES: tl.constexpr):
    """N(c) = (q c + a) c + b where c > tau_i, else c, or r c with SLOPES; N'(c) without; and where c > tau_i."""
    tau = tl.load(thresholds + rows, mask=is_row, other=float("inf"))
    q, a, b = tl.load(negatives), tl.load(negatives + 1), tl.load(negatives + 2)
    hard = cos > tau[:, None]
    low = tl.load(negatives + 3) * cos if SLOPES else cos
    return tl.where(hard, (q * cos + a) * cos + b, low), tl.where(hard, 2 * q * cos + a, 1.0), hard


@triton.jit
def _slopes(cos, thresholds, negatives, rows, is_row):
    """u c + v where c > tau_i, else r. To be called where they are used: fewer registers wait."""
    tau = tl.load(thresholds + rows, mask=is_row, other=float("inf"))
    r, u, v = tl.load(negatives + 3), tl.load(negatives + 4), tl.load(negatives + 5)
    return tl.where(cos > tau[:, None], u * cos + v, r)


@triton.jit
def _finite(running_max):
    """The running maximum to subtract: 0 while there is none, because -inf - -inf would be nan."""
    return tl.where(running_max == -float("inf"), 0.0, running_max)


@triton.jit
def _factor(s):
    """e^{s c} = 2^{factor c}; not 0, which would turn a masked -inf to nan."""
    return tl.where(s == 0.0, TINY, s * LOG2_E)


@triton.jit
def _shrink(factor, old_max, new_max):
    """Factor of a sum of 2^{factor (c - max)} when its maximum grows; a sum over nothing stays, be it 0 or nan."""
    return tl.exp2(factor * tl.where(old_max == -float("inf"), 0.0, old_max - new_max))


@triton.jit
def _lower(below, sum_exp, factor, old_max, new_max):
    """A sum of 2^{factor (c - max)} (max - c), that of 2^{factor (c - max)} beside it, when the maximum grows."""
    rise = tl.where(old_max == -float("inf"), 0.0, new_max - old_max)
    return (below + sum_exp * rise) * _shrink(factor, old_max, new_max)


@triton.jit
def _second(values, rows, is_row, N, other):
    """Of the second row of values, (2, N)."""
    return tl.load(values + (rows.to(tl.int64) + N), mask=is_row, other=other)


@triton.jit
def _is_active(g_lse, g_cos):
    """Rows without gradient take no part, even if their embedding is not finite."""
    return (g_lse != 0.0) | (g_cos != 0.0)


@triton.jit
def _has_more(rows, is_row, g_cos, g_moments, N):
    """Whether a row has a gradient of its second target's cosine or of its moments."""
    row_b = tl.load(g_moments + rows, mask=is_row, other=0.0)
    row_c = _second(g_moments, rows, is_row, N, 0.0)
    return _is_active(row_b, row_c) | (_second(g_cos, rows, is_row, N, 0.0) != 0.0)
