"""What moves the rows of a head, what adds up, and what is refused: a test for each row of docs/optimizers.md."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import run_python
from torch import nn

from cosface_kernels import FusedCosFaceLoss, FusedLSoftmaxLoss, checkpoint, margin_softmax_loss
from cosface_kernels.backends import BACKENDS
from cosface_kernels.optim import FusedAdamW, FusedSGD, row_optimizer
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


@rules
def test_a_capture_for_a_cuda_graph_is_refused_before_anything_moves(fused, torchs, options, monkeypatch):
    head = make_head()
    optimizer = fused(head.parameters(), **options)
    before = head.weight.detach().clone()
    monkeypatch.setattr(row_optimizer, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"shape \(60, 16\) by the learning rate, the step count"):
        head(*batch())
    monkeypatch.undo()
    assert torch.equal(head.weight, before)
    head(*batch()).backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


@rules
def test_what_accumulates_can_be_captured_but_for_its_step(fused, torchs, options, monkeypatch):
    pair = Pair(fused, torchs, options, accumulate=True)
    before = pair.heads[0].weight.detach().clone()
    monkeypatch.setattr(row_optimizer, "is_capturing", lambda: True)
    for head in pair.heads:
        head(*batch()).backward()
    with pytest.raises(RuntimeError, match="A CUDA graph would move a weight"):
        pair.optimizers[0].step()
    assert torch.equal(pair.heads[0].weight, before)
    monkeypatch.undo()
    pair.step(lambda head, optimizer: None)
    pair.check()


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
    # torch 2.10 tells what gloo connects.
    first, second = (line for line in done.stdout.splitlines() if not line.startswith("[Gloo]"))
    assert first == "moved True", done.stderr
    assert second.startswith("True DistributedDataParallel averages gradients"), done.stderr


# -- what is not finite, scaled or well formed -------------------------------------------------------------------


def _nan_batch():
    x, labels = batch(1)
    with torch.no_grad():
        x[3, 2] = torch.nan
    return x, labels


@rules
def test_a_batch_that_is_not_finite_moves_no_parameter_of_the_optimizer(fused, torchs, options):
    """The run is as if that batch had not been, also where backward was then not followed by step()."""
    head, backbone = make_head(), nn.Linear(D, D)
    other = copy.deepcopy((head, backbone))
    optimizer = fused([*backbone.parameters(), *head.parameters()], **options, nonfinite="skip")
    want = torchs([*other[1].parameters(), *other[0].parameters()], **options)
    for seed, (is_wrong, steps) in enumerate([(False, True), (True, True), (True, False), (False, True)]):
        x, labels = _nan_batch() if is_wrong else batch(seed)
        optimizer.zero_grad()
        head(backbone(x), labels).backward()
        if steps:
            optimizer.step()
        if not is_wrong:
            want.zero_grad()
            other[0](other[1](x), labels).backward()
            want.step()
    assert optimizer.skipped == 2
    for mine, theirs in zip((head.weight, backbone.weight), (other[0].weight, other[1].weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


def test_of_two_heads_one_batch_that_is_not_finite_holds_back_the_backbone():
    heads, backbone = [make_head(), make_head()], nn.Linear(D, D)
    parameters = [*backbone.parameters(), *(head.weight for head in heads)]
    optimizer = FusedSGD(parameters, lr=0.1, nonfinite="skip")
    before = copy.deepcopy(backbone.state_dict())
    heads[0](backbone(_nan_batch()[0]), _nan_batch()[1]).backward()
    usual(heads[1])
    optimizer.step()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])
    assert bool(torch.cat([head.weight for head in heads]).isfinite().all())


def test_after_a_skipped_batch_other_losses_are_taken():
    """It has moved nothing, and so nothing can have come too late."""
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1, nonfinite="skip")
    head(*_nan_batch()).backward()
    both_losses_at_once(head, optimizer)
    before = head.weight.detach().clone()
    optimizer.step()  # which ends the step that the batch had spoiled
    assert torch.equal(head.weight, before)
    optimizer.zero_grad()
    both_losses_at_once(head, optimizer)
    optimizer.step()
    assert not torch.equal(head.weight, before)


def test_a_disabled_scaler_is_none():
    head = make_head()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = FusedSGD(head.parameters(), lr=0.1, grad_scaler=scaler)
    with pytest.raises(RuntimeError, match=r"not finite .that of sample 3 is the first"):
        head(*_nan_batch()).backward()
    usual(head)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="backward ran twice"):
        usual(head)


def test_a_scaler_that_scales_no_loss_is_noticed():
    head = make_head()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = FusedSGD(head.parameters(), lr=0.1, grad_scaler=scaler)
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"a scale of 1024 that is not there: call scaler\.scale\(loss\)"):
        usual(head)
    assert torch.equal(head.weight, before)
    scaler.scale(head(*batch())).backward()
    scaler.step(optimizer)


def test_another_scale_than_backward_divided_by_is_noticed():
    """As in a copy of the optimizer, which has a copy of the scaler."""
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1, grad_scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2048.0)
    optimizer.grad_scaler.scale(torch.zeros(()))
    scaler.scale(head(*batch())).backward()
    with pytest.raises(RuntimeError, match=r"scaled by 2048, but backward .* gradient over 1024: .*grad_scaler"):
        scaler.step(optimizer)


@pytest.mark.parametrize("drop", ["module", "none", "optimizer"])
def test_a_step_that_a_scaler_left_out_ends_with_any_zero_grad(drop):
    head, backbone = make_head(), nn.Linear(D, D)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = FusedSGD([*backbone.parameters(), *head.parameters()], lr=0.1, grad_scaler=scaler)
    for overflow in (True, False):
        x, labels = batch()
        loss = head(backbone(x), labels) + ((backbone.weight * torch.inf).sum() if overflow else 0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.state_dict()
        if drop == "none":
            head.weight.grad = None
            backbone.zero_grad()
        else:
            (nn.ModuleList([head, backbone]) if drop == "module" else optimizer).zero_grad()


def test_a_refused_backward_is_over_after_zero_grad_whoever_dropped_the_gradient():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    usual(head)
    head.zero_grad()
    with pytest.raises(RuntimeError, match="backward ran twice"):
        usual(head)
    optimizer.zero_grad()
    optimizer.step()
    usual(head)
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"momentum": None}, TypeError, "momentum must be a number, got None"),
        ({"max_row_norm": float("nan")}, ValueError, "max_row_norm must not be negative, got nan"),
        ({"gradient_factor": float("nan")}, ValueError, "gradient_factor must be finite, got nan"),
        ({"seed": 1.5}, ValueError, "seed must be an integer, got 1.5"),
        ({"grad_scaler": True}, TypeError, r"grad_scaler must be a torch\.amp\.GradScaler or None, got True"),
    ],
)
def test_options_that_are_none_are_refused_when_made(options, error, message):
    with pytest.raises(error, match=message):
        FusedSGD(make_head().parameters(), **options)


@pytest.mark.parametrize(
    ("name", "value"), [("gradient_factor", float("inf")), ("max_row_norm", -1.0), ("lr", float("nan"))]
)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("after_forward", [False, True])
def test_options_of_a_group_are_looked_at_before_each_step(name, value, accumulate, after_forward):
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9, accumulate=accumulate)
    usual(head)
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    group, right = optimizer.param_groups[0], optimizer.param_groups[0][name]

    def step():
        loss = head(*batch()) if after_forward else None
        group[name] = value
        (head(*batch()) if loss is None else loss).backward()
        optimizer.step()

    with pytest.raises(ValueError, match=f"{name} must .* got {value}"):
        step()
    group[name] = right
    for now, then in zip(_tensors(head, optimizer), _tensors(*before), strict=True):
        assert torch.equal(now, then)
    optimizer.zero_grad()
    usual(head)
    optimizer.step()


def test_options_of_the_optimizer_are_no_groups():
    head = make_head()
    with pytest.raises(ValueError, match="accumulate is one for all of FusedSGD, got True in a param group"):
        FusedSGD([{"params": head.parameters(), "accumulate": True}], lr=0.1)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**80])
def test_any_integer_is_a_seed(seed):
    head = make_head(dtype=torch.bfloat16)
    optimizer = FusedSGD(head.parameters(), lr=0.1, seed=seed)
    head(batch()[0].bfloat16(), batch()[1]).backward()
    optimizer.step()


# -- a call that is refused, and one that is interrupted ---------------------------------------------------------


@pytest.mark.parametrize("wrong", ["environment", "memory", "device"])
@rules
def test_a_refusal_in_backward_is_as_if_it_had_not_been(fused, torchs, options, wrong, monkeypatch):
    head = make_head()
    optimizer = fused(head.parameters(), **options)
    usual(head)
    optimizer.step()
    state = optimizer.state[head.weight]
    name = next(name for name in state if name != "step")
    before, right = copy.deepcopy((head.state_dict(), optimizer.state_dict())), state[name]
    loss = head(*batch())
    if wrong == "environment":
        monkeypatch.setenv("COSFACE_CPU_TILE", "abc")
    elif wrong == "memory":
        state[name] = right.clone()
        state[name].untyped_storage().resize_(0)
    else:
        state[name] = right.to("meta")
    with pytest.raises((ValueError, TypeError)):
        loss.backward()
    monkeypatch.delenv("COSFACE_CPU_TILE", raising=False)
    optimizer.state[head.weight][name] = right
    for now, then in zip(_tensors(head, optimizer), _tensors(*before), strict=True):
        assert torch.equal(now, then)
    usual(head)
    optimizer.step()


def test_a_weight_whose_memory_was_freed_is_refused():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1, accumulate=True)
    usual(head)
    head.weight.grad.untyped_storage().resize_(0)
    with pytest.raises(
        ValueError, match=r"dw of shape \[60, 16\] needs 3840 bytes of memory, but its storage has 0"
    ):
        optimizer.step()
    optimizer.zero_grad()
    head.weight.untyped_storage().resize_(0)
    with pytest.raises(
        ValueError, match=r"w of shape \[60, 16\] needs 3840 bytes of memory, but its storage has 0"
    ):
        usual(head)


def _interrupt(head, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BACKENDS["cpu"], "backward_update_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            usual(head)


def test_checkpoint_load_restores_what_is_half_moved(monkeypatch, tmp_path):
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
    usual(head)
    optimizer.step()
    checkpoint.save(tmp_path, 1, head=head, optimizer=optimizer)
    before = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    _interrupt(head, monkeypatch)
    assert checkpoint.load(tmp_path, head=head, optimizer=optimizer) == 1
    for now, then in zip(_tensors(head, optimizer), _tensors(*before), strict=True):
        assert torch.equal(now, then)
    usual(head)
    optimizer.step()


def test_a_half_moved_weight_stays_so_without_its_optimizer(monkeypatch):
    head = make_head()
    whole = copy.deepcopy(head.state_dict())
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    _interrupt(head, monkeypatch)
    del optimizer
    gc.collect()
    another = FusedSGD(head.parameters(), lr=0.1)
    for read in (lambda: head.get_logits(batch()[0]), head.state_dict, lambda: usual(head), another.step):
        with pytest.raises(RuntimeError, match="was interrupted"):
            read()
    del another, read
    gc.collect()
    head.load_state_dict({}, strict=False)  # which restores nothing
    with pytest.raises(RuntimeError, match="was interrupted"):
        usual(head)
    head.load_state_dict(whole)
    usual(head)


def test_a_save_between_backward_and_step_is_refused():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    usual(head)
    with pytest.raises(RuntimeError, match=r"its step is not over: .* Save after step"):
        optimizer.state_dict()
    optimizer.step()
    optimizer.state_dict()


# -- other optimizers, other parameters --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"foreach": True}], ids=str)
def test_an_optimizer_of_torch_that_has_the_weight_too_is_told_so(options):
    head = make_head()
    owner = FusedSGD(head.parameters(), lr=0.1)
    other = torch.optim.SGD(head.parameters(), lr=0.1, **options)
    usual(head)
    with pytest.raises(RuntimeError, match="If another optimizer has the weight too, leave it out of one of them"):
        other.step()
    owner.step()


@pytest.mark.parametrize("kinds", [(FusedSGD, FusedAdamW), (torch.optim.AdamW, FusedSGD)], ids=["adamw", "sgd"])
def test_state_of_another_rule_is_refused_before_anything_is_loaded(kinds):
    optimizers = [kind(make_head().parameters(), lr=lr) for kind, lr in zip(kinds, (0.1, 0.2), strict=True)]
    with pytest.raises(ValueError, match=r"loads the state of its like or of torch\.optim.* got groups without"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].param_groups[0]["lr"] == 0.2


def test_state_that_does_not_fit_changes_nothing():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
    usual(head)
    optimizer.step()
    before, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    saved["state"][0]["momentum_buffer"] = torch.ones(3, D)
    with pytest.raises(ValueError, match=r"got \(3, 16\)\. Were the parameters given in another order\?"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(optimizer.state[head.weight]["momentum_buffer"], before["state"][0]["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@rules
def test_state_of_other_parameters_has_their_dtype(fused, torchs, options, dtype):
    """As torch.optim casts it when it loads it."""
    layers = [nn.Linear(D, D), nn.Linear(D, D).to(dtype)]
    optimizers = [fused(layer.parameters(), **options) for layer in layers]
    layers[0](torch.ones(D)).sum().backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    layers[1](torch.ones(D, dtype=dtype)).sum().backward()
    optimizers[1].step()


def test_a_float16_state_of_a_head_is_taken_in_the_dtype_of_its_weight():
    half, head = make_head(dtype=torch.float16), make_head()
    torchs = torch.optim.SGD(half.parameters(), lr=0.1, momentum=0.9)
    half(batch()[0].half(), batch()[1]).backward()
    torchs.step()
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(torchs.state_dict())
    usual(head)
    optimizer.step()
    assert optimizer.state[head.weight]["momentum_buffer"].dtype == torch.float32


@rules
def test_a_parameter_that_was_put_into_a_group_is_moved_as_torch_moves_it(fused, torchs, options):
    """As those do who grow a layer and keep its state."""
    heads, optimizers = [make_head(), make_head()], []
    for kind, head in zip((fused, torchs), heads, strict=True):
        optimizer = kind(head.parameters(), **options)
        usual(head)
        optimizer.step()
        optimizer.zero_grad()
        old, generator = head.weight, torch.Generator().manual_seed(1)
        rows = torch.randn(4, D, generator=generator)
        head.weight = nn.Parameter(torch.cat([old.detach(), rows]))
        state = optimizer.state.pop(old)
        optimizer.state[head.weight] = {
            name: value if name == "step" else torch.cat([value, torch.zeros(4, D)])
            for name, value in state.items()
        }
        optimizer.param_groups[0]["params"][0] = head.weight
        head.num_classes += 4
        optimizers.append(optimizer)
    for _ in range(3):
        for head, optimizer in zip(heads, optimizers, strict=True):
            usual(head)
            optimizer.step()
            optimizer.state_dict()
            optimizer.zero_grad()
    torch.testing.assert_close(*(head.weight for head in heads), rtol=2e-5, atol=2e-6)


def test_a_weight_that_was_taken_out_of_its_group_has_an_ordinary_gradient():
    head, layer = make_head(), nn.Linear(D, D)
    optimizer = FusedSGD([{"params": layer.parameters()}, {"params": head.parameters()}], lr=0.1)
    del optimizer.param_groups[1]
    head(layer(batch()[0]), batch()[1]).backward()
    optimizer.step()
    assert bool(head.weight.grad.isfinite().all())


def test_a_weight_can_be_swapped_with_another_tensor():
    """As Module.to does with a sharded weight; torch refuses it for a tensor with weak references."""
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for _ in range(2):
            usual(head)
            optimizer.step()
            optimizer.zero_grad()
            head.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_hook_that_came_after_forward_is_refused_before_rows_move():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    loss, before = head(*batch()), head.weight.detach().clone()
    head.weight.register_hook(lambda gradient: None)
    with pytest.raises(RuntimeError, match="A hook on a weight"):
        loss.backward()
    assert torch.equal(head.weight, before)
    optimizer.step()
