"""A product whose tile has a second user: on Hopper a load overwrites what the product still reads."""

import triton
import triton.language as tl


@triton.jit
def product_and_squares(x, w, out, squares, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    dot = tl.zeros((BLOCK, BLOCK), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x_tile = tl.load(x + rows[:, None] * D + d[None, :])
        w_tile = tl.load(w + rows[:, None] * D + d[None, :])
        dot = tl.dot(x_tile, tl.trans(w_tile), dot)
        w_full = w_tile.to(tl.float32)
        sums += tl.sum(w_full * w_full, 1)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], dot)
    tl.store(squares + rows, sums)
