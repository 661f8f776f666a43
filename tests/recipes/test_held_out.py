"""The test data of a training, and the threshold that is chosen on them."""

import dataclasses
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from support.evaluation import colour_of, encoded, write_images
from torch import nn

from cosface_recipes.data.augmentation import make_transform
from cosface_recipes.data.image_datasets import ImageFiles, decode, open_dataset
from cosface_recipes.data.pairs import write_bin
from cosface_recipes.evaluation import held_out
from cosface_recipes.evaluation.collect import Embedder
from cosface_recipes.evaluation.protocols import cross_validate
from cosface_recipes.models import make_model
from cosface_recipes.training import Training


def test_the_threshold_lets_the_asked_share_of_impostors_pass(settings):
    network = make_model("glyphnet", channels=1, image_size=32, embedding_size=16)
    (result,) = held_out.evaluate(network, settings, torch.device("cpu"))
    assert network.training
    data = open_dataset(settings.test[0], make_transform("none", 32), color="gray")
    with torch.no_grad():
        unit = nn.functional.normalize(network.eval()(torch.stack([image for image, _ in data])))
    labels = data.labels
    impostor = (unit @ unit.T)[(labels[:, None] < labels)]
    assert ((impostor > result.threshold).sum() / len(impostor)).item() == pytest.approx(
        0.05, abs=1 / len(impostor)
    )
    assert f"{len(impostor):,} impostor pairs" in result.chosen


def test_many_images_are_counted_as_few_are_compared(settings, monkeypatch):
    network = make_model("glyphnet", channels=1, image_size=32, embedding_size=16)
    monkeypatch.setattr(held_out, "EXACT_IMAGES", 48)
    (few,) = held_out.evaluate(network, settings, torch.device("cpu"))
    assert few.images == 48
    monkeypatch.setattr(held_out, "EXACT_IMAGES", 47)
    (many,) = held_out.evaluate(network, settings, torch.device("cpu"))
    assert few.rates.pop("rank-1") > 0
    assert many.rates == pytest.approx(few.rates, abs=1 / 72, nan_ok=True)  # one genuine pair may fall in the bin
    assert many.threshold == pytest.approx(few.threshold, abs=1e-6)
    assert many.chosen == few.chosen


def test_pairs_of_a_bin_file_are_verified_in_folds(settings, tmp_path):
    images = open_dataset(settings.test[0])
    rows = [(i % 24, (i % 24) + (1 if i % 2 else 24)) for i in range(0, 40)]  # records lie four to an identity
    same = [bool(images.labels[a] == images.labels[b]) for a, b in rows]
    encoded = [images.read(i)[0] for pair in rows for i in pair]
    write_bin(tmp_path / "some.bin", encoded, same)
    network = make_model("glyphnet", channels=1, image_size=32, embedding_size=16)
    settings = dataclasses.replace(settings, test=(settings.test[0], str(tmp_path / "some.bin")), flip=True)
    everything, pairs = held_out.evaluate(network, settings, torch.device("cpu"))
    assert pairs.images == 80
    assert pairs.chosen == "best accuracy on 40 pairs of some.bin"
    x = torch.stack([make_transform("none", 32)(decode(image, "gray")) for image in encoded])
    with torch.no_grad():
        unit = nn.functional.normalize(network.eval()(x) + network(x.flip(-1)))
    cosines = (unit[0::2] * unit[1::2]).sum(1)
    distances = (2 - 2 * cosines).double().numpy()
    assert pairs.rates["accuracy"] == cross_validate(distances, np.array(same)).accuracy
    lines = held_out.table([everything, pairs]).splitlines()
    assert [line.split()[0] for line in lines] == ["test", "test", "some"]
    assert len({len(line) for line in lines}) == 1


def test_test_sets_of_one_name_are_told_apart(settings, data, tmp_path):
    """Else their rates are one curve in TensorBoard."""
    for folder in ("x/test", "y/test", "faces.v2"):
        shutil.copytree(data / "test", tmp_path / folder)
    shutil.copy(data / "test" / "train.rec", tmp_path / "x" / "faces.rec")
    names = ["x/test", "y/test", "faces.v2", "x/faces.rec"]
    settings = dataclasses.replace(settings, test=tuple(str(tmp_path / name) for name in names))
    for file in ("train.idx", "property"):
        shutil.copy(data / "test" / file, tmp_path / "x" / file.replace("train", "faces"))
    network = make_model("glyphnet", channels=1, image_size=32, embedding_size=16)
    results = held_out.evaluate(network, settings, torch.device("cpu"))
    assert [result.name for result in results] == ["x/test", "y/test", "faces.v2", "faces"]
    assert held_out.told_apart([tmp_path / "faces.v2", tmp_path / "faces.v2.bin"]) == ["faces.v2", "faces.v2.bin"]


def people(folder, names):
    write_images(folder, [f"{name}/{i}.png" for name in names for i in range(2)], [(90, 99, 9)] * 2 * len(names))
    return str(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Jose\u0301", "Ann", "Eve"], r"The test data .*test has 2 identities that .*train has too, 'Ann' first"),
        (["Eve", "7"], None),  # 7 is a number, which another person has in another data set
    ],
)
def test_people_of_the_training_are_no_test(settings, tmp_path, recwarn, names, message):
    train = people(tmp_path / "train", ["Ann", "Bo", "Jos\u00e9", "7"])
    settings = dataclasses.replace(settings, train=train, test=(people(tmp_path / "test", names),))
    held_out.check(settings, open_dataset(train))
    assert len(recwarn) == (message is not None)
    assert not message or re.search(message, str(recwarn[0].message))
    with pytest.warns(UserWarning, match=r"The test data .*train is the training data: what is measured there"):
        held_out.check(dataclasses.replace(settings, test=(f"{tmp_path}/test/../train",)), open_dataset(train))


def test_a_training_needs_two_identities(settings, tmp_path):
    settings = dataclasses.replace(settings, train=people(tmp_path / "train", ["Ann"]), test=())
    with pytest.raises(ValueError, match=r"A training needs two identities to tell apart, got 1 in .*train"):
        Training(settings)


@pytest.mark.parametrize("exact", [5, 4])
@pytest.mark.parametrize("labels", [torch.arange(5), torch.zeros(5).long()], ids=["genuine", "impostor"])
def test_pairs_of_one_kind_are_refused(monkeypatch, exact, labels):
    monkeypatch.setattr(held_out, "EXACT_IMAGES", exact)
    with pytest.raises(ValueError, match=r"5 test images of \d identities .*; both kinds are needed"):
        held_out.compare_pairs("test", torch.randn(5, 3), labels, 0.1)


def test_a_rate_at_which_no_impostor_may_pass_is_said():
    """1/49 of 49 is one, and below 1 in floating point."""
    labels = torch.arange(2).repeat_interleave(7)
    with pytest.warns(UserWarning, match=r"^49 impostor pairs of test are too few .* a FAR of 0\.02,"):
        held_out.compare_pairs("test", torch.randn(14, 3), labels, 0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held_out.compare_pairs("test", torch.randn(14, 3), labels, 1 / 49)


def test_a_skipped_image_is_not_measured_twice(settings):
    network = make_model("glyphnet", channels=1, image_size=32, embedding_size=16)
    files = [encoded(colour_of(i // 2, i % 2)) for i in range(8)]
    labels = torch.arange(8) // 2
    embedder = Embedder(network, 32, "gray", on_corrupt="skip", progress=False)
    keys = [str(i) for i in range(8)]
    whole, _ = embedder.embed(ImageFiles(files, keys, labels, **embedder.options))
    files[3] = files[7] = b"no image"
    found, found_labels = embedder.embed(ImageFiles(files, keys, labels, on_corrupt="skip", **embedder.options))
    assert found_labels.tolist() == [0, 0, 1, 2, 2, 3]
    assert torch.allclose(found, whole[[0, 1, 2, 4, 5, 6]], atol=1e-5)
