"""Kernels of backend `triton` for Hopper, in Gluon: one warp loads, two groups of warps multiply in turn.

A program keeps its block of rows of x in shared memory and streams w past it, in tiles of BLOCK_C classes and
STEP columns, through a ring of slots. The groups take whole tiles of classes alternately, so that the epilogue of
one runs while the other multiplies. Letters, arguments and rounding are those of `forward.py` and `backward.py`,
but that x and w are descriptors; operands are bfloat16 or float16, D is a multiple of STEP, and there are no
options.

Barriers, each of one arrival a phase:

| barrier | completed by | waited for by |
|---|---|---|
| ready | x, when it has arrived | both groups |
| full, of a slot | a tile of w, when it has arrived | the group whose tile it is |
| empty, of a slot | that group, when its products have read it | the loading warp |
| turns, of a group | the other group, when it has seen its last slot full | the group, before its first slot |

A wait names a phase by its parity alone. Without turns a group could take a phase of its slot for the one before
it, which was the other group's.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cosface_kernels.backends.triton.kernels.common import (
    EPS,
    G_LIFT,
    LOG2_E,
    _factor,
    _finite,
    _is_active,
    _shrink,
)

STEP = gl.constexpr(64)  # columns of a tile: 128 bytes, a row of the widest swizzle
GROUPS = gl.constexpr(2)
PARTS = gl.constexpr(4)  # of a tile's classes in an epilogue
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # their names in Triton 3.6
_store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


def describe(matrix, rows, columns):
    """What a kernel takes as x, w or g: a matrix of 16-bit numbers, in such blocks."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


@gluon.jit
def _memory(x, w, D: gl.constexpr, SLOTS: gl.constexpr):
    """The tiles of x, the ring of w's, and the barriers."""
    x_tiles = gl.allocate_shared_memory(x.dtype, [D // STEP, x.block_type.shape[0], STEP], x.layout)
    w_slots = gl.allocate_shared_memory(w.dtype, [SLOTS, w.block_type.shape[0], STEP], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    for group in gl.static_range(GROUPS):
        mbarrier.init(turns.index(group), count=1)
    return x_tiles, w_slots, ready, full, empty, turns


@gluon.jit
def _load_tiles(x, w, memory, row, first_class, tiles):
    """The one warp that loads: rows of x, and tiles of w from the first class on."""
    x_tiles, w_slots, ready, full, empty, _ = memory
    STEPS: gl.constexpr = x_tiles.type.shape[0]
    SLOTS: gl.constexpr = w_slots.type.shape[0]
    mbarrier.expect(ready, STEPS * x.block_type.nbytes)
    for step in gl.static_range(STEPS):
        _load_tile(x, [row, step * STEP], ready, x_tiles.index(step))
    for load in range(tiles * STEPS):
        slot = load % SLOTS
        mbarrier.wait(empty.index(slot), (load // SLOTS & 1) ^ 1)  # the first is over before it begins
        mbarrier.expect(full.index(slot), w.block_type.nbytes)
        place = [first_class + load // STEPS * w.block_type.shape[0], load % STEPS * STEP]
        _load_tile(w, place, full.index(slot), w_slots.index(slot))


@gluon.jit
def _multiply(memory, tile, sums, GROUP: gl.constexpr):
    """<x_i, w_j> of the group's next tile, the tile-th of the program, in place of sums."""
    x_tiles, w_slots, _, full, empty, turns = memory
    STEPS: gl.constexpr = x_tiles.type.shape[0]
    SLOTS: gl.constexpr = w_slots.type.shape[0]
    mbarrier.wait(turns.index(GROUP), (tile // GROUPS + 1 + GROUP) & 1)  # group 0's first is over
    first, last = tile * STEPS, (tile + 1) * STEPS - 1
    for load in range(first, last + 1):
        slot = load % SLOTS
        mbarrier.wait(full.index(slot), load // SLOTS & 1)
        mbarrier.arrive(turns.index(1 - GROUP), count=1, pred=load == last)
        w_tile = w_slots.index(slot).permute((1, 0))
        sums = warpgroup_mma(x_tiles.index(load - first), w_tile, sums, use_acc=load > first, is_async=True)
        sums = warpgroup_mma_wait(num_outstanding=1, deps=[sums])
        mbarrier.arrive(empty.index((load + SLOTS - 1) % SLOTS), count=1, pred=load > first)
    sums = warpgroup_mma_wait(num_outstanding=0, deps=[sums])
    mbarrier.arrive(empty.index(last % SLOTS), count=1)
    return sums


@gluon.jit
def _inverse_norm(w_norm, classes, C):
    """1 / |w_j|; of the last class where there is none, because a mask would take a register for each."""
    return 1 / gl.maximum(gl.load(w_norm + gl.minimum(classes, C - 1)), EPS)


@gluon.jit
def _statistics(
    memory, norms, per_row, results, N, C, row, first_class, tiles, slot, BLOCK_N: gl.constexpr,
    BLOCK_C: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Of one group's tiles."""
    w_norm, x_norm = norms
    targets, scale = per_row
    top, sum_exp = results
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_C, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    rows = row + gl.arange(0, BLOCK_N, layout=OF_ROWS)
    is_row = rows < N
    running_max = gl.full((BLOCK_N,), -float("inf"), gl.float32, layout=OF_ROWS)
    running_sum = gl.full((BLOCK_N,), 0.0, gl.float32, layout=OF_ROWS)
    mbarrier.wait(memory[2], 0)  # ready
    for tile in range(GROUP, tiles, GROUPS):
        zero = gl.full((BLOCK_N, BLOCK_C), 0.0, gl.float32, layout=SUMS)
        dot = _multiply(memory, tile, zero, GROUP)
        # Loaded for each tile, so that no register holds them beside the sums.
        target = gl.load(targets + rows, mask=is_row, other=-1).to(gl.int32)
        x_inverse = 1 / gl.maximum(gl.load(x_norm + rows, mask=is_row, other=1.0), EPS)
        factor = _factor(gl.load(scale + rows, mask=is_row, other=0.0))
        classes = first_class + tile * BLOCK_C + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, SUMS))
        cos = dot * x_inverse[:, None] * _inverse_norm(w_norm, classes, C)[None, :]
        is_negative = (classes < C)[None, :] & (classes[None, :] != target[:, None])
        cos = gl.where(is_negative, cos, -float("inf"))
        new_max = gl.maximum(running_max, gl.max(cos, 1))
        base = _finite(new_max)
        terms = gl.exp2(factor[:, None] * (cos - base[:, None]))
        running_sum = running_sum * _shrink(factor, running_max, base) + gl.sum(terms, 1)
        running_max = new_max
    slots = slot.to(gl.int64) * N + rows
    gl.store(top + slots, running_max, mask=is_row)
    gl.store(sum_exp + slots, running_sum, mask=is_row)


@gluon.jit(do_not_specialize=["N", "C", "tiles_per_split"])
def class_statistics(
    x,
    w,
    w_norm,
    x_norm,
    targets,
    scale,
    top,
    sum_exp,
    N,
    C,
    tiles_per_split,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_C: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """`forward.class_statistics`, each split in two.

    Grid (row blocks, splits). top, sum_exp: (GROUPS splits, N).
    """
    memory = _memory(x, w, D, SLOTS)
    row, split = gl.program_id(0) * BLOCK_N, gl.program_id(1)
    first = split * tiles_per_split
    tiles = gl.minimum(tiles_per_split, gl.cdiv(C, BLOCK_C) - first)
    norms, per_row, results = (w_norm, x_norm), (targets, scale), (top, sum_exp)
    first_class, slot = first * BLOCK_C, split * GROUPS
    gl.warp_specialize(
        [
            (
                _statistics,
                (memory, norms, per_row, results, N, C, row, first_class, tiles, slot, BLOCK_N, BLOCK_C, 0),
            ),
            (
                _statistics,
                (memory, norms, per_row, results, N, C, row, first_class, tiles, slot + 1, BLOCK_N, BLOCK_C, 1),
            ),
            (_load_tiles, (x, w, memory, row, first_class, tiles)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _row_numbers(targets, scale, top, log_sum, g_lse, g_cos, x_norm, unit, N, row_block, BLOCK_N: gl.constexpr):
    """What `_gradients` reads of each row, in shared memory: registers would spill, be it numbers or addresses."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.float32, [8, BLOCK_N], FLAT)
    row_targets = gl.allocate_shared_memory(gl.int32, [BLOCK_N], FLAT)
    rows = row_block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [4], [0]))
    is_row = rows < N
    row_g_lse = gl.load(g_lse + rows, mask=is_row, other=0.0)
    row_g_cos = gl.load(g_cos + rows, mask=is_row, other=0.0)
    active = is_row & _is_active(row_g_lse, row_g_cos)
    s = gl.load(scale + rows, mask=is_row, other=0.0)
    row_log_sum = gl.load(log_sum + rows, mask=active, other=float("inf"))
    row_log_sum = gl.where(row_log_sum == -float("inf"), float("inf"), row_log_sum)
    lift = G_LIFT / gl.load(unit + rows, mask=is_row, other=1.0)
    row_targets.store(gl.load(targets + rows, mask=is_row, other=-1).to(gl.int32))
    numbers.index(0).store(1 / gl.maximum(gl.load(x_norm + rows, mask=active, other=1.0), EPS))
    numbers.index(1).store(_factor(s))
    numbers.index(2).store(gl.load(top + rows, mask=active, other=0.0))
    numbers.index(3).store(row_log_sum * LOG2_E)
    numbers.index(4).store(s * row_g_lse)
    numbers.index(5).store(row_g_cos)
    numbers.index(6).store(gl.where(active, lift, 0.0))
    numbers.index(7).store(row_g_lse)
    return row_targets, numbers


@gluon.jit
def _halves(values):
    """Of the columns."""
    return values.reshape((values.shape[0], 2, values.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _gradients(
    memory, w_norm, per_row, results, N, C, chunk, row_block, first_class, first_tile, tiles,
    BLOCK_N: gl.constexpr, BLOCK_C: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Of one group's tiles, each in PARTS of its classes: cos and p of all of them are 256 registers.

    A loop and not its expansion, in which a compiler mixes the parts, each of which then waits in registers.
    """
    targets, numbers = per_row
    g, negative_dot, class_dot = results
    WIDTH: gl.constexpr = BLOCK_C // PARTS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_C, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, PART)
    OF_WARPS: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0])
    rows = row_block * BLOCK_N + gl.arange(0, BLOCK_N, layout=OF_ROWS)
    is_row = rows < N
    g_tile = gl.allocate_shared_memory(g.dtype, g.block_type.shape, g.layout)
    mbarrier.wait(memory[2], 0)  # ready
    for tile in range(GROUP, tiles, GROUPS):
        zero = gl.full((BLOCK_N, BLOCK_C), 0.0, gl.float32, layout=SUMS)
        left, right = _halves(_multiply(memory, tile, zero, GROUP))
        dot, second = _halves(left)
        third, fourth = _halves(right)
        dot, second = gl.convert_layout(dot, PART), gl.convert_layout(second, PART)
        third, fourth = gl.convert_layout(third, PART), gl.convert_layout(fourth, PART)
        from_negatives = gl.full((BLOCK_N,), 0.0, gl.float32, layout=OF_ROWS)
        for part in range(PARTS):
            column = (first_tile + tile) * BLOCK_C + part * WIDTH
            classes = first_class + column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, PART))
            lift = numbers.index(6).load(OF_ROWS)[:, None]  # 0 of a row that is not active
            w_inverse = _inverse_norm(w_norm, classes, C)[None, :]
            cos = gl.where(lift > 0.0, dot, 0.0) * numbers.index(0).load(OF_ROWS)[:, None] * w_inverse
            is_target = classes[None, :] == targets.load(OF_ROWS)[:, None]
            below = gl.where(is_target, -float("inf"), cos) - numbers.index(2).load(OF_ROWS)[:, None]
            factor, log_sum = numbers.index(1).load(OF_ROWS), numbers.index(3).load(OF_ROWS)
            log_p = factor[:, None] * below - log_sum[:, None]
            p = gl.exp2(gl.minimum(log_p, 0.0, propagate_nan=tl.PropagateNan.ALL))
            from_negatives += gl.sum(p * cos, 1)
            g_cos, s_g_lse = numbers.index(5).load(OF_ROWS), numbers.index(4).load(OF_ROWS)
            gradient = gl.where(is_target, g_cos[:, None], s_g_lse[:, None] * p)
            lifted = gradient * lift
            if g.dtype != gl.float16:
                lifted *= w_inverse
            # Within each warp, whose rows are 16 of every 64, then over the four of them.
            of_warps = gl.sum(gl.sum((gradient * cos).reshape((BLOCK_N // 64, 4, 16, WIDTH)), 2), 0)
            of_classes = gl.sum(gl.convert_layout(of_warps, OF_WARPS), 0)
            columns = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, OF_WARPS))
            gl.store(class_dot + row_block.to(gl.int64) * chunk + columns, of_classes)
            tma.store_wait(0)  # until the part before is read
            g_tile.store(lifted.to(g.dtype))
            fence_async_shared()
            _store_tile(g, [row_block * BLOCK_N, column], g_tile)
            dot, second, third = second, third, fourth
        slots = negative_dot + (first_tile + tile).to(gl.int64) * N + rows
        so_far = gl.load(slots, mask=is_row, other=0.0)
        gl.store(slots, so_far + numbers.index(7).load(OF_ROWS) * from_negatives, mask=is_row)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "C", "first_class", "tiles_per_split"])
def logit_gradients(
    x,
    w,
    w_norm,
    targets,
    scale,
    top,
    log_sum,
    g_lse,
    g_cos,
    x_norm,
    unit,
    g,
    negative_dot,
    class_dot,
    N,
    C,
    first_class,
    chunk,
    tiles_per_split,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_C: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """`backward.logit_gradients` of one chunk of classes.

    Grid (row blocks, splits). g: a descriptor, in blocks of BLOCK_N x BLOCK_C / PARTS.
    """
    memory = _memory(x, w, D, SLOTS)
    row_block = gl.program_id(0)
    first = gl.program_id(1) * tiles_per_split
    tiles = gl.minimum(tiles_per_split, gl.cdiv(gl.minimum(chunk, C - first_class), BLOCK_C) - first)
    per_row = _row_numbers(targets, scale, top, log_sum, g_lse, g_cos, x_norm, unit, N, row_block, BLOCK_N)
    results = g, negative_dot, class_dot
    gl.warp_specialize(
        [
            (
                _gradients,
                (
                    memory, w_norm, per_row, results, N, C, chunk, row_block, first_class, first, tiles, BLOCK_N,
                    BLOCK_C, 0,
                ),
            ),
            (
                _gradients,
                (
                    memory, w_norm, per_row, results, N, C, chunk, row_block, first_class, first, tiles, BLOCK_N,
                    BLOCK_C, 1,
                ),
            ),
            (_load_tiles, (x, w, memory, row_block * BLOCK_N, first_class + first * BLOCK_C, tiles)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
