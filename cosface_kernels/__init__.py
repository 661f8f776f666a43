"""Margin-softmax heads for millions of classes: exact loss and gradients without the N x C logits."""

from cosface_kernels.family import (
    FusedAdaCosLoss,
    FusedAdaFaceLoss,
    FusedAdaMSoftmaxLoss,
    FusedArcFaceLoss,
    FusedASoftmaxLoss,
    FusedCircleLoss,
    FusedCombinedMarginLoss,
    FusedCurricularFaceLoss,
    FusedElasticFaceLoss,
    FusedGBCosFaceLoss,
    FusedKappaFaceLoss,
    FusedLSoftmaxLoss,
    FusedMagFaceLoss,
    FusedMVSoftmaxLoss,
    FusedNormalizedSoftmaxLoss,
    FusedNPCFaceLoss,
    FusedSoftmaxLoss,
    FusedSphereFaceLoss,
    FusedSubCenterArcFaceLoss,
    FusedX2SoftmaxLoss,
)
from cosface_kernels.functional import LossStats, Sparsity, cosface_loss, margin_softmax_loss
from cosface_kernels.loss import FusedCosFaceLoss, FusedMarginLoss
from cosface_kernels.nearest import NearestClasses, nearest_classes
from cosface_kernels.theory import max_margin, min_scale

__version__ = "0.1.0"

__all__ = [
    "FusedASoftmaxLoss",
    "FusedAdaCosLoss",
    "FusedAdaFaceLoss",
    "FusedAdaMSoftmaxLoss",
    "FusedArcFaceLoss",
    "FusedCircleLoss",
    "FusedCombinedMarginLoss",
    "FusedCosFaceLoss",
    "FusedCurricularFaceLoss",
    "FusedElasticFaceLoss",
    "FusedGBCosFaceLoss",
    "FusedKappaFaceLoss",
    "FusedLSoftmaxLoss",
    "FusedMVSoftmaxLoss",
    "FusedMagFaceLoss",
    "FusedMarginLoss",
    "FusedNPCFaceLoss",
    "FusedNormalizedSoftmaxLoss",
    "FusedSoftmaxLoss",
    "FusedSphereFaceLoss",
    "FusedSubCenterArcFaceLoss",
    "FusedX2SoftmaxLoss",
    "LossStats",
    "NearestClasses",
    "Sparsity",
    "__version__",
    "cosface_loss",
    "margin_softmax_loss",
    "max_margin",
    "min_scale",
    "nearest_classes",
]
