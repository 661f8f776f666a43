"""An optimizer's state of a weight: laid out like it, sharded like it, on its device."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cosface_kernels import float8
from cosface_kernels.backends import cpu
from cosface_kernels.distributed import beside, own_rows, zero_exponents
from cosface_kernels.float8 import FLOAT8, OF_STATE

IN_FLOAT8 = "_float8"  # behind the name of a state that is saved so: torch.optim would read it without exponents


def saved_state(state: dict[str, Any]) -> dict[str, Any]:
    in_float8 = {name for name, value in state.items() if isinstance(value, Tensor) and value.dtype is FLOAT8}
    return {name + IN_FLOAT8 if name in in_float8 else name: value for name, value in state.items()}


def loaded_states(
    weights: list[Tensor], saved: dict[str, Any], state_names: tuple[str, ...]
) -> dict[Tensor, dict[str, Any]]:
    """saved: an optimizer's state_dict, of as many parameters."""
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    return {
        weight: _loaded_state(weight, saved["state"][index], state_names)
        for index, weight in zip(indices, weights, strict=False)
        if saved["state"].get(index)
    }


def _loaded_state(weight: Tensor, saved: dict[str, Any], state_names: tuple[str, ...]) -> dict[str, Any]:
    saved = {name.removesuffix(IN_FLOAT8): value for name, value in saved.items()}
    moments = {name: saved[name] for name in _with_exponents(state_names) if saved.get(name) is not None}
    for name, moment in moments.items():
        if _layout(moment) != _wanted(name, weight):
            raise ValueError(
                f"{name} must be laid out like its weight, {_wanted(name, weight)}, got {_layout(moment)}. Were "
                "the parameters given in another order?"
            )
        if moment.dtype is FLOAT8 and name + OF_STATE not in moments:
            raise ValueError(f"{name} is in float8, and the state lacks {name}{OF_STATE}, its rows' exponents.")
        if not isinstance(moment, DTensor):
            moments[name] = moment.to(weight.device).contiguous()
    steps = {"step": step_count(float(saved["step"]))} if "step" in saved else {}  # SGD of torch counts none
    return steps | moments


def check_state(weight: Tensor, state: dict[str, Any], state_names: tuple[str, ...]) -> None:
    for name in _with_exponents(state_names):
        if name in state and _layout(state[name]) != _wanted(name, weight):
            raise ValueError(
                f"{name} must be laid out like its weight, {_wanted(name, weight)}, got {_layout(state[name])}: "
                "the weight was replaced by one of another shape. Give the new one to a new optimizer, or "
                "drop the old state with optimizer.state.pop(weight)."
            )
        if name in state and state[name].device != weight.device:
            raise ValueError(
                f"{name} must be on device {weight.device}, as its weight is, got it on {state[name].device}."
            )


def _with_exponents(state_names: tuple[str, ...]) -> list[str]:
    return [each for name in state_names for each in (name, name + OF_STATE)]


def _layout(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{_placements(tensor)}"


def _wanted(name: str, weight: Tensor) -> str:
    return f"{(len(weight),)}{_placements(weight)}" if name.endswith(OF_STATE) else _layout(weight)


def _placements(tensor: Tensor) -> str:
    return f" as {tensor.placements}" if isinstance(tensor, DTensor) else ""


def step_count(steps: float) -> Tensor:
    """On the CPU and in float32, whatever torch's defaults are: each step reads it, and bfloat16 ends at 256."""
    return torch.tensor(steps, dtype=torch.float32, device="cpu")


def zero_state(weight: Tensor, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of that name of a new weight, and in float8 the exponents of its rows."""
    state = {name: zeros_like(weight, dtype)}
    return state | ({name + OF_STATE: zero_exponents(weight)} if dtype is FLOAT8 else {})


def convert_(state: dict[str, Any], name: str, dtype: torch.dtype, *, is_square: bool) -> None:
    """Takes the state of that name to another dtype, to the nearest; of squares float8 has the roots."""
    before, exponents = state[name], state.pop(name + OF_STATE, None)
    rows = own_rows(before)
    if exponents is not None:
        rows = float8.values(rows, own_rows(exponents), torch.float32)
        rows = rows.square() if is_square else rows
    if dtype is FLOAT8:
        rows, of_rows = float8.quantized(rows.sqrt() if is_square else rows)
        state[name + OF_STATE] = beside(before, of_rows)
    state[name] = beside(before, rows.to(dtype))


def zeros_like(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, DTensor):
        return beside(weight, zeros_like(own_rows(weight), dtype))
    if weight.device.type == "cpu" and not cpu.unavailable():
        return cpu.zeros_like(weight, dtype)
    return torch.zeros_like(weight, dtype=dtype)
