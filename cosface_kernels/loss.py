"""The heads as modules: they own the class centres and call the functional form."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cosface_kernels.backends import check_name
from cosface_kernels.distributed import empty_weight
from cosface_kernels.functional import LossStats, cosface_loss, cosine_logits
from cosface_kernels.init import normal_
from cosface_kernels.validation import check_margin, check_positive, check_reduction, check_scale

INIT_STD = 0.01  # as in insightface's partial_fc; the loss does not depend on it, the effective learning rate does


class FusedCosFaceLoss(nn.Module):
    """CosFace (LMCL) head: class centres, margin and softmax in one fused loss.

    Takes the place of a last linear layer with its cross-entropy. The first four arguments are in the order of
    pytorch-metric-learning's `CosFaceLoss`.

    Args:
        num_classes: C, the number of identities.
        embedding_size: D, the size of the backbone's output.
        margin: m, subtracted from the target's cosine.
        scale: s > 0, or a 0-d `torch.nn.Parameter` to learn it.
        reduction: "none", "sum" or "mean" (over the samples that are not ignored).
        ignore_index: label of samples that have no loss and no gradient.
        validate_labels: raise for a label out of range, which waits for the device; None: on the CPU alone. If not
            validated, the loss of such a sample is nan.
        backend: name of a backend, or None for the first that can run; see `python -m cosface_kernels.info`.
        process_group: shards the classes over these ranks; see `cosface_kernels.distributed`.
        device, dtype: of the weight; float64, float32, bfloat16 or float16.

    Attributes:
        weight: Parameter (num_classes, embedding_size), one class centre per row, not normalised; a DTensor,
            Shard(0), with a process group.

    Raises:
        ValueError: an argument is out of its range; the message shows its value.

    Source: Wang et al., CosFace, arXiv:1801.09414. The defaults m = 0.35 and s = 64 are the paper's.

    >>> _ = torch.manual_seed(0)
    >>> head = FusedCosFaceLoss(num_classes=1000, embedding_size=128)
    >>> embeddings = torch.randn(4, 128, requires_grad=True)
    >>> loss = head(embeddings, torch.tensor([1, 17, 17, 999]))
    >>> loss.backward()
    >>> embeddings.grad.shape, head.weight.grad.shape
    (torch.Size([4, 128]), torch.Size([1000, 128]))
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float | nn.Parameter = 64.0,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        validate_labels: bool | None = None,
        backend: str | None = None,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("embedding_size", embedding_size)
        check_margin(margin)
        check_scale(scale)
        check_reduction(reduction)
        check_name(backend)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.margin = margin
        self.scale = scale
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.validate_labels = validate_labels
        self.backend = backend
        if process_group is None:
            weight = torch.empty(num_classes, embedding_size, device=device, dtype=dtype)
        else:
            weight = empty_weight(num_classes, embedding_size, process_group, device, dtype)
        self.weight = nn.Parameter(weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the class centres anew; the same for the same `torch.manual_seed`, on any number of threads."""
        normal_(self.weight, INIT_STD)

    def forward(
        self, embeddings: Tensor, labels: Tensor, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, LossStats]:
        """The loss of a batch; see `cosface_loss`.

        Args:
            embeddings: (N, embedding_size), need not be normalised.
            labels: (N,) integers in [0, num_classes), or ignore_index.
            return_stats: also return `LossStats`, which costs no further pass over the weight.

        Returns:
            The loss, 0-d, or (N,) for reduction "none"; with return_stats, a pair (loss, stats).
        """
        return cosface_loss(
            embeddings,
            self.weight,
            labels,
            margin=self.margin,
            scale=self.scale,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            validate_labels=self.validate_labels,
            backend=self.backend,
            return_stats=return_stats,
        )

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, num_classes) logits s cos_ij without a margin; see `cosine_logits`."""
        return cosine_logits(embeddings, self.weight, scale=self.scale)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, margin={self.margin}, "
            f"scale={self.scale}, reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"backend={self.backend!r}"
        )
