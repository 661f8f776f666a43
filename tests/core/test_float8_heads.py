"""Heads with a weight in float8: made, trained, saved, taken to other dtypes, and what they refuse."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from support.formulas import LOSSES, as_leaves, formula_problem, make_head

from cosface_kernels import (
    FusedCosFaceLoss,
    FusedCurricularFaceLoss,
    FusedLSoftmaxLoss,
    FusedMarginLoss,
    FusedSoftmaxLoss,
    FusedSubCenterArcFaceLoss,
    checkpoint,
    convert,
    cosface_loss,
    float8,
)
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.functional import margin_softmax_loss
from cosface_kernels.optim import FusedAdamW, FusedSGD

C, D, N = 83, 20, 9


def _head(dtype=FLOAT8, seed=3, **options) -> FusedCosFaceLoss:
    torch.manual_seed(seed)
    return FusedCosFaceLoss(C, D, scale=16.0, dtype=dtype, **options)


def _batch(seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator), torch.randint(C, (N,), generator=generator)


def _trained(steps=5, rule=FusedSGD, **options):
    head = _head()
    optimizer = rule(head.parameters(), lr=0.1, **options)
    for step in range(steps):
        head(*_batch(step)).backward()
        optimizer.step()
    return head, optimizer


def _rows(head: FusedMarginLoss) -> torch.Tensor:
    return float8.values(head.weight.detach(), head.weight_exponent, torch.float64)


def _is_same(one: FusedMarginLoss, other: FusedMarginLoss) -> bool:
    bits = [head.weight.detach().view(torch.uint8) for head in (one, other)]
    return torch.equal(*bits) and torch.equal(one.weight_exponent, other.weight_exponent)


@pytest.mark.parametrize("std", [0.01, 1.0, 0.25, 3e-5, 70.0])
def test_first_rows_are_those_of_float32_rounded(std):
    """By one power of two for all, which leaves no number beyond the format."""
    head, other = _head(init_std=std), _head(torch.float32, init_std=std)
    assert len(head.weight_exponent.unique()) == 1
    unit = 2.0 ** int(head.weight_exponent[0])
    assert 32 < std / unit <= 64
    assert torch.equal(head.weight.float(), (other.weight / unit).to(FLOAT8).float())


def test_dtype_of_others_is_refused():
    with pytest.raises(ValueError, match=r"float16 or float8_e4m3fn, got torch\.float8_e5m2"):
        FusedCosFaceLoss(C, D, dtype=torch.float8_e5m2)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "l_softmax"])
def test_every_loss_is_that_of_the_same_rows_in_float32(name):
    """And the embeddings' gradient, in training."""
    x, w, labels = formula_problem("random")
    x, other = x.float(), make_head(name, w.float())
    rows = float8.values(*float8.quantized(other.weight.detach()), torch.float32)
    other.weight.data.copy_(rows)
    head = copy.deepcopy(other).to(FLOAT8)
    optimizers = [FusedSGD(each.parameters(), lr=0.0) for each in (head, other)]
    gradients = []
    for each in (head, other):
        torch.manual_seed(1)  # of margins that are drawn
        (leaf,) = as_leaves(x)
        loss = each(leaf, labels)
        loss.backward()
        gradients.append((loss.detach(), leaf.grad))
    for optimizer in optimizers:
        optimizer.step()
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("rule", [FusedSGD, FusedAdamW])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16, FLOAT8], ids=str)
def test_learns_as_float32_does(rule, state_dtype):
    """On classes that can be told apart; a step of float8's rounding costs a few parts in a hundred."""
    losses = []
    for dtype in (torch.float32, FLOAT8):
        head = _head(dtype)
        momentum = {"momentum": 0.9} if rule is FusedSGD else {}
        given = state_dtype if dtype is FLOAT8 else None
        optimizer = rule(head.parameters(), lr=0.05 if rule is FusedSGD else 2e-3, state_dtype=given, **momentum)
        torch.manual_seed(2)
        centres = torch.randn(C, D)
        for _ in range(60):
            labels = torch.randint(C, (64,))
            loss = head(centres[labels] + 0.3 * torch.randn(64, D), labels)
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < 1.1 * losses[0] + 0.1
    name = "momentum_buffer" if rule is FusedSGD else "exp_avg_sq"
    assert optimizer.state[head.weight][name].dtype == (state_dtype or torch.bfloat16)


def test_evaluation_and_frozen_rows_have_gradients_of_embeddings():
    head, (x, labels) = _head(), _batch()
    want = torch.autograd.grad(head.eval()(*(leaf := x.clone().requires_grad_(), labels)), leaf)
    other = _head().float().requires_grad_(False)
    for each in (other, _head().requires_grad_(False)):
        leaf = x.clone().requires_grad_()
        got = torch.autograd.grad(each(leaf, labels), leaf)
        assert torch.equal(got[0], want[0])
    assert _is_same(head, _head())


def test_logits_and_nearest_classes_are_those_of_float32():
    head, (x, _) = _trained()[0].eval(), _batch()
    other = copy.deepcopy(head).float()
    assert torch.equal(head.get_logits(x), other.get_logits(x))
    for got, want in zip(head.topk(x, 7), other.topk(x, 7), strict=True):
        assert torch.equal(got, want)


def test_sampled_classes_alone_move():
    head = _head(sample_rate=0.4)
    before = _rows(head)
    optimizer = FusedSGD(head.parameters(), lr=1.0)
    x, labels = _batch()
    head(x, labels).backward()
    optimizer.step()
    moved = (_rows(head) != before).any(1)
    assert bool(moved[labels].all())
    assert moved.sum() <= 34


@pytest.mark.parametrize("rule", [FusedSGD, FusedAdamW])
def test_rows_keep_their_length(rule):
    """Within a step of the format, of which each is rounded from the length itself."""
    head = _trained(4, rule, weight_norm=0.25)[0]
    torch.testing.assert_close(_rows(head).norm(dim=1), torch.full((C,), 0.25).double(), rtol=0.05, atol=0)


# -- other dtypes, copies and files ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_goes_to_another_dtype_and_back(dtype):
    """Rows with any lengths, exactly; a row may come back with its largest number at another power of two."""
    head = _trained()[0]
    want, margin = _rows(head), head.margin
    other = copy.deepcopy(head).to(dtype)
    assert other.weight.dtype is dtype
    assert other.weight_exponent is None
    assert "weight_exponent" not in other.state_dict()
    assert torch.equal(other.weight.double(), want)
    assert other.to(FLOAT8).weight.dtype is FLOAT8
    assert torch.equal(_rows(other), want)
    assert other.margin == margin


def test_what_is_no_row_stays_in_its_dtype():
    class_weight, scale = torch.rand(C), torch.nn.Parameter(torch.tensor(16.0))
    torch.manual_seed(0)
    head = FusedCurricularFaceLoss(C, D, scale=scale, class_weight=class_weight)
    model = torch.nn.Sequential(head).to(FLOAT8)
    assert model[0].weight.dtype is FLOAT8
    assert {head.scale.dtype, head.class_weight.dtype, *(b.dtype for b in head.margin.buffers())} <= {
        torch.float32,
        torch.float64,
        torch.int64,
    }
    assert torch.equal(head.class_weight, class_weight)


def test_copies_and_pickles():
    head = _trained()[0].eval()
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(head), torch.load(buffer, weights_only=False)):
        assert _is_same(twin, head)
        assert torch.equal(twin(*_batch()), head(*_batch()))


def test_a_head_on_meta_can_be_filled():
    head = FusedCosFaceLoss(C, D, dtype=FLOAT8, device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    head.reset_parameters()
    assert _is_same(head, _head())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign):
    head = _trained()[0]
    state = {name: each.clone() for name, each in head.state_dict().items()}
    assert set(state) == {"weight", "weight_exponent"}
    other = _head(seed=4)
    other.load_state_dict(state, assign=assign)
    assert _is_same(other, head)
    del state["weight_exponent"]
    with pytest.raises(RuntimeError, match="weight is in float8, and the state lacks weight_exponent"):
        other.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_states_of_other_dtypes_load(dtype, assign):
    theirs, head = _head(dtype, seed=4), _trained()[0]
    with pytest.warns(UserWarning, match=rf"weight is rounded from {dtype} to torch\.float8_e4m3fn"):
        head.load_state_dict(theirs.state_dict(), assign=assign)
    exact = theirs.weight.detach().double()
    largest = exact.abs().amax(1, keepdim=True)
    assert bool(((_rows(head) - exact).abs() <= exact.abs() / 16 + largest * 2**-18).all())
    theirs.load_state_dict(head.state_dict(), assign=assign)
    assert theirs.weight.dtype is dtype
    assert torch.equal(theirs.weight.detach().double(), _rows(head))


@pytest.mark.parametrize("keep", [None, [5, 1]], ids=str)
def test_files_hold_the_exponents(tmp_path, keep, monkeypatch):
    monkeypatch.setattr(convert, "ROWS_AT_ONCE", 7)
    head = _trained()[0]
    convert.save_weight(head.weight, tmp_path / "w.safetensors", head.weight_exponent)
    want = _rows(head) if keep is None else _rows(head)[keep]
    rows = len(want)
    same, other = _head(seed=9), _head(torch.float32, seed=9)
    convert.load_weight_(same.weight, tmp_path / "w.safetensors", keep, same.weight_exponent)
    convert.load_weight_(other.weight, tmp_path / "w.safetensors", keep)
    assert torch.equal(_rows(same)[:rows], want)
    assert torch.equal(other.weight[:rows].double(), want)
    convert.save_weight(other.weight, tmp_path / "w32.safetensors")
    convert.load_weight_(same.weight, tmp_path / "w32.safetensors", None, same.weight_exponent)
    assert torch.equal(_rows(same)[:rows], want)
    for call in (convert.save_weight, convert.load_weight_):
        with pytest.raises(
            ValueError, match="weight_exponent must be given with a weight in float8 whose length counts"
        ):
            call(head.weight, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"beside one in torch\.float32"):
        convert.save_weight(other.weight, tmp_path / "w.safetensors", head.weight_exponent)


def test_pytorch_metric_learning_gets_numbers_that_multiply(tmp_path):
    head = _trained()[0]
    convert.save_weight(head.weight, tmp_path / "w.safetensors", head.weight_exponent)
    assert convert.main(["to-pml", str(tmp_path / "w.safetensors"), str(tmp_path / "loss.pt")]) == 0
    assert torch.equal(torch.load(tmp_path / "loss.pt")["W"].T.double(), _rows(head))
    with pytest.raises(ValueError, match=r"got torch\.float8_e4m3fn: take head\.float\(\)"):
        convert.to_pytorch_metric_learning(head.weight)


@pytest.mark.parametrize("rule", [FusedSGD, FusedAdamW])
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, FLOAT8], ids=str)
def test_a_run_resumes_bit_by_bit(tmp_path, rule, state_dtype):
    options = {"state_dtype": state_dtype} | ({"momentum": 0.9} if rule is FusedSGD else {})
    head, optimizer = _trained(3, rule, **options)
    checkpoint.save(tmp_path, 3, head=head, optimizer=optimizer)
    other = _head(seed=8)
    resumed = rule(other.parameters(), lr=1.0, **options)
    assert checkpoint.load(tmp_path, head=other, optimizer=resumed) == 3
    for each, its in ((head, optimizer), (other, resumed)):
        for step in range(3, 6):
            each(*_batch(step)).backward()
            its.step()
    assert _is_same(other, head)
    state = optimizer.state_dict()["state"][0]
    exponents = [name for name in state if name.endswith("_exponent")]
    assert len(exponents) == (0 if state_dtype is torch.bfloat16 else 1 if rule is FusedSGD else 2)


@pytest.mark.parametrize(("saved", "wanted"), [(torch.float32, FLOAT8), (FLOAT8, torch.float32)], ids=str)
def test_a_checkpoint_of_another_dtype_is_converted(tmp_path, saved, wanted):
    head = _head(saved, seed=4)
    checkpoint.save(tmp_path, 1, head=head)
    other = _head(wanted)
    with pytest.warns(UserWarning, match="is rounded from torch.float32") if wanted is FLOAT8 else nullcontext():
        checkpoint.load(tmp_path, head=other)
    if wanted is FLOAT8:
        assert torch.equal(_rows(other), float8.values(*float8.quantized(head.weight.detach()), torch.float64))
    else:
        assert torch.equal(other.weight.double(), _rows(head))


@pytest.mark.parametrize("rule", [FusedSGD, FusedAdamW])
def test_states_go_to_another_dtype(rule):
    momentum = {"momentum": 0.9} if rule is FusedSGD else {}
    head, optimizer = _trained(3, rule, state_dtype=torch.float32, **momentum)
    before = {k: v.clone() for k, v in optimizer.state[head.weight].items()}
    for dtype in (FLOAT8, torch.float32):
        optimizer.state_dtype = dtype
        optimizer.param_groups[0].update(lr=0.0)
        head(*_batch()).backward()
        optimizer.step()
        state = optimizer.state[head.weight]
        assert all(state[name].dtype is dtype for name in optimizer.state_names_of(optimizer.param_groups[0]))
    assert set(state) == set(before)


# -- classes that come and go ------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, FLOAT8], ids=str)
def test_classes_come_and_go(init, state_dtype):
    head, optimizer = _trained(4, momentum=0.9, state_dtype=state_dtype)
    before = _rows(head)
    momentum = {k: v.clone() for k, v in optimizer.state[head.weight].items() if v.dim()}
    kept = [7, 3, 80]
    given = (torch.randn(4, D), torch.tensor([3, 4, 3, 4])) if init else None
    head.resize_classes_(kept, 2, init=given, optimizer=optimizer)
    assert torch.equal(_rows(head)[:3], before[kept])
    lengths = _rows(head).norm(dim=1)
    torch.testing.assert_close(lengths[3:], lengths[:3].mean().expand(2), rtol=0.03, atol=0)
    if init:
        means = torch.nn.functional.normalize(given[0]).double()
        means = torch.stack([means[::2].sum(0), means[1::2].sum(0)])
        assert bool((torch.cosine_similarity(_rows(head)[3:], means) > 0.998).all())
    for name, want in momentum.items():
        got = optimizer.state[head.weight][name]
        assert torch.equal(got[:3].view(torch.uint8), want[kept].view(torch.uint8)), name
        assert not got[3:].float().any()
    head(torch.randn(5, D), torch.arange(5)).backward()
    optimizer.step()


def test_the_longest_sub_centre_is_found_by_its_exponent():
    torch.manual_seed(0)
    head = FusedSubCenterArcFaceLoss(C, D, subcenters=3, dtype=FLOAT8)
    head.weight_exponent.random_(-12, -2)
    longest = _rows(head).view(C, 3, D).norm(dim=2).argmax(1)
    want = _rows(head).view(C, 3, D)[torch.arange(C), longest]
    assert torch.equal(_rows(head.drop_subcenters_()), want)


# -- what has no gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda head: None,
    lambda head: torch.optim.SGD(head.parameters(), lr=0.1),
    lambda head: FusedSGD(head.parameters(), lr=0.1, accumulate=True),
], ids=["none", "torch's", "accumulating"])  # fmt: skip
def test_training_needs_an_optimizer_of_rows(make):
    head = _head()
    keep = make(head)
    with pytest.raises(RuntimeError, match=r"of shape \(83, 20\) here, has no gradient of its own: its rows"):
        head(*_batch())
    del keep


def test_what_needs_the_whole_gradient_is_refused_before_a_row_moves():
    head = _head()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    loss = head(*_batch())
    with pytest.raises(RuntimeError, match="has no gradient as a whole"):
        torch.autograd.grad(loss, head.weight)
    loss = head(*_batch()) + head.weight.float().square().sum()
    with pytest.raises(RuntimeError, match=r"has no gradient as a whole|another loss came after it"):
        loss.backward()
    del optimizer


def test_margins_that_compute_with_the_weight_are_refused():
    head = FusedLSoftmaxLoss(C, D, dtype=FLOAT8)
    for each in (head, head.eval()):
        with pytest.raises(ValueError, match=r"LSoftmaxMargin computes with the weight: .* got torch\.float8"):
            each(*_batch())


@pytest.mark.parametrize("of_backend", ["cpu", "reference", "cuda_host"])
def test_rows_whose_length_counts_have_it(of_backend):
    """Loss, gradients, logits, nearest classes and a step of plain softmax: those of the same rows in float32."""
    torch.manual_seed(0)
    head = FusedSoftmaxLoss(C, D, dtype=FLOAT8, backend=of_backend, init_std=0.3)
    head.weight_exponent += torch.randint(-3, 3, (C,), dtype=torch.int8)
    other = copy.deepcopy(head).float()
    assert torch.equal(other.weight.double(), _rows(head))
    x, labels = _batch()
    assert torch.equal(head.get_logits(x), other.get_logits(x))
    for got, want in zip(head.topk(x, 5), other.topk(x, 5), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    results = []
    for each in (head, other):
        optimizer = FusedSGD(each.parameters(), lr=0.1)
        leaf = x.clone().requires_grad_()
        loss, stats = each(leaf, labels, return_stats=3)
        loss.backward()
        optimizer.step()
        results.append((loss.detach(), *stats[:4], stats.top_k_accuracy, leaf.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    largest = other.weight.detach().abs().amax(1, keepdim=True)
    off = (_rows(head) - other.weight.detach()).abs()
    assert bool((off <= 0.13 * other.weight.detach().abs() + 2e-5 * largest).all())
    assert bool((off > 0).any())
    with pytest.raises(ValueError, match="weight_exponent must be given with a weight in float8 whose length"):
        margin_softmax_loss(x, head.weight.detach(), labels, margin=0.0, normalize_weight=False)


def test_the_functional_form_asks_for_exponents():
    weight, (x, labels) = torch.nn.Parameter(torch.randn(C, D).to(FLOAT8)), _batch()
    optimizer = FusedSGD([weight], lr=1e-3)
    with pytest.raises(ValueError, match="weight_exponent must be given with a weight in float8 whose rows move"):
        cosface_loss(x, weight, labels)
    for wrong in (torch.zeros(C), torch.zeros(C - 1, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"weight_exponent must be int8 of shape \(83,\) on cpu"):
            margin_softmax_loss(x, weight, labels, margin=0.35, weight_exponent=wrong)
    with pytest.raises(ValueError, match=r"beside one in torch\.float32"):
        margin_softmax_loss(
            x, weight.detach().float(), labels, margin=0.35, weight_exponent=torch.zeros(C, dtype=torch.int8)
        )
    exponent = torch.full((C,), -6, dtype=torch.int8)
    margin_softmax_loss(x, weight, labels, margin=0.35, weight_exponent=exponent).backward()
    optimizer.step()
    assert bool((exponent < -6).all())
    assert torch.equal(cosface_loss(x, weight.detach(), labels), cosface_loss(x, weight.detach().float(), labels))
    with pytest.raises(TypeError, match=r"embeddings must be .* got torch\.float8_e4m3fn"):
        cosface_loss(x.to(FLOAT8), weight.detach(), labels)
