"""What no op and no node of this package has is refused here, above all where it would be dropped in silence."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cosface_kernels.validation import is_transformed


def refuse_forward_mode() -> None:
    """Tangents do not pass through an op; without this, torch.func.jvp would take them for 0."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "The loss has no forward-mode derivative, which torch.func.jvp, jacfwd and dual tensors ask for. "
            "Take backward, or cosface_kernels.reference.forward, which is plain PyTorch."
        )


def without_tangents(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of an op, which refuses to run where there are some."""

    @functools.wraps(function)
    def refusing(*arguments: Any, **options: Any) -> Any:
        refuse_forward_mode()
        return function(*arguments, **options)

    return refusing


def refuse_transforms() -> None:
    """Those of torch.func ask an op for what it does not have, and say so in words of their own."""
    if not torch.compiler.is_compiling() and is_transformed():
        refuse_forward_mode()
        raise NotImplementedError(
            "The loss does not go through torch.func's transforms, such as grad, vjp, jacrev and vmap. Take "
            "loss.backward() or torch.autograd.grad, or cosface_kernels.reference.forward, which is plain PyTorch."
        )


def _refuse_batches(upstream: tuple[Tensor | None, ...]) -> None:
    if torch.compiler.is_compiling():
        return
    if any(each is not None and torch._C._functorch.is_legacy_batchedtensor(each) for each in upstream):
        raise NotImplementedError(
            "The gradients of the loss do not come in batches, which is_grads_batched=True and jacobian's "
            "vectorize=True ask for. Take one backward of each, or cosface_kernels.reference.forward, which is "
            "plain PyTorch."
        )


class _WithoutDerivative(torch.autograd.Function):
    """The first `count` of the tensors, functions of the others too, whose own derivative is refused."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(each if each is None else each.detach() for each in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise NotImplementedError(
            "The loss has no second derivative, which a penalty on its gradient asks for, as does whatever else "
            "differentiates what create_graph=True gave. Take cosface_kernels.reference.forward, which is plain "
            "PyTorch."
        )


def once_differentiable(backward: Callable[..., tuple[Any, tuple[Tensor, ...]]]) -> Callable[..., Any]:
    """For a node's `backward` that returns its gradients, and which of the node's inputs these are functions of.

    torch's own leaves these out of the graph that create_graph=True asks for, so that a penalty on the gradients
    would add nothing, silently, to what is differentiated with respect to the inputs.
    """

    @functools.wraps(backward)
    def of_upstream(ctx: Any, *upstream: Tensor | None) -> Any:
        refuse_forward_mode()
        refuse_transforms()
        _refuse_batches(upstream)
        if not torch.is_grad_enabled():  # without create_graph=True
            return backward(ctx, *upstream)[0]
        with torch.no_grad():
            gradients, inputs = backward(ctx, *upstream)
        return _WithoutDerivative.apply(len(gradients), *gradients, *inputs, *upstream)  # type: ignore[no-untyped-call]

    return of_upstream
