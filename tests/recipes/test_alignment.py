"""Faces cut out by landmarks: the transform, and where pixels arrive."""

import numpy as np
import pytest
from PIL import Image

from cosface_recipes.data.alignment import LANDMARKS, align, similarity_transform


def test_a_similarity_is_found_again():
    angle, scale = np.deg2rad(25), 1.7
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found = similarity_transform(LANDMARKS, LANDMARKS @ rotation.T + [3, -8])
    np.testing.assert_allclose(found, np.column_stack([rotation, [3, -8]]), rtol=1e-10)


def test_a_mirror_image_is_not_reflected_back():
    found = similarity_transform(LANDMARKS, LANDMARKS * [-1, 1])
    assert np.linalg.det(found[:, :2]) > 0


def test_the_least_squares_have_no_better_neighbour():
    random = np.random.default_rng(0)
    target = LANDMARKS * 0.6 + random.normal(0, 4, (5, 2))

    def error(a, b, x, y):
        return np.square(LANDMARKS @ np.array([[a, b], [-b, a]]) + [x, y] - target).sum()

    found = similarity_transform(LANDMARKS, target)
    best = (found[0, 0], found[1, 0], *found[:, 2])
    for step in np.concatenate([np.eye(4), -np.eye(4)]) * 1e-3:
        assert error(*best) < error(*(best + step))


def test_landmarks_arrive_where_they_belong():
    """A white spot around each landmark of a photograph twice as large and turned by a right angle."""
    landmarks = (LANDMARKS * 2)[:, ::-1] * [1, -1] + [10, 260]
    y, x = np.mgrid[:300, :300]
    spots = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / 50) for a, b in landmarks)
    face = np.asarray(align(Image.fromarray((255 * spots).clip(max=255).astype(np.uint8)), landmarks)).astype(
        float
    )
    assert face.shape == (112, 112)
    y, x = np.mgrid[:112, :112]
    for a, b in LANDMARKS:
        weight = face * ((x - a) ** 2 + (y - b) ** 2 < 64)
        assert (weight * x).sum() / weight.sum() == pytest.approx(a, abs=0.1)
        assert (weight * y).sum() / weight.sum() == pytest.approx(b, abs=0.1)
    outside = align(Image.new("L", (300, 300), 255), landmarks + np.array([400, 0]))
    assert np.asarray(outside).max() == 0


POSES = {  # landmarks of a photograph, and the crop's width of insightface's estimate over that of the reverse one
    "near-frontal": ([[110, 140], [182, 138], [147, 180], [117, 222], [176, 221]], 0.9999),
    "three-quarter": ([[120, 140], [165, 142], [170, 180], [122, 222], [160, 224]], 0.8923),
    "profile": ([[150, 140], [162, 141], [196, 178], [152, 222], [164, 222]], 0.6332),
}


@pytest.mark.parametrize("size", [112, 96])
@pytest.mark.parametrize("pose", POSES)
def test_a_crop_is_the_inverse_of_the_estimate_from_photograph_to_template(pose, size):
    """Photographs whose grey values are their coordinates; the estimate by the normal equations."""
    landmarks, narrower = np.array(POSES[pose][0], float), POSES[pose][1]
    x, y = landmarks.T
    one, zero = np.ones(5), np.zeros(5)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    a, b, *shift = np.linalg.lstsq(rows, (LANDMARKS * size / 112).T.ravel(), rcond=None)[0]
    result = np.mgrid[:size, :size][::-1].reshape(2, -1)  # x, y
    expected = np.linalg.solve([[a, -b], [b, a]], result - np.array(shift)[:, None])  # in the photograph
    photograph = np.mgrid[:400, :400][::-1].astype(np.float32)
    found = [np.asarray(align(Image.fromarray(axis), landmarks, size)).ravel() for axis in photograph]
    inside = ((expected >= 1) & (expected <= 398)).all(0)
    assert inside.mean() > 0.7
    np.testing.assert_allclose(np.array(found)[:, inside], expected[:, inside], atol=1e-2)
    reverse = similarity_transform(LANDMARKS * size / 112, landmarks)
    assert np.linalg.norm(reverse[:, 0]) * np.hypot(a, b) == pytest.approx(narrower, abs=1e-4)
