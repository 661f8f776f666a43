"""The softmax over a sample's negatives, as the op knows it, and what follows from it without a logit."""

from typing import NamedTuple

import torch
from torch import Tensor


class Softmax(NamedTuple):
    """The results of the op over all classes, (N,) each; of samples with two targets, target_cos is (2, N).

    The last four are `cosface_kernels.reference.moments`, or None where they were not asked for.
    """

    top: Tensor
    log_sum: Tensor
    target_cos: Tensor
    max_neg: Tensor
    below: Tensor | None = None
    total: Tensor | None = None
    hard_sum: Tensor | None = None
    hard_count: Tensor | None = None

    @classmethod
    def of(cls, top: Tensor, log_sum: Tensor, target_cos: Tensor, max_neg: Tensor, moments: Tensor) -> "Softmax":
        # torch.export cannot read the parts of what has none
        return cls(top, log_sum, target_cos, max_neg, *(moments if len(moments) else ()))

    def only(self, there: Tensor) -> "Softmax":
        """0 for the samples that are not `there`, (N,) bool, so that no nan of theirs reaches a gradient."""
        return Softmax(*(None if rows is None else torch.where(there, rows, 0) for rows in self))  # type: ignore[arg-type]

    def including(self, cos: Tensor, scale: Tensor, there: Tensor) -> "Softmax":
        """With one more class among the negatives, where it is `there`, (N,) bool, at (N,) cosines.

        Differentiable, with top a constant as everywhere. What is small stays exact: the share of the others is
        never taken from 1.
        """
        assert self.below is not None
        assert self.total is not None
        largest = self.top.masked_fill(self.log_sum.isneginf(), -torch.inf)  # (N,)
        top = torch.maximum(largest, cos.detach())  # (N,)
        others, own = self.log_sum + scale * (self.top - top), scale * (cos - top)  # (N,) each
        log_sum = torch.logaddexp(others, own)  # (N,)
        share, own_share = (others - log_sum).exp(), (own - log_sum).exp()  # (N,) each
        below = share * (self.below + top - self.top) + own_share * (top - cos)  # (N,)
        return self._replace(
            top=torch.where(there, top, self.top),
            log_sum=torch.where(there, log_sum, self.log_sum),
            max_neg=torch.where(there, torch.maximum(self.max_neg, cos.detach()), self.max_neg),
            below=torch.where(there, below, self.below),
            total=torch.where(there, self.total + cos, self.total),
        )

    def entropy(self, scale: Tensor) -> Tensor:
        """(N,) -sum_j p_ij log p_ij over the classes that are included; 0 where there is none."""
        assert self.below is not None
        none = self.log_sum.isneginf()  # (N,)
        return torch.where(none, 0, self.log_sum.masked_fill(none, 0) + scale * self.below)
