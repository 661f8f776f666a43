"""The evaluation command: each protocol from images and from files of features, and messages on bad ones."""

import io
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import evaluate_protocol
from cosface_recipes import export
from cosface_recipes.data.alignment import LANDMARKS, align, similarity_transform
from cosface_recipes.data.pairs import write_bin
from cosface_recipes.evaluation.collect import (
    Embedder,
    collect_bin,
    collect_identities,
    collect_ijb,
    collect_images,
    collect_lfw,
    collect_ytf,
)
from cosface_recipes.evaluation.features import load_features, read_matrix, save_features, write_matrix
from cosface_recipes.evaluation.megaface import clean
from cosface_recipes.evaluation.protocols import cross_validate, pair_distances
from cosface_recipes.models import make_model

# Features on disk


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_come_back_as_they_were_saved(tmp_path, suffix):
    arrays = {
        "features": np.arange(6, dtype=np.float32).reshape(3, 2)[::-1],
        "labels": np.array([2, 0, 1]),
        "same": np.array([True, False]),
        "names": np.array(["a/1.png", "b", "c"]),
    }
    save_features(tmp_path / "new" / f"x{suffix}", arrays)
    loaded = load_features(tmp_path / "new" / f"x{suffix}")
    assert set(loaded) == set(arrays) - ({"names"} if suffix == ".safetensors" else set())
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype


def test_a_matrix_of_megaface_by_hand(tmp_path):
    write_matrix(tmp_path / "x.bin", np.float32([1.5, -2, 0]))
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<4i3f", 3, 1, 4, 5, 1.5, -2, 0)
    assert read_matrix(tmp_path / "x.bin").tolist() == [1.5, -2, 0]


@given(
    st.binary(max_size=40)
    | st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6).map(lambda n: struct.pack(f"<{len(n)}i", *n))
)
def test_a_damaged_matrix_is_named(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("matrix") / "x.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"The matrix .*x\.bin "):
        read_matrix(path)


def test_a_folder_of_matrices(tmp_path):
    for i, name in enumerate(["Ann/1.png_net.bin", "Ann/2.png_net.bin", "Bo/an_odd_name.jpg_net.bin"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_matrix(tmp_path / name, np.float32([i, 1]))
    arrays = load_features(tmp_path)
    assert arrays["features"].tolist() == [[0, 1], [1, 1], [2, 1]]
    assert arrays["labels"].tolist() == [0, 0, 1]
    assert arrays["names"].tolist() == ["Ann/1.png", "Ann/2.png", "Bo/an_odd_name.jpg"]
    write_matrix(tmp_path / "Bo" / "short.bin", np.float32([1]))
    with pytest.raises(ValueError, match=r"short\.bin has 1 numbers, and .*1\.png_net\.bin has 2"):
        load_features(tmp_path)


def objects(path: Path) -> None:
    np.savez(path, features=np.array([{}], object))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        (
            "x.npy",
            lambda path: path.write_bytes(b""),
            r"Features are a \.npz or \.safetensors file, .* got .*x\.npy",
        ),
        ("x.npz", lambda path: path.write_bytes(b"PK"), r"The features .*x\.npz cannot be read"),
        ("x.npz", lambda path: path.write_bytes(b""), r"The features .*x\.npz cannot be read"),
        ("x.npz", objects, r"The features .*x\.npz cannot be read: Object arrays cannot be loaded"),
        ("x.npz", lambda path: np.savez(path, a=np.ones(2), b=1), r"named features; it has a, b"),
        (
            "x.npz",
            lambda path: np.savez(path, features=np.ones(2)),
            r"should have an \(n, D\) array named features",
        ),
        ("x.safetensors", lambda path: path.write_bytes(b"12345678"), r"The features .*tensors cannot be read"),
        ("x", lambda path: path.mkdir(), r"The folder .*x has no \.bin file"),
    ],
)
def test_unreadable_features_are_named(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_features(tmp_path / name)


def test_an_unknown_kind_of_file_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"Features are saved as \.npz or \.safetensors, got .*x\.pkl"):
        save_features(tmp_path / "x.pkl", {})
    with pytest.raises(ValueError, match=r"x\.safetensors cannot hold text, of which labels are; \.npz can"):
        save_features(tmp_path / "x.safetensors", {"labels": np.array(["Ann"])})


# Alignment


def test_a_similarity_is_found_again():
    angle, scale = np.deg2rad(25), 1.7
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found = similarity_transform(LANDMARKS, LANDMARKS @ rotation.T + [3, -8])
    np.testing.assert_allclose(found, np.column_stack([rotation, [3, -8]]), rtol=1e-10)


def test_a_mirror_image_is_not_reflected_back():
    found = similarity_transform(LANDMARKS, LANDMARKS * [-1, 1])
    assert np.linalg.det(found[:, :2]) > 0


def test_the_least_squares_have_no_better_neighbour():
    random = np.random.default_rng(0)
    target = LANDMARKS * 0.6 + random.normal(0, 4, (5, 2))

    def error(a, b, x, y):
        return np.square(LANDMARKS @ np.array([[a, b], [-b, a]]) + [x, y] - target).sum()

    found = similarity_transform(LANDMARKS, target)
    best = (found[0, 0], found[1, 0], *found[:, 2])
    for step in np.concatenate([np.eye(4), -np.eye(4)]) * 1e-3:
        assert error(*best) < error(*(best + step))


def test_landmarks_arrive_where_they_belong():
    """A white spot around each landmark of a photograph twice as large and turned by a right angle."""
    landmarks = (LANDMARKS * 2)[:, ::-1] * [1, -1] + [10, 260]
    y, x = np.mgrid[:300, :300]
    spots = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / 50) for a, b in landmarks)
    face = np.asarray(align(Image.fromarray((255 * spots).clip(max=255).astype(np.uint8)), landmarks)).astype(
        float
    )
    assert face.shape == (112, 112)
    y, x = np.mgrid[:112, :112]
    for a, b in LANDMARKS:
        weight = face * ((x - a) ** 2 + (y - b) ** 2 < 64)
        assert (weight * x).sum() / weight.sum() == pytest.approx(a, abs=0.1)
        assert (weight * y).sum() / weight.sum() == pytest.approx(b, abs=0.1)
    outside = align(Image.new("L", (300, 300), 255), landmarks + np.array([400, 0]))
    assert np.asarray(outside).max() == 0


POSES = {  # landmarks of a photograph, and the crop's width of insightface's estimate over that of the reverse one
    "near-frontal": ([[110, 140], [182, 138], [147, 180], [117, 222], [176, 221]], 0.9999),
    "three-quarter": ([[120, 140], [165, 142], [170, 180], [122, 222], [160, 224]], 0.8923),
    "profile": ([[150, 140], [162, 141], [196, 178], [152, 222], [164, 222]], 0.6332),
}


@pytest.mark.parametrize("size", [112, 96])
@pytest.mark.parametrize("pose", POSES)
def test_a_crop_is_the_inverse_of_the_estimate_from_photograph_to_template(pose, size):
    """Photographs whose grey values are their coordinates; the estimate by the normal equations."""
    landmarks, narrower = np.array(POSES[pose][0], float), POSES[pose][1]
    x, y = landmarks.T
    one, zero = np.ones(5), np.zeros(5)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    a, b, *shift = np.linalg.lstsq(rows, (LANDMARKS * size / 112).T.ravel(), rcond=None)[0]
    result = np.mgrid[:size, :size][::-1].reshape(2, -1)  # x, y
    expected = np.linalg.solve([[a, -b], [b, a]], result - np.array(shift)[:, None])  # in the photograph
    photograph = np.mgrid[:400, :400][::-1].astype(np.float32)
    found = [np.asarray(align(Image.fromarray(axis), landmarks, size)).ravel() for axis in photograph]
    inside = ((expected >= 1) & (expected <= 398)).all(0)
    assert inside.mean() > 0.7
    np.testing.assert_allclose(np.array(found)[:, inside], expected[:, inside], atol=1e-2)
    reverse = similarity_transform(LANDMARKS * size / 112, landmarks)
    assert np.linalg.norm(reverse[:, 0]) * np.hypot(a, b) == pytest.approx(narrower, abs=1e-4)


# From images


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encoded(colour: tuple[int, int, int], size: int = 8) -> bytes:
    return png(np.full((size, size, 3), colour, np.uint8))


def colour_of(identity: int, photo: int) -> tuple[int, int, int]:
    """Identities differ in hue, photos a little in brightness."""
    angle = identity * 2.4
    return tuple(int(128 + (90 + photo) * np.cos(angle + turn)) for turn in (0, 2.1, 4.2))


@pytest.fixture
def embedder() -> Embedder:
    return Embedder(lambda images: images.mean((2, 3)), size=8, color="rgb", flip="sum", batch_size=3)


def write_images(folder: Path, names: list[str], colours: list[tuple[int, int, int]]) -> None:
    for name, colour in zip(names, colours, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(colour))


def expected_feature(colour: tuple[int, int, int]) -> np.ndarray:
    return 2 * (np.array(colour) - 127.5) / 127.5


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


def write_ijb(folder: Path, images: list[tuple[int, int, float]], pairs: list[tuple[int, int, int]]) -> None:
    """Photographs of 112 pixels that need no alignment; (template, medium, score) each."""
    (folder / "meta").mkdir(parents=True)
    points = " ".join(map(str, LANDMARKS.ravel()))
    names = [f"{i + 1}.png" for i in range(len(images))]
    faces = [f"{name} {template} {medium}" for name, (template, medium, _) in zip(names, images, strict=True)]
    scores = [f"{name} {points} {score}" for name, (_, _, score) in zip(names, images, strict=True)]
    (folder / "meta" / "ijbb_face_tid_mid.txt").write_text("\n".join(faces) + "\n")
    (folder / "meta" / "ijbb_name_5pts_score.txt").write_text("\n".join(scores) + "\n")
    (folder / "meta" / "ijbb_template_pair_label.txt").write_text("".join(f"{a} {b} {c}\n" for a, b, c in pairs))


def test_ijb_from_images(tmp_path):
    write_ijb(tmp_path, [(7, 1, 0.5), (7, 1, 1.0), (9, 4, 0.25)], [(7, 9, 0), (9, 7, 1)])
    colours = [colour_of(i, 0) for i in range(3)]
    write_images(tmp_path / "loose_crop", ["1.png", "2.png", "3.png"], colours)
    for i, colour in enumerate(colours):
        (tmp_path / "loose_crop" / f"{i + 1}.png").write_bytes(encoded(colour, 112))
    embedder = Embedder(lambda images: images[:, :, 20:90, 20:90].mean((2, 3)), size=112, color="rgb")
    arrays = collect_ijb(embedder, tmp_path, "ijbb")
    np.testing.assert_allclose(arrays["features"], [expected_feature(colour) for colour in colours], atol=0.02)
    assert arrays["templates"].tolist() == [7, 7, 9]
    assert arrays["media"].tolist() == [1, 1, 4]
    assert arrays["scores"].tolist() == [0.5, 1.0, 0.25]
    assert arrays["pairs"].tolist() == [[7, 9], [9, 7]]
    assert arrays["same"].tolist() == [False, True]
    (tmp_path / "meta" / "ijbb_face_tid_mid.txt").write_text("1.png 7\n")
    with pytest.raises(
        ValueError, match=r"The line '1\.png 7' of .*tid_mid\.txt should have a name and 2 numbers"
    ):
        collect_ijb(embedder, tmp_path, "ijbb")


def test_a_bin_file_from_images_to_figures(tmp_path, embedder):
    identities = [(i // 2, (i // 2 + i % 2) % 20) for i in range(40)]  # every second pair is of one identity
    images = [encoded(colour_of(identity, photo)) for pair in identities for photo, identity in enumerate(pair)]
    same = [a == b for a, b in identities]
    write_bin(tmp_path / "x.bin", images, same)
    arrays = collect_bin(embedder, tmp_path / "x.bin")
    report = evaluate_protocol.evaluate_lfw(arrays)
    assert report.rows["pairs"] == 40
    assert report.rows["accuracy"] == cross_validate(pair_distances(arrays["features"]), same).accuracy
    assert report.curve.pairs == (20, 20)


# From files of features


def command(*arguments: object) -> None:
    evaluate_protocol.main([*map(str, arguments)])


def printed(capsys) -> dict[str, str]:
    return dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())


def identity_features(identities: int, photos: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(identities, 16))
    labels = np.repeat(np.arange(identities), photos)
    return (centres[labels] + 0.3 * random.normal(size=(len(labels), 16))).astype(np.float32), labels


@pytest.fixture
def lfw(tmp_path) -> Path:
    features, _ = identity_features(40, 2)
    first = np.arange(0, 80, 2)
    pairs = np.stack([first, np.where(first % 4, first + 1, (first + 2) % 80)], 1)
    save_features(tmp_path / "lfw.npz", {"features": features, "pairs": pairs, "same": first % 4 != 0})
    return tmp_path / "lfw.npz"


@pytest.mark.parametrize("protocol", ["lfw", "bin"])
def test_verification_of_features(lfw, tmp_path, capsys, protocol):
    command(
        "--protocol",
        protocol,
        "--features",
        lfw,
        "--json",
        tmp_path / "new" / "x.json",
        "--roc",
        tmp_path / "roc.png",
    )
    arrays = load_features(lfw)
    result = cross_validate(pair_distances(arrays["features"], arrays["pairs"]), arrays["same"])
    rows = json.loads((tmp_path / "new" / "x.json").read_text())
    assert rows["accuracy"] == result.accuracy > 0.9
    assert rows["cosine threshold"] == result.cosine_threshold
    assert rows["protocol"] == protocol
    assert rows["population standard deviation"] == result.accuracies.std()
    assert rows["sample standard deviation"] == result.accuracies.std(ddof=1)
    assert rows["standard error"] == result.accuracies.std(ddof=1) / math.sqrt(10)
    assert printed(capsys)["accuracy"] == f"{result.accuracy:.5f}"
    with Image.open(tmp_path / "roc.png") as image:
        assert image.format == "PNG"


def test_a_bin_file_tells_which_pairs_are_the_same(tmp_path, capsys):
    features, _ = identity_features(20, 4)
    write_bin(tmp_path / "x.bin", [b""] * 80, [True, False] * 20)
    pairs = np.arange(80).reshape(20, 4)
    order = np.stack([pairs[:, [0, 1]], np.stack([pairs[:, 2], np.roll(pairs[:, 3], 1)], 1)], 1).ravel()
    save_features(tmp_path / "x.safetensors", {"features": features[order]})
    command("--protocol", "bin", "--features", tmp_path / "x.safetensors", "--data", tmp_path / "x.bin")
    assert float(printed(capsys)["accuracy"]) > 0.9


def test_ytf_of_features(tmp_path, capsys):
    features, _ = identity_features(40, 6)
    videos = np.arange(240) // 3 + 100  # two videos per identity
    first = np.arange(0, 80, 2)
    pairs = np.stack([first, np.where(first % 4, first + 1, (first + 2) % 80)], 1) + 100
    save_features(
        tmp_path / "x.npz", {"features": features, "videos": videos, "pairs": pairs, "same": first % 4 != 0}
    )
    command("--protocol", "ytf", "--features", tmp_path / "x.npz")
    assert float(printed(capsys)["accuracy"]) > 0.9


def test_ijb_of_features(tmp_path, capsys):
    features, _ = identity_features(6, 4)
    images = [(10 * label + i // 2, i, 0.9) for label in range(6) for i in range(4)]  # two templates per identity
    pairs = [(10 * a + i, 10 * b + j, int(a == b)) for a in range(6) for b in range(6) for i, j in [(0, 1)]]
    write_ijb(tmp_path / "IJBB", images, pairs)
    save_features(tmp_path / "x.npz", {"features": features})
    command("--protocol", "ijb", "--features", tmp_path / "x.npz", "--data", tmp_path / "IJBB", "--target", "ijbb")
    output = printed(capsys)
    assert (output["templates"], output["pairs"]) == ("12", "36")
    assert {value for name, value in output.items() if name.startswith("TAR")} == {"1.00000"}


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


def test_megaface_of_features(megaface, tmp_path, capsys):
    probes, others = megaface
    figures = ["--json", tmp_path / "x.json", "--cmc", tmp_path / "cmc.png"]
    arguments = ["--protocol", "megaface", "--features", probes, "--distractors", others, *figures]
    command(*arguments, "--sizes", "12,27")
    rows = json.loads((tmp_path / "x.json").read_text())
    assert rows["rank-1 of 12"] == 1.0
    assert rows["rank-1 of 27"] == 0.0  # each probe is among its distractors
    assert rows["cleaned lists"] == "no"
    assert (tmp_path / "cmc.png").stat().st_size > 1000
    capsys.readouterr()
    command(*arguments)
    rows = json.loads((tmp_path / "x.json").read_text())
    assert rows["distractors"] == 10  # the default: the powers of ten
    assert rows["rank-1 of 10"] == 1.0
    output = printed(capsys)
    assert output["TAR@FAR=1e-06"] == "n/a"
    assert output["TAR@FAR=0.1"] == "1.00000"


# From an exported model


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    description = export.Description("glyphnet", "rgb", 16, 8, flip=True, threshold=None, chosen_on="")
    export.export(make_model("glyphnet", channels=3, image_size=16, embedding_size=8), description, folder)
    return folder


@pytest.mark.parametrize(
    ("file", "flip"), [("", "sum"), ("", "concatenate"), ("", "none"), (export.ONNX, None), (export.WEIGHTS, None)]
)
def test_a_bin_file_with_an_exported_model(tmp_path, exported, capsys, file, flip):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    write_bin(tmp_path / "x.bin", [png(image) for image in pixels], [True, False] * 10)
    options = [
        "--batch-size",
        7,
        "--workers",
        1,
        "--save",
        tmp_path / "x.npz",
        *(["--flip", flip] if flip else []),
    ]
    command("--protocol", "bin", "--model", exported / file, "--data", tmp_path / "x.bin", *options)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).sub(127.5).div(127.5)
    network, _ = export.load(exported)
    plain, mirrored = network(images), network(images.flip(-1))
    expected = {"none": plain, "concatenate": torch.cat([plain, mirrored], 1)}.get(flip, plain + mirrored)
    features = load_features(tmp_path / "x.npz")["features"]
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-5)
    accuracy = cross_validate(pair_distances(features), [True, False] * 10).accuracy
    assert printed(capsys)["accuracy"] == f"{accuracy:.5f}"


def directions(*degrees: float, length: float = 1.0) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return (length * np.stack([np.cos(angles), np.sin(angles)], 1)).astype(np.float32)


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
    command("--protocol", "megaface", *options)
    assert printed(capsys)["rank-1 of 2"] == "0.00000"
    command("--protocol", "megaface", *options, "--noise", tmp_path / "probes.txt")
    # The third is now at 10 degrees; only in the gallery of 10, for the probe of 20, is no distractor nearer (11).
    assert printed(capsys)["rank-1 of 2"] == f"{1 / 6:.5f}"
    command("--protocol", "megaface", *options, "--noise", tmp_path / "probes.txt", tmp_path / "others.txt")
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
        command(
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
    command("--protocol", "identification", *options, *figures)
    rows = json.loads((tmp_path / "x.json").read_text())
    assert (rows["mated probes"], rows["non-mated probes"], rows["identities in the gallery"]) == (2, 1, 2)
    assert (rows["rank-1"], rows["rank-20"]) == (1.0, 1.0)
    assert printed(capsys)["TPIR@FPIR=0.1"] == "n/a"  # of one non-mated probe there is no tenth
    assert min((tmp_path / name).stat().st_size for name in ("cmc.png", "roc.png")) > 1000
    strangers = {"features": directions(*[-10] * 9, -1), "labels": np.array(["Cem"] * 10)}
    both = {name: np.concatenate([probes[name][:2], strangers[name]]) for name in probes}
    save_features(tmp_path / "probes.npz", both)
    command("--protocol", "identification", *options)
    assert printed(capsys)["TPIR@FPIR=0.1"] == "0.50000"  # the threshold is at 10 degrees


def test_retrieval_of_features(tmp_path, capsys):
    save_features(
        tmp_path / "x.safetensors", {"features": directions(0, 10, 4, 90), "labels": np.array([5, 5, 8, 8])}
    )
    command("--protocol", "retrieval", "--features", tmp_path / "x.safetensors")
    output = printed(capsys)
    assert (output["queries"], output["gallery"]) == ("4", "4")
    # Nearest first: of 0: 4, 10; of 10: 4, 0; of 4: 0, 10, 90; of 90: 10, 4.
    assert (output["recall@1"], output["recall@5"], output["mAP@R"]) == ("0.00000", "1.00000", "0.00000")
    options = ["--features", tmp_path / "x.safetensors", "--gallery", tmp_path / "x.safetensors"]
    command("--protocol", "retrieval", *options)
    output = printed(capsys)
    # Each finds itself; with R = 2 nobody's second is the other one.
    assert (output["recall@1"], output["mAP@R"]) == ("1.00000", "0.50000")


def test_search_among_matrices(tmp_path, capsys):
    """A folder is an identity by its name, and not by its place among the folders."""
    for name, angle in (("probes/x/Bob/1.jpg", 5), ("gallery/Ann/1.jpg", 90), ("gallery/Bob/2.jpg", 0)):
        path = tmp_path / f"{name}_net.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_matrix(path, directions(angle)[0])
    options = ["--features", tmp_path / "probes", "--gallery", tmp_path / "gallery"]
    command("--protocol", "identification", *options)
    assert printed(capsys)["rank-1"] == "1.00000"


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
        command("--protocol", "identification", *options)


def test_search_with_an_exported_model(tmp_path, exported, capsys):
    """The labels are the folders' names, which need not be the same in both."""
    write_images(tmp_path / "probes", ["B/1.png", "C/1.png", "D/1.png"], [colour_of(i, 0) for i in (1, 2, 3)])
    write_images(tmp_path / "gallery", ["A/1.png", "B/2.png", "D/2.png"], [colour_of(i, 0) for i in (0, 1, 3)])
    options = ["--model", exported, "--data", tmp_path / "probes", "--gallery", tmp_path / "gallery"]
    command("--protocol", "identification", *options)
    output = printed(capsys)
    assert (output["mated probes"], output["non-mated probes"], output["rank-1"]) == ("2", "1", "1.00000")
    command("--protocol", "retrieval", *options)
    output = printed(capsys)
    assert (output["queries with a match"], output["recall@1"], output["mAP@R"]) == ("2", "1.00000", "1.00000")


def test_every_other_protocol_with_an_exported_model(tmp_path, exported, capsys):
    people = [f"P{i}" for i in range(20)]
    names = [f"{person}/{person}_{photo:04}.png" for person in people for photo in (1, 2)]
    write_images(tmp_path / "lfw", names, [colour_of(i // 2, i % 2) for i in range(40)])
    lines = [f"{a} 1 2\n{a} 1 {b} 2\n" for a, b in zip(people, people[1:] + people[:1], strict=True)]
    (tmp_path / "pairs.txt").write_text("10 2\n" + "".join(lines))
    command(
        "--protocol", "lfw", "--model", exported, "--data", tmp_path / "lfw", "--pairs", tmp_path / "pairs.txt"
    )
    assert printed(capsys)["pairs"] == "40"

    frames = [f"{person}/{video}/{frame}.png" for person in people for video in (0, 1) for frame in (0, 1)]
    write_images(tmp_path / "ytf", frames, [colour_of(i // 4, i % 4) for i in range(80)])
    lines = [
        f"{i // 2 + 1}, {a}/0, {a}/1, 1\n{i // 2 + 1}, {a}/0, {b}/1, 0\n"
        for i, (a, b) in enumerate(zip(people, people[1:] + people[:1], strict=True))
    ]
    (tmp_path / "splits.txt").write_text("".join(lines))
    command(
        "--protocol", "ytf", "--model", exported, "--data", tmp_path / "ytf", "--pairs", tmp_path / "splits.txt"
    )
    assert printed(capsys)["pairs"] == "40"

    write_ijb(tmp_path / "IJBB", [(1, 1, 1), (2, 1, 1), (3, 1, 1)], [(1, 2, 1), (1, 3, 0)])
    write_images(
        tmp_path / "IJBB" / "loose_crop", ["1.png", "2.png", "3.png"], [colour_of(i, 0) for i in range(3)]
    )
    command("--protocol", "ijb", "--model", exported, "--data", tmp_path / "IJBB", "--target", "ijbb")
    assert printed(capsys)["templates"] == "3"

    others = ["--distractors", tmp_path / "ytf"]
    command("--protocol", "megaface", "--model", exported, "--data", tmp_path / "lfw", *others)
    output = printed(capsys)
    assert (output["probes"], output["distractors"]) == ("40", "10")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--protocol lfw", r"Either --model or --features is needed, and not both"),
        ("--protocol lfw --features {lfw} --model x", r"Either --model or --features"),
        ("--protocol ytf --features {lfw}", r"The features of protocol ytf lack videos\."),
        ("--protocol megaface --features {probes}", r"Protocol megaface needs --distractors\."),
        ("--protocol megaface --features {probes} --distractors {others} --sizes 40", r"1 to 27, .* got \[40\]"),
        ("--protocol identification --features {probes}", r"Protocol identification needs --gallery\."),
        ("--protocol identification --features {probes} --gallery {others}", r"identification lack labels"),
        ("--protocol lfw --features nothing.npz", r"nothing\.npz"),
        ("--protocol lfw --features {lfw} --save x.pkl", r"Features are saved as .* got x\.pkl"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(lfw, megaface, arguments, message):
    probes, others = megaface
    with pytest.raises(SystemExit, match=message):
        command(*arguments.format(lfw=lfw, probes=probes, others=others).split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": np.full((40, 2), 80)}, r"No feature is of row 80, which a pair names"),
        (
            {"pairs": np.zeros((39, 2), int)},
            r"pairs must be of shape \(40, 2\), as many as same has, got \(39, 2\)",
        ),
        ({"labels": np.zeros(3)}, r"There are 80 features and 3 labels"),
        ({"same": np.ones(40, bool)}, r"lack genuine or impostor pairs"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(lfw, change, message):
    save_features(lfw, load_features(lfw) | change)
    with pytest.raises(SystemExit, match=message):
        command("--protocol", "lfw", "--features", lfw)
