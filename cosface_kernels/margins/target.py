"""Margins that are a function of the target's cosine, and of the norms at most."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cosface_kernels.margins import defaults
from cosface_kernels.margins.angles import angle_of, cos_of_sum, falling_cos
from cosface_kernels.margins.base import Margin, Rows
from cosface_kernels.reference import EPS
from cosface_kernels.validation import check_finite, check_interval, check_margin, check_numbers


class CosFaceMargin(Margin):
    """psi = c - m; with m = 0 the normalised softmax (NSL).

    Source: Wang et al., CosFace, arXiv:1801.09414, Eq. 4.

    >>> CosFaceMargin(0.35)(torch.tensor([0.71]))
    tensor([0.3600])
    """

    def __init__(self, margin: float = defaults.COSFACE_MARGIN) -> None:
        super().__init__()
        check_margin(margin)
        self.margin = margin

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        return cos - self.margin

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


class ArcFaceMargin(Margin):
    """psi = cos(theta + m) where theta + m <= pi, beyond that c - m sin(m), which goes on falling.

    Args:
        margin: m in [0, pi), in radians (pytorch-metric-learning takes degrees).
        straight_through: insightface's variant: cos(theta + m) everywhere, and the gradient of psi = c.

    Source: Deng et al., ArcFace, arXiv:1801.07698, Eq. 3; the guard is that of Tencent/TFace
    (torchkit/head/localfc/arcface.py), the variant that of deepinsight/insightface
    (recognition/arcface_torch/losses.py).

    >>> ArcFaceMargin(0.5)(torch.tensor([1.0, 0.0, -1.0]))
    tensor([ 0.8776, -0.4794, -1.2397])
    """

    def __init__(self, margin: float = defaults.ARCFACE_MARGIN, *, straight_through: bool = False) -> None:
        super().__init__(straight_through=straight_through)
        check_interval("margin", margin, "[0, pi) radians", 0, math.pi)
        self.margin = margin

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        psi = cos_of_sum(cos, self.margin)  # (N,)
        if self.straight_through:
            return psi
        return torch.where(cos > -math.cos(self.margin), psi, cos - self.margin * math.sin(self.margin))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, straight_through={self.straight_through}"


class SphereFaceMargin(Margin):
    """psi = (-1)^k cos(m theta) - 2k with k = floor(m theta / pi): cos(m theta), continued to fall beyond pi / m.

    Args:
        margin: m >= 1, the factor of the angle; need not be whole.
        straight_through: the gradient of psi = c, as in opensphere.

    Source: Liu et al., SphereFace, arXiv:1704.08063, Eq. 7; ydwen/opensphere (model/head/sphereface.py).

    >>> SphereFaceMargin(4.0)(torch.tensor([1.0, -1.0]))
    tensor([ 1., -7.])
    """

    def __init__(self, margin: float = defaults.SPHEREFACE_MARGIN, *, straight_through: bool = False) -> None:
        super().__init__(straight_through=straight_through)
        check_interval("margin", margin, "[1, inf)", 1, math.inf)
        self.margin = margin

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        return falling_cos(self.margin * angle_of(cos))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, straight_through={self.straight_through}"


class LSoftmaxMargin(SphereFaceMargin):
    """|w_y| psi with SphereFace's psi, for logits <x, w_j> of weights that are not normalised.

    The length of w_y has a gradient of its own, for which backward takes a second (C, D) buffer.

    Args:
        margin: m >= 1, the factor of the angle.
        straight_through: the gradient of |w_y| psi = <x_i, w_y> / |x_i|.

    Source: Liu et al., Large-Margin Softmax, arXiv:1612.02295, Eq. 4-6.
    """

    reads_weight = True

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        """From `cos` = <x_i, w_y> / |x_i|; without rows, SphereFace's psi of a cosine."""
        if rows is None:
            return super().forward(cos)
        if rows.weight is None:
            raise ValueError("L-Softmax needs all class centres on one process, got a sharded weight.")
        own = rows.weight[rows.targets.clamp_min(0)]  # (N, D)
        length = torch.linalg.vector_norm(own, dim=1, dtype=cos.dtype)  # (N,)
        return length * super().forward(cos / length.clamp_min(EPS))


class MagFaceMargin(Margin):
    """psi = cos(theta + m_i) where c > 0, else c, with m_i that grows with the norm; and a term for the norm.

        a_i = clip(|x_i|, l_a, u_a),   m_i = l_m + (u_m - l_m)(a_i - l_a)/(u_a - l_a)
        loss_i = softplus(lse_i - s psi_i) + lambda (a_i / u_a^2 + 1 / a_i)

    The gradient reaches the norms through both.

    Args:
        margins: (l_m, u_m), 0 <= l_m <= u_m < pi, in radians.
        norms: (l_a, u_a), 0 < l_a < u_a.
        regularizer: lambda.

    Source: Meng et al., MagFace, arXiv:2103.06627, Eq. 2-5; IrvingMeng/MagFace (models/magface.py, run/run.sh).
    """

    def __init__(
        self,
        margins: Sequence[float] = defaults.MAGFACE_MARGINS,
        *,
        norms: Sequence[float] = defaults.MAGFACE_NORMS,
        regularizer: float = defaults.MAGFACE_REGULARIZER,
    ) -> None:
        super().__init__()
        self.margins, self.norms = check_numbers("margins", margins, 2), check_numbers("norms", norms, 2)
        check_interval("the smallest margin", self.margins[0], "[0, pi) radians", 0, math.pi)
        check_interval("the largest margin", self.margins[1], "[smallest, pi)", self.margins[0], math.pi)
        check_interval("the smallest norm", self.norms[0], "(0, inf)", math.ulp(0.0), math.inf)
        check_interval(
            "the largest norm", self.norms[1], "(smallest, inf)", math.nextafter(self.norms[0], math.inf), math.inf
        )
        check_interval("regularizer", regularizer, "[0, inf)", 0, math.inf)
        self.regularizer = regularizer

    def forward(self, cos: Tensor, rows: Rows) -> Tensor:
        (l_m, u_m), (l_a, u_a) = self.margins, self.norms
        m = l_m + (u_m - l_m) / (u_a - l_a) * (rows.norms().clamp(l_a, u_a) - l_a)  # (N,)
        return torch.where(cos > 0, cos_of_sum(cos, m), cos)

    def loss(self, top: Tensor, log_sum: Tensor, cos: Tensor, scale: Tensor, rows: Rows) -> Tensor:
        l_a, u_a = self.norms
        a = rows.norms().clamp(l_a, u_a)  # (N,)
        return super().loss(top, log_sum, cos, scale, rows) + self.regularizer * (a / u_a**2 + 1 / a)

    def extra_repr(self) -> str:
        return f"margins={self.margins}, norms={self.norms}, regularizer={self.regularizer}"


class X2SoftmaxMargin(Margin):
    """psi = a (theta - h)^2 + k.

    Args:
        a, h, k: a < 0, k - a h^2 is what a sample at its class centre gets.
        straight_through: the gradient of psi = c, as in the authors' code.

    Source: Xu et al., X2-Softmax, arXiv:2312.05281, Eq. 6; the defaults are its code's.

    >>> X2SoftmaxMargin()(torch.tensor([1.0]))
    tensor([0.6500])
    """

    def __init__(
        self,
        a: float = defaults.X2_SOFTMAX_A,
        h: float = defaults.X2_SOFTMAX_H,
        k: float = defaults.X2_SOFTMAX_K,
        *,
        straight_through: bool = False,
    ) -> None:
        super().__init__(straight_through=straight_through)
        check_interval("a", a, "(-inf, 0)", -math.inf, 0)
        check_finite("h", h)
        check_finite("k", k)
        self.a, self.h, self.k = a, h, k

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        return self.a * (angle_of(cos) - self.h) ** 2 + self.k

    def extra_repr(self) -> str:
        return f"a={self.a}, h={self.h}, k={self.k}, straight_through={self.straight_through}"
