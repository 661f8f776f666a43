"""MegaFace's cleaned lists: the noise among its photos made harmless, without changing how many there are.

As insightface's remove_noises.py does it (recognition/_evaluation_/megaface), on features of length 1, but for the
random numbers below 0.001 that it adds to a centre.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from cosface_recipes.data.names import identity
from cosface_recipes.evaluation.verification import normalised

# The extra coordinate of a noisy distractor, whose others have length 1: cosines shrink to a hundredth.
AWAY = 100.0


def read_noise(path: str | Path) -> list[str]:
    """Names of a list, one a line, or `number<TAB>name`; lines that begin with # are left out."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    return [line.split("\t")[1] if "\t" in line else line for line in lines if line and not line.startswith("#")]


def is_noise(names: Sequence[str] | np.ndarray, noise: Iterable[str]) -> np.ndarray:
    """(n,) bool: whether a name is one of a list, or ends in "/" and one of them.

    >>> is_noise(["A/A_1.jpg", "A/A_2.jpg"], ["A_1.jpg"]).tolist()
    [True, False]
    """
    noise = {*map(identity, noise)}
    tails = (
        {name, *(name[i + 1 :] for i, letter in enumerate(name) if letter == "/")} for name in map(identity, names)
    )
    return np.array([not noise.isdisjoint(tail) for tail in tails], bool)


def clean(
    probes: np.ndarray,
    labels: np.ndarray,
    noisy: np.ndarray,
    distractors: np.ndarray,
    noisy_distractors: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Put a noisy probe at the centre of its identity's other photos, and move a noisy distractor away from all.

    Args:
        probes: (P, D).
        labels: (P,) identities.
        noisy: (P,) bool.
        distractors: (N, D).
        noisy_distractors: (N,) bool.

    Returns:
        (P, D + 1) and (N, D + 1) float32, to be compared by cosine: the extra coordinate is 0 but for a noisy
        distractor, where it is 100 times the length of the others.

    Raises:
        ValueError: all photos of an identity are noisy.
    """
    probes, distractors = (normalised(torch.from_numpy(x)).numpy() for x in (probes, distractors))
    moved = np.pad(probes, ((0, 0), (0, 1)))
    for label in np.unique(labels[noisy]):
        rest = (labels == label) & ~noisy
        if not rest.any():
            raise ValueError(
                f"All {(labels == label).sum()} photos of identity {label} are noise, so that it has no centre."
            )
        moved[(labels == label) & noisy, :-1] = probes[rest].sum(0)
    return moved, np.column_stack([distractors, np.where(noisy_distractors, AWAY, 0).astype(np.float32)])
