"""What weighs the samples of a batch: the user, their classes, the tuples that a miner found them in."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cosface_kernels.validation import check_per_sample, check_tensor, vector_of


def combined(
    labels: Tensor,
    dtype: torch.dtype,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    indices_tuple: Sequence[Tensor] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The product of those that are there, in the shape of labels, or None.

    And, of two labels of a sample, the sample_weight alone, where it is not all of that product; else None.
    """
    if labels.dim() == 2 and sample_weight is None:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} must have a sample_weight of that shape, by which the two of "
            "a sample share its loss; got None."
        )
    factors = []  # not of 16 bits: the sum of many, by which the mean divides, would be coarse or overflow
    if sample_weight is not None:
        check_per_sample("sample_weight", sample_weight, labels)
        factors.append(sample_weight.to(torch.promote_types(sample_weight.dtype, dtype)))
    if class_weight is not None:
        factors.append(class_weight.to(dtype)[labels.long().clamp(0, len(class_weight) - 1)])
    if indices_tuple is not None:
        counts = of_tuples(indices_tuple, labels.view(len(labels), -1)[:, 0], dtype)  # (N,)
        factors.append(counts if labels.dim() == 1 else counts[:, None])
    product = math.prod(factors[1:], start=factors[0]) if factors else None
    return product, factors[0] if labels.dim() == 2 and len(factors) > 1 else None


def of_tuples(indices_tuple: Sequence[Tensor], labels: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) how often a sample occurs in pairs or triplets, over the largest of these counts; 1 if there are none.

    Raises:
        ValueError: it is no tuple of vectors of positions in the batch.

    Source: pytorch-metric-learning, utils/loss_and_miner_utils.py.

    >>> anchors, positives, negatives = torch.tensor([[0, 0], [1, 2], [3, 1]])
    >>> of_tuples((anchors, positives, negatives), torch.zeros(5), torch.float32)
    tensor([1.0000, 1.0000, 0.5000, 0.5000, 0.0000])
    """
    is_tuple = isinstance(indices_tuple, tuple | list) and len(indices_tuple) > 0
    if not is_tuple or not all(isinstance(each, Tensor) and each.dim() == 1 for each in indices_tuple):
        raise ValueError(
            "indices_tuple must be what a miner gives, vectors of positions in the batch, got "
            f"{type(indices_tuple).__name__}; return_stats and sample_weight are keyword arguments."
        )
    places = torch.cat([each.to(labels.device) for each in indices_tuple])
    if not len(places):
        return torch.ones(labels.shape, dtype=dtype, device=labels.device)
    if places.is_floating_point() or places.dtype == torch.bool:
        raise ValueError(f"indices_tuple must hold integers, got {places.dtype}.")
    if places.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (places < 0) | (places >= len(labels))
        if wrong.any():
            raise ValueError(
                f"indices_tuple must hold positions in [0, {len(labels)}), got {int(places[wrong][0])}."
            )
    counts = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
    counts.index_add_(0, places.long(), torch.ones_like(places, dtype=dtype))
    return counts / counts.max()


def of_each_class(values: Tensor | Sequence[float] | None, num_classes: int) -> Tensor | None:
    """(C,) float32.

    Raises:
        ValueError: there are not as many, or one is no finite number of at least 0.
    """
    if values is None:
        return None
    weight = vector_of("class_weight", values).detach()
    check_class_weight(weight, num_classes)
    if weight.is_meta:
        raise ValueError("class_weight must have values, got a tensor on meta.")
    weight = weight.to(torch.float32, copy=True)
    wrong = ~((weight >= 0) & (weight < math.inf))
    if wrong.any():
        raise ValueError(f"class_weight must be finite and at least 0, got {weight[wrong][0].item()}.")
    return weight


def check_class_weight(weight: Tensor, num_classes: int) -> None:
    check_tensor("class_weight", weight)
    if weight.shape != (num_classes,):
        raise ValueError(f"class_weight must hold {num_classes} numbers, got shape {tuple(weight.shape)}.")
