"""What the tests of evaluation and use share: an exported network, and files of features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.evaluation import identity_features

from cosface_recipes import export
from cosface_recipes.evaluation.features import save_features
from cosface_recipes.models import make_model


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
