"""The nearest classes of embeddings, without the (N, C) cosines."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from cosface_kernels import ops, optim
from cosface_kernels.backends import check_name, select
from cosface_kernels.derivatives import refuse_transforms
from cosface_kernels.distributed import own_rows, placement
from cosface_kernels.options import Options
from cosface_kernels.reference import EPS
from cosface_kernels.validation import check_bool, check_exponents, check_integer, check_rows


class NearestClasses(NamedTuple):
    """
    Attributes:
        cosines: (N, k), the largest first; float32, or float64 if an input is.
        classes: (N, k) int64, their classes; of equal cosines the lower class first, and a nan before any number.
    """

    cosines: Tensor
    classes: Tensor


_register_namedtuple(NearestClasses, serialized_type_name="cosface_kernels.NearestClasses")  # for torch.export


@torch.no_grad()
def nearest_classes(
    embeddings: Tensor,
    weight: Tensor,
    k: int,
    *,
    normalize_embeddings: bool = True,
    normalize_weight: bool = True,
    backend: str | None = None,
    weight_exponent: Tensor | None = None,
) -> NearestClasses:
    """The k classes whose centres have the largest cosines with each embedding, or the images of a gallery.

    The classes go by in tiles, each of which leaves its best: memory is that of some N k candidates and a tile for
    every thread, on a GPU of a chunk of classes. The result is without a gradient, and the same on every run.

    Args:
        embeddings: (N, D) float64, float32, bfloat16 or float16; need not be normalised.
        weight: (C, D) class centres or gallery, one row each, of any of these dtypes; need not be normalised. Of a
            sharded one every rank gets its own samples' nearest classes on all ranks, which all make the call.
        k: in [1, C].
        normalize_embeddings, normalize_weight: if not, |x_i| cos_ij, |w_j| cos_ij or <x_i, w_j> take the place
            of cos_ij.
        backend: name of a backend, or None for the first that takes these tensors.
        weight_exponent: (C,) of a weight in float8, which without normalize_weight is needed.

    Raises:
        ValueError: a shape or k does not fit; the message shows it.
        TypeError: so for a dtype.
        RuntimeError: the named backend cannot run here; the message says why.

    >>> nearest_classes(torch.tensor([[3.0, 1.0]]), torch.eye(2), k=2)
    NearestClasses(cosines=tensor([[0.9487, 0.3162]]), classes=tensor([[0, 1]]))
    """
    refuse_transforms()
    ranks = placement(weight)
    exponents = own_rows(weight_exponent) if isinstance(weight_exponent, Tensor) else None

    def stated() -> dict[str, object]:
        if len(ranks.classes):  # of none there is nothing to compute
            select(
                backend, embeddings, ranks.weight, Options(normalize_weight=normalize_weight, exponents=exponents)
            )
        return {"k": k, "normalization": (normalize_embeddings, normalize_weight)}

    with ranks.agreement(stated, embeddings):
        check_rows(embeddings, weight)
        check_name(backend)
        check_bool("normalize_embeddings", normalize_embeddings)
        check_bool("normalize_weight", normalize_weight)
        check_exponents(weight, weight_exponent, needed=not normalize_weight)
        check_integer("k", k, 1)
        if k > weight.shape[0]:
            raise ValueError(f"k must be at most num_classes, {weight.shape[0]}, got {k}.")
        if getattr(weight, optim.MARK, False):
            optim.note_use(weight)
    x = ranks.gather(embeddings)
    most = min(int(k), len(ranks.classes))
    cosines, classes = ops.nearest(x, ranks.weight, most, normalize_weight, backend, exponents)
    cosines, classes = ranks.keep_nearest(cosines, classes, int(k))
    if not normalize_embeddings:
        cosines = cosines * embeddings.to(cosines.dtype).norm(dim=1, keepdim=True).clamp_min(EPS)
    return NearestClasses(cosines, classes)
