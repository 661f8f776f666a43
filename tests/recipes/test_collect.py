"""The images of each protocol's data set, embedded."""

import numpy as np
import pytest
from support.evaluation import colour_of, encoded, expected_feature, write_ijb, write_images

from cosface_recipes.data.pairs import write_bin
from cosface_recipes.evaluation import reports
from cosface_recipes.evaluation.collect import (
    Embedder,
    collect_bin,
    collect_identities,
    collect_ijb,
    collect_images,
    collect_lfw,
    collect_ytf,
    read_ijb,
    read_ijb_pairs,
)
from cosface_recipes.evaluation.protocols import cross_validate, pair_distances


@pytest.fixture
def embedder() -> Embedder:
    return Embedder(lambda images: images.mean((2, 3)), size=8, color="rgb", flip="sum", batch_size=3)


def test_lfw_from_images(tmp_path, embedder):
    write_images(
        tmp_path,
        ["A/A_0001.png", "A/A_0002.png", "B/B_0001.png"],
        [colour_of(0, 0), colour_of(0, 9), colour_of(1, 0)],
    )
    (tmp_path / "pairs.txt").write_text("1\nA\t1\t2\nA\t2\tB\t1\n")
    arrays = collect_lfw(embedder, tmp_path, tmp_path / "pairs.txt")
    np.testing.assert_allclose(arrays["features"][1], expected_feature(colour_of(0, 9)), atol=1e-6)
    assert arrays["pairs"].tolist() == [[0, 1], [1, 2]]
    assert arrays["same"].tolist() == [True, False]


def test_ytf_from_images(tmp_path, embedder):
    names = ["A/0/1.png", "A/0/2.png", "A/1/1.png", "B/2/1.png"]
    write_images(tmp_path, names, [colour_of(0, i) for i in range(4)])
    (tmp_path / "splits.txt").write_text("split, first, second, same\n1, A/0, B/2, 0\n1, A/1, A/0, 1\n")
    arrays = collect_ytf(embedder, tmp_path, tmp_path / "splits.txt")
    assert arrays["videos"].tolist() == [0, 0, 1, 2]
    assert arrays["pairs"].tolist() == [[0, 2], [1, 0]]
    assert len(arrays["features"]) == 4
    (tmp_path / "splits.txt").write_text("1, A/0, C/2, 0\n")
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 videos have no frames, .*C.2 first"):
        collect_ytf(embedder, tmp_path, tmp_path / "splits.txt")


def test_megaface_from_images(tmp_path, embedder):
    write_images(tmp_path / "probes", ["A/1.png", "A/2.png", "B/1.png"], [colour_of(i, 0) for i in range(3)])
    write_images(tmp_path / "others", ["000/x/1.png", "001/y/1.png"], [colour_of(i, 0) for i in range(2)])
    arrays = collect_identities(embedder, tmp_path / "probes")
    assert arrays["labels"].tolist() == [0, 0, 1]
    assert arrays["names"].tolist() == ["A/1.png", "A/2.png", "B/1.png"]
    assert collect_images(embedder, tmp_path / "others")["names"].tolist() == ["000/x/1.png", "001/y/1.png"]
    with pytest.raises(ValueError, match=r"The folder .*empty has no images"):
        collect_images(embedder, tmp_path / "empty")


def test_ijb_from_images(tmp_path):
    write_ijb(tmp_path, [(7, 1, 0.5), (7, 1, 1.0), (9, 4, 0.25)], [(7, 9, 0), (9, 7, 1)])
    colours = [colour_of(i, 0) for i in range(3)]
    write_images(tmp_path / "loose_crop", ["1.png", "2.png", "3.png"], colours)
    for i, colour in enumerate(colours):
        (tmp_path / "loose_crop" / f"{i + 1}.png").write_bytes(encoded(colour, 112))
    embedder = Embedder(lambda images: images[:, :, 20:90, 20:90].mean((2, 3)), size=112, color="rgb")
    arrays = collect_ijb(embedder, tmp_path, "ijbb") | read_ijb_pairs(tmp_path, "ijbb")
    np.testing.assert_allclose(arrays["features"], [expected_feature(colour) for colour in colours], atol=0.02)
    assert arrays["templates"].tolist() == [7, 7, 9]
    assert arrays["media"].tolist() == [1, 1, 4]
    assert arrays["scores"].tolist() == [0.5, 1.0, 0.25]
    assert arrays["pairs"].tolist() == [[7, 9], [9, 7]]
    assert arrays["same"].tolist() == [False, True]
    (tmp_path / "meta" / "ijbb_face_tid_mid.txt").write_text("1.png 7\n")
    with pytest.raises(
        ValueError, match=r"The line '1\.png 7' of .*tid_mid\.txt should have a name and 2 whole n"
    ):
        collect_ijb(embedder, tmp_path, "ijbb")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "face_tid_mid",
            "2.png 7 1\n1.png 9 4\n",
            r"Image 1 of .*tid_mid\.txt is 2\.png, and that of .* 1\.png: both",
        ),
        ("face_tid_mid", "1.png 7 1\n", r"Image 2 of .* is missing, and that of .* 2\.png"),
        ("face_tid_mid", "1.png 7.5 1\n", r"'1\.png 7\.5 1' of .* should have a name and 2 whole numbers\."),
        ("face_tid_mid", "", r"tid_mid\.txt has no line\."),
        ("name_5pts_score", "1.png " + "1 " * 10 + "nan\n", r"should have a name and 11 numbers\."),
        ("template_pair_label", "", r"got 0 lines of any numbers\."),
        (
            "template_pair_label",
            "7 9\n",
            r"should have two templates and a label in every line, got 1 lines of 2 n",
        ),
        ("template_pair_label", "7 9 1\n7 9 2\n", r"Pair 2 of .* has the label 2, which should be 0 or 1\."),
        ("template_pair_label", "7 x 1\n", r"should have two templates and a label in every line: .*'x'"),
    ],
)
def test_a_file_of_ijb_that_is_none_is_named(tmp_path, name, text, message):
    write_ijb(tmp_path, [(7, 1, 0.5), (9, 4, 0.25)], [(7, 9, 0)])
    (tmp_path / "meta" / f"ijbb_{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ijb(tmp_path, "ijbb") | read_ijb_pairs(tmp_path, "ijbb")


def test_a_bin_file_from_images_to_figures(tmp_path, embedder):
    identities = [(i // 2, (i // 2 + i % 2) % 20) for i in range(40)]  # every second pair is of one identity
    images = [encoded(colour_of(identity, photo)) for pair in identities for photo, identity in enumerate(pair)]
    same = [a == b for a, b in identities]
    write_bin(tmp_path / "x.bin", images, same)
    arrays = collect_bin(embedder, tmp_path / "x.bin")
    report = reports.report_pairs(arrays)
    assert report.rows["pairs"] == 40
    assert report.rows["accuracy"] == cross_validate(pair_distances(arrays["features"]), same).accuracy
    assert report.curves["pairs"].pairs == (20, 20)
