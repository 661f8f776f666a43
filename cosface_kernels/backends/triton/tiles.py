"""Block sizes of the Triton kernels: a small table per architecture; `choice.py` chooses among its entries.

The table is short because little else survives ahead-of-time compilation: on every architecture a candidate may
spill 16 bytes a thread, by which compilers differ, must fit into shared memory and must use the matrix units:
`make kernels` checks it.
"""

import math
from dataclasses import dataclass, replace

import torch

from cosface_kernels.backends import chunks
from cosface_kernels.float8 import FLOAT8

MOVED, MOVED_COLUMNS = 2048, 512  # elements and most columns of a block of rows to move: 16 a thread
MOVED_WHOLE = 1024  # elements, of rows that are computed twice: twice as many registers for each
ROWS, COLUMNS, SPLITS = 8, 64, 64  # blocks of the kernels without a matrix product


@dataclass(frozen=True)
class Tile:
    """Rows, classes and columns of a program's block; what a kernel sums over is the step of its loop.

    specialized: its warps load or multiply, in `kernels.hopper`; stages are the slots of its ring.
    """

    n: int
    c: int
    d: int
    warps: int
    stages: int
    specialized: bool = False

    def __str__(self) -> str:
        if self == LIBRARY:
            return "the library"
        warps, stages = ("specialised warps", "slots") if self.specialized else ("warps", "stages")
        return f"{self.n} x {self.c} x {self.d}, {self.warps} {warps}, {self.stages} {stages}"


REGISTERS = {"reshape", "raw", "kept", "moments", "sigmoid"}  # variants that have tiles of their own
LIBRARY = Tile(0, 0, 0, 0, 0)  # a product of torch's in the kernel's place


@dataclass(frozen=True)
class Key:
    """What the best tile depends on.

    `bucket` is the power of two that holds N; `variant`: what else the kernels are compiled for, in the words of
    `launch.variant`, as each can be wrong on its own; `library`: whether torch could multiply the operands as they
    are; `described`: whether tensor descriptors could load them.
    """

    architecture: str
    dim: int
    x: torch.dtype
    w: torch.dtype
    operand: torch.dtype
    bucket: int
    variant: frozenset[str] = frozenset()
    library: bool = False
    described: bool = False

    @property
    def plain(self) -> bool:
        return self.variant.isdisjoint(REGISTERS)


INTERPRETED = "interpreter"
# Architectures that take the blocks of another, whose matrix units are theirs: on sm_80 none of these needs more
# than the 99 KiB of shared memory that the smaller GPUs have.
ALIKE = dict.fromkeys(("sm_86", "sm_87", "sm_89", "sm_120", "sm_121"), "sm_80")
ALIKE |= {"sm_103": "sm_100", "sm_110": "sm_100", "gfx90a": "gfx942", "gfx950": "gfx942"}
GEMM_KERNELS = ("class_statistics", "logit_gradients", "embedding_gradients", "weight_gradients")
SPARSE_KERNELS = ("keep_entries", "sample_entries")  # likewise with a matrix product, for a gradient_tolerance

# By kernel and bytes of an operand: the default, a smaller block, and one for small batches. 128 x 128 sums in 256
# threads are 64 registers a thread, half of what the epilogues leave; float32 operands as three TensorFloat-32
# products need their high and low halves in registers beside them, hence a quarter of the block.
TABLE: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("class_statistics", 2): (Tile(128, 128, 64, 8, 3), Tile(64, 128, 32, 8, 3), Tile(16, 128, 32, 4, 3)),
    ("logit_gradients", 2): (Tile(64, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(16, 64, 64, 4, 3)),
    ("embedding_gradients", 2): (Tile(128, 64, 128, 8, 2), Tile(64, 64, 64, 4, 2), Tile(16, 64, 64, 4, 2)),
    ("weight_gradients", 2): (Tile(64, 128, 128, 8, 3), Tile(64, 128, 64, 8, 3), Tile(16, 128, 64, 4, 3)),
    ("class_statistics", 4): (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3)),
    ("logit_gradients", 4): (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3)),
    ("embedding_gradients", 4): (Tile(64, 32, 64, 8, 2), Tile(64, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2)),
    ("weight_gradients", 4): (Tile(64, 64, 32, 4, 2), Tile(32, 64, 32, 4, 2)),
    ("keep_entries", 2): (Tile(64, 128, 32, 8, 3), Tile(16, 128, 32, 4, 2)),
    ("keep_entries", 4): (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 8, 3)),
}
# Where an architecture holds more: warp-group products read both operands from shared memory. Where it holds less:
# on sm_80 and sm_100 a block of TABLE would spill 8 to 24 bytes.
OVERRIDES: dict[tuple[str, int, str], tuple[Tile, ...]] = {
    ("class_statistics", 4, "sm_80"): (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 8, 3), Tile(32, 64, 32, 4, 3)),
    ("logit_gradients", 2, "sm_80"): (Tile(64, 128, 64, 8, 3), Tile(128, 64, 32, 8, 2), Tile(16, 64, 64, 4, 3)),
    ("weight_gradients", 2, "sm_80"): (*TABLE["weight_gradients", 2][:2], Tile(16, 64, 64, 4, 3)),
    ("embedding_gradients", 2, "sm_100"): (
        Tile(128, 64, 128, 8, 2),
        Tile(64, 64, 64, 8, 2),
        Tile(16, 64, 64, 4, 2),
    ),
    ("keep_entries", 2, "sm_90"): (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 8, 3), Tile(16, 128, 64, 4, 2)),
    ("logit_gradients", 2, "sm_90"): (Tile(128, 128, 64, 8, 3), *TABLE["logit_gradients", 2]),
    ("embedding_gradients", 2, "sm_90"): (
        Tile(128, 64, 128, 8, 3),
        Tile(64, 64, 128, 4, 3),
        Tile(16, 64, 64, 4, 2),
    ),
}
# Where both products take bfloat16 rows of w as they are, fewer registers are in use: last, a block that reads
# operands the fewest times through L2.
LARGE: dict[tuple[str, str], Tile] = {
    ("class_statistics", "sm_90"): Tile(128, 256, 64, 8, 3),
    ("embedding_gradients", "sm_90"): Tile(128, 64, 256, 8, 3),
    ("weight_gradients", "sm_90"): Tile(64, 256, 128, 8, 3),
}
# With options: reshaped negatives need registers, and so do cosines that are kept.
WITH_OPTIONS: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("class_statistics", 2): (Tile(64, 128, 32, 8, 3), Tile(16, 128, 32, 4, 3)),
    ("logit_gradients", 2): (Tile(64, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(16, 64, 32, 4, 3)),
    ("class_statistics", 4): (Tile(128, 64, 32, 8, 2), Tile(32, 32, 32, 4, 3)),
    ("logit_gradients", 4): (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 3)),
}
# Where the first block of a table, plain or with options, spills or is more than the shared memory: kernel, bytes,
# architecture, plain.
TOO_LARGE = {
    ("class_statistics", 2, "sm_80", True),
    ("class_statistics", 4, "sm_100", False),
    ("logit_gradients", 4, "sm_100", False),
    ("class_statistics", 2, "gfx942", True),
    ("logit_gradients", 2, "gfx942", True),
    *(("keep_entries", 4, arch, plain) for arch in ("sm_80", "sm_100") for plain in (True, False)),
}
# Likewise where a loop over the columns has one step, and for heads of sigmoids.
TOO_LARGE_FOR_ONE_STEP = {("class_statistics", 2, "sm_100")}
TOO_LARGE_FOR_SIGMOIDS = {("logit_gradients", 4, "sm_80")}
# For embeddings whose size is no multiple of 16, and a weight that does not begin at one of 16 bytes: of such rows
# nothing can be copied ahead, and loads go through registers, one number at a time, so that blocks are small and
# nothing is in flight.
RAGGED: dict[str, tuple[Tile, ...]] = {
    "class_statistics": (Tile(64, 32, 32, 8, 1), Tile(32, 64, 32, 8, 1)),
    "logit_gradients": (Tile(64, 32, 32, 4, 1), Tile(32, 32, 32, 8, 1)),
    "embedding_gradients": (Tile(64, 32, 32, 4, 1), Tile(32, 16, 32, 4, 1)),
    "weight_gradients": (Tile(64, 64, 32, 8, 1), Tile(32, 64, 32, 4, 1)),
    "keep_entries": (Tile(64, 32, 32, 8, 1),),
    "sample_entries": (Tile(32, 64, 32, 8, 1),),
}
# Of a weight in float8, with which a small block of these kernels spills 8 bytes in 4 warps on sm_80 and sm_100,
# another 8 bytes in any, and a large one 64 bytes on sm_80 alone.
FLOAT8_WARPS = {"class_statistics": 8, "logit_gradients": 8, "keep_entries": 8}
FLOAT8_BLOCKS = {Tile(16, 128, 32, 4, 3): Tile(16, 64, 32, 8, 2)}
FLOAT8_BLOCKS_ON_SM_80 = FLOAT8_BLOCKS | {Tile(128, 64, 128, 8, 2): Tile(128, 64, 64, 8, 2)}
INTERPRETED_TILE = Tile(32, 64, 32, 4, 1)  # several blocks of everything even in an interpreter's small problems
LIBRARY_KERNELS = ("embedding_gradients", "weight_gradients")
# Of a specialised kernel: bytes of shared memory for all but its operands (barriers; in backward G and numbers of
# rows too), for everything, and the fewest and most slots: one is read, one waits for its product, one arrives.
SPECIALIZED = {"class_statistics": 1 << 10, "logit_gradients": 22 << 10}
SPECIALIZED_MEMORY, SPECIALIZED_SLOTS = 227 << 10, (3, 8)


def table(kernel: str, key: Key) -> tuple[Tile, ...]:
    """The candidates for batches of any size, the default first."""
    if key.architecture == INTERPRETED:
        return (INTERPRETED_TILE,)
    if key.dim % 16 or "unaligned" in key.variant:
        return RAGGED[kernel]
    size = key.operand.itemsize
    tiles = OVERRIDES.get((kernel, size, key.architecture), TABLE[kernel, size])
    if not key.plain:
        tiles = WITH_OPTIONS.get((kernel, size), tiles)
    if key.w is FLOAT8:
        blocks = FLOAT8_BLOCKS_ON_SM_80 if key.architecture == "sm_80" else FLOAT8_BLOCKS
        tiles = tuple(blocks.get(tile, tile) for tile in tiles)
        tiles = tuple(replace(tile, warps=FLOAT8_WARPS.get(kernel, tile.warps)) for tile in tiles)
    where = (kernel, size, key.architecture)
    one_step = key.dim <= tiles[0].d and where in TOO_LARGE_FOR_ONE_STEP
    sigmoids = "sigmoid" in key.variant and where in TOO_LARGE_FOR_SIGMOIDS
    if one_step or sigmoids or (*where, key.plain) in TOO_LARGE:
        return tiles[1:]
    large = LARGE.get((kernel, key.architecture)) if key.x == key.w == torch.bfloat16 and key.plain else None
    return (*tiles, large) if large else tiles


def specialized(kernel: str, key: Key) -> tuple[Tile, ...]:
    """Of `kernels.hopper`, which keeps rows of x in shared memory and passes w through the rest of it."""
    takes = key.architecture == "sm_90" and key.plain and key.described and key.operand.itemsize == 2
    # With one step a tile class_statistics spills 16 bytes under Triton 3.6.
    if not takes or kernel not in SPECIALIZED or key.dim % 64 or key.dim == 64:
        return ()
    n, c, d = 128, 128, 64
    fewest, most = SPECIALIZED_SLOTS
    slots = (SPECIALIZED_MEMORY - SPECIALIZED[kernel] - 2 * n * key.dim) // (2 * c * d)
    return (Tile(n, c, d, 12, min(slots, most), specialized=True),) if slots >= fewest else ()


def candidates(kernel: str, key: Key) -> tuple[Tile, ...]:
    """The table's entries for a batch of this size: with no more rows than its bucket, if there are any."""
    tiles = (*table(kernel, key), *specialized(kernel, key))
    smallest = min(tile.n for tile in tiles)
    fitting = tuple(tile for tile in tiles if tile.n <= max(key.bucket, smallest))
    return (*fitting, LIBRARY) if key.library and kernel in LIBRARY_KERNELS else fitting


def plainest(kernel: str, key: Key) -> Tile:
    """Small, with one stage: it loads, then multiplies."""
    return INTERPRETED_TILE if key.architecture == INTERPRETED else RAGGED[kernel][-1]


def chunk_classes(
    N: int,
    D: int,
    C: int,
    *,
    class_bytes: int,
    workspace_bytes: int,
    row_blocks: int,
    block_c: int,
    processors: int,
) -> int:
    """Classes per chunk of backward, by `chunks.chunk_classes`.

    In whole waves where it can be: a launch has `row_blocks` programs for every `block_c` classes, and its last
    wave takes as long with one program as with one on every processor.
    """
    wave = math.lcm(block_c * processors // math.gcd(processors, row_blocks), chunks.CHUNK_STEP)
    return chunks.chunk_classes(N, D, C, class_bytes=class_bytes, workspace_bytes=workspace_bytes, wave=wave)


def row_block(dim: int, moved: int = MOVED) -> tuple[int, int]:
    """Classes and columns of a block of the kernels that move rows, powers of two: a whole row, if it is short."""
    columns = min(max(1 << (dim - 1).bit_length(), 16), MOVED_COLUMNS)
    return moved // columns, columns
