"""What one rank refuses, all refuse; what differs between ranks is found."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.one_process import ON_ONE_PROCESS
from support.ranks import LARGEST_WORLD
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cosface_kernels import (
    FusedCosFaceLoss,
    FusedMarginLoss,
    FusedUniFaceLoss,
    cosface_loss,
    margin_softmax_loss,
)
from cosface_kernels.distributed import empty_weight
from cosface_kernels.margins import (
    ArcFaceMargin,
    ClassMargin,
    CurricularFaceMargin,
    KappaFaceMargin,
    LSoftmaxMargin,
)
from cosface_kernels.storage import on_first


def _refuse(rank, group, num_classes, embedding_size, batch_of):
    """The message on this rank, and a loss afterwards: a refusal leaves the ranks in step."""
    try:
        head = FusedCosFaceLoss(num_classes[rank], embedding_size[rank], process_group=group)
        x, labels, *options = batch_of(rank)
        head(x, labels, *options)
    except (ValueError, TypeError) as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = None
    head = FusedCosFaceLoss(7, 5, process_group=group)
    return message, head(torch.ones(2, 5), torch.tensor([rank, 6])).item()


def _good(rank):
    return torch.ones(2, 5), torch.tensor([0, 6])


def _label_out_of_range(rank):
    return torch.ones(2, 5), torch.tensor([0, 7 if rank == 1 else 6])


def _one_dimensional(rank):
    return torch.ones(5) if rank == 2 else torch.ones(2, 5), torch.tensor([0, 6])


def _bfloat16(rank):
    return torch.ones(2, 5, dtype=torch.bfloat16 if rank == 1 else torch.float32), torch.tensor([0, 6])


def _frozen(rank):
    return torch.ones(2, 5, requires_grad=rank > 0), torch.tensor([0, 6])


ALIKE = "must be the same on every rank"


REFUSALS = {
    "num_classes": ((7, 7, 8), (5, 5, 5), _good, f"num_classes {ALIKE}, got 7 on rank 0 and 8 on rank 2."),
    "embedding_size": ((7, 7, 7), (5, 4, 5), _good, f"embedding_size {ALIKE}, got 5 on rank 0 and 4 on rank 1."),
    "label": ((7, 7, 7), (5, 5, 5), _label_out_of_range, "labels must be in [0, 7)"),
    "shape": ((7, 7, 7), (5, 5, 5), _one_dimensional, "embeddings must have shape (N, D), got shape (5,)."),
    "dtype": ((7, 7, 7), (5, 5, 5), _bfloat16, f"dtype of embeddings {ALIKE}, got torch.float32 on rank 0 and"),
    "gradient": ((7, 7, 7), (5, 5, 5), _frozen, f"recording of gradients {ALIKE}"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_one_rank_refuses_all_refuse(ranks, name):
    *setting, sentence = REFUSALS[name]
    results = ranks.results(3, _refuse, *setting)
    for message, _ in results:
        assert message is not None
        assert sentence in message
    assert len({loss for _, loss in results}) == 1


def _curricular(margin=0.5, t=0.0):
    psi = CurricularFaceMargin(margin)
    psi.t.fill_(t)
    return psi


def _kappa(step):
    psi = KappaFaceMargin([3] * 7)
    psi.weights[step] = 0.25
    return psi


class Shift(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, cos):
        return cos - self.m


class Slope(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m))

    def forward(self, cos):
        return cos - self.m


# Of rank 1, where it is not what the others have, and what every rank is told; {} is the same on all.
UNLIKE = {
    "margin": ({"margin": 0.3}, "margin {}, got 0.35 on rank 0 and 0.3 on rank 1."),
    "kind of margin": ({"margin": ArcFaceMargin(0.35)}, "margin {}, got 0.35 on rank 0 and ('ArcFaceMargin', "),
    "function": ({"margin": torch.cos}, "margin {}, got 0.35 on rank 0 and "),
    "scale": ({"scale": 32.0}, "scale {}, got 64.0 on rank 0 and 32.0 on rank 1."),
    "learned scale": (
        {"scale": torch.tensor(32.0)},
        "scale {}, got 64.0 on rank 0 and 32.0 (torch.float32) on rank 1.",
    ),
    "a scale that learns": (
        {"scale": nn.Parameter(torch.tensor(64.0))},
        "scale {}, got 64.0 on rank 0 and 64.0 (torch.float32, with a gradient) on rank 1.",
    ),
    "scales": ({"scale": torch.full((3,), 64.0)}, "scale {}, got 64.0 on rank 0 and one per sample on rank 1."),
    "ignore_index": ({"ignore_index": 0}, "ignore_index {}, got -100 on rank 0 and 0 on rank 1."),
    "validate_labels": ({"validate_labels": False}, "validate_labels {}, got None on rank 0 and False on rank 1."),
    "reduction": ({"reduction": "sum"}, "reduction {}, got mean on rank 0 and sum on rank 1."),
    "sample_weight": (
        {"sample_weight": torch.ones(3, dtype=torch.float64)},
        "dtype of sample_weight {}, got torch.float32 on rank 0 and torch.float64 on rank 1.",
    ),
    "no sample_weight": (
        {"sample_weight": None},
        "dtype of sample_weight {}, got torch.float32 on rank 0 and None",
    ),
    "normalization": ({"normalize_weight": False}, "normalization of embeddings and weight {}, got (True, True)"),
    "tolerance": ({"gradient_tolerance": 0.1}, "gradient_tolerance {}, got 0.0 on rank 0 and 0.1 on rank 1."),
    "settings": (
        {"margin": (_curricular(), _curricular(0.4), _curricular())},
        "margin {}, got ('CurricularFaceMargin', {{'training': True, 'straight_through': False, 'margin': 0.5, ",
    ),
    "state": (
        {"margin": (_curricular(), _curricular(t=0.25), _curricular())},
        "margin.t {}, got 0.0 (torch.float32) on rank 0 and 0.25 (torch.float32) on rank 1.",
    ),
    "table": (
        {"margin": (ClassMargin([0.1] * 7), ClassMargin([0.1] * 6 + [0.2]), ClassMargin([0.1] * 7))},
        "margin.margins {}, got numbers in [0.1, 0.1], checksum ",
    ),
    "order of a table": (
        {"margin": tuple(ClassMargin(order / 10) for order in (*[torch.arange(7)] * 2, torch.arange(6, -1, -1)))},
        "margin.margins {}, got numbers in [0, 0.6], checksum ",
    ),
    "a table that learns": (
        {"margin": (*[ClassMargin(torch.full((7,), 0.1))] * 2, ClassMargin(nn.Parameter(torch.full((7,), 0.1))))},
        "margin.margins {}, got numbers in [0.1, 0.1], checksum ",
    ),
    "state of each class": ({"margin": (_kappa(0), _kappa(1), _kappa(0))}, "margin.weights {}, got numbers in ["),
    "own module": (
        {"margin": (Shift(0.3), Shift(0.3), Shift(0.4))},
        "margin {}, got ('Shift', {{'training': True, ",
    ),
    "its parameter": (
        {"margin": (Slope(0.5), Slope(0.5), Slope(0.25))},
        "margin.m {}, got 0.5 (torch.float32, with ",
    ),
    "what it freezes": (
        {"margin": (Slope(0.5), Slope(0.5).requires_grad_(False), Slope(0.5))},
        "margin.m {}, got 0.5 (torch.float32, with a gradient) on rank 0 and 0.5 (torch.float32) on rank 1.",
    ),
    "class_weight": (
        {"class_weight": (torch.ones(7), torch.ones(7), torch.arange(7.0))},
        "class_weight {}, got numbers in [1, 1], checksum ",
    ),
    "backend": ({"backend": "triton"}, "backend 'triton' cannot run: "),
    "mode": ({"margin": (_curricular(), _curricular().eval(), _curricular())}, "margin {}, got ('CurricularFaceM"),
}


def _unlike(rank, group, changes):
    """A good batch, once with the changes of rank 1 and once without."""
    torch.manual_seed(0)
    weight, x, labels = empty_weight(7, 5, group), torch.ones(3, 5), torch.tensor([0, 6, 3])
    nn.init.normal_(weight.to_local())
    options = {"margin": 0.35, "sample_weight": torch.ones(3)}
    try:
        own = {
            k: v[rank] if isinstance(v, tuple) else v
            for k, v in changes.items()
            if isinstance(v, tuple) or rank == 1
        }
        margin_softmax_loss(x, weight, labels, **{**options, **own})
        message = None
    except (ValueError, RuntimeError) as error:
        message = f"{error}"
    return message, margin_softmax_loss(x, weight, labels, **options)


@pytest.mark.parametrize("name", UNLIKE)
def test_what_differs_on_one_rank_all_refuse(ranks, name):
    """Else each would return its own loss, or gloo abort; and all go on with the next batch."""
    changes, sentence = UNLIKE[name]
    results = ranks.results(3, _unlike, changes)
    for message, _ in results:
        assert message is not None
        assert sentence.format(ALIKE) in message
    assert len({loss.item() for _, loss in results}) == 1


def _out_of_range_on_the_first(rank, group, held):
    x = torch.ones(2, 6)
    held.add(x)
    FusedCosFaceLoss(9, 6, process_group=group)(x, torch.tensor([0, 8 if rank else 9]))


def _no_file_on_the_first(rank, group, held):
    x = torch.ones(2, 6)
    held.add(x)
    on_first(Path("/there/is/no/file").stat, group)


def _outlived(rank, group, fail):
    """How many tensors outlive a refusal until the garbage is collected, and with them the group."""
    empty_weight(9, 6, group)  # imports of torch's, at its first call, hold the frames above them
    held = weakref.WeakSet()
    gc.disable()
    with pytest.raises((ValueError, FileNotFoundError)):
        fail(rank, group, held)
    gc.enable()
    return len(held)


@pytest.mark.parametrize("fail", [_out_of_range_on_the_first, _no_file_on_the_first])
def test_a_refusal_holds_nothing(ranks, fail):
    assert ranks.results(2, _outlived, fail) == [0, 0]


def _shard(rank, group, make):
    make(9, 6, process_group=group)


@pytest.mark.parametrize("make", [ON_ONE_PROCESS, functools.partial(FusedMarginLoss, margin=LSoftmaxMargin())])
def test_a_margin_that_needs_all_class_centres_refuses_shards(ranks, make):
    for refusal in ranks.run(2, _shard, make):
        assert "LSoftmaxMargin needs all class centres on one process: process_group must be None" in str(refusal)


def _outside_of_the_group(rank, group):
    first = dist.new_group([0])
    head = FusedCosFaceLoss(9, 6, process_group=first)
    return head(torch.ones(2, 6), torch.tensor([0, 8])).item()


def test_a_rank_that_is_not_in_the_group(ranks):
    on_first, *others = ranks.run(LARGEST_WORLD, _outside_of_the_group)
    assert on_first > 0
    for rank, refusal in enumerate(others, 1):
        assert isinstance(refusal, ValueError)
        assert f"rank {rank} is not in process_group, of which new_group() returned -100 here" in str(refusal)


@pytest.mark.parametrize("value", [True, False, "WORLD", [0, 1]])
def test_what_is_no_group(value):
    with pytest.raises(TypeError) as error:
        FusedCosFaceLoss(9, 6, process_group=value)
    assert f"{error.value}" == (f"process_group must be a torch.distributed.ProcessGroup or None, got {value!r}.")


class Part(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.head = FusedCosFaceLoss(9, 6, process_group=group)


def _load_the_other_kind(rank, group):
    """What a sharded head says of a whole weight, and the other way round, alone and as a part of a module."""
    heads = [FusedCosFaceLoss(9, 6, process_group=group), FusedCosFaceLoss(9, 6)]
    models = [Part(group), Part(None)]
    messages = []
    for sharded, whole in (heads, models):
        for into, other in ((sharded, whole), (whole, sharded)):
            before = into.state_dict()
            with pytest.raises(RuntimeError) as error:
                into.load_state_dict(other.state_dict())
            messages.append(str(error.value))
            into.load_state_dict(before)
    return messages


def test_a_state_of_the_other_kind_is_refused_with_the_way_to_load_it(ranks):
    for messages in ranks.results(2, _load_the_other_kind):
        names = ["weight", "weight", "head.weight", "head.weight"]
        kinds = 2 * [("whole", "sharded over ranks"), ("sharded over ranks", "whole")]
        for message, name, (there, here) in zip(messages, names, kinds, strict=True):
            assert f"{name} is {there} in the state and {here} in the head, and neither loads" in message
            assert "checkpoint.load take" in message
            assert "convert.load_weight_(head.weight, path)" in message
            assert "copy" not in message


def _on_other_meshes(rank, group):
    """What is said of weights that are not Shard(0) of one dimension."""
    mesh = DeviceMesh.from_group(group, "cpu")
    messages = []
    for placement in (Shard(1), Replicate()):
        weight = distribute_tensor(torch.ones(4, 6), mesh, [placement])
        with pytest.raises(ValueError, match="must be sharded on dimension 0") as error:
            cosface_loss(torch.ones(2, 6), weight, torch.tensor([0, 3]))
        messages.append(str(error.value))
    return messages


def test_weights_that_are_sharded_otherwise_are_refused(ranks):
    for columns, whole in ranks.results(2, _on_other_meshes):
        assert "Shard(dim=1)" in columns
        assert "Replicate()" in whole


def _penalty(rank, group, kind):
    scale = nn.Parameter(torch.tensor(8.0)) if kind is FusedCosFaceLoss else 8.0
    head = kind(7, 5, scale=scale, process_group=group)
    x = torch.randn(2, 5, requires_grad=True)
    messages = []
    for of in [x, scale] if kind is FusedCosFaceLoss else [x]:
        (g,) = torch.autograd.grad(head(x, torch.tensor([0, 6])), of, create_graph=True)
        with pytest.raises(NotImplementedError) as refusal:
            torch.autograd.grad(x.sum() + g.square().sum(), x)
        messages.append(str(refusal.value))
    return messages


@pytest.mark.parametrize("kind", [FusedCosFaceLoss, FusedUniFaceLoss])
def test_a_penalty_on_a_gradient_is_refused_not_dropped(ranks, kind):
    for messages in ranks.results(2, _penalty, kind):
        assert all(message.startswith("The loss has no second derivative") for message in messages)
