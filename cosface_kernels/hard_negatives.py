"""The heads of the family whose losses reshape the cosines of hard negatives too."""

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import Unpack

from cosface_kernels.loss import FusedMarginLoss, HeadOptions
from cosface_kernels.margins import (
    CircleLossMargin,
    CurricularFaceMargin,
    MVSoftmaxMargin,
    NPCFaceMargin,
    defaults,
)


class FusedCurricularFaceLoss(FusedMarginLoss):
    """CurricularFace, ArcFace with hard negatives that weigh more as training goes on; see `CurricularFaceMargin`.

    Source: HuangYG123/CurricularFace (head/metrics.py): m = 0.5, s = 64, averages at a rate of 0.01.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.ARCFACE_MARGIN,
        scale: float | Tensor = defaults.SCALE,
        *,
        rate: float = defaults.RATE,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, CurricularFaceMargin(margin, rate=rate), scale, **options)


class FusedMVSoftmaxLoss(FusedMarginLoss):
    """MV-Softmax, and with margin 0 SV-Softmax: hard negatives weigh more; see `MVSoftmaxMargin`.

    Source: xiaoboCASIA/SV-X-Softmax: m = 0.35, t = 0.2, s = 32.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.MV_SOFTMAX_MARGIN,
        scale: float | Tensor = defaults.MV_SOFTMAX_SCALE,
        *,
        t: float = defaults.MV_SOFTMAX_T,
        arc: bool = False,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, MVSoftmaxMargin(margin, t=t, arc=arc), scale, **options)


class FusedNPCFaceLoss(FusedMarginLoss):
    """NPCFace, whose margin follows the hard negatives, which weigh more; see `NPCFaceMargin`.

    Source: JDAI-CV/FaceX-Zoo (head/NPCFace.py): m = 0.5, t = 1.1, a = 0.2, (m0, m1) = (0.4, 0.2), s = 64.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.ARCFACE_MARGIN,
        scale: float | Tensor = defaults.SCALE,
        *,
        t: float = defaults.NPCFACE_T,
        a: float = defaults.NPCFACE_A,
        target_margins: Sequence[float] = defaults.NPCFACE_MARGINS,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = NPCFaceMargin(margin, t=t, a=a, target_margins=target_margins)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedCircleLoss(FusedMarginLoss):
    """CircleLoss over classes; see `CircleLossMargin`.

    Source: JDAI-CV/FaceX-Zoo (head/CircleLoss.py), m = 0.25, gamma = 256, which is the scale.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.CIRCLE_LOSS_MARGIN,
        scale: float | Tensor = defaults.CIRCLE_LOSS_SCALE,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, CircleLossMargin(margin), scale, **options)
