"""The margins of the family: what a loss does to its target's cosine, on (N,) vectors. No kernel knows them.

Letters: c = cos(theta), the (N,) target cosines; psi, what takes their place; s, the scale; lse = log sum_{j != y}
e^{s cos_ij} = s top + log_sum, where top is the largest of these cosines. Where a paper and its code differ, the
code's formula is here. Gradients are exact unless a margin is told to be `straight_through`: the gradient with
respect to c is then that of psi(c) = c, as in the code of insightface and others, who compute the margin without a
graph.

State (statistics of batches, counters) is in float32 buffers, whatever the dtype of the module. It changes in
training mode alone, once for each forward pass, and samples that are ignored have no part in it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosface_kernels.reference import EPS, excess, softplus
from cosface_kernels.validation import check_interval, check_margin, check_numbers

UNIT_NORM = 1e-2  # norms that are all this close to 1 are those of normalised embeddings, in any dtype


@dataclass(frozen=True)
class Rows:
    """The samples of a batch, for the margins that look at more than their target's cosine.

    Attributes:
        embeddings: (N, D), as given to the loss.
        targets: (N,) int64 classes, negative for a sample that has no loss.
        weight: (C, D) class centres, or None if they are sharded.
    """

    embeddings: Tensor
    targets: Tensor
    weight: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        return self.targets >= 0  # (N,)

    def norms(self) -> Tensor:
        """(N,) |x_i|, differentiable; 0 for a sample that has no loss."""
        dtype = torch.promote_types(self.embeddings.dtype, torch.float32)
        return torch.linalg.vector_norm(self.embeddings.where(self.valid[:, None], 0), dim=1, dtype=dtype)


class Margin(nn.Module):
    """Base of the margins. A subclass defines psi as `forward(cos, rows)`; some replace `loss`.

    One that `reshapes_negatives` also has `negatives(cos, rows)`, which is called first, without a graph. It
    returns (N,) thresholds, above which a negative's cosine c enters the softmax as (q c + a) c + b, and (3,) q, a
    and b.

    One that `reads_weight` has a gradient of the class centres besides that of their cosines.
    """

    reshapes_negatives = reads_weight = False

    def negatives(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __init__(self, *, straight_through: bool = False) -> None:
        super().__init__()
        self.straight_through = straight_through
        self._initial: dict[str, float] = {}

    def loss(self, top: Tensor, log_sum: Tensor, cos: Tensor, scale: Tensor, rows: Rows) -> Tensor:
        """softplus(lse - s psi(c)), and 0 for a sample that has no loss.

        Args:
            top, log_sum, cos, scale: (N,), finite for samples without a loss; log_sum is -inf, and top 0, where
                there is no other class.

        Returns:
            (N,); what it holds for a sample without a loss is dropped.
        """
        psi = self(cos, rows)  # (N,)
        if self.straight_through:
            psi = cos + (psi - cos).detach()
        return softplus(torch.where(rows.valid, excess(scale, top, log_sum, psi), 0))

    def reset_parameters(self) -> None:
        """Sets the state to what it was before the first batch."""
        for name, value in self._initial.items():
            self.get_buffer(name).fill_(value)

    def batch_state(self) -> list[Tensor]:
        """What a batch may change; a state of each class is changed between batches."""
        return [state for state in map(self.get_buffer, self._initial) if not state.dim()]

    def _register_state(self, name: str, initial: float, *shape: int) -> None:
        self._initial[name] = initial
        self.register_buffer(name, torch.full(shape, initial, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Margin":
        super()._apply(lambda state: fn(state).to(state.dtype), recurse)  # type: ignore[no-untyped-call]
        return self


class CosFaceMargin(Margin):
    """psi = c - m; with m = 0 the normalised softmax (NSL).

    Source: Wang et al., CosFace, arXiv:1801.09414, Eq. 4.

    >>> CosFaceMargin(0.35)(torch.tensor([0.71]))
    tensor([0.3600])
    """

    def __init__(self, margin: float = 0.35) -> None:
        super().__init__()
        check_margin(margin)
        self.margin = margin

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        return cos - self.margin

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


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
        self.bounds = check_numbers("bounds", (scale / 4, 4 * scale) if bounds is None else bounds, 2)
        check_interval("the smallest scale", self.bounds[0], "(0, inf)", math.ulp(0.0), math.inf)
        check_interval("the largest scale", self.bounds[1], "[smallest, inf)", self.bounds[0], math.inf)
        self._register_state("scale", scale)

    def loss(self, top: Tensor, log_sum: Tensor, cos: Tensor, scale: Tensor, rows: Rows) -> Tensor:
        if self.training:
            lse = (scale * top + log_sum).detach().double()  # (N,)
            mean = lse.where(rows.valid, -math.inf).logsumexp(0) - rows.valid.sum().double().log()
            theta = _angle(cos.detach()).where(rows.valid, math.nan).nanmedian().clamp_max(math.pi / 4)
            update_average(self.scale, (mean / theta.cos()).clamp(*self.bounds), rate=1)
        return super().loss(top, log_sum, cos, scale, rows)


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

    def __init__(self, margin: float = 0.5, *, straight_through: bool = False) -> None:
        super().__init__(straight_through=straight_through)
        check_interval("margin", margin, "[0, pi) radians", 0, math.pi)
        self.margin = margin

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        psi = _cos_of_sum(cos, self.margin)  # (N,)
        if self.straight_through:
            return psi
        return torch.where(cos > -math.cos(self.margin), psi, cos - self.margin * math.sin(self.margin))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, straight_through={self.straight_through}"


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

    def __init__(self, margin: float = 0.5, *, rate: float = 0.01) -> None:
        super().__init__(margin)
        _check_rate(rate)
        self.rate = rate
        self._register_state("t", 0.0)

    def negatives(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        if self.training:
            mean, _ = mean_and_std(cos, rows.valid)
            update_average(self.t, mean, self.rate)
        return _cos_of_sum(cos, self.margin), _polynomial(cos, 1.0, self.t, 0.0)

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

    def __init__(self, margin: float = 0.35, *, t: float = 0.2, arc: bool = False) -> None:
        super().__init__()
        check_interval("margin", margin, "[0, pi) radians" if arc else "[0, 2)", 0, math.pi if arc else 2)
        check_interval("t", t, "[0, inf)", 0, math.inf)
        self.margin, self.t, self.arc = margin, t, arc

    def negatives(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return self._lowered(cos), _polynomial(cos, 0.0, 1 + self.t, self.t)

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        return torch.where(cos > 0, self._lowered(cos), cos)

    def _lowered(self, cos: Tensor) -> Tensor:
        return _cos_of_sum(cos, self.margin) if self.arc else cos - self.margin

    def extra_repr(self) -> str:
        return f"margin={self.margin}, t={self.t}, arc={self.arc}"


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
        margins: Sequence[float] = (1.0, 0.5, 0.0),
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
        check_margin(margins[2])
        if filter_above is not None:
            check_interval("filter_above", filter_above, "[0, 1]", 0, math.nextafter(1, 2))
        self.margins, self.filter_above = tuple(margins), filter_above or None
        self.guard = not straight_through if guard is None else guard
        self.reshapes_negatives = self.filter_above is not None

    def negatives(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return torch.full_like(cos, self.filter_above or 0.0), cos.new_zeros(3)

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        m1, m2, m3 = self.margins
        angle = m1 * _angle(cos) + m2  # (N,)
        return (_falling_cos(angle) if self.guard else angle.cos()) - m3

    def extra_repr(self) -> str:
        return (
            f"margins={self.margins}, filter_above={self.filter_above}, guard={self.guard}, "
            f"straight_through={self.straight_through}"
        )


class SphereFaceMargin(Margin):
    """psi = (-1)^k cos(m theta) - 2k with k = floor(m theta / pi): cos(m theta), continued to fall beyond pi / m.

    Args:
        margin: m >= 1, the factor of the angle; need not be whole.
        straight_through: the gradient of psi = c, as in opensphere.

    Source: Liu et al., SphereFace, arXiv:1704.08063, Eq. 7; ydwen/opensphere (model/head/sphereface.py).

    >>> SphereFaceMargin(4.0)(torch.tensor([1.0, -1.0]))
    tensor([ 1., -7.])
    """

    def __init__(self, margin: float = 1.7, *, straight_through: bool = False) -> None:
        super().__init__(straight_through=straight_through)
        check_interval("margin", margin, "[1, inf)", 1, math.inf)
        self.margin = margin

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        return _falling_cos(self.margin * _angle(cos))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, straight_through={self.straight_through}"


class LSoftmaxMargin(SphereFaceMargin):
    """|w_y| psi with SphereFace's psi, for logits <x, w_j> of weights that are not normalised.

    The length of w_y has a gradient of its own, for which backward takes a second (C, D) buffer.

    Args:
        margin: m >= 1, the factor of the angle.

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
        self, margin: float = 4.0, *, base: float = 1000.0, gamma: float = 0.12, lambda_min: float = 5.0
    ) -> None:
        super().__init__(margin)
        for name, value in (("base", base), ("gamma", gamma), ("lambda_min", lambda_min)):
            check_interval(name, value, "[0, inf)", 0, math.inf)
        self.base, self.gamma, self.lambda_min = base, gamma, lambda_min
        self._register_state("step", 0)

    @property
    def annealing(self) -> Tensor:
        """lambda, 0-d."""
        return (self.base / (1 + self.gamma * self.step)).clamp_min(self.lambda_min)

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
        self, margin: float = 0.4, *, h: float = 0.333, rate: float = 0.01, straight_through: bool = False
    ) -> None:
        super().__init__(straight_through=straight_through)
        check_interval("margin", margin, "[0, pi)", 0, math.pi)
        check_interval("h", h, "[0, inf)", 0, math.inf)
        _check_rate(rate)
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
        theta = _angle(cos.clamp(-0.999, 0.999)) - self.margin * q  # (N,)
        return torch.cos(theta.clamp(1e-3, math.pi - 1e-3)) - (self.margin + self.margin * q)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, h={self.h}, rate={self.rate}, straight_through={self.straight_through}"


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
        margins: Sequence[float] = (0.45, 0.8),
        *,
        norms: Sequence[float] = (10.0, 110.0),
        regularizer: float = 35.0,
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
        return torch.where(cos > 0, cos * m.cos() - _sine(cos) * m.sin(), cos)

    def loss(self, top: Tensor, log_sum: Tensor, cos: Tensor, scale: Tensor, rows: Rows) -> Tensor:
        l_a, u_a = self.norms
        a = rows.norms().clamp(l_a, u_a)  # (N,)
        return super().loss(top, log_sum, cos, scale, rows) + self.regularizer * (a / u_a**2 + 1 / a)

    def extra_repr(self) -> str:
        return f"margins={self.margins}, norms={self.norms}, regularizer={self.regularizer}"


class KappaFaceMargin(Margin):
    """psi = cos(theta + m w_y), with a weight of each class that falls with its concentration and its size.

        w_j = gamma (1 - sigmoid(T z_j)) + (1 - gamma)(1 + cos(pi n_j / K)) / 2,   K = 1.05 max_j n_j

    z_j is the class's concentration kappa_j, less the mean, over the standard deviation of all classes;
    kappa = r (D - r^2)/(1 - r^2) with r = |sum of the class's unit embeddings| / n_j. There is no guard.
    State: `weights` (C,), 0.5 until the first call of `update`, of which there should be one an epoch.

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
        margin: float = 0.8,
        *,
        temperature: float = 0.4,
        gamma: float = 0.7,
    ) -> None:
        super().__init__()
        try:
            counts = torch.as_tensor(class_counts)
        except (TypeError, ValueError, RuntimeError):
            counts = torch.empty(())  # is none
        if counts.dim() != 1 or counts.numel() == 0 or not bool((counts >= 1).all()):
            raise ValueError(f"class_counts must be a vector of positive counts, got {class_counts!r}.")
        check_interval("margin", margin, "[0, pi) radians", 0, math.pi)
        check_interval("temperature", temperature, "[0, inf)", 0, math.inf)
        check_interval("gamma", gamma, "[0, 1]", 0, math.nextafter(1, 2))
        self.margin, self.temperature, self.gamma = margin, temperature, gamma
        self.register_buffer("class_counts", counts.double())
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

    def forward(self, cos: Tensor, rows: Rows) -> Tensor:
        m = (self.margin * self.weights[rows.targets.clamp_min(0)]).to(cos.dtype)  # (N,)
        return cos * m.cos() - _sine(cos) * m.sin()

    def extra_repr(self) -> str:
        return f"margin={self.margin}, temperature={self.temperature}, gamma={self.gamma}"


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
        self, a: float = -0.9, h: float = 0.0, k: float = 0.65, *, straight_through: bool = False
    ) -> None:
        super().__init__(straight_through=straight_through)
        check_interval("a", a, "(-inf, 0)", -math.inf, 0)
        check_margin(h)
        check_margin(k)
        self.a, self.h, self.k = a, h, k

    def forward(self, cos: Tensor, rows: Rows | None = None) -> Tensor:
        return self.a * (_angle(cos) - self.h) ** 2 + self.k

    def extra_repr(self) -> str:
        return f"a={self.a}, h={self.h}, k={self.k}, straight_through={self.straight_through}"


class GBCosFaceMargin(Margin):
    """A boundary between c and the negatives' cosine n = lse / s, which each must clear by the margin m.

        v = (1 - alpha)(c + n)/2 + alpha V     without a gradient
        loss = softplus(2s(v - c + m))/2 + softplus(2s(n - v + m))/2

    State: `boundary` V, the average of (c + n)/2 over the batches before, nan before the first, which takes its
    own; clipped to `bounds` where it is used.

    Args:
        margin: m.
        alpha: in [0, 1], the share of the global boundary.
        bounds: (low, high) of V.
        rate: of the average.

    Source: Xu et al., GB-CosFace, arXiv:2111.11186; aliyun/GB-CosFace (loss/GBCosFace.py).
    """

    boundary: Tensor

    def __init__(
        self,
        margin: float = 0.16,
        *,
        alpha: float = 0.15,
        bounds: Sequence[float] = (0.5, 0.7),
        rate: float = 0.01,
    ) -> None:
        super().__init__()
        check_margin(margin)
        check_interval("alpha", alpha, "[0, 1]", 0, math.nextafter(1, 2))
        _check_rate(rate)
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


def mean_and_std(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation over the valid samples, 0-d float64; nan if there are too few."""
    count = valid.sum()
    values = values.double()  # (N,)
    mean = values.where(valid, 0).sum() / count
    return mean, ((values - mean).where(valid, 0).square().sum() / (count - 1)).sqrt()


def update_average(average: Tensor, value: Tensor, rate: float) -> None:
    """average += rate (value - average), in place; a value that is not finite changes nothing."""
    average.copy_(torch.where(value.isfinite(), average.lerp(value.to(average.dtype), rate), average))


def _sine(cos: Tensor) -> Tensor:
    """sin(acos(c)) >= 0, with gradient 0 where it is infinite; cosines beyond 1 by rounding are taken for 1."""
    square = (1 - cos) * (1 + cos)
    inside = square > 0
    return square.where(inside, 1).sqrt().where(inside, 0)


def _angle(cos: Tensor) -> Tensor:
    """acos(c) in [0, pi], with the guard of `_sine`."""
    return torch.atan2(_sine(cos), cos)


def _falling_cos(angle: Tensor) -> Tensor:
    """(-1)^k cos(a) - 2k with k = floor(a / pi), which falls for any a >= 0."""
    k = (angle.detach() / math.pi).floor()
    return (1 - 2 * (k % 2)) * torch.cos(angle) - 2 * k


def _cos_of_sum(cos: Tensor, angle: float) -> Tensor:
    return cos * math.cos(angle) - _sine(cos) * math.sin(angle)


def _polynomial(cos: Tensor, *coefficients: float | Tensor) -> Tensor:
    """q, a and b on the device of the cosines, without a copy from the host."""
    return torch.stack([c.to(cos.dtype) if isinstance(c, Tensor) else cos.new_full((), c) for c in coefficients])


def _check_rate(rate: float) -> None:
    check_interval("rate", rate, "[0, 1]", 0, math.nextafter(1, 2))


def _refuse_unit_norms(norms: Tensor, valid: Tensor) -> None:
    if torch.compiler.is_compiling() or norms.device.type != "cpu" or valid.sum() < 2:
        return  # the norm of one sample may be 1 by chance
    if bool(((norms - 1).abs() < UNIT_NORM)[valid].all()):
        seen = norms[valid]
        raise ValueError(
            "AdaFace takes the norms of the embeddings for their quality, and here all are 1: it needs the "
            f"embeddings before they are normalised, got norms in [{seen.min():.4g}, {seen.max():.4g}]."
        )
