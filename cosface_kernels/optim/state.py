"""An optimizer's state of a weight: laid out like it, sharded like it, on its device."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cosface_kernels.backends import cpu
from cosface_kernels.distributed import own_rows, shard_like


def loaded_state(weight: Tensor, saved: dict[str, Any], state_names: tuple[str, ...]) -> dict[str, Any]:
    moments = {name: saved[name] for name in state_names if saved.get(name) is not None}
    for name, moment in moments.items():
        if _layout(moment) != _layout(weight):
            raise ValueError(
                f"{name} must be laid out like its weight, {_layout(weight)}, got {_layout(moment)}. Were the "
                "parameters given in another order?"
            )
        if not isinstance(moment, DTensor):
            moments[name] = moment.to(weight.device).contiguous()
    if "step" in saved:
        return {"step": step_count(float(saved["step"])), **moments}
    return {"step": step_count(1.0 if moments else 0.0), **moments}  # SGD of torch counts no steps


def check_state(weight: Tensor, state: dict[str, Any], state_names: tuple[str, ...]) -> None:
    for name in state_names:
        if name in state and _layout(state[name]) != _layout(weight):
            raise ValueError(
                f"{name} must be laid out like its weight, {_layout(weight)}, got {_layout(state[name])}: "
                "the weight was replaced by one of another shape. Give the new one to a new optimizer, or "
                "drop the old state with optimizer.state.pop(weight)."
            )
        if name in state and state[name].device != weight.device:
            raise ValueError(
                f"{name} must be on device {weight.device}, as its weight is, got it on {state[name].device}."
            )


def _layout(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{f' as {tensor.placements}' if isinstance(tensor, DTensor) else ''}"


def step_count(steps: float) -> Tensor:
    """On the CPU whatever torch's default device is, since each step reads it."""
    return torch.tensor(steps, device="cpu")


def zeros_like(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, DTensor):
        return shard_like(weight, zeros_like(own_rows(weight), dtype))
    if weight.device.type == "cpu" and not cpu.unavailable():
        return cpu.zeros_like(weight, dtype)
    return torch.zeros_like(weight, dtype=dtype)
