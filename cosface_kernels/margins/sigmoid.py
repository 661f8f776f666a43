"""Margins of losses in which each class counts on its own, by a sigmoid, and no softmax compares them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cosface_kernels.margins import defaults
from cosface_kernels.margins.angles import angle_of
from cosface_kernels.margins.base import Margin, Rows
from cosface_kernels.reference import softplus
from cosface_kernels.validation import (
    check_finite,
    check_interval,
    check_margin,
    check_per_sample,
    check_positive,
    exact_dtype,
    is_integer,
)

Polynomials = tuple[tuple[float, ...], tuple[float, ...]]


class SigmoidTerms(NamedTuple):
    """What a batch's losses are made of: loss_i = positive_i(c_iy) + factor_i sum_{j != y_i} f(c_ij).

    With z_ij = scale_i N(c_ij) + bias_i, f is log(1 + e^z_ij) where the margin's form is "cross_entropy"; where it
    is "angle", N(c) = -arccos(c) and f is c_ij / (1 + e^-z_ij), of which the factor of c_ij is a constant.

    Attributes:
        positive: from the (N,) target cosines to (N,), differentiable.
        factor, scale, bias: (N,) each, differentiable.
    """

    positive: Callable[[Tensor], Tensor]
    factor: Tensor
    scale: Tensor
    bias: Tensor


class SigmoidMargin(Margin):
    """Base of these. A subclass defines `terms(scale, rows)`, which gives a batch's `SigmoidTerms`.

    A parameter of its own must pass through `rows.share` there, so that its gradient is the same on all ranks.

    Attributes:
        form: "cross_entropy" or "angle".
        polynomials: of "cross_entropy": the coefficients of 1, c, c^2, c^3 and c^4 in N(c), and in the slope that
            backward takes for it; N(c) = c and 1 unless a subclass says otherwise.
    """

    smooths_labels = False
    form = "cross_entropy"
    polynomials: Polynomials | None = ((0.0, 1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0))

    def terms(self, scale: Tensor, rows: Rows) -> SigmoidTerms:
        raise NotImplementedError(f"{type(self).__name__} must define terms(scale, rows).")

    def checked_terms(self, scale: Tensor, rows: Rows) -> SigmoidTerms:
        """
        Raises:
            ValueError: something does not hold one number of each sample.
        """
        name = type(self).__name__
        terms = self.terms(scale, rows)
        for field in ("factor", "scale", "bias"):
            check_per_sample(f"the {field} of {name}", getattr(terms, field), scale)

        def positive(cos: Tensor) -> Tensor:
            losses = terms.positive(cos)
            check_per_sample(f"what positive of {name} gives", losses, cos)
            return losses

        return terms._replace(positive=positive)

    def check_use(
        self, label_smoothing: float, gradient_tolerance: float, labels_per_sample: int, entropy: bool
    ) -> None:
        super().check_use(label_smoothing, gradient_tolerance, labels_per_sample, entropy)
        for name, value, wanted in (
            ("gradient_tolerance", gradient_tolerance, 0),
            ("entropy", entropy, False),
            ("the number of labels of a sample", labels_per_sample, 1),
        ):
            if value != wanted:
                raise ValueError(
                    f"{type(self).__name__} has no softmax over classes: {name} must be {wanted}, got {value!r}."
                )

    def forward(self, cos: Tensor, rows: Rows) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is no margin of a softmax.")


def polynomials(coefficients: list[float], *, straight_through: bool = False) -> Polynomials:
    """N by its coefficients of 1, c, c^2 and so on; its slope in backward is that of c if straight_through."""
    value = [*coefficients, 0.0, 0.0, 0.0, 0.0][:5]
    slope = [1.0, 0.0, 0.0, 0.0] if straight_through else [k * value[k] for k in range(1, 5)]
    return tuple(value), (*slope, 0.0)


class BiasedMargin(SigmoidMargin):
    """Those with a bias that learns, one number for all classes."""

    bias: Tensor

    def __init__(self, bias: float, *, straight_through: bool = False) -> None:
        check_finite("bias", bias)
        super().__init__(straight_through=straight_through)
        self.initial = float(bias)
        self.bias = nn.Parameter(torch.tensor(self.initial, dtype=exact_dtype(), device="cpu"))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.bias, self.initial)

    def _bias_of(self, scale: Tensor, rows: Rows) -> Tensor:
        """(N,)"""
        return rows.share(self.bias).to(scale.dtype).expand_as(scale)


class SphereFace2Margin(BiasedMargin):
    """SphereFace2: binary classifiers, one of each class, with a margin on both sides.

        loss_i = w (lambda log(1 + e^{-z_iy}) + (1 - lambda) sum_{j != y} log(1 + e^{z_ij})) / s

    with z = s g + b and g(c) = 2 ((c + 1) / 2)^t - 1. Of kind "C", z_iy has g(c) - m and z_ij has g(c) + m; of
    "A", z_iy has g(cos(theta + m)), and of "M" g(cos(m theta)), each angle up to pi, and z_ij has g(c).

    Args:
        margin: m, of "M" the factor of the angle.
        scale, num_classes: s, which the paper calls r, and C, from which the bias b starts as the code's does.
        kind: "C", "A" or "M".
        weighting: lambda, of the target against all other classes.
        t: an integer from 1 to 4.
        weight: w, 50 in the code and 1 in the paper.
        straight_through: gradients as if g and the margin were not there, as the code has them but for its own
            file of kind "C".

    Source: Wen et al., SphereFace2: Binary Classification is All You Need for Deep Face Recognition,
    arXiv:2108.01513; ydwen/opensphere (model/head/sphereface2.py): m = 0.4, s = 40, lambda = 0.7, t = 3, w = 50.
    """

    scale = defaults.SPHEREFACE2_SCALE  # of one that was pickled before it kept its own

    def __init__(
        self,
        margin: float = defaults.SPHEREFACE2_MARGIN,
        *,
        scale: float = defaults.SPHEREFACE2_SCALE,
        num_classes: int,
        kind: str = "C",
        weighting: float = defaults.SPHEREFACE2_WEIGHTING,
        t: int = defaults.SPHEREFACE2_T,
        weight: float = defaults.SPHEREFACE2_WEIGHT,
        straight_through: bool = False,
    ) -> None:
        if not isinstance(kind, str) or kind not in ("C", "A", "M"):
            raise ValueError(f"kind must be 'C', 'A' or 'M', got {kind!r}.")
        if kind == "A":
            check_interval("margin", margin, "[0, pi) radians", 0, math.pi)
        else:
            check_margin(margin)
        check_positive("num_classes", num_classes)
        check_interval("scale", scale, "(0, inf)", math.ulp(0.0), math.inf)
        check_interval("weighting", weighting, "(0, 1)", math.ulp(0.0), 1)
        if not is_integer(t) or t not in (1, 2, 3, 4):
            raise ValueError(f"t must be an integer from 1 to 4, got {t!r}.")
        check_interval("weight", weight, "(0, inf)", math.ulp(0.0), math.inf)
        self.kind, self.margin, self.t = kind, margin, int(t)
        self.weighting, self.weight, self.scale = weighting, weight, float(scale)
        super().__init__(self._first_bias(self.scale, num_classes), straight_through=straight_through)
        coefficients = [2 ** (1 - self.t) * math.comb(self.t, k) for k in range(self.t + 1)]
        coefficients[0] += self._added - 1
        self.polynomials = polynomials(coefficients, straight_through=straight_through)

    @property
    def _added(self) -> float:
        """To g of a negative."""
        return self.margin if self.kind == "C" else 0.0

    def _g(self, cos: Tensor) -> Tensor:
        return 2 * ((cos + 1) / 2) ** self.t - 1

    def _shaped(self, cos: Tensor) -> Tensor:
        """(N,) of the target, in the place of its cosine."""
        if self.kind == "C":
            return self._g(cos) - self.margin
        theta = angle_of(cos)
        theta = theta + self.margin if self.kind == "A" else self.margin * theta
        return self._g(theta.clamp_max(math.pi).cos())

    def _first_bias(self, scale: float, num_classes: int) -> float:
        """b at which the gradients of target and other classes balance, where all cosines are 0."""
        right = torch.zeros((), dtype=torch.float64, device="cpu")
        a_y = scale * float(self._shaped(right))
        a_j = scale * float(self._g(right) + self._added)
        ratio = self.weighting / ((1 - self.weighting) * max(num_classes - 1, 1))
        root = math.hypot(1 - ratio, 2 * math.sqrt(ratio) * math.exp((a_y - a_j) / 2))
        if ratio < 1:
            return math.log(2 * ratio) - a_j - math.log(1 - ratio + root)
        if ratio == 1:
            return -(a_y + a_j) / 2
        return math.log((root + ratio - 1) / 2) - a_y  # the same, where 1 - ratio + root would cancel

    def resize_classes_(self, sources: Tensor, counts: Tensor) -> None:
        super().resize_classes_(sources, counts)
        self.initial = self._first_bias(self.scale, len(sources))

    def terms(self, scale: Tensor, rows: Rows) -> SigmoidTerms:
        bias = self._bias_of(scale, rows)  # (N,)

        def positive(cos: Tensor) -> Tensor:
            shaped = self._straight(cos)
            return self.weight * self.weighting / scale * softplus(-(scale * shaped + bias))

        return SigmoidTerms(positive, self.weight * (1 - self.weighting) / scale, scale, bias)

    def _straight(self, cos: Tensor) -> Tensor:
        if not self.straight_through:
            return self._shaped(cos)
        return cos + (self._shaped(cos) - cos).detach()

    def extra_repr(self) -> str:
        own = f"margin={self.margin}, kind={self.kind!r}, weighting={self.weighting}"
        return f"{own}, t={self.t}, weight={self.weight}, straight_through={self.straight_through}"


class UniFaceMargin(BiasedMargin):
    """UniFace's unified cross-entropy: one threshold b / s for all positive and all negative pairs.

        loss_i = log(1 + e^{-(s (c_iy - m) - b)}) + l sum_{j != y} log(1 + e^{s c_ij - b})

    With m = 0 it is the plain form, with m > 0 the marginal one, and with l < 1, or sampled classes, the balanced
    one. UniTSFace's sample-to-sample loss is this one too, with m = 0.1, whose classes are the other features.

    Args:
        margin: m.
        bias: b at the start, log(10 C r) in the code, with the share r of the classes that take part; of
            UniTSFace's the mean of log sum_{j != y} e^{s c_ij} over the first batch.
        balance: l, the weight of the negatives.

    Source: Zhou et al., UniFace: Unified Cross-Entropy Loss for Deep Face Recognition, ICCV 2023; CVI-SZU/UniFace
    (head.py): m = 0.4, s = 64, l = 1, r = 1. It clamps logits to [-s, s], so that a target with c < m + b / s - 1
    has no gradient; here e^z is finite without. Li et al., UniTSFace, NeurIPS 2023; CVI-SZU/UniTSFace (head.py).
    """

    def __init__(
        self, margin: float = defaults.UNIFACE_MARGIN, *, bias: float, balance: float = defaults.UNIFACE_BALANCE
    ) -> None:
        check_margin(margin)
        check_interval("balance", balance, "(0, inf)", math.ulp(0.0), math.inf)
        super().__init__(bias)
        self.margin, self.balance = margin, balance

    def terms(self, scale: Tensor, rows: Rows) -> SigmoidTerms:
        bias = self._bias_of(scale, rows)  # (N,)
        positive = lambda cos: softplus(bias - scale * (cos - self.margin))  # noqa: E731
        return SigmoidTerms(positive, torch.full_like(scale, self.balance), scale, -bias)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, balance={self.balance}"


class SFaceMargin(SigmoidMargin):
    """SFace: pulls and pushes whose strength sigmoids of the angle bound; they are constants of the gradient.

        loss_i = -s r(a, theta_iy) c_iy + s sum_{j != y} r'(b, theta_ij) c_ij
        r = 1 / (1 + e^{-k (theta - a)}),  r' = 1 / (1 + e^{k (theta - b)})

    Args:
        k, a, b: in 1 / radian and radians.

    Source: Zhong et al., SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition,
    arXiv:2205.12010; zhongyy/SFace (SFace_torch/head/metrics.py): s = 64, k = 80, a = 0.80, b = 1.23.
    """

    form, polynomials = "angle", None

    def __init__(
        self, *, k: float = defaults.SFACE_K, a: float = defaults.SFACE_A, b: float = defaults.SFACE_B
    ) -> None:
        check_interval("k", k, "(0, inf)", math.ulp(0.0), math.inf)
        for name, angle in (("a", a), ("b", b)):
            check_interval(name, angle, "[0, pi] radians", 0, math.nextafter(math.pi, 4))
        super().__init__()
        self.k, self.a, self.b = k, a, b

    def terms(self, scale: Tensor, rows: Rows) -> SigmoidTerms:
        def positive(cos: Tensor) -> Tensor:
            theta = angle_of(cos.detach())
            return -scale * torch.sigmoid(self.k * (theta - self.a)) * cos

        steepness = torch.full_like(scale, self.k)
        return SigmoidTerms(positive, scale, steepness, self.b * steepness)

    def extra_repr(self) -> str:
        return f"k={self.k}, a={self.a}, b={self.b}"
