"""Backend `reference`: the specification itself, on any device and dtype, with all logits in memory."""

import torch
from torch import Tensor

from cosface_kernels import reference
from cosface_kernels.options import Options, empty_cache


def unavailable() -> str | None:
    return None


def unsupported(x: Tensor, w: Tensor, options: Options) -> str | None:
    return options.refusal({"classes"})


def describe() -> str:
    return "plain PyTorch, all logits in memory"


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options
) -> tuple[Tensor, ...]:
    with torch.autocast(x.device.type, enabled=False):  # the specification's matrix products are never rounded
        return *reference.forward(x, _rows(w, options), targets, scale, margin), empty_cache(x)


def backward(*tensors: Tensor, options: Options, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, w, *per_row, _ = tensors
    with torch.autocast(x.device.type, enabled=False):
        dx, dw, dscale = reference.backward(x, _rows(w, options), *per_row)
    return dx if need_dx else dx.new_empty(0), dw if need_dw else dw.new_empty(0), dscale


def _rows(w: Tensor, options: Options) -> Tensor:
    return w if options.classes is None else w[options.classes]
