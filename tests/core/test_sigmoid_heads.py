"""Heads whose classes count each on its own: their losses, settings, statistics and steps."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from support.sigmoids import HEADS, C, D, N, batch, each_head, gradients

from cosface_kernels import (
    FusedSFaceLoss,
    FusedSphereFace2Loss,
    FusedUniFaceLoss,
    margin_softmax_loss,
)
from cosface_kernels.margins import SFaceMargin, SphereFace2Margin, UniFaceMargin
from cosface_kernels.optim import FusedAdamW, FusedSGD


@each_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(kind, dtype):
    head, (x, labels) = kind(C, D, dtype=dtype), batch(dtype)
    twin = kind(C, D, dtype=torch.float64)
    twin.weight.data = head.weight.detach().double()
    ours = x.detach().double().requires_grad_()
    got, want = head(x, labels), twin(ours, labels)
    got.backward()
    want.backward()
    eps = torch.finfo(dtype).eps
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 1e-5
    assert relative_error(x.grad, ours.grad) < 1e-4 + 4 * eps
    assert relative_error(head.weight.grad, twin.weight.grad) < 1e-4 + 4 * eps


@pytest.mark.option("sigmoid")
@each_head
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_backend(backend, kind, reduction):
    """Statistics too, which are a softmax's."""
    head = backend.head(C, D, kind=kind, reduction=reduction)
    twin = kind(C, D, reduction=reduction, backend="reference", dtype=torch.float64, device=backend.device)
    with torch.no_grad():
        twin.weight.copy_(head.weight)
    problem = backend.problem(N, C, D)
    x, ours = problem.x.requires_grad_(), problem.x.detach().double().requires_grad_()
    found = [model(rows, problem.targets, return_stats=2) for model, rows in ((head, x), (twin, ours))]
    (got, got_stats), (want, want_stats) = found
    upstream = torch.linspace(0.5, 2, N, device=backend.device) if reduction == "none" else torch.ones_like(got)
    got.backward(upstream)
    want.backward(upstream.double())
    for a, b in zip((got, x.grad, head.weight.grad), (want, ours.grad, twin.weight.grad), strict=True):
        assert relative_error(a, b) < 2e-5
    if kind is not FusedSFaceLoss:
        assert relative_error(head.margin.bias.grad, twin.margin.bias.grad) < 2e-5
    assert relative_error(got_stats.lse, want_stats.lse) < 1e-5
    assert got_stats.top_k_accuracy == want_stats.top_k_accuracy


@each_head
def test_sampled_classes(kind):
    head, (x, labels) = kind(C, D, dtype=torch.float64, sample_rate=0.3), batch()
    got = head(x, labels)
    dx, dw = gradients(got, x, head.weight)
    assert dw.is_sparse
    chosen = dw.coalesce().indices()[0]
    place = torch.searchsorted(chosen, labels.clamp_min(0)).where(labels >= 0, -100)
    rows = head.weight.detach()[chosen].requires_grad_()
    want = margin_softmax_loss(x, rows, place, margin=head.margin, scale=head.scale)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    want_dx, want_dw = gradients(want, x, rows)
    torch.testing.assert_close(dx, want_dx, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dw.coalesce().values(), want_dw, rtol=1e-10, atol=1e-12)


@each_head
@pytest.mark.parametrize("sample_rate", [1.0, 0.4])
def test_rows_move_in_backward(kind, sample_rate):
    head = kind(C, D, dtype=torch.float64, sample_rate=sample_rate)
    twin = kind(C, D, dtype=torch.float64, sample_rate=sample_rate)
    twin.load_state_dict(head.state_dict())
    ours = FusedSGD(head.parameters(), lr=0.1)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        x, labels = batch()
        for model, optimizer in ((head, ours), (twin, theirs)):
            optimizer.zero_grad()
            model(x, labels).backward()
            optimizer.step()
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_rows_move_by_adamw_and_two_losses_of_one_weight():
    head, (x, labels) = FusedUniFaceLoss(C, D, dtype=torch.float64), batch()
    before = head.weight.detach().clone()
    optimizer = FusedAdamW(head.parameters(), lr=0.1)
    (head(x, labels) + head(2 * x + 1, labels)).backward()  # whose sum no row may move by halves
    assert torch.equal(head.weight, before)
    optimizer.step()
    assert not torch.equal(head.weight, before)


@each_head
def test_statistics(kind):
    head, (x, labels) = kind(C, D, dtype=torch.float64), batch()
    loss, stats = head(x, labels, return_stats=3)
    torch.testing.assert_close(loss, head(x, labels), rtol=0, atol=0)
    cos = F.normalize(x.detach()) @ F.normalize(head.weight.detach()).T
    valid = labels >= 0
    target = cos[valid].gather(1, labels[valid][:, None])[:, 0]
    torch.testing.assert_close(stats.target_cos[valid], target)
    assert stats.accuracy == (cos[valid].argmax(1) == labels[valid]).double().mean()
    assert stats.top_k_accuracy == (cos[valid].topk(3).indices == labels[valid][:, None]).any(1).double().mean()
    assert stats.entropy is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"return_stats": True, "entropy": True}, "entropy must be False, got True"),
        ({"labels": torch.zeros(N, 2, dtype=torch.int64), "sample_weight": torch.ones(N, 2)}, "must be 1, got 2"),
    ],
)
def test_what_only_a_softmax_has(arguments, message):
    head = FusedUniFaceLoss(C, D)
    arguments = {"labels": torch.zeros(N, dtype=torch.int64), **arguments}
    with pytest.raises(ValueError, match=message):
        head(torch.randn(N, D), **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedUniFaceLoss(C, D, gradient_tolerance=0.1), "gradient_tolerance must be 0, got 0.1"),
        (lambda: FusedUniFaceLoss(C, D, label_smoothing=0.1), "label_smoothing must be 0, got 0.1"),
        (lambda: FusedSFaceLoss(C, D, 0.35), "margin must be 0, because SFace has none, got 0.35"),
        (lambda: SphereFace2Margin(num_classes=C, t=5), "t must be an integer from 1 to 4, got 5"),
        (lambda: SphereFace2Margin(num_classes=C, kind="B"), "kind must be 'C', 'A' or 'M', got 'B'"),
        (lambda: SphereFace2Margin(num_classes=C, weighting=1.0), "weighting must be in .0, 1., got 1.0"),
        (lambda: SphereFace2Margin(num_classes=C, weight=0), "weight must be in"),
        (lambda: UniFaceMargin(bias=math.inf), "bias must be in"),
        (lambda: UniFaceMargin(bias=0.0, balance=0.0), "balance must be in"),
        (lambda: SFaceMargin(k=-1.0), "k must be in"),
        (lambda: SFaceMargin(a=math.nan), "a must be in"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("t", [1, 2, 3, 4])
@pytest.mark.parametrize("classes", [1, 2, 10_000_000])
@pytest.mark.parametrize("scale", [1.0, 40.0, 2000.0])
def test_the_first_bias_balances(t, classes, scale):
    """Where all cosines are 0, the target pulls as hard as all others push, as far as float64 can tell."""
    margin = SphereFace2Margin(num_classes=classes, t=t, scale=scale)
    b, g = margin.initial, 2 * 0.5**t - 1
    assert math.isfinite(b)
    pull = margin.weighting * torch.sigmoid(torch.tensor(-(scale * (g - 0.4) + b), dtype=torch.float64))
    push = (1 - margin.weighting) * (classes - 1) * torch.sigmoid(torch.tensor(scale * (g + 0.4) + b).double())
    if classes > 1 and scale <= 40:
        assert float(pull) == pytest.approx(float(push), rel=1e-6)


def test_sample_to_sample():
    """UniTSFace's: the classes are features, of which each has a gradient as well."""
    x, other = (torch.randn(N, D, dtype=torch.float64).requires_grad_() for _ in range(2))
    labels = torch.arange(N)
    margin = UniFaceMargin(0.1, bias=4.0)
    got = margin_softmax_loss(x, other, labels, margin=margin, scale=16.0)
    cos = F.normalize(x) @ F.normalize(other).T
    eye = torch.eye(N, dtype=torch.bool)
    want = torch.where(eye, F.softplus(4 - 16 * (cos - 0.1)), F.softplus(16 * cos - 4)).sum(1).mean()
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(gradients(got, x, other), gradients(want, x, other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_each_epoch_it_learns():
    """The bias too, which begins where the negatives of many classes weigh as much as one target."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(20, 16))
    labels = torch.randint(20, (400,))
    x = centres[labels] + 0.1 * torch.randn(400, 16)
    for kind in HEADS:
        head = kind(20, 16)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
        for _ in range(60):
            loss = head(x, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _, stats = head(x, labels, return_stats=True)
        assert stats.accuracy > 0.95, kind.__name__


@pytest.mark.parametrize("normalize_embeddings", [False, True])
@pytest.mark.parametrize("margin", [UniFaceMargin(0.4, bias=3.0), SphereFace2Margin(num_classes=C)], ids=str)
def test_rows_that_are_not_normalised(margin, normalize_embeddings):
    x, labels = batch()
    w = (0.3 * torch.randn(C, D, dtype=torch.float64)).requires_grad_()
    options = {"normalize_weight": False, "normalize_embeddings": normalize_embeddings}
    got = margin_softmax_loss(x, w, labels, margin=margin, scale=10.0, **options)
    cos, valid = F.normalize(x) @ w.T, labels >= 0
    scale = torch.full((N, 1), 10.0) if normalize_embeddings else 10 * x.norm(dim=1, keepdim=True)
    is_target = F.one_hot(labels.clamp_min(0), C).bool()
    if isinstance(margin, UniFaceMargin):
        terms = torch.where(is_target, F.softplus(3 - scale * (cos - 0.4)), F.softplus(scale * cos - 3))
    else:
        g, b, sign = 2 * ((cos + 1) / 2) ** 3 - 1, margin.bias.detach(), 1 - 2 * is_target.double()
        terms = 50 / scale * (0.5 - 0.2 * sign) * F.softplus(sign * (scale * (g + sign * 0.4) + b))
    want = terms.sum(1)[valid].mean()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    for ours, theirs in zip(gradients(got, x, w), gradients(want, x, w), strict=True):
        assert relative_error(ours, theirs) < 1e-8


@each_head
def test_made_on_meta(kind):
    head, (x, labels) = kind(C, D, dtype=torch.float64), batch()
    want = head(x, labels)
    emptied = kind(C, D, dtype=torch.float64, device="meta").to_empty(device="cpu")
    emptied.reset_parameters()
    emptied.load_state_dict(head.state_dict())
    assigned = kind(C, D, dtype=torch.float64, device="meta")
    assigned.load_state_dict(head.state_dict(), assign=True)
    for other in (emptied, assigned):
        torch.testing.assert_close(other(x, labels), want, rtol=0, atol=0)


@each_head
def test_another_dtype_rounds_the_weight_alone(kind):
    head = kind(C, D)
    before = {name: value.clone() for name, value in head.margin.state_dict().items()}
    head.bfloat16().to(torch.float16).float()
    for name, value in head.margin.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedUniFaceLoss(C, D, sample_rate=0), r"sample_rate must be in \(0, 1\], got 0"),
        (lambda: FusedUniFaceLoss(C, D, sample_rate=None), r"sample_rate must be in \(0, 1\], got None"),
        (lambda: FusedUniFaceLoss(-C, D), f"num_classes must be a positive integer, got -{C}"),
        (lambda: FusedSphereFace2Loss(0, D), "num_classes must be a positive integer, got 0"),
        (lambda: FusedSphereFace2Loss(C, D, scale=torch.ones(3)), r"scale of a head must be .*, got shape \(3,\)"),
        (lambda: FusedSphereFace2Loss(C, D, scale=-3), "scale must be positive and finite, got -3"),
        (lambda: FusedSphereFace2Loss(C, D, t=True), "t must be an integer from 1 to 4, got True"),
    ],
)
def test_what_the_bias_starts_from(make, message):
    with pytest.raises(ValueError, match=message):
        make()
