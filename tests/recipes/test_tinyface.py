"""TinyFace's protocol by the evaluation command, from images and from features."""

import sys

import numpy as np
import pytest
from scipy.io import savemat
from support.evaluation import colour_of, directions, evaluate, printed, write_images

from cosface_recipes.evaluation.collect import read_tinyface
from cosface_recipes.evaluation.features import load_features, save_features


def test_tinyface_of_features(tmp_path, capsys):
    """As in test_ranked_images_by_hand: the second probe's mate is behind an image of the other identity."""
    arrays = {
        "features": directions(0, 60, 10, 50, 90, 20, 200),
        "labels": np.array([7, 8, 7, 7, 8, -100, -100]),
        "probe": np.arange(7) < 2,
    }
    save_features(tmp_path / "x.npz", arrays)
    evaluate("--protocol", "tinyface", "--features", tmp_path / "x.npz")
    output = printed(capsys)
    assert (output["probes"], output["gallery"], output["distractors"]) == ("2", "3", "2")
    assert [output[f"rank-{k}"] for k in (1, 5, 10, 20)] == ["0.50000", "1.00000", "1.00000", "1.00000"]
    assert output["mAP"] == f"{25 / 48:.5f}"
    save_features(tmp_path / "x.npz", {name: arrays[name] for name in ("features", "labels")})
    with pytest.raises(SystemExit, match=r"The features of protocol tinyface in .*x\.npz lack probe\."):
        evaluate("--protocol", "tinyface", "--features", tmp_path / "x.npz")


def write_mat(path, kind: str, names: list[str], ids: list[int]) -> None:
    """Cells of texts in a column, and a column of numbers, as TinyFace's files have them."""
    cells = np.empty((len(names), 1), object)
    for cell, name in zip(cells, names, strict=True):
        cell[0] = name
    savemat(path, {f"{kind}_set": cells, f"{kind}_ids": np.array(ids, np.int16)[:, None]})


@pytest.fixture
def tinyface(tmp_path):
    folder = tmp_path / "tinyface" / "Testing_Set"
    write_images(folder / "Probe", ["3_1.png", "5_1.png"], [colour_of(3, 0), colour_of(5, 0)])
    write_images(folder / "Gallery_Match", ["5_2.png", "3_2.png"], [colour_of(5, 4), colour_of(3, 4)])
    write_images(
        folder / "Gallery_Distractor", [f"{i}.png" for i in range(3)], [colour_of(i, 0) for i in range(3)]
    )
    write_mat(folder / "probe_img_ID_pairs.mat", "probe", ["5_1.png", "3_1.png"], [5, 3])
    write_mat(folder / "gallery_match_img_ID_pairs.mat", "gallery", ["3_2.png", "5_2.png"], [3, 5])
    return tmp_path / "tinyface"


@pytest.mark.parametrize("part", ["", "Testing_Set"])
def test_tinyface_with_an_exported_model(tinyface, tmp_path, exported, capsys, part):
    options = ["--data", tinyface / part, "--save", tmp_path / "x.npz"]
    evaluate("--protocol", "tinyface", "--model", exported, *options)
    output = printed(capsys)
    assert (output["probes"], output["gallery"], output["distractors"], output["rank-1"]) == (
        "2",
        "2",
        "3",
        "1.00000",
    )
    arrays = load_features(tmp_path / "x.npz")
    names = ["Probe/5_1.png", "Probe/3_1.png", "Gallery_Match/3_2.png", "Gallery_Match/5_2.png"]
    assert arrays["names"].tolist() == names + [f"Gallery_Distractor/{i}.png" for i in range(3)]
    assert arrays["labels"].tolist() == [5, 3, 3, 5, -100, -100, -100]


def test_damaged_files_are_named(tinyface, exported):
    path = tinyface / "Testing_Set" / "probe_img_ID_pairs.mat"
    write_mat(path, "gallery", ["a"], [1])
    with pytest.raises(
        ValueError, match=r"probe_img_ID_pairs\.mat should have as many names probe_set as identities"
    ):
        read_tinyface(path, "probe")
    path.write_bytes(b"no MATLAB file" * 20)
    with pytest.raises(SystemExit, match=r"probe_img_ID_pairs\.mat cannot be read as a MATLAB file"):
        evaluate("--protocol", "tinyface", "--model", exported, "--data", tinyface)
    path.unlink()
    with pytest.raises(SystemExit, match=r"probe_img_ID_pairs\.mat"):
        evaluate("--protocol", "tinyface", "--model", exported, "--data", tinyface)


@pytest.mark.parametrize("kind", ["probe", "gallery"])
def test_the_label_of_distractors_is_no_identity(tmp_path, kind):
    write_mat(tmp_path / "x.mat", kind, ["a.png", "b.png"], [3, -100])
    with pytest.raises(ValueError, match=rf"{kind}_ids of .*x\.mat have -100, the label of distractors"):
        read_tinyface(tmp_path / "x.mat", kind)


def test_without_scipy_the_files_are_refused(tinyface, exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(SystemExit, match=r"Reading .*probe_img_ID_pairs\.mat needs SciPy: pip install scipy"):
        evaluate("--protocol", "tinyface", "--model", exported, "--data", tinyface)
