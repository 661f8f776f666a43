"""Block sizes of the Triton kernels: a small table per architecture, and the choice among its entries by timing.

The table is short because little else survives ahead-of-time compilation: on every architecture a candidate must
not spill registers, must fit into shared memory and must use the matrix units: `make kernels` checks it.
"""

import functools
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

TIMED_RUNS = 3
MOVED, MOVED_COLUMNS = 2048, 1024  # elements and most columns of a block of rows to move: 16 a thread


@dataclass(frozen=True)
class Tile:
    """Rows, classes and columns of a program's block; what a kernel sums over is the step of its loop."""

    n: int
    c: int
    d: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Key:
    """What the best tile depends on.

    `bucket` is the power of two that holds N; `plain`: without options, other than chosen classes and updates.
    """

    architecture: str
    dim: int
    x: torch.dtype
    w: torch.dtype
    operand: torch.dtype
    bucket: int
    plain: bool = True


CHUNK_STEP = 256  # a multiple of every tile's number of classes
LAUNCH_FLOPS = 1 << 36  # of a product with a chunk, which longer ones would hide no better: 86 us at 800 TFLOP/s
INTERPRETED = "interpreter"
GEMM_KERNELS = ("class_statistics", "logit_gradients", "embedding_gradients", "weight_gradients")

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
    ("embedding_gradients", 4): (Tile(64, 32, 64, 8, 2), Tile(64, 16, 64, 4, 2), Tile(32, 32, 32, 4, 2)),
    ("weight_gradients", 4): (Tile(64, 64, 32, 4, 2), Tile(32, 64, 32, 4, 2)),
}
# Where an architecture holds more: warp-group products read both operands from shared memory. Where it holds less:
# on sm_80 the second block would spill 8 bytes.
OVERRIDES: dict[tuple[str, int, str], tuple[Tile, ...]] = {
    ("class_statistics", 4, "sm_80"): (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2), Tile(32, 64, 32, 4, 3)),
    ("logit_gradients", 2, "sm_80"): (Tile(64, 128, 64, 8, 3), Tile(128, 64, 32, 8, 3), Tile(16, 64, 64, 4, 3)),
    ("logit_gradients", 2, "sm_90"): (Tile(128, 128, 64, 8, 3), *TABLE["logit_gradients", 2]),
}
# With options: reshaped negatives need registers.
WITH_OPTIONS: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("class_statistics", 2): (Tile(64, 128, 32, 8, 3), Tile(16, 128, 32, 4, 3)),
    ("logit_gradients", 2): (Tile(64, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(16, 64, 32, 4, 3)),
    ("class_statistics", 4): (Tile(128, 64, 32, 8, 2), Tile(32, 32, 32, 4, 3)),
    ("logit_gradients", 4): (Tile(128, 64, 32, 8, 2), Tile(32, 32, 32, 4, 3)),
}
# Where the first block of a table, plain or with options, spills or is more than the shared memory: kernel, bytes,
# architecture, plain.
TOO_LARGE = {
    ("class_statistics", 2, "sm_80", True),
    ("class_statistics", 4, "sm_100", False),
    ("class_statistics", 2, "gfx942", True),
    ("logit_gradients", 2, "gfx942", True),
}
# For embeddings whose size is no multiple of 16: of odd rows nothing can be copied ahead, and loads go through
# registers, one number at a time, so that blocks are small and nothing is in flight.
RAGGED: dict[str, tuple[Tile, ...]] = {
    "class_statistics": (Tile(64, 64, 32, 8, 1), Tile(32, 64, 32, 4, 1)),
    "logit_gradients": (Tile(64, 64, 32, 8, 1), Tile(32, 64, 32, 4, 1)),
    "embedding_gradients": (Tile(64, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1)),
    "weight_gradients": (Tile(32, 64, 64, 8, 1), Tile(32, 64, 32, 4, 1)),
}
INTERPRETED_TILE = Tile(32, 64, 32, 4, 1)  # several blocks of everything even in an interpreter's small problems


def table(
    kernel: str, architecture: str, operand: torch.dtype, plain: bool = True, dim: int = 16
) -> tuple[Tile, ...]:
    """The candidates, the default first."""
    if architecture == INTERPRETED:
        return (INTERPRETED_TILE,)
    if dim % 16:
        return RAGGED[kernel]
    size = operand.itemsize
    tiles = OVERRIDES.get((kernel, size, architecture), TABLE[kernel, size])
    if not plain:
        tiles = WITH_OPTIONS.get((kernel, size), tiles)
    return tiles[1:] if (kernel, size, architecture, plain) in TOO_LARGE else tiles


def candidates(kernel: str, key: Key) -> tuple[Tile, ...]:
    """The table's entries for a batch of this size: with no more rows than its bucket, if there are any."""
    tiles = table(kernel, key.architecture, key.operand, key.plain, key.dim)
    smallest = min(tile.n for tile in tiles)
    return tuple(tile for tile in tiles if tile.n <= max(key.bucket, smallest))


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
    """Classes per chunk of backward, a multiple of CHUNK_STEP.

    As few chunks as the workspace and LAUNCH_FLOPS allow, of even sizes, each in whole waves where it can be: a
    launch has `row_blocks` programs for every `block_c` classes, and its last wave takes as long with one program
    as with one on every processor.
    """
    wave = math.lcm(block_c * processors // math.gcd(processors, row_blocks), CHUNK_STEP)
    affordable = workspace_bytes // class_bytes
    step = wave if wave <= affordable else CHUNK_STEP
    long_enough = -(-LAUNCH_FLOPS // (2 * N * D * step))
    chunks = -(-C // (step * max(min(affordable // step, long_enough), 1)))
    return -(-C // (chunks * step)) * step


def row_block(dim: int) -> tuple[int, int]:
    """Classes and columns of a block of the kernels that move rows, powers of two: a whole row, if it is short."""
    columns = min(max(1 << (dim - 1).bit_length(), 16), MOVED_COLUMNS)
    return MOVED // columns, columns


_chosen: dict[tuple[str, Key], Tile] = {}


def choose(kernel: str, key: Key, run: Callable[[Tile], object]) -> Tile:
    """The fastest candidate, timed by `run` at the first call with this key and remembered.

    The first candidate, untimed, inside a CUDA graph capture, with COSFACE_TRITON_TUNE=0, and under
    torch.use_deterministic_algorithms: another tile rounds differently, and the next process may choose another.
    """
    tiles = candidates(kernel, key)
    if len(tiles) == 1 or not _may_time():
        return _chosen.get((kernel, key), tiles[0])
    if (kernel, key) not in _chosen:
        _chosen[kernel, key] = min(tiles, key=lambda tile: _seconds(functools.partial(run, tile)))
    return _chosen[kernel, key]


def _may_time() -> bool:
    return (
        os.environ.get("COSFACE_TRITON_TUNE") != "0"
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _seconds(run: Callable[[], object]) -> float:
    """Median time on the GPU, after one run that compiles."""
    run()
    times = []
    for _ in range(TIMED_RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
