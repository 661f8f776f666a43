"""Backend `triton`: fused kernels for CUDA and ROCm GPUs.

Under TRITON_INTERPRET=1 they run on CPU tensors, slowly.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cosface_kernels.backends import contract
from cosface_kernels.backends.chunks import embeddings, is_full, nearest
from cosface_kernels.backends.triton import backward_pass, choice, forward_pass, launch
from cosface_kernels.backends.triton.backward_pass import Move
from cosface_kernels.backends.triton.cache import Saved, cache_size, nothing_saved, saved_in
from cosface_kernels.backends.triton.choice import Trial
from cosface_kernels.backends.triton.tiles import GEMM_KERNELS, Tile, candidates, plainest
from cosface_kernels.backends.triton.update import move_rows
from cosface_kernels.options import PLAIN, Options, Update, empty_cache

__all__ = [
    "apply_update_",
    "backward",
    "backward_update_",
    "cache_size",
    "describe",
    "forward",
    "nearest",
    "sigmoid",
    "unavailable",
    "unsupported",
]

MIN_VERSION = (3, 6)  # that of torch 2.10; 3.2 loads a next tile into memory that a product still reads
MIN_CAPABILITY = (8, 0)  # bfloat16 on tensor cores, asynchronous copies

OPTIONS = {"cache_bytes", "classes", "gradient_tolerance", "updates", "normalize_weight", "thresholds"}
OPTIONS |= {"negatives", "moments", "g_moments", "sigmoid", "polynomials", "exponents"}

sparse: Any = None  # for a gradient_tolerance; imports Triton


@functools.cache
def unavailable() -> str | None:
    if not launch.INTERPRETED and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm GPU."
    global sparse
    try:
        launch.triton = importlib.import_module("triton")
        launch.kernels = importlib.import_module("cosface_kernels.backends.triton.kernels")
    except ImportError as error:
        return f"triton cannot be imported ({error})."
    if tuple(int(part) for part in launch.triton.__version__.split(".")[:2]) < MIN_VERSION:
        return f"it needs triton {'.'.join(map(str, MIN_VERSION))} or newer, found {launch.triton.__version__}."
    sparse = importlib.import_module("cosface_kernels.backends.triton.sparse")
    if launch.INTERPRETED:
        return None
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or newer, found {capability[0]}.{capability[1]}."
    return _compile_failure()


@_disable_current_modes()  # who asks first may be tracing, with tensors that have no memory; all get the answer
def _compile_failure() -> str | None:
    """Why a kernel cannot be compiled or launched here (no C compiler, too old a driver), or None.

    Any exception is a reason: Triton passes on subprocess's of a compiler without Python's headers, asserts that
    libcuda is found, and other versions raise others.
    """
    one = torch.ones(1, 1, dtype=torch.float32, device="cuda")
    try:
        label = one.new_zeros(1, dtype=torch.int64)
        saved = Saved(one[0], one[0], one.new_empty(1, 0, dtype=torch.int16))
        forward_pass.forward(one, one, saved, label, one[0], 0.0, PLAIN, Tile(16, 16, 16, 4, 1))
    except Exception as error:
        if is_full(error):  # what is raised is not remembered
            raise
        return f"a kernel cannot be compiled or launched ({type(error).__name__}: {error})."
    return None


def unsupported(x: Tensor, w: Tensor, options: Options) -> str | None:
    wanted = "cpu" if launch.INTERPRETED else "cuda"
    if x.device.type != wanted:
        return f"it takes tensors on device {wanted!r}, got them on {str(x.device)!r}."
    if torch.float64 in (x.dtype, w.dtype):
        return "it computes in float32 and leaves float64 to backend 'reference'."
    if not w.is_contiguous():
        return f"it takes a contiguous weight, got strides {w.stride()} for shape {tuple(w.shape)}."
    if options.gradient_tolerance and options.thresholds is not None:
        return "reshaped negatives with a gradient_tolerance are not on this backend yet."
    if options.gradient_tolerance and (options.moments or options.g_moments is not None):
        return "moments with a gradient_tolerance are not on this backend yet."
    return options.refusal(OPTIONS)


def describe() -> str:
    where = "interpreted on the CPU" if launch.INTERPRETED else torch.cuda.get_device_name()
    return f"triton {launch.triton.__version__}, {where}"


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options
) -> tuple[Tensor, ...]:
    contract.check(x, w, options, targets, scale)
    x, targets, scale = map(launch.aligned, (embeddings(x, w, options), targets, scale))
    with torch.cuda.device_of(x):
        cache = x.new_zeros(cache_size(x, w, options), dtype=torch.uint8)
        if len(x) == 0:
            rows = forward_pass.five_rows(x, targets)
            return *rows, cache, forward_pass.empty_moments(x, options)
        saved = saved_in(cache, x, w, options)
        forward_pass.fill_norms(x, w, options, saved)
        some_w, some_options = launch.sample(x, w, options)

        def prepare(tile: Tile) -> Trial:
            results: list[Tensor] = []

            def run() -> None:
                results[:] = forward_pass.forward(x, some_w, saved, targets, scale, margin, some_options, tile)

            return Trial(run, lambda: results if options.moments else results[:-1])

        tile = choice.choose("class_statistics", launch.key(x, w, options), prepare)
        *results, moments = forward_pass.forward(x, w, saved, targets, scale, margin, options, tile)
        if options.gradient_tolerance:
            sparse.keep(x, w, saved, targets, scale, results, options, cache)
        return *results, cache, moments


def backward(*tensors: Tensor, options: Options, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, dscale, *_ = _tuned_backward(tensors, options, need_dx, need_dw)
    return dx, dw, dscale


def sigmoid(
    *tensors: Tensor, options: Options, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, targets, scale, bias, g, g_cos = tensors
    contract.check_sums(x, w, options, *tensors[2:])
    per_row = targets, scale, bias, -bias, g, g_cos  # as backward takes them; there is no top to read
    dx, dw, dscale, sums = _tuned_backward((x, w, *per_row, empty_cache(x)), options, need_dx, need_dw)
    return sums, dx, dw, dscale


def backward_update_(
    *tensors: Tensor, state: list[Tensor], finite: Tensor | None, update: Update, options: Options, need_dx: bool
) -> tuple[Tensor, Tensor]:
    contract.check_state(tensors[1], state, update, finite=finite)
    move = functools.partial(move_rows, tensors[1], state, finite, update, options)
    dx, _, dscale, *_ = _tuned_backward(tensors, options, need_dx, True, move)
    return dx, dscale


def apply_update_(w: Tensor, dw: Tensor, state: list[Tensor], update: Update) -> None:
    contract.check_state(w, state, update, dw)
    with torch.cuda.device_of(w):
        move_rows(w, state, None, update, PLAIN, 0, dw.contiguous())


def _tuned_backward(
    tensors: tuple[Tensor, ...], options: Options, need_dx: bool, need_dw: bool, move: Move | None = None
) -> tuple[Tensor, ...]:
    """dx, dw, dscale and, with a sigmoid, its sums, (2, N)."""
    x, w, *per_row, cache = tensors
    contract.check(x, w, options, *per_row)
    with torch.cuda.device_of(x):
        if len(x) == 0:
            return backward_pass.backward_of_nothing(x, w, options, need_dx, need_dw, move)
        wanted, x = x.dtype, launch.aligned(embeddings(x, w, options))
        per_row = list(map(launch.aligned, per_row))  # targets, scale, top, log_sum, g_lse, g_cos: (N,)
        if options.sigmoid:
            saved = nothing_saved(x, w, options)
            forward_pass.fill_norms(x, w, options, saved)
        else:
            saved = saved_in(cache, x, w, options)
        if options.g_moments is not None or per_row[0].dim() == 2:
            per_row, options = backward_pass.with_moments(per_row, options)
        else:  # nobody asks for gradients of the moments
            options = dataclasses.replace(options, moments=False)
        key, (some_w, some_options) = launch.key(x, w, options), launch.sample(x, w, options)
        every_row = None
        if options.gradient_tolerance:
            every_row = torch.full((1,), len(x), dtype=torch.int32, device=x.device)
        tiles = {kernel: candidates(kernel, key)[0] for kernel in GEMM_KERNELS[1:]}

        def prepare(kernel: str, tile: Tile) -> Trial:
            of_g = *candidates("logit_gradients", key), plainest("logit_gradients", key)
            trial = backward_pass.Backward(
                x, some_w, saved, per_row, some_options, {**tiles, kernel: tile}, need_dx, need_dw, bool(move),
                every_row, backward_pass.trial_chunk(x, some_w, some_options, of_g),
            )  # fmt: skip
            trial.saved = saved.half_kept(trial.classes(0))
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
                tiles[kernel] = choice.choose(kernel, key, functools.partial(prepare, kernel))
        if options.gradient_tolerance:
            dx, *others = sparse.backward(x, w, saved, per_row, options, cache, need_dx, need_dw, tiles, move)
        else:
            dx, *others = backward_pass.backward(x, w, saved, per_row, options, need_dx, need_dw, tiles, move)
        return dx.to(wanted), *others
