"""Margin-softmax heads for millions of classes: exact loss and gradients without the N x C logits."""

from cosface_kernels.functional import LossStats, cosface_loss, margin_softmax_loss
from cosface_kernels.loss import FusedCosFaceLoss

__version__ = "0.1.0"

__all__ = ["FusedCosFaceLoss", "LossStats", "__version__", "cosface_loss", "margin_softmax_loss"]
