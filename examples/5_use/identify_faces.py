"""Whose image is this? Compares probes with a gallery of known identities.

    python examples/5_use/identify.py build/run gallery/ probe.jpg [more.jpg ...] --top 3

The gallery has a sub-folder of images per identity, or an image per identity, named after it. The best cosines
are printed, and marked where they pass the threshold that the evaluation chose. That threshold holds for one pair:
against a gallery of N identities a stranger passes about N times as often.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cosface_recipes.recognition import Recognizer, enroll


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="output folder of a training, or its .onnx or .safetensors file")
    parser.add_argument("gallery", type=Path, help="folder of known identities")
    parser.add_argument("probes", type=Path, nargs="+", help="images, or folders of one identity each")
    parser.add_argument("--top", type=int, default=5, help="identities to show (default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="least cosine of the same identity (default: the model's)")
    args = parser.parse_args(argv)
    try:
        recognizer = Recognizer(args.model)
        names, gallery = enroll(recognizer, args.gallery)
        probes = torch.stack([recognizer.identity(path) for path in args.probes])
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    threshold = args.threshold if args.threshold is not None else recognizer.description.threshold
    best = (probes @ gallery.T).topk(min(args.top, len(names)))  # (probes, top)
    for path, cosines, rows in zip(args.probes, best.values.tolist(), best.indices.tolist(), strict=True):
        print(path)
        for cosine, row in zip(cosines, rows, strict=True):
            mark = "*" if threshold is not None and cosine > threshold else " "
            print(f"  {mark} {cosine:.4f}  {names[row]}")
    if threshold is not None:
        print(f"* above the threshold {threshold:.4f}")


if __name__ == "__main__":
    main()
