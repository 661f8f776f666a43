"""What a state must be to load into a head."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cosface_kernels import float8
from cosface_kernels.distributed import beside, own_rows
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.validation import warn

SHARDED_OR_WHOLE = (
    "{weight} is {there} in the state and {here} in the head, and neither loads into the other. "
    "cosface_kernels.checkpoint.save and checkpoint.load take a head from any number of ranks to any other; "
    "cosface_kernels.convert.load_weight_(head.weight, path) fills either from a file of convert.save_weight."
)


def fit_(state_dict: dict[str, Any], head: Any, prefix: str, assigns: bool, errors: list[str]) -> bool:
    """Makes the state one that torch loads into the head, and adds what is wrong with it to torch's errors.

    Returns:
        Whether the head's weight will be the state's.
    """
    draws, weight, theirs = (f"{prefix}{name}" for name in ("sampler.draws", "weight", "W"))
    if weight not in state_dict and theirs in state_dict:  # (D, C), of pytorch-metric-learning 2.x
        given = state_dict.pop(theirs)
        state_dict[weight] = given.T.contiguous() if _is_matrix(given) else given
    if head.sampler is None:  # the number of draws is nothing to a head that draws none
        state_dict.pop(draws, None)
    else:
        state_dict.setdefault(draws, head.sampler.draws)
    sharded = [isinstance(tensor, DTensor) for tensor in (state_dict.get(weight, head.weight), head.weight)]
    restored = weight in state_dict and (assigns or sharded[0] == sharded[1])
    if not _is_matrix(given := state_dict.get(weight, head.weight)):
        restored = False
        errors.append(f"{weight} must be a tensor with two dimensions, got {_seen(given)} in the state.")
        state_dict[weight] = head.weight
    elif sharded[0] != sharded[1] and not assigns:
        there, here = ("sharded over ranks" if each else "whole" for each in sharded)
        errors.append(SHARDED_OR_WHOLE.format(weight=weight, there=there, here=here))
        state_dict[weight] = head.weight
    elif restored and len(state_dict[weight]) != head.num_classes * head.subcenters:
        count, restored = len(state_dict[weight]), False
        errors.append(f"{weight} is of {count} {_other_size(count, head)}")
        state_dict[weight] = head.weight
    exponents = f"{prefix}weight_exponent"
    if restored:
        _fit_float8(state_dict, head, weight, exponents, errors)
    elif head.weight_exponent is not None:
        state_dict[exponents] = head.weight_exponent
    else:
        state_dict.pop(exponents, None)
    return restored


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _seen(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _fit_float8(state_dict: dict[str, Any], head: Any, weight: str, exponents: str, errors: list[str]) -> None:
    """Takes the state's rows to float8, or from it, where the head has them in the other form."""
    given, wanted = state_dict[weight], head.weight.dtype
    wrong = _wrong_exponents(given, state_dict.get(exponents)) if given.dtype is FLOAT8 else ""
    if wrong:
        errors.append(f"{weight} is in float8, and the state {wrong} {exponents}, the exponents of its rows.")
        state_dict.pop(exponents, None)
        state_dict[weight] = head.weight
        if head.weight_exponent is not None:
            state_dict[exponents] = head.weight_exponent
    elif wanted is FLOAT8 and given.dtype is not FLOAT8:
        warn(
            f"{weight} is rounded from {given.dtype} to {wanted}, to the nearest: an entry by at most 1/16 of "
            "itself, but for the smallest of its row, and a cosine by about 1e-3."
        )
        rows, of_rows = float8.quantized(own_rows(given))
        state_dict[weight], state_dict[exponents] = beside(given, rows), beside(given, of_rows)
    elif given.dtype is FLOAT8 and wanted is not FLOAT8:
        rows = float8.values(own_rows(given), own_rows(state_dict.pop(exponents)), wanted)
        state_dict[weight] = beside(given, rows)


def _wrong_exponents(rows: Any, exponents: Any) -> str:
    """What the state does with them, or nothing where they are those of the rows."""
    if exponents is None:
        return "lacks"
    if isinstance(exponents, Tensor) and exponents.shape == rows.shape[:1] and exponents.dtype is torch.int8:
        return ""
    return f"has {_seen(exponents)} and not int8 of {(len(rows),)} as"


def _other_size(count: int, head: Any) -> str:
    if head.subcenters == 1:
        return (
            f"classes in the state and of {head.num_classes} in the head: load it into a head of {count}, then "
            "call its resize_classes_(keep=..., new=..., optimizer=...), or, if classes have several sub-centres "
            "there, into one with them, then its drop_subcenters_()."
        )
    return (
        f"rows in the state and of {head.num_classes * head.subcenters} in the head, {head.subcenters} of each of "
        f"{head.num_classes} classes: load it into a head of as many."
    )
