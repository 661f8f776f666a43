"""What the optimizers refuse of weights and options."""

import math
from typing import Any

import torch
from torch import Tensor

from cosface_kernels.distributed import placement
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.optim.ownership import owner_of
from cosface_kernels.validation import check_bool, is_number

MOVABLE = (torch.float64, torch.float32, torch.bfloat16, FLOAT8)

FLAGS = ("maximize", "nesterov", "amsgrad")
NUMBERS = ("lr", "weight_decay", "momentum", "dampening", "eps", "gradient_factor", "max_row_norm")
SIGNED = ("dampening", "gradient_factor")


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
    """The options of either rule."""
    for name in (name for name in FLAGS if name in group):
        check_bool(name, group[name])
    for name in (name for name in NUMBERS if name in group):
        number = _number(name, group[name])
        if not number >= 0 and name not in SIGNED:
            raise ValueError(f"{name} must not be negative, got {group[name]}.")
        if not math.isfinite(number) and name != "max_row_norm":
            raise ValueError(f"{name} must be finite, got {group[name]}.")
    length = group.get("weight_norm")  # of an optimizer that was pickled before there was one
    if length is not None and not 0 < _number("weight_norm", length) < math.inf:
        raise ValueError(f"weight_norm must be None, or positive and finite, got {length}.")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov needs a positive momentum and no dampening, got momentum {group['momentum']} and "
            f"dampening {group['dampening']}."
        )
    if "betas" in group:
        _check_betas(group["betas"])


def check_amsgrad(amsgrad: bool, squares: torch.dtype | None) -> None:
    """squares: the dtype in which their means are kept; None if it is not float8."""
    if amsgrad and squares is FLOAT8:
        raise ValueError(
            "amsgrad must be False with states in float8_e4m3fn, got True: of squares that are rounded at random "
            "the maximum keeps those that were rounded up, so that steps would become ever shorter. Give "
            "state_dtype=torch.float32, or bfloat16, where they do so by less."
        )


def check_rule(group: dict[str, Any], name: str, of_torch: str, options: tuple[str, ...]) -> None:
    """A group of a state that is loaded, of an optimizer of this name, whose groups have these options."""
    if missing := [option for option in options if option not in group]:
        raise ValueError(
            f"{name} loads the state of its like or of torch.optim.{of_torch}, got groups without "
            f"{', '.join(missing)}, with {', '.join(group)}."
        )
    if group.get("weight_decay") and not group.get("decoupled_weight_decay", True):
        raise ValueError(
            f"{name} takes weight_decay off the weights, got the state of torch.optim.Adam, which adds "
            f"weight_decay {group['weight_decay']} of them to the gradient. To go on by {name}'s rule, set "
            "decoupled_weight_decay to True in the groups of the state."
        )


def _number(name: str, value: Any) -> float:
    if not is_number(value) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return float(value)


def _check_betas(betas: tuple[float, float]) -> None:
    try:
        beta1, beta2 = betas
        fit = 0 <= beta1 < 1 and 0 <= beta2 < 1
    except (TypeError, ValueError):
        fit = False
    if not fit:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}.")
