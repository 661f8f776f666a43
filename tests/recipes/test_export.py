"""An exported network comes back as it was."""

import json

import pytest
import torch

from cosface_recipes import export
from cosface_recipes.models import make_model


def description(**changes: object) -> export.Description:
    fields = {"model": "glyphnet", "color": "gray", "image_size": 32, "embedding_size": 8, "flip": False}
    return export.Description(**{**fields, "threshold": 0.5, "chosen_on": "some data", **changes})


def test_an_iresnet_comes_back_from_both_files(tmp_path):
    model = make_model("iresnet18", channels=3, image_size=32, embedding_size=8)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32))  # statistics of the norms
    about = description(model="iresnet18", color="rgb")
    assert export.export(model, about, tmp_path) < 1e-5
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = model.eval()(images)
    for file in (export.ONNX, export.WEIGHTS):
        embed, read = export.load(tmp_path / file)
        assert read == about
        assert (embed(images) - expected).norm() < 1e-5 * expected.norm()


def test_an_export_that_differs_is_refused(tmp_path, monkeypatch):
    model = make_model("glyphnet", channels=1, image_size=32, embedding_size=8)
    monkeypatch.setattr(export, "load_onnx", lambda file, _: lambda images: model(images).detach() * 1.001)
    with pytest.raises(
        RuntimeError, match=r"model\.onnx does not reproduce the embeddings: they differ by 1\.0e-03"
    ):
        export.export(model, description(), tmp_path)


@pytest.mark.parametrize("name", [export.WEIGHTS, export.DESCRIPTION, export.ONNX])
def test_an_export_that_cannot_be_written_is_an_error_of_the_file(tmp_path, name):
    (tmp_path / name).mkdir()
    model = make_model("glyphnet", channels=1, image_size=32, embedding_size=8)
    with pytest.raises(OSError, match=name.replace(".", r"\.")):
        export.export(model, description(), tmp_path)


def test_files_that_are_no_exported_model_are_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path)
    (tmp_path / export.DESCRIPTION).write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"model\.json does not describe an exported model"):
        export.load(tmp_path)
    model = make_model("glyphnet", channels=1, image_size=32, embedding_size=8)
    export.export(model, description(), tmp_path)
    (tmp_path / "model.bin").write_bytes(b"something")
    with pytest.raises(ValueError, match=r"is a folder, a \.safetensors or an \.onnx file, got .*model\.bin"):
        export.load(tmp_path / "model.bin")
    (tmp_path / export.WEIGHTS).write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold the weights of glyphnet"):
        export.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"color": "grey"}, r"color must be one of rgb, gray, got 'grey'"),
        ({"image_size": "32"}, r"image_size cannot be '32'"),
        ({"image_size": 0}, r"image_size cannot be 0"),
        ({"embedding_size": 9}, r"model\.\S+ (takes|does not hold)"),
        ({"flip": "no"}, r"flip cannot be 'no'"),
        ({"threshold": float("nan")}, r"threshold must be finite, got nan"),
        ({"threshold": "high"}, r"threshold cannot be 'high'"),
        ({"model": 3}, r"model cannot be 3"),
    ],
    ids=str,
)
def test_a_description_of_something_else_is_refused(tmp_path, shared, change, message):
    for file in (export.ONNX, export.WEIGHTS):
        (tmp_path / file).write_bytes((shared / file).read_bytes())
    fields = json.loads((shared / export.DESCRIPTION).read_text())
    (tmp_path / export.DESCRIPTION).write_text(json.dumps(fields | change))
    for file in (export.ONNX, export.WEIGHTS):
        with pytest.raises(ValueError, match=message):
            export.load(tmp_path / file)


def test_a_damaged_onnx_file_is_named(tmp_path, shared):
    (tmp_path / export.DESCRIPTION).write_text((shared / export.DESCRIPTION).read_text())
    (tmp_path / export.ONNX).write_bytes((shared / export.ONNX).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.onnx is no ONNX model that can be run"):
        export.load(tmp_path / export.ONNX)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    export.export(make_model("glyphnet", channels=1, image_size=32, embedding_size=8), description(), folder)
    return folder
