"""From a PIL image to a normalised tensor, with or without augmentation.

The names and meanings are torchvision's (transforms.v2), whose classes can take their place. They are written out
here because torchvision loads only beside the build of torch that it was compiled for: its 0.28.0 does not beside
the CPU build of torch 2.13.0. Random numbers come from torch's generator, which DataLoader seeds in each worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor


def uniform(low: float, high: float) -> float:
    return torch.empty(()).uniform_(low, high).item()


@dataclass(frozen=True)
class Compose:
    """One transform after the other."""

    transforms: Sequence[Callable[[Any], Any]]

    def __call__(self, image: Image.Image) -> Tensor:
        result: Any = image
        for transform in self.transforms:
            result = transform(result)
        return result


@dataclass(frozen=True)
class Resize:
    """To size x size pixels; an image of that size is left as it is."""

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.resize((self.size, self.size), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirror with probability p."""

    p: float = 0.5

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image) if uniform(0, 1) < self.p else image


@dataclass(frozen=True)
class RandomResizedCrop:
    """A rectangle at a uniform place, of a uniform share of the area and a log-uniform ratio of its sides.

    Args:
        size: pixels of the sides of the result.
        scale: least and largest share of the area.
        ratio: least and largest width / height.
    """

    size: int
    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (0.9, 1 / 0.9)

    def __call__(self, image: Image.Image) -> Image.Image:
        area = uniform(*self.scale) * image.width * image.height
        ratio = math.exp(uniform(*map(math.log, self.ratio)))
        width = min(math.sqrt(area * ratio), image.width)
        height = min(math.sqrt(area / ratio), image.height)
        left, top = uniform(0, image.width - width), uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        return image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, each times a factor from 1 - x to 1 + x."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __call__(self, image: Image.Image) -> Image.Image:
        for enhance, x in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ):
            if x > 0:
                image = enhance(image).enhance(uniform(max(0.0, 1 - x), 1 + x))
        return image


@dataclass(frozen=True)
class Normalize:
    """To a tensor (channels, height, width) float32 of (x - 127.5) / 127.5, from -1 to 1.

    >>> Normalize()(Image.new("L", (1, 2), 255))
    tensor([[[1.],
             [1.]]])
    """

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = np.array(image)  # (h, w) or (h, w, channels)
        planes = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1)))
        return (planes.float() - 127.5) / 127.5


def training_transform(size: int, flip: float = 0.5, crop: float = 0.0, color: float = 0.0) -> Compose:
    """Augment for training.

    Args:
        size: pixels of the sides of the result.
        flip: probability of mirroring; 0 where mirrored images are other things, as glyphs are.
        crop: largest share of the area that is cut off; 0 cuts nothing.
        color: strength of the change of brightness, contrast and saturation; 0 changes nothing.
    """
    cut = RandomResizedCrop(size, scale=(1 - crop, 1.0)) if crop else Resize(size)
    jitter = ColorJitter(color, color, color)
    return Compose((cut, RandomHorizontalFlip(flip), jitter, Normalize()))


def evaluation_transform(size: int) -> Compose:
    """Resize and normalise."""
    return Compose((Resize(size), Normalize()))
