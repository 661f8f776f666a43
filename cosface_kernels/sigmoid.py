"""The losses in which each class counts on its own, from a batch to its loss.

    loss_i = positive_i(c_iy) + factor_i sum_{j != y_i} f(c_ij)

No gradient of f waits for a sum over all classes. So where the batch's loss is one number, and each sample's share
in it known, forward makes the gradients as well, in one pass over the weight (6 N C D), and backward multiplies
them by its own upstream gradient. Else there are two, as for a softmax (8 N C D): with reduction="none", with rows
that move in backward, under torch.compile, and for float16, whose range a gradient may need a loss scale to stay
within.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from cosface_kernels import ops, optim
from cosface_kernels.derivatives import once_differentiable
from cosface_kernels.distributed import Exchange, Local
from cosface_kernels.margins import Rows, SigmoidMargin
from cosface_kernels.margins.sigmoid import Polynomials
from cosface_kernels.options import ARGUMENTS
from cosface_kernels.stages import Batch, OwnClasses, Settings, reduce, target_cosines
from cosface_kernels.validation import check_numbers

OP_DEFAULTS = [(field.name, field.default) for field in ARGUMENTS]


class _OnePass(torch.autograd.Function):
    """sum_i factor_i sum_{j != y_i} f(c_ij), whose gradients of x and w have those of the targets' cosines too."""

    @staticmethod
    def forward(ctx: Any, x, w, targets, scale, bias, factor, g_cos, backend, classes, *options):  # type: ignore[no-untyped-def]
        need_dx, need_dw, *_ = ctx.needs_input_grad
        sums, dx, dw, dscale = ops.sigmoid(
            x, w, targets, scale, bias, factor, g_cos, need_dx, need_dw, backend, classes, *options
        )
        added, mass = sums
        ctx.save_for_backward(dx, dw, dscale, factor * mass, added, classes)
        ctx.inputs = x, w, scale, bias, factor  # not saved: they may change, since the gradients are made
        return (factor * added).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        dx, dw, *rows, classes = ctx.saved_tensors
        need_dx, need_dw, _, *of_rows = ctx.needs_input_grad[:6]
        # of a row without any, also where g is not finite
        dx = torch.where(dx != 0, dx * g.to(dx.dtype), 0) if need_dx else None
        rows = [
            torch.where(row != 0, row * g, 0) if needed else None
            for row, needed in zip(rows, of_rows, strict=True)
        ]
        if need_dw:
            if torch._C._autograd._get_current_graph_task_keep_graph():  # another backward will want it
                dw = dw * g.to(dw.dtype)
            elif ops.dispatches(dw, g) or dw.device.type != "cpu" or g != 1:  # elsewhere the question would wait
                dw.mul_(g)
            dw = ops.of_all_classes(dw, classes, ctx.inputs[1].shape)
        none = (None,) * (len(ctx.needs_input_grad) - 6)
        return (dx, dw if need_dw else None, None, *rows, *none), ctx.inputs


class _TwoPasses(torch.autograd.Function):
    """sum_{j != y_i} f(c_ij), and the targets' cosines, which are given; (N,) each."""

    @staticmethod
    def forward(ctx: Any, x, w, targets, scale, bias, target_cos, backend, classes, *options):  # type: ignore[no-untyped-def]
        added, mass = ops.sigmoid_sums(x, w, targets, scale, bias, backend, classes, *options)
        ctx.backend = backend
        ctx.options = [None if isinstance(option, Tensor) else option for option in options]
        tensors = [option if isinstance(option, Tensor) else None for option in options]
        ctx.save_for_backward(x, w, targets, scale, bias, mass, classes, *tensors)
        return added, target_cos.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_cos: Tensor) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        x, w, targets, scale, bias, mass, classes, *tensors = ctx.saved_tensors
        options = [each if tensor is None else tensor for each, tensor in zip(ctx.options, tensors, strict=True)]
        need_dx, need_dw, _, need_dscale, need_dbias, *_ = ctx.needs_input_grad
        _, dx, dw, dscale = ops.sigmoid(
            x, w, targets, scale, bias, g, g_cos, need_dx, need_dw, ctx.backend, classes, *options
        )
        dw = ops.of_all_classes(dw, classes, w.shape) if need_dw else None
        rows = dscale if need_dscale else None, ops.bias_gradient(g, mass) if need_dbias else None
        none = (None,) * (len(ctx.needs_input_grad) - 5)
        return (dx if need_dx else None, dw, None, *rows, *none), (x, w, scale, bias)


def loss(
    settings: Settings,
    options: dict[str, Any],
    ranks: Local | Exchange,
    weight: Tensor,
    batch: Batch,
    own: OwnClasses,
    validate: bool,
) -> Tensor:
    """The reduced loss, 0-d, or those of this rank's samples."""
    margin, targets = settings.margin, batch.targets
    assert isinstance(margin, SigmoidMargin)
    valid, has_loss = targets != ops.IGNORED, targets >= 0  # (N,) each
    rows = Rows(batch.embeddings, targets, ranks.whole, ranks.share)
    terms = margin.checked_terms(torch.where(has_loss, batch.scale, 1), rows)
    scale, bias = ranks.of_own_classes(torch.stack([terms.scale, terms.bias]))  # (N,) each
    inputs = own.x, own.w, own.targets, scale, bias
    polynomials = None if margin.form == "angle" else _on_device(margin.polynomials, own)
    fields = {**options, "classes": own.chosen, "sigmoid": margin.form, "polynomials": polynomials}
    flat = tuple(fields.get(name, default) for name, default in OP_DEFAULTS)
    with torch.no_grad():
        cos = target_cosines(settings, own)  # (N,)
    weights = torch.where(valid, 1.0 if batch.sample_weight is None else batch.sample_weight, 0).to(cos.dtype)
    moves = bool(getattr(weight, optim.MARK, False))
    if settings.reduction != "none" and not moves and not weights.requires_grad and _makes_gradients(own):
        total = weights.sum()
        share = weights if settings.reduction == "sum" else weights / total  # (N,), of a sample in the loss
        share = torch.where(has_loss, share, 0)  # (N,)
        # Saved as they are: unpacked by torch.utils.checkpoint, they would make it run its region again, here.
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            cos = ranks.sum(cos).requires_grad_()  # (N,)
            positive = torch.where(has_loss, terms.positive(cos), 0)  # (N,)
        (g_cos,) = torch.autograd.grad(positive, cos, share, retain_graph=True)
        factor = ranks.of_own_classes(torch.where(has_loss, share * terms.factor, 0))  # (N,)
        negative = _OnePass.apply(*inputs, factor, g_cos, settings.backend, *flat)  # type: ignore[no-untyped-call]
        reduced = (share * positive).sum() + ranks.add(negative)
        if settings.reduction == "mean":
            reduced = torch.where(total == 0, torch.nan, reduced)
        if not validate:  # added, so that the others keep their gradient
            reduced = reduced + torch.where((targets == ops.INVALID).any(), torch.nan, 0)
        return reduced
    results = optim.sigmoid(weight, *inputs, cos, settings.backend, **fields) if moves else None
    if results is None:
        results = _TwoPasses.apply(*inputs, cos, settings.backend, *flat)  # type: ignore[no-untyped-call]
    added, cos = (torch.where(has_loss, ranks.add(each), 0) for each in results)  # (N,) each
    losses = torch.where(has_loss, terms.positive(cos) + terms.factor * added, 0)  # (N,)
    if not validate:
        losses = losses.masked_fill(targets == ops.INVALID, torch.nan)
    return reduce(ranks, losses, batch, valid, batch.sample_weight, settings.reduction)


def _makes_gradients(own: OwnClasses) -> bool:
    """Whether forward can make what backward is asked for."""
    asked = torch.is_grad_enabled() and (own.x.requires_grad or own.w.requires_grad)
    return asked and not ops.dispatches(own.x, own.w) and torch.float16 not in (own.x.dtype, own.w.dtype)


def _on_device(given: object, own: OwnClasses) -> Tensor:
    """(2, 5)

    Raises:
        ValueError: they are no two times five numbers.
    """
    try:
        polynomials = tuple(check_numbers("each of the margin's polynomials", tuple(each), 5) for each in given)  # type: ignore[attr-defined]
    except TypeError:
        polynomials = ()
    if len(polynomials) != 2:
        raise ValueError(f"the margin's polynomials must be two, of 5 coefficients each, got {given!r}.")
    if ops.dispatches(own.x, own.w):
        return torch.tensor(polynomials, dtype=torch.float64, device=own.x.device)
    return _made_once(polynomials, own.x.device)


@functools.cache
def _made_once(polynomials: Polynomials, device: torch.device) -> Tensor:
    """Not at every step: a copy to a GPU could not be captured in a CUDA graph."""
    with torch.inference_mode(False):
        return torch.tensor(polynomials, dtype=torch.float64, device=device)
