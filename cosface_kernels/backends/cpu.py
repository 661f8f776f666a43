"""Backend `cpu`: the C++ kernels of csrc/cpu, for any CPU."""

from torch import Tensor

from cosface_kernels.backends.extension import _C, import_error


def unavailable() -> str | None:
    if _C is None:
        return import_error
    try:
        _C.instruction_set()
    except RuntimeError as error:  # COSFACE_CPU_ISA names a set that this processor does not have
        return str(error)
    return None


def unsupported(x: Tensor, w: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"it takes tensors on the CPU, got them on {x.device}."
    return None


def describe() -> str:
    return f"instruction set {_C.instruction_set()}, {_C.threads()} threads"


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _C.lmcl_forward(x, w, targets, scale, margin)


def backward(*tensors: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _C.lmcl_backward(*tensors, need_dx, need_dw)


def normal_(tensor: Tensor, seed: int, std: float) -> None:
    """Fills a contiguous tensor with N(0, std^2)."""
    _C.normal_(tensor, seed, std)
