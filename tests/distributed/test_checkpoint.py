"""Checkpoints: saved on some ranks and loaded on others, spoiled by no crash, and nothing unpickled."""

from __future__ import annotations

import copy
from collections import Counter
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from support import patience, run_python
from support.formulas import LOSSES
from support.ranks import LARGEST_WORLD, Odd
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import FusedCosFaceLoss, checkpoint, structure
from cosface_kernels.optim import FusedAdamW, FusedSGD

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
            structure.encode(getattr(self, name).state_dict(), name, tensors)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000000010-000003",
        "step-000000000011-000004",
    ]
    assert checkpoint.latest(tmp_path).name == "step-000000000011-000004"
    assert checkpoint.load(tmp_path / "step-000000000010-000003", **run.objects) == 10


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_is_what_was_written_last(tmp_path, keep):
    """Whatever its step: after a rollback, a restart from 0, the same step again."""
    for count, step in enumerate([5, 9, 3, 0, 0, 7, 2], start=1):
        path = checkpoint.save(tmp_path, step, keep=keep, odd=Odd(count))
        assert checkpoint.latest(tmp_path) == path
        loaded = Odd(None)
        assert checkpoint.load(tmp_path, odd=loaded) == step
        assert loaded.value == count
        assert len(list(tmp_path.iterdir())) == min(keep, count)


def test_a_folder_from_before_checkpoints_were_counted(tmp_path):
    for step in (8, 9):
        path = checkpoint.save(tmp_path, step, odd=Odd(step))
        path.rename(tmp_path / f"step-{step:012d}")
    (tmp_path / "step-by-step").mkdir()
    loaded = Odd(None)
    assert checkpoint.load(tmp_path, odd=loaded) == 9
    checkpoint.save(tmp_path, 1, odd=Odd(1))
    assert checkpoint.load(tmp_path, odd=loaded) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000000001-000001", "step-000000000009", "step-by-step"
    ]  # fmt: skip
    assert checkpoint.load(tmp_path / "step-by-step", odd=loaded) is None


def test_nothing_to_load(tmp_path):
    run = Run()
    before = run.everything()
    assert checkpoint.load(tmp_path, **run.objects) is None
    assert checkpoint.load(tmp_path / "absent", **run.objects) is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in run.everything().items())


CRASH = """
import os, shutil, sys
from pathlib import Path
import torch
from cosface_kernels import checkpoint

torch.set_num_threads(1)  # of others a fork would have none
folder, left = Path(sys.argv[1]), [0]

def change(*file):
    left[0] -= 1
    if left[0] == 0:
        for descriptor in file:  # what is not yet on the disk
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os._exit(9)

def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and args[1] != "r"
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"):
        change()

def fsync(descriptor):
    change(*([descriptor] if os.path.isfile(f"/proc/self/fd/{descriptor}") else []))

sys.addaudithook(watch)
os.fsync = fsync

def state(value):
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, value)
    return layer

def save(step, value, keep):
    checkpoint.save(folder, step, keep=keep, layer=state(value))

def load():
    layer = state(0.0)
    return checkpoint.load(folder, layer=layer), layer.weight[0, 0].item()

moments = []
for before, step, keep in (([], 3, 2), ([(3, 1.0)], 3, 1), ([(3, 1.0), (6, 2.0)], 0, 2)):
    old, died = (before[-1] if before else (None, 0.0)), 9
    while died:
        shutil.rmtree(folder, ignore_errors=True)
        for s, value in before:
            save(s, value, keep=2)
        child, moment = os.fork(), moments.count((step, keep)) + 1
        if not child:
            left[0] = moment
            save(step, 9.0, keep)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert died in (0, 9), died
        appeared = any(path.name.startswith(f"step-{step:012d}-{len(before) + 1:06d}") and not path.suffix
                       for path in folder.glob("*"))
        assert load() == ((step, 9.0) if appeared else old), (step, keep, moment)
        assert appeared or died, "it was saved"
        save(5, 7.0, keep=1)  # what was left is in the way of nothing
        assert load() == (5, 7.0)
        assert len(list(folder.iterdir())) == 1
        moments.append((step, keep))
print(*map(moments.count, dict.fromkeys(moments)))
"""


def test_crash_at_any_change_of_the_folder_leaves_the_newest_complete_checkpoint(tmp_path):
    """The process ends before the k-th call that makes, writes, renames or removes something, for every k."""
    run = run_python(CRASH, str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    first, *others = map(int, run.stdout.split())
    assert first > 5  # the folders, the file, its bytes, the two names
    assert all(moments > first for moments in others)  # no folder for all, but one checkpoint is removed


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


MOMENTA = partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW, partial(FusedSGD, momentum=0.9), FusedAdamW


@pytest.mark.parametrize("kind", MOMENTA, ids=["SGD", "AdamW", "FusedSGD", "FusedAdamW"])
def test_the_state_of_parameters_of_any_shape(tmp_path, kind):
    """Of every head, with a scale that learns, if it does not set its scale itself."""
    shapes = [(), (1,), (3,), (0,), (0, 4), (2, 0)]
    for name, (make, _) in LOSSES.items():
        others = nn.ParameterList([torch.ones(shape) for shape in shapes])
        saved = nn.ModuleList([make(37, DIM), others])
        if name != "adacos":
            saved[0].scale = nn.Parameter(torch.tensor(16.0))
        loaded = copy.deepcopy(saved)
        optimizer, other = (kind(model.parameters(), lr=0.01) for model in (saved, loaded))
        loss = saved[0](30 * torch.ones(2, DIM), torch.arange(2))
        (loss + sum(each.square().sum() for each in others)).backward()
        optimizer.step()
        checkpoint.save(tmp_path, 1, keep=1, model=saved, optimizer=optimizer)
        checkpoint.load(tmp_path, model=loaded, optimizer=other)
        want, got = (each.state_dict()["state"] for each in (optimizer, other))
        for key, state in want.items():
            assert all(torch.equal(got[key][of], moment) for of, moment in state.items()), (name, key)


def test_what_does_not_fit_is_named(tmp_path):
    run = Run()
    checkpoint.save(tmp_path, 1, **run.objects)
    other = Run(classes=8)
    with pytest.raises(ValueError, match=r"head/weight is torch.float64 of shape \(7, 6\) in the checkpoint, but"):
        checkpoint.load(tmp_path, **other.objects)
    with pytest.raises(ValueError, match="holds backbone, head, optimizer, schedule, but no ema, scaler"):
        checkpoint.load(tmp_path, head=run.head, ema=run.backbone, scaler=run.head)
    for keep in (0, None, 1.5):
        with pytest.raises(ValueError, match=f"keep must be an integer of at least 1, got {keep}"):
            checkpoint.save(tmp_path, 1, keep=keep)
    for step in (-1, 0.5, "1", 10**12):
        with pytest.raises(ValueError, match=rf"step must be an integer in \[0, 10\^12\), got {step!r}"):
            checkpoint.save(tmp_path, step, **run.objects)


def test_parts_load_by_choice(tmp_path):
    saved, loaded = Run(), Run(seed=1)
    saved.train(1)
    checkpoint.save(tmp_path, 1, **saved.objects)
    other_parts = {key: tensor for key, tensor in loaded.everything().items() if not key.startswith("head")}
    assert checkpoint.load(tmp_path, head=loaded.head) == 1
    assert torch.equal(loaded.head.weight, saved.head.weight)
    assert all(torch.equal(loaded.everything()[key], tensor) for key, tensor in other_parts.items())


class Tied(nn.Module):
    """One weight under two names, and a second view of its memory."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layer = nn.Linear(3, 3)
        self.layers = nn.Sequential(layer, layer)
        self.register_buffer("flat", layer.weight.detach().view(-1))


def test_tensors_that_are_one(tmp_path):
    """They are written once, and load into those that are one or not, each by itself or together."""
    saved = Tied(0)
    path = checkpoint.save(tmp_path, 1, model=saved, layer=saved.layers[0], empty=Odd([torch.empty(0)] * 2))
    assert sum(file.stat().st_size for file in path.iterdir()) < 3000
    for name in ("model/layers.0.weight", "model/layers.1.weight", "layer/weight"):
        assert torch.equal(checkpoint.load_tensor(path, name), saved.layers[0].weight)
    assert torch.equal(checkpoint.load_tensor(path, "model/flat"), saved.flat)
    layer, model = nn.Linear(3, 3), Tied(1)
    checkpoint.load(tmp_path, layer=layer)
    checkpoint.load(tmp_path, model=model)
    both = Tied(2)
    checkpoint.load(tmp_path, layer=both.layers[0], model=both)
    for weight in (layer.weight, model.layers[1].weight, both.layers[0].weight):
        assert torch.equal(weight, saved.layers[0].weight)
    apart = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    checkpoint.save(tmp_path, 2, model=saved.layers)
    checkpoint.load(tmp_path, model=apart)
    assert torch.equal(apart[1].weight, saved.layers[0].weight)
    assert apart[1].weight.data_ptr() != apart[0].weight.data_ptr()


def save_twice(rank, group, folder, classes):
    run = Run(group, classes=classes)
    model = nn.ModuleDict({"backbone": run.backbone, "head": run.head})
    checkpoint.save(folder, 1, model=model, head=run.head, process_group=group)
    return run.head.weight.full_tensor()


def load_part(rank, group, folder, classes):
    run = Run(group, classes=classes, seed=rank)
    checkpoint.load(folder, head=run.head, process_group=group)
    return run.head.weight.full_tensor()


@pytest.mark.parametrize("classes", [1, 3, CLASSES])
def test_a_sharded_tensor_given_twice(ranks, tmp_path, classes):
    """Also where ranks have no rows of it."""
    want, *_ = ranks.results(LARGEST_WORLD, save_twice, tmp_path, classes)
    assert all(torch.equal(got, want) for got in ranks.results(3, load_part, tmp_path, classes))


def save_where_it_cannot(rank, group, folder):
    checkpoint.save(folder, 1, process_group=group, **({"layer": nn.Linear(2, 2)} if group else {}))


def test_every_rank_says_why_it_could_not_be_written(ranks, tmp_path):
    (tmp_path / "file").touch()
    for result in ranks.run(2, save_where_it_cannot, tmp_path / "file"):
        assert isinstance(result, NotADirectoryError | FileExistsError), result


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 0.1, float("inf"), "text", (1, 2), [(0.9, 0.999), {}], {1: {"a": [None]}},
        Counter([2, 4, 4]),
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
    with pytest.raises(TypeError, match=r"odd/value is a sparse tensor; a checkpoint holds dense ones\.$"):
        checkpoint.save(tmp_path, 1, odd=Odd(torch.eye(2).to_sparse()))
    for call in (checkpoint.save, checkpoint.load):
        arguments = (tmp_path, 1) if call is checkpoint.save else (tmp_path,)
        for value, shown in (
            (3, "int 3; a number can"),
            (None, "NoneType None; a number can"),
            (nn.Parameter(torch.ones(5, 2)), r"a Parameter of shape \(5, 2\); give the module that it is in\.$"),
        ):
            with pytest.raises(TypeError, match=f"epoch must have state_dict and load_state_dict, got {shown}"):
                call(*arguments, odd=Odd(1), epoch=value)
        with pytest.raises(
            TypeError, match=r"process_group must be a torch.distributed.ProcessGroup or None, got 1"
        ):
            call(*arguments, odd=Odd(1), process_group=1)
        with pytest.raises(TypeError, match=r"folder must be a path, got None\."):
            call(None, *arguments[1:], odd=Odd(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "error", "sentence"),
    [
        ({1: torch.ones(2), "1": torch.zeros(2)}, ValueError, r"^odd/value/1 is the place of two tensors"),
        ({"a": {"b/c": torch.ones(2)}, "a/b": {"c": torch.zeros(2)}}, ValueError, r"^odd/value/a/b/c is the"),
        ({b"a": torch.ones(2)}, TypeError, r"^odd/value has a key that is a bytes, b'a'; those of a checkpoint"),
        ({(1, 2): 3}, TypeError, r"^odd/value has a key that is a tuple, \(1, 2\)"),
    ],
    ids=["number and string", "slash", "bytes", "tuple"],
)
def test_refuses_keys_that_would_not_come_back(tmp_path, value, error, sentence):
    with pytest.raises(error, match=sentence):
        checkpoint.save(tmp_path, 1, odd=Odd(value))
    assert not list(tmp_path.iterdir())


def test_momentum_of_sampled_classes(tmp_path):
    head = FusedCosFaceLoss(50, DIM, scale=16.0, sample_rate=0.3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(torch.randn(4, DIM), torch.arange(4)).backward()
    optimizer.step()
    with pytest.raises(
        TypeError, match=r"optimizer/state/0/momentum_buffer is a sparse tensor; .* take FusedSGD, or"
    ):
        checkpoint.save(tmp_path, 1, optimizer=optimizer)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("head", lambda: nn.Sequential(nn.Linear(2, 2))),
        ("optimizer", lambda: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)),
        ("optimizer", lambda: FusedSGD(nn.Linear(2, 2).parameters(), lr=0.1)),
    ],
    ids=["module", "optimizer", "optimizer of rows"],
)
def test_what_an_object_does_not_take_is_named(tmp_path, name, other):
    path = checkpoint.save(tmp_path, 1, **Run().objects)
    with pytest.raises(
        ValueError, match=rf"(?s)^{name} does not take what {path} holds of it: .*(group|Missing key)"
    ):
        checkpoint.load(tmp_path, **{name: other()})


def test_a_damaged_file_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, odd=Odd(torch.ones(9)))
    (file,) = path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    for read in (
        lambda: checkpoint.load(tmp_path, odd=Odd(None)),
        lambda: checkpoint.load_tensor(path, "odd/value"),
    ):
        with pytest.raises(RuntimeError, match=rf"^reading {path} failed: .*header"):
            read()


def call_on_some(rank, group, folder, call, callers):
    own = dist.new_group(range(2), timeout=timedelta(seconds=patience(3)))
    if rank in callers:
        arguments = (folder, 2) if call is checkpoint.save else (folder,)
        call(*arguments, layer=nn.Linear(2, 2), process_group=own)


@pytest.mark.parametrize("callers", [(0,), (1,)], ids=["first alone", "last alone"])
@pytest.mark.parametrize("call", [checkpoint.save, checkpoint.load], ids=lambda call: call.__name__)
def test_a_rank_that_does_not_call(ranks, tmp_path, call, callers):
    checkpoint.save(tmp_path, 1, layer=nn.Linear(2, 2))
    results = ranks.run(LARGEST_WORLD, call_on_some, tmp_path, call, callers)
    for rank, result in enumerate(results):
        if rank in callers:
            assert f"failed on rank {rank} of 2: every rank must call save and load, and another did not" in str(
                result
            )
        elif rank < 2:
            assert result is None
