"""The Triton kernels of backend `triton` for a gradient_tolerance; `sparse.py` of the package above launches them.

Letters as in `kernels`. An entry is a class with its cosine, kept of a sample: p_ij above a cut of the
sample's own. Of a row of entries the first is the target's. No result depends on what ran first: a program writes
where it alone writes, at places that it counts itself.
"""

import triton
import triton.language as tl

from cosface_kernels.backends.triton.kernels.common import (
    EPS,
    LOG2_E,
    _class_factor,
    _dot_tile,
    _factor,
    _offsets,
    _upcast,
    _weight_rows,
)


@triton.jit
def _log2_probabilities(cos, factor, top, log2_sum):
    """log2 p, at most 0; -inf where log2_sum is inf."""
    return tl.minimum(factor * (cos - top) - log2_sum, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _log2_sum(log_sum):
    """inf of a row without negatives, in which no p is above 0."""
    return tl.where(log_sum == -float("inf"), float("inf"), log_sum * LOG2_E)


@triton.jit
def _negative_cosines(
    x,
    w,
    chosen,
    w_norm,
    x_norm,
    targets,
    rows,
    classes,
    N,
    C,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """cos_ij of a tile, -inf where j = y_i and where there is no class."""
    is_row, is_class = rows < N, classes < C
    w_rows = _weight_rows(chosen, classes, is_class, CHOSEN)
    dot = _dot_tile(
        x, w, rows, w_rows, is_row, is_class, D, BLOCK_N, BLOCK_C, BLOCK_D, OPERAND, PRECISION,
    )  # fmt: skip
    target = tl.load(targets + rows, mask=is_row, other=-1).to(tl.int32)
    x_inverse = 1 / tl.maximum(tl.load(x_norm + rows, mask=is_row, other=1.0), EPS)
    cos = dot * x_inverse[:, None] * _class_factor(w_norm, classes, is_class, NORMALIZE)[None, :]
    return tl.where(is_class[None, :] & (classes[None, :] != target[:, None]), cos, -float("inf"))


@triton.jit(do_not_specialize=["N", "C", "steps", "tiles", "stride", "tiles_per_split"])
def sample_entries(
    x,
    w,
    chosen,
    w_norm,
    x_norm,
    targets,
    scale,
    top,
    log_sum,
    masses,
    counts,
    N,
    C,
    largest_cut,
    steps,
    tiles,
    stride,
    tiles_per_split,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Of every stride-th tile, by the cut that half a bit times its number is below the largest: the p, summed,
    of entries that are not above it, and the number of those that are.

    Grid (row blocks, splits of the sampled tiles). masses, counts: (splits, N, STEPS).
    """
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    factor = _factor(tl.load(scale + rows, mask=is_row, other=0.0))[:, None]
    row_top = tl.load(top + rows, mask=is_row, other=0.0)[:, None]
    log2_sum = _log2_sum(tl.load(log_sum + rows, mask=is_row, other=-float("inf")))[:, None]
    step = tl.arange(0, STEPS)
    mass = tl.zeros((BLOCK_N, STEPS), tl.float32)
    count = tl.zeros((BLOCK_N, STEPS), tl.float32)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        classes = tile * stride * BLOCK_C + tl.arange(0, BLOCK_C)
        cos = _negative_cosines(
            x, w, chosen, w_norm, x_norm, targets, rows, classes, N, C, D, BLOCK_N, BLOCK_C, BLOCK_D,
            OPERAND, PRECISION, NORMALIZE, CHOSEN,
        )  # fmt: skip
        log_p = _log2_probabilities(cos, factor, row_top, log2_sum)
        p = tl.exp2(log_p)
        for number in range(0, steps):
            above = log_p > largest_cut - 0.5 * number  # nan is not, and enters the mass
            here = (step == number)[None, :]
            mass += tl.where(here, tl.sum(tl.where(above, 0.0, p), 1)[:, None], 0.0)
            count += tl.where(here, tl.sum(tl.where(above, 1.0, 0.0), 1)[:, None], 0.0)
    slots = _offsets(split.to(tl.int64) * N + rows, step, STEPS)
    mask = is_row[:, None] & (step < STEPS)[None, :]
    tl.store(masses + slots, mass, mask=mask)
    tl.store(counts + slots, count, mask=mask)


@triton.jit(do_not_specialize=["N", "C", "splits", "capacity", "tiles_per_split"])
def keep_entries(
    x,
    w,
    chosen,
    w_norm,
    x_norm,
    targets,
    scale,
    top,
    log_sum,
    cuts,
    split_classes,
    split_cosines,
    counts,
    dropped,
    N,
    C,
    splits,
    capacity,
    tiles_per_split,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """The entries of a split of the classes whose log2 p is above their row's cut, by class, and the p of others.

    That p is found to be above by its cosine, so that no register holds both.

    Grid (row blocks, splits). A row with the cut inf drops all, and a block of such rows computes nothing.
    split_classes, split_cosines: (N, splits, capacity). counts: (splits, N), of what is above, be there room or
    not. dropped: (splits, N).
    """
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    cut = tl.load(cuts + rows, mask=is_row, other=float("inf"))
    factor = _factor(tl.load(scale + rows, mask=is_row, other=0.0))
    row_top = tl.load(top + rows, mask=is_row, other=0.0)
    log2_sum = _log2_sum(tl.load(log_sum + rows, mask=is_row, other=-float("inf")))
    least = row_top + (cut + log2_sum) / factor  # the cosine that has the cut's p
    mass = tl.where(cut == float("inf"), float("inf"), 0.0)
    count = tl.zeros((BLOCK_N,), tl.int32)
    first_slot = (rows.to(tl.int64) * splits + split) * capacity
    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(C, BLOCK_C))
    last_tile = tl.where(tl.min(cut, 0) == float("inf"), 0, last_tile)
    for tile in range(split * tiles_per_split, last_tile):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        cos = _negative_cosines(
            x, w, chosen, w_norm, x_norm, targets, rows, classes, N, C, D, BLOCK_N, BLOCK_C, BLOCK_D,
            OPERAND, PRECISION, NORMALIZE, CHOSEN,
        )  # fmt: skip
        p = tl.exp2(_log2_probabilities(cos, factor[:, None], row_top[:, None], log2_sum[:, None]))
        kept = cos > least[:, None]  # nan is not, and enters the mass
        mass += tl.sum(tl.where(kept, 0.0, p), 1)
        left = tl.sum(kept.to(tl.int32), 1)
        last = tl.full((BLOCK_N,), -1, tl.int32)
        # One of each row at a time, since rows have few: places for all at once, a running count along the rows,
        # would take more registers than the product leaves. Triton 3.6 and 3.7 fail on sm_100 where the length of
        # a for loop follows from a product.
        while tl.max(left, 0) > 0:
            is_next = (cos > least[:, None]) & (classes[None, :] > last[:, None])
            last = tl.min(tl.where(is_next, classes[None, :], 2147483647), 1)
            value = tl.max(tl.where(classes[None, :] == last[:, None], cos, -float("inf")), 1)
            has_room = (left > 0) & (count < capacity)
            tl.store(split_classes + first_slot + count, last, mask=has_room)
            tl.store(split_cosines + first_slot + count, value, mask=has_room)
            count += (left > 0).to(tl.int32)
            left -= 1
    to = split.to(tl.int64) * N + rows
    tl.store(counts + to, count, mask=is_row)
    tl.store(dropped + to, mass, mask=is_row)


@triton.jit(do_not_specialize=["N", "C", "splits", "capacity", "slots"])
def pack_entries(
    split_classes, split_cosines, counts, targets, target_cos, classes, cosines, N, C, splits, capacity, slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The target's entry and then those of the splits in order, one row a program; C where there is no entry.

    classes, cosines: (N, slots).
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    tl.store(classes + row * slots, tl.where(target < 0, C, tl.minimum(target, C)).to(tl.int32))
    tl.store(cosines + row * slots, tl.load(target_cos + row))
    place = 1
    for split in range(0, splits):
        count = tl.minimum(tl.load(counts + split * N + row), tl.minimum(capacity, slots - place))
        source = (row * splits + split) * capacity
        for first in range(0, count, BLOCK):
            k = first + tl.arange(0, BLOCK)
            to = row * slots + place + k
            tl.store(classes + to, tl.load(split_classes + source + k, mask=k < count, other=0), mask=k < count)
            tl.store(cosines + to, tl.load(split_cosines + source + k, mask=k < count, other=0.0), mask=k < count)
        place += count
    for first in range(place, slots, BLOCK):
        k = first + tl.arange(0, BLOCK)
        tl.store(classes + row * slots + k, tl.zeros((BLOCK,), tl.int32) + C, mask=k < slots)


@triton.jit(do_not_specialize=["C", "slots"])
def entry_gradients(
    classes, cosines, scale, top, log_sum, g_lse, g_cos, keys, g, ends, row_dot, dscale, C, slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """G of the entries, one row a program: g_cos of the target's, s g_lse p of the others.

    keys: (N, slots), the classes, C where there is no entry, and in all of a row without gradient. g: (N, slots).
    ends: (N,), slots up to the last entry. row_dot: (N,), sum G cos. dscale: (N,), sum g_lse p cos.
    """
    row = tl.program_id(0).to(tl.int64)
    s, row_g_lse, row_g_cos = tl.load(scale + row), tl.load(g_lse + row), tl.load(g_cos + row)
    factor, row_top, log2_sum = _factor(s), tl.load(top + row), _log2_sum(tl.load(log_sum + row))
    classes_of_row = tl.where(row_g_lse != 0.0, C, tl.where(row_g_cos != 0.0, C, 0))
    along, along_scale = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    end = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, slots, BLOCK):
        k = first + tl.arange(0, BLOCK)
        at = row * slots + k
        j = tl.load(classes + at, mask=k < slots, other=-1)
        cos = tl.load(cosines + at, mask=k < slots, other=0.0)
        is_entry = (j >= 0) & (j < classes_of_row)
        p = tl.exp2(_log2_probabilities(cos, factor, row_top, log2_sum))
        gradient = tl.where(is_entry, tl.where(k == 0, row_g_cos, s * row_g_lse * p), 0.0)
        along += tl.where(is_entry, gradient * cos, 0.0)
        along_scale += tl.where(is_entry & (k > 0), row_g_lse * p * cos, 0.0)
        end = tl.maximum(end, tl.where(is_entry, k + 1, 0))
        tl.store(keys + at, tl.where(is_entry, j, C), mask=k < slots)
        tl.store(g + at, gradient, mask=k < slots)
    tl.store(ends + row, tl.max(end, 0))
    tl.store(row_dot + row, tl.sum(along, 0))
    tl.store(dscale + row, tl.sum(along_scale, 0))


@triton.jit(do_not_specialize=["C", "slots"])
def entry_embedding_gradients(
    keys,
    g,
    ends,
    row_dot,
    w,
    chosen,
    w_norm,
    x,
    x_norm,
    dx,
    C,
    slots,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """dx_i = (sum_k G_ik w_hat_k - row_dot_i x_hat_i) / |x_i| over the entries k of a row, in their order.

    Grid (N, column blocks).
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(ends + row)
    sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first in range(0, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        j = tl.load(keys + row * slots + k, mask=k < end, other=C)
        is_entry = j < C
        factor = tl.load(g + row * slots + k, mask=is_entry, other=0.0)
        factor *= _class_factor(w_norm, j, is_entry, NORMALIZE)
        w_rows = _weight_rows(chosen, j, is_entry, CHOSEN)
        tile = tl.load(w + _offsets(w_rows, d, D), mask=is_entry[:, None] & (d < D)[None, :], other=0.0)
        sums += factor[:, None] * _upcast(tile, OPERAND).to(tl.float32)
    norm = tl.load(x_norm + row)
    inverse = 1 / tl.maximum(norm, EPS)
    dot = tl.where(norm > EPS, tl.load(row_dot + row), 0.0)  # no projection where the norm was clamped
    x_mask = d < tl.where(end > 0, D, 0)
    place = row * D + d
    x_row = tl.load(x + place, mask=x_mask, other=0.0).to(tl.float32)
    gradient = (tl.sum(sums, 0) - dot * (x_row * inverse)) * inverse
    tl.store(dx + place, tl.where(x_mask, gradient, 0.0).to(dx.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["C", "slots"])
def entry_weight_gradients(
    places,
    starts,
    g,
    cosines,
    x,
    x_norm,
    w,
    chosen,
    w_norm,
    exact_rows,
    dw,
    C,
    first_class,
    chunk,
    slots,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """dw_j = (sum_k G_k x_hat_k - (sum_k G_k cos_k) w_hat_j) / |w_j| over the entries k of a class, by sample.

    Grid (blocks of classes of the chunk, column blocks).
    places: of the entries, sorted by class; starts: (C + 1,), where those of a class begin among them.
    dw: (chunk, D), added to where there are exact rows, else written.
    """
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    classes = first_class + columns
    is_class = classes < C
    is_d = (d < D)[None, :]
    start = tl.load(starts + classes, mask=is_class, other=0)
    count = (tl.load(starts + classes + 1, mask=is_class, other=0) - start).to(tl.int32)
    sums = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    dots = tl.zeros((BLOCK_C,), tl.float32)
    for k in range(0, tl.max(count, 0)):
        # Another entry, which counts for nothing, where a class has fewer. Triton 3.6 and 3.7 fail where one mask
        # is used for both a vector and, along D, a matrix.
        at = tl.load(places + tl.maximum(start + tl.minimum(k, count - 1), 0))
        rows = at // slots
        of_entry = tl.where(k < count, tl.load(g + at), 0.0)
        dots += tl.where(of_entry != 0.0, of_entry * tl.load(cosines + at), 0.0)
        inverse = 1 / tl.maximum(tl.load(x_norm + rows), EPS)
        factor = tl.where(of_entry != 0.0, of_entry * inverse, 0.0)
        mask = (factor != 0.0)[:, None] & is_d
        tile = tl.load(x + _offsets(rows, d, D), mask=mask, other=0.0)
        sums += factor[:, None] * tile.to(tl.float32)
    if NORMALIZE:
        norm = tl.load(w_norm + classes, mask=is_class, other=1.0)
        inverse = 1 / tl.maximum(norm, EPS)
        along_w = tl.where(norm > EPS, dots * inverse * inverse, 0.0)
        w_rows = _weight_rows(chosen, classes, is_class, CHOSEN)
        w_tile = tl.load(w + _offsets(w_rows, d, D), mask=(count > 0)[:, None] & is_d, other=0.0)
        sums = sums * inverse[:, None] - along_w[:, None] * _upcast(w_tile, OPERAND).to(tl.float32)
    else:
        sums *= _class_factor(w_norm, classes, is_class, NORMALIZE)[:, None]  # as of what is stored
    is_written = is_class & (columns < chunk)
    limit = tl.where(tl.load(exact_rows) > 0, D, 0)
    to = dw + _offsets(columns, d, D)
    sums += tl.load(to, mask=is_written[:, None] & (d < limit)[None, :], other=0.0).to(tl.float32)
    tl.store(to, sums.to(dw.dtype.element_ty), mask=is_written[:, None] & is_d)
