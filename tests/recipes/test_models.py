"""The backbones by name, and the augmentation of what they are trained on."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cosface_recipes.data.augmentation import RandomAffine, make_transform
from cosface_recipes.models import DEPTHS, make_model


@pytest.mark.parametrize(
    ("name", "blocks", "millions"),
    [("iresnet18", 8, 24.03), ("iresnet34", 16, 34.14), ("iresnet50", 24, 43.59), ("iresnet100", 49, 65.16)],
)
def test_the_iresnets_have_the_known_sizes(name, blocks, millions):
    with torch.device("meta"):
        model = make_model(name)
    assert sum(DEPTHS[name]) == blocks
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    names = set(model.state_dict())
    assert {"conv1.weight", "prelu.weight", "layer3.1.bn3.bias", "layer4.0.downsample.1.running_var"} <= names
    assert {"fc.bias", "features.running_mean"} <= names
    assert not model.features.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "channels", "size"), [("iresnet18", 3, 112), ("iresnet18", 1, 50), ("glyphnet", 1, 32)]
)
def test_the_last_layers_are_float32_under_autocast(name, channels, size, dtype):
    model = make_model(name, channels=channels, image_size=size, embedding_size=24)
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    with torch.no_grad():
        linear.weight *= 1e6  # float16 ends at 65504
    norm.eval()
    with torch.autocast("cpu", dtype):
        embeddings = model(torch.rand(3, channels, size, size) * 2 - 1)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (3, 24)
    assert embeddings.isfinite().all()
    assert embeddings.abs().max() > 65504


def test_a_model_of_timm_gets_an_embedding_layer(monkeypatch):
    asked = {}

    def create_model(name: str, **options: object) -> nn.Module:
        asked.update(options, name=name)
        body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        body.num_features = 10
        return body

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    model = make_model("timm:resnet18", channels=3, embedding_size=5)
    assert asked == {"name": "resnet18", "num_classes": 0, "in_chans": 3}
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(torch.randn(4, 3, 8, 8))
    assert (embeddings.shape, embeddings.dtype) == ((4, 5), torch.float32)


def test_missing_models_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"model must be one of iresnet18, .* got 'resnet1000'\."):
        make_model("resnet1000")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"The model timm:resnet18 needs timm: pip install timm"):
        make_model("timm:resnet18")


def test_an_affine_map_is_that_of_affine_grid():
    x, y = np.meshgrid(np.linspace(0, np.pi, 48), np.linspace(0, np.pi, 32))
    smooth = (255 * np.sin(x) * np.sin(y) ** 2).astype(np.uint8)  # black at the border, as glyphs are
    torch.manual_seed(5)
    warped = np.asarray(RandomAffine(0.1)(Image.fromarray(smooth)), np.float32)
    torch.manual_seed(5)
    noise = torch.randn(6).mul(0.1).clamp(-0.2, 0.2).reshape(1, 2, 3)
    grid = torch.nn.functional.affine_grid(torch.eye(2, 3) + noise, [1, 1, 32, 48], align_corners=False)
    image = torch.from_numpy(smooth).float()[None, None]
    expected = torch.nn.functional.grid_sample(image, grid, align_corners=False)[0, 0].numpy()
    assert np.abs(warped - smooth).max() > 20
    assert np.abs(warped - expected).max() <= 6  # half a pixel of border, which one blends with black


@pytest.mark.parametrize("name", ["face", "face-strong", "glyph", "none"])
def test_augmentations_give_normalised_images_of_the_size(name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    tensor = make_transform(name, 16)(image)
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert -1 <= tensor.min() < -0.5
    assert 0.5 < tensor.max() <= 1
