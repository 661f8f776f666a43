"""Known identities as a saved gallery for identify_faces.py: a name and an embedding each, and the model's digest.

    python examples/5_use/enroll.py build/run gallery/ --output gallery.npz

The gallery has a sub-folder of images per identity, or an image per identity, named after it. An identity's
embedding is the mean of its images' unit embeddings, normalised.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cosface_recipes.outputs import check_output, print_any_name
from cosface_recipes.recognition import FILES, add_options, enroll, open_recognizer


def main(argv: Sequence[str] | None = None) -> None:
    print_any_name()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("gallery", type=Path, help="folder of known identities")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".npz or .safetensors")
    args = parser.parse_args(argv)
    try:
        check_output(args.output, FILES)
        recognizer = open_recognizer(args)
        gallery = enroll(recognizer, args.gallery)
        gallery.save(args.output)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    if recognizer.left_out:
        print(recognizer.report())
    print(f"{args.output}: {len(gallery.names):,} identities")


if __name__ == "__main__":
    main()
