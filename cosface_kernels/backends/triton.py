"""Backend `triton`: fused kernels for CUDA and ROCm GPUs.

Under TRITON_INTERPRET=1 they run on CPU tensors, slowly.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosface_kernels.backends import contract, triton_choice, triton_tiles
from cosface_kernels.backends.triton_choice import Trial
from cosface_kernels.backends.triton_tiles import LIBRARY, Key, Tile
from cosface_kernels.options import PLAIN, Options, Update
from cosface_kernels.reference import operand_dtype

MIN_VERSION = (3, 6)  # that of torch 2.10; 3.2 loads a next tile into memory that a product still reads
MIN_CAPABILITY = (8, 0)  # bfloat16 on tensor cores, asynchronous copies
TRIAL_FLOPS = 1 << 34  # of a product on which tiles are tried: some waves of any tile, and little memory
PROGRAMS_PER_PROCESSOR = 2
ALIGNED_BYTES = 16  # for which Triton compiles wide loads, and at which a tensor descriptor's rows begin
ALIGNED = ALIGNED_BYTES // torch.float32.itemsize
ROWS, COLUMNS, SPLITS = 8, 64, 64  # blocks of the kernels without a matrix product
# With a gradient_tolerance a sample keeps one of so many classes, and some more where there are few. To gather its
# two rows, an entry is predicted to take as long as three dense products with 128 classes on an H100.
KEPT_CLASSES, KEPT_LEAST = 256, 256
SMALLEST_UNIT, LARGEST_UNIT = 2.0**-100, 2.0**100  # so that G_LIFT over a unit is finite in float32

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_WORKSPACE = 1 << 15  # bytes: several chunks even of problems as small as an interpreter can do
INTERPRETED_PROCESSORS = 4

triton: Any = None  # imported by unavailable(): a second that a machine without a GPU need not spend
kernels: Any = None
sparse: Any = None  # triton_sparse, for a gradient_tolerance


@functools.cache
def unavailable() -> str | None:
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm GPU."
    global triton, kernels, sparse
    try:
        triton = importlib.import_module("triton")
        kernels = importlib.import_module("cosface_kernels.backends.triton_kernels")
    except ImportError as error:
        return f"triton cannot be imported ({error})."
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_VERSION:
        return f"it needs triton {'.'.join(map(str, MIN_VERSION))} or newer, found {triton.__version__}."
    sparse = importlib.import_module("cosface_kernels.backends.triton_sparse")
    if INTERPRETED:
        return None
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or newer, found {capability[0]}.{capability[1]}."
    return _compile_failure()


def _compile_failure() -> str | None:
    """Why a kernel cannot be compiled or launched here (no C compiler, too old a driver), or None."""
    one = torch.ones(1, 1, device="cuda")
    try:
        label = one.new_zeros(1, dtype=torch.int64)
        saved = Saved(one[0], one[0], one.new_empty(1, 0, dtype=torch.int16))
        _forward(one, one, saved, label, one[0], 0.0, PLAIN, Tile(16, 16, 16, 4, 1))
    except (RuntimeError, OSError, triton.errors.TritonError) as error:
        return f"a kernel cannot be compiled or launched ({type(error).__name__}: {error})."
    return None


def unsupported(x: Tensor, w: Tensor, options: Options) -> str | None:
    wanted = "cpu" if INTERPRETED else "cuda"
    if x.device.type != wanted:
        return f"it takes tensors on device {wanted!r}, got them on {str(x.device)!r}."
    if torch.float64 in (x.dtype, w.dtype):
        return "it computes in float32 and leaves float64 to backend 'reference'."
    if not w.is_contiguous():
        return f"it takes a contiguous weight, got strides {w.stride()} for shape {tuple(w.shape)}."
    if options.gradient_tolerance and options.thresholds is not None:
        return "reshaped negatives with a gradient_tolerance are not on this backend yet."
    return options.refusal(
        {"cache_bytes", "classes", "gradient_tolerance", "updates", "normalize_weight", "thresholds", "negatives"}
    )


def describe() -> str:
    where = "interpreted on the CPU" if INTERPRETED else torch.cuda.get_device_name()
    return f"triton {triton.__version__}, {where}"


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options
) -> tuple[Tensor, ...]:
    contract.check(x, w, options, targets, scale)
    with torch.cuda.device_of(x):
        cache = x.new_zeros(cache_size(x, w, options), dtype=torch.uint8)
        if len(x) == 0:
            return *_five_rows(x), cache
        saved = _saved_in(cache, x, w, options)
        _fill_norms(x, w, options, saved)
        some_w, some_options = _sample(x, w, options)

        def prepare(tile: Tile) -> Trial:
            results: list[Tensor] = []

            def launch() -> None:
                results[:] = _forward(x, some_w, saved, targets, scale, margin, some_options, tile)

            return Trial(launch, lambda: results)

        tile = triton_choice.choose("class_statistics", _key(x, w, options), prepare)
        results = _forward(x, w, saved, targets, scale, margin, options, tile)
        if options.gradient_tolerance:
            sparse.keep(x, w, saved, targets, scale, results, options, cache)
        return *results, cache


def cache_size(x: Tensor, w: Tensor, options: Options) -> int:
    """Of the norms, and of the cosines that fit into cache_bytes, or of the entries that a tolerance leaves."""
    norms = 4 * _norm_slots(x, w, options)
    if options.gradient_tolerance:
        return 16 * x.shape[0] + norms + 8 * x.shape[0] * entry_slots(x, w, options)
    return norms + 2 * x.shape[0] * _kept_classes(x, w, options)


def entry_slots(x: Tensor, w: Tensor, options: Options) -> int:
    """Entries of a sample for which a cache has room, that of the target included."""
    C = options.count(w)
    most = torch.sym_min(C, C // KEPT_CLASSES + KEPT_LEAST)
    if options.cache_bytes:
        most = torch.sym_min(most, options.cache_bytes // (8 * torch.sym_max(x.shape[0], 1)))
    return 1 + most


class Saved(NamedTuple):
    """What forward leaves in the cache for backward."""

    w_norm: Tensor  # (C,) |w_j|, float32; nothing without normalize_weight
    x_norm: Tensor  # (N,) |x_i|, float32
    cosines: Tensor  # (N, K) int16, of the first K classes, in steps of 1 / 32767

    def without_cosines(self) -> "Saved":
        return self._replace(cosines=self.cosines[:, :0])


def _class_slots(w: Tensor, options: Options) -> int:
    """Places for norms of classes in the cache, so many that those of embeddings behind them are aligned."""
    return _aligned(options.count(w)) if options.normalize_weight else 0


def _norm_slots(x: Tensor, w: Tensor, options: Options) -> int:
    return _class_slots(w, options) + _aligned(x.shape[0])


def _aligned(numbers: int) -> int:
    return -(-numbers // ALIGNED) * ALIGNED


def _kept_classes(x: Tensor, w: Tensor, options: Options) -> int:
    """Those whose cosines the cache holds, in whole tiles, so that it may pass the last class."""
    step = triton_tiles.CHUNK_STEP
    if options.gradient_tolerance:
        return 0
    fitting = (options.cache_bytes or 0) // (2 * step * torch.sym_max(x.shape[0], 1))
    return step * torch.sym_min(fitting, -(-options.count(w) // step))


def _saved_in(cache: Tensor, x: Tensor, w: Tensor, options: Options) -> Saved:
    kept, classes = _kept_classes(x, w, options), _class_slots(w, options)
    if options.gradient_tolerance:
        cache = cache[16 * len(x) :]
    slots = 4 * _norm_slots(x, w, options)
    norms = cache[:slots].view(torch.float32)
    cosines = cache[slots : slots + 2 * len(x) * kept].view(torch.int16)
    return Saved(norms[:classes], norms[classes:], cosines.view(len(x), kept))


def _fill_norms(x: Tensor, w: Tensor, options: Options, saved: Saved) -> None:
    D = x.shape[1]
    block_c, block_d = triton_tiles.row_block(D)
    chosen, is_chosen = _chosen(w, options)
    of_rows = [(x, saved.x_norm, len(x), False)]
    if options.normalize_weight:
        of_rows.append((w, saved.w_norm, options.count(w), is_chosen))
    for matrix, norms, count, some in of_rows:
        kernels.row_norms[(triton.cdiv(count, block_c),)](
            matrix, chosen, norms, count, *matrix.stride(),
            D=D, BLOCK_C=block_c, BLOCK_D=block_d, OPERAND=_operand(x, w), CHOSEN=some,
        )  # fmt: skip


def _forward(
    x: Tensor,
    w: Tensor,
    saved: Saved,
    targets: Tensor,
    scale: Tensor,
    margin: float,
    options: Options,
    tile: Tile,
) -> tuple[Tensor, ...]:
    (N, D), C = x.shape, options.count(w)
    w_norm, x_norm, cosines = saved
    scale, targets = scale.contiguous(), targets.contiguous()  # (N,)
    row_blocks, tiles = triton.cdiv(N, tile.n), triton.cdiv(C, tile.c)
    tiles_per_split = triton.cdiv(tiles, _splits(row_blocks, x, 1 if tile.specialized else PROGRAMS_PER_PROCESSOR))
    programs = triton.cdiv(tiles, tiles_per_split)
    splits = programs * _hopper().GROUPS.value if tile.specialized else programs
    top, max_cos, sum_exp = (x.new_empty(splits, N, dtype=torch.float32) for _ in range(3))
    chosen, is_chosen = _chosen(targets, options)
    reshape, normalize = options.thresholds is not None, options.normalize_weight
    variant = {"NORMALIZE": normalize, "RESHAPE": reshape, "CHOSEN": is_chosen}
    if tile.specialized:
        _hopper().class_statistics[row_blocks, programs](
            *_described(x, w, tile), w_norm, x_norm, targets, scale, top, sum_exp, N, C, tiles_per_split,
            **_specialized_blocks(tile, x),
        )  # fmt: skip
    else:
        kernels.class_statistics[row_blocks, programs](
            x, w, chosen, w_norm, x_norm, targets, scale, *_polynomial(options, scale), top, max_cos, sum_exp,
            cosines, N, C, cosines.shape[1], *x.stride(), tiles_per_split, **_blocks(tile, x, w), **variant,
            KEEP=cosines.numel() > 0,
        )  # fmt: skip
    results = _five_rows(x)  # loss, top, log_sum, target_cos, max_neg
    kernels.merge_statistics[(triton.cdiv(N, ROWS),)](
        top, max_cos, sum_exp, x, w, chosen, x_norm, targets, scale, *results, N, C, splits, margin, *x.stride(),
        BLOCK_N=ROWS, BLOCK_SPLITS=SPLITS, BLOCK_D=COLUMNS, D=D, OPERAND=_operand(x, w), **variant,
    )  # fmt: skip
    return results


def _sample(x: Tensor, w: Tensor, options: Options) -> tuple[Tensor, Options]:
    """The first classes, on which tiles are tried."""
    step = triton_tiles.CHUNK_STEP
    classes = step * max(TRIAL_FLOPS // (2 * max(x.numel(), 1) * step), 1)
    if options.classes is None:
        return w[:classes], options
    return w, replace(options, classes=options.classes[:classes])


def _chosen(unused: Tensor, options: Options) -> tuple[Tensor, bool]:
    """The chosen rows as the kernels read them, or what stands in for them where none are read."""
    return (unused, False) if options.classes is None else (options.classes.contiguous(), True)


def _polynomial(options: Options, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds and coefficients as the kernels read them, or what stands in for them where none are read."""
    if options.thresholds is None or options.negatives is None:
        return unused, unused
    return options.thresholds.float().contiguous(), options.negatives.float().contiguous()


def _five_rows(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(len(x), dtype=torch.float32) for _ in range(5))  # an op's outputs share no storage


def backward(*tensors: Tensor, options: Options, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _tuned_backward(tensors, options, need_dx, need_dw)


def backward_update_(
    *tensors: Tensor, state: list[Tensor], finite: Tensor | None, update: Update, options: Options, need_dx: bool
) -> tuple[Tensor, Tensor]:
    contract.check_state(tensors[1], state, update, finite=finite)
    move = functools.partial(_move_rows, tensors[1], state, finite, update, options)
    dx, _, dscale = _tuned_backward(tensors, options, need_dx, True, move)
    return dx, dscale


def apply_update_(w: Tensor, dw: Tensor, state: list[Tensor], update: Update) -> None:
    contract.check_state(w, state, update, dw)
    with torch.cuda.device_of(w):
        _move_rows(w, state, None, update, PLAIN, 0, dw.contiguous())


Move = Callable[[int, Tensor], None]  # by the number of the first class and the gradient of it and those after it


def _tuned_backward(
    tensors: tuple[Tensor, ...], options: Options, need_dx: bool, need_dw: bool, move: Move | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    x, w, *per_row, cache = tensors
    contract.check(x, w, options, *per_row)
    with torch.cuda.device_of(x):
        if len(x) == 0:
            return _backward_of_nothing(x, w, options, need_dx, need_dw, move)
        per_row = [values.contiguous() for values in per_row]  # targets, scale, top, log_sum, g_lse, g_cos: (N,)
        saved = _saved_in(cache, x, w, options)
        key, (some_w, some_options) = _key(x, w, options), _sample(x, w, options)
        norms = saved.without_cosines()
        tiles = {kernel: triton_tiles.candidates(kernel, key)[0] for kernel in triton_tiles.GEMM_KERNELS[1:]}

        def prepare(kernel: str, tile: Tile) -> Trial:
            trial = _Backward(
                x, some_w, norms, per_row, some_options, {**tiles, kernel: tile}, need_dx, need_dw, bool(move)
            )
            stages: dict[str, tuple[Callable[[], object], Callable[[], list[Tensor]]]] = {
                "logit_gradients": (lambda: trial.logit_gradients(0), trial.sums_of_logit_gradients),
                "embedding_gradients": (lambda: trial.embedding_gradients(0), lambda: [trial.dx_hat.sum(0)]),
                "weight_gradients": (
                    lambda: trial.weight_gradients(0),
                    lambda: [trial.rows(0)[: trial.classes(0)]],
                ),
            }
            if kernel != "logit_gradients":
                trial.logit_gradients(0)
            return Trial(*stages[kernel])

        needed = {"logit_gradients": True, "embedding_gradients": need_dx, "weight_gradients": need_dw}
        for kernel in tiles:
            if needed[kernel]:
                tiles[kernel] = triton_choice.choose(kernel, key, functools.partial(prepare, kernel))
        if options.gradient_tolerance:
            return sparse.backward(x, w, saved, per_row, options, cache, need_dx, need_dw, tiles, move)
        return _backward(x, w, saved, per_row, options, need_dx, need_dw, tiles, move)


def _backward_of_nothing(
    x: Tensor, w: Tensor, options: Options, need_dx: bool, need_dw: bool, move: Move | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Without samples the gradient is zero; momentum and weight decay still move the rows."""
    C, dw = options.count(w), w.new_empty(0)
    if move:
        chunk = min(C, max(options.workspace_bytes // (w.element_size() * w.shape[1]), 1))
        zeros = w.new_zeros(chunk, w.shape[1])
        for first in range(0, C, chunk):
            move(first, zeros)
    elif need_dw:
        dw = w.new_zeros(C, w.shape[1])
    return torch.empty_like(x) if need_dx else x.new_empty(0), dw, x.new_empty(0, dtype=torch.float32)


def _backward(
    x: Tensor,
    w: Tensor,
    saved: Saved,
    per_row: list[Tensor],
    options: Options,
    need_dx: bool,
    need_dw: bool,
    tiles: dict[str, Tile],
    move: Move | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk by chunk of classes: G, then what it adds to dx, then dw of these classes, which `move` may consume.

    Rows move when nothing reads them any more: the targets' cosines are taken before the first chunk, and whatever
    else reads a row belongs to its own chunk.
    """
    step = _Backward(x, w, saved, per_row, options, tiles, need_dx, need_dw, bool(move))
    for first in range(0, step.C, step.chunk):
        step.logit_gradients(first)
        if need_dx:
            step.embedding_gradients(first)
        if need_dw:
            step.weight_gradients(first)
            if move:
                move(first, step.rows(first))
    dx, dscale = step.finish()
    return dx, step.dw, dscale


class _Backward:
    """What the chunks of a backward share, and their kernels, each on the chunk that begins with class `first`.

    tiles: by kernel. updates: whether rows move, by gradients in float32 that only one chunk has.
    active_rows: (1,) int32, how many rows have a gradient, the first ones; dx of the others may be anything, and
    dw is not written if there are none. None: it may be any of them.
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
    ) -> None:
        self.x, self.w, self.saved, self.per_row, self.options = x, w, saved, per_row, options
        self.of_g, self.of_dx, self.of_dw = (tiles[kernel] for kernel in triton_tiles.GEMM_KERNELS[1:])
        (self.N, self.D), self.C = x.shape, options.count(w)
        N, D = x.shape
        self.need_dx, self.updates = need_dx, updates
        sums_apart = updates or (need_dw and self.of_dw == LIBRARY)
        self.row_blocks = triton.cdiv(N, self.of_g.n)
        self.chunk = _chunk_classes(x, w, options, self.of_g, rows_in_float32=sums_apart)
        self.class_tiles = triton.cdiv(self.chunk, self.of_g.c)
        self.float32 = functools.partial(x.new_empty, dtype=torch.float32)

        self.some = active_rows is not None
        self.active_rows = per_row[0] if active_rows is None else active_rows
        self.class_dot = self.float32(self.row_blocks, self.chunk)
        if self.some:
            self.class_dot.zero_()  # where nothing writes it
        self.negative_dot, self.target_dot = self.float32(self.class_tiles, N).zero_(), self.float32(N)
        self.reshape, self.normalize = options.thresholds is not None, options.normalize_weight
        self.scale_dot = torch.zeros_like(self.negative_dot) if self.reshape else self.negative_dot
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
        blocks, tiles = triton.cdiv(self.N, tile.n) * triton.cdiv(self.D, tile.d), triton.cdiv(self.chunk, tile.c)
        tiles_per_split = triton.cdiv(tiles, _splits(blocks, self.x))
        return blocks, tiles_per_split, triton.cdiv(tiles, tiles_per_split)

    def _normalize_embeddings(self) -> None:
        x, w, (targets, scale, _, _, g_lse, g_cos) = self.x, self.w, self.per_row
        self.chosen, self.is_chosen = _chosen(targets, self.options)
        self.unit = _units(scale, g_lse, g_cos)  # (N,)
        self.largest_unit = self.unit.amax()
        kernels.normalize_embeddings[(triton.cdiv(self.N, ROWS),)](
            x, w, self.chosen, self.saved.x_norm, targets, g_lse, g_cos, self.unit, self.largest_unit, self.x_hat,
            self.target_dot, self.N, self.C, *x.stride(), D=self.D, BLOCK_N=ROWS, BLOCK_D=COLUMNS,
            OPERAND=_operand(x, w), NORMALIZE=self.normalize, CHOSEN=self.is_chosen,
        )  # fmt: skip

    def logit_gradients(self, first: int) -> None:
        x, w, (targets, scale, top, log_sum, g_lse, g_cos) = self.x, self.w, self.per_row
        w_norm, x_norm, cosines = self.saved
        classes, kept = self.classes(first), cosines.shape[1]
        if self.of_g.specialized:
            tiles = triton.cdiv(classes, self.of_g.c)
            tiles_per_split = triton.cdiv(tiles, _splits(self.row_blocks, x, 1))
            _hopper().logit_gradients[self.row_blocks, triton.cdiv(tiles, tiles_per_split)](
                *self.described, w_norm, targets, scale, top, log_sum, g_lse, g_cos, x_norm, self.unit,
                self.described_g, self.negative_dot, self.class_dot, self.N, self.C, first, self.chunk,
                tiles_per_split, **_specialized_blocks(self.of_g, x),
            )  # fmt: skip
            return
        tiles, kept_tiles = (triton.cdiv(c, self.of_g.c) for c in (classes, min(max(kept - first, 0), classes)))
        for first_tile, end, is_kept in ((0, kept_tiles, True), (kept_tiles, tiles, False)):
            if first_tile == end:
                continue
            kernels.logit_gradients[(self.row_blocks * (end - first_tile),)](
                x, w, self.chosen, w_norm, targets, scale, top, log_sum, g_lse, g_cos,
                *_polynomial(self.options, scale), x_norm, self.unit, self.g, self.negative_dot, self.scale_dot,
                self.class_dot, cosines, self.active_rows, self.N, self.C, kept, first, first_tile, self.chunk,
                self.row_blocks, *x.stride(), **_blocks(self.of_g, x, w), NORMALIZE=self.normalize,
                RESHAPE=self.reshape, CHOSEN=self.is_chosen, KEPT=is_kept, SOME=self.some,
            )  # fmt: skip

    @functools.cached_property
    def described(self) -> tuple[Any, Any]:
        return _described(self.x, self.w, self.of_g)

    @functools.cached_property
    def described_g(self) -> Any:
        return _hopper().describe(self.g, self.of_g.n, self.of_g.c // _hopper().PARTS.value)

    def embedding_gradients(self, first: int) -> None:
        x, w = self.x, self.w
        if self.of_dx == LIBRARY:
            classes = self.classes(first)
            _multiply(self.dx_hat[0], self.g[:, :classes], w[first : first + classes], accumulate=True)
        else:
            kernels.embedding_gradients[self.dx_blocks, self.splits](
                self.g, w, self.chosen, self.saved.w_norm, self.dx_hat, self.active_rows, self.N, self.C, first,
                self.chunk, triton.cdiv(self.N, self.of_dx.n), self.tiles_per_split, **_blocks(self.of_dx, x, w),
                NORMALIZE=self.normalize, CHOSEN=self.is_chosen, SOME=self.some,
            )  # fmt: skip

    def weight_gradients(self, first: int) -> None:
        x, w, w_norm, classes = self.x, self.w, self.saved.w_norm, self.classes(first)
        of_class = self.class_dot, self.largest_unit, self.rows(first)
        place = self.C, first, self.chunk, self.row_blocks
        if self.of_dw == LIBRARY:
            _multiply(self.dw_of_chunk[:classes], self.g[:, :classes].T, self.x_hat)
            block_c, block_d = triton_tiles.row_block(self.D)
            kernels.project_weight_gradients[(triton.cdiv(classes, block_c),)](
                self.dw_of_chunk, w, w_norm, *of_class, *place, D=self.D, BLOCK_C=block_c, BLOCK_D=block_d,
                OPERAND=_operand(x, w), NORMALIZE=self.normalize,
            )  # fmt: skip
        else:
            blocks = triton.cdiv(self.D, self.of_dw.d) * triton.cdiv(classes, self.of_dw.c)
            kernels.weight_gradients[(blocks,)](
                self.g, self.x_hat, w, self.chosen, w_norm, *of_class, self.active_rows, self.N, *place,
                **_blocks(self.of_dw, x, w), NORMALIZE=self.normalize, CHOSEN=self.is_chosen, SOME=self.some,
            )  # fmt: skip

    def finish(self) -> tuple[Tensor, Tensor]:
        """dx and dscale."""
        x, (_, scale, _, _, g_lse, g_cos) = self.x, self.per_row
        dx, dscale = x.new_empty(x.shape if self.need_dx else 0), self.float32(self.N)
        columns = triton.cdiv(self.D, COLUMNS) if self.need_dx else 1
        kernels.finish_embedding_gradients[triton.cdiv(self.N, ROWS), columns](
            self.dx_hat, self.negative_dot, self.scale_dot, self.target_dot, x, self.saved.x_norm, scale, g_lse,
            g_cos, self.unit, dx, dscale, self.N, self.splits, self.class_tiles, *x.stride(), D=self.D,
            NEED_DX=self.need_dx, RESHAPE=self.reshape, BLOCK_N=ROWS, BLOCK_SPLITS=SPLITS, BLOCK_D=COLUMNS,
        )  # fmt: skip
        return dx, dscale

    def rows(self, first: int) -> Tensor:
        """Of dw, from the class on."""
        return self.dw_of_chunk if self.updates else self.dw[first:]

    def sums_of_logit_gradients(self) -> list[Tensor]:
        """G and the sums that its kernel leaves, of the first chunk, as no block size changes them."""
        classes = self.classes(0)
        sums = [self.class_dot[:, :classes].sum(0), self.negative_dot.sum(0), self.scale_dot.sum(0)]
        return [self.g[:, :classes], *sums]

    def classes(self, first: int) -> int:
        """Of the chunk."""
        return min(self.chunk, self.C - first)


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out (+)= a b by the library, its sums in float32."""
    if INTERPRETED:  # torch has this product on GPUs alone
        out.copy_(torch.addmm(out, a.float(), b.float(), beta=int(accumulate)))
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _move_rows(
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
    block_c, block_d = triton_tiles.row_block(D)
    chosen, is_chosen = _chosen(w, options)
    common = (
        chosen, w if finite is None else finite, options.count(w), first, chunk, update.seed, update.step,
        update.gradient_factor, update.max_row_norm,
    )  # fmt: skip
    blocks = {"D": D, "BLOCK_C": block_c, "BLOCK_D": block_d, "CLIP": update.max_row_norm < math.inf}
    blocks["MAY_STAY"] = finite is not None
    grid = (triton.cdiv(chunk, block_c),)
    if update.rule == "sgd":
        of_gradient, of_momentum = (1.0, update.momentum) if update.nesterov else (0.0, 1.0)
        kernels.sgd_rows[grid](
            dw, w, *(state or [w]), *common, update.lr, update.weight_decay, update.momentum, 1 - update.dampening,
            of_gradient, of_momentum, **blocks, MOMENTUM=bool(state), CHOSEN=is_chosen,
        )  # fmt: skip
    else:
        amsgrad = len(state) == 3
        kernels.adamw_rows[grid](
            dw, w, *(state if amsgrad else [*state, w]), *common, update.lr / (1 - update.beta1**update.step),
            1 - update.lr * update.weight_decay, 1 - update.beta1, update.beta2, 1 - update.beta2,
            math.sqrt(1 - update.beta2**update.step), update.eps, **blocks, AMSGRAD=amsgrad, CHOSEN=is_chosen,
        )  # fmt: skip


def _operand(x: Tensor, w: Tensor) -> Any:
    """The same for Triton. The interpreter's products of bfloat16 are wrong, so that it multiplies float32."""
    operand = operand_dtype(x.dtype, w.dtype)
    if INTERPRETED and operand == torch.bfloat16:
        return triton.language.float32
    return getattr(triton.language, str(operand).removeprefix("torch."))


def precision(operand: torch.dtype) -> str:
    """How float32 operands are multiplied: three TensorFloat-32 products (nearly float32), or one if torch may.

    AMD's matrix units multiply float32 as it is.
    """
    if operand != torch.float32 or INTERPRETED or torch.version.hip is not None:
        return "ieee"
    # Not `allow_tf32`, which raises once a user has set `fp32_precision`; this one follows either.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _units(scale: Tensor, g_lse: Tensor, g_cos: Tensor) -> Tensor:
    """(N,) powers of two that bound |G_ij| of each row, so that G / unit fits float16 whatever the loss's mean.

    One per row and not one for all: then no row of dx depends on the rest of the batch.
    """
    bound = torch.maximum((scale * g_lse).abs(), g_cos.abs())  # (N,)
    bound = bound.where(bound < torch.inf, 0).clamp(SMALLEST_UNIT, LARGEST_UNIT)
    return torch.ldexp(torch.ones_like(bound), torch.frexp(bound).exponent)


def _chunk_classes(x: Tensor, w: Tensor, options: Options, tile: Tile, *, rows_in_float32: bool) -> int:
    """Classes per chunk of backward; see `triton_tiles.chunk_classes`.

    A class takes its column of G, a slot of class_dot for each block of rows and, where that is not in dw yet, its
    gradient in float32. COSFACE_TRITON_CHUNK overrides it, rounded up to CHUNK_STEP.
    """
    (N, D), C, step = x.shape, options.count(w), triton_tiles.CHUNK_STEP
    if override := os.environ.get("COSFACE_TRITON_CHUNK"):
        if not override.isdecimal() or int(override) == 0:
            raise ValueError(f"COSFACE_TRITON_CHUNK must be a positive number of classes, got {override!r}.")
        return triton.cdiv(min(int(override), C), step) * step
    row_blocks = triton.cdiv(N, tile.n)
    return triton_tiles.chunk_classes(
        N,
        D,
        C,
        class_bytes=N * operand_dtype(x.dtype, w.dtype).itemsize
        + 4 * row_blocks
        + (4 * D if rows_in_float32 else 0),
        workspace_bytes=min(options.workspace_bytes, INTERPRETED_WORKSPACE)
        if INTERPRETED
        else options.workspace_bytes,
        row_blocks=row_blocks,
        block_c=tile.c,
        processors=_processors(x),
    )


def _splits(blocks: int, x: Tensor, programs: int = PROGRAMS_PER_PROCESSOR) -> int:
    """How many parts a sum over classes is cut into, so that `blocks` times as many programs fill the GPU."""
    return max(1, programs * _processors(x) // blocks)


def _processors(x: Tensor) -> int:
    return INTERPRETED_PROCESSORS if INTERPRETED else _device(x.device).multi_processor_count


@functools.cache
def _device(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _key(x: Tensor, w: Tensor, options: Options) -> Key:
    bucket = triton.next_power_of_2(len(x))
    keeps_cosines = options.cache_bytes and not options.gradient_tolerance
    plain = options.normalize_weight and options.thresholds is None and not keeps_cosines
    # The library and the specialised kernels multiply all rows of x with neighbouring rows of w.
    whole = not INTERPRETED and x.dtype == w.dtype and options.classes is None and not options.gradient_tolerance
    library = whole and x.dtype == torch.bfloat16
    # On demand: where a barrier is wrong a kernel hangs, which no check of results would find.
    described = whole and os.environ.get("COSFACE_TRITON_SPECIALIZED") == "1" and _can_describe(x, w)
    operand = operand_dtype(x.dtype, w.dtype)
    return Key(architecture(x.device), x.shape[1], x.dtype, w.dtype, operand, bucket, plain, library, described)


def _can_describe(*matrices: Tensor) -> bool:
    """Rows of contiguous numbers that begin at multiples of 16 bytes and do not overlap."""
    return all(
        m.stride(1) == 1
        and m.stride(0) >= m.shape[1]
        and m.stride(0) * m.itemsize % ALIGNED_BYTES == m.data_ptr() % ALIGNED_BYTES == 0
        for m in matrices
    )


@functools.cache
def architecture(device: torch.device) -> str:
    """As the table of tiles names it."""
    if INTERPRETED:
        return triton_tiles.INTERPRETED
    if torch.version.hip is not None:
        return str(_device(device).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _hopper() -> Any:
    """Imported when first launched: a Triton that lacks what it imports has one candidate fewer."""
    return importlib.import_module("cosface_kernels.backends.triton_hopper")


def _described(x: Tensor, w: Tensor, tile: Tile) -> tuple[Any, Any]:
    """Descriptors of the operands, as a specialised kernel loads them."""
    return _hopper().describe(x, tile.n, tile.d), _hopper().describe(w, tile.c, tile.d)


def _specialized_blocks(tile: Tile, x: Tensor) -> dict[str, Any]:
    """Likewise of `_blocks`; the kernel adds warps to its first four."""
    return {"D": x.shape[1], "BLOCK_N": tile.n, "BLOCK_C": tile.c, "SLOTS": tile.stages, "num_warps": 4}


def _blocks(tile: Tile, x: Tensor, w: Tensor) -> dict[str, Any]:
    """The compile-time arguments of a matrix-product kernel."""
    return {
        "D": x.shape[1],
        "BLOCK_N": tile.n,
        "BLOCK_C": tile.c,
        "BLOCK_D": tile.d,
        "OPERAND": _operand(x, w),
        "PRECISION": precision(operand_dtype(x.dtype, w.dtype)),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
