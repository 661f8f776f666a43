"""The optimizers of rows beside torch's, a head and batches for both."""

import pytest
import torch

from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.optim import FusedAdamW, FusedSGD

C, D, N = 301, 20, 9  # a ragged tile, a width that fills no panel


SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01},
    "maximize": {"momentum": 0.9, "maximize": True, "weight_decay": 0.01},
}


ADAMW = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    "maximize": {"maximize": True, "eps": 1e-4},
}


RULES = [
    *(pytest.param(FusedSGD, torch.optim.SGD, {"lr": 0.3, **o}, id=f"sgd-{k}") for k, o in SGD.items()),
    *(pytest.param(FusedAdamW, torch.optim.AdamW, {"lr": 0.01, **o}, id=f"adamw-{k}") for k, o in ADAMW.items()),
]


def make_head(dtype=torch.float32, backend="cpu", num_classes=C, dim=D, **options) -> FusedCosFaceLoss:
    torch.manual_seed(3)
    head = FusedCosFaceLoss(num_classes, dim, scale=16.0, dtype=dtype, backend=backend, **options)
    with torch.no_grad():
        head.weight.mul_(100)
    return head


def batches(steps: int, dtype=torch.float32, rows=N, num_classes=C, dim=D):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(num_classes, (rows,), generator=generator)


def train(head, optimizer, steps, dtype=torch.float32, **sizes):
    """The gradients of the embeddings of each step, which see the weight of the step before."""
    gradients = []
    for x, labels in batches(steps, dtype, **sizes):
        x.requires_grad_()
        optimizer.zero_grad()
        head(x, labels).backward()
        optimizer.step()
        gradients.append(x.grad)
    return torch.stack(gradients)
