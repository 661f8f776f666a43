"""What moves the rows of a head, what adds up, and what is refused: a test for each row of the README's table."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import run_python
from torch import nn

from cosface_kernels import FusedCosFaceLoss, FusedLSoftmaxLoss, margin_softmax_loss
from cosface_kernels.backends import BACKENDS
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.sampling import ClassSampler

N, C, D = 8, 60, 16
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
RULES = [
    pytest.param(FusedSGD, torch.optim.SGD, SGD, id="sgd"),
    pytest.param(FusedAdamW, torch.optim.AdamW, {"lr": 0.01, "eps": 0.1}, id="adamw"),
]
rules = pytest.mark.parametrize(("fused", "torchs", "options"), RULES)


def make_head(kind=FusedCosFaceLoss, **options):
    torch.manual_seed(0)
    head = kind(C, D, backend="cpu", **options)
    nn.init.normal_(head.weight)  # as large as what is learned
    return head


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator)
    return x.requires_grad_(), torch.randint(C, (N,), generator=generator)


class Pair:
    """A head whose rows move inside backward, and the same with torch.optim."""

    def __init__(self, fused=FusedSGD, torchs=torch.optim.SGD, options=SGD, kind=FusedCosFaceLoss, **fields):
        self.heads = make_head(kind), make_head(kind)
        self.optimizers = (
            fused(self.heads[0].parameters(), **options, **fields),
            torchs(self.heads[1].parameters(), **options),
        )

    def step(self, backward):
        """backward(head, optimizer), then step() and zero_grad() of both."""
        for head, optimizer in zip(self.heads, self.optimizers, strict=True):
            backward(head, optimizer)
            optimizer.step()
            optimizer.zero_grad()

    def check(self):
        torch.testing.assert_close(self.heads[0].weight, self.heads[1].weight, rtol=2e-5, atol=2e-6)


def usual(head, optimizer=None):
    head(*batch()).backward()


def both_losses_at_once(head, optimizer):
    (head(*batch(1)) + head(*batch(2))).backward()


def of_three_one_alone(head, optimizer):
    first, second, _ = (head(*batch(seed)) for seed in (1, 2, 3))
    (first + second).backward()


def another_loss_before(head, optimizer):
    (0.1 * head.weight.square().sum()).backward()
    usual(head)


def logits(head, optimizer):
    x, labels = batch(1)
    F.cross_entropy(head.get_logits(x) / 64, labels).backward()


def another_loss_alone(head, optimizer):
    head.weight.square().sum().backward()


def gradient_of_everything(head, optimizer):
    x, labels = batch(1)
    gradient, head.weight.grad = torch.autograd.grad(head(x, labels), [x, head.weight])
    assert float(gradient.norm()) > 0


def eval_before_training(head, optimizer):
    head.eval()
    x, labels = batch(3)
    head(x, labels).backward()
    assert float(x.grad.norm()) > 0
    optimizer.zero_grad()
    usual(head.train())


def gradient_dropped(head, optimizer):
    another_loss_alone(head, optimizer)
    optimizer.zero_grad()
    usual(head)


ADDS_UP = [
    usual,
    both_losses_at_once,
    of_three_one_alone,
    another_loss_before,
    another_loss_alone,
    logits,
    gradient_of_everything,
    eval_before_training,
    gradient_dropped,
]


@rules
@pytest.mark.parametrize("backward", ADDS_UP, ids=lambda f: f.__name__)
def test_adds_up_as_in_torch(fused, torchs, options, backward):
    pair = Pair(fused, torchs, options)
    for _ in range(2):
        pair.step(backward)
        pair.step(usual)
    pair.check()


def for_embeddings(head, x, labels):
    torch.autograd.grad(head(x, labels), x)


def with_inputs(head, x, labels):
    head(x, labels).backward(inputs=[x])


def for_inner(head, x, labels):
    inner = 2 * x
    torch.autograd.grad(head(inner, labels), inner)


def in_eval(head, x, labels):
    head.eval()
    head(x, labels).backward()
    head.train()


def asked_for(head, x, labels):
    (gradient,) = torch.autograd.grad(head(x, labels), head.weight)
    assert gradient.shape == (C, D)


def without_graph(head, x, labels):
    with torch.no_grad():
        head(x, labels)


@rules
@pytest.mark.parametrize(
    "call", [for_embeddings, with_inputs, for_inner, in_eval, asked_for, without_graph], ids=lambda f: f.__name__
)
def test_moves_nothing(fused, torchs, options, call):
    head = make_head()
    optimizer = fused(head.parameters(), **options)
    before = head.weight.detach().clone()
    x, labels = batch()
    call(head, x, labels)
    assert torch.equal(head.weight, before)
    assert head.weight.grad is None
    assert not optimizer.state
    optimizer.step()
    assert torch.equal(head.weight, before)
    usual(head)
    assert not torch.equal(head.weight, before)


def test_gradient_of_the_embeddings_is_the_same_however_it_is_asked_for():
    head, (x, labels) = make_head(), batch()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    (alone,) = torch.autograd.grad(head(x, labels), x)
    both, weight = torch.autograd.grad(head(x, labels), [x, head.weight])
    plain = make_head()
    want = torch.autograd.grad(plain(x, labels), [x, plain.weight])
    assert torch.equal(alone, want[0])
    assert torch.equal(both, want[0])
    assert torch.equal(weight, want[1])
    optimizer.step()
    assert torch.equal(head.weight, plain.weight)


@pytest.mark.parametrize("late", ["same backward", "another backward"])
def test_a_gradient_that_comes_too_late_is_refused_by_step(late):
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    if late == "same backward":
        loss = head(*batch()) + head.weight.square().sum()
    else:
        usual(head)
        loss = head.weight.square().sum()
    with pytest.raises(RuntimeError, match=r"one of another loss came after it\. Run that backward before"):
        loss.backward()
    with pytest.raises(RuntimeError, match="half an update"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    usual(head)


def test_a_gradient_that_torch_finds_too_late_is_refused():
    """It saw the weight before its rows moved."""
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    loss = head.weight.square().sum() + head(*batch())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["hook", "post_accumulate_grad_hook"])
def test_a_hook_that_would_see_nothing_is_refused_before_anything_moves(kind):
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    handle = getattr(head.weight, f"register_{kind}")(lambda _: None)
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"A hook on a weight of shape \(60, 16\)"):
        usual(head)
    assert torch.equal(head.weight, before)
    handle.remove()
    usual(head)
    optimizer.step()


@rules
def test_l_softmax_has_an_ordinary_gradient(fused, torchs, options):
    pair = Pair(fused, torchs, options, FusedLSoftmaxLoss)
    for _ in range(3):
        pair.step(usual)
    pair.check()


@rules
def test_other_parameters_move_as_in_torch(fused, torchs, options):
    """A backbone, a norm's vectors, a head under weight_norm and one that never ran, in one optimizer."""

    def make():
        head, normed = make_head(), nn.utils.parametrizations.weight_norm(make_head())
        torch.manual_seed(1)
        backbone = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Conv1d(1, 1, 3, padding=1))
        return nn.ModuleDict({"backbone": backbone, "head": head, "normed": normed, "idle": nn.Linear(3, 3)})

    models = make(), make()
    optimizers = [
        kind([{"params": m["backbone"].parameters(), "lr": 0.02}, {"params": [*m["head"].parameters(),
              *m["normed"].parameters(), *m["idle"].parameters()]}], **options)
        for kind, m in zip((fused, torchs), models, strict=True)
    ]  # fmt: skip
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in optimizers]
    for seed in range(4):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            x, labels = batch(seed)
            embeddings = model["backbone"](x[:, None])[:, 0]
            optimizer.zero_grad()
            (model["head"](embeddings, labels) + model["normed"](embeddings, labels)).backward()
            optimizer.step()
            scheduler.step()
    for mine, want in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
    optimizers[1].load_state_dict(optimizers[0].state_dict())  # a checkpoint of torch's


@pytest.mark.parametrize("overflows", ["head", "backbone"])
def test_one_scaler_for_backbone_and_head(overflows):
    """An overflow anywhere: the step is skipped, and the next one is not refused."""
    head, backbone = make_head(), nn.Linear(D, D)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = FusedSGD([*backbone.parameters(), *head.parameters()], lr=0.1, grad_scaler=scaler)
    for overflow in (False, True, False):
        before = [p.detach().clone() for p in (backbone.weight, head.weight)]
        x, labels = batch()
        optimizer.zero_grad()
        loss = head(backbone(x), labels)
        if overflow:
            loss = loss * torch.inf if overflows == "head" else loss + (backbone.weight * torch.inf).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(backbone.weight, before[0]) == overflow
        assert torch.equal(head.weight, before[1]) == (overflow and overflows == "head")
    assert scaler.get_scale() == 512
    assert optimizer.skipped == 0


@rules
@pytest.mark.parametrize("wrong", ["embedding", "upstream"])
def test_what_is_not_finite_moves_nothing(fused, torchs, options, wrong):
    head = make_head()
    optimizer = fused(head.parameters(), **options)
    usual(head)
    optimizer.step()
    before = copy.deepcopy((head.state_dict(), optimizer.state_dict()))

    def broken():
        x, labels = batch(1)
        with torch.no_grad():
            if wrong == "embedding":
                x[3, 2] = torch.nan
                x[5, 0] = torch.inf
        losses = margin_softmax_loss(x, head.weight, labels, margin=0.3, reduction="none", backend="cpu")
        (losses * (torch.inf if wrong == "upstream" else 1)).sum().backward()

    sample = 0 if wrong == "upstream" else 3
    with pytest.raises(RuntimeError, match=f"not finite .that of sample {sample} is the first"):
        broken()
    optimizer.nonfinite = "skip"
    for _ in range(2):
        broken()
        optimizer.step()
    assert optimizer.skipped == 2
    for now, then in zip(_tensors(head, optimizer), _tensors(*before), strict=True):
        assert torch.equal(now, then)


def _tensors(head, optimizer):
    state = optimizer if isinstance(optimizer, dict) else optimizer.state_dict()
    weights = head if isinstance(head, dict) else head.state_dict()
    return [*weights.values(), *(value for values in state["state"].values() for value in values.values())]


def test_an_ignored_sample_may_hold_anything():
    head, (x, labels) = make_head(), batch()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    with torch.no_grad():
        x[2] = torch.nan
    labels[2] = -100
    head(x, labels).backward()
    optimizer.step()
    assert bool(head.weight.isfinite().all())


@pytest.mark.parametrize(
    "copies", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@rules
def test_head_and_optimizer_are_copied_together(fused, torchs, options, copies):
    head = make_head()
    optimizer = fused(head.parameters(), **options, nonfinite="skip", seed=3)
    usual(head)
    optimizer.step()
    twin, twins = copies((head, optimizer))
    assert twins.nonfinite == "skip"
    for h, o in ((head, optimizer), (twin, twins)):
        h(*batch(1)).backward()
        assert h.weight.grad.shape == (C, D)
        o.step()
    assert torch.equal(head.weight, twin.weight)


def test_a_weight_that_is_half_moved_is_neither_read_nor_saved(monkeypatch):
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(BACKENDS["cpu"], "backward_update_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        usual(head)
    x, _ = batch()
    for read in (
        lambda: head.get_logits(x),
        head.state_dict,
        lambda: nn.Sequential(head).state_dict(),
        lambda: usual(head),
        optimizer.state_dict,
        optimizer.step,
        lambda: FusedSGD(head.parameters(), lr=0.1).step(),
    ):
        with pytest.raises(RuntimeError, match="was interrupted, with some of its rows"):
            read()


def test_of_two_optimizers_the_later_moves_the_rows_and_the_first_says_so():
    head = make_head()
    first = FusedSGD(head.parameters(), lr=0.1)
    second = FusedSGD(head.parameters(), lr=0.2)
    usual(head)
    with pytest.raises(RuntimeError, match="belongs to another optimizer"):
        first.step()
    second.step()
    usual(head)


def test_two_bfloat16_heads_round_differently():
    heads = [make_head(dtype=torch.bfloat16) for _ in range(2)]
    optimizer = FusedSGD([head.weight for head in heads], lr=0.1)
    for head in heads:
        head(batch()[0].detach().bfloat16(), batch()[1]).backward()
    optimizer.step()
    moved = heads[0].weight != heads[1].weight
    assert 0.1 < float(moved.float().mean()) < 0.9


@pytest.mark.parametrize("bad", [[1.0], ["w"], [nn.Linear(2, 2)]], ids=["number", "name", "module"])
def test_a_refused_group_leaves_nothing(bad):
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": bad})
    assert len(optimizer.param_groups) == 1
    usual(head)
    optimizer.step()


def test_an_old_checkpoint_of_torch_counts_steps_in_python():
    head = make_head()
    optimizer = FusedAdamW(head.parameters())
    usual(head)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = 1
    optimizer.load_state_dict(saved)
    usual(head)
    assert float(optimizer.state[head.weight]["step"]) == 2


def test_momentum_that_begins_later_begins_as_in_torch():
    pair = Pair(options={"lr": 0.1, "dampening": 0.5})
    pair.step(usual)
    for optimizer in pair.optimizers:
        optimizer.param_groups[0]["momentum"] = 0.9
    for _ in range(3):
        pair.step(usual)
    pair.check()


# -- a weight that was replaced under the optimizer --------------------------------------------------------------


@pytest.mark.parametrize("rows", [-20, 5, 1000])
@rules
def test_a_weight_that_grew_or_shrank_is_refused_before_anything_moves(fused, torchs, options, rows):
    head = make_head()
    optimizer = fused(head.parameters(), **options)
    usual(head)
    optimizer.step()
    old = head.weight.data
    head.weight.data = torch.cat([old, torch.randn(rows, D)]) if rows > 0 else old[:rows].clone()
    before = head.weight.detach().clone()
    x, labels = batch()
    with pytest.raises(ValueError, match=rf"must be laid out like its weight, \({C + rows}, 16\), got \(60, 16\)"):
        head(x, labels.clamp_max(C + rows - 1))
    assert torch.equal(head.weight, before)
    optimizer.state.pop(head.weight)
    head(x, labels.clamp_max(C + rows - 1)).backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_weight_that_was_recast_keeps_its_state(dtype):
    """With each state in the dtype that it has; amsgrad's new one has the weight's."""
    head = make_head()
    optimizer = FusedAdamW(head.parameters(), lr=0.01)
    usual(head)
    optimizer.step()
    head.to(dtype)
    optimizer.param_groups[0]["amsgrad"] = True
    head(batch()[0].to(dtype), batch()[1]).backward()
    optimizer.step()
    state = optimizer.state[head.weight]
    assert (state["exp_avg"].dtype, state["max_exp_avg_sq"].dtype) == (torch.float32, dtype)
    assert bool(head.weight.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.half(), r"dtype float64, float32 or bfloat16 .* got shape .* and torch\.float16"),
        (lambda w: w.T.contiguous().T, r"must be contiguous .* got strides \(1, 60\)"),
        (lambda w: torch.randn(C, 2 * D)[:, ::2], r"must be contiguous .* got strides \(32, 2\)"),
    ],
    ids=["half", "transposed", "strided"],
)
def test_a_weight_that_cannot_be_moved_is_refused_in_forward(change, message):
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    head.weight.data = change(head.weight.data)
    with pytest.raises(ValueError, match=message):
        usual(head)
    assert not optimizer.state


def test_a_weight_whose_memory_was_replaced_before_backward_is_refused():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    loss = head(*batch())
    head.weight.data = head.weight.data.clone()
    with pytest.raises(RuntimeError, match="replaced between forward and backward"):
        loss.backward()
    assert not optimizer.state


def test_strided_state_from_a_checkpoint_is_the_same_step():
    head, twin = make_head(), make_head()
    optimizers = [FusedSGD(h.parameters(), lr=0.1, momentum=0.9) for h in (head, twin)]
    for h, optimizer in zip((head, twin), optimizers, strict=True):
        usual(h)
        optimizer.step()
    saved = copy.deepcopy(optimizers[1].state_dict())
    buffer = saved["state"][0]["momentum_buffer"]
    saved["state"][0]["momentum_buffer"] = buffer.T.contiguous().T
    optimizers[1].load_state_dict(saved)
    for h, optimizer in zip((head, twin), optimizers, strict=True):
        usual(h)
        optimizer.step()
    assert torch.equal(head.weight, twin.weight)


@pytest.mark.parametrize("classes", [20, 5000, 10**8])
def test_a_sampler_for_other_classes_is_refused(classes):
    sampler, (x, labels) = ClassSampler(classes, 0.5), batch()
    with pytest.raises(ValueError, match=f"draws from {classes} classes, but the weight has 60"):
        margin_softmax_loss(x, make_head().weight, labels, margin=0.3, sampler=sampler)
    assert int(sampler.draws) == 0


def test_under_distributed_data_parallel_it_is_refused_before_anything_moves(tmp_path):
    done = run_python(
        """
import sys, torch, torch.distributed as dist
from torch import nn
from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.optim import FusedSGD
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 4), FusedCosFaceLoss(9, 4, backend="cpu")
    def forward(self, x, y):
        return self.head(self.backbone(x), y)
for accumulate in (True, False):
    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = FusedSGD(model.parameters(), lr=0.1, accumulate=accumulate)
    before = model.module.head.weight.detach().clone()
    try:
        model(torch.randn(3, 4), torch.tensor([1, 2, 3])).backward()
        optimizer.step()
        print("moved", not torch.equal(before, model.module.head.weight))
    except RuntimeError as error:
        print(torch.equal(before, model.module.head.weight), error)
dist.destroy_process_group()
""",
        str(tmp_path / "rendezvous"),
    )
    first, second = done.stdout.strip().splitlines()
    assert first == "moved True", done.stderr
    assert second.startswith("True DistributedDataParallel averages gradients"), done.stderr
