"""Backend `cpu`: the C++ kernels of csrc/cpu, for any CPU."""

import math
from typing import Any

import torch
from torch import Tensor

from cosface_kernels.backends import contract
from cosface_kernels.backends.extension import _C, import_error, kernel_update
from cosface_kernels.derivatives import once_differentiable
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import CACHE_BYTES, Options, Update, empty_cache
from cosface_kernels.reference import compute_dtype, operand_dtype

OPTIONS = {"classes", "updates", "normalize_weight", "thresholds", "negatives", "moments", "g_moments"}
OPTIONS |= {"cache_bytes", "exact_cache", "gradient_tolerance", "subcenters", "sigmoid", "polynomials"}
OPTIONS |= {"exponents"}


def unavailable() -> str | None:
    if _C is None:
        return import_error
    _C.instruction_set()  # raises where COSFACE_CPU_ISA names none of this processor: no other backend is meant
    return None


def unsupported(x: Tensor, w: Tensor, options: Options) -> str | None:
    if x.device.type != "cpu":
        return f"it takes tensors on the CPU, got them on {x.device}."
    return options.refusal(OPTIONS)


def multiplies_bfloat16(x: torch.dtype, w: torch.dtype, options: Options) -> bool:
    """Whether matrix products are of bfloat16 numbers, as `reference.operand_dtype` has it, with float32 sums."""
    return operand_dtype(x, w) is torch.bfloat16 and _C.multiplies_bfloat16(options.gradient_tolerance)


def describe() -> str:
    return f"instruction set {_C.instruction_set()}, {_C.threads()} threads"


def cache_size(x: Tensor, w: Tensor, options: Options) -> int:
    # Products of bfloat16 make cosines faster than memory brings them back.
    by_default = 0 if multiplies_bfloat16(x.dtype, w.dtype, options) else CACHE_BYTES
    return options.entry_bytes(x, w) + options.cosine_bytes(x, w, by_default)


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options
) -> tuple[Tensor, ...]:
    contract.check(x, w, options, targets, scale)
    cache = _empty(x, cache_size(x, w, options), dtype=torch.uint8)
    call = _call(x, w, targets, scale, options, cache)
    N, like = len(x), x.new_empty(0, dtype=compute_dtype(x, w))
    results = [like.new_empty(shape) for shape in (N, N, N, targets.shape, N)]
    moments = like.new_empty(4 if options.moments else 0, N)
    call.forward(margin, results, moments if options.moments else None)
    return *results, cache, moments


def backward(*tensors: Tensor, options: Options, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, w, targets, scale, *upstream, _ = tensors
    contract.check(x, w, options, targets, scale, *upstream)
    return _backward(*tensors, options=options, need_dx=need_dx, need_dw=need_dw)


def sigmoid(
    *tensors: Tensor, options: Options, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, targets, scale, bias, g, g_cos = tensors
    contract.check_sums(x, w, options, *tensors[2:])
    sums = bias.new_empty(2, len(x))
    rows = targets, scale, bias, -bias, g, g_cos, empty_cache(x)  # as backward takes them; there is no top to read
    gradients = _backward(x, w, *rows, options=options, need_dx=need_dx, need_dw=need_dw, sums=sums)
    return sums, *gradients


def backward_update_(
    *tensors: Tensor, state: list[Tensor], finite: Tensor | None, update: Update, options: Options, need_dx: bool
) -> tuple[Tensor, Tensor]:
    if finite is not None and not finite:
        return backward(*tensors, options=options, need_dx=need_dx, need_dw=False)[::2]
    x, w, targets, scale, *upstream, cache = tensors
    contract.check(x, w, options, targets, scale, *upstream)
    contract.check_state(w, state, update)
    call = _call(x, w, targets, scale, options, cache)
    dx, dscale = _empty_dx(x, w, need_dx), torch.empty_like(upstream[0])
    call.backward_update(*_upstream(upstream, options), dx, dscale, kernel_update(update), state)
    return x.new_empty(0) if dx is None else dx.to(x.dtype), dscale


def apply_update_(w: Tensor, dw: Tensor, state: list[Tensor], update: Update) -> None:
    contract.check_state(w, state, update, dw)
    gradient = dw.to(torch.float32 if w.dtype is FLOAT8 else w.dtype).contiguous()
    _C.apply_update(w, gradient, kernel_update(update), state)


class _Loss(torch.autograd.Function):
    """`loss` as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, labels: Tensor, rule: Any, options: Options) -> Tensor:
        contract.check_rows(x, w)
        targets, dtype = labels.to(torch.int64, copy=True), compute_dtype(x, w)
        losses, rows = x.new_empty(len(x), dtype=dtype), x.new_empty(4, len(x), dtype=dtype)
        cache = _empty(x, cache_size(x, w, options), dtype=torch.uint8)
        divisor = _call(x, w, targets, None, options, cache).loss_forward(rule, losses, rows)
        ctx.rule, ctx.options = rule, options
        ctx.save_for_backward(x, w, targets, rows, cache)
        return losses if rule.reduction == "none" else losses.sum().div_(divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        x, w, targets, rows, cache = ctx.saved_tensors
        need_dx, need_dw, *_ = ctx.needs_input_grad
        dx, dw = _empty_dx(x, w, need_dx), _empty(w, *w.shape) if need_dw else None
        call = _call(x, w, targets, None, ctx.options, cache)
        call.loss_backward(ctx.rule, rows, g.resolve_neg().contiguous(), dx, dw)
        return (dx if dx is None else dx.to(x.dtype), dw, None, None, None), (x, w)


def loss(x: Tensor, w: Tensor, labels: Tensor, options: Options, **rule: Any) -> Tensor:
    """The reduced loss in one call of the compiled module, and its gradients in another.

    Where samples and classes are few, the small tensor operations of `functional` take longer than the kernels.

    Args:
        options: its numbers alone.
        rule: margin, scale, reduction, ignore_index and validate_labels of `functional.cosface_loss`.
    """
    return _Loss.apply(x, w, labels, _C.Rule(**rule), options)  # type: ignore[no-untyped-call]


def nearest(x: Tensor, w: Tensor, k: int, options: Options) -> tuple[Tensor, Tensor]:
    contract.check_nearest(x, w, k, options)
    none = x.new_empty(0, dtype=torch.int64)
    cos = x.new_empty(len(x), k, dtype=compute_dtype(x, w))
    classes = none.new_empty(len(x), k)
    _call(x, w, none, None, options, None).nearest(k, cos, classes)
    return cos, classes


def zeros_like(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros on huge pages, which the system provides when they are first touched."""
    zeros = torch.zeros(w.shape, dtype=dtype, device=w.device)
    _C.use_huge_pages(zeros)
    return zeros


def normal_(tensor: Tensor, seed: int, std: float, start: int = 0) -> None:
    """Fills a contiguous tensor with N(0, std^2), the elements of the seed's stream from `start` on."""
    if not tensor.is_contiguous():
        raise ValueError(f"normal_ needs a contiguous tensor, got strides {tensor.stride()}.")
    _C.normal_(tensor, seed, std, start)


def _call(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor | None, options: Options, cache: Tensor | None
) -> Any:
    """What the kernels read, as they read it: in the dtype of all arithmetic, but for the weight."""
    dtype, classes, tau, exponents = compute_dtype(x, w), options.classes, options.thresholds, options.exponents
    return _C.Call(
        x.to(dtype).contiguous(),
        w if w.stride(1) == 1 or w.shape[1] == 1 else w.contiguous(),
        targets.contiguous(),
        None if scale is None else scale.to(dtype).contiguous(),
        bfloat16=x.dtype is torch.bfloat16,
        classes=None if classes is None else classes.contiguous(),
        cache=cache,
        thresholds=None if tau is None else tau.to(dtype).contiguous(),
        exponents=None if exponents is None else exponents.contiguous(),
        entry_bytes=options.entry_bytes(x, w),
        exact_cosines=options.keeps_exactly,
        normalize_weight=options.normalize_weight,
        gradient_tolerance=options.gradient_tolerance,
        subcenters=options.subcenters,
        negatives=None if options.negatives is None else options.coefficients(dtype).tolist(),
        sigmoid=options.sigmoid,
        polynomials=None if options.polynomials is None else options.polynomials.tolist(),
    )


def _upstream(upstream: list[Tensor], options: Options) -> tuple[list[Tensor], Tensor | None]:
    """top, log_sum, g_lse and g_cos, and the gradients of the moments, if any."""
    g_moments = options.g_moments
    return [rows.contiguous() for rows in upstream], None if g_moments is None else g_moments.contiguous()


def _backward(
    *tensors: Tensor, options: Options, need_dx: bool, need_dw: bool, sums: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    x, w, targets, scale, *upstream, cache = tensors
    if need_dw and w.dtype is FLOAT8:
        raise TypeError("A weight in float8 has no gradient of its own.")
    dx = _empty_dx(x, w, need_dx)
    dw = _empty(w, options.count(w), w.shape[1]) if need_dw else None
    dscale = torch.empty_like(upstream[0])
    call = _call(x, w, targets, scale, options, cache)
    call.backward(*_upstream(upstream, options), dx, dw, dscale, sums)
    return x.new_empty(0) if dx is None else dx.to(x.dtype), w.new_empty(0) if dw is None else dw, dscale


def _empty_dx(x: Tensor, w: Tensor, needed: bool) -> Tensor | None:
    return x.new_empty(x.shape, dtype=compute_dtype(x, w)) if needed else None


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory: for gigabytes, the pages of a tensor of the same size that was freed."""
    dtype = dtype or like.dtype
    if math.prod(shape) * dtype.itemsize >= _C.MANY_BYTES:
        pages = _C.take_pages(shape, like.new_empty(0, dtype=dtype))
        if pages is not None:
            return pages
    fresh = like.new_empty(shape, dtype=dtype)
    _C.use_huge_pages(fresh)
    return fresh
