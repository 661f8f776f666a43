"""The nearest classes of all ranks' shards: those of one process, and refusals on all."""

import pytest
import torch
from support.ranks import LARGEST_WORLD
from torch.distributed import ProcessGroup

from cosface_kernels import FusedCosFaceLoss, margin_softmax_loss, nearest_classes
from cosface_kernels.distributed import class_range, empty_weight

DIM, SAMPLES = 6, (4, 0, 7, 1)


def batch(world: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Small integers, so that many cosines are equal."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (sum(SAMPLES[:world]), DIM), generator=rng) * 2.0 - 1
    return x, torch.randint(0, 2, (classes, DIM), generator=rng) * 2.0 - 1


def sharded(rank: int, group: ProcessGroup, classes: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    world = group.size()
    x, w = batch(world, classes)
    head = FusedCosFaceLoss(classes, DIM, process_group=group)
    own = class_range(classes, rank, world)
    head.weight.data.to_local().copy_(w[own.start : own.stop])
    return tuple(head.topk(x.split(SAMPLES[:world])[rank], k))


@pytest.mark.parametrize(("classes", "k"), [(103, 5), (103, 103), (3, 2), (40, 15)])
@pytest.mark.parametrize("world", range(1, LARGEST_WORLD + 1))
def test_those_of_one_process(ranks, world, classes, k):
    """With 103 classes and 103 wanted, a rank owns fewer; of 3, the last of 4 ranks owns none."""
    want = nearest_classes(*batch(world, classes), k)
    got = ranks.results(world, sharded, classes, k)
    assert torch.equal(torch.cat([cosines for cosines, _ in got]), want.cosines)
    assert torch.equal(torch.cat([places for _, places in got]), want.classes)


def unlike(rank: int, group: ProcessGroup) -> None:
    weight = empty_weight(10, DIM, group)
    torch.nn.init.ones_(weight.to_local())
    nearest_classes(torch.ones(2, DIM), weight, 3 + rank)


def too_many(rank: int, group: ProcessGroup) -> None:
    nearest_classes(torch.ones(2, DIM), empty_weight(10, DIM, group), 11 if rank else 10)


def test_all_ranks_refuse_what_differs(ranks):
    for function, message in ((unlike, "k"), (too_many, "k must be at most num_classes, 10, got 11.")):
        for refusal in ranks.run(2, function):
            assert isinstance(refusal, Exception)
            assert message in str(refusal)


def infinitely_far(rank: int, group: ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    weight = empty_weight(5, DIM, group)
    weight.to_local().zero_()[:, 0] = -torch.inf
    return tuple(nearest_classes(torch.eye(1, DIM), weight, 5, normalize_weight=False))


def test_a_class_is_found_however_far_it_is(ranks):
    """A rank that owns fewer than k classes offers no other in their place."""
    for cosines, classes in ranks.results(3, infinitely_far):
        assert cosines.isneginf().all()
        assert classes.tolist() == [[0, 1, 2, 3, 4]]


def accuracy_of_shards(rank: int, group: ProcessGroup, classes: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    world = group.size()
    x, w = batch(world, classes)
    labels = torch.arange(len(x)) % classes
    head = FusedCosFaceLoss(classes, DIM, process_group=group)
    own = class_range(classes, rank, world)
    head.weight.data.to_local().copy_(w[own.start : own.stop])
    x, labels = (rows.split(SAMPLES[:world])[rank] for rows in (x, labels))
    return head(x, labels, return_stats=k)[1].top_k_accuracy


@pytest.mark.parametrize(("classes", "k"), [(103, 5), (40, 1), (3, 2)])
@pytest.mark.parametrize("world", range(1, LARGEST_WORLD + 1))
def test_accuracy_among_the_k_nearest_is_of_all_ranks(ranks, world, classes, k):
    x, w = batch(world, classes)
    labels = torch.arange(len(x)) % classes
    _, stats = margin_softmax_loss(x, w, labels, margin=0.35, return_stats=k)
    for accuracy in ranks.results(world, accuracy_of_shards, classes, k):
        torch.testing.assert_close(accuracy, stats.top_k_accuracy)


def unlike_in_k(rank: int, group: ProcessGroup) -> None:
    head = FusedCosFaceLoss(10, DIM, process_group=group)
    head(torch.ones(2, DIM), torch.tensor([0, 1]), return_stats=2 + rank)


def test_ranks_agree_on_the_k_of_accuracy(ranks):
    for refusal in ranks.run(2, unlike_in_k):
        assert "k of return_stats must be the same on every rank, got 2 on rank 0 and 3" in str(refusal)
