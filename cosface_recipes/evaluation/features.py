"""Features on disk: named arrays in .npz or .safetensors, and MegaFace's folders of matrices."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cosface_recipes.outputs import give_mode_of_open

MATRIX = struct.Struct("<4i")  # rows, columns, bytes per row, type
FLOAT32 = 5  # OpenCV's CV_32F
TEXTS = "texts"  # in the metadata of .safetensors, which hold no text otherwise


def load_features(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays by name; of a folder of MegaFace's matrices `features`, `labels` and `names`.

    Raises:
        ValueError: the file is none of these, or has no (n, D) array `features` of finite numbers.
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


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"The features {path} cannot be read: {error}") from error


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:  # numpy has no bfloat16
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            narrow = {name for name, x in tensors.items() if x.is_floating_point() and x.itemsize < 4}
            arrays = {name: (x.float() if name in narrow else x).numpy() for name, x in tensors.items()}
            texts = json.loads((file.metadata() or {}).get(TEXTS, "{}"))
            return arrays | {name: np.array(lines, np.str_) for name, lines in texts.items()}
    except (SafetensorError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"The features {path} cannot be read: {error}") from error


def save_features(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write .npz or .safetensors, in whose metadata arrays of text are lists in JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        texts = {name: array.tolist() for name, array in arrays.items() if array.dtype.kind == "U"}
        numbers = {name: np.ascontiguousarray(array) for name, array in arrays.items() if name not in texts}
        save_file(numbers, path, {TEXTS: json.dumps(texts)} if texts else None)
        give_mode_of_open(path)
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
    """folder/.../identity/photo.jpg_algorithm.bin; the innermost folder is the identity."""
    paths = sorted(folder.rglob("*.bin"))
    if not paths:
        raise ValueError(f"The folder {folder} has no .bin file.")
    first = read_matrix(paths[0])
    features = np.empty((len(paths), len(first)), np.float32)
    for row, path in zip(features, paths, strict=True):
        column = read_matrix(path)
        if len(column) != len(first):
            raise ValueError(f"The matrix {path} has {len(column)} numbers, and {paths[0]} has {len(first)}.")
        row[:] = column
    parents = [path.parent.as_posix() for path in paths]
    names = [path.relative_to(folder).as_posix().rpartition("_")[0] for path in paths]
    return {"features": features, "labels": np.unique(parents, return_inverse=True)[1], "names": np.array(names)}
