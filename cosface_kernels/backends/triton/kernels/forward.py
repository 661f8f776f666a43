"""The Triton kernels of forward: norms, and statistics of each row over the classes."""

import triton
import triton.language as tl

from cosface_kernels.backends.triton.kernels.common import (
    COSINE_STEP,
    EPS,
    LOG2_E,
    _class_factor,
    _dot_tile,
    _factor,
    _finite,
    _lower,
    _norms,
    _offsets,
    _reshape,
    _second,
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
    norm = _norms(matrix, places, is_row, D, BLOCK_C, BLOCK_D, OPERAND)
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
    moments,
    cosines,
    N,
    C,
    kept,
    tiles_per_split,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RESHAPE: tl.constexpr,
    SLOPES: tl.constexpr,
    CHOSEN: tl.constexpr,
    KEEP: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Of one split of the classes, for each row: max N(cos) and sum e^{z - s max} over the negatives, and max cos.

    Grid (row blocks, splits): the row blocks of a split run side by side and share its class rows in L2.
    w_norm: (C,), as `_class_factor` reads it.
    top, max_cos, sum_exp: (splits, N); without RESHAPE, N(c) = c, and max_cos is not written.
    cosines: (N, kept) int16, of the first classes, written with KEEP.
    moments: (splits, 4, N), written with MOMENTS: sum e^{z - s max} (max - N(cos)), sum N(cos), sum cos over those
    above tau, and their count. targets: (2, N) then, else (N,).
    """
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    target = tl.load(targets + rows, mask=is_row, other=-1).to(tl.int32)
    if MOMENTS:
        second = _second(targets, rows, is_row, N, -1).to(tl.int32)
    x_inverse = 1 / tl.maximum(tl.load(x_norm + rows, mask=is_row, other=1.0), EPS)
    factor = _factor(tl.load(scale + rows, mask=is_row, other=0.0))

    running_max = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    running_cos = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    if MOMENTS:
        below = tl.zeros((BLOCK_N,), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        hard_sum = tl.zeros((BLOCK_N,), tl.float32)
        hard_count = tl.zeros((BLOCK_N,), tl.int32)
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
            D,
            BLOCK_N,
            BLOCK_C,
            BLOCK_D,
            OPERAND,
            PRECISION,
        )
        w_factor = _class_factor(w_norm, classes, is_class, NORMALIZE)
        is_negative = is_class[None, :] & (classes[None, :] != target[:, None])
        if MOMENTS:
            is_negative &= classes[None, :] != second[:, None]
        cos = dot * x_inverse[:, None] * w_factor[None, :]
        if KEEP:
            in_steps = tl.floor(tl.clamp(cos, -1.0, 1.0) * (1 / COSINE_STEP) + 0.5).to(tl.int16)
            mask = is_row[:, None] & (classes < kept)[None, :]
            tl.store(cosines + _offsets(rows, classes, kept), in_steps, mask=mask)
        # Rounded as in logit_gradients; the choice keeps the product out of an fma with what is subtracted.
        cos = tl.where(is_negative, cos, -float("inf"))
        if RESHAPE:
            running_cos = tl.maximum(running_cos, tl.max(cos, 1))
            shaped, _, hard = _reshape(cos, thresholds, negatives, rows, is_row, SLOPES)
            if MOMENTS:
                hard_sum += tl.sum(tl.where(hard, cos, 0.0), 1)
                hard_count += tl.sum(hard.to(tl.int32), 1)
            cos = shaped
            if SLOPES:  # by r = 0, -inf has become nan
                cos = tl.where(is_negative, shaped, -float("inf"))
        if MOMENTS:
            total += tl.sum(tl.where(is_negative, cos, 0.0), 1)
        new_max = tl.maximum(running_max, tl.max(cos, 1))
        base = _finite(new_max)
        terms = tl.exp2(factor[:, None] * (cos - base[:, None]))
        if MOMENTS:
            lower = tl.where(terms > 0.0, terms * (base[:, None] - cos), 0.0)  # cos is -inf of what is no negative
            below = _lower(below, running_sum, factor, running_max, base) + tl.sum(lower, 1)
        running_sum = running_sum * _shrink(factor, running_max, base) + tl.sum(terms, 1)
        running_max = new_max

    slots = split.to(tl.int64) * N + rows
    tl.store(top + slots, running_max, mask=is_row)
    if RESHAPE:
        tl.store(max_cos + slots, running_cos, mask=is_row)
    tl.store(sum_exp + slots, running_sum, mask=is_row)
    if MOMENTS:
        slots += 3 * split.to(tl.int64) * N  # 4 rows of each split precede its own
        tl.store(moments + slots, below, mask=is_row)
        tl.store(moments + (slots + N), total, mask=is_row)
        tl.store(moments + (slots + N + N), hard_sum, mask=is_row)
        tl.store(moments + (slots + N + N + N), hard_count.to(tl.float32), mask=is_row)


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
    parts,
    x,
    w,
    chosen,
    w_norm,
    x_norm,
    targets,
    scale,
    loss,
    row_top,
    log_sum,
    target_cos,
    max_neg,
    moments,
    N,
    C,
    splits,
    margin,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RESHAPE: tl.constexpr,
    CHOSEN: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """The splits' statistics in order, then LMCL: loss, row_top, log_sum, target_cos and max_neg, each (N,).

    With MOMENTS also moments, (4, N), of parts, (splits, 4, N); targets and target_cos are (2, N) then.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    s = tl.load(scale + rows, mask=is_row, other=0.0)
    running_max = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    running_cos = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    if MOMENTS:
        below = tl.zeros((BLOCK_N,), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        hard_sum = tl.zeros((BLOCK_N,), tl.float32)
        hard_count = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        slots = _offsets(split, rows, N)
        mask = (split < splits)[:, None] & is_row[None, :]
        part_max = tl.load(top + slots, mask=mask, other=-float("inf"))
        if RESHAPE:
            part_cos = tl.load(max_cos + slots, mask=mask, other=-float("inf"))
            running_cos = tl.maximum(running_cos, tl.max(part_cos, 0))
        part_sum = tl.load(sum_exp + slots, mask=mask, other=0.0)
        new_max = tl.maximum(running_max, tl.max(part_max, 0))
        base = _finite(new_max)
        shrunk = part_sum * _shrink((s * LOG2_E)[None, :], part_max, base[None, :])
        if MOMENTS:
            part_slots = parts + (slots + 3 * split.to(tl.int64)[:, None] * N)
            lower = tl.load(part_slots, mask=mask, other=0.0)
            lower = _lower(lower, part_sum, (s * LOG2_E)[None, :], part_max, base[None, :])
            below = _lower(below, running_sum, s * LOG2_E, running_max, base) + tl.sum(lower, 0)
            total += tl.sum(tl.load(part_slots + N, mask=mask, other=0.0), 0)
            hard_sum += tl.sum(tl.load(part_slots + N + N, mask=mask, other=0.0), 0)
            hard_count += tl.sum(tl.load(part_slots + N + N + N, mask=mask, other=0.0), 0)
        running_sum = running_sum * _shrink(s * LOG2_E, running_max, base) + tl.sum(shrunk, 0)
        running_max = new_max

    is_empty = running_sum == 0.0  # no negatives: with one, the largest term is 1
    log_sum_row = tl.where(is_empty, -float("inf"), tl.log(tl.where(is_empty, 1.0, running_sum)))
    target = tl.load(targets + rows, mask=is_row, other=-1)
    cos = _target_cos(
        x, w, chosen, w_norm, x_norm, target, rows, is_row, C, D, BLOCK_N, BLOCK_D, OPERAND, NORMALIZE, CHOSEN,
    )  # fmt: skip
    z = log_sum_row + s * (_finite(running_max) - (cos - margin))
    softplus = tl.maximum(z, 0.0) + _log1p(tl.exp(-tl.abs(z)))
    tl.store(loss + rows, tl.where(target >= 0, softplus, 0.0), mask=is_row)
    tl.store(row_top + rows, _finite(running_max), mask=is_row)
    tl.store(log_sum + rows, log_sum_row, mask=is_row)
    tl.store(target_cos + rows, cos, mask=is_row)
    tl.store(max_neg + rows, running_cos if RESHAPE else running_max, mask=is_row)
    if MOMENTS:
        place = rows.to(tl.int64)
        below = tl.where(is_empty, 0.0, below / tl.where(is_empty, 1.0, running_sum))
        tl.store(moments + place, below, mask=is_row)
        tl.store(moments + (place + N), total, mask=is_row)
        tl.store(moments + (place + N + N), hard_sum, mask=is_row)
        tl.store(moments + (place + N + N + N), hard_count, mask=is_row)
        second = _second(targets, rows, is_row, N, -1)
        cos = _target_cos(
            x, w, chosen, w_norm, x_norm, second, rows, is_row, C, D, BLOCK_N, BLOCK_D, OPERAND, NORMALIZE, CHOSEN,
        )  # fmt: skip
        tl.store(target_cos + (place + N), cos, mask=is_row)
