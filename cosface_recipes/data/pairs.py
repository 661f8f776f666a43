"""Sets of image pairs for verification: insightface's .bin files, LFW's pairs.txt, and lists of pairs."""

from __future__ import annotations

import itertools
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosface_recipes.data.image_datasets import ImageFiles
from cosface_recipes.data.images import SUFFIXES
from cosface_recipes.data.names import below
from cosface_recipes.data.plain_pickle import Array, PickleError, read_pickle

FOLDS = 10


class PairedImages(ImageFiles):
    """Samples (transform(PIL image), index), and the pairs of them that are to be told apart.

    Attributes:
        pairs: (n, 2) int64, indices of samples.
        same: (n,) bool, whether a pair is of one identity.
    """

    pairs: Tensor
    same: Tensor
    advice = "Mend it: an image of a pair cannot be left out."


def read_bin(path: str | Path) -> tuple[list[bytes | np.ndarray], np.ndarray]:
    """The encoded images of a .bin file, and whether images 2i and 2i + 1 are of one identity.

    The file is a pickle (images, same), written by Python 2 or 3 (insightface, recognition/arcface_torch/eval/
    verification.py). Nothing in it is executed; see plain_pickle.py.

    Returns:
        2n images, each bytes or an array of uint8, and (n,) bool.

    Raises:
        PickleError: the file is damaged, or holds anything else.
    """
    content = read_pickle(path)
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise PickleError(
            f"{path} should hold a pair, of images and of booleans, and holds a {type(content).__name__}."
        )
    images, same = content
    if isinstance(same, Array) and same.value is not None and same.value.dtype == np.bool_:
        same = same.value.tolist()
    if not isinstance(same, list) or not all(isinstance(item, bool) for item in same):
        raise PickleError(f"The second half of {path} should be a list of booleans, one per pair.")
    if not isinstance(images, list) or len(images) != 2 * len(same):
        count = f"{len(images)} images" if isinstance(images, list) else "no list of images"
        raise PickleError(f"{path} has {count} for {len(same)} pairs.")
    return [_encoded(path, i, image) for i, image in enumerate(images)], np.array(same, np.bool_)


def _encoded(path: str | Path, i: int, image: object) -> bytes | np.ndarray:
    data = image.value if isinstance(image, Array) else image
    if isinstance(data, bytes) or (isinstance(data, np.ndarray) and data.dtype == np.uint8):
        return data
    raise PickleError(f"Image {i} of {path} is neither bytes nor an array of uint8.")


def write_bin(path: str | Path, images: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write encoded images, two per pair, as insightface's Python 3 code reads them."""
    if len(images) != 2 * len(same):
        raise ValueError(f"{len(same)} pairs take {2 * len(same)} images, got {len(images)}.")
    with open(path, "wb") as file:
        pickle.dump(([bytes(image) for image in images], [bool(item) for item in same]), file, protocol=4)


def read_pairs(path: str | Path) -> list[tuple[str, str, bool]]:
    """Names of two images or videos, and whether they are of one identity, for each line of a text file.

    Five formats, told apart by the first line (RFW's also by a line of four fields or one that ends in 2 or more,
    YTF's by a line that begins with the number of a split):

        10 <TAB> 300                     LFW's pairs.txt; then "name i j" and "name i other j", for name/name_0001,
                                         ten times 300 of each; a single number stands for one time
        name <TAB> i <TAB> j             RFW's lists, which are LFW's without the first line
        name.jpg 1                       CPLFW's and CALFW's: two such lines a pair, of one identity unless 0;
                                         put in the order of ten folds, a tenth of both kinds each
        split number, first name, ...    YTF's splits.txt; then "split, first, second, same", sorted by split
        anything else                    "first second same" on every line, with same 0 or 1; two tabs
                                         separate names that have spaces

    Raises:
        ValueError: a line is not in the format, and the message shows it; there are none; another number of them
            than the first line of LFW's says; or splits of YTF's that are no ten folds.
    """
    lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    first = lines[0].split() if lines else []
    if first and all(field.isdecimal() for field in first) and len(first) <= 2:
        parse, lines = _lfw_pair, lines[1:]
        if len(lines) != (expected := 2 * math.prod(map(int, first))):
            raise ValueError(
                f"{path} begins with {' '.join(first)}, for {expected:,} pairs, but {len(lines):,} lines follow."
            )
    elif lines and re.search(r"\s\d+\s.*\d$", lines[0].strip()) and any(map(_is_rfw, lines)):
        parse = _lfw_pair
    elif len(first) == 2 and first[1].isdecimal():
        return _paired_lines(path, lines)
    elif lines and "," in lines[0] and any(_split(line) >= 0 for line in lines):
        titles = not any(field.strip().isdecimal() for field in lines[0].split(","))
        parse, lines = _ytf_pair, sorted(lines[titles:], key=_split)
    else:
        parse = _plain_pair
    pairs = []
    for line in lines:
        try:
            pairs.append(parse(line))
        except (ValueError, KeyError):
            raise ValueError(f"The line {line!r} of {path} is no pair.") from None
    if not pairs:
        raise ValueError(f"{path} has no pairs.")
    if parse is _ytf_pair:
        _check_splits(path, Counter(map(_split, lines)))
    return pairs


def _fields(line: str) -> list[str]:
    return line.strip().split("\t") if "\t" in line else line.split()


def _is_rfw(line: str) -> bool:
    fields = _fields(line)
    return len(fields) == 4 or (all(field.isdecimal() for field in fields[-2:]) and int(fields[-1]) > 1)


def _split(line: str) -> int:
    """The number that a line of YTF's begins with; -1 where there is none."""
    number, comma, _ = line.partition(",")
    return int(number) if comma and number.strip().isdecimal() else -1


def _lfw_pair(line: str) -> tuple[str, str, bool]:
    fields = _fields(line)
    name, i, *other, j = fields
    second = other[0] if len(fields) == 4 else name
    if len(fields) > 4:
        raise ValueError
    return f"{name}/{name}_{int(i):04}", f"{second}/{second}_{int(j):04}", len(fields) == 3


def _paired_lines(path: str | Path, lines: list[str]) -> list[tuple[str, str, bool]]:
    """CPLFW and CALFW list all genuine pairs first; a fold is a tenth of these and of the others (FaceX-Zoo,
    test_protocol/lfw/pairs_parser.py).

    Where a pair is genuine, CPLFW has a 1 and CALFW the number of a fold.
    """
    parsed = [line.split() for line in lines]
    for line, fields in zip(lines, parsed, strict=True):
        if len(fields) != 2 or not fields[1].isdecimal():
            raise ValueError(f"The line {line!r} of {path} is no image with a number.")
    if len(lines) % 2:
        raise ValueError(f"{path} has two lines for each pair, but {len(lines)} lines.")
    kinds: dict[bool, list[tuple[str, str, bool]]] = {True: [], False: []}
    for (first, a), (second, b) in zip(parsed[::2], parsed[1::2], strict=True):
        if (same := int(a) != 0) != (int(b) != 0):
            raise ValueError(f"The lines of {first} and {second} in {path} make a pair, but say {a} and {b}.")
        kinds[same].append((first, second, same))
    ends = [[len(pairs) * k // FOLDS for k in range(FOLDS + 1)] for pairs in kinds.values()]
    folds = zip(*(itertools.pairwise(end) for end in ends), strict=True)
    return [pair for fold in folds for kind, (i, j) in zip(kinds, fold, strict=True) for pair in kinds[kind][i:j]]


def _check_splits(path: str | Path, sizes: Counter[int]) -> None:
    """Folds are tenths of the list, and those of other splits would share them."""
    if len(sizes) > 1 and (len(sizes) != FOLDS or len({*sizes.values()}) > 1):
        shown = ", ".join(f"{size} pairs in split {split}" for split, size in sorted(sizes.items()))
        raise ValueError(f"{path} should have {FOLDS} splits of as many pairs each, or one split; it has {shown}.")


def _ytf_pair(line: str) -> tuple[str, str, bool]:
    if _split(line) < 0:
        raise ValueError
    _, first, second, same = (field.strip() for field in line.split(",")[:4])
    return first, second, {"0": False, "1": True}[same]


def _plain_pair(line: str) -> tuple[str, str, bool]:
    first, second, same = line.strip().split("\t") if line.strip().count("\t") == 2 else line.split()
    return first, second, {"0": False, "1": True}[same]


def open_bin(
    path: str | Path, transform: Callable[[Image.Image], object] | None = None, color: str = "rgb"
) -> PairedImages:
    images, same = read_bin(path)
    if not images:
        raise ValueError(f"{path} has no pairs.")
    keys = [f"{Path(path).name}:{i}" for i in range(len(images))]
    dataset = PairedImages(images, keys, transform=transform, color=color)  # type: ignore[arg-type]
    dataset.pairs, dataset.same = torch.arange(len(images)).reshape(-1, 2), torch.from_numpy(same)
    return dataset


def open_pairs(
    folder: str | Path,
    pairs: str | Path,
    transform: Callable[[Image.Image], object] | None = None,
    color: str = "rgb",
) -> PairedImages:
    """The images of a folder that a file of pairs names, with or without their suffix, each once."""
    keys, rows, same = index_pairs(read_pairs(pairs))
    dataset = PairedImages([_find(Path(folder), key) for key in keys], keys, transform=transform, color=color)
    dataset.pairs, dataset.same = rows, same
    return dataset


def index_pairs(named: list[tuple[str, str, bool]]) -> tuple[list[str], Tensor, Tensor]:
    """The names of `read_pairs`, each once; the pairs as (n, 2) positions among them; and (n,) bool."""
    names = sorted({name for first, second, _ in named for name in (first, second)})
    position = {name: i for i, name in enumerate(names)}
    rows = torch.tensor([(position[first], position[second]) for first, second, _ in named]).reshape(-1, 2)
    return names, rows, torch.tensor([same for *_, same in named])


def _find(folder: Path, name: str) -> Path:
    suffixes = [written for suffix in sorted(SUFFIXES) for written in (suffix, suffix.upper())]
    for path in (below(folder, f"{name}{suffix}") for suffix in ("", *suffixes)):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"There is no image {name} in {folder}, with any suffix of {', '.join(sorted(SUFFIXES))}."
    )
