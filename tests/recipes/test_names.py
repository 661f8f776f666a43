"""One name in two ways of Unicode: precomposed (NFC), and as archives of macOS have it (NFD), is one identity."""

import unicodedata

import numpy as np
import pytest
from support.evaluation import colour_of, evaluate, printed, write_images

import embed
from cosface_recipes import recognition
from cosface_recipes.data.image_datasets import ImageFolder
from cosface_recipes.data.pairs import open_pairs
from cosface_recipes.evaluation.collect import Embedder, collect_ytf
from cosface_recipes.evaluation.features import load_features, save_features
from cosface_recipes.evaluation.megaface import is_noise

NAMES = ["José", "Zoe", "Ümit", "김철수"]  # in the order of NFC; of NFD, Ümit is before Zoe
OTHER = {"NFC": "NFD", "NFD": "NFC"}
FORMS = pytest.mark.parametrize("form", OTHER)


def written(form: str, *names: str) -> list[str]:
    return [unicodedata.normalize(form, name) for name in names]


def people(folder, form: str):
    names = [f"{name}/é{photo}.png" for name in NAMES for photo in range(2)]
    write_images(folder, written(form, *names), [colour_of(i // 2, i % 2) for i in range(8)])
    return folder


@FORMS
def test_a_data_set_has_the_same_identities(tmp_path, form):
    data = ImageFolder(people(tmp_path, form))
    assert data.identities == NAMES
    assert [data[i][1] for i in range(8)] == data.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@FORMS
@pytest.mark.parametrize("what", ["folders", "files"])
@pytest.mark.parametrize(
    ("protocol", "expected"),
    [("identification", {"mated probes": "8"}), ("retrieval", {"queries with a match": "8"})],
)
def test_probes_find_their_identities(tmp_path, exported, capsys, form, what, protocol, expected):
    probes, gallery = people(tmp_path / "probes", form), people(tmp_path / "gallery", OTHER[form])
    if what == "folders":
        evaluate("--protocol", protocol, "--model", exported, "--data", probes, "--gallery", gallery)
    else:
        for folder in (probes, gallery):
            embed.main([str(exported), str(folder), "--output", f"{folder}.npz"])
        arrays = load_features(f"{gallery}.npz")
        assert np.unique(arrays["labels"]).tolist() == NAMES
        arrays["labels"] = np.char.encode(written(OTHER[form], *arrays["labels"]), "utf-8")  # by another program
        save_features(f"{gallery}.npz", arrays)
        capsys.readouterr()
        evaluate("--protocol", protocol, "--features", f"{probes}.npz", "--gallery", f"{gallery}.npz")
    assert expected.items() <= printed(capsys).items()


@FORMS
def test_a_name_of_a_list_is_found(tmp_path, form):
    folder, other = people(tmp_path / "lfw", form), OTHER[form]
    first, second, third = written(other, "José/é0", "José/é1.png", "김철수/é0")
    (tmp_path / "pairs.txt").write_text(f"{first}\t{second}\t1\n{first}\t{third}\t0\n", encoding="utf-8")
    assert {path.parent.parent for path in open_pairs(folder, tmp_path / "pairs.txt").sources} == {folder}
    (tmp_path / "list.txt").write_text(f"lfw/{second}\n", encoding="utf-8")
    ((path, name, _),) = embed.photos(tmp_path / "list.txt")
    assert path.is_file()
    assert name == f"lfw/{second}"
    videos = written(other, "José", "김철수")
    (tmp_path / "splits.txt").write_text(f"1, {videos[0]}, {videos[1]}, 0\n", encoding="utf-8")
    embedder = Embedder(lambda images: images.mean((2, 3)), size=8, color="rgb")
    assert collect_ytf(embedder, folder, tmp_path / "splits.txt")["videos"].tolist() == [0, 0, 1, 1]
    assert is_noise(written(form, "A/José.jpg", "Zoe.jpg"), written(other, "José.jpg")).tolist() == [True, False]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (
            lambda folder, _: ImageFolder(folder),
            "has two sub-folders 'José', whose names Unicode writes in two ways",
        ),
        (lambda folder, model: recognition.enroll(recognition.Recognizer(model), folder), "has two entries José"),
    ],
    ids=["training", "gallery"],
)
def test_two_folders_of_one_name_are_refused(tmp_path, exported, read, message):
    people(tmp_path / "faces", "NFC")
    people(tmp_path / "faces", "NFD")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "faces", exported)
