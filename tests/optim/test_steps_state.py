"""State of a step: copied, saved, loaded, and what a weight that is half moved allows."""

import copy
import gc
import pickle

import pytest
import torch
from support.steps import C, D, Pair, batch, make_head, rules, state_tensors, usual
from torch import nn

from cosface_kernels import checkpoint
from cosface_kernels.backends import BACKENDS
from cosface_kernels.optim import FusedAdamW, FusedSGD


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


@pytest.mark.parametrize("as_loaded", [False, True])
def test_amsgrad_is_refused_where_states_are_in_float8_by_then(as_loaded):
    """A maximum of numbers that are rounded at random grows with the steps; other states take theirs in."""
    head = make_head()
    optimizer = FusedAdamW(head.parameters(), lr=0.01, state_dtype=torch.float8_e4m3fn)
    usual(head)
    optimizer.step()
    if as_loaded:
        saved, optimizer = optimizer.state_dict(), FusedAdamW(head.parameters(), lr=0.01)
        optimizer.load_state_dict(saved)
    before = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match=r"^amsgrad must be False with states in float8_e4m3fn, got True: "):
        usual(head)
    optimizer.param_groups[0]["amsgrad"] = False
    for now, then in zip(state_tensors(head, optimizer), state_tensors(*before), strict=True):
        assert torch.equal(now, then)
    saved, optimizer = optimizer.state_dict(), FusedAdamW(head.parameters(), state_dtype=torch.bfloat16)
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["amsgrad"] = True
    usual(head)
    optimizer.step()
    state = optimizer.state[head.weight]
    assert [state[name].dtype for name in optimizer.state_names] == [torch.bfloat16] * 3


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
    for now, then in zip(state_tensors(head, optimizer), state_tensors(*before), strict=True):
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


@pytest.mark.parametrize(
    "kinds",
    [
        (FusedSGD, FusedAdamW),
        *((other, FusedSGD) for other in (torch.optim.AdamW, torch.optim.RMSprop)),
        *((getattr(torch.optim, name), FusedAdamW) for name in ("Adamax", "NAdam", "RAdam", "SparseAdam")),
    ],
    ids=lambda kinds: f"{kinds[0].__name__} to {kinds[1].__name__}",
)
def test_state_of_another_rule_is_refused_before_anything_is_loaded(kinds):
    optimizers = [kind(make_head().parameters(), lr=lr) for kind, lr in zip(kinds, (0.1, 0.2), strict=True)]
    with pytest.raises(ValueError, match=r"loads the state of its like or of torch\.optim.* got groups without"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("named", [True, False], ids=["as it is saved", "by its name alone"])
@rules
def test_a_state_in_float8_is_read_here_and_not_by_torch(fused, torchs, options, named):
    head = make_head()
    optimizer = fused(head.parameters(), **options, state_dtype=torch.float8_e4m3fn)
    usual(head)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert not {"momentum_buffer", "exp_avg", "exp_avg_sq"} & {*saved["state"][0]}
    if not named:
        saved["state"][0] = {name.removesuffix("_float8"): value for name, value in saved["state"][0].items()}
    before, state = head.weight.detach().clone(), optimizer.state[head.weight]
    again = fused(head.parameters(), **options, state_dtype=torch.float8_e4m3fn)
    again.load_state_dict(saved)
    assert again.state[head.weight].keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(again.state[head.weight][name].float(), value.float())
    plain = torchs(head.parameters())
    plain.load_state_dict(optimizer.state_dict())
    plain.param_groups[0]["weight_decay"] = 0.0
    head.weight.grad = torch.zeros(C, D)
    if torchs is torch.optim.SGD:
        plain.step()
        assert torch.equal(head.weight, before)  # the momentum is one of its own
    else:
        with pytest.raises(KeyError, match="exp_avg"):
            plain.step()


@pytest.mark.parametrize("kind", [FusedSGD, torch.optim.SGD])
def test_hooks_see_the_state_that_is_loaded_and_may_change_it(kind):
    head, seen = make_head(), []
    optimizer = kind(head.parameters(), lr=0.1, momentum=0.9)
    usual(head)
    optimizer.step()
    saved = optimizer.state_dict()

    def zero(_, state_dict):
        seen.append([*state_dict["state"]])
        return {**state_dict, "state": {0: {"momentum_buffer": torch.zeros(C, D)}}}

    optimizer.register_load_state_dict_pre_hook(zero)
    optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.append([*optimizer.state]))
    for _ in range(2):
        optimizer.load_state_dict(saved)
        assert not optimizer.state[head.weight]["momentum_buffer"].any()
    assert [len(each) for each in seen] == [1, 1, 1, 1]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_of_adam_the_state_is_that_of_adamw(weight_decay):
    """Without weight decay, or where it says that this is decoupled; else the rule would change in silence."""
    models = [nn.Sequential(nn.Linear(D, D), make_head()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    def step(model, optimizer):
        x, labels = batch()
        model[1](model[0](x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    for model, kind in zip(models, (FusedAdamW, torch.optim.AdamW), strict=True):
        adam = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=weight_decay, eps=0.1)
        step(model, adam)
        optimizer, saved = kind(model.parameters()), adam.state_dict()
        if kind is FusedAdamW and weight_decay:
            with pytest.raises(ValueError, match=r"adds weight_decay 0\.1 of them to the gradient"):
                optimizer.load_state_dict(saved)
            assert not optimizer.state
            saved["param_groups"][0]["decoupled_weight_decay"] = True
        optimizer.load_state_dict(saved)
        for _ in range(3):
            step(model, optimizer)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


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
def test_what_is_loaded_is_saved_again(fused, torchs, options):
    """Of a head's rows and of other parameters, no number more and none less."""
    model = nn.Sequential(nn.Linear(D, D), make_head())
    optimizer = fused(model.parameters(), **options)
    x, labels = batch()
    for _ in range(3):
        model[1](model[0](x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved, again = optimizer.state_dict(), fused(copy.deepcopy(model).parameters(), **options)
    again.load_state_dict(saved)
    torch.testing.assert_close(again.state_dict()["state"], saved["state"], rtol=0, atol=0)
