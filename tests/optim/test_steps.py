"""What moves the rows of a head and what adds up: a test for each row of docs/optimizers.md."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from support.steps import C, D, Pair, batch, both_losses_at_once, make_head, rules, usual
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cosface_kernels import FusedCosFaceLoss, FusedLSoftmaxLoss, FusedUniFaceLoss, margin_softmax_loss
from cosface_kernels.optim import FusedSGD


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


@pytest.mark.parametrize("asked", [[0], [2, 0], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("by", ["autograd.grad", "inputs"])
@pytest.mark.parametrize("kind", [FusedCosFaceLoss, FusedUniFaceLoss])
def test_losses_that_were_asked_for_a_gradient_before_add_up(kind, by, asked):
    """As by GradNorm, which weighs losses by the gradient of each."""
    pair = Pair(kind=kind)

    def backward(head, optimizer):
        x, labels = batch()
        losses = [head((i + 1) * x + i, labels) for i in range(3)]
        for i in asked:
            if by == "inputs":
                losses[i].backward(inputs=[x], retain_graph=True)
            else:
                torch.autograd.grad(losses[i], x, retain_graph=True)
        sum(losses).backward()

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


@pytest.mark.parametrize("kind", [FusedCosFaceLoss, FusedUniFaceLoss])
@rules
def test_a_weight_that_is_frozen_after_forward_does_not_move(fused, torchs, options, kind):
    pair, gradients = Pair(fused, torchs, options, kind), []

    def backward(head, optimizer):
        x, labels = batch()
        loss = head(x, labels)
        head.requires_grad_(False)
        loss.backward()
        gradients.append(x.grad)

    before = pair.heads[0].weight.detach().clone()
    pair.step(backward)
    torch.testing.assert_close(*gradients)
    assert all(torch.equal(head.weight, before) for head in pair.heads)
    for head in pair.heads:
        head.requires_grad_(True)
    pair.step(usual)
    pair.check()


@pytest.mark.parametrize("kind", [FusedCosFaceLoss, FusedUniFaceLoss])
def test_moves_the_weight_itself_where_saved_tensors_are_copied(kind):
    """As save_on_cpu does on a GPU."""
    heads = make_head(kind), make_head(kind)
    for head, hooks in zip(heads, (nullcontext(), saved_tensors_hooks(torch.clone, torch.clone)), strict=True):
        optimizer = FusedSGD(head.parameters(), lr=0.1)
        with hooks:
            loss = head(*batch())
        loss.backward()
        optimizer.step()
    assert torch.equal(heads[0].weight, heads[1].weight)


class WithWeight(nn.Module):
    def __init__(self, num_classes, embedding_size, backend):
        super().__init__()
        self.weight, self.backend = nn.Parameter(torch.empty(num_classes, embedding_size)), backend

    def forward(self, x, labels):
        return margin_softmax_loss(x, self.weight, labels, margin=0.3, backend=self.backend)


@pytest.mark.parametrize(
    "change", [nn.Module.share_memory, nn.Module.double, lambda module: module.to("cpu", torch.float64)],
    ids=["share_memory", "double", "to"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [FusedCosFaceLoss, WithWeight])
@pytest.mark.parametrize("swaps", [False, True])
def test_a_module_may_change_between_backward_and_step(change, kind, swaps, monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: swaps)
    pair = Pair(kind=kind)

    def backward(head, optimizer):
        usual(head)
        change(head)
        assert head.weight.grad.dtype == head.weight.dtype

    pair.step(backward)
    pair.check()
    pair.step(usual)
    pair.check()


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


@rules
def test_hooks_of_all_optimizers_run_once_a_step(fused, torchs, options):
    head, layer, ran = make_head(), nn.Linear(D, D), []
    optimizer = fused([*layer.parameters(), *head.parameters()], **options)
    handles = [
        register(lambda optimizer, *_: ran.append(type(optimizer)))
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    try:
        head(layer(batch()[0]), batch()[1]).backward()
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [fused, fused]


def test_two_bfloat16_heads_round_differently():
    heads = [make_head(dtype=torch.bfloat16) for _ in range(2)]
    optimizer = FusedSGD([head.weight for head in heads], lr=0.1)
    for head in heads:
        head(batch()[0].detach().bfloat16(), batch()[1]).backward()
    optimizer.step()
    moved = heads[0].weight != heads[1].weight
    assert 0.1 < float(moved.float().mean()) < 0.9


def test_another_scale_than_backward_divided_by_is_noticed():
    """As in a copy of the optimizer, which has a copy of the scaler."""
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1, grad_scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2048.0)
    optimizer.grad_scaler.scale(torch.zeros(()))
    scaler.scale(head(*batch())).backward()
    with pytest.raises(RuntimeError, match=r"scaled by 2048, but backward .* gradient over 1024: .*grad_scaler"):
        scaler.step(optimizer)
