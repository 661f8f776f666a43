"""Shards that sample their classes: each draws its own, and the loss is that over what they drew."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from support import relative_error
from support.sharded_moves import DIM, IGNORED, MOMENTUM, Case, batches, make_head
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cosface_kernels import (
    FusedCosFaceLoss,
    FusedMarginLoss,
    margin_softmax_loss,
)
from cosface_kernels.distributed import own_classes, own_rows
from cosface_kernels.margins import ArcFaceMargin, MVSoftmaxMargin
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.sampling import ClassSampler


class Sampled(NamedTuple):
    loss: Tensor
    dx: Tensor
    dw: Tensor
    classes: Tensor  # global numbers of those that took part


MARGINS = {"cosface": lambda: 0.35, "arcface": ArcFaceMargin, "mv-softmax": MVSoftmaxMargin}


def _sample(rank, group, classes, rate, samples, margin):
    torch.manual_seed(0)
    head = FusedMarginLoss(
        classes, DIM, MARGINS[margin](), 16.0, process_group=group, sample_rate=rate, dtype=torch.float64
    )
    own = own_classes(head.weight)
    found = []
    for step in range(2):
        x, labels = _sampled_batch(step, classes, samples)
        targets = torch.where((labels >= own.start) & (labels < own.stop), labels - own.start, -1)
        drawn, _ = copy.deepcopy(head.sampler)(targets)
        positives = targets[targets >= 0].unique()
        assert len(drawn) == max(math.ceil(rate * len(own)), len(positives))
        assert bool(torch.isin(positives, drawn).all())
        mine = slice(sum(samples[:rank]), sum(samples[: rank + 1]))
        x, labels = x[mine].requires_grad_(), labels[mine]
        head.weight.grad = None
        loss = head(x, labels)
        loss.backward()
        found.append(Sampled(loss.detach(), x.grad, own_rows(head.weight.grad), drawn + own.start))
    head.eval()
    return found, head(x, labels).detach(), int(head.sampler.draws)


def _sampled_batch(step, classes, samples):
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(sum(samples), DIM, generator=rng, dtype=torch.float64)
    labels = torch.randint(classes, (sum(samples),), generator=rng)
    labels[1] = IGNORED
    return x, labels


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(
    ("classes", "rate"), [(103, 0.2), (103, 0.01), (5, 0.5), (2, 0.5)], ids=["20 %", "positives", "few", "fewer"]
)
def test_sampled_shards_are_the_loss_over_what_they_drew(ranks, world, margin, classes, rate):
    """On one process, over the classes that the ranks drew, of which each has its share; evaluation takes all."""
    samples = (4, 0, 6, 3)[:world]
    results = ranks.results(world, _sample, classes, rate, samples, margin)
    torch.manual_seed(0)
    weight = FusedMarginLoss(classes, DIM, MARGINS[margin](), 16.0, dtype=torch.float64).weight
    drawn = []
    for step in range(2):
        shards = [found[step] for found, _, _ in results]
        union = torch.cat([shard.classes for shard in shards])
        drawn.append(union)
        x, labels = _sampled_batch(step, classes, samples)
        positions = torch.where(labels == IGNORED, IGNORED, torch.searchsorted(union, labels))
        x.requires_grad_()
        weight.grad = None
        loss = margin_softmax_loss(x, weight[union], positions, margin=MARGINS[margin](), scale=16.0)
        loss.backward()
        dx, dw = torch.cat([s.dx for s in shards]) / world, torch.cat([s.dw for s in shards])
        torch.testing.assert_close(dx, x.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dw, weight.grad, rtol=1e-9, atol=1e-12)
        for shard in shards:
            torch.testing.assert_close(shard.loss, loss.detach(), rtol=1e-12, atol=0)
    assert rate * classes < 20 or not torch.equal(*drawn)
    x, labels = _sampled_batch(1, classes, samples)
    full = margin_softmax_loss(x, weight, labels, margin=MARGINS[margin](), scale=16.0)
    for _, evaluated, draws in results:
        torch.testing.assert_close(evaluated, full.detach(), rtol=1e-12, atol=0)
        assert draws == 2


def _draw(rank, group):
    sampler = FusedCosFaceLoss(120, DIM, process_group=group, sample_rate=0.2, sample_seed=5).sampler
    return sampler(torch.tensor([-1]))[0]


def test_each_shard_draws_its_own_stream(ranks):
    first, *others = ranks.results(4, _draw)
    assert len(first) == 6
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(*ranks.results(1, _draw), _draw(0, None))


def _at_rate_1(rank, group):
    case = Case("rate 1", steps=1)
    found = []
    for sampled in (False, True):
        head = make_head(case, group)
        sampler = ClassSampler(len(own_classes(head.weight)), 1.0) if sampled else None
        ((x, labels),) = batches(case, rank, group)
        cosface = margin_softmax_loss(x.requires_grad_(), head.weight, labels, margin=0.35, sampler=sampler)
        cosface.backward()
        found.append((cosface.detach(), x.grad, own_rows(head.weight.grad)))
    return found


def test_equals_the_full_loss_at_rate_1(ranks):
    for full, sampled in ranks.results(4, _at_rate_1):
        for got, want in zip(sampled, full, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def _sampled_moves(rank, group, fused):
    """Rows and state of sampled classes move as without a shard, and no others."""
    torch.manual_seed(0)
    head = FusedCosFaceLoss(103, DIM, scale=16.0, process_group=group, sample_rate=0.1, dtype=torch.float64)
    options = MOMENTUM if fused is FusedSGD else {"lr": 0.01}
    optimizer = fused(head.parameters(), **options)
    own = own_classes(head.weight)
    for x, labels in batches(Case("sampled", steps=3), rank, group):
        drawn = copy.deepcopy(head.sampler)
        before = [own_rows(head.weight).clone()]
        before += [own_rows(v).clone() for v in optimizer.state[head.weight].values() if v.dim()]
        loss = head(x, labels)
        everyones = [torch.empty(0)] * group.size()
        torch.distributed.all_gather_object(everyones, labels, group=group)
        labels = torch.cat(everyones)
        targets = torch.where((labels >= own.start) & (labels < own.stop), labels - own.start, -1)
        classes, _ = drawn(targets)
        others = torch.ones(len(own), dtype=torch.bool)
        others[classes] = False
        loss.backward()
        optimizer.step()
        after = [own_rows(head.weight)]
        after += [own_rows(v) for v in optimizer.state[head.weight].values() if v.dim()]
        for old, new in zip(before, after, strict=False):
            assert torch.equal(new[others], old[others])
            assert bool((new[classes] != old[classes]).any(1).all())
    return True


@pytest.mark.parametrize("fused", [FusedSGD, FusedAdamW])
def test_sampled_rows_move_and_no_others(ranks, fused):
    assert all(ranks.results(3, _sampled_moves, fused))


def _unlike(rank, group):
    head = FusedCosFaceLoss(103, DIM, process_group=group, sample_rate=0.5)
    head.train(rank != 1)
    with pytest.raises(ValueError, match="same on every rank") as refusal:
        head(torch.ones(2, DIM), torch.tensor([0, 3]))
    return str(refusal.value)


def test_ranks_that_sample_unlike_the_others_are_refused(ranks):
    for message in ranks.results(2, _unlike):
        assert message == "sample_rate must be the same on every rank, got 0.5 on rank 0 and 1 on rank 1."


def _recomputed(rank, group, samples):
    """The weight's gradients of two losses, by a backward each, without and with torch.utils.checkpoint."""
    found = []
    for wraps in (False, True):
        torch.manual_seed(0)
        head = FusedCosFaceLoss(40, DIM, 0.3, 8.0, process_group=group, sample_rate=0.3, init_std=1.0)
        losses = []
        for step in range(2):
            x, labels = _sampled_batch(step, 40, samples)
            mine = slice(sum(samples[:rank]), sum(samples[: rank + 1]))
            batch = x[mine].float().requires_grad_(), labels[mine]
            losses.append(checkpoint(head, *batch, use_reentrant=False) if wraps else head(*batch))
        gradients = []
        for loss in losses:
            loss.backward()
            gradients.append(head.weight.grad.full_tensor().clone())
        found.append(gradients)
    return found


def test_a_rank_without_samples_draws_again_what_its_own_pass_drew(ranks):
    for plain, again in ranks.results(3, _recomputed, (3, 0, 2)):
        for want, got in zip(plain, again, strict=True):
            assert relative_error(got, want) < 1e-6
