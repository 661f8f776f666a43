"""Writes the glyph data set of the repository as records for train.py.

python examples/2_data/glyphs_to_records.py build/glyphs    # build/glyphs/{train,test}/train.rec
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cosface_recipes.data.glyphs import load_glyphs, write_records

HANGUL = Path(__file__).parents[1] / "demo" / "data" / "hangul"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write")
    folder = parser.parse_args(argv).folder
    for split in ("train", "test"):
        images = load_glyphs(split, HANGUL)
        write_records(images, folder / split)
        print(f"{folder / split}: {len(images):,} images of {len(images.identities):,} identities")


if __name__ == "__main__":
    main()
