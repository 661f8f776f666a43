"""Margins that reshape the cosines of hard negatives too."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cosface_kernels.margins import defaults
from cosface_kernels.margins.angles import angle_of, cos_of_sum, falling_cos
from cosface_kernels.margins.base import Margin, Rows, check_rate, mean_and_std, update_average
from cosface_kernels.margins.target import ArcFaceMargin
from cosface_kernels.validation import check_bool, check_finite, check_flag, check_interval, check_numbers


class CurricularFaceMargin(ArcFaceMargin):
    """ArcFace's psi; a negative c above cos(theta + m) becomes c (t + c), harder as training goes on.

    State: `t`, the average of the target cosines over batches, this one included; it starts at 0.

    Args:
        margin: m in [0, pi), in radians.
        rate: of the average.

    Source: Huang et al., CurricularFace, arXiv:2004.00288, Eq. 7-12; HuangYG123/CurricularFace (head/metrics.py).
    """

    reshapes_negatives = True
    t: Tensor

    def __init__(self, margin: float = defaults.ARCFACE_MARGIN, *, rate: float = defaults.RATE) -> None:
        super().__init__(margin)
        check_rate(rate)
        self.rate = rate
        self._register_state("t", 0.0)

    def negatives(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        if self.training:
            mean, _ = mean_and_std(cos, rows.valid)
            update_average(self.t, mean, self.rate)
        return cos_of_sum(cos, self.margin), _polynomial(cos, 1.0, self.t, 0.0)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, rate={self.rate}"


class MVSoftmaxMargin(Margin):
    """psi = c - m where c > 0, else c; a negative c_j above c - m becomes (1 + t) c_j + t, as if it were closer.

    With m = 0 it is SV-Softmax.

    Args:
        margin: m, or in [0, pi) radians with `arc`.
        t: >= 0, how much harder hard negatives are made.
        arc: cos(theta + m) takes the place of c - m.

    Source: Wang et al., Mis-classified Vector Guided Softmax Loss, arXiv:1912.00833, Eq. 8-10;
    xiaoboCASIA/SV-X-Softmax.
    """

    reshapes_negatives = True

    def __init__(
        self, margin: float = defaults.MV_SOFTMAX_MARGIN, *, t: float = defaults.MV_SOFTMAX_T, arc: bool = False
    ) -> None:
        super().__init__()
        check_bool("arc", arc)
        check_interval("margin", margin, "[0, pi) radians" if arc else "[0, 2)", 0, math.pi if arc else 2)
        check_interval("t", t, "[0, inf)", 0, math.inf)
        self.margin, self.t, self.arc = margin, t, arc

    def negatives(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return self._lowered(cos), _polynomial(cos, 0.0, 1 + self.t, self.t)

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        return torch.where(cos > 0, self._lowered(cos), cos)

    def _lowered(self, cos: Tensor) -> Tensor:
        return cos_of_sum(cos, self.margin) if self.arc else cos - self.margin

    def extra_repr(self) -> str:
        return f"margin={self.margin}, t={self.t}, arc={self.arc}"


class NPCFaceMargin(Margin):
    """cos(theta + m_i) where c > 0, else c; a negative c_j above cos(theta + m) becomes t c_j + a.

    m_i = m0 + m1 h_i with h_i the mean cosine of the sample's hard negatives, those above, without a gradient: the
    more they resemble it, the larger its margin.

    Args:
        margin: m in [0, pi), in radians.
        t, a: t >= 0; t c + a takes the place of a hard negative's cosine.
        target_margins: (m0, m1) in radians.

    Source: Zeng et al., NPCFace, arXiv:2007.10172; JDAI-CV/FaceX-Zoo (head/NPCFace.py).
    """

    reshapes_negatives = reads_hard_negatives = True

    def __init__(
        self,
        margin: float = defaults.ARCFACE_MARGIN,
        *,
        t: float = defaults.NPCFACE_T,
        a: float = defaults.NPCFACE_A,
        target_margins: Sequence[float] = defaults.NPCFACE_MARGINS,
    ) -> None:
        super().__init__()
        check_interval("margin", margin, "[0, pi) radians", 0, math.pi)
        check_interval("t", t, "[0, inf)", 0, math.inf)
        check_finite("a", a)
        self.margin, self.t, self.a = margin, t, a
        self.target_margins = check_numbers("target_margins", target_margins, 2)
        for m in self.target_margins:
            check_interval("each of target_margins", m, "(-pi, pi) radians", -math.nextafter(math.pi, 0), math.pi)

    def negatives(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return cos_of_sum(cos, self.margin), _polynomial(cos, 0.0, self.t, self.a)

    def forward(self, cos: Tensor, rows: Rows) -> Tensor:
        m0, m1 = self.target_margins
        hardness = torch.zeros_like(cos) if rows.hardness is None else rows.hardness  # (N,)
        return torch.where(cos > 0, cos_of_sum(cos, m0 + m1 * hardness), cos)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, t={self.t}, a={self.a}, target_margins={self.target_margins}"


class CircleLossMargin(Margin):
    """CircleLoss over classes: each cosine is weighted by how far it is from its optimum, without a gradient.

        psi = [1 + m - c]_+ (c - (1 - m)), of slope [1 + m - c]_+
        a negative c_j becomes [c_j + m]_+ (c_j - m), of slope [c_j + m]_+

    Args:
        margin: m in [0, 1).

    Source: Sun et al., Circle Loss, arXiv:2002.10857, Eq. 5-8 with class centres for proxies; JDAI-CV/FaceX-Zoo
    (head/CircleLoss.py).

    >>> CircleLossMargin(0.25)(torch.tensor([0.75, 0.25]))
    tensor([ 0.0000, -0.5000])
    """

    reshapes_negatives = True

    def __init__(self, margin: float = defaults.CIRCLE_LOSS_MARGIN) -> None:
        super().__init__()
        check_interval("margin", margin, "[0, 1)", 0, 1)
        self.margin = margin

    def negatives(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        m = self.margin
        return torch.full_like(cos, -m), _polynomial(cos, 1.0, 0.0, -(m**2), 0.0, 1.0, m)

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        weight = (1 + self.margin - cos.detach()).clamp_min(0)  # (N,)
        return weight * (cos - (1 - self.margin))

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


class CombinedMargin(Margin):
    """psi = cos(m1 theta + m2) - m3: SphereFace's, ArcFace's and CosFace's margin at once.

    Beyond m1 theta + m2 = pi the cosine would rise again; it is continued to fall, as `SphereFaceMargin` has it.

    Args:
        margins: m1 >= 1, m2 in [0, pi) radians, m3. insightface's code leaves m1 and m2 out once m3 > 0: the same
            as (1, 0, m3) here.
        filter_above: insightface's inter-class filter: a negative cosine above it, in (0, 1], is taken for 0,
            because its class is likely to be the same person under another label. None or 0: no filter.
        guard: continue psi as above; None: unless straight_through, since insightface's has no guard.
        straight_through: the gradient of psi = c, as in insightface; Paddle's is exact.

    Source: Deng et al., ArcFace, arXiv:1801.07698, Eq. 4; deepinsight/insightface
    (recognition/arcface_torch/losses.py, CombinedMarginLoss).

    >>> CombinedMargin((1.0, 0.0, 0.4))(torch.tensor([0.7]))
    tensor([0.3000])
    """

    def __init__(
        self,
        margins: Sequence[float] = defaults.COMBINED_MARGINS,
        *,
        filter_above: float | None = None,
        guard: bool | None = None,
        straight_through: bool = False,
    ) -> None:
        super().__init__(straight_through=straight_through)
        if not isinstance(margins, Sequence) or len(margins) != 3:
            raise ValueError(f"margins must be three numbers (m1, m2, m3), got {margins!r}.")
        check_interval("m1", margins[0], "[1, inf)", 1, math.inf)
        check_interval("m2", margins[1], "[0, pi) radians", 0, math.pi)
        check_finite("m3", margins[2])
        if filter_above is not None:
            check_interval("filter_above", filter_above, "[0, 1]", 0, math.nextafter(1, 2))
        check_flag("guard", guard)
        self.margins, self.filter_above = tuple(margins), filter_above or None
        self.guard = not straight_through if guard is None else guard
        self.reshapes_negatives = self.filter_above is not None

    def negatives(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return torch.full_like(cos, self.filter_above or 0.0), cos.new_zeros(3)

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        m1, m2, m3 = self.margins
        angle = m1 * angle_of(cos) + m2  # (N,)
        return (falling_cos(angle) if self.guard else angle.cos()) - m3

    def extra_repr(self) -> str:
        return (
            f"margins={self.margins}, filter_above={self.filter_above}, guard={self.guard}, "
            f"straight_through={self.straight_through}"
        )


def _polynomial(cos: Tensor, *coefficients: float | Tensor) -> Tensor:
    """The coefficients on the device of the cosines, without a copy from the host."""
    return torch.stack([c.to(cos.dtype) if isinstance(c, Tensor) else cos.new_full((), c) for c in coefficients])
