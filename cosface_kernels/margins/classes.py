"""Margins of each class: a table that is given, by the sizes of the classes for instance, or one that learns."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cosface_kernels.margins import defaults
from cosface_kernels.margins.angles import cos_of_sum
from cosface_kernels.margins.base import Margin, Rows, check_counts, taken
from cosface_kernels.resizing import replace_
from cosface_kernels.validation import (
    check_bool,
    check_finite,
    check_interval,
    check_positive,
    exact_dtype,
    vector_of,
)


class ClassMargin(Margin):
    """psi = c - m_y, or cos(theta + m_y), with a margin of each class. There is no guard beyond theta + m = pi.

    A head or `margin_softmax_loss` whose margin is a (C,) tensor takes this one, with `arc=False`. A class that
    `resize_classes_` adds has the mean of the margins.

    Args:
        margins: (C,) m_j; a `torch.nn.Parameter` learns. All of them on every rank.
        arc: whether they are angles, in radians.

    Raises:
        ValueError: they are no vector of finite numbers.

    >>> ClassMargin([0.1, 0.4])(torch.tensor([0.5, 0.5]), Rows(torch.ones(2, 3), torch.tensor([1, 0])))
    tensor([0.1000, 0.4000])
    """

    margins: Tensor

    def __init__(self, margins: Tensor | Sequence[float], *, arc: bool = False) -> None:
        super().__init__()
        check_bool("arc", arc)
        table = vector_of("margins", margins)
        if table.dim() != 1 or not table.numel():
            raise ValueError(f"margins must be a vector, one for each class, got shape {tuple(table.shape)}.")
        if table.dtype == torch.bool:
            raise ValueError(f"margins must be numbers, got {table.dtype}.")
        if not table.is_floating_point():
            table = table.to(exact_dtype())
        looks = table.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not bool(table.isfinite().all()):
            raise ValueError(f"margins must be finite, got {table[~table.isfinite()][0].item()}.")
        if looks and arc:
            check_interval("the largest of the margins", float(table.abs().max()), "[0, pi) radians", 0, math.pi)
        self.arc = arc
        if isinstance(table, nn.Parameter):
            self.margins = table
        else:
            self.register_buffer("margins", table)

    def forward(self, cos: Tensor, rows: Rows) -> Tensor:
        m = rows.share(self.margins)[rows.targets.clamp_min(0)].to(cos.dtype)  # (N,)
        return cos_of_sum(cos, m) if self.arc else cos - m

    def resize_classes_(self, sources: Tensor, counts: Tensor) -> None:
        super().resize_classes_(sources, counts)
        margins = self.margins.detach()
        margins = taken(margins, sources, margins.mean().expand(len(sources)))
        if isinstance(self.margins, nn.Parameter):
            replace_(self.margins, margins)
        else:
            self.margins = margins

    def parameters_of_each_class(self) -> list[nn.Parameter]:
        return [self.margins] if isinstance(self.margins, nn.Parameter) else []

    def extra_repr(self) -> str:
        return f"{len(self.margins)} classes, arc={self.arc}"


def of_each_class(margin: float | Tensor | Callable[..., Tensor]) -> float | Callable[..., Tensor]:
    """A tensor as the margin that it means; raises ValueError for a class in place of a margin."""
    if isinstance(margin, type):
        raise ValueError(f"margin must be a margin, got the class {margin.__name__}: call it, to make one.")
    return ClassMargin(margin) if isinstance(margin, Tensor) else margin


class AdaMSoftmaxMargin(ClassMargin):
    """psi = c - m_y with margins that learn, one of each class, and a term that keeps them large.

        loss_i = softplus(lse_i - s psi_i) + lambda (1 - mean_j m_j)

    Margins are in [0, 1] in each use, and in training brought there before it, as in FaceX-Zoo.

    Args:
        num_classes: C.
        margin: every m_j at the start. FaceX-Zoo draws them from [0.3, 0.4].
        regularizer: lambda.

    Source: Liu et al., AdaptiveFace: Adaptive Margin and Sampling for Face Recognition, CVPR 2019;
    JDAI-CV/FaceX-Zoo (head/AdaM_Softmax.py), lambda = 70.
    """

    def __init__(
        self,
        num_classes: int,
        margin: float = defaults.ADAM_SOFTMAX_MARGIN,
        *,
        regularizer: float = defaults.ADAM_SOFTMAX_REGULARIZER,
    ) -> None:
        check_positive("num_classes", num_classes)
        check_interval("margin", margin, "[0, 1]", 0, math.nextafter(1, 2))
        check_interval("regularizer", regularizer, "[0, inf)", 0, math.inf)
        margins = torch.full((num_classes,), float(margin), dtype=exact_dtype(), device="cpu")
        super().__init__(nn.Parameter(margins))
        self.initial, self.regularizer = margin, regularizer

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.margins, self.initial)

    def loss(self, top: Tensor, log_sum: Tensor, cos: Tensor, scale: Tensor, rows: Rows) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.margins.clamp_(0, 1)
        # once, since the ranks average its gradient; clamped for evaluation, which changes no state
        shared = rows.share(self.margins).clamp(0, 1)
        rows = replace(rows, share=lambda _: shared)
        return super().loss(top, log_sum, cos, scale, rows) + self.regularizer * (1 - shared.mean())

    def extra_repr(self) -> str:
        return f"{len(self.margins)} classes, regularizer={self.regularizer}"


def ldam_margins(class_counts: Tensor | Sequence[int], largest: float = defaults.LDAM_MARGIN) -> Tensor:
    """(C,) m_j in proportion to n_j^(-1/4), the smallest class's `largest`.

    Args:
        class_counts: (C,) n_j >= 1, the number of training samples of each class.
        largest: >= 0.

    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, arXiv:1906.07413,
    Eq. 11; kaidic/LDAM-DRW (losses.py), largest = 0.5, with s = 30.

    >>> ldam_margins([1, 16, 81])
    tensor([0.5000, 0.2500, 0.1667])
    """
    check_interval("largest", largest, "[0, inf)", 0, math.inf)
    rarity = check_counts(class_counts) ** -0.25
    return (largest * rarity / rarity.max()).float()


def dynamic_margins(
    class_counts: Tensor | Sequence[int],
    smallest: float = defaults.DYNAMIC_MARGINS[0],
    largest: float = defaults.DYNAMIC_MARGINS[1],
) -> Tensor:
    """(C,) m_j that rise with n_j^(-1/4) from the `smallest`, the largest class's, to the `largest`.

    Args:
        class_counts: (C,) n_j >= 1, the number of training samples of each class.
        smallest, largest: in this order.

    Source: Ha et al., Google Landmark Recognition 2020 Competition Third Place Solution, arXiv:2010.05350, for
    ArcFace's angle: `ClassMargin(dynamic_margins(counts), arc=True)`.

    >>> dynamic_margins([1, 16, 81])
    tensor([0.5000, 0.1625, 0.0500])
    """
    check_finite("smallest", smallest)
    check_interval("largest", largest, f"[{smallest}, inf)", smallest, math.inf)
    rarity = check_counts(class_counts) ** -0.25
    spread = (rarity.max() - rarity.min()).clamp_min(torch.finfo(rarity.dtype).tiny)
    return (smallest + (largest - smallest) * (rarity - rarity.min()) / spread).float()
