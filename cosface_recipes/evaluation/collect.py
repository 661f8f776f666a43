"""The images of a protocol's data set, embedded: the arrays that the protocol is computed from."""

from __future__ import annotations

import csv
import itertools
import math
import warnings
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
from cosface_recipes.data.names import below
from cosface_recipes.data.pairs import index_pairs, open_bin, open_pairs, read_pairs
from cosface_recipes.data.transforms import evaluation_transform
from cosface_recipes.evaluation.features import reading
from cosface_recipes.evaluation.verification import Flip, embed

Arrays = dict[str, np.ndarray]

DISTRACTOR = -100  # TinyFace, and the label of its people without a name


@dataclass(frozen=True)
class Embedder:
    """A network, and how it sees images.

    Attributes:
        network: (n, channels, size, size) in [-1, 1] -> (n, D).
        size: pixels of the sides of an image.
        color: "rgb" or "gray".
        flip: see `embed`.
        workers: processes that read images; 0: this process.
        device: of the network.
        on_corrupt: see `ImageDataset`; of data sets without pairs.
        progress: whether a bar shows it.
        digest: of the network, as `cosface_recipes.export.digest` has it; "" if none is known.
    """

    network: Callable[[Tensor], Tensor]
    size: int
    color: str
    flip: Flip = "sum"
    batch_size: int = 256
    workers: int = 0
    device: torch.device | str = "cpu"
    on_corrupt: str = "raise"
    progress: bool = True
    digest: str = ""

    @property
    def options(self) -> dict[str, object]:
        """Of the data sets."""
        return {"transform": evaluation_transform(self.size), "color": self.color}

    def embed(self, images: ImageDataset) -> tuple[Tensor, Tensor]:
        """(n, D) float32 and (n,) labels, in the order of the images, without the corrupt that were skipped."""
        batches = DataLoader(images, self.batch_size, num_workers=self.workers)
        shown = tqdm(batches, desc="embeddings", unit="batch", disable=not self.progress)
        embeddings, labels = embed(self.network, shown, self.flip, self.device)
        if not (corrupt := set(images.corrupt)):
            return embeddings, labels
        # The data set gave the next image in place of each: beside itself, that is a genuine pair of cosine 1.
        kept = torch.tensor([key not in corrupt for key in images.keys])
        return embeddings[kept], labels[kept]

    def __call__(self, images: ImageDataset) -> Arrays:
        """The array `features` and, if it is known, `model`, which says of which network they are."""
        model = {"model": np.array([self.digest])} if self.digest else {}
        return {"features": self.embed(images)[0].numpy()} | model


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
    return embedder(dataset) | {"pairs": dataset.pairs.numpy(), "same": dataset.same.numpy()}


def collect_bin(embedder: Embedder, path: Path) -> Arrays:
    dataset = open_bin(path, **embedder.options)
    return embedder(dataset) | {"same": dataset.same.numpy()}


def collect_ytf(embedder: Embedder, folder: Path, splits: Path) -> Arrays:
    videos, pairs, same = index_pairs(read_pairs(splits))
    frames = {video: image_files(below(folder, video)) for video in videos}
    if empty := [video for video, paths in frames.items() if not paths]:
        raise FileNotFoundError(
            f"{len(empty)} of the {len(videos)} videos have no frames, {folder / empty[0]} first."
        )
    sources = [path for paths in frames.values() for path in paths]
    labels = torch.arange(len(videos)).repeat_interleave(torch.tensor([*map(len, frames.values())]))
    dataset = ImageFiles(sources, [*map(str, sources)], labels, **embedder.options)
    return embedder(dataset) | {"videos": labels.numpy(), "pairs": pairs.numpy(), "same": same.numpy()}


def collect_ijb(embedder: Embedder, folder: Path, target: str) -> Arrays:
    """The features of IJB's images, and what `read_ijb` says of them."""
    about = read_ijb(folder, target)
    names, numbers = read_table(folder / "meta" / f"{target}_name_5pts_score.txt", 12)
    dataset = AlignedFaces([below(folder / "loose_crop", name) for name in names], names, **embedder.options)
    dataset.landmarks, dataset.side = numbers[:, :10].reshape(-1, 5, 2), embedder.size
    return embedder(dataset) | about


def collect_identities(embedder: Embedder, folder: Path) -> Arrays:
    """MegaFace's probes: one sub-folder per identity."""
    dataset = ImageFolder(folder, **embedder.options)
    return embedder(dataset) | {"labels": dataset.labels.numpy(), "names": np.array(dataset.keys)}


def collect_images(embedder: Embedder, folder: Path) -> Arrays:
    """MegaFace's distractors: all images below a folder."""
    paths = image_files(folder)
    if not paths:
        raise ValueError(f"The folder {folder} has no images.")
    names = [path.relative_to(folder).as_posix() for path in paths]
    return embedder(ImageFiles(paths, names, **embedder.options)) | {"names": np.array(names)}


def collect_tinyface(embedder: Embedder, folder: Path) -> Arrays:
    """TinyFace's probes, gallery and distractors, one after the other; the distractors have the label -100.

    The folder has Probe, Gallery_Match, Gallery_Distractor and the two .mat files that name the images of the
    first two and their identities; or a sub-folder Testing_Set that has them.
    """
    folder = folder / "Testing_Set" if (folder / "Testing_Set").is_dir() else folder
    probes, probe_ids = read_tinyface(folder / "probe_img_ID_pairs.mat", "probe")
    gallery, gallery_ids = read_tinyface(folder / "gallery_match_img_ID_pairs.mat", "gallery")
    paths = [below(folder / "Probe", name) for name in probes]
    paths += [below(folder / "Gallery_Match", name) for name in gallery]
    distractors = image_files(folder / "Gallery_Distractor")
    if not distractors:
        raise ValueError(f"The folder {folder / 'Gallery_Distractor'} has no images.")
    paths += distractors
    names = [path.relative_to(folder).as_posix() for path in paths]
    return embedder(ImageFiles(paths, names, **embedder.options)) | {
        "labels": np.concatenate([probe_ids, gallery_ids, np.full(len(distractors), DISTRACTOR)]),
        "probe": np.arange(len(paths)) < len(probes),
        "names": np.array(names),
    }


def read_tinyface(path: Path, kind: str) -> tuple[list[str], np.ndarray]:
    """The names of images and (n,) their identities, from one of TinyFace's .mat files.

    Args:
        kind: "probe" or "gallery", as the file's arrays KIND_set and KIND_ids are named.
    """
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Reading {path} needs SciPy: pip install scipy.") from error
    names, ids = f"{kind}_set", f"{kind}_ids"
    with reading(path, "a MATLAB file") as file:
        arrays = loadmat(file, variable_names=(names, ids))
    if names not in arrays or ids not in arrays or arrays[names].size != arrays[ids].size:
        raise ValueError(f"{path} should have as many names {names} as identities {ids}.")
    # A cell of MATLAB is an array of objects, each an array with one text.
    cells = [np.asarray(cell).ravel().tolist() for cell in arrays[names].ravel()]
    if odd := [i for i, cell in enumerate(cells) if len(cell) != 1 or not isinstance(cell[0], str)]:
        raise ValueError(
            f"Name {odd[0]} of the {len(cells)} in {names} of {path} is no text, but {cells[odd[0]]}."
        )
    if arrays[ids].dtype.kind not in "iu":
        raise ValueError(f"The identities {ids} of {path} should be whole numbers, got {arrays[ids].dtype}.")
    numbers = arrays[ids].ravel().astype(np.int64)
    if DISTRACTOR in numbers:
        raise ValueError(f"The identities {ids} of {path} have {DISTRACTOR}, the label of distractors.")
    return [cell[0] for cell in cells], numbers


def read_ijb(folder: Path, target: str) -> Arrays:
    """What IJB's files say of images: templates, media, scores, each (images,).

    Raises:
        ValueError: a line is not in the format, or the files do not name the same images in the same order.
    """
    paths = [folder / "meta" / f"{target}_{what}.txt" for what in ("face_tid_mid", "name_5pts_score")]
    (names, faces), (others, points) = read_table(paths[0], 3, np.int64), read_table(paths[1], 12)
    for i, (name, other) in enumerate(itertools.zip_longest(names, others), 1):
        if name != other:
            raise ValueError(
                f"Image {i} of {paths[0]} is {name or 'missing'}, and that of {paths[1]} {other or 'missing'}: "
                "both files should name the same images in the same order."
            )
    templates, media = faces.T
    return {"templates": templates, "media": media, "scores": points[:, -1].astype(np.float32)}


def read_ijb_pairs(folder: Path, target: str) -> Arrays:
    """What is verified: pairs (n, 2) of templates, and same (n,)."""
    path = folder / "meta" / f"{target}_template_pair_label.txt"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of no lines
            pairs = np.loadtxt(path, np.int64, ndmin=2)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} should have two templates and a label in every line: {error}") from error
    if len(pairs) == 0 or pairs.shape[1] != 3:
        raise ValueError(
            f"{path} should have two templates and a label in every line, got {len(pairs)} lines of "
            f"{pairs.shape[1] if len(pairs) else 'any'} numbers."
        )
    if (odd := (pairs[:, 2] != 0) & (pairs[:, 2] != 1)).any():
        row = odd.argmax()
        raise ValueError(f"Pair {row + 1} of {path} has the label {pairs[row, 2]}, which should be 0 or 1.")
    return {"pairs": pairs[:, :2], "same": pairs[:, 2] == 1}


def read_ijb_searches(folder: Path, target: str) -> Arrays:
    """What is identified: gallery_1, gallery_2 and probes, each (n, 2) of templates and their subjects.

    The galleries are called G1 and G2 by IJB-C, S1 and S2 by IJB-B.
    """
    meta, arrays = folder / "meta", {}
    for number in (1, 2):
        found = [path for letter in "GS" if (path := meta / f"{target}_1N_gallery_{letter}{number}.csv").is_file()]
        if not found:
            raise FileNotFoundError(f"{meta} has neither {target}_1N_gallery_G{number}.csv nor ..._S{number}.csv.")
        arrays[f"gallery_{number}"] = read_subjects(found[0])
    arrays["probes"] = read_subjects(meta / f"{target}_1N_probe_mixed.csv")
    return arrays | check_searches(arrays, str(meta))


def read_subjects(path: Path) -> np.ndarray:
    """(rows, 2) templates and their subjects: the first two columns of a .csv file with titles, a row an image."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            titles, *rows = [row[:2] for row in csv.reader(file) if row] or [[]]
        kinds = [kind in title.lower() for kind, title in zip(("template", "subject"), titles, strict=False)]
        if kinds != [True, True]:
            raise ValueError(f"the titles should begin with TEMPLATE_ID,SUBJECT_ID, got {','.join(titles)!r}")
        subjects = np.array(rows, np.int64).reshape(-1, 2)
    except (ValueError, OverflowError, csv.Error) as error:
        raise ValueError(
            f"Lines of {path} should begin with two numbers, template and subject, below titles: {error}"
        ) from error
    if len(subjects) == 0:
        raise ValueError(f"{path} has no line below its titles.")
    return subjects


def check_searches(arrays: Arrays, source: str) -> Arrays:
    """gallery_1, gallery_2 and probes with each template once, ascending.

    Raises:
        ValueError: a template is of more than one subject, or a subject in both galleries.
    """
    found = {name: np.unique(arrays[name], axis=0) for name in ("gallery_1", "gallery_2", "probes")}
    for name, subjects in found.items():
        if (twice := subjects[1:, 0] == subjects[:-1, 0]).any():
            template = subjects[1:, 0][twice][0]
            raise ValueError(f"Template {template} of {name} in {source} is of more than one subject.")
    if len(shared := np.intersect1d(found["gallery_1"][:, 1], found["gallery_2"][:, 1])):
        raise ValueError(
            f"Subject {shared[0]} is in both galleries of {source}. They should share none, so that probes of one "
            "are non-mated in the other."
        )
    return found


def read_table(
    path: Path, columns: int, kind: type[float] | type[np.int64] = float
) -> tuple[list[str], np.ndarray]:
    """Names and (n, columns - 1) finite numbers of a text file with a name in the first column."""
    names, rows = [], []
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    for line in lines:
        name, *numbers = line.split()
        try:
            rows.append([kind(number) for number in numbers])
        except (ValueError, OverflowError):
            rows.append([])
        if len(rows[-1]) != columns - 1 or not all(map(math.isfinite, rows[-1])):
            whole = "whole " if kind is np.int64 else ""
            raise ValueError(f"The line {line!r} of {path} should have a name and {columns - 1} {whole}numbers.")
        names.append(name)
    if not names:
        raise ValueError(f"{path} has no line.")
    return names, np.array(rows)
