"""Several centres of a class (sub-centres): which rows are whose, and which of them stays.

Class j of K sub-centres owns the rows jK .. jK + K - 1 of the weight.

Source: Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces, ECCV 2020.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from cosface_kernels import float8, ops, resizing
from cosface_kernels.margins import Margin
from cosface_kernels.nearest import NearestClasses
from cosface_kernels.options import MOST_SUBCENTERS
from cosface_kernels.reference import compute_dtype
from cosface_kernels.validation import check_integer, check_labels, check_rows

SAMPLES_AT_ONCE = 8192  # 48 MiB of rows at K = 3 and embedding_size 512


def check_subcenters(
    subcenters: int, *, sharded: bool, gradient_tolerance: float, margin: float | Callable[..., Tensor]
) -> None:
    """Raises ValueError for a K that is out of range, or for what does not go with several."""
    check_integer("subcenters", subcenters, 1)
    if subcenters > MOST_SUBCENTERS:
        raise ValueError(f"subcenters must be in [1, {MOST_SUBCENTERS}], got {subcenters}.")
    if subcenters == 1:
        return
    if sharded:
        raise ValueError(f"sub-centres cannot be sharded over ranks yet: subcenters must be 1, got {subcenters}.")
    if gradient_tolerance:
        raise ValueError(
            f"sub-centres have exact gradients alone: gradient_tolerance must be 0, got {gradient_tolerance!r}."
        )
    if isinstance(margin, Margin) and margin.reads_weight:
        raise ValueError(
            f"{type(margin).__name__} reads the class centres, of which a class must have one: subcenters must be "
            f"1, got {subcenters}."
        )


def rows_of(classes: Tensor, subcenters: int) -> Tensor:
    """(S K,) ascending, the rows of ascending classes (S,)."""
    return (classes[:, None] * subcenters + torch.arange(subcenters, device=classes.device)).flatten()


def first_of_each_class(cosines: Tensor, rows: Tensor, subcenters: int, k: int) -> tuple[Tensor, Tensor]:
    """From the nearest rows, (N, M) in order, and their cosines, to the k nearest classes, (N, k) each.

    M must be k K, or all rows: among as many there are k classes.
    """
    classes = rows // subcenters  # (N, M)
    ordered, places = classes.sort(stable=True, dim=1)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    later = torch.ones_like(is_first).scatter_(1, places, ~is_first)  # (N, M), as the rows
    kept = later.int().sort(stable=True, dim=1).indices[:, :k]  # (N, k)
    return cosines.gather(1, kept), classes.gather(1, kept)


def nearest_of_classes(
    find: Callable[[int], NearestClasses], k: int, num_classes: int, subcenters: int
) -> NearestClasses:
    """The k nearest classes by what finds the nearest rows."""
    check_integer("k", k, 1)
    if k > num_classes:
        raise ValueError(f"k must be at most num_classes, {num_classes}, got {k}.")
    cosines, rows = find(k * subcenters)
    return NearestClasses(*first_of_each_class(cosines, rows, subcenters, k))


def check_one_centre(what: str, subcenters: int) -> None:
    """Raises ValueError, where classes of several cannot be so."""
    if subcenters > 1:
        raise ValueError(
            f"classes must have one centre each to be {what}, got {subcenters} subcenters: call the head's "
            "drop_subcenters_() first."
        )


def dominant(
    weight: Tensor,
    targets: Tensor,
    embeddings: Tensor | None,
    subcenters: int,
    normalize_weight: bool,
    exponents: Tensor | None = None,
) -> Tensor:
    """(C,) int64, the row of each class that wins for most of its samples; without samples, its longest row.

    Of equal ones it is the first. A gradient is at right angles to the row that it moves, and lengthens it, so
    that the longest has moved most; weight decay shrinks all alike.

    Args:
        targets: (M,) classes of the embeddings, negative for none.
        embeddings: (M, D), or None.
        exponents: (C K,) of a weight in float8.
    """
    centres = weight.detach().unflatten(0, (-1, subcenters))  # (C, K, D)
    places = float8.lengths(weight.detach(), exponents).view(-1, subcenters).argmax(1)  # (C,)
    if embeddings is not None:
        rows = []
        chosen = targets >= 0
        blocks = (values[chosen].split(SAMPLES_AT_ONCE) for values in (embeddings, targets))
        for x, y in zip(*blocks, strict=True):
            dtype = compute_dtype(x, weight)
            w = centres[y].to(dtype)  # (samples, K, D)
            if normalize_weight:
                w = F.normalize(w, dim=2)
            elif exponents is not None:
                w = torch.ldexp(w, exponents.unflatten(0, (-1, subcenters))[y][..., None])
            rows.append(y * subcenters + (w @ x.to(dtype)[..., None])[..., 0].argmax(1))
        if rows:
            wins = torch.bincount(torch.cat(rows), minlength=len(weight)).view(-1, subcenters)  # (C, K)
            places = wins.argmax(1).where(wins.any(1), places)
    return torch.arange(len(places), device=places.device) * subcenters + places


def drop_(head: Any, embeddings: Tensor | None, labels: Tensor | None, optimizer: Optimizer | None) -> None:
    """Leaves the head and the optimizer's state the dominant row of each class; nothing changes if it raises."""
    if head.subcenters == 1:
        return
    weight, rows = head.weight, head.num_classes * head.subcenters
    if (embeddings is None) != (labels is None):
        raise ValueError("embeddings and labels must be given together, got one of them alone.")
    if len(weight) != rows:  # by another head with the same parameter
        raise ValueError(
            f"the weight must have the head's {rows} rows, {head.subcenters} of each of {head.num_classes} "
            f"classes, got {len(weight)}."
        )
    targets = torch.empty(0, dtype=torch.int64, device=weight.device)
    if embeddings is not None and labels is not None:
        check_rows(embeddings, weight)
        check_labels(labels, embeddings)
        if labels.dim() != 1:
            raise ValueError(f"labels must have shape (M,), got shape {tuple(labels.shape)}.")
        targets = ops.targets(labels, head.num_classes, int(head.ignore_index))
        embeddings = embeddings.detach()
        wrong = ~embeddings.isfinite().all(1) & (targets >= 0)  # (M,)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            seen = embeddings[row][~embeddings[row].isfinite()][0].item()
            raise ValueError(f"embeddings must be finite, got {seen} at row {row}.")
    exponents = head.weight_exponent
    keep = dominant(weight, targets, embeddings, head.subcenters, head.normalize_weight, exponents)
    *_, head.weight_exponent = resizing.resize_(
        weight, [], rows, head.init_std, keep, 0, None, optimizer, exponents
    )
    head.subcenters = 1
