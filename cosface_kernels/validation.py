"""The checks at the door: every message is a sentence that shows the value seen. Inside, the code trusts."""

import math
import numbers
import reprlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cosface_kernels.float8 import FLOAT8

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (*FLOAT_DTYPES, FLOAT8)
REDUCTIONS = ("none", "sum", "mean")
LARGEST = 2.0**63  # from which torch takes no integer; the product of two is finite in float32


def warn(message: str) -> None:
    """Of the user's line, however many calls of this package and of torch lie between."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].startswith(("cosface_kernels.", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def is_capturing() -> bool:
    """Whether what runs now is recorded for a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_transformed() -> bool:
    """Whether a transform of torch.func is under way, such as vmap, whose tensors have no values to look at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_number(value: object) -> bool:
    """A real one; a bool, which Python takes for 0 or 1, is a flag."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_positive(name: str, value: int) -> None:
    if not is_integer(value) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    check_integer(name, value)


def check_integer(name: str, value: int, least: float = -math.inf) -> None:
    if not is_integer(value) or value < least:
        kind = "an integer" if least == -math.inf else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {kind}, got {value!r}.")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {value!r}.")


def check_numbers(name: str, values: Sequence[float], count: int) -> Any:
    """The values, as a tuple of `count`."""
    is_numbers = isinstance(values, Sequence) and all(map(is_number, values))
    if not is_numbers or len(values) != count:
        raise ValueError(f"{name} must be {count} numbers, got {values!r}.")
    return tuple(values)


def check_flag(name: str, value: bool | None) -> None:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be True, False or None, got {value!r}.")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_stats(return_stats: bool | int, entropy: bool, num_classes: int) -> None:
    if not isinstance(return_stats, numbers.Integral) or return_stats < 0:
        raise ValueError(f"return_stats must be True, False or a number k of classes, got {return_stats!r}.")
    if not isinstance(return_stats, bool) and return_stats > num_classes:
        raise ValueError(f"return_stats must be at most num_classes, {num_classes}, got {return_stats!r}.")
    check_bool("entropy", entropy)
    if entropy and not return_stats:
        raise ValueError(
            f"entropy is one of the stats, so that return_stats must be True or k, got {return_stats!r}."
        )


def check_cache(cache_bytes: int | None, exact_cache: bool | None) -> None:
    if cache_bytes is not None:
        check_integer("cache_bytes", cache_bytes, 0)
    check_flag("exact_cache", exact_cache)


def check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in WEIGHT_DTYPES):
        raise ValueError(f"dtype must be float64, float32, bfloat16, float16 or float8_e4m3fn, got {dtype!r}.")


def check_exponents(weight: Tensor, exponents: Tensor | None, *, needed: bool) -> None:
    """Of a weight in float8: needed where the length of its rows counts."""
    if exponents is None:
        if weight.dtype is FLOAT8 and needed:
            raise ValueError(
                "weight_exponent must be given with a weight in float8 whose length counts, got None: it is "
                "head.weight_exponent."
            )
        return
    check_tensor("weight_exponent", exponents)
    fits = exponents.shape == weight.shape[:1] and exponents.dtype == torch.int8
    if weight.dtype is not FLOAT8 or not fits or exponents.device != weight.device:
        raise ValueError(
            f"weight_exponent must be int8 of shape {(len(weight),)} on {weight.device}, beside a weight in "
            f"float8_e4m3fn, got {exponents.dtype} of shape {tuple(exponents.shape)} on {exponents.device} beside "
            f"one in {weight.dtype}."
        )
    if not exponents.is_contiguous():
        raise ValueError(
            f"weight_exponent must be contiguous to be moved in place, got strides {exponents.stride()}."
        )


def check_one_number(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        hint = "; FusedMarginLoss with a ClassMargin has one of each class" if name == "margin" else ""
        raise ValueError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)}{hint}.")


def check_margin(margin: float) -> None:
    check_one_number("margin", margin)
    if not is_number(margin) or not -math.inf < margin < math.inf:
        raise ValueError(f"margin must be a finite number, got {margin!r}.")
    check_magnitude("margin", margin)


def check_magnitude(name: str, value: float) -> None:
    if not abs(value) < LARGEST:
        raise ValueError(f"{name} must be less than 2^63 in magnitude, got {value!r}.")


def check_table(margins: Tensor, num_classes: int) -> None:
    if len(margins) != num_classes:
        raise ValueError(f"margin must be one number or {num_classes}, one of each class, got {len(margins)}.")


def check_interval(name: str, value: float, interval: str, low: float, high: float) -> None:
    """low <= value < high, which the message calls `interval`, and less than LARGEST."""
    check_one_number(name, value)
    if not is_number(value) or not low <= value < high:
        degrees = "radians" in interval and is_number(value) and high <= value <= 180
        hint = f"; if these are degrees, give {math.radians(value):.4g}" if degrees else ""
        raise ValueError(f"{name} must be in {interval}, got {value!r}{hint}.")
    check_magnitude(name, value)


def check_finite(name: str, value: float) -> None:
    check_interval(name, value, "(-inf, inf)", -sys.float_info.max, math.inf)


def check_sample_rate(rate: float) -> None:
    check_interval("sample_rate", rate, "(0, 1]", math.ulp(0.0), math.nextafter(1, 2))


def check_tolerance(tolerance: float) -> None:
    if not is_number(tolerance) or not 0 <= tolerance < 1:
        raise ValueError(f"gradient_tolerance must be in [0, 1), got {tolerance!r}.")


def check_scale(scale: float | Tensor, *, of_head: bool = False) -> None:
    """A number must be positive and finite; a tensor is looked at only where that needs no wait for a device.

    One value per sample, which a head does not have, may also be 0 (the norm of a zero embedding) or nan (of a
    broken one).
    """
    if of_head and isinstance(scale, Tensor) and scale.dim():
        raise ValueError(f"scale of a head must be a number or a 0-d tensor, got shape {tuple(scale.shape)}.")
    if not isinstance(scale, Tensor):
        if not is_number(scale) or not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale!r}.")
        check_magnitude("scale", scale)
    elif scale.dtype is torch.bool or scale.is_complex():
        raise ValueError(f"scale must be a real number, got a tensor of {scale.dtype}.")
    elif scale.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
        wrong = scale.isinf() | ((scale < 0) if scale.dim() else ~(scale > 0))
        if wrong.any():
            raise ValueError(f"scale must be positive and finite, got {scale[wrong][0].item()}.")


def number_of(scale: float | Tensor, why: str) -> float:
    """The value of a head's scale, for what starts from it."""
    if isinstance(scale, Tensor) and scale.is_meta:
        raise ValueError(f"scale must have a value, {why}, got a tensor on meta.")
    check_scale(scale, of_head=True)
    return float(scale.detach() if isinstance(scale, Tensor) else scale)


def check_reduction(reduction: str) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__} {reprlib.repr(value)}; torch.as_tensor "
            "makes one of it."
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, which to_dense makes it, got a tensor of layout {value.layout}.")
    if value.is_nested:
        raise TypeError(f"{name} must be dense, got a nested tensor of {value.size(0)}, which torch.stack joins.")


def exact_dtype() -> torch.dtype:
    """Of numbers that are given and of those that learn: torch's default, unless that would round them."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def vector_of(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """A tensor as it is, and numbers as one on the CPU."""
    try:
        vector = values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")
        if vector is not values and vector.is_floating_point():
            vector = torch.tensor(values, dtype=torch.promote_types(vector.dtype, torch.float32), device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of torch, by what it finds inside
        raise ValueError(f"{name} must be a vector of numbers, got {reprlib.repr(values)}.") from None
    if vector.is_complex():
        raise ValueError(f"{name} must be real numbers, got {reprlib.repr(values)}.")
    return vector


def check_rows(embeddings: Tensor, weight: Tensor) -> None:
    """Shapes (N, D) and (C, D) with C and D positive, floating dtypes, one device."""
    for name, tensor, shape in (("embeddings", embeddings, "(N, D)"), ("weight", weight, "(C, D)")):
        check_tensor(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have shape {shape}, got shape {tuple(tensor.shape)}.")
        if tensor.dtype not in WEIGHT_DTYPES or (tensor is embeddings and tensor.dtype is FLOAT8):
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}.")
    if embeddings.shape[1] != weight.shape[1]:
        raise ValueError(
            f"embeddings have size {embeddings.shape[1]} but the weight expects embedding_size {weight.shape[1]}."
        )
    for name, size in (("num_classes", weight.shape[0]), ("embedding_size", weight.shape[1])):
        if size <= 0:
            raise ValueError(f"{name} must be a positive integer, got {size}.")
    if embeddings.device != weight.device:
        raise ValueError(
            f"embeddings and weight must be on one device, got {embeddings.device} and {weight.device}."
        )


def check_sampler(sampled: int, classes: int) -> None:
    if sampled != classes:
        raise ValueError(
            f"The sampler draws from {sampled} classes, but the weight has {classes} here: make one for this."
        )


def check_labels(labels: Tensor, embeddings: Tensor) -> None:
    """Shape (N,) or (N, 2), an integer dtype, the embeddings' device; the op checks their range."""
    check_tensor("labels", labels)
    if labels.dim() != 1 and labels.shape[1:] != (2,):
        raise ValueError(
            "labels must have shape (N,), or (N, 2) with a sample_weight of that shape, got shape "
            f"{tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype in (torch.bool, torch.uint64):
        raise TypeError(f"labels must have an integer dtype that int64 holds, got {labels.dtype}.")
    if labels.shape[0] != embeddings.shape[0]:
        raise ValueError(f"every embedding needs a label, got {embeddings.shape[0]} and {labels.shape[0]}.")
    if labels.device != embeddings.device:
        raise ValueError(
            f"embeddings and labels must be on one device, got {embeddings.device} and {labels.device}."
        )


def check_per_sample(name: str, values: Tensor, labels: Tensor) -> None:
    check_tensor(name, values)
    if values.shape != labels.shape:
        raise ValueError(
            f"{name} must hold one value per sample, shape {tuple(labels.shape)}, got shape {tuple(values.shape)}."
        )
