"""The margins of the family: what a loss does to its target's cosine, on (N,) vectors. No kernel knows them.

Letters: c = cos(theta), the (N,) target cosines; psi, what takes their place; s, the scale; lse = log sum_{j != y}
e^{s cos_ij} = s top + log_sum, where top is the largest of these cosines, and those of reshaped negatives are what
they become. Where a paper and its code differ, the code's formula is here. Gradients are exact unless a margin is
told to be `straight_through`: the gradient with respect to c is then that of psi(c) = c, as in the code of
insightface and others, who compute the margin without a graph.

State (statistics of batches, counters) is in float32 buffers, whatever the dtype of the module. It changes in
training mode alone, once for each forward pass, and samples that are ignored have no part in it.
"""

from cosface_kernels.margins.base import Margin, Rows, Smoothing, mean_and_std, update_average
from cosface_kernels.margins.classes import (
    AdaMSoftmaxMargin,
    ClassMargin,
    dynamic_margins,
    ldam_margins,
    of_each_class,
)
from cosface_kernels.margins.drawn import ElasticFaceMargin
from cosface_kernels.margins.negatives import (
    CircleLossMargin,
    CombinedMargin,
    CurricularFaceMargin,
    MVSoftmaxMargin,
    NPCFaceMargin,
)
from cosface_kernels.margins.sigmoid import (
    SFaceMargin,
    SigmoidMargin,
    SigmoidTerms,
    SphereFace2Margin,
    UniFaceMargin,
)
from cosface_kernels.margins.state import (
    UNIT_NORM,
    AdaCosMargin,
    AdaFaceMargin,
    AnnealedSphereFaceMargin,
    GBCosFaceMargin,
    KappaFaceMargin,
)
from cosface_kernels.margins.target import (
    ArcFaceMargin,
    CosFaceMargin,
    LSoftmaxMargin,
    MagFaceMargin,
    SphereFaceMargin,
    X2SoftmaxMargin,
)

__all__ = [
    "UNIT_NORM",
    "AdaCosMargin",
    "AdaFaceMargin",
    "AdaMSoftmaxMargin",
    "AnnealedSphereFaceMargin",
    "ArcFaceMargin",
    "CircleLossMargin",
    "ClassMargin",
    "CombinedMargin",
    "CosFaceMargin",
    "CurricularFaceMargin",
    "ElasticFaceMargin",
    "GBCosFaceMargin",
    "KappaFaceMargin",
    "LSoftmaxMargin",
    "MVSoftmaxMargin",
    "MagFaceMargin",
    "Margin",
    "NPCFaceMargin",
    "Rows",
    "SFaceMargin",
    "SigmoidMargin",
    "SigmoidTerms",
    "Smoothing",
    "SphereFace2Margin",
    "SphereFaceMargin",
    "UniFaceMargin",
    "X2SoftmaxMargin",
    "dynamic_margins",
    "ldam_margins",
    "mean_and_std",
    "of_each_class",
    "update_average",
]
