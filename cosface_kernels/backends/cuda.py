"""Backend `cuda`: the CUDA kernels of csrc/cuda between library matrix products.

For NVIDIA GPUs where Triton is missing or not wanted: Windows, old drivers, builds ahead of time; and for float64.
Neither the gradient of a weight that an optimizer moves nor the rows of sampled classes exist as a whole, but a
chunk of them at a time.
"""

from typing import Any

import torch
from torch import Tensor

from cosface_kernels.backends.chunks import nearest as nearest
from cosface_kernels.backends.extension import _C, import_error, kernel_update
from cosface_kernels.options import Options, Update, empty_cache
from cosface_kernels.reference import compute_dtype

OPTIONS = {"cache_bytes", "classes", "updates", "normalize_weight", "thresholds", "negatives"}
OPTIONS |= {"moments", "g_moments", "sigmoid", "polynomials", "exponents"}


def unavailable() -> str | None:
    if _C is None:
        return import_error
    if not hasattr(_C, "cuda_forward"):
        return (
            "cosface_kernels was built without CUDA; building it so needs a CUDA build of torch "
            f"(this is torch {torch.__version__}) and nvcc, on PATH or in CUDA_HOME."
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device."
    return None


def unsupported(x: Tensor, w: Tensor, options: Options) -> str | None:
    if x.device.type != "cuda":
        return f"it takes tensors on device 'cuda', got them on {str(x.device)!r}."
    return options.refusal(OPTIONS)


def describe() -> str:
    major, minor = divmod(_C.cuda_version // 10, 100)
    return f"built with CUDA {major}.{minor}, {torch.cuda.get_device_name()}"


def cache_size(x: Tensor, w: Tensor, options: Options) -> int:
    """Of the norms that forward leaves for backward, and of cosines; csrc/cuda/driver.cpp has the same rule.

    0 with a sigmoid, which no forward precedes.
    """
    if options.sigmoid:
        return 0
    norms = x.shape[0] + (options.count(w) if options.normalize_weight else 0)
    return compute_dtype(x, w).itemsize * norms + options.cosine_bytes(x, w)


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options
) -> tuple[Tensor, ...]:
    cache = x.new_empty(cache_size(x, w, options), dtype=torch.uint8)
    *results, moments = _C.cuda_forward(x, w, targets, scale, margin, _kernel_options(options, cache))
    return *results, cache, moments


def backward(*tensors: Tensor, options: Options, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _C.cuda_backward(*tensors[:-1], _kernel_options(options, tensors[-1]), need_dx, need_dw)


def sigmoid(
    *tensors: Tensor, options: Options, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _C.cuda_sigmoid(*tensors, _kernel_options(options, empty_cache(tensors[0])), need_dx, need_dw)


def backward_update_(
    *tensors: Tensor, state: list[Tensor], finite: Tensor | None, update: Update, options: Options, need_dx: bool
) -> tuple[Tensor, Tensor]:
    kernel_options, numbers = _kernel_options(options, tensors[-1]), kernel_update(update)
    return _C.cuda_backward_update(*tensors[:-1], kernel_options, numbers, state, finite, need_dx)


def apply_update_(w: Tensor, dw: Tensor, state: list[Tensor], update: Update) -> None:
    _C.cuda_apply_update(w, dw, kernel_update(update), state)


def _kernel_options(options: Options, cache: Tensor) -> Any:
    return _C.CudaOptions(
        classes=options.classes,
        cache=cache,
        normalize_weight=options.normalize_weight,
        thresholds=options.thresholds,
        negatives=options.negatives,
        workspace_bytes=options.workspace_bytes,
        moments=options.moments,
        g_moments=options.g_moments,
        sigmoid=options.sigmoid,
        polynomials=options.polynomials,
        exponents=options.exponents,
    )
