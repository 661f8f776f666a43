"""Heads with several centres of a class: their loss, what they find, and how they become plain heads."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from support import DEFAULT_DEVICE, relative_error
from torch import Tensor

from cosface_kernels import (
    FusedCosFaceLoss,
    FusedCurricularFaceLoss,
    FusedLSoftmaxLoss,
    FusedMarginLoss,
    FusedSoftmaxLoss,
    FusedSubCenterArcFaceLoss,
    checkpoint,
    cosface_loss,
    margin_softmax_loss,
)
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.sampling import ClassSampler

pytestmark = pytest.mark.option("subcenters")

C, D, K = 40, 12, 3


def _batch(backend, samples: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, D, device=backend.device)
    return x, torch.randint(C, (samples,), device=backend.device)


def _head(backend, kind: type[FusedMarginLoss] = FusedSubCenterArcFaceLoss, **options) -> FusedMarginLoss:
    with torch.device(backend.device):  # for the margin's state
        return backend.head(C, D, kind=kind, subcenters=K, init_std=1.0, **options)


def _cosines(x: Tensor, w: Tensor) -> Tensor:
    return (F.normalize(x) @ F.normalize(w).T).view(len(x), -1, K).max(2).values


def _check_same(loss: Tensor, want: Tensor, *leaves: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(loss, want, rtol=tolerance, atol=tolerance)
    for g, r in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert relative_error(g, r) < tolerance * 10


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_is_cross_entropy_over_the_nearest_centres(backend, label_smoothing, weighted):
    class_weight = torch.linspace(0.5, 2, C, device=backend.device) if weighted else None
    head = _head(backend, FusedCosFaceLoss, label_smoothing=label_smoothing, class_weight=class_weight, scale=16.0)
    x, labels = _batch(backend)
    x.requires_grad_()
    logits = 16 * (_cosines(x, head.weight) - 0.35 * F.one_hot(labels, C))
    losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    a = torch.ones_like(losses) if class_weight is None else class_weight[labels]
    _check_same(head(x, labels), (a * losses).sum() / a.sum(), x, head.weight)


def test_two_labels_of_a_sample(backend):
    head = _head(backend, FusedCosFaceLoss, scale=16.0)
    x, labels = _batch(backend)
    both, a = torch.stack([labels, (labels + 7) % C], 1), torch.rand(len(x), 2, device=backend.device)
    logits = 16 * _cosines(x, head.weight)
    losses = [
        F.cross_entropy(logits - 16 * 0.35 * F.one_hot(each, C), each, reduction="none") for each in both.unbind(1)
    ]
    want = (a * torch.stack(losses, 1)).sum() / a.sum()
    _check_same(head(x, both, sample_weight=a), want, head.weight)


def test_hard_negatives(backend):
    """The threshold of CurricularFace is of the target's cosine, that of its nearest centre."""
    head = _head(backend, FusedCurricularFaceLoss, scale=8.0)
    x, labels = _batch(backend)
    x = x + 2 * head.weight.detach()[labels * K + 1]
    cos = _cosines(x, head.weight)
    target = cos.gather(1, labels[:, None])
    t = 0.01 * target.mean().detach()
    psi = (target.acos() + 0.5).cos()
    hard = torch.where(cos > psi, cos * (t + cos), cos)
    want = F.cross_entropy(8 * hard.scatter(1, labels[:, None], psi), labels)
    _check_same(head(x, labels), want, head.weight)


def test_class_margins(backend):
    margins = torch.linspace(0, 0.6, C, device=backend.device)
    head = backend.head(C, D, margins, 16.0, kind=FusedMarginLoss, subcenters=K, init_std=1.0)
    x, labels = _batch(backend)
    logits = 16 * (_cosines(x, head.weight) - margins[labels][:, None] * F.one_hot(labels, C))
    _check_same(head(x, labels), F.cross_entropy(logits, labels), head.weight)


def test_statistics_logits_and_nearest_classes(backend):
    head = _head(backend)
    x, labels = _batch(backend, 64)
    cos = _cosines(x, head.weight)
    _, stats = head(x, labels, return_stats=5, entropy=True)
    others = cos.scatter(1, labels[:, None], -torch.inf)
    torch.testing.assert_close(stats.target_cos, cos.gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(stats.max_negative_cos, others.amax(1))
    assert stats.accuracy.item() == pytest.approx((cos.argmax(1) == labels).float().mean().item())
    top = (cos.topk(5).indices == labels[:, None]).any(1).float().mean()
    assert stats.top_k_accuracy.item() == pytest.approx(top.item())
    p = (64 * cos).softmax(1)
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(head.get_logits(x), 64 * cos)
    for k in (1, 5, C):
        found = head.topk(x, k)
        want = cos.topk(k)
        torch.testing.assert_close(found.cosines, want.values)
        assert torch.equal(found.classes, want.indices)
    for k in (0, C + 1, 2.5, None):
        with pytest.raises(ValueError, match="k must be"):
            head.topk(x, k)


def test_sampled_classes_are_whole(backend):
    head = _head(backend, sample_rate=0.25, sample_seed=3, reduction="none")
    x, labels = _batch(backend)
    classes, positions = ClassSampler(C, 0.25, 3, device=backend.device)(labels)
    losses = head(x, labels)
    cos = _cosines(x, head.weight)[:, classes]
    target = cos.gather(1, positions[:, None])
    logits = cos.scatter(1, positions[:, None], (target.acos() + 0.5).cos())
    torch.testing.assert_close(
        losses, F.cross_entropy(64 * logits, positions, reduction="none"), rtol=1e-4, atol=1e-4
    )
    losses.sum().backward()
    moved = head.weight.grad.to_dense().view(C, K, D).abs().sum((1, 2)).nonzero()[:, 0]
    assert set(moved.tolist()) <= set(classes.tolist())


@pytest.mark.option("updates")
@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_rows_move_inside_backward(backend, sample_rate):
    heads = [_head(backend, FusedCosFaceLoss, scale=8.0, sample_rate=sample_rate) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    optimizers = FusedSGD(heads[0].parameters(), lr=0.5), torch.optim.SGD(heads[1].parameters(), lr=0.5)
    for _ in range(3):
        x, labels = _batch(backend)
        for head, optimizer in zip(heads, optimizers, strict=True):
            optimizer.zero_grad()
            head(x, labels).backward()
            optimizer.step()
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-4, atol=1e-5)


def test_compiles_into_one_graph(backend):
    torch.compiler.reset()
    head = _head(backend)
    x, labels = _batch(backend)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    loss = compiled(x, labels)
    torch.testing.assert_close(loss, head(x, labels))
    want = torch.autograd.grad(head(x, labels), head.weight)[0]
    loss.backward()
    torch.testing.assert_close(head.weight.grad, want)


def test_learns_from_noisy_classes_and_drops_what_is_not_dominant(backend):
    """Of each class a fifth of the samples lies elsewhere: one centre ends among the others."""
    generator = torch.Generator().manual_seed(0)
    to = {"device": "cpu", "generator": generator}
    clean, noise = (F.normalize(torch.randn(8, 16, **to)) for _ in range(2))
    labels = torch.arange(8, device="cpu").repeat_interleave(20)
    noisy = torch.arange(len(labels), device="cpu") % 5 == 4
    x = torch.where(noisy[:, None], noise[labels], clean[labels]) + 0.05 * torch.randn(len(labels), 16, **to)
    x, labels = x.to(backend.device), labels.to(backend.device)
    closeness = []
    for k in (1, 3):
        head = backend.head(8, 16, 0.2, 16.0, kind=FusedSubCenterArcFaceLoss, subcenters=k, init_std=0.1)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
        for _ in range(60):
            optimizer.zero_grad()
            head(x, labels).backward()
            optimizer.step()
        head.drop_subcenters_(x, labels, optimizer=optimizer)
        closeness.append(F.cosine_similarity(head.weight, clean.to(backend.device)).mean().item())
        assert optimizer.state[head.weight]["momentum_buffer"].shape == (8, 16)
        head(x, labels).backward()
        optimizer.step()
    assert closeness[1] > closeness[0] + 0.1, closeness


@pytest.mark.parametrize("optimizer", [FusedSGD, FusedAdamW, torch.optim.SGD, torch.optim.AdamW])
def test_the_dominant_centre_of_each_class_stays(backend, optimizer):
    head = _head(backend, kind=FusedCosFaceLoss, ignore_index=-7)
    fused = optimizer(head.parameters(), lr=0.1, **({} if "AdamW" in optimizer.__name__ else {"momentum": 0.9}))
    x, labels = _batch(backend)
    head(x, labels).backward()
    with torch.device(backend.device):  # torch 2.10 makes AdamW's step on the default device, and reads it
        fused.step()
    before = head.weight.detach().clone().view(C, K, D)
    state = {name: value.clone() for name, value in fused.state[head.weight].items() if value.dim() == 2}
    assert state
    parameter = head.weight
    classes = torch.tensor([5, 5, 5, 9, 9, -7, 11], device=backend.device)
    places = torch.tensor([2, 2, 0, 2, 1, 0, 1], device=backend.device)  # of two equal counts, the lower place
    samples = 3.0 * before[classes.clamp_min(0), places]
    assert head.drop_subcenters_(samples, classes, optimizer=fused) is head
    keep = before.norm(dim=2).argmax(1)
    keep[5], keep[9], keep[11] = 2, 1, 1
    rows = torch.arange(C, device=backend.device), keep
    assert head.weight is parameter
    assert torch.equal(head.weight, before[rows])
    for name, value in state.items():
        assert torch.equal(fused.state[parameter][name], value.view(C, K, D)[rows]), name
    assert (head.subcenters, head.num_classes) == (1, C)
    want = cosface_loss(x, head.weight, labels, backend=backend.name)
    assert torch.equal(head(x, labels), want)
    fused.zero_grad()
    head(x, labels).backward()
    fused.step()
    plain = backend.head(C, D)
    plain.load_state_dict(head.state_dict())
    head.resize_classes_(new=2, optimizer=fused)


def test_a_plain_head_stays_as_it_is(backend):
    head = backend.head(C, D)
    before = head.weight.detach().clone()
    head.drop_subcenters_(*_batch(backend))
    assert torch.equal(head.weight, before)


def test_a_checkpoint_holds_all_centres(backend, tmp_path):
    head, twin = _head(backend), _head(backend)
    x, labels = _batch(backend)
    with DEFAULT_DEVICE:
        checkpoint.save(tmp_path, 1, head=head)
        checkpoint.load(tmp_path, head=twin)
        with pytest.raises(ValueError, match=rf"{C * K}, {D}.* in the checkpoint, but .*{C}, {D}"):
            checkpoint.load(tmp_path, head=backend.head(C, D))
    assert torch.equal(head(x, labels), twin(x, labels))


def test_without_samples_the_longest_stays(backend):
    head = _head(backend, FusedSoftmaxLoss)
    before = head.weight.detach().clone().view(C, K, D)
    head.drop_subcenters_()
    assert torch.equal(head.weight.norm(dim=1), before.norm(dim=2).amax(1))


@pytest.mark.parametrize("spoil", ["alone", "label", "nan", "infinite", "shape", "optimizer", "shared"])
def test_what_cannot_be_dropped_changes_nothing(backend, spoil):
    head = _head(backend)
    x, labels = _batch(backend)
    arguments, options, message = [x, labels], {}, ""
    if spoil == "alone":
        arguments, message = [x], "embeddings and labels must be given together"
    elif spoil == "label":
        labels[3], message = C, rf"labels must be in \[0, {C}\) .* got {C} at row 3"
    elif spoil in ("nan", "infinite"):
        x = x.detach()
        x[2, 1], x[4, 3], labels[2] = torch.nan, -torch.inf if spoil == "infinite" else torch.nan, -100
        arguments, message = [x, labels], rf"embeddings must be finite, got {x[4, 3].item()} at row 4\."
    elif spoil == "shape":
        arguments, message = [x[:, 1:], labels], "embeddings have size 11"
    elif spoil == "optimizer":
        other = torch.ones(1, device=backend.device, requires_grad=True)
        options = {"optimizer": torch.optim.SGD([other], lr=1.0)}
        message = "the optimizer must hold the head's weight"
    else:
        other = _head(backend)
        other.weight = head.weight
        other.drop_subcenters_()
        message = f"must have the head's {C * K} rows"
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        head.drop_subcenters_(*arguments, **options)
    assert torch.equal(head.weight, before)
    assert head.subcenters == K


def test_state_travels(backend):
    head, twin = _head(backend), _head(backend)
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    x, labels = _batch(backend)
    assert torch.equal(head(x, labels), twin(x, labels))
    with pytest.raises(RuntimeError, match=rf"of {C * K} classes in the state and of {C} in the head.*drop_sub"):
        backend.head(C, D).load_state_dict(head.state_dict())
    with pytest.raises(RuntimeError, match=rf"of {C} rows in the state and of {C * K} in the head, {K} of each"):
        twin.load_state_dict(backend.head(C, D).state_dict())


def test_shows_its_subcenters(backend):
    assert f"subcenters={K}" in repr(_head(backend))
    assert "subcenters" not in repr(backend.head(C, D))


def test_checkpointed_under_recomputation(backend):
    head = _head(backend, sample_rate=0.5, reduction="sum")
    x, labels = _batch(backend)
    x.requires_grad_()
    want = torch.autograd.grad(head(x, labels), x)[0]
    head.sampler.reset_parameters()
    again = torch.utils.checkpoint.checkpoint(head, x, labels, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, x)[0], want)


@pytest.mark.parametrize("margin", [0.0, 28.6])
def test_swaps_with_pytorch_metric_learning(backend, margin):
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    with DEFAULT_DEVICE:
        theirs = pml.SubCenterArcFaceLoss(num_classes=C, embedding_size=D, margin=margin, scale=64, sub_centers=K)
    theirs = theirs.to(backend.device)
    head = _head(backend, margin=math.radians(margin))
    head.load_state_dict(theirs.state_dict(), strict=False)
    x, labels = _batch(backend)
    with DEFAULT_DEVICE:
        want = theirs(x, labels)
    got = head(x, labels)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.backward()
    want.backward()
    assert relative_error(head.weight.grad, theirs.W.grad.T) < 1e-3


@pytest.mark.parametrize("subcenters", [0, -1, 2.5, 65, None])
def test_a_number_out_of_range_is_refused(backend, subcenters):
    x, labels = _batch(backend)
    with pytest.raises(ValueError, match=r"subcenters must be"):
        backend.head(C, D, subcenters=subcenters)
    with pytest.raises(ValueError, match=r"subcenters must be"):
        margin_softmax_loss(x, x, labels % 4, margin=0.1, subcenters=subcenters, backend=backend.name)


def test_what_does_not_go_with_several_centres_is_refused(backend):
    x, labels = _batch(backend)
    w = torch.randn(100, D, device=backend.device)
    with pytest.raises(ValueError, match=r"3 rows of each class, its subcenters, got 100 rows"):
        margin_softmax_loss(x, w, labels, margin=0.1, subcenters=3, backend=backend.name)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 25\)"):
        margin_softmax_loss(x, w, labels + 25, margin=0.1, subcenters=4, backend=backend.name)
    with pytest.raises(ValueError, match=r"gradient_tolerance must be 0, got 0\.1"):
        margin_softmax_loss(x, w, labels, margin=0.1, subcenters=2, gradient_tolerance=0.1, backend=backend.name)
    with pytest.raises(ValueError, match=r"gradient_tolerance must be 0, got 0\.1"):
        _head(backend, gradient_tolerance=0.1)
    with pytest.raises(ValueError, match=r"LSoftmaxMargin reads the class centres.* got 3"):
        _head(backend, FusedLSoftmaxLoss)
    with pytest.raises(ValueError, match=r"to be resized, got 3 subcenters"):
        _head(backend).resize_classes_(new=1)
    with pytest.raises(ValueError, match=f"The sampler draws from {C * K} classes"):
        margin_softmax_loss(
            x, _head(backend).weight, labels, margin=0.1, subcenters=K, sampler=ClassSampler(C * K, 0.5)
        )
