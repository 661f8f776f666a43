"""The protocols by which face recognition is compared: LFW, YTF, IJB-B and IJB-C, MegaFace.

    LFW and its kin (.bin files)    pair_distances, cross_validate
    YTF                             video_embeddings, pair_distances, cross_validate
    IJB 1:1                         template_embeddings, tar_at_nearest_far
    MegaFace                        identify

Where a source computes in float64, so does this, in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosface_recipes.evaluation.verification import Histogram, cosines, normalised, on_grid

BLOCK = 4096  # distractors at a time: with 3,530 probes, 110 MiB of similarities in float64


@dataclass(frozen=True)
class CrossValidation:
    """Of pairs in folds: each fold is tested with what the others chose.

    Attributes:
        accuracies: (folds,) share of a fold's pairs that are told rightly.
        thresholds: (folds,) on the squared distance.
        vals, fars: (folds,) shares of a fold's genuine and of its impostor pairs accepted, at the threshold where
            the false acceptance rate of the other folds is 1e-3.
    """

    accuracies: np.ndarray
    thresholds: np.ndarray
    vals: np.ndarray
    fars: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.accuracies.mean())

    @property
    def population_std(self) -> float:
        """Of the folds, sum of squares / folds (ddof 0): what insightface reports."""
        return float(self.accuracies.std())

    @property
    def sample_std(self) -> float:
        """Of the folds, sum of squares / (folds - 1) (ddof 1): the estimate that LFW's definition asks for."""
        return float(self.accuracies.std(ddof=1))

    @property
    def standard_error(self) -> float:
        """Of the mean, sample_std / sqrt(folds) (Huang et al., UMass technical report 07-49, 2007)."""
        return self.sample_std / math.sqrt(len(self.accuracies))

    @property
    def cosine_threshold(self) -> float:
        """The mean threshold, as a cosine c: |a - b|^2 = 2 - 2c."""
        return 1 - float(self.thresholds.mean()) / 2


def pair_distances(embeddings: Tensor | np.ndarray, pairs: Tensor | np.ndarray | None = None) -> np.ndarray:
    """|a - b|^2 of normalised embeddings, (n,) float64.

    Args:
        embeddings: (m, D).
        pairs: (n, 2) rows of embeddings; None pairs rows 2i and 2i + 1.

    Raises:
        ValueError: an embedding is not finite.
    """
    x = _unit(np.asarray(embeddings, np.float64))
    a, b = (x[0::2], x[1::2]) if pairs is None else (x[np.asarray(pairs)[:, i]] for i in (0, 1))
    return np.square(a - b).sum(1)


def cross_validate(
    distances: np.ndarray, same: np.ndarray | Tensor, folds: int = 10, far: float = 1e-3
) -> CrossValidation:
    """LFW's protocol as insightface computes it (recognition/arcface_torch/eval/verification.py).

    Folds are consecutive pairs; a pair is genuine if its distance is below a threshold. For the accuracy, that is
    the first of 0, 0.01, ... 3.99 with the highest accuracy on the other folds. For VAL, it is the last place at
    which the false acceptance rate of the other folds, linear between thresholds of 0, 0.001, ... 3.999, is `far`,
    and 0 where the rate stays below.

    Args:
        distances: (n,) squared, of `pair_distances`.
        same: (n,) bool.
        folds: at most n. LFW has 10 of 600, YTF 10 of 500.

    Raises:
        ValueError: there are fewer pairs than folds, or a fold lacks genuine or impostor pairs.
    """
    distances, same = np.asarray(distances, np.float64), np.asarray(same, bool)
    if len(distances) != len(same):
        raise ValueError(f"There are {len(distances)} distances and {len(same)} pairs.")
    fold = split(same, folds)
    grid, fine = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
    results = []
    for k in range(folds):
        train, test = fold != k, fold == k
        accepted_genuine, accepted_impostors = _accepted(distances[train], same[train], grid)
        right = accepted_genuine - accepted_impostors  # plus the number of impostors
        threshold = grid[right.argmax()]
        accuracy = ((distances[test] < threshold) == same[test]).mean()
        rate = _accepted(distances[train], same[train], fine)[1] / (~same[train]).sum()
        strict = np.interp(far, rate, fine) if rate.max() >= far else 0.0
        below = distances[test] < strict
        results.append((accuracy, threshold, below[same[test]].mean(), below[~same[test]].mean()))
    return CrossValidation(*np.array(results).T)


def split(same: np.ndarray, folds: int = 10) -> np.ndarray:
    """(n,) the fold of each pair, or what `cross_validate` raises of pairs that cannot be verified in folds."""
    if len(same) < folds:
        raise ValueError(f"{len(same)} pairs cannot make {folds} folds.")
    fold = np.repeat(np.arange(folds), [len(part) for part in np.array_split(same, folds)])
    for k in range(folds):
        if len(np.unique(same[fold != k])) < 2 or len(np.unique(same[fold == k])) < 2:
            raise ValueError(f"Fold {k}, or the others together, lack genuine or impostor pairs.")
    return fold


def _accepted(distances: np.ndarray, same: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor pairs below each threshold."""
    genuine, impostors = (np.searchsorted(np.sort(distances[kind]), thresholds) for kind in (same, ~same))
    return genuine, impostors


def video_embeddings(
    embeddings: Tensor | np.ndarray, videos: Tensor | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """YTF: the mean embedding of a video's frames.

    Args:
        embeddings: (frames, D).
        videos: (frames,) which video a frame is of.

    Returns:
        (v, D) float64, and the (v,) videos they are of, ascending.
    """
    ids, rows, frames = np.unique(np.asarray(videos), return_inverse=True, return_counts=True)
    total = np.zeros((len(ids), embeddings.shape[1]))
    np.add.at(total, rows, np.asarray(embeddings, np.float64))
    return total / frames[:, None], ids


def template_embeddings(
    embeddings: np.ndarray, templates: np.ndarray, media: np.ndarray, scores: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """IJB: one embedding per template, of all its images and videos.

    Images of one medium (a video) are averaged, media are added, and the sum is normalised. Embeddings keep their
    lengths, which tell how sure the network is, and are weighted with the detector's score of the face
    (insightface, recognition/_evaluation_/ijb/ijb_onnx.py, settings N1 D1; F1 is `embed` with flip="sum").

    Args:
        embeddings: (images, D).
        templates, media: (images,) ids.
        scores: (images,) of the detector; None weighs all alike.

    Returns:
        (t, D) float64 of length 1, and the (t,) templates they are of, ascending.
    """
    order = np.lexsort((media, templates))
    ids, starts_template = np.unique(templates[order], return_index=True)
    result = np.empty((len(ids), embeddings.shape[1]))
    for i, rows in enumerate(np.split(order, starts_template[1:])):
        x = embeddings[rows].astype(np.float64)  # (images of the template, D)
        if scores is not None:
            x *= scores[rows, None]
        _, first, images = np.unique(media[rows], return_index=True, return_counts=True)
        result[i] = (np.add.reduceat(x, first) / images[:, None]).sum(0)
    return _unit(result), ids


def _unit(x: np.ndarray) -> np.ndarray:
    """(n, D) float64 of length 1; a zero stays zero. A NaN would count as a rejected pair."""
    if not (finite := np.isfinite(x).all(1)).all():
        raise ValueError(f"Embedding {finite.argmin()} of {len(x)} is not finite.")
    # By a power of two, which rounds nothing: the squares of 1e200 and of 1e-200 are not in float64.
    x = np.ldexp(x, -np.frexp(np.abs(x).max(1, keepdims=True))[1])
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def tar_at_nearest_far(scores: np.ndarray, same: np.ndarray, fars: Sequence[float]) -> list[float]:
    """IJB: the true acceptance rate at the point of the ROC curve whose false acceptance rate is nearest.

    The curve is scikit-learn's, whose default leaves out points midway between two others; of two points as near,
    the one with the higher rates counts. Unlike that of `Curve.tar_at_far`, its FAR may be higher
    than what was asked for.

    Args:
        scores: (n,) similarities.
        same: (n,) bool.

    Raises:
        ValueError: all pairs are of one kind.
    """
    if len(np.unique(same)) < 2:
        raise ValueError(f"{len(same)} pairs are all of one kind; genuine and impostor pairs are needed.")
    from sklearn.metrics import roc_curve

    far, tar = (rates[::-1] for rates in roc_curve(same, scores)[:2])
    return [float(tar[np.abs(far - wanted).argmin()]) for wanted in fars]


@dataclass(frozen=True)
class Identification:
    """MegaFace.

    Attributes:
        rates: by the number of distractors, (ranks,) shares of probes identified at rank 1, 2, ... or better.
        curve: of verification, of the probes with each other and with the distractors of the largest size.
    """

    rates: dict[int, np.ndarray]
    curve: Histogram


def identify(
    probes: Tensor, labels: Tensor, distractors: Tensor, sizes: Sequence[int], ranks: int = 1
) -> Identification:
    """MegaFace's challenge 1 (Kemelmacher-Shlizerman et al., CVPR 2016): identification among N distractors.

    For every ordered pair (i, j) of one identity's photos, j is sought in a gallery of i and N distractors. It is
    found at rank k if fewer than k distractors are more similar to it than i is: one that ties is not.

    Args:
        probes: (P, D); FaceScrub.
        labels: (P,) identities; one of them at least has two photos.
        distractors: (at least max(sizes), D), other people; the first N are those of size N.
        sizes: N, in any order.
        ranks: how many ranks are told apart.

    Raises:
        ValueError: no identity has two photos, or there are fewer distractors than asked for.
    """
    sizes = check_sizes(sizes, len(distractors))
    unit = on_grid(normalised(probes))
    first, second = _mates(labels)
    if len(first) == 0:
        raise ValueError(f"None of the {len(labels.unique())} identities has two photos.")
    pairs = zip(first.split(BLOCK), second.split(BLOCK), strict=True)
    mate = torch.cat([cosines(unit[i, None], unit[j, None]).flatten() for i, j in pairs])  # of each ordered pair
    curve = Histogram(unit.device)
    curve.add(mate[first < second], True)
    nearest = mate.new_full((len(unit), ranks), -torch.inf)  # the highest similarities of each probe, descending
    rates = {}
    for begin, end in zip([0, *sizes], sizes, strict=False):
        for block in distractors[begin:end].split(BLOCK):
            similarity = cosines(unit, on_grid(normalised(block.to(unit.device))))  # (P, block)
            curve.add(similarity, False)
            nearest = torch.cat([nearest, similarity], 1).topk(ranks, 1).values
        found = mate[:, None] >= nearest[second]  # (pairs, ranks)
        rates[end] = found.double().mean(0).cpu().numpy()
    return Identification(rates, curve)


def check_sizes(sizes: Sequence[int], distractors: int) -> list[int]:
    """The sizes ascending, each once, or what `identify` raises of more than there are distractors."""
    sizes = sorted(set(sizes))
    if not sizes or not 0 < sizes[0] <= sizes[-1] <= distractors:
        raise ValueError(f"sizes must be from 1 to {distractors}, the number of distractors, got {sizes}.")
    return sizes


def _mates(labels: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different rows with equal labels."""
    rows = labels.argsort(stable=True)
    groups = rows.split(labels[rows].unique_consecutive(return_counts=True)[1].tolist())
    grids = [torch.cartesian_prod(group, group) for group in groups]
    pairs = torch.cat([grid[grid[:, 0] != grid[:, 1]] for grid in grids])
    return pairs[:, 0], pairs[:, 1]
