"""What a loss tells of its batch beside its value."""

from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import _register_namedtuple


class Sparsity(NamedTuple):
    """What a backward with a gradient_tolerance leaves out, known before it runs.

    Let p_ij = e^{s_i cos_ij} / sum_{k != y_i} e^{s_i cos_ik}, and dropped_i the sum of p_ij over the negatives
    left out. With g_i = d loss / d lse_i, |x_i| dx_i lacks s_i g_i sum_{j dropped} p_ij w_j / |w_j|, and
    |w_j| dw_j lacks s_i g_i p_ij x_i / |x_i| of every i that dropped it, projected, which makes nothing longer. So

        |delta dx_i| <= s_i |g_i| dropped_i / |x_i|    sum_j |w_j| |delta dw_j| <= sum_i s_i |g_i| dropped_i

    and nothing is left out of the target's part of either. |x_i| and |w_j| are clamped at 1e-12. Where classes are
    sharded, all of this is of the samples and the classes of all ranks.

    Where the margin reshapes negatives, N(cos_ij) takes the place of cos_ij in p_ij. What is left out then has the
    factor N'(cos_ij), and both bounds the largest |N'| of it: at most 2 + |t| of CurricularFace, 1 + t of
    MV-Softmax, and 1 with an inter-class filter.

    Attributes:
        dropped: (N,) float64, at most the tolerance; 0 for an exact sample.
        kept: (N,) float64, the share of the negatives that is not left out; 1 for an exact sample, one with so
            many that dense products are faster, or more than there is room for, on every rank.
    """

    dropped: Tensor
    kept: Tensor

    @property
    def exact(self) -> Tensor:
        """(N,) bool: the samples that take the exact path."""
        return self.kept == 1


class LossStats(NamedTuple):
    """What the loss knows of its batch, without another pass over the weights but for the k nearest.

    Detached, but for the entropy. Where samples have two labels, neither is among a sample's negatives.

    Attributes:
        lse: (N,) log sum_{j != y} e^{s N(cos_ij)}, over the negative classes alone; N(c) = c unless the margin
            of a softmax reshapes negatives.
        target_cos: (N,) cosine between each embedding and its class centre, (N, 2) where samples have two labels;
            0 for an ignored one, and for the second of two equal ones.
        max_negative_cos: (N,) cosine of the nearest other class centre, not reshaped; -inf if there is none.
        accuracy: 0-d, the share of the valid samples whose own class centre is the nearest, without the margin;
            where samples have two labels, of these by their sample_weight alone.
        sparsity: with a gradient_tolerance, and where there will be a gradient.
        top_k_accuracy: with return_stats=k, 0-d, the share whose own class centre is among the k nearest of all
            classes, also where a sampler draws some; else None.
        entropy: with entropy=True, (N,) -sum_j p_ij log p_ij over all classes that take part, in nats, with
            p_ij = e^{s cos_ij} / sum_k e^{s cos_ik}: without the margin, with reshaped negatives; else None.
    """

    lse: Tensor
    target_cos: Tensor
    max_negative_cos: Tensor
    accuracy: Tensor
    sparsity: Sparsity | None = None
    top_k_accuracy: Tensor | None = None
    entropy: Tensor | None = None


# for torch.export, which saves them by these names
_register_namedtuple(Sparsity, serialized_type_name="cosface_kernels.Sparsity")
_register_namedtuple(LossStats, serialized_type_name="cosface_kernels.LossStats")
