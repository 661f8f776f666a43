"""Margins of a user's own: what they give is looked at before it is broadcast, and angles for being some."""

import math

import pytest
import torch
from torch import Tensor

from cosface_kernels import (
    FusedArcFaceLoss,
    FusedCosFaceLoss,
    FusedMarginLoss,
    FusedNPCFaceLoss,
    FusedSFaceLoss,
    FusedSphereFace2Loss,
    FusedUniFaceLoss,
    margin_softmax_loss,
)
from cosface_kernels.margins import (
    ArcFaceMargin,
    ClassMargin,
    CombinedMargin,
    Margin,
    Rows,
    SigmoidMargin,
    SigmoidTerms,
    SphereFaceMargin,
    X2SoftmaxMargin,
)

SHAPES = {"column": lambda v: v[:, None], "sum": lambda v: v.sum(), "twice": lambda v: torch.cat([v, v])}
shapes = pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)


def _loss(margin: Margin) -> Tensor:
    return margin_softmax_loss(torch.randn(5, 8), torch.randn(9, 8), torch.arange(5), margin=margin, scale=4.0)


@shapes
def test_a_margin_that_does_not_hold_one_value_of_each_sample(change):
    class Own(Margin):
        def forward(self, cos: Tensor, rows: Rows) -> Tensor:
            return change(cos - 0.1)

    with pytest.raises(ValueError, match=r"the result of Own must hold one value per sample, shape \(5,\)"):
        _loss(Own())


@shapes
def test_a_loss_that_does_not(change):
    class Own(Margin):
        def loss(self, top: Tensor, log_sum: Tensor, cos: Tensor, scale: Tensor, rows: Rows) -> Tensor:
            return change(scale * cos)

    with pytest.raises(ValueError, match="the loss of Own must hold one value per sample"):
        _loss(Own())


class Sigmoids(SigmoidMargin):
    """A binary cross-entropy, of which one thing is changed."""

    def __init__(self, part: str | None = None, change=None) -> None:
        super().__init__()
        self.part, self.change = part, change

    def terms(self, scale: Tensor, rows: Rows) -> SigmoidTerms:
        terms = SigmoidTerms(
            lambda cos: self._changed("positive", torch.nn.functional.softplus(-scale * cos)),
            torch.ones_like(scale),
            scale,
            torch.zeros_like(scale),
        )
        return terms._replace(**{name: self._changed(name, getattr(terms, name)) for name in terms._fields[1:]})

    def _changed(self, name: str, value: Tensor) -> Tensor:
        return self.change(value) if name == self.part else value


@shapes
@pytest.mark.parametrize("part", ["positive", "factor", "scale", "bias"])
def test_terms_that_do_not(part, change):
    with pytest.raises(ValueError, match=f"{part} of Sigmoids.* must hold one value per sample"):
        _loss(Sigmoids(part, change))


def test_sigmoids_of_ones_own():
    x, w, labels = torch.randn(5, 8, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64), torch.arange(5)
    cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
    one_hot = torch.nn.functional.one_hot(labels, 9).double()
    want = torch.nn.functional.binary_cross_entropy_with_logits(4 * cos, one_hot, reduction="sum") / 5
    torch.testing.assert_close(margin_softmax_loss(x, w, labels, margin=Sigmoids(), scale=4.0), want)
    lists = Sigmoids()
    lists.polynomials = [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    torch.testing.assert_close(margin_softmax_loss(x, w, labels, margin=lists, scale=4.0), want)


@pytest.mark.parametrize("polynomials", [(), ((0, 1),), ((0, 1), (1, 0)), 3, None, (("a",) * 5, (1,) * 5)])
def test_polynomials_that_are_none(polynomials):
    margin = Sigmoids()
    margin.polynomials = polynomials
    with pytest.raises(ValueError, match="polynomials must be"):
        _loss(margin)


def test_what_a_subclass_must_define():
    with pytest.raises(NotImplementedError, match=r"SigmoidMargin must define terms\(scale, rows\)"):
        _loss(SigmoidMargin())

    class Reshapes(Margin):
        reshapes_negatives = True

    with pytest.raises(NotImplementedError, match=r"Reshapes must define negatives\(cos, rows\)"):
        _loss(Reshapes())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedSphereFace2Loss(9, 8, 28.6, kind="A"), r"\[0, pi\) radians, got 28.6; if these are degrees"),
        (lambda: FusedSFaceLoss(9, 8, a=45), r"a must be in \[0, pi\] radians, got 45; if these are degrees"),
        (lambda: FusedSFaceLoss(9, 8, b=-0.1), r"b must be in \[0, pi\] radians, got -0.1"),
        (lambda: FusedNPCFaceLoss(9, 8, target_margins=(28, 5)), "each of target_margins must be in .* radians"),
        (lambda: ClassMargin([0.1, 28.6], arc=True), r"the largest of the margins must be in \[0, pi\) radians"),
        (
            lambda: FusedArcFaceLoss(9, 8, torch.full((9,), 0.5)),
            r"a tensor of shape \(9,\); FusedMarginLoss with a",
        ),
        (lambda: FusedUniFaceLoss(9, 8, torch.full((9,), 0.5)), r"margin must be a number, got a tensor of shape"),
        (lambda: FusedMarginLoss(9, 8, ArcFaceMargin), "margin must be a margin, got the class ArcFaceMargin"),
        (lambda: _loss(ArcFaceMargin), "margin must be a margin, got the class ArcFaceMargin"),
        (lambda: FusedCosFaceLoss(9, 8, scale=torch.ones(5)), r"scale of a head .* got shape \(5,\)"),
    ],
)
def test_what_is_no_margin(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_beyond_1_an_angle_is_0_or_pi():
    """As `margin_softmax_loss` says of rows that are not normalised."""
    cos = torch.tensor([-3.0, -1.5, 1.5, 3.0])
    rows = Rows(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    for margin in (SphereFaceMargin(), X2SoftmaxMargin(), CombinedMargin((1.2, 0.3, 0.1))):
        torch.testing.assert_close(margin(cos, rows), margin(cos.sign(), rows))
    torch.testing.assert_close(ClassMargin([0.5], arc=True)(cos, rows), cos * math.cos(0.5))


def test_angles_up_to_pi():
    assert FusedSFaceLoss(9, 8, a=0, b=math.pi).margin.b == math.pi
    assert len(ClassMargin([-0.2, 0.5], arc=True).margins) == 2
