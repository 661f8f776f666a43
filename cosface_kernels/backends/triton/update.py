"""Launches that move rows of the weight and of an optimizer's state."""

import math

from torch import Tensor

from cosface_kernels.backends.triton import launch
from cosface_kernels.backends.triton.tiles import cdiv, row_block
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
    block_c, block_d = row_block(D)
    chosen, is_chosen = launch.chosen_rows(w, options)
    common = (
        chosen, w if finite is None else finite, options.count(w), first, chunk, update.seed, update.step,
        update.gradient_factor, update.max_row_norm,
    )  # fmt: skip
    blocks = {"D": D, "BLOCK_C": block_c, "BLOCK_D": block_d, "CLIP": update.max_row_norm < math.inf}
    blocks["MAY_STAY"] = finite is not None
    grid = (cdiv(chunk, block_c),)
    if update.rule == "sgd":
        of_gradient, of_momentum = (1.0, update.momentum) if update.nesterov else (0.0, 1.0)
        launch.kernels.sgd_rows[grid](
            dw, w, *(state or [w]), *common, update.lr, update.weight_decay, update.momentum, 1 - update.dampening,
            of_gradient, of_momentum, **blocks, MOMENTUM=bool(state), CHOSEN=is_chosen,
        )  # fmt: skip
    else:
        amsgrad = len(state) == 3
        launch.kernels.adamw_rows[grid](
            dw, w, *(state if amsgrad else [*state, w]), *common, update.lr / (1 - update.beta1**update.step),
            1 - update.lr * update.weight_decay, 1 - update.beta1, update.beta2, 1 - update.beta2,
            math.sqrt(1 - update.beta2**update.step), update.eps, **blocks, AMSGRAD=amsgrad, CHOSEN=is_chosen,
        )  # fmt: skip
