"""Photos to one file of features: for evaluate_protocol.py --features, identify_faces.py, or a program of yours.

    python examples/5_use/embed.py build/run photos/ --output photos.npz
    python examples/5_use/embed.py build/run list.txt --output list.npz --detector my_detector:five_points

Photos are images, folders of them, and .txt files with a path a line, from that file's folder. The output has

    features    (n, D) float32, not normalised; with that of the mirror image added, if the model was tested so
    names       (n,) paths, below the folder that was given, or as the list has them
    labels      (n,) the first folder of that path, if all photos have one: photos/alice/1.jpg is of alice
    model       (1,) a digest, which tells whether other features are of the same model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cosface_recipes.data.images import SUFFIXES, image_files
from cosface_recipes.data.names import below, identity
from cosface_recipes.evaluation.features import save_features
from cosface_recipes.outputs import check_output, print_any_name
from cosface_recipes.recognition import FILES, Recognizer, add_options, open_recognizer


def photos(path: Path) -> list[tuple[Path, str, str]]:
    """Of each photo of an argument: where it is, its name, and its label or ""."""
    if path.is_dir():
        names = {file: file.relative_to(path) for file in image_files(path)}
        if not names:
            raise ValueError(f"The folder {path} has no images.")
        return [
            (file, name.as_posix(), identity(name.parts[0]) if name.parts[1:] else "")
            for file, name in names.items()
        ]
    if path.suffix == ".txt":
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"The list {path} is empty.")
        return [(below(path.parent, line), line, "") for line in lines]
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"Photos are folders, .txt lists, or images ({' '.join(sorted(SUFFIXES))}), got {path}.")
    if not path.exists():
        raise FileNotFoundError(f"There is no photo {path}.")
    return [(path, path.as_posix(), "")]


def embed(recognizer: Recognizer, paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """The arrays of the file."""
    files, names, labels = zip(*(photo for path in paths for photo in photos(path)), strict=True)
    features, kept = recognizer.embeddings(files)
    if not kept:
        raise ValueError(f"None of the {len(files)} photos could be used.\n{recognizer.report()}")
    arrays = {"features": features.numpy(), "names": np.array(names)[kept], "model": np.array([recognizer.digest])}
    return arrays | ({"labels": np.array(labels)[kept]} if all(labels) else {})


def main(argv: Sequence[str] | None = None) -> None:
    print_any_name()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("photos", type=Path, nargs="+", help="images, folders of them, or .txt lists")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".npz or .safetensors")
    args = parser.parse_args(argv)
    try:
        check_output(args.output, FILES)
        recognizer = open_recognizer(args)
        arrays = embed(recognizer, args.photos)
        save_features(args.output, arrays)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    if recognizer.left_out:
        print(recognizer.report())
    n, size = arrays["features"].shape
    print(f"{args.output}: {n:,} photos, {size} numbers each", end="")
    print(f", of {len(np.unique(arrays['labels'])):,} identities" if "labels" in arrays else ", without labels")


if __name__ == "__main__":
    main()
