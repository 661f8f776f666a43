"""Faces found in photographs by a detector that the user has, and cut out as ArcFace needs them.

A detector is a function of one photograph, an array (height, width, 3) uint8 in RGB, that returns the landmarks of
its largest face, (5, 2) x and y in pixels: both eyes, the tip of the nose, both corners of the mouth, in each case
the left one in the picture first. It returns None where there is no face.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cosface_recipes.data.alignment import LANDMARKS, align
from cosface_recipes.data.images import MODES, read_image

Detector = Callable[[np.ndarray], "np.ndarray | None"]


class NoFaceError(ValueError):
    """A photograph in which the detector finds no face, or landmarks of none; the message has its path."""


def load_detector(name: str) -> Detector:
    """A function by its name, "package.module:function"; modules of the current folder are found too.

    Raises:
        ValueError: there is no such function.

    >>> load_detector("numpy:nothing")
    Traceback (most recent call last):
        ...
    ValueError: The module numpy of the detector numpy:nothing has no function nothing.
    """
    module, _, function = name.partition(":")
    if not (function and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(
            f"A detector is named package:function, my_detector:five_points of my_detector.py, got {name!r}."
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's module ends with
        raise ValueError(f"The detector {name} cannot be imported: {type(error).__name__}: {error}.") from error
    if not callable(found):
        raise ValueError(f"The module {module} of the detector {name} has no function {function}.")
    return found


def read_face(path: Path, color: str, size: int, detector: Detector) -> Image.Image:
    """The largest face of a photograph, size x size pixels.

    Raises:
        NoFaceError: there is none, or `align` refuses its landmarks.
        CorruptSampleError: the photograph cannot be read.
        ValueError: the detector fails, or returns something else than five points.
    """
    photograph = read_image(path, "rgb")
    try:
        landmarks = detector(np.array(photograph))  # which it may write to
    except Exception as error:  # a function of the user's, or none that takes a photograph
        raise ValueError(f"The detector failed on {path}: {type(error).__name__}: {error}") from error
    if landmarks is None:
        raise NoFaceError(f"The detector finds no face in {path}.")
    points = np.asarray(landmarks, float)
    if points.shape != LANDMARKS.shape or not np.isfinite(points).all():
        raise ValueError(
            f"A detector must return (5, 2) finite numbers or None; of {path} it returned {landmarks!r}."
        )
    try:
        return align(photograph, points, size).convert(MODES[color])
    except ValueError as error:
        raise NoFaceError(f"The detector finds no face in {path}. {error}") from error
