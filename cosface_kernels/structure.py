"""A state as JSON, with the key of each tensor in its place, and its tensors by key."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor


def encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, with the key of each tensor in its place."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            advice = (
                " For a head of sampled classes take FusedSGD, or torch.optim.SGD without momentum."
                if key.endswith("/momentum_buffer")
                else ""
            )
            raise TypeError(f"{key} is a sparse tensor; a checkpoint holds dense ones.{advice}")
        if key in tensors:
            raise ValueError(f"{key} is the place of two tensors, and one would be lost: give it another key.")
        if value.is_meta:
            raise TypeError(f"{key} is on the device meta, without numbers: call to_empty(device=...) first.")
        if not _comes_back(value.dtype):
            raise TypeError(
                f"{key} is in {value.dtype}, which safetensors does not give back: keep it in another dtype, or a "
                "view of it in uint8."
            )
        tensors[key] = value.resolve_conj().resolve_neg()  # no file has a word for either
        return {"tensor": key}
    if isinstance(value, Mapping):  # as pairs, because an optimizer's keys are integers
        for k in value:
            if not (k is None or isinstance(k, bool | int | float | str)):
                raise TypeError(
                    f"{key} has a key that is a {type(k).__name__}, {k!r}; those of a checkpoint are numbers, "
                    "strings or None."
                )
        kind = (
            "counter" if isinstance(value, Counter) else "dict"
        )  # MultiStepLR has one, and asks for its elements
        return {kind: [[k, encode(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        items = [encode(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{key} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings and containers of them."
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(decode(v, tensors) for v in content)
    pairs = {k: decode(v, tensors) for k, v in content}
    return Counter(pairs) if kind == "counter" else pairs


def places(value: Any) -> Iterator[str]:
    """Those of the tensors in a structure."""
    if isinstance(value, list):
        for item in value:
            yield from places(item)
    elif isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            yield content
        elif kind in ("dict", "counter", "tuple"):
            yield from places(content if kind == "tuple" else [v for _, v in content])
        else:
            raise ValueError(f"{kind!r} is none of tensor, dict, counter and tuple.")


@functools.cache
def _comes_back(dtype: torch.dtype) -> bool:
    """safetensors writes some that it does not read, and its releases differ."""
    try:
        return load(save({"one": torch.empty(1, dtype=dtype, device="cpu")}))["one"].dtype == dtype
    except Exception:  # as many kinds as there are tables that lack it
        return False
