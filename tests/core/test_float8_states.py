"""Heads with a weight in float8 on their way to other dtypes, states and files: what is taken, what is not."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import relative_error
from torch import Tensor

from cosface_kernels import FusedCosFaceLoss, convert, float8
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.functional import margin_softmax_loss
from cosface_kernels.optim import FusedAdamW, FusedSGD

C, D = 50, 16


def _head(dtype: torch.dtype = FLOAT8, **options) -> FusedCosFaceLoss:
    torch.manual_seed(3)
    return FusedCosFaceLoss(C, D, dtype=dtype, **options)


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, D, generator=generator), torch.randint(C, (8,), generator=generator)


def _bits(head: FusedCosFaceLoss) -> list[Tensor]:
    return [head.weight.detach().view(torch.uint8).clone(), head.weight_exponent.clone()]


@pytest.mark.parametrize("init_std", [1e-6, 1e4])
@pytest.mark.parametrize("way", ["to", "state"])
def test_float16_has_what_it_holds_of_the_rows(way, init_std):
    """Though not the power of two that a row is scaled by."""
    head = _head(init_std=init_std)
    want = copy.deepcopy(head).float().half()
    if way == "to":
        got = copy.deepcopy(head).half()
    else:
        got = _head(torch.float16)
        got.load_state_dict(head.state_dict())
    assert bool(want.weight.count_nonzero() > C * D / 2)
    assert torch.equal(got.weight, want.weight)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_what_is_not_finite_stays_so(value):
    head = _head(torch.float32)
    head.weight.data[7, 2] = value
    head.to(FLOAT8)
    assert head.weight.float()[7].isnan().nonzero().flatten().tolist() == [2]
    assert bool(head.eval()(*_batch()).isnan())


@pytest.mark.parametrize("dtype", [FLOAT8, torch.float32], ids=str)
def test_no_head_goes_to_another_format_of_8_bits(dtype):
    head = _head(dtype)
    before = head.weight.detach().view(torch.uint8).clone()
    with pytest.raises(ValueError, match=r"float16 or float8_e4m3fn, got torch\.float8_e5m2\."):
        head.to(torch.float8_e5m2)
    assert head.weight.dtype is dtype
    assert torch.equal(head.weight.detach().view(torch.uint8), before)


def test_its_name_tells_the_dtype():
    assert "dtype=torch.float8_e4m3fn" in repr(_head())


@pytest.mark.parametrize("dtype", [FLOAT8, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda e: e[:1], r"has torch\.int8 of shape \(1,\)"),
        (lambda e: e.long() + 300, r"has torch\.int64 of shape \(50,\)"),
        (lambda e: e + 0.5, r"has torch\.float32 of shape \(50,\)"),
        (lambda e: 3, "has 3"),
        (lambda e: None, "lacks"),
    ],
    ids=["one", "wide", "fractions", "number", "none"],
)
def test_exponents_of_a_state_are_those_of_its_rows(dtype, change, got):
    state, head = _head(init_std=1.0).state_dict(), _head(dtype)
    before = head.weight.detach().view(torch.uint8).clone()
    state["weight_exponent"] = change(state["weight_exponent"])
    if state["weight_exponent"] is None:
        del state["weight_exponent"]
    with pytest.raises(
        RuntimeError, match=rf"weight is in float8, and the state {got}.* the exponents of its rows"
    ):
        head.load_state_dict(state)
    assert torch.equal(head.weight.detach().view(torch.uint8), before)


def test_rows_alone_are_taken_with_exponents_of_their_own():
    head, rows = _head(), torch.randn(C, D, generator=torch.Generator().manual_seed(6))
    with pytest.warns(UserWarning, match="weight is rounded from"):
        head.load_state_dict({"weight": rows})
    held = float8.values(head.weight.detach(), head.weight_exponent, torch.float32)
    assert bool(((held - rows).abs() <= rows.abs() / 16 + rows.abs().amax(1, keepdim=True) * 2**-18).all())


def test_a_state_of_other_classes_is_named_by_them_alone():
    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match="weight is of 50 classes in the state and of 9 in the head") as caught:
        FusedCosFaceLoss(9, D).load_state_dict(_head().state_dict())
    assert "Unexpected" not in str(caught.value)


def test_exponents_that_cannot_be_moved_are_refused_in_forward():
    head = _head()
    x, labels = _batch()
    strided = head.weight_exponent.repeat_interleave(2)[::2]
    with pytest.raises(ValueError, match=r"weight_exponent must be contiguous .* got strides \(2,\)"):
        margin_softmax_loss(x, head.weight.detach(), labels, margin=0.35, weight_exponent=strided)


@pytest.mark.parametrize("rule", [FusedSGD, FusedAdamW])
def test_a_restored_state_is_read_with_its_exponents_before_any_head_is_used(rule):
    """An ordinary gradient moves the weight by torch's rule, whose state is in the weight's dtype."""
    options = {"momentum": 0.9} if rule is FusedSGD else {}
    head = _head(torch.float32)
    optimizer = rule(head.parameters(), lr=1e-3, state_dtype=FLOAT8, **options)
    for _ in range(3):
        head(*_batch()).backward()
        optimizer.step()
    restored = _head(torch.float32)
    restored.load_state_dict(head.state_dict())
    other = rule(restored.parameters(), lr=1e-3, state_dtype=FLOAT8, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, ways = head.weight.detach().clone(), []
    for each, by in ((head, optimizer), (restored, other)):
        each.weight.square().sum().backward()
        by.step()
        ways.append(each.weight.detach() - before)
    assert relative_error(ways[1], ways[0]) < 0.1  # the first is of a state that is rounded
    assert not any(name.endswith("_exponent") for name in other.state[restored.weight])


@pytest.mark.parametrize("shape", [(), (1,), (C - 5,), (C, D)], ids=str)
@pytest.mark.parametrize("keep", [None, [5, 1]], ids=str)
def test_a_file_has_a_scale_of_each_row(tmp_path, shape, keep):
    head, other = _head(), _head(torch.float32)
    before, path = other.weight.detach().clone(), tmp_path / "w.safetensors"
    convert.save_weight(head.weight, path, head.weight_exponent)
    save_file(load_file(path) | {"weight_scale": torch.ones(shape)}, path)
    with pytest.raises(ValueError, match=rf"must have a number of each of {C} rows, got shape "):
        convert.load_weight_(other.weight, path, keep)
    assert torch.equal(other.weight, before)
    assert convert.main(["to-pml", str(path), str(tmp_path / "loss.pt")]) == 1
    assert not (tmp_path / "loss.pt").exists()
    save_file(load_file(path) | {"weight_scale": torch.full((C, 1), 0.5)}, path)
    convert.load_weight_(other.weight, path)
    assert torch.equal(other.weight, head.weight.float() / 2)
