"""Images of identities, one at a time, for torch's DataLoader.

dataset = open_dataset("faces_emore", training_transform(112), on_corrupt="skip")
loader = DataLoader(dataset, 128, shuffle=True, num_workers=4)
for images, labels in loader: ...
log(f"{len(dataset.corrupt)} images could not be read: {dataset.corrupt}")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cosface_recipes.data.images import KINDS, MODES, UNREADABLE, CorruptSampleError, decode, identity_files
from cosface_recipes.data.recordio import RecordFile

log = logging.getLogger(__name__)

MOST_IN_A_ROW = 1000  # unreadable samples; beyond that, the data is of another kind


class ImageDataset(Dataset[Any]):
    """Samples (transform(PIL image), label); what all data sets here have in common.

    Args:
        transform: from a PIL image to what the loader collates; None leaves the image.
        on_corrupt: "raise" raises CorruptSampleError. "skip" logs a warning, notes the sample in `corrupt`, and
            puts the next readable sample in its place, so that batches keep their size.
        color: "rgb" or "gray".

    Attributes:
        keys: a name per sample, for messages.
        labels: (n,) int64.
        skipped: (n,) bool, the samples skipped until now, by this process and the loader's workers.
        num_classes: labels are below it.
        advice: what to do about a sample that cannot be read.
    """

    keys: list[str]
    labels: Tensor
    num_classes: int
    advice = "Mend it or take it away."

    def __init__(
        self,
        size: int,
        transform: Callable[[Image.Image], object] | None,
        on_corrupt: Literal["raise", "skip"],
        color: str,
    ):
        if on_corrupt not in ("raise", "skip"):
            raise ValueError(f'on_corrupt must be "raise" or "skip", got {on_corrupt!r}.')
        if color not in MODES:
            raise ValueError(f"color must be one of {', '.join(MODES)}, got {color!r}.")
        self.size, self.transform, self.on_corrupt, self.color = size, transform, on_corrupt, color
        self.skipped = torch.zeros(size, dtype=torch.bool)
        if on_corrupt == "skip":
            self.skipped.share_memory_()  # the loader's workers write to it

    def read(self, index: int) -> tuple[bytes | Path, int]:
        """The encoded image and its label."""
        raise NotImplementedError

    def load(self, index: int) -> tuple[Image.Image, int]:
        data, label = self.read(index)
        return decode(data, self.color), label

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[object, int]:
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in [0, {self.size}), got {index}.")
        for attempt in range(min(self.size, MOST_IN_A_ROW)):
            i = (index + attempt) % self.size
            try:
                image, label = self.load(i)
            except UNREADABLE as error:
                message = f"The sample {self.keys[i]} cannot be read: {str(error).removesuffix('.')}"
                if self.on_corrupt == "raise":
                    raise CorruptSampleError(f"{message}. {self.advice}") from error
                if not self.skipped[i]:
                    log.warning("%s. Skipped.", message)
                self.skipped[i] = True
                continue
            return (self.transform(image) if self.transform else image), label
        raise CorruptSampleError(f"{min(self.size, MOST_IN_A_ROW)} samples in a row cannot be read. {message}")

    @property
    def corrupt(self) -> list[str]:
        """The keys of the samples skipped."""
        return [self.keys[i] for i in self.skipped.nonzero().flatten().tolist()]


class ImageFiles(ImageDataset):
    """Images in memory or in files, by default labelled with their positions."""

    def __init__(
        self,
        sources: Sequence[bytes | Path],
        keys: list[str],
        labels: Tensor | None = None,
        transform: Callable[[Image.Image], object] | None = None,
        on_corrupt: Literal["raise", "skip"] = "raise",
        color: str = "rgb",
    ):
        self.sources, self.keys = sources, keys
        self.labels = torch.arange(len(sources)) if labels is None else labels
        self.num_classes = int(self.labels.max()) + 1 if len(sources) else 0
        super().__init__(len(sources), transform, on_corrupt, color)

    def read(self, index: int) -> tuple[bytes | Path, int]:
        return self.sources[index], int(self.labels[index])


class ImageFolder(ImageFiles):
    """One sub-folder of images per identity, e.g. FOLDER/alice/1.jpg; labels in the order of the folders' names.

    Attributes:
        identities: the names of the sub-folders, by label.
    """

    def __init__(
        self,
        folder: str | Path,
        transform: Callable[[Image.Image], object] | None = None,
        on_corrupt: Literal["raise", "skip"] = "raise",
        color: str = "rgb",
    ):
        self.folder = Path(folder)
        files = identity_files(self.folder)
        if not files:
            raise ValueError(
                f"The image folder {folder} has no sub-folder with images: it takes one per identity, such as "
                f"{self.folder / 'alice' / '1.jpg'}. {KINDS}"
            )
        self.identities = list(files)
        sources = [path for paths in files.values() for path in paths]
        labels = torch.arange(len(files)).repeat_interleave(torch.tensor([*map(len, files.values())]))
        keys = [path.relative_to(self.folder).as_posix() for path in sources]
        super().__init__(sources, keys, labels, transform, on_corrupt, color)


class RecordDataset(ImageDataset):
    """insightface's train.rec; see recordio.py.

    Attributes:
        file: the RecordFile.
    """

    def __init__(
        self,
        path: str | Path,
        transform: Callable[[Image.Image], object] | None = None,
        on_corrupt: Literal["raise", "skip"] = "raise",
        color: str = "rgb",
    ):
        self.file = RecordFile(path)
        self.num_classes = self.file.num_classes
        super().__init__(len(self.file), transform, on_corrupt, color)

    @property
    def keys(self) -> RecordKeys:  # type: ignore[override]
        return RecordKeys(self.file)

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        return torch.from_numpy(np.array(self.file.labels))

    def read(self, index: int) -> tuple[bytes, int]:
        return self.file[index]


class RecordKeys:
    """Names of records, made when asked for: a list of them would take gigabytes."""

    def __init__(self, file: RecordFile):
        self.file = file

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> str:
        return f"{self.file.path.name}:{self.file.keys[index]}"


def open_dataset(
    path: str | Path,
    transform: Callable[[Image.Image], object] | None = None,
    on_corrupt: Literal["raise", "skip"] = "raise",
    color: str = "rgb",
) -> ImageFolder | RecordDataset:
    """A .rec file or a folder with train.rec, else a folder of images."""
    path = Path(path)
    is_record = path.suffix == ".rec" or (path / "train.rec").is_file()
    dataset = (RecordDataset if is_record else ImageFolder)(path, transform, on_corrupt, color)
    dataset.advice = "Mend it or take it away; with --on-corrupt skip a command leaves it out."
    return dataset
