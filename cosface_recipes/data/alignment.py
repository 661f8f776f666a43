"""Faces cut out of photographs by five landmarks, as ArcFace's networks are trained on them."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Where both eyes, the tip of the nose and both corners of the mouth go, in 112 x 112 pixels (insightface,
# python-package/insightface/utils/face_align.py).
LANDMARKS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)

LEAST_SPREAD = 1.0  # pixels around their mean: a face of 4 x 4; coordinates from 0 to 1 are below
LEAST_FIT = 0.1  # of 1; a profile has 0.6, a mirror image 0.2


def align(image: Image.Image, landmarks: np.ndarray, size: int = 112) -> Image.Image:
    """Rotate, scale and shift a photograph so that its landmarks come nearest to ArcFace's; black outside.

    Nearest in the result's pixels, as insightface estimates it: the least squares in the photograph's pixels are
    another problem, and make the crop of a profile about a third narrower.

    Args:
        landmarks: (5, 2) x and y, in pixels; a pixel's centre has whole coordinates.
        size: pixels of the sides of the result.

    Raises:
        ValueError: the landmarks are of no face in this photograph: the crop would be of one colour, and all such
            crops of one identity.
    """
    target = LANDMARKS * size / 112
    with np.errstate(over="ignore", invalid="ignore"):
        spread = _spread(landmarks)
    if not ((landmarks >= -0.5) & (landmarks <= np.array(image.size) - 0.5)).all(1).any():
        raise _no_face(image, landmarks, "none lies in it")
    if not LEAST_SPREAD <= spread <= sum(image.size):
        raise _no_face(image, landmarks, f"they lie {spread:.3g} pixels around their mean")
    transform = similarity_transform(landmarks, target)
    if np.linalg.norm(transform[:, 0]) * spread < LEAST_FIT * _spread(target):
        raise _no_face(image, landmarks, "they lie as no face's do")
    matrix, shift = np.split(transform, [2], axis=1)
    inverse = np.linalg.inv(matrix)
    back = np.column_stack([inverse, -inverse @ shift])  # from the result to the photograph
    # Pillow's centres of pixels are half a pixel further.
    back[:, 2] += 0.5 - back[:, :2].sum(1) * 0.5
    return image.transform((size, size), Image.Transform.AFFINE, back.ravel().tolist(), Image.Resampling.BILINEAR)


def _spread(points: np.ndarray) -> float:
    return float(np.sqrt(points.var(0).sum()))


def _no_face(image: Image.Image, landmarks: np.ndarray, reason: str) -> ValueError:
    width, height = image.size
    return ValueError(
        f"The landmarks {landmarks.round(2).tolist()} are of no face in {width} x {height} pixels: {reason}."
    )


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift, without reflection, that bring points nearest to others in the least squares.

    Umeyama, TPAMI 13(4), 1991, equations 40 to 43.

    Args:
        source, target: (n, 2).

    Returns:
        (2, 3): target ~ source @ result[:, :2].T + result[:, 2].
    """
    mean_source, mean_target = source.mean(0), target.mean(0)
    centred = source - mean_source
    u, singular, vt = np.linalg.svd((target - mean_target).T @ centred / len(source))
    sign = np.array([1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = u * sign @ vt
    scale = (singular * sign).sum() / centred.var(0).sum()
    return np.column_stack([scale * rotation, mean_target - scale * rotation @ mean_source])
