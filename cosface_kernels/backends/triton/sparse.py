"""Backend `triton` with a gradient_tolerance: forward keeps the entries of the softmax that matter, and backward
visits no others. What may be left out, and the bound of the error, are those of `csrc/cpu/sparse.h`.

Forward knows lse, from the pass that every loss takes, before it keeps anything. So what a split of the classes
keeps does not depend on whether it has seen the heaviest classes of a row of the batch, and no split waits for
another. A few classes, spread over all, say which cut leaves out as much as it may; a second pass over all of them
keeps what is above the cut and sums the p of what is not, so that no estimate enters a result. A row whose sum is
above the tolerance after all, or for whose entries there is no room, is exact: backward computes it densely, with
the other exact ones and no block of others. Which these are is known on the device alone and nothing waits for it,
so that a CUDA graph can hold both passes.

Predicted, not measured, in bfloat16 on an H100 at 800 TFLOP/s, 3.35 TB/s of memory and 5.5 TB/s of L2, with
N = 1024, C = 1M, D = 512 and n entries kept of each row. An exact step has 8 N C D operations, 5.24 ms.

| part | operations or bytes | ms at n = 1,000 | at n = 10 |
|---|---|---|---|
| forward and the second pass | 4 N C D, w read twice beneath | 2.62 | 2.62 |
| the classes that say where to cut | a sixtieth of a pass | 0.03 | 0.03 |
| entries: a row of w each, and one of x through L2 | 2 D N n bytes each | 0.50 | 0.01 |
| places sorted by class, for all that there is room for | N (C / 256 + 257) of 12 bytes, 4 passes | 0.12 | 0.12 |
| dw written, mostly zeros | 2 C D bytes | 0.31 | 0.31 |
| all | | 3.6 | 3.1 |

So the second pass bounds what is gained: 1.7 at most. A step of which all rows are exact takes 0.2 ms more than
one without a tolerance, and none of its products is the library's.
"""

import functools
import math

import torch
from torch import Tensor

from cosface_kernels.backends.chunks import cdiv
from cosface_kernels.backends.triton import choice, launch
from cosface_kernels.backends.triton.backward_pass import Backward, Move
from cosface_kernels.backends.triton.cache import Saved, entry_slots
from cosface_kernels.backends.triton.choice import Trial
from cosface_kernels.backends.triton.kernels import sparse as kernels
from cosface_kernels.backends.triton.tiles import Tile, plainest, row_block
from cosface_kernels.options import Options

SAMPLED_TILES, SAMPLE_SPLITS = 256, 32
STEPS = 64  # cuts to choose from, half a bit apart: for up to 2^32 classes
LARGEST_SHARE = 1 / 2  # of the tolerance, of an entry that is left out
# What is aimed at, of the tolerance. Where one of r classes has been seen, a sum q of p that are at most t is off
# by a standard deviation of at most sqrt(r t q), so many of which are left free.
AIM, DEVIATIONS = 0.95, 3.0
SPLIT_SLACK = 4  # times the entries of a split that a row may have, were all splits alike
BLOCK = 256  # entries of a row
BLOCK_K = 8  # rows of w that a sample gathers at a time


def keep(
    x: Tensor,
    w: Tensor,
    saved: Saved,
    targets: Tensor,
    scale: Tensor,
    results: list[Tensor],
    options: Options,
    cache: Tensor,
) -> None:
    """Fills the cache with entries, and with what was dropped and kept of each sample."""
    _, top, log_sum, target_cos, _ = results
    N, C, slots = len(x), options.count(w), entry_slots(x, w, options)
    per_row = targets, scale, top, log_sum
    cuts = _cuts(x, w, saved, per_row, options, slots - 1)
    some_w, some_options = launch.sample(x, w, options)

    def prepare(tile: Tile) -> Trial:
        kept: list[Tensor] = []

        def run() -> None:
            kept[:] = _entries_of_splits(x, some_w, saved, per_row, cuts, some_options, slots, tile)

        return Trial(run, lambda: [kept[2].sum(0).float(), kept[3].sum(0)])

    tile = choice.choose("keep_entries", launch.key(x, w, options), prepare)
    classes, cosines, counts, dropped = _entries_of_splits(x, w, saved, per_row, cuts, options, slots, tile)
    splits, capacity = classes.shape[1:]
    to_classes, to_cosines = _entries_in(cache, x, slots)
    kernels.pack_entries[(N,)](
        classes, cosines, counts, targets, target_cos, to_classes, to_cosines, N, C, splits, capacity,
        slots, BLOCK=BLOCK,
    )  # fmt: skip
    mass, kept = dropped.double().sum(0), counts.sum(0)  # (N,)
    fits = (counts.amax(0) <= capacity) & (kept < slots)
    is_exact = ~(fits & (mass <= options.gradient_tolerance))  # (N,); nan is not below
    share = (kept / (C - (targets >= 0).long()).clamp_min(1).double()).clamp_max(1 - 1e-12)
    of_samples = cache[: 16 * N].view(torch.float64)
    of_samples[:N] = torch.where(is_exact, 0, mass)
    of_samples[N:] = torch.where(is_exact, 1, share)


def _entries_in(cache: Tensor, x: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """classes int32 and cosines float32, (N, slots) each, at the end of the cache."""
    entries = cache[len(cache) - 8 * len(x) * slots :].view(torch.int32).view(2, len(x), slots)
    return entries[0], entries[1].view(torch.float32)


def _cuts(x: Tensor, w: Tensor, saved: Saved, per_row: tuple[Tensor, ...], options: Options, most: int) -> Tensor:
    """(N,) log2 p above which entries are kept, inf for a sample that would keep more than `most`."""
    N, C, tolerance = len(x), options.count(w), options.gradient_tolerance
    # The last cut times C is below AIM of the tolerance: where all classes are seen it fits, whatever the p are.
    steps = min(max(2 * (C - 1).bit_length(), 1), STEPS)
    tile = plainest("sample_entries", launch.key(x, w, options))
    stride = max(cdiv(C, tile.c) // SAMPLED_TILES, 1)
    tiles = cdiv(cdiv(C, tile.c), stride)
    tiles_per_split = cdiv(tiles, SAMPLE_SPLITS)
    splits = cdiv(tiles, tiles_per_split)
    masses, counts = (x.new_empty(splits, N, STEPS, dtype=torch.float32) for _ in range(2))
    chosen, is_chosen = launch.chosen_rows(per_row[0], options)
    largest_cut = math.log2(tolerance * LARGEST_SHARE)
    kernels.sample_entries[cdiv(N, tile.n), splits](
        x, launch.stored(w), chosen, *saved[:2], *per_row, masses, counts, N, C, largest_cut, steps,
        tiles, stride, tiles_per_split, **launch.blocks(tile, x, w), NORMALIZE=options.normalize_weight,
        CHOSEN=is_chosen, STEPS=STEPS,
    )  # fmt: skip
    cuts = largest_cut - 0.5 * torch.arange(STEPS, device=x.device)  # (STEPS,)
    mass, count = masses.sum(0) * stride, counts.sum(0) * stride  # (N, STEPS)
    unseen = stride - 1  # of `stride` classes
    off = DEVIATIONS * (unseen * torch.exp2(cuts) * mass).sqrt()  # (N, STEPS)
    step = (~(mass + off <= AIM * tolerance)).sum(1, keepdim=True).clamp_max(steps - 1)  # (N, 1)
    return cuts[step[:, 0]].masked_fill(count.gather(1, step)[:, 0] > most, torch.inf)


def _entries_of_splits(
    x: Tensor,
    w: Tensor,
    saved: Saved,
    per_row: tuple[Tensor, ...],
    cuts: Tensor,
    options: Options,
    slots: int,
    tile: Tile,
) -> list[Tensor]:
    """classes and cosines (N, splits, capacity), counts and dropped (splits, N)."""
    N, C = len(x), options.count(w)
    row_blocks, tiles = cdiv(N, tile.n), cdiv(C, tile.c)
    tiles_per_split = cdiv(tiles, launch.splits(row_blocks, x))
    splits = cdiv(tiles, tiles_per_split)
    capacity = min(tiles_per_split * tile.c, SPLIT_SLACK * cdiv(slots, splits) + tile.c, slots)
    float32 = functools.partial(x.new_empty, dtype=torch.float32)
    classes, counts = (x.new_empty(shape, dtype=torch.int32) for shape in ((N, splits, capacity), (splits, N)))
    cosines, dropped = float32(N, splits, capacity), float32(splits, N)
    chosen, is_chosen = launch.chosen_rows(per_row[0], options)
    kernels.keep_entries[row_blocks, splits](
        x, launch.stored(w), chosen, *saved[:2], *per_row, cuts, classes, cosines, counts, dropped, N, C,
        splits, capacity, tiles_per_split, **launch.blocks(tile, x, w),
        NORMALIZE=options.normalize_weight, CHOSEN=is_chosen,
    )  # fmt: skip
    return [classes, cosines, counts, dropped]


def backward(
    x: Tensor,
    w: Tensor,
    saved: Saved,
    per_row: list[Tensor],
    options: Options,
    cache: Tensor,
    need_dx: bool,
    need_dw: bool,
    tiles: dict[str, Tile],
    move: Move | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The exact samples, chunk by chunk as without a tolerance, and the others by their entries.

    The exact ones come first in a copy, so that whole blocks of others are passed by. Rows move when nothing reads
    them any more: dx of the others, for which any row may be read, is computed before the first chunk.
    """
    targets, scale, top, log_sum, g_lse, g_cos = per_row
    is_exact = cache[8 * len(x) : 16 * len(x)].view(torch.float64) == 1  # (N,)
    exact_rows = is_exact.sum(dtype=torch.int32).view(1)
    order = torch.sort((~is_exact).int(), stable=True).indices  # (N,)
    of_exact, of_others = ([g.where(where, 0) for g in (g_lse, g_cos)] for where in (is_exact, ~is_exact))
    entries = _Entries(x, w, saved, [scale, top, log_sum, *of_others], options, cache)
    dx = entries.embedding_gradients() if need_dx else x.new_empty(0)
    if need_dw:
        entries.sort_by_class()
    step = Backward(
        x[order], w, saved._replace(x_norm=saved.x_norm[order]),
        [values[order] for values in (targets, scale, top, log_sum, *of_exact)], options, tiles, need_dx, need_dw,
        bool(move), exact_rows,
    )  # fmt: skip
    for first in range(0, step.C, step.chunk):
        step.logit_gradients(first)
        if need_dx:
            step.embedding_gradients(first)
        if need_dw:
            step.weight_gradients(first)
            entries.weight_gradients(step.rows(first), first, step.classes(first), exact_rows)
            if move:
                move(first, step.rows(first))
    exact_dx, exact_dscale = step.finish()
    back = torch.sort(order).indices  # (N,)
    if need_dx:
        dx = torch.where(is_exact[:, None], exact_dx[back], dx)
    return dx, step.dw, torch.where(is_exact, exact_dscale[back], entries.dscale)


class _Entries:
    """Entries that forward has kept, with the gradients of their cosines.

    per_row: scale, top, log_sum, and g_lse and g_cos, 0 where a sample is exact.
    """

    def __init__(
        self, x: Tensor, w: Tensor, saved: Saved, per_row: list[Tensor], options: Options, cache: Tensor
    ) -> None:
        self.x, self.w, self.saved = x, w, saved
        (self.N, self.D), self.C, self.slots = x.shape, options.count(w), entry_slots(x, w, options)
        self.chosen, self.is_chosen = launch.chosen_rows(x, options)
        classes, self.cosines = _entries_in(cache, x, self.slots)
        self.keys, self.g = torch.empty_like(classes), torch.empty_like(self.cosines)  # (N, slots)
        self.ends = classes.new_empty(self.N)
        self.row_dot, self.dscale = (self.cosines.new_empty(self.N) for _ in range(2))
        self.block_c, block_d = row_block(self.D)
        self.variant = {
            "D": self.D, "BLOCK_D": block_d, "OPERAND": launch.operand(x, w),
            "NORMALIZE": options.normalize_weight, "CHOSEN": self.is_chosen,
        }  # fmt: skip
        self.columns = cdiv(self.D, block_d)
        kernels.entry_gradients[(self.N,)](
            classes, self.cosines, *per_row, self.keys, self.g, self.ends, self.row_dot, self.dscale, self.C,
            self.slots, BLOCK=BLOCK,
        )  # fmt: skip

    def embedding_gradients(self) -> Tensor:
        """dx (N, D), 0 of an exact sample."""
        x, dx = self.x, self.x.new_empty(self.N, self.D)
        kernels.entry_embedding_gradients[self.N, self.columns](
            self.keys, self.g, self.ends, self.row_dot, launch.stored(self.w), self.chosen, self.saved.w_norm,
            x, self.saved.x_norm, dx, self.C, self.slots, BLOCK_K=BLOCK_K, **self.variant,
        )  # fmt: skip
        return dx

    def sort_by_class(self) -> None:
        """places: of the entries, by class and then by sample; starts: (C + 1,), among these of each class."""
        keys, self.places = torch.sort(self.keys.flatten(), stable=True)
        classes = torch.arange(self.C + 1, dtype=torch.int32, device=keys.device)
        self.starts = torch.searchsorted(keys, classes)

    def weight_gradients(self, dw: Tensor, first: int, classes: int, exact_rows: Tensor) -> None:
        """Of a chunk; added to what the exact samples have left there, if there are any."""
        kernels.entry_weight_gradients[cdiv(classes, self.block_c), self.columns](
            self.places, self.starts, self.g, self.cosines, self.x, self.saved.x_norm, launch.stored(self.w),
            self.chosen, self.saved.w_norm, exact_rows, dw, self.C, first, classes, self.slots,
            BLOCK_C=self.block_c, **self.variant,
        )  # fmt: skip
