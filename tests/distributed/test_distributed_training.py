"""Backbones, wrapped and replicated heads train on several processes as on one."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from support import Backend, Dtypes, relative_error
from support.one_process import IGNORED, ON_ONE_PROCESS, RAGGED, Case, make_batch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import (
    FusedCosFaceLoss,
    FusedKappaFaceLoss,
    FusedMarginLoss,
    cosface_loss,
    family,
)
from cosface_kernels.distributed import GradScaler, class_range, clip_grad_norm_, empty_weight
from cosface_kernels.optim import FusedSGD


def _train(model_of, rank, group, samples, classes, steps=4):
    """A backbone, wrapped by model_of, before a head, on ragged batches; the weights after some steps."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16)).double()
    backbone = model_of(backbone, group)
    head = FusedCosFaceLoss(classes, 16, scale=16.0, process_group=group, dtype=torch.float64)
    optimizer = torch.optim.SGD(
        [{"params": backbone.parameters()}, {"params": head.parameters()}], lr=0.5, momentum=0.9
    )
    rng = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        data = torch.randn(sum(samples), 6, generator=rng, dtype=torch.float64)
        labels = torch.randint(classes, (sum(samples),), generator=rng)
        if group is not None:
            data, labels = (t.split(samples)[rank] for t in (data, labels))
        optimizer.zero_grad()
        loss = head(backbone(data), labels)
        loss.backward()
        norm = clip_grad_norm_([*backbone.parameters(), *head.parameters()], 0.5, process_group=group)
        optimizer.step()
        losses += [loss.detach(), norm.detach()]
    weights = [
        p.full_tensor() if isinstance(p, DTensor) else p for p in (*backbone.parameters(), *head.parameters())
    ]
    return losses, [w.detach().clone() for w in weights]


def _plain(backbone, group):
    return backbone


def _ddp(backbone, group):
    return DistributedDataParallel(backbone, process_group=group)


def _fsdp(backbone, group):
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in backbone:
        fully_shard(layer, mesh=mesh)
    return fully_shard(backbone, mesh=mesh)


def _train_on_rank(rank, group, model_of, samples, classes):
    return _train(model_of, rank, group, samples[: group.size()], classes)


@pytest.mark.parametrize("model_of", [_ddp, _fsdp], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("samples", [(6, 6, 6, 6), (5, 0, 3, 4)], ids=["even", "ragged"])
def test_backbones_train_as_on_one_process(ranks, world, model_of, samples):
    """Averaging the backbone's gradients makes ranks train, and clip, as one process does on the whole batch."""
    classes = 9
    results = ranks.results(world, _train_on_rank, model_of, samples, classes)
    losses, weights = _train(_plain, 0, None, samples[:world], classes)
    for got_losses, got_weights in results:
        torch.testing.assert_close(torch.stack(got_losses), torch.stack(losses), rtol=1e-9, atol=1e-12)
        for got, want in zip(got_weights, weights, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


class Wrapped(nn.Module):
    """A model that DistributedDataParallel wraps whole, head and all, at one depth or another."""

    def __init__(self, make, depth):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(6, 8)
        head = make(40, 8)
        for _ in range(depth):
            head = nn.ModuleDict({"head": head})
        self.part = head

    @property
    def head(self):
        part = self.part
        while isinstance(part, nn.ModuleDict):
            part = part["head"]
        return part

    def forward(self, data, labels):
        return self.head(self.backbone(data), labels)


def _train_wrapped(rank, group, make, sharded, depth=0, kind=torch.optim.SGD):
    """Parameters and buffers after three steps, whole, and the warnings."""
    options = {"process_group": group} if sharded else {}
    model = Wrapped(functools.partial(make, **options), depth)
    module = DistributedDataParallel(model, process_group=group) if group else model
    optimizers = [kind(part.parameters(), lr=0.1) for part in (model.backbone, model.head)]
    rng = torch.Generator().manual_seed(1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            data, labels = torch.randn(12, 6, generator=rng), torch.randint(40, (12,), generator=rng)
            if group:
                data, labels = (t.chunk(group.size())[rank] for t in (data, labels))
            module(data, labels).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    state = {name.replace("head.", ""): tensor for name, tensor in model.state_dict().items()}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in state.items()}
    return whole, [str(warning.message) for warning in warned if "drift" in str(warning.message)]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(
    "make", [FusedCosFaceLoss, family.FusedCurricularFaceLoss], ids=lambda make: make.__name__
)
def test_a_sharded_head_in_a_wrapped_module(ranks, make, depth):
    """It trains as one process does on the whole batch, statistics included."""
    want, _ = _train_wrapped(0, None, make, False, depth)
    for got, _ in ranks.results(3, _train_wrapped, make, True, depth):
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert relative_error(got[name], tensor) < 1e-4, name


def test_rows_of_a_sharded_head_move_in_a_wrapped_module(ranks):
    want, _ = _train_wrapped(0, None, FusedCosFaceLoss, False)
    for got, _ in ranks.results(2, _train_wrapped, FusedCosFaceLoss, True, 1, FusedSGD):
        for name, tensor in want.items():
            assert relative_error(got[name], tensor) < 1e-4, name


def _learned_scale(*sizes, **options):
    return FusedCosFaceLoss(*sizes, scale=nn.Parameter(torch.tensor(16.0)), **options)


def _train_wrapped_alone(rank, group, make):
    """Whole parameters of a head that is itself what DDP wraps, after three steps."""
    torch.manual_seed(0)
    head = make(40, 8, process_group=group) if group else make(40, 8)
    module = DistributedDataParallel(head, process_group=group) if group else head
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, labels = torch.randn(12, 8, generator=rng), torch.randint(40, (12,), generator=rng)
        if group:
            x, labels = (t.chunk(group.size())[rank] for t in (x, labels))
        module(x, labels).backward()
        for parameter in head.parameters():
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in head.parameters()]


def test_a_sharded_head_that_is_wrapped_itself(ranks):
    """Its other parameters are averaged; where it has none, torch says that there is nothing to wrap."""
    want = _train_wrapped_alone(0, None, _learned_scale)
    for got in ranks.results(2, _train_wrapped_alone, _learned_scale):
        for mine, theirs in zip(got, want, strict=True):
            assert relative_error(mine, theirs) < 1e-4
    for refusal in ranks.run(2, _train_wrapped_alone, FusedCosFaceLoss):
        assert "DistributedDataParallel is not needed" in str(refusal)


REPLICATED = {
    "plain": FusedCosFaceLoss,
    "sampled": functools.partial(FusedCosFaceLoss, sample_rate=0.3),
    "learned scale": _learned_scale,
    "statistics": family.FusedAdaFaceLoss,
}


def _train_replicated(rank, group, name, kind=torch.optim.SGD):
    return _train_wrapped(rank, group, lambda *sizes: REPLICATED[name](*sizes), False, kind=kind)


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, functools.partial(FusedSGD, accumulate=True)], ids=["torch", "accumulate"]
)
@pytest.mark.parametrize("name", REPLICATED)
def test_a_replicated_head_in_a_wrapped_module(ranks, name, kind):
    """It stays the same on all ranks, without a warning, and one of CosFace trains as on one process."""
    results = ranks.results(2, _train_replicated, name, kind)
    initial = Wrapped(REPLICATED[name], 0).head.weight
    for got, warned in results:
        assert not warned
        assert torch.equal(got["part.weight"], results[0][0]["part.weight"])
        assert not torch.equal(got["part.weight"], initial)
    if name in ("plain", "learned scale"):
        want, _ = _train_replicated(0, None, name)
        for key, tensor in want.items():
            torch.testing.assert_close(results[0][0][key], tensor, rtol=1e-4, atol=1e-6)


def _outside(rank, group):
    """Where the head is called without DDP: trained, evaluated, and in a group of one."""
    head, x, labels = FusedCosFaceLoss(40, 8), torch.randn(4, 8), torch.arange(4)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        head(x, labels)
        trained = [(warning.filename, str(warning.message)) for warning in warned]
        head.eval()(x, labels)
        head.train().get_logits(x)
        with torch.no_grad():
            head(x, labels)
    return trained, len(warned)


def test_a_replicated_head_outside_warns(ranks):
    for trained, count in ranks.results(2, _outside):
        ((file, message),) = trained
        assert file == __file__
        assert "copy of this head by its own samples, and the copies drift apart" in message
        assert "torch.distributed.group.WORLD is None before init_process_group()" in message
        assert count == 1


def _half(rank, group, dtype):
    """The gradient of an embedding, summed over the ranks, which must not be rounded between them."""
    batch = make_batch(Case("half", samples=RAGGED, dtypes=Dtypes(dtype, torch.float32)), group.size())
    weight = empty_weight(*batch.w.shape, group)
    own = class_range(len(batch.w), rank, group.size())
    weight.to_local().copy_(batch.w[own.start : own.stop])
    first = sum(RAGGED[:rank])
    x = batch.x[first : first + RAGGED[rank]].requires_grad_()
    loss = cosface_loss(x, nn.Parameter(weight), batch.labels[first : first + RAGGED[rank]])
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features(ranks, dtype):
    world = 4
    results = ranks.results(world, _half, dtype)
    batch = make_batch(Case("half", samples=RAGGED, dtypes=Dtypes(dtype, torch.float32)), world)
    x = batch.x.double().requires_grad_()
    weight = batch.w.to(Backend("cpu").operand(Dtypes(dtype, torch.float32)))  # as it is multiplied
    want = cosface_loss(x, weight.double(), batch.labels)
    want.backward()
    assert {r[0].dtype for r in results} == {torch.float32}
    torch.testing.assert_close(results[0][0].double(), want.detach(), rtol=1e-5, atol=0)
    got = torch.cat([r[1] for r in results]) / world
    assert got.dtype == dtype
    assert relative_error(got, x.grad) < 2 * torch.finfo(dtype).eps


def _train_in_half_precision(rank, group, broken):
    """Scales of the GradScaler, and weights before and after the step whose gradient overflows on rank 1 alone."""
    torch.manual_seed(0)
    backbone = DistributedDataParallel(nn.Linear(6, 16), process_group=group)
    head = FusedCosFaceLoss(9, 16, scale=16.0, process_group=group)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = GradScaler("cpu", init_scale=1024.0, process_group=group)
    rng = torch.Generator().manual_seed(rank)
    scales, weights = [], []
    for step in range(3):
        data, labels = torch.randn(4, 6, generator=rng), torch.randint(9, (4,), generator=rng)
        with torch.autocast("cpu", torch.float16):
            embeddings = backbone(data)
            loss = head(embeddings, labels)
        overflows = step == 1 and rank == 1
        if overflows and broken == "backbone":
            embeddings.register_hook(lambda grad: grad * torch.inf)
        scaler.scale(loss).backward()
        if overflows and broken == "head":
            head.weight.grad.to_local()[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(parameters, 1.0, process_group=group)
        scaler.step(optimizer)
        optimizer.zero_grad()
        scaler.update()
        scales.append((scaler.get_scale(), norm.isfinite().item()))
        weights.append((backbone.module.weight.detach().clone(), head.weight.full_tensor().detach().clone()))
    return embeddings.dtype, scales, weights


def test_clipping_takes_one_tensor_as_torch_does():
    weights = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.full((3, 4), 2.0)
    norms = [
        clip(weight, 0.5)
        for clip, weight in zip((clip_grad_norm_, nn.utils.clip_grad_norm_), weights, strict=True)
    ]
    assert norms[0] == norms[1]
    assert torch.equal(weights[0].grad, weights[1].grad)


@pytest.mark.parametrize("broken", ["head", "backbone"])
def test_an_overflow_on_one_rank_is_agreed(ranks, broken):
    """What overflows on one rank is skipped on all, and all halve their scale."""
    results = ranks.results(3, _train_in_half_precision, broken)
    for dtype, scales, weights in results:
        assert dtype == torch.float16
        assert scales == [(1024.0, True), (512.0, False), (512.0, True)]
        for mine, first in zip(weights, results[0][2], strict=True):
            assert all(torch.equal(*pair) for pair in zip(mine, first, strict=True))
        for before, after, later in zip(*weights, strict=True):
            assert torch.equal(before, after)
            assert not torch.equal(after, later)


# sub-centres are not sharded yet
FAMILY = [
    loss
    for name, loss in vars(family).items()
    if name.startswith("Fused") and loss not in (FusedMarginLoss, family.FusedSubCenterArcFaceLoss)
]


def _train_state(loss, rank, group, samples):
    """Losses, gradients and the margin's state of some steps on a fixed weight."""
    torch.manual_seed(0)
    options = {"class_counts": torch.arange(1, 10)} if loss is FusedKappaFaceLoss else {}
    head = loss(9, 6, process_group=group, dtype=torch.float64, **options)
    rng = torch.Generator().manual_seed(1)
    found = []
    for _ in range(3):
        x = 20 * torch.randn(sum(samples), 6, generator=rng, dtype=torch.float64)
        labels = torch.randint(9, (sum(samples),), generator=rng)
        labels[0] = IGNORED
        if group is not None:
            x, labels = (t.split(samples)[rank] for t in (x, labels))
        x.requires_grad_()
        value = head(x, labels)
        value.backward()
        found.append((value.detach(), x.grad))
    dw = head.weight.grad.full_tensor() if group is not None else head.weight.grad
    learned = {name: parameter.grad for name, parameter in head.named_parameters() if name != "weight"}
    return found, dw, learned | {name: buffer.clone() for name, buffer in head.named_buffers()}


def _train_state_on_rank(rank, group, loss, samples):
    return _train_state(loss, rank, group, samples)


@pytest.mark.parametrize("loss", [loss for loss in FAMILY if loss is not ON_ONE_PROCESS], ids=lambda x: x.__name__)
def test_margins_know_the_global_batch(ranks, loss):
    """Statistics of the batch and what is averaged from them are those of one process, and so are gradients that
    reach the embeddings' norms."""
    samples = (5, 0, 7)
    results = ranks.results(3, _train_state_on_rank, loss, samples)
    found, dw, state = _train_state(loss, 0, None, samples)
    for step, (value, dx) in enumerate(found):
        torch.testing.assert_close(torch.cat([r[0][step][1] for r in results]) / 3, dx, rtol=1e-8, atol=1e-12)
        for got, _, _ in results:
            torch.testing.assert_close(got[step][0], value, rtol=1e-10, atol=1e-12)
    for _, got_dw, got_state in results:
        torch.testing.assert_close(got_dw, dw, rtol=1e-8, atol=1e-12)
        assert got_state.keys() == state.keys()
        for name, buffer in state.items():
            torch.testing.assert_close(got_state[name], buffer)
            assert torch.equal(got_state[name], results[0][2][name])


def _compiled(rank, group):
    torch.manual_seed(0)
    head = FusedCosFaceLoss(9, 6, process_group=group)
    x, labels = torch.randn(rank + 2, 6), torch.arange(rank + 2)
    found = []
    for call in (head, torch.compile(head, backend="eager")):
        head.weight.grad, leaf = None, x.clone().requires_grad_()
        loss = call(leaf, labels)
        loss.backward()
        found.append((loss.detach(), leaf.grad, head.weight.grad.to_local()))
    return found


def test_under_torch_compile(ranks):
    for plain, compiled in ranks.results(2, _compiled):
        for got, want in zip(compiled, plain, strict=True):
            assert torch.equal(got, want)


def _learned_margins(rank, group):
    """The gradient of the margins that a rank's own samples' losses give."""
    torch.manual_seed(0)
    head = family.FusedAdaMSoftmaxLoss(9, 6, process_group=group, reduction="none", dtype=torch.float64)
    rng = torch.Generator().manual_seed(1)
    x, labels = torch.randn(12, 6, generator=rng, dtype=torch.float64), torch.arange(12) % 9
    if group is not None:
        x, labels = (t.split((5, 0, 7))[rank] for t in (x, labels))
    head(x, labels).sum().backward()
    return head.margin.margins.grad


def test_learned_margins_have_one_gradient_on_all_ranks(ranks):
    """Also where each rank's loss is of its own samples alone: that of the mean over the ranks' losses."""
    want = _learned_margins(0, None) / 3
    for got in ranks.results(3, _learned_margins):
        torch.testing.assert_close(got, want)
