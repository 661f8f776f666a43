"""Verification of a network on the test data of a training, and the threshold with which it decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from config import Config
from datasets import open_dataset
from evaluation import allowed, compare_all
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transforms import evaluation_transform

FARS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
BATCH = 256


@dataclass(frozen=True)
class Result:
    """Of one test set.

    Attributes:
        rates: by name, in [0, 1]; nan where there are too few pairs for the rate.
        threshold: of the cosine, at the false acceptance rate that the configuration asks for.
        chosen: how the threshold was chosen, in words.
    """

    name: str
    images: int
    identities: int
    rates: dict[str, float]
    threshold: float
    chosen: str


def evaluate(network: nn.Module, config: Config, device: torch.device) -> list[Result]:
    """Each test set in turn: rank-1 and TAR at FAR over all pairs of its images."""
    results = []
    for path in config.test:
        data = open_dataset(
            path, evaluation_transform(config.image_size), on_corrupt=config.on_corrupt, color=config.color
        )
        loader = DataLoader(data, BATCH, num_workers=config.workers)
        embeddings, labels = embed(network, loader, device, flip=config.flip)
        scores = compare_all(embeddings, labels)
        rates = {"rank-1": scores.rank1, **{f"TAR@FAR={far:g}": scores.tar_at_far(far) for far in FARS}}
        threshold = scores.impostor[allowed(config.far, len(scores.impostor))].item()
        chosen = f"FAR {config.far:g} of {len(scores.impostor):,} impostor pairs of {Path(path).name}"
        results.append(Result(Path(path).stem, len(data), data.num_classes, rates, threshold, chosen))
    return results


@torch.no_grad()
def embed(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, *, flip: bool
) -> tuple[Tensor, Tensor]:
    """Embeddings (n, D) and labels (n,) in evaluation mode; with flip, those of the mirror images added."""
    training = network.training
    network.eval()
    embeddings, labels = [], []
    for images, label in batches:
        images = images.to(device)
        x = network(images)
        embeddings.append((x + network(images.flip(-1)) if flip else x).cpu())
        labels.append(label)
    network.train(training)
    return torch.cat(embeddings), torch.cat(labels)


def table(results: Sequence[Result]) -> str:
    """The results as aligned text, a line per test set."""
    lines = [["test", "images", "identities", *results[0].rates, "threshold"]]
    for result in results:
        rates = ["n/a" if math.isnan(rate) else f"{100 * rate:.2f} %" for rate in result.rates.values()]
        lines.append(
            [result.name, f"{result.images:,}", f"{result.identities:,}", *rates, f"{result.threshold:.4f}"]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in lines
    )
