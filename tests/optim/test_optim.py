"""Rows that move inside backward, step for step beside torch.optim."""

import math

import pytest
import torch
from support.rules import RULES, C, D, batches, make_head, train
from torch import nn

from cosface_kernels import FusedCosFaceLoss, FusedCurricularFaceLoss, FusedUniFaceLoss, cosface_loss
from cosface_kernels.backends import BACKENDS
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.options import Options, Update


def relative_error(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("fused", "torchs", "options"), RULES)
def test_equals_torch_on_the_same_gradients(fused, torchs, options, dtype):
    """100 steps, element by element, in ulps of the largest value that the element has had."""
    heads = make_head(dtype), make_head(dtype)
    optimizers = fused([heads[0].weight], accumulate=True, **options), torchs([heads[1].weight], **options)
    largest = heads[0].weight.detach().abs()
    for _ in range(100):
        gradient = torch.randn(C, D, dtype=dtype)
        for head, optimizer in zip(heads, optimizers, strict=True):
            head.weight.grad = gradient.clone()
            optimizer.step()
        largest = largest.maximum(heads[1].weight.detach().abs())
    ulps = (heads[0].weight - heads[1].weight).detach().abs() / largest / torch.finfo(dtype).eps
    assert float(ulps.square().mean().sqrt()) < 4
    assert float(ulps.max()) < 32
    theirs, mine = (o.state[head.weight] for o, head in zip(optimizers[::-1], heads[::-1], strict=True))
    for name, values in theirs.items():
        if isinstance(values, torch.Tensor) and values.dim():
            torch.testing.assert_close(mine[name], values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("fused", "torchs", "options"), RULES)
def test_training_is_torchs_for_100_steps(fused, torchs, options, dtype):
    """Weights and the gradients of the embeddings, which see the weight before it moves."""
    head, other = make_head(dtype), make_head(dtype)
    dx = train(head, fused(head.parameters(), **options), 100, dtype)
    want = train(other, torchs(other.parameters(), **options), 100, dtype)
    assert relative_error(head.weight.detach(), other.weight.detach()) < 100 * torch.finfo(dtype).eps
    assert relative_error(dx, want) < 1000 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [1, 300, 520])
@pytest.mark.parametrize("dim", [1, 31, 64])
@pytest.mark.parametrize("num_classes", [1, 83, 700])
def test_one_step_is_torchs_to_an_ulp(num_classes, dim, rows):
    sizes = {"rows": rows, "num_classes": num_classes, "dim": dim}
    head, other = make_head(num_classes=num_classes, dim=dim), make_head(num_classes=num_classes, dim=dim)
    train(head, FusedSGD(head.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1), 1, **sizes)
    train(other, torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1), 1, **sizes)
    torch.testing.assert_close(head.weight, other.weight, rtol=4e-7, atol=1e-6)


def test_weight_and_embeddings_of_different_dtypes():
    head, other = make_head(), make_head()
    double = train(head, FusedSGD(head.parameters(), lr=0.3, momentum=0.9), 5, torch.float64)
    want = train(other, torch.optim.SGD(other.parameters(), lr=0.3, momentum=0.9), 5, torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head.weight, other.weight, rtol=1e-6, atol=1e-6)


def test_gradient_of_embeddings_sees_the_weight_before_the_step():
    head = make_head()
    before = head.weight.detach().clone()
    ((x, labels),) = batches(1)
    x.requires_grad_()
    FusedSGD(head.parameters(), lr=100.0)
    optimizer = FusedSGD(head.parameters(), lr=100.0)
    head(x, labels).backward()
    optimizer.step()
    y = x.detach().requires_grad_()
    cosface_loss(y, before, labels, scale=16.0, backend="cpu").backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-9)


def test_frozen_embeddings_and_learned_scale():
    scale = nn.Parameter(torch.tensor(16.0))
    heads = [FusedCosFaceLoss(C, D, scale=nn.Parameter(scale.detach().clone()), backend="cpu") for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    optimizer = FusedSGD([heads[0].weight], lr=0.1)
    theirs = torch.optim.SGD([heads[1].weight], lr=0.1)
    for x, labels in batches(3):
        for head, each in zip(heads, (optimizer, theirs), strict=True):
            each.zero_grad()
            head.scale.grad = None
            head(x, labels).backward()
            each.step()
        torch.testing.assert_close(heads[0].scale.grad, heads[1].scale.grad)
    torch.testing.assert_close(heads[0].weight, heads[1].weight)


def test_opcheck_update():
    x, w, state = torch.randn(3, 4), torch.randn(6, 4), [torch.zeros(6, 4)]
    rows = [torch.rand(3) for _ in range(5)]
    update = Update("sgd", 1, 0, 1.0, math.inf, 0.1, 0.0, 0.9)
    cache = torch.empty(0, dtype=torch.uint8)
    targets = torch.tensor([0, 5, -1])
    arguments = (x, w, targets, *rows, cache, state, None, *update.flat(), True, "cpu", None, 0)
    torch.library.opcheck(torch.ops.cosface.lmcl_backward_update_, arguments)
    torch.library.opcheck(torch.ops.cosface.apply_update_, (w, torch.rand(6, 4), state, *update.flat(), "cpu"))


def test_a_refused_call_moves_nothing():
    head = make_head(backend="reference", cache_bytes=2**20)
    FusedSGD(head.parameters(), lr=0.1)
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    ((x, labels),) = batches(1)
    with pytest.raises(RuntimeError, match="option 'cache_bytes' is not on this backend yet"):
        head(x, labels)
    optimizer.step()


def test_learning_rate_schedule():
    heads = make_head(), make_head()
    optimizers = FusedSGD(heads[0].parameters(), lr=0.5), torch.optim.SGD(heads[1].parameters(), lr=0.5)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in optimizers]
    for _ in range(4):
        for head, optimizer, scheduler in zip(heads, optimizers, schedulers, strict=True):
            train(head, optimizer, 1)
            scheduler.step()
    assert optimizers[0].param_groups[0]["lr"] == 0.5 / 16
    torch.testing.assert_close(heads[0].weight, heads[1].weight)


def test_closure():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    ((x, labels),) = batches(1)

    def closure():
        optimizer.zero_grad()
        loss = head(x, labels)
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(3)]
    assert losses[2] < losses[0]


def test_without_gradients_nothing_moves():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    ((x, labels),) = batches(1)
    before = head.weight.detach().clone()
    with torch.no_grad():
        head(x, labels)
    head.weight.requires_grad_(False)
    head(x.requires_grad_(), labels).backward()
    optimizer.step()
    assert torch.equal(head.weight, before)


def test_compiled_model_moves_the_rows():
    torch._dynamo.reset()
    head, other = make_head(), make_head()
    compiled = torch.compile(head, backend="eager")
    train(compiled, FusedSGD(head.parameters(), lr=0.1), 2)
    train(other, FusedSGD(other.parameters(), lr=0.1), 2)
    torch.testing.assert_close(head.weight, other.weight)
    torch.compile(make_head(), backend="eager", fullgraph=True)(*next(batches(1))).backward()  # has no owner


def _step(net, head, optimizer, x, labels):
    optimizer.zero_grad()
    loss = head(net(x), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    ("fused", "torchs", "options"),
    [(FusedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (FusedAdamW, torch.optim.AdamW, {"lr": 0.01})],
)
@pytest.mark.parametrize("kind", [FusedCosFaceLoss, FusedCurricularFaceLoss, FusedUniFaceLoss])
def test_a_compiled_step_is_torchs(kind, fused, torchs, options):
    """Of every call, the first of which is what Python that runs inside backward would be compiled for."""
    torch._dynamo.reset()
    runs = []
    for optimizer, wrap in ((fused, lambda step: torch.compile(step, backend="aot_eager")), (torchs, lambda s: s)):
        torch.manual_seed(7)
        net, head, step = nn.Linear(16, 16), kind(40, 16), wrap(_step)
        both = optimizer([*net.parameters(), *head.parameters()], **options)
        losses = [step(net, head, both, torch.randn(8, 16), torch.randint(40, (8,))) for _ in range(3)]
        runs.append((torch.stack(losses), *net.parameters(), *head.parameters()))
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [FusedCosFaceLoss, FusedUniFaceLoss])
@pytest.mark.parametrize("fused", [FusedSGD, FusedAdamW])
def test_compiled_autograd_is_refused_or_moves_as_torch(fused, kind):
    """It would skip what ends backward, after the rows have moved."""
    torch._dynamo.reset()
    head, other = kind(40, 16), kind(40, 16)
    other.load_state_dict(head.state_dict())
    x, labels = torch.randn(8, 16, requires_grad=True), torch.randint(40, (8,))

    with torch._dynamo.config.patch(compiled_autograd=True):
        backward = torch.compile(torch.Tensor.backward, backend="aot_eager")
        owner = fused(head.parameters(), lr=0.1)
        with pytest.raises(RuntimeError, match="whose end compiled autograd skips"):
            backward(head(x, labels))
        assert torch.equal(head.weight, other.weight)
        owner = fused(head.parameters(), lr=0.1, accumulate=True)
        owner.zero_grad()
        backward(head(x, labels))
        owner.step()
    optimizer = fused(other.parameters(), lr=0.1)
    other(x, labels).backward()
    optimizer.step()
    torch.testing.assert_close(head.weight, other.weight)


@pytest.mark.parametrize(
    ("message", "construct"),
    [
        ("lr must not be negative, got -1", lambda w: FusedSGD([w], lr=-1)),
        ("momentum must not be negative, got -0.1", lambda w: FusedSGD([w], momentum=-0.1)),
        ("max_row_norm must not be negative, got nan", lambda w: FusedSGD([w], max_row_norm=math.nan)),
        ("weight_norm must be None, or positive and finite, got 0", lambda w: FusedSGD([w], weight_norm=0)),
        (
            "weight_norm must be None, or positive and finite, got inf",
            lambda w: FusedAdamW([w], weight_norm=math.inf),
        ),
        ("float8_e4m3fn, got torch.float16", lambda w: FusedSGD([w], state_dtype=torch.float16)),
        ("nesterov needs a positive momentum", lambda w: FusedSGD([w], nesterov=True)),
        (r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)", lambda w: FusedAdamW([w], betas=(0.9, 1.0))),
        (r"betas must be two numbers in \[0, 1\), got \(0.9,\)", lambda w: FusedAdamW([w], betas=(0.9,))),
        ("state_dtype must be .* got torch.float16", lambda w: FusedSGD([w], state_dtype=torch.float16)),
        ("nonfinite must be one of raise, skip, got 'ignore'", lambda w: FusedSGD([w], nonfinite="ignore")),
    ],
)
def test_refuses(message, construct):
    with pytest.raises(ValueError, match=message):
        construct(nn.Parameter(torch.ones(5, 2)))


def test_options_of_a_backend_say_whether_it_moves_rows():
    x, w = torch.ones(1, 2), torch.ones(3, 2)
    for name, backend in BACKENDS.items():
        if not backend.unavailable() and not backend.unsupported(x, w, Options()):
            taken = backend.unsupported(x, w, Options(updates=True)) is None
            assert taken == hasattr(backend, "backward_update_"), name
