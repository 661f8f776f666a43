"""Whose image is this? Compares probes with a gallery of known identities.

    python examples/5_use/identify_faces.py build/run gallery/ probe.jpg [more.jpg ...] --top 3
    python examples/5_use/identify_faces.py build/run gallery.npz probe.jpg

The gallery has a sub-folder of images per identity, or an image per identity, named after it; or it is what
enroll.py saved of such a folder. The best cosines are printed, and marked where they pass the threshold that the
evaluation chose. That threshold holds for one pair: against a gallery of N identities a stranger passes about N
times as often.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cosface_kernels import nearest_classes
from cosface_recipes.outputs import print_any_name
from cosface_recipes.recognition import add_options, cosine, open_gallery, open_recognizer


def main(argv: Sequence[str] | None = None) -> None:
    print_any_name()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("gallery", type=Path, help="folder of known identities, or a file that enroll.py wrote")
    parser.add_argument("probes", type=Path, nargs="+", help="images, or folders of one identity each")
    parser.add_argument("--top", type=int, default=5, help="identities to show (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=cosine, help="least cosine of the same identity (default: the model's)"
    )
    args = parser.parse_args(argv)
    try:
        if args.top < 1:
            raise ValueError(f"--top must be at least 1, got {args.top}.")
        recognizer = open_recognizer(args)
        gallery = open_gallery(recognizer, args.gallery)
        probes = {path: recognizer.identity(path) for path in args.probes}
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    threshold = args.threshold if args.threshold is not None else recognizer.description.threshold
    for path, probe in probes.items():
        if probe is None:
            continue
        (cosines,), (rows,) = nearest_classes(probe[None], gallery.embeddings, min(args.top, len(gallery.names)))
        print(path)
        for similarity, row in zip(cosines.tolist(), rows.tolist(), strict=True):
            mark = "*" if threshold is not None and similarity > threshold else " "
            print(f"  {mark} {similarity:.4f}  {gallery.names[row]}")
    if recognizer.left_out:
        print(recognizer.report())
    if threshold is None:
        print("No mark: the model was exported without a threshold; --threshold gives one.")
    else:
        print(f"* above the threshold {threshold:.4f}")
    if all(probe is None for probe in probes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
