"""Batches and heads whose classes count each on its own, for the tests of these."""

import pytest
import torch
from torch import Tensor

from cosface_kernels import FusedSFaceLoss, FusedSphereFace2Loss, FusedUniFaceLoss

C, D, N = 211, 24, 17
HEADS = [FusedSphereFace2Loss, FusedUniFaceLoss, FusedSFaceLoss]
each_head = pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    labels = torch.randint(C, (N,))
    labels[4] = -100
    return torch.randn(N, D, dtype=dtype).requires_grad_(), labels


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def losses(head, x, labels, **options) -> Tensor:
    """(N,), of which the reduced loss is to be the mean or the sum."""
    reduction, head.reduction = head.reduction, "none"
    losses = head(x, labels, **options)
    head.reduction = reduction
    return losses
