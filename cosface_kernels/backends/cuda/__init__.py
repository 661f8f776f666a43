"""Backend `cuda`: the CUDA kernels of csrc/cuda between library matrix products.

For NVIDIA GPUs where Triton is missing or not wanted: Windows, old drivers, builds ahead of time; and for float64.
Neither the gradient of a weight that an optimizer moves nor the rows of sampled classes exist as a whole, but a
chunk of them at a time.
"""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cosface_kernels.backends import contract
from cosface_kernels.backends.chunks import is_full
from cosface_kernels.backends.chunks import nearest as nearest
from cosface_kernels.backends.cuda import driver
from cosface_kernels.backends.cuda.driver import Device, Step
from cosface_kernels.backends.extension import _C, import_error, kernel_update
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import Options, Update, empty_cache
from cosface_kernels.reference import compute_dtype

OPTIONS = {"cache_bytes", "classes", "updates", "normalize_weight", "thresholds", "negatives"}
OPTIONS |= {"moments", "g_moments", "sigmoid", "polynomials", "exponents"}


def unavailable() -> str | None:
    if _C is None:
        return import_error
    if not hasattr(_C, "cuda_version"):
        return (
            "cosface_kernels was built without CUDA; building it with it needs nvcc, on PATH or in CUDA_HOME, and "
            "no COSFACE_CUDA=0."
        )
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device."
    return _launch_failure()


@functools.cache
@_disable_current_modes()  # who asks first may be tracing, with tensors that have no memory; all get the answer
def _launch_failure() -> str | None:
    """Why no kernel can be launched here (one compiled for other GPUs, too old a driver), or None."""
    one = torch.ones(1, 1, dtype=torch.float32, device="cuda")
    try:
        _C.row_norms(one, one.new_empty(1), torch.cuda.current_stream().cuda_stream)
    except RuntimeError as error:
        if is_full(error):  # what is raised is not remembered
            raise
        major, minor = torch.cuda.get_device_capability()
        return f"a kernel cannot be launched on a GPU of compute capability {major}.{minor} ({error})."
    return None


def unsupported(x: Tensor, w: Tensor, options: Options) -> str | None:
    if x.device.type != "cuda":
        return f"it takes tensors on device 'cuda', got them on {str(x.device)!r}."
    return options.refusal(OPTIONS)


def describe() -> str:
    major, minor = divmod(_C.cuda_version // 10, 100)
    return f"built with CUDA {major}.{minor}, {torch.cuda.get_device_name()}"


def cache_size(x: Tensor, w: Tensor, options: Options) -> int:
    """Of the norms that forward leaves for backward, and of cosines, as `driver.Cache` reads it.

    0 with a sigmoid, which no forward precedes.
    """
    if options.sigmoid:
        return 0
    norms = x.shape[0] + (options.count(w) if options.normalize_weight else 0)
    return compute_dtype(x, w).itemsize * norms + options.cosine_bytes(x, w)


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options
) -> tuple[Tensor, ...]:
    contract.check(x, w, options, targets, scale)
    with torch.cuda.device_of(x):
        cache = x.new_empty(cache_size(x, w, options), dtype=torch.uint8)
        step = Step(device_of(x), x, w, targets, scale, options, cache)
        *results, moments = driver.forward(step, margin)
    return *results, cache, moments


def backward(*tensors: Tensor, options: Options, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, dscale, _ = _backward(*tensors, options=options, need_dx=need_dx, need_dw=need_dw)
    return dx, dw, dscale


def sigmoid(
    *tensors: Tensor, options: Options, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, targets, scale, bias, g, g_cos = tensors
    contract.check_sums(x, w, options, *tensors[2:])
    rows = targets, scale, bias, -bias, g, g_cos, empty_cache(x)  # as backward takes them; there is no top to read
    dx, dw, dscale, sums = _backward(x, w, *rows, options=options, need_dx=need_dx, need_dw=need_dw)
    return sums, dx, dw, dscale


def backward_update_(
    *tensors: Tensor, state: list[Tensor], finite: Tensor | None, update: Update, options: Options, need_dx: bool
) -> tuple[Tensor, Tensor]:
    w = tensors[1]
    contract.check_state(w, state, update, finite=finite)
    move = _move(w, state, update, options.classes, finite)
    dx, _, dscale, _ = _backward(*tensors, options=options, need_dx=need_dx, need_dw=False, move=move)
    return dx, dscale


def apply_update_(w: Tensor, dw: Tensor, state: list[Tensor], update: Update) -> None:
    contract.check_state(w, state, update, dw)
    with torch.cuda.device_of(w):
        driver.apply(device_of(w), w, dw, _move(w, state, update))


def device_of(tensor: Tensor) -> Device:
    properties = torch.cuda.get_device_properties(tensor.device)
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return Device(_C, stream, properties.multi_processor_count)


def _backward(
    *tensors: Tensor, options: Options, need_dx: bool, need_dw: bool, move: driver.Move | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, targets, scale, *upstream, cache = tensors
    contract.check(x, w, options, targets, scale, *upstream)
    if need_dw and w.dtype is FLOAT8:
        raise TypeError("A weight in float8 has no gradient of its own.")
    with torch.cuda.device_of(x):
        step = Step(device_of(x), x, w, targets, scale, options, None if options.sigmoid else cache)
        dx, dw, dscale, sums = driver.backward(step, upstream, need_dx=need_dx, need_dw=need_dw, move=move)
    return dx.to(x.dtype), dw, dscale, sums


def _move(
    w: Tensor, state: list[Tensor], update: Update, classes: Tensor | None = None, finite: Tensor | None = None
) -> driver.Move:
    numbers, chosen = kernel_update(update), None if classes is None else classes.contiguous()

    def move(device: Device, first: int, gradient: Tensor) -> None:
        index = None if chosen is None else chosen[first : first + len(gradient)]
        device.kernels.move_rows(gradient, w, index, first, numbers, state, finite, device.stream)

    return move
