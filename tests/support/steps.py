"""A head whose rows move inside backward beside one that torch moves, and their batches."""

import pytest
import torch
from torch import nn

from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.optim import FusedAdamW, FusedSGD

N, C, D = 8, 60, 16


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


RULES = [
    pytest.param(FusedSGD, torch.optim.SGD, SGD, id="sgd"),
    pytest.param(FusedAdamW, torch.optim.AdamW, {"lr": 0.01, "eps": 0.1}, id="adamw"),
]


rules = pytest.mark.parametrize(("fused", "torchs", "options"), RULES)


def make_head(kind=FusedCosFaceLoss, **options):
    torch.manual_seed(0)
    head = kind(C, D, backend="cpu", **options)
    nn.init.normal_(head.weight)  # as large as what is learned
    return head


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator)
    return x.requires_grad_(), torch.randint(C, (N,), generator=generator)


class Pair:
    """A head whose rows move inside backward, and the same with torch.optim."""

    def __init__(self, fused=FusedSGD, torchs=torch.optim.SGD, options=SGD, kind=FusedCosFaceLoss, **fields):
        self.heads = make_head(kind), make_head(kind)
        self.optimizers = (
            fused(self.heads[0].parameters(), **options, **fields),
            torchs(self.heads[1].parameters(), **options),
        )

    def step(self, backward):
        """backward(head, optimizer), then step() and zero_grad() of both."""
        for head, optimizer in zip(self.heads, self.optimizers, strict=True):
            backward(head, optimizer)
            optimizer.step()
            optimizer.zero_grad()

    def check(self):
        torch.testing.assert_close(self.heads[0].weight, self.heads[1].weight, rtol=2e-5, atol=2e-6)


def usual(head, optimizer=None):
    head(*batch()).backward()


def both_losses_at_once(head, optimizer):
    (head(*batch(1)) + head(*batch(2))).backward()


def state_tensors(head, optimizer):
    state = optimizer if isinstance(optimizer, dict) else optimizer.state_dict()
    weights = head if isinstance(head, dict) else head.state_dict()
    return [*weights.values(), *(value for values in state["state"].values() for value in values.values())]
