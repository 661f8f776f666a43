"""FusedCosFaceLoss: its weight, its options, and how it sits in a model."""

import copy
import inspect
import io
from typing import get_type_hints

import pytest
import torch
import torch.nn.functional as F
from support import DEFAULT_DEVICE, relative_error

import cosface_kernels
from cosface_kernels import FusedCosFaceLoss, FusedMarginLoss, cosface_loss
from cosface_kernels.loss import HeadOptions


def _head(backend, **options):
    """A head and a batch for it."""
    head = backend.head(50, 16, **options)
    return head, torch.randn(8, 16, device=backend.device), torch.randint(50, (8,), device=backend.device)


def test_signature():
    parameters = inspect.signature(FusedCosFaceLoss).parameters
    assert list(parameters)[:4] == ["num_classes", "embedding_size", "margin", "scale"]
    assert (parameters["margin"].default, parameters["scale"].default) == (0.35, 64.0)
    options = inspect.signature(FusedMarginLoss).parameters  # which FusedCosFaceLoss passes on
    assert list(options)[:4] == list(parameters)[:4]
    keyword_only = [name for name, p in options.items() if p.kind is p.KEYWORD_ONLY]
    assert {"reduction", "ignore_index", "backend", "device", "dtype"} <= set(keyword_only)
    hints = get_type_hints(FusedMarginLoss.__init__)
    # by which an editor knows what the family passes on
    assert {name: hints[name] for name in keyword_only} == get_type_hints(HeadOptions)
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = list(inspect.signature(pml.LargeMarginSoftmaxLoss).parameters)  # the base of their CosFaceLoss
    assert theirs[:4] == list(parameters)[:4]
    assert {"FusedCosFaceLoss", "cosface_loss", "margin_softmax_loss", "LossStats", "__version__"} <= set(
        cosface_kernels.__all__
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": 0.2, "scale": 30.0},
        {"reduction": "none"},
        {"reduction": "sum", "ignore_index": 3},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_is_the_functional_form(backend, options):
    head, x, labels = _head(backend, **options)
    functional = {k: v for k, v in options.items() if k != "dtype"}
    want = cosface_loss(x, head.weight, labels, backend=backend.name, **functional)
    assert torch.equal(head(x, labels), want)
    assert head.weight.dtype == options.get("dtype", torch.float32)
    assert head.weight.shape == (50, 16)


@pytest.mark.float64
@pytest.mark.parametrize("margin", [0.35, 0.2])
@pytest.mark.parametrize("scale", [64.0, 10.0])
def test_swaps_with_pytorch_metric_learning(backend, scale, margin):
    """The same loss and gradients with their weight, which is (D, C), turned."""
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    double = {"dtype": torch.float64, "device": backend.device}
    with DEFAULT_DEVICE:
        theirs = pml.CosFaceLoss(num_classes=50, embedding_size=16, margin=margin, scale=scale).to(**double)
    ours = backend.head(50, 16, margin=margin, scale=scale, dtype=torch.float64)
    with torch.no_grad():
        ours.weight.copy_(theirs.W.T)
    x, labels = torch.randn(8, 16, requires_grad=True, **double), torch.randint(50, (8,), device=backend.device)
    with DEFAULT_DEVICE:
        want = theirs(x, labels)
    want_dx, want_dw = torch.autograd.grad(want, (x, theirs.W))
    got = ours(x, labels)
    got_dx, got_dw = torch.autograd.grad(got, (x, ours.weight))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(got_dx, want_dx, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got_dw, want_dw.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logits_are_scaled_cosines(weight_dtype):
    head, x = FusedCosFaceLoss(20000, 8, scale=30.0, dtype=weight_dtype), torch.randn(8, 8)
    logits = head.get_logits(x)
    assert logits.dtype == (torch.float64 if weight_dtype == torch.float64 else torch.float32)
    assert logits.shape == (8, 20000)
    want = 30 * F.normalize(x.double()) @ F.normalize(head.weight.double()).T
    torch.testing.assert_close(logits.double(), want, rtol=1e-5, atol=1e-4)


def test_logits_agree_with_the_loss(backend):
    head, x, labels = _head(backend, margin=0.0, scale=12.0)
    torch.testing.assert_close(head(x, labels), F.cross_entropy(head.get_logits(x), labels))


def test_statistics(backend):
    head, x, labels = _head(backend, scale=12.0)
    labels[:2] = head.get_logits(x).argmax(1)[:2]
    loss, stats = head(x, labels, return_stats=True)
    logits = head.get_logits(x)
    assert torch.equal(loss, head(x, labels))
    assert stats._fields[:4] == ("lse", "target_cos", "max_negative_cos", "accuracy")
    torch.testing.assert_close(stats.target_cos * 12, logits.gather(1, labels[:, None])[:, 0])
    assert stats.accuracy.item() == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert stats[4:] == (None, None, None)
    assert not any(t.requires_grad for t in stats[:4])


def test_scale_parameter_learns(backend):
    scale = torch.nn.Parameter(torch.tensor(20.0, device=backend.device))
    head, x, labels = _head(backend, scale=scale)
    assert {name for name, _ in head.named_parameters()} == {"weight", "scale"}
    head(x, labels).backward()
    step = 1e-2
    x64, w64 = x.double(), head.weight.detach().double()
    slope = cosface_loss(x64, w64, labels, scale=20 + step) - cosface_loss(x64, w64, labels, scale=20 - step)
    assert head.scale.grad.item() == pytest.approx(slope.item() / (2 * step), rel=1e-4)


def test_repr():
    text = repr(FusedCosFaceLoss(50, 16, 0.25, 30.0))
    for part in ("FusedCosFaceLoss(", "num_classes=50", "embedding_size=16", "margin=0.25", "scale=30.0"):
        assert part in text


def test_state_dict_round_trip(backend, tmp_path):
    head, x, labels = _head(backend)
    assert set(head.state_dict()) == {"weight"}
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = backend.head(50, 16)
    assert not torch.equal(other(x, labels), head(x, labels))
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert torch.equal(other(x, labels), head(x, labels))
    with pytest.raises(RuntimeError, match="weight is of 50 classes in the state and of 51 in the head"):
        backend.head(51, 16).load_state_dict(head.state_dict())


def test_copies_and_pickles(backend):
    head, x, labels = _head(backend)
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(head), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x, labels), head(x, labels))
        with torch.no_grad():
            twin.weight.add_(torch.randn_like(twin.weight))
        assert not torch.equal(twin(x, labels), head(x, labels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moves_to_another_dtype(backend, dtype):
    head, x, labels = _head(backend)
    want = head(x, labels)
    head.to(dtype)
    assert head.weight.dtype == dtype
    assert relative_error(head(x, labels), want) < 8 * torch.finfo(dtype).eps + 1e-6


def test_training_and_evaluation_mode_are_alike(backend):
    head, x, labels = _head(backend)
    assert torch.equal(head.train()(x, labels), head.eval()(x, labels))


def test_meta_device_allocates_nothing_and_can_be_filled():
    head = FusedCosFaceLoss(10**9, 512, device="meta")  # 2 TB
    assert head.weight.is_meta
    small = FusedCosFaceLoss(50, 16, device="meta").to_empty(device="cpu")
    torch.manual_seed(5)
    small.reset_parameters()
    torch.manual_seed(5)
    assert torch.equal(small.weight, FusedCosFaceLoss(50, 16).weight)


def test_forward_on_meta_tensors_gives_shapes():
    head = FusedCosFaceLoss(50, 16, device="meta", reduction="none")
    loss = head(torch.empty(8, 16, device="meta"), torch.empty(8, dtype=torch.int64, device="meta"))
    assert loss.is_meta
    assert loss.shape == (8,)


def test_optimizer_step_on_the_weight(backend):
    head, x, labels = _head(backend, scale=16.0)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    before = head(x, labels)
    for _ in range(20):
        optimizer.zero_grad()
        head(x, labels).backward()
        optimizer.step()
    assert head(x, labels) < 0.5 * before


def test_hooks(backend):
    head, x, labels = _head(backend)
    calls = []
    head.register_forward_pre_hook(lambda module, args: calls.append("before"))
    head.register_forward_hook(lambda module, args, out: calls.append("after"))
    head.register_full_backward_hook(lambda module, g_in, g_out: calls.append(g_in[0].shape))
    x.requires_grad_()
    head(x, labels).backward()
    assert calls == ["before", "after", (8, 16)]


@pytest.fixture(scope="module")
def drawn():
    torch.manual_seed(1)
    return FusedCosFaceLoss(20011, 67).weight.detach().double()  # sizes that divide into no block


def test_initial_weight_is_normal(drawn):
    """Mean, spread, skewness, kurtosis and the whole distribution, each within 5 standard errors."""
    n, z = drawn.numel(), drawn.flatten() / 0.01
    assert abs(z.mean().item()) < 5 / n**0.5
    assert abs(z.square().mean().item() - 1) < 5 * (2 / n) ** 0.5
    assert abs(z.pow(3).mean().item()) < 5 * (15 / n) ** 0.5
    assert abs(z.pow(4).mean().item() - 3) < 5 * (96 / n) ** 0.5
    assert 4.5 < z.abs().max().item() < 7
    uniform = torch.special.ndtr(z.sort().values)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (uniform - steps).abs().max().item() < 2 / n**0.5  # Kolmogorov-Smirnov, p < 1e-3


def test_initial_rows_and_columns_are_independent(drawn):
    rows = drawn.shape[0]
    z = drawn / 0.01
    assert torch.unique(drawn, dim=0).shape[0] == rows, "two classes start at the same centre"
    assert torch.unique(drawn[:, :2], dim=0).shape[0] > 0.999 * rows
    column_correlation = z.T @ z / rows
    off_diagonal = column_correlation - torch.diag(column_correlation.diagonal())
    assert off_diagonal.abs().max().item() < 6 / rows**0.5
    flat = z.flatten()
    for lag in (*range(1, 20), 64, 67, 128, 256, 512, 1024, 4096, 65536):
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < 6 / flat.numel() ** 0.5, f"lag {lag}"
        squares = (flat[lag:].square() - 1) * (flat[:-lag].square() - 1)
        assert abs(squares.mean().item()) < 6 * 2 / flat.numel() ** 0.5, f"squares at lag {lag}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_initial_weight_of_every_dtype(dtype):
    torch.manual_seed(2)
    weight = FusedCosFaceLoss(4000, 50, dtype=dtype).weight.detach()
    assert weight.dtype == dtype
    assert weight.double().std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(weight.double().mean().item()) < 5 * 0.01 / weight.numel() ** 0.5


def test_initial_weight_depends_on_the_seed_alone(restore_threads):
    weights = {}
    for seed in (0, 1, 2**31):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(seed)
            weights[seed, threads] = FusedCosFaceLoss(3001, 33).weight.detach()
    for seed in (0, 1, 2**31):
        assert torch.equal(weights[seed, 1], weights[seed, 2])
        assert torch.equal(weights[seed, 1], weights[seed, 5])
    assert (weights[0, 1] == weights[1, 1]).float().mean() < 1e-3
    assert (weights[0, 1] == weights[2**31, 1]).float().mean() < 1e-3


def test_heads_made_one_after_the_other_differ():
    torch.manual_seed(0)
    first, second = FusedCosFaceLoss(100, 33).weight, FusedCosFaceLoss(100, 33).weight
    assert (first == second).float().mean() < 1e-3
    first.data.zero_()
    head = FusedCosFaceLoss(100, 33)
    before = head.weight.detach().clone()
    head.reset_parameters()
    assert (head.weight == before).float().mean() < 1e-3


def test_labels_repeat_and_weight_gradient_has_its_dtype(backend):
    for dtype in (torch.float32, torch.bfloat16):
        head, x, labels = _head(backend, dtype=dtype)
        head(x, torch.full_like(labels, 7)).backward()
        assert head.weight.grad.dtype == dtype
        assert head.weight.grad[7].any()
