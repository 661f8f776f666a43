"""The autograd node whose backward moves rows."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor

from cosface_kernels import ops
from cosface_kernels.backends import select
from cosface_kernels.derivatives import once_differentiable
from cosface_kernels.distributed import shard_like
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.optim.consumed_gradient import ConsumedGradient
from cosface_kernels.optim.ownership import IDLE, SKIPPED, owner_of
from cosface_kernels.options import Options, empty_cache


@torch._disable_dynamo  # type: ignore[attr-defined]
def moves(
    weight: Tensor, x: Tensor, w: Tensor, backend: str | None, options: Options, whole_gradient: bool = False
) -> Any:
    """The optimizer that is to move the weight's rows in the backward of this batch, or None.

    Raises:
        What `lmcl` does.
    """
    owner = owner_of(weight)
    if owner is None or not (torch.is_grad_enabled() and weight.requires_grad) or whole_gradient:
        return None
    owner._check_movable(weight)
    select(backend, x, w, replace(options, updates=True))
    return owner


@torch._disable_dynamo  # type: ignore[attr-defined]
def lmcl(
    weight: Tensor,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    margin: float,
    backend: str | None,
    *,
    whole_gradient: bool = False,
    **fields: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.lmcl`, whose backward moves w, the weight's rows that are here, if an optimizer of this module owns it.

    whole_gradient: the loss has another use of the weight, so that `step()` must move it by an ordinary gradient.

    Raises:
        RuntimeError: the backend cannot move rows, or something needs the gradient that would not exist.
        ValueError: the weight is not one that can be moved, or no longer fits the optimizer's state.
    """
    options = Options(**fields)
    if owner := moves(weight, x, w, backend, options, whole_gradient):
        return _MovesRows.apply(x, w.detach(), targets, scale, margin, backend, options, owner, weight)  # type: ignore[no-untyped-call]
    return ops.lmcl(x, w, targets, scale, margin, backend, *options.flat())


@torch._disable_dynamo  # type: ignore[attr-defined]
def sigmoid(
    weight: Tensor,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    bias: Tensor,
    target_cos: Tensor,
    backend: str | None,
    **fields: Any,
) -> tuple[Tensor, Tensor] | None:
    """What `cosface_kernels.sigmoid` computes in two passes, whose backward moves w as that of `lmcl` does.

    None if no optimizer of this module owns the weight.
    """
    options = Options(**fields)
    if owner := moves(weight, x, w, backend, options):
        inputs = x, w.detach(), targets, scale, bias, target_cos
        return _MovesRowsBySigmoids.apply(*inputs, backend, options, owner, weight)  # type: ignore[no-untyped-call]
    return None


class _MovesRows(torch.autograd.Function):
    """ops.lmcl whose backward moves the weight, unless its gradient is needed as a whole."""

    @staticmethod
    def forward(ctx, x, w, targets, scale, margin, backend, options, owner, weight):  # type: ignore[no-untyped-def]
        ctx.margin = margin
        _enter(ctx, w, backend, options, owner, weight)
        outputs = ops.lmcl(x, w, targets, scale, margin, backend, *options.flat())
        _, top, log_sum, target_cos, max_neg, cache, moments = outputs
        ctx.set_materialize_grads(False)  # that of a cache would be as large
        ctx.mark_non_differentiable(top, max_neg, cache, *([] if len(moments) else [moments]))
        ctx.save_for_backward(x, targets, scale, top, log_sum, target_cos, cache, moments)
        return outputs

    @staticmethod
    @torch._disable_dynamo  # type: ignore[attr-defined] # it would compile this, and guard none of ctx
    @once_differentiable
    def backward(ctx, g_loss, _, g_log_sum, g_cos, __, ___, g_moments):  # type: ignore[no-untyped-def]
        adds, whole = _wanted(ctx)
        x, targets, scale, top, log_sum, target_cos, cache, moments = ctx.saved_tensors
        need_dx, _, _, need_dscale, *_ = ctx.needs_input_grad
        g = ops.fold(
            targets, scale, top, log_sum, target_cos, ctx.margin, moments, g_loss, g_log_sum, g_cos, g_moments
        )
        tensors = (x, ctx.w, targets, scale, top, log_sum, g.g_lse, g.g_cos, cache)
        options = replace(ctx.options, g_moments=g.g_moments)
        dx, dw, dscale = _gradients(ctx, tensors, log_sum, options, adds, whole)
        of_scale = dscale + g.dscale if need_dscale else None
        gradients = dx if need_dx else None, None, None, of_scale, None, None, None, None, dw
        return gradients, (x, scale, ctx.weight)


class _MovesRowsBySigmoids(torch.autograd.Function):
    """`sigmoid` whose backward moves the weight, unless its gradient is needed as a whole."""

    @staticmethod
    def forward(ctx, x, w, targets, scale, bias, target_cos, backend, options, owner, weight):  # type: ignore[no-untyped-def]
        _enter(ctx, w, backend, options, owner, weight)
        added, mass = ops.sigmoid_sums(x, w, targets, scale, bias, backend, *options.flat())
        ctx.save_for_backward(x, targets, scale, bias, mass)
        return added, target_cos.clone()

    @staticmethod
    @torch._disable_dynamo  # type: ignore[attr-defined] # it would compile this, and guard none of ctx
    @once_differentiable
    def backward(ctx, g, g_cos):  # type: ignore[no-untyped-def]
        adds, whole = _wanted(ctx)
        x, targets, scale, bias, mass = ctx.saved_tensors
        tensors = (x, ctx.w, targets, scale, torch.zeros_like(bias), -bias, g, g_cos, empty_cache(x))
        dx, dw, dscale = _gradients(ctx, tensors, mass, ctx.options, adds, whole)
        need_dx, _, _, need_dscale, need_dbias, *_ = ctx.needs_input_grad
        rows = dscale if need_dscale else None, ops.bias_gradient(g, mass) if need_dbias else None
        gradients = dx if need_dx else None, None, None, *rows, None, None, None, None, dw
        return gradients, (x, scale, bias, ctx.weight)


def _enter(node: Any, w: Tensor, backend: str | None, options: Options, owner: Any, weight: Tensor) -> None:
    node.backend, node.options, node.owner, node.weight = backend, options, owner, weight
    node.w, node.version = w, w._version  # not saved: a hook on what is, such as save_on_cpu's, would move a copy
    node.whole_gradient = False
    owner._ownership(weight).nodes.add(node)


def _gradients(
    node: Any, tensors: tuple[Tensor, ...], sums: Tensor, options: Options, adds: bool, whole: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dx, dw where it is needed as a whole, and dscale; otherwise the weight moves, if this backward adds to it.

    tensors: those of ops.lmcl_backward; sums: those of `finiteness.finite_rows`.
    """
    weight, need_dx = node.weight, node.needs_input_grad[0]
    if node.w._version != node.version:
        raise RuntimeError(
            f"A weight of shape {tuple(weight.shape)} has been modified by an inplace operation between forward "
            "and backward, which needs it as it was: call backward first."
        )
    if whole and weight.dtype is FLOAT8:
        raise RuntimeError(
            f"A weight in float8, of shape {tuple(weight.shape)} here, has no gradient as a whole, which another "
            "loss of it in this backward or torch.autograd.grad would need: its rows move inside backward."
        )
    if adds and not whole:
        dx, dscale = node.owner._move(weight, tensors, sums, need_dx, node.backend, options)
        node.owner._ownership(weight).nodes.discard(node)
        return dx, None, dscale
    dx, dw, dscale = ops.lmcl_backward(*tensors, need_dx, whole, node.backend, *options.flat())
    if not whole:
        return dx, None, dscale
    dw = ops.of_all_classes(dw, options.classes, tensors[1].shape)
    if isinstance(weight, DTensor):
        dw = shard_like(weight, dw.to_dense() if dw.is_sparse else dw)
    return dx, dw, dscale


def _wanted(node: Any) -> tuple[bool, bool]:
    """Whether this backward is to add to the weight's gradient, and whether a whole one is needed."""
    weight, ownership = node.weight, node.owner._ownership(node.weight)
    if not weight.requires_grad:
        return False, False  # frozen after forward
    if hasattr(node, "real"):  # what compiled autograd puts in its place
        raise RuntimeError(
            f"A weight of shape {tuple(weight.shape)} moves inside backward, whose end compiled autograd skips: "
            "leave torch._dynamo.config.compiled_autograd off, or construct the optimizer with "
            "accumulate=True."
        )
    if ownership.phase == SKIPPED and node.owner._scaler() is None:
        weight.grad = None  # what moved nothing is nothing to add to
    try:
        adds = torch._C._will_engine_execute_node(get_gradient_edge(weight).node)
    except RuntimeError as error:
        if "autograd.grad()" not in str(error):
            raise
        return False, True  # torch.autograd.grad is asked for the gradient of this leaf
    if adds and ownership.phase in (IDLE, SKIPPED):
        for other in ownership.nodes:  # that run in this backward too
            if other is not node and torch._C._will_engine_execute_node(other):
                node.whole_gradient = other.whole_gradient = True
        earlier = weight.grad is not None and not isinstance(weight.grad, ConsumedGradient)
        node.whole_gradient |= earlier
    whole = adds and node.whole_gradient
    if adds and not whole:
        node.owner._check_ready(weight)
    return adds, whole
