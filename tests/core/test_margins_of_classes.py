"""Margins of each class and of each sample: tables, learned ones, drawn ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from cosface_kernels import (
    FusedAdaMSoftmaxLoss,
    FusedCosFaceLoss,
    FusedElasticFaceLoss,
    FusedGBCosFaceLoss,
    FusedMarginLoss,
    margin_softmax_loss,
)
from cosface_kernels.margins import ClassMargin, ElasticFaceMargin, Rows, dynamic_margins, ldam_margins
from cosface_kernels.margins.drawn import standard_normal

C, D, N = 7, 5, 12


def _rows(labels):
    return Rows(torch.ones(len(labels), D), labels)


def _draw(margin, cos, labels):
    return margin.margins_of(cos, _rows(labels))


@pytest.mark.float64
def test_a_table_learns(backend):
    """Its gradient is that of the target's logits, in the op's float64."""
    x, w = (torch.randn(n, D, device=backend.device, dtype=torch.float64) for n in (N, C))
    labels = torch.arange(N, device=backend.device) % 4  # of some classes there is no sample
    table = torch.rand(C, device=backend.device, dtype=torch.float64).requires_grad_()
    loss = margin_softmax_loss(x, w, labels, margin=table, scale=8.0, backend=backend.name)
    (got,) = torch.autograd.grad(loss, table)
    logits = F.normalize(x) @ F.normalize(w).T
    logits = logits - table * F.one_hot(labels, C)
    want_loss = F.cross_entropy(8.0 * logits, labels)
    (want,) = torch.autograd.grad(want_loss, table)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FusedCosFaceLoss(3, 2, torch.ones(4)),
            "margin must be one number or 3, one of each class, got 4",
        ),
        (lambda: FusedMarginLoss(3, 2, ClassMargin([0.1, 0.2])), "one number or 3, one of each class, got 2"),
        (lambda: ClassMargin([0.1, float("nan")]), "margins must be finite, got nan"),
        (lambda: ClassMargin(torch.ones(2, 2)), r"margins must be a vector, .* got shape \(2, 2\)"),
        (lambda: FusedCosFaceLoss(3, 2, torch.tensor(0.3)), r"margins must be a vector, .* got shape \(\)"),
        (lambda: ClassMargin([True, False]), "margins must be numbers, got torch.bool"),
        (lambda: ldam_margins([0, 1]), r"class_counts must be a vector of positive counts, got \[0, 1\]"),
        (lambda: ldam_margins([1, 2], -1.0), r"largest must be in \[0, inf\), got -1\.0"),
        (lambda: dynamic_margins([1, 2], 0.5, 0.05), r"largest must be in \[0\.5, inf\), got 0\.05"),
        (lambda: dynamic_margins([1, 2], math.inf), r"smallest must be in \(-inf, inf\), got inf"),
        (lambda: FusedAdaMSoftmaxLoss(3, 2, 1.5), r"margin must be in \[0, 1\], got 1\.5"),
        (lambda: FusedElasticFaceLoss(3, 2, std=-1.0), r"std must be in \[0, inf\), got -1\.0"),
        (lambda: FusedElasticFaceLoss(3, 2, plus=1), "plus must be True or False, got 1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_function_refuses_a_table_of_other_classes():
    with pytest.raises(ValueError, match="margin must be one number or 7, one of each class, got 6"):
        margin_softmax_loss(torch.ones(2, D), torch.ones(C, D), torch.tensor([0, 1]), margin=torch.ones(6))


def test_a_table_of_the_function_compiles_whole():
    x, w, labels, table = torch.randn(N, D), torch.randn(C, D), torch.arange(N) % C, torch.rand(C)
    loss = lambda table: margin_softmax_loss(x, w, labels, margin=table)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(table), loss(table))


def test_integers_are_margins():
    head = FusedCosFaceLoss(3, D, torch.tensor([0, 1, 0]))
    head.resize_classes_(new=1)
    torch.testing.assert_close(head.margin.margins, torch.tensor([0, 1, 0, 1 / 3]))


def test_margins_by_class_size():
    counts = [3, 100, 7, 100000]
    assert ldam_margins(counts, 0.4).max() == 0.4
    torch.testing.assert_close(ldam_margins(counts, 0.4), 0.4 * (3 / torch.tensor(counts)) ** 0.25)
    table = dynamic_margins(counts, 0.1, 0.6)
    assert (table.min(), table.max()) == (table[3], table[0])
    torch.testing.assert_close(table[[3, 0]], torch.tensor([0.1, 0.6]))
    assert torch.equal(dynamic_margins([5, 5]), torch.full((2,), 0.05))


@pytest.mark.parametrize(
    ("make", "name", "state"),
    [
        (FusedAdaMSoftmaxLoss, "margins", [1.3, -0.2, 0.5, 0.5, 0.5, 1.1, 0.0]),
        (FusedGBCosFaceLoss, "boundary", 0.95),
    ],
)
def test_state_that_left_its_range_counts_alike_in_training_and_evaluation(make, name, state):
    head = make(C, D, dtype=torch.float64)
    of_margin = getattr(head.margin, name)
    of_margin.data.copy_(torch.tensor(state))
    before = of_margin.detach().clone()
    x, labels = torch.randn(N, D, dtype=torch.float64), torch.arange(N) % C
    evaluated = head.eval()(x, labels)
    assert torch.equal(of_margin, before)
    torch.testing.assert_close(evaluated, head.train()(x, labels))


def test_adam_softmax_keeps_its_margins_within_bounds():
    head = FusedAdaMSoftmaxLoss(C, D, regularizer=0.5)
    with torch.no_grad():
        head.margin.margins.copy_(torch.tensor([-1.0, 2, 0.5, 0.5, 0.5, 0.5, 0.5]))
    head.eval()
    head(torch.randn(3, D), torch.tensor([0, 1, 2]))
    assert head.margin.margins[1] == 2
    head.train()
    head(torch.randn(3, D), torch.tensor([0, 1, 2])).backward()
    assert head.margin.margins.tolist() == [0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    # the term for large margins, whose classes have no sample here
    torch.testing.assert_close(head.margin.margins.grad[3:], torch.full((4,), -0.5 / C))


def test_drawn_margins_are_normal():
    z = standard_normal(3, torch.tensor(5.0), torch.arange(200_000))
    assert abs(z.mean()) < 4 / len(z) ** 0.5
    assert abs(z.std() - 1) < 4 / (2 * len(z)) ** 0.5
    inside = torch.tensor([(z.abs() < limit).double().mean() for limit in (1, 2, 3)])
    torch.testing.assert_close(inside, torch.tensor([0.6827, 0.9545, 0.9973], dtype=z.dtype), atol=4e-3, rtol=0)
    neighbours = torch.stack(
        [
            z[:-1],
            z[1:],
            standard_normal(3, torch.tensor(6.0), torch.arange(1, 200_000)),
            standard_normal(4, torch.tensor(5.0), torch.arange(1, 200_000)),
        ]
    )
    assert (torch.corrcoef(neighbours) - torch.eye(4, dtype=z.dtype)).abs().max() < 5 / len(z) ** 0.5


def test_seeds_do_not_run_into_each_other_s_draws():
    """Where a seed were added to the count of draws, or to the place, one would repeat what another drew."""
    place = torch.arange(4)
    draws = [standard_normal(s, torch.tensor(float(d)), place + at * 2**16)
             for s in (0, 1, 2**16, 2**31, -1) for d in (0, 1, 2) for at in (0, 1)]  # fmt: skip
    assert len(torch.cat(draws).unique()) == 4 * len(draws)


def test_draws_go_on_and_ignored_samples_take_none():
    cos, labels = torch.rand(N), torch.arange(N) % C
    first, second = (_draw(margin := ElasticFaceMargin(0.35), cos, labels), _draw(margin, cos, labels))
    assert not torch.equal(first, second)
    resumed = ElasticFaceMargin(0.35)
    resumed.draws.fill_(1)
    assert torch.equal(_draw(resumed, cos, labels), second)
    padded = torch.cat([torch.tensor([-1]), labels, torch.tensor([-1])])
    assert torch.equal(_draw(ElasticFaceMargin(0.35), F.pad(cos, (1, 1)), padded)[1:-1], first)
    assert torch.equal(ElasticFaceMargin(0.35).eval()(cos, _rows(labels)), cos - 0.35)


def test_plus_gives_the_largest_margin_to_the_smallest_cosine():
    cos, labels = torch.rand(N), torch.arange(N) % C
    labels[4] = -1
    plain, plus = (ElasticFaceMargin(0.35, plus=plus) for plus in (False, True))
    drawn, shared = _draw(plain, cos, labels), _draw(plus, cos, labels)
    valid = labels >= 0
    assert torch.equal(shared[valid].sort().values, drawn[valid].sort().values)
    order = cos[valid].argsort()
    assert torch.equal(shared[valid][order], shared[valid].sort(descending=True).values)
