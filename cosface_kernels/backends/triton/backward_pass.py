"""Launches of backward, chunk by chunk of classes."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cosface_kernels.backends.chunks import CHUNK_STEP, cdiv, chunk_in_environment, units
from cosface_kernels.backends.triton import launch
from cosface_kernels.backends.triton.cache import Saved
from cosface_kernels.backends.triton.tiles import (
    COLUMNS,
    GEMM_KERNELS,
    LIBRARY,
    ROWS,
    SPLITS,
    Tile,
    chunk_classes,
    row_block,
)
from cosface_kernels.options import Options
from cosface_kernels.reference import operand_dtype

INTERPRETED_WORKSPACE = 1 << 15  # bytes: several chunks even of problems as small as an interpreter can do

Move = Callable[[int, Tensor], None]  # by the number of the first class and the gradient of it and those after it


def backward_of_nothing(
    x: Tensor, w: Tensor, options: Options, need_dx: bool, need_dw: bool, move: Move | None
) -> tuple[Tensor, ...]:
    """Without samples the gradient is zero; momentum and weight decay still move the rows."""
    C, dw = options.count(w), w.new_empty(0)
    if move:
        chunk = min(C, max(options.workspace_bytes // (4 * w.shape[1]), CHUNK_STEP))
        zeros = w.new_zeros(chunk, w.shape[1], dtype=torch.float32)
        for first in range(0, C, chunk):
            move(first, zeros)
    elif need_dw:
        dw = w.new_zeros(C, w.shape[1])
    dscale, sums = (x.new_empty(shape, dtype=torch.float32) for shape in (0, (2, 0)))
    return torch.empty_like(x) if need_dx else x.new_empty(0), dw, dscale, sums


def with_moments(per_row: list[Tensor], options: Options) -> tuple[list[Tensor], Options]:
    """As a `Backward` takes them with moments: targets, g_cos and g_moments (2, N) each."""
    targets, *others, g_lse, g_cos = per_row
    g_moments = g_lse.new_zeros(2, len(g_lse)) if options.g_moments is None else launch.aligned(options.g_moments)
    per_row = [launch.pairs(targets, -1), *others, g_lse, launch.pairs(g_cos, 0)]
    return per_row, replace(options, moments=True, g_moments=g_moments)


def backward(
    x: Tensor,
    w: Tensor,
    saved: Saved,
    per_row: list[Tensor],
    options: Options,
    need_dx: bool,
    need_dw: bool,
    tiles: dict[str, Tile],
    move: Move | None = None,
) -> tuple[Tensor, ...]:
    """Chunk by chunk of classes: G, then what it adds to dx, then dw of these classes, which `move` may consume.

    Returns dx, dw, dscale and, with a sigmoid, its sums, (2, N).
    Rows move when nothing reads them any more: the targets' cosines are taken before the first chunk, and whatever
    else reads a row belongs to its own chunk.
    """
    step = Backward(x, w, saved, per_row, options, tiles, need_dx, need_dw, bool(move))
    for first in range(0, step.C, step.chunk):
        step.logit_gradients(first)
        if need_dx:
            step.embedding_gradients(first)
        if need_dw:
            step.weight_gradients(first)
            if move:
                move(first, step.rows(first))
    dx, dscale = step.finish()
    return (dx, step.dw, dscale, step.sums.sum(0)) if step.sigmoid else (dx, step.dw, dscale)


class Backward:
    """What the chunks of a backward share, and their kernels, each on the chunk that begins with class `first`.

    per_row: targets, scale, top, log_sum, g_lse and g_cos, (N,) each; see also `with_moments`.
    tiles: by kernel. updates: whether rows move, by gradients in float32 that only one chunk has.
    active_rows: (1,) int32, how many rows have a gradient, the first ones; dx of the others may be anything, and
    dw is not written if there are none. None: it may be any of them.
    chunk: its classes. None: as many as suit the tiles.
    """

    def __init__(
        self,
        x: Tensor,
        w: Tensor,
        saved: Saved,
        per_row: list[Tensor],
        options: Options,
        tiles: dict[str, Tile],
        need_dx: bool,
        need_dw: bool,
        updates: bool,
        active_rows: Tensor | None = None,
        chunk: int | None = None,
    ) -> None:
        self.x, self.w, self.saved, self.per_row, self.options = x, w, saved, per_row, options
        self.of_g, self.of_dx, self.of_dw = (tiles[kernel] for kernel in GEMM_KERNELS[1:])
        (self.N, self.D), self.C = x.shape, options.count(w)
        N, D = x.shape
        self.need_dx, self.updates = need_dx, updates
        sums_apart = updates or (need_dw and self.of_dw == LIBRARY)
        self.row_blocks = cdiv(N, self.of_g.n)
        self.chunk = chunk or _chunk_classes(x, w, options, self.of_g, rows_in_float32=sums_apart)
        self.class_tiles = cdiv(self.chunk, self.of_g.c)
        self.float32 = functools.partial(x.new_empty, dtype=torch.float32)

        self.some = active_rows is not None
        self.active_rows = per_row[0] if active_rows is None else active_rows
        self.class_dot = self.float32(self.row_blocks, self.chunk)
        if self.some:
            self.class_dot.zero_()  # where nothing writes it
        self.negative_dot, self.target_dot = self.float32(self.class_tiles, N).zero_(), self.float32(N)
        self.reshape, self.normalize = options.thresholds is not None, options.normalize_weight
        self.moments, self.sigmoid = options.moments, options.sigmoid is not None
        apart = self.reshape or self.moments or self.sigmoid
        self.scale_dot = torch.zeros_like(self.negative_dot) if apart else self.negative_dot
        self.sums = self.float32(self.class_tiles, 2, N).zero_() if self.sigmoid else self.negative_dot
        self.g_moments = options.g_moments if options.g_moments is not None else per_row[0]  # not read without
        half = operand_dtype(x.dtype, w.dtype)
        self.g, self.x_hat = x.new_empty(N, self.chunk, dtype=half), x.new_empty(N, D, dtype=half)
        # Products read G also where a ragged last chunk has no class. What they find must be a number, of a tile
        # past the last class, of a chunk before, or 0: zeros of w and rows of dw that are not stored take it away.
        self.g[:, self.C :] = 0
        self.dx_blocks, self.tiles_per_split, self.splits = self._splits_of_dx()
        self.dx_hat = self.float32(self.splits, N, D).zero_() if need_dx else self.float32(0)
        self.dw = w.new_empty((self.C, D) if need_dw and not updates else 0)
        self.dw_of_chunk = self.float32(self.chunk if sums_apart else 0, D)
        self._normalize_embeddings()

    def _splits_of_dx(self) -> tuple[int, int, int]:
        """Blocks of dx, and how the classes of a chunk are split for each."""
        tile = self.of_dx
        if tile == LIBRARY:
            return 1, 1, 1
        blocks, tiles = cdiv(self.N, tile.n) * cdiv(self.D, tile.d), cdiv(self.chunk, tile.c)
        tiles_per_split = cdiv(tiles, launch.splits(blocks, self.x))
        return blocks, tiles_per_split, cdiv(tiles, tiles_per_split)

    def _normalize_embeddings(self) -> None:
        x, w, (targets, scale, _, _, g_lse, g_cos) = self.x, self.w, self.per_row
        self.chosen, self.is_chosen = launch.chosen_rows(targets, self.options)
        self.unit = units(scale, g_lse, g_cos, self.options)  # (N,)
        self.largest_unit = self.unit.amax()
        launch.kernels.normalize_embeddings[(cdiv(self.N, ROWS),)](
            x, launch.stored(w), self.chosen, self.saved.w_norm, self.saved.x_norm, targets, g_lse, g_cos,
            self.g_moments, self.unit, self.largest_unit, self.x_hat, self.target_dot, self.N, self.C,
            D=self.D, BLOCK_N=ROWS, BLOCK_D=COLUMNS, OPERAND=launch.operand(x, w), NORMALIZE=self.normalize,
            CHOSEN=self.is_chosen, MOMENTS=self.moments,
        )  # fmt: skip

    def logit_gradients(self, first: int) -> None:
        x, w, (targets, scale, top, log_sum, g_lse, g_cos) = self.x, self.w, self.per_row
        w_norm, x_norm, cosines = self.saved
        classes, kept = self.classes(first), cosines.shape[1]
        if self.of_g.specialized:
            tiles = cdiv(classes, self.of_g.c)
            tiles_per_split = cdiv(tiles, launch.splits(self.row_blocks, x, 1))
            launch.hopper().logit_gradients[self.row_blocks, cdiv(tiles, tiles_per_split)](
                *self.described, w_norm, targets, scale, top, log_sum, g_lse, g_cos, x_norm, self.unit,
                self.described_g, self.negative_dot, self.class_dot, self.N, self.C, first, self.chunk,
                tiles_per_split, **launch.specialized_blocks(self.of_g, x),
            )  # fmt: skip
            return
        tiles, kept_tiles = (cdiv(c, self.of_g.c) for c in (classes, min(max(kept - first, 0), classes)))
        for first_tile, end, is_kept in ((0, kept_tiles, True), (kept_tiles, tiles, False)):
            if first_tile == end:
                continue
            launch.kernels.logit_gradients[(self.row_blocks * (end - first_tile),)](
                x, launch.stored(w), self.chosen, w_norm, targets, scale, top, log_sum, g_lse, g_cos,
                self.g_moments, *launch.polynomial(self.options, scale), x_norm, self.unit, self.g,
                self.negative_dot, self.scale_dot, self.sums, self.class_dot, cosines, self.active_rows, self.N,
                self.C, kept, first, first_tile, self.chunk, self.row_blocks, **launch.blocks(self.of_g, x, w),
                NORMALIZE=self.normalize, RESHAPE=self.reshape, SLOPES=self.options.own_slopes,
                CHOSEN=self.is_chosen, KEPT=is_kept, SOME=self.some, MOMENTS=self.moments, SIGMOID=self.sigmoid,
                ANGLE=self.options.sigmoid == "angle",
            )  # fmt: skip

    @functools.cached_property
    def described(self) -> tuple[Any, Any]:
        return launch.described(self.x, self.w, self.of_g)

    @functools.cached_property
    def described_g(self) -> Any:
        return launch.hopper().describe(self.g, self.of_g.n, self.of_g.c // launch.hopper().PARTS.value)

    def embedding_gradients(self, first: int) -> None:
        x, w = self.x, self.w
        if self.of_dx == LIBRARY:
            classes = self.classes(first)
            _multiply(self.dx_hat[0], self.g[:, :classes], w[first : first + classes], accumulate=True)
        else:
            launch.kernels.embedding_gradients[self.dx_blocks, self.splits](
                self.g, launch.stored(w), self.chosen, self.saved.w_norm, self.dx_hat, self.active_rows, self.N,
                self.C, first, self.chunk, cdiv(self.N, self.of_dx.n), self.tiles_per_split,
                **launch.blocks(self.of_dx, x, w), NORMALIZE=self.normalize, CHOSEN=self.is_chosen, SOME=self.some,
            )  # fmt: skip

    def weight_gradients(self, first: int) -> None:
        x, w, w_norm, classes = self.x, self.w, self.saved.w_norm, self.classes(first)
        of_class = self.class_dot, self.largest_unit, self.rows(first)
        place = self.C, first, self.chunk, self.row_blocks
        if self.of_dw == LIBRARY:
            _multiply(self.dw_of_chunk[:classes], self.g[:, :classes].T, self.x_hat)
            block_c, block_d = row_block(self.D)
            launch.kernels.project_weight_gradients[(cdiv(classes, block_c),)](
                self.dw_of_chunk, w, w_norm, *of_class, *place, D=self.D, BLOCK_C=block_c, BLOCK_D=block_d,
                OPERAND=launch.operand(x, w), NORMALIZE=self.normalize,
            )  # fmt: skip
        else:
            blocks = cdiv(self.D, self.of_dw.d) * cdiv(classes, self.of_dw.c)
            launch.kernels.weight_gradients[(blocks,)](
                self.g, self.x_hat, launch.stored(w), self.chosen, w_norm, *of_class, self.active_rows, self.N,
                *place, **launch.blocks(self.of_dw, x, w), NORMALIZE=self.normalize, CHOSEN=self.is_chosen,
                SOME=self.some,
            )  # fmt: skip

    def finish(self) -> tuple[Tensor, Tensor]:
        """dx and dscale."""
        x, (_, scale, _, _, g_lse, g_cos) = self.x, self.per_row
        dx, dscale = x.new_empty(x.shape if self.need_dx else 0), self.float32(self.N)
        columns = cdiv(self.D, COLUMNS) if self.need_dx else 1
        launch.kernels.finish_embedding_gradients[cdiv(self.N, ROWS), columns](
            self.dx_hat, self.negative_dot, self.scale_dot, self.target_dot, x, self.saved.x_norm, scale, g_lse,
            g_cos, self.g_moments, self.unit, dx, dscale, self.N, self.splits, self.class_tiles,
            D=self.D, NEED_DX=self.need_dx, RESHAPE=self.reshape, MOMENTS=self.moments, SIGMOID=self.sigmoid,
            BLOCK_N=ROWS, BLOCK_SPLITS=SPLITS, BLOCK_D=COLUMNS,
        )  # fmt: skip
        return dx, dscale

    def rows(self, first: int) -> Tensor:
        """Of dw, from the class on."""
        return self.dw_of_chunk if self.updates else self.dw[first:]

    def sums_of_logit_gradients(self) -> list[Tensor]:
        """G and the sums that its kernel leaves, of the first chunk, as no block size changes them."""
        classes = self.classes(0)
        slots = self.class_dot[:, :classes], self.negative_dot, self.scale_dot, self.sums
        return [self.g[:, :classes], *(each.sum(0) for each in slots)]

    def classes(self, first: int) -> int:
        """Of the chunk."""
        return min(self.chunk, self.C - first)


def trial_chunk(x: Tensor, w: Tensor, options: Options, blocks: Iterable[Tile]) -> int:
    """Classes on which all blocks of a step are tried: its shortest chunk with any of these of logit_gradients.

    Were each tried on the chunk that suits it, times would be of unlike work, and results of unlike shapes.
    """
    return min(_chunk_classes(x, w, options, tile, rows_in_float32=True) for tile in blocks)


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out (+)= a b by the library, its sums in float32."""
    if launch.INTERPRETED:  # torch has this product on GPUs alone
        out.copy_(torch.addmm(out, a.float(), b.float(), beta=int(accumulate)))
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _chunk_classes(x: Tensor, w: Tensor, options: Options, tile: Tile, *, rows_in_float32: bool) -> int:
    """Classes per chunk of backward; see `tiles.chunk_classes`.

    A class takes its column of G, a slot of class_dot for each block of rows and, where that is not in dw yet, its
    gradient in float32. COSFACE_TRITON_CHUNK overrides it.
    """
    (N, D), C = x.shape, options.count(w)
    if chunk := chunk_in_environment("COSFACE_TRITON_CHUNK", C):
        return chunk
    row_blocks = cdiv(N, tile.n)
    return chunk_classes(
        N,
        D,
        C,
        class_bytes=N * operand_dtype(x.dtype, w.dtype).itemsize
        + 4 * row_blocks
        + (4 * D if rows_in_float32 else 0),
        workspace_bytes=min(options.workspace_bytes, INTERPRETED_WORKSPACE)
        if launch.INTERPRETED
        else options.workspace_bytes,
        row_blocks=row_blocks,
        block_c=tile.c,
        processors=launch.processors(x),
    )
