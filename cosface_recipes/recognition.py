"""Identities of image files, with an exported model: embeddings, a gallery of them, a decision."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cosface_recipes.data.detection import Detector, NoFaceError, load_detector, read_face
from cosface_recipes.data.images import (
    CorruptSampleError,
    image_files,
    is_image,
    read_image,
    visible_files,
    warn_of_others,
)
from cosface_recipes.data.names import identity
from cosface_recipes.data.transforms import evaluation_transform
from cosface_recipes.evaluation.features import load_features, save_features
from cosface_recipes.evaluation.verification import normalised
from cosface_recipes.export import Description, Embed, digest, load

BATCH = 64
FILES = (".npz", ".safetensors")


class Recognizer:
    """Embeddings of image files, with an exported model.

    Args:
        model: see `cosface_recipes.export.load`.
        detector: finds the face of a photograph; None takes images that are cut out and aligned already.
        strict: a photo that cannot be read or has no face raises; otherwise it is left out.

    Attributes:
        left_out: a sentence for each photo left out until now.
        digest: of the model; embeddings of another one cannot be compared.
    """

    def __init__(self, model: Path, detector: Detector | None = None, strict: bool = False):
        self.embed: Embed
        self.description: Description
        self.embed, self.description = load(model)
        self.digest = digest(model)
        self.transform = evaluation_transform(self.description.image_size)
        self.detector, self.strict = detector, strict
        self.left_out: list[str] = []

    def read(self, path: Path) -> Tensor | None:
        """(channels, size, size), or None where it is left out."""
        about = self.description
        try:
            if self.detector:
                return self.transform(read_face(path, about.color, about.image_size, self.detector))
            return self.transform(read_image(path, about.color))
        except (CorruptSampleError, NoFaceError) as error:
            if self.strict:
                raise
            self.left_out.append(str(error))
            return None

    def embeddings(self, paths: Sequence[Path]) -> tuple[Tensor, list[int]]:
        """(n, embedding_size), not normalised, of those photos that are not left out, and their positions.

        Raises:
            ValueError: one is not finite.
        """
        parts = [torch.empty(0, self.description.embedding_size)]
        kept: list[int] = []
        starts = range(0, len(paths), BATCH)
        for start in tqdm(starts, desc="embeddings", unit="batch", disable=len(starts) < 2):
            images = {i: self.read(paths[i]) for i in range(start, min(start + BATCH, len(paths)))}
            found = {i: image for i, image in images.items() if image is not None}
            if not found:
                continue
            batch = torch.stack([*found.values()])
            x = self.embed(batch)
            x = x + self.embed(batch.flip(-1)) if self.description.flip else x
            if not (finite := x.isfinite().all(1)).all():
                first = paths[[*found][int(finite.int().argmin())]]
                raise ValueError(f"The embedding of {first} is not finite: the weights of the model are damaged.")
            parts.append(x)
            kept += found
        return torch.cat(parts), kept

    def identity(self, path: Path) -> Tensor | None:
        """(embedding_size,) of length 1, of an image or of a folder of one identity; None if all are left out."""
        if not path.exists():
            raise FileNotFoundError(f"There is no photo {path}.")
        paths = image_files(path) if path.is_dir() else [path]
        if not paths:
            raise ValueError(f"The folder {path} has no images.")
        return self.mean(paths)

    def mean(self, paths: Sequence[Path]) -> Tensor | None:
        """(embedding_size,) of length 1, of the photos of one identity; None if all are left out."""
        embeddings, kept = self.embeddings(paths)
        return normalised(normalised(embeddings).mean(0, keepdim=True))[0] if kept else None

    def report(self, most: int = 20) -> str:
        """What was left out, a line each; empty if nothing was."""
        lines = [f"Left out {len(self.left_out)}:", *(f"  {sentence}" for sentence in self.left_out[:most])]
        lines += [f"  and {len(self.left_out) - most} more"] if len(self.left_out) > most else []
        return "\n".join(lines) if self.left_out else ""


@dataclass(frozen=True)
class Gallery:
    """Known identities.

    Attributes:
        names: one each; several embeddings may have the same.
        embeddings: (n, embedding_size) of length 1.
        model: the digest of the model that they are of.
    """

    names: list[str]
    embeddings: Tensor
    model: str

    def save(self, path: Path) -> None:
        """A file of features, .npz or .safetensors."""
        arrays = {
            "features": self.embeddings.numpy(),
            "names": np.array(self.names),
            "model": np.array([self.model]),
        }
        save_features(path, arrays)


def enroll(recognizer: Recognizer, folder: Path) -> Gallery:
    """A sub-folder of images per identity, or an image per identity, named after it.

    Raises:
        ValueError: there are none, two have the same name, or all images of all are left out.
    """
    if not folder.is_dir():
        raise ValueError(f"The gallery {folder} is neither a folder nor a file of {' or '.join(FILES)}.")
    visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    entries = [path for path in visible if path.is_dir() or is_image(path)]
    if not entries:
        raise ValueError(f"The gallery {folder} has no sub-folders and no images.")
    named: dict[str, Path] = {}
    for path in entries:
        name = identity(path.name if path.is_dir() else path.stem)
        if name in named:
            raise ValueError(f"The gallery {folder} has two entries {name}: {named[name].name} and {path.name}.")
        named[name] = path
    files = {name: visible_files(path) if path.is_dir() else [path] for name, path in named.items()}
    warn_of_others(folder, itertools.chain(set(visible) - set(entries), *files.values()))
    images = {name: [path for path in paths if is_image(path)] for name, paths in files.items()}
    recognizer.left_out += [
        f"The folder {named[name]} has no images." for name in sorted(named) if not images[name]
    ]
    found = {name: recognizer.mean(paths) for name, paths in images.items() if paths}
    known = {name: embedding for name, embedding in found.items() if embedding is not None}
    if not known:
        raise ValueError(
            f"None of the {len(named)} identities of {folder} has a usable photo. {recognizer.report()}"
        )
    return Gallery([*known], torch.stack([*known.values()]), recognizer.digest)


def open_gallery(recognizer: Recognizer, path: Path) -> Gallery:
    """A saved gallery or file of features, or a folder to be enrolled.

    Raises:
        ValueError: the file is of another model, or lacks names, one each.
    """
    if path.suffix not in FILES:
        return enroll(recognizer, path)
    arrays = load_features(path)
    if missing := [name for name in ("names", "model") if name not in arrays]:
        raise ValueError(
            f"{path} is no gallery, which enroll.py and embed.py write: it lacks {', '.join(missing)}."
        )
    features, names = arrays["features"], arrays["names"]
    expected = {
        "features": (len(names), recognizer.description.embedding_size),
        "names": names.shape[:1],
        "model": 1,
    }
    found = {"features": features.shape, "names": names.shape, "model": arrays["model"].size}
    if found != expected:
        raise ValueError(f"{path} is no gallery of this model: {found} should be {expected}.")
    model = str(arrays["model"].item())
    if model != recognizer.digest:
        raise ValueError(
            f"The gallery {path} is of another model: its digest is {model}, and that of this one is "
            f"{recognizer.digest}. Enroll its photos again."
        )
    return Gallery(names.tolist(), normalised(torch.from_numpy(features)), model)


def decision(cosine: float, threshold: float | None, description: Description) -> str:
    reason = "as given"
    if threshold is None:
        threshold, reason = description.threshold, description.chosen_on
    if threshold is None:
        return "no decision: the model was exported without a threshold; --threshold gives one"
    verdict = "same identity" if cosine > threshold else "different identities"
    return f"{verdict}: threshold {threshold:.4f} ({reason})"


def cosine(text: str) -> float:
    """A number of the command line, from -1 to 1: beside a NaN all would be different identities."""
    if not -1 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"a cosine must be from -1 to 1, got {text}")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes that embeds photos; `open_recognizer` reads it."""
    parser.add_argument("model", type=Path, help="output folder of a training, or its .onnx or .safetensors file")
    parser.add_argument(
        "--detector",
        metavar="PACKAGE:FUNCTION",
        help="finds the face in a photo (cosface_recipes/data/detection.py); default: images are aligned already",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse a photo without a face, and do not leave it out"
    )


def open_recognizer(args: argparse.Namespace) -> Recognizer:
    detector = None if args.detector is None else load_detector(args.detector)
    return Recognizer(args.model, detector, args.strict)
