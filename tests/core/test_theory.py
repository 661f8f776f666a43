"""CosFace's bounds on s and m, against what they are bounds of."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from cosface_kernels import (
    FusedASoftmaxLoss,
    FusedCosFaceLoss,
    FusedMarginLoss,
    FusedNormalizedSoftmaxLoss,
    FusedUniFaceLoss,
    max_margin,
    min_scale,
)


@pytest.mark.parametrize("num_classes", [2, 5, 100])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.999])
def test_min_scale_is_reached_by_a_simplex(num_classes, probability):
    """C centres, equally far from each other in C - 1 dimensions: their cosines are -1/(C - 1)."""
    s = min_scale(num_classes, probability)
    others = (num_classes - 1) * math.exp(-s / (num_classes - 1))
    assert math.exp(s) / (math.exp(s) + others) == pytest.approx(probability)


@pytest.mark.parametrize(
    ("num_classes", "dim"), [(2, 2), (3, 2), (8, 2), (50, 2), (3, 3), (4, 3), (5, 16), (2, 1), (3, 1), (4, 1)]
)
def test_max_margin_is_reached_by_the_best_placement(num_classes, dim):
    """On a line its ends, on a circle the corners of a polygon, else those of a simplex."""
    if dim == 2:
        angles = torch.arange(num_classes, dtype=torch.float64) * 2 * math.pi / num_classes
        centres = torch.stack([angles.cos(), angles.sin()], 1)
    elif dim == 1:
        centres = (-1.0) ** torch.arange(num_classes, dtype=torch.float64)[:, None]
    else:
        eye = torch.eye(num_classes, dtype=torch.float64)
        centres = F.normalize(eye - eye.mean(0))
    cos = centres @ centres.T
    cos.fill_diagonal_(-math.inf)
    assert max_margin(num_classes, dim) == pytest.approx(1 - cos.max().item())


def test_max_margin_bounds_any_placement():
    for num_classes, dim in ((2, 1), (3, 1), (6, 2), (20, 3), (9, 8), (300, 16)):
        centres = F.normalize(torch.randn(num_classes, dim, dtype=torch.float64))
        cos = (centres @ centres.T).fill_diagonal_(-math.inf)
        assert 1 - cos.max().item() <= max_margin(num_classes, dim) + 1e-12


def test_the_modules_warn_once():
    with pytest.warns(UserWarning, match=r"scale 4.0 is below 9.67, .* among 1763 \(CosFace, Eq. 6\)"):
        head = FusedCosFaceLoss(1763, 64, scale=4.0)
    with pytest.warns(UserWarning, match=r"margin 0.35 is above 0.293, .* 8 class centres of size 2 .*Eq. 7"):
        FusedCosFaceLoss(8, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(torch.randn(2, 64), torch.tensor([1, 2]))
        FusedCosFaceLoss(8, 2, 0.2)
        FusedCosFaceLoss(1763, 64, scale=12.0)
        FusedCosFaceLoss(8, 2, max_margin(8, 2), scale=min_scale(8))  # the bounds themselves
        FusedCosFaceLoss(1763, 64, scale=torch.nn.Parameter(torch.tensor(1.0)))
        FusedASoftmaxLoss(1763, 64)  # whose scale is a factor of the norm
        FusedUniFaceLoss(1763, 64, scale=4.0)  # without a softmax


class MyHead(FusedCosFaceLoss):
    """A subclass of a user, whose line is that of the call of its parent."""

    def __init__(self) -> None:
        super().__init__(1763, 64, scale=4.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FusedMarginLoss(1763, 64, 0.35, scale=4.0),
        lambda: FusedCosFaceLoss(1763, 64, scale=4.0),
        lambda: FusedNormalizedSoftmaxLoss(1763, 64, scale=4.0),
        lambda: FusedMarginLoss(8, 2, 0.35),
        lambda: FusedCosFaceLoss(8, 2),
        MyHead,
    ],
)
def test_warnings_are_of_the_line_that_made_the_head(make):
    with pytest.warns(UserWarning, match="CosFace, Eq") as warned:
        make()
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: min_scale(1), r"num_classes must be in \[2, inf\), got 1"),
        (lambda: min_scale(10, 1.0), r"probability must be in \(0, 1\), got 1.0"),
        (lambda: min_scale(10, 0.0), r"probability must be in \(0, 1\), got 0.0"),
        (lambda: max_margin(1, 2), r"num_classes must be in \[2, inf\), got 1"),
        (lambda: max_margin(4, 0), "embedding_size must be a positive integer, got 0"),
    ],
)
def test_out_of_range_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
