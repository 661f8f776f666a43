"""Batches that are not finite, and gradient scalers: nothing moves, and what follows is as in torch."""

import copy

import pytest
import torch
from support.steps import C, D, batch, both_losses_at_once, make_head, rules, state_tensors, usual
from torch import nn

from cosface_kernels import (
    FusedCosFaceLoss,
    FusedSFaceLoss,
    FusedSphereFace2Loss,
    FusedUniFaceLoss,
    margin_softmax_loss,
)
from cosface_kernels.optim import FusedSGD


@pytest.mark.parametrize("overflows", ["head", "backbone"])
def test_one_scaler_for_backbone_and_head(overflows):
    """An overflow anywhere: the step is skipped, and the next one is not refused."""
    head, backbone = make_head(), nn.Linear(D, D)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = FusedSGD([*backbone.parameters(), *head.parameters()], lr=0.1, grad_scaler=scaler)
    for overflow in (False, True, False):
        before = [p.detach().clone() for p in (backbone.weight, head.weight)]
        x, labels = batch()
        optimizer.zero_grad()
        loss = head(backbone(x), labels)
        if overflow:
            loss = loss * torch.inf if overflows == "head" else loss + (backbone.weight * torch.inf).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(backbone.weight, before[0]) == overflow
        assert torch.equal(head.weight, before[1]) == (overflow and overflows == "head")
    assert scaler.get_scale() == 512
    assert optimizer.skipped == 0


@rules
@pytest.mark.parametrize("wrong", ["embedding", "upstream"])
def test_what_is_not_finite_moves_nothing(fused, torchs, options, wrong):
    head = make_head()
    optimizer = fused(head.parameters(), **options)
    usual(head)
    optimizer.step()
    before = copy.deepcopy((head.state_dict(), optimizer.state_dict()))

    def broken():
        x, labels = batch(1)
        with torch.no_grad():
            if wrong == "embedding":
                x[3, 2] = torch.nan
                x[5, 0] = torch.inf
        losses = margin_softmax_loss(x, head.weight, labels, margin=0.3, reduction="none", backend="cpu")
        (losses * (torch.inf if wrong == "upstream" else 1)).sum().backward()

    sample = 0 if wrong == "upstream" else 3
    with pytest.raises(RuntimeError, match=f"not finite .that of sample {sample} is the first"):
        broken()
    optimizer.nonfinite = "skip"
    for _ in range(2):
        broken()
        optimizer.step()
    assert optimizer.skipped == 2
    for now, then in zip(state_tensors(head, optimizer), state_tensors(*before), strict=True):
        assert torch.equal(now, then)


@pytest.mark.option("updates")
@pytest.mark.parametrize("nonfinite", ["raise", "skip", None], ids=["raise", "skip", "scaler"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", [FusedCosFaceLoss, FusedSphereFace2Loss, FusedUniFaceLoss, FusedSFaceLoss])
def test_a_row_of_the_weight_that_is_not_finite_moves_nothing(backend, kind, value, nonfinite):
    """Whether its class is that of all samples or of none."""
    head, backbone = backend.head(C, D, kind=kind), nn.Linear(D, D, device=backend.device)
    model = nn.ModuleList([head, backbone])
    scaler = None if nonfinite else torch.amp.GradScaler(backend.device, init_scale=1024.0)
    optimizer = FusedSGD(model.parameters(), lr=0.1, grad_scaler=scaler, nonfinite=nonfinite or "raise")
    with torch.no_grad():
        head.weight[7, 3] = value
    before = [parameter.detach().clone() for parameter in model.parameters()]
    x = torch.randn(4, D, device=backend.device)
    for labels in ([7, 7, 7, 7], [0, 1, 2, 3]):
        optimizer.zero_grad()
        loss = head(backbone(x), torch.tensor(labels, device=backend.device))
        if scaler is not None:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        elif nonfinite == "raise" and backend.device == "cpu":
            with pytest.raises(RuntimeError, match=r"not finite \(that of sample 0 is the first"):
                loss.backward()
        else:
            loss.backward()
            optimizer.step()
        for now, then in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def test_an_ignored_sample_may_hold_anything():
    head, (x, labels) = make_head(), batch()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    with torch.no_grad():
        x[2] = torch.nan
    labels[2] = -100
    head(x, labels).backward()
    optimizer.step()
    assert bool(head.weight.isfinite().all())


# -- what is not finite, scaled or well formed -------------------------------------------------------------------


def _nan_batch():
    x, labels = batch(1)
    with torch.no_grad():
        x[3, 2] = torch.nan
    return x, labels


@rules
def test_a_batch_that_is_not_finite_moves_no_parameter_of_the_optimizer(fused, torchs, options):
    """The run is as if that batch had not been, also where backward was then not followed by step()."""
    head, backbone = make_head(), nn.Linear(D, D)
    other = copy.deepcopy((head, backbone))
    optimizer = fused([*backbone.parameters(), *head.parameters()], **options, nonfinite="skip")
    want = torchs([*other[1].parameters(), *other[0].parameters()], **options)
    for seed, (is_wrong, steps) in enumerate([(False, True), (True, True), (True, False), (False, True)]):
        x, labels = _nan_batch() if is_wrong else batch(seed)
        optimizer.zero_grad()
        head(backbone(x), labels).backward()
        if steps:
            optimizer.step()
        if not is_wrong:
            want.zero_grad()
            other[0](other[1](x), labels).backward()
            want.step()
    assert optimizer.skipped == 2
    for mine, theirs in zip((head.weight, backbone.weight), (other[0].weight, other[1].weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


def test_of_two_heads_one_batch_that_is_not_finite_holds_back_the_backbone():
    heads, backbone = [make_head(), make_head()], nn.Linear(D, D)
    parameters = [*backbone.parameters(), *(head.weight for head in heads)]
    optimizer = FusedSGD(parameters, lr=0.1, nonfinite="skip")
    before = copy.deepcopy(backbone.state_dict())
    heads[0](backbone(_nan_batch()[0]), _nan_batch()[1]).backward()
    usual(heads[1])
    optimizer.step()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])
    assert bool(torch.cat([head.weight for head in heads]).isfinite().all())


def test_after_a_skipped_batch_other_losses_are_taken():
    """It has moved nothing, and so nothing can have come too late."""
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1, nonfinite="skip")
    head(*_nan_batch()).backward()
    both_losses_at_once(head, optimizer)
    before = head.weight.detach().clone()
    optimizer.step()  # which ends the step that the batch had spoiled
    assert torch.equal(head.weight, before)
    optimizer.zero_grad()
    both_losses_at_once(head, optimizer)
    optimizer.step()
    assert not torch.equal(head.weight, before)


def test_a_disabled_scaler_is_none():
    head = make_head()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = FusedSGD(head.parameters(), lr=0.1, grad_scaler=scaler)
    with pytest.raises(RuntimeError, match=r"not finite .that of sample 3 is the first"):
        head(*_nan_batch()).backward()
    usual(head)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="backward ran twice"):
        usual(head)


def test_a_scaler_that_scales_no_loss_is_noticed():
    head = make_head()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = FusedSGD(head.parameters(), lr=0.1, grad_scaler=scaler)
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"a scale of 1024 that is not there: call scaler\.scale\(loss\)"):
        usual(head)
    assert torch.equal(head.weight, before)
    scaler.scale(head(*batch())).backward()
    scaler.step(optimizer)


@pytest.mark.parametrize("drop", ["module", "none", "optimizer"])
def test_a_step_that_a_scaler_left_out_ends_with_any_zero_grad(drop):
    head, backbone = make_head(), nn.Linear(D, D)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = FusedSGD([*backbone.parameters(), *head.parameters()], lr=0.1, grad_scaler=scaler)
    for overflow in (True, False):
        x, labels = batch()
        loss = head(backbone(x), labels) + ((backbone.weight * torch.inf).sum() if overflow else 0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.state_dict()
        if drop == "none":
            head.weight.grad = None
            backbone.zero_grad()
        else:
            (nn.ModuleList([head, backbone]) if drop == "module" else optimizer).zero_grad()


def test_a_refused_backward_is_over_after_zero_grad_whoever_dropped_the_gradient():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    usual(head)
    head.zero_grad()
    with pytest.raises(RuntimeError, match="backward ran twice"):
        usual(head)
    optimizer.zero_grad()
    optimizer.step()
    usual(head)
    optimizer.step()
