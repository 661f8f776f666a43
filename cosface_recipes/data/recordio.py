"""insightface's training files, train.rec + train.idx + property, read and written without mxnet.

A .rec file is a sequence of records (dmlc-core, src/recordio.cc), all integers little-endian:

    u32 magic | u32 part << 29 | length | data | zeros up to a multiple of 4

Data that contains the magic at a multiple of 4 is cut there, and written as several parts without it: 1 begins a
record, 2 continues, 3 ends it; 0 is a whole record. What a record holds (mxnet, recordio.py), 24 bytes ahead:

    u32 flag | f32 label | u64 id | u64 id2 | flag x f32 labels, which replace the label if flag > 0 | image

The .idx file is text, a line "key<TAB>offset" per record; spaces are read too. `property` is one line,
"classes,height,width": insightface's readers take no second. Two layouts exist, told apart by the record of key 0:

    flag > 0, no image    its labels are [a, b]: keys 1 ... a-1 are images; each of a ... b-1 is an identity, whose
                          labels [first, last) are the keys of its images (insightface)
    otherwise             every key is an image (mxnet's im2rec; with --pack-label, every flag is > 0)

All these labels are float32, exact below 2^24 = 16,777,216. So train.labels.npy may hold the images' labels once
more, int64, in the order of their keys in train.idx; where it exists, it counts. mxnet does not look at it.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
PREFIX = struct.Struct("<II")
HEADER = struct.Struct("<IfQQ")
LENGTH_BITS = 29
WHOLE, BEGIN, MIDDLE, END = range(4)
EXACT = 2**24  # float32 holds every integer below, and this one stands for the next one too


class RecordError(ValueError):
    """A record, or the file around it, is not what the format says."""


@dataclass(frozen=True)
class Record:
    """What a record holds.

    Attributes:
        labels: float32, (1,) if the label is a scalar, else the label array.
        data: encoded image, or nothing; of a file, a view of the mapped bytes.
        flag: 0 for a scalar label, else the length of the label array.
        id: as the writer chose it.
    """

    labels: np.ndarray
    data: bytes | memoryview
    flag: int = 0
    id: int = 0

    @classmethod
    def unpack(cls, payload: bytes | memoryview) -> Record:
        """
        >>> Record.unpack(Record(np.float32([7]), b"image").pack()).data
        b'image'
        """
        if len(payload) < HEADER.size:
            raise RecordError(f"it has {len(payload)} bytes, and the header alone takes {HEADER.size}")
        flag, label, id, _ = HEADER.unpack_from(payload)
        end = HEADER.size + 4 * flag
        if end > len(payload):
            raise RecordError(f"it has {len(payload)} bytes, and its {flag} labels end at byte {end}")
        labels = np.frombuffer(payload, "<f4", flag, HEADER.size) if flag else np.array([label], np.float32)
        return cls(labels, payload[end:], flag, id)

    def pack(self) -> bytes:
        if self.flag == 0:
            return HEADER.pack(0, self.labels[0], self.id, 0) + self.data
        return HEADER.pack(self.flag, 0.0, self.id, 0) + np.asarray(self.labels, "<f4").tobytes() + self.data


class RecordFile:
    """The images of an insightface data set, by position or by key, from a memory-mapped file.

    It can be pickled; a copy in another process maps the file again.

    Args:
        path: the .rec file, or the folder with train.rec.

    Attributes:
        keys: (n,) int64, of the images, in the order of the .idx file.
        identities: (m, 3) int64, one row (key, first, last) per identity, in insightface's layout, else (0, 3).
            The images first ... last - 1 are its own. Beyond 2^24 images they are rounded.
        num_classes: from `property`, else one more than the largest label.
        image_size: (height, width) from `property`, else None.

    Raises:
        RecordError: a file is corrupt; the message shows which, and where.
        FileNotFoundError: a file is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.is_dir():
            self.path /= "train.rec"
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no record file {self.path}.")
        self._offsets = _read_index(self.path.with_suffix(".idx"))  # {key: byte} in two columns, (all, 2)
        self._by_key = np.argsort(self._offsets[:, 0], kind="stable")
        self._sorted_keys = self._offsets[self._by_key, 0]
        if (repeated := np.flatnonzero(np.diff(self._sorted_keys) == 0)).size:
            raise RecordError(
                f"The key {self._sorted_keys[repeated[0]]} occurs twice in the index of {self.path}."
            )
        self._map: memoryview | None = None
        self._side_car = _read_side_car(side_car(self.path))
        self._property = _read_property(self.path.with_name("property"))
        self.keys, self._identity_keys = self._layout()
        if self._side_car is not None and len(self._side_car) != len(self.keys):
            raise RecordError(
                f"{side_car(self.path)} has {len(self._side_car)} labels, and {self.path} {len(self.keys)} images."
            )

    def _layout(self) -> tuple[np.ndarray, np.ndarray]:
        """The keys of the images, and of the identities."""
        keys = self._offsets[:, 0]
        if not len(keys) or self._sorted_keys[0] != 0:
            return keys, keys[:0]
        header = self.record(0)
        if header.flag == 0 or header.data:
            return keys, keys[:0]
        if header.flag < 2 or not np.isfinite(header.labels[:2]).all():
            raise self._corrupt(
                0, f"its labels should be the two ends of the keys, and are {header.labels.tolist()}"
            )
        end = self._exact_end(header.labels[0])
        images = keys[(keys >= 1) & (keys < end)]
        if len(images) != end - 1:
            raise RecordError(
                f"{self.path} should have the images 1 to {end - 1}, and its index has {len(images)} of them."
            )
        return images, keys[keys >= end]

    def _exact_end(self, rounded: np.float32) -> int:
        """The key after the last image. Where float32 only has it nearly: identities have no data, images do."""
        if rounded < EXACT:
            return int(rounded)
        near = self._sorted_keys[np.abs(self._sorted_keys - float(rounded)) <= np.spacing(rounded)]
        return next((key for key in near.tolist() if not self.record(key).data), int(rounded))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        """The encoded image at position i, and its label."""
        key = int(self.keys[i])
        record = self.record(key)
        if self._side_car is None:
            return bytes(record.data), self._label(key, record)
        label = int(self._side_car[i])
        if np.float32(label) != record.labels[0]:
            raise self._corrupt(key, f"its label is {record.labels[0]:g}, and {side_car(self.path)} has {label}")
        return bytes(record.data), label

    def record(self, key: int) -> Record:
        """The record of a key, parts joined.

        Raises:
            KeyError: the index has no such key.
            RecordError: the record is corrupt.
        """
        position = int(np.searchsorted(self._sorted_keys, key))
        if position == len(self._sorted_keys) or self._sorted_keys[position] != key:
            raise KeyError(f"{self.path} has no record of key {key}.")
        if self._map is None:
            self._map = memoryview(_map(self.path))
        try:
            return Record.unpack(read_payload(self._map, int(self._offsets[self._by_key[position], 1])))
        except RecordError as error:
            raise self._corrupt(key, str(error)) from None

    @cached_property
    def labels(self) -> np.ndarray:
        """(n,) int64. Without a side-car, the first access reads the header of every image.

        Raises:
            RecordError: a label is none of the classes of `property`.
        """
        if self._side_car is not None:
            labels = np.asarray(self._side_car)
        else:
            labels = np.array([self._label(key, self.record(key)) for key in self.keys.tolist()], np.int64)
        if self._property and (wrong := np.flatnonzero((labels < 0) | (labels >= self.num_classes))).size:
            raise RecordError(
                f"The record of key {self.keys[wrong[0]]} in {self.path} has the label {labels[wrong[0]]}, and "
                f"the {self.num_classes} classes of {self.path.with_name('property')} are those below."
            )
        return labels

    @property
    def num_classes(self) -> int:
        return self._property[0] if self._property else int(self.labels.max(initial=-1)) + 1

    @property
    def image_size(self) -> tuple[int, int] | None:
        return self._property[1:] if self._property else None

    @cached_property
    def identities(self) -> np.ndarray:
        rows = []
        for key in self._identity_keys.tolist():
            labels = self.record(key).labels
            if len(labels) != 2 or not 1 <= labels[0] <= labels[1] <= np.float32(len(self) + 1):
                raise self._corrupt(key, f"its labels should be two keys of images, and are {labels.tolist()}")
            rows.append((key, *map(int, labels)))
        return np.array(rows, np.int64).reshape(-1, 3)

    def _label(self, key: int, record: Record) -> int:
        label = float(record.labels[0])
        if not (0 <= label < EXACT and label.is_integer()):
            raise self._corrupt(
                key,
                f"its label is {label:g}; float32 holds labels from 0 to {EXACT - 1}, and others are needed "
                f"in {side_car(self.path)}",
            )
        return int(label)

    def _corrupt(self, key: int, reason: str) -> RecordError:
        return RecordError(f"The record of key {key} in {self.path} is corrupt: {reason}.")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_map": None}


def read_payload(file: bytes | memoryview, offset: int) -> bytes | memoryview:
    """The payload of the record that begins at a byte; parts are joined by the magic that separated them."""
    parts: list[bytes | memoryview] = []
    while True:
        if not 0 <= offset <= len(file) - PREFIX.size:
            raise RecordError(f"its header at byte {offset} lies beyond the file's {len(file)} bytes")
        magic, word = PREFIX.unpack_from(file, offset)
        if magic != MAGIC:
            raise RecordError(f"at byte {offset} there is {magic:#010x} instead of the magic {MAGIC:#010x}")
        part, length = word >> LENGTH_BITS, word & ((1 << LENGTH_BITS) - 1)
        if part not in ((MIDDLE, END) if parts else (WHOLE, BEGIN)):
            raise RecordError(f"the part at byte {offset} is of kind {part}, after {len(parts)} parts")
        start = offset + PREFIX.size
        if start + length > len(file):
            raise RecordError(f"its {length} bytes from byte {start} on end beyond the file's {len(file)} bytes")
        parts.append(file[start : start + length])
        if part in (WHOLE, END):
            return parts[0] if part == WHOLE else MAGIC_BYTES.join(parts)
        offset = start + (length + 3 & ~3)


def write_payload(file: BinaryIO, payload: bytes) -> None:
    """Write one record where the file stands."""
    cuts = [i for i in _find_all(payload, MAGIC_BYTES) if i % 4 == 0]
    starts, ends = [0, *(cut + 4 for cut in cuts)], [*cuts, len(payload)]
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        length = end - start
        if length >> LENGTH_BITS:
            raise RecordError(f"A record of {length} bytes is too long; {(1 << LENGTH_BITS) - 1} are possible.")
        part = WHOLE if not cuts else BEGIN if i == 0 else END if i == len(cuts) else MIDDLE
        file.write(PREFIX.pack(MAGIC, part << LENGTH_BITS | length))
        file.write(payload[start:end])
        file.write(bytes(-length % 4))


def _find_all(text: bytes, pattern: bytes) -> Iterator[int]:
    position = text.find(pattern)
    while position >= 0:
        yield position
        position = text.find(pattern, position + 1)


class RecordWriter:
    """Writes train.rec, train.idx, train.labels.npy and property, in insightface's layout, to a folder.

        with RecordWriter(folder, image_size=(112, 112)) as writer:
            writer.write(jpeg, label)

    Images of an identity follow one another, as the layout has them. The index is written last: after an exception
    there is none, and the unfinished file cannot be taken for a finished one.

    Args:
        folder: created if need be; files of these names are replaced.
        image_size: (height, width), for `property`.
        num_classes: for `property`; by default one more than the largest label.
    """

    def __init__(self, folder: str | Path, image_size: tuple[int, int], num_classes: int | None = None):
        self.path = Path(folder) / "train.rec"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".idx").unlink(missing_ok=True)
        self._image_size, self._num_classes = image_size, num_classes
        self._file = self.path.open("wb")
        self._offsets: list[int] = []
        self._labels: list[int] = []
        self._first_key: dict[int, int] = {}  # of the images of a label
        self._append(Record(np.zeros(2, np.float32), b"", flag=2))  # written again when the counts are known

    def write(self, image: bytes, label: int, more_labels: Sequence[float] = ()) -> int:
        """Append an encoded image, and return its key.

        Args:
            label: from 0.
            more_labels: e.g. landmarks; they make the record's label an array that begins with `label`.
        """
        if label < 0:
            raise ValueError(f"A label is at least 0, got {label}.")
        key = len(self._offsets)
        if label in self._first_key and self._labels[-1] != label:
            raise ValueError(
                f"Image {key} has label {label} after an image of label {self._labels[-1]}, but the images of an "
                f"identity follow one another, and those of {label} began with image {self._first_key[label]}."
            )
        flag = 1 + len(more_labels) if more_labels else 0
        self._append(Record(np.array([label, *more_labels], np.float32), image, flag, id=key))
        self._first_key.setdefault(label, key)
        self._labels.append(label)
        return key

    def close(self) -> None:
        """Write the identities, the record of key 0, the labels, the property and the index."""
        a = len(self._offsets)
        first = [*self._first_key.values(), a]
        for identity in itertools.pairwise(first):
            self._append(Record(np.array(identity, np.float32), b"", flag=2, id=len(self._offsets)))
        b = len(self._offsets)
        self._file.seek(0)
        write_payload(self._file, Record(np.array([a, b], np.float32), b"", flag=2).pack())
        self._file.close()
        np.save(side_car(self.path), np.array(self._labels, np.int64))
        classes = self._num_classes if self._num_classes is not None else max(self._labels, default=-1) + 1
        height, width = self._image_size
        self.path.with_name("property").write_text(f"{classes},{height},{width}\n")
        lines = "".join(f"{key}\t{offset}\n" for key, offset in enumerate(self._offsets))
        self.path.with_suffix(".idx").write_text(lines)

    def _append(self, record: Record) -> None:
        self._offsets.append(self._file.tell())
        write_payload(self._file, record.pack())

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def side_car(path: Path) -> Path:
    """Where the int64 labels of a .rec file are."""
    return path.with_suffix(".labels.npy")


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise RecordError(f"The record file {path} is empty.") from None


def _read_index(path: Path) -> np.ndarray:
    """(all, 2) int64: key and offset."""
    if not path.is_file():
        raise FileNotFoundError(f"The record file's index {path} is missing.")
    if path.stat().st_size == 0:
        raise RecordError(f"The record file's index {path} is empty.")
    try:
        index = np.loadtxt(path, np.int64, ndmin=2, comments=None, encoding="utf-8-sig")
    except ValueError as error:
        raise RecordError(f"The index {path} should have lines of a key and an offset: {error}") from None
    if index.shape[1] != 2 or index.min() < 0:
        raise RecordError(f"The index {path} should have two columns of numbers from 0, key and offset.")
    return index


def _read_side_car(path: Path) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        labels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise RecordError(f"The labels {path} cannot be read: {error}") from error
    if labels.dtype != np.int64 or labels.ndim != 1:
        raise RecordError(f"{path} should hold int64 labels in one dimension, not {labels.dtype} {labels.shape}.")
    return labels


def _read_property(path: Path) -> tuple[int, int, int] | None:
    """(classes, height, width) of the first line."""
    if not path.is_file():
        return None
    line = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    try:
        classes, height, width = map(int, line.split(","))
    except ValueError:
        raise RecordError(f"The first line of {path} should be classes,height,width, and is {line!r}.") from None
    return classes, height, width
