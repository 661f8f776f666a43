"""Identification and verification over every pair of test images, by cosine similarity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # of the similarity matrix at a time


@dataclass(frozen=True)
class Scores:
    """Similarities of all unordered pairs of test images, and the rank-1 rate."""

    genuine: Tensor  # (G,) float32, descending
    impostor: Tensor  # (I,) float32, descending
    rank1: float

    def tar_at_far(self, far: float) -> float:
        """True acceptance rate at a false acceptance rate of at most `far`, exactly.

        With k = floor(far * I) impostor pairs that may pass, the threshold is the (k+1)-th highest impostor
        score, and a pair passes if its score is above it. NaN where I < 1 / far: no such rate can be seen.
        """
        passing = allowed(far, len(self.impostor))
        if passing == 0:
            return math.nan
        threshold = self.impostor[passing] if passing < len(self.impostor) else -torch.inf
        return int((self.genuine > threshold).sum()) / len(self.genuine)

    def roc(self, points: int = 200) -> tuple[list[float], list[float]]:
        """FAR, evenly spaced in its logarithm from 1 / I to 1, and TAR at each."""
        exponents = torch.linspace(0, 1, points, dtype=torch.float64)
        far = (float(len(self.impostor)) ** (exponents - 1)).clamp(max=1).tolist()
        return far, [self.tar_at_far(f) for f in far]


def allowed(far: float, impostors: int) -> int:
    """floor(far * impostors), where 1e-3 * 1000 is 1 and not 0.99999."""
    return int(far * impostors * (1 + 1e-12))


def compare_all(embeddings: Tensor, labels: Tensor) -> Scores:
    """Score all pairs of images.

    Rank-1 is MegaFace's (Kemelmacher-Shlizerman et al., CVPR 2016): of all ordered pairs of a probe and
    another image of its identity, the share in which that image is more similar to the probe than every
    image of every other identity.

    Args:
        embeddings: (n, D); normalised here.
        labels: (n,) identities; at least one identity with two images, and two identities.
    """
    unit = F.normalize(embeddings.float())  # (n, D)
    n = len(unit)
    column = torch.arange(n)
    genuine, impostor = [], []
    hits = mates = 0
    for start in range(0, n, ROWS):
        row = column[start : start + ROWS, None]  # (R, 1)
        similarity = unit[start : start + ROWS] @ unit.T  # (R, n)
        same = labels[row] == labels  # (R, n)
        later = column > row  # each unordered pair once
        genuine.append(similarity[same & later])
        impostor.append(similarity[~same & later])
        best_other = similarity.masked_fill(same, -torch.inf).amax(1, keepdim=True)  # (R, 1)
        mate = same & (column != row)
        hits += int((mate & (similarity > best_other)).sum())
        mates += int(mate.sum())
    scores = [torch.cat(parts).sort(descending=True).values for parts in (genuine, impostor)]
    if mates == 0 or len(scores[1]) == 0:
        raise ValueError(
            f"{n} test images of {len(labels.unique())} identities make {len(scores[0])} genuine and "
            f"{len(scores[1])} impostor pairs; both kinds are needed."
        )
    return Scores(*scores, rank1=hits / mates)


def plot_roc(curves: dict[str, Scores], path: Path) -> None:
    """Write the ROC curves as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for name, scores in curves.items():
        axes.plot(*scores.roc(), label=name)
    some = next(iter(curves.values()))
    axes.set(
        xscale="log",
        xlabel="false acceptance rate",
        ylabel="true acceptance rate",
        ylim=(0, 1.02),
        title=f"{len(some.genuine):,} genuine and {len(some.impostor):,} impostor pairs",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
