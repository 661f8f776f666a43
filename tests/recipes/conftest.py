"""What the tests of the recipes share: a training of seconds, an exported network, files of features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.evaluation import identity_features
from support.recipe import FONTS, some_glyphs

from cosface_recipes import config, export, training
from cosface_recipes.data import glyphs
from cosface_recipes.evaluation.features import save_features
from cosface_recipes.models import make_model


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The same 72 images of 12 syllables as records and as folders, and test images of 12 others."""
    folder = tmp_path_factory.mktemp("glyphs")
    images = some_glyphs("train", FONTS)
    glyphs.write_records(images, folder / "train")
    glyphs.write_records(some_glyphs("test", 4), folder / "test")
    for i, label in enumerate(images.labels.tolist()):
        path = folder / "folders" / f"{label:02}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(glyphs.png(images.pixels[i, 0].numpy()))
    return folder


@pytest.fixture
def settings(data, tmp_path, restore_threads) -> config.Config:
    """20 steps, 4 an epoch."""
    return config.Config(
        train=str(data / "train"),
        test=(str(data / "test"),),
        output=str(tmp_path / "run"),
        image_size=32,
        color="gray",
        augmentation="glyph",
        flip=False,
        model="glyphnet",
        embedding_size=16,
        scale=8.0,
        margin=(0.1,),
        epochs=5,
        batch_size=18,
        learning_rate=0.1,
        warm_up=0.1,
        far=0.05,
        workers=0,
        threads=1,
        log_every=1,
    )


@pytest.fixture
def without_export(monkeypatch):
    """Tracing for ONNX takes longer than these trainings."""
    monkeypatch.setattr(training, "export", lambda network, description, folder: 0.0)


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    description = export.Description("glyphnet", "rgb", 16, 8, flip=True, threshold=None, chosen_on="")
    export.export(make_model("glyphnet", channels=3, image_size=16, embedding_size=8), description, folder)
    return folder


@pytest.fixture
def lfw(tmp_path) -> Path:
    features, _ = identity_features(40, 2)
    first = np.arange(0, 80, 2)
    pairs = np.stack([first, np.where(first % 4, first + 1, (first + 2) % 80)], 1)
    save_features(tmp_path / "lfw.npz", {"features": features, "pairs": pairs, "same": first % 4 != 0})
    return tmp_path / "lfw.npz"


@pytest.fixture
def megaface(tmp_path) -> tuple[Path, Path]:
    """Probes of five identities, and distractors that are these people again, but for the first twelve."""
    features, labels = identity_features(5, 3)
    names = np.array([f"id{label}/{i}.png" for i, label in enumerate(labels)])
    save_features(tmp_path / "probes.npz", {"features": features, "labels": labels, "names": names})
    strangers, _ = identity_features(12, 1, seed=1)
    save_features(
        tmp_path / "others.npz",
        {"features": np.concatenate([strangers, features]), "names": np.array([*map(str, range(12)), *names])},
    )
    return tmp_path / "probes.npz", tmp_path / "others.npz"
