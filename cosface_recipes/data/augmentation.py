"""The augmentations of training, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from cosface_recipes.data.transforms import Compose, Normalize, Resize, evaluation_transform, training_transform

AUGMENTATIONS = ("face", "face-strong", "glyph", "none")


def make_transform(augmentation: str, size: int) -> Compose:
    """From a PIL image to a normalised tensor (channels, size, size).

    Args:
        augmentation: "face" mirrors, "face-strong" also crops and changes colours, "glyph" bends a little and
            never mirrors, since a mirrored glyph is another one.
    """
    if augmentation == "face":
        return training_transform(size)
    if augmentation == "face-strong":
        return training_transform(size, crop=0.2, color=0.2)
    if augmentation == "glyph":
        return Compose((Resize(size), RandomAffine(), Normalize()))
    return evaluation_transform(size)


@dataclass(frozen=True)
class RandomAffine:
    """Shift, scale, rotate and shear by a random affine map around the identity; what comes in is black.

    Args:
        strength: standard deviation of each of the six entries of the map, in half image sides; none is further
            than two of them from the identity's.
    """

    strength: float = 0.1

    def __call__(self, image: Image.Image) -> Image.Image:
        noise = torch.randn(6).mul_(self.strength).clamp_(-2 * self.strength, 2 * self.strength).tolist()
        a, b, c, d, e, f = noise
        x, y = image.width / 2, image.height / 2  # the map's origin is the centre, its unit half a side
        a, e = 1 + a, 1 + e
        inverse = (a, b * x / y, x * (1 - a - b + c), d * y / x, e, y * (1 - d - e + f))
        return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
