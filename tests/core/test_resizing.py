"""Classes that come, go and change their labels: the weight, and all else that is known of each."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.formulas import LOSSES
from torch.nn.utils import parametrize, prune

from cosface_kernels import (
    FusedAdaCosLoss,
    FusedAdaMSoftmaxLoss,
    FusedCosFaceLoss,
    FusedKappaFaceLoss,
    FusedMarginLoss,
    FusedSphereFace2Loss,
    FusedUniFaceLoss,
    convert,
)
from cosface_kernels.margins import Margin
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.resizing import sources

C, D = 7, 5
OPTIMIZERS = {
    "FusedSGD": lambda p: FusedSGD(p, lr=0.1, momentum=0.9),
    "FusedSGD, accumulating": lambda p: FusedSGD(p, lr=0.1, momentum=0.9, accumulate=True),
    "FusedAdamW": lambda p: FusedAdamW(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
}


def _step(head, optimizer, x, labels):
    optimizer.zero_grad()
    head(x, labels).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("keep", "new", "want"),
    [
        (None, 0, [0, 1, 2, 3, 4, 5, 6]),
        (None, 2, [0, 1, 2, 3, 4, 5, 6, -1, -1]),
        ([6, 0, 3], 0, [6, 0, 3]),
        (torch.tensor([6, 0]), 1, [6, 0, -1]),
        (range(2, 4), 1, [2, 3, -1]),
        (np.arange(7)[::-1], 0, [6, 5, 4, 3, 2, 1, 0]),
        ({6: 0, 0: 2}, 2, [6, -1, 0, -1]),
        ([], 2, [-1, -1]),
    ],
    ids=str,
)
def test_sources(keep, new, want):
    assert sources(keep, new, C).tolist() == want


@pytest.mark.parametrize(
    ("keep", "new", "message"),
    [
        ([0, 7], 0, r"keep must be in \[0, 7\), got 7\."),
        ([0, -1], 0, r"keep must be in \[0, 7\), got -1\."),
        ([3, 0, 3], 0, "keep must be distinct, got 3 several times"),
        ([0.5], 0, "keep must be a vector of integers"),
        (torch.ones(7, dtype=torch.bool), 0, "keep must be a vector of integers"),
        (3, 0, "keep must be a vector of integers, got 3"),
        (torch.tensor(3), 0, r"keep must be a vector of integers, got tensor\(3\)"),
        (np.array(3), 0, r"keep must be a vector of integers, got array\(3\)"),
        ({1, 2}, 0, r"keep must be a vector of integers, got \{1, 2\}"),
        ({0: 1}, 0, r"the new labels of keep must be in \[0, 1\), got 1"),
        ({0: 0, 1: 0}, 0, "the new labels of keep must be distinct, got 0 several times"),
        ([], 0, "a head needs a class, got none to keep of 7 and new=0"),
        (None, -1, "new must be an integer of at least 0, got -1"),
        (None, 1.5, "new must be an integer of at least 0, got 1.5"),
    ],
    ids=str,
)
def test_refuses(keep, new, message):
    head = FusedCosFaceLoss(C, D)
    before = head.weight.clone()
    with pytest.raises(ValueError, match=message):
        head.resize_classes_(keep, new)
    assert torch.equal(head.weight, before)
    assert head.num_classes == C


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_kept_classes_train_on_as_if_nothing_had_been(make):
    """Dropped and added classes at cosine -1 of all embeddings, of which the softmax at s = 64 sees nothing."""
    torch.manual_seed(0)
    x = F.normalize(torch.rand(12, D))
    labels = torch.randint(4, (12,))
    far = -torch.ones(3, D)
    head = FusedCosFaceLoss(4, D)
    other = FusedCosFaceLoss(C, D)
    optimizer = make(head.parameters())
    others = make(other.parameters())
    order = [5, 1, 6, 0]  # where the classes of `head` are in `other`
    with torch.no_grad():
        other.weight[order] = head.weight
        other.weight[[2, 3, 4]] = far
    places = torch.tensor(order)
    for _ in range(3):
        _step(head, optimizer, x, labels)
        _step(other, others, x, places[labels])
    weight = other.weight
    assert other.resize_classes_(order, 3, optimizer=others) is other
    assert other.weight is weight
    assert other.num_classes == len(weight) == C
    with torch.no_grad():
        weight[4:] = far
    state, wanted = others.state[weight], optimizer.state[head.weight]
    assert state.keys() == wanted.keys()
    for name in wanted:
        if wanted[name].dim():
            torch.testing.assert_close(state[name][:4], wanted[name])
            assert state[name].shape == weight.shape
            assert not state[name][4:].any()
    for _ in range(3):
        _step(head, optimizer, x, labels)
        _step(other, others, x, labels)
    torch.testing.assert_close(weight[:4], head.weight, rtol=1e-4, atol=1e-6)


def test_new_rows_are_as_long_as_the_kept(backend):
    head = backend.head(C, D, init_std=3.0)
    old = head.weight.detach().clone()
    head.resize_classes_([4, 2], 3)
    assert torch.equal(head.weight[:2], old[[4, 2]])
    lengths = head.weight.norm(dim=1)
    torch.testing.assert_close(lengths[2:], old[[4, 2]].norm(dim=1).mean().expand(3))
    assert len(F.normalize(head.weight[2:]).unique(dim=0)) == 3
    head.resize_classes_([], 400)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.full_like(head.weight[:, 0], 3 * D**0.5))
    x, labels = torch.randn(3, D, device=backend.device), torch.tensor([0, 200, 399], device=backend.device)
    head(x, labels).backward()
    assert head.weight.grad.shape == (400, D)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_imprints_class_means(dtype):
    head = FusedCosFaceLoss(C, D, dtype=dtype)
    old = head.weight.detach().clone()
    x = torch.randn(20, D, dtype=torch.float64) * torch.rand(20, 1, dtype=torch.float64) * 100
    labels = torch.arange(20) % 4  # 0 and 2 are new
    head.resize_classes_({3: 1, 0: 3}, 2, init=(x, labels))
    assert torch.equal(head.weight[[1, 3]], old[[3, 0]])
    length = old[[3, 0]].double().norm(dim=1).mean()
    means = torch.stack([F.normalize(x[labels == label]).mean(0) for label in (0, 2)])
    tolerance = {"rtol": 1e-2, "atol": 1e-4} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(
        head.weight[[0, 2]].double(),
        F.normalize(means) * length,
        check_dtype=False,
        **(tolerance or {"rtol": 1e-5, "atol": 1e-7}),
    )


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ((torch.ones(2, D), torch.tensor([7, 7])), "an embedding of every new class, got none of class 8"),
        ((torch.ones(2, D + 1), torch.tensor([7, 8])), r"must have shape \(M, 5\), got \(2, 6\)"),
        ((torch.ones(2, D), torch.tensor([7, 9])), r"must be in \[0, 9\), got 9"),
        ((torch.ones(2, D), torch.tensor([7])), r"must be 2 integers, got torch.int64 of shape \(1,\)"),
        ((torch.ones(2, D), torch.tensor([7.0, 8.0])), "must be 2 integers, got torch.float32"),
        ((torch.tensor([[1.0] * D, [1] * D, [-1] * D]), torch.tensor([7, 8, 8])), "got length 0 for class 8"),
        (
            (torch.full((2, D), torch.nan), torch.tensor([7, 8])),
            "must have a direction, got length nan for class 7",
        ),
        (torch.ones(2, D), r"must be None or a pair \(embeddings, labels\), got Tensor"),
    ],
    ids=str,
)
def test_refuses_an_init(init, message):
    head = FusedCosFaceLoss(C, D)
    before = head.weight.clone()
    with pytest.raises(ValueError, match=message):
        head.resize_classes_(new=2, init=init)
    assert torch.equal(head.weight, before)


def test_refuses_another_optimizer_or_the_middle_of_a_step():
    head = FusedCosFaceLoss(C, D)
    with pytest.raises(ValueError, match=r"must be a torch.optim.Optimizer or None, got 3\."):
        head.resize_classes_(new=1, optimizer=3)
    with pytest.raises(ValueError, match="must hold the head's weight, got a SGD without it"):
        head.resize_classes_(new=1, optimizer=torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1))
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"must be the FusedSGD that holds the weight and its state .* got None"):
        head.resize_classes_(new=1)
    head(torch.randn(3, D), torch.tensor([0, 1, 2])).backward()
    with pytest.raises(RuntimeError, match="its step is not over"):
        head.resize_classes_(new=1, optimizer=optimizer)
    optimizer.step()
    head.resize_classes_(new=1, optimizer=optimizer)
    assert head.weight.shape == (C + 1, D)


@pytest.mark.parametrize("keep", [[0, 1], [3, 2, 1, 0]], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.SGD, FusedSGD])
def test_a_loss_of_before_has_no_backward(kind, keep):
    """It would give gradients to other classes, or read beyond the rows."""
    head = FusedCosFaceLoss(4, D)
    optimizer = kind(head.parameters(), lr=0.1)
    loss = head(torch.randn(2, D), torch.tensor([3, 2]))
    head.resize_classes_(keep, optimizer=optimizer)
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sub_center_arcface"])
def test_a_loss_of_before_does_not_keep_the_gradients_shapes(name):
    """Of no parameter that has a number of each class, in a loop where `loss` is still the last one."""
    for make in OPTIMIZERS.values():
        head = LOSSES[name][0](37, D)
        optimizer = make(head.parameters())
        x, labels = torch.randn(3, D), torch.tensor([0, 1, 2])
        losses = []
        for keep in (None, None, [2, 1, 0]):
            losses.append(head(x, labels))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
            head.resize_classes_(keep, 1, optimizer=optimizer)
        assert head.num_classes == 4


@pytest.mark.parametrize(
    ("kind", "message"),
    [(torch.optim.Adafactor, r"row_var of Adafactor, shape \(7, 1\)"), (torch.optim.LBFGS, "of LBFGS, list")],
)
def test_refuses_a_state_that_is_not_of_each_class(kind, message):
    head = FusedCosFaceLoss(C, D)
    optimizer = kind(head.parameters())
    x = torch.randn(3, D)

    def closure():
        optimizer.zero_grad()
        loss = head(x, torch.tensor([0, 1, 2]))
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(ValueError, match=message):
        head.resize_classes_([1, 0], optimizer=optimizer)
    assert head.num_classes == len(head.weight) == C


CHANGES = {
    "resize_classes_": lambda head: head.resize_classes_([1, 0], 2),
    "drop_subcenters_": lambda head: head.drop_subcenters_(),
    "float8": lambda head: head.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.orthogonal,
        lambda head: prune.l1_unstructured(head, "weight", 0.1),
    ],
    ids=["weight_norm", "orthogonal", "prune"],
)
def test_a_weight_that_is_computed_gets_no_other_rows(wrap, change):
    head = FusedCosFaceLoss(C, D, subcenters=2 if change == "drop_subcenters_" else 1)
    wrap(head)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"must be a Parameter .* got a Tensor of shape \(\d+, 5\) that is computed"
    ):
        CHANGES[change](head)
    assert (head.num_classes, head.subcenters * C, head.weight.dtype) == (C, len(head.weight), torch.float32)
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)


def test_a_parametrization_that_gives_the_parameter_itself_is_none():
    head = FusedCosFaceLoss(C, D)
    parametrize.register_parametrization(head, "weight", torch.nn.Identity())
    head.resize_classes_(new=2)
    assert head(torch.randn(1, D), torch.tensor([C + 1])).isfinite()


class _Affine(Margin):
    def __init__(self):
        super().__init__()
        self.numbers = torch.nn.Parameter(torch.tensor([0.9, 0.3, 0.0]))

    def forward(self, cos, rows):
        return self.numbers[0] * cos - self.numbers[1]


def test_what_a_margin_learns_for_all_classes_stays():
    head = FusedMarginLoss(C, D, _Affine())
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    _step(head, optimizer, torch.randn(2, D), torch.tensor([0, 1]))
    moment = optimizer.state[head.margin.numbers]["momentum_buffer"].clone()
    head.resize_classes_([6, 5], optimizer=optimizer)
    assert torch.equal(optimizer.state[head.margin.numbers]["momentum_buffer"], moment)


def test_of_heads_that_share_a_weight_one_changes_its_classes():
    head, other = FusedCosFaceLoss(C, D), FusedCosFaceLoss(C, D, class_weight=range(C))
    other.weight = head.weight
    head.resize_classes_(new=2)
    with pytest.raises(ValueError, match="must have the head's 7 classes, got 9: where heads share one"):
        other.resize_classes_([0, 1])
    with pytest.raises(ValueError, match=r"class_weight must hold 9 numbers, got shape \(7,\)"):
        other(torch.randn(1, D), torch.tensor([8]))


def test_the_margins_state_follows_and_class_weight():
    head = FusedKappaFaceLoss(3, D, class_counts=[10, 20, 30], class_weight=[1.0, 2.0, 3.0])
    head.margin.update(torch.tensor([[9.0, 0, 0, 0, 0], [0, 12.0, 0, 0, 0], [5.0, 0, 0, 0, 0]]))
    weights = head.margin.weights.clone()
    x = torch.randn(4, D)
    head.resize_classes_([2, 0], 2, init=(x, torch.tensor([2, 3, 3, 3])))
    torch.testing.assert_close(head.margin.weights, torch.cat([weights[[2, 0]], torch.full((2,), 0.5)]))
    assert head.margin.class_counts.tolist() == [30, 10, 1, 3]
    assert head.class_weight.tolist() == [3.0, 1.0, 1.0, 1.0]
    head(x, torch.tensor([0, 1, 2, 3])).backward()
    assert head.state_dict().keys() == copy.deepcopy(head).state_dict().keys()


def test_a_sampler_draws_from_the_new_classes():
    head = FusedCosFaceLoss(100, D, sample_rate=0.5)
    head(torch.randn(2, D), torch.tensor([0, 1]))
    head.resize_classes_(range(10), 30)
    assert head.sampler.num_classes == 40
    assert int(head.sampler.draws) == 1
    loss = head(torch.randn(2, D), torch.tensor([0, 39]))
    loss.backward()
    assert head.weight.grad.coalesce().indices().numel() == 20


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_momentum_of_sampled_classes_stays_sparse(nesterov):
    head = FusedCosFaceLoss(100, D, sample_rate=0.3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
    for keep in ([5, 0, 1], [2, 0]):
        for _ in range(2):
            _step(head, optimizer, torch.randn(2, D), torch.tensor([0, 1]))
        before = optimizer.state[head.weight]["momentum_buffer"].to_dense()
        head.resize_classes_(keep, 60, optimizer=optimizer)
        moment = optimizer.state[head.weight]["momentum_buffer"]
        assert moment.is_sparse
        assert torch.equal(moment.to_dense(), torch.cat([before[keep], torch.zeros(60, D)]))


def test_the_bounds_of_adacos_follow():
    head = FusedAdaCosLoss(10, D)
    head.resize_classes_(new=990)
    assert head.margin.bounds == FusedAdaCosLoss(1000, D).margin.bounds


GIVEN = "kappaface", "class_margin", "class_margin_arc"  # numbers of each class, which no reset gives again
FIRST_STATES = {
    **{name: make for name, (make, _) in LOSSES.items() if name not in ("sub_center_arcface", *GIVEN)},
    "adacos of its own scale": partial(FusedAdaCosLoss, scale=9.0),
    "sphereface2 of another scale": partial(FusedSphereFace2Loss, scale=16.0, kind="A"),
    "uniface of its own bias": partial(FusedUniFaceLoss, bias=3.0),
    "uniface of sampled classes": partial(FusedUniFaceLoss, sample_rate=0.5),
}


@pytest.mark.parametrize("name", FIRST_STATES)
def test_a_reset_after_it_is_that_of_a_head_of_as_many_classes(name):
    head, fresh = (FIRST_STATES[name](count, D) for count in (20, 300))
    head(30 * torch.randn(3, D), torch.arange(3)).sum().backward()
    head.resize_classes_(new=280)
    for each in (head, fresh):
        torch.manual_seed(0)
        each.reset_parameters()
    torch.testing.assert_close(head.state_dict(), fresh.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_margins_that_learn_follow_with_their_state():
    head = FusedAdaMSoftmaxLoss(4, D)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9)
    _step(head, optimizer, torch.randn(6, D), torch.arange(6) % 4)
    margins = head.margin.margins
    before, moment = margins.detach().clone(), optimizer.state[margins]["momentum_buffer"].clone()
    head.resize_classes_([2, 0], 1, optimizer=optimizer)
    assert head.margin.margins is margins
    assert torch.equal(margins[:2], before[[2, 0]])
    torch.testing.assert_close(margins[2], before.mean())
    assert torch.equal(optimizer.state[margins]["momentum_buffer"], torch.cat([moment[[2, 0]], torch.zeros(1)]))
    _step(head, optimizer, torch.randn(6, D), torch.arange(6) % 3)
    assert margins.grad.shape == (3,)


@pytest.mark.parametrize(
    ("keep", "wanted"), [([4, 6], {0: 4, 1: 6}), ({4: 2, 0: 0}, {2: 4, 0: 0}), ([], {}), ({}, {})], ids=str
)
def test_a_weight_of_other_classes_loads(tmp_path, monkeypatch, keep, wanted):
    """Read in blocks of a few rows; what keep does not name stays."""
    monkeypatch.setattr(convert, "ROWS_AT_ONCE", 3)
    theirs = FusedCosFaceLoss(C, D)
    convert.save_weight(theirs.weight, tmp_path / "weight.safetensors")
    head = FusedCosFaceLoss(3, D, dtype=torch.float64)
    before = head.weight.detach().clone()
    convert.load_weight_(head.weight, tmp_path / "weight.safetensors", keep)
    for label in range(3):
        want = theirs.weight[wanted[label]].double() if label in wanted else before[label]
        assert torch.equal(head.weight[label], want)


@pytest.mark.parametrize(
    ("head", "keep", "message"),
    [
        ((C, D), None, r"shape \(7, 5\), not \(9, 5\); keep says which of other classes to take"),
        ((C, D), [7], r"keep must be in \[0, 7\), got 7"),
        ((C, D), {0: 9}, r"the new labels of keep must be in \[0, 9\), got 9"),
        ((2, D), [0, 1, 2], "keep must have at most 2 labels, got 3"),
        ((C, D + 1), [0], "embedding size 5, not 6"),
    ],
    ids=str,
)
def test_refuses_to_load(tmp_path, head, keep, message):
    convert.save_weight(FusedCosFaceLoss(C, D).weight, tmp_path / "weight.safetensors")
    classes, dim = head
    weight = FusedCosFaceLoss(classes + 2 if classes == C else classes, dim).weight
    with pytest.raises(ValueError, match=message):
        convert.load_weight_(weight, tmp_path / "weight.safetensors", keep)


def test_a_state_of_other_classes_says_what_to_do():
    head = FusedCosFaceLoss(C, D)
    before = head.weight.detach().clone()
    with pytest.raises(
        RuntimeError, match="weight is of 4 classes in the state and of 7 in the head: load it into a"
    ):
        head.load_state_dict(FusedCosFaceLoss(4, D).state_dict())
    assert torch.equal(head.weight, before)
