"""What is refused before anything moves, and what a weight or a group may become meanwhile."""

import copy

import pytest
import torch
from support import run_python
from support.steps import C, D, Pair, batch, make_head, rules, state_tensors, usual
from torch import nn

from cosface_kernels import FusedCosFaceLoss, FusedUniFaceLoss, margin_softmax_loss
from cosface_kernels.optim import FusedAdamW, FusedSGD, row_optimizer
from cosface_kernels.sampling import ClassSampler


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


@pytest.mark.parametrize(
    "other",
    [
        lambda head, layer: head.weight.square().sum(),
        lambda head, layer: head.get_logits(batch()[0]).square().mean(),
        lambda head, layer: _raises(layer.weight),
    ],
    ids=["square", "get_logits", "hook"],
)
@pytest.mark.parametrize("kind", [FusedCosFaceLoss, FusedUniFaceLoss])
def test_a_backward_that_raises_after_rows_moved_is_refused_by_step(kind, other):
    """Two of them saw the weight before its rows moved, which torch finds."""
    head, layer = make_head(kind), nn.Linear(D, D)
    optimizer = FusedSGD([*layer.parameters(), *head.parameters()], lr=0.1)
    before = head.weight.detach().clone()
    loss = other(head, layer)
    loss = loss + head(layer(batch()[0]), batch()[1])
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|modified inplace|from a hook"):
        loss.backward()
    assert not torch.equal(head.weight, before)
    with pytest.raises(RuntimeError, match=r"backward then raised: .* half an update"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    usual(head)
    optimizer.step()


def _raises(weight):
    def hook(gradient):
        raise RuntimeError("from a hook")

    weight.register_hook(hook)
    return 0.0


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


def test_of_two_optimizers_the_later_moves_the_rows_and_the_first_says_so():
    head = make_head()
    first = FusedSGD(head.parameters(), lr=0.1)
    second = FusedSGD(head.parameters(), lr=0.2)
    usual(head)
    with pytest.raises(RuntimeError, match="belongs to another optimizer"):
        first.step()
    second.step()
    usual(head)


@pytest.mark.parametrize("bad", [[1.0], ["w"], [nn.Linear(2, 2)]], ids=["number", "name", "module"])
def test_a_refused_group_leaves_nothing(bad):
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": bad})
    assert len(optimizer.param_groups) == 1
    usual(head)
    optimizer.step()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.half(),
            r"bfloat16 or float8_e4m3fn for .* got shape .* and torch\.float16",
        ),
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


@pytest.mark.parametrize("kind", [FusedCosFaceLoss, FusedUniFaceLoss])
def test_a_weight_that_was_changed_before_backward_is_refused(kind):
    head = make_head(kind)
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    loss = head(*batch())
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"shape \(60, 16\) has been modified by an inplace operation"):
        loss.backward()
    assert not optimizer.state


def test_a_weight_whose_memory_was_replaced_before_backward_is_refused():
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    loss = head(*batch())
    head.weight.data = head.weight.data.clone()
    with pytest.raises(RuntimeError, match="replaced between forward and backward"):
        loss.backward()
    assert not optimizer.state


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
from cosface_kernels import FusedCosFaceLoss, distributed
from cosface_kernels.optim import FusedSGD
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 4), FusedCosFaceLoss(9, 4, backend="cpu")
    def forward(self, x, y):
        return self.head(self.backbone(x), y)
def step(accumulate):
    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = FusedSGD(model.parameters(), lr=0.1, accumulate=accumulate)
    before = model.module.head.weight.detach().clone()
    try:
        model(torch.randn(3, 4), torch.tensor([1, 2, 3])).backward()
        optimizer.step()
        print("moved", not torch.equal(before, model.module.head.weight))
    except RuntimeError as error:
        print(torch.equal(before, model.module.head.weight), error)
for accumulate in (True, False): step(accumulate)
distributed.destroy_process_group()
""",
        str(tmp_path / "rendezvous"),
    )
    # torch 2.10 tells what gloo connects.
    first, second = (line for line in done.stdout.splitlines() if not line.startswith("[Gloo]"))
    assert first == "moved True", done.stderr
    assert second.startswith("True DistributedDataParallel averages gradients"), done.stderr


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"momentum": None}, TypeError, "momentum must be a number, got None"),
        ({"momentum": None, "nesterov": True}, TypeError, "momentum must be a number, got None"),
        ({"dampening": "a"}, TypeError, "dampening must be a number, got 'a'"),
        ({"dampening": float("nan")}, ValueError, "dampening must be finite, got nan"),
        ({"lr": float("inf")}, ValueError, "lr must be finite, got inf"),
        ({"lr": torch.ones(2)}, TypeError, r"lr must be a number, got tensor\(\[1., 1.\]\)"),
        *(
            ({name: "False"}, ValueError, f"{name} must be True or False, got 'False'")
            for name in ("accumulate", "maximize", "nesterov")
        ),
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
    ("name", "value"),
    [
        ("gradient_factor", float("inf")),
        ("max_row_norm", -1.0),
        ("lr", float("nan")),
        ("momentum", -1.0),
        ("dampening", float("nan")),
        ("maximize", "no"),
    ],
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

    with pytest.raises(ValueError, match=f"{name} must .* got {value!r}"):
        step()
    group[name] = right
    for now, then in zip(state_tensors(head, optimizer), state_tensors(*before), strict=True):
        assert torch.equal(now, then)
    optimizer.zero_grad()
    usual(head)
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0\.9"),
        ({"betas": "ab"}, r"betas must be two numbers in \[0, 1\), got 'ab'"),
        ({"eps": float("inf")}, "eps must be finite, got inf"),
        ({"amsgrad": 1}, "amsgrad must be True or False, got 1"),
        ({"amsgrad": True, "state_dtype": torch.float8_e4m3fn}, "amsgrad must be False with states in float8"),
    ],
)
def test_options_that_are_none_of_adamw(options, message):
    with pytest.raises(ValueError, match=message):
        FusedAdamW(make_head().parameters(), **options)


def test_a_closure_is_a_function():
    with pytest.raises(TypeError, match="closure must be a function or None, got True"):
        FusedSGD(make_head().parameters()).step(True)


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
    for now, then in zip(state_tensors(head, optimizer), state_tensors(*before), strict=True):
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


# -- other optimizers, other parameters --------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"foreach": True}], ids=str)
def test_an_optimizer_of_torch_that_has_the_weight_too_is_told_so(options, trained):
    head = make_head()
    other = torch.optim.SGD(head.parameters(), lr=0.1, **options)
    if trained:
        usual(head)
        other.step()
        other.zero_grad()
    owner = FusedSGD(head.parameters(), lr=0.1)
    usual(head)
    with pytest.raises(RuntimeError, match="If another optimizer has the weight too, leave it out of one of them"):
        other.step()
    owner.step()


@pytest.mark.parametrize(
    "compute",
    [
        lambda g: g + 1.0,
        lambda g: g + torch.ones(C, D),
        lambda g: torch.ones(C, D) + g,
        lambda g: torch.ones(C, D).add_(g),
        lambda g: g.add_(torch.ones(C, D)),
        lambda g: 2 * g,
    ],
)
def test_a_sum_with_what_is_no_longer_there_is_refused_and_ends_nothing(compute):
    head = make_head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    usual(head)
    with pytest.raises(RuntimeError, match=r"needs the gradient of a weight of which backward has moved the rows"):
        compute(head.weight.grad)
    optimizer.step()


@pytest.mark.parametrize("fused", [FusedSGD, FusedAdamW])
def test_what_torch_refuses_of_the_backbone_is_refused_before_the_head_moves(fused):
    head, layer = make_head(), nn.Embedding(30, D, sparse=True)
    optimizer = fused([*head.parameters(), *layer.parameters()], lr=0.1, weight_decay=0.1, accumulate=True)
    before = head.weight.detach().clone()
    head(layer(torch.arange(8)), batch()[1]).backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(head.weight, before)


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
