"""Characters drawn with the fonts of this system, as images of identities."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTCollection, TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

SYSTEM_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)
SUPERSAMPLING = 4  # glyphs are drawn 4 x larger and averaged, so that hinting plays no part


def each_face(folders: Iterable[str | Path], take: Callable[[Path, int, TTFont], None]) -> None:
    """Calls `take` with every face of the fonts below the folders: its file, its number there, and itself."""
    for folder in folders:
        for path in sorted(Path(folder).expanduser().rglob("*")):
            if path.suffix.lower() not in {".ttf", ".otf", ".ttc", ".otc"}:
                continue
            try:
                for index, face in enumerate(faces(path)):
                    take(path, index, face)
            except (TTLibError, OSError) as error:
                print(f"{path} is skipped, it cannot be read: {error}", file=sys.stderr)


def faces(path: Path) -> Iterator[TTFont]:
    """The faces of a font file or of a collection, in order."""
    if path.suffix.lower() in {".ttc", ".otc"}:
        with TTCollection(path, lazy=True) as collection:
            yield from collection.fonts
    else:
        with TTFont(path, lazy=True) as font:
            yield font


def render(path: Path, index: int, characters: Sequence[str], size: int) -> np.ndarray:
    """Draw characters white on black, (n, size, size) uint8.

    One scale and one offset per font: the largest ink box of all the characters fills the cell but for a
    margin of one pixel, so that every character keeps its place and its size relative to the others.
    """
    cell = size * SUPERSAMPLING
    room = (size - 2) * SUPERSAMPLING
    ruler = load_face(path, index, 10 * size)
    boxes = np.array([ruler.getbbox(character, anchor="ls") for character in characters])
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    scale = room / max(1, (high - low).max())
    face = load_face(path, index, int(10 * size * scale))
    x, y = (int(v) for v in np.rint(cell / 2 - (low + high) / 2 * scale))
    glyphs = np.empty((len(characters), size, size), np.uint8)
    for glyph, character in zip(glyphs, characters, strict=True):
        canvas = Image.new("L", (cell, cell))
        ImageDraw.Draw(canvas).text((x, y), character, fill=255, font=face, anchor="ls")
        glyph[:] = np.asarray(canvas.reduce(SUPERSAMPLING))
    return glyphs


def load_face(path: Path, index: int, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), pixels, index=index, layout_engine=ImageFont.Layout.BASIC)


def usable(glyphs: np.ndarray) -> np.ndarray:
    """(n,) bool: glyphs that are not blank and that no other glyph equals."""
    _, inverse, counts = np.unique(
        glyphs.reshape(len(glyphs), -1), axis=0, return_inverse=True, return_counts=True
    )
    return (counts[inverse.reshape(-1)] == 1) & glyphs.any((1, 2))
