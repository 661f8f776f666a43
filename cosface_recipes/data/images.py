"""Image files: which there are, how they are decoded, and a folder of them held in memory."""

from __future__ import annotations

import functools
import io
import itertools
import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from cosface_recipes.data.names import identity

log = logging.getLogger(__name__)

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")  # none that Pillow hands to another program
MODES = {"gray": "L", "rgb": "RGB"}
BETWEEN = {"LAB": "RGB", "La": "LA"}  # the one mode that Pillow converts these to
# How an image is turned upright, by its EXIF orientation (Exif 2.32, tag 0x0112), as OpenCV turns it.
UPRIGHT: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on bytes that are not an image, apart from its own errors, which are OSErrors.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
KINDS = f"Images are files that end in {', '.join(sorted(SUFFIXES))}; convert others, such as .heic, first."


class CorruptSampleError(ValueError):
    """A sample that cannot be read; the message has its key."""

    def __init__(self, message: str):
        # A DataLoader makes a worker's error again, of its traceback, at whose end the message stands.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


def visible_files(folder: Path) -> list[Path]:
    """The files below a folder, in the order of their paths, without hidden ones; links are followed.

    A system leaves hidden files beside images, macOS one of the same suffix beside each (._1.jpg). A folder that
    several links lead to is entered once, and none above this one. A link that leads nowhere is a file, one that
    cannot be read.
    """
    found: list[Path] = []
    entered = {str(path) for path in folder.resolve().parents}
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.is_file() or not path.exists()]
    return sorted(found)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def image_files(folder: Path) -> list[Path]:
    """The images below a folder, in the order of their paths; hidden files are none, and others are warned of."""
    found = visible_files(folder)
    warn_of_others(folder, found)
    return [path for path in found if is_image(path)]


def warn_of_others(folder: Path, files: Iterable[Path]) -> None:
    """A warning of those that are no images, by their suffixes."""
    kinds = Counter(path.suffix.lower() or path.name for path in files if not is_image(path))
    if kinds:
        others = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        warn_once(f"Files in {folder} that are left out: {others}. {KINDS}")


def identity_files(folder: Path) -> dict[str, list[Path]]:
    """The images below each sub-folder that has any, by its name, in the order of the names.

    What is left out is logged as a warning: files of other kinds, links that lead nowhere, and sub-folders that
    have no images.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: two sub-folders have one name, which Unicode writes in several ways.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"The image folder {folder} does not exist or is not a folder.")
    visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    subfolders = sorted((identity(path.name), path) for path in visible if path.is_dir())
    if twice := [name for name, count in Counter(name for name, _ in subfolders).items() if count > 1]:
        raise ValueError(
            f"The image folder {folder} has two sub-folders {twice[0]!r}, whose names Unicode writes in two ways: "
            "move the images of one to the other."
        )
    found = {name: visible_files(path) for name, path in subfolders}
    files = {name: [path for path in paths if is_image(path)] for name, paths in found.items()}
    warn_of_others(folder, itertools.chain(*found.values()))
    if nowhere := [path.name for path in visible if not path.exists()]:
        warn_once(f"{len(nowhere)} links in {folder} lead nowhere, {nowhere[0]!r} first.")
    if empty := [name for name, paths in files.items() if not paths]:
        warn_once(f"{len(empty)} of the {len(files)} sub-folders of {folder} have no images, {empty[0]!r} first.")
    return {name: paths for name, paths in files.items() if paths}


@functools.cache
def warn_once(text: str) -> None:
    """A test set is opened after every epoch."""
    log.warning(text)


def decode(data: bytes | Path, color: str = "rgb") -> Image.Image:
    """A JPEG, PNG, WebP, BMP, PPM or TIFF image, in memory or in a file, upright by its EXIF orientation.

    Of integers of more than 8 bits, as in a 16-bit PNG, the upper 8 of 16 count; transparency is dropped.

    Args:
        color: "rgb" or "gray".

    Raises:
        One of UNREADABLE: it is something else, damaged, or of floating-point numbers.
    """
    source = data if isinstance(data, Path) else io.BytesIO(data)
    try:
        opened = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:  # which shows the address of a BytesIO
        raise UnidentifiedImageError(f"it is none of {', '.join(FORMATS)}") from error
    with opened as image:
        image.load()  # turns a TIFF upright, and then removes the orientation
        method = UPRIGHT.get(orientation(image))
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers; which one is white, only their writer knows")
        eight_bits = upper_byte(image) if image.mode.startswith("I") else image
        between = BETWEEN.get(image.mode)
        converted = (eight_bits.convert(between) if between else eight_bits).convert(MODES[color])
    return converted if method is None else converted.transpose(method)


def orientation(image: Image.Image) -> object:
    """The EXIF orientation; 1, which is upright, where there is none or it is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*UNREADABLE, KeyError, TypeError):
        return 1


def upper_byte(image: Image.Image) -> Image.Image:
    """Pillow's own conversion makes white of all above 255."""
    return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


def read_image(path: Path, color: str) -> Image.Image:
    """An image file; raises CorruptSampleError with its path where it cannot be read."""
    try:
        return decode(path, color)
    except UNREADABLE as error:
        raise CorruptSampleError(f"The image {path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Images:
    """Images of identities, all of one size."""

    pixels: Tensor  # (n, channels, height, width) uint8
    labels: Tensor  # (n,) int64, in [0, len(identities))
    identities: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def load_folder(folder: Path, *, size: int, color: str, test_fraction: float) -> tuple[Images, Images]:
    """Load a folder with one sub-folder of images per identity, and hold identities out for the test.

    Of the identities with two images or more, in the order of their names, every k-th is held out, with
    k = round(1 / test_fraction): whole identities, so that the test verifies people never seen in training.
    An identity with one image has no genuine pair to test and stays in training.

    Args:
        folder: e.g. FOLDER/alice/1.png, FOLDER/alice/2.png, FOLDER/bob/1.jpg.
        size: images are resized to size x size pixels.
        color: "gray" or "rgb".
        test_fraction: share of identities held out, in (0, 0.5].

    Returns:
        train and test images, each with labels counted from 0.

    Raises:
        ValueError: an option is out of range, the folder holds too few identities, or an image cannot be read;
            the message shows which.
        FileNotFoundError: there is no such folder.
    """
    if size < 8:
        raise ValueError(f"image_size must be at least 8, got {size}.")
    if not 0 < test_fraction <= 0.5:
        raise ValueError(f"test_fraction must be above 0 and at most 0.5, got {test_fraction}.")
    files = identity_files(folder)
    candidates = [name for name, paths in files.items() if len(paths) >= 2]
    step = max(2, round(1 / test_fraction))
    held_out = set(candidates[step - 1 :: step])
    training = [name for name in files if name not in held_out]
    if len(held_out) < 2 or len(training) < 2:
        raise ValueError(
            f"The image folder {folder} has {len(files)} identities (sub-folders with images), "
            f"{len(candidates)} of them with two images or more; a test fraction of {test_fraction:g} needs "
            f"at least {2 * step} of the latter, so that two can be held out and two are left to train on."
        )

    def load(names: list[str]) -> Images:
        images = (read_image(path, color) for name in names for path in files[name])
        resized = (image.resize((size, size), Image.Resampling.BILINEAR) for image in images)
        pixels = [np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1) for image in resized]
        labels = [label for label, name in enumerate(names) for _ in files[name]]
        return Images(torch.from_numpy(np.stack(pixels)), torch.tensor(labels), names)

    return load(training), load(sorted(held_out))
