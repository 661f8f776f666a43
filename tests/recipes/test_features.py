"""Features on disk: what is saved comes back, and what cannot be read is named."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cosface_recipes import outputs
from cosface_recipes.evaluation.features import load_features, read_matrix, save_features, write_matrix


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_come_back_as_they_were_saved(tmp_path, suffix):
    arrays = {
        "features": np.arange(6, dtype=np.float32).reshape(3, 2)[::-1],
        "model": np.array(["0a"]),
        "labels": np.array([2, 0, 1]),
        "same": np.array([True, False]),
        "names": np.array(["a/1.png", "b", "é\u4e00"]),
    }
    save_features(tmp_path / "new" / f"x{suffix}", arrays)
    loaded = load_features(tmp_path / "new" / f"x{suffix}")
    assert set(loaded) == set(arrays)
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


@pytest.mark.parametrize("ending", ["{}.jpg_net.bin", "{}.bin", "an_odd_{}.jpg_net.bin"])
@pytest.mark.parametrize("outer", ["", "a_b/", "_/c/"])
@pytest.mark.parametrize("inner", ["Ann_Poe", "Ann_", "_", "Ann"])
def test_an_underscore_of_a_folder_begins_no_algorithm(tmp_path, ending, outer, inner):
    for k in range(2):
        (path := tmp_path / f"{outer}{inner}_{k}" / ending.format(k)).parent.mkdir(parents=True)
        write_matrix(path, np.float32([k, 1]))
    photo = ending.removesuffix("_net.bin").removesuffix(".bin")
    names = [f"{outer}{inner}_{k}/{photo.format(k)}" for k in range(2)]
    assert load_features(tmp_path)["names"].tolist() == names


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
        ("x.npz", lambda path: path.write_bytes(b"PK"), r"x\.npz cannot be read as features in \.npz: "),
        ("x.npz", lambda path: path.write_bytes(b""), r"x\.npz cannot be read as features in \.npz: "),
        ("x.npz", lambda path: np.save(path.open("wb"), np.ones((2, 2))), r"x\.npz cannot be read as features in"),
        ("x.npz", objects, r"x\.npz cannot be read as features in \.npz: Object arrays cannot be loaded"),
        ("x.npz", lambda path: np.savez(path, a=np.ones(2), b=1), r"named features; it has a, b"),
        (
            "x.npz",
            lambda path: np.savez(path, features=np.ones(2)),
            r"x\.npz must be an \(n, D\) array of numbers, got \(2,\) of float64",
        ),
        ("x.safetensors", lambda path: path.write_bytes(b"12345678"), r"x\.safetensors cannot be read as"),
        ("x", lambda path: path.mkdir(), r"The folder .*x has no \.bin file"),
    ],
)
def test_unreadable_features_are_named(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_features(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("x.npz", save_features),
        ("x.npz", lambda file, arrays: np.savez_compressed(file, **arrays)),
        ("x.safetensors", save_features),
    ],
    ids=["npz", "compressed npz", "safetensors"],
)
@pytest.mark.parametrize("seed", range(200))
def test_a_damaged_file_is_refused_by_its_name(tmp_path, name, save, seed):
    """Or what was damaged is of no array: a time, a place in the archive."""
    file, random = tmp_path / name, np.random.default_rng(seed)
    save(file, {"features": np.ones((4, 3), np.float32), "names": np.array([*"abcd"])})
    content = np.fromfile(file, np.uint8)
    places = random.integers(len(content), size=1 + seed % 4)
    content[places] = random.integers(256, size=len(places))
    content[: len(content) if seed % 3 else random.integers(len(content))].tofile(file)
    refused = ""
    try:
        loaded = load_features(file)
    except ValueError as error:
        refused = str(error)
    assert file.name in refused or loaded["features"].shape[1] == 3


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_that_cannot_be_written_are_an_error_of_the_file(tmp_path, suffix):
    (tmp_path / f"x{suffix}").mkdir()
    with pytest.raises(OSError, match=rf"x\{suffix}"):
        save_features(tmp_path / f"x{suffix}", {"features": np.ones((1, 2), np.float32)})


def test_an_unknown_kind_of_file_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"Features are saved as \.npz or \.safetensors, got .*x\.pkl"):
        save_features(tmp_path / "x.pkl", {})


@pytest.mark.parametrize("odd", [{"when": np.array(["2020-01-01"], "M8[D]")}, {"names": np.array([b"a"])}])
def test_a_dtype_that_safetensors_lacks_is_an_error_of_the_file(tmp_path, odd):
    arrays = {"features": np.ones((1, 2), np.float32)}
    with pytest.raises(OSError, match=r"x\.safetensors could not be written: .*(datetime64|bytes)"):
        save_features(tmp_path / "x.safetensors", arrays | odd)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_text_in_bytes_is_text(tmp_path, suffix):
    names = ["Ann/1.png", "\u00e9"]
    encoded = np.array([name.encode() for name in names])
    np.savez(tmp_path / "x.npz", features=np.ones((2, 2)), names=encoded)
    save_features(tmp_path / f"y{suffix}", load_features(tmp_path / "x.npz"))
    assert load_features(tmp_path / f"y{suffix}")["names"].tolist() == names
    np.savez(tmp_path / "x.npz", features=np.ones((2, 2)), names=np.array([b"a", b"\xff"]))
    with pytest.raises(ValueError, match=r"x\.npz cannot be read as features in \.npz: 'utf-8' codec"):
        load_features(tmp_path / "x.npz")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8])
def test_features_of_any_precision_are_read(tmp_path, dtype):
    features = torch.tensor([[1.5, -2.0], [0.25, 3.0]]).to(dtype)
    save_file({"features": features, "labels": torch.arange(2)}, tmp_path / "x.safetensors")
    arrays = load_features(tmp_path / "x.safetensors")
    assert arrays["features"].dtype == (np.float64 if dtype == torch.float64 else np.float32)
    assert arrays["features"].tolist() == features.tolist()
    assert arrays["labels"].dtype == np.int64


def test_a_folder_without_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    outputs.check_output(tmp_path / "new" / "x.npz", [".npz"])
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))  # root may
    with pytest.raises(ValueError, match=rf"x\.npz cannot be written: .* no permission to write {tmp_path}\."):
        outputs.check_output(tmp_path / "new" / "x.npz", [".npz"])
