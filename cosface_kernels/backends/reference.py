"""Backend `reference`: the specification itself, on any device and dtype, with all logits in memory."""

from torch import Tensor

from cosface_kernels import reference

forward = reference.forward


def unavailable() -> str | None:
    return None


def unsupported(x: Tensor, w: Tensor) -> str | None:
    return None


def describe() -> str:
    return "plain PyTorch, all logits in memory"


def backward(*tensors: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, dscale = reference.backward(*tensors)
    return dx if need_dx else dx.new_empty(0), dw if need_dw else dw.new_empty(0), dscale
