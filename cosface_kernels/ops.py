"""The operators torch.ops.cosface.*: one schema, one fake and one autograd formula each.

Everything that knows torch.library is here. Because the ops are registered, torch.compile, autocast, DDP, hooks
and no_grad treat them like any other operator. In eager mode their functions are called directly: the way through
the dispatcher takes longer than the kernels where samples and classes are few.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cosface_kernels.backends import Backend, UpdatingBackend, select
from cosface_kernels.backends.contract import check_memory
from cosface_kernels.derivatives import once_differentiable, without_tangents
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import ARGUMENTS, CACHE_ALIGNMENT, Options, Update, empty_cache
from cosface_kernels.reference import compute_dtype, excess

IGNORED, INVALID = -1, -2  # targets that are no class


def dispatches(*tensors: Tensor) -> bool:
    """Whether torch must see an op: it traces, a mode or a subclass listens, or memory holds other numbers."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace's
        or torch._C._len_torch_dispatch_stack() > 0
        or any(
            type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.is_neg()
            for tensor in tensors
        )
    )


class Op:
    """An op that changes nothing, with `eager`, the function that stands for it where torch need not see it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        function = without_tangents(function)
        self.registered = torch.library.custom_op(f"cosface::{function.__name__}", function, mutates_args=())
        self.function = self.eager = function

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """A compiled graph has no tangents left, when the op runs in it."""
        self.registered.register_fake(without_tangents(fake))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        tensors = (each for each in (*arguments, *options.values()) if isinstance(each, Tensor))
        return (self.registered if dispatches(*tensors) else self.eager)(*arguments, **options)


@Op
def targets(labels: Tensor, num_classes: int, ignore_index: int, validate: bool = True) -> Tensor:
    """int64 labels, of any shape, with ignore_index replaced by IGNORED.

    A label that is out of range raises if `validate`, which waits for the labels' device, else becomes INVALID.
    """
    labels = labels.long()
    ignored = labels == ignore_index  # (N,)
    wrong = ((labels < 0) | (labels >= num_classes)) & ~ignored  # (N,)
    if validate and wrong.any():
        raise ValueError(
            f"labels must be in [0, {num_classes}) or equal to ignore_index {ignore_index}, "
            f"got {int(labels[wrong][0])} at row {int(wrong.nonzero()[0, 0])}."
        )
    return labels.masked_fill(ignored, IGNORED).masked_fill(wrong, INVALID)


@targets.register_fake
def _(labels, num_classes, ignore_index, validate=True):  # type: ignore[no-untyped-def]
    return labels.new_empty(labels.shape, dtype=torch.int64)


def takes_options(*, updates: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a function whose last parameter is `options`: in its place an op takes what a schema can say of them.

    That is `options.ARGUMENTS`, with their types and defaults.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        *own, last = signature.parameters.values()
        count = len(own)

        @functools.wraps(function)
        def flat(*arguments: Any, **named: Any) -> Any:
            named["updates"] = updates
            return function(*arguments[:count], Options(*arguments[count:], **named))

        options = (
            last.replace(name=field.name, default=field.default, annotation=field.type) for field in ARGUMENTS
        )
        flat.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return flat

    return decorate


@Op
@takes_options()
def lmcl(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    margin: float,
    backend: str | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, top, log_sum, target_cos and max_neg, as `cosface_kernels.reference.forward` defines them.

    The sixth result, uint8, is lmcl_backward's cache, and the last one `reference.moments`, (4, N), or (0, N).
    """
    if options.sigmoid:
        raise ValueError(f"lmcl is a softmax: sigmoid must be None, got {options.sigmoid!r}.")
    if not w.shape[0]:  # a rank that owns no class
        fills = (0, 0, -torch.inf, 0, -torch.inf)
        loss, top, log_sum, target_cos, max_neg = (
            x.new_full(x.shape[:1], fill, dtype=compute_dtype(x, w)) for fill in fills
        )
        target_cos = target_cos.new_zeros(targets.shape)
        moments = top.new_zeros(4 if options.moments else 0, x.shape[0])
        return loss, top, log_sum, target_cos, max_neg, empty_cache(x), moments
    loss, top, log_sum, target_cos, max_neg, cache, moments = select(backend, x, w, options).forward(
        x, w, targets, scale, margin, options
    )
    return loss, top, log_sum, target_cos, max_neg, cache, moments


@lmcl.register_fake
@takes_options()
def _(x, w, targets, scale, margin, backend, options):  # type: ignore[no-untyped-def]
    dtype, n = compute_dtype(x, w), x.shape[0]
    rows = (x.new_empty(shape, dtype=dtype) for shape in (n, n, n, targets.shape, n))
    size = select(backend, x, w, options).cache_size(x, w, options) if w.shape[0] else 0
    moments = x.new_empty(4 if options.moments else 0, n, dtype=dtype)
    return *rows, x.new_empty(size, dtype=torch.uint8), moments


@Op
def nearest(
    x: Tensor, w: Tensor, k: int, normalize_weight: bool, backend: str | None, exponents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cosines and classes, (N, k) each, as `cosface_kernels.reference.nearest` defines them."""
    if not w.shape[0]:  # a rank that owns no class
        return x.new_empty(x.shape[0], 0, dtype=compute_dtype(x, w)), x.new_empty(x.shape[0], 0, dtype=torch.int64)
    options = Options(normalize_weight=normalize_weight, exponents=exponents)
    return select(backend, x, w, options).nearest(x, w, k, options)


@nearest.register_fake
def _(x, w, k, normalize_weight, backend, exponents=None):  # type: ignore[no-untyped-def]
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=compute_dtype(x, w)), x.new_empty(shape, dtype=torch.int64)


def _without_classes(x: Tensor, w: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor]:
    """dx and dw of a rank that owns no class."""
    return torch.zeros_like(x) if need_dx else x.new_empty(0), torch.zeros_like(w) if need_dw else w.new_empty(0)


def _empty_gradients(
    x: Tensor, w: Tensor, need_dx: bool, need_dw: bool, options: Options
) -> tuple[Tensor, Tensor]:
    """dx and dw in their shapes."""
    rows = w.shape[0] if options.classes is None else options.classes.shape[0]
    return x.new_empty(x.shape if need_dx else (0,)), w.new_empty((rows, w.shape[1]) if need_dw else (0,))


def _check_gradient(w: Tensor, need_dw: bool) -> None:
    if need_dw and w.dtype is FLOAT8:
        raise TypeError(f"w in {w.dtype} has no gradient dw of its own: its rows move inside backward alone.")


@Op
@takes_options()
def lmcl_backward(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    top: Tensor,
    log_sum: Tensor,
    g_lse: Tensor,
    g_cos: Tensor,
    cache: Tensor,
    need_dx: bool,
    need_dw: bool,
    backend: str | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, D), dw (C, D) and dscale (N,), as `cosface_kernels.reference.backward` defines them.

    A gradient that is not needed comes back empty. With classes (S,), dw is (S, D).
    """
    _check_gradient(w, need_dw)
    if not w.shape[0]:
        return *_without_classes(x, w, need_dx, need_dw), torch.zeros_like(log_sum)
    return _that_cached(backend, x, w, cache, options).backward(
        x, w, targets, scale, top, log_sum, g_lse, g_cos, cache, options=options, need_dx=need_dx, need_dw=need_dw
    )


@lmcl_backward.register_fake
@takes_options()
def _(x, w, targets, scale, top, log_sum, g_lse, g_cos, cache, need_dx, need_dw, backend, options):  # type: ignore[no-untyped-def]
    return *_empty_gradients(x, w, need_dx, need_dw, options), log_sum.new_empty(log_sum.shape)


@Op
@takes_options()
def sigmoid(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    bias: Tensor,
    g: Tensor,
    g_cos: Tensor,
    need_dx: bool,
    need_dw: bool,
    backend: str | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.sigmoid_sums`, (2, N), and in the same pass dx (N, D), dw (C, D) and dscale (N,).

    g, (N,), is the gradient of the first sum and g_cos, (N,), that of the target's cosine; a row of which both are
    0 has none, and sums of 0. The other gradients are as lmcl_backward returns them, that of bias is g times the
    second sum.
    """
    _check_gradient(w, need_dw)
    if not w.shape[0]:
        return g.new_zeros(2, x.shape[0]), *_without_classes(x, w, need_dx, need_dw), torch.zeros_like(g)
    return select(backend, x, w, options).sigmoid(
        x, w, targets, scale, bias, g, g_cos, options=options, need_dx=need_dx, need_dw=need_dw
    )


@sigmoid.register_fake
@takes_options()
def _(x, w, targets, scale, bias, g, g_cos, need_dx, need_dw, backend, options):  # type: ignore[no-untyped-def]
    gradients = _empty_gradients(x, w, need_dx, need_dw, options)
    return g.new_empty(2, x.shape[0]), *gradients, g.new_empty(g.shape)


def sigmoid_sums(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, bias: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """Those of `sigmoid`, (N,) each, of every sample; options: the backend and what follows it."""
    one = torch.ones_like(bias)
    sums, *_ = sigmoid(x, w, targets, scale, bias, one, one, False, False, *options)
    added, mass = sums
    return added.clone(), mass


def bias_gradient(g: Tensor, mass: Tensor) -> Tensor:
    """(N,), of the first of these sums by the second; 0 for a sample that has none, whatever it holds."""
    return torch.where(g != 0, g * mass, 0)


@torch.library.custom_op("cosface::lmcl_backward_update_", mutates_args=("w", "state"))
@takes_options(updates=True)
def lmcl_backward_update_(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    top: Tensor,
    log_sum: Tensor,
    g_lse: Tensor,
    g_cos: Tensor,
    cache: Tensor,
    state: list[Tensor],
    finite: Tensor | None,
    rule: str,
    step: int,
    seed: int,
    numbers: list[float],
    need_dx: bool,
    backend: str | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """dx and dscale as lmcl_backward has them; w and the optimizer's state move, as `reference.move_rows` defines.

    rule, step, seed and numbers are the fields of `Update`, in order. Where `finite`, 0-d, is false nothing moves.
    """
    if not w.shape[0]:
        return x.new_zeros(x.shape if need_dx else 0), torch.zeros_like(log_sum)
    update = Update.unflat(rule, step, seed, numbers)
    return cast(UpdatingBackend, _that_cached(backend, x, w, cache, options)).backward_update_(
        x,
        w,
        targets,
        scale,
        top,
        log_sum,
        g_lse,
        g_cos,
        cache,
        state=state,
        finite=finite,
        update=update,
        options=options,
        need_dx=need_dx,
    )


@lmcl_backward_update_.register_fake
def _(x, w, targets, scale, top, log_sum, g_lse, g_cos, cache, state, finite, rule, step, seed, numbers, need_dx, *_):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    return x.new_empty(x.shape if need_dx else (0,)), log_sum.new_empty(log_sum.shape)


@torch.library.custom_op("cosface::apply_update_", mutates_args=("w", "state"))
def apply_update_(
    w: Tensor,
    dw: Tensor,
    state: list[Tensor],
    rule: str,
    step: int,
    seed: int,
    numbers: list[float],
    backend: str | None,
) -> None:
    """One step with a gradient (C, D) that exists, as `reference.move_rows` defines it."""
    if not w.shape[0]:
        return
    update = Update.unflat(rule, step, seed, numbers)
    cast(UpdatingBackend, select(backend, w, w, Options(updates=True))).apply_update_(w, dw, state, update)


def _that_cached(name: str | None, x: Tensor, w: Tensor, cache: Tensor, options: Options) -> Backend:
    """The backend, whose forward must have left this cache."""
    backend = select(name, x, w, options)
    size = backend.cache_size(x, w, options)
    if cache.shape != (size,) or cache.dtype != torch.uint8:
        raise ValueError(
            f"cache must be what lmcl returned for these tensors and options, uint8 of shape {[size]}, got "
            f"{cache.dtype} of shape {list(cache.shape)}."
        )
    if cache.device != x.device or not cache.is_contiguous() or cache.data_ptr() % CACHE_ALIGNMENT:
        raise ValueError(
            f"cache must be on device {x.device}, contiguous and aligned to {CACHE_ALIGNMENT} bytes, as lmcl "
            f"returned it; got strides {list(cache.stride())} at byte {cache.storage_offset()} of {cache.device}."
        )
    check_memory("cache", cache)
    return backend


def kept_entries(cache: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """dropped and kept, (N,) each, as lmcl with a gradient_tolerance leaves them at the front of its cache."""
    if not cache.numel():  # of a rank that owns no class
        return cache.new_zeros(samples, dtype=torch.float64), cache.new_ones(samples, dtype=torch.float64)
    dropped, kept = cache[: 16 * samples].view(torch.float64).view(2, samples).clone()
    return dropped, kept


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w, targets, scale, ctx.margin, ctx.backend, *options = inputs
    # those that are tensors may be outputs of other nodes, which only saving them keeps from a cycle
    ctx.options = [None if isinstance(option, Tensor) else option for option in options]
    _, top, log_sum, target_cos, max_neg, cache, moments = output
    ctx.set_materialize_grads(False)  # that of a cache would be as large
    ctx.mark_non_differentiable(top, max_neg, cache, *([] if len(moments) else [moments]))
    tensors = [option if isinstance(option, Tensor) else None for option in options]
    ctx.save_for_backward(x, w, targets, scale, top, log_sum, target_cos, cache, moments, *tensors)


class Folded(NamedTuple):
    """The gradients that lmcl_backward takes, from those of lmcl's results, and what these add to dscale."""

    g_lse: Tensor  # (N,)
    g_cos: Tensor  # as targets
    g_moments: Tensor | None  # (2, N)
    dscale: Tensor  # (N,)


def fold(
    targets: Tensor,
    scale: Tensor,
    top: Tensor,
    log_sum: Tensor,
    target_cos: Tensor,
    margin: float,
    moments: Tensor,
    *upstream: Tensor | None,
) -> Folded:
    """upstream: the gradients of loss, log_sum, target_cos and moments, None where there is none.

    loss = softplus(z) with z = lse - s psi, where there is a (first) target; no gradient stays none where z is
    nan. log_sum = lse - s top.
    """
    of_loss, of_log_sum, of_cos, of_moments = upstream
    g_loss, g_lse = (torch.zeros_like(log_sum) if g is None else g for g in (of_loss, of_log_sum))  # (N,) each
    g_cos = torch.zeros_like(target_cos) if of_cos is None else of_cos
    two = targets.dim() == 2
    first, first_cos = (targets[0], target_cos[0]) if two else (targets, target_cos)  # (N,) each
    psi = first_cos - margin  # (N,)
    flows = (first >= 0) & (g_loss != 0)  # (N,)
    g_z = torch.where(flows, g_loss * torch.sigmoid(excess(scale, top, log_sum, psi)), 0)  # (N,)
    less = scale * g_z  # (N,)
    g_cos = g_cos - (torch.stack([less, torch.zeros_like(less)]) if two else less)
    dscale = -g_lse * top - g_z * psi  # (N,)
    g_lse = g_lse + g_z
    if of_moments is None:
        return Folded(g_lse, g_cos, None, dscale)
    g_mean = -of_moments[0]  # (N,)
    of_mean = torch.where(g_mean != 0, g_mean * moments[0], 0)  # (N,)
    return Folded(g_lse + of_mean, g_cos, torch.stack([g_mean, of_moments[1]]), dscale)


def of_all_classes(dw: Tensor, classes: Tensor | None, shape: torch.Size) -> Tensor:
    """dw in the shape of the weight: sparse where it is of chosen classes."""
    if classes is None or not dw.numel():
        return dw
    return torch.sparse_coo_tensor(
        classes[None], dw, shape, device=dw.device, is_coalesced=True, check_invariants=False
    )


@once_differentiable
def _backward(ctx, g_loss, _, g_log_sum, g_cos, __, ___, g_moments):  # type: ignore[no-untyped-def]
    x, w, targets, scale, top, log_sum, target_cos, cache, moments, *tensors = ctx.saved_tensors
    options = [number if tensor is None else tensor for number, tensor in zip(ctx.options, tensors, strict=True)]
    need_dx, need_dw, _, need_dscale, *_ = ctx.needs_input_grad
    g = fold(targets, scale, top, log_sum, target_cos, ctx.margin, moments, g_loss, g_log_sum, g_cos, g_moments)
    dx, dw, dscale = lmcl_backward(
        x, w, targets, scale, top, log_sum, g.g_lse, g.g_cos, cache, need_dx, need_dw, ctx.backend,
        *options[:-1], g.g_moments,
    )  # fmt: skip
    dw = of_all_classes(dw, options[0], w.shape)
    none = (None,) * (len(ctx.needs_input_grad) - 4)
    of_scale = dscale + g.dscale if need_dscale else None
    return (dx if need_dx else None, dw if need_dw else None, None, of_scale, *none), (x, w, scale)


class _Lmcl(torch.autograd.Function):
    """The op in eager mode."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        outputs = lmcl.function(*arguments)
        _setup_context(ctx, arguments, outputs)
        return outputs

    backward = staticmethod(_backward)


def _eager_lmcl(*arguments: Any, **options: Any) -> Any:
    return _Lmcl.apply(*arguments[:6], *Options(*arguments[6:], **options).flat())  # type: ignore[no-untyped-call]


lmcl.registered.register_autograd(_backward, setup_context=_setup_context)
lmcl.eager = _eager_lmcl
