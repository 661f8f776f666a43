"""The evaluation command: verification from images and from files of features, and messages on bad ones."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.evaluation import colour_of, evaluate, identity_features, png, printed, write_ijb, write_images

import evaluate_protocol
import train
from cosface_recipes import config, export
from cosface_recipes.data.pairs import write_bin
from cosface_recipes.evaluation import collect, held_out
from cosface_recipes.evaluation.features import load_features, save_features
from cosface_recipes.evaluation.protocols import cross_validate, pair_distances


@pytest.mark.parametrize("protocol", ["lfw", "bin"])
def test_verification_of_features(lfw, tmp_path, capsys, protocol):
    evaluate(
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
    evaluate("--protocol", "bin", "--features", tmp_path / "x.safetensors", "--data", tmp_path / "x.bin")
    assert float(printed(capsys)["accuracy"]) > 0.9


def test_ytf_of_features(tmp_path, capsys):
    features, _ = identity_features(40, 6)
    videos = np.arange(240) // 3 + 100  # two videos per identity
    first = np.arange(0, 80, 2)
    pairs = np.stack([first, np.where(first % 4, first + 1, (first + 2) % 80)], 1) + 100
    save_features(
        tmp_path / "x.npz", {"features": features, "videos": videos, "pairs": pairs, "same": first % 4 != 0}
    )
    evaluate("--protocol", "ytf", "--features", tmp_path / "x.npz")
    assert float(printed(capsys)["accuracy"]) > 0.9


def test_ijb_of_features(tmp_path, capsys):
    features, _ = identity_features(6, 4)
    images = [(10 * label + i // 2, i, 0.9) for label in range(6) for i in range(4)]  # two templates per identity
    pairs = [(10 * a + i, 10 * b + j, int(a == b)) for a in range(6) for b in range(6) for i, j in [(0, 1)]]
    write_ijb(tmp_path / "IJBB", images, pairs)
    save_features(tmp_path / "x.npz", {"features": features})
    evaluate(
        "--protocol", "ijb", "--features", tmp_path / "x.npz", "--data", tmp_path / "IJBB", "--target", "ijbb"
    )
    output = printed(capsys)
    assert (output["templates"], output["pairs"]) == ("12", "36")
    assert {value for name, value in output.items() if name.startswith("TAR")} == {"1.00000"}


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
    evaluate("--protocol", "bin", "--model", exported / file, "--data", tmp_path / "x.bin", *options)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).sub(127.5).div(127.5)
    network, _ = export.load(exported)
    plain, mirrored = network(images), network(images.flip(-1))
    expected = {"none": plain, "concatenate": torch.cat([plain, mirrored], 1)}.get(flip, plain + mirrored)
    features = load_features(tmp_path / "x.npz")["features"]
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-5)
    accuracy = cross_validate(pair_distances(features), [True, False] * 10).accuracy
    assert printed(capsys)["accuracy"] == f"{accuracy:.5f}"


def test_every_other_protocol_with_an_exported_model(tmp_path, exported, capsys):
    people = [f"P{i}" for i in range(20)]
    names = [f"{person}/{person}_{photo:04}.png" for person in people for photo in (1, 2)]
    write_images(tmp_path / "lfw", names, [colour_of(i // 2, i % 2) for i in range(40)])
    lines = [f"{a} 1 2\n{a} 1 {b} 2\n" for a, b in zip(people, people[1:] + people[:1], strict=True)]
    (tmp_path / "pairs.txt").write_text("10 2\n" + "".join(lines))
    evaluate(
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
    evaluate(
        "--protocol", "ytf", "--model", exported, "--data", tmp_path / "ytf", "--pairs", tmp_path / "splits.txt"
    )
    assert printed(capsys)["pairs"] == "40"

    write_ijb(tmp_path / "IJBB", [(1, 1, 1), (2, 1, 1), (3, 1, 1)], [(1, 2, 1), (1, 3, 0)])
    (tmp_path / "IJBB" / "loose_crop").mkdir()
    for i in range(3):
        photograph = png(np.full((112, 112, 3), colour_of(i, 0), np.uint8))
        (tmp_path / "IJBB" / "loose_crop" / f"{i + 1}.png").write_bytes(photograph)
    evaluate("--protocol", "ijb", "--model", exported, "--data", tmp_path / "IJBB", "--target", "ijbb")
    assert printed(capsys)["templates"] == "3"

    others = ["--distractors", tmp_path / "ytf"]
    evaluate("--protocol", "megaface", "--model", exported, "--data", tmp_path / "lfw", *others)
    output = printed(capsys)
    assert (output["probes"], output["distractors"]) == ("40", "10")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--protocol lfw", r"Either --model or --features is needed, and not both"),
        ("--protocol lfw --features {lfw} --model x", r"Either --model or --features"),
        ("--protocol ytf --features {lfw}", r"The features of protocol ytf in .*lfw\.npz lack videos\."),
        ("--protocol megaface --features {probes}", r"Protocol megaface needs --distractors\."),
        ("--protocol megaface --features {probes} --distractors {others} --sizes 40", r"1 to 27, .* got \[40\]"),
        ("--protocol identification --features {probes}", r"Protocol identification needs --gallery\."),
        ("--protocol identification --features {probes} --gallery {others}", r"in .*others\.npz lack labels\."),
        ("--protocol lfw --features nothing.npz", r"nothing\.npz"),
        ("--protocol folder --features {probes} --far 2", r"acceptance rate must be from 0 to 1, got 2\.0"),
        ("--protocol folder --features {probes} --far nan", r"acceptance rate must be from 0 to 1, got nan"),
        ("--protocol lfw --features {lfw} --flip sum", r"Protocol lfw has no use for --flip beside --features\."),
        ("--protocol lfw --features {lfw} --data x", r"Protocol lfw has no use for --data beside --features\."),
        ("--protocol lfw --features {lfw} --save x.pkl", r"x\.pkl should end in \.npz or \.safetensors\."),
    ],
)  # fmt: skip
def test_bad_options_are_refused(lfw, megaface, arguments, message):
    probes, others = megaface
    with pytest.raises(SystemExit, match=message):
        evaluate(*arguments.format(lfw=lfw, probes=probes, others=others).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--protocol lfw", r"Protocol lfw needs --pairs\."),
        ("--protocol ytf", r"Protocol ytf needs --pairs\."),
        ("--protocol megaface", r"Protocol megaface needs --distractors\."),
        ("--protocol megaface --distractors {images} --sizes 1,99999", r"sizes must be from 1 to 4, .*99999"),
        ("--protocol megaface --distractors {images} --noise none.txt", r"There is no none\.txt\."),
        ("--protocol megaface --distractors {empty}", r"The folder .*empty has no images\."),
        ("--protocol identification", r"Protocol identification needs --gallery\."),
        ("--protocol identification --gallery none", r"There is no none\."),
        ("--protocol retrieval --gallery {images}/A/1.png", r"Features are a \.npz or \.safetensors file"),
        ("--protocol retrieval --gallery {empty}", r"The folder .*empty has no images\."),
        ("--protocol retrieval --on-corrupt skip", r"Protocol retrieval has no use for --on-corrupt\."),
        ("--protocol folder --data {images}/x.bin --on-corrupt skip", r"images that are in no pair, and those"),
        ("--protocol lfw --pairs x --gallery x --sizes 3", r"Protocol lfw has no use for --(gallery|sizes)\."),
        ("--protocol tinyface --noise x", r"Protocol tinyface has no use for --noise\."),
        ("--protocol folder --far 2", r"acceptance rate must be from 0 to 1, got 2\.0"),
        ("--protocol retrieval --save x.h5", r"x\.h5 should end in \.npz or \.safetensors\."),
        ("--protocol folder --roc x.pgn", r"x\.pgn should end in .*\.png"),
        ("--protocol identification --gallery {images} --cmc x", r"x should end in .*\.png"),
        ("--protocol retrieval --json {images}", r"images is a folder, not the name of a file to write\."),
        ("--protocol retrieval --json {images}/A/1.png/x", r"x cannot be written: .*1\.png is no"),
        ("--protocol retrieval --save {images}/A/1.png/x.npz", r"x\.npz cannot be written: .*1\.png is no"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_the_first_embedding(tmp_path, exported, monkeypatch, arguments, message):
    def embed(*_):
        pytest.fail("an image was embedded")

    monkeypatch.setattr(collect.Embedder, "embed", embed)
    images = tmp_path / "images"
    write_images(images, [f"{name}/{i}.png" for name in "AB" for i in (1, 2)], [colour_of(i, 0) for i in range(4)])
    write_bin(images / "x.bin", [b""] * 40, [True, False] * 10)
    (tmp_path / "empty").mkdir()
    arguments = arguments.format(images=images, empty=tmp_path / "empty").split()
    with pytest.raises(SystemExit, match=message):
        evaluate("--model", exported, "--data", images, *arguments)


def test_sizes_are_numbers(capsys):
    with pytest.raises(SystemExit):
        evaluate("--protocol", "megaface", "--sizes", "10,abc")
    assert "argument --sizes: sizes are whole numbers, by comma, got '10,abc'" in capsys.readouterr().err


def test_figures_are_written_where_a_curve_cannot_be(lfw, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device.")

    monkeypatch.setattr(evaluate_protocol, "plot_roc", full)
    with pytest.raises(SystemExit, match=r"^No space left on device\.$"):
        evaluate(
            "--protocol", "lfw", "--features", lfw, "--roc", tmp_path / "x.png", "--json", tmp_path / "x.json"
        )
    assert json.loads((tmp_path / "x.json").read_text())["protocol"] == "lfw"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": np.full((40, 2), 80)}, r"No feature is of row 80, which a pair names"),
        (
            {"pairs": np.zeros((39, 2), int)},
            r"pairs must be of shape \(40, 2\), as many as same has, got \(39, 2\)",
        ),
        ({"labels": np.zeros(3)}, r"There are 80 features and labels of shape \(3,\)"),
        ({"same": np.ones(40, bool)}, r"lack genuine or impostor pairs"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(lfw, change, message):
    save_features(lfw, load_features(lfw) | change)
    with pytest.raises(SystemExit, match=message):
        evaluate("--protocol", "lfw", "--features", lfw)


def test_a_folder_is_evaluated_as_the_training_did(tmp_path, capsys):
    """The last lines that train.py prints of its test sets, from the model that it exported."""
    people = {"train": range(12), "test": range(20, 26)}
    for name, numbers in people.items():
        names = [f"P{i:02}/{photo}.png" for i in numbers for photo in range(4)]
        write_images(tmp_path / name, names, [colour_of(i, 3 * photo) for i in numbers for photo in range(4)])
    options = ["--model", "glyphnet", "--image-size", "16", "--embedding-size", "8", "--augmentation", "none"]
    options += [
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--output",
        tmp_path / "run",
        "--far",
        "0.02",
    ]
    train.main([*map(str, ["--train", tmp_path / "train", "--test", tmp_path / "test", *options])])
    printed = capsys.readouterr().out
    evaluate("--protocol", "folder", "--model", tmp_path / "run", "--data", tmp_path / "test", "--far", 0.02,
             "--json", tmp_path / "x.json")  # fmt: skip
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 2
    assert table in printed
    assert printed.rindex("rank-1") > printed.rindex("step ")
    rows, (network, description) = json.loads((tmp_path / "x.json").read_text()), export.load(tmp_path / "run")
    assert rows["threshold"] == description.threshold
    assert rows["chosen by"] == description.chosen_on == "FAR 0.02 of 240 impostor pairs of test"
    settings = config.Config(test=(str(tmp_path / "test"),), image_size=16, workers=0, far=0.02)
    (result,) = held_out.evaluate(network, settings, torch.device("cpu"))
    rates = {name: None if math.isnan(rate) else rate for name, rate in result.rates.items()}
    assert {name: rows[name] for name in rates} == rates
    with pytest.raises(SystemExit, match=r"--protocol folder saves no features; embed\.py does"):
        evaluate("--protocol", "folder", "--model", tmp_path / "run", "--save", tmp_path / "x.npz")


def arrays_of(protocol: str) -> dict[str, np.ndarray]:
    """Sixty features of twenty identities, with what the protocol needs."""
    features, labels = identity_features(20, 3)
    n, first = np.arange(60), np.arange(0, 60, 2)
    pairs = {"pairs": np.stack([first, first + 1], 1), "same": n[:30] % 2 == 0}
    images = {"templates": n, "media": n, "scores": np.ones(60)}
    subjects = np.stack([n, labels], 1)
    searches = {"gallery_1": subjects[:30:3], "gallery_2": subjects[30::3], "probes": subjects[1::3]}
    return {"features": features} | {
        "folder": {"labels": labels},
        "lfw": {"same": pairs["same"]},
        "ytf": {"videos": n} | pairs,
        "ijb": images | pairs,
        "ijb-1n": images | searches,
        "megaface": {"labels": labels},
        "tinyface": {"labels": np.where(n < 40, n % 20, -100), "probe": n < 20},
        "retrieval": {"labels": labels},
        "identification": {"labels": labels},
    }[protocol]


def evaluate_arrays(protocol: str, arrays: dict[str, np.ndarray], folder: Path) -> None:
    save_features(folder / "x.npz", arrays)
    save_features(folder / "others.npz", arrays_of("folder"))
    others = {"megaface": "--distractors", "identification": "--gallery"}.get(protocol)
    more = [others, folder / "others.npz"] if others else []
    evaluate("--protocol", protocol, "--features", folder / "x.npz", *more)


PROTOCOLS = ("folder", "lfw", "ytf", "ijb", "ijb-1n", "megaface", "tinyface", "retrieval", "identification")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_protocol_measures_features_that_are_none(protocol, tmp_path, capsys):
    arrays = arrays_of(protocol)
    evaluate_arrays(protocol, arrays, tmp_path)
    as_they_are, features = capsys.readouterr().out, arrays["features"]
    for kind in (np.float64, np.float16):  # 100 times as long, their squares pass the largest float16
        evaluate_arrays(protocol, arrays | {"features": (features * 100).astype(kind)}, tmp_path)
        measured = capsys.readouterr().out
        assert measured.splitlines()[0] == as_they_are.splitlines()[0]
        assert kind is np.float16 or measured == as_they_are
    broken = features.copy()
    broken[7, 0] = np.nan
    for other, message in (
        (broken, r"Embedding 7 of 60 of .*x\.npz is not finite"),
        (broken.clip(-1, 1) * np.inf, "is not finite"),
        (features.astype(str), r"must be an \(n, D\) array of numbers, got .* of <U"),
        (features.astype(complex), "of complex128"),
        (features[:0], r"got \(0, "),
        (features[:, :0], r"got \(60, 0\)"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate_arrays(protocol, arrays | {"features": other}, tmp_path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_other_shapes_or_without_numbers_are_refused(protocol, tmp_path):
    arrays = arrays_of(protocol)
    for name, array in arrays.items():
        if name != "features":
            for other in (np.array(3), np.stack([array] * 2), array[:0], np.full(array.shape, np.nan)):
                with pytest.raises(SystemExit) as stop:
                    evaluate_arrays(protocol, arrays | {name: other}, tmp_path)
                assert stop.value.code


def test_identities_of_tinyface_may_have_names(tmp_path, capsys):
    arrays = arrays_of("tinyface")
    evaluate_arrays("tinyface", arrays, tmp_path)
    numbers = capsys.readouterr().out
    evaluate_arrays("tinyface", arrays | {"labels": arrays["labels"].astype(str)}, tmp_path)
    assert capsys.readouterr().out == numbers
    with pytest.raises(SystemExit, match="There is no probe to be sought among the 60 images"):
        evaluate_arrays("tinyface", arrays | {"probe": np.zeros(60, bool)}, tmp_path)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-100, "A probe has the label -100, which is that of distractors"),
        (777, "The gallery has no image of identity 777, which a probe is of"),
    ],
)
@pytest.mark.parametrize("kind", [int, str])
def test_a_probe_of_tinyface_has_mates_and_no_distractors(tmp_path, label, message, kind):
    arrays = arrays_of("tinyface")
    labels = arrays["labels"].copy()
    labels[3] = label
    with pytest.raises(SystemExit, match=message):
        evaluate_arrays("tinyface", arrays | {"labels": labels.astype(kind)}, tmp_path)


@pytest.mark.parametrize("kinds", [(np.uint64, np.int64), (np.int64, np.uint64), (np.float64, np.int64)])
def test_numbers_of_identities_are_compared_as_they_are(tmp_path, capsys, kinds):
    """Of 2^53 and more, float64 has every other number, and numpy makes it of uint64 and int64 together."""
    largest = 2**52 if np.float64 in kinds else 2**60
    for name, kind in zip(("probes", "gallery"), kinds, strict=True):
        labels = np.arange(largest - 4, largest).astype(kind)
        save_features(tmp_path / f"{name}.npz", {"features": np.eye(4, dtype=np.float32), "labels": labels})
    files = ["--features", tmp_path / "probes.npz", "--gallery", tmp_path / "gallery.npz"]
    evaluate("--protocol", "identification", *files)
    assert printed(capsys)["identities in the gallery"] == "4"


@pytest.mark.parametrize("template", [np.uint64, np.int64])
def test_numbers_of_templates_are_compared_as_they_are(tmp_path, capsys, template):
    arrays = arrays_of("ijb")
    evaluate_arrays("ijb", arrays, tmp_path)
    expected = capsys.readouterr().out
    large = {"templates": (arrays["templates"] + 2**60).astype(template), "pairs": arrays["pairs"] + 2**60}
    evaluate_arrays("ijb", arrays | large, tmp_path)
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("protocol", "change", "message"),
    [
        ("folder", {"labels": np.arange(60) / 2}, r"labels must be whole numbers of 64 bits, .* got 0\.5 in"),
        ("folder", {"labels": np.full(60, 2**63, np.uint64)}, r"got 9223372036854775808 in uint64"),
        ("folder", {"labels": np.full(60, 2.0**53)}, r"got 9007199254740992\.0 in float64"),
        ("folder", {"labels": np.full(60, 1j)}, r"got 1j in complex128"),
        ("ijb-1n", {"probes": np.array([["1", "0"]])}, r"probes must be numbers, got <U1"),
        ("ijb", {"scores": np.zeros(60)}, r"scores must be positive, where an image counts, got 0 at most"),
        ("ijb", {"scores": -np.ones(60)}, r"got -1 at most"),
    ],
)
def test_numbers_that_say_nothing_are_refused(tmp_path, protocol, change, message):
    with pytest.raises(SystemExit, match=message):
        evaluate_arrays(protocol, arrays_of(protocol) | change, tmp_path)


def test_figures_that_are_none_are_null_in_json(tmp_path):
    save_features(tmp_path / "x.npz", arrays_of("folder"))
    evaluate(*("--protocol", "folder", "--features", tmp_path / "x.npz"), "--json", tmp_path / "x.json")
    text = (tmp_path / "x.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["TAR@FAR=1e-06"] is None
