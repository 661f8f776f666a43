"""Backend `reference`: the specification itself, on any device and dtype, with all logits in memory."""

import torch
from torch import Tensor

from cosface_kernels import reference


def unavailable() -> str | None:
    return None


def unsupported(x: Tensor, w: Tensor) -> str | None:
    return None


def describe() -> str:
    return "plain PyTorch, all logits in memory"


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):  # the specification's matrix products are never rounded
        return reference.forward(x, w, targets, scale, margin)


def backward(*tensors: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(tensors[0].device.type, enabled=False):
        dx, dw, dscale = reference.backward(*tensors)
    return dx if need_dx else dx.new_empty(0), dw if need_dw else dw.new_empty(0), dscale
