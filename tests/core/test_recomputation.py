"""Heads whose forward changes state, under torch.utils.checkpoint, which runs it again inside backward."""

import copy

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosface_kernels import (
    FusedAdaCosLoss,
    FusedAdaFaceLoss,
    FusedASoftmaxLoss,
    FusedCosFaceLoss,
    FusedCurricularFaceLoss,
    FusedGBCosFaceLoss,
    recomputation,
)

C, D, N = 60, 16, 8
HEADS = [FusedAdaCosLoss, FusedAdaFaceLoss, FusedASoftmaxLoss, FusedCurricularFaceLoss, FusedGBCosFaceLoss]


class Model(nn.Module):
    def __init__(self, make, rate: float) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.3))
        self.head = make(C, D, sample_rate=rate)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.backbone(3 * x), labels)


def train(model: Model, run, whole: bool) -> dict[str, Tensor]:
    """Gradients and state after three steps of two passes each, one of them with the labels of the other."""
    torch.manual_seed(1)
    for _ in range(3):
        labels = torch.randint(C, (N,))
        losses = []
        for x in torch.randn(2, N, D):
            losses.append(run(model, x, labels) if whole else run(model.head, model.backbone(3 * x), labels))
        model.head(3 * x, labels.flip(0)).detach()  # is not differentiated
        sum(losses).backward()
    gradients = {f"grad {name}": parameter.grad.to_dense() for name, parameter in model.named_parameters()}
    return gradients | dict(model.named_buffers())


@pytest.mark.parametrize(("reentrant", "whole"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("make", [FusedCosFaceLoss, *HEADS])
def test_equals_a_run_without(make, rate, reentrant, whole, restore_threads):
    torch.set_num_threads(1)  # the passes are too small for more
    torch.manual_seed(0)
    plain = Model(make, rate)
    again = copy.deepcopy(plain)
    want = train(plain, lambda module, *batch: module(*batch), whole)
    got = train(again, lambda module, *batch: checkpoint(module, *_leaves(batch), use_reentrant=reentrant), whole)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        if name.startswith("grad"):  # the reentrant kind adds up in another order
            assert relative_error(got[name], tensor) < 1e-6, name
        else:
            assert torch.equal(got[name], tensor), name
    if rate < 1:
        assert int(again.head.sampler.draws) == 3 * 3


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("make", HEADS)
def test_equal_batches_of_one_backward_have_the_state_of_their_own_pass(make, rate):
    torch.manual_seed(0)
    head = make(C, D, sample_rate=rate)
    x, labels = 3 * torch.randn(N, D), torch.randint(C, (N,))
    gradients = []
    for wrap in (lambda module, *batch: module(*batch), lambda *call: checkpoint(*call, use_reentrant=False)):
        (leaf, labels), module = _leaves((x, labels)), copy.deepcopy(head)
        loss = sum(wrap(module, leaf, labels) for _ in range(3))
        gradients += [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]
    for again in gradients[1:]:
        assert relative_error(again, gradients[0]) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_equal_batches_of_several_backwards_have_the_state_of_their_own_pass(order, reentrant):
    x, labels = torch.randn(N, D), torch.randint(C, (N,))
    plain = FusedCosFaceLoss(C, D, sample_rate=0.3)
    gradients = []
    for wrap in (lambda module, *batch: module(*batch), lambda *call: checkpoint(*call, use_reentrant=reentrant)):
        head = copy.deepcopy(plain)
        leaves = [x.clone().requires_grad_() for _ in order]
        losses = [wrap(head, leaf, labels) for leaf in leaves]
        for k in order:
            losses[k].backward()
        gradients.append(torch.stack([leaf.grad for leaf in leaves]))
    assert not torch.equal(gradients[0][0], gradients[0][1])
    for want, got in zip(*gradients, strict=True):
        assert relative_error(got, want) < 1e-6


def _leaves(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """For the reentrant kind something must need a gradient."""
    x, labels = batch
    return (x if x.requires_grad else x.clone().requires_grad_()), labels


def test_a_pass_that_is_forgotten_is_refused():
    head = FusedCosFaceLoss(C, D, sample_rate=0.3)
    x = torch.randn(N, D, requires_grad=True)
    loss = checkpoint(head, x, torch.arange(N), use_reentrant=False)
    for _ in range(recomputation.REMEMBERED):
        head(x, torch.arange(N) + 1)
    with pytest.raises(RuntimeError, match="has 8 labels that none of the last 32 forward passes"):
        loss.backward()


def test_nothing_is_kept_of_a_head_without_state():
    head = FusedCosFaceLoss(C, D)
    sampled = FusedCosFaceLoss(C, D, sample_rate=0.3)
    for each in (head, sampled):
        each(torch.randn(N, D), torch.arange(N))
        each.eval()(torch.randn(N, D), torch.arange(N))
    assert head not in recomputation._passes
    assert len(recomputation._passes[sampled]) == 1
    assert copy.deepcopy(sampled) not in recomputation._passes
