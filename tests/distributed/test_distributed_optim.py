"""Sharded rows move as those of one weight: optimizers, clipping, overflow, saved state."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import test_checkpoint
import torch
from support import F32, F64
from support.one_process import assert_as_good_as_one
from support.ranks import LARGEST_WORLD
from support.sharded_moves import DIM, MOMENTUM, RAGGED, Case, batches, make_head
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import (
    FusedCosFaceLoss,
    checkpoint,
    margin_softmax_loss,
    ops,
)
from cosface_kernels.backends import BACKENDS
from cosface_kernels.distributed import GradScaler, agreement_on_rows, clip_grad_norm_, own_rows
from cosface_kernels.optim import FusedAdamW, FusedSGD

TORCHS = {FusedSGD: torch.optim.SGD, FusedAdamW: torch.optim.AdamW}


class Trained(NamedTuple):
    losses: Tensor
    dx: Tensor  # (steps, N, D)
    weight: Tensor
    state: dict[str, Tensor]


def train(case: Case, rank: int, group, optimizer_type=None) -> Trained:
    head = make_head(case, group)
    optimizer = (optimizer_type or case.optimizer)(head.parameters(), **case.options)
    losses, gradients = [], []
    for x, labels in batches(case, rank, group):
        x.requires_grad_()
        optimizer.zero_grad()
        loss = head(x, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        gradients.append(x.grad)
    state = {k: own_rows(v) for k, v in optimizer.state[head.weight].items() if torch.is_tensor(v) and v.dim()}
    return Trained(torch.stack(losses), torch.stack(gradients), own_rows(head.weight), state)


def train_on_rank(rank, group, case: Case) -> Trained:
    return train(case, rank, group)


CASES = [
    Case("plain sgd", options={"lr": 0.3}),
    Case("momentum", options=MOMENTUM, ignored=(0, 3, 6)),
    Case("nesterov", options={**MOMENTUM, "nesterov": True}),
    Case("confident", options=MOMENTUM, confident=True),
    Case("adamw", FusedAdamW, {"lr": 0.01}),
    Case("amsgrad", FusedAdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}, ignored=(1,)),
    Case("fewer classes than ranks", options=MOMENTUM, classes=2),
    Case("one class", FusedAdamW, {"lr": 0.01}, classes=1),
    Case("no samples at all", options=MOMENTUM, samples=(0, 0, 0, 0), reduction="sum"),
    Case("sum", options={"lr": 0.01}, reduction="sum"),
    Case("reference", options=MOMENTUM, backend="reference"),
    Case("accumulate", options={**MOMENTUM, "accumulate": True}, classes=2),
    Case("cache", options=MOMENTUM, head={"cache_bytes": 1 << 16}),
]


@pytest.mark.parametrize("dtypes", [F64, F32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_move_as_one_weight_does(ranks, world, case, dtypes):
    """To twice the distance of one process from torch.optim in float64, plus a few ulp of the logits."""
    case = replace(case, dtypes=dtypes, samples=case.samples[:world])
    results = ranks.results(world, train_on_rank, case)
    one = train(case, 0, None)
    torchs = {k: v for k, v in case.options.items() if k != "accumulate"}
    exact = train(replace(case, dtypes=F64, options=torchs, head={}), 0, None, TORCHS[case.optimizer])
    assert all(torch.equal(r.losses, results[0].losses) for r in results)
    ulp = torch.finfo(dtypes.compute).eps * case.scale
    got = {
        "loss": results[0].losses,
        "dx": torch.cat([r.dx for r in results], dim=1) / world,
        "weight": torch.cat([r.weight for r in results]),
        **{name: torch.cat([r.state[name] for r in results]) for name in one.state},
    }
    mine, right = ({"loss": t.losses, "dx": t.dx, "weight": t.weight, **t.state} for t in (one, exact))
    for name, value in got.items():
        assert_as_good_as_one(name, value, mine[name], right[name], ulp)


def _backbone_and_head(rank, group, samples):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, DIM)).double()
    backbone = DistributedDataParallel(backbone, process_group=group) if group else backbone
    head = FusedCosFaceLoss(9, DIM, scale=16.0, process_group=group, dtype=torch.float64)
    optimizers = torch.optim.SGD(backbone.parameters(), lr=0.1), FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in optimizers]
    rng = torch.Generator().manual_seed(1)
    for _ in range(5):
        data = torch.randn(sum(samples), 6, generator=rng, dtype=torch.float64)
        labels = torch.randint(9, (sum(samples),), generator=rng)
        if group is not None:
            data, labels = (t.split(samples)[rank] for t in (data, labels))
        head(backbone(data), labels).backward()
        for step in (*optimizers, *schedules):
            step.step()
        optimizers[0].zero_grad()
    weights = [*backbone.parameters(), head.weight.full_tensor() if group is not None else head.weight]
    return [w.detach().clone() for w in weights], optimizers[1].param_groups[0]["lr"]


def test_backbone_and_head_train_as_on_one_process(ranks):
    """Under DistributedDataParallel, with a learning rate that a schedule changes."""
    want, lr = _backbone_and_head(0, None, RAGGED)
    assert lr == 0.5 / 4
    for weights, rank_lr in ranks.results(4, _backbone_and_head, RAGGED):
        assert rank_lr == lr
        for got, expected in zip(weights, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)


def _clipped(rank, group):
    """The weight after a step with the factor and the norm that a row may have, and after two micro-batches."""
    case = Case("clipped", steps=1, classes=9, samples=(5, 4, 7))
    found = []
    for options in ({"gradient_factor": 0.5, "max_row_norm": 0.7}, {"accumulate": True}):
        head = make_head(case, group)
        optimizer = FusedSGD(head.parameters(), lr=1.0, **options)
        for _ in range(2):
            for x, labels in batches(case, rank, group):
                (head(x, labels) / 2).backward()
            if "accumulate" not in options:
                optimizer.step()
        optimizer.step()
        found.append(own_rows(head.weight))
    return found


def test_clipping_of_rows_and_accumulation(ranks):
    results = ranks.results(3, _clipped)
    for got, want in zip(zip(*results, strict=True), _clipped(0, None), strict=True):
        torch.testing.assert_close(torch.cat(got), want, rtol=1e-9, atol=1e-12)


def _swap(rank, group):
    """Half-way, a run changes from one optimizer to the other by the state_dict, and back."""
    case, weights = Case("swap", steps=2), []
    for order in ((FusedSGD, torch.optim.SGD, FusedSGD), (torch.optim.SGD, FusedSGD, torch.optim.SGD)):
        head, state = make_head(case, group), None
        for make in order:
            optimizer = make(head.parameters(), **MOMENTUM)
            if state is not None:
                optimizer.load_state_dict(state)
            for x, labels in batches(case, rank, group):
                head(x, labels).backward()
                optimizer.step()
                head.weight.grad = None
            state = copy.deepcopy(optimizer.state_dict())
            assert state["state"][0]["momentum_buffer"].placements == head.weight.placements
        weights.append(own_rows(head.weight))
    return weights


def test_state_passes_to_torch_and_back(ranks):
    for first, second in ranks.results(3, _swap):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def _load_whole_state(rank, group):
    head, whole = make_head(Case("state"), group), make_head(Case("state"), None)
    optimizers = [FusedSGD([h.weight], **MOMENTUM) for h in (head, whole)]
    x, labels = next(batches(Case("state"), 0, None))
    whole(x, labels).backward()
    optimizers[1].step()
    with pytest.raises(ValueError, match="laid out") as refusal:
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    return str(refusal.value)


def test_state_of_another_layout_is_refused(ranks):
    for message in ranks.results(2, _load_whole_state):
        assert "must be laid out like its weight, (103, 24) as (Shard(dim=0),), got (103, 24)." in message
    optimizer = FusedSGD([nn.Parameter(torch.ones(4, 2))], lr=0.1, momentum=0.9)
    other = FusedSGD([nn.Parameter(torch.ones(3, 2))], lr=0.1, momentum=0.9)
    state = optimizer.state_dict() | {"state": {0: {"momentum_buffer": torch.ones(4, 2)}}}
    with pytest.raises(ValueError, match=r"like its weight, \(3, 2\), got \(4, 2\)\."):
        other.load_state_dict(state)


def _clip(rank, group):
    """What is said of the gradient that backward has used up, by rank, and whether the run can go on."""
    head = make_head(Case("clip"), group)
    backbone = nn.Linear(2, 2)
    backbone.weight.grad = torch.ones(2, 2)
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    messages = []
    for x, labels in batches(Case("clip", steps=2), rank, group):
        head(x, labels).backward()
        for clip in (
            lambda: clip_grad_norm_([*backbone.parameters(), *head.parameters()], 1.0),
            lambda: nn.utils.clip_grad_norm_(head.parameters(), 1.0),
            lambda: nn.utils.clip_grad_value_(head.parameters(), 1.0),
        ):
            with pytest.raises(RuntimeError) as refusal:
                clip()
            messages.append(str(refusal.value))
        assert "(103, 24)" in repr(head.weight.grad)
        optimizer.step()
        assert head.weight.grad is None
    return messages


def test_clipping_by_the_global_norm_afterwards_raises(ranks):
    for messages in ranks.results(3, _clip):
        assert len(messages) == 6
        assert all("set gradient_factor (from a norm known before backward)" in message for message in messages)


def _overflow(rank, group, where):
    """Scales and weights of five steps, of which one overflows on rank 1 alone."""
    torch.manual_seed(0)
    backbone = DistributedDataParallel(nn.Linear(6, DIM), process_group=group)
    head = FusedCosFaceLoss(2, DIM, scale=16.0, process_group=group)  # rank 2 owns no class
    scaler = (GradScaler if where == "loss" else torch.amp.GradScaler)("cpu", init_scale=1024.0)
    optimizers = (
        FusedSGD(head.parameters(), lr=0.1, momentum=0.9, grad_scaler=scaler),
        torch.optim.SGD(backbone.parameters(), lr=0.1),
    )
    rng = torch.Generator().manual_seed(rank)
    fold = ops.fold
    weights, scales = [head.weight.full_tensor().detach().clone()], []
    for step in range(4):
        data, labels = torch.randn(4, 6, generator=rng), torch.randint(2, (4,), generator=rng)
        broken = step == 2 and rank == 1
        loss = head(backbone(data), labels)
        if broken and where == "loss":
            loss = loss * torch.inf
        if broken and where == "shard":  # of what the op alone sees
            ops.fold = lambda *args: fold(*args)._replace(g_lse=fold(*args).g_lse * torch.inf)
        scaler.scale(loss).backward()
        ops.fold = fold
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        scales.append(scaler.get_scale())
        weights.append(head.weight.full_tensor().detach().clone())
    return scales, weights, int(optimizers[0].state[head.weight]["step"])


@pytest.mark.parametrize("where", ["loss", "shard"])
def test_what_overflows_on_one_rank_is_skipped_on_all(ranks, where):
    for scales, weights, steps in ranks.results(3, _overflow, where):
        moved = [not torch.equal(*pair) for pair in pairwise(weights)]
        assert moved == [True, True, False, True]
        assert scales == [1024.0, 1024.0, 512.0, 512.0]
        assert steps == 3
        assert all(bool(w.isfinite().all()) for w in weights)


def _agreed(rank, group):
    """Every rank's count, or what each raises, of good and of bad statements, one after the other."""
    weight = make_head(Case("agreed"), group).weight
    found = []
    for facts, refusing in (({"a": 1}, None), ({"a": rank // 2}, None), ({"a": rank}, 1), ({"a": 2}, None)):
        try:
            with agreement_on_rows(weight, "this") as own:
                own.facts, own.count = facts, 10 + rank
                if rank == refusing:
                    raise MemoryError("no memory")
            found.append(own.counts)
        except (ValueError, MemoryError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_agreement(ranks):
    unlike = "ValueError: a must be the same on every rank, got 0 on rank 0 and 1 on rank 2."
    refused = "ValueError: rank 1 refused: no memory"
    for rank, found in enumerate(ranks.results(3, _agreed)):
        own = "MemoryError: no memory" if rank == 1 else refused
        assert found == [[10, 11, 12], unlike, own, [10, 11, 12]]


def _interrupted(rank, group, lost):
    """What is said after a step that ended early on one rank; then all go back to a state they kept."""
    case = Case("interrupted", options=MOMENTUM)
    head = make_head(case, group)
    optimizer = FusedSGD(head.parameters(), **MOMENTUM)
    x, labels = next(batches(case, rank, group))

    def step():
        head(x, labels).backward()
        optimizer.step()

    step()
    kept = copy.deepcopy(own_rows(head.weight)), copy.deepcopy(optimizer.state_dict())
    cpu = BACKENDS["cpu"]
    whole = cpu.backward_update_

    def half(*tensors, **options):
        raise MemoryError

    if rank == 1 and lost == "in backward":
        cpu.backward_update_ = half
        with pytest.raises(MemoryError):
            step()
        cpu.backward_update_ = whole
        with pytest.raises(RuntimeError, match="was interrupted"):
            optimizer.state_dict()
    elif rank == 1:
        head(x, labels).backward()
    else:
        step()
    with pytest.raises((RuntimeError, ValueError)) as refusal:
        step()
    with torch.no_grad():
        own_rows(head.weight).copy_(kept[0])
    optimizer.load_state_dict(kept[1])
    step()
    return str(refusal.value), own_rows(head.weight)


def test_a_step_that_one_rank_did_not_end_is_told_to_all(ranks):
    results = ranks.results(3, _interrupted, "in backward")
    sentence = "The last step on a weight of shape (103, 24) was interrupted, with some of its rows moved"
    assert results[1][0].startswith(sentence)
    assert all(results[r][0].startswith(f"rank 1 refused: {sentence}") for r in (0, 2))
    for message, _ in ranks.results(3, _interrupted, "before step()"):
        assert message == (
            "optimizer must be the same on every rank, got step 2, idle on rank 0 and step 2, moved on rank 1."
        )
    case = Case("interrupted", options=MOMENTUM, samples=RAGGED[:3], steps=1)
    head = make_head(case, None)
    optimizer = FusedSGD(head.parameters(), **MOMENTUM)
    for _ in range(2):
        for x, labels in batches(case, 0, None):
            head(x, labels).backward()
            optimizer.step()
    torch.testing.assert_close(torch.cat([w for _, w in results]), head.weight.detach(), rtol=1e-9, atol=1e-12)


def _round(rank, group, classes):
    """bfloat16 rows of ones after a step far below their last bit, with gradients that are the same everywhere."""
    head = FusedCosFaceLoss(classes, DIM, process_group=group, dtype=torch.bfloat16)
    nn.init.ones_(own_rows(head.weight))
    optimizer = FusedSGD(head.parameters(), lr=2.0**-10, accumulate=True, seed=3)
    head.get_logits(torch.zeros(1, DIM))  # a head's weight is one that a head has used
    for _ in range(2):
        head.weight.grad = torch.ones_like(head.weight)
        optimizer.step()
    return own_rows(head.weight)


def test_rounding_is_a_stream_of_each_shard(ranks):
    classes = 2000
    found = ranks.results(4, _round, classes)
    assert torch.equal(ranks.results(1, _round, classes)[0], _round(0, None, classes))
    assert all(torch.equal(a, b) for a, b in zip(found, ranks.results(4, _round, classes), strict=True))
    assert not any(torch.equal(found[0], other) for other in found[1:])
    moved = 1 - torch.cat(found).double()
    standard_error = float(moved.std()) / math.sqrt(moved.numel())
    assert abs(float(moved.mean()) - 2 * 2.0**-10) < 4 * standard_error


def _twice(rank, group, classes):
    """What is said of a second backward before `step()`, and of one whose forward saw the weight before it."""
    case = Case("twice", classes=classes, steps=2)
    head = make_head(case, group)
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    losses = [head(x, labels) for x, labels in batches(case, rank, group)]
    losses[0].backward()
    moved = own_rows(head.weight).clone()
    messages = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as refusal:
            losses[1].backward(retain_graph=True)
        messages.append(str(refusal.value))
        optimizer.zero_grad()
        optimizer.step()
    assert torch.equal(own_rows(head.weight), moved)
    return messages


@pytest.mark.parametrize("classes", [103, 1], ids=["all ranks", "one rank"])
def test_two_backwards_before_a_step_raise_and_change_nothing(ranks, classes):
    for twice, stale in ranks.results(2, _twice, classes):
        assert "backward ran twice" in twice
        assert "modified by an inplace operation" in stale


def _on_other_meshes(rank, group):
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 6), DeviceMesh.from_group(group, "cpu"), [Shard(1)]))
    optimizer = FusedSGD([weight], lr=0.1)
    with pytest.raises(ValueError, match="must be sharded on dimension 0") as refusal:
        margin_softmax_loss(torch.ones(2, 6), weight, torch.tensor([0, 3]), margin=0.3)
    optimizer.step()
    return str(refusal.value)


def test_weights_that_are_sharded_otherwise_are_refused(ranks):
    assert all("Shard(dim=1)" in message for message in ranks.results(2, _on_other_meshes))


def _compiled(rank, group):
    found = []
    for compile in (lambda head: head, lambda head: torch.compile(head, backend="eager")):
        case = Case("compiled")
        head = make_head(case, group)
        optimizer = FusedSGD(head.parameters(), **MOMENTUM)
        call = compile(head)
        for x, labels in batches(case, rank, group):
            call(x.requires_grad_(), labels).backward()
            optimizer.step()
        found.append((own_rows(head.weight), x.grad))
    return found


def test_under_torch_compile(ranks):
    for plain, compiled in ranks.results(2, _compiled):
        assert all(torch.equal(got, want) for got, want in zip(compiled, plain, strict=True))


class Run(test_checkpoint.Run):
    """A head that samples its classes, its optimizer and its schedule, on a group or alone."""

    parts = ("head", "optimizer")

    def __init__(self, group, optimizer: type, seed: int = 0):
        torch.manual_seed(seed)
        self.group = group
        self.head = FusedCosFaceLoss(23, 6, scale=16.0, process_group=group, dtype=torch.float64, sample_rate=0.4)
        options = {"momentum": 0.9, "nesterov": True} if optimizer is FusedSGD else {"amsgrad": True}
        self.optimizer = optimizer(self.head.parameters(), lr=0.1, state_dtype=torch.float32, **options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.data = torch.Generator().manual_seed(group.rank() if group else 0)

    @property
    def objects(self):
        return {
            "head": self.head,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "process_group": self.group,
            "generators": {"data": self.data},
        }

    def loss(self) -> Tensor:
        x = torch.randn(3, 6, generator=self.data, dtype=torch.float64)
        return self.head(x, torch.randint(23, (3,), generator=self.data))


@pytest.mark.parametrize("optimizer", [FusedSGD, FusedAdamW])
def test_checkpoints_load_on_any_number_of_ranks(ranks, tmp_path, optimizer):
    """Weight, state, draws and schedule are the same on 1, 2, 3 and 4 ranks, and with none at all; on as many
    ranks as saved it, the losses go on to the bit."""
    saved = ranks.results(3, test_checkpoint.save, tmp_path, optimizer, Run)
    want, _ = saved[0]
    assert int(want["head/sampler.draws"]) == 3
    assert {t.dtype for key, t in want.items() if "optimizer/state/0/" in key and t.dim()} == {torch.float32}
    assert all(bool(want[key].any()) for key in want)
    for world in range(1, LARGEST_WORLD + 1):
        for rank, (step, got, epoch, after) in enumerate(
            ranks.results(world, test_checkpoint.load, tmp_path, optimizer, Run)
        ):
            assert (step, epoch) == (3, 3)
            assert got.keys() == want.keys()
            for key, tensor in want.items():
                assert torch.equal(got[key], tensor), key
            if world == 3:
                assert after == saved[rank][1]
    alone = Run(None, optimizer, seed=9)
    assert checkpoint.load(tmp_path, **alone.objects) == 3
    assert all(torch.equal(alone.everything()[key], tensor) for key, tensor in want.items())
    assert all(math.isfinite(loss) for loss in alone.train(2))
