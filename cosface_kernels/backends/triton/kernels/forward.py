"""The Triton kernels of forward: norms, and statistics of each row over the classes."""

import triton
import triton.language as tl

from cosface_kernels.backends.triton.kernels.common import (
    COSINE_STEP,
    EPS,
    LOG2_E,
    _dot_tile,
    _factor,
    _finite,
    _inverse_norm,
    _norms,
    _offsets,
    _reshape,
    _shrink,
    _target_cos,
    _weight_rows,
)


@triton.jit(do_not_specialize=["count"])
def row_norms(
    matrix,
    chosen,
    norms,
    count,
    row_stride,
    column_stride,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """norms (count,) of the rows of x or w, rounded to operands as the products see them.

    Once for both passes: a sum in another order would round the cosines differently.
    """
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row = rows < count
    places = _weight_rows(chosen, rows, is_row, CHOSEN)
    norm = _norms(matrix, places, is_row, row_stride, column_stride, D, BLOCK_C, BLOCK_D, OPERAND)
    tl.store(norms + rows, norm, mask=is_row)


@triton.jit(do_not_specialize=["N", "C", "tiles_per_split"])
def class_statistics(
    x,
    w,
    chosen,
    w_norm,
    x_norm,
    targets,
    scale,
    thresholds,
    negatives,
    top,
    max_cos,
    sum_exp,
    cosines,
    N,
    C,
    kept,
    x_row_stride,
    x_column_stride,
    tiles_per_split,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RESHAPE: tl.constexpr,
    CHOSEN: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Of one split of the classes, for each row: max N(cos) and sum e^{z - s max} over the negatives, and max cos.

    Grid (row blocks, splits): the row blocks of a split run side by side and share its class rows in L2.
    w_norm: (C,); not read without NORMALIZE.
    top, max_cos, sum_exp: (splits, N); without RESHAPE, N(c) = c, and max_cos is not written.
    cosines: (N, kept) int16, of the first classes, written with KEEP.
    """
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    target = tl.load(targets + rows, mask=is_row, other=-1).to(tl.int32)
    x_inverse = 1 / tl.maximum(tl.load(x_norm + rows, mask=is_row, other=1.0), EPS)
    factor = _factor(tl.load(scale + rows, mask=is_row, other=0.0))

    running_max = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    running_cos = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(C, BLOCK_C))
    for tile in range(split * tiles_per_split, last_tile):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        is_class = classes < C
        dot = _dot_tile(
            x,
            w,
            rows,
            _weight_rows(chosen, classes, is_class, CHOSEN),
            is_row,
            is_class,
            x_row_stride,
            x_column_stride,
            D,
            BLOCK_N,
            BLOCK_C,
            BLOCK_D,
            OPERAND,
            PRECISION,
        )
        w_inverse = _inverse_norm(w_norm, classes, is_class, NORMALIZE)
        is_negative = is_class[None, :] & (classes[None, :] != target[:, None])
        cos = dot * x_inverse[:, None] * w_inverse[None, :]
        if KEEP:
            in_steps = tl.floor(cos * (1 / COSINE_STEP) + 0.5).to(tl.int16)
            mask = is_row[:, None] & (classes < kept)[None, :]
            tl.store(cosines + _offsets(rows, classes, kept, 1), in_steps, mask=mask)
        # Rounded as in logit_gradients; the choice keeps the product out of an fma with what is subtracted.
        cos = tl.where(is_negative, cos, -float("inf"))
        if RESHAPE:
            running_cos = tl.maximum(running_cos, tl.max(cos, 1))
            cos, _ = _reshape(cos, thresholds, negatives, rows, is_row)
        new_max = tl.maximum(running_max, tl.max(cos, 1))
        base = _finite(new_max)
        terms = tl.exp2(factor[:, None] * (cos - base[:, None]))
        running_sum = running_sum * _shrink(factor, running_max, base) + tl.sum(terms, 1)
        running_max = new_max

    slots = split.to(tl.int64) * N + rows
    tl.store(top + slots, running_max, mask=is_row)
    if RESHAPE:
        tl.store(max_cos + slots, running_cos, mask=is_row)
    tl.store(sum_exp + slots, running_sum, mask=is_row)


@triton.jit
def _log1p(y):
    """log(1 + y) for y in [0, 1], right to rounding also where 1 + y rounds to 1 (Kahan's correction)."""
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["N", "C", "splits"])
def merge_statistics(
    top,
    max_cos,
    sum_exp,
    x,
    w,
    chosen,
    x_norm,
    targets,
    scale,
    loss,
    row_top,
    log_sum,
    target_cos,
    max_neg,
    N,
    C,
    splits,
    margin,
    x_row_stride,
    x_column_stride,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RESHAPE: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """The splits' statistics in order, then LMCL: loss, row_top, log_sum, target_cos and max_neg, each (N,)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    s = tl.load(scale + rows, mask=is_row, other=0.0)
    running_max = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    running_cos = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        slots = _offsets(split, rows, N, 1)
        mask = (split < splits)[:, None] & is_row[None, :]
        part_max = tl.load(top + slots, mask=mask, other=-float("inf"))
        if RESHAPE:
            part_cos = tl.load(max_cos + slots, mask=mask, other=-float("inf"))
            running_cos = tl.maximum(running_cos, tl.max(part_cos, 0))
        part_sum = tl.load(sum_exp + slots, mask=mask, other=0.0)
        new_max = tl.maximum(running_max, tl.max(part_max, 0))
        base = _finite(new_max)
        parts = part_sum * _shrink((s * LOG2_E)[None, :], part_max, base[None, :])
        running_sum = running_sum * _shrink(s * LOG2_E, running_max, base) + tl.sum(parts, 0)
        running_max = new_max

    is_empty = running_sum == 0.0  # no negatives: with one, the largest term is 1
    log_sum_row = tl.where(is_empty, -float("inf"), tl.log(tl.where(is_empty, 1.0, running_sum)))
    target = tl.load(targets + rows, mask=is_row, other=-1)
    cos = _target_cos(
        x, w, chosen, x_norm, target, rows, is_row, C, x_row_stride, x_column_stride, D, BLOCK_N, BLOCK_D, OPERAND,
        NORMALIZE, CHOSEN,
    )  # fmt: skip
    z = log_sum_row + s * (_finite(running_max) - (cos - margin))
    softplus = tl.maximum(z, 0.0) + _log1p(tl.exp(-tl.abs(z)))
    tl.store(loss + rows, tl.where(target >= 0, softplus, 0.0), mask=is_row)
    tl.store(row_top + rows, _finite(running_max), mask=is_row)
    tl.store(log_sum + rows, log_sum_row, mask=is_row)
    tl.store(target_cos + rows, cos, mask=is_row)
    tl.store(max_neg + rows, running_cos if RESHAPE else running_max, mask=is_row)
