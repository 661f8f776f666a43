"""What the optimizers refuse of weights and options."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from cosface_kernels.distributed import placement

MOVABLE = (torch.float64, torch.float32, torch.bfloat16)


def check_weight(weight: Tensor) -> None:
    rows = placement(weight).weight
    if weight.dim() != 2 or weight.dtype not in MOVABLE:
        raise ValueError(
            "A head's weight must have shape (C, D) and dtype float64, float32 or bfloat16 for its rows to move "
            f"inside backward, got shape {tuple(weight.shape)} and {weight.dtype}."
        )
    if not rows.is_contiguous():
        raise ValueError(f"A weight must be contiguous to be moved in place, got strides {rows.stride()}.")


def check_group(group: dict[str, Any]) -> None:
    """The options that both rules have."""
    check_not_negative(**{name: group[name] for name in ("lr", "weight_decay", "max_row_norm")})
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
