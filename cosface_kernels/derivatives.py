"""How a second derivative, which no node of this package has, is refused where it would be dropped."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
        if not torch.is_grad_enabled():  # without create_graph=True
            return backward(ctx, *upstream)[0]
        with torch.no_grad():
            gradients, inputs = backward(ctx, *upstream)
        return _WithoutDerivative.apply(len(gradients), *gradients, *inputs, *upstream)  # type: ignore[no-untyped-call]

    return of_upstream
