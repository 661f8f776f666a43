"""Smoothed labels, two labels of a sample and the entropy on several ranks: what one process computes."""

from typing import NamedTuple

import pytest
import torch
from support.ranks import LARGEST_WORLD
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from cosface_kernels import FusedCosFaceLoss, margin_softmax_loss
from cosface_kernels.distributed import class_range, empty_weight
from cosface_kernels.margins import MVSoftmaxMargin

DIM, SAMPLES = 6, (4, 0, 7, 1)


class Case(NamedTuple):
    two: bool = True
    smoothing: float = 0.1
    classes: int = 23
    reshapes: bool = False
    weighted: bool = False  # by their classes
    broken: bool = False
    backend: str | None = None


class Result(NamedTuple):
    loss: Tensor
    entropy: Tensor
    accuracy: Tensor
    top_k: Tensor
    dx: Tensor
    dscale: Tensor
    dw: Tensor


def batch(world: int, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Some samples have two equal labels, some an ignored one, some none."""
    rng = torch.Generator().manual_seed(world)
    n = sum(SAMPLES[:world])
    x = torch.randn(n, DIM, generator=rng, dtype=torch.float64)
    w = torch.randn(case.classes, DIM, generator=rng, dtype=torch.float64)
    labels = torch.randint(case.classes, (n,), generator=rng)
    labels[1] = -100
    if case.broken:
        x[1] = torch.nan
    if not case.two:
        return x, w, labels, None
    second = torch.randint(case.classes, (n,), generator=rng)
    second[0], second[2] = labels[0], -100
    second[1] = -100 if case.broken else second[1]
    share = torch.rand(n, generator=rng, dtype=torch.float64)
    return x, w, torch.stack([labels, second], 1), torch.stack([share, 1 - share], 1)


def evaluate(
    x: Tensor, weight: Tensor, labels: Tensor, share: Tensor | None, case: Case, entropies: float
) -> Result:
    x, scale = x.clone().requires_grad_(), torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    loss, stats = margin_softmax_loss(
        x,
        weight,
        labels,
        margin=MVSoftmaxMargin(0.3) if case.reshapes else 0.2,
        scale=scale,
        label_smoothing=case.smoothing,
        sample_weight=share,
        class_weight=torch.linspace(1, 9, case.classes) if case.weighted else None,
        return_stats=min(3, case.classes),
        entropy=True,
        backend=case.backend,
    )
    (loss + entropies * stats.entropy.nansum()).backward()
    dw = weight.grad.to_local() if isinstance(weight, DTensor) else weight.grad
    return Result(
        loss.detach(), stats.entropy.detach(), stats.accuracy, stats.top_k_accuracy, x.grad, scale.grad, dw
    )


def on_rank(rank: int, group: ProcessGroup, case: Case) -> Result:
    x, w, labels, share = batch(group.size(), case)
    weight = empty_weight(case.classes, DIM, group, dtype=torch.float64)
    own = class_range(case.classes, rank, group.size())
    weight.to_local().copy_(w[own.start : own.stop])
    x, labels, share = (t if t is None else t.split(SAMPLES[: group.size()])[rank] for t in (x, labels, share))
    return evaluate(x, nn.Parameter(weight), labels, share, case, 1.0)


CASES = [
    Case(),
    Case(two=False),
    Case(smoothing=0.0),
    Case(weighted=True),
    Case(classes=2),
    Case(classes=3),
    Case(two=False, reshapes=True),
    Case(broken=True),
    Case(two=False, broken=True, backend="reference"),  # which has a nan among the moments too
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("world", range(1, LARGEST_WORLD + 1))
def test_ranks_compute_what_one_process_does(ranks, world, case):
    """Each rank adds the entropy of its samples, and gradients are those of the mean over the ranks."""
    results = ranks.results(world, on_rank, case)
    x, w, labels, share = batch(world, case)
    want = evaluate(x, nn.Parameter(w), labels, share, case, 1 / world)
    for name in ("loss", "accuracy", "top_k", "dscale"):
        for result in results:
            torch.testing.assert_close(getattr(result, name), getattr(want, name), rtol=1e-12, atol=1e-12)
    for name, factor in (("entropy", 1), ("dx", world), ("dw", 1)):
        got = torch.cat([getattr(result, name) for result in results]) / factor
        torch.testing.assert_close(got, getattr(want, name), rtol=1e-10, atol=1e-12, equal_nan=name == "entropy")


def sampled(rank: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """A head's smoothed loss over sampled classes, and what it would be of all classes with sample_rate 1."""
    head = FusedCosFaceLoss(40, DIM, process_group=group, sample_rate=0.5, label_smoothing=1.0, scale=4.0)
    torch.nn.init.ones_(head.weight.data.to_local())
    x = torch.ones(2, DIM)
    return head(x, torch.tensor([3, 7])), head.eval()(x, torch.tensor([3, 7]))


def test_of_sampled_classes_those_that_take_part_count(ranks):
    """All cosines are 1: the mean over S classes of -log p_j is log S but for the margin of one of them."""
    for loss, of_all in ranks.results(2, sampled):
        for got, count in ((loss, 20), (of_all, 40)):
            lse = torch.tensor([4.0 * 0.65] + [4.0] * (count - 1)).logsumexp(0)
            want = lse - 4.0 * (count - 0.35) / count
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def unlike(rank: int, group: ProcessGroup, what: str) -> None:
    weight = nn.Parameter(empty_weight(10, DIM, group))
    nn.init.ones_(weight.data.to_local())
    labels, options = torch.tensor([1, 2]), {}
    if what == "label_smoothing":
        options["label_smoothing"] = 0.1 * rank
    if what == "entropy":
        options |= {"return_stats": True, "entropy": bool(rank)}
    if what == "labels" and rank:
        labels = torch.stack([labels, labels], 1)
    if what == "labels":
        options["sample_weight"] = torch.ones(labels.shape)
    margin_softmax_loss(torch.ones(2, DIM), weight, labels, margin=0.1, **options)


@pytest.mark.parametrize("what", ["label_smoothing", "entropy", "labels"])
def test_all_ranks_refuse_what_differs(ranks, what):
    for refusal in ranks.run(2, unlike, what):
        assert isinstance(refusal, ValueError)
        assert what in str(refusal)
        assert "must be the same on every rank" in str(refusal)
