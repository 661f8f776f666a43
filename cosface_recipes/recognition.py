"""Identities of image files, with an exported model: unit embeddings, a gallery of them, a decision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cosface_recipes.data.images import SUFFIXES, image_files, read_image
from cosface_recipes.data.transforms import evaluation_transform
from cosface_recipes.export import Description, Embed, load

BATCH = 64


class Recognizer:
    """Unit embeddings of image files, with an exported model."""

    def __init__(self, model: Path):
        self.embed: Embed
        self.description: Description
        self.embed, self.description = load(model)
        self.transform = evaluation_transform(self.description.image_size)

    def images(self, paths: Sequence[Path]) -> Tensor:
        """(n, embedding_size)."""
        parts, color = [], self.description.color
        for start in range(0, len(paths), BATCH):
            batch = torch.stack([self.transform(read_image(path, color)) for path in paths[start : start + BATCH]])
            x = self.embed(batch)
            parts.append(x + self.embed(batch.flip(-1)) if self.description.flip else x)
        return F.normalize(torch.cat(parts))

    def identity(self, path: Path) -> Tensor:
        """(embedding_size,) of one image, or of a folder of images of one identity."""
        paths = image_files(path) if path.is_dir() else [path]
        if not paths:
            raise ValueError(f"The folder {path} has no images.")
        return F.normalize(self.images(paths).mean(0), dim=0)


def enroll(recognizer: Recognizer, gallery: Path) -> tuple[list[str], Tensor]:
    """Names, and one unit embedding each, (identities, embedding_size)."""
    if not gallery.is_dir():
        raise ValueError(f"The gallery {gallery} does not exist or is not a folder.")
    entries = [path for path in sorted(gallery.iterdir()) if path.is_dir() or path.suffix.lower() in SUFFIXES]
    if not entries:
        raise ValueError(f"The gallery {gallery} has no sub-folders and no images.")
    names = [path.name if path.is_dir() else path.stem for path in entries]
    return names, torch.stack([recognizer.identity(path) for path in entries])


def decision(cosine: float, threshold: float | None, description: Description) -> str:
    reason = "as given"
    if threshold is None:
        threshold, reason = description.threshold, description.chosen_on
    if threshold is None:
        return "no decision: the model was exported without a threshold; --threshold gives one"
    verdict = "same identity" if cosine > threshold else "different identities"
    return f"{verdict}: threshold {threshold:.4f} ({reason})"
