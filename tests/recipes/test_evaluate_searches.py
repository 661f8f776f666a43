"""Probes sought in a gallery, by the evaluation command: MegaFace, identification, retrieval."""

import json

import numpy as np
import pytest
from support.evaluation import colour_of, directions, evaluate, printed, write_images

from cosface_recipes.evaluation.features import load_features, save_features, write_matrix
from cosface_recipes.evaluation.megaface import clean


def test_megaface_of_features(megaface, tmp_path, capsys):
    probes, others = megaface
    figures = ["--json", tmp_path / "x.json", "--cmc", tmp_path / "cmc.png"]
    arguments = ["--protocol", "megaface", "--features", probes, "--distractors", others, *figures]
    evaluate(*arguments, "--sizes", "12,27")
    rows = json.loads((tmp_path / "x.json").read_text())
    assert rows["rank-1 of 12"] == 1.0
    assert rows["rank-1 of 27"] == 0.0  # each probe is among its distractors
    assert rows["cleaned lists"] == "no"
    assert (tmp_path / "cmc.png").stat().st_size > 1000
    capsys.readouterr()
    evaluate(*arguments)
    rows = json.loads((tmp_path / "x.json").read_text())
    assert rows["distractors"] == 10  # the default: the powers of ten
    assert rows["rank-1 of 10"] == 1.0
    output = printed(capsys)
    assert output["TAR@FAR=1e-06"] == "n/a"
    assert output["TAR@FAR=0.1"] == "1.00000"


def test_noise_is_moved_and_not_deleted(tmp_path, capsys):
    """Ann is at 0, 20 and, by mistake, 180 degrees, and so is a distractor, at 9."""
    probes = {"features": directions(0, 20, 180), "labels": np.zeros(3, int)}
    save_features(
        tmp_path / "probes.npz", probes | {"names": np.array(["Ann/Ann_1.png", "Ann/Ann_2.png", "Ann/Ann_3.png"])}
    )
    others = {"features": directions(9, 50, length=3), "names": np.array(["7/x/1.png", "7/x/2.png"])}
    save_features(tmp_path / "others.npz", others)
    (tmp_path / "probes.txt").write_text("# by hand\nAnn_3.png\n", encoding="utf-8-sig")
    (tmp_path / "others.txt").write_bytes(b"1\t7/x/1.png\r\n")
    options = ["--features", tmp_path / "probes.npz", "--distractors", tmp_path / "others.npz", "--sizes", "2"]
    evaluate("--protocol", "megaface", *options)
    assert printed(capsys)["rank-1 of 2"] == "0.00000"
    evaluate("--protocol", "megaface", *options, "--noise", tmp_path / "probes.txt")
    # The third is now at 10 degrees; only in the gallery of 10, for the probe of 20, is no distractor nearer (11).
    assert printed(capsys)["rank-1 of 2"] == f"{1 / 6:.5f}"
    evaluate("--protocol", "megaface", *options, "--noise", tmp_path / "probes.txt", tmp_path / "others.txt")
    output = printed(capsys)
    assert (output["probes"], output["distractors"], output["rank-1 of 2"]) == ("3", "2", "1.00000")
    assert (output["cleaned lists"], output["noisy probes"], output["noisy distractors"]) == ("yes", "1", "1")


def test_cleaned_features_by_hand():
    """The centre is that of directions; a noisy distractor's cosines are divided by |(1, 100)|."""
    probes, distractors = directions(0, 20, 180) * [[5], [1], [1]], directions(9, 50, length=3)
    a, b = clean(probes, np.zeros(3, int), np.array([0, 0, 1], bool), distractors, np.array([1, 0], bool))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(a, np.column_stack([directions(0, 20, 10), [0, 0, 0]]), atol=1e-6)
    expected = np.cos(np.deg2rad([[9, 50], [11, 30], [1, 40]])) / [np.sqrt(1 + 100**2), 1]
    np.testing.assert_allclose(a @ b.T, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"All 3 photos of identity 0 are noise, so that it has no centre"):
        clean(probes, np.zeros(3, int), np.ones(3, bool), distractors, np.zeros(2, bool))


@pytest.mark.parametrize(("content", "names"), [("Bob_1.png\n", 1), ("5\t.png\n\n6\t0/0.png", 2), ("# none", 0)])
def test_a_list_of_noise_that_matches_nothing_is_refused(megaface, tmp_path, content, names):
    probes, others = megaface
    (tmp_path / "noise.txt").write_text(content)
    message = rf"None of the {names} names of .*noise\.txt is .* probes are .* 'id0/0\.png', distractors .* '0'"
    with pytest.raises(SystemExit, match=message):
        evaluate(
            *("--protocol", "megaface", "--features", probes, "--distractors", others),
            *("--noise", tmp_path / "noise.txt"),
        )


def test_identification_of_features(tmp_path, capsys):
    """Ann's and Bob's probes are 5 and 40 degrees from theirs; a stranger's is 10 from Ann's."""
    gallery = {"features": directions(0, 90), "labels": np.array(["Ann", "Bob"])}
    probes = {"features": directions(5, 50, -10), "labels": np.array(["Ann", "Bob", "Cem"])}
    save_features(tmp_path / "gallery.npz", gallery)
    save_features(tmp_path / "probes.npz", probes)
    options = ["--features", tmp_path / "probes.npz", "--gallery", tmp_path / "gallery.npz"]
    figures = ["--json", tmp_path / "x.json", "--cmc", tmp_path / "cmc.png", "--roc", tmp_path / "roc.png"]
    evaluate("--protocol", "identification", *options, *figures)
    rows = json.loads((tmp_path / "x.json").read_text())
    assert (rows["mated probes"], rows["non-mated probes"], rows["identities in the gallery"]) == (2, 1, 2)
    assert (rows["rank-1"], rows["rank-20"]) == (1.0, 1.0)
    assert printed(capsys)["TPIR@FPIR=0.1"] == "n/a"  # of one non-mated probe there is no tenth
    assert min((tmp_path / name).stat().st_size for name in ("cmc.png", "roc.png")) > 1000
    strangers = {"features": directions(*[-10] * 9, -1), "labels": np.array(["Cem"] * 10)}
    both = {name: np.concatenate([probes[name][:2], strangers[name]]) for name in probes}
    save_features(tmp_path / "probes.npz", both)
    evaluate("--protocol", "identification", *options)
    assert printed(capsys)["TPIR@FPIR=0.1"] == "0.50000"  # the threshold is at 10 degrees


def test_retrieval_of_features(tmp_path, capsys):
    save_features(
        tmp_path / "x.safetensors", {"features": directions(0, 10, 4, 90), "labels": np.array([5, 5, 8, 8])}
    )
    evaluate("--protocol", "retrieval", "--features", tmp_path / "x.safetensors")
    output = printed(capsys)
    assert (output["queries"], output["gallery"]) == ("4", "4")
    # Nearest first: of 0: 4, 10; of 10: 4, 0; of 4: 0, 10, 90; of 90: 10, 4.
    assert (output["recall@1"], output["recall@5"], output["mAP@R"]) == ("0.00000", "1.00000", "0.00000")
    options = ["--features", tmp_path / "x.safetensors", "--gallery", tmp_path / "x.safetensors"]
    evaluate("--protocol", "retrieval", *options)
    output = printed(capsys)
    # Each finds itself; with R = 2 nobody's second is the other one.
    assert (output["recall@1"], output["mAP@R"]) == ("1.00000", "0.50000")


@pytest.mark.parametrize("ending", [".jpg_net.bin", ".bin"])
def test_search_among_matrices(ending, tmp_path, capsys):
    """A folder is an identity by its name, and not by its place among the folders."""
    matrices = [("probes/x/Bob_Roe/1", 5), ("gallery/Ann_Poe/1", 90), ("gallery/Bob_Roe/2", 0)]
    for name, angle in matrices:
        path = tmp_path / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_matrix(path, directions(angle)[0])
    options = ["--features", tmp_path / "probes", "--gallery", tmp_path / "gallery"]
    evaluate("--protocol", "identification", *options)
    output = printed(capsys)
    assert (output["rank-1"], output["identities in the gallery"]) == ("1.00000", "2")


@pytest.mark.parametrize("ending", [".jpg_net.bin", ".bin"])
def test_retrieval_among_matrices(ending, tmp_path, capsys):
    """Nearest to each is one of another person, whose folder begins alike."""
    for name, angle in (("Jane_1/1", 0), ("Jane_1/2", 20), ("Jane_2/1", 1), ("Jane_2/2", 21)):
        path = tmp_path / "all" / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_matrix(path, directions(angle)[0])
    evaluate("--protocol", "retrieval", "--features", tmp_path)
    output = printed(capsys)
    assert (output["recall@1"], output["recall@5"]) == ("0.00000", "1.00000")


def test_two_folders_of_one_name_are_refused(tmp_path):
    """Which may be one identity or two; of MegaFace's probes, which are named nowhere else, they are two."""
    for name, angle in (("a/1/x", 0), ("a/1/y", 1), ("b/1/x", 90), ("b/1/y", 91)):
        path = tmp_path / f"{name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_matrix(path, directions(angle)[0])
    with pytest.raises(SystemExit, match=r"is that of an identity, and .* has two of one name, a/1 and b/1: put"):
        evaluate("--protocol", "retrieval", "--features", tmp_path)
    assert load_features(tmp_path)["labels"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        ({"labels": np.array(["a", "b"])}, r"The gallery's labels are text, and those of what is sought numbers"),
        (
            {"features": np.ones((2, 3), np.float32)},
            r"features are 3 numbers each, and those of .* 2 numbers each",
        ),
    ],
)
def test_a_gallery_that_cannot_be_compared_is_refused(tmp_path, gallery, message):
    arrays = {"features": directions(0, 10), "labels": np.array([5, 8])}
    save_features(tmp_path / "x.npz", arrays)
    save_features(tmp_path / "y.npz", arrays | gallery)
    options = ["--features", tmp_path / "x.npz", "--gallery", tmp_path / "y.npz"]
    with pytest.raises(SystemExit, match=message):
        evaluate("--protocol", "identification", *options)


@pytest.mark.parametrize("protocol", ["retrieval", "identification", "megaface"])
def test_features_of_another_model_are_refused(protocol, tmp_path, exported):
    """Of a file that embed.py or --save wrote, by a model or by another file."""
    arrays = {
        "features": np.ones((2, 8), np.float32),
        "labels": np.array(["A", "B"]),
        "names": np.array(["A/1", "B/1"]),
    }
    for name in ("one", "another"):
        save_features(tmp_path / f"{name}.npz", arrays | {"model": np.array([name])})
    write_images(tmp_path / "images", ["A/1.png", "A/2.png", "B/1.png"], [colour_of(i, 0) for i in range(3)])
    among = ["--distractors" if protocol == "megaface" else "--gallery", tmp_path / "another.npz"]
    with pytest.raises(
        SystemExit, match=r"another model: its digest is another, and that of what is sought one\."
    ):
        evaluate("--protocol", protocol, "--features", tmp_path / "one.npz", *among)
    of_model = ["--model", exported, "--data", tmp_path / "images"]
    with pytest.raises(
        SystemExit, match=r"another model: its digest is another, and that of what is sought [0-9a-f]{8}"
    ):
        evaluate("--protocol", protocol, *of_model, *among)
    itself = [among[0], tmp_path / "images", "--save", tmp_path / "saved.npz"]
    evaluate("--protocol", protocol, *of_model, *itself)
    with pytest.raises(SystemExit, match="another model"):
        evaluate("--protocol", protocol, "--features", tmp_path / "saved.npz", *among)


def test_matrices_in_linked_folders_are_read_and_hidden_files_are_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "matrices").mkdir()
    write_matrix(tmp_path / "elsewhere" / "1.jpg_net.bin", directions(5)[0])
    (tmp_path / "elsewhere" / "._1.jpg_net.bin").write_bytes(b"of macOS")
    (tmp_path / "matrices" / "Ann").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    arrays = load_features(tmp_path / "matrices")
    assert arrays["names"].tolist() == ["Ann/1.jpg"]
    np.testing.assert_array_equal(arrays["features"], directions(5))


def test_matrices_that_lie_in_no_sub_folder_have_no_identity(tmp_path):
    for i in range(3):
        write_matrix(tmp_path / f"{i}.jpg_net.bin", directions(i)[0])
    with pytest.raises(
        SystemExit, match=r"lack labels\. The identity of a matrix is the sub-folder that it lies in\."
    ):
        evaluate("--protocol", "retrieval", "--features", tmp_path)


def test_search_with_an_exported_model(tmp_path, exported, capsys):
    """The labels are the folders' names, which need not be the same in both."""
    write_images(tmp_path / "probes", ["B/1.png", "C/1.png", "D/1.png"], [colour_of(i, 0) for i in (1, 2, 3)])
    write_images(tmp_path / "gallery", ["A/1.png", "B/2.png", "D/2.png"], [colour_of(i, 0) for i in (0, 1, 3)])
    options = ["--model", exported, "--data", tmp_path / "probes", "--gallery", tmp_path / "gallery"]
    evaluate("--protocol", "identification", *options)
    output = printed(capsys)
    assert (output["mated probes"], output["non-mated probes"], output["rank-1"]) == ("2", "1", "1.00000")
    evaluate("--protocol", "retrieval", *options)
    output = printed(capsys)
    assert (output["queries with a match"], output["recall@1"], output["mAP@R"]) == ("2", "1.00000", "1.00000")
