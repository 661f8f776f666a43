"""Verification of a network on the test data of a training, and the threshold with which it decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cosface_recipes.config import Config
from cosface_recipes.data.image_datasets import ImageDataset, open_dataset
from cosface_recipes.data.pairs import PairedImages, open_bin
from cosface_recipes.evaluation.collect import Embedder
from cosface_recipes.evaluation.protocols import cross_validate, pair_distances, split
from cosface_recipes.evaluation.verification import Curve, allowed, check_kinds, compare_all, count_all
from cosface_recipes.tables import aligned, percent

FARS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
EXACT_IMAGES = 20_000  # whose 200 million pairs take 3 GB to sort; more are counted, without rank-1


@dataclass(frozen=True)
class Result:
    """Of one test set.

    Attributes:
        rates: by name, in [0, 1]; nan where there are too few pairs for the rate.
        threshold: of the cosine, above which a pair is of one identity.
        chosen: how the threshold was chosen, in words.
        curve: of all pairs; None where folds of chosen pairs were verified.
    """

    name: str
    images: int
    rates: dict[str, float]
    threshold: float
    chosen: str
    curve: Curve | None = None


def evaluate(network: nn.Module, config: Config, device: torch.device) -> list[Result]:
    """Each test set in turn."""
    embedder = embedder_of(network, config, device)
    return [verify(embedder, Path(path), config.far) for path in config.test]


def check(config: Config) -> None:
    """Reads every image of the test sets, and raises what `evaluate` would after hours of training."""
    if missing := [path for path in config.test if not Path(path).exists()]:
        raise FileNotFoundError(f"There is no test data {', '.join(missing)}.")
    embedder = embedder_of(lambda images: images.new_empty(len(images), 0), config, torch.device("cpu"))
    for path in config.test:
        try:
            data = open_test(embedder, Path(path))
            labels = embedder.embed(data)[1]
            if isinstance(data, PairedImages):
                split(data.same.numpy())
            else:
                check_kinds(labels)
        except ValueError as error:
            raise ValueError(f"The test data {path} cannot be used: {error}") from error


def embedder_of(network: Callable[[Tensor], Tensor], config: Config, device: torch.device) -> Embedder:
    return Embedder(
        network,
        config.image_size,
        config.color,
        "sum" if config.flip else None,
        workers=config.workers,
        device=device,
        on_corrupt=config.on_corrupt,
        progress=False,
    )


def open_test(embedder: Embedder, path: Path) -> ImageDataset:
    """A .bin file of pairs, else a folder of identities or a .rec file."""
    if path.suffix == ".bin":
        return open_bin(path, **embedder.options)
    return open_dataset(path, on_corrupt=embedder.on_corrupt, **embedder.options)


def verify(embedder: Embedder, path: Path, far: float) -> Result:
    """A test set: ten-fold accuracy of a .bin file, all pairs of a folder of identities or a .rec file."""
    data = open_test(embedder, path)
    if isinstance(data, PairedImages):
        return verify_pairs(embedder, path, data)
    return compare_pairs(path.name, *embedder.embed(data), far, embedder.device)


def verify_pairs(embedder: Embedder, path: Path, data: PairedImages) -> Result:
    """LFW's protocol, at the mean of the folds' thresholds."""
    folds = cross_validate(pair_distances(embedder.embed(data)[0]), data.same)
    rates = {"accuracy": folds.accuracy, "VAL@FAR=0.001": float(folds.vals.mean())}
    chosen = f"best accuracy on {len(data.same):,} pairs of {path.name}"
    return Result(path.stem, len(data), rates, folds.cosine_threshold, chosen)


def compare_pairs(
    name: str, embeddings: Tensor, labels: Tensor, far: float, device: torch.device | str = "cpu"
) -> Result:
    """Rank-1 and TAR at FAR over all pairs of images, at the threshold of a false acceptance rate.

    Args:
        name: of the test set's file or folder.
        embeddings: (n, D).
        labels: (n,) identities.
        far: at which the threshold is chosen.
    """
    if len(labels) <= EXACT_IMAGES:
        curve = compare_all(embeddings, labels)
        rates = {"rank-1": curve.rank1}
    else:
        check_kinds(labels)
        curve = count_all(embeddings, labels, device)
        rates = {}
    rates |= {f"TAR@FAR={far:g}": curve.tar_at_far(far) for far in FARS}
    impostors = curve.pairs[1]
    if not allowed(far, impostors):
        warnings.warn(
            f"{impostors:,} impostor pairs of {name} are too few for a threshold at a FAR of {far:g}, at which "
            "less than one of them would pass: hold out more identities, or choose a larger far.",
            stacklevel=2,
        )
    chosen = f"FAR {far:g} of {impostors:,} impostor pairs of {name}"
    return Result(Path(name).stem, len(labels), rates, curve.threshold(far), chosen, curve)


def table(results: Sequence[Result]) -> str:
    """The results as aligned text, a line per test set."""
    names = list(dict.fromkeys(name for result in results for name in result.rates))
    lines = [["test", "images", *names, "threshold"]]
    for result in results:
        rates = [percent(result.rates[name]) if name in result.rates else "" for name in names]
        lines.append([result.name, f"{result.images:,}", *rates, f"{result.threshold:.4f}"])
    return aligned(lines)
