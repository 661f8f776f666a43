"""Backend `cuda`: the CUDA kernels of csrc/cuda between library matrix products.

For NVIDIA GPUs where Triton is missing or not wanted: Windows, old drivers, builds ahead of time; and for float64.
"""

import torch
from torch import Tensor

from cosface_kernels.backends.extension import _C, import_error
from cosface_kernels.options import Options, empty_cache


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
    return options.refusal({"normalize_weight", "thresholds", "negatives"})


def describe() -> str:
    major, minor = divmod(_C.cuda_version // 10, 100)
    return f"built with CUDA {major}.{minor}, {torch.cuda.get_device_name()}"


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options
) -> tuple[Tensor, ...]:
    return *_C.cuda_forward(x, w, targets, scale, margin, *_extras(options)), empty_cache(x)


def backward(*tensors: Tensor, options: Options, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _C.cuda_backward(*tensors[:-1], need_dx, need_dw, *_extras(options))


def _extras(options: Options) -> tuple[bool, Tensor | None, Tensor | None]:
    return options.normalize_weight, options.thresholds, options.negatives
