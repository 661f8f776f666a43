"""What the optimizers refuse of weights and options."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from cosface_kernels.distributed import placement
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.optim.ownership import owner_of

MOVABLE = (torch.float64, torch.float32, torch.bfloat16, FLOAT8)


def check_weight(weight: Tensor) -> None:
    rows = placement(weight).weight
    if weight.dim() != 2 or weight.dtype not in MOVABLE:
        raise ValueError(
            "A head's weight must have shape (C, D) and dtype float64, float32, bfloat16 or float8_e4m3fn for its "
            f"rows to move inside backward, got shape {tuple(weight.shape)} and {weight.dtype}."
        )
    if not rows.is_contiguous():
        raise ValueError(f"A weight must be contiguous to be moved in place, got strides {rows.stride()}.")


def check_gradient(weight: Tensor, exponents: Tensor | None) -> None:
    """Of a weight in float8, which has no gradient but one that moves its rows at once."""
    if weight.dtype is not FLOAT8 or not (weight.requires_grad and torch.is_grad_enabled()):
        return
    if owner_of(weight) is None:
        raise RuntimeError(
            f"A weight in float8, of shape {tuple(weight.shape)} here, has no gradient of its own: its rows move "
            "inside backward. Give it to a FusedSGD or FusedAdamW of cosface_kernels without accumulate=True, "
            "which must stay alive, or call requires_grad_(False)."
        )
    if exponents is None:
        raise ValueError("weight_exponent must be given with a weight in float8 whose rows move, got None.")


def check_group(group: dict[str, Any]) -> None:
    """The options that both rules have."""
    check_not_negative(**{name: group[name] for name in ("lr", "weight_decay", "max_row_norm")})
    length = group.get("weight_norm")  # of an optimizer that was pickled before there was one
    if length is not None:
        _check_number("weight_norm", length)
        if not 0 < length < math.inf:
            raise ValueError(f"weight_norm must be None, or positive and finite, got {length}.")
    _check_number("gradient_factor", group["gradient_factor"])
    if not math.isfinite(group["gradient_factor"]):
        raise ValueError(f"gradient_factor must be finite, got {group['gradient_factor']}.")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real | Tensor):
        raise TypeError(f"{name} must be a number, got {value!r}.")


def check_not_negative(**values: float) -> None:
    for name, value in values.items():
        _check_number(name, value)
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")


def check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}.")
    return betas
