"""What lasts longer than a step: accumulation, clipping, interruptions, saved state, scalers, rounding."""

import copy
import math

import pytest
import torch
from support import run_python
from support.rules import RULES, D, batches, make_head, train
from torch import nn

from cosface_kernels import FusedCosFaceLoss, cosface_loss, ops
from cosface_kernels.backends import BACKENDS
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.options import Update


def _gradient(head, x, labels):
    weight = head.weight.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cosface_loss(x, weight, labels, scale=16.0, backend="cpu"), weight)
    return gradient


def test_clipping_by_rows_and_by_a_known_factor():
    ((x, labels),) = batches(1)
    head = make_head()
    before, gradient = head.weight.detach().clone(), _gradient(head, x, labels)
    norms = gradient.norm(dim=1, keepdim=True)
    limit = float(norms.quantile(0.7)) / 2
    optimizer = FusedSGD(head.parameters(), lr=1.0, gradient_factor=0.5, max_row_norm=limit)
    head(x, labels).backward()
    optimizer.step()
    clipped = 0.5 * gradient * (limit / (0.5 * norms)).clamp_max(1)
    assert bool((0.5 * norms > limit).any())
    assert bool((0.5 * norms < limit).any())
    torch.testing.assert_close(head.weight, before - clipped, rtol=1e-6, atol=1e-7)


def test_clipping_by_the_global_norm_afterwards_raises():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    ((x, labels),) = batches(1)
    head(x, labels).backward()
    for clip in (
        lambda: nn.utils.clip_grad_norm_(head.parameters(), 1.0),
        lambda: nn.utils.clip_grad_value_(head.parameters(), 1.0),
        lambda: head.weight.grad.norm(),
    ):
        with pytest.raises(RuntimeError, match=r"set gradient_factor .* or max_row_norm"):
            clip()
    assert "(301, 20)" in repr(head.weight.grad)
    optimizer.step()
    assert head.weight.grad is None


def test_two_backwards_before_a_step_raise_and_change_nothing():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    (x, labels), (x2, labels2) = batches(2)
    losses = head(x, labels), head(x2, labels2)
    losses[0].backward()
    after = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"backward ran twice .*FusedSGD\.step\(\)\. .*accumulate=True"):
        losses[1].backward()
    with pytest.raises(RuntimeError, match=r"backward then raised: .* half an update"):
        optimizer.step()
    assert torch.equal(head.weight, after)
    optimizer.zero_grad()
    optimizer.step()
    stale = head(x, labels)
    head(x2, labels2).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()  # its forward saw the weight before the step


@pytest.mark.parametrize(("fused", "torchs", "options"), RULES[1::4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_accumulation_is_the_mean_of_one_large_batch(fused, torchs, options, dtype):
    accumulated, concatenated, theirs = make_head(dtype), make_head(dtype), make_head(dtype)
    optimizers = (
        fused(accumulated.parameters(), accumulate=True, **options),
        fused(concatenated.parameters(), **options),
        torchs(theirs.parameters(), **options),
    )
    for _ in range(3):
        micro = list(batches(4, dtype))
        for x, labels in micro:
            (accumulated(x, labels) / 4).backward()
        for head in (concatenated, theirs):
            head(torch.cat([x for x, _ in micro]), torch.cat([labels for _, labels in micro])).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for head in (accumulated, concatenated):
        torch.testing.assert_close(head.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_accumulated_gradient_can_be_clipped_and_zeroed():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=1.0, accumulate=True)
    ((x, labels),) = batches(1)
    head(x, labels).backward()
    nn.utils.clip_grad_norm_(head.parameters(), 0.1)
    gradient, before = head.weight.grad.clone(), head.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(head.weight, before - gradient)
    optimizer.zero_grad()
    assert head.weight.grad is None


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_interrupted_step_is_never_used(failure, monkeypatch):
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
    train(head, optimizer, 2)
    checkpoint = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    cpu = BACKENDS["cpu"]
    whole = cpu.backward_update_

    def half(x, w, *tensors, state, **options):
        whole(x, w[:150], *tensors, state=[values[:150] for values in state], **options)
        raise failure

    monkeypatch.setattr(cpu, "backward_update_", half)
    ((x, labels),) = batches(1)
    labels %= 150
    with pytest.raises(failure):
        head(x, labels).backward()
    monkeypatch.undo()
    for use in (lambda: head(x, labels), optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"\(301, 20\) was interrupted, .*Restore the weight"):
            use()
    with torch.no_grad(), pytest.raises(RuntimeError, match="was interrupted"):
        head(x, labels)

    head.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    other = make_head()
    other_optimizer = FusedSGD(other.parameters(), lr=0.1, momentum=0.9)
    train(other, other_optimizer, 2)
    train(head, optimizer, 2), train(other, other_optimizer, 2)
    assert torch.equal(head.weight, other.weight)


def test_a_cache_that_is_found_damaged_after_rows_have_moved_interrupts_the_step(restore_threads):
    """The places of kept entries are looked at where they are read, tile by tile."""
    torch.set_num_threads(2)
    head = FusedCosFaceLoss(4000, 64, backend="cpu", gradient_tolerance=0.01, cache_bytes=0)
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    x, labels, before = torch.randn(64, 64), torch.randint(4000, (64,)), head.weight.detach().clone()

    def damaged(saved):
        if saved.dtype is torch.uint8:
            saved = saved.clone()
            saved[-len(saved) // 6 :] = 255
        return saved

    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, damaged):
        loss = head(x, labels)
    with pytest.raises(RuntimeError, match="cache must be what lmcl returned"):
        loss.backward()
    for use in (lambda: head(x, labels), optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="was interrupted"):
            use()
    assert not torch.equal(head.weight, before)


def test_interrupt_of_a_real_step():
    """Ctrl-C while the kernels run is raised when they are done or in between, and either is told apart."""
    done = run_python(
        """
import os, signal, threading, torch
from cosface_kernels import FusedCosFaceLoss, optim
from cosface_kernels.optim import FusedSGD
head = FusedCosFaceLoss(40_000, 64, backend="cpu")
optimizer = FusedSGD(head.parameters(), lr=0.1)
x, labels = torch.randn(256, 64), torch.randint(40_000, (256,))
def step():
    head(x, labels).backward()
    optimizer.step()
step()  # before the interrupt, however slow the machine is
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        step()
except KeyboardInterrupt:
    pass
phase = optim.ownership_of(head.weight).phase
try:
    optimizer.step()
    print("whole" if phase != "moving" else "wrong")
except RuntimeError:
    print("half" if phase == "moving" else "wrong")
""",
        OMP_NUM_THREADS="2",
    )
    assert done.stdout.strip() in ("whole", "half"), done.stdout + done.stderr


@pytest.mark.parametrize(("fused", "torchs", "options"), RULES[1::4])
def test_state_passes_to_torch_and_back(fused, torchs, options):
    """A run that changes optimizer half-way is the run that does not."""
    head, other = make_head(), make_head()
    optimizer, theirs = fused(head.parameters(), **options), torchs(other.parameters(), **options)
    train(head, optimizer, 3), train(other, theirs, 3)
    swapped = fused(other.parameters(), **options)
    swapped.load_state_dict(theirs.state_dict())
    back = torchs(head.parameters(), **options)
    back.load_state_dict(optimizer.state_dict())
    del optimizer  # no longer the owner
    train(other, swapped, 3), train(head, back, 3)
    torch.testing.assert_close(head.weight, other.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [FusedSGD, FusedAdamW])
def test_the_state_of_other_parameters_is_in_their_order(fused):
    """In one that depends on addresses the ranks of a training would differ."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(30)]
    optimizer = fused(parameters, lr=0.1, **({"momentum": 0.9} if fused is FusedSGD else {}))
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    assert list(optimizer.state_dict()["state"]) == list(range(30))


def test_resumes_bitwise(tmp_path):
    head = make_head(torch.bfloat16)
    optimizer = FusedAdamW(head.parameters(), lr=0.01, state_dtype=torch.float32, seed=4)
    train(head, optimizer, 3)
    torch.save((head.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint")
    train(head, optimizer, 3)
    other = make_head(torch.bfloat16)
    resumed = FusedAdamW(other.parameters(), lr=0.5, state_dtype=torch.float32, seed=4)
    weights, state = torch.load(tmp_path / "checkpoint")
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.state[other.weight]["exp_avg"].dtype == torch.float32
    train(other, resumed, 3)
    assert torch.equal(head.weight, other.weight)


@pytest.mark.parametrize("with_backbone", [False, True])
def test_grad_scaler(with_backbone):
    """Steps like torch's SGD under a scaler of its own, over an overflow that both skip."""
    results = []
    for fused in (True, False):
        torch.manual_seed(1)
        head, backbone = make_head(), nn.Linear(D, D)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        optimizers = [
            FusedSGD(head.parameters(), lr=0.3, momentum=0.9, grad_scaler=scaler)
            if fused
            else torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.9)
        ]
        if with_backbone:
            optimizers.append(torch.optim.SGD(backbone.parameters(), lr=0.1))
        for i, (x, labels) in enumerate(batches(6)):
            loss = head(backbone(x), labels)
            loss = loss * math.inf if i == 3 else loss
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        assert bool(head.weight.isfinite().all())
        results.append((head.weight, scaler.get_scale()))
    assert results[0][1] == results[1][1] < 1024 * 8
    torch.testing.assert_close(results[0][0], results[1][0])


def test_a_scaler_that_the_optimizer_does_not_know_raises():
    head, scaler = make_head(), torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    ((x, labels),) = batches(1)
    scaler.scale(head(x, labels)).backward()
    with pytest.raises(RuntimeError, match="grad_scaler=scaler"):
        scaler.unscale_(optimizer)


def test_a_copy_of_a_head_and_a_dropped_optimizer_have_no_owner():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    ((x, labels),) = batches(1)
    copied = copy.deepcopy(head)
    copied(x, labels).backward()
    assert torch.equal(copied.weight, head.weight)
    assert float(copied.weight.grad.norm()) > 0
    del optimizer
    head(x, labels).backward()
    torch.testing.assert_close(head.weight.grad, copied.weight.grad)


def test_rounding_depends_on_seed_and_step_alone():
    w, g = torch.randn(500, 33).bfloat16(), torch.randn(500, 33).bfloat16()

    def moved(seed, step, threads=2):
        torch.set_num_threads(threads)
        v = w.clone()
        ops.apply_update_(v, g, [], *Update("sgd", step, seed, 1.0, math.inf, 1e-3, 0.0).flat(), "cpu")
        return v

    threads = torch.get_num_threads()
    first = moved(1, 1)
    assert torch.equal(first, moved(1, 1, threads=1))
    assert not torch.equal(first, moved(2, 1))
    assert not torch.equal(first, moved(1, 2))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("fused", [FusedSGD, FusedAdamW])
def test_bfloat16_follows_float32(fused, state_dtype):
    """The updates of many steps are far smaller than an ulp of the weight; they must not be lost."""
    options = {"lr": 0.02, "momentum": 0.9} if fused is FusedSGD else {"lr": 2e-4, "weight_decay": 0.0}
    small, exact = make_head(torch.bfloat16), make_head()
    exact.load_state_dict(small.state_dict())
    start = small.weight.detach().double()
    optimizer = fused(small.parameters(), state_dtype=state_dtype, **options)
    train(small, optimizer, 200)
    train(exact, fused(exact.parameters(), **options), 200)
    want, got = exact.weight.detach().double() - start, small.weight.detach().double() - start
    along = float((want * got).sum() / want.square().sum())
    assert abs(along - 1) < 0.05
    assert {v.dtype for v in optimizer.state[small.weight].values() if v.dim()} == {state_dtype or torch.bfloat16}
