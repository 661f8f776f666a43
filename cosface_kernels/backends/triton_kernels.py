"""The Triton kernels of backend `triton`; `triton.py` launches them.

Letters as in `cosface_kernels.reference`: x (N, D), w (C, D), s (N,), cos_ij, z_ij = s_i cos_ij and
p_ij = e^{s_i (cos_ij - top_i) - log_sum_i}. Products accumulate in float32, logits never leave the chip, offsets
are 64-bit, and no result is made by atomics: what several programs contribute to goes into a slot each, summed in
order. Where classes are chosen, class j is row chosen_j of w, read and moved in place.

FLOPs and bytes, with b bytes a number, and what that predicts. Nothing here has been measured.

| kernel | FLOPs | bytes of w and dw from memory |
|---|---|---|
| row_norms | 2 C D | b C D |
| class_statistics | 2 N C D | b C D |
| logit_gradients | 2 N C D | b C D |
| embedding_gradients | 2 N C D | b C D |
| weight_gradients | 2 N C D | 2 b C D: reads w for the projection; writes dw |
| project_weight_gradients | 5 C D | 2 b C D, and 4 C D of sums in float32: after a product of the library |
| sgd_rows, adamw_rows | 10 C D | 2 b C D for w, 2 C D numbers of each state, C D of dw in float32 |

G is written once and read twice: 3 b N C bytes.

Predicted floor of a step in bfloat16, D = 512, from the makers' dense rates (A100 312 TFLOP/s and 2.0 TB/s, H100
SXM 989 and 3.35, B200 2,250 and 8): the larger of 8 N C D / rate and (6 D + 3 N) b C / bandwidth, where w is read
once for its norms, once forward and thrice backward, dw written once. Times are in ms.

| C | N | A100 | H100 | B200 | bound by |
|---|---|---|---|---|---|
| 1M | 256 | 3.8 | 2.3 | 1.0 | memory (tensor cores: 3.4, 1.1, 0.5) |
| 1M | 1024 | 13 | 4.2 | 1.9 | tensor cores (memory: 6.1, 3.7, 1.5) |
| 1M | 4096 | 54 | 17 | 7.5 | tensor cores (memory: 15, 9.2, 3.8) |
| 10M | 256 | 38 | 23 | 9.6 | memory (tensor cores: 34, 11, 4.7) |
| 10M | 1024 | 134 | 42 | 19 | tensor cores (memory: 61, 37, 15) |
| 10M | 4096 | 538 | 170 | 75 | tensor cores (memory: 154, 92, 38) |

Chunks that stay in L2 would spare up to half of those bytes, but take a launch every 5 us at N = 256, faster than
they can be made; `triton_tiles.chunk_classes` makes them longer.

Where rows move inside backward, dw is written and read in float32 and w written in its place: 8 C D bytes more
and, for each state, 2 C D numbers.

The 2 N C exponentials, at 16 a clock and multiprocessor, take a twentieth of the tensor cores' time at D = 512 on
an A100 and an eighth on an H100, partly hidden under other programs' products.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)  # smallest norm that is divided by, as in F.normalize
# G / unit is at most 1: 2^12 lifts probabilities down to 1.5e-8 out of float16's subnormal range. Likewise the
# normalised embeddings, by 2^8; both leave room below 65504.
G_LIFT = tl.constexpr(4096.0)
X_LIFT = tl.constexpr(256.0)
COSINE_STEP = tl.constexpr(1 / 32767)  # of the cosines that forward keeps for backward, in 16 bits

LOG2_E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-30)


@triton.jit
def _offsets(rows, columns, row_stride, column_stride):
    return rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride


@triton.jit
def _weight_rows(chosen, classes, is_class, CHOSEN: tl.constexpr):
    """Where these classes are in w."""
    return tl.load(chosen + classes, mask=is_class, other=0) if CHOSEN else classes


@triton.jit
def _norms(
    x,
    rows,
    is_row,
    row_stride,
    column_stride,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr = tl.float32,
):
    """|x_i| of a block of rows, rounded to operands."""
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = tl.load(
            x + _offsets(rows, d, row_stride, column_stride), mask=is_row[:, None] & (d < D)[None, :], other=0.0
        )
        tile = tile.to(OPERAND).to(tl.float32)
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
    row_stride,
    column_stride,
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
        x_tile = tl.load(x + _offsets(rows, d, row_stride, column_stride), mask=is_row[:, None] & is_d, other=0.0)
        w_tile = tl.load(w + _offsets(w_rows, d, D, 1), mask=is_class[:, None] & is_d, other=0.0)
        dot = tl.dot(x_tile.to(OPERAND), tl.trans(w_tile.to(OPERAND)), dot, input_precision=PRECISION)
    return dot


@triton.jit
def _inverse_norm(w_norm, classes, is_class, NORMALIZE: tl.constexpr):
    """1 / |w_j| of a block of classes, 1 without NORMALIZE."""
    norm = (
        tl.load(w_norm + classes, mask=is_class, other=1.0)
        if NORMALIZE
        else tl.full(classes.shape, 1.0, tl.float32)
    )
    return 1 / tl.maximum(norm, EPS)


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


@triton.jit
def _reshape(cos, thresholds, negatives, rows, is_row):
    """N(c) = (q c + a) c + b where c > tau_i, else c; and N'(c)."""
    tau = tl.load(thresholds + rows, mask=is_row, other=float("inf"))
    q, a, b = tl.load(negatives), tl.load(negatives + 1), tl.load(negatives + 2)
    hard = cos > tau[:, None]
    return tl.where(hard, (q * cos + a) * cos + b, cos), tl.where(hard, 2 * q * cos + a, 1.0)


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


@triton.jit
def _target_cos(
    x,
    w,
    chosen,
    x_norm,
    target,
    rows,
    is_row,
    C,
    row_stride,
    column_stride,
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
    dot = tl.zeros((BLOCK_N,), tl.float32)
    w_squares = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        is_d = (d < D)[None, :]
        x_tile = tl.load(x + _offsets(rows, d, row_stride, column_stride), mask=is_row[:, None] & is_d, other=0.0)
        w_tile = tl.load(w + _offsets(w_rows, d, D, 1), mask=has_target[:, None] & is_d, other=0.0)
        w_tile = w_tile.to(OPERAND).to(tl.float32)
        dot += tl.sum(x_tile.to(OPERAND).to(tl.float32) * w_tile, 1)
        w_squares += tl.sum(w_tile * w_tile, 1)
    cos = dot * (1 / tl.maximum(tl.load(x_norm + rows, mask=is_row, other=1.0), EPS))
    if NORMALIZE:
        cos *= 1 / tl.maximum(tl.sqrt(w_squares), EPS)
    return tl.where(has_target, cos, 0.0)


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


@triton.jit
def _is_active(g_lse, g_cos):
    """Rows without gradient take no part, even if their embedding is not finite."""
    return (g_lse != 0.0) | (g_cos != 0.0)


@triton.jit(do_not_specialize=["N", "C"])
def normalize_embeddings(
    x,
    w,
    chosen,
    x_norm,
    targets,
    g_lse,
    g_cos,
    unit,
    largest_unit,
    x_hat,
    target_dot,
    N,
    C,
    x_row_stride,
    x_column_stride,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """x_hat (N, D) = X_LIFT unit_i / max unit * x_i / |x_i|, the right-hand side of dw.

    target_dot: (N,), g_cos cos_iy.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    row_g_lse = tl.load(g_lse + rows, mask=is_row, other=0.0)
    row_g_cos = tl.load(g_cos + rows, mask=is_row, other=0.0)
    active = is_row & _is_active(row_g_lse, row_g_cos)
    target = tl.load(targets + rows, mask=is_row, other=-1)
    cos = _target_cos(
        x, w, chosen, x_norm, target, rows, active, C, x_row_stride, x_column_stride, D, BLOCK_N, BLOCK_D, OPERAND,
        NORMALIZE, CHOSEN,
    )  # fmt: skip
    tl.store(target_dot + rows, row_g_cos * cos, mask=is_row)
    norm = tl.load(x_norm + rows, mask=active, other=1.0)
    factor = tl.load(unit + rows, mask=is_row, other=1.0) / tl.load(largest_unit) * X_LIFT / tl.maximum(norm, EPS)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        is_d = (d < D)[None, :]
        tile = tl.load(
            x + _offsets(rows, d, x_row_stride, x_column_stride), mask=active[:, None] & is_d, other=0.0
        ).to(tl.float32)
        tl.store(
            x_hat + _offsets(rows, d, D, 1),
            (tile * factor[:, None]).to(x_hat.dtype.element_ty),
            mask=is_row[:, None] & is_d,
        )


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
    thresholds,
    negatives,
    x_norm,
    unit,
    g,
    negative_dot,
    scale_dot,
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
    x_row_stride,
    x_column_stride,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RESHAPE: tl.constexpr,
    CHOSEN: tl.constexpr,
    KEPT: tl.constexpr,
    SOME: tl.constexpr,
):
    """G_ij = dL/dcos_ij of one chunk of classes, from the recomputed tile: s g_lse p for j != y, g_cos for j = y.

    With KEPT from what forward kept of it. cosines: (N, kept), in whole tiles.
    Grid (row blocks x class tiles of the chunk from first_tile on), the row blocks of a tile side by side; not two
    axes, because one of many tiles may be longer than all but the first can be.
    w_norm: (C,); not read without NORMALIZE.
    g: (N, chunk), scaled by G_LIFT / unit_i; some number where a tile passes the last class. Divided by |w_j| as
    well, so that both products take rows of w as they are, unless its dtype is float16: no range for short rows.
    negative_dot: (class tiles, N), += sum_{j != y} g_lse p N'(cos) cos. scale_dot: likewise, of g_lse p N(cos);
    not written without RESHAPE, where N(c) = c.
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
    if KEPT:
        in_steps = tl.load(cosines + _offsets(rows, classes, kept, 1), mask=active[:, None], other=0)
    else:
        dot = _dot_tile(
            x,
            w,
            rows,
            _weight_rows(chosen, classes, is_class, CHOSEN),
            active,
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
    # Loads after the product, and each sum before what follows from its terms: 188 registers for 128 x 128
    # on sm_90, where the other order takes 255 and spills.
    target = tl.load(targets + rows, mask=is_row, other=-1).to(tl.int32)
    s = tl.load(scale + rows, mask=is_row, other=0.0)
    # Rows and classes that are not there have cos = 0, and log_sum = inf keeps the p of such rows, and of rows
    # without negatives, at 0.
    row_top = tl.load(top + rows, mask=active, other=0.0)
    row_log_sum = tl.load(log_sum + rows, mask=active, other=float("inf"))
    row_log_sum = tl.where(row_log_sum == -float("inf"), float("inf"), row_log_sum)
    x_inverse = 1 / tl.maximum(tl.load(x_norm + rows, mask=active, other=1.0), EPS)
    w_inverse = _inverse_norm(w_norm, classes, is_class, NORMALIZE)[None, :]
    cos = in_steps.to(tl.float32) * COSINE_STEP if KEPT else dot * x_inverse[:, None] * w_inverse
    is_target = classes[None, :] == target[:, None]
    shaped = cos
    if RESHAPE:
        shaped, slope = _reshape(cos, thresholds, negatives, rows, is_row)
        shaped = tl.where(is_class[None, :], shaped, 0.0)  # N(0) need not be 0
    # The difference from the largest is class_statistics' own, unless products of another tile round otherwise.
    below = tl.where(is_target, -float("inf"), shaped) - row_top[:, None]
    log_p = _factor(s)[:, None] * below - (row_log_sum * LOG2_E)[:, None]
    p = tl.exp2(tl.minimum(log_p, 0.0, propagate_nan=tl.PropagateNan.ALL))
    slots = tile.to(tl.int64) * N + rows
    if RESHAPE:
        scale_so_far = tl.load(scale_dot + slots, mask=is_row, other=0.0)
        tl.store(scale_dot + slots, scale_so_far + row_g_lse * tl.sum(p * shaped, 1), mask=is_row)
        p *= slope
    so_far = tl.load(negative_dot + slots, mask=is_row, other=0.0)
    tl.store(negative_dot + slots, so_far + row_g_lse * tl.sum(p * cos, 1), mask=is_row)
    gradient = tl.where(is_target, row_g_cos[:, None], (s * row_g_lse)[:, None] * p)

    lift = G_LIFT / tl.load(unit + rows, mask=is_row, other=1.0)  # here, so that few registers wait
    # Past the last class too: a mask of the classes would make a store of every number.
    lifted = gradient * lift[:, None]
    if g.dtype.element_ty != tl.float16:
        lifted *= w_inverse
    tl.store(g + _offsets(rows, columns, chunk, 1), lifted.to(g.dtype.element_ty), mask=is_row[:, None])
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
    out = dx_hat + split.to(tl.int64) * N * D + _offsets(rows, d, D, 1)
    mask = is_row[:, None] & is_d
    # Before the loop, so that no register holds them beside the sums.
    sums = tl.load(out, mask=mask, other=0.0)
    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(tl.minimum(chunk, C - first_class), BLOCK_C))
    for tile in range(split * tiles_per_split, last_tile):
        columns = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        classes = first_class + columns
        is_class = classes < C
        g_tile = tl.load(g + _offsets(rows, columns, chunk, 1), mask=is_row[:, None], other=0.0)
        w_rows = _weight_rows(chosen, classes, is_class, CHOSEN)
        w_tile = tl.load(w + _offsets(w_rows, d, D, 1), mask=is_class[:, None] & is_d, other=0.0)
        if NORMALIZE and g.dtype.element_ty == tl.float16:
            inverse = _inverse_norm(w_norm, classes, is_class, NORMALIZE)
            w_tile = (w_tile.to(tl.float32) * inverse[:, None]).to(tl.float16)
        sums = tl.dot(g_tile.to(OPERAND), w_tile.to(OPERAND), sums, input_precision=PRECISION)
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
    """A block of dw from that of G^T x_hat, which may be divided by |w_j| already."""
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
        w_tile = tl.load(w + _offsets(w_rows, d, D, 1), mask=mask, other=0.0)
        gradient -= along_w[:, None] * w_tile.to(OPERAND).to(tl.float32)
    tl.store(dw + _offsets(columns, d, D, 1), gradient.to(dw.dtype.element_ty), mask=mask)


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
        g_tile = tl.load(g + _offsets(rows, columns, chunk, 1), mask=is_row[:, None], other=0.0)
        x_tile = tl.load(x_hat + _offsets(rows, d, D, 1), mask=is_row[:, None] & is_d, other=0.0)
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
        block = tl.load(sums + _offsets(columns, d, D, 1), mask=is_class[:, None] & (d < D)[None, :], other=0.0)
        _store_weight_gradient(
            block, True, w, w, w_norm, class_dot, largest_unit, dw, C, first_class, columns, d, chunk,
            dot_blocks, D, OPERAND, NORMALIZE, False,
        )  # fmt: skip


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
        norm = tl.abs(gradient_factor) * _norms(dw, columns, is_class, D, 1, D, BLOCK_C, BLOCK_D)
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
    group = _offsets(rows, first // 4 + tl.arange(0, BLOCK_D // 4), (D + 3) // 4, 1)
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
        place = _offsets(rows, d, D, 1)
        noise = _noise(seed, step, 0, rows, first, D, BLOCK_C, BLOCK_D)
        v = tl.load(w + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dw + _offsets(columns, d, D, 1), mask=mask, other=0.0).to(tl.float32) * factor[:, None]
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
        place = _offsets(rows, d, D, 1)
        noise = _noise(seed, step, 0, rows, first, D, BLOCK_C, BLOCK_D)
        more_noise = _noise(seed, step, 1, rows, first, D, BLOCK_C, BLOCK_D)
        v = tl.load(w + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dw + _offsets(columns, d, D, 1), mask=mask, other=0.0).to(tl.float32) * factor[:, None]
        m = tl.load(exp_avg + place, mask=mask, other=0.0).to(tl.float32)
        m += fresh1 * (g - m)
        q = beta2 * tl.load(exp_avg_sq + place, mask=mask, other=0.0).to(tl.float32) + fresh2 * g * g
        _store_moved(exp_avg + place, m, noise >> 16, mask)
        _store_moved(exp_avg_sq + place, q, more_noise, mask)
        if AMSGRAD:
            largest = tl.load(max_exp_avg_sq + place, mask=mask, other=0.0).to(tl.float32)
            q = tl.maximum(q, largest, propagate_nan=tl.PropagateNan.ALL)
            _store_moved(max_exp_avg_sq + place, q, more_noise >> 16, mask)
        _store_moved(w + place, kept * v - step_size * m / (tl.sqrt(q) / root_correction + eps), noise, mask)


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
    unit,
    dx,
    dscale,
    N,
    splits,
    tiles,
    x_row_stride,
    x_column_stride,
    D: tl.constexpr,
    NEED_DX: tl.constexpr,
    RESHAPE: tl.constexpr,
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
        slots = _offsets(tile, rows, N, 1)
        mask = (tile < tiles)[:, None] & is_row[None, :]
        from_negatives += tl.sum(tl.load(negative_dot + slots, mask=mask, other=0.0), 0)
        if RESHAPE:
            from_scale += tl.sum(tl.load(scale_dot + slots, mask=mask, other=0.0), 0)
    if tl.program_id(1) == 0:
        tl.store(dscale + rows, from_scale if RESHAPE else from_negatives, mask=is_row)
    if NEED_DX:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = is_row[:, None] & (d < D)[None, :]
        sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        part = _offsets(rows, d, D, 1)
        for _ in range(0, splits):
            sums += tl.load(dx_hat + part, mask=mask, other=0.0)
            part += N * D
        row_g_lse = tl.load(g_lse + rows, mask=is_row, other=0.0)
        active = _is_active(row_g_lse, tl.load(g_cos + rows, mask=is_row, other=0.0))
        norm = tl.load(x_norm + rows, mask=is_row & active, other=1.0)
        inverse = 1 / tl.maximum(norm, EPS)
        x_tile = tl.load(
            x + _offsets(rows, d, x_row_stride, x_column_stride), mask=mask & active[:, None], other=0.0
        ).to(tl.float32)
        dot = tl.load(scale + rows, mask=is_row, other=0.0) * from_negatives
        dot += tl.load(target_dot + rows, mask=is_row, other=0.0)
        dot = tl.where(norm > EPS, dot, 0.0)  # no projection where the norm was clamped
        unlift = tl.load(unit + rows, mask=is_row, other=1.0) / G_LIFT
        gradient = (sums * unlift[:, None] - dot[:, None] * (x_tile * inverse[:, None])) * inverse[:, None]
        tl.store(dx + _offsets(rows, d, D, 1), gradient.to(dx.dtype.element_ty), mask=mask)
