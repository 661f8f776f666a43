"""What the tests of evaluation share: small images, features of known angles, the command."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from cosface_recipes.data.alignment import LANDMARKS


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encoded(colour: tuple[int, int, int], size: int = 8) -> bytes:
    return png(np.full((size, size, 3), colour, np.uint8))


def colour_of(identity: int, photo: int) -> tuple[int, int, int]:
    """Identities differ in hue, photos a little in brightness."""
    angle = identity * 2.4
    return tuple(int(128 + (90 + photo) * np.cos(angle + turn)) for turn in (0, 2.1, 4.2))


def write_images(folder: Path, names: list[str], colours: list[tuple[int, int, int]]) -> None:
    for name, colour in zip(names, colours, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(colour))


def expected_feature(colour: tuple[int, int, int]) -> np.ndarray:
    return 2 * (np.array(colour) - 127.5) / 127.5


def write_ijb(folder: Path, images: list[tuple[int, int, float]], pairs: list[tuple[int, int, int]]) -> None:
    """Photographs of 112 pixels that need no alignment; (template, medium, score) each."""
    (folder / "meta").mkdir(parents=True)
    points = " ".join(map(str, LANDMARKS.ravel()))
    names = [f"{i + 1}.png" for i in range(len(images))]
    faces = [f"{name} {template} {medium}" for name, (template, medium, _) in zip(names, images, strict=True)]
    scores = [f"{name} {points} {score}" for name, (_, _, score) in zip(names, images, strict=True)]
    (folder / "meta" / "ijbb_face_tid_mid.txt").write_text("\n".join(faces) + "\n")
    (folder / "meta" / "ijbb_name_5pts_score.txt").write_text("\n".join(scores) + "\n")
    (folder / "meta" / "ijbb_template_pair_label.txt").write_text("".join(f"{a} {b} {c}\n" for a, b, c in pairs))


def printed(capsys) -> dict[str, str]:
    return dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())


def identity_features(identities: int, photos: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(identities, 16))
    labels = np.repeat(np.arange(identities), photos)
    return (centres[labels] + 0.3 * random.normal(size=(len(labels), 16))).astype(np.float32), labels


def directions(*degrees: float, length: float = 1.0) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return (length * np.stack([np.cos(angles), np.sin(angles)], 1)).astype(np.float32)


def evaluate(*arguments: object) -> None:
    """evaluate_protocol.py, whose folder only the tests of recipes have on their path."""
    import evaluate_protocol

    evaluate_protocol.main([*map(str, arguments)])
