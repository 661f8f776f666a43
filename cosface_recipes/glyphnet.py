"""A small convolutional network for glyphs, and the augmentation it trains with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class GlyphNet(nn.Sequential):
    """Images (n, channels, h, w), normalised to [-1, 1] -> embeddings (n, embedding_size), float32.

    6 million multiplications for a grey image of 32 x 32: two trainings fit into two minutes of two cores.
    """

    def __init__(self, channels: int, embedding_size: int):
        super().__init__(
            convolution(channels, 16, 2),
            convolution(16, 32, 1),
            convolution(32, 64, 2),
            convolution(64, 64, 1),
            convolution(64, 128, 2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        *convolutions, linear, norm = self
        x = images.contiguous(memory_format=torch.channels_last)
        for layer in convolutions:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):
            return norm(linear(x.float()))


class EmbeddingNet(GlyphNet):
    """The same network for images (n, channels, h, w) uint8 or float in 0..255."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.float().div(127.5).sub(1))

    @torch.no_grad()
    def embed(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Embeddings of all images, in evaluation mode, in batches."""
        self.eval()
        embeddings = torch.cat([self(batch) for batch in images.split(batch_size)])
        self.train()
        return embeddings


def augment(images: Tensor, generator: torch.Generator, strength: float = 0.1) -> Tensor:
    """Shift, scale, rotate and shear each image a little, by a random affine map around the identity.

    Args:
        images: (n, channels, h, w) uint8.
        strength: standard deviation of each of the six entries of the map, in half image sides.
    """
    noise = torch.randn(len(images), 2, 3, generator=generator).mul_(strength)
    maps = torch.eye(2, 3) + noise.clamp_(-2 * strength, 2 * strength)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)  # (n, h, w, 2)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
