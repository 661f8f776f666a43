"""What a backend asks of the tensors that the op hands it.

A kernel sees pointers alone: of a tensor that is too small it would read, or write, the memory of others.
"""

import torch
from torch import Tensor

from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import MOST_SUBCENTERS, SIGMOIDS, Options, Update
from cosface_kernels.reference import compute_dtype
from cosface_kernels.validation import FLOAT_DTYPES, WEIGHT_DTYPES


def check_rows(x: Tensor, w: Tensor) -> None:
    """Of x (N, D) and w (C, D); raises as `check` does."""
    for name, rows, dtypes in (("x", x, FLOAT_DTYPES), ("w", w, WEIGHT_DTYPES)):
        if rows.dim() != 2 or not rows.shape[1]:
            raise ValueError(f"{name} must have shape (rows, D), got {list(rows.shape)}.")
        if rows.dtype not in dtypes:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {rows.dtype}.")
        check_memory(name, rows)
    _check_one("w", w, (len(w), x.shape[1]), x.device)


def check_nearest(x: Tensor, w: Tensor, k: int, options: Options) -> None:
    """Of x (N, D), w (C, D) and how many classes of w are wanted; raises as `check` does."""
    check_rows(x, w)
    _check_exponents(options, w)
    if not 1 <= k <= len(w):
        raise ValueError(f"k must be in [1, {len(w)}], got {k}.")


def check(x: Tensor, w: Tensor, options: Options, targets: Tensor, scale: Tensor, *upstream: Tensor) -> None:
    """Of forward's tensors, and of backward's with top, log_sum, g_lse and g_cos.

    Raises:
        ValueError: a shape or a device does not fit; the message names the tensor and shows both.
        TypeError: so for a dtype.
    """
    check_rows(x, w)
    N = len(x)
    per_target = (2, N) if options.moments and targets.dim() == 2 else (N,)
    _check_one("targets", targets, per_target, x.device, torch.int64)
    _check_one("scale", scale, (N,), x.device)
    for name, values in zip(("top", "log_sum", "g_lse", "g_cos"), upstream, strict=False):
        _check_one(name, values, per_target if name == "g_cos" else (N,), x.device, compute_dtype(x, w))
    if options.g_moments is not None:
        _check_one("g_moments", options.g_moments, (2, N), x.device, compute_dtype(x, w))
    if options.thresholds is not None:
        _check_one("thresholds", options.thresholds, (N,), x.device)
    if options.negatives is not None:
        _check_one("negatives", options.negatives, (6,) if options.own_slopes else (3,), x.device)
    if (options.thresholds is None) != (options.negatives is None):
        raise ValueError("thresholds and negatives must be given together.")
    check_sigmoid(options)
    check_tolerance(options)
    if options.polynomials is not None:
        _check_one("polynomials", options.polynomials, (2, 5), x.device)
    _check_exponents(options, w)
    if options.classes is not None:
        _check_one("classes", options.classes, (options.classes.numel(),), x.device, torch.int64)
        if not len(options.classes):
            raise ValueError("classes must hold a class at least, got shape [0].")
        if x.device.type == "cpu":
            check_classes(options.classes, len(w))
    check_subcenters(options.subcenters, options.count(w))


def check_sums(x: Tensor, w: Tensor, options: Options, targets: Tensor, scale: Tensor, *rows: Tensor) -> None:
    """Of `sigmoid`'s tensors, with bias, g and g_cos; raises as `check` does."""
    if options.sigmoid is None:
        raise ValueError(f"sigmoid must be one of {', '.join(SIGMOIDS)}, got None.")
    check(x, w, options, targets, scale)
    for name, values in zip(("bias", "g", "g_cos"), rows, strict=True):
        _check_one(name, values, (len(x),), x.device, compute_dtype(x, w))


def check_sigmoid(options: Options) -> None:
    """That what a sigmoid asks for goes together; raises ValueError."""
    name, polynomials = options.sigmoid, options.polynomials
    if name not in (None, *SIGMOIDS):
        raise ValueError(f"sigmoid must be None or one of {', '.join(SIGMOIDS)}, got {name!r}.")
    if (name == "cross_entropy") != (polynomials is not None):
        raise ValueError(
            f"polynomials must be given with sigmoid 'cross_entropy' and with no other, got "
            f"{'none' if polynomials is None else 'some'} with {name!r}."
        )
    tensors = options.thresholds, options.g_moments
    if name and (options.moments or options.gradient_tolerance or any(each is not None for each in tensors)):
        raise ValueError(
            f"moments, thresholds and a gradient_tolerance belong to a softmax, got them with sigmoid {name!r}."
        )


def check_tolerance(options: Options) -> None:
    """That the backward of what is asked for can leave entries out; raises ValueError."""
    for asked, name in ((options.moments, "moments"), (options.subcenters > 1, "subcenters")):
        if asked and options.gradient_tolerance:
            raise ValueError(f"{name} cannot have a gradient_tolerance, got {options.gradient_tolerance}.")


def check_subcenters(subcenters: int, rows: int) -> None:
    """That so many rows are of whole classes; raises ValueError."""
    if not 1 <= subcenters <= MOST_SUBCENTERS:
        raise ValueError(f"subcenters must be in [1, {MOST_SUBCENTERS}], got {subcenters}.")
    if rows % subcenters:
        raise ValueError(
            f"the rows of w that take part must be a multiple of subcenters {subcenters}, got {rows}."
        )


def check_classes(classes: Tensor, num_classes: int) -> None:
    """That chosen classes ascend within [0, num_classes), which waits for their device; raises ValueError."""
    before = torch.cat([classes.new_full((1,), -1), classes[:-1]])  # (S,)
    wrong = (classes <= before) | (classes >= num_classes)  # (S,)
    if wrong.any():
        place = int(wrong.int().argmax())
        raise ValueError(
            f"classes must ascend within [0, {num_classes}), got {int(classes[place])} at place {place}."
        )


def check_state(
    w: Tensor, state: list[Tensor], update: Update, dw: Tensor | None = None, finite: Tensor | None = None
) -> None:
    """Of what an update moves, of the gradient by which, and of whether; raises as `check` does."""
    exponents = [each for each in state if each.dtype is torch.int8]
    moments = [each for each in state if each.dtype is not torch.int8]
    if len(moments) not in ((0, 1) if update.rule == "sgd" else (2, 3)):
        wanted = "at most one tensor" if update.rule == "sgd" else "two or three tensors"
        raise ValueError(f"{update.rule} must have {wanted} of state, got {len(moments)}.")
    if w.dim() != 2:
        raise ValueError(f"w must have shape (C, D), got {list(w.shape)}.")
    count = sum(rows.dtype is FLOAT8 for rows in (w, *moments))
    if len(exponents) != count:
        raise ValueError(f"state must have exponents of each of {count} tensors in float8, got {len(exponents)}.")
    for rows in exponents:
        _check_one("exponents", rows, (len(w),), w.device, torch.int8)
        _check_contiguous("exponents", rows)
    for name, rows in (("w", w), *(("state", values) for values in moments)):
        _check_one(name, rows, tuple(w.shape), w.device)
        _check_contiguous(name, rows)
        if rows.dtype not in (torch.float64, torch.float32, torch.bfloat16, FLOAT8):
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float8_e4m3fn to move, got {rows.dtype}."
            )
    if dw is not None:
        _check_one("dw", dw, tuple(w.shape), w.device)
    if finite is not None:
        _check_one("finite", finite, (), w.device, torch.bool)


def _check_contiguous(name: str, moved: Tensor) -> None:
    if not moved.is_contiguous():
        raise ValueError(f"{name} must be contiguous to be moved in place, got strides {list(moved.stride())}.")


def _check_exponents(options: Options, w: Tensor) -> None:
    if options.exponents is not None:
        _check_one("exponents", options.exponents, (len(w),), w.device, torch.int8)


def _check_one(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    if dtype and tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}.")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}.")
    if tensor.device != device:
        raise ValueError(f"{name} must be on device {device}, got it on {tensor.device}.")
    check_memory(name, tensor)


def check_memory(name: str, tensor: Tensor) -> None:
    """That its storage holds all of it, which may have been freed or shrunk under it."""
    if (numel := tensor.numel()) and not tensor.is_meta:
        span = numel
        if not tensor.is_contiguous():
            span = 1 + sum((size - 1) * by for size, by in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + span) * tensor.itemsize
        there = tensor.untyped_storage().nbytes()
        if needed > there:
            raise ValueError(
                f"{name} of shape {list(tensor.shape)} needs {needed} bytes of memory, but its storage has "
                f"{there}."
            )
