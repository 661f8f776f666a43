"""A training of seconds, on a few glyphs."""

from pathlib import Path

import pytest
from support.recipe import FONTS, some_glyphs

from cosface_recipes import config, training
from cosface_recipes.data import glyphs


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
