"""Render the glyph data set: the syllables of the Korean standard KS X 1001 in the fonts of demo/data/fonts.json.

    python examples/2_data/render_glyphs.py                             # fonts installed on this system
    python examples/2_data/render_glyphs.py --fonts FOLDER [FOLDER ...] # fonts below these folders

A character map may promise glyphs that the font does not draw. A character is kept only if every font draws
it, not blank, and unlike every other character of that font; a font that draws as another one does is
refused. So is a font that is not under the SIL Open Font License: either its own name table must name the
licence, or the copyright notice of its licence file beside it must name the font's family.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import features

from cosface_recipes.data.fonts import SYSTEM_FOLDERS, each_face, render, usable
from cosface_recipes.data.glyphs import quantise, write_sheet

DATA = Path(__file__).parents[1] / "demo" / "data"
COLUMNS = 50
TEST_EVERY = 4  # of the accepted characters, in code order, every fourth is for the test


@dataclass(frozen=True)
class Font:
    """One face of a font file, and what its name table says."""

    path: Path
    index: int
    name: str  # PostScript name
    version: str
    licence: str
    characters: frozenset[int]


def find_fonts(folders: Sequence[str | Path], wanted: set[str]) -> dict[str, Font]:
    """The wanted faces, by PostScript name, below the folders; the first one found of a name counts."""
    found: dict[str, Font] = {}

    def take(path: Path, index: int, face: TTFont) -> None:
        name = face["name"].getDebugName(6)
        if name in wanted and name not in found:
            found[name] = read_font(path, index, face)

    each_face(folders, take)
    return found


def read_font(path: Path, index: int, face: TTFont) -> Font:
    text = {i: face["name"].getDebugName(i) or "" for i in (0, 5, 6, 13, 14)}
    licence = " ".join(" ".join(text[i] for i in (0, 13, 14)).split())
    return Font(path, index, text[6], text[5], licence, frozenset(face.getBestCmap() or ()))


def check_licence(font: Font, family: str, licence_file: Path) -> None:
    """Raise ValueError unless the font itself, or the notice of its licence file, puts it under the OFL."""
    notice, _, terms = licence_file.read_text(encoding="utf-8").partition("SIL OPEN FONT LICENSE")
    if not terms:
        raise ValueError(f"The licence file {licence_file} does not contain the SIL Open Font License.")
    declared = re.search(r"open font licen[sc]e|scripts\.sil\.org/ofl", font.licence, re.IGNORECASE)
    if not declared and family not in notice:
        raise ValueError(
            f"The font {font.name} ({font.path}) does not declare the SIL Open Font License, and "
            f"{licence_file} does not name its family {family}; its licence field says {font.licence!r}."
        )


def ksx1001_syllables() -> str:
    """The 2,350 Hangul syllables of KS X 1001, in code order: the ones that Korean text uses."""
    syllables = map(chr, range(0xAC00, 0xD7A4))
    return "".join(syllable for syllable in syllables if len(syllable.encode("euc_kr", "ignore")) == 2)


def render_data_set(
    families: list[dict], fonts: dict[str, Font], characters: str, output: Path, size: int, levels: int
) -> dict:
    """Render every font, keep the characters that are good in all of them, write sheets and manifest."""
    names = [name for family in families for name in family["fonts"]]
    missing = [name for name in names if name not in fonts]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} fonts were not found: {', '.join(missing)}. Install the "
            "packages named in examples/README.md, or pass the folder that holds them with --fonts."
        )
    glyphs: dict[str, np.ndarray] = {}
    good = np.ones(len(characters), bool)
    seen: dict[bytes, str] = {}
    for name in names:
        font = fonts[name]
        glyphs[name] = quantise(render(font.path, font.index, characters, size), levels)
        good &= usable(glyphs[name]) & [ord(character) in font.characters for character in characters]
        twin = seen.setdefault(glyphs[name].tobytes(), name)
        if twin != name:
            raise ValueError(f"The fonts {twin} and {name} draw the same glyphs; leave one of them out.")
    kept = np.flatnonzero(good)
    if len(kept) < TEST_EVERY:
        raise ValueError(f"Only {len(kept)} of {len(characters)} characters are usable in every font.")
    for_test = np.arange(len(kept)) % TEST_EVERY == TEST_EVERY - 1
    splits = {}
    for split, chosen in (("train", kept[~for_test]), ("test", kept[for_test])):
        sheets = []
        for family in families:
            for name in family["fonts"] if family["split"] == split else ():
                file = f"{split}/{name}.png"
                write_sheet(output / file, glyphs[name][chosen], COLUMNS, levels)
                sheets.append(
                    {
                        "file": file,
                        "family": family["family"],
                        "font": name,
                        "version": fonts[name].version,
                        "licence": family["licence"],
                    }
                )
        splits[split] = {"characters": "".join(characters[i] for i in chosen), "sheets": sheets}
    manifest = {
        "size": size,
        "levels": levels,
        "columns": COLUMNS,
        "rendered_with": f"Pillow {features.version('pil')}, FreeType {features.version('freetype2')}",
        "rejected": "".join(characters[i] for i in np.flatnonzero(~good)),
        "splits": splits,
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    (output / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return manifest


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--fonts", nargs="+", default=SYSTEM_FOLDERS, metavar="FOLDER", help="where to look for fonts"
    )
    parser.add_argument(
        "--selection",
        type=Path,
        default=DATA / "fonts.json",
        help="families, their fonts by PostScript name, their split and licence (default: %(default)s)",
    )
    parser.add_argument(
        "--characters",
        default=ksx1001_syllables(),
        help="characters to render (default: KS X 1001 syllables)",
    )
    parser.add_argument("--size", type=int, default=32, help="pixels of a cell's side (default: %(default)s)")
    parser.add_argument(
        "--levels", type=int, default=4, choices=(2, 4, 16, 256), help="grey levels (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=DATA / "hangul", help="folder (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        families = json.loads(args.selection.read_text(encoding="utf-8"))["families"]
        fonts = find_fonts(args.fonts, {name for family in families for name in family["fonts"]})
        for family in families:
            for name in family["fonts"]:
                if name in fonts:
                    check_licence(fonts[name], family["family"], args.selection.parent / family["licence"])
        manifest = render_data_set(families, fonts, args.characters, args.output, args.size, args.levels)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for split, part in manifest["splits"].items():
        print(f"{split}: {len(part['characters'])} characters in {len(part['sheets'])} fonts")
    print(f"rejected: {len(manifest['rejected'])} characters {manifest['rejected']}")


if __name__ == "__main__":
    main()
