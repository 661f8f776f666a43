"""Kernels of backend `triton` for Hopper, in Gluon: one warp loads, two groups of warps multiply in turn.

A program keeps its block of rows of x in shared memory and streams w past it, in tiles of BLOCK_C classes and
STEP columns, through a ring of slots. The groups take whole tiles of classes alternately, so that the epilogue of
one runs while the other multiplies. Letters, arguments and rounding are those of `triton_kernels.py`, but that x
and w are descriptors; operands are bfloat16 or float16, D is a multiple of STEP, and there are no options.

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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from cosface_kernels.backends.triton_kernels import EPS, G_LIFT, LOG2_E, _factor, _finite, _is_active, _shrink

STEP = gl.constexpr(64)  # columns of a tile: 128 bytes, a row of the widest swizzle
GROUPS = gl.constexpr(2)
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name until Triton 3.6


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
        _copy(x, [row, step * STEP], ready, x_tiles.index(step))
    for load in range(tiles * STEPS):
        slot = load % SLOTS
        mbarrier.wait(empty.index(slot), (load // SLOTS & 1) ^ 1)  # the first is over before it begins
        mbarrier.expect(full.index(slot), w.block_type.nbytes)
        place = [first_class + load // STEPS * w.block_type.shape[0], load % STEPS * STEP]
        _copy(w, place, full.index(slot), w_slots.index(slot))


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
    """`triton_kernels.class_statistics`, each split in two.

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
def _gradients(
    memory, norms, per_row, results, N, C, chunk, row_block, first_class, first_tile, tiles, BLOCK_N: gl.constexpr,
    BLOCK_C: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Of one group's tiles."""
    w_norm, x_norm = norms
    targets, scale, top, log_sum, g_lse, g_cos, unit = per_row
    g, negative_dot, class_dot = results
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_C, 16])
    # In halves of the classes, one after the other: cos and p of all of them are 256 registers.
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_C // 2, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, HALF)
    rows = row_block * BLOCK_N + gl.arange(0, BLOCK_N, layout=OF_ROWS)
    is_row = rows < N
    mbarrier.wait(memory[2], 0)  # ready
    for tile in range(GROUP, tiles, GROUPS):
        zero = gl.full((BLOCK_N, BLOCK_C), 0.0, gl.float32, layout=SUMS)
        dot = _multiply(memory, tile, zero, GROUP)
        row_g_lse = gl.load(g_lse + rows, mask=is_row, other=0.0)
        row_g_cos = gl.load(g_cos + rows, mask=is_row, other=0.0)
        active = is_row & _is_active(row_g_lse, row_g_cos)
        target = gl.load(targets + rows, mask=is_row, other=-1).to(gl.int32)
        s = gl.load(scale + rows, mask=is_row, other=0.0)
        row_top = gl.load(top + rows, mask=active, other=0.0)
        row_log_sum = gl.load(log_sum + rows, mask=active, other=float("inf"))
        row_log_sum = gl.where(row_log_sum == -float("inf"), float("inf"), row_log_sum)
        x_inverse = 1 / gl.maximum(gl.load(x_norm + rows, mask=active, other=1.0), EPS)
        lift = G_LIFT / gl.load(unit + rows, mask=is_row, other=1.0)
        from_negatives = gl.full((BLOCK_N,), 0.0, gl.float32, layout=OF_ROWS)
        halves = dot.reshape((BLOCK_N, 2, BLOCK_C // 2)).permute((0, 2, 1)).split()
        for half in gl.static_range(2):
            of_half = gl.arange(0, BLOCK_C // 2, layout=gl.SliceLayout(0, HALF))
            columns = (first_tile + tile) * BLOCK_C + half * (BLOCK_C // 2) + of_half
            classes = first_class + columns
            w_inverse = _inverse_norm(w_norm, classes, C)[None, :]
            cos = gl.where(active[:, None], gl.convert_layout(halves[half], HALF), 0.0)
            cos = cos * x_inverse[:, None] * w_inverse
            is_target = classes[None, :] == target[:, None]
            below = gl.where(is_target, -float("inf"), cos) - row_top[:, None]
            log_p = _factor(s)[:, None] * below - (row_log_sum * LOG2_E)[:, None]
            p = gl.exp2(gl.minimum(log_p, 0.0, propagate_nan=tl.PropagateNan.ALL))
            from_negatives += gl.sum(p * cos, 1)
            gradient = gl.where(is_target, row_g_cos[:, None], (s * row_g_lse)[:, None] * p)
            gl.store(class_dot + row_block.to(gl.int64) * chunk + columns, gl.sum(gradient * cos, 0))
            if g.dtype.element_ty != gl.float16:
                gradient *= w_inverse
            places = rows[:, None].to(gl.int64) * chunk + columns[None, :]
            gl.store(g + places, (gradient * lift[:, None]).to(g.dtype.element_ty), mask=is_row[:, None])
        slots = negative_dot + (first_tile + tile).to(gl.int64) * N + rows
        so_far = gl.load(slots, mask=is_row, other=0.0)
        gl.store(slots, so_far + row_g_lse * from_negatives, mask=is_row)


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
    """`triton_kernels.logit_gradients` of one chunk of classes.

    Grid (row blocks, splits). g is also written where a tile passes the last class: some number, which no one
    reads but to multiply it by 0. A mask of the columns would keep stores from taking two at a time.
    """
    memory = _memory(x, w, D, SLOTS)
    row_block = gl.program_id(0)
    first = gl.program_id(1) * tiles_per_split
    tiles = gl.minimum(tiles_per_split, gl.cdiv(gl.minimum(chunk, C - first_class), BLOCK_C) - first)
    norms, per_row = (w_norm, x_norm), (targets, scale, top, log_sum, g_lse, g_cos, unit)
    results = g, negative_dot, class_dot
    gl.warp_specialize(
        [
            (
                _gradients,
                (
                    memory, norms, per_row, results, N, C, chunk, row_block, first_class, first, tiles, BLOCK_N,
                    BLOCK_C, 0,
                ),
            ),
            (
                _gradients,
                (
                    memory, norms, per_row, results, N, C, chunk, row_block, first_class, first, tiles, BLOCK_N,
                    BLOCK_C, 1,
                ),
            ),
            (_load_tiles, (x, w, memory, row_block * BLOCK_N, first_class + first * BLOCK_C, tiles)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
