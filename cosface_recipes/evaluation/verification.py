"""Embeddings of images, and verification over every pair of them by cosine similarity."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

ROWS = 256  # of the similarity matrix at a time
TILE = 2048  # rows and columns at a time, where memory must not grow with the number of pairs: 32 MiB of float64
BINS = 2**22  # of [-1, 1]: 4.8e-7 wide, which is what rounding does to a float32 cosine of 512 components

Flip = Literal["sum", "concatenate"] | None


@torch.no_grad()
def embed(
    network: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    flip: Flip = "sum",
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Embeddings of all images of a DataLoader, not normalised, with a module in evaluation mode.

    Args:
        network: (n, channels, h, w) -> (n, D).
        batches: of images and labels.
        flip: what happens to the mirror image's embedding: added, concatenated, or, with None, not computed.

    Returns:
        embeddings (n, D) or (n, 2D) float32, and labels (n,), both on the CPU.
    """
    if flip not in ("sum", "concatenate", None):
        raise ValueError(f'flip must be "sum", "concatenate" or None, got {flip!r}.')
    training = isinstance(network, nn.Module) and network.training
    if training:
        network.eval()
    embeddings, labels = [], []
    for images, label in batches:
        images = images.to(device)
        x = network(images)
        if flip:
            mirrored = network(images.flip(-1))
            x = x + mirrored if flip == "sum" else torch.cat([x, mirrored], 1)
        embeddings.append(x.float().cpu())
        labels.append(label)
    if training:
        network.train()
    return torch.cat(embeddings), torch.cat(labels)


class Curve(ABC):
    """Genuine and impostor pairs by their similarity.

    Attributes:
        pairs: how many genuine and how many impostor pairs there are.
    """

    pairs: tuple[int, int]

    @abstractmethod
    def accepted(self, passing: int) -> int:
        """Genuine pairs above the lowest threshold that at most `passing` >= 1 impostor pairs exceed."""

    @abstractmethod
    def threshold(self, far: float) -> float:
        """The cosine above which pairs are accepted at a false acceptance rate of at most `far`."""

    def tar_at_far(self, far: float) -> float:
        """True acceptance rate at a false acceptance rate of at most `far`.

        floor(far * impostors) impostor pairs may pass. NaN where that is 0: no such rate can be seen.
        """
        genuine, impostors = self.pairs
        passing = allowed(far, impostors)
        return self.accepted(passing) / genuine if passing else math.nan

    def roc(self, points: int = 200) -> tuple[list[float], list[float]]:
        """FAR, evenly spaced in its logarithm from 1 / impostors to 1, and TAR at each."""
        exponents = torch.linspace(0, 1, points, dtype=torch.float64)
        far = (float(self.pairs[1]) ** (exponents - 1)).clamp(max=1).tolist()
        return far, [self.tar_at_far(f) for f in far]


@dataclass(frozen=True)
class Scores(Curve):
    """Similarities of all unordered pairs of test images, exact, and the rank-1 rate."""

    genuine: Tensor  # (G,) float32, descending
    impostor: Tensor  # (I,) float32, descending
    rank1: float

    @property
    def pairs(self) -> tuple[int, int]:
        return len(self.genuine), len(self.impostor)

    def threshold(self, far: float) -> float:
        """The (floor(far * impostors) + 1)-th highest impostor."""
        passing = allowed(far, len(self.impostor))
        return float(self.impostor[passing]) if passing < len(self.impostor) else -1.0

    def accepted(self, passing: int) -> int:
        """The threshold is the (passing + 1)-th highest impostor; a pair passes above it."""
        threshold = self.impostor[passing] if passing < len(self.impostor) else -torch.inf
        return int((self.genuine > threshold).sum())


# By hand, since roc_curve and its kin hold and sort every score: of MegaFace's 3.5 billion pairs, 28 GB and more.
class Histogram(Curve):
    """Counts of any number of pairs, in constant memory.

    Thresholds are the edges of bins 2^-21 = 4.8e-7 wide. At each of them the counts are exact, so that a FAR is
    never above what was asked for; a TAR is that of a threshold higher than the best by less than a bin.
    """

    def __init__(self, device: torch.device | str = "cpu", bins: int = BINS):
        self.counts = torch.zeros(2, bins, dtype=torch.int64, device=device)  # impostor, genuine

    def add(self, similarity: Tensor, same: Tensor | bool) -> None:
        """Count pairs.

        Args:
            similarity: cosines, of any shape.
            same: bool, of the same shape or of all.
        """
        size = self.counts.shape[1]
        bins = ((similarity + 1) * (size / 2)).int().clamp_(0, size - 1).flatten()
        same = torch.as_tensor(same, device=bins.device).expand(similarity.shape).flatten()
        one = self.counts.new_ones(())
        self.counts.view(-1).index_add_(0, bins + same.int() * size, one.expand(bins.shape))
        self.__dict__.pop("from_above", None)

    @cached_property
    def from_above(self) -> Tensor:
        """(2, bins): impostor and genuine pairs in the highest 1, 2, ... bins."""
        return self.counts.flip(1).cumsum(1).cpu()

    @property
    def pairs(self) -> tuple[int, int]:
        impostors, genuine = self.from_above[:, -1].tolist()
        return genuine, impostors

    def threshold(self, far: float) -> float:
        return 1 - 2 * self.bins_above(allowed(far, self.pairs[1])) / self.counts.shape[1]

    def accepted(self, passing: int) -> int:
        bins = self.bins_above(passing)
        return int(self.from_above[1, bins - 1]) if bins else 0

    def bins_above(self, passing: int) -> int:
        """How many of the highest bins hold at most so many impostors."""
        return int(torch.searchsorted(self.from_above[0], passing, right=True))


def allowed(far: float, impostors: int) -> int:
    """floor(far * impostors), where 0.29 * 100 is 29 and not 28.999999999999996."""
    if not 0 <= far <= 1:
        raise ValueError(f"A false acceptance rate must be from 0 to 1, got {far}.")
    return int(far * impostors * (1 + 1e-12))


def normalised(embeddings: Tensor) -> Tensor:
    """(n, D) float32 of length 1; a zero stays zero.

    Raises:
        ValueError: an embedding is not finite, or one of float32 has a length that is not in float32.
    """
    if embeddings.dtype == torch.float64:  # has numbers that float32 would make infinite or zero
        largest = embeddings.abs().amax(1, keepdim=True)
        embeddings = embeddings / largest.clamp(min=torch.finfo(torch.float64).tiny)
    x = embeddings.float()
    # float64 has the squares of all numbers of float32: F.normalize makes of 1e20 a zero, of 1e-20 a short vector.
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    if not (finite := length.float().isfinite()).all():
        raise ValueError(f"Embedding {int(finite.int().argmin())} of {len(x)} is not finite in float32.")
    tiny = torch.finfo(torch.float32).tiny
    raised = torch.where(length < tiny, 2.0**64, 1.0).float()  # below it float32 has fewer digits
    return x * raised / (length * raised).float().clamp(min=tiny)


def on_grid(unit: Tensor) -> Tensor:
    """Rows of `normalised` in whole numbers of 2^-26, as float64, for `cosines`."""
    return (unit.double() * 2**26).round()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """All similarities of rows, the same number for the same two whatever is computed beside them.

    A float32 product rounds by shape, block and device, so that two copies of one image would not tie. Products
    of rows on the grid are whole numbers of 2^-52, and none of their partial sums exceeds |a| |b| < 2, so that
    float64 holds every one of them exactly, in any order. The grid moves a cosine less than float32 products do.

    Args:
        a, b: (..., n, D) and (..., m, D), of `on_grid`.

    Returns:
        (..., n, m) float32; two of them tie if they are the same number.
    """
    return (a @ b.mT * 2.0**-52).float()


def compare_all(embeddings: Tensor, labels: Tensor) -> Scores:
    """Score all pairs of images.

    Rank-1 is MegaFace's (Kemelmacher-Shlizerman et al., CVPR 2016): of all ordered pairs of a probe and
    another image of its identity, the share in which that image is more similar to the probe than every
    image of every other identity.

    Args:
        embeddings: (n, D); normalised here.
        labels: (n,) identities; at least one identity with two images, and two identities.
    """
    unit = on_grid(normalised(embeddings))  # (n, D)
    check_kinds(labels)
    n = len(unit)
    column = torch.arange(n)
    genuine, impostor = [], []
    hits = mates = 0
    for start in range(0, n, ROWS):
        row = column[start : start + ROWS, None]  # (R, 1)
        similarity = cosines(unit[start : start + ROWS], unit)  # (R, n)
        same = labels[row] == labels  # (R, n)
        later = column > row  # each unordered pair once
        genuine.append(similarity[same & later])
        impostor.append(similarity[~same & later])
        best_other = similarity.masked_fill(same, -torch.inf).amax(1, keepdim=True)  # (R, 1)
        mate = same & (column != row)
        hits += int((mate & (similarity > best_other)).sum())
        mates += int(mate.sum())
    scores = [torch.cat(parts).sort(descending=True).values for parts in (genuine, impostor)]
    return Scores(*scores, rank1=hits / mates)


def count_all(embeddings: Tensor, labels: Tensor, device: torch.device | str = "cpu") -> Histogram:
    """Count all unordered pairs of any number of images, tile by tile of the similarity matrix.

    Args:
        embeddings: (n, D); normalised here.
        labels: (n,) identities.
        device: where the cosines are computed; the CPU for "mps".
    """
    device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
    unit, labels = normalised(embeddings).to(device), labels.to(device)
    histogram = Histogram(device)
    for rows, row_labels, i in zip(unit.split(TILE), labels.split(TILE), range(0, len(unit), TILE), strict=True):
        rows = on_grid(rows)
        for columns, column_labels, j in zip(
            unit[i:].split(TILE), labels[i:].split(TILE), range(i, len(unit), TILE), strict=True
        ):
            similarity = cosines(rows, on_grid(columns))  # (R, C)
            same = row_labels[:, None] == column_labels
            if i == j:  # each pair once, and none with itself
                once = torch.ones_like(same).triu(1)
                similarity, same = similarity[once], same[once]
            histogram.add(similarity, same)
    return histogram


def check_kinds(labels: Tensor) -> None:
    """Raises ValueError where images of these identities, (n,), make no genuine or no impostor pair."""
    photos = labels.unique(return_counts=True)[1]
    genuine = int((photos * (photos - 1)).sum()) // 2
    impostors = len(labels) * (len(labels) - 1) // 2 - genuine
    if genuine == 0 or impostors == 0:
        raise ValueError(
            f"{len(labels)} test images of {len(photos)} identities make {genuine} genuine and "
            f"{impostors} impostor pairs; both kinds are needed."
        )
