"""Checkpoints: saved on some ranks and loaded on others, spoiled by no crash, and nothing unpickled."""

from __future__ import annotations

import pytest
import torch
from ranks import LARGEST_WORLD
from support import run_python
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import FusedCosFaceLoss, checkpoint

CLASSES, DIM = 7, 6


class Run:
    """A small training run, on a group or alone."""

    parts = ("backbone", "head", "optimizer")

    def __init__(self, group=None, optimizer="sgd", classes=CLASSES, seed=0):
        torch.manual_seed(seed)
        self.group = group
        self.backbone = nn.Sequential(nn.Linear(4, DIM), nn.BatchNorm1d(DIM), nn.Dropout(0.2)).double()
        self.head = FusedCosFaceLoss(classes, DIM, scale=16.0, process_group=group, dtype=torch.float64)
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9, nesterov=True)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=0.01, amsgrad=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.data = torch.Generator().manual_seed(group.rank() if group else 0)
        self.classes = classes
        self.ddp = DistributedDataParallel(self.backbone, process_group=group) if group else self.backbone

    @property
    def objects(self):
        return {
            "backbone": self.backbone,
            "head": self.head,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "process_group": self.group,
            "generators": {"data": self.data, "torch": torch.default_generator},
        }

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        return losses

    def loss(self) -> torch.Tensor:
        data = torch.randn(5, 4, generator=self.data, dtype=torch.float64)
        labels = torch.randint(self.classes, (5,), generator=self.data)
        return self.head(self.ddp(data), labels)

    def everything(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state, whole."""
        tensors: dict[str, torch.Tensor] = {}
        for name in self.parts:
            checkpoint._encode(getattr(self, name).state_dict(), name, tensors)
        return {k: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for k, t in tensors.items()}


def save(rank, group, folder, optimizer, kind=Run):
    run = kind(group, optimizer)
    run.train(3)
    checkpoint.save(folder, 3, **run.objects)
    return run.everything(), run.train(3)


def load(rank, group, folder, optimizer, kind=Run):
    run = kind(group, optimizer, seed=9)
    run.train(1)
    step = checkpoint.load(folder, **run.objects)
    return step, run.everything(), run.schedule.last_epoch, run.train(3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_loads_on_any_number_of_ranks(ranks, tmp_path, optimizer):
    """Weights, optimizer state and schedule are the same on 1, 2, 3 and 4 ranks, and with none at all; on as many
    ranks as saved it, the losses go on to the bit."""
    saved = ranks.results(3, save, tmp_path, optimizer)
    want, _ = saved[0]
    for world in range(1, LARGEST_WORLD + 1):
        for rank, (step, got, epoch, after) in enumerate(ranks.results(world, load, tmp_path, optimizer)):
            assert (step, epoch) == (3, 3)
            assert got.keys() == want.keys()
            for key, tensor in want.items():
                assert torch.equal(got[key], tensor), key
            if world == 3:
                assert after == saved[rank][1]
    alone = Run(None, optimizer, seed=9)
    assert checkpoint.load(tmp_path, **alone.objects) == 3
    assert all(torch.equal(alone.everything()[key], tensor) for key, tensor in want.items())


def test_only_the_newest_are_kept(tmp_path):
    run = Run()
    for step in (1, 2, 10, 11):
        run.train(1)
        checkpoint.save(tmp_path, step, keep=2, **run.objects)
    checkpoint.save(tmp_path, 11, keep=2, **run.objects)  # once more
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000010", "step-000000000011"]
    assert checkpoint.latest(tmp_path).name == "step-000000000011"
    assert checkpoint.load(tmp_path / "step-000000000010", **run.objects) == 10


def test_nothing_to_load(tmp_path):
    run = Run()
    before = run.everything()
    assert checkpoint.load(tmp_path, **run.objects) is None
    assert checkpoint.load(tmp_path / "absent", **run.objects) is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in run.everything().items())


CRASH = """
import os, signal, sys
import safetensors.torch, pathlib
from cosface_kernels import checkpoint
from test_checkpoint import Run

run = Run()
run.train(2)
checkpoint.save(sys.argv[1], 2, **run.objects)
run.train(2)
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "before the rename":
    pathlib.Path.rename = die
elif sys.argv[2] == "while writing":
    import torch.distributed.checkpoint.filesystem as filesystem
    filesystem.os.fsync = die
checkpoint.save(sys.argv[1], 4, **run.objects)
"""


@pytest.mark.parametrize("moment", ["before the rename", "while writing"])
def test_crash_while_saving_leaves_the_last_good_one(tmp_path, moment):
    died = run_python(CRASH, str(tmp_path), moment)
    assert died.returncode == -9, died.stderr
    assert any(path.name.endswith(checkpoint.PARTIAL) for path in tmp_path.iterdir())
    run = Run(seed=5)
    assert checkpoint.load(tmp_path, **run.objects) == 2
    checkpoint.save(tmp_path, 3, **run.objects)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000002", "step-000000000003"]


def test_tensors_of_any_layout(tmp_path):
    def network() -> torch.nn.Module:
        return torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    saved, loaded = network(), network()
    checkpoint.save(tmp_path, 1, network=saved)
    checkpoint.load(tmp_path, network=loaded)
    assert torch.equal(loaded.weight, saved.weight)
    assert loaded.weight.is_contiguous(memory_format=torch.channels_last)


def test_holds_no_pickle(tmp_path, monkeypatch):
    """Loading unpickles nothing, and there is nothing in the folder that is not safetensors."""
    run = Run()
    run.train(1)
    path = checkpoint.save(tmp_path, 1, **run.objects)
    assert {file.suffix for file in path.iterdir()} == {".safetensors"}

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert checkpoint.load(tmp_path, **Run(seed=1).objects) == 1


def test_what_does_not_fit_is_named(tmp_path):
    run = Run()
    checkpoint.save(tmp_path, 1, **run.objects)
    other = Run(classes=8)
    with pytest.raises(ValueError, match=r"head/weight is torch.float64 of shape \(7, 6\) in the checkpoint, but"):
        checkpoint.load(tmp_path, **other.objects)
    with pytest.raises(ValueError, match="holds backbone, head, optimizer, schedule, but head were to be loaded"):
        checkpoint.load(tmp_path, head=run.head)
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.save(tmp_path, 1, keep=0)


class Odd:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 0.1, float("inf"), "text", (1, 2), [(0.9, 0.999), {}], {1: {"a": [None]}},
        torch.tensor(2.5), torch.empty(0), torch.empty(0, 3), torch.tensor([True, False]),
        [torch.ones(2), {5: torch.zeros(1, dtype=torch.bfloat16)}],
    ],
    ids=str,
)  # fmt: skip
def test_keeps_values_of_every_kind(tmp_path, value):
    checkpoint.save(tmp_path, 1, odd=Odd(value))
    other = Odd(None)
    checkpoint.load(tmp_path, odd=other)
    assert type(other.value) is type(value)
    assert str(other.value) == str(value)


def test_refuses_other_objects(tmp_path):
    with pytest.raises(TypeError, match="odd/value is a set; a checkpoint holds tensors, numbers"):
        checkpoint.save(tmp_path, 1, odd=Odd({1}))
    assert not list(tmp_path.iterdir())
