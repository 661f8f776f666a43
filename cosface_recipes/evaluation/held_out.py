"""Verification of a network on the test data of a training, and the threshold with which it decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from cosface_recipes.config import Config
from cosface_recipes.data.image_datasets import open_dataset
from cosface_recipes.data.pairs import open_bin
from cosface_recipes.data.transforms import evaluation_transform
from cosface_recipes.evaluation.protocols import cross_validate, pair_distances
from cosface_recipes.evaluation.verification import compare_all, count_all, embed
from cosface_recipes.tables import aligned, percent

FARS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
BATCH = 256
EXACT_IMAGES = 20_000  # whose 200 million pairs take 3 GB to sort; more are counted, without rank-1


@dataclass(frozen=True)
class Result:
    """Of one test set.

    Attributes:
        rates: by name, in [0, 1]; nan where there are too few pairs for the rate.
        threshold: of the cosine, above which a pair is of one identity.
        chosen: how the threshold was chosen, in words.
    """

    name: str
    images: int
    rates: dict[str, float]
    threshold: float
    chosen: str


def evaluate(network: nn.Module, config: Config, device: torch.device) -> list[Result]:
    """Each test set in turn: ten-fold accuracy of a .bin file, all pairs of anything else."""
    return [
        (verify_pairs if Path(path).suffix == ".bin" else compare_pairs)(network, path, config, device)
        for path in config.test
    ]


def verify_pairs(network: nn.Module, path: str, config: Config, device: torch.device) -> Result:
    """LFW's protocol, at the mean of the folds' thresholds."""
    data = open_bin(path, evaluation_transform(config.image_size), color=config.color)
    embeddings, _ = embed(network, loader(data, config), "sum" if config.flip else None, device)
    folds = cross_validate(pair_distances(embeddings), data.same)
    rates = {"accuracy": folds.accuracy, "VAL@FAR=0.001": float(folds.vals.mean())}
    chosen = f"best accuracy on {len(data.same):,} pairs of {Path(path).name}"
    return Result(Path(path).stem, len(data), rates, folds.cosine_threshold, chosen)


def compare_pairs(network: nn.Module, path: str, config: Config, device: torch.device) -> Result:
    """Rank-1 and TAR at FAR over all pairs of images, at the threshold of the FAR that the settings name."""
    transform = evaluation_transform(config.image_size)
    data = open_dataset(path, transform, on_corrupt=config.on_corrupt, color=config.color)
    embeddings, labels = embed(network, loader(data, config), "sum" if config.flip else None, device)
    if len(data) <= EXACT_IMAGES:
        curve = compare_all(embeddings, labels)
        rates = {"rank-1": curve.rank1}
    else:
        curve = count_all(embeddings, labels, device)
        rates = {}
    rates |= {f"TAR@FAR={far:g}": curve.tar_at_far(far) for far in FARS}
    chosen = f"FAR {config.far:g} of {curve.pairs[1]:,} impostor pairs of {Path(path).name}"
    return Result(Path(path).stem, len(data), rates, curve.threshold(config.far), chosen)


def loader(data, config: Config) -> DataLoader:
    return DataLoader(data, BATCH, num_workers=config.workers)


def table(results: Sequence[Result]) -> str:
    """The results as aligned text, a line per test set."""
    names = list(dict.fromkeys(name for result in results for name in result.rates))
    lines = [["test", "images", *names, "threshold"]]
    for result in results:
        rates = [percent(result.rates[name]) if name in result.rates else "" for name in names]
        lines.append([result.name, f"{result.images:,}", *rates, f"{result.threshold:.4f}"])
    return aligned(lines)
