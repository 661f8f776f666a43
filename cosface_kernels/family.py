"""The losses that users know by name: each a margin of `cosface_kernels.margins` and defaults with their source.

Each takes num_classes (C), embedding_size (D), margin and scale first, then the keyword arguments of its margin
and those of `FusedMarginLoss`. Angles are in radians, where pytorch-metric-learning takes degrees.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from cosface_kernels.functional import LossStats
from cosface_kernels.hard_negatives import FusedCircleLoss as FusedCircleLoss
from cosface_kernels.hard_negatives import FusedCurricularFaceLoss as FusedCurricularFaceLoss
from cosface_kernels.hard_negatives import FusedMVSoftmaxLoss as FusedMVSoftmaxLoss
from cosface_kernels.hard_negatives import FusedNPCFaceLoss as FusedNPCFaceLoss
from cosface_kernels.loss import FusedCosFaceLoss, FusedMarginLoss, HeadOptions
from cosface_kernels.margins import (
    AdaCosMargin,
    AdaFaceMargin,
    AdaMSoftmaxMargin,
    AnnealedSphereFaceMargin,
    ArcFaceMargin,
    CombinedMargin,
    ElasticFaceMargin,
    GBCosFaceMargin,
    KappaFaceMargin,
    LSoftmaxMargin,
    MagFaceMargin,
    SphereFaceMargin,
    X2SoftmaxMargin,
    defaults,
)
from cosface_kernels.sigmoid_heads import FusedSFaceLoss as FusedSFaceLoss
from cosface_kernels.sigmoid_heads import FusedSphereFace2Loss as FusedSphereFace2Loss
from cosface_kernels.sigmoid_heads import FusedUniFaceLoss as FusedUniFaceLoss
from cosface_kernels.validation import check_margin, check_numbers, check_positive


class FusedNormalizedSoftmaxLoss(FusedCosFaceLoss):
    """NSL, softmax over scaled cosines: CosFace with m = 0.

    margin and scale are keyword arguments: the third of pytorch-metric-learning's `NormalizedSoftmaxLoss` is a
    temperature, 1 / scale.

    Source: Wang et al., NormFace, arXiv:1704.06369; CosFace, arXiv:1801.09414, Eq. 3.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        margin: float = 0.0,
        scale: float | Tensor = defaults.SCALE,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **options)


class FusedArcFaceLoss(FusedMarginLoss):
    """ArcFace, psi = cos(theta + m); `margin` in [0, pi) radians; see `ArcFaceMargin`.

    Source: Deng et al., ArcFace, arXiv:1801.07698, whose m = 0.5 and s = 64 are the defaults. insightface trains
    with straight_through=True.

    >>> head = FusedArcFaceLoss(num_classes=1000, embedding_size=128, margin=0.4)
    >>> head(torch.randn(4, 128), torch.tensor([1, 17, 17, 999])).shape
    torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.ARCFACE_MARGIN,
        scale: float | Tensor = defaults.SCALE,
        *,
        straight_through: bool = False,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = ArcFaceMargin(margin, straight_through=straight_through)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedSubCenterArcFaceLoss(FusedArcFaceLoss):
    """Sub-centre ArcFace: `subcenters` centres of each class, of which the nearest to a sample counts.

    Trained on noisy data, one centre of a class becomes dominant and the others gather what does not belong to it;
    `drop_subcenters_` then leaves the dominant one. pytorch-metric-learning's has the same rows.

    Source: Deng et al., Sub-center ArcFace, ECCV 2020, Eq. 2, with K = 3; insightface's subcenter_arcface.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.ARCFACE_MARGIN,
        scale: float | Tensor = defaults.SCALE,
        *,
        subcenters: int = defaults.SUBCENTERS,
        straight_through: bool = False,
        **options: Any,
    ) -> None:
        options |= {"subcenters": subcenters, "straight_through": straight_through}
        super().__init__(num_classes, embedding_size, margin, scale, **options)


class FusedCombinedMarginLoss(FusedMarginLoss):
    """psi = cos(m1 theta + m2) - m3; `margin` is (m1, m2, m3); see `CombinedMargin`.

    Source: deepinsight/insightface (recognition/arcface_torch), whose margin_list and s = 64 are the defaults. It
    trains with straight_through=True, and with (1, 0, m3) where m3 > 0.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: Sequence[float] = defaults.COMBINED_MARGINS,
        scale: float | Tensor = defaults.SCALE,
        *,
        filter_above: float | None = None,
        guard: bool | None = None,
        straight_through: bool = False,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = CombinedMargin(margin, filter_above=filter_above, guard=guard, straight_through=straight_through)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedSphereFaceLoss(FusedMarginLoss):
    """SphereFace with normalised features; `margin` >= 1 is the factor of the angle; see `SphereFaceMargin`.

    pytorch-metric-learning's `SphereFaceLoss` scales each sample by its norm, as `FusedASoftmaxLoss` does.

    Source: ydwen/opensphere (model/head/sphereface.py), m = 1.7 and s = 30; it trains with straight_through=True.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.SPHEREFACE_MARGIN,
        scale: float | Tensor = defaults.SPHEREFACE_SCALE,
        *,
        straight_through: bool = False,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = SphereFaceMargin(margin, straight_through=straight_through)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedASoftmaxLoss(FusedMarginLoss):
    """A-Softmax, SphereFace as it was first: the scale of a sample is `scale` |x_i|, and lambda is annealed.

    `margin` >= 1 is the factor of the angle; base, gamma and lambda_min are those of `AnnealedSphereFaceMargin`.
    With base = lambda_min = 0 there is no annealing.

    Source: Liu et al., SphereFace, arXiv:1704.08063; MuggleWang/CosFace_pytorch (layer.py), m = 4.
    """

    normalize_embeddings = False

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.A_SOFTMAX_MARGIN,
        scale: float | Tensor = 1.0,
        *,
        base: float = defaults.A_SOFTMAX_BASE,
        gamma: float = defaults.A_SOFTMAX_GAMMA,
        lambda_min: float = defaults.A_SOFTMAX_LAMBDA_MIN,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = AnnealedSphereFaceMargin(margin, base=base, gamma=gamma, lambda_min=lambda_min)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedSoftmaxLoss(FusedMarginLoss):
    """Plain softmax over <x, w_j>, nothing normalised, without a bias; `margin` is 0.

    Source: Wang et al., CosFace, arXiv:1801.09414, Eq. 1, with B = 0.
    """

    normalize_embeddings = normalize_weight = False

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.0,
        scale: float | Tensor = 1.0,
        **options: Unpack[HeadOptions],
    ) -> None:
        check_margin(margin)
        if margin != 0:
            raise ValueError(f"margin must be 0, because the plain softmax has none, got {margin!r}.")
        super().__init__(num_classes, embedding_size, margin, scale, **options)


class FusedLSoftmaxLoss(FusedMarginLoss):
    """L-Softmax, logits <x, w_j> with the target's |x||w_y| psi(theta); `margin` >= 1; see `LSoftmaxMargin`.

    Source: Liu et al., Large-Margin Softmax, arXiv:1612.02295; pytorch-metric-learning's `LargeMarginSoftmaxLoss`,
    whose m = 4 and s = 1 are the defaults.
    """

    normalize_embeddings = normalize_weight = False

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.L_SOFTMAX_MARGIN,
        scale: float | Tensor = 1.0,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, LSoftmaxMargin(margin), scale, **options)


class FusedAdaFaceLoss(FusedMarginLoss):
    """AdaFace, a margin that follows the norm of the embedding, which must not be normalised; see `AdaFaceMargin`.

    Source: mk-minchul/AdaFace (head.py, README), m = 0.4, h = 0.333, s = 64, averages at a rate of 0.01.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.ADAFACE_MARGIN,
        scale: float | Tensor = defaults.SCALE,
        *,
        h: float = defaults.ADAFACE_H,
        rate: float = defaults.RATE,
        straight_through: bool = False,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = AdaFaceMargin(margin, h=h, rate=rate, straight_through=straight_through)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedMagFaceLoss(FusedMarginLoss):
    """MagFace; `margin` is (l_m, u_m), `norms` (l_a, u_a), and `regularizer` lambda; see `MagFaceMargin`.

    Source: IrvingMeng/MagFace (models/magface.py, run/run.sh).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: Sequence[float] = defaults.MAGFACE_MARGINS,
        scale: float | Tensor = defaults.SCALE,
        *,
        norms: Sequence[float] = defaults.MAGFACE_NORMS,
        regularizer: float = defaults.MAGFACE_REGULARIZER,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = MagFaceMargin(margin, norms=norms, regularizer=regularizer)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedKappaFaceLoss(FusedMarginLoss):
    """KappaFace, a margin for each class, set by `head.margin.update` after each epoch; see `KappaFaceMargin`.

    Args:
        class_counts: (num_classes,), the number of training samples of each class.

    Source: Leminhbinh0209/KappaFace (configs/base.py): m = 0.8, T = 0.4, gamma = 0.7, s = 64.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.KAPPAFACE_MARGIN,
        scale: float | Tensor = defaults.SCALE,
        *,
        class_counts: Tensor | Sequence[int] | None = None,
        temperature: float = defaults.KAPPAFACE_TEMPERATURE,
        gamma: float = defaults.KAPPAFACE_GAMMA,
        **options: Unpack[HeadOptions],
    ) -> None:
        if class_counts is None:
            raise ValueError(
                f"KappaFace needs class_counts, the number of training samples of each of the {num_classes} "
                "classes, got None."
            )
        check_positive("num_classes", num_classes)
        psi = KappaFaceMargin(class_counts, margin, temperature=temperature, gamma=gamma)
        if len(psi.class_counts) != num_classes:
            raise ValueError(f"class_counts must hold {num_classes} counts, got {len(psi.class_counts)}.")
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedX2SoftmaxLoss(FusedMarginLoss):
    """X2-Softmax, psi = a (theta - h)^2 + k; `margin` is (a, h, k); see `X2SoftmaxMargin`.

    Source: Xu et al., X2-Softmax, arXiv:2312.05281, and its code, which trains with straight_through=True.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: Sequence[float] = defaults.X2_SOFTMAX_PARABOLA,
        scale: float | Tensor = defaults.SCALE,
        *,
        straight_through: bool = False,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = X2SoftmaxMargin(*check_numbers("margin", margin, 3), straight_through=straight_through)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedGBCosFaceLoss(FusedMarginLoss):
    """GB-CosFace, a global boundary that target and other classes must clear by a margin; see `GBCosFaceMargin`.

    Source: aliyun/GB-CosFace (loss/GBCosFace.py): m = 0.16, s = 32, alpha = 0.15, rate 0.01.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.GB_COSFACE_MARGIN,
        scale: float | Tensor = defaults.GB_COSFACE_SCALE,
        *,
        alpha: float = defaults.GB_COSFACE_ALPHA,
        bounds: Sequence[float] = defaults.GB_COSFACE_BOUNDS,
        rate: float = defaults.RATE,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = GBCosFaceMargin(margin, alpha=alpha, bounds=bounds, rate=rate)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedElasticFaceLoss(FusedMarginLoss):
    """ElasticFace, a margin drawn for every sample; `arc` and `plus` as in `ElasticFaceMargin`.

    Source: fdbtrs/ElasticFace: with arc=False m = 0.35, with arc=True m = 0.5; std = 0.05, with plus=True 0.02 and
    0.0175.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.COSFACE_MARGIN,
        scale: float | Tensor = defaults.SCALE,
        *,
        std: float = defaults.ELASTICFACE_STD,
        arc: bool = False,
        plus: bool = False,
        seed: int = 0,
        **options: Unpack[HeadOptions],
    ) -> None:
        psi = ElasticFaceMargin(margin, std=std, arc=arc, plus=plus, seed=seed)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedAdaMSoftmaxLoss(FusedMarginLoss):
    """AdaM-Softmax, a margin of each class that learns from `margin` on; see `AdaMSoftmaxMargin`.

    Its optimizer must have `head.parameters()`: the weight and head.margin.margins, (num_classes,), which every
    rank has whole and moves alike.

    Source: JDAI-CV/FaceX-Zoo (head/AdaM_Softmax.py, training_mode/head_conf.yaml), lambda = 70, s = 32.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = defaults.ADAM_SOFTMAX_MARGIN,
        scale: float | Tensor = defaults.ADAM_SOFTMAX_SCALE,
        *,
        regularizer: float = defaults.ADAM_SOFTMAX_REGULARIZER,
        **options: Unpack[HeadOptions],
    ) -> None:
        check_positive("num_classes", num_classes)
        psi = AdaMSoftmaxMargin(num_classes, margin, regularizer=regularizer)
        super().__init__(num_classes, embedding_size, psi, scale, **options)


class FusedAdaCosLoss(FusedMarginLoss):
    """AdaCos: no margin, and a scale that each training batch sets before it is used.

        s <- log( mean_i sum_{j != y} e^{s cos_ij} ) / cos( min(pi / 4, median_i theta_i) )

    That takes a forward pass of its own: 10 N C D of arithmetic a step instead of 8. The scale is a buffer of the
    margin. It is kept within a quarter and four times sqrt(2) ln(C - 1); see `AdaCosMargin`.

    Args:
        margin: m, 0 in the paper; subtracted from the target's cosine.
        scale: the first s; None for sqrt(2) ln(C - 1).

    Source: Zhang et al., AdaCos, arXiv:1905.00292, Eq. 15-17.
    """

    margin: AdaCosMargin
    _first_of_classes = False  # whether the first s is that of the number of classes

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.0,
        scale: float | None = None,
        **options: Unpack[HeadOptions],
    ) -> None:
        check_positive("num_classes", num_classes)
        of_classes = scale is None
        if scale is None:
            check_positive("num_classes - 2, of which AdaCos takes a logarithm,", num_classes - 2)
            scale = _adacos_scale(num_classes)
        psi = AdaCosMargin(margin, scale, bounds=_adacos_bounds(num_classes))
        super().__init__(num_classes, embedding_size, psi, psi.scale.clone(), **options)
        self._first_of_classes = of_classes

    @property
    def scale(self) -> Tensor:
        """0-d, s of the last batch."""
        return self.margin.scale.clone()

    @scale.setter
    def scale(self, scale: float | Tensor) -> None:
        self.margin.scale.fill_(scale)

    def _loss(
        self, embeddings: Tensor, labels: Tensor, margin: float | Callable[..., Tensor], **arguments: Any
    ) -> Tensor | tuple[Tensor, LossStats]:
        if self.training:
            with torch.no_grad():
                super()._loss(embeddings, labels, margin, sample_weight=arguments.get("sample_weight"))
            if self.sampler is not None:
                self.sampler.draws -= 1  # the loss is over the classes by which the scale was set
        return super()._loss(embeddings, labels, self.margin.margin, **arguments)

    def resize_classes_(self, *arguments: Any, **options: Any) -> Self:
        super().resize_classes_(*arguments, **options)
        self.margin.bounds = _adacos_bounds(self.num_classes)
        if self._first_of_classes:
            self.margin._initial["scale"] = _adacos_scale(self.num_classes)
        return self


def _adacos_scale(num_classes: int) -> float:
    return math.sqrt(2) * math.log(max(num_classes - 1, 2))


def _adacos_bounds(num_classes: int) -> tuple[float, float]:
    return _adacos_scale(num_classes) / 4, 4 * _adacos_scale(num_classes)
