"""The losses of pytorch-metric-learning 2.x with these kernels inside, for its trainers and wrappers.

    - from pytorch_metric_learning.losses import ArcFaceLoss
    + from cosface_kernels.pml import ArcFaceLoss

Each is a subclass of theirs: constructor (degrees, temperature, distance, reducer, regularizers), `W` (D, C),
`get_logits`, miners' tuples and what is refused are theirs. What is new is that the loss of each sample comes from
`margin_softmax_loss`, so that there are no (N, C) logits. Only the distance's recorded norms are left out.
"""

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cosface_kernels.functional import margin_softmax_loss
from cosface_kernels.margins import ArcFaceMargin, LSoftmaxMargin, SphereFaceMargin

try:
    VERSION = metadata.version("pytorch-metric-learning")
except metadata.PackageNotFoundError as error:
    raise ModuleNotFoundError(
        "cosface_kernels.pml needs pytorch-metric-learning, which is not installed: "
        'pip install "pytorch-metric-learning<3".'
    ) from error
if VERSION.partition(".")[0] != "2":
    raise ImportError(
        f"cosface_kernels.pml is made of the losses of pytorch-metric-learning 2.x, got {VERSION}. The heads of "
        "cosface_kernels do without it, and load the state_dict of either version."
    )

# isort: split
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

__all__ = [
    "ArcFaceLoss",
    "CosFaceLoss",
    "LargeMarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
]


class _Fused:
    """Before a loss of theirs among the bases.

    Raises:
        ValueError: the distance is no product of vectors, or one with a p or a power of its own.
    """

    psi: Callable[[Any], Any]  # from their margin to that of `margin_softmax_loss`
    normalize_embeddings = normalize_weight = True
    sub_centers = 1
    W: torch.nn.Parameter
    distance: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        distance = self.distance
        if not isinstance(distance, DotProductSimilarity) or (distance.p, distance.power) != (2, 1):
            raise ValueError(
                "the distance must be CosineSimilarity or DotProductSimilarity with p=2 and power=1, got "
                f"{type(distance).__name__} with p={distance.p} and power={distance.power}."
            )
        # (D, C) for them, and laid out as the (C, D) that the kernels read
        self.W = torch.nn.Parameter(self.W.detach().t().contiguous().t())

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Sequence[Tensor] | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> dict[str, Any]:
        """As theirs: a weighted loss of each sample, (N,), and that of the weight_regularizer."""
        theirs = cast(Any, self)
        c_f.labels_required(labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        theirs.cast_types(embeddings.dtype, embeddings.device)
        weight = self.W.t()  # (C, D)
        each: Any = margin_softmax_loss(
            embeddings,
            weight,
            cast(Tensor, labels),
            reduction="none",
            normalize_weight=self.normalize_weight,
            subcenters=self.sub_centers,
            **self.options(),
        )
        if not torch.is_autocast_enabled(embeddings.device.type):  # which has a cross-entropy in float32
            each = each.to(embeddings.dtype)
        if theirs.collect_stats and hasattr(self, "get_angles"):
            own = weight.detach().unflatten(0, (-1, self.sub_centers))[labels]  # (N, sub_centers, D)
            theirs.get_angles(F.cosine_similarity(embeddings.detach()[:, None], own, dim=2).amax(1))
        loss = {
            "losses": each * lmu.convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype),
            "indices": c_f.torch_arange_from_size(embeddings),
            "reduction_type": "element",
        }
        by_name = {"loss": loss}
        theirs.add_weight_regularization_to_loss_dict(by_name, weight)
        return by_name

    def options(self) -> dict[str, Any]:
        theirs = cast(Any, self)
        return {
            "margin": type(self).psi(theirs.margin),
            "scale": theirs.scale,
            "normalize_embeddings": self.normalize_embeddings,
        }


class CosFaceLoss(_Fused, losses.CosFaceLoss):  # type: ignore[misc]
    """psi = cos - m.

    >>> loss = CosFaceLoss(num_classes=1000, embedding_size=128)
    >>> loss(torch.randn(4, 128), torch.tensor([1, 17, 17, 999])).shape
    torch.Size([])
    """

    psi = staticmethod(lambda margin: margin)


class ArcFaceLoss(_Fused, losses.ArcFaceLoss):  # type: ignore[misc]
    """psi = cos(theta + m) with `margin` in degrees, [0, 180); cos - m sin(m) beyond theta + m = pi."""

    psi = staticmethod(lambda margin: ArcFaceMargin(float(margin)))  # numpy's, in radians


class SubCenterArcFaceLoss(_Fused, losses.SubCenterArcFaceLoss):  # type: ignore[misc]
    """ArcFace's psi of the nearest of the `sub_centers` columns of W of each class; num_classes is a keyword."""

    psi = staticmethod(lambda margin: ArcFaceMargin(float(margin)))


class SphereFaceLoss(_Fused, losses.SphereFaceLoss):  # type: ignore[misc]
    """SphereFace's psi with the scale s |x_i|; not annealed, unlike `cosface_kernels.FusedASoftmaxLoss`."""

    psi = SphereFaceMargin
    normalize_embeddings = False


class LargeMarginSoftmaxLoss(_Fused, losses.LargeMarginSoftmaxLoss):  # type: ignore[misc]
    """SphereFace's psi with the scale s |x_i| |w_j|."""

    psi = LSoftmaxMargin
    normalize_embeddings = normalize_weight = False


class NormalizedSoftmaxLoss(_Fused, losses.NormalizedSoftmaxLoss):  # type: ignore[misc]
    """Softmax over cosines / temperature, or over <x_i, w_j> / (temperature |w_j|) by its distance."""

    def options(self) -> dict[str, Any]:
        return {
            "margin": 0.0,
            "scale": 1 / self.temperature,
            "normalize_embeddings": self.distance.normalize_embeddings,
        }
