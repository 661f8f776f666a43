"""Probes sought in a gallery: retrieval of images, and identification (1:N) of people, some of them unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosface_kernels import nearest_classes
from cosface_recipes.evaluation.verification import ROWS, Scores, cosines, normalised, on_grid

BLOCK = 1024  # probes at a time


@dataclass(frozen=True)
class Retrieval:
    """
    Attributes:
        recall: by k, the share of queries that have an image of their identity among the k nearest.
        map_at_r: mean average precision at R (Musgrave et al., ECCV 2020), R images of the query's identity being
            in the gallery.
        queries: how many there are with R > 0, over which both are averaged.
    """

    recall: dict[int, float]
    map_at_r: float
    queries: int


def retrieve(
    queries: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Retrieval:
    """Retrieve images by cosine similarity; mAP@R is computed by pytorch-metric-learning's AccuracyCalculator.

    Of images that are as similar, the first of the gallery comes first.

    Args:
        queries: (Q, D).
        labels: (Q,) identities.
        gallery: (G, D); None seeks each query among the others.
        gallery_labels: (G,).

    Raises:
        ValueError: no query has an image of its identity in the gallery.
    """
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    own = gallery is None or gallery_labels is None
    others, other_labels = (queries, labels) if own else (gallery, gallery_labels)
    ids, numbers = torch.unique(torch.cat([labels, other_labels]), return_inverse=True)
    wanted, offered = numbers[: len(labels)], numbers[len(labels) :]
    relevant = offered.bincount(minlength=len(ids))[wanted] - int(own)  # R of each query
    if not (relevant > 0).any():
        raise ValueError(f"None of the {len(labels)} queries has another image of its identity to be found.")
    unit, against = normalised(queries), normalised(others)
    nearest = _nearest(unit, against, max(*ks, int(relevant.max())), own)  # (Q, k)
    hit = (offered[nearest] == wanted[:, None])[relevant > 0]
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r",),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=lambda query, k, *_: (None, nearest[:, :k]),
        kmeans_func=lambda *_: None,  # the default needs faiss
    )
    found = calculator.get_accuracy(unit, wanted, against, offered, ref_includes_query=own)
    return Retrieval(
        {k: float(hit[:, :k].any(1).double().mean()) for k in ks},
        float(found["mean_average_precision_at_r"]),
        len(hit),
    )


def _nearest(queries: Tensor, gallery: Tensor, k: int, own: bool) -> Tensor:
    """(Q, at most k) rows of the gallery, the most similar first; `own`: without the query itself."""
    rows = nearest_classes(queries, gallery, min(k + own, len(gallery))).classes
    if not own:
        return rows
    itself = rows == torch.arange(len(rows))[:, None]
    itself[:, -1] |= ~itself.any(1)  # where as many others are as similar and have lower numbers
    return rows[~itself].view(len(rows), rows.shape[1] - 1)


@dataclass(frozen=True)
class Search:
    """
    Attributes:
        rates: (ranks,) shares of mated probes identified at rank 1, 2, ... or better.
        open_set: `tar_at_far(f)` is TPIR at FPIR f. Its genuine scores are those of the mated probes' mates, -inf
            where another identity is as similar; its impostors are the highest score of each non-mated probe.
    """

    rates: np.ndarray
    open_set: Scores


def search(probes: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, ranks: int = 20) -> Search:
    """Identify probes in a gallery, whose identities may have several images: the most similar one counts.

    Closed set: of the mated probes, whose identity is in the gallery, the mate is at rank k or better if fewer
    than k other identities are at least as similar. Open set (ISO/IEC 19795-1): FPIR is the share of non-mated
    probes for which any identity exceeds the threshold, TPIR that of mated probes whose mate is at rank 1 and
    exceeds it.

    Args:
        probes: (P, D).
        labels: (P,) identities.
        gallery: (G, D).
        gallery_labels: (G,).
        ranks: how many ranks are told apart.

    Raises:
        ValueError: no probe has its identity in the gallery.
    """
    ids, columns = gallery_labels.unique(return_inverse=True)  # (I,), (G,)
    position = torch.searchsorted(ids, labels).clamp(max=len(ids) - 1)
    mated = ids[position] == labels
    if not mated.any():
        raise ValueError(f"None of the {len(labels)} probes is of one of the gallery's {len(ids)} identities.")
    unit, against = normalised(probes), normalised(gallery)
    rank, genuine, impostor = [], [], []
    for block, own, known in zip(unit.split(BLOCK), position.split(BLOCK), mated.split(BLOCK), strict=True):
        impostor.append(nearest_classes(block[~known], against, 1).cosines[:, 0])
        mate, ahead = _mates(block[known], own[known, None], against, columns, ranks, ranks + 1)
        rank.append(ahead + 1)
        genuine.append(mate.masked_fill(ahead > 0, -torch.inf))
    found = torch.cat(rank)[:, None] <= torch.arange(1, ranks + 1)  # (M, ranks)
    rates = found.double().mean(0).numpy()
    scores = [torch.cat(parts).sort(descending=True).values for parts in (genuine, impostor)]
    return Search(rates, Scores(*scores, rank1=float(rates[0])))


def _mates(
    probes: Tensor, own: Tensor, gallery: Tensor, columns: Tensor, ranks: int, k: int
) -> tuple[Tensor, Tensor]:
    """The best score of each probe's own identity, and how many others are at least as similar; (M,) each.

    The k nearest images tell both if one of them is less similar than the mate. If `ranks` others are ahead, it
    does not matter how many more are, nor the score. For the probes that are left, k doubles.

    Args:
        probes, gallery: (M, D), (G, D), of length 1.
        own, columns: (M, 1), (G,) identities.
    """
    cosines, rows = nearest_classes(probes, gallery, min(k, len(gallery)))  # (M, k)
    found = columns[rows]  # (M, k)
    mate = cosines.masked_fill(found != own, -torch.inf).amax(1)
    ahead = torch.where(cosines >= mate[:, None], found, own).sort(1).values.diff(dim=1).count_nonzero(1)
    left = (cosines[:, -1] >= mate) & (ahead < ranks)
    if k < len(gallery) and left.any():
        mate[left], ahead[left] = _mates(probes[left], own[left], gallery, columns, ranks, 2 * k)
    return mate, ahead


@dataclass(frozen=True)
class Ranking:
    """
    Attributes:
        rates: by k, the share of probes that have an image of their identity among the k most similar.
        mean_average_precision: over the probes, the area below the curve of precision over recall.
    """

    rates: dict[int, float]
    mean_average_precision: float


def rank_images(
    probes: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, ks: Sequence[int]
) -> Ranking:
    """Rank a gallery's images by cosine similarity, as TinyFace's evaluation does (Cheng et al., ACCV 2018).

    With the i-th of R images of the probe's identity at place p_i, average precision is the sum over i of
    ((i - 1) / (p_i - 1) + i / p_i) / (2 R), the trapezoids of its compute_AP; the first term is 1 for p_i = 1. An
    image of another identity that is as similar is ahead. (The mAP@R of `retrieve` has rectangles, up to place R.)

    Args:
        probes: (P, D).
        labels: (P,) identities.
        gallery: (G, D), distractors included.
        gallery_labels: (G,); that of a distractor is no probe's.

    Raises:
        ValueError: there is no probe, or one has no image of its identity in the gallery.
    """
    if len(probes) == 0:
        raise ValueError(f"There is no probe to be sought among the {len(gallery)} images of the gallery.")
    unit, against = (on_grid(normalised(x)) for x in (probes, gallery))
    first, precision = [], []
    for block, block_labels in zip(unit.split(ROWS), labels.split(ROWS), strict=True):
        for similarity, label in zip(cosines(block, against), block_labels.tolist(), strict=True):
            own = gallery_labels == label
            if not own.any():
                raise ValueError(f"The gallery has no image of identity {label}, which a probe is of.")
            mates = similarity[own].sort(descending=True).values  # (R,)
            others = similarity[~own].sort().values
            ahead = len(others) - torch.searchsorted(others, mates)  # (R,) others at least as similar
            i = torch.arange(1, len(mates) + 1, dtype=torch.float64)
            place = ahead + i
            before = ((i - 1) / (place - 1)).nan_to_num(1.0)  # 0 / 0 where the first is at place 1
            precision.append((before + i / place).mean().item() / 2)
            first.append(int(place[0]))
    rates = {k: float(np.mean(np.array(first) <= k)) for k in ks}
    return Ranking(rates, float(np.mean(precision)))
