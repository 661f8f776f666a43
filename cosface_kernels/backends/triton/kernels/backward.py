"""The Triton kernels of backward: the gradient of the logits, and what follows from it."""

import triton
import triton.language as tl

from cosface_kernels.backends.triton.kernels.common import (
    COSINE_STEP,
    EPS,
    G_LIFT,
    LOG2_E,
    X_LIFT,
    _class_factor,
    _dot_tile,
    _factor,
    _has_more,
    _is_active,
    _offsets,
    _reshape,
    _second,
    _slopes,
    _target_cos,
    _upcast,
    _weight_rows,
)
from cosface_kernels.backends.triton.kernels.sigmoid import _sigmoid_gradients


@triton.jit(do_not_specialize=["N", "C"])
def normalize_embeddings(
    x,
    w,
    chosen,
    w_norm,
    x_norm,
    targets,
    g_lse,
    g_cos,
    g_moments,
    unit,
    largest_unit,
    x_hat,
    target_dot,
    N,
    C,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """x_hat (N, D) = X_LIFT unit_i / max unit * x_i / |x_i|, the right-hand side of dw.

    target_dot: (N,), g_cos cos_iy. With MOMENTS, of both targets; targets, g_cos and g_moments are (2, N) then.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    row_g_lse = tl.load(g_lse + rows, mask=is_row, other=0.0)
    row_g_cos = tl.load(g_cos + rows, mask=is_row, other=0.0)
    active = is_row & _is_active(row_g_lse, row_g_cos)
    if MOMENTS:
        active |= is_row & _has_more(rows, is_row, g_cos, g_moments, N)
    target = tl.load(targets + rows, mask=is_row, other=-1)
    cos = _target_cos(
        x, w, chosen, w_norm, x_norm, target, rows, active, C, D, BLOCK_N, BLOCK_D, OPERAND, NORMALIZE, CHOSEN,
    )  # fmt: skip
    dot = row_g_cos * cos
    if MOMENTS:
        second = _second(targets, rows, is_row, N, -1)
        cos = _target_cos(
            x, w, chosen, w_norm, x_norm, second, rows, active, C, D, BLOCK_N, BLOCK_D, OPERAND, NORMALIZE, CHOSEN,
        )  # fmt: skip
        dot += _second(g_cos, rows, is_row, N, 0.0) * cos
    tl.store(target_dot + rows, dot, mask=is_row)
    norm = tl.load(x_norm + rows, mask=active, other=1.0)
    factor = tl.load(unit + rows, mask=is_row, other=1.0) / tl.load(largest_unit) * X_LIFT / tl.maximum(norm, EPS)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        is_d = (d < D)[None, :]
        place = _offsets(rows, d, D)
        tile = tl.load(x + place, mask=active[:, None] & is_d, other=0.0).to(tl.float32)
        hat = (tile * factor[:, None]).to(x_hat.dtype.element_ty)
        tl.store(x_hat + _offsets(rows, d, D), hat, mask=is_row[:, None] & is_d)


@triton.jit(do_not_specialize=["N", "C", "row_blocks", "first_tile"])
def logit_gradients(
    x,
    w,
    chosen,
    w_norm,
    targets,
    scale,
    top,
    log_sum,
    g_lse,
    g_cos,
    g_moments,
    thresholds,
    negatives,
    x_norm,
    unit,
    g,
    negative_dot,
    scale_dot,
    sums,
    class_dot,
    cosines,
    active_rows,
    N,
    C,
    kept,
    first_class,
    first_tile,
    chunk,
    row_blocks,
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
    KEPT: tl.constexpr,
    SOME: tl.constexpr,
    MOMENTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    ANGLE: tl.constexpr,
):
    """G_ij = dL/dcos_ij of one chunk of classes, from the recomputed tile: s g_lse p for j != y, g_cos for j = y.

    With KEPT from what forward kept of it. cosines: (N, kept), in whole tiles.
    Grid (row blocks x class tiles of the chunk from first_tile on), the row blocks of a tile side by side; not two
    axes, because one of many tiles may be longer than all but the first can be.
    w_norm: (C,), as `_class_factor` reads it.
    g: (N, chunk), scaled by G_LIFT / unit_i; some number where a tile passes the last class. Divided by |w_j|, or
    times 2^e_j, so that both products take rows of w as they are, unless in float16: no range for short rows.
    negative_dot: (class tiles, N), += sum_{j != y} g_lse p N'(cos) cos. scale_dot: likewise, of g_lse p N(cos);
    not written without RESHAPE, where N(c) = c.
    With MOMENTS, G_ij = (s t + b p + c) N'(cos) for j != y, where t = (g_lse + b (N(cos) - top)) p; both targets
    are excluded, negative_dot sums G_ij cos_ij and scale_dot t N(cos); targets, g_cos and g_moments, b and c, are
    (2, N). With SIGMOID as `_sigmoid_gradients` has it; negatives are its polynomials then, and sums are written.
    class_dot: (row blocks, chunk), sum_i G_ij cos_ij of the block.
    active_rows: (1,), with SOME how many rows have a gradient, the first ones; a block without any writes nothing.
    """
    row_block, tile = tl.program_id(0) % row_blocks, first_tile + tl.program_id(0) // row_blocks
    if SOME:  # noqa: SIM102  `and` would compile both
        if row_block * BLOCK_N >= tl.load(active_rows):
            return
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    classes = first_class + columns
    is_row = rows < N
    is_class = classes < C
    row_g_lse = tl.load(g_lse + rows, mask=is_row, other=0.0)
    row_g_cos = tl.load(g_cos + rows, mask=is_row, other=0.0)
    active = is_row & _is_active(row_g_lse, row_g_cos)
    if MOMENTS:
        active |= is_row & _has_more(rows, is_row, g_cos, g_moments, N)
    if KEPT:
        in_steps = tl.load(cosines + _offsets(rows, classes, kept), mask=active[:, None], other=0)
    else:
        w_rows = _weight_rows(chosen, classes, is_class, CHOSEN)
        dot = _dot_tile(
            x, w, rows, w_rows, active, is_class, D, BLOCK_N, BLOCK_C, BLOCK_D, OPERAND, PRECISION,
        )  # fmt: skip
    # Loads after the product, and each sum before what follows from its terms: 188 registers for 128 x 128
    # on sm_90, where the other order takes 255 and spills.
    target = tl.load(targets + rows, mask=is_row, other=-1).to(tl.int32)
    s = tl.load(scale + rows, mask=is_row, other=0.0)
    # Rows and classes that are not there have cos = 0, and log_sum = inf keeps the p of such rows, and of rows
    # without negatives, at 0.
    row_top = tl.load(top + rows, mask=active, other=0.0)
    row_log_sum = tl.load(log_sum + rows, mask=active, other=float("inf"))
    if not SIGMOID:
        row_log_sum = tl.where(row_log_sum == -float("inf"), float("inf"), row_log_sum)
    x_inverse = 1 / tl.maximum(tl.load(x_norm + rows, mask=active, other=1.0), EPS)
    w_factor = _class_factor(w_norm, classes, is_class, NORMALIZE)[None, :]
    cos = in_steps.to(tl.float32) * COSINE_STEP if KEPT else dot * x_inverse[:, None] * w_factor
    is_target = classes[None, :] == target[:, None]
    if MOMENTS:
        is_second = classes[None, :] == _second(targets, rows, is_row, N, -1).to(tl.int32)[:, None]
        is_target |= is_second
    if SIGMOID:
        gradient = _sigmoid_gradients(
            cos, is_class[None, :] & ~is_target, s, row_log_sum, row_g_lse, negatives, negative_dot, scale_dot,
            sums, rows, is_row, tile, N, ANGLE,
        )  # fmt: skip
        gradient = tl.where(is_target, row_g_cos[:, None], gradient)
    else:
        shaped = cos
        if RESHAPE:
            shaped, slope, _ = _reshape(cos, thresholds, negatives, rows, is_row, SLOPES)
            shaped = tl.where(is_class[None, :], shaped, 0.0)  # N(0) need not be 0
        # The difference from the largest is class_statistics' own, unless another tile's products round otherwise.
        below = tl.where(is_target, -float("inf"), shaped) - row_top[:, None]
        log_p = _factor(s)[:, None] * below - (row_log_sum * LOG2_E)[:, None]
        p = tl.exp2(tl.minimum(log_p, 0.0, propagate_nan=tl.PropagateNan.ALL))
        slots = tile.to(tl.int64) * N + rows
        if MOMENTS:
            row_b = tl.load(g_moments + rows, mask=is_row, other=0.0)
            row_c = _second(g_moments, rows, is_row, N, 0.0)
            # A cosine that is kept, or of no class, may be above the largest: G stays within its unit.
            from_top = tl.where(is_target, 0.0, tl.minimum(below, 0.0, propagate_nan=tl.PropagateNan.ALL))
            t = (row_g_lse[:, None] + row_b[:, None] * from_top) * p
            scale_so_far = tl.load(scale_dot + slots, mask=is_row, other=0.0)
            tl.store(scale_dot + slots, scale_so_far + tl.sum(t * shaped, 1), mask=is_row)
            gradient = s[:, None] * t + row_b[:, None] * p + row_c[:, None]
            if RESHAPE:
                gradient *= _slopes(cos, thresholds, negatives, rows, is_row) if SLOPES else slope
            gradient = tl.where(is_target, 0.0, gradient)
            so_far = tl.load(negative_dot + slots, mask=is_row, other=0.0)
            tl.store(negative_dot + slots, so_far + tl.sum(gradient * cos, 1), mask=is_row)
            of_targets = tl.where(is_second, _second(g_cos, rows, is_row, N, 0.0)[:, None], row_g_cos[:, None])
            gradient = tl.where(is_target, of_targets, gradient)
        else:
            if RESHAPE:
                scale_so_far = tl.load(scale_dot + slots, mask=is_row, other=0.0)
                tl.store(scale_dot + slots, scale_so_far + row_g_lse * tl.sum(p * shaped, 1), mask=is_row)
                p *= _slopes(cos, thresholds, negatives, rows, is_row) if SLOPES else slope
            so_far = tl.load(negative_dot + slots, mask=is_row, other=0.0)
            tl.store(negative_dot + slots, so_far + row_g_lse * tl.sum(p * cos, 1), mask=is_row)
            gradient = tl.where(is_target, row_g_cos[:, None], (s * row_g_lse)[:, None] * p)

    lift = G_LIFT / tl.load(unit + rows, mask=is_row, other=1.0)  # here, so that few registers wait
    # Past the last class too: a mask of the classes would make a store of every number.
    lifted = gradient * lift[:, None]
    if g.dtype.element_ty != tl.float16:
        lifted *= w_factor
    tl.store(g + _offsets(rows, columns, chunk), lifted.to(g.dtype.element_ty), mask=is_row[:, None])
    tl.store(class_dot + row_block.to(tl.int64) * chunk + columns, tl.sum(gradient * cos, 0))


@triton.jit(do_not_specialize=["N", "C", "row_blocks", "tiles_per_split"])
def embedding_gradients(
    g,
    w,
    chosen,
    w_norm,
    dx_hat,
    active_rows,
    N,
    C,
    first_class,
    chunk,
    row_blocks,
    tiles_per_split,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
    SOME: tl.constexpr,
):
    """dx_hat (splits, N, D) += G w_hat of one chunk, each split of its classes into a slot of its own.

    Where G is divided by |w_j|, w takes the place of w_hat. With SOME, rows from active_rows on may hold anything.

    Grid (row blocks x column blocks, splits): at N = 256 dx has too few blocks to fill a GPU.
    """
    split = tl.program_id(1)
    if SOME:  # noqa: SIM102
        if tl.program_id(0) % row_blocks * BLOCK_N >= tl.load(active_rows):
            return
    rows = tl.program_id(0) % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(0) // row_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    is_row = rows < N
    is_d = (d < D)[None, :]
    out = dx_hat + split.to(tl.int64) * N * D + _offsets(rows, d, D)
    mask = is_row[:, None] & is_d
    # Before the loop, so that no register holds them beside the sums.
    sums = tl.load(out, mask=mask, other=0.0)
    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(tl.minimum(chunk, C - first_class), BLOCK_C))
    for tile in range(split * tiles_per_split, last_tile):
        columns = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        classes = first_class + columns
        is_class = classes < C
        g_tile = tl.load(g + _offsets(rows, columns, chunk), mask=is_row[:, None], other=0.0)
        w_rows = _weight_rows(chosen, classes, is_class, CHOSEN)
        w_tile = tl.load(w + _offsets(w_rows, d, D), mask=is_class[:, None] & is_d, other=0.0)
        if NORMALIZE and g.dtype.element_ty == tl.float16:
            inverse = _class_factor(w_norm, classes, is_class, NORMALIZE)
            w_tile = (_upcast(w_tile, tl.float32) * inverse[:, None]).to(tl.float16)
        sums = tl.dot(g_tile.to(OPERAND), _upcast(w_tile, OPERAND), sums, input_precision=PRECISION)
    tl.store(out, sums, mask=mask)


@triton.jit
def _store_weight_gradient(
    sums,
    IS_DIVIDED: tl.constexpr,
    w,
    chosen,
    w_norm,
    class_dot,
    largest_unit,
    dw,
    C,
    first_class,
    columns,
    d,
    chunk,
    dot_blocks,
    D: tl.constexpr,
    OPERAND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """A block of dw, of float8 that of what is stored, from G^T x_hat, which may be divided by |w_j| already."""
    classes = first_class + columns
    is_class = classes < C
    dot = tl.zeros(columns.shape, tl.float32)
    slots = columns.to(tl.int64)
    for _ in range(0, dot_blocks):
        dot += tl.load(class_dot + slots)
        slots += chunk
    mask = is_class[:, None] & (d < D)[None, :]
    gradient = sums * (tl.load(largest_unit) / (G_LIFT * X_LIFT))
    if NORMALIZE:
        norm = tl.load(w_norm + classes, mask=is_class, other=1.0)
        inverse = 1 / tl.maximum(norm, EPS)
        if not IS_DIVIDED:
            gradient *= inverse[:, None]
        along_w = tl.where(norm > EPS, dot * inverse * inverse, 0.0)  # no projection where the norm was clamped
        w_rows = _weight_rows(chosen, classes, is_class, CHOSEN)
        w_tile = tl.load(w + _offsets(w_rows, d, D), mask=mask, other=0.0)
        gradient -= along_w[:, None] * _upcast(w_tile, OPERAND).to(tl.float32)
    tl.store(dw + _offsets(columns, d, D), gradient.to(dw.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "C", "dot_blocks"])
def weight_gradients(
    g,
    x_hat,
    w,
    chosen,
    w_norm,
    class_dot,
    largest_unit,
    dw,
    active_rows,
    N,
    C,
    first_class,
    chunk,
    dot_blocks,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
    SOME: tl.constexpr,
):
    """dw (chunk, D), written once: (G^T x_hat - (sum_i G_ij cos_ij) w_hat) / |w_j|.

    Grid (column blocks x class tiles of the chunk), the column blocks of a tile side by side.
    With SOME, of the first active_rows rows; nothing is written if there are none.
    """
    if SOME:
        N = tl.load(active_rows)
        if N == 0:
            return
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    columns = tl.program_id(0) // column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    is_d = (d < D)[None, :]
    sums = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for first in range(0, N, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        is_row = rows < N
        g_tile = tl.load(g + _offsets(rows, columns, chunk), mask=is_row[:, None], other=0.0)
        x_tile = tl.load(x_hat + _offsets(rows, d, D), mask=is_row[:, None] & is_d, other=0.0)
        sums = tl.dot(tl.trans(g_tile.to(OPERAND)), x_tile.to(OPERAND), sums, input_precision=PRECISION)

    _store_weight_gradient(
        sums, g.dtype.element_ty != tl.float16, w, chosen, w_norm, class_dot, largest_unit, dw, C, first_class,
        columns, d, chunk, dot_blocks, D, OPERAND, NORMALIZE, CHOSEN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["C", "dot_blocks"])
def project_weight_gradients(
    sums,
    w,
    w_norm,
    class_dot,
    largest_unit,
    dw,
    C,
    first_class,
    chunk,
    dot_blocks,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """dw (chunk, D) from sums = G^T x_hat, (chunk, D) float32, of bfloat16 operands; it may be the same memory."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_class = first_class + columns < C
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        block = tl.load(sums + _offsets(columns, d, D), mask=is_class[:, None] & (d < D)[None, :], other=0.0)
        _store_weight_gradient(
            block, True, w, w, w_norm, class_dot, largest_unit, dw, C, first_class, columns, d, chunk,
            dot_blocks, D, OPERAND, NORMALIZE, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "splits", "tiles"])
def finish_embedding_gradients(
    dx_hat,
    negative_dot,
    scale_dot,
    target_dot,
    x,
    x_norm,
    scale,
    g_lse,
    g_cos,
    g_moments,
    unit,
    dx,
    dscale,
    N,
    splits,
    tiles,
    D: tl.constexpr,
    NEED_DX: tl.constexpr,
    RESHAPE: tl.constexpr,
    MOMENTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row's slots in their order: dscale (N,), and dx (N, D) = (dx_hat - (sum_j G_ij cos_ij) x_hat) / |x_i|.

    Grid (row blocks, column blocks).
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    from_negatives = tl.zeros((BLOCK_N,), tl.float32)
    from_scale = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, tiles, BLOCK_SPLITS):
        tile = first + tl.arange(0, BLOCK_SPLITS)
        slots = _offsets(tile, rows, N)
        mask = (tile < tiles)[:, None] & is_row[None, :]
        from_negatives += tl.sum(tl.load(negative_dot + slots, mask=mask, other=0.0), 0)
        if RESHAPE or MOMENTS or SIGMOID:
            from_scale += tl.sum(tl.load(scale_dot + slots, mask=mask, other=0.0), 0)
    if tl.program_id(1) == 0:
        tl.store(dscale + rows, from_scale if RESHAPE or MOMENTS or SIGMOID else from_negatives, mask=is_row)
    if NEED_DX:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = is_row[:, None] & (d < D)[None, :]
        sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        part = _offsets(rows, d, D)
        for _ in range(0, splits):
            sums += tl.load(dx_hat + part, mask=mask, other=0.0)
            part += N.to(tl.int64) * D
        row_g_lse = tl.load(g_lse + rows, mask=is_row, other=0.0)
        active = _is_active(row_g_lse, tl.load(g_cos + rows, mask=is_row, other=0.0))
        if MOMENTS:
            active |= _has_more(rows, is_row, g_cos, g_moments, N)
        norm = tl.load(x_norm + rows, mask=is_row & active, other=1.0)
        inverse = 1 / tl.maximum(norm, EPS)
        x_tile = tl.load(x + _offsets(rows, d, D), mask=mask & active[:, None], other=0.0).to(tl.float32)
        dot = from_negatives
        if not (MOMENTS or SIGMOID):
            dot = tl.load(scale + rows, mask=is_row, other=0.0) * from_negatives
        dot += tl.load(target_dot + rows, mask=is_row, other=0.0)
        dot = tl.where(norm > EPS, dot, 0.0)  # no projection where the norm was clamped
        unlift = tl.load(unit + rows, mask=is_row, other=1.0) / G_LIFT
        gradient = (sums * unlift[:, None] - dot[:, None] * (x_tile * inverse[:, None])) * inverse[:, None]
        tl.store(dx + _offsets(rows, d, D), gradient.to(dx.dtype.element_ty), mask=mask)
