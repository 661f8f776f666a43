"""Features on disk: named arrays in .npz or .safetensors, and MegaFace's folders of matrices."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cosface_recipes.data.images import visible_files
from cosface_recipes.outputs import safetensors_of

MATRIX = struct.Struct("<4i")  # rows, columns, bytes per row, type
FLOAT32 = 5  # OpenCV's CV_32F
TEXTS = "texts"  # in the metadata of .safetensors, which hold no text otherwise


def load_features(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays by name; of a folder of MegaFace's matrices `features`, `names` and, of sub-folders, `labels`.

    Raises:
        ValueError: the file is none of these or damaged, has no (n, D) array `features` of finite numbers, or has
            an array of neither numbers nor text.
    """
    path = Path(path)
    if path.is_dir():
        return _load_matrices(path)
    if path.suffix == ".safetensors":
        arrays = _load_safetensors(path)
    elif path.suffix == ".npz":
        arrays = _load_npz(path)
    else:
        raise ValueError(f"Features are a .npz or .safetensors file, or a folder of .bin matrices, got {path}.")
    if odd := [name for name, array in arrays.items() if array.dtype.kind not in "biufcU"]:
        raise ValueError(f"The array {odd[0]} of {path} is neither numbers nor text, but {arrays[odd[0]].dtype}.")
    if "features" not in arrays:
        raise ValueError(
            f"{path} should have an (n, D) array named features; it has {', '.join(arrays) or 'nothing'}."
        )
    return arrays | {"features": checked(arrays["features"], str(path))}


def checked(features: np.ndarray, source: str) -> np.ndarray:
    """(n, D) finite numbers in float32, or in float64 if they are.

    Raises:
        ValueError: they are something else, or there are none.
    """
    if features.ndim != 2 or features.size == 0 or features.dtype.kind not in "fiu":
        raise ValueError(
            f"The features of {source} must be an (n, D) array of numbers, got {features.shape} of "
            f"{features.dtype}."
        )
    if features.dtype != np.float64:
        features = features.astype(np.float32, copy=False)
    if not (finite := np.isfinite(features).all(1)).all():
        raise ValueError(f"Embedding {finite.argmin()} of {len(features)} of {source} is not finite.")
    return features


@contextmanager
def reading(path: Path, kind: str) -> Iterator[BinaryIO]:
    """A file that another project's code reads. What that raises of a damaged one becomes a ValueError."""
    with open(path, "rb") as file:
        try:
            yield file
        # Of zipfile, zlib, numpy's header, which is Python, SciPy and json it may be any class.
        except Exception as error:
            about = str(error) or type(error).__name__
            raise ValueError(f"{path} cannot be read as {kind}: {about}") from error


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    with reading(path, "features in .npz") as file, zipfile.ZipFile(file) as archive:
        arrays = {}
        for name in archive.namelist():
            with archive.open(name) as member:  # np.load takes a member without numpy's header for bytes
                array = np.lib.format.read_array(member, allow_pickle=False)
            text = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
            arrays[name.removesuffix(".npy")] = text
        return arrays


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with reading(path, "features in .safetensors"), safe_open(path, "pt") as file:  # numpy has no bfloat16
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        narrow = {name for name, x in tensors.items() if x.is_floating_point() and x.itemsize < 4}
        arrays = {name: (x.float() if name in narrow else x).numpy() for name, x in tensors.items()}
        texts = json.loads((file.metadata() or {}).get(TEXTS, "{}"))
        return arrays | {name: np.array(lines, np.str_) for name, lines in texts.items()}


def save_features(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write .npz or .safetensors, in whose metadata arrays of text are lists in JSON.

    Raises:
        OSError: the file cannot be written, or is to be .safetensors and has no such dtype.
        ValueError: it ends otherwise.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        texts = {name: array.tolist() for name, array in arrays.items() if array.dtype.kind == "U"}
        numbers = {name: np.ascontiguousarray(array) for name, array in arrays.items() if name not in texts}
        with safetensors_of(path):
            save_file(numbers, path, {TEXTS: json.dumps(texts)} if texts else None)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        raise ValueError(f"Features are saved as .npz or .safetensors, got {path}.")


def read_matrix(path: str | Path) -> np.ndarray:
    """A column of float32, as MegaFace's development kit has it: int32 D, 1, 4, 5, then D numbers."""
    data = Path(path).read_bytes()
    if len(data) < MATRIX.size:
        raise ValueError(f"The matrix {path} has {len(data)} bytes, and its header alone takes {MATRIX.size}.")
    rows, columns, step, kind = MATRIX.unpack_from(data)
    if (columns, step, kind) != (1, 4, FLOAT32) or MATRIX.size + 4 * rows != len(data):
        raise ValueError(
            f"The matrix {path} of {len(data)} bytes should begin with its length, then 1, 4, 5 for a column of "
            f"float32; it begins with {rows}, {columns}, {step}, {kind}."
        )
    return np.frombuffer(data, "<f4", offset=MATRIX.size)


def write_matrix(path: str | Path, column: np.ndarray) -> None:
    Path(path).write_bytes(MATRIX.pack(len(column), 1, 4, FLOAT32) + np.asarray(column, "<f4").tobytes())


def _load_matrices(folder: Path) -> dict[str, np.ndarray]:
    """folder/.../identity/photo.jpg_algorithm.bin, or photo.bin; the innermost folder is the identity.

    No matrix has a label if one lies in no sub-folder, as distractors may.
    """
    paths = [path for path in visible_files(folder) if path.suffix == ".bin"]
    if not paths:
        raise ValueError(f"The folder {folder} has no .bin file.")
    first = read_matrix(paths[0])
    features = np.empty((len(paths), len(first)), np.float32)
    for row, path in zip(features, paths, strict=True):
        column = read_matrix(path)
        if len(column) != len(first):
            raise ValueError(f"The matrix {path} has {len(column)} numbers, and {paths[0]} has {len(first)}.")
        row[:] = column
    parents = [path.parent for path in paths]
    photos = [path.with_name(path.stem.rpartition("_")[0] or path.stem) for path in paths]
    names = [photo.relative_to(folder).as_posix() for photo in photos]
    arrays = {"features": features, "names": np.array(names)}
    if folder in parents:
        return arrays
    return arrays | {"labels": np.unique([*map(str, parents)], return_inverse=True)[1]}
