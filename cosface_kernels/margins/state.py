"""Margins with state: a scale, a step, averages over batches, a weight of each class."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cosface_kernels.margins import defaults
from cosface_kernels.margins.angles import angle_of, cos_of_sum
from cosface_kernels.margins.base import (
    Margin,
    Rows,
    check_counts,
    check_rate,
    kept_for_backward,
    mean_and_std,
    taken,
    update_average,
)
from cosface_kernels.margins.target import CosFaceMargin, SphereFaceMargin
from cosface_kernels.reference import softplus
from cosface_kernels.validation import check_interval, check_margin, check_numbers, number_of

UNIT_NORM = 1e-2  # norms that are all this close to 1 are those of normalised embeddings, in any dtype


class AdaCosMargin(CosFaceMargin):
    """psi = c - m; its loss sets the scale for a pass that follows it.

        s <- log( mean_i sum_{j != y} e^{s cos_ij} ) / cos( min(pi / 4, median_i theta_i) )

    s is kept within bounds, which neither the paper nor the public code does: with a few classes in two dimensions
    it would grow from batch to batch without end, or fall below 0, where all negatives are opposite.
    State: `scale`.

    Args:
        margin: m.
        scale: the first s.
        bounds: (low, high) of s; None: a quarter and four times the first.

    Source: Zhang et al., AdaCos, arXiv:1905.00292, Eq. 15-17.
    """

    scale: Tensor

    def __init__(self, margin: float, scale: float, *, bounds: Sequence[float] | None = None) -> None:
        super().__init__(margin)
        scale = number_of(scale, "from which the bounds follow")
        self.bounds = check_numbers("bounds", (scale / 4, 4 * scale) if bounds is None else bounds, 2)
        check_interval("the smallest scale", self.bounds[0], "(0, inf)", math.ulp(0.0), math.inf)
        check_interval("the largest scale", self.bounds[1], "[smallest, inf)", self.bounds[0], math.inf)
        self._register_state("scale", scale)

    def loss(self, top: Tensor, log_sum: Tensor, cos: Tensor, scale: Tensor, rows: Rows) -> Tensor:
        if self.training:
            lse = (scale * top + log_sum).detach().double()  # (N,)
            mean = lse.where(rows.valid, -math.inf).logsumexp(0) - rows.valid.sum().double().log()
            theta = angle_of(cos.detach()).where(rows.valid, math.nan).nanmedian().clamp_max(math.pi / 4)
            update_average(self.scale, (mean / theta.cos()).clamp(*self.bounds), rate=1)
        return super().loss(top, log_sum, cos, scale, rows)


class AnnealedSphereFaceMargin(SphereFaceMargin):
    """(psi + lambda c) / (1 + lambda) with SphereFace's psi, lambda = max(lambda_min, base / (1 + gamma step)).

    The first steps are close to no margin. State: `step`, the number of batches seen.

    Args:
        margin: m >= 1; the paper's is 4.
        base, gamma, lambda_min: of lambda.

    Source: Liu et al., SphereFace, arXiv:1704.08063, section 4.1; wy1iu/sphereface (MarginInnerProduct) and
    MuggleWang/CosFace_pytorch (layer.py).
    """

    step: Tensor

    def __init__(
        self,
        margin: float = defaults.A_SOFTMAX_MARGIN,
        *,
        base: float = defaults.A_SOFTMAX_BASE,
        gamma: float = defaults.A_SOFTMAX_GAMMA,
        lambda_min: float = defaults.A_SOFTMAX_LAMBDA_MIN,
    ) -> None:
        super().__init__(margin)
        for name, value in (("base", base), ("gamma", gamma), ("lambda_min", lambda_min)):
            check_interval(name, value, "[0, inf)", 0, math.inf)
        self.base, self.gamma, self.lambda_min = base, gamma, lambda_min
        self._register_state("step", 0)

    @property
    def annealing(self) -> Tensor:
        """lambda, 0-d."""
        return (self.base / (1 + self.gamma * kept_for_backward(self.step))).clamp_min(self.lambda_min)

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        if self.training:
            self.step.add_(1)
        return cos + (super().forward(cos) - cos) / (1 + self.annealing)


class AdaFaceMargin(Margin):
    """psi = cos(clip(theta - m q)) - (m + m q), where q in [-1, 1] is the quality that an embedding's norm tells.

        q_i = clip( h (|x_i| - mean) / (std + 1e-3), -1, 1 )

    theta is kept 1e-3 away from 0 and pi, c within 0.999, and norms within [1e-3, 100]; no gradient reaches norms.
    State: `mean` and `std` of the norms, averaged over batches, this one included.

    Args:
        margin: m in [0, pi).
        h: how much the norm counts.
        rate: of the averages.
        straight_through: the gradient of psi = c, as in CVLface.

    Raises:
        ValueError: several samples all have norm 1: embeddings were normalised. On the CPU alone, where that
            needs no wait.

    Source: Kim et al., AdaFace, arXiv:2204.00964, Eq. 15-17; mk-minchul/AdaFace (head.py, whose command line has
    rate 0.01). There the cosines of other classes are kept within 0.999 too; here they are not.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        margin: float = defaults.ADAFACE_MARGIN,
        *,
        h: float = defaults.ADAFACE_H,
        rate: float = defaults.RATE,
        straight_through: bool = False,
    ) -> None:
        super().__init__(straight_through=straight_through)
        check_interval("margin", margin, "[0, pi)", 0, math.pi)
        check_interval("h", h, "[0, inf)", 0, math.inf)
        check_rate(rate)
        self.margin, self.h, self.rate = margin, h, rate
        self._register_state("mean", 20.0)
        self._register_state("std", 100.0)

    def forward(self, cos: Tensor, rows: Rows) -> Tensor:
        norms = rows.norms().detach()  # (N,)
        _refuse_unit_norms(norms, rows.valid)
        norms = norms.clamp(1e-3, 100)
        if self.training:
            mean, std = mean_and_std(norms, rows.valid)
            update_average(self.mean, mean, self.rate)
            update_average(self.std, std, self.rate)
        q = (self.h * (norms - self.mean) / (self.std + 1e-3)).clamp(-1, 1)  # (N,)
        theta = angle_of(cos.clamp(-0.999, 0.999)) - self.margin * q  # (N,)
        return torch.cos(theta.clamp(1e-3, math.pi - 1e-3)) - (self.margin + self.margin * q)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, h={self.h}, rate={self.rate}, straight_through={self.straight_through}"


class KappaFaceMargin(Margin):
    """psi = cos(theta + m w_y), with a weight of each class that falls with its concentration and its size.

        w_j = gamma (1 - sigmoid(T z_j)) + (1 - gamma)(1 + cos(pi n_j / K)) / 2,   K = 1.05 max_j n_j

    z_j is the class's concentration kappa_j, less the mean, over the standard deviation of all classes;
    kappa = r (D - r^2)/(1 - r^2) with r = |sum of the class's unit embeddings| / n_j. There is no guard.
    State: `weights` (C,), 0.5 until the first call of `update`, of which there should be one an epoch; and
    `class_counts`, to which a head that grows adds how many embeddings it was given of a class, or 1.

    Args:
        class_counts: (C,), n_j >= 1, the number of training samples of each class.
        margin: m in [0, pi), in radians.
        temperature: T; gamma: in [0, 1], how much concentration counts against size.

    Source: Oinar et al., KappaFace, arXiv:2201.07394; Leminhbinh0209/KappaFace (memory.py, losses.py,
    configs/base.py).

    >>> margin = KappaFaceMargin([10, 20, 10])
    >>> margin.update(torch.tensor([[9.0, 0], [0, 12.0], [5.0, 0]]))
    >>> margin.weights
    tensor([0.4320, 0.3866, 0.5565])
    """

    weights: Tensor
    class_counts: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        margin: float = defaults.KAPPAFACE_MARGIN,
        *,
        temperature: float = defaults.KAPPAFACE_TEMPERATURE,
        gamma: float = defaults.KAPPAFACE_GAMMA,
    ) -> None:
        super().__init__()
        counts = check_counts(class_counts)
        check_interval("margin", margin, "[0, pi) radians", 0, math.pi)
        check_interval("temperature", temperature, "[0, inf)", 0, math.inf)
        check_interval("gamma", gamma, "[0, 1]", 0, math.nextafter(1, 2))
        self.margin, self.temperature, self.gamma = margin, temperature, gamma
        self.register_buffer("class_counts", counts)
        self._register_state("weights", 0.5, len(counts))

    @torch.no_grad()
    def update(self, class_sums: Tensor) -> None:
        """Sets the weights from the last epoch's embeddings.

        Args:
            class_sums: (C, D), for each class the sum of its training samples' unit embeddings (the authors take
                them from a momentum encoder, averaged over epochs).
        """
        if class_sums.dim() != 2 or len(class_sums) != len(self.class_counts):
            raise ValueError(
                f"class_sums must have shape ({len(self.class_counts)}, D), got shape {tuple(class_sums.shape)}."
            )
        r = class_sums.double().norm(dim=1) / self.class_counts  # (C,)
        kappa = r * (class_sums.shape[1] - r**2) / (1 - r**2)  # (C,); infinite for a class of one sample
        largest = kappa.where(kappa.isfinite(), 0).max()  # 0 where every class is a single point
        kappa = kappa.where(kappa.isfinite() & (kappa >= 0), largest)
        z = ((kappa - kappa.mean()) / kappa.std()).nan_to_num(0)  # (C,)
        size = (1 + torch.cos(torch.pi / 1.05 * self.class_counts / self.class_counts.max())) / 2  # (C,)
        self.weights.copy_(self.gamma * (1 - torch.sigmoid(self.temperature * z)) + (1 - self.gamma) * size)

    def resize_classes_(self, sources: Tensor, counts: Tensor) -> None:
        super().resize_classes_(sources, counts)
        self.class_counts = taken(self.class_counts, sources, counts)

    def forward(self, cos: Tensor, rows: Rows) -> Tensor:
        m = (self.margin * self.weights[rows.targets.clamp_min(0)]).to(cos.dtype)  # (N,)
        return cos_of_sum(cos, m)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, temperature={self.temperature}, gamma={self.gamma}"


class GBCosFaceMargin(Margin):
    """A boundary between c and the negatives' cosine n = lse / s, which each must clear by the margin m.

        v = (1 - alpha)(c + n)/2 + alpha V     without a gradient
        loss = softplus(2s(v - c + m))/2 + softplus(2s(n - v + m))/2

    State: `boundary` V, the average of (c + n)/2 over the batches before, nan before the first, which takes its
    own. It is clipped to `bounds` before each use, and the average goes on from there.

    Args:
        margin: m.
        alpha: in [0, 1], the share of the global boundary.
        bounds: (low, high) of V.
        rate: of the average.

    Source: Xu et al., GB-CosFace, arXiv:2111.11186; aliyun/GB-CosFace (loss/GBCosFace.py).
    """

    smooths_labels = False
    boundary: Tensor

    def __init__(
        self,
        margin: float = defaults.GB_COSFACE_MARGIN,
        *,
        alpha: float = defaults.GB_COSFACE_ALPHA,
        bounds: Sequence[float] = defaults.GB_COSFACE_BOUNDS,
        rate: float = defaults.RATE,
    ) -> None:
        super().__init__()
        check_margin(margin)
        check_interval("alpha", alpha, "[0, 1]", 0, math.nextafter(1, 2))
        check_rate(rate)
        self.bounds = check_numbers("bounds", bounds, 2)
        if not self.bounds[0] <= self.bounds[1]:
            raise ValueError(f"bounds must be (low, high) with low <= high, got {bounds!r}.")
        self.margin, self.alpha, self.rate = margin, alpha, rate
        self._register_state("boundary", math.nan)

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        """c - m, which is what has to reach the boundary."""
        return cos - self.margin

    def loss(self, top: Tensor, log_sum: Tensor, cos: Tensor, scale: Tensor, rows: Rows) -> Tensor:
        counts = rows.valid & (log_sum > -math.inf)  # (N,); without another class there is nothing to be told from
        negative = top + torch.where(counts, log_sum, 0) / scale  # (N,)
        middle = ((cos + negative) / 2).detach()  # (N,)
        mean, _ = mean_and_std(middle, counts)
        boundary = self.boundary.where(self.boundary.isfinite(), mean).clamp(*self.bounds)
        if self.training:
            self.boundary.copy_(boundary.where(mean.isfinite(), self.boundary))
            update_average(self.boundary, mean, self.rate)
        v = middle + self.alpha * (boundary.nan_to_num() - middle)  # (N,)
        to_target = softplus(2 * scale * (v - self(cos)))  # (N,)
        to_others = softplus(2 * scale * (negative - v + self.margin))  # (N,)
        return torch.where(counts, (to_target + to_others) / 2, 0)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, alpha={self.alpha}, bounds={self.bounds}, rate={self.rate}"


def _refuse_unit_norms(norms: Tensor, valid: Tensor) -> None:
    if torch.compiler.is_compiling() or norms.device.type != "cpu" or valid.sum() < 2:
        return  # the norm of one sample may be 1 by chance
    if bool(((norms - 1).abs() < UNIT_NORM)[valid].all()):
        seen = norms[valid]
        raise ValueError(
            "AdaFace takes the norms of the embeddings for their quality, and here all are 1: it needs the "
            f"embeddings before they are normalised, got norms in [{seen.min():.4g}, {seen.max():.4g}]."
        )
