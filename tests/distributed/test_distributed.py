"""Classes sharded over 1 to 4 real processes: the loss and gradients of one process, and refusals on all."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from support import F32, F64, Backend, Dtypes, make_problem, relative_error
from support.ranks import LARGEST_WORLD
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import (
    FusedCosFaceLoss,
    FusedKappaFaceLoss,
    FusedLSoftmaxLoss,
    FusedMarginLoss,
    cosface_loss,
    family,
    margin_softmax_loss,
)
from cosface_kernels.distributed import GradScaler, class_range, clip_grad_norm_, empty_weight
from cosface_kernels.margins import ArcFaceMargin, CurricularFaceMargin, LSoftmaxMargin
from cosface_kernels.optim import FusedSGD

WORLDS = range(1, LARGEST_WORLD + 1)
IGNORED = -100


@pytest.fixture(params=WORLDS, ids="{} ranks".format, scope="module")
def world(request):
    return request.param


@dataclass(frozen=True)
class Case:
    """A global batch, how its rows fall to the ranks, and how the loss is called."""

    name: str
    classes: int = 103  # 2, 3 and 4 ranks own unequal shares
    samples: tuple[int, ...] = (8, 8, 8, 8)  # rows of each rank
    dtypes: Dtypes = F32
    regime: str = "random"
    scale: float = 64.0
    backend: str = "cpu"
    reduction: str = "mean"
    margin: str = "cosface"
    ignored: tuple[int, ...] = ()
    scale_kind: str = "number"
    weighted: bool = False
    own_classes: tuple[int, int] | None = None  # all labels fall in this range
    zero_rows: bool = False

    def __str__(self) -> str:
        return self.name


class Batch(NamedTuple):
    x: Tensor
    w: Tensor
    labels: Tensor
    scale: Tensor
    sample_weight: Tensor | None
    upstream: Tensor  # (N,) gradient of each row's loss, for reduction "none"


def make_batch(case: Case, world: int) -> Batch:
    n = sum(case.samples[:world])
    problem = make_problem(n, case.classes, 24, case.dtypes, regime=case.regime, scale=case.scale)
    labels, x, w = problem.targets.clone(), problem.x, problem.w
    if case.own_classes:
        low, high = case.own_classes
        labels = low + labels % (high - low)
    labels[[i for i in case.ignored if i < n]] = IGNORED
    if case.zero_rows and n > 1:
        x[1] = 0
        w[case.classes // 2] = 0
    rng = torch.Generator().manual_seed(3)
    draw = torch.rand(n, generator=rng, dtype=torch.float64).to(case.dtypes.compute)
    upstream = torch.randn(n, generator=rng, dtype=torch.float64).to(case.dtypes.compute)
    scales = {
        "number": torch.tensor(case.scale),
        "parameter": torch.tensor(case.scale, dtype=case.dtypes.compute),
        "vector": case.scale * (0.5 + draw),
    }
    return Batch(x, w, labels, scales[case.scale_kind], 0.1 + draw if case.weighted else None, upstream)


def psi_of(name: str):
    if name == "arcface":
        return lambda cos: torch.cos(torch.acos(cos.clamp(-0.999, 0.999)) + 0.5)
    return 0.35


class Result(NamedTuple):
    loss: Tensor
    dx: Tensor
    dw: Tensor
    dscale: Tensor | None
    lse: Tensor
    target_cos: Tensor
    max_neg: Tensor
    accuracy: Tensor


def evaluate(batch: Batch, case: Case, weight: Tensor, rows: slice) -> Result:
    """Loss, gradients and statistics of some rows of the batch, on a weight that may be sharded."""
    x = batch.x[rows].clone().requires_grad_()
    scale: float | Tensor = case.scale
    if case.scale_kind != "number":
        scale = (batch.scale[rows] if case.scale_kind == "vector" else batch.scale).clone().requires_grad_()
    loss, stats = margin_softmax_loss(
        x,
        weight,
        batch.labels[rows],
        margin=psi_of(case.margin),
        scale=scale,
        reduction=case.reduction,
        sample_weight=None if batch.sample_weight is None else batch.sample_weight[rows],
        ignore_index=IGNORED,
        backend=case.backend,
        return_stats=True,
    )
    if case.reduction == "none":
        loss.backward(batch.upstream[rows])
    else:
        loss.backward()
    dw = weight.grad.to_local() if isinstance(weight, DTensor) else weight.grad
    return Result(loss.detach(), x.grad, dw, getattr(scale, "grad", None), *stats[:4])


def on_rank(rank, group, case: Case) -> Result:
    batch = make_batch(case, group.size())
    weight = empty_weight(*batch.w.shape, group, dtype=batch.w.dtype)
    own = class_range(len(batch.w), rank, group.size())
    weight.to_local().copy_(batch.w[own.start : own.stop])
    first = sum(case.samples[:rank])
    return evaluate(batch, case, nn.Parameter(weight), slice(first, first + case.samples[rank]))


def on_one(case: Case, world: int) -> Result:
    batch = make_batch(case, world)
    return evaluate(batch, case, nn.Parameter(batch.w.clone()), slice(None))


RAGGED = (5, 1, 7, 3)
CASES = [
    Case("even"),
    Case("ragged", samples=RAGGED),
    Case("a rank without samples", samples=(4, 0, 6, 0)),
    Case("first rank without samples", samples=(0, 5, 1, 2)),
    Case("no samples at all", samples=(0, 0, 0, 0), reduction="sum"),
    Case("fewer classes than ranks", classes=2),
    Case("one class", classes=1),
    Case("labels of one shard", own_classes=(0, 20)),
    Case("labels of the last shard", own_classes=(95, 103), samples=RAGGED),
    Case("ignored", ignored=(0, 3, 8, 9), samples=RAGGED),
    Case("confident", regime="confident"),
    Case("wrong", regime="wrong", samples=RAGGED),
    Case("zero rows", zero_rows=True),
    Case("sum", reduction="sum", samples=RAGGED),
    Case("none", reduction="none", samples=RAGGED, ignored=(2,)),
    Case("arcface", margin="arcface", samples=RAGGED),
    Case("learned scale", scale_kind="parameter", scale=20.0, samples=RAGGED),
    Case("scale of each sample", scale_kind="vector", scale=20.0, samples=RAGGED),
    Case("weighted", weighted=True, samples=RAGGED, ignored=(1,)),
    Case("large scale", scale=2000.0, samples=RAGGED),
    Case("reference", backend="reference", samples=RAGGED),
]


def assert_as_good_as_one(name: str, got: Tensor, one: Tensor, exact: Tensor, ulp: float) -> None:
    """|got - exact| <= 2 |one - exact| + 4 ulp |exact|, with infinities and nan at the same places."""
    assert (got.shape, got.dtype) == (one.shape, one.dtype), name
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), name
    assert torch.equal(got[~finite].nan_to_num(), one[~finite].nan_to_num()), name
    got, one, exact = got[finite].double(), one[finite].double(), exact[finite]
    error, allowed = (got - exact).norm(), 2 * (one - exact).norm() + 4 * ulp * exact.norm()
    assert error <= allowed, f"{name} is {error:.3g} away, allowed {allowed:.3g}, norm {exact.norm():.3g}"


@pytest.mark.parametrize("dtypes", [F64, F32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_compute_what_one_process_does(ranks, world, case, dtypes):
    """The mean over the ranks of the backbone's gradients, which W-fold dx gives, and dw are those of one process.

    To twice the distance of one process from float64, plus a few ulp of the logits.
    """
    case = replace(case, dtypes=dtypes)
    results = ranks.results(world, on_rank, case)
    exact = on_one(replace(case, dtypes=F64), world)
    one = on_one(case, world)
    got = Result(
        torch.cat([r.loss for r in results]) if case.reduction == "none" else results[0].loss,
        torch.cat([r.dx for r in results]) / (1 if case.reduction == "none" else world),
        torch.cat([r.dw for r in results]) * (world if case.reduction == "none" else 1),
        None,
        *(torch.cat([getattr(r, field) for r in results]) for field in ("lse", "target_cos", "max_neg")),
        results[0].accuracy,
    )
    if case.scale_kind == "parameter":
        assert all(torch.equal(r.dscale, results[0].dscale) for r in results)
        got = got._replace(dscale=results[0].dscale)
    elif case.scale_kind == "vector":
        got = got._replace(dscale=torch.cat([r.dscale for r in results]) / world)
    if case.reduction != "none":
        for other in results[1:]:
            assert torch.equal(other.loss, got.loss), "every rank has the same loss, to the bit"
    assert len({str(r.accuracy.item()) for r in results}) == 1
    torch.testing.assert_close(got.accuracy.double(), exact.accuracy.double(), rtol=1e-7, atol=0, equal_nan=True)
    ulp = torch.finfo(dtypes.compute).eps * max(1.0, case.scale)
    for name in Result._fields[:-1]:
        mine, theirs, right = (getattr(result, name) for result in (got, one, exact))
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert_as_good_as_one(name, mine, theirs, right, ulp)


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
        norm = clip_grad_norm_([*backbone.parameters(), *head.parameters()], 0.5)
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


# Of rank 1, where it is not what the others have, and what every rank is told; {} is the same on all.
UNLIKE = {
    "margin": ({"margin": 0.3}, "margin {}, got 0.35 on rank 0 and 0.3 on rank 1."),
    "kind of margin": ({"margin": ArcFaceMargin(0.35)}, "margin {}, got 0.35 on rank 0 and ('ArcFaceMargin', "),
    "function": ({"margin": torch.cos}, "margin {}, got 0.35 on rank 0 and "),
    "scale": ({"scale": 32.0}, "scale {}, got 64.0 on rank 0 and 32.0 on rank 1."),
    "learned scale": ({"scale": torch.tensor(32.0)}, "scale {}, got 64.0 on rank 0 and 32.0 on rank 1."),
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
    "state": ({"margin": (_curricular(), _curricular(t=0.25), _curricular())}, "margin {}, got ('CurricularFaceM"),
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
    except ValueError as error:
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


def _weight_of_seed(rank, group):
    torch.manual_seed(5 + rank)
    return FusedCosFaceLoss(103, 24, process_group=group).weight.to_local().detach()


def test_initial_weight_does_not_depend_on_the_world(ranks, world):
    torch.manual_seed(5)
    want = FusedCosFaceLoss(103, 24).weight.detach()
    assert torch.equal(torch.cat(ranks.results(world, _weight_of_seed)), want)


def _dtensor_share(rank, group, classes):
    mesh = DeviceMesh.from_group(group, "cpu")
    share = distribute_tensor(torch.arange(classes), mesh, [Shard(0)]).to_local()
    return share.tolist(), class_range(classes, rank, group.size())


@pytest.mark.parametrize("classes", [1, 2, 5, 9, 100])
def test_shares_are_those_of_dtensor(ranks, world, classes):
    for share, own in ranks.results(world, _dtensor_share, classes):
        assert share == list(own)


def _logits(rank, group):
    torch.manual_seed(0)
    head = FusedCosFaceLoss(10, 4, process_group=group)
    x = torch.randn(rank + 1, 4)
    return head.get_logits(x), x


def test_logits_over_all_classes(ranks):
    torch.manual_seed(0)
    head = FusedCosFaceLoss(10, 4)
    for logits, x in ranks.results(3, _logits):
        torch.testing.assert_close(logits, head.get_logits(x))


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
    scaler = GradScaler("cpu", init_scale=1024.0)
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
        norm = clip_grad_norm_(parameters, 1.0)
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


FAMILY = [loss for name, loss in vars(family).items() if name.startswith("Fused") and loss is not FusedMarginLoss]
ON_ONE_PROCESS = FusedLSoftmaxLoss  # its margin reads the norms of the targets' class centres


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
    return found, dw, {name: buffer.clone() for name, buffer in head.named_buffers()}


def _train_state_on_rank(rank, group, loss, samples):
    return _train_state(loss, rank, group, samples)


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
