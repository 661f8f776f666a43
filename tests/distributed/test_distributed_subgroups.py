"""Heads on parts of the ranks behind a backbone that all of them hold, and margins that know no ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import FusedCosFaceLoss, FusedMarginLoss
from cosface_kernels.distributed import GradScaler, clip_grad_norm_, own_rows

PARTS = {"two": ([0, 1], [2, 3]), "one": ([0, 1, 2],), "of three and one": ([0, 2, 3], [1])}


def _model(rank, group, parts):
    """A backbone of all ranks, and the head of the part that this one is in, or none."""
    groups = [dist.new_group(part) for part in parts]  # which all ranks must make
    torch.manual_seed(0)
    backbone = DistributedDataParallel(nn.Linear(4, 4), process_group=group)
    for part, own in zip(parts, groups, strict=True):
        if rank in part:
            return backbone, FusedCosFaceLoss(9, 4, scale=8.0, process_group=own, init_std=1.0)
    return backbone, None


def _backward(rank, backbone, head, factor=1.0):
    torch.manual_seed(rank)
    embeddings = backbone(torch.randn(5, 4))
    loss = embeddings.square().mean() if head is None else head(embeddings, torch.randint(9, (5,)))
    (loss * factor).backward()
    return [*backbone.parameters(), *([] if head is None else head.parameters())]


def _clip(rank, group, parts, p):
    backbone, head = _model(rank, group, parts)
    parameters = _backward(rank, backbone, head)
    if head is not None:
        with pytest.raises(ValueError, match=r"sharded over \d of 4 ranks: .* got None\."):
            clip_grad_norm_(parameters, 0.01, p)
    before = [own_rows(parameter.grad).double().flatten() for parameter in parameters]
    norm = clip_grad_norm_(parameters, 0.01, p, process_group=group)
    after = [own_rows(parameter.grad).double().flatten() for parameter in parameters]
    return norm, torch.cat(before[:2]), torch.cat([*before[2:], torch.zeros(0)]), torch.cat(after)


@pytest.mark.parametrize("p", [2.0, 3.0, math.inf])
@pytest.mark.parametrize("parts", PARTS)
def test_the_norm_is_that_of_the_backbone_and_of_every_head(ranks, parts, p):
    results = ranks.results(4, _clip, PARTS[parts], p)
    whole = torch.cat([results[0][1], *(heads for _, _, heads, _ in results)])
    want = torch.linalg.vector_norm(whole, p)
    for norm, backbone, heads, after in results:
        torch.testing.assert_close(norm.double(), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(after, torch.cat([backbone, heads]) * 0.01 / want, rtol=1e-4, atol=0)


def _overflow(rank, group, parts):
    backbone, head = _model(rank, group, parts)
    scaler = GradScaler("cpu", init_scale=16.0, process_group=group)
    scaler.scale(torch.ones(()))
    parameters = _backward(rank, backbone, head, factor=16.0)
    optimizer = torch.optim.SGD(parameters, lr=0.1, foreach=False)
    before = backbone.module.weight.detach().clone()
    if rank == 1:
        own_rows(head.weight.grad)[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), torch.equal(before, backbone.module.weight)


@pytest.mark.parametrize("parts", PARTS)
def test_an_overflow_in_one_head_is_skipped_by_all(ranks, parts):
    assert ranks.results(4, _overflow, PARTS[parts]) == [(8.0, True)] * 4


class Slope(nn.Module):
    """A margin that learns, and knows of no ranks."""

    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, cos):
        return cos - self.m


def _gradient(rank, group, reduction):
    """Of the mean over the ranks of losses that have other factors, sharded and on one process."""
    gradients = []
    world = dist.get_world_size(group)
    x = torch.randn(3 * world, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(3 * world) % 7
    for sharded in (True, False):
        torch.manual_seed(0)
        options = {"scale": 8.0, "init_std": 1.0, "reduction": reduction, "dtype": torch.float64}
        head = FusedMarginLoss(7, 5, Slope(), process_group=group if sharded else None, **options)
        mine = slice(rank, None, world) if sharded else slice(None)
        loss = head(x[mine], labels[mine])
        if reduction == "none":
            loss = (loss * (1 + torch.arange(3 * world, dtype=torch.float64)[mine])).mean()
        else:
            loss = loss * (1 + rank if sharded else (1 + world) / 2)
        loss.backward()
        gradients.append(head.margin.m.grad.item())
    return gradients


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_module_as_margin_has_the_same_gradient_on_all_ranks(ranks, reduction):
    for sharded, whole in ranks.results(3, _gradient, reduction):
        assert sharded == pytest.approx(whole, rel=1e-12)
