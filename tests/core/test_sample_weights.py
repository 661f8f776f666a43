"""What weighs samples: classes, and the tuples of miners; against float64 and pytorch-metric-learning's own."""

import pytest
import torch
import torch.nn.functional as F

from cosface_kernels import FusedCosFaceLoss, margin_softmax_loss
from cosface_kernels.sample_weights import of_tuples

C, D, N = 9, 6, 8


def _batch(backend):
    x = torch.randn(N, D, device=backend.device)
    return x, torch.tensor([0, 3, 3, 8, -100, 2, 5, 0], device=backend.device)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_class_weight_is_that_of_cross_entropy(backend, reduction):
    """At margin 0 the loss is the cross-entropy of scaled cosines."""
    weight = torch.rand(C, device=backend.device) + 0.1
    head = backend.head(C, D, margin=0.0, scale=10.0, reduction=reduction, class_weight=weight)
    x, labels = _batch(backend)
    x.requires_grad_()
    loss = head(x, labels)
    loss.sum().backward()
    ours = x.grad.clone(), head.weight.grad.clone()
    x.grad = head.weight.grad = None
    logits = 10.0 * F.normalize(x.double()) @ F.normalize(head.weight.double()).T
    want = F.cross_entropy(logits, labels, weight=weight.double().to(x.device), reduction=reduction)
    want.sum().backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    for got, expected in zip(ours, (x.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_class_weight_is_saved_and_moves_with_the_head():
    head = FusedCosFaceLoss(C, D, class_weight=range(C))
    assert head.state_dict()["class_weight"].tolist() == list(range(C))
    assert "class_weight" not in FusedCosFaceLoss(C, D).state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_another_dtype_of_the_head_leaves_class_weights_alone(dtype):
    values = torch.tensor([1e-9, 1.003, 1e9]).repeat(C)[:C]
    head = FusedCosFaceLoss(C, D, class_weight=values).to(dtype)
    assert head.weight.dtype == dtype
    for each in (head, head.float(), FusedCosFaceLoss(C, D, class_weight=values, dtype=dtype)):
        assert each.class_weight.dtype == torch.float32
        assert torch.equal(each.class_weight, values)
    assert head.to("meta", torch.float16).class_weight.is_meta


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0] * 8, r"class_weight must hold 9 numbers, got shape \(8,\)"),
        ([1.0] * 8 + [-0.5], r"finite and at least 0, got -0\.5"),
        ([1.0] * 8 + [float("nan")], "finite and at least 0, got nan"),
        ([1.0] * 8 + [float("inf")], "finite and at least 0, got inf"),
        (torch.full((9,), 1e300, dtype=torch.float64), "finite and at least 0, got inf"),
    ],
)
def test_refuses_class_weights(values, message):
    with pytest.raises(ValueError, match=message):
        FusedCosFaceLoss(C, D, class_weight=values)


def test_the_function_refuses_class_weights_of_other_classes():
    with pytest.raises(ValueError, match=r"class_weight must hold 9 numbers, got shape \(3,\)"):
        margin_softmax_loss(
            torch.ones(2, D), torch.ones(C, D), torch.tensor([0, 8]), margin=0.1, class_weight=torch.ones(3)
        )


def test_class_weights_of_a_short_format_sum_in_float32():
    """Their sum, 240000, is no float16."""
    head = FusedCosFaceLoss(C, D, class_weight=[3e4] * C).half()
    x, labels = torch.randn(N, D).half(), torch.zeros(N, dtype=torch.long)
    want = margin_softmax_loss(x, head.weight, labels, margin=0.35)
    torch.testing.assert_close(head(x, labels), want)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_tuples_weigh_as_in_pytorch_metric_learning(count):
    utils = pytest.importorskip("pytorch_metric_learning.utils.loss_and_miner_utils")
    labels = torch.zeros(20, dtype=torch.long)
    tuples = tuple(torch.randint(20, (7,)) for _ in range(count)) or (torch.empty(0, dtype=torch.long),) * 3
    want = utils.convert_to_weights(tuples, labels, torch.float64)
    assert torch.equal(of_tuples(tuples, labels, torch.float64), want)


def test_all_weights_multiply(backend):
    x, labels = _batch(backend)
    miner = tuple(torch.tensor([[0, 0, 5], [7, 7, 6], [1, 5, 1]], device=x.device))
    own, of_class = torch.rand(N, device=x.device), torch.rand(C, device=x.device)
    product = own * of_class[labels.clamp_min(0)] * of_tuples(miner, labels, torch.float32)
    head = backend.head(C, D, class_weight=of_class)
    got = head(x, labels, miner, sample_weight=own)
    want = margin_softmax_loss(x, head.weight, labels, margin=0.35, backend=backend.name, sample_weight=product)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("tuples", "message"),
    [
        (True, "must be what a miner gives, .* got bool; return_stats and sample_weight are keyword"),
        (torch.ones(3), "must be what a miner gives, .* got Tensor"),
        ((), "must be what a miner gives, .* got tuple"),
        ((torch.tensor([0, 8]),), r"positions in \[0, 8\), got 8"),
        ((torch.tensor([0, -1]),), r"positions in \[0, 8\), got -1"),
        ((torch.tensor([0.0]),), "must hold integers, got torch.float32"),
    ],
    ids=str,
)
def test_refuses_tuples(tuples, message):
    head = FusedCosFaceLoss(C, D)
    with pytest.raises(ValueError, match=message):
        head(torch.randn(N, D), torch.zeros(N, dtype=torch.long), tuples)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 60_000.0), (torch.bfloat16, 1.0)], ids=str)
def test_weights_in_16_bits_are_summed_in_float32(dtype, value):
    """Their sum, 301 times the value, overflows in float16 and is rounded to 302 in bfloat16."""
    head, x, labels = FusedCosFaceLoss(C, D), torch.randn(301, D), torch.randint(C, (301,))
    got = head(x, labels, sample_weight=torch.full((301,), value, dtype=dtype))
    torch.testing.assert_close(got, head(x, labels), rtol=1e-5, atol=0)
