"""A glyph data set: one contact sheet (PNG) per font, and a manifest that says what is where."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from cosface_recipes.data.images import Images
from cosface_recipes.data.recordio import RecordWriter


def quantise(glyphs: np.ndarray, levels: int) -> np.ndarray:
    """Round 8-bit grey to `levels` evenly spaced greys, still in 0..255."""
    steps = levels - 1
    return (np.rint(glyphs / 255 * steps) * (255 // steps)).astype(np.uint8)


def write_sheet(path: Path, glyphs: np.ndarray, columns: int, levels: int) -> None:
    """Save glyphs (n, size, size), in 0..255, row by row; levels of 2, 4, 16 pack to 1, 2, 4 bits a pixel."""
    n, size, _ = glyphs.shape
    rows = -(-n // columns)
    cells = np.zeros((rows * columns, size, size), np.uint8)
    cells[:n] = glyphs // (255 // (levels - 1))
    grid = cells.reshape(rows, columns, size, size).swapaxes(1, 2).reshape(rows * size, columns * size)
    sheet = Image.fromarray(grid, mode="L")
    sheet = Image.frombytes("P", sheet.size, sheet.tobytes())
    sheet.putpalette([grey * 255 // (levels - 1) for grey in range(levels) for _ in "RGB"])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True, bits=(levels - 1).bit_length())


def read_sheet(path: Path, count: int, size: int, columns: int) -> np.ndarray:
    """The first `count` glyphs of a sheet, (count, size, size) uint8."""
    try:
        with Image.open(path) as sheet:
            grid = np.asarray(sheet.convert("L"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"The contact sheet {path} cannot be read: {error}.") from error
    rows = -(-count // columns)
    if grid.shape != (rows * size, columns * size):
        raise ValueError(
            f"The contact sheet {path} is {grid.shape[1]} x {grid.shape[0]} pixels, but {count} glyphs of "
            f"{size} pixels in {columns} columns take {columns * size} x {rows * size}."
        )
    cells = grid.reshape(rows, size, columns, size).swapaxes(1, 2).reshape(-1, size, size)
    return cells[:count]


def load_glyphs(split: str, folder: Path) -> Images:
    """Load "train" or "test": one identity per character, one image of it per font."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    part = manifest["splits"][split]
    characters = part["characters"]
    sheets = [
        read_sheet(folder / sheet["file"], len(characters), manifest["size"], manifest["columns"])
        for sheet in part["sheets"]
    ]
    pixels = torch.from_numpy(np.concatenate(sheets)).unsqueeze(1)  # (fonts * characters, 1, size, size)
    labels = torch.arange(len(characters)).repeat(len(sheets))
    return Images(pixels, labels, list(characters))


def png(glyph: np.ndarray) -> bytes:
    """A PNG file of a glyph (size, size) uint8."""
    file = io.BytesIO()
    Image.fromarray(glyph).save(file, "png")
    return file.getvalue()


def write_records(images: Images, folder: Path) -> None:
    """As train.rec, in order of identity."""
    height, width = images.pixels.shape[-2:]
    with RecordWriter(folder, image_size=(height, width), num_classes=len(images.identities)) as writer:
        for i in images.labels.argsort(stable=True).tolist():
            writer.write(png(images.pixels[i, 0].numpy()), int(images.labels[i]))
