"""The heads of losses in which each class counts on its own."""

import math
from typing import Any

from torch import Tensor
from typing_extensions import Self, Unpack

from cosface_kernels.loss import FusedMarginLoss, HeadOptions
from cosface_kernels.margins import SFaceMargin, SphereFace2Margin, UniFaceMargin, defaults
from cosface_kernels.validation import check_margin, check_positive, check_sample_rate, number_of


class FusedSphereFace2Loss(FusedMarginLoss):
    """SphereFace2, a binary classifier of each class, whose bias learns; see `SphereFace2Margin`.

    Its optimizer must have `head.parameters()`: the weight and head.margin.bias, which every rank has and moves
    alike.

    Source: ydwen/opensphere (model/head/sphereface2.py): m = 0.4, s = 40, lambda = 0.7, t = 3, w = 50; it trains
    with straight_through=True.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.SPHEREFACE2_MARGIN,
        scale: float | Tensor = defaults.SPHEREFACE2_SCALE,
        *,
        kind: str = "C",
        weighting: float = defaults.SPHEREFACE2_WEIGHTING,
        t: int = defaults.SPHEREFACE2_T,
        weight: float = defaults.SPHEREFACE2_WEIGHT,
        straight_through: bool = False,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = SphereFace2Margin(
            margin,
            scale=number_of(scale, "from which the bias follows"),
            num_classes=num_classes,
            kind=kind,
            weighting=weighting,
            t=t,
            weight=weight,
            straight_through=straight_through,
        )
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedUniFaceLoss(FusedMarginLoss):
    """UniFace, one threshold for all pairs, which learns; see `UniFaceMargin`.

    Its optimizer must have `head.parameters()`, as `FusedSphereFace2Loss` says.

    Args:
        balance: l, the weight of the negatives.
        bias: s times the threshold at the start; None for log(10 C r), with sample_rate r.

    Source: CVI-SZU/UniFace (head.py): m = 0.4, s = 64, l = 1, r = 1.
    """

    margin: UniFaceMargin
    _first_of_classes = False  # whether the first bias is that of the number of classes

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.UNIFACE_MARGIN,
        scale: float | Tensor = defaults.SCALE,
        *,
        balance: float = defaults.UNIFACE_BALANCE,
        bias: float | None = None,
        **options: Unpack[HeadOptions],
    ) -> None:
        check_positive("num_classes", num_classes)
        of_classes = bias is None
        if bias is None:
            rate = options.get("sample_rate", 1.0)
            check_sample_rate(rate)
            bias = _uniface_bias(num_classes, rate)
        super().__init__(
            num_classes, embedding_size, UniFaceMargin(margin, bias=bias, balance=balance), scale, **options
        )
        self._first_of_classes = of_classes

    def resize_classes_(self, *arguments: Any, **options: Any) -> Self:
        super().resize_classes_(*arguments, **options)
        if self._first_of_classes:
            rate = 1.0 if self.sampler is None else self.sampler.rate
            self.margin.initial = _uniface_bias(self.num_classes, rate)
        return self


def _uniface_bias(num_classes: int, sample_rate: float) -> float:
    return math.log(10 * num_classes * sample_rate)


class FusedSFaceLoss(FusedMarginLoss):
    """SFace, pulls and pushes that sigmoids of the angle bound, without a margin; see `SFaceMargin`.

    Source: zhongyy/SFace (SFace_torch/head/metrics.py): s = 64, k = 80, a = 0.80, b = 1.23.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.0,
        scale: float | Tensor = defaults.SCALE,
        *,
        k: float = defaults.SFACE_K,
        a: float = defaults.SFACE_A,
        b: float = defaults.SFACE_B,
        **options: Unpack[HeadOptions],
    ) -> None:
        check_margin(margin)
        if margin != 0:
            raise ValueError(f"margin must be 0, because SFace has none, got {margin!r}.")
        super().__init__(num_classes, embedding_size, SFaceMargin(k=k, a=a, b=b), scale, **options)
