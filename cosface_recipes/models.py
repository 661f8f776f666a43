"""Backbones by name: normalised images -> float32 embeddings, under any autocast.

The last layers run in float32: half precision there costs accuracy in every cosine that follows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosface_recipes.glyphnet import GlyphNet

DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
WIDTHS = (64, 128, 256, 512)
TIMM = "timm:"


def make_model(name: str, *, channels: int = 3, image_size: int = 112, embedding_size: int = 512) -> nn.Module:
    """A backbone: images (n, channels, image_size, image_size) in [-1, 1] -> embeddings (n, embedding_size).

    Args:
        name: "iresnet18", "iresnet34", "iresnet50", "iresnet100", "glyphnet", or "timm:NAME" for a model of timm.

    Raises:
        ValueError: there is no such model.
        ModuleNotFoundError: timm is asked for and not installed.

    >>> make_model("glyphnet", channels=1, image_size=32, embedding_size=128)(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 128])
    """
    if name in DEPTHS:
        return IResNet(DEPTHS[name], channels, image_size, embedding_size)
    if name == "glyphnet":
        return GlyphNet(channels, embedding_size)
    if name.startswith(TIMM):
        return TimmEmbedding(name.removeprefix(TIMM), channels, embedding_size)
    raise ValueError(f"model must be one of {', '.join(DEPTHS)}, glyphnet or {TIMM}NAME, got {name!r}.")


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """Norm, convolution, norm, PReLU, convolution with the stride, norm; added to the input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = convolution(outputs, outputs, stride=stride)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                convolution(inputs, outputs, size=1, stride=stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut


class IResNet(nn.Module):
    """The residual network of face recognition: no pooling, one stride of 2 per stage, a linear layer at the end.

    Parameters are named and shaped as in insightface's arcface_torch, so its checkpoints load.

    Args:
        depths: blocks of the four stages.

    Source: Deng et al., ArcFace, arXiv:1801.07698, Sec. 3.1 (IR blocks, output E: norm, dropout, linear, norm).
    """

    def __init__(self, depths: tuple[int, ...], channels: int, image_size: int, embedding_size: int):
        super().__init__()
        self.conv1 = convolution(channels, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        inputs = WIDTHS[0]
        for stage, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True), start=1):
            blocks = [Block(inputs, width, stride=2), *(Block(width, width, stride=1) for _ in range(depth - 1))]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            inputs = width
        side = -(-image_size // 2 ** len(depths))
        self.bn2 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs * side * side, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)  # the loss sees directions alone, so a scale per axis is enough
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))  # (n, 64, h, w)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (n, 512, h / 16, w / 16)
        x = self.bn2(x).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))


class TimmEmbedding(nn.Module):
    """A model of timm up to its pooled features, then a linear layer and a norm to the embedding."""

    def __init__(self, name: str, channels: int, embedding_size: int):
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"The model {TIMM}{name} needs timm: pip install timm ({error})", name=error.name
            ) from error
        self.body = timm.create_model(name, num_classes=0, in_chans=channels)
        self.fc = nn.Linear(self.body.num_features, embedding_size, bias=False)
        self.features = nn.BatchNorm1d(embedding_size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(images)  # (n, num_features)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))
