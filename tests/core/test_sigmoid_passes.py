"""The pass that makes loss and gradients of classes that count each on its own, and the two where one cannot."""

import math

import pytest
import torch
from support import relative_error
from support.memory import raised_by
from support.sigmoids import C, D, N, batch, each_head, gradients, losses
from torch import Tensor, nn

from cosface_kernels import (
    ops,
    sigmoid,
)
from cosface_kernels.optim import FusedSGD


@each_head
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", ["none", "constant", "learned"])
def test_one_pass_is_two(kind, reduction, weights):
    """Also for what learns beside: the scale, the bias, the weights of the samples, which take two."""
    scale = nn.Parameter(torch.tensor(17.0, dtype=torch.float64))
    head = kind(C, D, scale=scale, reduction=reduction, dtype=torch.float64, class_weight=torch.linspace(0, 2, C))
    x, labels = batch()
    a = None if weights == "none" else torch.rand(N, dtype=torch.float64)
    inputs = [x, *head.parameters()]
    if weights == "learned":
        inputs.append(a.requires_grad_())
    each = losses(head, x, labels, sample_weight=a)
    total = (head.class_weight.double()[labels.clamp_min(0)] * (labels >= 0) * (1 if a is None else a)).sum()
    want = each.sum() if reduction == "sum" else each.sum() / total
    got = head(x, labels, sample_weight=a)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(1.7 * got, *inputs), gradients(1.7 * want, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@each_head
def test_how_often_the_weight_is_read(kind, monkeypatch):
    """By the op that makes all gradients: once, unless samples have gradients of their own."""
    needed = []

    def spy(*arguments, **options):
        needed.append(tuple(arguments[7:9]))
        return op(*arguments, **options)

    op = ops.sigmoid
    monkeypatch.setattr(sigmoid.ops, "sigmoid", spy)
    head, (x, labels) = kind(C, D, dtype=torch.float64), batch()
    head(x, labels).backward()
    assert needed == [(True, True)]
    needed.clear()
    head(x.detach(), labels).backward()
    assert needed == [(False, True)]
    needed.clear()
    losses(head, x, labels).sum().backward()
    assert needed == [(False, False), (True, True)]
    needed.clear()
    with torch.no_grad():
        head(x, labels)
    assert needed == [(False, False)]


@each_head
def test_backward_hands_over_what_forward_made(kind):
    """Not a copy, of gigabytes; and can run again where the graph is retained."""
    head, (x, labels) = kind(C, D, dtype=torch.float64), batch()
    loss = head(x, labels)
    loss.backward(retain_graph=True)
    once = head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(head.weight.grad, 2 * once, rtol=0, atol=0)

    step = lambda: head(x, labels).backward()  # noqa: E731
    head.weight.grad = None
    gradient = []
    head.weight.register_post_accumulate_grad_hook(lambda weight: gradient.append(weight.grad.data_ptr()))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        step()
    assert gradient[0] in saved


@each_head
def test_memory(kind):
    """No (N, C), and of (C, D) the gradient alone."""
    classes, samples, size = 60_000, 256, 8
    head = kind(classes, size)
    x, labels = torch.randn(samples, size), torch.randint(classes, (samples,))

    def step() -> None:
        head.weight.grad = None
        head(x, labels).backward()

    logits = samples * classes * 4
    assert raised_by(step) < logits / 3


@each_head
def test_float16_keeps_its_loss_scale(kind):
    """Of a mean over many samples, a gradient made before it is scaled would be 0 in float16."""
    head = kind(C, D, dtype=torch.float16)
    x = torch.randn(N, D, dtype=torch.float16).requires_grad_()
    labels = torch.randint(C, (N,))
    tiny = 2.0**-20
    (tiny * head(x, labels) * 2.0**16).backward()
    twin = kind(C, D, dtype=torch.float64)
    twin.weight.data = head.weight.detach().double()
    ours = x.detach().double().requires_grad_()
    (tiny * twin(ours, labels) * 2.0**16).backward()
    assert relative_error(x.grad, ours.grad) < 5e-3
    assert relative_error(head.weight.grad, twin.weight.grad) < 5e-3


@each_head
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels_that_are_no_class(kind, reduction):
    """The mean over none is nan; of a label that is out of range the loss is, and others keep their gradient."""
    head = kind(C, D, dtype=torch.float64, validate_labels=False, reduction=reduction)
    x, labels = batch()
    empty = head(x, torch.full_like(labels, -100))
    assert bool(empty.isnan().all()) if reduction == "mean" else not empty.any()
    labels[2] = C
    loss = head(x, labels)
    assert bool(loss.isnan()) if reduction == "mean" else loss.isnan().nonzero().flatten().tolist() == [2]
    dx, dw = gradients(loss.nan_to_num().sum() if reduction == "none" else loss, x, head.weight)
    assert dx.isfinite().all()
    assert dw.isfinite().all()
    assert not dx[2].any()
    assert dx[0].any()


@each_head
def test_a_zero_weight_is_no_sample(kind):
    head, (x, labels) = kind(C, D, dtype=torch.float64), batch()
    weights = torch.ones(N, dtype=torch.float64)
    weights[1] = 0
    others = torch.arange(N) != 1
    got, want = head(x, labels, sample_weight=weights), head(x[others], labels[others])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(got, x, head.weight), gradients(want, x, head.weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@each_head
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, FusedSGD], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_what_an_ignored_sample_holds_reaches_nothing(kind, reduction, optimizer, rubbish):
    head, (x, labels) = kind(C, D, dtype=torch.float64, reduction=reduction), batch()
    twin = kind(C, D, dtype=torch.float64, reduction=reduction)
    twin.load_state_dict(head.state_dict())
    broken = x.detach().clone()
    broken[4] = rubbish
    for model, rows in ((head, x.detach().requires_grad_()), (twin, broken.requires_grad_())):
        step = optimizer(model.parameters(), lr=0.1)
        model(rows, labels).sum().backward()
        step.step()
        assert rows.grad.isfinite().all()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(value, head.state_dict()[name], rtol=0, atol=0)


@each_head
def test_a_weight_of_zero_has_its_gradient(kind):
    """It says what the loss would gain by the sample, which takes no part."""
    head, (x, labels) = kind(C, D, dtype=torch.float64), batch()
    a = torch.linspace(-1, 1, N, dtype=torch.float64)
    a[:3] = 0
    a.requires_grad_()
    each = losses(head, x, labels).detach()
    weights = torch.where(labels >= 0, a, 0)
    want = (each * weights).sum() / weights.sum()
    torch.testing.assert_close(gradients(head(x, labels, sample_weight=a), a), gradients(want, a))


@each_head
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_gradient_that_is_changed_in_place(kind, upstream):
    """Belongs to who asked for it; the next backward has its own."""
    head, (x, labels) = kind(C, D, dtype=torch.float64), batch()
    loss = upstream * head(x, labels)
    inputs = x, head.weight
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    want = [each.clone() for each in first]
    for each in first:
        each.mul_(0)
    for _ in range(2):
        for again, once in zip(torch.autograd.grad(loss, inputs, retain_graph=True), want, strict=True):
            torch.testing.assert_close(again, once, rtol=0, atol=0)
    for last, once in zip(torch.autograd.grad(loss, inputs), want, strict=True):
        torch.testing.assert_close(last, once, rtol=0, atol=0)


@each_head
def test_an_upstream_gradient_that_is_not_finite(kind):
    head, (x, labels) = kind(C, D, dtype=torch.float64), batch()
    (head(x, labels) * math.nan).backward()
    assert x.grad[0].isnan().any()
    assert not x.grad[4].any()


@each_head
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_one_gradient_of_the_weight_at_a_time(kind, upstream):
    """Also where it is multiplied."""
    head = kind(150_000, 64)
    x, labels = torch.randn(4, 64), torch.randint(150_000, (4,))
    size = head.weight.nbytes

    def step() -> None:
        head.weight.grad = None
        (upstream * head(x, labels)).backward()

    assert raised_by(step) < 1.5 * size


@each_head
@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(kind, sample_rate, reentrant):
    """The region runs twice, as with any head, and a sampler draws once."""
    head, (x, labels) = kind(C, D, dtype=torch.float64, sample_rate=sample_rate), batch()
    twin = kind(C, D, dtype=torch.float64, sample_rate=sample_rate)
    twin.load_state_dict(head.state_dict())
    runs = []

    def region(rows: Tensor) -> Tensor:
        runs.append(1)
        return head(torch.tanh(rows), labels)

    got = torch.utils.checkpoint.checkpoint(region, x, use_reentrant=reentrant)
    assert len(runs) == 1
    got.backward()
    assert len(runs) == 2
    ours = x.detach().requires_grad_()
    want = twin(torch.tanh(ours), labels)
    want.backward()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad, ours.grad, rtol=1e-10, atol=1e-12)
    for name, parameter in head.named_parameters():
        grads = (p.grad.to_dense() for p in (parameter, twin.get_parameter(name)))
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@each_head
def test_traced_without_numbers(kind):
    head, (x, labels) = kind(C, D, dtype=torch.float64), batch()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, labels = mode.from_tensor(x.detach()).requires_grad_(), mode.from_tensor(labels)
        head(x, labels).backward()
    assert x.grad.shape == (N, D)
