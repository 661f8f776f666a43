"""Verification of a network on the test data of a training, and the threshold with which it decides."""

from __future__ import annotations

import dataclasses
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
    paths = [*map(Path, config.test)]
    return [verify(embedder, path, config.far, name) for path, name in zip(paths, told_apart(paths), strict=True)]


def told_apart(paths: Sequence[Path]) -> list[str]:
    """What test sets are called: their folders, their files without the suffix, and as much before as differs.

    >>> told_apart([Path("lfw.bin"), Path("a/agedb.bin"), Path("b/agedb.bin")])
    ['lfw', 'a/agedb.bin', 'b/agedb.bin']
    """
    whole = [path.absolute() for path in paths]
    names = [path.name if path.is_dir() else path.stem for path in whole]
    for length in range(1, max((len(path.parts) for path in whole), default=0)):
        names = [
            name if names.count(name) == 1 else "/".join(path.parts[-length:])
            for name, path in zip(names, whole, strict=True)
        ]
    return names


def check(config: Config, train: ImageDataset) -> None:
    """Reads every image of the test sets, and raises what `evaluate` would after hours of training."""
    if train.num_classes < 2:
        raise ValueError(
            f"A training needs two identities to tell apart, got {train.num_classes} in {config.train}."
        )
    if missing := [path for path in config.test if not Path(path).exists()]:
        raise FileNotFoundError(f"There is no test data {', '.join(missing)}.")
    embedder = embedder_of(lambda images: images.new_empty(len(images), 0), config, torch.device("cpu"))
    for path in config.test:
        try:
            data = open_test(embedder, Path(path))
            labels = embedder.embed(data)[1]
            warn_of_shared(config.train, train, path, data)
            if isinstance(data, PairedImages):
                split(data.same.numpy())
            else:
                check_kinds(labels)
        except ValueError as error:
            raise ValueError(f"The test data {path} cannot be used: {error}") from error


def warn_of_shared(train_path: str, train: ImageDataset, path: str, test: ImageDataset) -> None:
    """A warning of test data that the training sees. Names of digits are numbers, which every data set has."""
    of_train, of_test = ({*getattr(data, "identities", ())} for data in (train, test))
    shared = sorted(name for name in of_train & of_test if not name.isdecimal())
    if Path(train_path).resolve() == Path(path).resolve():
        what = "is the training data"
    elif shared:
        what = f"has {len(shared)} identities that {train_path} has too, {shared[0]!r} first"
    else:
        return
    warnings.warn(
        f"The test data {path} {what}: what is measured there, and the threshold, say little of people that the "
        "network has not seen.",
        stacklevel=2,
    )


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


def verify(embedder: Embedder, path: Path, far: float, name: str = "") -> Result:
    """A test set: ten-fold accuracy of a .bin file, all pairs of a folder of identities or a .rec file.

    Args:
        name: of the result; by default the path's.
    """
    data = open_test(embedder, path)
    if isinstance(data, PairedImages):
        result = verify_pairs(embedder, path, data)
    else:
        result = compare_pairs(path.name, *embedder.embed(data), far, embedder.device)
    return dataclasses.replace(result, name=name or told_apart([path])[0])


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
