"""Backend `cpu`: the C++ kernels of csrc/cpu, for any CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosface_kernels.backends.extension import _C, import_error, kernel_update
from cosface_kernels.options import CACHE_BYTES, Options, Update, empty_cache
from cosface_kernels.reference import operand_dtype

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
    cache = _C.empty_bytes(cache_size(x, w, options))
    *results, moments = _C.lmcl_forward(x, w, targets, scale, margin, _kernel_options(options, x, w, cache))
    return *results, cache, moments


def backward(*tensors: Tensor, options: Options, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, w, *_, cache = tensors
    return _C.lmcl_backward(*tensors[:-1], _kernel_options(options, x, w, cache), need_dx, need_dw)


def sigmoid(
    *tensors: Tensor, options: Options, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, *_ = tensors
    return _C.sigmoid(*tensors, _kernel_options(options, x, w, empty_cache(x)), need_dx, need_dw)


def backward_update_(
    *tensors: Tensor, state: list[Tensor], finite: Tensor | None, update: Update, options: Options, need_dx: bool
) -> tuple[Tensor, Tensor]:
    if finite is not None and not finite:
        return backward(*tensors, options=options, need_dx=need_dx, need_dw=False)[::2]
    x, w, *_, cache = tensors
    kernel_options, numbers = _kernel_options(options, x, w, cache), kernel_update(update)
    return _C.lmcl_backward_update(*tensors[:-1], kernel_options, numbers, state, need_dx)


def apply_update_(w: Tensor, dw: Tensor, state: list[Tensor], update: Update) -> None:
    _C.apply_update(w, dw, kernel_update(update), state)


class _Loss(torch.autograd.Function):
    """`loss` as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, labels: Tensor, rule: Any, options: Options) -> Tensor:
        cache = _C.empty_bytes(cache_size(x, w, options))
        loss, *rows = _C.loss_forward(x, w, labels, rule, _kernel_options(options, x, w, cache))
        ctx.rule, ctx.options = rule, options
        ctx.save_for_backward(x, w, cache, *rows)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, cache, *rows = ctx.saved_tensors
        need_dx, need_dw, *_ = ctx.needs_input_grad
        options = _kernel_options(ctx.options, x, w, cache)
        dx, dw = _C.loss_backward(x, w, *rows, g, ctx.rule, options, need_dx, need_dw)
        return dx if need_dx else None, dw if need_dw else None, None, None, None


def loss(x: Tensor, w: Tensor, labels: Tensor, options: Options, **rule: Any) -> Tensor:
    """The reduced loss in one call of the compiled module, and its gradients in another.

    Where samples and classes are few, the small tensor operations of `functional` take longer than the kernels.

    Args:
        options: its numbers alone.
        rule: margin, scale, reduction, ignore_index and validate_labels of `functional.cosface_loss`.
    """
    return _Loss.apply(x, w, labels, _C.Rule(**rule), options)  # type: ignore[no-untyped-call]


def nearest(x: Tensor, w: Tensor, k: int, options: Options) -> tuple[Tensor, Tensor]:
    return _C.nearest(x, w, k, options.normalize_weight, options.exponents)


def zeros_like(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros on huge pages, which the system provides when they are first touched."""
    zeros = torch.zeros(w.shape, dtype=dtype, device=w.device)
    _C.use_huge_pages(zeros)
    return zeros


def _kernel_options(options: Options, x: Tensor, w: Tensor, cache: Tensor) -> Any:
    return _C.Options(
        classes=options.classes,
        gradient_tolerance=options.gradient_tolerance,
        cache=cache,
        entry_bytes=options.entry_bytes(x, w),
        exact_cosines=options.keeps_exactly,
        normalize_weight=options.normalize_weight,
        thresholds=options.thresholds,
        negatives=options.negatives,
        moments=options.moments,
        g_moments=options.g_moments,
        subcenters=options.subcenters,
        sigmoid=options.sigmoid,
        polynomials=options.polynomials,
        exponents=options.exponents,
    )


def normal_(tensor: Tensor, seed: int, std: float, start: int = 0) -> None:
    """Fills a contiguous tensor with N(0, std^2), the elements of the seed's stream from `start` on."""
    _C.normal_(tensor, seed, std, start)
