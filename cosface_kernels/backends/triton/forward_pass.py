"""Launches of forward: norms of the rows, statistics of splits of the classes, and the loss from these."""

import torch
from torch import Tensor

from cosface_kernels.backends.chunks import cdiv
from cosface_kernels.backends.triton import launch
from cosface_kernels.backends.triton.cache import Saved
from cosface_kernels.backends.triton.tiles import COLUMNS, ROWS, SPLITS, Tile, row_block
from cosface_kernels.options import Options


def fill_norms(x: Tensor, w: Tensor, options: Options, saved: Saved) -> None:
    D = x.shape[1]
    block_c, block_d = row_block(D)
    chosen, is_chosen = launch.chosen_rows(w, options)
    of_rows = [(x, saved.x_norm, len(x), False)]
    if options.normalize_weight:
        of_rows.append((w, saved.w_norm, options.count(w), is_chosen))
    for matrix, norms, count, some in of_rows:
        launch.kernels.row_norms[(cdiv(count, block_c),)](
            launch.stored(matrix), chosen, norms, count, D=D, BLOCK_C=block_c, BLOCK_D=block_d,
            OPERAND=launch.operand(x, w), CHOSEN=some,
        )  # fmt: skip


def forward(
    x: Tensor,
    w: Tensor,
    saved: Saved,
    targets: Tensor,
    scale: Tensor,
    margin: float,
    options: Options,
    tile: Tile,
) -> tuple[Tensor, ...]:
    """loss, top, log_sum, target_cos, max_neg and moments."""
    (N, D), C = x.shape, options.count(w)
    w_norm, x_norm, cosines = saved
    one_target = targets.dim() == 1
    targets = launch.pairs(targets, -1) if options.moments else targets  # (N,), with moments (2, N)
    row_blocks, tiles = cdiv(N, tile.n), cdiv(C, tile.c)
    programs = 1 if tile.specialized else launch.PROGRAMS_PER_PROCESSOR
    tiles_per_split = cdiv(tiles, launch.splits(row_blocks, x, programs))
    programs = cdiv(tiles, tiles_per_split)
    splits = programs * launch.hopper().GROUPS.value if tile.specialized else programs
    top, max_cos, sum_exp = (x.new_empty(splits, N, dtype=torch.float32) for _ in range(3))
    parts, moments = scale, empty_moments(x, options)
    if options.moments:
        parts = x.new_empty(splits, 4, N, dtype=torch.float32)
    chosen, is_chosen = launch.chosen_rows(targets, options)
    reshape, normalize = options.thresholds is not None, options.normalize_weight
    variant = {"NORMALIZE": normalize, "RESHAPE": reshape, "CHOSEN": is_chosen, "MOMENTS": options.moments}
    if tile.specialized:
        launch.hopper().class_statistics[row_blocks, programs](
            *launch.described(x, w, tile), w_norm, x_norm, targets, scale, top, sum_exp, N, C, tiles_per_split,
            **launch.specialized_blocks(tile, x),
        )  # fmt: skip
    else:
        launch.kernels.class_statistics[row_blocks, programs](
            x, launch.stored(w), chosen, w_norm, x_norm, targets, scale, *launch.polynomial(options, scale), top,
            max_cos, sum_exp, parts, cosines, N, C, cosines.shape[1], tiles_per_split,
            **launch.blocks(tile, x, w), **variant, KEEP=cosines.numel() > 0,
            SLOPES=options.own_slopes,
        )  # fmt: skip
    results = five_rows(x, targets)
    launch.kernels.merge_statistics[(cdiv(N, ROWS),)](
        top, max_cos, sum_exp, parts, x, launch.stored(w), chosen, w_norm, x_norm, targets, scale, *results,
        moments, N, C, splits, margin, BLOCK_N=ROWS, BLOCK_SPLITS=SPLITS, BLOCK_D=COLUMNS, D=D,
        OPERAND=launch.operand(x, w), **variant,
    )  # fmt: skip
    if options.moments and one_target:
        loss, row_top, log_sum, target_cos, max_neg = results
        results = loss, row_top, log_sum, target_cos[0], max_neg
    return *results, moments


def five_rows(x: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Of loss, top, log_sum, target_cos and max_neg; an op's outputs share no storage."""
    N = len(x)
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in (N, N, N, targets.shape, N))


def empty_moments(x: Tensor, options: Options) -> Tensor:
    return x.new_empty(4 if options.moments else 0, len(x), dtype=torch.float32)
