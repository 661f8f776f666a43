"""Launches that move rows of the weight and of an optimizer's state."""

import math

import torch
from torch import Tensor

from cosface_kernels.backends.chunks import cdiv
from cosface_kernels.backends.triton import launch
from cosface_kernels.backends.triton.tiles import MOVED, MOVED_WHOLE, row_block
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import Options, Update


def move_rows(
    w: Tensor,
    state: list[Tensor],
    finite: Tensor | None,
    update: Update,
    options: Options,
    first: int,
    dw: Tensor,
) -> None:
    """Moves the classes from the first on by dw (chunk, D), which is contiguous and may pass the last class."""
    chunk, D = dw.shape
    moved = [w, *(rows for rows in state if rows.dtype is not torch.int8)]
    unused = [dw] * ((2 if update.rule == "sgd" else 4) - len(moved))
    arguments = [*map(launch.stored, moved), *unused]
    whole = bool(update.weight_norm) or any(rows.dtype is FLOAT8 for rows in moved)
    if whole:
        of_float8 = iter(rows for rows in state if rows.dtype is torch.int8)
        arguments += [next(of_float8) if rows.dtype is FLOAT8 else dw for rows in moved] + unused
    block_c, block_d = row_block(D, MOVED_WHOLE if whole else MOVED)
    chosen, is_chosen = launch.chosen_rows(dw, options)
    arguments += [chosen, dw if finite is None else finite]
    common = [
        options.count(w), first, chunk, update.seed, update.step, update.gradient_factor, update.max_row_norm,
    ]  # fmt: skip
    blocks = {"D": D, "BLOCK_C": block_c, "BLOCK_D": block_d, "CLIP": update.max_row_norm < math.inf}
    blocks |= {"MAY_STAY": finite is not None, "CHOSEN": is_chosen}
    if whole:
        common.append(update.weight_norm)
        blocks["NORM"] = bool(update.weight_norm)
    kernels, grid = launch.kernels, (cdiv(chunk, block_c),)
    if update.rule == "sgd":
        of_gradient, of_momentum = (1.0, update.momentum) if update.nesterov else (0.0, 1.0)
        sgd_rows = kernels.sgd_whole_rows if whole else kernels.sgd_rows
        sgd_rows[grid](
            dw, *arguments, *common, update.lr, update.weight_decay, update.momentum, 1 - update.dampening,
            of_gradient, of_momentum, **blocks, MOMENTUM=len(moved) == 2,
        )  # fmt: skip
    else:
        adamw_rows = kernels.adamw_whole_rows if whole else kernels.adamw_rows
        adamw_rows[grid](
            dw, *arguments, *common, update.lr / (1 - update.beta1**update.step),
            1 - update.lr * update.weight_decay, 1 - update.beta1, update.beta2, 1 - update.beta2,
            math.sqrt(1 - update.beta2**update.step), update.eps, **blocks, AMSGRAD=len(moved) == 4,
        )  # fmt: skip
