"""The images of a protocol's data set, embedded: the arrays that the protocol is computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cosface_recipes.data.alignment import align
from cosface_recipes.data.image_datasets import ImageDataset, ImageFiles, ImageFolder
from cosface_recipes.data.images import image_files
from cosface_recipes.data.pairs import index_pairs, open_bin, open_pairs, read_pairs
from cosface_recipes.data.transforms import evaluation_transform
from cosface_recipes.evaluation.verification import Flip, embed

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Embedder:
    """A network, and how it sees images.

    Attributes:
        network: (n, channels, size, size) in [-1, 1] -> (n, D).
        size: pixels of the sides of an image.
        color: "rgb" or "gray".
        flip: see `embed`.
    """

    network: Callable[[Tensor], Tensor]
    size: int
    color: str
    flip: Flip = "sum"
    batch_size: int = 128
    workers: int = 0

    @property
    def options(self) -> dict[str, object]:
        """Of the data sets."""
        return {"transform": evaluation_transform(self.size), "color": self.color}

    def __call__(self, images: ImageDataset) -> np.ndarray:
        """(n, D) float32, in the order of the images."""
        batches = DataLoader(images, self.batch_size, num_workers=self.workers)
        return embed(self.network, tqdm(batches, desc="embeddings", unit="batch"), self.flip)[0].numpy()


class AlignedFaces(ImageFiles):
    """Faces cut out of photographs.

    Attributes:
        landmarks: (n, 5, 2).
        side: pixels of the result's sides.
    """

    landmarks: np.ndarray
    side: int

    def load(self, index: int) -> tuple[Image.Image, int]:
        image, label = super().load(index)
        return align(image, self.landmarks[index], self.side), label


def collect_lfw(embedder: Embedder, folder: Path, pairs: Path) -> Arrays:
    dataset = open_pairs(folder, pairs, **embedder.options)
    return {"features": embedder(dataset), "pairs": dataset.pairs.numpy(), "same": dataset.same.numpy()}


def collect_bin(embedder: Embedder, path: Path) -> Arrays:
    dataset = open_bin(path, **embedder.options)
    return {"features": embedder(dataset), "same": dataset.same.numpy()}


def collect_ytf(embedder: Embedder, folder: Path, splits: Path) -> Arrays:
    videos, pairs, same = index_pairs(read_pairs(splits))
    frames = {video: image_files(folder / video) for video in videos}
    if empty := [video for video, paths in frames.items() if not paths]:
        raise FileNotFoundError(
            f"{len(empty)} of the {len(videos)} videos have no frames, {folder / empty[0]} first."
        )
    sources = [path for paths in frames.values() for path in paths]
    labels = torch.arange(len(videos)).repeat_interleave(torch.tensor([*map(len, frames.values())]))
    dataset = ImageFiles(sources, [*map(str, sources)], labels, **embedder.options)
    return {"features": embedder(dataset), "videos": labels.numpy(), "pairs": pairs.numpy(), "same": same.numpy()}


def collect_ijb(embedder: Embedder, folder: Path, target: str) -> Arrays:
    names, numbers = read_table(folder / "meta" / f"{target}_name_5pts_score.txt", 12)
    dataset = AlignedFaces([folder / "loose_crop" / name for name in names], names, **embedder.options)
    dataset.landmarks, dataset.side = numbers[:, :10].reshape(-1, 5, 2), embedder.size
    return {"features": embedder(dataset), **read_ijb(folder, target)}


def collect_identities(embedder: Embedder, folder: Path) -> Arrays:
    """MegaFace's probes: one sub-folder per identity."""
    dataset = ImageFolder(folder, **embedder.options)
    return {"features": embedder(dataset), "labels": dataset.labels.numpy(), "names": np.array(dataset.keys)}


def collect_images(embedder: Embedder, folder: Path) -> Arrays:
    """MegaFace's distractors: all images below a folder."""
    paths = image_files(folder)
    if not paths:
        raise ValueError(f"The folder {folder} has no images.")
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {"features": embedder(ImageFiles(paths, names, **embedder.options)), "names": np.array(names)}


def read_ijb(folder: Path, target: str) -> Arrays:
    """What IJB's files say of images (templates, media, scores) and of pairs of templates (pairs, same)."""
    _, faces = read_table(folder / "meta" / f"{target}_face_tid_mid.txt", 3)
    _, points = read_table(folder / "meta" / f"{target}_name_5pts_score.txt", 12)
    pairs = np.loadtxt(folder / "meta" / f"{target}_template_pair_label.txt", np.int64, ndmin=2)
    templates, media = faces.astype(np.int64).T
    scores = points[:, -1].astype(np.float32)
    return {
        "templates": templates,
        "media": media,
        "scores": scores,
        "pairs": pairs[:, :2],
        "same": pairs[:, 2] == 1,
    }


def read_table(path: Path, columns: int) -> tuple[list[str], np.ndarray]:
    """Names and (n, columns - 1) numbers of a text file with a name in the first column."""
    names, rows = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        name, *numbers = line.split()
        try:
            rows.append([float(number) for number in numbers])
        except ValueError:
            rows.append([])
        if len(rows[-1]) != columns - 1:
            raise ValueError(f"The line {line!r} of {path} should have a name and {columns - 1} numbers.")
        names.append(name)
    return names, np.array(rows)
