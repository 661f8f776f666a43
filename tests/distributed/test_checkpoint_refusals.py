"""Checkpoints of which files are gone, and ranks that do not save or load the same: every rank is told."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from support.ranks import LARGEST_WORLD, Odd
from torch import nn

from cosface_kernels import FusedCosFaceLoss, checkpoint
from cosface_kernels.optim import FusedSGD

DIM = 4


def make_run(group, classes, seed=0):
    """A backbone that each rank has, and a head with momentum whose rows they share out."""
    torch.manual_seed(seed)
    head = FusedCosFaceLoss(classes, DIM, process_group=group, init_std=1.0)
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
    head(torch.ones(2, DIM, requires_grad=True), torch.tensor([0, classes - 1])).backward()
    optimizer.step()
    generators = {"data": torch.Generator().manual_seed(seed)}
    parts = {"backbone": nn.Linear(3, DIM), "head": head, "optimizer": optimizer}
    return {**parts, "generators": generators, "process_group": group}


def save_run(rank, group, folder, classes):
    return checkpoint.save(folder, 1, **make_run(group, classes))


def load_run(rank, group, folder, classes):
    run = make_run(group, classes, seed=1)
    before = str([run[name].state_dict() for name in ("backbone", "head", "optimizer")])
    try:
        return checkpoint.load(folder, **run)
    except Exception:
        assert str([run[name].state_dict() for name in ("backbone", "head", "optimizer")]) == before
        raise


@pytest.mark.parametrize("classes", [2, 7], ids="{} classes".format)
def test_a_file_that_is_gone_is_missed(ranks, tmp_path, classes):
    """Whichever it is, also that of a rank without rows, which holds the state of its generator alone."""
    path, *_ = ranks.results(LARGEST_WORLD, save_run, tmp_path / "run", classes)
    files = sorted(path.iterdir())
    assert len(files) == LARGEST_WORLD
    weight = checkpoint.load_tensor(path, "head/weight")
    for rank, file in enumerate(files):
        away = file.rename(tmp_path / file.name)
        for result in ranks.run(LARGEST_WORLD, load_run, path.parent, classes):
            assert f"reading {path} failed: its files are gone, or some, and" in str(result), (rank, result)
        if rank < classes:
            with pytest.raises(RuntimeError, match=r"(head/weight|structure) is not whole; an earlier checkpoint"):
                checkpoint.load_tensor(path, "head/weight")
        else:
            assert torch.equal(checkpoint.load_tensor(path, "head/weight"), weight)
        if rank > 0:  # no part of these is gone
            assert checkpoint.load(path, backbone=nn.Linear(3, DIM)) == 1
        away.rename(file)
    assert ranks.results(LARGEST_WORLD, load_run, path.parent, classes) == [1] * LARGEST_WORLD


def save_as_before_shapes_were_kept(rank, group, folder, classes):
    dumps = json.dumps
    json.dumps = lambda content: dumps({name: part for name, part in content.items() if name != "shapes"})
    try:
        return save_run(rank, group, folder, classes)
    finally:
        json.dumps = dumps


def test_a_checkpoint_from_before_shapes_were_kept(ranks, tmp_path):
    """It loads, and what is missing between two files that are left is missed."""
    path, *_ = ranks.results(LARGEST_WORLD, save_as_before_shapes_were_kept, tmp_path, 7)
    assert ranks.results(2, load_run, tmp_path, 7) == [1, 1]
    sorted(path.iterdir())[1].unlink()
    for result in ranks.run(2, load_run, tmp_path, 7):
        assert "head/weight is not whole" in str(result)


OTHERS = {
    "a set": ({"odd": Odd({1})}, 1, "rank 1 refused: odd/value is a set"),
    "no state": ({"odd": 3}, 1, "rank 1 refused: odd must have state_dict"),
    "another object": (
        {"odd": Odd(1), "more": Odd(2)},
        1,
        r"objects must be .*, got \['odd'\] on rank 0 and \['more', 'o",
    ),
    "an object less": ({}, 1, r"objects must be the same on every rank, got \['odd'\] on rank 0 and \[\]"),
    "another shape": ({"odd": Odd(torch.ones(3))}, 1, r"odd/value must be .*, got None on rank 0 and .*\(3,\) on"),
    "another step": ({"odd": Odd(1)}, 2, "step must be the same on every rank, got 1 on rank 0 and 2 on rank 1"),
    "no step": ({"odd": Odd(1)}, -1, r"rank 1 refused: step must be an integer in \[0, 10\^12\), got -1"),
    "a generator": ({"odd": Odd(1), "generators": {"data": torch.Generator()}}, 1, "generators must be the same"),
}


def save_other(rank, group, folder, objects, step):
    objects, step = (objects, step) if rank == 1 else ({"odd": Odd(1)}, 1)
    checkpoint.save(folder, step, process_group=group, **objects)


@pytest.mark.parametrize("name", OTHERS)
def test_ranks_that_do_not_save_the_same(ranks, tmp_path, name):
    objects, step, sentence = OTHERS[name]
    for rank, result in enumerate(ranks.run(3, save_other, tmp_path, objects, step)):
        own = rank == 1 and "refused" in sentence
        with pytest.raises(TypeError if own and "step" not in name else ValueError, match=sentence[16 * own :]):
            raise result
    assert not list(tmp_path.iterdir())


def load_other(rank, group, folder, objects):
    checkpoint.load(folder, process_group=group, **(objects if rank == 1 else {"layer": nn.Linear(2, 2)}))


@pytest.mark.parametrize(
    ("objects", "error", "sentence"),
    [
        ({"layer": 3}, TypeError, "layer must have state_dict and load_state_dict, got int 3"),
        ({"other": nn.Linear(2, 2)}, ValueError, r"holds layer, but no other\."),
        ({"layer": nn.Linear(2, 3)}, ValueError, r"layer/weight is .* of shape \(2, 2\) in the checkpoint, but"),
    ],
    ids=["no state", "another object", "another shape"],
)
def test_a_rank_that_does_not_load_the_same(ranks, tmp_path, objects, error, sentence):
    checkpoint.save(tmp_path, 1, layer=nn.Linear(2, 2))
    for rank, result in enumerate(ranks.run(3, load_other, tmp_path, objects)):
        with pytest.raises(
            error if rank == 1 else ValueError, match=sentence if rank == 1 else "rank 1 refused: "
        ):
            raise result


class Refusing(Odd):
    def load_state_dict(self, state):
        raise TypeError("it has no place for it")


NOT_TAKEN = {
    "own object": (lambda: Refusing(1), "it has no place for it"),
    "module": (lambda: nn.Sequential(nn.Linear(2, 2)), "Error.* in loading state_dict"),
}


def load_what_one_rank_does_not_take(rank, group, folder, name):
    make, _ = NOT_TAKEN[name]
    checkpoint.load(folder, process_group=group, part=make() if rank == 1 else Odd(1))


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_one_rank_does_not_take_all_are_told(ranks, tmp_path, name):
    """Else the others would train on, and wait for it."""
    checkpoint.save(tmp_path, 1, part=Odd(1))
    sentence = f"part does not take what .* holds of it: {NOT_TAKEN[name][1]}"
    for rank, result in enumerate(ranks.run(3, load_what_one_rank_does_not_take, tmp_path, name)):
        with pytest.raises(ValueError, match=sentence if rank == 1 else f"rank 1 refused: {sentence}"):
            raise result


def save_in_another_order(rank, group, folder):
    objects, generators = {"a": Odd(1), "b": Odd(2)}, {"c": torch.Generator(), "d": torch.Generator()}
    if rank == 1:
        objects, generators = (dict(reversed(each.items())) for each in (objects, generators))
    checkpoint.save(folder, 1, generators=generators, process_group=group, **objects)


def test_the_order_of_objects_does_not_count(ranks, tmp_path):
    ranks.results(3, save_in_another_order, tmp_path)


def save_heads_of_two_groups(rank, group, folder):
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = halves[rank // 2]
    torch.manual_seed(rank // 2)
    head = FusedCosFaceLoss(5, DIM, process_group=own)
    want = head.weight.full_tensor().clone()
    with pytest.raises(
        ValueError, match=r"head/weight is sharded over ranks \[., .\], and ranks \[0, 1, 2, 3\] save"
    ):
        checkpoint.save(folder / "both", 1, head=head, process_group=group)
    checkpoint.save(folder / str(rank // 2), 1, head=head, process_group=own)
    nn.init.zeros_(head.weight)
    checkpoint.load(folder / str(rank // 2), head=head, process_group=own)
    return torch.equal(head.weight.full_tensor(), want)


def test_heads_of_two_groups_under_one_name(ranks, tmp_path):
    """Of which one would be kept. Each group has a folder of its own instead."""
    assert ranks.results(4, save_heads_of_two_groups, tmp_path) == [True] * 4
    assert not (tmp_path / "both").exists()
