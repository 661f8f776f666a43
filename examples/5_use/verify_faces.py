"""Are two images, or two folders of images, of the same identity?

    python examples/5_use/verify_faces.py build/run alice1.jpg alice2.jpg
    python examples/5_use/verify_faces.py build/run/model.onnx gallery/alice probes/unknown

Prints the cosine of the two embeddings, and the decision at the threshold that the evaluation chose for this
model. A folder is one identity: the mean of its images' unit embeddings. Images must be cut out and aligned as
those of the training were; --detector does that, with any detector of faces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cosface_recipes.outputs import print_any_name
from cosface_recipes.recognition import add_options, cosine, decision, open_recognizer


def main(argv: Sequence[str] | None = None) -> None:
    print_any_name()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("a", type=Path, help="an image, or a folder of one identity")
    parser.add_argument("b", type=Path, help="another one")
    parser.add_argument(
        "--threshold", type=cosine, help="least cosine of the same identity (default: the model's)"
    )
    args = parser.parse_args(argv)
    try:
        recognizer = open_recognizer(args)
        a, b = (recognizer.identity(path) for path in (args.a, args.b))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    if recognizer.left_out:
        print(recognizer.report())
    if a is None or b is None:
        sys.exit("no decision: there is no photo to compare")
    similarity = float(a @ b)
    print(f"cosine {similarity:.4f}")
    print(decision(similarity, args.threshold, recognizer.description))


if __name__ == "__main__":
    main()
