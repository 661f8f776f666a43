"""The commands of 5_use: photos to features, a saved gallery, a detector by its name, and their messages."""

import dataclasses
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.evaluation import colour_of, evaluate, printed, write_images

import embed
import enroll
import identify_faces
import verify_faces
from cosface_recipes import export, recognition
from cosface_recipes.data.alignment import LANDMARKS, align
from cosface_recipes.data.detection import load_detector, read_face
from cosface_recipes.data.images import KINDS, image_files
from cosface_recipes.evaluation.features import load_features, save_features
from cosface_recipes.models import make_model

PEOPLE = ["Ann", "Bo", "Cem"]
DETECTORS = '''
import numpy as np

def corner(photo):
    """The face is in the upper left quarter; a black photograph has none."""
    assert photo.dtype == np.uint8 and photo.shape[2] == 3
    return np.array(POINTS) * photo.shape[0] / 224 if photo.any() else None

def four(photo):
    return [[1, 2]] * 4

def point(photo):
    return [[1, 2]] * 5

def painter(photo):
    points = corner(photo)
    photo[:] = 0
    return points

number = 3
'''


def run(command, *arguments: object) -> None:
    command.main([*map(str, arguments)])


@pytest.fixture
def photos(tmp_path):
    """Two photos of each person; one that is black, and one that is no image."""
    names = [f"{person}/{i}.png" for person in PEOPLE for i in (1, 2)]
    write_images(tmp_path / "photos", names, [colour_of(i // 2, i % 2) for i in range(6)])
    return tmp_path / "photos"


@pytest.fixture
def detectors(tmp_path, monkeypatch):
    (tmp_path / "my_detectors.py").write_text(DETECTORS.replace("POINTS", repr(LANDMARKS.tolist())))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    yield "my_detectors"
    sys.modules.pop("my_detectors", None)


def by_hand(model, images: list[Image.Image]) -> np.ndarray:
    network, _ = export.load(model)
    pixels = [np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)) for image in images]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).sub(127.5).div(127.5)
    return (network(x) + network(x.flip(-1))).numpy()


# Photos to features


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_folder_becomes_a_file_of_features(photos, tmp_path, exported, capsys, suffix):
    output = tmp_path / "new" / f"x{suffix}"
    run(embed, exported, photos, "--output", output)
    assert capsys.readouterr().out == f"{output}: 6 photos, 8 numbers each, of 3 identities\n"
    arrays = load_features(output)
    assert arrays["names"].tolist() == [f"{person}/{i}.png" for person in PEOPLE for i in (1, 2)]
    assert arrays["labels"].tolist() == [person for person in PEOPLE for _ in (1, 2)]
    expected = by_hand(exported, [Image.open(path) for path in image_files(photos)])
    np.testing.assert_allclose(arrays["features"], expected, rtol=1e-5, atol=1e-6)

    evaluate("--protocol", "retrieval", "--features", output)
    assert printed(capsys)["recall@1"] == "1.00000"
    evaluate("--protocol", "identification", "--features", output, "--gallery", output)
    assert printed(capsys)["rank-1"] == "1.00000"
    evaluate("--protocol", "folder", "--features", output)
    title, line = capsys.readouterr().out.splitlines()
    assert title.split()[:3] == ["test", "images", "rank-1"]
    assert line.split()[:4] == ["x", "6", "100.00", "%"]


def test_a_list_is_read_from_its_own_folder(photos, tmp_path, exported, capsys):
    (photos / "list.txt").write_text("\nBo/1.png\nAnn/2.png\n", encoding="utf-8-sig")
    run(embed, exported, photos / "list.txt", photos / "Cem" / "1.png", "--output", tmp_path / "x.npz")
    assert capsys.readouterr().out.endswith("3 photos, 8 numbers each, without labels\n")
    arrays = load_features(tmp_path / "x.npz")
    assert arrays["names"].tolist() == ["Bo/1.png", "Ann/2.png", (photos / "Cem" / "1.png").as_posix()]
    assert "labels" not in arrays
    with pytest.raises(SystemExit, match=r"The features of protocol retrieval in .*x\.npz lack labels\."):
        evaluate("--protocol", "retrieval", "--features", tmp_path / "x.npz")


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_what_cannot_be_used_is_left_out_and_said(photos, tmp_path, exported, capsys, monkeypatch, batch):
    monkeypatch.setattr(recognition, "BATCH", batch)
    (photos / "Bo" / "1.png").write_bytes(b"no image")
    run(embed, exported, photos, "--output", tmp_path / "x.npz")
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "Left out 1:"
    assert second.startswith(f"  The image {photos / 'Bo' / '1.png'} cannot be read: ")
    assert "5 photos" in third
    arrays = load_features(tmp_path / "x.npz")
    assert arrays["names"].tolist() == ["Ann/1.png", "Ann/2.png", "Bo/2.png", "Cem/1.png", "Cem/2.png"]
    kept = [Image.open(photos / name) for name in arrays["names"]]
    np.testing.assert_allclose(arrays["features"], by_hand(exported, kept), rtol=1e-5, atol=1e-6)
    with pytest.raises(SystemExit, match=r"The image .*1\.png cannot be read"):
        run(embed, exported, photos, "--output", tmp_path / "x.npz", "--strict")


# A detector


def test_faces_are_found_and_aligned(photos, tmp_path, exported, detectors, capsys):
    random = np.random.default_rng(0)
    for path in image_files(photos):
        Image.fromarray(random.integers(0, 256, (448, 448, 3), np.uint8)).save(path)
    Image.new("RGB", (50, 50)).save(photos / "Ann" / "1.png")
    options = ["--detector", f"{detectors}:corner", "--output", tmp_path / "x.npz"]
    run(embed, exported, photos, *options)
    output = capsys.readouterr().out
    assert output.startswith(f"Left out 1:\n  The detector finds no face in {photos / 'Ann' / '1.png'}.\n")
    arrays = load_features(tmp_path / "x.npz")
    faces = [align(Image.open(photos / name), LANDMARKS * 2, 16) for name in arrays["names"]]
    np.testing.assert_allclose(arrays["features"], by_hand(exported, faces), rtol=1e-5, atol=1e-6)
    with pytest.raises(SystemExit, match=r"The detector finds no face in .*Ann.1\.png"):
        run(embed, exported, photos, *options, "--strict")

    run(verify_faces, exported, photos / "Ann", photos / "Bo" / "1.png", "--threshold", "0.2", *options[:2])
    left_out, _, cosine, decision = capsys.readouterr().out.splitlines()
    assert left_out == "Left out 1:"
    unit = arrays["features"] / np.linalg.norm(arrays["features"], axis=1, keepdims=True)
    assert float(cosine.removeprefix("cosine ")) == pytest.approx(unit[0] @ unit[1], abs=1e-4)
    assert decision.endswith("identity: threshold 0.2000 (as given)")
    with pytest.raises(SystemExit, match="no decision: there is no photo to compare"):
        run(verify_faces, exported, photos / "Ann" / "1.png", photos / "Bo", *options[:2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_detectors", r"A detector is named package:function, .*, got 'my_detectors'"),
        ("my_detectors:", r"A detector is named package:function"),
        (
            "./my_detectors.py:corner",
            r"A detector is named package:function, .*, got '\./my_detectors\.py:corner'",
        ),
        (".my_detectors:corner", r"A detector is named package:function"),
        ("", r"A detector is named package:function"),
        ("no_such:function", r"no_such:function cannot be imported: ModuleNotFoundError: No module named"),
        ("broken_syntax:f", r"broken_syntax:f cannot be imported: SyntaxError: .*broken_syntax\.py, line 1"),
        ("broken_name:f", r"broken_name:f cannot be imported: NameError: name 'nothing' is not defined"),
        (
            "my_detectors:number",
            r"The module my_detectors of the detector my_detectors:number has no function number",
        ),
        ("my_detectors:none", r"has no function none"),
    ],
)
def test_a_detector_that_is_none_is_refused(photos, tmp_path, exported, detectors, name, message):
    (tmp_path / "broken_syntax.py").write_text("def f(:")
    (tmp_path / "broken_name.py").write_text("f = nothing")
    with pytest.raises(SystemExit, match=message):
        run(verify_faces, exported, photos / "Ann", photos / "Bo", "--detector", name)


@pytest.mark.parametrize("name", ["json:loads", "math:sqrt", "builtins:open", "operator:index"])
def test_a_function_that_takes_no_photograph_is_named_with_it(photos, exported, detectors, name):
    with pytest.raises(SystemExit, match=r"^The detector failed on .*Ann.1\.png: \w*Error: "):
        run(verify_faces, exported, photos / "Ann", photos / "Bo", "--detector", name)


def test_a_detector_that_returns_something_else_is_refused(photos, tmp_path, exported, detectors):
    with pytest.raises(
        SystemExit, match=r"A detector must return \(5, 2\) finite numbers or None; of .* \[\[1, 2\]"
    ):
        run(embed, exported, photos, "--detector", f"{detectors}:four", "--output", tmp_path / "x.npz")


def test_a_detector_may_write_to_its_photograph(photos, detectors):
    Image.effect_mandelbrot((112, 112), (-2, -1.5, 1, 1.5), 20).save(photos / "Ann" / "1.png")
    faces = [
        read_face(photos / "Ann" / "1.png", "rgb", 16, load_detector(f"{detectors}:{name}"))
        for name in ("corner", "painter")
    ]
    np.testing.assert_array_equal(*map(np.asarray, faces))


def test_landmarks_of_no_face_are_left_out_and_said(photos, exported, detectors, capsys):
    """All their crops would be of one identity."""
    options = photos / "Ann" / "1.png", photos / "Bo" / "1.png", "--detector", f"{detectors}:point"
    with pytest.raises(SystemExit, match="no decision: there is no photo to compare"):
        run(verify_faces, exported, *options)
    title, *sentences = capsys.readouterr().out.splitlines()
    assert title == "Left out 2:"
    for sentence, path in zip(sentences, options[:2], strict=True):
        assert sentence.startswith(f"  The detector finds no face in {path}. The landmarks [[1.0, 2.0], ")
    with pytest.raises(SystemExit, match=r"finds no face in .*Ann.1\.png\. The landmarks"):
        run(verify_faces, exported, *options, "--strict")


# A gallery


def test_a_saved_gallery_identifies_as_its_folder_does(photos, tmp_path, exported, capsys):
    probe = photos / "Bo" / "2.png"
    run(identify_faces, exported, photos, probe, "--top", 2)
    expected = capsys.readouterr().out
    lines = expected.splitlines()
    assert lines[0] == str(probe)
    assert lines[1].split()[-1] == "Bo"
    assert lines[3:] == ["No mark: the model was exported without a threshold; --threshold gives one."]
    for file in ("x.npz", "x.safetensors"):
        run(enroll, exported, photos, "--output", tmp_path / file)
        assert capsys.readouterr().out == f"{tmp_path / file}: 3 identities\n"
        run(identify_faces, exported / export.ONNX, tmp_path / file, probe, "--top", 2)
        assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
            line.split()[-1] for line in lines
        ]
    run(identify_faces, exported, tmp_path / "x.npz", probe, "--top", 2)
    assert capsys.readouterr().out == expected
    run(identify_faces, exported, tmp_path / "x.npz", probe, "--threshold", -1)
    assert [line[2] for line in capsys.readouterr().out.splitlines()[1:-1]] == ["*"] * 3


def test_photos_can_be_the_gallery(photos, tmp_path, exported, capsys):
    run(embed, exported, photos, "--output", tmp_path / "x.npz")
    run(identify_faces, exported, tmp_path / "x.npz", photos / "Cem" / "1.png", "--top", 1)
    assert capsys.readouterr().out.splitlines()[2].split() == ["1.0000", "Cem/1.png"]


def test_a_gallery_leaves_out_what_is_empty_or_hidden(photos, tmp_path, exported, capsys):
    gallery = tmp_path / "gallery"
    shutil.copytree(photos, gallery)
    (gallery / "Nobody").mkdir()
    shutil.copytree(gallery / "Cem", gallery / ".thumbnails")
    run(enroll, exported, gallery, "--output", tmp_path / "x.npz")
    assert f"The folder {gallery / 'Nobody'} has no images." in "".join(capsys.readouterr())
    names = np.load(tmp_path / "x.npz")["names"].tolist()
    assert "Cem" in names
    assert not {"Nobody", ".thumbnails"} & set(names)


@pytest.mark.parametrize("command", [embed, enroll, identify_faces, verify_faces])
def test_files_of_other_kinds_are_left_out_and_said(photos, tmp_path, exported, caplog, command):
    for name in ("Ann/3.heic", "Ann/more/4.HEIC", "Ann/.5.heic", "Bo/3.heic"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"")
    (photos / "Dee.gif").write_bytes(b"")
    output = ["--output", tmp_path / "x.npz"]
    arguments = {
        embed: [photos, *output],
        enroll: [photos, *output],
        identify_faces: [photos, photos / "Ann"],
        verify_faces: [photos / "Ann", photos / "Bo"],
    }
    with caplog.at_level("WARNING"):
        run(command, exported, *arguments[command])
    of_all, of_ann, of_bo = (
        f"Files in {folder} that are left out: {kinds}. {KINDS}"
        for folder, kinds in (
            (photos, ".gif (1), .heic (3)"),
            (photos / "Ann", ".heic (2)"),
            (photos / "Bo", ".heic (1)"),
        )
    )
    expected = {embed: [of_all], enroll: [of_all], identify_faces: [of_all, of_ann], verify_faces: [of_ann, of_bo]}
    assert caplog.messages == expected[command]


@pytest.mark.parametrize("command", [embed, enroll, identify_faces, verify_faces])
def test_names_that_are_no_utf_8_are_printed(photos, tmp_path, exported, monkeypatch, command):
    other = photos / os.fsdecode(b"M\xfcller")
    (photos / "Ann").rename(other)
    (other / "3.png").write_bytes(b"")
    output = ["--output", tmp_path / "x.npz"]
    arguments = {
        embed: [photos, *output],
        enroll: [photos, *output],
        identify_faces: [photos, other],
        verify_faces: [other, photos / "Bo"],
    }
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8", errors="strict", write_through=True))
    run(command, exported, *arguments[command])
    assert rb"M\udcfcller" in printed.getvalue()


@pytest.mark.parametrize("command", [embed, enroll, identify_faces, verify_faces])
@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_damaged_model_has_no_embeddings(photos, tmp_path, exported, command, weight):
    shutil.copytree(exported, tmp_path / "model")
    weights = load_file(tmp_path / "model" / export.WEIGHTS)
    save_file(
        {name: torch.full_like(x, weight) if x.is_floating_point() else x for name, x in weights.items()},
        tmp_path / "model" / export.WEIGHTS,
    )
    arguments = [photos, photos / "Ann"] if command is identify_faces else [photos / "Ann", photos / "Bo"]
    if command in (embed, enroll):
        arguments = [photos, "--output", tmp_path / "x.npz"]
    with pytest.raises(
        SystemExit, match=r"The embedding of .*Ann.1\.png is not finite: the weights of the model are"
    ):
        run(command, tmp_path / "model", *arguments)
    assert not (tmp_path / "x.npz").exists()


@pytest.fixture(scope="module")
def other(tmp_path_factory, exported):
    """The same description, other weights."""
    folder = tmp_path_factory.mktemp("other")
    description = export.load(exported)[1]
    torch.manual_seed(1)
    export.export(make_model("glyphnet", channels=3, image_size=16, embedding_size=8), description, folder)
    return folder


def test_another_model_s_gallery_is_refused(photos, tmp_path, exported, other):
    assert export.digest(exported) == export.digest(exported / export.ONNX) != export.digest(other)
    run(enroll, exported, photos, "--output", tmp_path / "x.npz")
    message = rf"x\.npz is of another model: its digest is {export.digest(exported)}, .* is {export.digest(other)}"
    with pytest.raises(SystemExit, match=message):
        run(identify_faces, other, tmp_path / "x.npz", photos / "Ann")
    for model, name in ((exported, "a.npz"), (other, "b.npz")):
        run(embed, model, photos, "--output", tmp_path / name)
    with pytest.raises(SystemExit, match=rf"that of what is sought {export.digest(exported)}"):
        evaluate(*("--protocol", "retrieval", "--features", tmp_path / "a.npz"), "--gallery", tmp_path / "b.npz")


def test_an_onnx_file_alone_has_a_digest_of_its_own(exported, tmp_path):
    shutil.copy(exported / export.ONNX, tmp_path)
    (tmp_path / export.DESCRIPTION).write_text(json.dumps(dataclasses.asdict(export.load(exported)[1])))
    recognizer = recognition.Recognizer(tmp_path / export.ONNX)
    assert len(recognizer.digest) == 16
    assert recognizer.digest != export.digest(exported)


def test_identities_without_a_usable_photo_are_left_out(photos, tmp_path, exported, capsys):
    for path in image_files(photos / "Ann"):
        path.write_bytes(b"")
    run(enroll, exported, photos, "--output", tmp_path / "x.npz")
    assert capsys.readouterr().out.splitlines()[-1].endswith("x.npz: 2 identities")
    assert load_features(tmp_path / "x.npz")["names"].tolist() == ["Bo", "Cem"]
    run(identify_faces, exported, tmp_path / "x.npz", photos / "Ann", photos / "Bo", "--top", 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(photos / "Bo")
    assert lines[2] == "Left out 2:"
    with pytest.raises(SystemExit) as end:
        run(identify_faces, exported, tmp_path / "x.npz", photos / "Ann")
    assert end.value.code == 1


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (embed, "{photos} --output x.pkl", r"x\.pkl should end in \.npz or \.safetensors\."),
        (embed, "{photos} --output {photos}", r"photos should end in \.npz or"),
        (embed, "{photos} --output {features}/x.npz", r"x\.npz cannot be written: .*x\.npz is no folder"),
        (
            embed,
            "{photos}/none.mp4 --output x.npz",
            r"Photos are folders, \.txt lists, or images .* got .*none\.mp4",
        ),
        (embed, "{empty} --output x.npz", r"The folder .*empty has no images"),
        (embed, "{list} --output x.npz", r"None of the 1 photos could be used\.\nLeft out 1:\n  The image"),
        (embed, "{empty}/none.txt --output x.npz", r"none\.txt"),
        (
            embed,
            "{empty}/none.png --output x.npz",
            r"There is no photo .*none\.png",
        ),
        (enroll, "{photos} --output x.pkl", r"x\.pkl should end in \.npz or \.safetensors\."),
        (
            enroll,
            "{empty}/none --output x.npz",
            r"The gallery .*none is neither a folder nor a file of \.npz or \.safetensors",
        ),
        (enroll, "{empty} --output x.npz", r"The gallery .*empty has no sub-folders and no images"),
        (identify_faces, "{photos} {photos}/Ann --top 0", r"--top must be at least 1, got 0"),
        (identify_faces, "{features} {photos}/Ann", r"x\.npz is no gallery, .*: it lacks names, model"),
        (verify_faces, "{photos}/Ann {photos}/Bo --threshold nan", "2"),
        (verify_faces, "{photos}/Ann {empty}", r"The folder .*empty has no images"),
        (verify_faces, "{photos}/Ann {empty}/none.png", r"There is no photo .*none\.png"),
    ],
)
def test_bad_arguments_are_refused(photos, tmp_path, exported, command, arguments, message):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "x.npz", features=np.ones((2, 8), np.float32))
    (tmp_path / "list.txt").write_text("none.png")
    paths = {
        "list": tmp_path / "list.txt",
        "photos": photos,
        "empty": tmp_path / "empty",
        "features": tmp_path / "x.npz",
    }
    with pytest.raises(SystemExit, match=message):
        run(command, exported, *arguments.format(**paths).split())


def test_two_entries_of_one_name_are_refused(photos, exported):
    write_images(photos, ["Ann.png"], [colour_of(0, 0)])
    with pytest.raises(ValueError, match=r"The gallery .*photos has two entries Ann: Ann and Ann\.png"):
        recognition.enroll(recognition.Recognizer(exported), photos)


def test_a_model_that_is_not_there_is_named(photos, tmp_path):
    for model in (tmp_path / "nowhere", photos):
        with pytest.raises(SystemExit, match=rf"There is no exported model {model}, with a model\.json beside it"):
            run(verify_faces, model, photos / "Ann", photos / "Bo")


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {"names": a["names"][:-1]},
        lambda a: a | {"names": np.append(a["names"], "Dee")},
        lambda a: a | {"names": np.stack([a["names"]] * 2, 1)},
        lambda a: a | {"features": a["features"][:, :4]},
        lambda a: a | {"model": np.repeat(a["model"], 2)},
    ],
    ids=["fewer names", "more names", "two names each", "another size", "two models"],
)
def test_a_gallery_that_does_not_fit_is_refused(photos, tmp_path, exported, change):
    run(enroll, exported, photos, "--output", tmp_path / "x.npz")
    save_features(tmp_path / "x.npz", change(load_features(tmp_path / "x.npz")))
    with pytest.raises(SystemExit, match=r"x\.npz is no gallery of this model: .* should be"):
        run(identify_faces, exported, tmp_path / "x.npz", photos / "Ann")


@pytest.mark.parametrize("factor", [1e-30, 1, 1e30])
def test_a_gallery_of_any_length_identifies_alike(photos, tmp_path, exported, factor, capsys):
    run(enroll, exported, photos, "--output", tmp_path / "x.npz")
    arrays = load_features(tmp_path / "x.npz")
    save_features(tmp_path / "x.npz", arrays | {"features": arrays["features"] * np.float32(factor)})
    capsys.readouterr()
    run(identify_faces, exported, tmp_path / "x.npz", photos / "Bo", "--top", 1)
    assert "1.0000  Bo" in capsys.readouterr().out
