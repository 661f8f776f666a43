"""Faces cut out by landmarks: the transform, and where pixels arrive."""

import numpy as np
import pytest
from PIL import Image

from cosface_recipes.data.alignment import LANDMARKS, align, similarity_transform
from cosface_recipes.data.images import CorruptSampleError
from cosface_recipes.evaluation.collect import AlignedFaces


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


def test_what_is_outside_of_the_photograph_is_black():
    photograph, around = Image.new("L", (300, 300), 255), Image.new("L", (600, 300))
    around.paste(photograph)
    face, expected = (np.asarray(align(image, LANDMARKS * 2 + [180, 20])) for image in (photograph, around))
    assert (expected == 0).mean() > 0.4 < (expected == 255).mean()
    np.testing.assert_array_equal(face[face == expected], expected[face == expected])
    assert (face != expected).mean() < 0.02  # the photograph's last column


NOWHERE = {
    "one point": (np.full((5, 2), 7.0), r"they lie 0 pixels around their mean"),
    "nearly one point": ([[7, 7]] * 4 + [[7 + 1e-7, 7]], r"they lie \S*e-08 pixels around"),
    "fractions of the sides": (LANDMARKS / 112, r"they lie 0\.\d+ pixels around"),
    "too far apart": ((LANDMARKS - LANDMARKS[0]) * 1e6, r"they lie 2\.\d+e\+07 pixels around"),
    "beyond float64's squares": ((LANDMARKS - LANDMARKS[0]) * 1e200, r"they lie inf pixels around"),
    "outside": (LANDMARKS + 400, r"none lies in it"),
    "far outside": (LANDMARKS * 1e300, r"none lies in it"),
    "not finite": (LANDMARKS * np.nan, r"none lies in it"),
    "the nose alone": ([[0, 0], [0, 0], [60, 70], [0, 0], [0, 0]], r"they lie as no face's do"),
}


@pytest.mark.parametrize("case", NOWHERE)
@pytest.mark.filterwarnings("error")
def test_landmarks_of_no_face_are_refused(case):
    """Their crops would be of one colour, and all of one identity."""
    landmarks, reason = np.array(NOWHERE[case][0], float), NOWHERE[case][1]
    with pytest.raises(
        ValueError, match=rf"^The landmarks \[\[.*\]\] are of no face in 300 x 200 pixels: {reason}"
    ):
        align(Image.new("L", (300, 200), 255), landmarks)


def test_landmarks_of_no_face_are_named_with_their_image(tmp_path):
    """As IJB's come, of a file."""
    Image.new("RGB", (300, 200)).save(tmp_path / "0.png")
    faces = AlignedFaces([tmp_path / "0.png"], ["loose_crop/7.jpg"])
    faces.landmarks, faces.side = np.full((1, 5, 2), 7.0), 112
    with pytest.raises(
        CorruptSampleError,
        match=r"The sample loose_crop/7\.jpg cannot be read: The landmarks \[\[7\.0.* mean\. Mend it",
    ):
        faces[0]


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
