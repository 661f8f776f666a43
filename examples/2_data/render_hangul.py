"""Render Hangul syllables in every distinct installed font: 10,000 identities to train on, 1,000 others to test.

    apt-get install fonts-nanum fonts-nanum-extra fonts-nanum-eco fonts-noto-cjk fonts-naver-d2coding
    python examples/2_data/render_hangul.py --output build/hangul      # build/hangul/{train,test}/train.rec
    python examples/2_data/render_hangul.py --output build/hangul --format folders --fonts FOLDER [FOLDER ...]

The identities are drawn from all 11,172 syllables. A character map may promise glyphs that the font does not draw,
or name the wrong ones, so every font first draws a few hundred syllables. A font is left out if some of them are
blank or alike, if it draws them all as a font before it, or if they do not look like the same syllables of the
other fonts. Weights and variants of a design are one family, and a family is in one split: no syllable and no
family of the test is in training.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image
from tqdm import tqdm

from cosface_recipes.data.fonts import SYSTEM_FOLDERS, each_face, render, usable
from cosface_recipes.data.glyphs import png, quantise
from cosface_recipes.data.recordio import RecordWriter

SYLLABLES = "".join(map(chr, range(0xAC00, 0xD7A4)))  # all 19 x 21 x 28
PROBES = SYLLABLES[::43]  # 43 is prime to 28 and 21: every initial, vowel and final occurs
LEVELS = 16  # greys of a pixel
AGREEMENT = 0.7  # handwriting reaches 0.84 and 0.89, printing 1.0; a font whose map is shuffled reached 0.58
STYLES = re.compile(
    r"(Extra|Ultra|Semi|Demi)?(Thin|Light|Bold|Black)|Regular|Medium|Eco|Yet ?Hangul|Round|Mono\b|_ac"
    r"|\b(JP|KR|SC|TC|HK)\b|ligature|Script",
    re.IGNORECASE,
)
# Designs derived from another under a name of their own.
DERIVED = {"D2Coding": "NanumBarunGothic", "NanumGothicCoding": "NanumGothic"}
TEST_FAMILIES = ("NanumBarunpen", "NanumMyeongjo", "NotoSansCJK")


@dataclass(frozen=True)
class Face:
    """One face of a font file."""

    path: Path
    index: int
    name: str  # PostScript name
    family: str  # the design


def family_of(name: str) -> str:
    """The design of a family name.

    >>> [family_of(name) for name in ("NanumGothic Eco ExtraBold", "NanumGothicCoding", "Noto Sans Mono CJK KR")]
    ['NanumGothic', 'NanumGothic', 'NotoSansCJK']
    """
    design = re.sub(r"\W", "", STYLES.sub("", name))
    return DERIVED.get(design, design)


def find_faces(folders: Iterable[str | Path], characters: str) -> list[Face]:
    """The faces whose character map has all the characters, one of each PostScript name."""
    wanted, found = set(map(ord, characters)), {}

    def take(path: Path, index: int, face: TTFont) -> None:
        if wanted <= set(face.getBestCmap() or ()):
            name, family = (face["name"].getDebugName(i) or path.stem for i in (6, 1))
            found.setdefault(name, Face(path, index, name, family_of(family)))

    each_face(folders, take)
    return list(found.values())


def draw(face: Face, characters: str, size: int) -> np.ndarray:
    """(n, size, size) uint8 of LEVELS greys."""
    return quantise(render(face.path, face.index, characters, size), LEVELS)


def distinct(candidates: Sequence[Face], probes: str, size: int, pool: ProcessPoolExecutor) -> list[Face]:
    """The faces that draw every probe, no two alike, not all of them as a face before, and the right ones."""
    kept: dict[bytes, tuple[Face, np.ndarray]] = {}
    n = len(candidates)
    drawn = pool.map(draw, candidates, [probes] * n, [size] * n)
    for face, glyphs in tqdm(zip(candidates, drawn, strict=True), "fonts", n, leave=False):
        bad = int((~usable(glyphs)).sum())
        if bad:
            say(f"{face.name} is left out: of {len(probes)} probes, {bad} are blank or like another.")
            continue
        twin, _ = kept.setdefault(glyphs.tobytes(), (face, glyphs))
        if twin is not face:
            say(f"{face.name} is left out: it draws as {twin.name}.")
    if len(kept) < 2:
        return [face for face, _ in kept.values()]
    fonts, glyphs = zip(*kept.values(), strict=True)
    agreed = agreement(np.stack(glyphs))
    for face, share in zip(fonts, agreed, strict=True):
        if share < AGREEMENT:
            say(f"{face.name} is left out: its glyphs are not those of the other fonts (agreement {share:.2f}).")
    return [face for face, share in zip(fonts, agreed, strict=True) if share >= AGREEMENT]


def agreement(glyphs: np.ndarray) -> np.ndarray:
    """How well each font's glyphs match the other fonts', from 0.5 by chance to 1.

    Args:
        glyphs: (fonts, n, size, size), none blank.

    Returns:
        (fonts,) mean share of the characters that a glyph resembles less than its own one. What is compared is the
        ink box shrunk to 8 x 8 pixels, less the font's mean glyph, and the mean of all other fonts.
    """
    shrunk = np.array([[ink_box(glyph) for glyph in font] for font in glyphs])  # (fonts, n, 64)
    shrunk = unit(shrunk - shrunk.mean(1, keepdims=True))
    total = shrunk.sum(0)
    shares = []
    for font in shrunk:
        cosine = font @ unit(total - font).T  # (n, n)
        shares.append((np.diag(cosine)[:, None] > cosine).sum(1).mean() / (len(font) - 1))
    return np.array(shares)


def ink_box(glyph: np.ndarray) -> np.ndarray:
    image = Image.fromarray(glyph)
    return np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR, image.getbbox()), np.float32).reshape(-1)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def images(face: Face, characters: str, size: int) -> list[bytes]:
    """PNG files of the characters; empty where a glyph is blank or like another."""
    glyphs = draw(face, characters, size)
    return [png(glyph) if good else b"" for glyph, good in zip(glyphs, usable(glyphs), strict=True)]


def split_syllables(characters: str, train: int, test: int, seed: int) -> dict[str, str]:
    """Disjoint random samples, each in code order."""
    if train + test > len(characters):
        raise ValueError(f"{train} + {test} identities are more than the {len(characters)} characters.")
    order = np.random.default_rng(seed).permutation(len(characters))
    chosen = {"train": order[:train], "test": order[train : train + test]}
    return {split: "".join(characters[i] for i in sorted(rows)) for split, rows in chosen.items()}


def write(
    folder: Path, form: str, faces: Sequence[Face], characters: str, size: int, pool: ProcessPoolExecutor
) -> int:
    """Render one split, and return its number of images; one file per image, or records in order of identity."""
    n = len(faces)
    drawn = pool.map(images, faces, [characters] * n, [size] * n)
    columns = list(tqdm(drawn, folder.name, n, unit="font"))  # one list of PNG files per face
    if form == "rec":
        with RecordWriter(folder, image_size=(size, size), num_classes=len(characters)) as writer:
            for label, row in enumerate(zip(*columns, strict=True)):
                for image in filter(None, row):
                    writer.write(image, label)
    else:
        for face, column in zip(faces, columns, strict=True):
            for character, image in zip(characters, column, strict=True):
                if image:
                    path = folder / f"{ord(character):04X}" / f"{face.name}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(image)
    return sum(bool(image) for column in columns for image in column)


def run(args: argparse.Namespace) -> dict[str, dict]:
    """Render both splits, and write manifest.json, which says what is in them."""
    splits = split_syllables(args.characters, args.train, args.test, args.seed)
    candidates = find_faces(args.fonts, args.characters)
    with ProcessPoolExecutor(args.processes) as pool:
        kept = distinct(candidates, args.probes or args.characters, args.size, pool)
        by_split = {
            "train": [face for face in kept if face.family not in args.test_families],
            "test": [face for face in kept if face.family in args.test_families],
        }
        for split, faces in by_split.items():
            if len(faces) < 2:
                raise ValueError(
                    f"{len(faces)} fonts are left for {split}, of the families "
                    f"{', '.join(sorted({face.family for face in kept})) or 'none'}; at least 2 are needed."
                )
        manifest = {}
        for split, faces in by_split.items():
            count = write(args.output / split, args.format, faces, splits[split], args.size, pool)
            names = {}
            for face in faces:
                names.setdefault(face.family, []).append(face.name)
            manifest[split] = {"images": count, "characters": splits[split], "families": names}
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    (args.output / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return manifest


def say(text: str) -> None:
    tqdm.write(text, file=sys.stdout)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)

    def option(name: str, help: str, **settings) -> None:
        parser.add_argument(name, help=f"{help} (default: %(default)s)", **settings)

    parser.add_argument(
        "--fonts", nargs="+", default=SYSTEM_FOLDERS, metavar="FOLDER", help="where to look for fonts"
    )
    parser.add_argument("--characters", default=SYLLABLES, help="the identities (default: all syllables)")
    parser.add_argument("--probes", default=PROBES, help="what a font must draw (default: every 43rd syllable)")
    option("--output", "folder", type=Path, default=Path("build/hangul"))
    option("--format", "record files, or folders of PNG files", choices=("rec", "folders"), default="rec")
    option("--size", "pixels of an image's side", type=int, default=32)
    option("--train", "identities to train on", type=int, default=10_000)
    option("--test", "other identities, to test on", type=int, default=1_000)
    option("--test-families", "designs to test on", nargs="+", default=TEST_FAMILIES, metavar="FAMILY")
    option("--seed", "of the choice of identities", type=int, default=0)
    option("--processes", "that draw", type=int, default=os.cpu_count())
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    try:
        manifest = run(parse_arguments(argv))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for split, part in manifest.items():
        fonts = sum(map(len, part["families"].values()))
        print(
            f"{split}: {part['images']:,} images of {len(part['characters']):,} identities, in {fonts} fonts of "
            f"{len(part['families'])} families: {', '.join(part['families'])}"
        )


if __name__ == "__main__":
    main()
